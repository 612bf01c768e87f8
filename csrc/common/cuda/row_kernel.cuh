// Kernels that give every row to a warp, or to a whole block where rows are long: who does what, and sums over them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../row_layout.h"
#include "vectors.cuh"

namespace layersync {

constexpr int kWarpThreads = 32;
constexpr int kRowBlockThreads = 128;
constexpr int kRowBlockWarps = kRowBlockThreads / kWarpThreads;

// The launch of a row kernel. It depends on the shape alone, never on the card, so results are the same on every card.
struct RowGrid {
  int row_threads;         // threads that share a row: a warp or the block
  int64_t rows_per_group;  // rows that those threads take, one after another
  unsigned blocks;
};

// Enough blocks for several waves on any card, few enough to sum their partial results at once. The tests take fewer.
#ifndef LAYERSYNC_MAX_ROW_BLOCKS
#define LAYERSYNC_MAX_ROW_BLOCKS 4096
#endif

inline RowGrid row_grid(int64_t rows, int row_threads) {
  const int64_t groups = kRowBlockThreads / row_threads, max_blocks = LAYERSYNC_MAX_ROW_BLOCKS;
  const int64_t rows_per_group = rows > groups * max_blocks ? (rows - 1) / (groups * max_blocks) + 1 : 1;
  const int64_t blocks = rows > 0 ? (rows - 1) / (groups * rows_per_group) + 1 : 1;
  return {row_threads, rows_per_group, unsigned(blocks)};
}

// The threads that share a row (kRowThreads: a warp or the block), and the rows that they take.
template <int kRowThreads>
struct RowGroup {
  static_assert(kRowThreads == kWarpThreads || kRowThreads == kRowBlockThreads);
  static constexpr int kGroups = kRowBlockThreads / kRowThreads;

  // This thread's place in its row.
  __device__ static int index() { return threadIdx.x % kRowThreads; }

  // Groups of a block take turns, so that a block reads one stretch of memory.
  __device__ static int64_t first_row(const RowGrid& grid) {
    return int64_t(blockIdx.x) * kGroups * grid.rows_per_group + threadIdx.x / kRowThreads;
  }

  __device__ static int64_t end_row(const RowGrid& grid, int64_t rows) {
    const int64_t end = int64_t(blockIdx.x + 1) * kGroups * grid.rows_per_group;
    return end < rows ? end : rows;
  }
};

// RowLayout::offset without its 64-bit division, which takes a hundred instructions and the registers of a call:
// launchers refuse 2^31 rows. Mostly rows have one stride, and there is nothing to divide.
__device__ inline int64_t row_offset(const RowLayout& layout, int64_t row) {
  if (row < layout.inner) return row * layout.inner_stride;
  const uint32_t outer = uint32_t(row) / uint32_t(layout.inner);
  return outer * layout.outer_stride + (uint32_t(row) - outer * uint32_t(layout.inner)) * layout.inner_stride;
}

// The rows of an input, or nothing: data is null where an optional input is missing.
struct RowInput {
  const void* data = nullptr;
  RowLayout layout{INT64_MAX, 0, 0};  // nothing to divide

  template <class T>
  __device__ const T* row(int64_t index) const {
    return static_cast<const T*>(data) + row_offset(layout, index);
  }

  // Whether every row starts at a multiple of 16 bytes, for values of `size` bytes.
  bool aligned(int64_t size) const {
    return aligned16(data) && layout.outer_stride * size % 16 == 0 && layout.inner_stride * size % 16 == 0;
  }
};

// Sum over the warp in a fixed order; every lane gets it.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Sums of kCount values over the block in a fixed order; every thread gets them. All threads must call it. A block of
// fewer warps than kWarps says how many.
template <int kWarps, int kCount>
__device__ inline void block_sum(float (&value)[kCount], int warps = kWarps) {
  static_assert(kWarps <= kWarpThreads);
  __shared__ float slots[kCount][kWarps];
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    value[k] = warp_sum(value[k]);
    if (lane == 0) slots[k][warp] = value[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if constexpr (kWarps <= 4) {
      value[k] = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) value[k] += slots[k][w];
    } else {
      value[k] = warp_sum(lane < warps ? slots[k][lane] : 0.f);
    }
  }
  __syncthreads();  // the slots may be written again
}

// Sums over the threads that share a row; every one of them gets them.
template <int kRowThreads, int kCount>
__device__ inline void row_sum(float (&value)[kCount]) {
  if constexpr (kRowThreads > kWarpThreads) {
    block_sum<kRowBlockWarps>(value);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) value[k] = warp_sum(value[k]);
  }
}

// How two rows are read side by side: values per thread and step, so that the narrower type moves 16 bytes, and steps
// whose loads are issued together: 128 bytes in flight per thread, at 32 registers.
template <class A, class B>
struct RowPair {
  static constexpr int kValues = 16 / int(sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));
  static constexpr int kSteps = 160 / (kValues * int(sizeof(A) + sizeof(B)));
};

// Calls body(i, a_values, b_values) for the values of two rows from i on, spread over the row's threads. Both pointers
// are 16-byte aligned; `vectors` counts steps of kValues.
template <int kRowThreads, class A, class B, class Body>
__device__ inline void for_each_vector(const A* a, const B* b, int vectors, Body body) {
  constexpr int kValues = RowPair<A, B>::kValues, kSteps = RowPair<A, B>::kSteps;
  for (int first = RowGroup<kRowThreads>::index(); first < vectors; first += kSteps * kRowThreads) {
    const A* from_a = a + int64_t(first) * kValues;
    const B* from_b = b + int64_t(first) * kValues;
    Pack<A, kValues> packs_a[kSteps];
    Pack<B, kValues> packs_b[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (first + step * kRowThreads < vectors) {
        packs_a[step] = load<kValues>(from_a + step * kRowThreads * kValues);
        packs_b[step] = load<kValues>(from_b + step * kRowThreads * kValues);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (first + step * kRowThreads < vectors) {
        float values_a[kValues], values_b[kValues];
        unpack(packs_a[step], values_a);
        unpack(packs_b[step], values_b);
        body(first * kValues + step * kRowThreads * kValues, values_a, values_b);
      }
    }
  }
}

// Calls body(i, count) for the values [i, i + count) of a row, spread over the row's threads; count is a constant:
// kValues for the first `vectors` steps, then 1.
template <int kRowThreads, int kValues, class Body>
__device__ inline void for_each_values(int width, int vectors, Body body) {
  const int index = RowGroup<kRowThreads>::index();
#pragma unroll 1
  for (int v = index; v < vectors; v += kRowThreads) body(v * kValues, std::integral_constant<int, kValues>{});
#pragma unroll 1
  for (int i = vectors * kValues + index; i < width; i += kRowThreads) body(i, std::integral_constant<int, 1>{});
}

}  // namespace layersync
