// The loops, written once over Vec and compiled once per instruction set inside the namespace of the includer.
#include "../common/cpu/activations.inl"
#include "../common/cpu/vec_put.inl"
#include "../common/cpu/vec_tail.inl"

// Where the values i to i + Vec::size of both halves of a row begin. Interleaved ones are two vectors side by side.
template <bool interleaved>
inline int64_t first_of(int64_t i) {
  return interleaved ? 2 * i : i;
}

template <bool interleaved>
inline int64_t second_of(int64_t i, int64_t width) {
  return interleaved ? 2 * i + Vec::size : width + i;
}

// Of the last `rest` values of both halves: how many lie in the first vector, and in the second.
template <bool interleaved>
inline int64_t first_rest(int64_t rest) {
  return !interleaved ? rest : 2 * rest < Vec::size ? 2 * rest : Vec::size;
}

template <bool interleaved>
inline int64_t second_rest(int64_t rest) {
  return !interleaved ? rest : 2 * rest - first_rest<true>(rest);
}

// Loads both halves, or the first `rest` values of them.
template <bool interleaved, class T>
inline VecPair load_halves(const T* row, int64_t i, int64_t width, int64_t rest = Vec::size) {
  const T *first = row + first_of<interleaved>(i), *second = row + second_of<interleaved>(i, width);
  const bool whole = rest == Vec::size;
  const Vec a = whole ? load(first) : load_first(first, first_rest<interleaved>(rest));
  const Vec b = whole ? load(second) : load_first(second, second_rest<interleaved>(rest));
  if constexpr (interleaved) return deinterleave(a, b);
  return {a, b};
}

template <bool interleaved>
inline VecPair laid_out(VecPair halves) {
  if constexpr (interleaved) return interleave(halves.first, halves.second);
  return halves;
}

template <class T, bool gelu_gate, bool interleaved, bool streaming>
void forward_range(const SwigluForwardArgs& args, int64_t first_row, int64_t last_row) {
  const int64_t width = args.width;
  const auto gated = [](VecPair x) { return mul(gelu_gate ? gelu(x.first) : silu(x.first), x.second); };
  for (int64_t row = first_row; row < last_row; ++row) {
    const T* in = static_cast<const T*>(args.x12) + args.layout.offset(row);
    T* out = static_cast<T*>(args.out) + row * width;
    int64_t i = 0;
    for (; i + Vec::size <= width; i += Vec::size)
      put<streaming>(out + i, gated(load_halves<interleaved>(in, i, width)));
    if (const int64_t rest = width - i; rest > 0)
      store_first(out + i, gated(load_halves<interleaved>(in, i, width, rest)), rest);
  }
  if constexpr (streaming) stream_fence();
}

template <class T, bool gelu_gate, bool interleaved>
void forward_rows(const SwigluForwardArgs& args, int64_t first_row, int64_t last_row) {
  (args.streaming ? forward_range<T, gelu_gate, interleaved, true>
                  : forward_range<T, gelu_gate, interleaved, false>)(args, first_row, last_row);
}

// f(x1) x2 and the gradients of x1 and x2, as both lie in memory.
struct Gated {
  Vec out;
  VecPair gradient;
};

template <bool gelu_gate, bool interleaved>
inline Gated gated_gradient(VecPair x, Vec g) {
  const Activated f = gelu_gate ? gelu_and_slope(x.first) : silu_and_slope(x.first);
  return {mul(f.value, x.second), laid_out<interleaved>({mul(mul(g, x.second), f.slope), mul(g, f.value)})};
}

template <class T, bool gelu_gate, bool interleaved, bool streaming>
void backward_range(const SwigluBackwardArgs& args, int64_t first_part, int64_t last_part) {
  const int64_t width = args.width;
  for (int64_t part = first_part; part < last_part; ++part) {
    const int64_t begin = part * args.rows_per_part;
    const int64_t end = begin + args.rows_per_part < args.rows ? begin + args.rows_per_part : args.rows;
    float* sums = args.sums == nullptr ? nullptr : args.sums + part * 2 * width;
    for (int64_t row = begin; row < end; ++row) {
      const T* in = static_cast<const T*>(args.x12) + args.layout.offset(row);
      const T* g = static_cast<const T*>(args.grad) + args.grad_layout.offset(row);
      T* d_x12 = static_cast<T*>(args.d_x12) + row * 2 * width;
      T* out = args.out == nullptr ? nullptr : static_cast<T*>(args.out) + row * width;
      const bool fresh = row == begin;
      const auto put_gradient = [&](int64_t at, Vec value) {
        put<streaming>(d_x12 + at, value);
        if (sums != nullptr) store(sums + at, fresh ? value : add(load(sums + at), value));
      };
      int64_t i = 0;
      for (; i + Vec::size <= width; i += Vec::size) {
        const Gated r = gated_gradient<gelu_gate, interleaved>(load_halves<interleaved>(in, i, width), load(g + i));
        put_gradient(first_of<interleaved>(i), r.gradient.first);
        put_gradient(second_of<interleaved>(i, width), r.gradient.second);
        if (out != nullptr) put<streaming>(out + i, r.out);
      }
      if (const int64_t rest = width - i; rest > 0) {
        const Gated r = gated_gradient<gelu_gate, interleaved>(load_halves<interleaved>(in, i, width, rest),
                                                               load_first(g + i, rest));
        const auto put_rest = [&](int64_t at, Vec value, int64_t count) {
          store_first(d_x12 + at, value, count);
          if (sums != nullptr) store_first(sums + at, fresh ? value : add(load_first(sums + at, count), value), count);
        };
        put_rest(first_of<interleaved>(i), r.gradient.first, first_rest<interleaved>(rest));
        put_rest(second_of<interleaved>(i, width), r.gradient.second, second_rest<interleaved>(rest));
        if (out != nullptr) store_first(out + i, r.out, rest);
      }
    }
  }
  if constexpr (streaming) stream_fence();
}

template <class T, bool gelu_gate, bool interleaved>
void backward_parts(const SwigluBackwardArgs& args, int64_t first_part, int64_t last_part) {
  (args.streaming ? backward_range<T, gelu_gate, interleaved, true>
                  : backward_range<T, gelu_gate, interleaved, false>)(args, first_part, last_part);
}

#define LAYERSYNC_OF_TYPES(function, gelu_gate, interleaved)                        \
  {function<float, gelu_gate, interleaved>, function<bf16, gelu_gate, interleaved>, \
   function<fp16, gelu_gate, interleaved>}
#define LAYERSYNC_OF_LAYOUTS(function)                                                         \
  {                                                                                            \
    {LAYERSYNC_OF_TYPES(function, false, false), LAYERSYNC_OF_TYPES(function, true, false)}, { \
      LAYERSYNC_OF_TYPES(function, false, true), LAYERSYNC_OF_TYPES(function, true, true)      \
    }                                                                                          \
  }

constexpr SwigluKernels kernels = {LAYERSYNC_OF_LAYOUTS(forward_rows), LAYERSYNC_OF_LAYOUTS(backward_parts)};

#undef LAYERSYNC_OF_TYPES
#undef LAYERSYNC_OF_LAYOUTS
