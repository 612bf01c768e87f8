// The CPU kernels of spatial_norm as one table per instruction set.
#pragma once

#include <cstdint>

#include "../common/cpu/cpu.h"
#include "../common/row_layout.h"

namespace layersync {

constexpr int64_t kMostChannels = 512;  // of a block

struct SpatialNormArgs {
  const void* x;
  RowLayout layout;
  void* y;  // contiguous
  int64_t tokens, width;
  int64_t channels, blocks;  // of a block, and blocks of a sample
  float kept_mean;           // 1 - alpha
  float eps;
  bool streaming;
};

// A task is a block of the channels of a sample.
using SpatialNorm = void (*)(const SpatialNormArgs&, int64_t first_task, int64_t last_task);

// Indexed by type: 0 = fp32, 1 = bf16, 2 = fp16.
struct SpatialNormKernels {
  SpatialNorm run[3];
};

LAYERSYNC_DECLARE_TABLES(SpatialNormKernels, spatial_norm_kernels);

}  // namespace layersync
