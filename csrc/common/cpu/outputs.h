// Outputs of the CPU kernels: fresh tensors on large pages, and whether they are written past the cache.
#pragma once

#include <initializer_list>

#include "../host/arguments.h"
#include "../host/outputs.h"
#include "cpu.h"

namespace layersync {

inline Tensor large_output(const Tensor& like, const std::vector<int64_t>& sizes, bool wanted = true,
                           std::optional<ScalarType> dtype = std::nullopt) {
  Tensor out = new_output(like, sizes, wanted, dtype);
  advise_large_pages(out.data_ptr(), out.numel() * int64_t(out.element_size()));
  return out;
}

inline Tensor large_output_like(const Tensor& like, bool wanted = true,
                                std::optional<ScalarType> dtype = std::nullopt) {
  return large_output(like, {like.sizes().begin(), like.sizes().end()}, wanted, dtype);
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
