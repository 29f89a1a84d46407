// Bodies of the CPU kernels, compiled for the instruction set FASTKD_ISA. No header may be included from here: what it
// defines inline would be compiled for this instruction set, and the linker could pick it for older processors.
//
// A run is a row of elements that lie next to each other: the cells of one channel (NCHW) or the channels of one cell
// (channels_last). Runs are converted to Acc where dtype or stride ask for it, else read in place.

namespace fastkd::cpu {
namespace FASTKD_ISA_NAMESPACE {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

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

constexpr int64_t kLine = 64;  // bytes that memory is moved in

// Copies past the caches: a line that is written whole need not be read first, nor push out what is still needed.
// Calls meanwhile(first byte) for each line, to have something read while these are written.
template <class T, class F>
inline void stream_run(const T* from, T* to, int64_t count, const F& meanwhile) {
  int64_t j = 0;
#if defined(__x86_64__)
  // parts of a line, which the next run completes: 4 or 8 bytes at a time, as an ordinary store would read the line
  const auto stream_until = [&](int64_t end, uintptr_t alignment) {
    while (j < end && (alignment == 0 || reinterpret_cast<uintptr_t>(to + j) % alignment)) {
      const uintptr_t at = reinterpret_cast<uintptr_t>(to + j);
      if (const int64_t n = int64_t(8 / sizeof(T)); at % 8 == 0 && j + n <= end) {
        long long word;
        __builtin_memcpy(&word, from + j, 8);
        _mm_stream_si64(reinterpret_cast<long long*>(to + j), word);
        j += n;
      } else if (const int64_t n = int64_t(4 / sizeof(T)); sizeof(T) <= 4 && at % 4 == 0 && j + n <= end) {
        int word;
        __builtin_memcpy(&word, from + j, 4);
        _mm_stream_si32(reinterpret_cast<int*>(to + j), word);
        j += n;
      } else {
        to[j] = from[j];
        ++j;
      }
    }
  };
#if defined(__AVX512F__)
  using Vector = __m512i;
  const auto stream = [](T* p, const T* x) {
    _mm512_stream_si512(reinterpret_cast<Vector*>(p), _mm512_loadu_si512(x));
  };
#elif defined(__AVX__)
  using Vector = __m256i;
  const auto stream = [](T* p, const T* x) {
    _mm256_stream_si256(reinterpret_cast<Vector*>(p), _mm256_loadu_si256(reinterpret_cast<const Vector*>(x)));
  };
#else
  using Vector = __m128i;
  const auto stream = [](T* p, const T* x) {
    _mm_stream_si128(reinterpret_cast<Vector*>(p), _mm_loadu_si128(reinterpret_cast<const Vector*>(x)));
  };
#endif
  constexpr int64_t lanes = int64_t(sizeof(Vector) / sizeof(T)), line = int64_t(kLine / sizeof(T));
  stream_until(count, kLine);
  for (; j + line <= count; j += line) {
    for (int64_t k = 0; k < line; k += lanes) stream(to + j + k, from + j + k);
    meanwhile(j * int64_t(sizeof(T)));
  }
  stream_until(count, 0);
#endif
  for (; j < count; ++j) to[j] = from[j];
}

// Streamed stores must be seen before whatever tells other threads that the work is done.
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
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

// Where a run lies: count elements, in pieces (more than one only for cells of a feature whose rows have gaps).
struct Run {
  int64_t offset, stride, count;
  bool one_piece = true;
  int64_t row = 0, column = 0, width = 0, row_stride = 0;  // of the first cell, where there are several pieces

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

// Whether the run can be read and written where it lies.
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

// Reads a run: as elements E that lie where it is, or converted to E, the type of arithmetic.
template <class E, class Acc>
inline const E* load(const Feature& f, const Run& run, E* buffer) {
  if (!std::is_same_v<E, Acc> || in_place<Acc>(f, run)) return static_cast<const E*>(f.data) + run.offset;
  if constexpr (std::is_same_v<E, Acc>)
    run.each_piece(
        [&](int64_t offset, int64_t first, int64_t count) { copy_in(f, offset, run.stride, count, buffer + first); });
  return buffer;
}

// Where to compute a run that store() then puts in its place.
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

inline int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Fetches what a sweep reads next while it writes: a thread can wait for few lines at a time, and finds them there.
struct Ahead {
  uintptr_t student = 0, teacher = 0;

