// gated_residual_norm on the GPU: the kernels, free of torch, so that the tests compile them for the host too.
#pragma once

#include <type_traits>

#include "../common/cuda/column_sum.cuh"
#include "../common/cuda/row_cosine.cuh"

namespace layersync {

struct GatedForwardParams {
  RowInput x, branch, student;
  RowInput gate, shift, scale;  // one row for each group of rows
  bool wide_modulation;         // those three in fp32, not in the dtype of the branch
  int64_t rows, rows_per_group;
  int width;
  RowGrid grid;
  bool rms;
  float eps, align_eps;
  void* residual;    // contiguous rows, or null without branch
  void* normed;      // contiguous rows, or null
  float* stats;      // (2, rows), or null without normed
  float* alignment;  // (3, rows), or null without student
};

struct GatedBackwardParams {
  RowInput d_residual, d_normed, residual, branch, other;
  RowInput gate, scale;
  bool wide_modulation;
  int64_t rows;
  int width;
  bool rms;
  RowRuns runs;
  int tiles;             // blocks that share a run of rows, each with its columns
  const float* stats;    // (2, rows), or null without d_normed
  const float* factors;  // (2, rows), or null without other
  float* means;          // (2, rows) for rows that several blocks share, else null
  void* d_x;             // contiguous rows, or null
  void* d_branch;        // contiguous rows, or null
  float* d_gate;         // (groups * runs, width) each, or null
  float* d_shift;
  float* d_scale;
  float* d_bias;
};

// Which row of the modulation serves a row. There are fewer than 2^32 rows: a 64-bit division has 100 instructions.
__device__ inline int64_t group_of(int64_t row, int64_t rows_per_group) {
  return uint32_t(row) / uint32_t(rows_per_group);
}

// Calls body(M{}) with the dtype of the modulation. The branch is the same for the whole grid.
template <class H, class Body>
__device__ inline void with_modulation(bool wide, Body body) {
  if constexpr (std::is_same_v<H, float>) {
    body(float{});
  } else {
    if (wide)
      body(float{});
    else
      body(H{});
  }
}

// Values i to i + kValues of a row of the modulation, or a constant where it is missing.
template <class M, int kValues>
__device__ inline void load_modulation(const RowInput& input, const M* row, int i, float absent,
                                       float (&out)[kValues]) {
  Pack<M, kValues> pack{};
  if (input.data != nullptr) pack = load<kValues>(row + i);
  unpack(pack, out);
#pragma unroll
  for (int k = 0; k < kValues; ++k) out[k] = input.data != nullptr ? out[k] : absent;
}

template <int kValues>
__device__ inline void modulate(float mean, float rstd, const float (&scale)[kValues], const float (&shift)[kValues],
                                float (&r)[kValues]) {
#pragma unroll
  for (int k = 0; k < kValues; ++k) r[k] = fmaf((r[k] - mean) * rstd, 1 + scale[k], shift[k]);
}

__device__ inline void write_stats(const GatedForwardParams& p, int64_t row, float mean, float rstd) {
  p.stats[row] = mean;
  p.stats[p.rows + row] = rstd;
}

__device__ inline void write_alignment(const GatedForwardParams& p, int64_t row, const RowCosine& cosine) {
  p.alignment[row] = cosine.cosine;
  p.alignment[p.rows + row] = cosine.rnorm_student;
  p.alignment[2 * p.rows + row] = cosine.rnorm_teacher;
}

// Rows of at most kChannels channels, a multiple of kValues, all aligned: x and the branch are read once, and the sum
// stays in registers, in the residual's dtype, until the row is normalised.
template <class R, class H, int kRowThreads, int kChannels>
__global__ void __launch_bounds__(kRowBlockThreads) gated_forward_kernel(GatedForwardParams p) {
  using Group = RowGroup<kRowThreads>;
  constexpr int kValues = RowPair<R, H>::kValues, kStep = kRowThreads * kValues, kSteps = kChannels / kStep;
  static_assert(kSteps * kStep == kChannels);
  const int first = Group::index() * kValues;
  const int64_t end = Group::end_row(p.grid, p.rows);
  for (int64_t row = Group::first_row(p.grid); row < end; row += Group::kGroups) {
    const int64_t group = group_of(row, p.rows_per_group);
    // Calls body(step, i) for this thread's part of the row.
    const auto for_each_step = [&](auto body) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        if (const int i = first + step * kStep; i < p.width) body(step, i);
    };
    Pack<R, kValues> r[kSteps];
    const R* x = p.x.row<R>(row);
    for_each_step([&](int step, int i) { r[step] = load<kValues>(x + i); });
    if (p.branch.data != nullptr) {
      Pack<H, kValues> branch[kSteps];
      const H* from = p.branch.row<H>(row);
      R* residual = static_cast<R*>(p.residual) + row * p.width;
      for_each_step([&](int step, int i) { branch[step] = load<kValues>(from + i); });
      with_modulation<H>(p.wide_modulation, [&](auto modulation) {
        const auto* gate_row = p.gate.row<decltype(modulation)>(group);
        for_each_step([&](int step, int i) {
          float values[kValues], update[kValues], gate[kValues];
          load_modulation(p.gate, gate_row, i, 1, gate);
          unpack(r[step], values);
          unpack(branch[step], update);
#pragma unroll
          for (int k = 0; k < kValues; ++k) values[k] = fmaf(gate[k], update[k], values[k]);
          pack(values, r[step]);
          store(residual + i, r[step]);
        });
      });
    }
    if (p.normed != nullptr) {
      float sum[1] = {0};
      if (!p.rms) {
        for_each_step([&](int step, int) {
          float values[kValues];
          unpack(r[step], values);
#pragma unroll
          for (int k = 0; k < kValues; ++k) sum[0] += values[k];
        });
        row_sum<kRowThreads>(sum);
      }
      const float mean = sum[0] / p.width;
      float square[1] = {0};
      for_each_step([&](int step, int) {
        float values[kValues];
        unpack(r[step], values);
#pragma unroll
        for (int k = 0; k < kValues; ++k) square[0] = fmaf(values[k] - mean, values[k] - mean, square[0]);
      });
      row_sum<kRowThreads>(square);
      const float rstd = 1.f / sqrtf(square[0] / p.width + p.eps);
      if (Group::index() == 0) write_stats(p, row, mean, rstd);
      H* normed = static_cast<H*>(p.normed) + row * p.width;
      with_modulation<H>(p.wide_modulation, [&](auto modulation) {
        const auto* scale_row = p.scale.row<decltype(modulation)>(group);
        const auto* shift_row = p.shift.row<decltype(modulation)>(group);
        for_each_step([&](int step, int i) {
          float values[kValues], scale[kValues], shift[kValues];
          load_modulation(p.scale, scale_row, i, 0, scale);
          load_modulation(p.shift, shift_row, i, 0, shift);
          unpack(r[step], values);
          modulate(mean, rstd, scale, shift, values);
          Pack<H, kValues> out;
          pack(values, out);
          store(normed + i, out);
        });
      });
    }
    if (p.student.data != nullptr) {
      const R* student = p.student.row<R>(row);
      const auto dots_of = [&](float factor_s, float factor_r, float (&dots)[3]) {
        dots[0] = dots[1] = dots[2] = 0;
        for_each_step([&](int step, int i) {
          float s[kValues], values[kValues];
          unpack(load<kValues>(student + i), s);
          unpack(r[step], values);
#pragma unroll
          for (int k = 0; k < kValues; ++k) add_to_dots(s[k] * factor_s, values[k] * factor_r, dots);
        });
        row_sum<kRowThreads>(dots);
      };
      const RowCosine cosine = cosine_of_dots(p.align_eps, dots_of);
      if (Group::index() == 0) write_alignment(p, row, cosine);
    }
  }
}

