// The CPU kernels of swiglu as one table per instruction set.
#pragma once

#include <cstdint>

#include "../common/cpu/cpu.h"
#include "../common/row_layout.h"
namespace layersync {

struct SwigluForwardArgs {
  const void* x12;  // rows of 2 width
  RowLayout layout;
  void* out;  // contiguous rows of width
  int64_t width;
  bool streaming;
};

struct SwigluBackwardArgs {
  const void* grad;  // rows of width
  RowLayout grad_layout;
  const void* x12;  // rows of 2 width
  RowLayout layout;
  void* d_x12;  // contiguous
  void* out;    // contiguous, or null
  float* sums;  // (parts, 2 width) of d_x12, or null
  int64_t rows, width, rows_per_part;
  bool streaming;
};

using SwigluForward = void (*)(const SwigluForwardArgs&, int64_t first_row, int64_t last_row);
using SwigluBackward = void (*)(const SwigluBackwardArgs&, int64_t first_part, int64_t last_part);

// Indexed by whether halves are interleaved, whether the activation is GELU, and by type: 0 = fp32, 1 = bf16, 2 = fp16.
struct SwigluKernels {
  SwigluForward forward[2][2][3];
  SwigluBackward backward[2][2][3];
};

LAYERSYNC_DECLARE_TABLES(SwigluKernels, swiglu_kernels);

}  // namespace layersync
