// The CPU kernels of gated_residual_norm as one table per instruction set.
#pragma once

#include <cstdint>

#include "../common/cpu/cpu.h"
#include "../common/row_layout.h"

namespace layersync {

// A (G, D) tensor of fp32, or null for what stands for its absence.
struct ModulationRows {
  const float* data;
  int64_t stride;
};

struct ResidualNormForwardArgs {
  const void* x;
  const void* branch;   // or null: r is x
  const void* student;  // or null: no cosine
  RowLayout x_rows, branch_rows, student_rows;
  ModulationRows gate, shift, scale;
  int64_t width, rows_per_group;
  bool rms;
  float eps, align_eps;
  void* residual;  // contiguous rows; null without branch
  void* normed;    // contiguous rows; null without norm
  float* mean;     // (M,); null without norm
  float* rstd;
  float* cosine;  // (M,); null without student
  float* rnorm_student;
  float* rnorm_residual;
  bool streaming;
};

struct ResidualNormBackwardArgs {
  const void* d_residual;  // or null for zeros
  const void* d_normed;    // or null: no norm
  const void* residual;
  const void* branch;  // or null
  const void* other;   // or null; factors (2, M): its own, and that of residual
  RowLayout d_residual_rows, d_normed_rows, residual_rows, branch_rows, other_rows;
  const float* factors;
  ModulationRows gate, scale;
  const float* mean;
  const float* rstd;
  int64_t rows, width, rows_per_group;
  int64_t parts, rows_per_part;  // a group is worked on in parts, each with sums of its own
  bool rms;
  void* d_x;       // contiguous rows; null where it equals d_residual
  void* d_branch;  // contiguous rows; null without branch
  float* d_gate;   // (groups, parts, D), or null where not wanted
  float* d_shift;
  float* d_scale;
  float* d_bias;
  bool streaming;
};

// scratch: kScratchRows rows of fp32, allocated outside: what the standard library would instantiate here for a newer
// instruction set could be the copy that the linker keeps for everybody.
constexpr int64_t kScratchRows = 6;
using ResidualNormForward = void (*)(const ResidualNormForwardArgs&, int64_t first_row, int64_t last_row,
                                     float* scratch);
using ResidualNormBackward = void (*)(const ResidualNormBackwardArgs&, int64_t first_part, int64_t last_part,
                                      float* scratch);

// Indexed by the types of x and of branch and y: 0 = fp32, 1 = bf16, 2 = fp16; null for a narrow x with wide branches.
struct ResidualNormKernels {
  ResidualNormForward forward[3][3];
  ResidualNormBackward backward[3][3];
};

LAYERSYNC_DECLARE_TABLES(ResidualNormKernels, residual_norm_kernels);

}  // namespace layersync
