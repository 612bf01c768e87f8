// The loops, written once over Vec and compiled once per instruction set inside the namespace of the includer.
#include "../common/cpu/vec_exp.inl"

// A product's operands are words, one for each step of the sums: a float, or with the bf16 instructions a pair of bf16.

struct Fp32Words {
  using Word = float;
  using Stored = float;  // a row of these is a row of words
  static constexpr int64_t values = 1;

  static Word word(float first, float) { return first; }
  static Vec words(const Vec& first, const Vec&) { return first; }
  static Vec multiply(const Word& a, const Vec& b, const Vec& sum) { return fma(broadcast(a), b, sum); }
};

constexpr int kTileVectors = Vec::registers / 8;  // of a panel, that a product has in registers

template <class Words>
int64_t steps_of(int64_t values) {
  return (values + Words::values - 1) / Words::values;
}

// The last, partial vector of a row is filled up with zeros.
template <class T>
Vec load_part(const T* p, int64_t count) {
  if (count >= Vec::size) return load(p);
  T part[Vec::size] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
}

template <class T>
void store_part(T* p, const Vec& v, int64_t count) {
  if (count >= Vec::size) return store(p, v);
  T part[Vec::size];
  store(part, v);
  for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}

// Rows of words, and how far apart rows and steps are.
template <class Words>
struct Left {
  const typename Words::Word* data;
  int64_t row_stride, step_stride;
};

// Column c of step s is at ((c / kPanel) * steps + s) * kPanel + c % kPanel.
template <class Words>
struct Panels {
  typename Words::Word* data;
  int64_t steps;

  typename Words::Word* at(int64_t column, int64_t step) const {
    return data + (column / kPanel * steps + step) * kPanel + column % kPanel;
  }

  // A row of values becomes a column.
  template <class T>
  void put_column(int64_t column, const T* values, int64_t count) const {
    typename Words::Word* to = at(column, 0);
    for (int64_t i = 0; i < count; i += Words::values, to += kPanel)
      *to = Words::word(to_float(values[i]), i + 1 < count ? to_float(values[i + 1]) : 0);
  }

  // A row of values becomes a step, or two of them.
  template <class T>
  void put_step(int64_t step, const T* first, const T* second, int64_t count) const {
    for (int64_t i = 0; i < count; i += Vec::size) {
      const Vec next = second == nullptr ? broadcast(0) : load_part(second + i, count - i);
      store(reinterpret_cast<float*>(at(i, step)), Words::words(load_part(first + i, count - i), next));
    }
  }
};

// Rows times panel. Six rows times four vectors are 24 accumulators: with the vectors and one row's word 29 of 32
// registers, and 24 multiplications for 10 loads.
template <int kVectors, bool accumulate, class Words>
void multiply_tile(const Left<Words>& left, int64_t last, const typename Words::Word* panel, int64_t steps, float* out,
                   int64_t out_stride) {
  const typename Words::Word* row[kTileRows];
  Vec sums[kTileRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
    row[r] = left.data + (r < last ? r : last) * left.row_stride;
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) sums[r][c] = broadcast(0);
  }
  for (int64_t step = 0; step < steps; ++step, panel += kPanel) {
    Vec column[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) column[c] = load(reinterpret_cast<const float*>(panel) + c * Vec::size);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const typename Words::Word word = row[r][step * left.step_stride];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sums[r][c] = Words::multiply(word, column[c], sums[r][c]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      float* to = out + r * out_stride + c * Vec::size;
      store(to, accumulate ? add(load(to), sums[r][c]) : sums[r][c]);
    }
}

template <class Words>
using TileKernel = void (*)(const Left<Words>&, int64_t, const typename Words::Word*, int64_t, float*, int64_t);

template <bool accumulate, class Words>
constexpr TileKernel<Words> tile_kernels[4] = {multiply_tile<1, accumulate, Words>,
                                               multiply_tile<(kTileVectors < 2 ? 1 : 2), accumulate, Words>,
                                               multiply_tile<(kTileVectors < 3 ? 1 : 3), accumulate, Words>,
                                               multiply_tile<(kTileVectors < 4 ? 1 : 4), accumulate, Words>};

// out (rows, columns), rows whole panels apart, = or += left · right. Whole tiles of `out` are written. Long sums are
// made of shorter ones, whose errors do not add up.
template <bool accumulate, class Words>
void multiply(const Left<Words>& left, int64_t rows, const Panels<Words>& right, int64_t columns, float* out) {
  constexpr int64_t kSteps = 128;
  const int64_t stride = whole_panels(columns);
  for (int64_t column = 0; column < columns; column += kTileVectors * Vec::size) {
    const int64_t vectors = (columns - column + Vec::size - 1) / Vec::size;
    const int64_t width = (vectors < kTileVectors ? vectors : kTileVectors) - 1;
    const auto tile = tile_kernels<accumulate, Words>[width], more = tile_kernels<true, Words>[width];
    for (int64_t step = 0; step < right.steps; step += kSteps)
      for (int64_t row = 0; row < rows; row += kTileRows)
        (step == 0 ? tile : more)(
            {left.data + row * left.row_stride + step * left.step_stride, left.row_stride, left.step_stride},
            rows - row - 1, right.at(column, step), right.steps - step < kSteps ? right.steps - step : kSteps,
            out + row * stride + column, stride);
  }
}

