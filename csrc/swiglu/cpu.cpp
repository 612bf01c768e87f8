// swiglu on the CPU: outputs, threads and the ordered sum around the row kernels.
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

Tensor forward(const Tensor& x12, bool gelu, bool interleaved) {
  const int64_t width = check_halves(x12);
  const Rows rows = as_rows(x12);
  Tensor out = large_output(x12, sizes_of_half(x12));
  const SwigluForwardArgs args{rows.data, rows.layout, out.data_ptr(), width, streams(width, {&out})};
  const auto kernel = LAYERSYNC_FOR_THIS_CPU(swiglu_kernels).forward[interleaved][gelu][type_index(rows.dtype)];
  torch::stable::parallel_for(0, rows.count, rows_per_task(width),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x12, bool gelu, bool interleaved,
                                            bool output, bool bias) {
  check_half_gradient(grad, x12);
  const int64_t width = check_halves(x12);
  const Rows rows = as_rows(x12), gradient = as_rows(grad);
  const Parts parts = parts_of(1, rows.count);
  Tensor d_x12 = large_output_like(x12);
  Tensor out = large_output(x12, sizes_of_half(x12), output);
  Tensor sums = float_output(x12, {parts.count, 2 * width}, bias);
  if (rows.count == 0) torch::stable::zero_(sums);
  const SwigluBackwardArgs args{gradient.data,
                                gradient.layout,
                                rows.data,
                                rows.layout,
                                d_x12.data_ptr(),
                                output ? out.data_ptr() : nullptr,
                                bias ? static_cast<float*>(sums.data_ptr()) : nullptr,
                                rows.count,
                                width,
                                parts.rows,
                                streams(width, {&d_x12, &out})};
  const auto kernel = LAYERSYNC_FOR_THIS_CPU(swiglu_kernels).backward[interleaved][gelu][type_index(rows.dtype)];
  torch::stable::parallel_for(0, rows.count == 0 ? 0 : parts.count, 1,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  const Tensor total = sum_of_parts(sums, 1, parts.count);
  return {d_x12, out, bias ? torch::stable::view(total, {2 * width}) : total};
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cpp, CPU, m) {
  m.impl("swiglu_forward", TORCH_BOX(&layersync::forward));
  m.impl("swiglu_backward", TORCH_BOX(&layersync::backward));
}
