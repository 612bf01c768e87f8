// A store that bypasses the cache, or a plain one. No include guard: see vec_generic.h.

template <bool streaming, class V, class T>
inline void put(T* p, const V& v) {
  if constexpr (streaming) {
    stream(p, v);
  } else {
    store(p, v);
  }
}
