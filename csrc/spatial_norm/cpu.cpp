// spatial_norm on the CPU: the output and the threads around the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../common/cpu/cpu.h"
#include "../common/cpu/outputs.h"
#include "arguments.h"
#include "cpu_kernels.h"

namespace layersync {
namespace {

// As many channels of a sample as half a megabyte holds, which is in every core's cache: the tokens are read three
// times, from memory once. At least 64, so that a token is a few cache lines.
int64_t channels_per_block(int64_t tokens, int64_t width, int64_t size) {
  const int64_t most = std::clamp<int64_t>((int64_t(1) << 19) / (tokens * size), 64, kMostChannels);
  const int64_t blocks = (width - 1) / most + 1, even = (width - 1) / blocks + 1;
  return (even + 31) / 32 * 32;  // blocks start on vector boundaries
}

Tensor spatial_norm(const Tensor& x, double alpha, double eps) {
  check_samples(x);
  Tensor y = large_output_like(x);
  if (x.numel() == 0) return y;
  const Rows rows = as_rows(x);
  const int64_t tokens = x.size(1), width = rows.width;
  const int64_t channels = channels_per_block(tokens, width, int64_t(x.element_size()));
  const int64_t blocks = (width - 1) / channels + 1;
  const SpatialNormArgs args{rows.data, rows.layout, y.data_ptr(),     tokens,     width,
                             channels,  blocks,      float(1 - alpha), float(eps), streams(width, {&y})};
  const auto kernel = LAYERSYNC_FOR_THIS_CPU(spatial_norm_kernels).run[type_index(rows.dtype)];
  torch::stable::parallel_for(0, x.size(0) * blocks, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

}  // namespace
}  // namespace layersync

STABLE_TORCH_LIBRARY_IMPL(layersync_cpp, CPU, m) { m.impl("spatial_norm", TORCH_BOX(&layersync::spatial_norm)); }