  Ahead() = default;
  // From the element of this offset in the gradient on, in features that lie as the gradient does.
  template <class Acc>
  Ahead(const Level<Acc>& level, int64_t offset) {
    const auto place = [&](const Feature& f) {
      const bool same = f.dtype == level.grad.dtype && f.image_stride == level.grad.image_stride &&
                        f.channel_stride == level.grad.channel_stride && f.row_stride == level.grad.row_stride &&
                        f.column_stride == level.grad.column_stride;
      return same ? reinterpret_cast<uintptr_t>(f.data) + uintptr_t(offset * element_size(f.dtype)) : 0;
    };
    student = place(level.student);
    teacher = place(level.teacher);
  }
  void operator()(int64_t bytes) const {
    if (student) __builtin_prefetch(reinterpret_cast<const char*>(student + uintptr_t(bytes)), 0, 2);
    if (teacher) __builtin_prefetch(reinterpret_cast<const char*>(teacher + uintptr_t(bytes)), 0, 2);
  }
};

// Puts `count` elements that are neighbours in memory in their place past the caches.
template <class E>
inline void stream(const E* buffer, const Feature& f, int64_t offset, int64_t count, const Ahead& ahead) {
  with_type(f.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* const to = static_cast<T*>(f.data) + offset;
    if constexpr (std::is_same_v<T, E>) {
      stream_run(buffer, to, count, ahead);
    } else if constexpr (!std::is_same_v<E, BFloat16>) {
      alignas(kLine) T narrowed[kRun];
      for (int64_t j = 0; j < count; j += kRun) {
        narrow_run(buffer + j, narrowed, 1, smaller(kRun, count - j));
        stream_run(narrowed, to + j, smaller(kRun, count - j),
                   [&](int64_t bytes) { ahead(j * int64_t(sizeof(T)) + bytes); });
      }
    }
  });
}

// ---- arithmetic ----

// exp of x <= 0, to about 1 ulp, by 2^n * exp(r), abs(r) <= log(2) / 2; below float32's normal range it is 0.
inline float exponential(float x) {
  constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, magic = 12582912.f;
  const float n = (x * log2e + magic) - magic;
  const float r = (x - n * ln2_high) - n * ln2_low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.f;
  const float power = as_float(uint32_t(int32_t(x < -87.f ? 0.f : n) + 127) << 23);
  return x < -87.f ? 0.f : p * power;
}
inline double exponential(double x) { return std::exp(x); }

// The mean and rstd of each channel; identity where the level has none.
template <class Acc>
struct Moments {
  const Acc *mean, *rstd;
  explicit Moments(const Level<Acc>& level) : mean(level.mean), rstd(level.rstd) {}
  Acc mean_of(int64_t c) const { return mean ? mean[c] : Acc(0); }
  Acc rstd_of(int64_t c) const { return mean ? rstd[c] : Acc(1); }