// Rows of any length and alignment, a block for each: what it wrote of a row it reads again.
template <class R, class H>
__global__ void __launch_bounds__(kRowBlockThreads, 4) gated_forward_any_kernel(GatedForwardParams p) {
  using Group = RowGroup<kRowBlockThreads>;
  constexpr int kValues = RowPair<R, H>::kValues;
  const int64_t end = Group::end_row(p.grid, p.rows);
  for (int64_t row = Group::first_row(p.grid); row < end; row += Group::kGroups) {
    const int64_t group = group_of(row, p.rows_per_group);
    const R* x = p.x.row<R>(row);
    const H* branch = p.branch.data == nullptr ? nullptr : p.branch.row<H>(row);
    R* residual = p.residual == nullptr ? nullptr : static_cast<R*>(p.residual) + row * p.width;
    H* normed = p.normed == nullptr ? nullptr : static_cast<H*>(p.normed) + row * p.width;
    const R* r = p.branch.data == nullptr ? x : residual;
    with_modulation<H>(p.wide_modulation, [&](auto modulation) {
      using M = decltype(modulation);
      const M *gate_row = p.gate.row<M>(group), *scale_row = p.scale.row<M>(group), *shift_row = p.shift.row<M>(group);
      const bool aligned = aligned16(x) && aligned16(branch) && aligned16(r) && aligned16(normed) &&
                           aligned16(gate_row) && aligned16(scale_row) && aligned16(shift_row);
      const int vectors = aligned ? p.width / kValues : 0;
      float sum[1] = {0};
      for_each_values<kRowBlockThreads, kValues>(p.width, vectors, [&](int i, auto count) {
        constexpr int kCount = decltype(count)::value;
        Pack<R, kCount> pack_r = load<kCount>(x + i);
        float values[kCount];
        unpack(pack_r, values);
        if (p.branch.data != nullptr) {
          float update[kCount], gate[kCount];
          unpack(load<kCount>(branch + i), update);
          load_modulation(p.gate, gate_row, i, 1, gate);
#pragma unroll
          for (int k = 0; k < kCount; ++k) values[k] = fmaf(gate[k], update[k], values[k]);
          pack(values, pack_r);
          store(residual + i, pack_r);
          unpack(pack_r, values);
        }
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum[0] += values[k];
      });
      if (p.normed == nullptr) return;
      row_sum<kRowBlockThreads>(sum);
      const float mean = p.rms ? 0 : sum[0] / p.width;
      float square[1] = {0};
      for_each_values<kRowBlockThreads, kValues>(p.width, vectors, [&](int i, auto count) {
        constexpr int kCount = decltype(count)::value;
        float values[kCount];
        unpack(load<kCount>(r + i), values);
#pragma unroll
        for (int k = 0; k < kCount; ++k) square[0] = fmaf(values[k] - mean, values[k] - mean, square[0]);
      });
      row_sum<kRowBlockThreads>(square);
      const float rstd = 1.f / sqrtf(square[0] / p.width + p.eps);
      if (Group::index() == 0) write_stats(p, row, mean, rstd);
      for_each_values<kRowBlockThreads, kValues>(p.width, vectors, [&](int i, auto count) {
        constexpr int kCount = decltype(count)::value;
        float values[kCount], scale[kCount], shift[kCount];
        unpack(load<kCount>(r + i), values);
        load_modulation(p.scale, scale_row, i, 0, scale);
        load_modulation(p.shift, shift_row, i, 0, shift);
        modulate(mean, rstd, scale, shift, values);
        Pack<H, kCount> out;
        pack(values, out);
        store(normed + i, out);
      });
    });
    if (p.student.data != nullptr) {
      __syncthreads();  // other threads wrote the residual
      const RowCosine cosine = row_cosine<kRowBlockThreads>(p.student.row<R>(row), r, p.width, p.align_eps);
      if (Group::index() == 0) write_alignment(p, row, cosine);
    }
  }
}

