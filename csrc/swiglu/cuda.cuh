// swiglu on the GPU: the kernels, free of torch, so that the tests compile them for the host too.
#pragma once

#include "../common/cuda/activations.cuh"
#include "../common/cuda/column_sum.cuh"

namespace layersync {

struct SwigluForwardParams {
  RowInput x12;  // rows of 2 width
  void* out;     // contiguous rows of width
  int64_t rows;
  int width;
};

struct SwigluBackwardParams {
  RowInput grad;  // rows of width
  RowInput x12;   // rows of 2 width
  void* d_x12;    // contiguous rows
  void* out;      // contiguous rows, or null
  float* d_bias;  // (runs, 2 width) sums over the rows of each run, or null
  int64_t rows;
  int width;
  RowRuns runs;
  int tiles;  // blocks that share a run of rows, each with its columns
};

// Values i to i + kValues of both halves of a row, as they lie in memory: side by side where halves are interleaved.
template <class T, int kValues, bool kInterleaved>
struct Halves {
  static constexpr bool kPaired = kInterleaved && kValues > 1;  // both packs have values of both halves
  Pack<T, kValues> first, second;

  __device__ static int64_t first_place(int i) { return kInterleaved ? 2 * int64_t(i) : i; }
  __device__ static int64_t second_place(int i, int width) {
    return kInterleaved ? 2 * int64_t(i) + kValues : int64_t(width) + i;
  }

  __device__ static Halves load(const T* row, int i, int width) {
    return {layersync::load<kValues>(row + first_place(i)), layersync::load<kValues>(row + second_place(i, width))};
  }

  __device__ void unpack(float (&a)[kValues], float (&b)[kValues]) const {
    layersync::unpack(first, a);
    layersync::unpack(second, b);
    if constexpr (kPaired) sort<false>(a, b);
  }

  // Turns pairs into halves, or halves into pairs.
  template <bool kBack>
  __device__ static void sort(float (&a)[kValues], float (&b)[kValues]) {
    float from[2 * kValues];
#pragma unroll
    for (int k = 0; k < kValues; ++k) from[k] = a[k], from[kValues + k] = b[k];
#pragma unroll
    for (int k = 0; k < 2 * kValues; ++k) {
      const float value = kBack ? from[k / 2 + k % 2 * kValues] : from[k < kValues ? 2 * k : 2 * (k - kValues) + 1];
      (k < kValues ? a[k % kValues] : b[k % kValues]) = value;
    }
  }

  __device__ static void store(T* row, int i, int width, const float (&a)[kValues], const float (&b)[kValues]) {
    Halves out;
    pack(a, out.first);
    pack(b, out.second);
    layersync::store(row + first_place(i), out.first);
    layersync::store(row + second_place(i, width), out.second);
  }
};

template <bool kGelu>
__device__ inline Activated gate_and_slope(float u) {
  return kGelu ? gelu_and_slope(u) : silu_and_slope(u);
}

constexpr int kSwigluThreads = 128;
constexpr int kSwigluBytes = 32;  // of a thread's result

// A stretch of the result for each block.
template <class T, int kValues, bool kGelu, bool kInterleaved>
__global__ void __launch_bounds__(kSwigluThreads) swiglu_forward_kernel(SwigluForwardParams p) {
  using In = Halves<T, kValues, kInterleaved>;
  constexpr int kSteps = kSwigluBytes / int(sizeof(T)) / kValues;
  const uint32_t per_row = uint32_t(p.width) / kValues;
  const int64_t first = int64_t(blockIdx.x) * kSteps * kSwigluThreads + threadIdx.x, count = p.rows * per_row;
  In halves[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    if (const int64_t place = first + step * kSwigluThreads; place < count) {
      const uint32_t row = uint32_t(place) / per_row;  // launchers refuse 2^31 packs
      halves[step] = In::load(p.x12.row<T>(row), int(uint32_t(place) - row * per_row) * kValues, p.width);
    }
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    if (const int64_t place = first + step * kSwigluThreads; place < count) {
      float a[kValues], b[kValues];
      halves[step].unpack(a, b);
#pragma unroll
      for (int k = 0; k < kValues; ++k) a[k] = (kGelu ? gelu(a[k]) : silu(a[k])) * b[k];
      Pack<T, kValues> out;
      pack(a, out);
      store(static_cast<T*>(p.out) + place * kValues, out);
    }
}

constexpr int kSwigluColumns = 8;  // of a thread
constexpr int kSwigluTile = kSwigluThreads * kSwigluColumns;

// A block takes a run of rows and a tile of columns, a few rows at a time. kValues is 1 where rows are not aligned.
template <class T, int kValues, bool kGelu, bool kInterleaved>
__global__ void __launch_bounds__(kSwigluThreads) swiglu_backward_kernel(SwigluBackwardParams p) {
  using In = Halves<T, kValues, kInterleaved>;
  constexpr int kSteps = kSwigluColumns / kValues, kRows = kSwigluBytes / (kSwigluColumns * int(sizeof(T)));
  const int64_t run = blockIdx.x / p.tiles;
  const int first = int(blockIdx.x % p.tiles) * kSwigluTile + threadIdx.x * kValues;
  const int64_t begin = p.runs.begin(run), end = p.runs.end(run);
  float sums[2][kSteps][kValues] = {};  // as the gradients lie in memory
  for (int64_t batch = begin; batch < end; batch += kRows) {
    const auto for_each_pack = [&](auto body) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (batch + r >= end) break;
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
          if (const int i = first + step * kSwigluThreads * kValues; i < p.width) body(r, step, i);
      }
    };
    Pack<T, kValues> gradient[kRows][kSteps];
    In halves[kRows][kSteps];
    for_each_pack([&](int r, int step, int i) {
      gradient[r][step] = load<kValues>(p.grad.row<T>(batch + r) + i);
      halves[r][step] = In::load(p.x12.row<T>(batch + r), i, p.width);
    });
    for_each_pack([&](int r, int step, int i) {
      float g[kValues], a[kValues], b[kValues];
      unpack(gradient[r][step], g);
      halves[r][step].unpack(a, b);
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        const Activated gate = gate_and_slope<kGelu>(a[k]);
        a[k] = g[k] * b[k] * gate.slope;
        b[k] *= gate.value;
        g[k] *= gate.value;
      }
      if (p.out != nullptr) {
        Pack<T, kValues> out;
        pack(b, out);
        store(static_cast<T*>(p.out) + (batch + r) * p.width + i, out);
      }
      if constexpr (In::kPaired) In::template sort<true>(a, g);
#pragma unroll
      for (int k = 0; k < kValues; ++k) sums[0][step][k] += a[k], sums[1][step][k] += g[k];
      In::store(static_cast<T*>(p.d_x12) + (batch + r) * 2 * p.width, i, p.width, a, g);
    });
  }
  if (p.d_bias == nullptr) return;
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    if (const int i = first + step * kSwigluThreads * kValues; i < p.width)
      Halves<float, kValues, kInterleaved>::store(p.d_bias + run * 2 * p.width, i, p.width, sums[0][step],
                                                  sums[1][step]);
}

