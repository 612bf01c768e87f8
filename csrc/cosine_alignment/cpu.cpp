// cosine_alignment on the CPU: checks, outputs, threads and the ordered reduction around the row kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/cpu.h"
#include "../common/outputs.h"
#include "arguments.h"
#include "cpu_kernels.h"

namespace layersync {
namespace {

const CosineKernels& kernels() { return LAYERSYNC_FOR_THIS_CPU(cosine_kernels); }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& student, const Tensor& teacher, std::optional<Tensor> weight,
                                           double eps, int64_t reduction) {
  const Rows s = as_rows(student), t = as_rows(teacher);
  check_alignment_inputs(s, t, student, teacher, weight, reduction);
  const int64_t rows = s.count;
  const auto none = reduction == kReductionNone;
  const auto device = torch::stable::Device(torch::headeronly::DeviceType::CPU);
  Tensor loss = torch::stable::empty(none ? leading_sizes(student) : std::vector<int64_t>{}, ScalarType::Float,
                                     std::nullopt, device);
  Tensor stats = torch::stable::empty({3, rows}, ScalarType::Float, std::nullopt, device);
  Tensor scale = torch::stable::empty({}, ScalarType::Float, std::nullopt, device);

  float* cosine = static_cast<float*>(stats.data_ptr());
  const float* w = weight.has_value() ? static_cast<const float*>(weight->data_ptr()) : nullptr;
  const CosineForwardArgs args{s.data, t.data, s.layout,    t.layout,
                               s.width, w,     float(eps), {cosine, cosine + rows, cosine + 2 * rows}};
  const auto kernel = kernels().forward[type_index(s.dtype)][type_index(t.dtype)];
  torch::stable::parallel_for(0, rows, rows_per_task(s.width),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });

  float* out = static_cast<float*>(loss.data_ptr());
  float& factor = *static_cast<float*>(scale.data_ptr());
  factor = 1;
  if (none) {
    for (int64_t i = 0; i < rows; ++i) out[i] = w == nullptr ? -cosine[i] : w[i] == 0 ? 0.f : -w[i] * cosine[i];
    return {loss, stats, scale};
  }
  // One ordered sum over M floats: the result does not depend on the number of threads.
  double total = 0, weights = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (w == nullptr) {
      total += cosine[i];
    } else if (w[i] != 0) {
      total += double(w[i]) * cosine[i];
      weights += w[i];
    }
  }
  if (w == nullptr) weights = double(rows);
  if (reduction == kReductionMean) factor = weights == 0 ? 0.f : float(1 / weights);
  const double mean_factor = reduction == kReductionMean ? (weights == 0 ? 0 : 1 / weights) : 1;
  out[0] = total == 0 ? 0.f : float(-total * mean_factor);
  return {loss, stats, scale};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                    std::optional<Tensor> weight, const Tensor& stats, const Tensor& scale,
                                    bool student_grad, bool teacher_grad) {
  const Rows s = as_rows(student), t = as_rows(teacher);
  check_alignment_inputs(s, t, student, teacher, weight, kReductionMean);
  const int64_t rows = s.count;
  const Tensor g = torch::stable::contiguous(grad);
  STD_TORCH_CHECK(g.numel() == rows || g.dim() == 0, "layersync_kernels: gradient of ", g.numel(),
                  " values for a loss of ", rows, " tokens");

  Tensor grad_student = output_like(student, student_grad), grad_teacher = output_like(teacher, teacher_grad);
  if (!student_grad && !teacher_grad) return {grad_student, grad_teacher};

  float* cosine = static_cast<float*>(stats.data_ptr());
  const CosineBackwardArgs args{
      s.data,
      t.data,
      s.layout,
      t.layout,
      s.width,
      weight.has_value() ? static_cast<const float*>(weight->data_ptr()) : nullptr,
      {cosine, cosine + rows, cosine + 2 * rows},
      static_cast<const float*>(g.data_ptr()),
      g.dim() == 0 ? 0 : 1,
      *static_cast<const float*>(scale.data_ptr()),
      student_grad ? grad_student.data_ptr() : nullptr,
      teacher_grad ? grad_teacher.data_ptr() : nullptr,
      streams(s.width, {&grad_student, &grad_teacher})};
  const auto kernel = kernels().backward[type_index(s.dtype)][type_index(t.dtype)];
  torch::stable::parallel_for(0, rows, rows_per_task(s.width),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {grad_student, grad_teacher};
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cpp, CPU, m) {
  m.impl("cosine_alignment_forward", TORCH_BOX(&layersync::forward));
  m.impl("cosine_alignment_backward", TORCH_BOX(&layersync::backward));
}
