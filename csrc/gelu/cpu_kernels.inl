// The loops, written once over Vec and compiled once per instruction set inside the namespace of the includer.
#include "../common/cpu/activations.inl"
#include "../common/cpu/vec_put.inl"
#include "../common/cpu/vec_tail.inl"

template <class T, bool streaming>
void forward_range(const GeluForwardArgs& args, int64_t first_row, int64_t last_row) {
  const T* in = static_cast<const T*>(args.preactivation);
  T* out = static_cast<T*>(args.activation);
  int64_t i = first_row * args.width;
  const int64_t end = last_row * args.width;
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
  const Activated a = gelu_and_slope(u);
  return {a.value, mul(g, a.slope)};
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
