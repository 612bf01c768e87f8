// A cuBLASLt of a few lines on the host, by the names of its C interface as csrc/gelu/cublaslt.h declares it:
// column-major products of half types with the epilogues of GELU. It refuses what the library's header rules out, counts
// the descriptors that are not given back, and knows which card a handle belongs to.
#include "../../csrc/gelu/cublaslt.h"

#include <cmath>
#include <cstring>

#include "emulator.h"
#include "runtime.h"

namespace layersync::cublaslt {

struct HandleData {
  int card;
};

struct LayoutData {
  int type;
  uint64_t rows, columns;
  int64_t stride;
};

struct OperationData {
  int32_t transpose_a = kPlain;
  uint32_t epilogue = 1;
  void* bias = nullptr;
  void* aux = nullptr;
  int64_t aux_stride = 0;
};

struct PreferenceData {
  uint64_t workspace = 0;
  uint32_t alignment[4] = {256, 256, 256, 256};  // of A, B, C and D
};

}  // namespace layersync::cublaslt

namespace {

using namespace layersync::cublaslt;

constexpr Status kInvalidValue = 7;

// What the tests set, and what they read.
struct State {
  size_t workspace = 0;  // that every plan wants
  int refuse = 0;
  int handles = 0, questions = 0, products = 0, descriptors = 0;
} state;

float value_at(const void* data, int64_t index, int type) {
  if (type == kHalf) return layersync::to_float(static_cast<const layersync::fp16*>(data)[index]);
  return layersync::to_float(static_cast<const layersync::bf16*>(data)[index]);
}

void set_value(void* data, int64_t index, int type, float value) {
  if (type == kHalf) return layersync::from_float(value, static_cast<layersync::fp16*>(data) + index);
  layersync::from_float(value, static_cast<layersync::bf16*>(data) + index);
}

template <class T>
Status assign(T& member, const void* value, size_t bytes) {
  if (bytes != sizeof(T)) return kInvalidValue;
  std::memcpy(&member, value, bytes);
  return kSuccess;
}

template <class T>
Status create(T** object, T value) {
  *object = new T(value);
  ++state.descriptors;
  return kSuccess;
}

template <class T>
Status destroy(T* object) {
  delete object;
  --state.descriptors;
  return kSuccess;
}

bool aligned(const void* pointer, uint32_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether the shapes fit each other, and the library's rules.
bool possible(Operation operation, Layout a, Layout b, Layout c, Layout d) {
  const bool plain = operation->transpose_a == kPlain;
  const uint64_t rows = plain ? a->rows : a->columns, depth = plain ? a->columns : a->rows;
  const bool biased = operation->epilogue == kGeluAuxBias || operation->epilogue == kDGeluBiasGradient;
  if (!biased && operation->epilogue != kGeluAux) return false;
  if (c != d || depth != b->rows || rows != d->rows || b->columns != d->columns) return false;
  for (const Layout layout : {a, b, d})
    if (layout->type != d->type || (layout->type != kHalf && layout->type != kBFloat16) ||
        layout->stride < int64_t(layout->rows) || layout->stride % 8 != 0)
      return false;
  return operation->aux != nullptr && aligned(operation->aux, 16) && operation->aux_stride % 8 == 0 &&
         operation->aux_stride >= int64_t(rows) && biased == (operation->bias != nullptr) &&
         aligned(operation->bias, 16);
}

}  // namespace

extern "C" {

Status cublasLtCreate(Handle* handle) {
  *handle = new HandleData{emulation::current_card()};
  ++state.handles;
  return kSuccess;
}

Status cublasLtMatrixLayoutCreate(Layout* layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  return create(layout, LayoutData{type, rows, columns, stride});
}

Status cublasLtMatrixLayoutDestroy(Layout layout) { return destroy(layout); }

Status cublasLtMatmulDescCreate(Operation* operation, int compute, int scale) {
  if (compute != kComputeFloat || scale != kFloat) return kInvalidValue;
  return create(operation, OperationData{});
}

Status cublasLtMatmulDescDestroy(Operation operation) { return destroy(operation); }

Status cublasLtMatmulDescSetAttribute(Operation operation, OperationAttribute attribute, const void* value,
                                      size_t bytes) {
  switch (attribute) {
    case kTransposeA:
      return assign(operation->transpose_a, value, bytes);
    case kEpilogue:
      return assign(operation->epilogue, value, bytes);
    case kBiasPointer:
      return assign(operation->bias, value, bytes);
    case kAuxPointer:
      return assign(operation->aux, value, bytes);
    case kAuxStride:
      return assign(operation->aux_stride, value, bytes);
  }
  return kInvalidValue;
}

Status cublasLtMatmulPreferenceCreate(Preference* preference) { return create(preference, PreferenceData{}); }

Status cublasLtMatmulPreferenceDestroy(Preference preference) { return destroy(preference); }

Status cublasLtMatmulPreferenceSetAttribute(Preference preference, PreferenceAttribute attribute, const void* value,
                                            size_t bytes) {
  if (attribute == kMaxWorkspace) return assign(preference->workspace, value, bytes);
  return assign(preference->alignment[attribute - kAlignmentA], value, bytes);
}

Status cublasLtMatmulAlgoGetHeuristic(Handle handle, Operation operation, Layout a, Layout b, Layout c, Layout d,
                                      Preference preference, int wanted, Plan* plan, int* found) {
  ++state.questions;
  *found = 0;
  if (handle == nullptr || handle->card != emulation::current_card()) return kInvalidValue;
  if (wanted != 1 || !possible(operation, a, b, c, d)) return kNotSupported;
  if (state.refuse || preference->workspace < state.workspace) return kSuccess;  // and no plan
  *found = 1;
  *plan = {};
  for (int i = 0; i < 4; ++i) plan->algorithm.data[i] = preference->alignment[i];
  plan->workspace = state.workspace;
  return kSuccess;
}

Status cublasLtMatmul(Handle handle, Operation operation, const void* alpha, const void* a, Layout a_layout,
                      const void* b, Layout b_layout, const void* beta, const void* c, Layout c_layout, void* d,
                      Layout d_layout, const Algorithm* algorithm, void* workspace, size_t workspace_bytes,
                      void* stream) {
  emulation::check_stream("cublasLtMatmul", static_cast<cudaStream_t>(stream));
  if (handle == nullptr || handle->card != emulation::current_card()) return kInvalidValue;
  if (!possible(operation, a_layout, b_layout, c_layout, d_layout) || c != d) return kNotSupported;
  if (*static_cast<const float*>(alpha) != 1 || *static_cast<const float*>(beta) != 0) return kInvalidValue;
  const void* pointers[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    if (!aligned(pointers[i], uint32_t(algorithm->data[i]))) return kInvalidValue;
  if (workspace_bytes < state.workspace) return kInvalidValue;
  if (state.workspace > 0) std::memset(workspace, 0xff, state.workspace);
  const bool plain = operation->transpose_a == kPlain, backward = operation->epilogue == kDGeluBiasGradient;
  const int type = d_layout->type;
  const int64_t depth = b_layout->rows;
  for (int64_t row = 0; row < int64_t(d_layout->rows); ++row) {
    double total = 0;
    for (int64_t column = 0; column < int64_t(d_layout->columns); ++column) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k)
        sum += double(value_at(a, plain ? k * a_layout->stride + row : row * a_layout->stride + k, type)) *
               value_at(b, column * b_layout->stride + k, type);
      const int64_t aux = column * operation->aux_stride + row;
      if (!backward && operation->bias != nullptr) sum += value_at(operation->bias, row, type);
      if (!backward) set_value(operation->aux, aux, type, float(sum));
      const double u = backward ? value_at(operation->aux, aux, type) : sum;
      const double beta_u = 0.7978845608028654 * (u + 0.044715 * u * u * u), tanh_u = std::tanh(beta_u);
      const double slope = 0.7978845608028654 * (1 + 3 * 0.044715 * u * u);
      const double result =
          backward ? sum * 0.5 * (1 + tanh_u + u * (1 - tanh_u * tanh_u) * slope) : 0.5 * u * (1 + tanh_u);
      set_value(d, column * d_layout->stride + row, type, float(result));
      total += result;
    }
    if (backward) set_value(operation->bias, row, type, float(total));
  }
  ++state.products;
  return kSuccess;
}

void* emulation_cublaslt() { return &state; }
}
