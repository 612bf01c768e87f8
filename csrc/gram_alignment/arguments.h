// Inputs of gram_alignment_strip, checked against the contract in op.py, for the CPU and the GPU.
#pragma once

#include <optional>

#include "../common/host/arguments.h"
#include "gram_kinds.h"

namespace layersync {

inline void check_strip(const Tensor& difference, int64_t diagonal, int64_t kind,
                        const std::optional<Tensor>& gradient) {
  const auto check = [&](const char* name, const Tensor& tensor) {
    type_index(tensor.scalar_type());
    STD_TORCH_CHECK(tensor.dim() == 3 && tensor.is_contiguous(), "layersync_kernels: ", name,
                    " must be contiguous, of shape (samples, rows, columns)");
    check_equal_sizes(name, tensor, "difference", difference);
  };
  check("difference", difference);
  if (gradient.has_value()) check("gradient", *gradient);
  STD_TORCH_CHECK(diagonal >= 0 && diagonal <= difference.size(2), "layersync_kernels: ", diagonal,
                  " columns that count once, of ", difference.size(2));
  STD_TORCH_CHECK(kind >= 0 && kind < kGramKinds, "layersync_kernels: unknown kind ", kind);
}

}  // namespace layersync
