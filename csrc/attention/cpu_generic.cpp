#include "cpu_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "../common/types.h"

namespace layersync {
namespace generic {
constexpr int kTileVectors = 1;
#include "../common/vec_generic.h"
#include "../common/vec_exp.inl"
#include "cpu_kernels.inl"
}  // namespace generic
const AttentionKernels attention_kernels_generic = generic::kernels<generic::Fp32Words>;
}  // namespace layersync
