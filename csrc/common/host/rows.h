// How a kernel sees a (..., D) tensor: M rows of D contiguous values at any row stride.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "../row_layout.h"

namespace layersync {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Rows {
  Tensor owner;  // keeps the memory alive when a copy had to be made
  const void* data;
  ScalarType dtype;
  int64_t count;  // M, the product of the leading dimensions
  int64_t width;  // D
  RowLayout layout;
};

// Collapses the leading dimensions into at most two strides, which covers contiguous tensors, slices of tokens or
// channels, (N, B, D) transposes and views of a cat. Anything else costs one explicit copy; but of a tensor without
// elements nothing is read, and contiguous() hands it back with the strides that it has.
inline Rows as_rows(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t ndim = tensor.dim();
  STD_TORCH_CHECK(ndim >= 1, "layersync_kernels: expected a tensor of at least one dimension");
  const int64_t width = sizes[ndim - 1];
  int64_t count = 1;
  for (int64_t i = 0; i < ndim - 1; ++i) count *= sizes[i];

  int64_t extent[2] = {1, 1}, stride[2] = {0, 0};  // from the innermost outwards
  int level = -1;
  bool fits = width <= 1 || strides[ndim - 1] == 1;
  for (int64_t i = ndim - 2; i >= 0 && fits; --i) {
    if (sizes[i] == 1) continue;
    if (level >= 0 && strides[i] == stride[level] * extent[level]) {
      extent[level] *= sizes[i];
    } else if (level == 1) {
      fits = false;
    } else {
      ++level;
      extent[level] = sizes[i];
      stride[level] = strides[i];
    }
  }
  if (!fits && count * width > 0) return as_rows(torch::stable::contiguous(tensor));
  const RowLayout layout{extent[0] > 0 ? extent[0] : 1, stride[1], stride[0]};
  return Rows{tensor, tensor.data_ptr(), tensor.scalar_type(), count, width, layout};
}

}  // namespace layersync
