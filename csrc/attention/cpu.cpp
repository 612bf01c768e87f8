// Attention on the CPU: checks, outputs and threads around the kernels, which take a head at a time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/cpu/cpu.h"
#include "../common/cpu/outputs.h"
#include "../common/cpu/partial_sums.h"
#include "cpu_kernels.h"

namespace layersync {
namespace {

const AttentionKernels& kernels([[maybe_unused]] ScalarType dtype) {
#ifdef LAYERSYNC_X86
  if (dtype == ScalarType::BFloat16 && cpu_has_bf16()) return attention_kernels_avx512_bf16;
#endif
  return LAYERSYNC_FOR_THIS_CPU(attention_kernels);
}

// Queries, keys and values (B, N, heads * head_dim), collapsed to rows; they own copies of what has other strides.
struct Parts3 {
  Rows rows[3];

  Parts3(const Tensor& q, const Tensor& k, const Tensor& v) : rows{as_rows(q), as_rows(k), as_rows(v)} {
    check_equal_sizes("k", k, "q", q);
    check_equal_sizes("v", v, "q", q);
    check_dtype("k", rows[1].dtype, "q", rows[0].dtype);
    check_dtype("v", rows[2].dtype, "q", rows[0].dtype);
  }

  AttentionArgs arguments(const Tensor& q, int64_t heads) const {
    STD_TORCH_CHECK(q.dim() == 3 && heads > 0 && q.size(2) % heads == 0,
                    "layersync_kernels: queries, keys and values must be (B, N, heads * head_dim)");
    const int64_t head_dim = q.size(2) / heads;
    AttentionArgs args{};
    for (int which = 0; which < 3; ++which) {
      args.part[which] = rows[which].data;
      args.part_rows[which] = rows[which].layout;
    }
    args.tokens = q.size(1);
    args.heads = heads;
    args.head_dim = head_dim;
    args.scale = float(1 / std::sqrt(double(head_dim)));
    return args;
  }
};

// The tokens that are there of each sample; kernels rely on their range.
void set_lengths(AttentionArgs& args, const std::optional<Tensor>& lengths, int64_t batch) {
  if (!lengths.has_value()) return;
  STD_TORCH_CHECK(lengths->dim() == 1 && lengths->size(0) == batch && lengths->is_contiguous() && lengths->is_cpu() &&
                      lengths->scalar_type() == ScalarType::Long,
                  "layersync_kernels: lengths must be contiguous int64 (B,) on the CPU");
  args.lengths = static_cast<const int64_t*>(lengths->data_ptr());
  for (int64_t i = 0; i < batch; ++i)
    STD_TORCH_CHECK(args.lengths[i] >= 0 && args.lengths[i] <= args.tokens, "layersync_kernels: lengths[", i, "] is ",
                    args.lengths[i], "; expected 0 to ", args.tokens, " tokens");
}

void run(AttentionKernel kernel, const AttentionArgs& args, int64_t batch) {
  torch::stable::parallel_for(0, batch * args.heads, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t kLine = 64 / sizeof(float);
    std::vector<float> memory(size_t(attention_scratch(args.tokens, args.head_dim) + kLine));
    float* const aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    kernel(args, begin, end, aligned);
  });
}

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> lengths, int64_t heads) {
  const Parts3 in(q, k, v);
  AttentionArgs args = in.arguments(q, heads);
  set_lengths(args, lengths, q.size(0));
  const ScalarType dtype = in.rows[0].dtype;
  const AttentionKernel kernel = kernels(dtype).forward[type_index(dtype)];
  Tensor out = large_output_like(q);
  if (out.numel() == 0) return out;
  args.out = out.data_ptr();
  run(kernel, args, q.size(0));
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                    std::optional<Tensor> lengths, int64_t heads, bool bias) {
  const Parts3 in(q, k, v);
  const Rows gradient = as_rows(d_out);
  AttentionArgs args = in.arguments(q, heads);
  const int64_t batch = q.size(0), width = 3 * q.size(2);
  set_lengths(args, lengths, batch);
  check_equal_sizes("d_out", d_out, "q", q);
  const ScalarType dtype = in.rows[0].dtype;
  check_dtype("d_out", gradient.dtype, "q", dtype);
  const AttentionKernel kernel = kernels(dtype).backward[type_index(dtype)];
  Tensor out = large_output(q, {batch, args.tokens, width});
  Tensor sums = float_output(q, {batch, width}, bias);
  if (out.numel() == 0) {
    Tensor nothing = float_output(q, {width}, bias);
    torch::stable::zero_(nothing);
    return {out, nothing};
  }
  args.d_out = gradient.data;
  args.d_out_rows = gradient.layout;
  args.out = out.data_ptr();
  args.d_bias = bias ? static_cast<float*>(sums.data_ptr()) : nullptr;
  run(kernel, args, batch);
  return {out, bias ? torch::stable::view(sum_of_parts(sums, 1, batch), {width}) : sums};
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cpp, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&layersync::forward));
  m.impl("attention_backward", TORCH_BOX(&layersync::backward));
}
