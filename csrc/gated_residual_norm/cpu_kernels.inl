// The loops, written once over Vec and compiled once per instruction set inside the namespace of the includer.
#include "../common/cpu/row_cosine.inl"
#include "../common/cpu/vec_put.inl"

// One value as a vector, so that the rest of a row takes the same path as its bulk.
struct Scalar {
  static constexpr int64_t size = 1;
  float v;
};

template <class T>
inline void load_into(const T* p, Vec& out) {
  out = load(p);
}

template <class T>
inline void load_into(const T* p, Scalar& out) {
  out = {to_float(*p)};
}

inline Scalar add(Scalar a, Scalar b) { return {a.v + b.v}; }
inline Scalar sub(Scalar a, Scalar b) { return {a.v - b.v}; }
inline Scalar mul(Scalar a, Scalar b) { return {a.v * b.v}; }
inline Scalar fma(Scalar a, Scalar b, Scalar c) { return {a.v * b.v + c.v}; }

template <class T>
inline void store(T* p, Scalar v) {
  from_float(v.v, p);
}

template <class T>
inline void stream(T* p, Scalar v) {
  from_float(v.v, p);
}

template <class V>
inline V spread(float value) {
  if constexpr (V::size == 1) {
    return {value};
  } else {
    return broadcast(value);
  }
}

template <class V, class T>
inline V get(const T* p) {
  V v;
  load_into(p, v);
  return v;
}

// Calls body(i, V) for a row: vectors, then the rest one by one.
template <class Body>
inline void for_row(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + Vec::size <= width; i += Vec::size) body(i, Vec{});
  for (; i < width; ++i) body(i, Scalar{});
}

inline float* filled(float* row, int64_t width, float value) {
  for (int64_t i = 0; i < width; ++i) row[i] = value;
  return row;
}

inline const float* modulation_row(const ModulationRows& m, int64_t group, const float* otherwise) {
  return m.data == nullptr ? otherwise : m.data + group * m.stride;
}

// Sums over a row, in Vec and in the rest. The constructor is written out: one that GCC makes is for the instruction set
// of the command line, and where it is not inlined it looks for what `broadcast` returns in the wrong place.
struct RowSum {
  Vec vector;
  float rest;
  RowSum() : vector(broadcast(0)), rest(0) {}
  void operator+=(Vec v) { vector = add(vector, v); }
  void operator+=(Scalar v) { rest += v.v; }
  void add_product(Vec a, Vec b) { vector = fma(a, b, vector); }
  void add_product(Scalar a, Scalar b) { rest += a.v * b.v; }
  float total() const { return sum(vector) + rest; }
};

// Rows that are worked on side by side: they share the loads of the modulation and of the sums over rows, and the chains
// of their row sums overlap.
constexpr int kRows = 4;

// Calls body(k) for k = 0, 1, ... as compile-time constants: arrays that are indexed by them become registers.
template <int count, class Body>
__attribute__((always_inline)) inline void each(Body body) {
  if constexpr (count > 0) {
    each<count - 1>(body);
    body(std::integral_constant<int, count - 1>{});
  }
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }

// Copies a row from the cache past it.
template <class T>
inline void stream_row(T* to, const T* from, int64_t width) {
  constexpr int64_t kFloats = sizeof(float) / sizeof(T);
  for (int64_t i = 0; i < width; i += kFloats * Vec::size)
    stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
}

