// The loops, written once over Vec and compiled once per instruction set inside the namespace of the includer.
#include "../common/cpu/vec_exp.inl"
#include "../common/cpu/vec_put.inl"
#include "../common/cpu/vec_tail.inl"

constexpr float kBeta = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float kKappa = 0.044715f;

// exp(-2 z), z = beta (u + kappa u^3). Its sigmoid s = 1 / (1 + exp(-2 z)) is (1 + tanh(z)) / 2 without the cancellation
// of that for negative u, and 1 - s = exp(-2 z) s is without that of the difference.
inline Vec gelu_decay(Vec u, Vec u2) {
  return exp(mul(u, fma(u2, broadcast(-2 * kBeta * kKappa), broadcast(-2 * kBeta))));
}

inline Vec gelu_sigmoid(Vec decay) { return div(broadcast(1), add(broadcast(1), decay)); }

// u^2, bounded where GELU is u or 0 to all digits: an infinite slope times the 0 that 1 - s is there would be a NaN.
inline Vec gelu_square(Vec u) { return min(broadcast(1e30f), mul(u, u)); }

template <class T, bool streaming>
void forward_range(const GeluForwardArgs& args, int64_t first_row, int64_t last_row) {
  const T* in = static_cast<const T*>(args.preactivation);
  T* out = static_cast<T*>(args.activation);
  int64_t i = first_row * args.width;
  const int64_t end = last_row * args.width;
  const auto gelu = [](Vec u) { return mul(u, gelu_sigmoid(gelu_decay(u, gelu_square(u)))); };
  for (; i + Vec::size <= end; i += Vec::size) put<streaming>(out + i, gelu(load(in + i)));
  if (i < end) store_first(out + i, gelu(load_first(in + i, end - i)), end - i);
  if constexpr (streaming) stream_fence();
}

template <class T>
void forward_rows(const GeluForwardArgs& args, int64_t first_row, int64_t last_row) {
  (args.streaming ? forward_range<T, true> : forward_range<T, false>)(args, first_row, last_row);
}

struct GeluGradient {
  Vec activation, gradient;
};

inline GeluGradient gelu_gradient(Vec u, Vec g) {
  const Vec u2 = gelu_square(u), decay = gelu_decay(u, u2), s = gelu_sigmoid(decay), activation = mul(u, s);
  const Vec rest = mul(min(broadcast(1e38f), decay), s);                           // 1 - s, where that is not 1
  const Vec slope = fma(u2, broadcast(6 * kBeta * kKappa), broadcast(2 * kBeta));  // of 2 z
  return {activation, mul(g, fma(mul(activation, rest), slope, s))};
}

template <class T, bool activated, bool streaming>
void backward_range(const GeluBackwardArgs& args, int64_t first_part, int64_t last_part) {
  const int64_t width = args.width;
  for (int64_t part = first_part; part < last_part; ++part) {
    const int64_t begin = part * args.rows_per_part;
    const int64_t end = begin + args.rows_per_part < args.rows ? begin + args.rows_per_part : args.rows;
    float* sums = args.sums == nullptr ? nullptr : args.sums + part * width;
    for (int64_t row = begin; row < end; ++row) {
      const T* in = static_cast<const T*>(args.preactivation) + row * width;
      const T* g = static_cast<const T*>(args.d_activation) + row * args.d_activation_stride;
      T* out = static_cast<T*>(args.d_preactivation) + row * width;
      T* activation = activated ? static_cast<T*>(args.activation) + row * width : nullptr;
      const bool first = row == begin;
      int64_t i = 0;
      for (; i + Vec::size <= width; i += Vec::size) {
        const GeluGradient r = gelu_gradient(load(in + i), load(g + i));
        put<streaming>(out + i, r.gradient);
        if constexpr (activated) put<streaming>(activation + i, r.activation);
        if (sums != nullptr) store(sums + i, first ? r.gradient : add(load(sums + i), r.gradient));
      }
      if (i < width) {
        const int64_t rest = width - i;
        const GeluGradient r = gelu_gradient(load_first(in + i, rest), load_first(g + i, rest));
        store_first(out + i, r.gradient, rest);
        if constexpr (activated) store_first(activation + i, r.activation, rest);
        if (sums != nullptr)
          store_first(sums + i, first ? r.gradient : add(load_first(sums + i, rest), r.gradient), rest);
      }
    }
  }
  if constexpr (streaming) stream_fence();
}

template <class T>
void backward_parts(const GeluBackwardArgs& args, int64_t first_part, int64_t last_part) {
  if (args.activation == nullptr) {
    (args.streaming ? backward_range<T, false, true> : backward_range<T, false, false>)(args, first_part, last_part);
  } else {
    (args.streaming ? backward_range<T, true, true> : backward_range<T, true, false>)(args, first_part, last_part);
  }
}

constexpr GeluKernels kernels = {{forward_rows<float>, forward_rows<bf16>, forward_rows<fp16>},
                                 {backward_parts<float>, backward_parts<bf16>, backward_parts<fp16>}};
