// The loops, written once over Vec and compiled once per instruction set inside the namespace of the includer.
#include "../common/cpu/vec_put.inl"
#include "../common/cpu/vec_tail.inl"

struct AllLanes {};

template <class T>
inline Vec load_first(const T* p, AllLanes) {
  return load(p);
}

// Calls body(i, lanes) for every vector of a row: AllLanes, or how many there are in the last.
template <class Body>
inline void for_each_vector(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + Vec::size <= width; i += Vec::size) body(i, AllLanes{});
  if (i < width) body(i, width - i);
}

// The tokens of a sample in a block of its channels. Every value is taken less that of the first token: equal tokens
// have deviations of 0, and sums keep their digits far from 0.
template <class T>
struct Block {
  const T* x;
  int64_t stride, tokens, width;
  alignas(64) float first[kMostChannels], mean[kMostChannels], scale[kMostChannels];
};

template <int kRows, class T, class Term>
inline void add_tokens(const Block<T>& block, int64_t token, float* total, Term term) {
  const int64_t stride = block.stride;
  const T* x = block.x + token * stride;
  for_each_vector(block.width, [&](int64_t i, auto lanes) {
    const Vec first = load(block.first + i);
    Vec sum = term(i, sub(load_first(x + i, lanes), first));
    for (int row = 1; row < kRows; ++row) sum = add(sum, term(i, sub(load_first(x + row * stride + i, lanes), first)));
    store(total + i, add(load(total + i), sum));
  });
}

// Sums of term(i, value) over the tokens. Four rows at a time: a quarter of the accesses to `total`, and of its rounding.
template <class T, class Term>
inline void sum_tokens(const Block<T>& block, float* total, Term term) {
  for_each_vector(block.width, [&](int64_t i, auto) { store(total + i, broadcast(0)); });
  int64_t token = 0;
  for (; token + 4 <= block.tokens; token += 4) add_tokens<4>(block, token, total, term);
  for (; token < block.tokens; ++token) add_tokens<1>(block, token, total, term);
}

// Where squares leave the range of fp32, which is rare.
template <class T>
double wide_sum_of_squares(const Block<T>& block, int64_t channel) {
  double sum = 0;
  for (int64_t token = 0; token < block.tokens; ++token) {
    const double value = to_float(block.x[token * block.stride + channel]);
    const double deviation = value - block.first[channel] - block.mean[channel];
    sum += deviation * deviation;
  }
  return sum;
}

template <class T, bool streaming>
void normalise(const SpatialNormArgs& args, int64_t first_task, int64_t last_task) {
  Block<T> block;
  block.stride = args.layout.offset(1) - args.layout.offset(0);
  block.tokens = args.tokens;
  const float tokens = float(args.tokens);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t row = task / args.blocks * args.tokens, channel = task % args.blocks * args.channels;
    block.x = static_cast<const T*>(args.x) + args.layout.offset(row) + channel;
    block.width = args.width - channel < args.channels ? args.width - channel : args.channels;
    // The first pass brings the block into the cache, where the others find it.
    for_each_vector(block.width,
                    [&](int64_t i, auto lanes) { store(block.first + i, load_first(block.x + i, lanes)); });
    sum_tokens(block, block.mean, [](int64_t, Vec value) { return value; });
    for (int64_t i = 0; i < block.width; ++i) block.mean[i] /= tokens;
    sum_tokens(block, block.scale, [&](int64_t i, Vec value) {
      const Vec deviation = sub(value, load(block.mean + i));
      return mul(deviation, deviation);
    });
    for (int64_t i = 0; i < block.width; ++i) {
      const float squares = block.scale[i];
      const float std = squares < 1e37f ? std::sqrt(squares / (tokens - 1))
                                        : float(std::sqrt(wide_sum_of_squares(block, i) / (tokens - 1)));
      block.scale[i] = 1 / (std + args.eps);
      block.mean[i] -= args.kept_mean * (block.first[i] + block.mean[i]);
    }
    T* y = static_cast<T*>(args.y) + row * args.width + channel;
    const T* x = block.x;
    for (int64_t token = 0; token < args.tokens; ++token, x += block.stride, y += args.width)
      for_each_vector(block.width, [&](int64_t i, auto lanes) {
        const Vec value = sub(sub(load_first(x + i, lanes), load(block.first + i)), load(block.mean + i));
        const Vec normed = mul(value, load(block.scale + i));
        if constexpr (std::is_same_v<decltype(lanes), AllLanes>) {
          put<streaming>(y + i, normed);
        } else {
          store_first(y + i, normed, lanes);
        }
      });
  }
  if constexpr (streaming) stream_fence();
}

template <class T>
void normalise_tasks(const SpatialNormArgs& args, int64_t first_task, int64_t last_task) {
  (args.streaming ? normalise<T, true> : normalise<T, false>)(args, first_task, last_task);
}

constexpr SpatialNormKernels kernels = {{normalise_tasks<float>, normalise_tasks<bf16>, normalise_tasks<fp16>}};
