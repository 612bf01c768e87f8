// spatial_norm on the GPU: the output and the launch around the kernel of cuda.cuh.
#include "cuda.cuh"

#ifndef __CUDA_ARCH__  // what compiles the kernels for a card would read torch's headers for nothing
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/cuda/launch.h"
#include "../common/host/outputs.h"
#include "arguments.h"

namespace layersync {
namespace {

Tensor spatial_norm(const Tensor& x, double alpha, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_samples(x);
  Tensor y = output_like(x);
  if (x.numel() == 0) return y;
  const Rows rows = as_rows(x);
  check_row_limits(rows);
  SpatialNormParams params{row_input(rows),  y.data_ptr(), int(x.size(1)), int(rows.width), 0,
                           float(1 - alpha), float(eps)};
  const SpatialNormPlan plan = spatial_norm_plan(params, type_index(rows.dtype));
  params.tiles = plan.tiles;
  launch("spatial_norm", plan.kernel, x.size(0) * plan.tiles, kSpatialThreads, current_stream(x), params);
  return y;
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cuda, CUDA, m) { m.impl("spatial_norm", TORCH_BOX(&layersync::spatial_norm)); }
#endif
