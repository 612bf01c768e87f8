// tanh-GELU on the GPU: the kernels, free of torch, so that the tests compile them for the host too.
#pragma once

#include "../common/cuda/activations.cuh"
#include "../common/cuda/column_sum.cuh"

namespace layersync {

struct GeluForwardParams {
  const void* preactivation;  // contiguous
  void* activation;
  int64_t count;
};

struct GeluBackwardParams {
  RowInput d_activation;
  const void* preactivation;  // contiguous rows
  void* d_preactivation;      // contiguous rows
  void* activation;           // contiguous rows, or null
  float* d_bias;              // (runs, width) sums over the rows of each run, or null
  int64_t rows;
  int width;
  RowRuns runs;
  int tiles;  // blocks that share a run of rows, each with its columns
};

constexpr int kGeluThreads = 128;
constexpr int kGeluBytes = 64;  // of a thread's loads

// One stretch of memory for each block; the values that vectors leave over go to the last threads, one each.
template <class T, int kValues>
__global__ void __launch_bounds__(kGeluThreads) gelu_forward_kernel(GeluForwardParams p) {
  constexpr int kSteps = kGeluBytes / int(sizeof(T)) / kValues;
  const T* from = static_cast<const T*>(p.preactivation);
  T* to = static_cast<T*>(p.activation);
  const int64_t first = (int64_t(blockIdx.x) * kSteps * kGeluThreads + threadIdx.x) * kValues;
  const auto apply = [&]<int kCount>(Pack<T, kCount> pack_u, int64_t i) {
    float values[kCount];
    unpack(pack_u, values);
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] = gelu(values[k]);
    pack(values, pack_u);
    store(to + i, pack_u);
  };
  Pack<T, kValues> packs[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    if (const int64_t i = first + step * kGeluThreads * kValues; i + kValues <= p.count)
      packs[step] = load<kValues>(from + i);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    if (const int64_t i = first + step * kGeluThreads * kValues; i + kValues <= p.count) apply(packs[step], i);
  if (blockIdx.x == 0 && threadIdx.x < p.count % kValues) {
    const int64_t i = p.count / kValues * kValues + threadIdx.x;
    apply(load<1>(from + i), i);
  }
}

constexpr int kGeluColumns = 8;  // of a thread
constexpr int kGeluTile = kGeluThreads * kGeluColumns;

// A block takes a run of rows and a tile of columns, a few rows at a time. kValues is 1 where rows are not aligned.
template <class T, int kValues>
__global__ void __launch_bounds__(kGeluThreads) gelu_backward_kernel(GeluBackwardParams p) {
  constexpr int kSteps = kGeluColumns / kValues, kRows = kGeluBytes / (kGeluColumns * int(sizeof(T)));
  const T* from = static_cast<const T*>(p.preactivation);
  const int64_t run = blockIdx.x / p.tiles;
  const int first = int(blockIdx.x % p.tiles) * kGeluTile + threadIdx.x * kValues;
  const int64_t begin = p.runs.begin(run), end = p.runs.end(run);
  float d_bias[kSteps][kValues] = {};
  for (int64_t batch = begin; batch < end; batch += kRows) {
    const auto for_each_pack = [&](auto body) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (batch + r >= end) break;
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
          if (const int i = first + step * kGeluThreads * kValues; i < p.width) body(r, step, i);
      }
    };
    Pack<T, kValues> gradient[kRows][kSteps], preactivation[kRows][kSteps];
    for_each_pack([&](int r, int step, int i) {
      gradient[r][step] = load<kValues>(p.d_activation.row<T>(batch + r) + i);
      preactivation[r][step] = load<kValues>(from + (batch + r) * p.width + i);
    });
    for_each_pack([&](int r, int step, int i) {
      const int64_t offset = (batch + r) * p.width + i;
      float d[kValues], u[kValues];
      unpack(gradient[r][step], d);
      unpack(preactivation[r][step], u);
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        const Activated gelu = gelu_and_slope(u[k]);
        d[k] *= gelu.slope;
        u[k] = gelu.value;
        d_bias[step][k] += d[k];
      }
      Pack<T, kValues> out;
      pack(d, out);
      store(static_cast<T*>(p.d_preactivation) + offset, out);
      if (p.activation == nullptr) return;
      pack(u, out);
      store(static_cast<T*>(p.activation) + offset, out);
    });
  }
  if (p.d_bias == nullptr) return;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int i = first + step * kGeluThreads * kValues;
    if (i >= p.width) break;
    Pack<float, kValues> out;
    pack(d_bias[step], out);
    store(p.d_bias + run * p.width + i, out);
  }
}

using GeluForwardKernel = void (*)(GeluForwardParams);
using GeluBackwardKernel = void (*)(GeluBackwardParams);

inline GeluForwardKernel gelu_forward_kernel_for(const GeluForwardParams& p, int type) {
  return with_type(type, [&](auto t) -> GeluForwardKernel {
    using T = decltype(t);
    return aligned16(p.preactivation) ? gelu_forward_kernel<T, 16 / int(sizeof(T))> : gelu_forward_kernel<T, 1>;
  });
}

inline int64_t gelu_forward_blocks(int64_t count, int type) {
  return (count - 1) / (kGeluThreads * kGeluBytes / (type == 0 ? 4 : 2)) + 1;
}

inline GeluBackwardKernel gelu_backward_kernel_for(const GeluBackwardParams& p, int type) {
  const int size = type == 0 ? 4 : 2;
  const bool vectors = p.width % (16 / size) == 0 && aligned16(p.preactivation) && p.d_activation.aligned(size);
  return with_type(type, [=](auto t) -> GeluBackwardKernel {
    using T = decltype(t);
    return vectors ? gelu_backward_kernel<T, 16 / int(sizeof(T))> : gelu_backward_kernel<T, 1>;
  });
}

inline int gelu_tiles(int width) { return (width - 1) / kGeluTile + 1; }

// At most 256 partial sums of a column, which are less than one percent of the traffic.
inline RowRuns gelu_row_runs(int64_t rows) { return row_runs(rows, rows / 256 < 16 ? 16 : rows / 256); }

}  // namespace layersync
