// Every cpu_kernels.cpp is compiled once per instruction set: by files of two lines that setup.py writes, which name the
// set and include it. A file for each, as what the compiler inlines depends on how much there is in one.
//
// What stands between LAYERSYNC_BEGIN and LAYERSYNC_END is for a newer machine than the rest of the extension. All that
// the kernels need of the standard library is included here, before that: an inline function of it compiled for AVX-512
// could be the copy that the linker keeps for everybody. Never include torch's headers beside this one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "types.h"

#define LAYERSYNC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LAYERSYNC_TARGET_BEGIN(isa) \
  LAYERSYNC_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LAYERSYNC_TARGET_END LAYERSYNC_PRAGMA(clang attribute pop)
#else
#define LAYERSYNC_TARGET_BEGIN(isa) LAYERSYNC_PRAGMA(GCC push_options) LAYERSYNC_PRAGMA(GCC target(isa))
#define LAYERSYNC_TARGET_END LAYERSYNC_PRAGMA(GCC pop_options)
#endif

#if defined(LAYERSYNC_ISA_GENERIC)
#define LAYERSYNC_ISA generic
#define LAYERSYNC_VEC "../common/cpu/vec_generic.h"
#define LAYERSYNC_BEGIN
#define LAYERSYNC_END
#else
#include <immintrin.h>
#define LAYERSYNC_END LAYERSYNC_TARGET_END
#if defined(LAYERSYNC_ISA_AVX2)
#define LAYERSYNC_ISA avx2
#define LAYERSYNC_VEC "../common/cpu/vec_avx2.h"
#define LAYERSYNC_BEGIN LAYERSYNC_TARGET_BEGIN("avx2,fma,f16c")
#elif defined(LAYERSYNC_ISA_AVX512)
#define LAYERSYNC_ISA avx512
#define LAYERSYNC_VEC "../common/cpu/vec_avx512.h"
#define LAYERSYNC_BEGIN LAYERSYNC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#elif defined(LAYERSYNC_ISA_AVX512_BF16)
#define LAYERSYNC_ISA avx512_bf16
#define LAYERSYNC_VEC "../common/cpu/vec_avx512.h"
#define LAYERSYNC_BEGIN LAYERSYNC_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#else
#error "kernels are compiled for an instruction set, which setup.py names: LAYERSYNC_ISA_GENERIC, _AVX2 or _AVX512"
#endif
#endif

// NAME_avx2 and the like: the table that cpu.h finds by its NAME.
#define LAYERSYNC_JOIN_(name, isa) name##_##isa
#define LAYERSYNC_JOIN(name, isa) LAYERSYNC_JOIN_(name, isa)
#define LAYERSYNC_TABLE(name) LAYERSYNC_JOIN(name, LAYERSYNC_ISA)
