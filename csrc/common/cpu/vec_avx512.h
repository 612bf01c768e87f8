// Sixteen floats in an AVX-512 register. No include guard: see vec_generic.h.

struct Vec {
  static constexpr int64_t size = 16;
  static constexpr int registers = 32;  // as many of these as the machine has room for
  __m512 v;
};

inline Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }

inline Vec load(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

inline Vec load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }

// Not the AVX512_BF16 instruction: that one flushes subnormals, and machines without it need this anyway.
inline __m256i pack(Vec v, const bf16*) {
  const __m512i bits = _mm512_castps_si512(v.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
}

inline __m256i pack(Vec v, const fp16*) { return _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v.v); }

inline void stream(float* p, Vec v) { _mm512_stream_ps(p, v.v); }

template <class T>
inline void store(T* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack(v, p));
}

template <class T>
inline void stream(T* p, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack(v, p));
}

inline void stream_fence() { _mm_sfence(); }

inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }

inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }

inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }

inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }

inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

inline Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }

// min and max give b where either is NaN.
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }

inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }

// `value` where x > 0 or NaN, else 0.
inline Vec where_positive(Vec x, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NLE_UQ), value.v)};
}

// A magnitude that is not negative, with the sign of another value.
inline Vec with_sign(Vec magnitude, Vec sign) {
  return {_mm512_or_ps(magnitude.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.f)))};
}

// v * 2^n for integral n from -252 to 254.
inline Vec scale_by_power(Vec v, Vec n) { return {_mm512_scalef_ps(v.v, n.v)}; }

inline float max(Vec v) { return _mm512_reduce_max_ps(v.v); }

inline float sum(Vec v) { return _mm512_reduce_add_ps(v.v); }

struct VecPair {
  Vec first, second;
};

// The even and the odd ones of the values of two vectors.
inline VecPair deinterleave(Vec a, Vec b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(a.v, even, b.v)}, {_mm512_permutex2var_ps(a.v, odd, b.v)}};
}

// Two vectors of values that alternate between those of even and odd.
inline VecPair interleave(Vec even, Vec odd) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  return {{_mm512_permutex2var_ps(even.v, low, odd.v)}, {_mm512_permutex2var_ps(even.v, high, odd.v)}};
}
