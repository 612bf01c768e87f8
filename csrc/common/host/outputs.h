// Fresh tensors for the results of an op. Sizes are vectors here: torch's array references only borrow their memory, and
// a variable bound to a braced list is left without it at the end of its own declaration.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

namespace layersync {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// On the device of `like` and of its dtype or the one given; empty where it is not wanted.
inline Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes, bool wanted = true,
                         std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, wanted ? sizes : std::vector<int64_t>{0}, dtype);
}

inline Tensor output_like(const Tensor& like, bool wanted = true, std::optional<ScalarType> dtype = std::nullopt) {
  return new_output(like, {like.sizes().begin(), like.sizes().end()}, wanted, dtype);
}

inline Tensor float_output(const Tensor& like, const std::vector<int64_t>& sizes, bool wanted = true) {
  return new_output(like, sizes, wanted, ScalarType::Float);
}

}  // namespace layersync
