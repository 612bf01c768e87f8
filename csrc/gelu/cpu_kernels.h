// The CPU kernels of gelu as one table per instruction set.
#pragma once

#include <cstdint>

#include "../common/cpu/cpu.h"
namespace layersync {

struct GeluForwardArgs {
  const void* preactivation;
  void* activation;
  int64_t width;
  bool streaming;
};

struct GeluBackwardArgs {
  const void* d_activation;
  int64_t d_activation_stride;  // of rows, in elements
  const void* preactivation;
  void* d_preactivation;
  void* activation;  // or null
  float* sums;       // (parts, width) of d_preactivation, or null
  int64_t rows, width, rows_per_part;
  bool streaming;
};

using GeluForward = void (*)(const GeluForwardArgs&, int64_t first_row, int64_t last_row);
using GeluBackward = void (*)(const GeluBackwardArgs&, int64_t first_part, int64_t last_part);

// Indexed by type: 0 = fp32, 1 = bf16, 2 = fp16.
struct GeluKernels {
  GeluForward forward[3];
  GeluBackward backward[3];
};

LAYERSYNC_DECLARE_TABLES(GeluKernels, gelu_kernels);

}  // namespace layersync
