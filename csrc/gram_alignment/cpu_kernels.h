// The CPU kernels of gram_alignment as one table per instruction set.
#pragma once

#include <cstdint>

#include "gram_kinds.h"

namespace layersync {

struct GramStripArgs {
  const float* student;  // (rows, columns) of cosines
  const float* teacher;
  float* gradient;  // of the sums with respect to `student`, and may be that; or null
  float* sums;      // (rows)
  int64_t columns;
  int64_t diagonal;  // the first columns count once, the others twice
  float margin;
};

using GramStrip = void (*)(const GramStripArgs&, int64_t first_row, int64_t last_row);

// Indexed by kind.
struct GramKernels {
  GramStrip strip[kGramKinds];
};

extern const GramKernels gram_kernels_generic;
extern const GramKernels gram_kernels_avx2;
extern const GramKernels gram_kernels_avx512;

}  // namespace layersync
