// Outputs of the CPU kernels: fresh tensors on large pages, and whether they are written past the cache.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "arguments.h"
#include "cpu.h"

namespace layersync {

// A tensor shaped like another one, of its dtype or the one given; empty where it is not wanted.
inline Tensor output_like(const Tensor& like, bool wanted, std::optional<ScalarType> dtype = std::nullopt) {
  Tensor out = torch::stable::new_empty(like, wanted ? like.sizes() : torch::headeronly::IntHeaderOnlyArrayRef{0}, dtype);
  advise_large_pages(out.data_ptr(), out.numel() * int64_t(out.element_size()));
  return out;
}

inline Tensor float_output(const Tensor& like, const std::vector<int64_t>& sizes, bool wanted) {
  return torch::stable::new_empty(like, wanted ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
}

// Whether a kernel writes these outputs, of rows of `width`, past the cache: where they would flush it. Streaming stores
// need every row to start on a vector boundary; torch aligns allocations to 64 bytes.
inline bool streams(int64_t width, std::initializer_list<const Tensor*> outputs) {
  int64_t bytes = 0;
  bool aligned = width % 32 == 0;
  for (const Tensor* out : outputs) {
    bytes += out->numel() * int64_t(out->element_size());
    aligned = aligned && aligned_to_vector(*out);
  }
  return aligned && bytes >= kStreamBytes;
}

}  // namespace layersync
