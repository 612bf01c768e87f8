// gram_alignment on the GPU: the launch of what stands behind the library's products.
#include "cuda.cuh"

#ifndef __CUDA_ARCH__  // what compiles the kernels for a card would read torch's headers for nothing
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../common/cuda/launch.h"
#include "../common/host/outputs.h"
#include "arguments.h"

namespace layersync {
namespace {

Tensor strip(const Tensor& difference, int64_t diagonal, double margin, int64_t kind, std::optional<Tensor> gradient) {
  const torch::stable::accelerator::DeviceGuard guard(difference.get_device_index());
  check_same_gpu(difference, {&gradient});
  check_strip(difference, diagonal, kind, gradient);
  if (gradient.has_value()) check_dtype("gradient", gradient->scalar_type(), "difference", difference.scalar_type());
  const int64_t samples = difference.size(0), rows = difference.size(1), columns = difference.size(2);
  STD_TORCH_CHECK(columns <= kMaxWidth, "layersync_kernels: strips of ", columns, " tokens; at most ", kMaxWidth);
  Tensor sums = float_output(difference, {samples, rows});
  if (samples * rows == 0) return sums;
  const GramStripParams params{difference.data_ptr(), gradient.has_value() ? gradient->data_ptr() : nullptr,
                               floats(sums),          samples * rows,
                               int(columns),          int(diagonal),
                               float(margin),         int(kind)};
  launch("gram_alignment_strip", gram_strip_kernel_for(params, type_index(difference.scalar_type())), params.rows,
         kRowBlockThreads, current_stream(difference), params);
  return sums;
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cuda, CUDA, m) { m.impl("gram_alignment_strip", TORCH_BOX(&layersync::strip)); }
#endif