template <int rows, bool branched, bool normed, bool streaming, class R, class H>
void forward_block(const ResidualNormForwardArgs& args, int64_t row, const float* zeros, const float* ones, R* copies) {
  const int64_t width = args.width, group = row / args.rows_per_group;
  const R* r[rows];
  if constexpr (branched) {
    const R* x[rows];
    const H* branch[rows];
    R* out[rows];
    each<rows>([&](auto k) {
      x[k] = static_cast<const R*>(args.x) + args.x_rows.offset(row + k);
      branch[k] = static_cast<const H*>(args.branch) + args.branch_rows.offset(row + k);
      // Where the output bypasses the cache, the passes behind this one need a copy that does not.
      out[k] = streaming ? copies + k * width : static_cast<R*>(args.residual) + (row + k) * width;
      r[k] = out[k];
    });
    const float* gate = modulation_row(args.gate, group, ones);
    for_row(width, [&](int64_t i, auto v) {
      using V = decltype(v);
      const V g = get<V>(gate + i);
      each<rows>([&](auto k) {
        store(out[k] + i, fma(g, get<V>(branch[k] + i), get<V>(x[k] + i)));
        prefetch(x[k] + rows * width + i);
        prefetch(branch[k] + rows * width + i);
      });
    });
    if constexpr (streaming)
      each<rows>([&](auto k) { stream_row(static_cast<R*>(args.residual) + (row + k) * width, out[k], width); });
  } else {
    each<rows>([&](auto k) { r[k] = static_cast<const R*>(args.x) + args.x_rows.offset(row + k); });
  }
  if constexpr (normed) {
    float mean[rows] = {}, rstd[rows];
    if (!args.rms) {
      RowSum total[rows];
      for_row(width, [&](int64_t i, auto v) { each<rows>([&](auto k) { total[k] += get<decltype(v)>(r[k] + i); }); });
      each<rows>([&](auto k) { mean[k] = total[k].total() / float(width); });
    }
    RowSum squares[rows];
    for_row(width, [&](int64_t i, auto v) {
      using V = decltype(v);
      each<rows>([&](auto k) {
        const V d = sub(get<V>(r[k] + i), spread<V>(mean[k]));
        squares[k].add_product(d, d);
      });
    });
    each<rows>([&](auto k) {
      rstd[k] = 1 / std::sqrt(squares[k].total() / float(width) + args.eps);
      args.mean[row + k] = mean[k];
      args.rstd[row + k] = rstd[k];
    });
    const float* shift = modulation_row(args.shift, group, zeros);
    const float* scale = modulation_row(args.scale, group, zeros);
    H* out = static_cast<H*>(args.normed) + row * width;
    for_row(width, [&](int64_t i, auto v) {
      using V = decltype(v);
      const V factor = add(get<V>(scale + i), spread<V>(1)), offset = get<V>(shift + i);
      each<rows>([&](auto k) {
        const V unit = mul(sub(get<V>(r[k] + i), spread<V>(mean[k])), spread<V>(rstd[k]));
        put<streaming>(out + k * width + i, fma(unit, factor, offset));
      });
    });
  }
  if (args.student != nullptr) {
    each<rows>([&](auto k) {
      const R* student = static_cast<const R*>(args.student) + args.student_rows.offset(row + k);
      const RowCosine c = row_cosine(student, r[k], width, args.align_eps);
      args.cosine[row + k] = c.cosine;
      args.rnorm_student[row + k] = c.rnorm_student;
      args.rnorm_residual[row + k] = c.rnorm_teacher;
    });
  }
}

template <bool branched, bool normed, bool streaming, class R, class H>
void forward_range(const ResidualNormForwardArgs& args, int64_t first_row, int64_t last_row, float* scratch) {
  const int64_t width = args.width;
  const float* zeros = filled(scratch, width, 0);
  const float* ones = filled(scratch + width, width, 1);
  R* copies = reinterpret_cast<R*>(scratch + 2 * width);
  for (int64_t row = first_row; row < last_row;) {
    const int64_t left = args.rows_per_group - row % args.rows_per_group;
    if (left >= kRows && row + kRows <= last_row) {
      forward_block<kRows, branched, normed, streaming, R, H>(args, row, zeros, ones, copies);
      row += kRows;
    } else {
      forward_block<1, branched, normed, streaming, R, H>(args, row, zeros, ones, copies);
      row += 1;
    }
  }
  if constexpr (streaming) stream_fence();
}

