// The loops, written once over Vec and compiled once per instruction set inside the namespace of the includer.
#include "../common/cpu/vec_put.inl"
#include "../common/cpu/vec_tail.inl"

constexpr int64_t kMaxHead = 256;

// A head in fp32, with zeros behind it up to a whole vector.
struct Head {
  alignas(64) float value[kMaxHead + 16] = {};
};

// Calls body(i, count) for the vectors of a head. The last one begins where it still is whole, and does again what the
// one before did; body must bear that. Heads narrower than a vector have one, of `count` values.
template <class Body>
inline void for_each_vector(int64_t width, Body body) {
  if (width < Vec::size) return body(0, width);
  int64_t i = 0;
  for (; i + Vec::size <= width; i += Vec::size) body(i, Vec::size);
  if (i < width) body(width - Vec::size, Vec::size);
}

template <class T>
inline Vec load_some(const T* p, int64_t count) {
  return count == Vec::size ? load(p) : load_first(p, count);
}

template <class T, bool streaming>
inline void put_some(T* p, Vec v, int64_t count) {
  if (count < Vec::size) return store_first(p, v, count);
  put<streaming>(p, v);
}

// Calls body(i) for whole vectors, the zeros behind a head included.
template <class Body>
inline void for_each_padded(int64_t width, Body body) {
  for (int64_t i = 0; i < width; i += Vec::size) body(i);
}

template <class T>
inline void read(const T* from, Head& to, int64_t width) {
  for_each_vector(width, [&](int64_t i, int64_t count) {
    const Vec v = load_some(from + i, count);
    if (count < Vec::size) return store_first(to.value + i, v, count);
    store(to.value + i, v);
  });
}

inline Vec at(const Head& head, int64_t i) { return load(head.value + i); }

// (-b, a) for each pair (a, b) that turns; back: (b, -a).
inline void turn(const Head& from, Head& to, int64_t width, bool interleaved, bool back) {
  const float sign = back ? -1.f : 1.f;
  const int64_t half = width / 2;
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      to.value[2 * i] = -sign * from.value[2 * i + 1];
      to.value[2 * i + 1] = sign * from.value[2 * i];
    }
  } else {
    for (int64_t i = 0; i < half; ++i) to.value[i] = -sign * from.value[half + i];
    for (int64_t i = 0; i < half; ++i) to.value[half + i] = sign * from.value[i];
  }
}

// Leaves the values less their mean, or as they are, and gives the reciprocal of their deviation or root mean square.
inline float centre(Head& head, int64_t width, float eps, bool centred) {
  if (centred) {
    Vec sums = broadcast(0);
    for_each_padded(width, [&](int64_t i) { sums = add(sums, at(head, i)); });
    const float mean = sum(sums) / float(width);
    for (int64_t i = 0; i < width; ++i) head.value[i] -= mean;
  }
  Vec squares = broadcast(0);
  for_each_padded(width, [&](int64_t i) { squares = fma(at(head, i), at(head, i), squares); });
  return 1 / std::sqrt(sum(squares) / float(width) + eps);
}

template <class T, bool streaming>
void forward_tokens_as(const QkForwardArgs& args, int64_t first_token, int64_t last_token) {
  const QkHead& h = args.head;
  const int64_t width = h.width;
  Head x, turned;
  for (int64_t token = first_token; token < last_token; ++token) {
    const T* in = static_cast<const T*>(args.qkv) + args.layout.offset(token);
    T* out = static_cast<T*>(args.out) + token * 2 * h.heads * width;
    const int64_t place = h.cos == nullptr ? 0 : token % h.positions * width;
    for (int64_t slot = 0; slot < 2 * h.heads; ++slot, in += width, out += width) {
      read(in, x, width);
      if (const float* weight = h.weight[slot / h.heads]; weight != nullptr) {
        const Vec rstd = broadcast(centre(x, width, h.eps, h.centred));
        Head& y = turned;
        for_each_vector(width, [&](int64_t i, int64_t count) {
          const Vec v = mul(mul(at(x, i), rstd), load_some(weight + i, count));
          if (count < Vec::size) return store_first(y.value + i, v, count);
          store(y.value + i, v);
        });
        std::memcpy(x.value, y.value, size_t(width) * sizeof(float));
      }
      if (h.cos != nullptr) turn(x, turned, width, h.interleaved, false);
      for_each_vector(width, [&](int64_t i, int64_t count) {
        Vec v = at(x, i);
        if (h.cos != nullptr)
          v = fma(v, load_some(h.cos + place + i, count), mul(at(turned, i), load_some(h.sin + place + i, count)));
        put_some<T, streaming>(out + i, v, count);
      });
    }
  }
  if constexpr (streaming) stream_fence();
}