// The part of a gradient that came through the norm: a = dy·(1 + scale), x̂ = (r − mean)/σ.
struct NormGradient {
  float mean, rstd, mean_a, mean_ax;

  __device__ float normalised(float r) const { return (r - mean) * rstd; }
  __device__ float operator()(float a, float x) const { return (a - mean_a - x * mean_ax) * rstd; }
};

// Means over the row of a and of a·x̂, for rows that several blocks share.
template <class R, class H>
__global__ void __launch_bounds__(kRowBlockThreads) gated_means_kernel(GatedBackwardParams p) {
  constexpr int kValues = RowPair<R, H>::kValues;
  const int64_t row = blockIdx.x;
  const R* r = p.residual.row<R>(row);
  const H* d_normed = p.d_normed.row<H>(row);
  const NormGradient norm{p.stats[row], p.stats[p.rows + row], 0, 0};
  float sums[2] = {0, 0};
  with_modulation<H>(p.wide_modulation, [&](auto modulation) {
    using M = decltype(modulation);
    const M* scale_row = p.scale.row<M>(group_of(row, p.runs.rows_per_group));
    const bool aligned = aligned16(r) && aligned16(d_normed) && aligned16(scale_row);
    for_each_values<kRowBlockThreads, kValues>(p.width, aligned ? p.width / kValues : 0, [&](int i, auto count) {
      constexpr int kCount = decltype(count)::value;
      float values[kCount], dy[kCount], scale[kCount];
      unpack(load<kCount>(r + i), values);
      unpack(load<kCount>(d_normed + i), dy);
      load_modulation(p.scale, scale_row, i, 0, scale);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const float a = dy[k] * (1 + scale[k]);
        sums[0] += a;
        sums[1] = fmaf(a, norm.normalised(values[k]), sums[1]);
      }
    });
  });
  block_sum<kRowBlockWarps>(sums);
  if (threadIdx.x != 0) return;
  p.means[row] = p.rms ? 0 : sums[0] / p.width;
  p.means[p.rows + row] = sums[1] / p.width;
}

