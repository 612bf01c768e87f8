#include "cpu.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string_view>

#ifdef LAYERSYNC_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace layersync {

namespace {

constexpr std::string_view kIsaNames[] = {"generic", "avx2", "avx512"};

#ifdef LAYERSYNC_X86
// __builtin_cpu_supports does not know this one in clang 14.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

Isa detect_isa() {
  Isa best = Isa::generic;
#ifdef LAYERSYNC_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = Isa::avx512;
#endif
  return best;
}

// The highest instruction set that LAYERSYNC_CPU_ISA allows. A cap that the machine does not reach is none.
Isa allowed_isa() {
  const char* variable = std::getenv("LAYERSYNC_CPU_ISA");
  const std::string_view cap = variable == nullptr || *variable == 0 ? "best" : variable;
  if (cap == "best") return Isa::avx512;
  const auto* found = std::find(std::begin(kIsaNames), std::end(kIsaNames), cap);
  STD_TORCH_CHECK(found != std::end(kIsaNames), "layersync_kernels: LAYERSYNC_CPU_ISA=", variable,
                  "; expected best, generic, avx2 or avx512");
  return Isa(found - kIsaNames);
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = std::min(detect_isa(), allowed_isa());
  return isa;
}

bool cpu_has_bf16() {
#ifdef LAYERSYNC_X86
  static const bool has = cpu_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

const char* cpu_isa_name() { return kIsaNames[int(cpu_isa())].data(); }

void advise_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t(2) << 20;
  if (bytes < 2 * int64_t(kLargePage)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failure costs only time
#endif
}

}  // namespace layersync
