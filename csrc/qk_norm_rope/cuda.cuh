// qk_norm_rope on the GPU: the kernels, free of torch, so that the tests compile them for the host too.
//
// A head is narrow: 64 channels of bf16 are 8 accesses of 16 bytes. So it has a group of 4, 8, 9, 16 or 32 lanes, a warp
// as many heads as it has groups, and a lane all that its sums and rotations need but a shuffle.
#pragma once

#include "../common/cuda/column_sum.cuh"

namespace layersync {

// What is done to a head. No weights: no norm; no cos: no rotation.
struct QkHead {
  const float* weight[2];  // of queries and of keys, (width), or null
  const float *cos, *sin;  // (positions, width), or null
  int heads, width, positions;
  float eps;
  bool centred;  // LayerNorm, else RMSNorm
  // Where the values of an item lie: item i has its parts at i * stride and i * stride + distance.
  int items, stride, distance;
};

// Tokens (B, positions, ..) or, with heads, (B, heads, positions, ..) at any stride, in elements.
struct QkTokens {
  const void* data;
  int64_t batch_stride, head_stride, position_stride;

  bool aligned(int64_t size) const {
    return aligned16(data) && batch_stride * size % 16 == 0 && head_stride * size % 16 == 0 &&
           position_stride * size % 16 == 0;
  }
};

struct QkForwardParams {
  QkHead head;
  QkTokens qkv;
  void* out;     // (tokens, 2, heads, width)
  int64_t rows;  // tokens * 2 * heads
};

struct QkBackwardParams {
  QkHead head;
  QkTokens gradient[3];
  QkTokens qkv;     // nothing without a norm
  void* d_qkv;      // (tokens, 3, heads, width)
  float* d_weight;  // (2, runs, heads, width) sums over the tokens of each run, or null
  float* d_bias;    // (runs, 3, heads, width), or null
  int64_t tokens;
  RowRuns runs;
  int tiles, qk_tiles;  // warps that share a run, each with its heads; the first ones of queries and keys
};

constexpr int kQkThreads = 128;
constexpr int kQkWarps = kQkThreads / kWarpThreads;

// The lanes of a head. kParts: values of an item lie in one pack, whose neighbours may turn, or in two, which turn
// against each other. Lanes without an item, or without a head, do the work of another one beside it, and neither count
// in sums nor write.
template <class T, int kValues_, int kLanes, int kSteps_, int kParts_>
struct QkGroup {
  using Type = T;
  static constexpr int kValues = kValues_, kSteps = kSteps_, kParts = kParts_;
  static constexpr int kHeads = kWarpThreads / kLanes;  // of a warp
  // Of the backward pass on a multiprocessor; 0: as the compiler has it, which for 9 lanes would spill on sm_80.
  static constexpr int kLeastBlocks = kLanes == 9 && kValues * kSteps * kParts <= 8 ? 4 : 0;
  static constexpr bool kTurns = kParts == 2 || kValues > 1;  // has pairs
  using Values = float[kSteps][kParts][kValues];
  using Packs = Pack<T, kValues>[kSteps][kParts];

  const QkHead& head;
  int rank, lane;

  __device__ explicit QkGroup(const QkHead& head_)
      : head(head_), rank(threadIdx.x % kWarpThreads % kLanes), lane(threadIdx.x % kWarpThreads - rank) {}

  // Of the warp's groups; kHeads for the lanes that are left over.
  __device__ int index() const { return lane / kLanes; }

  __device__ bool counts(int step) const { return rank + step * kLanes < head.items; }

