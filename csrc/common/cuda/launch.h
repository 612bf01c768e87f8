// The host side of every CUDA op: what its kernels read, and their launch on torch's current stream.
#pragma once

#include <optional>

#include "../host/rows.h"
#include "device.h"
#include "row_kernel.cuh"

namespace layersync {

constexpr int64_t kMaxWidth = int64_t(1) << 30;

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

inline float* floats(const std::optional<Tensor>& tensor) { return tensor.has_value() ? floats(*tensor) : nullptr; }

inline RowInput row_input(const Rows& rows) { return {rows.data, rows.layout}; }

inline RowInput row_input(const std::optional<Rows>& rows) { return rows.has_value() ? row_input(*rows) : RowInput{}; }

inline void check_row_limits(const Rows& rows) {
  STD_TORCH_CHECK(rows.width <= kMaxWidth, "layersync_kernels: rows of ", rows.width, " channels; at most ", kMaxWidth);
  STD_TORCH_CHECK(rows.count <= INT32_MAX, "layersync_kernels: ", rows.count, " rows; at most ", INT32_MAX);
}

// Unlike <<<>>> and cudaGetLastError, the call returns its own error and not one that an earlier kernel left behind.
template <class Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, cudaStream_t stream, Params params) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "layersync_kernels: ", name, " on too large a tensor, by ", blocks, " blocks");
  void* arguments[] = {&params};
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(threads), arguments, 0, stream);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // reported here, so it must not turn up again at somebody else's check
  const bool foreign_card = error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
  STD_TORCH_CHECK(false, "layersync_kernels: ", name, " could not be launched: ", cudaGetErrorString(error),
                  foreign_card ? ". The extension was built for other cards: rebuild it with TORCH_CUDA_ARCH_LIST set "
                                 "to this one's (`layersync doctor` tells both), or use backend='triton'"
                               : "");
}

}  // namespace layersync