// exp(scale * (score - the row's largest)), rounded, into `out`, which may be the scores; returns their sum. What lies
// behind the row, up to a whole vector, becomes 0.
template <class T>
float exponentials(float* scores, int64_t width, float scale, T* out) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t i = width; i % Vec::size != 0; ++i) scores[i] = -kInfinity;
  Vec largest = broadcast(-kInfinity);
  for (int64_t i = 0; i < width; i += Vec::size) largest = max(largest, load(scores + i));
  const Vec top = broadcast(max(largest)), factor = broadcast(scale);
  Vec total = broadcast(0);
  for (int64_t i = 0; i < width; i += Vec::size) {
    const Vec e = exp(mul(sub(load(scores + i), top), factor));
    total = add(total, e);
    store(out + i, e);
  }
  return sum(total);
}

// From scores and the gradient of probabilities to probabilities and the gradient of scores.
inline void backward_row(float* scores, float* gradient, int64_t width, float scale) {
  const float norm = 1 / exponentials(scores, width, scale, scores);
  for (int64_t i = width; i % Vec::size != 0; ++i) gradient[i] = 0;
  const Vec factor = broadcast(norm), outer = broadcast(scale);
  Vec dot = broadcast(0);
  for (int64_t i = 0; i < width; i += Vec::size) {
    const Vec p = mul(load(scores + i), factor);
    store(scores + i, p);
    dot = fma(p, load(gradient + i), dot);
  }
  const Vec mean = broadcast(sum(dot));
  for (int64_t i = 0; i < width; i += Vec::size)
    store(gradient + i, mul(mul(load(scores + i), outer), sub(load(gradient + i), mean)));
}

class Scratch {
 public:
  explicit Scratch(float* next) : next_(next) {}

  // Buffers are whole cache lines.
  template <class W>
  W* take(int64_t words) {
    W* result = reinterpret_cast<W*>(next_);
    next_ += (words * int64_t(sizeof(W)) + 63) / 64 * 16;
    return result;
  }

 private:
  float* next_;
};

// The rows of one head: far apart, so that no hardware prefetcher follows. Left alone, waiting for them took as long as
// the products.
template <class T>
struct HeadRows {
  const T* first;
  int64_t stride, tokens, head_dim;

  HeadRows(const void* data, const RowLayout& layout, const AttentionArgs& args, int64_t head)
      : first(static_cast<const T*>(data) + layout.offset(head / args.heads * args.tokens) +
              head % args.heads * args.head_dim),
        stride(layout.inner_stride),
        tokens(args.length(head)),
        head_dim(args.head_dim) {}

  const T* operator[](int64_t token) const { return first + token * stride; }

