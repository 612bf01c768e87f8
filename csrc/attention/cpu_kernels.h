// The CPU kernels of attention as one table per instruction set.
#pragma once

#include <cstdint>

#include "../common/cpu/cpu.h"
#include "../common/row_layout.h"

namespace layersync {

struct AttentionArgs {
  const void* part[3];  // queries, keys and values (B, N, heads * head_dim)
  RowLayout part_rows[3];
  const void* d_out;  // (B, N, heads * head_dim), or null in the forward pass
  RowLayout d_out_rows;
  void* out;      // contiguous: like d_out in the forward pass, (B, N, 3 * heads * head_dim) in the backward pass
  float* d_bias;  // (B, 3 * heads * head_dim), sums of out over tokens, or null
  const int64_t* lengths;  // (B,) tokens of each sample that are there, 0 to N, or null: all are
  int64_t tokens, heads, head_dim;
  float scale;

  int64_t length(int64_t head) const { return lengths == nullptr ? tokens : lengths[head / heads]; }
};

// Rows that a product has in registers, rows that are worked on at a time, and columns that a product's right-hand side
// has side by side.
constexpr int64_t kTileRows = 6, kBlockRows = 4 * kTileRows, kPanel = 64;

inline int64_t whole_panels(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

// Floats of scratch for a thread: three copies of a head in panels, two gradients, a block of rows, and sums.
inline int64_t attention_scratch(int64_t tokens, int64_t head_dim) {
  const int64_t columns = whole_panels(tokens), channels = whole_panels(head_dim);
  return 5 * columns * channels + 4 * kBlockRows * columns + (8 * kBlockRows + 1) * channels;
}

// Over (batch, head) pairs; scratch is aligned to 64 bytes.
using AttentionKernel = void (*)(const AttentionArgs&, int64_t begin, int64_t end, float* scratch);

// Indexed by type: 0 = fp32, 1 = bf16, 2 = fp16.
struct AttentionKernels {
  AttentionKernel forward[3];
  AttentionKernel backward[3];
};

LAYERSYNC_DECLARE_TABLES(AttentionKernels, attention_kernels);
extern const AttentionKernels attention_kernels_avx512_bf16;  // of bf16 alone

}  // namespace layersync
