// Linear layers with GELU in the epilogue of cuBLASLt: checks, outputs and the state kept per GPU, around cublaslt.h.
#include "cublaslt.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "../common/cuda/device.h"
#include "../common/host/arguments.h"
#include "../common/host/outputs.h"

namespace layersync {
namespace {

using torch::stable::accelerator::DeviceGuard;

const cublaslt::Api& api() {
  static const cublaslt::Api functions = cublaslt::load("libcublasLt.so." + std::to_string(CUDART_VERSION / 1000));
  return functions;
}

// The current GPU's, which is device `index`. Kept for good: at exit the driver may be gone before a destructor runs.
cublaslt::Context& context(int index) {
  static std::mutex mutex;
  static auto& contexts = *new std::map<int, std::unique_ptr<cublaslt::Context>>;
  const std::lock_guard lock(mutex);
  auto& known = contexts[index];
  if (known == nullptr) {
    cublaslt::Handle handle = nullptr;
    const cublaslt::Status status = api().create(&handle);
    STD_TORCH_CHECK(status == cublaslt::kSuccess, "layersync_kernels: cublasLtCreate failed with status ", status);
    known = std::make_unique<cublaslt::Context>(api(), handle);
  }
  return *known;
}

int gemm_type(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "layersync_kernels: the epilogues of cuBLASLt take bfloat16 or float16");
  return dtype == ScalarType::Half ? cublaslt::kHalf : cublaslt::kBFloat16;
}

// What a view shifts off the 16 bytes that the epilogues and the fast GEMMs need costs one copy. Python cannot tell
// while it traces, so it does not decide this.
Tensor aligned(const Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0) return tensor;
  Tensor copy = output_like(tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

void check_matrix(const char* name, const Tensor& tensor, const Tensor& first) {
  check_dtype(name, tensor.scalar_type(), "the other matrix", first.scalar_type());
  STD_TORCH_CHECK(tensor.dim() == 2, "layersync_kernels: ", name, " must have 2 dimensions, not ", tensor.dim());
  const int64_t rows = tensor.size(0), width = tensor.size(1), stride = tensor.stride(0);
  STD_TORCH_CHECK(
      rows > 0 && width > 0 && width % 8 == 0 && tensor.stride(1) == 1 && stride >= width && stride % 8 == 0,
      "layersync_kernels: ", name, " of shape (", rows, ", ", width, ") and strides (", stride, ", ", tensor.stride(1),
      ") must have contiguous rows, a multiple of 8 wide and apart");
}

void check_inner(const Tensor& rows, int64_t depth, const Tensor& weight, int64_t width) {
  STD_TORCH_CHECK(rows.size(1) == depth && width % 8 == 0, "layersync_kernels: no product of (", rows.size(0), ", ",
                  rows.size(1), ") with a weight of shape (", weight.size(0), ", ", weight.size(1),
                  "): widths must fit, and be multiples of 8");
}

// False where the library has no plan.
bool run(const cublaslt::Gemm& gemm, const Tensor& like) {
  std::optional<Tensor> workspace;
  return context(like.get_device_index()).run(gemm, current_stream(like), [&](size_t bytes) {
    workspace = new_output(like, {int64_t(bytes)}, true, ScalarType::Byte);
    return workspace->data_ptr();
  });
}

template <size_t kCount>
void call(const char* op, std::array<StableIValue, kCount>& stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
}

// The library's product and our pass, where cuBLASLt has no plan with the epilogue.
std::tuple<Tensor, Tensor> plain_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 3> linear{from(x), from(weight), from(bias)};
  call("aten::linear", linear);
  const Tensor preactivation = to<Tensor>(linear[0]);
  std::array<StableIValue, 1> pass{from(preactivation)};
  call("layersync_cuda::gelu_forward", pass);
  return {to<Tensor>(pass[0]), preactivation};
}

std::tuple<Tensor, Tensor> plain_backward(const Tensor& d_output, const Tensor& weight, const Tensor& preactivation) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 4> pass{from(torch::stable::matmul(d_output, weight)), from(preactivation), from(false),
                                   from(true)};
  call("layersync_cuda::gelu_backward", pass);
  const Tensor d_preactivation = to<Tensor>(pass[0]), unused = to<Tensor>(pass[1]), sums = to<Tensor>(pass[2]);
  Tensor d_bias = new_output(preactivation, {preactivation.size(1)});
  torch::stable::copy_(d_bias, sums);
  return {d_preactivation, d_bias};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const DeviceGuard guard(x.get_device_index());
  const std::optional<Tensor> other = weight;
  check_same_gpu(x, {&other, &bias});
  const int type = gemm_type(x);
  check_matrix("x", x, x);
  check_matrix("weight", weight, x);
  const int64_t rows = x.size(0), outputs = weight.size(0);
  check_inner(x, weight.size(1), weight, outputs);
  if (bias.has_value()) {
    check_dtype("bias", bias->scalar_type(), "x", x.scalar_type());
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == outputs && bias->stride(0) == 1,
                    "layersync_kernels: the bias must be ", outputs, " contiguous values");
  }
  Tensor activation = new_output(x, {rows, outputs});
  Tensor preactivation = new_output(x, {rows, outputs});
  const Tensor a = aligned(weight), b = aligned(x);
  std::optional<Tensor> offset;
  if (bias.has_value()) offset = aligned(*bias);
  const auto gemm = cublaslt::forward_gemm(type, rows, x.size(1), outputs, b.data_ptr(), b.stride(0), a.data_ptr(),
                                           a.stride(0), offset.has_value() ? offset->data_ptr() : nullptr,
                                           activation.data_ptr(), preactivation.data_ptr());
  if (!run(gemm, x)) return plain_forward(x, weight, bias);
  return {activation, preactivation};
}

std::tuple<Tensor, Tensor> backward(const Tensor& d_output, const Tensor& weight, const Tensor& preactivation) {
  const DeviceGuard guard(preactivation.get_device_index());
  const std::optional<Tensor> gradient = d_output, other = weight;
  check_same_gpu(preactivation, {&gradient, &other});
  const int type = gemm_type(preactivation);
  check_matrix("d_output", d_output, preactivation);
  check_matrix("weight", weight, preactivation);
  check_matrix("preactivation", preactivation, preactivation);
  const int64_t rows = d_output.size(0), hidden = weight.size(1);
  check_inner(d_output, weight.size(0), weight, hidden);
  STD_TORCH_CHECK(preactivation.size(0) == rows && preactivation.size(1) == hidden && preactivation.is_contiguous(),
                  "layersync_kernels: the pre-activation must be contiguous, of shape (", rows, ", ", hidden, ")");
  Tensor d_preactivation = new_output(preactivation, {rows, hidden});
  Tensor d_bias = new_output(preactivation, {hidden});
  const Tensor a = aligned(weight), b = aligned(d_output), u = aligned(preactivation);
  const auto gemm =
      cublaslt::backward_gemm(type, rows, d_output.size(1), hidden, b.data_ptr(), b.stride(0), a.data_ptr(),
                              a.stride(0), u.data_ptr(), d_preactivation.data_ptr(), d_bias.data_ptr());
  if (!run(gemm, preactivation)) return plain_backward(d_output, weight, preactivation);
  return {d_preactivation, d_bias};
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cuda, CUDA, m) {
  m.impl("linear_gelu_gemm", TORCH_BOX(&layersync::forward));
  m.impl("gelu_mlp_gemm_backward", TORCH_BOX(&layersync::backward));
}
