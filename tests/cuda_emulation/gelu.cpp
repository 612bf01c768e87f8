// Runs the kernels of csrc/gelu/cuda.cuh in the emulator; results: those of the raw ops.
#include "driver.h"

#include "../../csrc/gelu/cuda.cuh"

using namespace driver;
using namespace layersync;

int main(int argc, char** argv) {
  parse(argc, argv);
  const unsigned seed = unsigned(integer("seed"));
  const int64_t rows = integer("rows");
  const int width = int(integer("width"));
  const Input preactivation("preactivation"), gradient("d_activation");
  const size_t bytes = size_t(rows * width) * preactivation.item;
  const Buffer activation(bytes);
  const GeluForwardParams forward{preactivation.rows.data, activation.as<void>(), rows * width};
  const auto forward_kernel = gelu_forward_kernel_for(forward, preactivation.type);
  emulation::launch(unsigned(gelu_forward_blocks(rows * width, preactivation.type)), kGeluThreads, seed,
                    [=] { forward_kernel(forward); });
  write(activation);
  if (gradient.type < 0) return 0;

  const bool bias = integer("bias");
  const RowRuns runs = integer("run_rows") ? row_runs(rows, integer("run_rows")) : gelu_row_runs(rows);
  const Buffer d_preactivation(bytes), again(integer("activation") ? bytes : 0);
  const Buffer partials(bias ? size_t(runs.per_group * width) * 4 : 0), d_bias(bias ? size_t(width) * 4 : 0);
  const GeluBackwardParams backward{
      gradient.rows, preactivation.rows.data, d_preactivation.as<void>(), again.as<void>(), partials.as(), rows, width,
      runs,          gelu_tiles(width)};
  const auto kernel = gelu_backward_kernel_for(backward, preactivation.type);
  emulation::launch(unsigned(runs.per_group * backward.tiles), kGeluThreads, seed, [=] { kernel(backward); });
  const ColumnSumParams sum{{partials.as()}, {d_bias.as()}, 1, runs.per_group, width};
  if (bias)
    emulation::launch(unsigned(column_sum_blocks(sum, 1)), kColumnSumThreads, seed, [=] { column_sum_kernel(sum); });
  for (const Buffer* buffer : {&d_preactivation, &again, &d_bias}) write(*buffer);
  return 0;
}
