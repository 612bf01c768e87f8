// Attention on the CPU: checks, outputs and threads around the kernels, which take a head at a time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../common/cpu/cpu.h"
#include "../common/cpu/outputs.h"
#include "cpu_kernels.h"

namespace layersync {
namespace {

const AttentionKernels& kernels([[maybe_unused]] ScalarType dtype) {
#ifdef LAYERSYNC_X86
  if (dtype == ScalarType::BFloat16 && cpu_has_bf16()) return attention_kernels_avx512_bf16;
#endif
  return LAYERSYNC_FOR_THIS_CPU(attention_kernels);
}

AttentionArgs arguments(const Rows& qkv, const Tensor& tensor, int64_t heads) {
  STD_TORCH_CHECK(tensor.dim() == 3 && heads > 0 && qkv.width % (3 * heads) == 0,
                  "layersync_kernels: qkv must be (B, N, 3 * heads * head_dim)");
  const int64_t head_dim = qkv.width / (3 * heads);
  const float scale = float(1 / std::sqrt(double(head_dim)));
  return {qkv.data, qkv.layout, nullptr, {}, nullptr, nullptr, tensor.size(1), heads, head_dim, scale};
}

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

Tensor forward(const Tensor& qkv, std::optional<Tensor> lengths, int64_t heads) {
  const Rows in = as_rows(qkv);
  AttentionArgs args = arguments(in, qkv, heads);
  set_lengths(args, lengths, qkv.size(0));
  const AttentionKernel kernel = kernels(in.dtype).forward[type_index(in.dtype)];
  Tensor out = new_output(qkv, {qkv.size(0), args.tokens, heads * args.head_dim});
  if (out.numel() == 0) return out;
  advise_large_pages(out.data_ptr(), out.numel() * int64_t(out.element_size()));
  args.out = out.data_ptr();
  run(kernel, args, qkv.size(0));
  return out;
}

Tensor backward(const Tensor& d_out, const Tensor& qkv, std::optional<Tensor> lengths, int64_t heads) {
  const Rows in = as_rows(qkv), gradient = as_rows(d_out);
  AttentionArgs args = arguments(in, qkv, heads);
  set_lengths(args, lengths, qkv.size(0));
  STD_TORCH_CHECK(d_out.dim() == 3 && d_out.size(0) == qkv.size(0) && d_out.size(1) == args.tokens &&
                      gradient.width == heads * args.head_dim,
                  "layersync_kernels: d_out must be (B, N, heads * head_dim)");
  check_dtype("d_out", gradient.dtype, "qkv", in.dtype);
  const AttentionKernel kernel = kernels(in.dtype).backward[type_index(in.dtype)];
  Tensor out = large_output_like(qkv);
  if (out.numel() == 0) return out;
  args.d_out = gradient.data;
  args.d_out_rows = gradient.layout;
  args.out = out.data_ptr();
  run(kernel, args, qkv.size(0));
  return out;
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cpp, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&layersync::forward));
  m.impl("attention_backward", TORCH_BOX(&layersync::backward));
}
