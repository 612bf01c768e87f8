// Eight floats in an AVX2 register. No include guard: see vec_generic.h.

struct Vec {
  static constexpr int64_t size = 8;
  static constexpr int registers = 16;  // as many of these as the machine has room for
  __m256 v;
};

inline Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }

inline Vec load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}

inline Vec load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }

inline __m128i pack(Vec v, const bf16*) {
  const __m256i bits = _mm256_castps_si256(v.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

inline __m128i pack(Vec v, const fp16*) { return _mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v.v); }

inline void stream(float* p, Vec v) { _mm256_stream_ps(p, v.v); }

template <class T>
inline void store(T* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), pack(v, p));
}

template <class T>
inline void stream(T* p, Vec v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), pack(v, p));
}

inline void stream_fence() { _mm_sfence(); }

inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }

inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }

inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }

inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }

inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

inline Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }

// min and max give b where either is NaN.
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }

inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }

// `value` where x > 0 or NaN, else 0.
inline Vec where_positive(Vec x, Vec value) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NLE_UQ), value.v)};
}

// A magnitude that is not negative, with the sign of another value.
inline Vec with_sign(Vec magnitude, Vec sign) {
  return {_mm256_or_ps(magnitude.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.f)))};
}

// v * 2^n for integral n from -252 to 254: in two factors, as one would leave the range of normal numbers.
inline Vec scale_by_power(Vec v, Vec n) {
  const __m256i power = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(power, 1), bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(power, half);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(v.v, first), second)};
}

inline float max(Vec v) {
  __m128 r = _mm_max_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
  r = _mm_max_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}

inline float sum(Vec v) {
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

struct VecPair {
  Vec first, second;
};

// The even and the odd ones of the values of two vectors.
inline VecPair deinterleave(Vec a, Vec b) {
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88));  // a0 a2 b0 b2 a4 a6 b4 b6
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0xdd));
  return {{_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8))}, {_mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8))}};
}

// Two vectors of values that alternate between those of even and odd.
inline VecPair interleave(Vec even, Vec odd) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  return {{_mm256_permute2f128_ps(low, high, 0x20)}, {_mm256_permute2f128_ps(low, high, 0x31)}};
}
