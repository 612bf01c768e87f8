// Portable vector of eight floats: plain loops, which the compiler turns into whatever the baseline machine has.
// No include guard: one copy per translation unit and instruction set, in the namespace of the includer.

struct Vec {
  static constexpr int64_t size = 8;
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

inline Vec mul(const Vec& a, const Vec& b) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = a.lane[i] * b.lane[i];
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

inline float sum(const Vec& v) {
  return ((v.lane[0] + v.lane[4]) + (v.lane[2] + v.lane[6])) + ((v.lane[1] + v.lane[5]) + (v.lane[3] + v.lane[7]));
}
