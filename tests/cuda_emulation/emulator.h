// Runs CUDA device code on the CPU, one block at a time: threads are fibers that a seed shuffles, warps have 32 lanes.
// Shuffles and barriers are collective; lanes or threads that part ways before one are an error. Address and undefined
// behaviour sanitizers watch every access, alignment of 16-byte accesses included. Include before the device code.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "../../csrc/common/cpu/types.h"

#define LAYERSYNC_CUDA_EMULATION
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
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half2 {
  __half x, y;
};
inline float __fdividef(float x, float y) { return x / y; }
inline void __stwb(uint4* p, uint4 value) { *p = value; }

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx, blockDim;

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

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = size_t(128) << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  const char* waits_at = nullptr;  // the collective that it has reached
  bool done = false;
  uint32_t value = 0;  // what it gives to a shuffle, then what it gets
  int source = 0;      // the lane that it wants to hear
};

struct Machine {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  int running = 0;
  std::function<void()> kernel;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};
inline Machine machine;

constexpr char kBarrier[] = "__syncthreads";

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s in block %u\n", what, blockIdx.x);
  for (size_t i = 0; i < machine.fibers.size(); ++i)
    if (const Fiber& f = machine.fibers[i]; i == 0 || f.waits_at != machine.fibers[i - 1].waits_at)
      std::fprintf(stderr, "  thread %zu %s\n", i, f.done ? "has returned" : f.waits_at ? f.waits_at : "runs");
  std::exit(3);
}

// Hands control to the scheduler until the collective is complete.
inline void wait_at(const char* collective) {
  Fiber& self = machine.fibers[machine.running];
  self.waits_at = collective;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, machine.scheduler_stack, machine.scheduler_stack_bytes);
  swapcontext(&self.context, &machine.scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
  machine.kernel();
  Fiber& self = machine.fibers[machine.running];
  self.done = true;
  __sanitizer_start_switch_fiber(nullptr, machine.scheduler_stack, machine.scheduler_stack_bytes);
  swapcontext(&self.context, &machine.scheduler);
}

inline void run_until_it_waits(int thread) {
  machine.running = thread;
  threadIdx.x = unsigned(thread);
  Fiber& fiber = machine.fibers[thread];
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.data(), fiber.stack.size());
  swapcontext(&machine.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// Completes a collective of threads [begin, end) if all of them have reached the same one.
inline bool release(int begin, int end, bool barrier) {
  const char* collective = machine.fibers[begin].waits_at;
  if (collective == nullptr || (collective == kBarrier) != barrier) return false;
  std::vector<uint32_t> given;
  for (int i = begin; i < end; ++i) {
    if (machine.fibers[i].done || machine.fibers[i].waits_at != collective) return false;
    given.push_back(machine.fibers[i].value);
  }
  for (int i = begin; i < end; ++i) {
    machine.fibers[i].waits_at = nullptr;
    if (!barrier) machine.fibers[i].value = given[machine.fibers[i].source];
  }
  return true;
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4);
  if (mask != 0xffffffffu) fail("a shuffle of part of a warp");
  Fiber& self = machine.fibers[machine.running];
  std::memcpy(&self.value, &value, sizeof value);
  self.source = source;
  wait_at(name);
  std::memcpy(&value, &self.value, sizeof value);
  return value;
}

// kernel<<<blocks, threads>>>, `kernel` being called once per thread. The order of blocks and threads follows the seed:
// a warp, its lanes in random order, mostly runs ahead until it has to wait, which is what betrays a missing barrier.
inline void launch(unsigned blocks, int threads, unsigned seed, std::function<void()> kernel) {
  std::mt19937 random(seed);
  machine.kernel = std::move(kernel);
  blockDim.x = unsigned(threads);
  machine.fibers.resize(threads);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (unsigned block : order) {
    blockIdx.x = block;
    for (Fiber& fiber : machine.fibers) {
      fiber.done = false;
      fiber.waits_at = nullptr;
      getcontext(&fiber.context);
      fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, fiber_main, 0);
    }
    std::vector<std::vector<int>> runnable(threads / kLanes);  // threads by warp
    int left = 0, warp = 0;
    const auto make_runnable = [&](int begin, int end) {
      for (int i = begin; i < end; ++i) runnable[i / kLanes].push_back(i);
      left += end - begin;
    };
    make_runnable(0, threads);
    while (left > 0) {
      if (random() % 64 == 0) warp = int(random() % runnable.size());
      while (runnable[warp].empty()) warp = int(random() % runnable.size());
      std::vector<int>& lanes = runnable[warp];
      std::swap(lanes[random() % lanes.size()], lanes.back());
      const int thread = lanes.back();
      lanes.pop_back();
      --left;
      run_until_it_waits(thread);
      if (release(warp * kLanes, (warp + 1) * kLanes, false)) make_runnable(warp * kLanes, (warp + 1) * kLanes);
      if (left == 0 && release(0, threads, true)) make_runnable(0, threads);
    }
    for (const Fiber& fiber : machine.fibers)
      if (!fiber.done) fail("threads diverged before a collective");
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait_at(emulation::kBarrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, int(threadIdx.x) % emulation::kLanes ^ lanes);
}
