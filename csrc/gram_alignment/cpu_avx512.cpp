#include "cpu_kernels.h"

#include <cmath>
#include <cstring>

#include "../common/types.h"

#ifdef LAYERSYNC_X86
#include <immintrin.h>

#include "../common/target.h"

LAYERSYNC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
namespace layersync {
namespace avx512 {
#include "../common/vec_avx512.h"
#include "cpu_kernels.inl"
}  // namespace avx512
}  // namespace layersync
LAYERSYNC_TARGET_END

const layersync::GramKernels layersync::gram_kernels_avx512 = layersync::avx512::kernels;
#endif
