// Sums over rows on the CPU: partial ones per part of the rows, then added in order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "outputs.h"

namespace layersync {

// How the rows of a group are split, so that few groups still occupy every core. By the shape alone: sums do not depend
// on the number of threads.
struct Parts {
  int64_t count;  // per group
  int64_t rows;   // per part
};

inline Parts parts_of(int64_t groups, int64_t rows_per_group) {
  constexpr int64_t kTasks = 64, kLeastRows = 8;
  const int64_t wanted = (kTasks + groups - 1) / std::max<int64_t>(groups, 1);
  const int64_t possible = (rows_per_group + kLeastRows - 1) / kLeastRows;
  const int64_t rows = (rows_per_group - 1) / std::max<int64_t>(std::min(wanted, possible), 1) + 1;
  return rows_per_group == 0 ? Parts{1, 0} : Parts{(rows_per_group - 1) / rows + 1, rows};
}

// Adds the parts of every group in order: (groups * parts, width) to (groups, width).
inline Tensor sum_of_parts(const Tensor& partials, int64_t groups, int64_t parts) {
  if (parts == 1 || partials.numel() == 0) return partials;
  const int64_t width = partials.size(1);
  Tensor sums = float_output(partials, {groups, width});
  const float* from = static_cast<const float*>(partials.data_ptr());
  float* to = static_cast<float*>(sums.data_ptr());
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      float* row = to + group * width;
      std::copy_n(from + group * parts * width, width, row);
      for (int64_t part = group * parts + 1; part < (group + 1) * parts; ++part)
        for (int64_t i = 0; i < width; ++i) row[i] += from[part * width + i];
    }
  });
  return sums;
}

}  // namespace layersync
