// The part of the CUDA runtime that csrc's host code calls, declared for a compiler that only checks that code.
#pragma once

#include <cstddef>

#define CUDART_VERSION 13000

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice, cudaErrorUnsupportedPtxVersion };
struct dim3 {
  dim3(unsigned x, unsigned y = 1, unsigned z = 1);
};

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
