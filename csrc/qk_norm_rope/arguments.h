// Inputs of qk_norm_rope, checked against the contract in op.py, for the CPU and the GPU.
#pragma once

#include <cmath>

#include "../common/host/arguments.h"

namespace layersync {

constexpr int64_t kMaxHeadWidth = 256;

struct QkShape {
  int64_t batch, positions, heads, width;

  int64_t tokens() const { return batch * positions; }
  bool empty() const { return tokens() * heads * width == 0; }
};

inline void check_head_floats(const char* name, const std::optional<Tensor>& tensor, int64_t rows, int64_t width) {
  if (!tensor.has_value()) return;
  const bool table = rows > 0;  // (rows, width), or a vector
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() &&
                      tensor->dim() == (table ? 2 : 1) && tensor->size(tensor->dim() - 1) == width &&
                      (!table || tensor->size(0) == rows),
                  "layersync_kernels: ", name, " must be contiguous float32, one value for each channel of a head",
                  table ? " and position" : "");
}

// What comes with queries and keys of a shape: norms and rotations are there as a whole or not at all.
inline void check_norm_and_rope(const QkShape& shape, const std::optional<Tensor>& q_weight,
                                const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
                                const std::optional<Tensor>& sin) {
  STD_TORCH_CHECK(shape.width <= kMaxHeadWidth, "layersync_kernels: heads of ", shape.width, " channels; at most ",
                  kMaxHeadWidth);
  STD_TORCH_CHECK(q_weight.has_value() == k_weight.has_value() && cos.has_value() == sin.has_value(),
                  "layersync_kernels: q_weight and k_weight belong together, as cos and sin do");
  STD_TORCH_CHECK(!cos.has_value() || shape.width % 2 == 0, "layersync_kernels: a rotation needs heads of even width");
  if (shape.empty()) return;
  check_head_floats("q_weight", q_weight, 0, shape.width);
  check_head_floats("k_weight", k_weight, 0, shape.width);
  check_head_floats("cos", cos, shape.positions, shape.width);
  check_head_floats("sin", sin, shape.positions, shape.width);
}

inline QkShape check_packed(const Tensor& qkv, int64_t heads) {
  type_index(qkv.scalar_type());
  STD_TORCH_CHECK(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0,
                  "layersync_kernels: qkv must be (B, N, 3 heads E)");
  return {qkv.size(0), qkv.size(1), heads, qkv.size(2) / (3 * heads)};
}

// Rows of (B, N, ..) or (B, H, N, E) at any stride, whose channels lie side by side.
struct TokenRows {
  std::optional<Tensor> owner;  // keeps the memory alive when a copy had to be made
  const void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, position_stride = 0;  // elements
};

inline TokenRows token_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.numel() > 0 && tensor.size(last) > 1 && tensor.stride(last) != 1)
    return token_rows(torch::stable::contiguous(tensor));
  return {tensor, tensor.data_ptr(), tensor.stride(0), last == 3 ? tensor.stride(1) : 0, tensor.stride(last - 1)};
}

inline QkShape check_head_gradients(const Tensor& d_q, const Tensor& d_k, const Tensor& d_v,
                                    const std::optional<Tensor>& qkv, bool norm) {
  type_index(d_q.scalar_type());
  STD_TORCH_CHECK(d_q.dim() == 4, "layersync_kernels: d_q must be (B, heads, N, E)");
  for (const Tensor* other : {&d_k, &d_v}) {
    check_equal_sizes("d_k or d_v", *other, "d_q", d_q);
    check_dtype("d_k or d_v", other->scalar_type(), "d_q", d_q.scalar_type());
  }
  const QkShape shape{d_q.size(0), d_q.size(2), d_q.size(1), d_q.size(3)};
  STD_TORCH_CHECK(qkv.has_value() || !norm, "layersync_kernels: the gradient of a norm needs qkv");
  if (!qkv.has_value()) return shape;
  check_dtype("qkv", qkv->scalar_type(), "d_q", d_q.scalar_type());
  STD_TORCH_CHECK(qkv->dim() == 3 && qkv->size(0) == shape.batch && qkv->size(1) == shape.positions &&
                      qkv->size(2) == 3 * shape.heads * shape.width,
                  "layersync_kernels: qkv must be (B, N, 3 heads E) of the gradients' sizes");
  return shape;
}

inline const float* floats_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
}

}  // namespace layersync
