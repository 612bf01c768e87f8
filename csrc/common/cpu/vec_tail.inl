// The last vector of a row, of which only some lanes are there. No include guard: see vec_generic.h.

// A vector whose first `count` lanes come from memory; the others are 0.
template <class T>
inline Vec load_first(const T* p, int64_t count) {
  T lanes[Vec::size] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
inline void store_first(T* p, Vec v, int64_t count) {
  T lanes[Vec::size];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
