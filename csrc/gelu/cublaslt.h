// A GEMM of cuBLASLt with GELU, or its derivative, in the epilogue, from plain sizes and pointers. Free of torch and
// CUDA, so that the tests run it on an emulation of the library. The library's C interface is declared here, not
// included: a toolkit need not have the header, and binding at run time to the copy that torch has loaded leaves the
// extension loadable beside any torch. The tests hold these declarations against the header.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace layersync::cublaslt {

using Status = int;
constexpr Status kSuccess = 0, kNotSupported = 15;

constexpr int kFloat = 0, kHalf = 2, kBFloat16 = 14;  // cudaDataType
constexpr int kComputeFloat = 68;                     // cublasComputeType_t
constexpr int32_t kPlain = 0, kTransposed = 1;        // cublasOperation_t

enum Epilogue : uint32_t { kGeluAux = 32 | 128, kGeluAuxBias = kGeluAux | 4, kDGeluBiasGradient = 64 | 128 | 16 };
enum OperationAttribute { kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8, kAuxPointer = 11, kAuxStride = 12 };
enum PreferenceAttribute { kMaxWorkspace = 1, kAlignmentA = 5, kAlignmentB = 6, kAlignmentC = 7, kAlignmentD = 8 };

struct HandleData;
struct LayoutData;
struct OperationData;
struct PreferenceData;
using Handle = HandleData*;
using Layout = LayoutData*;
using Operation = OperationData*;
using Preference = PreferenceData*;

struct Algorithm {
  uint64_t data[8];
};

struct Plan {
  Algorithm algorithm;
  size_t workspace;  // bytes
  Status status;
  float waves;
  int reserved[4];
};

struct Api {
  Status (*create)(Handle*);
  Status (*create_layout)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t stride);
  Status (*destroy_layout)(Layout);
  Status (*create_operation)(Operation*, int compute, int scale);
  Status (*destroy_operation)(Operation);
  Status (*set_operation)(Operation, OperationAttribute, const void*, size_t);
  Status (*create_preference)(Preference*);
  Status (*destroy_preference)(Preference);
  Status (*set_preference)(Preference, PreferenceAttribute, const void*, size_t);
  Status (*find_plans)(Handle, Operation, Layout a, Layout b, Layout c, Layout d, Preference, int wanted, Plan*,
                       int* found);
  Status (*multiply)(Handle, Operation, const void* alpha, const void* a, Layout, const void* b, Layout,
                     const void* beta, const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace,
                     size_t workspace_bytes, void* stream);
};

// By its soname, which finds the copy that torch has loaded wherever that lies.
inline Api load(const std::string& name) {
  void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr)
    throw std::runtime_error("layersync_kernels: cuBLASLt does not load: " + std::string(dlerror()));
  Api api{};
  const auto bind = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, symbol));
    if (function == nullptr) throw std::runtime_error("layersync_kernels: " + name + " has no " + symbol);
  };
  bind(api.create, "cublasLtCreate");
  bind(api.create_layout, "cublasLtMatrixLayoutCreate");
  bind(api.destroy_layout, "cublasLtMatrixLayoutDestroy");
  bind(api.create_operation, "cublasLtMatmulDescCreate");
  bind(api.destroy_operation, "cublasLtMatmulDescDestroy");
  bind(api.set_operation, "cublasLtMatmulDescSetAttribute");
  bind(api.create_preference, "cublasLtMatmulPreferenceCreate");
  bind(api.destroy_preference, "cublasLtMatmulPreferenceDestroy");
  bind(api.set_preference, "cublasLtMatmulPreferenceSetAttribute");
  bind(api.find_plans, "cublasLtMatmulAlgoGetHeuristic");
  bind(api.multiply, "cublasLtMatmul");
  return api;
}

