#include "cpu_kernels.h"

#include "../common/cpu/target.h"

LAYERSYNC_BEGIN
namespace layersync::LAYERSYNC_ISA {
#include LAYERSYNC_VEC
#include "cpu_kernels.inl"
}  // namespace layersync::LAYERSYNC_ISA
LAYERSYNC_END

const layersync::CosineKernels layersync::LAYERSYNC_TABLE(cosine_kernels) = layersync::LAYERSYNC_ISA::kernels;
