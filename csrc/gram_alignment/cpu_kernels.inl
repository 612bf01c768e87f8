// The loops, written once over Vec and compiled once per instruction set inside the namespace of the includer.

struct GramTerm {
  Vec value, gradient;
};

// A NaN of either cosine shows in both.
template <int kind>
inline GramTerm gram_term(Vec student, Vec teacher, Vec margin) {
  const Vec zero = broadcast(0), difference = sub(student, teacher), distance = max(difference, sub(zero, difference));
  const Vec excess = sub(distance, margin), positive = max(zero, excess);
  if constexpr (kind == kGramSquare) return {mul(positive, positive), with_sign(add(positive, positive), difference)};
  const Vec one = add(broadcast(1), sub(excess, excess));
  return {kind == kGramRelu ? positive : where_positive(excess, distance),
          where_positive(excess, with_sign(one, difference))};
}

template <int kind, bool differentiated>
float gram_run(const float* s, const float* t, float* g, int64_t count, float margin) {
  const Vec limit = broadcast(margin);
  Vec sum0 = broadcast(0), sum1 = broadcast(0);
  int64_t i = 0;
  for (; i + 2 * Vec::size <= count; i += 2 * Vec::size) {
    const GramTerm a = gram_term<kind>(load(s + i), load(t + i), limit);
    const GramTerm b = gram_term<kind>(load(s + i + Vec::size), load(t + i + Vec::size), limit);
    sum0 = add(sum0, a.value);
    sum1 = add(sum1, b.value);
    if constexpr (differentiated) {
      store(g + i, a.gradient);
      store(g + i + Vec::size, b.gradient);
    }
  }
  for (; i < count; i += Vec::size) {
    // The lanes beyond the row hold equal cosines, which add nothing.
    float lanes_s[Vec::size] = {}, lanes_t[Vec::size] = {};
    const size_t rest = size_t(count - i < Vec::size ? count - i : Vec::size) * sizeof(float);
    std::memcpy(lanes_s, s + i, rest);
    std::memcpy(lanes_t, t + i, rest);
    const GramTerm a = gram_term<kind>(load(lanes_s), load(lanes_t), limit);
    sum0 = add(sum0, a.value);
    if constexpr (differentiated) {
      store(lanes_s, a.gradient);
      std::memcpy(g + i, lanes_s, rest);
    }
  }
  return sum(add(sum0, sum1));
}

template <int kind, bool differentiated>
void strip_range(const GramStripArgs& args, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    const float* s = args.student + row * args.columns;
    const float* t = args.teacher + row * args.columns;
    float* g = differentiated ? args.gradient + row * args.columns : nullptr;
    const auto run = [&](int64_t begin, int64_t end) {
      return gram_run<kind, differentiated>(s + begin, t + begin, differentiated ? g + begin : nullptr, end - begin,
                                            args.margin);
    };
    args.sums[row] = run(0, args.diagonal) + 2 * run(args.diagonal, args.columns);
  }
}

template <int kind>
void strip_rows(const GramStripArgs& args, int64_t first_row, int64_t last_row) {
  (args.gradient == nullptr ? strip_range<kind, false> : strip_range<kind, true>)(args, first_row, last_row);
}

constexpr GramKernels kernels = {{strip_rows<kGramRelu>, strip_rows<kGramSquare>, strip_rows<kGramAbs>}};
