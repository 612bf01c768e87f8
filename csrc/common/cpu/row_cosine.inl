// The cosine of two rows over Vec, right at any magnitude. No include guard: see vec_generic.h.

struct Dots {
  float ss, tt, st;
};

template <class S, class T>
Dots dots(const S* s, const T* t, int64_t width) {
  // Two chains per sum: enough to hide the latency of fma behind the loads.
  Vec ss0 = broadcast(0), ss1 = broadcast(0), tt0 = broadcast(0), tt1 = broadcast(0), st0 = broadcast(0),
      st1 = broadcast(0);
  int64_t i = 0;
  for (; i + 2 * Vec::size <= width; i += 2 * Vec::size) {
    const Vec s0 = load(s + i), s1 = load(s + i + Vec::size);
    const Vec t0 = load(t + i), t1 = load(t + i + Vec::size);
    ss0 = fma(s0, s0, ss0);
    ss1 = fma(s1, s1, ss1);
    tt0 = fma(t0, t0, tt0);
    tt1 = fma(t1, t1, tt1);
    st0 = fma(s0, t0, st0);
    st1 = fma(s1, t1, st1);
  }
  const Vec one = broadcast(1);
  Dots r{sum(fma(ss0, one, ss1)), sum(fma(tt0, one, tt1)), sum(fma(st0, one, st1))};
  for (; i < width; ++i) {
    const float a = to_float(s[i]), b = to_float(t[i]);
    r.ss += a * a;
    r.tt += b * b;
    r.st += a * b;
  }
  return r;
}

// Squares of a fp32 or bf16 row overflow from 1e19 on and vanish below 1e-19. Such rows are rare and in the cache by
// now: they are read again, scaled by their largest element.
inline bool representable(float sum_of_squares) { return sum_of_squares > 1e-30f && sum_of_squares < 1e37f; }

template <class T>
float largest(const T* x, int64_t width) {
  float result = 0;
  for (int64_t i = 0; i < width; ++i) {
    const float a = std::fabs(to_float(x[i]));
    if (!(a <= result)) result = a;  // takes a NaN
    if (result != result) break;
  }
  return result;
}

inline double nonzero(float value) { return value == 0 ? 1 : value; }

struct RowCosine {
  float cosine, rnorm_student, rnorm_teacher;
};

template <class S, class T>
RowCosine scaled_row_cosine(const S* s, const T* t, int64_t width, float eps) {
  const double scale_s = nonzero(largest(s, width)), scale_t = nonzero(largest(t, width));
  double ss = 0, tt = 0, st = 0;
  for (int64_t i = 0; i < width; ++i) {
    const double a = to_float(s[i]) / scale_s, b = to_float(t[i]) / scale_t;
    ss += a * a;
    tt += b * b;
    st += a * b;
  }
  const double norm_s = std::sqrt(ss) * scale_s, norm_t = std::sqrt(tt) * scale_t;
  if (norm_s < eps || norm_t < eps) {
    const float cosine = float((norm_s - norm_s) + (norm_t - norm_t));  // 0, or the NaN of the other row
    return {cosine, cosine, cosine};
  }
  return {float(st / std::sqrt(ss * tt)), float(1 / norm_s), float(1 / norm_t)};
}

// The cosine of two rows, both norms from the same pass.
template <class S, class T>
RowCosine row_cosine(const S* s, const T* t, int64_t width, float eps) {
  const Dots d = dots(s, t, width);
  if (!representable(d.ss) || !representable(d.tt)) return scaled_row_cosine(s, t, width, eps);
  const float norm_s = std::sqrt(d.ss), norm_t = std::sqrt(d.tt);
  if (norm_s < eps || norm_t < eps) return {0, 0, 0};
  return {d.st / norm_s / norm_t, 1 / norm_s, 1 / norm_t};
}
