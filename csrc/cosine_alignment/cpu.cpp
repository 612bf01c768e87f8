// cosine_alignment on the CPU: checks, outputs, threads and the ordered reduction around the row kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/cpu/cpu.h"
#include "../common/cpu/outputs.h"
#include "../common/cpu/partial_sums.h"
#include "arguments.h"
#include "cpu_kernels.h"

namespace layersync {
namespace {

// Writes the loss, and returns what the mean multiplies its gradient by. One ordered sum over M floats: the result does
// not depend on the number of threads.
float reduce(const float* cosine, const float* weight, int64_t rows, int64_t reduction, float* loss) {
  if (reduction == kReductionNone) {
    for (int64_t i = 0; i < rows; ++i)
      loss[i] = weight == nullptr ? -cosine[i] : weight[i] == 0 ? 0.f : -weight[i] * cosine[i];
    return 1;
  }
  double total = 0, weights = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (weight == nullptr) {
      total += cosine[i];
    } else if (weight[i] != 0) {
      total += double(weight[i]) * cosine[i];
      weights += weight[i];
    }
  }
  if (weight == nullptr) weights = double(rows);
  const double factor = reduction != kReductionMean ? 1 : weights == 0 ? 0 : 1 / weights;
  *loss = total == 0 ? 0.f : float(-total * factor);
  return float(factor);
}

Tensor empty_loss(const Tensor& student, int64_t reduction) {
  return torch::stable::empty(reduction == kReductionNone ? leading_sizes(student) : std::vector<int64_t>{},
                              ScalarType::Float, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& student, const Tensor& teacher, std::optional<Tensor> weight,
                                           double eps, int64_t reduction) {
  const Rows s = as_rows(student), t = as_rows(teacher);
  check_alignment_inputs(s, t, student, teacher, weight, reduction);
  const int64_t rows = s.count;
  Tensor loss = empty_loss(student, reduction);
  Tensor stats = float_output(student, {3, rows}), scale = float_output(student, {});

  float* cosine = static_cast<float*>(stats.data_ptr());
  const float* w = weight.has_value() ? static_cast<const float*>(weight->data_ptr()) : nullptr;
  const CosineForwardArgs args{s.data,  t.data, s.layout,   t.layout,
                               s.width, w,      float(eps), {cosine, cosine + rows, cosine + 2 * rows}};
  const auto kernel = LAYERSYNC_FOR_THIS_CPU(cosine_kernels).forward[type_index(s.dtype)][type_index(t.dtype)];
  torch::stable::parallel_for(0, rows, rows_per_task(s.width),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });

  const float factor = reduce(cosine, w, rows, reduction, static_cast<float*>(loss.data_ptr()));
  *static_cast<float*>(scale.data_ptr()) = factor;
  return {loss, stats, scale};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                    std::optional<Tensor> weight, const Tensor& stats, const Tensor& scale,
                                    bool student_grad, bool teacher_grad) {
  const Rows s = as_rows(student), t = as_rows(teacher);
  check_alignment_inputs(s, t, student, teacher, weight, kReductionMean);
  check_saved(stats, scale, s.count);
  const int64_t rows = s.count;
  const Tensor g = torch::stable::contiguous(grad);
  check_dtype("the gradient", g.scalar_type(), "the loss", ScalarType::Float);
  STD_TORCH_CHECK(g.numel() == rows || g.dim() == 0, "layersync_kernels: gradient of ", g.numel(),
                  " values for a loss of ", rows, " tokens");

  Tensor grad_student = large_output_like(student, student_grad),
         grad_teacher = large_output_like(teacher, teacher_grad);
  if (!student_grad && !teacher_grad) return {grad_student, grad_teacher};

  float* cosine = static_cast<float*>(stats.data_ptr());
  const CosineBackwardArgs args{s.data,
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
  const auto kernel = LAYERSYNC_FOR_THIS_CPU(cosine_kernels).backward[type_index(s.dtype)][type_index(t.dtype)];
  torch::stable::parallel_for(0, rows, rows_per_task(s.width),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {grad_student, grad_teacher};
}

std::tuple<Tensor, Tensor> in_place(Tensor student, const Tensor& teacher, std::optional<Tensor> weight,
                                    const Tensor& grad, double eps, double scale, int64_t reduction, bool summed) {
  const Rows s = as_rows(student), t = as_rows(teacher);
  check_alignment_inputs(s, t, student, teacher, weight, reduction);
  STD_TORCH_CHECK(student.is_contiguous(), "layersync_kernels: student must be contiguous");
  const int64_t rows = s.count, width = s.width;
  const Tensor g = torch::stable::contiguous(grad);
  STD_TORCH_CHECK(g.scalar_type() == ScalarType::Float && (g.numel() == rows || g.dim() == 0),
                  "layersync_kernels: gradient of ", g.numel(), " values for a loss of ", rows, " tokens");

  const Parts parts = parts_of(1, rows);
  Tensor loss = empty_loss(student, reduction), cosine = float_output(student, {rows});
  Tensor sums = float_output(student, {parts.count, width}, summed);
  if (rows == 0) torch::stable::zero_(sums);
  const float* w = weight.has_value() ? static_cast<const float*>(weight->data_ptr()) : nullptr;
  const CosineInPlaceArgs args{student.data_ptr(),
                               t.data,
                               t.layout,
                               width,
                               w,
                               float(eps),
                               static_cast<const float*>(g.data_ptr()),
                               g.dim() == 0 ? 0 : 1,
                               float(scale),
                               static_cast<float*>(cosine.data_ptr()),
                               rows,
                               parts.rows,
                               summed ? static_cast<float*>(sums.data_ptr()) : nullptr};
  const auto kernel = LAYERSYNC_FOR_THIS_CPU(cosine_kernels).in_place[type_index(s.dtype)][type_index(t.dtype)];
  torch::stable::parallel_for(0, rows == 0 ? 0 : parts.count, 1,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  reduce(args.cosine, w, rows, reduction, static_cast<float*>(loss.data_ptr()));
  return {loss, sum_of_parts(sums, 1, parts.count)};
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cpp, CPU, m) {
  m.impl("cosine_alignment_forward", TORCH_BOX(&layersync::forward));
  m.impl("cosine_alignment_backward", TORCH_BOX(&layersync::backward));
  m.impl("cosine_alignment_in_place", TORCH_BOX(&layersync::in_place));
}