  // Calls body(step, part, place) for the packs of this lane.
  template <class Body>
  __device__ void each(Body body) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int item = rank + step * kLanes, place = (item < head.items ? item : head.items - 1) * head.stride;
#pragma unroll
      for (int part = 0; part < kParts; ++part) body(step, part, place + part * head.distance);
    }
  }

  // The sum over the lanes of a head of what value(step, part, k) gives, in a fixed order; all of them get it. Every lane
  // of the warp must call it.
  template <class Value>
  __device__ float sum(Value value) const {
    float total = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float own = 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int k = 0; k < kValues; ++k) own += value(step, part, k);
      total += counts(step) ? own : 0.f;
    }
    if constexpr (kLanes == 9) {
      // Three times three: no lane has a power of two to pair with.
      const int third = lane + rank / 3 * 3;
      total = (shuffle(total, third) + shuffle(total, third + 1)) + shuffle(total, third + 2);
      return (shuffle(total, lane) + shuffle(total, lane + 3)) + shuffle(total, lane + 6);
    } else {
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2)
        total += __shfl_xor_sync(0xffffffffu, total, distance);
      return total;
    }
  }

  __device__ static float shuffle(float value, int from) {
    return __shfl_sync(0xffffffffu, value, from % kWarpThreads);  // of the last, incomplete group: anything
  }

  template <class Body>
  __device__ static void each_value(Body body) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int k = 0; k < kValues; ++k) body(step, part, k);
  }

  __device__ void load(Packs& packs, const T* row) const {
    each([&](int step, int part, int place) { packs[step][part] = layersync::load<kValues>(row + place); });
  }

  __device__ void load(Values& values, const float* row) const {
    each([&](int step, int part, int place) {
      layersync::unpack(layersync::load<kValues>(row + place), values[step][part]);
    });
  }

  __device__ static void unpack(Values& values, const Packs& packs) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int part = 0; part < kParts; ++part) layersync::unpack(packs[step][part], values[step][part]);
  }

  template <class Out>
  __device__ void store(const Values& values, Out* row) const {
    each([&](int step, int part, int place) {
      if (!counts(step)) return;
      Pack<Out, kValues> out;
      pack(values[step][part], out);
      layersync::store(row + place, out);
    });
  }

  // Subtracts the mean, or does not; gives the reciprocal of the deviation, or of the root mean square.
  __device__ float centre(Values& x) const {
    const float share = 1.f / head.width;
    if (head.centred) {
      const float mean = sum([&](int step, int part, int k) { return x[step][part][k]; }) * share;
      each_value([&](int step, int part, int k) { x[step][part][k] -= mean; });
    }
    return rsqrtf(sum([&](int step, int part, int k) { return x[step][part][k] * x[step][part][k]; }) * share +
                  head.eps);
  }

  // Turns the pairs by the angles of a position, or back.
  template <bool kBack>
  __device__ void rotate(Values& x, int64_t position) const {
    Values cos, sin;
    load(cos, head.cos + position * head.width);
    load(sin, head.sin + position * head.width);
    constexpr int kPairs = kParts == 2 ? kValues : kValues / 2, kPart = kParts - 1;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int i = kParts == 2 ? pair : 2 * pair, j = kParts == 2 ? pair : 2 * pair + 1;
        float &a = x[step][0][i], &b = x[step][kPart][j];
        const float old_a = a, old_b = b;
        a = fmaf(old_a, cos[step][0][i], old_b * (kBack ? sin[step][kPart][j] : -sin[step][0][i]));
        b = fmaf(old_b, cos[step][kPart][j], old_a * (kBack ? -sin[step][0][i] : sin[step][kPart][j]));
      }
  }
};

