// The CPU kernels of gram_alignment as one table per instruction set.
#pragma once

#include <cstdint>

#include "../common/cpu/cpu.h"
#include "gram_kinds.h"

namespace layersync {

struct GramStripArgs {
  const void* difference;  // (rows, columns), of cosines
  float* gradient;         // of the terms, and may be `difference`; or null
  float* sums;             // (rows)
  int64_t columns;
  int64_t diagonal;  // the first columns count once, the others twice
  float margin;
};

using GramStrip = void (*)(const GramStripArgs&, int64_t first_row, int64_t last_row);

// Indexed by kind and type of the differences: 0 = fp32, 1 = bf16, 2 = fp16.
struct GramKernels {
  GramStrip strip[kGramKinds][3];
};

LAYERSYNC_DECLARE_TABLES(GramKernels, gram_kernels);

}  // namespace layersync