constexpr int kBackwardThreads = 640;  // at most; 96 registers for each

// Columns of a thread: as many as its registers hold, with their sums and modulation.
template <int kValues>
constexpr int kBackwardColumns = kValues == 1 ? 4 : 8;

// A block takes a run of rows of one group, all of their columns or a tile of them: the scale is read once, and the sums
// over rows stay in registers. That of d_branch is the gate times that of dr, so the gate, which comes out of the L1
// cache for each row, needs none. kValues is 1 where rows are not aligned.
template <class R, class H, int kValues>
__global__ void __launch_bounds__(kBackwardThreads) gated_backward_kernel(GatedBackwardParams p) {
  constexpr int kSteps = kBackwardColumns<kValues> / kValues;
  const int64_t run = blockIdx.x / p.tiles;
  const int step_columns = blockDim.x * kValues;
  const int first = int(blockIdx.x % p.tiles) * kSteps * step_columns + threadIdx.x * kValues;
  const auto for_each_step = [&](auto body) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      if (const int i = first + step * step_columns; i < p.width) body(step, i);
  };
  const bool has_norm = p.d_normed.data != nullptr, has_branch = p.branch.data != nullptr;
  const int64_t begin = p.runs.begin(run), end = p.runs.end(run), group = run / p.runs.per_group;
  // Values i to i + kValues of the gate.
  const auto load_gate = [&](int i, float(&gate)[kValues]) {
    with_modulation<H>(p.wide_modulation, [&](auto modulation) {
      load_modulation(p.gate, p.gate.row<decltype(modulation)>(group), i, 1, gate);
    });
  };
  float scale[kSteps][kValues];  // with its 1
  with_modulation<H>(p.wide_modulation, [&](auto modulation) {
    const auto* scale_row = p.scale.row<decltype(modulation)>(group);
    for_each_step([&](int step, int i) {
      load_modulation(p.scale, scale_row, i, 0, scale[step]);
#pragma unroll
      for (int k = 0; k < kValues; ++k) scale[step][k] += 1;
    });
  });
  float d_gate[kSteps][kValues] = {}, d_shift[kSteps][kValues] = {}, d_scale[kSteps][kValues] = {};
  float dr_sum[kSteps][kValues] = {};

  for (int64_t row = begin; row < end; ++row) {
    // Everything is asked for before anything is looked at; only what one block of a model has comes later.
    Pack<R, kValues> residual[kSteps] = {}, d_residual[kSteps] = {}, other[kSteps] = {};
    Pack<H, kValues> d_normed[kSteps] = {}, branch[kSteps] = {};
    const auto fetch = [&](const RowInput& input, auto* packs) {
      if (input.data == nullptr) return;
      const auto* from = input.row<typename std::remove_pointer_t<decltype(packs)>::Type>(row);
      for_each_step([&](int step, int i) { packs[step] = load<kValues>(from + i); });
    };
    float toward = 0, along = 0;  // the alignment's factors of `other` and of the residual
    if (p.other.data != nullptr) {
      toward = p.factors[row];
      along = p.factors[p.rows + row];
    }
    const bool has_other = toward != 0 || along != 0;  // a row of no weight may hold anything and is not read
    if (has_norm || has_other) fetch(p.residual, residual);
    if (has_norm) fetch(p.d_normed, d_normed);
    fetch(p.d_residual, d_residual);
    fetch(p.branch, branch);

    NormGradient norm{};
    if (has_norm) {
      norm.mean = p.stats[row];
      norm.rstd = p.stats[p.rows + row];
      if (p.means != nullptr) {
        norm.mean_a = p.means[row];
        norm.mean_ax = p.means[p.rows + row];
      } else {
        float sums[2] = {0, 0};
        for_each_step([&](int step, int) {
          float r[kValues], dy[kValues];
          unpack(residual[step], r);
          unpack(d_normed[step], dy);
#pragma unroll
          for (int k = 0; k < kValues; ++k) {
            const float a = dy[k] * scale[step][k];
            sums[0] += a;
            sums[1] = fmaf(a, norm.normalised(r[k]), sums[1]);
          }
        });
        block_sum<kBackwardThreads / kWarpThreads>(sums, blockDim.x / kWarpThreads);
        norm.mean_a = p.rms ? 0 : sums[0] / p.width;
        norm.mean_ax = sums[1] / p.width;
      }
    }
    if (has_other) fetch(p.other, other);
    for_each_step([&](int step, int i) {
      float r[kValues], dr[kValues], values[kValues], gate[kValues];
      if (has_branch) load_gate(i, gate);  // ahead of the stores, which no load can pass
      unpack(residual[step], r);
      unpack(d_residual[step], dr);
      if (has_norm) {
        unpack(d_normed[step], values);
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
          const float x = norm.normalised(r[k]);
          dr[k] += norm(values[k] * scale[step][k], x);
          d_shift[step][k] += values[k];
          d_scale[step][k] = fmaf(x, values[k], d_scale[step][k]);
        }
      }
      if (has_other) {
        unpack(other[step], values);
#pragma unroll
        for (int k = 0; k < kValues; ++k) dr[k] += fmaf(toward, values[k], along * r[k]);
      }
      if (p.d_x != nullptr) {
        Pack<R, kValues> out;
        pack(dr, out);
        store(static_cast<R*>(p.d_x) + row * p.width + i, out);
      }
      if (has_branch) {
        unpack(branch[step], values);
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
          d_gate[step][k] = fmaf(values[k], dr[k], d_gate[step][k]);
          dr_sum[step][k] += dr[k];
          values[k] = gate[k] * dr[k];
        }
        Pack<H, kValues> out;
        pack(values, out);
        store(static_cast<H*>(p.d_branch) + row * p.width + i, out);
      }
    });
  }
  const auto write = [&](float* to, float (&sums)[kSteps][kValues]) {
    if (to == nullptr) return;
    for_each_step([&](int step, int i) {
      Pack<float, kValues> out;
      pack(sums[step], out);
      store(to + run * p.width + i, out);
    });
  };
  write(p.d_gate, d_gate);
  write(p.d_shift, d_shift);
  write(p.d_scale, d_scale);
  if (p.d_bias == nullptr) return;
  for_each_step([&](int step, int i) {
    float gate[kValues];
    load_gate(i, gate);
#pragma unroll
    for (int k = 0; k < kValues; ++k) dr_sum[step][k] *= gate[k];
  });
  write(p.d_bias, dr_sum);
}