  // Calls f with what standardises an element of channel c + j.
  template <class F>
  FASTKD_INLINE void from(int64_t c, const F& f) const {
    if (!mean) return f([](int64_t, Acc x) { return x; });
    const Acc *m = mean + c, *r = rstd + c;
    f([m, r](int64_t j, Acc x) { return (x - m[j]) * r[j]; });
  }
};

// e of a cell from its summed score terms
template <Score S>
inline double finish_score(double sum, int64_t channels) {
  return S == Score::uniform ? 1 : sum / double(channels);
}

// 1 - H / log C from sum exp(x) and sum x exp(x)
inline double finish_entropy(double sum, double weighted, int64_t channels) {
  const double log_channels = std::log(double(channels));
  const double entropy = std::log(sum) - weighted / sum;
  return 1 - entropy / (log_channels > kTiny ? log_channels : kTiny);
}

template <class T>
inline T logit(T x, T highest, T temperature) {
  const T u = (x - highest) / temperature;
  return u < T(kLowestLogit) ? T(kLowestLogit) : u;
}

// ---- sweeps over student and teacher ----

// What a sweep computes of each cell: its score e, its penalty D, the student's gradient. The score needs no student.
// Whether the gradient goes past the caches is a part too.
enum Parts { kScore = 1, kDistance = 2, kGradient = 4, kStreams = 8 };

// In a sweep, E is the type of the elements that it reads and writes where they lie: Acc, to which runs of any other
// type or with gaps are converted first, or BFloat16, if all features are that and have no gaps.
template <class Acc>
inline bool all_bfloat16(const Level<Acc>& level) {
  for (const Feature* f : {&level.student, &level.teacher, &level.grad}) {
    if (!f->data) continue;
    const bool dense = f->column_stride == 1 && (f->row_stride == level.width || level.height == 1);
    if (f->dtype != DType::bfloat16 || !(channels_last(level) ? f->channel_stride == 1 : dense)) return false;
  }
  return std::is_same_v<Acc, float>;
}

// ---- a run = cells of one channel ----

constexpr int kGroup = 4;    // channels combined in registers before the sums in cache are touched
constexpr int kPartial = 8;  // groups summed in Acc, before double takes over: near-cancelling scores stay accurate

// An image of a feature, where its cells can be read and written where they lie.
template <class E, class Acc>
struct Plane {
  E* data = nullptr;
  int64_t channel_stride = 0;

  Plane(const Level<Acc>& level, const Feature& f, int64_t image) : channel_stride(f.channel_stride) {
    const Run first = cells_run(level, f, image, 0, 0, 1);
    if (f.data && (!std::is_same_v<E, Acc> || in_place<Acc>(f, first))) data = static_cast<E*>(f.data) + first.offset;
  }
  E* at(int64_t channel, int64_t cell) const { return data + channel * channel_stride + cell; }
};

template <class E, class Acc>
struct CellRuns {
  const Level<Acc>& level;
  int64_t image, begin = 0, count = 0;
  Moments<Acc> moments;
  Plane<E, Acc> student_plane, teacher_plane, grad_plane;
  alignas(64) E student_buffer[kGroup][kRun], teacher_buffer[kGroup][kRun], grad_buffer[kGroup][kRun];
  const E *student[kGroup] = {}, *teacher[kGroup] = {};
  E* grad[kGroup] = {};
  Acc mean[kGroup], rstd[kGroup];

  CellRuns(const Level<Acc>& level, int64_t image)
      : level(level),
        image(image),
        moments(level),
        student_plane(level, level.student, image),
        teacher_plane(level, level.teacher, image),
        grad_plane(level, level.grad, image) {}