template <class Group>
__global__ void __launch_bounds__(kQkThreads) qk_forward_kernel(QkForwardParams p) {
  using T = typename Group::Type;
  const QkHead& h = p.head;
  const Group group(h);
  const int64_t first = (int64_t(blockIdx.x) * kQkWarps + threadIdx.x / kWarpThreads) * Group::kHeads;
  if (first >= p.rows) return;  // of a whole warp
  const bool live = group.index() < Group::kHeads && first + group.index() < p.rows;
  const uint32_t row = uint32_t(first) + (live ? group.index() : 0);
  const uint32_t slots = 2 * h.heads, token = row / slots, slot = row - token * slots;
  const uint32_t sample = token / uint32_t(h.positions), position = token - sample * uint32_t(h.positions);
  typename Group::Packs packs;
  group.load(packs, static_cast<const T*>(p.qkv.data) + sample * p.qkv.batch_stride + position * p.qkv.position_stride +
                        int64_t(slot) * h.width);
  typename Group::Values x;
  group.unpack(x, packs);
  if (h.weight[0] != nullptr) {
    typename Group::Values weight;
    group.load(weight, slot < uint32_t(h.heads) ? h.weight[0] : h.weight[1]);
    const float rstd = group.centre(x);
    group.each_value([&](int step, int part, int k) { x[step][part][k] *= rstd * weight[step][part][k]; });
  }
  if constexpr (Group::kTurns) {
    if (h.cos != nullptr) group.template rotate<false>(x, position);
  }
  if (live) group.store(x, static_cast<T*>(p.out) + int64_t(row) * h.width);
}

// A run of tokens in one place of a tensor. Each step is to the next token, or stays at the last one.
template <class T>
struct QkWalk {
  const T* row;
  int64_t step, jump;  // to the next token, and what is added between samples

  __device__ QkWalk(const QkTokens& tokens, int positions, int64_t sample, int64_t position, int64_t offset)
      : row(static_cast<const T*>(tokens.data) + sample * tokens.batch_stride + position * tokens.position_stride +
            offset),
        step(tokens.position_stride),
        jump(tokens.batch_stride - positions * tokens.position_stride) {}

  __device__ void next(bool more, bool wraps) { row += (more ? step : 0) + (more && wraps ? jump : 0); }
};

// A warp takes a run of tokens and a few of their heads, of queries and keys or of values; the tokens one by one, and
// reads the next one meanwhile.
template <class Group>
__global__ void __launch_bounds__(kQkThreads, Group::kLeastBlocks) qk_backward_kernel(QkBackwardParams p) {
  using T = typename Group::Type;
  const QkHead& h = p.head;
  const Group group(h);
  const int64_t warp = int64_t(blockIdx.x) * kQkWarps + threadIdx.x / kWarpThreads, run = warp / p.tiles;
  if (run >= p.runs.per_group) return;  // of a whole warp
  const int tile = int(warp - run * p.tiles);
  const bool values = tile >= p.qk_tiles;
  const int first = (values ? tile - p.qk_tiles : tile) * Group::kHeads, count = values ? h.heads : 2 * h.heads;
  const bool live = group.index() < Group::kHeads && first + group.index() < count;
  const int slot = first + (live ? group.index() : 0) + (values ? 2 * h.heads : 0);
  const int kind = slot / h.heads, head = slot - kind * h.heads;
  const int64_t begin = p.runs.begin(run), end = p.runs.end(run);
  const int64_t sample = begin / h.positions;
  int64_t position = begin - sample * h.positions;
  // An index into parameters that the compiler cannot resolve would copy them to local memory.
  const QkTokens from = kind == 0 ? p.gradient[0] : kind == 1 ? p.gradient[1] : p.gradient[2];
  QkWalk<T> gradient(from, h.positions, sample, position, head * from.head_stride);
  T* out = static_cast<T*>(p.d_qkv) + (begin * 3 * h.heads + slot) * h.width;
  typename Group::Values d_bias = {}, g = {};
  typename Group::Packs next_g;
  group.load(next_g, gradient.row);
  const auto finish = [&] {
    group.each_value([&](int step, int part, int k) { d_bias[step][part][k] += g[step][part][k]; });
    if (live) group.store(g, out);
    out += 3 * h.heads * int64_t(h.width);
  };
  if (values) {
    for (int64_t token = begin; token < end; ++token) {
      group.unpack(g, next_g);
      const bool more = token + 1 < end, wraps = ++position == h.positions;
      if (wraps) position = 0;
      gradient.next(more, wraps);
      group.load(next_g, gradient.row);
      finish();
    }
  } else {
    const bool norm = h.weight[0] != nullptr;
    typename Group::Values d_weight = {}, weight = {}, x = {};
    typename Group::Packs next_x = {};
    QkWalk<T> input(p.qkv, h.positions, sample, position, int64_t(slot) * h.width);
    if (norm) {
      group.load(weight, kind == 0 ? h.weight[0] : h.weight[1]);
      group.load(next_x, input.row);
    }
    const float share = 1.f / h.width;
    for (int64_t token = begin; token < end; ++token) {
      group.unpack(g, next_g);
      group.unpack(x, next_x);
      const int64_t here = position;
      const bool more = token + 1 < end, wraps = ++position == h.positions;
      if (wraps) position = 0;
      gradient.next(more, wraps);
      group.load(next_g, gradient.row);
      if (norm) {
        input.next(more, wraps);
        group.load(next_x, input.row);
      }
      if constexpr (Group::kTurns) {
        if (h.cos != nullptr) group.template rotate<true>(g, here);
      }
      if (norm) {
        const float rstd = group.centre(x);
        group.each_value([&](int step, int part, int k) {
          float &normed = x[step][part][k], &value = g[step][part][k];
          normed *= rstd;
          d_weight[step][part][k] += value * normed;
          value *= weight[step][part][k];
        });
        const float along =
            group.sum([&](int step, int part, int k) { return g[step][part][k] * x[step][part][k]; }) * share;
        float total = 0;
        if (h.centred) total = group.sum([&](int step, int part, int k) { return g[step][part][k]; }) * share;
        group.each_value([&](int step, int part, int k) {
          g[step][part][k] = rstd * (g[step][part][k] - x[step][part][k] * along - total);
        });
      }
      finish();
    }
    if (p.d_weight != nullptr && live)
      group.store(d_weight, p.d_weight + ((kind * p.runs.per_group + run) * h.heads + head) * h.width);
  }
  if (p.d_bias != nullptr && live) group.store(d_bias, p.d_bias + (run * 3 * h.heads + slot) * h.width);
}

