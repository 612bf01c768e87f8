// Argument checks that the ops share. The Python edge has validated already; these guard direct calls.
#pragma once

#include <optional>
#include <vector>

#include "rows.h"

namespace layersync {

// Index of a storage type in the tables of kernels.
inline int type_index(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return 0;
    case ScalarType::BFloat16:
      return 1;
    case ScalarType::Half:
      return 2;
    default:
      STD_TORCH_CHECK(false, "layersync_kernels: a fused op takes float32, bfloat16 or float16");
      return -1;
  }
}

inline std::vector<int64_t> leading_sizes(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

inline bool aligned_to_vector(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 64 == 0; }

inline std::optional<Rows> as_rows(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return as_rows(*tensor);
}

inline const void* data_of(const std::optional<Rows>& rows) { return rows.has_value() ? rows->data : nullptr; }

inline void check_equal_sizes(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  STD_TORCH_CHECK(tensor.dim() == other.dim(), "layersync_kernels: ", name, " has ", tensor.dim(), " dimensions and ",
                  other_name, " ", other.dim());
  for (int64_t i = 0; i < tensor.dim(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == other.size(i), "layersync_kernels: ", name, " and ", other_name,
                    " differ in dimension ", i, ": ", tensor.size(i), " and ", other.size(i));
}

inline void check_dtype(const char* name, ScalarType found, const char* other_name, ScalarType expected) {
  STD_TORCH_CHECK(found == expected, "layersync_kernels: ", name, " must have the dtype of ", other_name);
}

// A few floats per row, which an earlier pass wrote or a gradient brought.
inline void check_row_floats(const char* name, const Tensor& tensor, int64_t per_row, int64_t rows) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 && tensor.size(0) == per_row &&
                      tensor.size(1) == rows,
                  "layersync_kernels: ", name, " must be float32 of shape (", per_row, ", ", rows, ")");
}

}  // namespace layersync
