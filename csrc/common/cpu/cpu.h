// What every CPU op needs around its loops: the instruction set chosen at run time, and large pages for fresh outputs.
#pragma once

#include <cstdint>

namespace layersync {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

// The best instruction set of this machine, or the lower one that LAYERSYNC_CPU_ISA names. Raises where that is none.
Isa cpu_isa();
const char* cpu_isa_name();

// Whether kernels for AVX-512 may use its bf16 products.
bool cpu_has_bf16();

// The kernels of an op as one table per instruction set: declared for all of them, then the one for this machine.
#define LAYERSYNC_DECLARE_TABLES(Type, name) extern const Type name##_generic, name##_avx2, name##_avx512
#ifdef LAYERSYNC_X86
#define LAYERSYNC_FOR_THIS_CPU(name)                              \
  (layersync::cpu_isa() == layersync::Isa::avx512 ? name##_avx512 \
   : layersync::cpu_isa() == layersync::Isa::avx2 ? name##_avx2   \
                                                  : name##_generic)
#else
#define LAYERSYNC_FOR_THIS_CPU(name) name##_generic
#endif

// Asks the kernel to back a fresh output with large pages. Faulting a 38 MB gradient in by 4 KiB pages costs as much
// as writing it; on memory that is already mapped the call does nothing.
void advise_large_pages(void* data, int64_t bytes);

// Outputs from this size on bypass the cache: they would push the inputs out of it and cost a read for ownership.
constexpr int64_t kStreamBytes = int64_t(8) << 20;

// Rows per task, so that a task moves at least a few tens of kilobytes.
inline int64_t rows_per_task(int64_t width) { return width >= 16384 ? 1 : 16384 / (width > 0 ? width : 1); }

}  // namespace layersync