template <class T>
void forward_tokens(const QkForwardArgs& args, int64_t first_token, int64_t last_token) {
  (args.streaming ? forward_tokens_as<T, true> : forward_tokens_as<T, false>)(args, first_token, last_token);
}

inline void add_to(float* sums, const Head& head, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sums[i] += head.value[i];
}

template <class T, bool streaming>
void backward_parts_as(const QkBackwardArgs& args, int64_t first_part, int64_t last_part) {
  const QkHead& h = args.head;
  const int64_t width = h.width, slots = 3 * h.heads;
  Head g, turned, x, d_weight;
  for (int64_t part = first_part; part < last_part; ++part) {
    const int64_t begin = part * args.rows_per_part;
    const int64_t end = begin + args.rows_per_part < args.tokens ? begin + args.rows_per_part : args.tokens;
    float* bias_sums = args.bias_sums == nullptr ? nullptr : args.bias_sums + part * slots * width;
    if (bias_sums != nullptr) std::memset(bias_sums, 0, size_t(slots * width) * sizeof(float));
    const auto weight_sums = [&](int64_t kind) {
      return args.weight_sums + (kind * args.parts + part) * h.heads * width;
    };
    for (int kind = 0; kind < 2 && args.weight_sums != nullptr; ++kind)
      std::memset(weight_sums(kind), 0, size_t(h.heads * width) * sizeof(float));
    for (int64_t token = begin; token < end; ++token) {
      const int64_t sample = token / h.positions, position = token - sample * h.positions, place = position * width;
      T* out = static_cast<T*>(args.d_qkv) + token * slots * width;
      for (int64_t slot = 0; slot < slots; ++slot, out += width) {
        const int64_t kind = slot / h.heads, head = slot - kind * h.heads;
        const QkGradient& from = args.gradient[kind];
        read(static_cast<const T*>(from.data) + sample * from.batch_stride + head * from.head_stride +
                 position * from.position_stride,
             g, width);
        if (kind < 2 && h.cos != nullptr) {
          for_each_vector(width, [&](int64_t i, int64_t count) {
            const Vec v = mul(at(g, i), load_some(h.sin + place + i, count));
            if (count < Vec::size) return store_first(x.value + i, v, count);
            store(x.value + i, v);
          });
          turn(x, turned, width, h.interleaved, true);
          if (width < Vec::size) {
            for (int64_t i = 0; i < width; ++i) g.value[i] = g.value[i] * h.cos[place + i] + turned.value[i];
          } else {
            for_each_vector(width, [&](int64_t i, int64_t) {
              store(x.value + i, fma(at(g, i), load(h.cos + place + i), at(turned, i)));
            });
            std::memcpy(g.value, x.value, size_t(width) * sizeof(float));
          }
        }
        if (const float* weight = kind < 2 ? h.weight[kind] : nullptr; weight != nullptr) {
          read(static_cast<const T*>(args.qkv) + args.layout.offset(token) + slot * width, x, width);
          const float rstd = centre(x, width, h.eps, h.centred);
          // x becomes the normed row, d_weight the gradient of the weight, g that of the normed row.
          for (int64_t i = 0; i < width; ++i) {
            x.value[i] *= rstd;
            d_weight.value[i] = g.value[i] * x.value[i];
            g.value[i] *= weight[i];
          }
          if (args.weight_sums != nullptr) add_to(weight_sums(kind) + head * width, d_weight, width);
          Vec along = broadcast(0), total = broadcast(0);
          for_each_padded(width, [&](int64_t i) {
            along = fma(at(g, i), at(x, i), along);
            total = add(total, at(g, i));
          });
          const float projected = sum(along) / float(width), mean = h.centred ? sum(total) / float(width) : 0;
          for (int64_t i = 0; i < width; ++i) g.value[i] = rstd * (g.value[i] - x.value[i] * projected - mean);
        }
        if (bias_sums != nullptr) add_to(bias_sums + slot * width, g, width);
        for_each_vector(width, [&](int64_t i, int64_t count) { put_some<T, streaming>(out + i, at(g, i), count); });
      }
    }
  }
  if constexpr (streaming) stream_fence();
}

template <class T>
void backward_parts(const QkBackwardArgs& args, int64_t first_part, int64_t last_part) {
  (args.streaming ? backward_parts_as<T, true> : backward_parts_as<T, false>)(args, first_part, last_part);
}

constexpr QkKernels kernels = {{forward_tokens<float>, forward_tokens<bf16>, forward_tokens<fp16>},
                               {backward_parts<float>, backward_parts<bf16>, backward_parts<fp16>}};
