// Argument checks that the CPU and the CUDA side share. The Python edge has validated already; this guards direct calls.
#pragma once

#include <optional>

#include "../common/host/arguments.h"

namespace layersync {

constexpr int64_t kReductionNone = 0, kReductionMean = 1, kReductionSum = 2;

inline void check_alignment_inputs(const Rows& s, const Rows& t, const Tensor& student, const Tensor& teacher,
                                   const std::optional<Tensor>& weight, int64_t reduction) {
  check_equal_sizes("student", student, "teacher", teacher);
  type_index(s.dtype);
  type_index(t.dtype);
  STD_TORCH_CHECK(reduction >= kReductionNone && reduction <= kReductionSum, "layersync_kernels: reduction must be 0 ",
                  "(none), 1 (mean) or 2 (sum), got ", reduction);
  if (weight.has_value())
    STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Float && weight->is_contiguous() && weight->numel() == s.count,
                    "layersync_kernels: weight must be contiguous float32 with one value for each of the ", s.count,
                    " tokens");
}

// What the forward pass has left for the backward pass.
inline void check_saved(const Tensor& stats, const Tensor& scale, int64_t rows) {
  check_row_floats("stats", stats, 3, rows);
  STD_TORCH_CHECK(stats.is_contiguous(), "layersync_kernels: stats must be contiguous");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && scale.numel() == 1,
                  "layersync_kernels: scale must be one float32");
}

}  // namespace layersync
