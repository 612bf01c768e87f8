// tanh-GELU on the GPU: outputs and launches around the kernels of cuda.cuh.
#include "cuda.cuh"

#ifndef __CUDA_ARCH__  // what compiles the kernels for a card would read torch's headers for nothing
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../common/cuda/launch.h"
#include "../common/host/outputs.h"
#include "arguments.h"

namespace layersync {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor forward(const Tensor& preactivation) {
  const DeviceGuard guard(preactivation.get_device_index());
  check_preactivation(preactivation);
  Tensor activation = output_like(preactivation);
  const int64_t count = preactivation.numel();
  if (count == 0) return activation;
  const int type = type_index(preactivation.scalar_type());
  const GeluForwardParams params{preactivation.data_ptr(), activation.data_ptr(), count};
  launch("gelu_forward", gelu_forward_kernel_for(params, type), gelu_forward_blocks(count, type), kGeluThreads,
         current_stream(preactivation), params);
  return activation;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_activation, const Tensor& preactivation, bool activation,
                                            bool bias) {
  const DeviceGuard guard(preactivation.get_device_index());
  const std::optional<Tensor> gradient = d_activation;
  check_same_gpu(preactivation, {&gradient});
  check_gelu_gradient(d_activation, preactivation);
  const Rows d = as_rows(d_activation);
  check_row_limits(d);
  const cudaStream_t stream = current_stream(preactivation);
  Tensor d_preactivation = output_like(preactivation);
  Tensor value = output_like(preactivation, activation);
  Tensor d_bias = float_output(preactivation, {d.width}, bias);
  if (d.count == 0 || d.width == 0) {
    torch::stable::zero_(d_bias);
    return {d_preactivation, value, d_bias};
  }
  const RowRuns runs = gelu_row_runs(d.count);
  const bool finish = bias && runs.per_group > 1;
  Tensor partials = float_output(preactivation, {runs.per_group, d.width}, finish);
  const GeluBackwardParams params{row_input(d),
                                  preactivation.data_ptr(),
                                  d_preactivation.data_ptr(),
                                  activation ? value.data_ptr() : nullptr,
                                  bias ? floats(finish ? partials : d_bias) : nullptr,
                                  d.count,
                                  int(d.width),
                                  runs,
                                  gelu_tiles(int(d.width))};
  launch("gelu_backward", gelu_backward_kernel_for(params, type_index(d.dtype)), runs.per_group * params.tiles,
         kGeluThreads, stream, params);
  if (finish) {
    const ColumnSumParams sum{{floats(partials)}, {floats(d_bias)}, 1, runs.per_group, int(d.width)};
    launch("gelu_sums", column_sum_kernel, column_sum_blocks(sum, 1), kColumnSumThreads, stream, sum);
  }
  return {d_preactivation, value, d_bias};
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cuda, CUDA, m) {
  m.impl("gelu_forward", TORCH_BOX(&layersync::forward));
  m.impl("gelu_backward", TORCH_BOX(&layersync::backward));
}
#endif