using QkForwardKernel = void (*)(QkForwardParams);
using QkBackwardKernel = void (*)(QkBackwardParams);

// How heads are cut: values of a pack, lanes of a head, steps of a lane, packs of an item.
struct QkCut {
  int values, lanes, steps, parts;
};

// Chooses the cut by width, rotation and alignment, and sets what of `head` follows from it. `aligned`: all heads start
// at multiples of 16 bytes.
inline QkCut qk_cut(QkHead& head, bool interleaved, bool aligned, int size) {
  const int whole = 16 / size, width = head.width;
  const bool halves = head.cos != nullptr && !interleaved;
  aligned = aligned && width % whole == 0 && aligned16(head.weight[0]) && aligned16(head.weight[1]) &&
            aligned16(head.cos) && aligned16(head.sin);
  QkCut cut{1, 32, 8, 1};
  if (!aligned || (halves && width / 2 % 4 != 0)) {
    const bool turns = head.cos != nullptr;
    head.items = turns ? width / 2 : width;
    head.stride = turns && interleaved ? 2 : 1;
    head.distance = !turns || interleaved ? 1 : width / 2;
    if (turns) cut = {1, 32, 4, 2};
    return cut;
  }
  cut.values = halves && width / 2 % whole != 0 ? 4 : whole;
  cut.parts = halves ? 2 : 1;
  head.items = width / cut.parts / cut.values;
  head.stride = cut.values;
  head.distance = width / 2;
  if (halves) {
    cut.lanes = head.items <= 4 && cut.values == whole ? 4 : head.items <= 8 && cut.values == whole ? 8 : 32;
    if (cut.lanes == 32 && head.items <= 9) cut.lanes = 9;
    cut.steps = 1;
  } else {
    cut.lanes = head.items <= 8 ? 8 : head.items <= 9 ? 9 : head.items <= 16 ? 16 : 32;
    cut.steps = cut.lanes == 32 ? 2 : 1;
  }
  return cut;
}

