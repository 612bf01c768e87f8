// Prints what the launchers of csrc/*/cuda.cu would launch for rows of a shape, one kernel a line: name, blocks,
// threads, tiles (see `parts`), parameters in hexadecimal. Everything is decided by the host functions of the .cuh
// files. Pointers are tensor number << 40, so that whoever sees an address knows the tensor; from 100 on they are small
// ones that stay in the caches. A kernel that walks over a run of rows is printed with runs of 2 and of 3 steps, and with how many more
// steps its runs have: the steps are all alike.
//   launches OP DTYPE(0 fp32, 1 bf16) ROWS WIDTH GROUPS
#include "../cuda_emulation/emulator.h"

#include "../../csrc/cosine_alignment/cuda.cuh"
#include "../../csrc/gated_residual_norm/cuda.cuh"
#include "../../csrc/gelu/cuda.cuh"
#include "../../csrc/qk_norm_rope/cuda.cuh"
#include "../../csrc/spatial_norm/cuda.cuh"
#include "../../csrc/swiglu/cuda.cuh"

#include <cxxabi.h>
#include <dlfcn.h>

#include <string>

using namespace layersync;

// No kernel runs here, so the emulator is not linked.
void emulation::barrier() { std::abort(); }
uint32_t emulation::shuffle(const char*, unsigned, uint32_t, unsigned) { std::abort(); }

namespace {

template <class T = void>
T* tensor(int number) {
  return reinterpret_cast<T*>(uintptr_t(number) << 40);
}

RowInput rows_of(int number, int64_t width) { return {tensor<const void>(number), {INT64_MAX, 0, width}}; }

template <class Params>
void print(const Params& params) {
  std::printf("\t");
  for (size_t i = 0; i < sizeof params; ++i) std::printf("%02x", reinterpret_cast<const unsigned char*>(&params)[i]);
}

// Blocks that share rows, each with its columns, where the last of them has fewer; else 1.
int parts(int width, int tiles, int columns) { return width % columns == 0 ? 1 : tiles; }

template <class Params>
void print(void (*kernel)(Params), int64_t blocks, int threads, const Params& params, int tiles) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(kernel), &info) == 0 || info.dli_sname == nullptr) std::exit(2);
  std::printf("%s\t%lld\t%d\t%d", abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr), (long long)blocks,
              threads, tiles);
  print(params);
}

template <class Params>
void print_line(void (*kernel)(Params), int64_t blocks, int threads, const Params& params, int tiles = 1) {
  print(kernel, blocks, threads, params, tiles);
  std::printf("\n");
}

