// Holds the declarations of csrc/gelu/cublaslt.h against NVIDIA's header, and the attributes against the library named
// on the command line, which needs no GPU to fill a descriptor.
#include <cublasLt.h>

#include <cstdio>

#include "../../csrc/gelu/cublaslt.h"

namespace ours = layersync::cublaslt;

template <class One, class Other>
constexpr bool alike = sizeof(One) == sizeof(Other) && std::is_pointer_v<One> == std::is_pointer_v<Other>;

template <class... One, class... Other>
constexpr bool same_call(ours::Status (*)(One...), cublasStatus_t (*)(Other...)) {
  if constexpr (sizeof...(One) != sizeof...(Other)) {
    return false;
  } else {
    return (alike<One, Other> && ...);
  }
}

constexpr ours::Api api{};
static_assert(same_call(api.create, decltype(&cublasLtCreate){}));
static_assert(same_call(api.create_layout, decltype(&cublasLtMatrixLayoutCreate){}));
static_assert(same_call(api.destroy_layout, decltype(&cublasLtMatrixLayoutDestroy){}));
static_assert(same_call(api.create_operation, decltype(&cublasLtMatmulDescCreate){}));
static_assert(same_call(api.destroy_operation, decltype(&cublasLtMatmulDescDestroy){}));
static_assert(same_call(api.set_operation, decltype(&cublasLtMatmulDescSetAttribute){}));
static_assert(same_call(api.create_preference, decltype(&cublasLtMatmulPreferenceCreate){}));
static_assert(same_call(api.destroy_preference, decltype(&cublasLtMatmulPreferenceDestroy){}));
static_assert(same_call(api.set_preference, decltype(&cublasLtMatmulPreferenceSetAttribute){}));
static_assert(same_call(api.find_plans, decltype(&cublasLtMatmulAlgoGetHeuristic){}));
static_assert(same_call(api.multiply, decltype(&cublasLtMatmul){}));

static_assert(sizeof(cublasStatus_t) == sizeof(ours::Status) && sizeof(cudaDataType) == sizeof(int));
static_assert(sizeof(ours::Algorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(ours::Plan) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(ours::Plan, workspace) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(ours::Plan, status) == offsetof(cublasLtMatmulHeuristicResult_t, state));

static_assert(ours::kSuccess == CUBLAS_STATUS_SUCCESS && ours::kNotSupported == CUBLAS_STATUS_NOT_SUPPORTED);
static_assert(ours::kFloat == CUDA_R_32F && ours::kHalf == CUDA_R_16F && ours::kBFloat16 == CUDA_R_16BF);
static_assert(ours::kComputeFloat == CUBLAS_COMPUTE_32F);
static_assert(ours::kPlain == CUBLAS_OP_N && ours::kTransposed == CUBLAS_OP_T);
static_assert(ours::kGeluAux == int(CUBLASLT_EPILOGUE_GELU_AUX));
static_assert(ours::kGeluAuxBias == int(CUBLASLT_EPILOGUE_GELU_AUX_BIAS));
static_assert(ours::kDGeluBiasGradient == int(CUBLASLT_EPILOGUE_DGELU_BGRAD));
static_assert(ours::kTransposeA == int(CUBLASLT_MATMUL_DESC_TRANSA));
static_assert(ours::kEpilogue == int(CUBLASLT_MATMUL_DESC_EPILOGUE));
static_assert(ours::kBiasPointer == int(CUBLASLT_MATMUL_DESC_BIAS_POINTER));
static_assert(ours::kAuxPointer == int(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER));
static_assert(ours::kAuxStride == int(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD));
static_assert(ours::kMaxWorkspace == int(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES));
static_assert(ours::kAlignmentA == int(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES));
static_assert(ours::kAlignmentB == int(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES));
static_assert(ours::kAlignmentC == int(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES));
static_assert(ours::kAlignmentD == int(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES));

int main(int argc, char** argv) {
  if (argc < 2) return 0;
  const ours::Api library = ours::load(argv[1]);
  char memory[16];  // nothing reads it: without a handle the run ends at the heuristic
  ours::Context context(library, nullptr);
  try {
    context.run(ours::forward_gemm(ours::kBFloat16, 32, 64, 128, memory, 64, memory, 64, memory, memory, memory),
                nullptr, [](size_t) -> void* { return nullptr; });
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
    return 0;
  }
  return 1;
}