  void prefetch(int64_t token, int64_t count) const {
    const int64_t end = token + count < tokens ? token + count : tokens;
    for (; token < end; ++token)
      for (int64_t byte = 0; byte < head_dim * int64_t(sizeof(T)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>((*this)[token]) + byte);
  }

  template <class Words>
  void put_columns(const Panels<Words>& panels) const {
    for (int64_t token = 0; token < tokens; ++token) {
      prefetch(token + kAhead, 1);
      panels.put_column(token, (*this)[token], head_dim);
    }
  }

  template <class Words>
  void put_steps(const Panels<Words>& panels) const {
    for (int64_t token = 0; token < tokens; token += Words::values) {
      prefetch(token + kAhead, Words::values);
      const T* next = token + 1 < tokens ? (*this)[token + 1] : nullptr;
      panels.put_step(token / Words::values, (*this)[token], next, head_dim);
    }
  }

 private:
  static constexpr int64_t kAhead = 16;
};

template <class Words, class T>
void put_row(const T* from, int64_t count, typename Words::Word* to) {
  for (int64_t i = 0; i < count; i += Words::values)
    *to++ = Words::word(to_float(from[i]), i + 1 < count ? to_float(from[i + 1]) : 0);
}

template <class T>
void finish_row(const float* from, int64_t count, float factor, T* to) {
  for (int64_t i = 0; i < count; i += Vec::size) store_part(to + i, mul(load(from + i), broadcast(factor)), count - i);
}

// Adds rows of whole panels to their sums, in order.
inline void add_rows(const float* rows, int64_t count, int64_t channels, float* sums) {
  for (int64_t i = 0; i < channels; i += Vec::size) {
    Vec total = load(sums + i);
    for (int64_t r = 0; r < count; ++r) total = add(total, load(rows + r * channels + i));
    store(sums + i, total);
  }
}

template <class T>
void zero_row(T* to, int64_t count) {
  std::fill_n(to, count, T{});
}

template <class T, class Words>
void forward(const AttentionArgs& args, int64_t begin, int64_t end, float* memory) {
  using Word = typename Words::Word;
  const int64_t head_dim = args.head_dim, channels = whole_panels(head_dim), channel_steps = steps_of<Words>(head_dim);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tokens = args.length(i);
    const int64_t columns = whole_panels(tokens);
    const int64_t token_steps = steps_of<Words>(tokens);
    Scratch scratch(memory);
    const Panels<Words> keys{scratch.take<Word>(channel_steps * columns), channel_steps};
    const Panels<Words> values{scratch.take<Word>(token_steps * channels), token_steps};
    Word* const queries = scratch.take<Word>(kTileRows * channel_steps);
    float* const scores = scratch.take<float>(kTileRows * columns);
    Word* const weights = scratch.take<Word>(kTileRows * columns / Words::values);
    float* const sums = scratch.take<float>(kTileRows * channels);
    const auto part = [&](int64_t which) { return HeadRows<T>(args.part[which], args.part_rows[which], args, i); };
    const HeadRows<T> q = part(0);
    T* const out = static_cast<T*>(args.out) + (i / args.heads * args.tokens * args.heads + i % args.heads) * head_dim;
    part(1).put_columns(keys);
    part(2).put_steps(values);
    q.prefetch(0, kTileRows);
    for (int64_t token = 0; token < tokens; token += kTileRows) {
      const int64_t count = tokens - token < kTileRows ? tokens - token : kTileRows;
      for (int64_t r = 0; r < count; ++r) put_row<Words>(q[token + r], head_dim, queries + r * channel_steps);
      q.prefetch(token + kTileRows, kTileRows);
      multiply<false, Words>({queries, channel_steps, 1}, count, keys, tokens, scores);
      float total[kTileRows];
      for (int64_t r = 0; r < count; ++r)
        total[r] = exponentials(scores + r * columns, tokens, args.scale,
                                reinterpret_cast<typename Words::Stored*>(weights + r * columns / Words::values));
      // Divided by their sum only in the end, the largest weight of a row is 1 and no rounding touches it.
      multiply<false, Words>({weights, columns / Words::values, 1}, count, values, head_dim, sums);
      for (int64_t r = 0; r < count; ++r)
        finish_row(sums + r * channels, head_dim, 1 / total[r], out + (token + r) * args.heads * head_dim);
    }
    for (int64_t token = tokens; token < args.tokens; ++token) zero_row(out + token * args.heads * head_dim, head_dim);
  }
}

