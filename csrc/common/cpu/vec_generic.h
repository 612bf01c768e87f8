// Portable vector of eight floats: plain loops, which the compiler turns into whatever the baseline machine has.
// No include guard: one copy per translation unit and instruction set, in the namespace of the includer.

struct Vec {
  static constexpr int64_t size = 8;
  static constexpr int registers = 8;  // as many of these as the machine has room for
  float lane[8];
};

inline Vec broadcast(float value) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = value;
  return r;
}

template <class T>
inline Vec load(const T* p) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = to_float(p[i]);
  return r;
}

template <class T>
inline void store(T* p, const Vec& v) {
  for (int i = 0; i < 8; ++i) from_float(v.lane[i], p + i);
}

template <class T>
inline void stream(T* p, const Vec& v) {
  store(p, v);
}

inline void stream_fence() {}

inline Vec add(const Vec& a, const Vec& b) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = a.lane[i] + b.lane[i];
  return r;
}

inline Vec sub(const Vec& a, const Vec& b) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = a.lane[i] - b.lane[i];
  return r;
}

inline Vec mul(const Vec& a, const Vec& b) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = a.lane[i] * b.lane[i];
  return r;
}

inline Vec div(const Vec& a, const Vec& b) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = a.lane[i] / b.lane[i];
  return r;
}

inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
  return r;
}

inline Vec fms(const Vec& a, const Vec& b, const Vec& c) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = a.lane[i] * b.lane[i] - c.lane[i];
  return r;
}

// min and max give b where either is NaN.
inline Vec min(const Vec& a, const Vec& b) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return r;
}

inline Vec max(const Vec& a, const Vec& b) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return r;
}

// `value` where x > 0 or NaN, else 0.
inline Vec where_positive(const Vec& x, const Vec& value) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = x.lane[i] <= 0 ? 0.f : value.lane[i];
  return r;
}

// A magnitude that is not negative, with the sign of another value.
inline Vec with_sign(const Vec& magnitude, const Vec& sign) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = std::copysign(magnitude.lane[i], sign.lane[i]);
  return r;
}

// v * 2^n for integral n from -252 to 254: in two factors, as one would leave the range of normal numbers.
inline Vec scale_by_power(const Vec& v, const Vec& n) {
  Vec r;
  for (int i = 0; i < 8; ++i) {
    // A NaN has no power, and converting it to an integer no defined result.
    const int32_t power = n.lane[i] == n.lane[i] ? int32_t(n.lane[i]) : 0, half = power >> 1;
    const float first = bits_to_float(uint32_t(half + 127) << 23);
    r.lane[i] = v.lane[i] * first * bits_to_float(uint32_t(power - half + 127) << 23);
  }
  return r;
}

inline float max(const Vec& v) {
  float r = v.lane[0];
  for (int i = 1; i < 8; ++i) r = v.lane[i] > r ? v.lane[i] : r;
  return r;
}

inline float sum(const Vec& v) {
  return ((v.lane[0] + v.lane[4]) + (v.lane[2] + v.lane[6])) + ((v.lane[1] + v.lane[5]) + (v.lane[3] + v.lane[7]));
}

struct VecPair {
  Vec first, second;
};

// The even and the odd ones of the values of two vectors.
inline VecPair deinterleave(const Vec& a, const Vec& b) {
  VecPair r;
  for (int i = 0; i < 4; ++i) {
    r.first.lane[i] = a.lane[2 * i], r.first.lane[i + 4] = b.lane[2 * i];
    r.second.lane[i] = a.lane[2 * i + 1], r.second.lane[i + 4] = b.lane[2 * i + 1];
  }
  return r;
}

// Two vectors of values that alternate between those of even and odd.
inline VecPair interleave(const Vec& even, const Vec& odd) {
  VecPair r;
  for (int i = 0; i < 4; ++i) {
    r.first.lane[2 * i] = even.lane[i], r.second.lane[2 * i] = even.lane[i + 4];
    r.first.lane[2 * i + 1] = odd.lane[i], r.second.lane[2 * i + 1] = odd.lane[i + 4];
  }
  return r;
}
