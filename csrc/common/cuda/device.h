// What the host side of every CUDA op asks of its tensors' device, kernels or none.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

namespace layersync {

using torch::stable::Tensor;

inline void check_same_gpu(const Tensor& first, std::initializer_list<const std::optional<Tensor>*> others) {
  for (const auto* other : others)
    STD_TORCH_CHECK(!other->has_value() || (*other)->get_device() == first.get_device(),
                    "layersync_kernels: all tensors must be on the same GPU");
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  // By hand: torch has renamed its own check of these codes after 2.11.
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "layersync_kernels: GPU ", tensor.get_device_index(), " has no current stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace layersync
