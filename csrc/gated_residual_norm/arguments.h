// Inputs of gated_residual_norm, checked against the contract in op.py and collapsed to rows, for the CPU and the GPU.
#pragma once

#include <optional>
#include <utility>

#include "../common/host/arguments.h"

namespace layersync {

// gate, shift and scale: (groups, D) of one dtype, row g serving the rows [g, g + 1)·M/groups of x.
struct Modulation {
  std::optional<Rows> gate, shift, scale;
  ScalarType dtype = ScalarType::Float;
  int64_t groups = 1;          // 1 where there is no modulation
  int64_t rows_per_group = 0;  // M/groups
};

inline Modulation modulation_inputs(const std::optional<Tensor>& gate, const std::optional<Tensor>& shift,
                                    const std::optional<Tensor>& scale, const Rows& x, ScalarType dtype) {
  Modulation modulation{as_rows(gate), as_rows(shift), as_rows(scale)};
  bool first = true;
  using Named = std::pair<const char*, const std::optional<Tensor>*>;
  for (const auto& [name, tensor] : {Named{"gate", &gate}, Named{"shift", &shift}, Named{"scale", &scale}}) {
    if (!tensor->has_value()) continue;
    const Tensor& given = **tensor;
    if (first) modulation.dtype = given.scalar_type(), modulation.groups = given.dim() == 2 ? given.size(0) : 0;
    first = false;
    STD_TORCH_CHECK(given.dim() == 2 && given.size(0) == modulation.groups && given.size(1) == x.width,
                    "layersync_kernels: ", name, " must have shape (G, ", x.width,
                    ") with one G for gate, shift and scale");
    STD_TORCH_CHECK(
        given.scalar_type() == modulation.dtype && (modulation.dtype == ScalarType::Float || modulation.dtype == dtype),
        "layersync_kernels: gate, shift and scale must all be float32, or all of the dtype of the branch");
  }
  const int64_t groups = modulation.groups;
  STD_TORCH_CHECK(x.count == 0 || (groups > 0 && x.count % groups == 0), "layersync_kernels: modulation of ", groups,
                  " rows for ", x.count, " tokens, which they do not divide");
  modulation.rows_per_group = groups > 0 ? x.count / groups : 0;
  return modulation;
}

// The dtypes that a residual stream and a half-block may have: equal, or the stream in float32.
inline void check_stream_dtypes(ScalarType stream, ScalarType half_block) {
  type_index(stream);
  type_index(half_block);
  STD_TORCH_CHECK(stream == half_block || stream == ScalarType::Float,
                  "layersync_kernels: the residual stream must be float32 or have the dtype of the branch");
}

struct GatedForwardInputs {
  Rows x;
  std::optional<Rows> branch, student;
  Modulation modulation;
  ScalarType dtype;  // of branch and normed
};

inline GatedForwardInputs gated_forward_inputs(const Tensor& x, const std::optional<Tensor>& branch,
                                               const std::optional<Tensor>& gate, const std::optional<Tensor>& shift,
                                               const std::optional<Tensor>& scale, const std::optional<Tensor>& student,
                                               bool norm, ScalarType dtype) {
  const ScalarType half_block = branch.has_value() && !norm ? branch->scalar_type() : dtype;
  check_stream_dtypes(x.scalar_type(), half_block);
  const Rows rows = as_rows(x);
  STD_TORCH_CHECK(rows.width > 0, "layersync_kernels: x needs at least one channel");
  if (branch.has_value()) {
    check_equal_sizes("branch", *branch, "x", x);
    check_dtype("branch", branch->scalar_type(), "the output", half_block);
  }
  STD_TORCH_CHECK(branch.has_value() || !gate.has_value(), "layersync_kernels: a gate without a branch");
  STD_TORCH_CHECK(norm || (!shift.has_value() && !scale.has_value()), "layersync_kernels: shift or scale without norm");
  if (student.has_value()) {
    check_equal_sizes("student", *student, "x", x);
    check_dtype("student", student->scalar_type(), "x", x.scalar_type());
  }
  return {rows, as_rows(branch), as_rows(student), modulation_inputs(gate, shift, scale, rows, half_block), half_block};
}

struct GatedBackwardInputs {
  Rows residual;
  std::optional<Rows> d_residual, d_normed, branch, other;
  Modulation modulation;          // without shift, which no gradient depends on
  std::optional<Tensor> stats;    // contiguous
  std::optional<Tensor> factors;  // contiguous
  ScalarType dtype;               // of branch and d_normed
};

inline GatedBackwardInputs gated_backward_inputs(const std::optional<Tensor>& d_residual,
                                                 const std::optional<Tensor>& d_normed, const Tensor& residual,
                                                 const std::optional<Tensor>& branch, const std::optional<Tensor>& gate,
                                                 const std::optional<Tensor>& scale, const std::optional<Tensor>& stats,
                                                 const std::optional<Tensor>& other,
                                                 const std::optional<Tensor>& factors, int64_t groups, bool bias) {
  const Rows rows = as_rows(residual);
  STD_TORCH_CHECK(rows.width > 0, "layersync_kernels: residual needs at least one channel");
  STD_TORCH_CHECK(d_residual.has_value() || d_normed.has_value() || other.has_value(),
                  "layersync_kernels: a backward pass without any gradient");
  const ScalarType dtype = branch.has_value()     ? branch->scalar_type()
                           : d_normed.has_value() ? d_normed->scalar_type()
                                                  : residual.scalar_type();
  check_stream_dtypes(residual.scalar_type(), dtype);
  using Named = std::pair<const char*, const std::optional<Tensor>*>;
  for (const auto& [name, tensor] : {Named{"d_residual", &d_residual}, Named{"other", &other}}) {
    if (!tensor->has_value()) continue;
    check_equal_sizes(name, **tensor, "residual", residual);
    check_dtype(name, (*tensor)->scalar_type(), "residual", residual.scalar_type());
  }
  for (const auto& [name, tensor] : {Named{"d_normed", &d_normed}, Named{"branch", &branch}}) {
    if (!tensor->has_value()) continue;
    check_equal_sizes(name, **tensor, "residual", residual);
    check_dtype(name, (*tensor)->scalar_type(), "the half-block", dtype);
  }
  STD_TORCH_CHECK(branch.has_value() || !gate.has_value(), "layersync_kernels: a gate without a branch");
  STD_TORCH_CHECK(!bias || (branch.has_value() && groups > 0), "layersync_kernels: a bias without a branch or groups");
  STD_TORCH_CHECK(other.has_value() == factors.has_value(), "layersync_kernels: other and factors belong together");
  STD_TORCH_CHECK(!d_normed.has_value() || stats.has_value(), "layersync_kernels: d_normed needs the forward's stats");
  GatedBackwardInputs inputs{rows,
                             as_rows(d_residual),
                             as_rows(d_normed),
                             as_rows(branch),
                             as_rows(other),
                             modulation_inputs(gate, std::nullopt, scale, rows, dtype),
                             std::nullopt,
                             std::nullopt,
                             dtype};
  if (stats.has_value()) {
    check_row_floats("stats", *stats, 2, rows.count);
    inputs.stats = torch::stable::contiguous(*stats);
  }
  if (factors.has_value()) {
    check_row_floats("factors", *factors, 2, rows.count);
    inputs.factors = torch::stable::contiguous(*factors);
  }
  if (groups > 0) {
    Modulation& modulation = inputs.modulation;
    const bool modulated = gate.has_value() || scale.has_value();
    STD_TORCH_CHECK(rows.count % groups == 0 && (!modulated || modulation.groups == groups),
                    "layersync_kernels: sums over ", groups, " groups for ", rows.count, " tokens");
    // A shift alone has groups, but is no input.
    modulation.groups = groups;
    modulation.rows_per_group = rows.count / groups;
  }
  return inputs;
}

}  // namespace layersync
