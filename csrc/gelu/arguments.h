// Inputs of gelu, checked against the contract in op.py, for the CPU and the GPU.
#pragma once

#include "../common/host/arguments.h"

namespace layersync {

inline void check_preactivation(const Tensor& preactivation) {
  type_index(preactivation.scalar_type());
  STD_TORCH_CHECK(preactivation.dim() == 2 && preactivation.is_contiguous(),
                  "layersync_kernels: the pre-activation must be contiguous, of shape (M, W)");
}

inline void check_gelu_gradient(const Tensor& d_activation, const Tensor& preactivation) {
  check_preactivation(preactivation);
  check_equal_sizes("d_activation", d_activation, "preactivation", preactivation);
  check_dtype("d_activation", d_activation.scalar_type(), "preactivation", preactivation.scalar_type());
}

}  // namespace layersync