  Run run(const Feature& f, int64_t channel) const { return cells_run(level, f, image, channel, begin, count); }
  const E* load_cells(const Plane<E, Acc>& plane, const Feature& f, int64_t channel, E* buffer) const {
    return plane.data ? plane.at(channel, begin) : load<E, Acc>(f, run(f, channel), buffer);
  }
  void read_teacher(int g, int64_t channel) {
    teacher[g] = load_cells(teacher_plane, level.teacher, channel, teacher_buffer[g]);
    mean[g] = moments.mean_of(channel);
    rstd[g] = moments.rstd_of(channel);
  }
  template <int kParts>
  void read(int g, int64_t channel) {
    read_teacher(g, channel);
    if constexpr (kParts & (kDistance | kGradient))
      student[g] = load_cells(student_plane, level.student, channel, student_buffer[g]);
    if constexpr ((kParts & kGradient) && !(kParts & kStreams))
      grad[g] = grad_plane.data ? grad_plane.at(channel, begin) : grad_buffer[g];
  }
  void write(int g, int64_t channel) {
    if (!grad_plane.data) store<E, Acc>(grad[g], level.grad, run(level.grad, channel));
  }
};

template <int kParts, Score S, Penalty P, int G, class E, class Acc>
inline void combine_channels(const CellRuns<E, Acc>& runs, Acc beta, const Acc* slope, Acc* e, Acc* d) {
  const int64_t count = runs.count;
  const E *student[G], *teacher[G];  // in registers: what is stored could else be one of these
  E* grad[G];
  Acc mean[G], rstd[G];
  for (int g = 0; g < G; ++g) {
    student[g] = runs.student[g], teacher[g] = runs.teacher[g], grad[g] = runs.grad[g];
    mean[g] = runs.mean[g], rstd[g] = runs.rstd[g];
  }
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    Acc e_sum = 0, d_sum = 0;
    for (int g = 0; g < G; ++g) {
      const Acc t = (widen(teacher[g][j]) - mean[g]) * rstd[g];
      if constexpr (kParts & kScore) e_sum += score_term<S>(t);
      if constexpr (kParts & kDistance) d_sum += penalty<P>(widen(student[g][j]) - t, beta);
      if constexpr (kParts & kGradient) narrow(slope[j] * penalty_slope<P>(widen(student[g][j]) - t, beta), grad[g][j]);
    }
    if constexpr (kParts & kScore) e[j] += e_sum;
    if constexpr (kParts & kDistance) d[j] += d_sum;
  }
}

template <class T>
inline void clear(T* x, int64_t count) {
  for (int64_t j = 0; j < count; ++j) x[j] = 0;
}

template <class Acc>
inline void add(const Acc* x, int64_t count, double* sum) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) sum[j] += x[j];
}

// Writes `count` cells of G channels each past the caches: in one run where the channels follow each other in memory,
// so that few lines of it are written in parts.
template <class E, class Acc>
inline void stream_channels(const Level<Acc>& level, int64_t image, int64_t channel, int G, int64_t begin,
                            int64_t count, const E* from) {
  const int64_t offset = cells_run(level, level.grad, image, channel, begin, count).offset;
  const int64_t stride = level.grad.channel_stride;
  const auto ahead = [&](int g) {  // the same channel of the next group
    return channel + G < level.channels ? Ahead(level, offset + (G + g) * stride) : Ahead();
  };
  if (count == level.cells()) return stream(from, level.grad, offset, G * count, ahead(0));
  for (int g = 0; g < G; ++g) stream(from + g * count, level.grad, offset + g * stride, count, ahead(g));
}

// Channel by channel, in the order of memory, so that the processor's prefetching follows.
template <int kParts, Score S, Penalty P, class E, class Acc>
void sweep_cells(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end, double* e,
                 double* d) {
  CellRuns<E, Acc> runs(level, image);
  constexpr bool kStream = kParts & kStreams;
  alignas(64) Acc e_part[kBlock], d_part[kBlock], slope[kBlock];
  alignas(64) E staged[kStream ? kGroup * kBlock : 1];
  const Acc beta = Acc(options.beta);
  const int64_t count = end - begin;
  if constexpr (kParts & kScore) clear(e, count);
  if constexpr (kParts & kDistance) clear(d, count);
  if constexpr (kParts & kGradient)
    for (int64_t j = 0; j < count; ++j) slope[j] = level.slope * level.map[image * level.cells() + begin + j];
  const auto combine = [&](auto group, int64_t channel) {
    constexpr int G = decltype(group)::value;
    for (int64_t j = 0; j < count; j += kRun) {
      runs.begin = begin + j;
      runs.count = smaller(kRun, count - j);
      for (int g = 0; g < G; ++g) {
        runs.template read<kParts>(g, channel + g);
        if constexpr (kStream) runs.grad[g] = staged + g * count + j;
      }
      combine_channels<kParts, S, P, G>(runs, beta, slope + j, e_part + j, d_part + j);
      if constexpr ((kParts & kGradient) && !kStream)
        for (int g = 0; g < G; ++g) runs.write(g, channel + g);
    }
    if constexpr (kStream) stream_channels(level, image, channel, G, begin, count, staged);
    return channel + G;
  };
  for (int64_t c = 0; c < level.channels;) {
    if constexpr (kParts & kScore) clear(e_part, count);
    if constexpr (kParts & kDistance) clear(d_part, count);
    for (int group = 0; group < kPartial && c < level.channels; ++group)
      c = c + kGroup <= level.channels ? combine(std::integral_constant<int, kGroup>(), c)
                                       : combine(std::integral_constant<int, 1>(), c);
    if constexpr (kParts & kScore) add(e_part, count, e);
    if constexpr (kParts & kDistance) add(d_part, count, d);
  }
  if constexpr (kParts & kScore)
    for (int64_t j = 0; j < count; ++j) e[j] = finish_score<S>(e[j], level.channels);
}

