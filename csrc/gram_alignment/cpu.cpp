// gram_alignment on the CPU: what becomes of the cosines of a strip. The products around it are the library's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../common/cpu/cpu.h"
#include "../common/cpu/outputs.h"
#include "arguments.h"
#include "cpu_kernels.h"

namespace layersync {
namespace {

Tensor strip(const Tensor& difference, int64_t diagonal, double margin, int64_t kind, std::optional<Tensor> gradient) {
  check_strip(difference, diagonal, kind, gradient);
  if (gradient.has_value())
    STD_TORCH_CHECK(gradient->scalar_type() == ScalarType::Float, "layersync_kernels: gradient must be float32");
  const int64_t samples = difference.size(0), rows = difference.size(1), columns = difference.size(2);
  Tensor sums = float_output(difference, {samples, rows});
  const GramStripArgs args{difference.data_ptr(),
                           gradient.has_value() ? static_cast<float*>(gradient->data_ptr()) : nullptr,
                           static_cast<float*>(sums.data_ptr()),
                           columns,
                           diagonal,
                           float(margin)};
  const auto kernel = LAYERSYNC_FOR_THIS_CPU(gram_kernels).strip[kind][type_index(difference.scalar_type())];
  torch::stable::parallel_for(0, samples * rows, rows_per_task(columns),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return sums;
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cpp, CPU, m) { m.impl("gram_alignment_strip", TORCH_BOX(&layersync::strip)); }