// Calls visit with the group of a cut.
template <class T, class Visit>
auto with_qk_group(const QkCut& cut, Visit visit) {
  constexpr int kWhole = 16 / int(sizeof(T));
  using std::type_identity;
  if (cut.values == 1)
    return cut.parts == 1 ? visit(type_identity<QkGroup<T, 1, 32, 8, 1>>{})
                          : visit(type_identity<QkGroup<T, 1, 32, 4, 2>>{});
  if (cut.parts == 1)
    return cut.lanes == 8    ? visit(type_identity<QkGroup<T, kWhole, 8, 1, 1>>{})
           : cut.lanes == 9  ? visit(type_identity<QkGroup<T, kWhole, 9, 1, 1>>{})
           : cut.lanes == 16 ? visit(type_identity<QkGroup<T, kWhole, 16, 1, 1>>{})
                             : visit(type_identity<QkGroup<T, kWhole, 32, 2, 1>>{});
  if (cut.values == kWhole)
    return cut.lanes == 4   ? visit(type_identity<QkGroup<T, kWhole, 4, 1, 2>>{})
           : cut.lanes == 8 ? visit(type_identity<QkGroup<T, kWhole, 8, 1, 2>>{})
           : cut.lanes == 9 ? visit(type_identity<QkGroup<T, kWhole, 9, 1, 2>>{})
                            : visit(type_identity<QkGroup<T, kWhole, 32, 1, 2>>{});
  return cut.lanes == 9 ? visit(type_identity<QkGroup<T, 4, 9, 1, 2>>{})
                        : visit(type_identity<QkGroup<T, 4, 32, 1, 2>>{});
}

struct QkForwardPlan {
  QkForwardKernel kernel;
  int64_t blocks;
};

inline QkForwardPlan qk_forward_plan(QkForwardParams& p, bool interleaved, int type) {
  const int size = type == 0 ? 4 : 2;
  const QkCut cut = qk_cut(p.head, interleaved, p.qkv.aligned(size), size);
  const auto kernel = with_type(type, [=](auto t) {
    return with_qk_group<decltype(t)>(cut, [](auto group) {
      return static_cast<QkForwardKernel>(qk_forward_kernel<typename decltype(group)::type>);
    });
  });
  const int64_t rows_of_block = kWarpThreads / cut.lanes * kQkWarps;
  return {kernel, (p.rows - 1) / rows_of_block + 1};
}

struct QkBackwardPlan {
  QkBackwardKernel kernel;
  int64_t blocks;
};

// Warps of the backward pass that an H100 holds, by its registers: so sums do not depend on the card.
inline int64_t qk_resident_warps(const QkCut& cut) {
  return 132 * (cut.values * cut.steps * cut.parts > 8 ? 12 : cut.lanes == 9 ? 16 : 20);
}

inline QkBackwardPlan qk_backward_plan(QkBackwardParams& p, bool interleaved, int type) {
  const int size = type == 0 ? 4 : 2;
  bool aligned = p.head.weight[0] == nullptr || p.qkv.aligned(size);
  for (const QkTokens& gradient : p.gradient) aligned = aligned && gradient.aligned(size);
  const QkCut cut = qk_cut(p.head, interleaved, aligned, size);
  const int heads = kWarpThreads / cut.lanes;
  p.qk_tiles = (2 * p.head.heads - 1) / heads + 1;
  p.tiles = p.qk_tiles + (p.head.heads - 1) / heads + 1;
  // As many warps as run at once, or fewer: runs of 16 tokens at least.
  const int64_t warps = qk_resident_warps(cut);
  const int64_t runs = warps > p.tiles ? warps / p.tiles : 1;
  const int64_t length = (p.tokens - 1) / runs + 1;
  p.runs = row_runs(p.tokens, length < 16 ? 16 : length);
  const auto kernel = with_type(type, [=](auto t) {
    return with_qk_group<decltype(t)>(cut, [](auto group) {
      return static_cast<QkBackwardKernel>(qk_backward_kernel<typename decltype(group)::type>);
    });
  });
  return {kernel, (p.runs.per_group * p.tiles - 1) / kQkWarps + 1};
}

}  // namespace layersync
