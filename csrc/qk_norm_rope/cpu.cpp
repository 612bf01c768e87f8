// qk_norm_rope on the CPU: outputs, threads and the ordered sums around the loops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../common/cpu/cpu.h"
#include "../common/cpu/partial_sums.h"
#include "arguments.h"
#include "cpu_kernels.h"

namespace layersync {
namespace {

using Optional = std::optional<Tensor>;

QkHead head_of(const QkShape& shape, const Optional& q_weight, const Optional& k_weight, const Optional& cos,
               const Optional& sin, double eps, bool centred, bool interleaved) {
  check_norm_and_rope(shape, q_weight, k_weight, cos, sin);
  return {{floats_of(q_weight), floats_of(k_weight)},
          floats_of(cos),
          floats_of(sin),
          shape.heads,
          shape.width,
          shape.positions,
          float(eps),
          centred,
          interleaved};
}

Tensor forward(const Tensor& qkv, const Optional& q_weight, const Optional& k_weight, const Optional& cos,
               const Optional& sin, int64_t heads, double eps, bool centred, bool interleaved) {
  const QkShape shape = check_packed(qkv, heads);
  const QkHead head = head_of(shape, q_weight, k_weight, cos, sin, eps, centred, interleaved);
  Tensor out = large_output(qkv, {shape.batch, shape.positions, 2 * heads * shape.width});
  if (shape.empty()) return out;
  const Rows rows = as_rows(qkv);
  const QkForwardArgs args{head, rows.data, rows.layout, out.data_ptr(), streams(shape.width, {&out})};
  const auto kernel = LAYERSYNC_FOR_THIS_CPU(qk_kernels).forward[type_index(rows.dtype)];
  torch::stable::parallel_for(0, rows.count, rows_per_task(rows.width),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_q, const Tensor& d_k, const Tensor& d_v,
                                            const Optional& qkv, const Optional& q_weight, const Optional& k_weight,
                                            const Optional& cos, const Optional& sin, double eps, bool centred,
                                            bool interleaved, bool weights, bool bias) {
  const QkShape shape = check_head_gradients(d_q, d_k, d_v, qkv, q_weight.has_value());
  const QkHead head = head_of(shape, q_weight, k_weight, cos, sin, eps, centred, interleaved);
  STD_TORCH_CHECK(!weights || q_weight.has_value(), "layersync_kernels: there are no weights to give a gradient of");
  const int64_t all = 3 * shape.heads * shape.width;
  Tensor d_qkv = large_output(d_q, {shape.batch, shape.positions, all});
  if (shape.empty()) {
    Tensor d_weights = float_output(d_q, {2, shape.width}, weights), d_bias = float_output(d_q, {all}, bias);
    torch::stable::zero_(d_weights);
    torch::stable::zero_(d_bias);
    return {d_qkv, d_weights, d_bias};
  }
  const Parts parts = parts_of(1, shape.tokens());
  const Tensor weight_sums = float_output(d_q, {2 * parts.count * shape.heads, shape.width}, weights);
  const Tensor bias_sums = float_output(d_q, {parts.count, all}, bias);
  const TokenRows gradients[3] = {token_rows(d_q), token_rows(d_k), token_rows(d_v)};
  QkBackwardArgs args{};
  args.head = head;
  for (int kind = 0; kind < 3; ++kind)
    args.gradient[kind] = {gradients[kind].data, gradients[kind].batch_stride, gradients[kind].head_stride,
                           gradients[kind].position_stride};
  const std::optional<Rows> rows = as_rows(qkv);
  args.qkv = data_of(rows);
  if (rows.has_value()) args.layout = rows->layout;
  args.d_qkv = d_qkv.data_ptr();
  args.weight_sums = weights ? static_cast<float*>(weight_sums.data_ptr()) : nullptr;
  args.bias_sums = bias ? static_cast<float*>(bias_sums.data_ptr()) : nullptr;
  args.tokens = shape.tokens();
  args.parts = parts.count;
  args.rows_per_part = parts.rows;
  args.streaming = streams(shape.width, {&d_qkv});
  const auto kernel = LAYERSYNC_FOR_THIS_CPU(qk_kernels).backward[type_index(d_q.scalar_type())];
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  const Tensor d_bias = sum_of_parts(bias_sums, 1, parts.count);
  return {d_qkv, sum_of_parts(weight_sums, 2, parts.count * shape.heads),
          bias ? torch::stable::view(d_bias, {all}) : d_bias};
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cpp, CPU, m) {
  m.impl("qk_norm_rope_forward", TORCH_BOX(&layersync::forward));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&layersync::backward));
}
