#include "cpu_kernels.h"

#include <cmath>
#include <cstring>

#include "../common/types.h"

namespace layersync {
namespace generic {
#include "../common/vec_generic.h"
#include "cpu_kernels.inl"
}  // namespace generic
const GramKernels gram_kernels_generic = generic::kernels;
}  // namespace layersync