// Calls visit with the constants that a kernel is made for.
template <class Visit>
auto swiglu_kernel(bool vectors, bool gelu, bool interleaved, int type, Visit visit) {
  return with_type(type, [=](auto t) {
    using T = decltype(t);
    const auto of_layout = [=](auto values, auto gate) {
      return interleaved ? visit(t, values, gate, std::true_type{}) : visit(t, values, gate, std::false_type{});
    };
    const auto of_gate = [=](auto values) {
      return gelu ? of_layout(values, std::true_type{}) : of_layout(values, std::false_type{});
    };
    return vectors ? of_gate(std::integral_constant<int, 16 / int(sizeof(T))>{})
                   : of_gate(std::integral_constant<int, 1>{});
  });
}

using SwigluForwardKernel = void (*)(SwigluForwardParams);
using SwigluBackwardKernel = void (*)(SwigluBackwardParams);

struct SwigluForwardPlan {
  SwigluForwardKernel kernel;
  int64_t packs, blocks;
};

inline SwigluForwardPlan swiglu_forward_plan(const SwigluForwardParams& p, bool gelu, bool interleaved, int type) {
  const int size = type == 0 ? 4 : 2, values = 16 / size;
  const bool vectors = p.width % values == 0 && p.x12.aligned(size);
  const int64_t packs = p.rows * (vectors ? p.width / values : p.width);
  const int steps = kSwigluBytes / size / (vectors ? values : 1);
  const auto kernel = swiglu_kernel(vectors, gelu, interleaved, type, [](auto t, auto values, auto gate, auto layout) {
    return static_cast<SwigluForwardKernel>(swiglu_forward_kernel<decltype(t), values(), gate(), layout()>);
  });
  return {kernel, packs, (packs - 1) / (kSwigluThreads * steps) + 1};
}

inline SwigluBackwardKernel swiglu_backward_kernel_for(const SwigluBackwardParams& p, bool gelu, bool interleaved,
                                                       int type) {
  const int size = type == 0 ? 4 : 2;
  const bool vectors = p.width % (16 / size) == 0 && p.x12.aligned(size) && p.grad.aligned(size);
  return swiglu_kernel(vectors, gelu, interleaved, type, [](auto t, auto values, auto gate, auto layout) {
    return static_cast<SwigluBackwardKernel>(swiglu_backward_kernel<decltype(t), values(), gate(), layout()>);
  });
}

inline int swiglu_tiles(int width) { return (width - 1) / kSwigluTile + 1; }

// Some 1024 blocks, at most 512 partial sums of a column: one percent of the traffic.
inline RowRuns swiglu_row_runs(int64_t rows, int width) {
  const int64_t tiles = swiglu_tiles(width), runs = tiles < 2 ? 512 : 1024 / tiles > 64 ? 1024 / tiles : 64;
  return row_runs(rows, rows / runs < 16 ? 16 : rows / runs);
}

}  // namespace layersync