// Two sweeps over the channels: the highest value of each cell (from memory), then the sums (the teacher from cache).
template <class Acc>
void entropy_cells(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end,
                   double* e) {
  CellRuns<Acc, Acc> runs(level, image);
  alignas(64) Acc highest[kRun];
  alignas(64) double sum[kRun], weighted[kRun];
  const int64_t count = end - begin;
  runs.begin = begin;
  runs.count = count;
  for (int64_t c = 0; c < level.channels; ++c) {
    runs.read_teacher(0, c);
    const Acc *t = runs.teacher[0], mean = runs.mean[0], rstd = runs.rstd[0];
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const Acc x = (t[j] - mean) * rstd;
      highest[j] = c == 0 || x > highest[j] ? x : highest[j];
    }
  }
  clear(sum, count);
  clear(weighted, count);
  const Acc temperature = Acc(options.temperature);
  for (int64_t c = 0; c < level.channels; ++c) {
    runs.read_teacher(0, c);
    const Acc *t = runs.teacher[0], mean = runs.mean[0], rstd = runs.rstd[0];
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const Acc u = logit((t[j] - mean) * rstd, highest[j], temperature);
      const Acc p = exponential(u);
      sum[j] += double(p);
      weighted[j] += double(u * p);
    }
  }
  for (int64_t j = 0; j < count; ++j) e[j] = finish_entropy(sum[j], weighted[j], level.channels);
}

// ---- a run = channels of one cell ----

// Calls f(student, teacher, first channel, count) for each run of the cell's channels.
template <bool kStudent, class E, class Acc, class F>
inline void each_channels_run(const Level<Acc>& level, int64_t image, int64_t cell, const F& f) {
  alignas(kLine) E student_buffer[kRun], teacher_buffer[kRun];
  for (int64_t c = 0; c < level.channels; c += kRun) {
    const int64_t count = smaller(kRun, level.channels - c);
    const E* const t =
        load<E, Acc>(level.teacher, channels_run(level, level.teacher, image, cell, c, count), teacher_buffer);
    const E* s = t;  // where nobody asks for the student
    if constexpr (kStudent)
      s = load<E, Acc>(level.student, channels_run(level, level.student, image, cell, c, count), student_buffer);
    f(s, t, c, count);
  }
}

constexpr int kLanes = 32;  // sums side by side, in registers: short chains of additions are faster and more accurate

template <int kParts, Score S, Penalty P, class E, class Acc>
FASTKD_INLINE void combine_lane(const E* s, Acc t, Acc beta, Acc slope, Acc& e, Acc& d, E* grad) {
  if constexpr (kParts & kScore) e += score_term<S>(t);
  if constexpr (kParts & kDistance) d += penalty<P>(widen(*s) - t, beta);
  if constexpr (kParts & kGradient) narrow(slope * penalty_slope<P>(widen(*s) - t, beta), *grad);
}

