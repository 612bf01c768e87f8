// The host side of every CUDA op: what its kernels read, and their launch on torch's current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "row_kernel.cuh"
#include "rows.h"

namespace layersync {

constexpr int64_t kMaxWidth = int64_t(1) << 30;

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

inline float* floats(const std::optional<Tensor>& tensor) { return tensor.has_value() ? floats(*tensor) : nullptr; }

inline RowInput row_input(const Rows& rows) { return {rows.data, rows.layout}; }

inline RowInput row_input(const std::optional<Rows>& rows) {
  return rows.has_value() ? row_input(*rows) : RowInput{};
}

inline void check_same_gpu(const Tensor& first, std::initializer_list<const std::optional<Tensor>*> others) {
  for (const auto* other : others)
    STD_TORCH_CHECK(!other->has_value() || (*other)->get_device() == first.get_device(),
                    "layersync_kernels: all tensors must be on the same GPU");
}

inline void check_row_limits(const Rows& rows) {
  STD_TORCH_CHECK(rows.width <= kMaxWidth, "layersync_kernels: rows of ", rows.width, " channels; at most ", kMaxWidth);
  STD_TORCH_CHECK(rows.count <= INT32_MAX, "layersync_kernels: ", rows.count, " rows; at most ", INT32_MAX);
}

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Unlike <<<>>> and cudaGetLastError, the call returns its own error and not one that an earlier kernel left behind.
template <class Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, cudaStream_t stream,
            Params params) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "layersync_kernels: ", name, " on too large a tensor, by ", blocks, " blocks");
  void* arguments[] = {&params};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)),
                                             dim3(threads), arguments, 0, stream);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, so it must not turn up again at somebody else's check
  const bool foreign_card = error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
  STD_TORCH_CHECK(false, "layersync_kernels: ", name, " could not be launched: ", cudaGetErrorString(error),
                  foreign_card ? ". The extension was built for other cards: rebuild it with TORCH_CUDA_ARCH_LIST set "
                                 "to this one's (`layersync doctor` tells both), or use backend='triton'"
                               : "");
}

}  // namespace layersync
