#include "cpu_kernels.h"

#include <cmath>
#include <cstring>

#include "../common/types.h"

#ifdef LAYERSYNC_X86
#include <immintrin.h>

#include "../common/target.h"

LAYERSYNC_TARGET_BEGIN("avx2,fma,f16c")
namespace layersync {
namespace avx2 {
#include "../common/vec_avx2.h"
#include "cpu_kernels.inl"
}  // namespace avx2
}  // namespace layersync
LAYERSYNC_TARGET_END

const layersync::GramKernels layersync::gram_kernels_avx2 = layersync::avx2::kernels;
#endif