template <int kParts, Score S, Penalty P, class E, class Acc, class F>
FASTKD_INLINE void combine_run(const E* s, const E* t, const F& standardise, int64_t count, Acc beta, Acc slope,
                               Acc* __restrict e, Acc* __restrict d, E* grad) {
  const auto combine = [&](int64_t j, int k) {
    combine_lane<kParts, S, P>(s + j, standardise(j, Acc(widen(t[j]))), beta, slope, e[k], d[k], grad + j);
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) combine(j + k, k);
  for (int k = 0; j + k < count; ++k) combine(j + k, k);
}

template <class Acc>
inline double sum_lanes(const Acc* x) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < kLanes; ++k) sum += double(x[k]);
  return sum;
}

template <int kParts, Score S, Penalty P, class E, class Acc>
void sweep_channels(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end,
                    double* e, double* d) {
  constexpr bool kStream = kParts & kStreams;  // in bursts: a store behind one that streams would wait for it
  alignas(kLine) E buffer[kStream ? kBlock : kRun];
  int64_t filled = 0, streamed = image * level.grad.image_stride + begin * level.channels;
  const auto flush = [&](bool last) {
    stream(buffer, level.grad, streamed, filled, last ? Ahead() : Ahead(level, streamed + filled));
    streamed += filled;
    filled = 0;
  };
  const Acc beta = Acc(options.beta);
  const Moments<Acc> moments(level);
  for (int64_t cell = begin; cell < end; ++cell) {
    Acc e_sums[kLanes] = {}, d_sums[kLanes] = {};
    const Acc slope = kParts & kGradient ? level.slope * level.map[image * level.cells() + cell] : Acc(0);
    each_channels_run<kParts != kScore, E>(level, image, cell, [&](const E* s, const E* t, int64_t c, int64_t count) {
      const auto combine = [&](E* grad) {
        moments.from(c, [&](const auto& standardise) {
          combine_run<kParts, S, P>(s, t, standardise, count, beta, slope, e_sums, d_sums, grad);
        });
      };
      if constexpr (kStream) {
        if (filled + count > kBlock) flush(false);
        combine(buffer + filled);
        filled += count;
      } else if constexpr (kParts & kGradient) {
        const Run run = channels_run(level, level.grad, image, cell, c, count);
        E* const grad = target<E, Acc>(level.grad, run, buffer);
        combine(grad);
        store<E, Acc>(grad, level.grad, run);
      } else {
        combine(buffer);
      }
    });
    if constexpr (kParts & kScore) e[cell - begin] = finish_score<S>(sum_lanes(e_sums), level.channels);
    if constexpr (kParts & kDistance) d[cell - begin] = sum_lanes(d_sums);
  }
  if constexpr (kStream) flush(true);
}

template <class Acc>
void entropy_channels(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end,
                      double* e) {
  const Acc temperature = Acc(options.temperature);
  const Moments<Acc> moments(level);
  for (int64_t cell = begin; cell < end; ++cell) {
    Acc highest = -__builtin_inf();
    each_channels_run<false, Acc>(level, image, cell, [&](const Acc*, const Acc* t, int64_t c, int64_t count) {
      moments.from(c, [&](const auto& standardise) {
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < count; ++j) {
          const Acc x = standardise(j, t[j]);
          highest = x > highest ? x : highest;
        }
      });
    });
    double sum = 0, weighted = 0;
    each_channels_run<false, Acc>(level, image, cell, [&](const Acc*, const Acc* t, int64_t c, int64_t count) {
      Acc sum_part = 0, weighted_part = 0;
      moments.from(c, [&](const auto& standardise) {
#pragma omp simd reduction(+ : sum_part, weighted_part)
        for (int64_t j = 0; j < count; ++j) {
          const Acc u = logit(standardise(j, t[j]), highest, temperature);
          const Acc p = exponential(u);
          sum_part += p;
          weighted_part += u * p;
        }
      });
      sum += double(sum_part);
      weighted += double(weighted_part);
    });
    e[cell - begin] = finish_entropy(sum, weighted, level.channels);
  }
}

