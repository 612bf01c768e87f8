// tanh-GELU and SiLU, u * sigmoid(z), with their derivatives over Vec. No include guard: see vec_generic.h.
#include "vec_exp.inl"

constexpr float kGeluBeta = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float kGeluKappa = 0.044715f;

// exp(-2 z), z = beta (u + kappa u^3). Its sigmoid s = 1 / (1 + exp(-2 z)) is (1 + tanh(z)) / 2 without the cancellation
// of that for negative u, and 1 - s = exp(-2 z) s is without that of the difference.
inline Vec gelu_decay(Vec u, Vec u2) {
  return exp(mul(u, fma(u2, broadcast(-2 * kGeluBeta * kGeluKappa), broadcast(-2 * kGeluBeta))));
}

inline Vec sigmoid_of_decay(Vec decay) { return div(broadcast(1), add(broadcast(1), decay)); }

// u^2, bounded where GELU is u or 0 to all digits: an infinite slope times the 0 that 1 - s is there would be a NaN.
inline Vec gelu_square(Vec u) { return min(broadcast(1e30f), mul(u, u)); }

inline Vec gelu(Vec u) { return mul(u, sigmoid_of_decay(gelu_decay(u, gelu_square(u)))); }

struct Activated {
  Vec value, slope;
};

// 1 - s, where that is not 1.
inline Vec rest_of_sigmoid(Vec decay, Vec s) { return mul(min(broadcast(1e38f), decay), s); }

inline Activated gelu_and_slope(Vec u) {
  const Vec u2 = gelu_square(u), decay = gelu_decay(u, u2), s = sigmoid_of_decay(decay), value = mul(u, s);
  const Vec slope = fma(u2, broadcast(6 * kGeluBeta * kGeluKappa), broadcast(2 * kGeluBeta));  // of 2 z
  return {value, fma(mul(value, rest_of_sigmoid(decay, s)), slope, s)};
}

inline Vec silu_decay(Vec u) { return exp(sub(broadcast(0), u)); }

inline Vec silu(Vec u) { return div(u, add(broadcast(1), silu_decay(u))); }

inline Activated silu_and_slope(Vec u) {
  const Vec decay = silu_decay(u), s = sigmoid_of_decay(decay), value = mul(u, s);
  return {value, fma(value, rest_of_sigmoid(decay, s), s)};
}
