// cosine_alignment on the GPU: the kernels, free of torch, so that the tests compile them for the host too.
// The semantics are those of cpu_kernels.inl.
#pragma once

#include "../common/cuda/row_cosine.cuh"

namespace layersync {

struct CosineForwardParams {
  const void* student;
  const void* teacher;
  RowLayout student_rows, teacher_rows;
  int64_t rows;
  int width;
  RowGrid grid;
  const float* weight;  // (rows,) or null for all ones
  float eps;
  float* cosine;  // (rows,)
  float* rnorm_student;
  float* rnorm_teacher;
  float* loss;       // (rows,) for reduction none, else null
  float2* partials;  // (blocks,) sums of w*c and of w, else null
  float* scale;      // set to 1 for reduction none
};

struct CosineFinishParams {
  const float2* partials;
  int count;
  bool mean;
  float* loss;   // ()
  float* scale;  // ()
};

// The gradient with respect to `a`, and to `b` where grad_b is given: cosine is symmetric, so a launcher that wants the
// teacher's alone swaps the two.
struct CosineBackwardParams {
  const void* a;
  const void* b;
  RowLayout a_rows, b_rows;
  int64_t rows;
  int width;
  RowGrid grid;
  const float* weight;
  const float* cosine;
  const float* rnorm_a;
  const float* rnorm_b;
  const float* grad;  // gradient of the loss: one value, or one per row
  int64_t grad_stride;
  const float* scale;
  void* grad_a;  // contiguous rows
  void* grad_b;  // contiguous rows, or null
};

template <class S, class T, int kRowThreads>
__global__ void __launch_bounds__(kRowBlockThreads, 6) cosine_forward_kernel(CosineForwardParams p) {
  using Group = RowGroup<kRowThreads>;
  float sums[2] = {0, 0};  // of w*c and of w
  const int64_t end = Group::end_row(p.grid, p.rows);
  for (int64_t row = Group::first_row(p.grid); row < end; row += Group::kGroups) {
    const float weight = p.weight == nullptr ? 1.f : p.weight[row];
    RowCosine r{0, 0, 0};
    if (weight != 0) {  // a masked row may hold anything and is not read
      const S* s = static_cast<const S*>(p.student) + row_offset(p.student_rows, row);
      const T* t = static_cast<const T*>(p.teacher) + row_offset(p.teacher_rows, row);
      r = row_cosine<kRowThreads>(s, t, p.width, p.eps);
      sums[0] += weight * r.cosine;
      sums[1] += weight;
    }
    if (Group::index() == 0) {
      p.cosine[row] = r.cosine;
      p.rnorm_student[row] = r.rnorm_student;
      p.rnorm_teacher[row] = r.rnorm_teacher;
      if (p.loss != nullptr) p.loss[row] = weight == 0 ? 0.f : -weight * r.cosine;
    }
  }
  if (p.partials == nullptr) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.scale = 1;
    return;
  }
  if (Group::index() != 0) sums[0] = sums[1] = 0;  // every thread of a row holds the same sums
  block_sum<kRowBlockWarps>(sums);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = {sums[0], sums[1]};
}

constexpr int kFinishThreads = 512;

__global__ void __launch_bounds__(kFinishThreads) cosine_finish_kernel(CosineFinishParams p) {
  float sums[2] = {0, 0};
#pragma unroll 4
  for (int i = threadIdx.x; i < p.count; i += kFinishThreads) {
    const float2 partial = p.partials[i];
    sums[0] += partial.x;
    sums[1] += partial.y;
  }
  block_sum<kFinishThreads / kWarpThreads>(sums);
  if (threadIdx.x != 0) return;
  const float scale = !p.mean ? 1.f : sums[1] == 0 ? 0.f : 1.f / sums[1];
  *p.scale = scale;
  *p.loss = sums[0] == 0 ? 0.f : -sums[0] * scale;
}

// factor * (b * rnorm_b - cosine * a * rnorm_a) * rnorm_a, the gradient of factor * cos(a, b) with respect to a.
// The order of the products keeps rows near 1e30 in range, where rnorm_a * rnorm_b would vanish.
struct RowGradient {
  float toward, away, factor;

  __device__ float operator()(float self, float other) const { return (other * toward - self * away) * factor; }
};

template <int kRowThreads, class T>
__device__ inline void zero_row(T* row, int width) {
  constexpr int kValues = 16 / int(sizeof(T));
  const int index = RowGroup<kRowThreads>::index();
  const int vectors = aligned16(row) ? width / kValues : 0;
#pragma unroll 1
  for (int v = index; v < vectors; v += kRowThreads) store(row + int64_t(v) * kValues, Pack<T, kValues>{});
#pragma unroll 1
  for (int i = vectors * kValues + index; i < width; i += kRowThreads) narrow(0, row + i);
}

