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

namespace layersync {

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

__device__ inline void narrow(float value, float* out) { *out = value; }
__device__ inline void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }
__device__ inline void narrow(float value, __half* out) { *out = __float2half_rn(value); }

// kValues neighbours of a row, moved by accesses of 16 bytes.
template <class T, int kValues>
struct Pack {
  static constexpr int kQuads = kValues * int(sizeof(T)) / 16;
  static_assert(kQuads * 16 == kValues * int(sizeof(T)));
  uint32_t word[4 * kQuads];
};

template <int kValues, class T>
__device__ inline Pack<T, kValues> load(const T* p) {
  Pack<T, kValues> pack;
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

template <int kValues, class T>
__device__ inline void store(T* p, const Pack<T, kValues>& pack) {
  // By the intrinsic of a plain store: nvcc splits some assignments of a uint4 into four stores of 4 bytes.
#pragma unroll
  for (int q = 0; q < pack.kQuads; ++q)
    __stwb(reinterpret_cast<uint4*>(p) + q,
           {pack.word[4 * q], pack.word[4 * q + 1], pack.word[4 * q + 2], pack.word[4 * q + 3]});
}

template <int kValues>
__device__ inline void unpack(const Pack<float, kValues>& pack, float (&out)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) out[i] = __uint_as_float(pack.word[i]);
}

template <int kValues>
__device__ inline void unpack(const Pack<__nv_bfloat16, kValues>& pack, float (&out)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    out[2 * i] = __uint_as_float(pack.word[i] << 16);
    out[2 * i + 1] = __uint_as_float(pack.word[i] & 0xffff0000u);
  }
}

template <int kValues>
__device__ inline void unpack(const Pack<__half, kValues>& pack, float (&out)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    out[2 * i] = __half2float(__ushort_as_half(uint16_t(pack.word[i] & 0xffffu)));
    out[2 * i + 1] = __half2float(__ushort_as_half(uint16_t(pack.word[i] >> 16)));
  }
}

template <class Pair>
__device__ inline uint32_t pair_bits(Pair pair) {
  uint32_t bits;
  static_assert(sizeof(pair) == sizeof(bits));
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

template <int kValues>
__device__ inline void pack(const float (&in)[kValues], Pack<float, kValues>& out) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) out.word[i] = __float_as_uint(in[i]);
}

template <int kValues>
__device__ inline void pack(const float (&in)[kValues], Pack<__nv_bfloat16, kValues>& out) {
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) out.word[i] = pair_bits(__floats2bfloat162_rn(in[2 * i], in[2 * i + 1]));
}

template <int kValues>
__device__ inline void pack(const float (&in)[kValues], Pack<__half, kValues>& out) {
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) out.word[i] = pair_bits(__floats2half2_rn(in[2 * i], in[2 * i + 1]));
}

__device__ inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace layersync
