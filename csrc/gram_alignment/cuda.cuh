// gram_alignment on the GPU: what becomes of the differences of cosines in a strip; free of torch, so that the tests
// compile it for the host too.
#pragma once

#include "../common/cuda/row_kernel.cuh"
#include "gram_kinds.h"

namespace layersync {

struct GramStripParams {
  const void* difference;  // (rows, columns)
  void* gradient;          // of the terms, and may be `difference`; or null
  float* sums;             // (rows)
  int64_t rows;
  int columns;
  int diagonal;  // the first columns count once, the others twice
  float margin;
  int kind;
};

struct GramTerm {
  float value, gradient;
};

// A NaN shows in both.
__device__ inline GramTerm gram_term(float difference, float margin, int kind) {
  const float distance = fabsf(difference), excess = distance - margin;
  if (excess <= 0) return {0, 0};
  if (kind == kGramSquare) return {excess * excess, copysignf(2 * excess, difference)};
  return {kind == kGramAbs ? distance : excess, copysignf(1 + (excess - excess), difference)};
}

constexpr int kGramSteps = 4;  // loads of a thread that are under way together

// A row for each block. kValues is 1 where rows are not aligned.
template <class T, int kValues>
__global__ void __launch_bounds__(kRowBlockThreads) gram_strip_kernel(GramStripParams p) {
  const int64_t row = blockIdx.x;
  const T* from = static_cast<const T*>(p.difference) + row * p.columns;
  T* to = static_cast<T*>(p.gradient) + row * p.columns;
  float total[1] = {0};
  const auto for_each_pack = [&](int first, auto body) {
#pragma unroll
    for (int step = 0; step < kGramSteps; ++step)
      if (const int i = first + step * kRowBlockThreads * kValues; i < p.columns) body(step, i);
  };
  for (int first = threadIdx.x * kValues; first < p.columns; first += kGramSteps * kRowBlockThreads * kValues) {
    Pack<T, kValues> packs[kGramSteps];
    for_each_pack(first, [&](int step, int i) { packs[step] = load<kValues>(from + i); });
    for_each_pack(first, [&](int step, int i) {
      float values[kValues];
      unpack(packs[step], values);
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        const GramTerm term = gram_term(values[k], p.margin, p.kind);
        total[0] += i + k < p.diagonal ? term.value : 2 * term.value;
        values[k] = term.gradient;
      }
      if (p.gradient == nullptr) return;
      pack(values, packs[step]);
      store(to + i, packs[step]);
    });
  }
  block_sum<kRowBlockWarps>(total);
  if (threadIdx.x == 0) p.sums[row] = total[0];
}

using GramStripKernel = void (*)(GramStripParams);

inline GramStripKernel gram_strip_kernel_for(const GramStripParams& p, int type) {
  const int size = type == 0 ? 4 : 2;
  const bool vectors = p.columns % (16 / size) == 0 && aligned16(p.difference) && aligned16(p.gradient);
  return with_type(type, [=](auto t) -> GramStripKernel {
    using T = decltype(t);
    return vectors ? gram_strip_kernel<T, 16 / int(sizeof(T))> : gram_strip_kernel<T, 1>;
  });
}

}  // namespace layersync