// ---- weigh ----

// w = (e - shift) * factor of every normaliser but softmax, which replaces e by its exponentials first
template <class Acc>
void normalise(double* e, int64_t count, const Options& options) {
  double lowest = e[0], highest = e[0], sum = 0;
#pragma omp simd reduction(min : lowest) reduction(max : highest) reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    lowest = e[j] < lowest ? e[j] : lowest;
    highest = e[j] > highest ? e[j] : highest;
    sum += e[j];
  }
  if (sum != sum) lowest = highest = sum;  // comparisons lose a NaN, which spoils its whole image as in PyTorch
  double shift = 0, factor = 1;
  if (options.norm == Norm::mean) {
    const double mean = sum / double(count);
    factor = 1 / (mean < kTiny ? kTiny : mean);
  } else if (options.norm == Norm::minmax) {
    shift = lowest;
    factor = 1 / (highest - lowest + kEps);
  } else if (options.norm == Norm::softmax) {
    sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) {
      e[j] = exponential(Acc(logit(e[j], highest, options.temperature)));
      sum += e[j];
    }
    factor = double(count) / sum;
  }
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) e[j] = (e[j] - shift) * factor;
}

template <class Acc>
double weigh(const Level<Acc>& level, const Options& options, int64_t image) {
  const int64_t count = level.cells(), first = image * count;
  double* e = level.score + first;
  if (options.norm != Norm::none) normalise<Acc>(e, count, options);
  if (level.prior) {
    const Acc* q = level.prior + first;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) e[j] *= double(q[j]);
  }
  Acc* w = level.map + first;
  double mass = 0;
#pragma omp simd reduction(+ : mass)
  for (int64_t j = 0; j < count; ++j) {
    w[j] = Acc(e[j]);
    mass += e[j];
  }
  return mass;
}

template <class Acc>
double loss(const Level<Acc>& level, int64_t image) {
  const int64_t count = level.cells();
  const double *w = level.score + image * count, *d = level.distance + image * count;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += w[j] * d[j];
  return sum;
}

// ---- the kernels: cells [begin, end) of an image ----

template <int kParts, Score S, Penalty P, class Acc>
void sweep_layout(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  double* const e = level.score ? level.score + image * level.cells() + begin : nullptr;
  double* const d = level.distance ? level.distance + image * level.cells() + begin : nullptr;
  const auto sweep = [&](auto* element) {
    using E = std::remove_pointer_t<decltype(element)>;
    if (channels_last(level))
      sweep_channels<kParts, S, P, E>(level, options, image, begin, end, e, d);
    else
      sweep_cells<kParts, S, P, E>(level, options, image, begin, end, e, d);
  };
  if constexpr (std::is_same_v<Acc, float>)
    if (all_bfloat16(level)) return sweep(static_cast<BFloat16*>(nullptr));
  sweep(static_cast<Acc*>(nullptr));
}

template <int kParts, Score S, class Acc>
void sweep_penalty(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  if constexpr (kParts == kScore) return sweep_layout<kParts, S, Penalty::l2>(level, options, image, begin, end);
  switch (options.penalty) {
    case Penalty::l2: return sweep_layout<kParts, S, Penalty::l2>(level, options, image, begin, end);
    case Penalty::l1: return sweep_layout<kParts, S, Penalty::l1>(level, options, image, begin, end);
    case Penalty::smooth_l1: return sweep_layout<kParts, S, Penalty::smooth_l1>(level, options, image, begin, end);
  }
}

// The sweep itself, in pieces that the sums of a run of cells have room for.
template <int kParts, Score S, class Acc>
void sweep_blocks(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; p += kBlock)
    sweep_penalty<kParts, S>(level, options, image, p, smaller(p + kBlock, end));
}

