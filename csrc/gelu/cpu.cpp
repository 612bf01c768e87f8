// gelu on the CPU: outputs, threads and the ordered sum around the row kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "../common/cpu/cpu.h"
#include "../common/cpu/partial_sums.h"
#include "arguments.h"
#include "cpu_kernels.h"

namespace layersync {
namespace {

Tensor forward(const Tensor& preactivation) {
  check_preactivation(preactivation);
  const int64_t rows = preactivation.size(0), width = preactivation.size(1);
  Tensor activation = large_output_like(preactivation);
  const GeluForwardArgs args{preactivation.data_ptr(), activation.data_ptr(), width, streams(width, {&activation})};
  const auto kernel = LAYERSYNC_FOR_THIS_CPU(gelu_kernels).forward[type_index(preactivation.scalar_type())];
  torch::stable::parallel_for(0, rows, rows_per_task(width),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return activation;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_activation, const Tensor& preactivation, bool activation,
                                            bool bias) {
  check_gelu_gradient(d_activation, preactivation);
  const Rows gradient = as_rows(d_activation);
  const int64_t rows = preactivation.size(0), width = preactivation.size(1);
  const Parts parts = parts_of(1, rows);
  Tensor d_preactivation = large_output_like(preactivation), out = large_output_like(preactivation, activation);
  Tensor sums = float_output(preactivation, {parts.count, width}, bias);
  if (rows == 0) torch::stable::zero_(sums);
  const GeluBackwardArgs args{gradient.data,
                              gradient.layout.inner_stride,
                              preactivation.data_ptr(),
                              d_preactivation.data_ptr(),
                              activation ? out.data_ptr() : nullptr,
                              bias ? static_cast<float*>(sums.data_ptr()) : nullptr,
                              rows,
                              width,
                              parts.rows,
                              streams(width, {&d_preactivation, &out})};
  const auto kernel = LAYERSYNC_FOR_THIS_CPU(gelu_kernels).backward[type_index(preactivation.scalar_type())];
  torch::stable::parallel_for(0, rows == 0 ? 0 : parts.count, 1,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  const Tensor total = sum_of_parts(sums, 1, parts.count);
  return {d_preactivation, out, bias ? torch::stable::view(total, {width}) : total};
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cpp, CPU, m) {
  m.impl("gelu_forward", TORCH_BOX(&layersync::forward));
  m.impl("gelu_backward", TORCH_BOX(&layersync::backward));
}
