// The loops, written once over Vec and compiled once per instruction set inside the namespace of the includer.

struct GramTerm {
  Vec value, gradient;
};

// A NaN shows in both.
template <int kind>
inline GramTerm gram_term(Vec difference, Vec margin) {
  const Vec zero = broadcast(0), distance = max(difference, sub(zero, difference));
  const Vec excess = sub(distance, margin), positive = max(zero, excess);
  if constexpr (kind == kGramSquare) return {mul(positive, positive), with_sign(add(positive, positive), difference)};
  const Vec one = add(broadcast(1), sub(excess, excess));
  return {kind == kGramRelu ? positive : where_positive(excess, distance),
          where_positive(excess, with_sign(one, difference))};
}

template <int kind, bool differentiated, class T>
float gram_run(const T* d, float* g, int64_t count, float margin) {
  const Vec limit = broadcast(margin);
  Vec sum0 = broadcast(0), sum1 = broadcast(0);
  int64_t i = 0;
  for (; i + 2 * Vec::size <= count; i += 2 * Vec::size) {
    const GramTerm a = gram_term<kind>(load(d + i), limit), b = gram_term<kind>(load(d + i + Vec::size), limit);
    sum0 = add(sum0, a.value);
    sum1 = add(sum1, b.value);
    if constexpr (differentiated) {
      store(g + i, a.gradient);
      store(g + i + Vec::size, b.gradient);
    }
  }
  while (i < count) {
    // The lanes beyond the row are 0, which adds nothing.
    T lanes[Vec::size] = {};
    int64_t used = 0;
    for (; used < Vec::size && i + used < count; ++used) lanes[used] = d[i + used];
    const GramTerm a = gram_term<kind>(load(lanes), limit);
    sum0 = add(sum0, a.value);
    if constexpr (differentiated) {
      float gradient[Vec::size];
      store(gradient, a.gradient);
      for (int64_t k = 0; k < used; ++k) g[i + k] = gradient[k];
    }
    i += used;
  }
  return sum(add(sum0, sum1));
}

template <int kind, bool differentiated, class T>
void strip_range(const GramStripArgs& args, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    const T* d = static_cast<const T*>(args.difference) + row * args.columns;
    float* g = differentiated ? args.gradient + row * args.columns : nullptr;
    const auto run = [&](int64_t begin, int64_t end) {
      return gram_run<kind, differentiated>(d + begin, differentiated ? g + begin : nullptr, end - begin, args.margin);
    };
    args.sums[row] = run(0, args.diagonal) + 2 * run(args.diagonal, args.columns);
  }
}

template <int kind, class T>
void strip_rows(const GramStripArgs& args, int64_t first_row, int64_t last_row) {
  (args.gradient == nullptr ? strip_range<kind, false, T> : strip_range<kind, true, T>)(args, first_row, last_row);
}

constexpr GramKernels kernels = {
    {{strip_rows<kGramRelu, float>, strip_rows<kGramRelu, bf16>, strip_rows<kGramRelu, fp16>},
     {strip_rows<kGramSquare, float>, strip_rows<kGramSquare, bf16>, strip_rows<kGramSquare, fp16>},
     {strip_rows<kGramAbs, float>, strip_rows<kGramAbs, bf16>, strip_rows<kGramAbs, fp16>}}};
