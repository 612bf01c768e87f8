// cosine_alignment on the GPU: checks, outputs and launches around the kernels of cuda.cuh.
#include "cuda.cuh"

#ifndef __CUDA_ARCH__  // what compiles the kernels for a card would read torch's headers for nothing
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/cuda/launch.h"
#include "../common/host/outputs.h"
#include "arguments.h"

namespace layersync {
namespace {

using torch::stable::accelerator::DeviceGuard;

RowGrid cosine_grid(const Rows& s, const Rows& t) {
  return row_grid(s.count, cosine_row_threads(s.width, type_index(s.dtype), type_index(t.dtype)));
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& student, const Tensor& teacher, std::optional<Tensor> weight,
                                           double eps, int64_t reduction) {
  const DeviceGuard guard(student.get_device_index());
  const cudaStream_t stream = current_stream(student);
  const std::optional<Tensor> other = teacher;
  check_same_gpu(student, {&other, &weight});
  const Rows s = as_rows(student), t = as_rows(teacher);
  check_alignment_inputs(s, t, student, teacher, weight, reduction);
  check_row_limits(s);
  const bool none = reduction == kReductionNone;
  const RowGrid grid = cosine_grid(s, t);

  Tensor loss = float_output(student, none ? leading_sizes(student) : std::vector<int64_t>{});
  Tensor stats = float_output(student, {3, s.count}), scale = float_output(student, {});
  Tensor partials = float_output(student, {grid.blocks, 2}, !none);

  float* loss_data = static_cast<float*>(loss.data_ptr());
  float* scale_data = static_cast<float*>(scale.data_ptr());
  float* cosine = static_cast<float*>(stats.data_ptr());
  float2* partials_data = none ? nullptr : static_cast<float2*>(partials.data_ptr());
  launch("cosine_alignment_forward",
         cosine_forward_kernel_for(type_index(s.dtype), type_index(t.dtype), grid.row_threads), grid.blocks,
         kRowBlockThreads, stream,
         CosineForwardParams{s.data, t.data, s.layout, t.layout, s.count, int(s.width), grid, floats(weight),
                             float(eps), cosine, cosine + s.count, cosine + 2 * s.count, none ? loss_data : nullptr,
                             partials_data, scale_data});
  if (!none)
    launch("cosine_alignment_finish", cosine_finish_kernel, 1, kFinishThreads, stream,
           CosineFinishParams{partials_data, int(grid.blocks), reduction == kReductionMean, loss_data, scale_data});
  return {loss, stats, scale};
}

// The gradient of the loss as one value, or one for each row. One value expanded over the rows needs no copy.
struct LossGradient {
  Tensor owner;
  int64_t stride;
};

LossGradient loss_gradient(const Tensor& grad, int64_t rows) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && (grad.dim() == 0 || grad.numel() == rows),
                  "layersync_kernels: expected a float32 gradient of one value or ", rows, ", got ", grad.numel());
  bool uniform = true;
  for (int64_t i = 0; i < grad.dim(); ++i) uniform = uniform && (grad.size(i) == 1 || grad.stride(i) == 0);
  if (uniform) return {grad, 0};
  return {torch::stable::contiguous(grad), 1};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                    std::optional<Tensor> weight, const Tensor& stats, const Tensor& scale,
                                    bool student_grad, bool teacher_grad) {
  const DeviceGuard guard(student.get_device_index());
  const cudaStream_t stream = current_stream(student);
  const std::optional<Tensor> others[] = {teacher, grad, stats, scale};
  check_same_gpu(student, {&others[0], &others[1], &others[2], &others[3], &weight});
  const Rows s = as_rows(student), t = as_rows(teacher);
  check_alignment_inputs(s, t, student, teacher, weight, kReductionMean);
  check_saved(stats, scale, s.count);
  check_row_limits(s);
  Tensor grad_student = output_like(student, student_grad), grad_teacher = output_like(teacher, teacher_grad);
  if ((!student_grad && !teacher_grad) || s.count == 0 || s.width == 0) return {grad_student, grad_teacher};

  const LossGradient loss_grad = loss_gradient(grad, s.count);
  const RowGrid grid = cosine_grid(s, t);
  const float* cosine = floats(stats);
  CosineBackwardParams params{s.data,
                              t.data,
                              s.layout,
                              t.layout,
                              s.count,
                              int(s.width),
                              grid,
                              floats(weight),
                              cosine,
                              cosine + s.count,
                              cosine + 2 * s.count,
                              floats(loss_grad.owner),
                              loss_grad.stride,
                              floats(scale),
                              grad_student.data_ptr(),
                              grad_teacher.data_ptr()};
  int a = type_index(s.dtype), b = type_index(t.dtype);
  if (!student_grad) {
    std::swap(a, b);
    std::swap(params.a, params.b);
    std::swap(params.a_rows, params.b_rows);
    std::swap(params.rnorm_a, params.rnorm_b);
    std::swap(params.grad_a, params.grad_b);
  }
  launch("cosine_alignment_backward", cosine_backward_kernel_for(a, b, student_grad && teacher_grad, grid.row_threads),
         grid.blocks, kRowBlockThreads, stream, params);
  return {grad_student, grad_teacher};
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cuda, CUDA, m) {
  m.impl("cosine_alignment_forward", TORCH_BOX(&layersync::forward));
  m.impl("cosine_alignment_backward", TORCH_BOX(&layersync::backward));
}
#endif
