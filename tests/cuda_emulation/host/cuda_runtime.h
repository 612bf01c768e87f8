// The part of the CUDA runtime that csrc's host code may call, and what it must not; runtime.cpp defines it.
#pragma once

#include <cstddef>
#include <cstring>

#define CUDART_VERSION 99000  // libcublasLt.so.99 is no library of NVIDIA's

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_size, unsigned y_size = 1, unsigned z_size = 1) : x(x_size), y(y_size), z(z_size) {}
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);

// What waits for the card or takes memory from it. Memory is torch's, whose allocator knows of streams and graphs.
// These fail by their names, whatever they are given.
#define EMULATION_FORBIDDEN(call)  \
  template <class... Arguments>    \
  cudaError_t call(Arguments...) { \
    emulation::forbid(#call);      \
  }

namespace emulation {

[[noreturn]] void forbid(const char* call);

// Checks a launch; runs it; `parameters` are what the kernel is given.
cudaError_t launch(void (*call)(const void*), const void* closure, bool null_kernel, dim3 grid, dim3 block,
                   size_t shared, cudaStream_t stream, const void* parameters, size_t bytes);

}  // namespace emulation

EMULATION_FORBIDDEN(cudaDeviceSynchronize)
EMULATION_FORBIDDEN(cudaThreadSynchronize)
EMULATION_FORBIDDEN(cudaStreamSynchronize)
EMULATION_FORBIDDEN(cudaStreamQuery)
EMULATION_FORBIDDEN(cudaStreamWaitEvent)
EMULATION_FORBIDDEN(cudaStreamCreate)
EMULATION_FORBIDDEN(cudaStreamDestroy)
EMULATION_FORBIDDEN(cudaEventCreate)
EMULATION_FORBIDDEN(cudaEventDestroy)
EMULATION_FORBIDDEN(cudaEventRecord)
EMULATION_FORBIDDEN(cudaEventQuery)
EMULATION_FORBIDDEN(cudaEventSynchronize)
EMULATION_FORBIDDEN(cudaMalloc)
EMULATION_FORBIDDEN(cudaMallocAsync)
EMULATION_FORBIDDEN(cudaMallocFromPoolAsync)
EMULATION_FORBIDDEN(cudaMallocHost)
EMULATION_FORBIDDEN(cudaMallocManaged)
EMULATION_FORBIDDEN(cudaMallocPitch)
EMULATION_FORBIDDEN(cudaMalloc3D)
EMULATION_FORBIDDEN(cudaHostAlloc)
EMULATION_FORBIDDEN(cudaHostRegister)
EMULATION_FORBIDDEN(cudaFree)
EMULATION_FORBIDDEN(cudaFreeAsync)
EMULATION_FORBIDDEN(cudaFreeHost)
EMULATION_FORBIDDEN(cudaMemcpy)
EMULATION_FORBIDDEN(cudaMemcpy2D)
EMULATION_FORBIDDEN(cudaMemcpyToSymbol)
EMULATION_FORBIDDEN(cudaMemcpyFromSymbol)
EMULATION_FORBIDDEN(cudaMemset)
EMULATION_FORBIDDEN(cudaMemset2D)
EMULATION_FORBIDDEN(cudaSetDevice)  // torch's guard does, and knows what to put back
EMULATION_FORBIDDEN(cudaDeviceReset)

#undef EMULATION_FORBIDDEN

// As in CUDA's own header, but that the type of the kernel, and so the size of its parameters, is not forgotten.
template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t shared = 0,
                             cudaStream_t stream = nullptr) {
  struct Closure {
    void (*kernel)(Params);
    Params params;
  };
  Closure closure{kernel, *static_cast<const Params*>(arguments[0])};
#if defined(__GNUC__) && !defined(__clang__)
  __builtin_clear_padding(&closure.params);  // which holds whatever the stack has held
#endif
  const auto call = [](const void* data) {
    const auto* launched = static_cast<const Closure*>(data);
    launched->kernel(launched->params);
  };
  return emulation::launch(call, &closure, kernel == nullptr, grid, block, shared, stream, &closure.params,
                           sizeof(Params));
}