template <class Acc>
void entropy(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  double* const e = level.score + image * level.cells();
  if (channels_last(level)) return entropy_channels(level, options, image, begin, end, e + begin);
  for (int64_t p = begin; p < end; p += kRun) entropy_cells(level, options, image, p, smaller(p + kRun, end), e + p);
}

template <class Acc>
void score(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  switch (options.score) {
    case Score::uniform: return sweep_blocks<kScore, Score::uniform>(level, options, image, begin, end);
    case Score::magnitude: return sweep_blocks<kScore, Score::magnitude>(level, options, image, begin, end);
    case Score::energy: return sweep_blocks<kScore, Score::energy>(level, options, image, begin, end);
    case Score::entropy: return entropy(level, options, image, begin, end);
  }
}

template <class Acc>
void measure(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  constexpr int kBoth = kScore | kDistance;
  switch (options.score) {
    case Score::uniform: return sweep_blocks<kBoth, Score::uniform>(level, options, image, begin, end);
    case Score::magnitude: return sweep_blocks<kBoth, Score::magnitude>(level, options, image, begin, end);
    case Score::energy: return sweep_blocks<kBoth, Score::energy>(level, options, image, begin, end);
    case Score::entropy:
      entropy(level, options, image, begin, end);  // first, so that the other sweep finds the teacher in cache
      return sweep_blocks<kDistance, Score::entropy>(level, options, image, begin, end);
  }
}

template <int kParts, class Acc>
void sweep_gradient(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  if (!level.streams) return sweep_blocks<kParts, Score::uniform>(level, options, image, begin, end);
  sweep_blocks<kParts | kStreams, Score::uniform>(level, options, image, begin, end);
  finish_streams();
}

template <class Acc>
void imitate(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  if (!level.grad.data) return sweep_blocks<kDistance, Score::uniform>(level, options, image, begin, end);
  sweep_gradient<kDistance | kGradient>(level, options, image, begin, end);
}

template <class Acc>
void differentiate(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  sweep_gradient<kGradient>(level, options, image, begin, end);
}

template <class Acc>
inline void rescale_run(const Feature& f, const Run& run, Acc factor) {
  alignas(64) Acc from[kRun], buffer[kRun];
  const Acc* const x = load<Acc, Acc>(f, run, from);
  Acc* const out = target<Acc, Acc>(f, run, buffer);
#pragma omp simd
  for (int64_t j = 0; j < run.count; ++j) out[j] = factor * x[j];
  store<Acc, Acc>(out, f, run);
}

template <class Acc>
void rescale(const Level<Acc>& level, const Options&, int64_t image, int64_t begin, int64_t end) {
  if (channels_last(level)) {
    for (int64_t cell = begin; cell < end; ++cell)
      for (int64_t c = 0; c < level.channels; c += kRun)
        rescale_run(level.grad, channels_run(level, level.grad, image, cell, c, smaller(kRun, level.channels - c)),
                    level.slope);
    return;
  }
  for (int64_t c = 0; c < level.channels; ++c)
    for (int64_t p = begin; p < end; p += kRun)
      rescale_run(level.grad, cells_run(level, level.grad, image, c, p, smaller(kRun, end - p)), level.slope);
}

template <class Acc>
constexpr Kernels<Acc> kKernels{score<Acc>,         measure<Acc>, weigh<Acc>, imitate<Acc>,
                                differentiate<Acc>, rescale<Acc>, loss<Acc>};

}  // namespace
}  // namespace FASTKD_ISA_NAMESPACE

template <>
const Kernels<float>& FASTKD_ISA<float>() {
  return FASTKD_ISA_NAMESPACE::kKernels<float>;
}
template <>
const Kernels<double>& FASTKD_ISA<double>() {
  return FASTKD_ISA_NAMESPACE::kKernels<double>;
}
}  // namespace fastkd::cpu