using GatedForwardKernel = void (*)(GatedForwardParams);
using GatedBackwardKernel = void (*)(GatedBackwardParams);

// Calls visit(R{}, H{}) for the dtypes of the residual stream and of the half-block, which are equal or fp32 and half.
template <class Visit>
auto with_stream_types(int r, int h, Visit visit) {
  return with_type(
      h, [=](auto half_block) { return r == 0 ? visit(float{}, half_block) : visit(half_block, half_block); });
}

inline int64_t size_of_type(int type) { return type == 0 ? 4 : 2; }

struct GatedForwardPlan {
  GatedForwardKernel kernel;
  int row_threads;
};

// By shapes and alignment: one warp keeps rows of 2048 channels in registers, a block rows of 5120.
inline GatedForwardPlan gated_forward_plan(const GatedForwardParams& p, int r, int h) {
  const int64_t size_r = size_of_type(r), size_h = size_of_type(h), size_m = p.wide_modulation ? 4 : size_h;
  const bool vectors = p.width % (h == 0 ? 4 : 8) == 0 && p.x.aligned(size_r) && p.student.aligned(size_r) &&
                       p.branch.aligned(size_h) && p.gate.aligned(size_m) && p.shift.aligned(size_m) &&
                       p.scale.aligned(size_m);
  return with_stream_types(r, h, [&](auto x, auto y) -> GatedForwardPlan {
    using R = decltype(x);
    using H = decltype(y);
    if (!vectors || p.width > 5120) return {gated_forward_any_kernel<R, H>, kRowBlockThreads};
    if (p.width > 2048) return {gated_forward_kernel<R, H, kRowBlockThreads, 5120>, kRowBlockThreads};
    if (p.width > 1280) return {gated_forward_kernel<R, H, kWarpThreads, 2048>, kWarpThreads};
    if (p.width <= 512) return {gated_forward_kernel<R, H, kWarpThreads, 512>, kWarpThreads};  // more warps at once
    return {gated_forward_kernel<R, H, kWarpThreads, 1280>, kWarpThreads};
  });
}