template <class Params>
void print_runs(void (*kernel)(Params), int64_t blocks, int threads, Params params, int64_t step, int tiles = 1) {
  const int64_t steps = (params.runs.rows - 1) / step + 1;
  params.runs.rows = 2 * step;
  print(kernel, blocks, threads, params, tiles);
  params.runs.rows = 3 * step;
  print(params);
  std::printf("\t%lld\n", (long long)(steps - 2));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) return 1;
  const std::string op = argv[1];
  const int type = std::stoi(argv[2]);
  const int64_t rows = std::stoll(argv[3]), groups = std::stoll(argv[5]);
  const int width = std::stoi(argv[4]);
  const RowLayout layout{INT64_MAX, 0, width};
  if (op == "cosine_alignment") {
    const RowGrid grid = row_grid(rows, cosine_row_threads(width, type, type));
    print_line(
        cosine_forward_kernel_for(type, type, grid.row_threads), grid.blocks, kRowBlockThreads,
        CosineForwardParams{tensor(1), tensor(2), layout, layout, rows, width, grid, nullptr, 1e-6f, tensor<float>(3),
                            tensor<float>(4), tensor<float>(5), nullptr, tensor<float2>(6), tensor<float>(7)});
    print_line(cosine_backward_kernel_for(type, type, false, grid.row_threads), grid.blocks, kRowBlockThreads,
               CosineBackwardParams{tensor(1), tensor(2), layout, layout, rows, width, grid, nullptr, tensor<float>(3),
                                    tensor<float>(4), tensor<float>(5), tensor<float>(6), 0, tensor<float>(7),
                                    tensor(8), nullptr});
  } else if (op == "gated_residual_norm") {
    GatedForwardParams forward{rows_of(1, width),
                               rows_of(2, width),
                               {},
                               rows_of(101, 3 * width),
                               rows_of(102, 3 * width),
                               rows_of(103, 3 * width),
                               type == 0,
                               rows,
                               rows / groups,
                               width,
                               {},
                               false,
                               1e-6f,
                               1e-6f,
                               tensor(3),
                               tensor(4),
                               tensor<float>(5),
                               nullptr};
    const GatedForwardPlan plan = gated_forward_plan(forward, type, type);
    forward.grid = row_grid(rows, plan.row_threads);
    print_line(plan.kernel, forward.grid.blocks, kRowBlockThreads, forward);

    GatedBackwardParams backward{rows_of(1, width),
                                 rows_of(2, width),
                                 rows_of(3, width),
                                 rows_of(4, width),
                                 {},
                                 rows_of(101, 3 * width),
                                 rows_of(103, 3 * width),
                                 type == 0,
                                 rows,
                                 width,
                                 false,
                                 gated_row_runs(rows, rows / groups),
                                 1,
                                 tensor<float>(5),
                                 nullptr,
                                 nullptr,
                                 tensor(6),
                                 tensor(7),
                                 tensor<float>(111),
                                 tensor<float>(112),
                                 tensor<float>(113),
                                 tensor<float>(114)};
    const GatedBackwardPlan back = gated_backward_plan(backward, type, type);
    backward.tiles = back.tiles;
    print_runs(back.kernel, groups * backward.runs.per_group * back.tiles, back.threads, backward, 1);
  } else if (op == "gelu") {
    const GeluForwardParams forward{tensor(1), tensor(2), rows * width};
    print_line(gelu_forward_kernel_for(forward, type), gelu_forward_blocks(rows * width, type), kGeluThreads, forward);
    GeluBackwardParams backward{rows_of(1, width),  tensor(2), tensor(3), tensor(4),
                                tensor<float>(111), rows,      width,     gelu_row_runs(rows),
                                gelu_tiles(width)};
    print_runs(gelu_backward_kernel_for(backward, type), backward.runs.per_group * backward.tiles, kGeluThreads,
               backward, kGeluBytes / (kGeluColumns * (type == 0 ? 4 : 2)), parts(width, backward.tiles, kGeluTile));
  } else if (op == "spatial_norm") {
    SpatialNormParams params{rows_of(1, width), tensor(2), int(rows / groups), width, 0, 0.f, 1e-6f};
    const SpatialNormPlan plan = spatial_norm_plan(params, type);
    params.tiles = plan.tiles;
    print_line(plan.kernel, groups * plan.tiles, kSpatialThreads, params,
               parts(width, plan.tiles, kSpatialLanes * (type == 0 ? 4 : 8)));
  } else if (op.rfind("qk_norm_rope", 0) == 0) {  // width: of a head; rows: tokens
    const int heads = 16;
    const bool interleaved = op == "qk_norm_rope";
    const QkHead head{{tensor<float>(101), tensor<float>(102)},
                      tensor<float>(103),
                      tensor<float>(104),
                      heads,
                      width,
                      int(rows / groups),
                      1e-6f,
                      false,
                      0,
                      0,
                      0};
    const int64_t wide = 3 * heads * int64_t(width);
    QkForwardParams forward{head, {tensor(1), rows / groups * wide, 0, wide}, tensor(2), rows * 2 * heads};
    const QkForwardPlan plan = qk_forward_plan(forward, interleaved, type);
    print_line(plan.kernel, plan.blocks, kQkThreads, forward);
    QkBackwardParams backward{};
    backward.head = head;
    for (int kind = 0; kind < 3; ++kind)
      backward.gradient[kind] = {tensor(1 + kind), rows / groups * heads * width, width, int64_t(heads) * width};
    backward.qkv = {tensor(4), rows / groups * wide, 0, wide};
    backward.d_qkv = tensor(5);
    backward.d_weight = tensor<float>(111);
    backward.d_bias = tensor<float>(112);
    backward.tokens = rows;
    const QkBackwardPlan back = qk_backward_plan(backward, interleaved, type);
    print_runs(back.kernel, back.blocks, kQkThreads, backward, 1, (backward.tiles - 1) / kQkWarps + 1);
  } else if (op == "swiglu") {
    const SwigluForwardParams forward{rows_of(1, 2 * int64_t(width)), tensor(2), rows, width};
    const SwigluForwardPlan plan = swiglu_forward_plan(forward, false, false, type);
    print_line(plan.kernel, plan.blocks, kSwigluThreads, forward);
    SwigluBackwardParams backward{rows_of(1, width),
                                  rows_of(2, 2 * int64_t(width)),
                                  tensor(3),
                                  tensor(4),
                                  tensor<float>(111),
                                  rows,
                                  width,
                                  swiglu_row_runs(rows, width),
                                  swiglu_tiles(width)};
    print_runs(swiglu_backward_kernel_for(backward, false, false, type), backward.runs.per_group * backward.tiles,
               kSwigluThreads, backward, kSwigluBytes / (kSwigluColumns * (type == 0 ? 4 : 2)),
               parts(width, backward.tiles, kSwigluTile));
  } else {
    return 1;
  }
  return 0;
}
