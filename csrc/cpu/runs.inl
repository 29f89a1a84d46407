inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- conversions ----

inline float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return as_float(uint32_t(x.x) << 16); }
inline float widen(Half x) { return float(x); }

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(double x, float& out) { out = float(x); }
inline void narrow(float x, BFloat16& out) {  // to nearest, ties to even; a NaN stays one
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.x = uint16_t(x != x ? 0x7fc0 : rounded);
}
inline void narrow(double x, BFloat16& out) { narrow(float(x), out); }
inline void narrow(float x, Half& out) { out = Half(x); }
inline void narrow(double x, Half& out) { narrow(float(x), out); }

template <class T, class Acc>
inline void widen_run(const T* from, int64_t stride, int64_t count, Acc* to) {
  int64_t j = 0;
#if defined(__F16C__) && defined(__AVX__)
  if constexpr (std::is_same_v<T, Half> && std::is_same_v<Acc, float>)
    if (stride == 1)
      for (; j + 8 <= count; j += 8)
        _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
#endif
  if (stride == 1)
    for (; j < count; ++j) to[j] = Acc(widen(from[j]));
  else
    for (; j < count; ++j) to[j] = Acc(widen(from[j * stride]));
}

template <class T, class Acc>
inline void narrow_run(const Acc* from, T* to, int64_t stride, int64_t count) {
  int64_t j = 0;
#if defined(__F16C__) && defined(__AVX__)
  if constexpr (std::is_same_v<T, Half> && std::is_same_v<Acc, float>)
    if (stride == 1)
      for (; j + 8 <= count; j += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), 0));
#endif
  if (stride == 1)
    for (; j < count; ++j) narrow(from[j], to[j]);
  else
    for (; j < count; ++j) narrow(from[j], to[j * stride]);
}

// Calls f with a null pointer of the feature's element type.
template <class F>
inline void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float16: return f(static_cast<Half*>(nullptr));
    case DType::bfloat16: return f(static_cast<BFloat16*>(nullptr));
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::float64: return f(static_cast<double*>(nullptr));
  }
}

template <class Acc>
constexpr DType kDType = std::is_same_v<Acc, float> ? DType::float32 : DType::float64;

template <class Acc>
inline void copy_in(const Feature& f, int64_t offset, int64_t stride, int64_t count, Acc* to) {
  with_type(f.dtype, [&](auto* type) { widen_run(static_cast<decltype(type)>(f.data) + offset, stride, count, to); });
}

template <class Acc>
inline void copy_out(const Acc* from, const Feature& f, int64_t offset, int64_t stride, int64_t count) {
  with_type(f.dtype,
            [&](auto* type) { narrow_run(from, static_cast<decltype(type)>(f.data) + offset, stride, count); });
}

// ---- runs ----

// The place of a run of count elements in memory. It has several pieces only if it is of cells and rows have gaps.
struct Run {
  int64_t offset, stride, count;
  bool one_piece = true;
  int64_t row = 0, column = 0, width = 0, row_stride = 0;  // of the first cell, if there are several pieces

  // f(offset of the piece, index of its first element, its length)
  template <class F>
  void each_piece(const F& f) const {
    if (one_piece) return f(offset, int64_t(0), count);
    for (int64_t done = 0, y = row, x = column; done < count; ++y, x = 0) {
      const int64_t piece = smaller(count - done, width - x);
      f(offset + y * row_stride + x * stride, done, piece);
      done += piece;
    }
  }
};

// Whether the run can be read and written in place.
template <class Acc>
inline bool in_place(const Feature& f, const Run& run) {
  return f.dtype == kDType<Acc> && run.stride == 1 && run.one_piece;
}

template <class Acc>
inline Run cells_run(const Level<Acc>& level, const Feature& f, int64_t image, int64_t channel, int64_t cell,
                     int64_t count) {
  const int64_t base = image * f.image_stride + channel * f.channel_stride;
  if (f.row_stride == level.width * f.column_stride || level.height == 1)
    return {base + cell * f.column_stride, f.column_stride, count};
  return {base, f.column_stride, count, false, cell / level.width, cell % level.width, level.width, f.row_stride};
}

template <class Acc>
inline Run channels_run(const Level<Acc>& level, const Feature& f, int64_t image, int64_t cell, int64_t channel,
                        int64_t count) {
  const int64_t y = cell / level.width, x = cell % level.width;
  const int64_t offset = image * f.image_stride + y * f.row_stride + x * f.column_stride + channel * f.channel_stride;
  return {offset, f.channel_stride, count};
}

// Returns the elements of a run, in place or converted into the buffer.
template <class E, class Acc>
inline const E* load(const Feature& f, const Run& run, E* buffer) {
  if (!std::is_same_v<E, Acc> || in_place<Acc>(f, run)) return static_cast<const E*>(f.data) + run.offset;
  if constexpr (std::is_same_v<E, Acc>)
    run.each_piece(
        [&](int64_t offset, int64_t first, int64_t count) { copy_in(f, offset, run.stride, count, buffer + first); });
  return buffer;
}

// Returns where to compute a run that store() then writes: in place or in the buffer.
template <class E, class Acc>
inline E* target(const Feature& f, const Run& run, E* buffer) {
  return !std::is_same_v<E, Acc> || in_place<Acc>(f, run) ? static_cast<E*>(f.data) + run.offset : buffer;
}

template <class E, class Acc>
inline void store(const E* buffer, const Feature& f, const Run& run) {
  if constexpr (std::is_same_v<E, Acc>)
    if (!in_place<Acc>(f, run))
      run.each_piece([&](int64_t offset, int64_t first, int64_t count) {
        copy_out(buffer + first, f, offset, run.stride, count);
      });
}

// Whether a sweep can read and write BFloat16 in place, its element type E: all features are BFloat16 without gaps.
// Otherwise E is Acc, to which runs of another type or with gaps are converted first.
template <class Acc>
inline bool all_bfloat16(const Level<Acc>& level) {
  for (const Feature* f : {&level.student, &level.teacher, &level.grad}) {
    if (!f->data) continue;
    const bool dense = f->column_stride == 1 && (f->row_stride == level.width || level.height == 1);
    if (f->dtype != DType::bfloat16 || !(channels_last(level) ? f->channel_stride == 1 : dense)) return false;
  }
  return std::is_same_v<Acc, float>;
}
