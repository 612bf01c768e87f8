// gated_residual_norm on the CPU: outputs, threads and the ordered sums around the row kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/cpu/cpu.h"
#include "../common/cpu/partial_sums.h"
#include "arguments.h"
#include "cpu_kernels.h"

namespace layersync {
namespace {

// A modulation as fp32: it has one row for many of x, so its copy costs next to nothing.
struct WideModulation {
  explicit WideModulation(const std::optional<Tensor>& given) {
    if (!given.has_value()) return;
    tensor = torch::stable::to(*given, ScalarType::Float);
    const Rows view = as_rows(*tensor);
    tensor = view.owner;
    rows = {static_cast<const float*>(view.data), view.layout.inner_stride};
  }

  std::optional<Tensor> tensor;
  ModulationRows rows{nullptr, 0};
};

RowLayout layout_of(const std::optional<Rows>& rows) { return rows.has_value() ? rows->layout : RowLayout{1, 0, 0}; }

template <class Kernel, class Args>
void run(Kernel kernel, const Args& args, int64_t count, int64_t grain) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(kScratchRows * args.width));
    kernel(args, begin, end, scratch.data());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, std::optional<Tensor> branch,
                                                   std::optional<Tensor> gate, std::optional<Tensor> shift,
                                                   std::optional<Tensor> scale, std::optional<Tensor> student,
                                                   bool norm, bool rms, double eps, double align_eps,
                                                   ScalarType dtype) {
  const GatedForwardInputs in = gated_forward_inputs(x, branch, gate, shift, scale, student, norm, dtype);
  const int64_t rows = in.x.count, width = in.x.width;
  Tensor residual = large_output_like(x, branch.has_value()), normed = large_output_like(x, norm, dtype);
  Tensor stats = float_output(x, {2, rows}, norm), alignment = float_output(x, {3, rows}, student.has_value());
  if (rows == 0) return {residual, normed, stats, alignment};

  const WideModulation wide_gate(gate), wide_shift(shift), wide_scale(scale);
  float* mean = norm ? static_cast<float*>(stats.data_ptr()) : nullptr;
  float* cosine = student.has_value() ? static_cast<float*>(alignment.data_ptr()) : nullptr;
  const ResidualNormForwardArgs args{in.x.data,
                                     data_of(in.branch),
                                     data_of(in.student),
                                     in.x.layout,
                                     layout_of(in.branch),
                                     layout_of(in.student),
                                     wide_gate.rows,
                                     wide_shift.rows,
                                     wide_scale.rows,
                                     width,
                                     in.modulation.rows_per_group,
                                     rms,
                                     float(eps),
                                     float(align_eps),
                                     branch.has_value() ? residual.data_ptr() : nullptr,
                                     norm ? normed.data_ptr() : nullptr,
                                     mean,
                                     mean + rows,
                                     cosine,
                                     cosine + rows,
                                     cosine + 2 * rows,
                                     streams(width, {&residual, &normed})};
  run(LAYERSYNC_FOR_THIS_CPU(residual_norm_kernels).forward[type_index(in.x.dtype)][type_index(in.dtype)], args, rows,
      rows_per_task(width));
  return {residual, normed, stats, alignment};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(std::optional<Tensor> d_residual,
                                                            std::optional<Tensor> d_normed, const Tensor& residual,
                                                            std::optional<Tensor> branch, std::optional<Tensor> gate,
                                                            std::optional<Tensor> scale, std::optional<Tensor> stats,
                                                            std::optional<Tensor> other, std::optional<Tensor> factors,
                                                            bool rms, int64_t groups, bool bias) {
  const GatedBackwardInputs in =
      gated_backward_inputs(d_residual, d_normed, residual, branch, gate, scale, stats, other, factors, groups, bias);
  STD_TORCH_CHECK(branch.has_value() || !other.has_value(), "layersync_kernels: an alignment needs a branch");
  const int64_t rows = in.residual.count, width = in.residual.width;
  const bool moved = d_normed.has_value() || other.has_value();
  const bool wants_gate = groups > 0 && gate.has_value(), wants_affine = groups > 0 && d_normed.has_value();
  Tensor d_x = large_output_like(residual, moved);
  Tensor d_branch = large_output_like(residual, branch.has_value(), in.dtype);

  const int64_t rows_per_group = in.modulation.rows_per_group, blocks = std::max<int64_t>(in.modulation.groups, 1);
  const Parts parts = parts_of(blocks, rows_per_group);
  const std::vector<int64_t> sums{blocks * parts.count, width};
  Tensor d_gate = float_output(residual, sums, wants_gate);
  Tensor d_shift = float_output(residual, sums, wants_affine), d_scale = float_output(residual, sums, wants_affine);
  Tensor d_bias = float_output(residual, sums, bias);
  const auto finish = [&] {
    const auto total = [&](const Tensor& t) { return sum_of_parts(t, blocks, parts.count); };
    return std::tuple{d_x, d_branch, total(d_gate), total(d_shift), total(d_scale), total(d_bias)};
  };
  if (rows == 0) {
    for (Tensor* t : {&d_gate, &d_shift, &d_scale, &d_bias}) torch::stable::zero_(*t);
    return finish();
  }

  const WideModulation wide_gate(gate), wide_scale(scale);
  const float* mean = in.stats.has_value() ? static_cast<const float*>(in.stats->data_ptr()) : nullptr;
  const auto floats = [](Tensor& t, bool wanted) { return wanted ? static_cast<float*>(t.data_ptr()) : nullptr; };
  const ResidualNormBackwardArgs args{data_of(in.d_residual),
                                      data_of(in.d_normed),
                                      in.residual.data,
                                      data_of(in.branch),
                                      data_of(in.other),
                                      layout_of(in.d_residual),
                                      layout_of(in.d_normed),
                                      in.residual.layout,
                                      layout_of(in.branch),
                                      layout_of(in.other),
                                      factors.has_value() ? static_cast<const float*>(in.factors->data_ptr()) : nullptr,
                                      wide_gate.rows,
                                      wide_scale.rows,
                                      mean,
                                      mean + rows,
                                      rows,
                                      width,
                                      rows_per_group,
                                      parts.count,
                                      parts.rows,
                                      rms,
                                      moved ? d_x.data_ptr() : nullptr,
                                      branch.has_value() ? d_branch.data_ptr() : nullptr,
                                      floats(d_gate, wants_gate),
                                      floats(d_shift, wants_affine),
                                      floats(d_scale, wants_affine),
                                      floats(d_bias, bias),
                                      streams(width, {&d_x, &d_branch})};
  run(LAYERSYNC_FOR_THIS_CPU(residual_norm_kernels).backward[type_index(in.residual.dtype)][type_index(in.dtype)], args,
      blocks * parts.count, std::max<int64_t>(rows_per_task(width) / parts.rows, 1));
  return finish();
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cpp, CPU, m) {
  m.impl("gated_residual_norm_forward", TORCH_BOX(&layersync::forward));
  m.impl("gated_residual_norm_backward", TORCH_BOX(&layersync::backward));
}
