// CUDA device code as C++ of the host: what it needs of the language, and emulation::run, which calls a kernel once for
// each thread of a grid (emulator.cpp). Include before the device code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../csrc/common/cpu/types.h"

#define LAYERSYNC_CUDA_EMULATION
#define LAYERSYNC_MAX_ROW_BLOCKS emulation::max_row_blocks
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using __nv_bfloat16 = layersync::bf16;
using __half = layersync::fp16;

struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half2 {
  __half x, y;
};
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline void __stwb(uint4* p, uint4 value) { *p = value; }
inline void __stwb(uint2* p, uint2 value) { *p = value; }

inline float __uint_as_float(uint32_t bits) { return layersync::bits_to_float(bits); }
inline uint32_t __float_as_uint(float value) { return layersync::float_to_bits(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return layersync::to_float(value); }
inline float __half2float(__half value) { return layersync::to_float(value); }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

template <class T>
T emulated_narrow(float value) {
  T out;
  layersync::from_float(value, &out);
  return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return emulated_narrow<__nv_bfloat16>(value); }
inline __half __float2half_rn(float value) { return emulated_narrow<__half>(value); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx, blockDim;

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;

inline int64_t max_row_blocks = 4096;  // what row_grid takes at most; fewer, and a warp has several rows
inline unsigned seed = 0;              // of the order of blocks and threads

// kernel<<<blocks, threads>>>: calls `call(closure)` in every thread. Throws std::runtime_error where threads part ways
// before a collective.
void run(unsigned blocks, unsigned threads, void (*call)(const void*), const void* closure);

// __syncthreads, and a shuffle: gives `value` to the warp and gets that of a lane.
void barrier();
uint32_t shuffle(const char* name, unsigned mask, uint32_t value, unsigned lane);

}  // namespace emulation

inline void __syncthreads() { emulation::barrier(); }

template <class T>
T emulated_shuffle(const char* name, unsigned mask, T value, unsigned lane) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulation::shuffle(name, mask, bits, lane % emulation::kLanes);
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulated_shuffle("__shfl_xor_sync", mask, value, (threadIdx.x % emulation::kLanes) ^ unsigned(lanes));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulated_shuffle("__shfl_sync", mask, value, unsigned(lane));
}
