// The CPU kernels of qk_norm_rope as one table per instruction set.
#pragma once

#include <cstdint>

#include "../common/cpu/cpu.h"
#include "../common/row_layout.h"
namespace layersync {

// What is done to a head. No weights: no norm; no cos: no rotation.
struct QkHead {
  const float* weight[2];  // of queries and of keys, (width), or null
  const float *cos, *sin;  // (positions, width), or null
  int64_t heads, width, positions;
  float eps;
  bool centred;      // LayerNorm, else RMSNorm
  bool interleaved;  // pairs of neighbours turn, else channels half a head apart
};

struct QkForwardArgs {
  QkHead head;
  const void* qkv;
  RowLayout layout;  // of tokens
  void* out;         // (tokens, 2, heads, width)
  bool streaming;
};

struct QkGradient {
  const void* data;
  int64_t batch_stride, head_stride, position_stride;
};

struct QkBackwardArgs {
  QkHead head;
  QkGradient gradient[3];
  const void* qkv;  // or null without a norm
  RowLayout layout;
  void* d_qkv;         // (tokens, 3, heads, width)
  float* weight_sums;  // (2, parts, heads, width), or null
  float* bias_sums;    // (parts, 3, heads, width), or null
  int64_t tokens, parts, rows_per_part;
  bool streaming;
};

using QkForward = void (*)(const QkForwardArgs&, int64_t first_token, int64_t last_token);
using QkBackward = void (*)(const QkBackwardArgs&, int64_t first_part, int64_t last_part);

// Indexed by type: 0 = fp32, 1 = bf16, 2 = fp16.
struct QkKernels {
  QkForward forward[3];
  QkBackward backward[3];
};

LAYERSYNC_DECLARE_TABLES(QkKernels, qk_kernels);

}  // namespace layersync
