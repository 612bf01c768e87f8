// exp, written once over Vec. No include guard: see vec_generic.h.

// Error at most 1 ulp; exp(-inf) = 0, exp(inf) = inf, NaN stays NaN, subnormal results are rounded as others are.
inline Vec exp(const Vec& x) {
  // Beyond these bounds the result is 0 or infinite anyway; min and max let a NaN through as second argument.
  const Vec bounded = min(broadcast(89.f), max(broadcast(-104.f), x));
  // x = n * ln2 + r with |r| <= ln2 / 2: adding 1.5 * 2^23 rounds to an integer, and the leading part of ln2 has so few
  // bits that its product with n is exact.
  const Vec shift = broadcast(0x1.8p23f);
  const Vec n = sub(fma(bounded, broadcast(0x1.715476p0f), shift), shift);
  const Vec r = fma(n, broadcast(-0x1.0bfbe8p-15f), fma(n, broadcast(-0x1.62ep-1f), bounded));
  // 1 + r + r^2 P(r), P of least relative error: 3.2e-9.
  Vec p = fma(broadcast(0x1.6a1f62p-10f), r, broadcast(0x1.123ccap-7f));
  p = fma(p, r, broadcast(0x1.555904p-5f));
  p = fma(p, r, broadcast(0x1.55548ep-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(mul(r, r), p, r);
  return scale_by_power(add(p, broadcast(1)), n);
}