template <class R, class H>
void forward_rows(const ResidualNormForwardArgs& args, int64_t first_row, int64_t last_row, float* scratch) {
  const auto choose = [&](auto branched, auto normed) {
    constexpr bool b = decltype(branched)::value, n = decltype(normed)::value;
    (args.streaming ? forward_range<b, n, true, R, H> : forward_range<b, n, false, R, H>)(args, first_row, last_row,
                                                                                          scratch);
  };
  if (args.branch == nullptr) {
    choose(std::false_type{}, std::true_type{});
  } else if (args.normed == nullptr) {
    choose(std::true_type{}, std::false_type{});
  } else {
    choose(std::true_type{}, std::true_type{});
  }
}

// Where the sums of a part go: its rows of the results, or a row that nobody reads.
inline float* sums_of(float* sums, int64_t part, int64_t width, float* unwanted) {
  return filled(sums == nullptr ? unwanted : sums + part * width, width, 0);
}

struct PartSums {
  float *gate, *shift, *scale, *update;
};

template <int rows, bool normed, bool branched, bool aligned, bool streaming, class R, class H>
void backward_block(const ResidualNormBackwardArgs& args, int64_t row, const float* gate, const float* scale,
                    const float* zeros, PartSums sums) {
  const int64_t width = args.width;
  const R *r[rows], *dr[rows], *other[rows];
  const H *dy[rows], *branch[rows];
  float p[rows], q[rows], mean[rows], rstd[rows];
  each<rows>([&](auto k) {
    r[k] = static_cast<const R*>(args.residual) + args.residual_rows.offset(row + k);
    dr[k] = args.d_residual == nullptr ? reinterpret_cast<const R*>(zeros)
                                       : static_cast<const R*>(args.d_residual) + args.d_residual_rows.offset(row + k);
    if constexpr (normed) {
      dy[k] = static_cast<const H*>(args.d_normed) + args.d_normed_rows.offset(row + k);
      mean[k] = args.mean[row + k];
      rstd[k] = args.rstd[row + k];
    }
    if constexpr (branched) branch[k] = static_cast<const H*>(args.branch) + args.branch_rows.offset(row + k);
    if constexpr (aligned) {
      other[k] = static_cast<const R*>(args.other) + args.other_rows.offset(row + k);
      p[k] = args.factors[row + k];
      q[k] = args.factors[args.rows + row + k];
    }
  });

  float mean_a[rows] = {}, mean_ax[rows] = {};
  if constexpr (normed) {
    RowSum a_sum[rows], ax_sum[rows];
    for_row(width, [&](int64_t i, auto v) {
      using V = decltype(v);
      V d_shift = get<V>(sums.shift + i), d_scale = get<V>(sums.scale + i);
      const V s = get<V>(scale + i);
      each<rows>([&](auto k) {
        const V unit = mul(sub(get<V>(r[k] + i), spread<V>(mean[k])), spread<V>(rstd[k])), g = get<V>(dy[k] + i);
        const V a = fma(g, s, g);
        d_shift = add(d_shift, g);
        d_scale = fma(g, unit, d_scale);
        prefetch(r[k] + rows * width + i);
        prefetch(dy[k] + rows * width + i);
        a_sum[k] += a;
        ax_sum[k].add_product(a, unit);
      });
      store(sums.shift + i, d_shift);
      store(sums.scale + i, d_scale);
    });
    each<rows>([&](auto k) {
      mean_a[k] = args.rms ? 0.f : a_sum[k].total() / float(width);
      mean_ax[k] = ax_sum[k].total() / float(width);
    });
  }
  R* dx = static_cast<R*>(args.d_x) + row * width;
  H* d_branch = static_cast<H*>(args.d_branch) + row * width;
  for_row(width, [&](int64_t i, auto v) {
    using V = decltype(v);
    const V s = get<V>(scale + i), gated = get<V>(gate + i);
    V d_gate = get<V>(sums.gate + i), d_update = get<V>(sums.update + i);
    each<rows>([&](auto k) {
      V d = get<V>(dr[k] + i);
      if constexpr (normed) {
        const V unit = mul(sub(get<V>(r[k] + i), spread<V>(mean[k])), spread<V>(rstd[k])), g = get<V>(dy[k] + i);
        const V a = sub(fma(g, s, g), spread<V>(mean_a[k]));
        d = fma(sub(a, mul(unit, spread<V>(mean_ax[k]))), spread<V>(rstd[k]), d);
      }
      if constexpr (aligned) d = fma(spread<V>(p[k]), get<V>(other[k] + i), fma(spread<V>(q[k]), get<V>(r[k] + i), d));
      if constexpr (normed || aligned) put<streaming>(dx + k * width + i, d);
      if constexpr (branched) {
        prefetch(dr[k] + rows * width + i);
        prefetch(branch[k] + rows * width + i);
        put<streaming>(d_branch + k * width + i, mul(gated, d));
        d_gate = fma(get<V>(branch[k] + i), d, d_gate);
        d_update = add(d_update, d);
      }
    });
    if constexpr (branched) {
      store(sums.gate + i, d_gate);
      store(sums.update + i, d_update);
    }
  });
}

