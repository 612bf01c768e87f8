// Launches a kernel on torch's current stream; the host side of every CUDA op.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace layersync {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Unlike <<<>>> and cudaGetLastError, the call returns its own error and not one that an earlier kernel left behind.
template <class Params>
void launch(const char* name, void (*kernel)(Params), unsigned blocks, int threads, cudaStream_t stream,
            Params params) {
  void* arguments[] = {&params};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments, 0, stream);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, so it must not turn up again at somebody else's check
  const bool foreign_card = error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
  STD_TORCH_CHECK(false, "layersync_kernels: ", name, " could not be launched: ", cudaGetErrorString(error),
                  foreign_card ? ". The extension was built for other cards: rebuild it with TORCH_CUDA_ARCH_LIST set "
                                 "to this one's (`layersync doctor` tells both), or use backend='triton'"
                               : "");
}

}  // namespace layersync
