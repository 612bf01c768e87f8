#include "cpu_kernels.h"

#include "../common/cpu/target.h"

LAYERSYNC_BEGIN
namespace layersync::LAYERSYNC_ISA {
#include LAYERSYNC_VEC
#include "cpu_kernels.inl"
}  // namespace layersync::LAYERSYNC_ISA
LAYERSYNC_END

const layersync::QkKernels layersync::LAYERSYNC_TABLE(qk_kernels) = layersync::LAYERSYNC_ISA::kernels;