template <bool normed, bool branched, bool aligned, bool streaming, class R, class H>
void backward_range(const ResidualNormBackwardArgs& args, int64_t first_part, int64_t last_part, float* scratch) {
  const int64_t width = args.width;
  const float* zeros = filled(scratch, width, 0);
  const float* ones = filled(scratch + width, width, 1);
  float* unwanted = scratch + 2 * width;
  for (int64_t part = first_part; part < last_part; ++part) {
    const int64_t group = part / args.parts, last = (group + 1) * args.rows_per_group;
    int64_t row = group * args.rows_per_group + part % args.parts * args.rows_per_part;
    const int64_t end = row + args.rows_per_part < last ? row + args.rows_per_part : last;
    const float* gate = modulation_row(args.gate, group, ones);
    const float* scale = modulation_row(args.scale, group, zeros);
    const PartSums sums{sums_of(args.d_gate, part, width, unwanted),
                        sums_of(args.d_shift, part, width, unwanted + width),
                        sums_of(args.d_scale, part, width, unwanted + 2 * width),
                        sums_of(args.d_bias, part, width, unwanted + 3 * width)};
    for (; row + kRows <= end; row += kRows)
      backward_block<kRows, normed, branched, aligned, streaming, R, H>(args, row, gate, scale, zeros, sums);
    for (; row < end; ++row)
      backward_block<1, normed, branched, aligned, streaming, R, H>(args, row, gate, scale, zeros, sums);
    if (args.d_bias != nullptr)  // the sum of gate·update
      for_row(width, [&](int64_t i, auto v) {
        using V = decltype(v);
        store(sums.update + i, mul(get<V>(gate + i), get<V>(sums.update + i)));
      });
  }
  if constexpr (streaming) stream_fence();
}

template <class R, class H>
void backward_parts(const ResidualNormBackwardArgs& args, int64_t first_part, int64_t last_part, float* scratch) {
  const auto choose = [&](auto normed, auto branched, auto aligned) {
    constexpr bool n = decltype(normed)::value, b = decltype(branched)::value, a = decltype(aligned)::value;
    (args.streaming ? backward_range<n, b, a, true, R, H> : backward_range<n, b, a, false, R, H>)(args, first_part,
                                                                                                  last_part, scratch);
  };
  const std::true_type yes;
  const std::false_type no;
  const bool normed = args.d_normed != nullptr, branched = args.branch != nullptr, aligned = args.other != nullptr;
  if (aligned) {
    normed ? choose(yes, yes, yes) : choose(no, yes, yes);
  } else if (branched) {
    normed ? choose(yes, yes, no) : choose(no, yes, no);
  } else {
    choose(yes, no, no);
  }
}

constexpr ResidualNormKernels kernels = {
    {{forward_rows<float, float>, forward_rows<float, bf16>, forward_rows<float, fp16>},
     {nullptr, forward_rows<bf16, bf16>, nullptr},
     {nullptr, nullptr, forward_rows<fp16, fp16>}},
    {{backward_parts<float, float>, backward_parts<float, bf16>, backward_parts<float, fp16>},
     {nullptr, backward_parts<bf16, bf16>, nullptr},
     {nullptr, nullptr, backward_parts<fp16, fp16>}}};
