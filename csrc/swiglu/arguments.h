// Inputs of swiglu, checked against the contract in op.py, for the CPU and the GPU.
#pragma once

#include "../common/host/arguments.h"

namespace layersync {

// The width of a half.
inline int64_t check_halves(const Tensor& x12) {
  type_index(x12.scalar_type());
  STD_TORCH_CHECK(x12.dim() >= 1 && x12.size(x12.dim() - 1) % 2 == 0,
                  "layersync_kernels: x12 must have two halves side by side, (..., 2 H)");
  return x12.size(x12.dim() - 1) / 2;
}

// The sizes of x12 with H in place of 2 H.
inline std::vector<int64_t> sizes_of_half(const Tensor& x12) {
  std::vector<int64_t> sizes = leading_sizes(x12);
  sizes.push_back(check_halves(x12));
  return sizes;
}

inline void check_half_gradient(const Tensor& grad, const Tensor& x12) {
  const std::vector<int64_t> sizes = sizes_of_half(x12);
  const auto found = grad.sizes();
  STD_TORCH_CHECK(std::vector<int64_t>(found.begin(), found.end()) == sizes,
                  "layersync_kernels: grad must have the sizes of x12, with H in place of 2 H");
  check_dtype("grad", grad.scalar_type(), "x12", x12.scalar_type());
}

}  // namespace layersync
