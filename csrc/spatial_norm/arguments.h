// Inputs of spatial_norm, checked against the contract in op.py, for the CPU and the GPU.
#pragma once

#include "../common/host/arguments.h"

namespace layersync {

inline void check_samples(const Tensor& x) {
  type_index(x.scalar_type());
  STD_TORCH_CHECK(x.dim() == 3, "layersync_kernels: x must have the shape (B, N, D)");
  STD_TORCH_CHECK(x.size(1) > 1 || x.numel() == 0, "layersync_kernels: one token has no standard deviation");
}

}  // namespace layersync
