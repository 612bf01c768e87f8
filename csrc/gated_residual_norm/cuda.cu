// gated_residual_norm on the GPU: outputs and launches around the kernels of cuda.cuh.
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

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, std::optional<Tensor> branch,
                                                   std::optional<Tensor> gate, std::optional<Tensor> shift,
                                                   std::optional<Tensor> scale, std::optional<Tensor> student,
                                                   bool norm, bool rms, double eps, double align_eps,
                                                   ScalarType dtype) {
  const DeviceGuard guard(x.get_device_index());
  check_same_gpu(x, {&branch, &gate, &shift, &scale, &student});
  const GatedForwardInputs in = gated_forward_inputs(x, branch, gate, shift, scale, student, norm, dtype);
  check_row_limits(in.x);
  const int64_t rows = in.x.count;
  Tensor residual = output_like(x, branch.has_value());
  Tensor normed = output_like(x, norm, dtype);
  Tensor stats = float_output(x, {2, rows}, norm), alignment = float_output(x, {3, rows}, student.has_value());
  if (rows == 0) return {residual, normed, stats, alignment};

  const Modulation& modulation = in.modulation;
  GatedForwardParams params{row_input(in.x),
                            row_input(in.branch),
                            row_input(in.student),
                            row_input(modulation.gate),
                            row_input(modulation.shift),
                            row_input(modulation.scale),
                            modulation.dtype == ScalarType::Float,
                            rows,
                            modulation.rows_per_group,
                            int(in.x.width),
                            {},
                            rms,
                            float(eps),
                            float(align_eps),
                            branch.has_value() ? residual.data_ptr() : nullptr,
                            norm ? normed.data_ptr() : nullptr,
                            norm ? floats(stats) : nullptr,
                            student.has_value() ? floats(alignment) : nullptr};
  const GatedForwardPlan plan = gated_forward_plan(params, type_index(in.x.dtype), type_index(in.dtype));
  params.grid = row_grid(rows, plan.row_threads);
  launch("gated_residual_norm_forward", plan.kernel, params.grid.blocks, kRowBlockThreads, current_stream(x), params);
  return {residual, normed, stats, alignment};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(std::optional<Tensor> d_residual,
                                                            std::optional<Tensor> d_normed, const Tensor& residual,
                                                            std::optional<Tensor> branch, std::optional<Tensor> gate,
                                                            std::optional<Tensor> scale, std::optional<Tensor> stats,
                                                            std::optional<Tensor> other, std::optional<Tensor> factors,
                                                            bool rms, int64_t groups, bool bias) {
  const DeviceGuard guard(residual.get_device_index());
  check_same_gpu(residual, {&d_residual, &d_normed, &branch, &gate, &scale, &stats, &other, &factors});
  const GatedBackwardInputs in =
      gated_backward_inputs(d_residual, d_normed, residual, branch, gate, scale, stats, other, factors, groups, bias);
  check_row_limits(in.residual);
  const int64_t rows = in.residual.count, width = in.residual.width;
  const cudaStream_t stream = current_stream(residual);
  const bool norm = d_normed.has_value(), moved = norm || other.has_value();
  const bool sums[] = {groups > 0 && gate.has_value(), groups > 0 && norm, groups > 0 && norm, bias};
  Tensor d_x = output_like(residual, moved);
  Tensor d_branch = output_like(residual, branch.has_value(), in.dtype);
  const auto sums_of = [&](int64_t parts, bool wanted) { return float_output(residual, {parts, width}, wanted); };
  Tensor results[] = {sums_of(groups, sums[0]), sums_of(groups, sums[1]), sums_of(groups, sums[2]),
                      sums_of(groups, sums[3])};
  const auto outputs = [&] { return std::tuple(d_x, d_branch, results[0], results[1], results[2], results[3]); };
  if (rows == 0) {
    for (Tensor& result : results) torch::stable::zero_(result);
    return outputs();
  }

  const Modulation& modulation = in.modulation;
  GatedBackwardParams params{row_input(in.d_residual),
                             row_input(in.d_normed),
                             row_input(in.residual),
                             row_input(in.branch),
                             row_input(in.other),
                             row_input(modulation.gate),
                             row_input(modulation.scale),
                             modulation.dtype == ScalarType::Float,
                             rows,
                             int(width),
                             rms,
                             gated_row_runs(rows, modulation.rows_per_group),
                             1,
                             floats(in.stats),
                             floats(in.factors),
                             nullptr,
                             moved ? d_x.data_ptr() : nullptr,
                             branch.has_value() ? d_branch.data_ptr() : nullptr,
                             nullptr,
                             nullptr,
                             nullptr,
                             nullptr};
  const GatedBackwardPlan plan = gated_backward_plan(params, type_index(in.residual.dtype), type_index(in.dtype));
  params.tiles = plan.tiles;
  // Where a run is all of its group, what it sums up is the result.
  const int64_t runs = params.runs.per_group, all_runs = modulation.groups * runs;
  const bool finish = runs > 1;
  Tensor partials[] = {sums_of(all_runs, finish && sums[0]), sums_of(all_runs, finish && sums[1]),
                       sums_of(all_runs, finish && sums[2]), sums_of(all_runs, finish && sums[3])};
  float** const targets[] = {&params.d_gate, &params.d_shift, &params.d_scale, &params.d_bias};
  ColumnSumParams column_sum{{}, {}, modulation.groups, runs, int(width)};
  int count = 0;
  for (int i = 0; i < 4; ++i) {
    if (!sums[i]) continue;
    *targets[i] = floats(finish ? partials[i] : results[i]);
    column_sum.from[count] = *targets[i];
    column_sum.to[count++] = floats(results[i]);
  }
  std::optional<Tensor> means;
  if (norm && plan.tiles > 1) {
    means = float_output(residual, {2, rows});
    params.means = floats(*means);
    launch("gated_residual_norm_means", plan.means_kernel, rows, kRowBlockThreads, stream, params);
  }
  launch("gated_residual_norm_backward", plan.kernel, all_runs * plan.tiles, plan.threads, stream, params);
  if (finish && count > 0)
    launch("gated_residual_norm_sums", column_sum_kernel, column_sum_blocks(column_sum, count), kColumnSumThreads,
           stream, column_sum);
  return outputs();
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cuda, CUDA, m) {
  m.impl("gated_residual_norm_forward", TORCH_BOX(&layersync::forward));
  m.impl("gated_residual_norm_backward", TORCH_BOX(&layersync::backward));
}
#endif
