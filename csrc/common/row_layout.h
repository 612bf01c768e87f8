// Row addressing shared by the host and the device code.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LAYERSYNC_HOST_DEVICE __host__ __device__
#else
#define LAYERSYNC_HOST_DEVICE
#endif

namespace layersync {

struct RowLayout {
  int64_t inner;         // rows in the innermost of the two collapsed dimensions
  int64_t outer_stride;  // elements
  int64_t inner_stride;  // elements

  // Offset of a row in elements; int64 because 65,536 x 1152 rows of a large batch pass 2^31.
  LAYERSYNC_HOST_DEVICE int64_t offset(int64_t row) const {
    const int64_t outer = row / inner;
    return outer * outer_stride + (row - outer * inner) * inner_stride;
  }
};

}  // namespace layersync
