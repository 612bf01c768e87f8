// Argument checks that the CPU and the CUDA side share. The Python edge has validated already; this guards direct calls.
#pragma once

#include <optional>
#include <vector>

#include "../common/rows.h"

namespace layersync {

constexpr int64_t kReductionNone = 0, kReductionMean = 1, kReductionSum = 2;

inline int type_index(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return 0;
    case ScalarType::BFloat16:
      return 1;
    case ScalarType::Half:
      return 2;
    default:
      STD_TORCH_CHECK(false, "layersync_kernels: cosine_alignment takes float32, bfloat16 or float16");
      return -1;
  }
}

inline std::vector<int64_t> leading_sizes(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

inline bool aligned_to_vector(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 64 == 0;
}

inline void check_alignment_inputs(const Rows& s, const Rows& t, const Tensor& student, const Tensor& teacher,
                                   const std::optional<Tensor>& weight, int64_t reduction) {
  STD_TORCH_CHECK(student.dim() == teacher.dim(), "layersync_kernels: student has ", student.dim(),
                  " dimensions and teacher ", teacher.dim());
  for (int64_t i = 0; i < student.dim(); ++i)
    STD_TORCH_CHECK(student.size(i) == teacher.size(i), "layersync_kernels: student and teacher differ in dimension ", i,
                    ": ", student.size(i), " and ", teacher.size(i));
  type_index(s.dtype);
  type_index(t.dtype);
  STD_TORCH_CHECK(reduction >= kReductionNone && reduction <= kReductionSum, "layersync_kernels: reduction must be 0 ",
                  "(none), 1 (mean) or 2 (sum), got ", reduction);
  if (weight.has_value())
    STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Float && weight->is_contiguous() && weight->numel() == s.count,
                    "layersync_kernels: weight must be contiguous float32 with one value for each of the ", s.count,
                    " tokens");
}

}  // namespace layersync