// D = epilogue(op(A)·B), all column-major: D (rows, columns), B (depth, columns), A (rows, depth) or its transpose.
// D and the pre-activation have no gaps.
struct Gemm {
  int type;
  Epilogue epilogue;
  bool transpose_a;
  int64_t rows, columns, depth;
  const void* a;
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  void* d;
  void* preactivation;  // written by GELU, read by its derivative
  void* bias;  // `rows` values of `type`: read by GELU, if any; by its derivative written, the sums over columns
};

// activation (M, O) = gelu(x (M, I)·weight (O, I)ᵀ + bias), row-major, which is its transpose in columns.
inline Gemm forward_gemm(int type, int64_t count, int64_t inputs, int64_t outputs, const void* x, int64_t x_stride,
                         const void* weight, int64_t weight_stride, void* bias, void* activation, void* preactivation) {
  const Epilogue epilogue = bias == nullptr ? kGeluAux : kGeluAuxBias;
  return {type,          epilogue, true,     outputs,    count,         inputs, weight,
          weight_stride, x,        x_stride, activation, preactivation, bias};
}

// d_preactivation (M, H) = gelu'(preactivation)·(d_output (M, O)·weight (O, H)), row-major, and its sums over M.
inline Gemm backward_gemm(int type, int64_t count, int64_t outputs, int64_t hidden, const void* d_output,
                          int64_t d_output_stride, const void* weight, int64_t weight_stride, void* preactivation,
                          void* d_preactivation, void* d_bias) {
  return {type,          kDGeluBiasGradient, false,           hidden,          count,         outputs, weight,
          weight_stride, d_output,           d_output_stride, d_preactivation, preactivation, d_bias};
}

inline std::string describe(const Gemm& gemm) {
  const auto size = [](int64_t rows, int64_t columns) { return std::to_string(rows) + "x" + std::to_string(columns); };
  return std::string(gemm.epilogue == kDGeluBiasGradient ? "backward" : "forward") + " GEMM of " +
         size(gemm.columns, gemm.depth) + " by " + size(gemm.depth, gemm.rows) + ", row strides " +
         std::to_string(gemm.b_stride) + " and " + std::to_string(gemm.a_stride) +
         (gemm.type == kHalf       ? ", float16"
          : gemm.type == kBFloat16 ? ", bfloat16"
                                   : "");
}

inline void check(Status status, const char* call, const Gemm& gemm) {
  if (status == kSuccess) return;
  throw std::runtime_error(
      std::string("layersync_kernels: ") + call +
      (status == kNotSupported ? " supports no " : " failed with status " + std::to_string(status) + " for the ") +
      describe(gemm) + "; LAYERSYNC_CUBLASLT=0 avoids it");
}

template <class T>
using Owned = std::unique_ptr<T, Status (*)(T*)>;

template <class T, class... Arguments>
Owned<T> make(const Gemm& gemm, Status (*create)(T**, Arguments...), Status (*destroy)(T*),
              std::type_identity_t<Arguments>... arguments) {
  T* object = nullptr;
  check(create(&object, arguments...), "the creation of a descriptor", gemm);
  return {object, destroy};
}

