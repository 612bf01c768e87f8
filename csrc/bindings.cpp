// Build facts for `layersync doctor`, and nothing that touches a tensor: tensor ops register through the stable ABI in
// each op's folder, so pybind11 is the only part of the binary that is tied to a Python version.
#include <pybind11/pybind11.h>

#include "common/cpu/cpu.h"

// Variadic, as a list of architectures has commas.
#define LAYERSYNC_STRING_(...) #__VA_ARGS__
#define LAYERSYNC_STRING(...) LAYERSYNC_STRING_(__VA_ARGS__)

#if defined(__clang__)
#define LAYERSYNC_COMPILER "clang " __clang_version__
#else
#define LAYERSYNC_COMPILER "gcc " __VERSION__
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the compiled extension of layersync_kernels.";
  m.attr("torch_built_with") = LAYERSYNC_STRING(LAYERSYNC_TORCH_VERSION);
  m.attr("torch_minimum") = "2.10";
  m.attr("cuda_built_with") = LAYERSYNC_STRING(LAYERSYNC_CUDA_VERSION);
  m.attr("cuda_archs") = LAYERSYNC_STRING(LAYERSYNC_CUDA_ARCHS);
  m.attr("compiler") = LAYERSYNC_COMPILER;
  m.def("cpu_isa", &layersync::cpu_isa_name, "The instruction set that the CPU kernels run with on this machine.");
}
