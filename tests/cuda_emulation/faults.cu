// A launcher and kernels with one deliberate fault each, which the emulation has to catch: torch.ops.layersync_faults.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../../csrc/common/cuda/launch.h"
#include "../../csrc/common/host/outputs.h"

namespace layersync {
namespace {

constexpr int kThreads = 64;

struct Params {
  const float* x;
  float* y;
  int count;
};

__global__ void twice(Params p) {
  const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (i < p.count) p.y[i] = 2 * p.x[i];
}

// Every thread hands its value to its neighbour in the other warp.
template <bool kBarrier>
__global__ void exchange(Params p) {
  __shared__ float slots[kThreads];
  slots[threadIdx.x] = p.x[threadIdx.x];
  if (kBarrier) __syncthreads();
  p.y[threadIdx.x] = slots[threadIdx.x ^ 32];
}

__global__ void beyond_the_end(Params p) { p.y[threadIdx.x + 1] = p.x[threadIdx.x]; }

__global__ void misaligned(Params p) {
  if (threadIdx.x == 0) __stwb(reinterpret_cast<uint4*>(p.y + 1), {1, 2, 3, 4});
}

__global__ void diverged_barrier(Params) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void diverged_shuffle(Params) {
  if (threadIdx.x % 2) __shfl_xor_sync(0xffffffffu, 1.f, 1);
}

__global__ void half_a_warp(Params) { __shfl_xor_sync(0xffffu, 1.f, 1); }

// x: 64 floats. Returns twice as much, but for the fault.
Tensor run(const Tensor& x, std::string fault) {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (fault != "no guard") guard.emplace(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  static const cudaStream_t first = stream;
  const int64_t count = x.numel();
  if (fault == "borrowed sizes") {
    const torch::headeronly::IntHeaderOnlyArrayRef sizes{count};
    return torch::stable::new_empty(x, sizes);
  }
  Tensor y = new_output(x, {fault == "small output" ? count - 1 : count});
  Params params{floats(x), floats(y), int(count)};
  const auto start = [&](auto kernel, int64_t blocks = 1, int threads = kThreads) {
    launch("twice", kernel, blocks, threads, stream, params);
    return y;
  };
  if (fault == "no launch") return y;
  if (fault == "missing output") params.y = nullptr;
  if (fault == "output on the stack") params.y = reinterpret_cast<float*>(&params);
  if (fault == "wrong copy") {
    cudaMemcpyAsync(params.y, params.x, size_t(count + 1) * 4, cudaMemcpyDeviceToDevice, stream);
    return y;
  }
  if (fault == "cudaDeviceSynchronize") cudaDeviceSynchronize();
  if (fault == "cudaStreamSynchronize") cudaStreamSynchronize(stream);
  if (fault == "cudaStreamQuery") cudaStreamQuery(stream);
  if (fault == "cudaMalloc") cudaMalloc(&params.y, size_t(count) * 4);
  if (fault == "cudaMallocAsync") cudaMallocAsync(&params.y, size_t(count) * 4, stream);
  if (fault == "cudaFree") cudaFree(params.y);
  if (fault == "cudaMemcpy") cudaMemcpy(params.y, params.x, size_t(count) * 4, cudaMemcpyDeviceToDevice);
  if (fault == "cudaMemset") cudaMemset(params.y, 0, size_t(count) * 4);
  if (fault == "default stream") return launch("twice", twice, 1, kThreads, nullptr, params), y;
  if (fault == "kept stream") return launch("twice", twice, 1, kThreads, first, params), y;
  if (fault == "no blocks") return start(twice, 0);
  if (fault == "no threads") return start(twice, 1, 0);
  if (fault == "too many threads") return start(twice, 1, 2048);
  if (fault == "no kernel") return start(static_cast<void (*)(Params)>(nullptr));
  if (fault == "exchange") return start(exchange<true>);
  if (fault == "missing barrier") return start(exchange<false>);
  if (fault == "beyond the end") return start(beyond_the_end);
  if (fault == "misaligned") return start(misaligned);
  if (fault == "diverged barrier") return start(diverged_barrier);
  if (fault == "diverged shuffle") return start(diverged_shuffle);
  if (fault == "half a warp") return start(half_a_warp);
  return start(twice);
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY(layersync_faults, m) { m.def("run(Tensor x, str fault) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(layersync_faults, CUDA, m) { m.impl("run", TORCH_BOX(&layersync::run)); }
