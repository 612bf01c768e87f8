// swiglu on the GPU: outputs and launches around the kernels of cuda.cuh.
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

Tensor forward(const Tensor& x12, bool gelu, bool interleaved) {
  const DeviceGuard guard(x12.get_device_index());
  const int64_t width = check_halves(x12);
  const Rows rows = as_rows(x12);
  check_row_limits(rows);
  Tensor out = new_output(x12, sizes_of_half(x12));
  if (out.numel() == 0) return out;
  const SwigluForwardParams params{row_input(rows), out.data_ptr(), rows.count, int(width)};
  const SwigluForwardPlan plan = swiglu_forward_plan(params, gelu, interleaved, type_index(rows.dtype));
  STD_TORCH_CHECK(plan.packs <= INT32_MAX, "layersync_kernels: swiglu_forward on too large a tensor");
  launch("swiglu_forward", plan.kernel, plan.blocks, kSwigluThreads, current_stream(x12), params);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x12, bool gelu, bool interleaved,
                                            bool output, bool bias) {
  const DeviceGuard guard(x12.get_device_index());
  const std::optional<Tensor> gradient = grad;
  check_same_gpu(x12, {&gradient});
  check_half_gradient(grad, x12);
  const int64_t width = check_halves(x12);
  const Rows rows = as_rows(x12), g = as_rows(grad);
  check_row_limits(rows);
  Tensor d_x12 = new_output(x12, {x12.sizes().begin(), x12.sizes().end()});
  Tensor out = new_output(x12, sizes_of_half(x12), output);
  Tensor d_bias = float_output(x12, {2 * width}, bias);
  if (rows.count == 0 || width == 0) {
    torch::stable::zero_(d_bias);
    return {d_x12, out, d_bias};
  }
  const cudaStream_t stream = current_stream(x12);
  const RowRuns runs = swiglu_row_runs(rows.count, int(width));
  const bool finish = bias && runs.per_group > 1;
  Tensor partials = float_output(x12, {runs.per_group, 2 * width}, finish);
  const SwigluBackwardParams params{row_input(g),
                                    row_input(rows),
                                    d_x12.data_ptr(),
                                    output ? out.data_ptr() : nullptr,
                                    bias ? floats(finish ? partials : d_bias) : nullptr,
                                    rows.count,
                                    int(width),
                                    runs,
                                    swiglu_tiles(int(width))};
  launch("swiglu_backward", swiglu_backward_kernel_for(params, gelu, interleaved, type_index(rows.dtype)),
         runs.per_group * params.tiles, kSwigluThreads, stream, params);
  if (finish) {
    const ColumnSumParams sum{{floats(partials)}, {floats(d_bias)}, 1, runs.per_group, int(2 * width)};
    launch("swiglu_sums", column_sum_kernel, column_sum_blocks(sum, 1), kColumnSumThreads, stream, sum);
  }
  return {d_x12, out, d_bias};
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cuda, CUDA, m) {
  m.impl("swiglu_forward", TORCH_BOX(&layersync::forward));
  m.impl("swiglu_backward", TORCH_BOX(&layersync::backward));
}
#endif
