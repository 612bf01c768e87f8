// The CPU kernels of cosine_alignment as one table per instruction set.
#pragma once

#include <cstdint>

#include "../common/cpu/cpu.h"
#include "../common/row_layout.h"

namespace layersync {

// Per-row results of the forward pass that the backward pass needs: 12 bytes a row.
struct CosineStats {
  float* cosine;
  float* rnorm_student;  // 1/norm, or 0 for a row that counts as zero
  float* rnorm_teacher;
};

struct CosineForwardArgs {
  const void* student;
  const void* teacher;
  RowLayout student_rows, teacher_rows;
  int64_t width;
  const float* weight;  // (M,) or null for all ones
  float eps;
  CosineStats out;
};

struct CosineBackwardArgs {
  const void* student;
  const void* teacher;
  RowLayout student_rows, teacher_rows;
  int64_t width;
  const float* weight;
  CosineStats stats;
  const float* grad;  // gradient of the loss: one value, or one per row
  int64_t grad_stride;
  float scale;         // 1 / sum of weights for the mean, else 1
  void* grad_student;  // contiguous rows, or null where not wanted
  void* grad_teacher;
  bool streaming;
};

// Loss and gradient in one go: each row is replaced by its gradient while it is in the cache.
struct CosineInPlaceArgs {
  void* student;  // contiguous rows
  const void* teacher;
  RowLayout teacher_rows;
  int64_t width;
  const float* weight;
  float eps;
  const float* grad;
  int64_t grad_stride;
  float scale;
  float* cosine;
  int64_t rows;
  int64_t rows_per_part;
  float* sums;  // (parts, width) of the gradient over the rows of a part, or null where not wanted
};

using CosineForward = void (*)(const CosineForwardArgs&, int64_t begin, int64_t end);
using CosineBackward = void (*)(const CosineBackwardArgs&, int64_t begin, int64_t end);
// By parts.
using CosineInPlace = void (*)(const CosineInPlaceArgs&, int64_t begin, int64_t end);

// Indexed by the types of student and teacher: 0 = fp32, 1 = bf16, 2 = fp16.
struct CosineKernels {
  CosineForward forward[3][3];
  CosineBackward backward[3][3];
  CosineInPlace in_place[3][3];
};

LAYERSYNC_DECLARE_TABLES(CosineKernels, cosine_kernels);

}  // namespace layersync