// What cuBLASLt must know of a GEMM.
class Problem {
 public:
  Problem(const Api& api, const Gemm& gemm)
      : operation(make(gemm, api.create_operation, api.destroy_operation, kComputeFloat, kFloat)),
        a(make(gemm, api.create_layout, api.destroy_layout, gemm.type, gemm.transpose_a ? gemm.depth : gemm.rows,
               gemm.transpose_a ? gemm.rows : gemm.depth, gemm.a_stride)),
        b(make(gemm, api.create_layout, api.destroy_layout, gemm.type, gemm.depth, gemm.columns, gemm.b_stride)),
        d(make(gemm, api.create_layout, api.destroy_layout, gemm.type, gemm.rows, gemm.columns, gemm.rows)) {
    const auto set = [&](OperationAttribute attribute, auto value) {
      check(api.set_operation(operation.get(), attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute",
            gemm);
    };
    set(kTransposeA, gemm.transpose_a ? kTransposed : kPlain);
    set(kEpilogue, uint32_t(gemm.epilogue));
    set(kAuxPointer, gemm.preactivation);
    set(kAuxStride, gemm.rows);
    if (gemm.bias != nullptr) set(kBiasPointer, gemm.bias);
  }

  Owned<OperationData> operation;
  Owned<LayoutData> a, b, d;
};

constexpr size_t kMaxWorkspaceBytes = size_t(32) << 20;
constexpr size_t kMaxPlans = 1024;  // for whoever has a new shape in every call

// Of a pointer, up to the 256 bytes beyond which cuBLASLt does not care.
inline uint32_t alignment(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return uint32_t(address & -address);
}

// A device's handle and what the heuristic has said there: a question costs microseconds, which is more than a small GEMM.
class Context {
 public:
  Context(const Api& functions, Handle device_handle) : api(functions), handle(device_handle) {}

  // False, and nothing done, where the library has no plan for it. `allocate` takes a number of bytes, at least one, and
  // gives memory to work in.
  template <class Allocate>
  bool run(const Gemm& gemm, void* stream, Allocate allocate) {
    const Problem problem(api, gemm);
    const std::optional<Plan> plan = plan_for(gemm, problem);
    if (!plan.has_value()) return false;
    void* workspace = plan->workspace == 0 ? nullptr : allocate(plan->workspace);
    const float one = 1, zero = 0;
    check(api.multiply(handle, problem.operation.get(), &one, gemm.a, problem.a.get(), gemm.b, problem.b.get(), &zero,
                       gemm.d, problem.d.get(), gemm.d, problem.d.get(), &plan->algorithm, workspace, plan->workspace,
                       stream),
          "cublasLtMatmul", gemm);
    return true;
  }

 private:
  using Key = std::array<int64_t, 12>;

  std::optional<Plan> plan_for(const Gemm& gemm, const Problem& problem) {
    const Key key{gemm.type,
                  gemm.epilogue,
                  gemm.rows,
                  gemm.columns,
                  gemm.depth,
                  gemm.a_stride,
                  gemm.b_stride,
                  alignment(gemm.a),
                  alignment(gemm.b),
                  alignment(gemm.d),
                  alignment(gemm.preactivation),
                  alignment(gemm.bias)};
    const std::lock_guard lock(mutex);
    if (const auto known = plans.find(key); known != plans.end()) return known->second;
    const auto preference = make(gemm, api.create_preference, api.destroy_preference);
    const auto set = [&](PreferenceAttribute attribute, auto value) {
      check(api.set_preference(preference.get(), attribute, &value, sizeof value),
            "cublasLtMatmulPreferenceSetAttribute", gemm);
    };
    set(kMaxWorkspace, uint64_t(kMaxWorkspaceBytes));
    set(kAlignmentA, alignment(gemm.a));
    set(kAlignmentB, alignment(gemm.b));
    set(kAlignmentC, alignment(gemm.d));
    set(kAlignmentD, alignment(gemm.d));
    Plan plan{};
    int found = 0;
    Status status = api.find_plans(handle, problem.operation.get(), problem.a.get(), problem.b.get(), problem.d.get(),
                                   problem.d.get(), preference.get(), 1, &plan, &found);
    if (status == kSuccess) status = found == 0 ? kNotSupported : plan.status;
    if (status != kNotSupported) check(status, "cublasLtMatmulAlgoGetHeuristic", gemm);
    if (plans.size() == kMaxPlans) plans.clear();
    return plans.emplace(key, status == kSuccess ? std::optional(plan) : std::nullopt).first->second;
  }

  const Api& api;
  const Handle handle;
  std::mutex mutex;
  std::map<Key, std::optional<Plan>> plans;  // without a value: there is none
};

}  // namespace layersync::cublaslt