struct GatedBackwardPlan {
  GatedBackwardKernel kernel;
  GatedBackwardKernel means_kernel;
  int threads;
  int tiles;
};

inline GatedBackwardPlan gated_backward_plan(const GatedBackwardParams& p, int r, int h) {
  const int64_t size_r = size_of_type(r), size_h = size_of_type(h), size_m = p.wide_modulation ? 4 : size_h;
  const bool vectors = p.width % (h == 0 ? 4 : 8) == 0 && p.residual.aligned(size_r) && p.d_residual.aligned(size_r) &&
                       p.other.aligned(size_r) && p.d_normed.aligned(size_h) && p.branch.aligned(size_h) &&
                       p.gate.aligned(size_m) && p.scale.aligned(size_m);
  const int columns = vectors ? kBackwardColumns<4> : kBackwardColumns<1>;
  const bool whole = p.width <= kBackwardThreads * columns;
  const int warps = (p.width - 1) / (kWarpThreads * columns) + 1;
  return with_stream_types(r, h, [&](auto x, auto y) -> GatedBackwardPlan {
    using R = decltype(x);
    using H = decltype(y);
    return {vectors ? gated_backward_kernel<R, H, RowPair<R, H>::kValues> : gated_backward_kernel<R, H, 1>,
            gated_means_kernel<R, H>, whole ? warps * kWarpThreads : kRowBlockThreads,
            whole ? 1 : (p.width - 1) / (kRowBlockThreads * columns) + 1};
  });
}

// Rows of a run: few enough to fill a card, enough that the partial sums, 16 bytes a channel against 12 or 24 a channel
// and row, cost little.
inline RowRuns gated_row_runs(int64_t rows, int64_t rows_per_group) {
  const int64_t wanted = rows / 512;
  return row_runs(rows_per_group, wanted < 8 ? 8 : wanted > 64 ? 64 : wanted);
}

}  // namespace layersync
