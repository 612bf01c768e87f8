// spatial_norm on the GPU: the kernel, free of torch, so that the tests compile it for the host too.
#pragma once

#include "../common/cuda/row_kernel.cuh"

namespace layersync {

struct SpatialNormParams {
  RowInput x;  // samples of `tokens` rows
  void* y;     // contiguous rows
  int tokens, width;
  int tiles;        // blocks that share a sample, each with its channels
  float kept_mean;  // 1 - alpha
  float eps;
};

// Eight threads read 128 bytes of a token, and the 32 slices of a block take turns at the tokens.
constexpr int kSpatialLanes = 8, kSpatialSlices = 32, kSpatialThreads = kSpatialLanes * kSpatialSlices;
constexpr int kSpatialBatch = 4;  // tokens of a slice whose loads are issued together

// Sums over the slices in a fixed order; every thread gets those of its channels.
template <int kValues>
__device__ inline void sum_over_slices(float (&value)[kValues]) {
  constexpr int kWarps = kSpatialThreads / kWarpThreads;
  __shared__ float slots[kValues][kWarps][kSpatialLanes];
  const int warp = threadIdx.x / kWarpThreads, place = threadIdx.x % kWarpThreads, lane = place % kSpatialLanes;
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
#pragma unroll
    for (int distance = kWarpThreads / 2; distance >= kSpatialLanes; distance /= 2)
      value[k] += __shfl_xor_sync(0xffffffffu, value[k], distance);
    if (place < kSpatialLanes) slots[k][warp][lane] = value[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    value[k] = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value[k] += slots[k][w][lane];
  }
  __syncthreads();  // the slots may be written again
}

// A block takes a tile of the channels of a sample. It reads its tokens three times, which the caches serve twice. Every
// value is taken less that of the first token: equal tokens have deviations of 0, and sums keep their digits far from 0.
// kValues is 1 where rows are not aligned.
template <class T, int kValues>
__global__ void __launch_bounds__(kSpatialThreads) spatial_norm_kernel(SpatialNormParams p) {
  const int slice = threadIdx.x / kSpatialLanes;
  const int column = (int(blockIdx.x % p.tiles) * kSpatialLanes + int(threadIdx.x) % kSpatialLanes) * kValues;
  const int64_t first_row = int64_t(blockIdx.x / p.tiles) * p.tokens;
  const T* x = p.x.row<T>(first_row) + column;
  const int64_t stride = row_offset(p.x.layout, first_row + 1) - row_offset(p.x.layout, first_row);
  const int tokens = column < p.width ? p.tokens : 0;  // threads beyond the width only take part in the sums

  float first[kValues] = {};
  if (tokens > 0) unpack(load<kValues>(x), first);
  // Calls body(token, values) for this thread's tokens.
  const auto for_each_token = [&](auto body) {
#pragma unroll 1
    for (int begin = slice; begin < tokens; begin += kSpatialBatch * kSpatialSlices) {
      Pack<T, kValues> packs[kSpatialBatch];
#pragma unroll
      for (int b = 0; b < kSpatialBatch; ++b)
        if (const int token = begin + b * kSpatialSlices; token < tokens) packs[b] = load<kValues>(x + token * stride);
#pragma unroll
      for (int b = 0; b < kSpatialBatch; ++b) {
        const int token = begin + b * kSpatialSlices;
        if (token >= tokens) break;
        float values[kValues];
        unpack(packs[b], values);
#pragma unroll
        for (int k = 0; k < kValues; ++k) values[k] -= first[k];
        body(token, values);
      }
    }
  };

  float mean[kValues] = {};
  for_each_token([&](int, const float (&values)[kValues]) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) mean[k] += values[k];
  });
  sum_over_slices(mean);
#pragma unroll
  for (int k = 0; k < kValues; ++k) mean[k] /= float(p.tokens);

  // Squares that leave the range of fp32 are there a second time, of shrunken deviations.
  constexpr float kShrink = 0x1p-80f;
  float squares[kValues] = {}, shrunken[kValues] = {};
  for_each_token([&](int, const float (&values)[kValues]) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      const float deviation = values[k] - mean[k], small = deviation * kShrink;
      squares[k] = fmaf(deviation, deviation, squares[k]);
      shrunken[k] = fmaf(small, small, shrunken[k]);
    }
  });
  sum_over_slices(squares);
  sum_over_slices(shrunken);
  float scale[kValues];
#pragma unroll
  for (int k = 0; k < kValues; ++k) {
    const bool fits = squares[k] < 1e37f;
    const float std = sqrtf((fits ? squares[k] : shrunken[k]) / float(p.tokens - 1)) * (fits ? 1.f : 1 / kShrink);
    scale[k] = 1.f / (std + p.eps);
    mean[k] -= p.kept_mean * (first[k] + mean[k]);
  }

  T* y = static_cast<T*>(p.y) + first_row * p.width + column;
  for_each_token([&](int token, const float (&values)[kValues]) {
    float normed[kValues];
#pragma unroll
    for (int k = 0; k < kValues; ++k) normed[k] = (values[k] - mean[k]) * scale[k];
    Pack<T, kValues> out;
    pack(normed, out);
    store(y + int64_t(token) * p.width, out);
  });
}

using SpatialNormKernel = void (*)(SpatialNormParams);

struct SpatialNormPlan {
  SpatialNormKernel kernel;
  int tiles;
};

inline SpatialNormPlan spatial_norm_plan(const SpatialNormParams& p, int type) {
  const int size = type == 0 ? 4 : 2, values = p.width % (16 / size) == 0 && p.x.aligned(size) ? 16 / size : 1;
  const SpatialNormKernel kernel = with_type(type, [=](auto t) -> SpatialNormKernel {
    using T = decltype(t);
    return values > 1 ? spatial_norm_kernel<T, 16 / int(sizeof(T))> : spatial_norm_kernel<T, 1>;
  });
  return {kernel, (p.width - 1) / (kSpatialLanes * values) + 1};
}

}  // namespace layersync
