// Cosine of two rows, over the whole range of fp32. The semantics are those of row_cosine.inl.
#pragma once

#include "row_kernel.cuh"

namespace layersync {

// Squares of a fp32 or bf16 row overflow from 1e19 on and vanish below 1e-19. Outside of this window a row is read
// again, scaled by a power of two. Not needed at the lower end where eps alone decides: rows of zeros are free.
constexpr float kSmallestSquare = 1e-30f, kLargestSquare = 1e37f, kEpsDecides = 1e-14f;

__device__ inline bool representable(float sum_of_squares, float eps) {
  return sum_of_squares < kLargestSquare && (sum_of_squares > kSmallestSquare || eps > kEpsDecides);
}

__device__ inline float range_factor(float sum_of_squares) {
  return sum_of_squares < kLargestSquare ? sum_of_squares > kSmallestSquare ? 1.f : 0x1p100f : 0x1p-80f;
}

struct RowCosine {
  float cosine, rnorm_student, rnorm_teacher;
};

// Three dot products (ss, tt, st) to the cosine; factors are those that the rows were scaled by.
__device__ inline RowCosine finish_row(const float (&dots)[3], float factor_s, float factor_t, float eps) {
  float norm_s = sqrtf(dots[0]), norm_t = sqrtf(dots[1]);
  norm_s += norm_s - norm_s;  // an infinite element makes a NaN of the row, as x / norm(x) does
  norm_t += norm_t - norm_t;
  if (norm_s < eps * factor_s || norm_t < eps * factor_t) {
    const float cosine = (norm_s - norm_s) + (norm_t - norm_t);  // 0, or the NaN of the other row
    return {cosine, cosine, cosine};
  }
  const float rnorm_s = 1.f / norm_s, rnorm_t = 1.f / norm_t;
  return {dots[2] * rnorm_s * rnorm_t, rnorm_s * factor_s, rnorm_t * factor_t};
}

__device__ inline void add_to_dots(float s, float t, float (&dots)[3]) {
  dots[0] = fmaf(s, s, dots[0]);
  dots[1] = fmaf(t, t, dots[1]);
  dots[2] = fmaf(s, t, dots[2]);
}

// For a caller that has the rows at hand: dots_of(factor_s, factor_t, dots) sums over them, scaled.
template <class DotsOf>
__device__ inline RowCosine cosine_of_dots(float eps, DotsOf dots_of) {
  float factor_s = 1, factor_t = 1, dots[3];
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    dots_of(factor_s, factor_t, dots);
    if (pass > 0 || (representable(dots[0], eps) && representable(dots[1], eps))) break;
    factor_s = range_factor(dots[0]);
    factor_t = range_factor(dots[1]);
  }
  return finish_row(dots, factor_s, factor_t, eps);
}

template <int kRowThreads, class S, class T>
__device__ inline RowCosine row_cosine(const S* s, const T* t, int width, float eps) {
  constexpr int kValues = RowPair<S, T>::kValues;
  const int index = RowGroup<kRowThreads>::index();
  const int vectors = aligned16(s) && aligned16(t) ? width / kValues : 0;
  float dots[3] = {0, 0, 0};
  for_each_vector<kRowThreads>(s, t, vectors, [&](int, const float (&a)[kValues], const float (&b)[kValues]) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) add_to_dots(a[k], b[k], dots);
  });
#pragma unroll 2
  for (int i = vectors * kValues + index; i < width; i += kRowThreads) add_to_dots(widen(s[i]), widen(t[i]), dots);
  row_sum<kRowThreads>(dots);
  if (representable(dots[0], eps) && representable(dots[1], eps)) return finish_row(dots, 1, 1, eps);

  const float factor_s = range_factor(dots[0]), factor_t = range_factor(dots[1]);
  float scaled[3] = {0, 0, 0};
#pragma unroll 1
  for (int i = index; i < width; i += kRowThreads) add_to_dots(widen(s[i]) * factor_s, widen(t[i]) * factor_t, scaled);
  row_sum<kRowThreads>(scaled);
  return finish_row(scaled, factor_s, factor_t, eps);
}

}  // namespace layersync
