// Attention with AVX-512's products of bf16 pairs, for bf16 alone.
#ifdef LAYERSYNC_X86
#define LAYERSYNC_ISA_AVX512_BF16
#include "../common/cpu/target.h"
#include "cpu_kernels.h"

LAYERSYNC_BEGIN
namespace layersync::LAYERSYNC_ISA {
#include LAYERSYNC_VEC
#include "cpu_kernels.inl"

// Pairs of bf16, the lower half first. The products of a pair are exact, and summed in fp32.
struct Bf16Words {
  using Word = uint32_t;
  using Stored = bf16;
  static constexpr int64_t values = 2;

  static Word word(float first, float second) {  // of values that are bf16 already
    return float_to_bits(first) >> 16 | (float_to_bits(second) & 0xffff0000);
  }
  // By the instruction that flushes subnormals: the products take them for zeros anyway.
  static Vec words(const Vec& first, const Vec& second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first.v));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second.v));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  static Vec multiply(const Word& a, const Vec& b, const Vec& sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b.v)};
  }
};

constexpr AttentionKernels bf16_kernels = {{nullptr, forward<bf16, Bf16Words>, nullptr},
                                           {nullptr, backward<bf16, Bf16Words>, nullptr}};
}  // namespace layersync::LAYERSYNC_ISA
LAYERSYNC_END

const layersync::AttentionKernels layersync::LAYERSYNC_TABLE(attention_kernels) =
    layersync::LAYERSYNC_ISA::bf16_kernels;
#endif
