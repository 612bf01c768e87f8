// Runs the kernels of csrc/gated_residual_norm/cuda.cuh in the emulator; results: those of the raw op, then how many
// runs each group of rows was cut into (backward).
#include "driver.h"

#include "../../csrc/gated_residual_norm/cuda.cuh"

using namespace driver;
using namespace layersync;

namespace {

void forward(int64_t rows, int width, int dtype, unsigned seed) {
  const Input x("x"), branch("branch"), gate("gate"), shift("shift"), scale("scale"), student("student");
  const bool norm = integer("norm"), wide = std::max({gate.type, shift.type, scale.type}) <= 0;
  const Buffer residual(branch.type < 0 ? 0 : size_t(rows * width) * x.item);
  const Buffer normed(norm ? size_t(rows * width) * item_size(dtype) : 0), stats(norm ? size_t(rows) * 8 : 0);
  const Buffer alignment(student.type < 0 ? 0 : size_t(rows) * 12);
  GatedForwardParams params{x.rows,
                            branch.rows,
                            student.rows,
                            gate.rows,
                            shift.rows,
                            scale.rows,
                            wide,
                            rows,
                            rows / integer("groups"),
                            width,
                            {},
                            integer("rms") != 0,
                            float(number("eps")),
                            float(number("align_eps")),
                            residual.as<void>(),
                            normed.as<void>(),
                            stats.as(),
                            alignment.as()};
  const GatedForwardPlan plan = gated_forward_plan(params, x.type, dtype);
  params.grid = row_grid(rows, plan.row_threads, integer("max_blocks"));
  emulation::launch(params.grid.blocks, kRowBlockThreads, seed, [=] { plan.kernel(params); });
  for (const Buffer* buffer : {&residual, &normed, &stats, &alignment}) write(*buffer);
}

void backward(int64_t rows, int width, int dtype, unsigned seed) {
  const Input d_residual("d_residual"), d_normed("d_normed"), residual("residual"), branch("branch");
  const Input gate("gate"), scale("scale"), other("other");
  const bool norm = d_normed.type >= 0, moved = norm || other.type >= 0, sums = integer("sums");
  const Buffer stats = read(norm ? size_t(rows) * 8 : 0), factors = read(other.type < 0 ? 0 : size_t(rows) * 8);
  const int64_t groups = integer("groups");
  const Buffer d_x(moved ? size_t(rows * width) * residual.item : 0);
  const Buffer d_branch(branch.type < 0 ? 0 : size_t(rows * width) * branch.item);
  const int64_t run_rows = integer("run_rows");
  const RowRuns runs = run_rows ? row_runs(rows / groups, run_rows) : gated_row_runs(rows, rows / groups);
  const int64_t all_runs = groups * runs.per_group;
  const size_t partial = sums ? size_t(all_runs * width) * 4 : 0, result = sums ? size_t(groups * width) * 4 : 0;
  const Buffer partials[] = {Buffer(gate.type < 0 ? 0 : partial), Buffer(norm ? partial : 0),
                             Buffer(norm ? partial : 0)};
  const Buffer results[] = {Buffer(gate.type < 0 ? 0 : result), Buffer(norm ? result : 0), Buffer(norm ? result : 0)};
  GatedBackwardParams params{d_residual.rows,
                             d_normed.rows,
                             residual.rows,
                             branch.rows,
                             other.rows,
                             gate.rows,
                             scale.rows,
                             std::max(gate.type, scale.type) <= 0,
                             rows,
                             width,
                             integer("rms") != 0,
                             runs,
                             1,
                             stats.as(),
                             factors.as(),
                             nullptr,
                             d_x.as<void>(),
                             d_branch.as<void>(),
                             partials[0].as(),
                             partials[1].as(),
                             partials[2].as()};
  const GatedBackwardPlan plan = gated_backward_plan(params, residual.type, dtype);
  params.tiles = plan.tiles;
  const Buffer means(norm && plan.tiles > 1 ? size_t(rows) * 8 : 0);
  params.means = means.as();
  if (params.means != nullptr)
    emulation::launch(unsigned(rows), kRowBlockThreads, seed, [=] { plan.means_kernel(params); });
  emulation::launch(unsigned(all_runs * plan.tiles), plan.threads, seed, [=] { plan.kernel(params); });
  ColumnSumParams sum{{}, {}, groups, runs.per_group, width};
  int count = 0;
  for (int i = 0; i < 3; ++i) {
    if (partials[i].size == 0) continue;
    sum.from[count] = partials[i].as();
    sum.to[count++] = results[i].as();
  }
  if (count > 0)
    emulation::launch(unsigned(column_sum_blocks(sum, count)), kColumnSumThreads, seed,
                      [=] { column_sum_kernel(sum); });
  for (const Buffer* buffer : {&d_x, &d_branch, &results[0], &results[1], &results[2]}) write(*buffer);
}

}  // namespace

int main(int argc, char** argv) {
  parse(argc, argv);
  (integer("backward") ? backward : forward)(integer("rows"), int(integer("width")), int(integer("dtype")),
                                             unsigned(integer("seed")));
  return 0;
}
