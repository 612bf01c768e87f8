// qk_norm_rope on the GPU: outputs and launches around the kernels of cuda.cuh.
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
using Optional = std::optional<Tensor>;

QkHead head_of(const QkShape& shape, const Optional& q_weight, const Optional& k_weight, const Optional& cos,
               const Optional& sin, double eps, bool centred) {
  check_norm_and_rope(shape, q_weight, k_weight, cos, sin);
  STD_TORCH_CHECK(3 * shape.heads * shape.width <= kMaxWidth && shape.tokens() * 3 * shape.heads <= INT32_MAX,
                  "layersync_kernels: qk_norm_rope on too large a tensor");
  return {{floats_of(q_weight), floats_of(k_weight)},
          floats_of(cos),
          floats_of(sin),
          int(shape.heads),
          int(shape.width),
          int(shape.positions),
          float(eps),
          centred,
          0,
          0,
          0};
}

QkTokens walked(const TokenRows& rows) {
  return {rows.data, rows.batch_stride, rows.head_stride, rows.position_stride};
}

Tensor forward(const Tensor& qkv, const Optional& q_weight, const Optional& k_weight, const Optional& cos,
               const Optional& sin, int64_t heads, double eps, bool centred, bool interleaved) {
  const DeviceGuard guard(qkv.get_device_index());
  check_same_gpu(qkv, {&q_weight, &k_weight, &cos, &sin});
  const QkShape shape = check_packed(qkv, heads);
  Tensor out = new_output(qkv, {shape.batch, shape.positions, 2 * heads * shape.width});
  QkForwardParams params{
      head_of(shape, q_weight, k_weight, cos, sin, eps, centred), {}, out.data_ptr(), shape.tokens() * 2 * heads};
  if (shape.empty()) return out;
  const TokenRows tokens = token_rows(qkv);
  params.qkv = walked(tokens);
  const QkForwardPlan plan = qk_forward_plan(params, interleaved, type_index(qkv.scalar_type()));
  launch("qk_norm_rope_forward", plan.kernel, plan.blocks, kQkThreads, current_stream(qkv), params);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& d_q, const Tensor& d_k, const Tensor& d_v,
                                            const Optional& qkv, const Optional& q_weight, const Optional& k_weight,
                                            const Optional& cos, const Optional& sin, double eps, bool centred,
                                            bool interleaved, bool weights, bool bias) {
  const DeviceGuard guard(d_q.get_device_index());
  const Optional keys = d_k, values = d_v;
  check_same_gpu(d_q, {&keys, &values, &qkv, &q_weight, &k_weight, &cos, &sin});
  const QkShape shape = check_head_gradients(d_q, d_k, d_v, qkv, q_weight.has_value());
  QkBackwardParams params{};
  params.head = head_of(shape, q_weight, k_weight, cos, sin, eps, centred);
  STD_TORCH_CHECK(!weights || q_weight.has_value(), "layersync_kernels: there are no weights to give a gradient of");
  const int64_t all = 3 * shape.heads * shape.width;
  Tensor d_qkv = new_output(d_q, {shape.batch, shape.positions, all});
  Tensor d_weights = float_output(d_q, {2, shape.width}, weights), d_bias = float_output(d_q, {all}, bias);
  if (shape.empty()) {
    torch::stable::zero_(d_weights);
    torch::stable::zero_(d_bias);
    return {d_qkv, d_weights, d_bias};
  }
  const cudaStream_t stream = current_stream(d_q);
  const TokenRows gradients[3] = {token_rows(d_q), token_rows(d_k), token_rows(d_v)};
  for (int kind = 0; kind < 3; ++kind) params.gradient[kind] = walked(gradients[kind]);
  const TokenRows tokens = qkv.has_value() ? token_rows(*qkv) : TokenRows{};
  params.qkv = walked(tokens);
  params.d_qkv = d_qkv.data_ptr();
  params.tokens = shape.tokens();
  const QkBackwardPlan plan = qk_backward_plan(params, interleaved, type_index(d_q.scalar_type()));
  const int64_t runs = params.runs.per_group;
  const bool finish = bias && runs > 1;
  const Tensor weight_sums = float_output(d_q, {2 * runs * shape.heads, shape.width}, weights);
  const Tensor bias_sums = float_output(d_q, {runs, all}, finish);
  params.d_weight = weights ? floats(weight_sums) : nullptr;
  params.d_bias = bias ? floats(finish ? bias_sums : d_bias) : nullptr;
  launch("qk_norm_rope_backward", plan.kernel, plan.blocks, kQkThreads, stream, params);
  const auto add = [&](const char* name, const Tensor& from, Tensor& to, int64_t groups, int64_t parts, int64_t width) {
    const ColumnSumParams sum{{floats(from)}, {floats(to)}, groups, parts, int(width)};
    launch(name, column_sum_kernel, column_sum_blocks(sum, 1), kColumnSumThreads, stream, sum);
  };
  if (finish) add("qk_norm_rope_bias", bias_sums, d_bias, 1, runs, all);
  if (weights) add("qk_norm_rope_weights", weight_sums, d_weights, 2, runs * shape.heads, shape.width);
  return {d_qkv, d_weights, d_bias};
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cuda, CUDA, m) {
  m.impl("qk_norm_rope_forward", TORCH_BOX(&layersync::forward));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&layersync::backward));
}
#endif
