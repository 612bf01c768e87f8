// Storage types of the device code and their 16-byte accesses; arithmetic is always fp32.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#elif !defined(LAYERSYNC_CUDA_EMULATION)
#error "device code needs nvcc, or the emulator that the tests compile it with"
#endif

#include <cstdint>
#include <cstring>

#include "../row_layout.h"

namespace layersync {

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

__device__ inline void narrow(float value, float* out) { *out = value; }
__device__ inline void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }
__device__ inline void narrow(float value, __half* out) { *out = __float2half_rn(value); }

// Calls visit(T{}) with the type that an index stands for: 0 = fp32, 1 = bf16, 2 = fp16.
template <class Visit>
auto with_type(int type, Visit visit) {
  return type == 0 ? visit(float{}) : type == 1 ? visit(__nv_bfloat16{}) : visit(__half{});
}

// kValues neighbours of a row, moved by accesses of 16 bytes, or by one of 8; or a single value, for rows that are not
// aligned.
template <class T, int kValues>
struct Pack {
  using Type = T;
  static constexpr int kWords = kValues * int(sizeof(T)) / 4, kQuads = kWords / 4;
  static_assert(kWords * 4 == kValues * int(sizeof(T)) && (kWords % 4 == 0 || kWords == 2));
  uint32_t word[kWords];
};

template <class T>
struct Pack<T, 1> {
  using Type = T;
  T value;
};

template <int kValues, class T>
__device__ inline Pack<T, kValues> load(const T* p) {
  if constexpr (kValues == 1) {
    return {*p};
  } else {
    Pack<T, kValues> pack;
    if constexpr (Pack<T, kValues>::kQuads == 0) {
      const uint2 pair = *reinterpret_cast<const uint2*>(p);
      pack.word[0] = pair.x;
      pack.word[1] = pair.y;
    }
#pragma unroll
    for (int q = 0; q < pack.kQuads; ++q) {
      const uint4 quad = reinterpret_cast<const uint4*>(p)[q];
      pack.word[4 * q] = quad.x;
      pack.word[4 * q + 1] = quad.y;
      pack.word[4 * q + 2] = quad.z;
      pack.word[4 * q + 3] = quad.w;
    }
    return pack;
  }
}

template <int kValues, class T>
__device__ inline void store(T* p, const Pack<T, kValues>& pack) {
  if constexpr (kValues == 1) {
    *p = pack.value;
  } else {
    // By the intrinsic of a plain store: nvcc splits some assignments of a uint4 into four stores of 4 bytes.
    if constexpr (Pack<T, kValues>::kQuads == 0) __stwb(reinterpret_cast<uint2*>(p), {pack.word[0], pack.word[1]});
#pragma unroll
    for (int q = 0; q < pack.kQuads; ++q)
      __stwb(reinterpret_cast<uint4*>(p) + q,
             {pack.word[4 * q], pack.word[4 * q + 1], pack.word[4 * q + 2], pack.word[4 * q + 3]});
  }
}

// The one or two values of a word.
__device__ inline void unpack_word(uint32_t word, const float*, float* out) { *out = __uint_as_float(word); }

__device__ inline void unpack_word(uint32_t word, const __nv_bfloat16*, float* out) {
  out[0] = __uint_as_float(word << 16);
  out[1] = __uint_as_float(word & 0xffff0000u);
}

__device__ inline void unpack_word(uint32_t word, const __half*, float* out) {
  out[0] = __half2float(__ushort_as_half(uint16_t(word & 0xffffu)));
  out[1] = __half2float(__ushort_as_half(uint16_t(word >> 16)));
}

template <class T, int kValues>
__device__ inline void unpack(const Pack<T, kValues>& pack, float (&out)[kValues]) {
  if constexpr (kValues == 1) {
    out[0] = widen(pack.value);
  } else {
    constexpr int kPerWord = 4 / int(sizeof(T));
#pragma unroll
    for (int w = 0; w < kValues / kPerWord; ++w)
      unpack_word(pack.word[w], static_cast<const T*>(nullptr), out + w * kPerWord);
  }
}

template <class Pair>
__device__ inline uint32_t pair_bits(Pair pair) {
  uint32_t bits;
  static_assert(sizeof(pair) == sizeof(bits));
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

__device__ inline uint32_t pack_word(const float* in, const float*) { return __float_as_uint(*in); }
__device__ inline uint32_t pack_word(const float* in, const __nv_bfloat16*) {
  return pair_bits(__floats2bfloat162_rn(in[0], in[1]));
}
__device__ inline uint32_t pack_word(const float* in, const __half*) {
  return pair_bits(__floats2half2_rn(in[0], in[1]));
}

template <class T, int kValues>
__device__ inline void pack(const float (&in)[kValues], Pack<T, kValues>& out) {
  if constexpr (kValues == 1) {
    narrow(in[0], &out.value);
  } else {
    constexpr int kPerWord = 4 / int(sizeof(T));
#pragma unroll
    for (int w = 0; w < kValues / kPerWord; ++w)
      out.word[w] = pack_word(in + w * kPerWord, static_cast<const T*>(nullptr));
  }
}

LAYERSYNC_HOST_DEVICE inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace layersync