template <class A, class B, bool kBoth, int kRowThreads>
__global__ void __launch_bounds__(kRowBlockThreads, kBoth ? 4 : 6) cosine_backward_kernel(CosineBackwardParams p) {
  constexpr int kValues = RowPair<A, B>::kValues;
  using Group = RowGroup<kRowThreads>;
  const int index = Group::index();
  const float scale = *p.scale;
  const int64_t end = Group::end_row(p.grid, p.rows);
  for (int64_t row = Group::first_row(p.grid); row < end; row += Group::kGroups) {
    A* grad_a = static_cast<A*>(p.grad_a) + row * p.width;
    B* grad_b = kBoth ? static_cast<B*>(p.grad_b) + row * p.width : nullptr;
    const float weight = p.weight == nullptr ? 1.f : p.weight[row];
    const float cosine = p.cosine[row], rnorm_a = p.rnorm_a[row], rnorm_b = p.rnorm_b[row];
    if (rnorm_a == 0 && rnorm_b == 0) {  // masked, or a row of zeros: its gradient is 0 whatever it holds
      zero_row<kRowThreads>(grad_a, p.width);
      if constexpr (kBoth) zero_row<kRowThreads>(grad_b, p.width);
      continue;
    }
    const float factor = -p.grad[row * p.grad_stride] * weight * scale;
    const RowGradient to_a{rnorm_b, cosine * rnorm_a, factor * rnorm_a};
    const RowGradient to_b{rnorm_a, cosine * rnorm_b, factor * rnorm_b};
    const A* a = static_cast<const A*>(p.a) + row_offset(p.a_rows, row);
    const B* b = static_cast<const B*>(p.b) + row_offset(p.b_rows, row);

    const bool aligned = aligned16(a) && aligned16(b) && aligned16(grad_a) && (!kBoth || aligned16(grad_b));
    const int vectors = aligned ? p.width / kValues : 0;
    for_each_vector<kRowThreads>(a, b, vectors, [&](int i, const float (&x)[kValues], const float (&y)[kValues]) {
      float values[kValues];
      Pack<A, kValues> out_a;
#pragma unroll
      for (int k = 0; k < kValues; ++k) values[k] = to_a(x[k], y[k]);
      pack(values, out_a);
      store(grad_a + i, out_a);
      if constexpr (kBoth) {
        Pack<B, kValues> out_b;
#pragma unroll
        for (int k = 0; k < kValues; ++k) values[k] = to_b(y[k], x[k]);
        pack(values, out_b);
        store(grad_b + i, out_b);
      }
    });
#pragma unroll 2
    for (int i = vectors * kValues + index; i < p.width; i += kRowThreads) {
      const float x = widen(a[i]), y = widen(b[i]);
      narrow(to_a(x, y), grad_a + i);
      if constexpr (kBoth) narrow(to_b(y, x), grad_b + i);
    }
  }
}

using CosineForwardKernel = void (*)(CosineForwardParams);
using CosineBackwardKernel = void (*)(CosineBackwardParams);

inline CosineForwardKernel cosine_forward_kernel_for(int student, int teacher, int row_threads) {
  return with_type(student, [=](auto s) {
    return with_type(teacher, [=](auto t) -> CosineForwardKernel {
      return row_threads == kWarpThreads ? cosine_forward_kernel<decltype(s), decltype(t), kWarpThreads>
                                         : cosine_forward_kernel<decltype(s), decltype(t), kRowBlockThreads>;
    });
  });
}

inline CosineBackwardKernel cosine_backward_kernel_for(int a, int b, bool both, int row_threads) {
  return with_type(a, [=](auto x) {
    return with_type(b, [=](auto y) -> CosineBackwardKernel {
      using A = decltype(x);
      using B = decltype(y);
      if (row_threads == kWarpThreads)
        return both ? cosine_backward_kernel<A, B, true, kWarpThreads>
                    : cosine_backward_kernel<A, B, false, kWarpThreads>;
      return both ? cosine_backward_kernel<A, B, true, kRowBlockThreads>
                  : cosine_backward_kernel<A, B, false, kRowBlockThreads>;
    });
  });
}

// One warp keeps up to 8 KiB of a row in flight by itself; longer rows get the block, so that few of them still fill
// the card.
inline int cosine_row_threads(int64_t width, int student, int teacher) {
  return width / (student == 0 && teacher == 0 ? 4 : 8) > 512 ? kRowBlockThreads : kWarpThreads;
}

}  // namespace layersync
