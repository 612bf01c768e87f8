// The loops, written once over Vec and compiled once per instruction set inside the namespace of the includer.
#include "../common/cpu/row_cosine.inl"
#include "../common/cpu/vec_put.inl"

template <class S, class T>
void forward_rows(const CosineForwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    RowCosine r{0, 0, 0};
    if (args.weight == nullptr || args.weight[row] != 0) {  // a masked row may hold anything and is not read
      const S* s = static_cast<const S*>(args.student) + args.student_rows.offset(row);
      const T* t = static_cast<const T*>(args.teacher) + args.teacher_rows.offset(row);
      r = row_cosine(s, t, args.width, args.eps);
    }
    args.out.cosine[row] = r.cosine;
    args.out.rnorm_student[row] = r.rnorm_student;
    args.out.rnorm_teacher[row] = r.rnorm_teacher;
  }
}

// factor * (b * rnorm_b - cosine * a * rnorm_a) * rnorm_a, the gradient of factor * cos(a, b) with respect to a.
// The order of the products keeps rows near 1e30 in range, where rnorm_a * rnorm_b would vanish.
struct RowGradient {
  float toward, away, factor;
};

inline RowGradient row_gradient(float factor, float cosine, float rnorm, float rnorm_other) {
  return {rnorm_other, cosine * rnorm, factor * rnorm};
}

template <bool streaming, bool student, bool teacher, class S, class T>
void backward_row(const S* s, const T* t, int64_t width, RowGradient gs, RowGradient gt, S* ds, T* dt) {
  const Vec s_toward = broadcast(gs.toward), s_away = broadcast(gs.away), s_factor = broadcast(gs.factor);
  const Vec t_toward = broadcast(gt.toward), t_away = broadcast(gt.away), t_factor = broadcast(gt.factor);
  int64_t i = 0;
  for (; i + Vec::size <= width; i += Vec::size) {
    const Vec a = load(s + i), b = load(t + i);
    if constexpr (student) put<streaming>(ds + i, mul(fms(b, s_toward, mul(a, s_away)), s_factor));
    if constexpr (teacher) put<streaming>(dt + i, mul(fms(a, t_toward, mul(b, t_away)), t_factor));
  }
  for (; i < width; ++i) {
    const float a = to_float(s[i]), b = to_float(t[i]);
    if constexpr (student) from_float((b * gs.toward - a * gs.away) * gs.factor, ds + i);
    if constexpr (teacher) from_float((a * gt.toward - b * gt.away) * gt.factor, dt + i);
  }
}

template <bool streaming, bool student, bool teacher, class S, class T>
void backward_range(const CosineBackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const S* s = static_cast<const S*>(args.student) + args.student_rows.offset(row);
    const T* t = static_cast<const T*>(args.teacher) + args.teacher_rows.offset(row);
    S* ds = student ? static_cast<S*>(args.grad_student) + row * args.width : nullptr;
    T* dt = teacher ? static_cast<T*>(args.grad_teacher) + row * args.width : nullptr;
    const float weight = args.weight == nullptr ? 1.f : args.weight[row];
    const float cosine = args.stats.cosine[row];
    const float rs = args.stats.rnorm_student[row], rt = args.stats.rnorm_teacher[row];
    if (rs == 0 && rt == 0) {  // masked, or a row of zeros: its gradient is 0 whatever it holds
      if constexpr (student) std::memset(static_cast<void*>(ds), 0, sizeof(S) * size_t(args.width));
      if constexpr (teacher) std::memset(static_cast<void*>(dt), 0, sizeof(T) * size_t(args.width));
      continue;
    }
    const float factor = -args.grad[row * args.grad_stride] * weight * args.scale;
    backward_row<streaming, student, teacher>(s, t, args.width, row_gradient(factor, cosine, rs, rt),
                                              row_gradient(factor, cosine, rt, rs), ds, dt);
  }
  if constexpr (streaming) stream_fence();
}

template <class S, class T>
void backward_rows(const CosineBackwardArgs& args, int64_t begin, int64_t end) {
  const bool student = args.grad_student != nullptr, teacher = args.grad_teacher != nullptr;
  if (student && teacher) {
    (args.streaming ? backward_range<true, true, true, S, T> : backward_range<false, true, true, S, T>)(args, begin,
                                                                                                        end);
  } else if (student) {
    (args.streaming ? backward_range<true, true, false, S, T> : backward_range<false, true, false, S, T>)(args, begin,
                                                                                                          end);
  } else {
    (args.streaming ? backward_range<true, false, true, S, T> : backward_range<false, false, true, S, T>)(args, begin,
                                                                                                          end);
  }
}

template <class S>
void add_to(float* sums, const S* s, int64_t width) {
  int64_t i = 0;
  for (; i + Vec::size <= width; i += Vec::size) store(sums + i, add(load(sums + i), load(s + i)));
  for (; i < width; ++i) sums[i] += to_float(s[i]);
}

template <class S, class T>
void in_place_parts(const CosineInPlaceArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  for (int64_t part = begin; part < end; ++part) {
    float* sums = args.sums == nullptr ? nullptr : args.sums + part * width;
    if (sums != nullptr) std::memset(sums, 0, sizeof(float) * size_t(width));
    const int64_t first = part * args.rows_per_part, last = first + args.rows_per_part;
    for (int64_t row = first; row < (last < args.rows ? last : args.rows); ++row) {
      S* s = static_cast<S*>(args.student) + row * width;
      const T* t = static_cast<const T*>(args.teacher) + args.teacher_rows.offset(row);
      const float weight = args.weight == nullptr ? 1.f : args.weight[row];
      const RowCosine r = weight == 0 ? RowCosine{0, 0, 0} : row_cosine(s, t, width, args.eps);
      args.cosine[row] = r.cosine;
      if (r.rnorm_student == 0 && r.rnorm_teacher == 0) {
        std::memset(static_cast<void*>(s), 0, sizeof(S) * size_t(width));
        continue;
      }
      const float factor = -args.grad[row * args.grad_stride] * weight * args.scale;
      backward_row<false, true, false>(s, t, width, row_gradient(factor, r.cosine, r.rnorm_student, r.rnorm_teacher),
                                       RowGradient{}, s, static_cast<T*>(nullptr));
      if (sums != nullptr) add_to(sums, s, width);
    }
  }
}

constexpr CosineKernels kernels = {
    {{forward_rows<float, float>, forward_rows<float, bf16>, forward_rows<float, fp16>},
     {forward_rows<bf16, float>, forward_rows<bf16, bf16>, forward_rows<bf16, fp16>},
     {forward_rows<fp16, float>, forward_rows<fp16, bf16>, forward_rows<fp16, fp16>}},
    {{backward_rows<float, float>, backward_rows<float, bf16>, backward_rows<float, fp16>},
     {backward_rows<bf16, float>, backward_rows<bf16, bf16>, backward_rows<bf16, fp16>},
     {backward_rows<fp16, float>, backward_rows<fp16, bf16>, backward_rows<fp16, fp16>}},
    {{in_place_parts<float, float>, in_place_parts<float, bf16>, in_place_parts<float, fp16>},
     {in_place_parts<bf16, float>, in_place_parts<bf16, bf16>, in_place_parts<bf16, fp16>},
     {in_place_parts<fp16, float>, in_place_parts<fp16, bf16>, in_place_parts<fp16, fp16>}}};