template <class T, class Words>
void backward(const AttentionArgs& args, int64_t begin, int64_t end, float* memory) {
  using Word = typename Words::Word;
  const int64_t head_dim = args.head_dim, channels = whole_panels(head_dim), channel_steps = steps_of<Words>(head_dim);
  constexpr int64_t kBlockSteps = kBlockRows / Words::values;
  // Floats are words as they are; bf16 pairs are made for products over tokens, and over the queries of a block.
  constexpr bool kPairs = Words::values > 1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tokens = args.length(i);
    const int64_t columns = whole_panels(tokens);
    const int64_t token_steps = steps_of<Words>(tokens);
    Scratch scratch(memory);
    const Panels<Words> key_columns{scratch.take<Word>(channel_steps * columns), channel_steps};
    const Panels<Words> value_columns{scratch.take<Word>(channel_steps * columns), channel_steps};
    const Panels<Words> key_steps{scratch.take<Word>(token_steps * channels), token_steps};
    float* const d_keys = scratch.take<float>((tokens + kTileRows - 1) * channels);
    float* const d_values = scratch.take<float>((tokens + kTileRows - 1) * channels);
    float* const scores = scratch.take<float>(kBlockRows * columns);
    float* const d_scores = scratch.take<float>(kBlockRows * columns);
    Word* const queries = scratch.take<Word>(kBlockRows * channel_steps);
    Word* const gradients = scratch.take<Word>(kBlockRows * channel_steps);
    Word* const query_steps = scratch.take<Word>(kBlockSteps * channels);
    Word* const gradient_steps = scratch.take<Word>(kBlockSteps * channels);
    float* const d_queries = scratch.take<float>(kBlockRows * channels);
    Word* const d_rows = kPairs ? scratch.take<Word>(kBlockRows * columns / 2) : reinterpret_cast<Word*>(d_scores);
    Word* const p_steps = kPairs ? scratch.take<Word>(kBlockSteps * columns) : reinterpret_cast<Word*>(scores);
    Word* const d_steps = kPairs ? scratch.take<Word>(kBlockSteps * columns) : reinterpret_cast<Word*>(d_scores);
    const auto part = [&](int64_t which) { return HeadRows<T>(args.part[which], args.part_rows[which], args, i); };
    const HeadRows<T> q = part(0), d_out(args.d_out, args.d_out_rows, args, i);
    const auto out = [&](int64_t token, int64_t which) {
      const int64_t row = (i / args.heads * args.tokens + token) * 3 + which;
      return static_cast<T*>(args.out) + (row * args.heads + i % args.heads) * head_dim;
    };
    // The sums over tokens of the gradients in `rows`, added to those that there are.
    float* const sums = scratch.take<float>(channels);
    const auto sum_up = [&](const float* rows, int64_t count) {
      if (args.d_bias != nullptr) add_rows(rows, count, channels, sums);
    };
    const auto put_sums = [&](int64_t which) {
      if (args.d_bias == nullptr) return;
      float* const to = args.d_bias + ((i / args.heads * 3 + which) * args.heads + i % args.heads) * head_dim;
      finish_row(sums, head_dim, 1, to);
      zero_row(sums, channels);
    };
    zero_row(sums, channels);
    part(1).put_columns(key_columns);
    part(2).put_columns(value_columns);
    part(1).put_steps(key_steps);
    q.prefetch(0, kBlockRows);
    d_out.prefetch(0, kBlockRows);
    for (int64_t token = 0; token < tokens; token += kBlockRows) {
      const int64_t count = tokens - token < kBlockRows ? tokens - token : kBlockRows;
      const int64_t steps = steps_of<Words>(count);
      const auto put = [&](const HeadRows<T>& rows, Word* left, const Panels<Words>& right) {
        for (int64_t r = 0; r < count; ++r) put_row<Words>(rows[token + r], head_dim, left + r * channel_steps);
        for (int64_t r = 0; r < count; r += Words::values)
          right.put_step(r / Words::values, rows[token + r], r + 1 < count ? rows[token + r + 1] : nullptr, head_dim);
        rows.prefetch(token + kBlockRows, kBlockRows);
      };
      const Panels<Words> right_queries{query_steps, steps}, right_gradients{gradient_steps, steps};
      put(q, queries, right_queries);
      put(d_out, gradients, right_gradients);
      multiply<false, Words>({queries, channel_steps, 1}, count, key_columns, tokens, scores);
      multiply<false, Words>({gradients, channel_steps, 1}, count, value_columns, tokens, d_scores);
      for (int64_t r = 0; r < count; ++r)
        backward_row(scores + r * columns, d_scores + r * columns, tokens, args.scale);
      if constexpr (kPairs) {
        for (int64_t r = 0; r < count; ++r)
          finish_row(d_scores + r * columns, columns, 1,
                     reinterpret_cast<typename Words::Stored*>(d_rows) + r * columns);
        for (int64_t r = 0; r < count; r += 2)
          for (int64_t c = 0; c < tokens; c += Vec::size) {
            const auto pair = [&](const float* rows, Word* steps) {
              const float* first = rows + r * columns + c;
              const Vec second = r + 1 < count ? load(first + columns) : broadcast(0);
              store(reinterpret_cast<float*>(steps + r / 2 * columns + c), Words::words(load(first), second));
            };
            pair(scores, p_steps);
            pair(d_scores, d_steps);
          }
      }
      multiply<false, Words>({d_rows, columns / Words::values, 1}, count, key_steps, head_dim, d_queries);
      for (int64_t r = 0; r < count; ++r) finish_row(d_queries + r * channels, head_dim, 1, out(token + r, 0));
      sum_up(d_queries, count);
      const auto add = token == 0 ? multiply<false, Words> : multiply<true, Words>;
      add({d_steps, 1, columns}, tokens, right_queries, head_dim, d_keys);
      add({p_steps, 1, columns}, tokens, right_gradients, head_dim, d_values);
    }
    put_sums(0);
    sum_up(d_keys, tokens);
    put_sums(1);
    sum_up(d_values, tokens);
    put_sums(2);
    for (int64_t token = 0; token < tokens; ++token) {
      finish_row(d_keys + token * channels, head_dim, 1, out(token, 1));
      finish_row(d_values + token * channels, head_dim, 1, out(token, 2));
    }
    for (int64_t token = tokens; token < args.tokens; ++token)
      for (int64_t which = 0; which < 3; ++which) zero_row(out(token, which), head_dim);
  }
}

template <class Words>
constexpr AttentionKernels kernels = {{forward<float, Words>, forward<bf16, Words>, forward<fp16, Words>},
                                      {backward<float, Words>, backward<bf16, Words>, backward<fp16, Words>}};
