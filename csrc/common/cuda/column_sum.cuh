// Sums over the rows of a matrix: blocks take runs of rows and write partial sums, and a second kernel adds those in
// order. Who sums what depends on shapes alone, so results are the same on every card.
#pragma once

#include "row_kernel.cuh"

namespace layersync {

// Rows in groups of equal size, each group cut into runs. A run is the work of one block, or of one block for each tile
// of columns.
struct RowRuns {
  int64_t rows_per_group;
  int64_t rows;  // of a run; the last one of a group may have fewer
  int64_t per_group;

  __device__ int64_t begin(int64_t run) const {
    const int64_t group = run / per_group;
    return group * rows_per_group + (run - group * per_group) * rows;
  }

  __device__ int64_t end(int64_t run) const {
    const int64_t group = run / per_group;
    const int64_t end = begin(run) + rows, group_end = (group + 1) * rows_per_group;
    return end < group_end ? end : group_end;
  }
};

inline RowRuns row_runs(int64_t rows_per_group, int64_t rows) {
  if (rows_per_group == 0) return {0, 0, 1};
  const int64_t per_group = (rows_per_group - 1) / rows + 1;
  return {rows_per_group, (rows_per_group - 1) / per_group + 1, per_group};
}

constexpr int kMaxColumnSums = 4;
constexpr int kColumnSumSlices = 8;
constexpr int kColumnSumThreads = kColumnSumSlices * kWarpThreads;

struct ColumnSumParams {
  const float* from[kMaxColumnSums];  // (groups, runs, width) each
  float* to[kMaxColumnSums];          // (groups, width) each
  int64_t groups, runs;
  int width;
};

inline int64_t column_sum_blocks(const ColumnSumParams& p, int sums) {
  return ((int64_t(p.width) - 1) / kWarpThreads + 1) * p.groups * sums;
}

// A block adds the runs of 32 columns of one group: its warps take turns, then the first one adds up what they have.
static __global__ void __launch_bounds__(kColumnSumThreads) column_sum_kernel(ColumnSumParams p) {
  __shared__ float slots[kColumnSumSlices][kWarpThreads];
  const int lane = threadIdx.x % kWarpThreads, slice = threadIdx.x / kWarpThreads;
  const int64_t tiles = (p.width - 1) / kWarpThreads + 1;
  const int64_t tile = blockIdx.x % tiles, group = blockIdx.x / tiles % p.groups, sum = blockIdx.x / tiles / p.groups;
  const int64_t column = tile * kWarpThreads + lane;
  const bool active = column < p.width;
  // An index into parameters that the compiler cannot resolve would copy them to local memory.
  const float* from = sum == 0 ? p.from[0] : sum == 1 ? p.from[1] : sum == 2 ? p.from[2] : p.from[3];
  float* to = sum == 0 ? p.to[0] : sum == 1 ? p.to[1] : sum == 2 ? p.to[2] : p.to[3];
  float value = 0;
  if (active) {
    from += group * p.runs * p.width + column;
#pragma unroll 4
    for (int64_t run = slice; run < p.runs; run += kColumnSumSlices) value += from[run * p.width];
  }
  slots[slice][lane] = value;
  __syncthreads();
  if (slice > 0 || !active) return;
#pragma unroll
  for (int s = 1; s < kColumnSumSlices; ++s) value += slots[s][lane];
  to[group * p.width + column] = value;
}

}  // namespace layersync
