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
  out.x = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
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

template <class Acc>
inline const Acc* load(const Feature& f, const Run& run, Acc* buffer) {
  if (in_place<Acc>(f, run)) return static_cast<const Acc*>(f.data) + run.offset;
  run.each_piece(
      [&](int64_t offset, int64_t first, int64_t count) { copy_in(f, offset, run.stride, count, buffer + first); });
  return buffer;
}

// Where to compute a run that store() then puts in its place.
template <class Acc>
inline Acc* target(const Feature& f, const Run& run, Acc* buffer) {
  return in_place<Acc>(f, run) ? static_cast<Acc*>(f.data) + run.offset : buffer;
}

template <class Acc>
inline void store(const Acc* buffer, const Feature& f, const Run& run) {
  if (in_place<Acc>(f, run)) return;
  run.each_piece(
      [&](int64_t offset, int64_t first, int64_t count) { copy_out(buffer + first, f, offset, run.stride, count); });
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

// A pair (mean, rstd) of each channel; identity where the level has none.
template <class Acc>
struct Moments {
  const Acc *mean, *rstd;
  explicit Moments(const Level<Acc>& level) : mean(level.mean), rstd(level.rstd) {}
  Acc mean_of(int64_t c) const { return mean ? mean[c] : Acc(0); }
  Acc rstd_of(int64_t c) const { return mean ? rstd[c] : Acc(1); }
};

template <class Acc>
inline void standardise_run(const Acc* t, const Moments<Acc>& moments, int64_t channel, int64_t count, Acc* out) {
  const Acc *mean = moments.mean + channel, *rstd = moments.rstd + channel;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) out[j] = (t[j] - mean[j]) * rstd[j];
}

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

// ---- measure, a run = cells of one channel ----

constexpr int kGroup = 4;    // channels combined in registers before the sums in cache are touched
constexpr int kPartial = 8;  // groups summed in Acc, before double takes over: near-cancelling scores stay accurate

template <class Acc>
struct CellRuns {
  const Level<Acc>& level;
  int64_t image, begin, count;
  Moments<Acc> moments;
  alignas(64) Acc student_buffer[kGroup][kRun], teacher_buffer[kGroup][kRun];
  const Acc *student[kGroup], *teacher[kGroup];
  Acc mean[kGroup], rstd[kGroup];

  CellRuns(const Level<Acc>& level, int64_t image, int64_t begin, int64_t end)
      : level(level), image(image), begin(begin), count(end - begin), moments(level) {}

  void read_teacher(int g, int64_t channel) {
    teacher[g] = load(level.teacher, cells_run(level, level.teacher, image, channel, begin, count), teacher_buffer[g]);
    mean[g] = moments.mean_of(channel);
    rstd[g] = moments.rstd_of(channel);
  }
  void read(int g, int64_t channel) {
    student[g] = load(level.student, cells_run(level, level.student, image, channel, begin, count), student_buffer[g]);
    read_teacher(g, channel);
  }
};

template <Score S, Penalty P, int G, class Acc>
inline void add_channels(const CellRuns<Acc>& runs, Acc beta, Acc* e, Acc* d) {
  const int64_t count = runs.count;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    Acc e_sum = 0, d_sum = 0;
    for (int g = 0; g < G; ++g) {
      const Acc x = (runs.teacher[g][j] - runs.mean[g]) * runs.rstd[g];
      e_sum += score_term<S>(x);
      d_sum += penalty<P>(runs.student[g][j] - x, beta);
    }
    e[j] += e_sum;
    d[j] += d_sum;
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

template <Score S, Penalty P, class Acc>
void measure_cells(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end,
                   double* e, double* d) {
  CellRuns<Acc> runs(level, image, begin, end);
  alignas(64) Acc e_part[kRun], d_part[kRun];
  const Acc beta = Acc(options.beta);
  const int64_t count = runs.count;
  clear(e, count);
  clear(d, count);
  for (int64_t c = 0; c < level.channels;) {
    clear(e_part, count);
    clear(d_part, count);
    for (int group = 0; group < kPartial && c < level.channels; ++group) {
      if (c + kGroup <= level.channels) {
        for (int g = 0; g < kGroup; ++g) runs.read(g, c + g);
        add_channels<S, P, kGroup>(runs, beta, e_part, d_part);
        c += kGroup;
      } else {
        runs.read(0, c++);
        add_channels<S, P, 1>(runs, beta, e_part, d_part);
      }
    }
    add(e_part, count, e);
    add(d_part, count, d);
  }
  for (int64_t j = 0; j < count; ++j) e[j] = finish_score<S>(e[j], level.channels);
}

// Two sweeps over the channels: the highest value of each cell (from memory), then the sums (the teacher from cache).
template <class Acc>
void entropy_cells(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end,
                   double* e) {
  CellRuns<Acc> runs(level, image, begin, end);
  alignas(64) Acc highest[kRun];
  alignas(64) double sum[kRun], weighted[kRun];
  const int64_t count = runs.count;
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

// ---- measure, a run = channels of one cell ----

// Calls f(student, standardised teacher, count) for each run of the cell's channels.
template <class Acc, class F>
inline void each_channels_run(const Level<Acc>& level, int64_t image, int64_t cell, const F& f) {
  alignas(64) Acc student_buffer[kRun], teacher_buffer[kRun], standardised[kRun];
  const Moments<Acc> moments(level);
  for (int64_t c = 0; c < level.channels; c += kRun) {
    const int64_t count = smaller(kRun, level.channels - c);
    const Acc* s = load(level.student, channels_run(level, level.student, image, cell, c, count), student_buffer);
    const Acc* t = load(level.teacher, channels_run(level, level.teacher, image, cell, c, count), teacher_buffer);
    if (moments.mean) {
      standardise_run(t, moments, c, count, standardised);
      t = standardised;
    }
    f(s, t, c, count);
  }
}

constexpr int kLanes = 64;  // sums side by side: short chains of additions are faster and more accurate

template <Score S, Penalty P, class Acc>
inline void add_run(const Acc* s, const Acc* t, int64_t count, Acc beta, Acc* __restrict e, Acc* __restrict d) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) {
      e[k] += score_term<S>(t[j + k]);
      d[k] += penalty<P>(s[j + k] - t[j + k], beta);
    }
  for (int k = 0; j + k < count; ++k) {
    e[k] += score_term<S>(t[j + k]);
    d[k] += penalty<P>(s[j + k] - t[j + k], beta);
  }
}

template <class Acc>
inline double sum_lanes(const Acc* x) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int k = 0; k < kLanes; ++k) sum += double(x[k]);
  return sum;
}

template <Score S, Penalty P, class Acc>
void measure_channels(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end,
                      double* e, double* d) {
  for (int64_t cell = begin; cell < end; ++cell) {
    alignas(64) Acc e_lanes[kLanes] = {}, d_lanes[kLanes] = {};
    each_channels_run(level, image, cell, [&](const Acc* s, const Acc* t, int64_t, int64_t count) {
      add_run<S, P>(s, t, count, Acc(options.beta), e_lanes, d_lanes);
    });
    e[cell - begin] = finish_score<S>(sum_lanes(e_lanes), level.channels);
    d[cell - begin] = sum_lanes(d_lanes);
  }
}

template <class Acc>
void entropy_channels(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end,
                      double* e) {
  const Acc temperature = Acc(options.temperature);
  for (int64_t cell = begin; cell < end; ++cell) {
    Acc highest = -__builtin_inf();
    each_channels_run(level, image, cell, [&](const Acc*, const Acc* t, int64_t, int64_t count) {
#pragma omp simd reduction(max : highest)
      for (int64_t j = 0; j < count; ++j) highest = t[j] > highest ? t[j] : highest;
    });
    double sum = 0, weighted = 0;
    each_channels_run(level, image, cell, [&](const Acc*, const Acc* t, int64_t, int64_t count) {
      Acc sum_part = 0, weighted_part = 0;
#pragma omp simd reduction(+ : sum_part, weighted_part)
      for (int64_t j = 0; j < count; ++j) {
        const Acc u = logit(t[j], highest, temperature);
        const Acc p = exponential(u);
        sum_part += p;
        weighted_part += u * p;
      }
      sum += double(sum_part);
      weighted += double(weighted_part);
    });
    e[cell - begin] = finish_entropy(sum, weighted, level.channels);
  }
}

template <Score S, Penalty P, class Acc>
void measure_block(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  double* e = level.score + image * level.cells() + begin;
  double* d = level.distance + image * level.cells() + begin;
  if (channels_last(level)) {
    measure_channels<S, P>(level, options, image, begin, end, e, d);
    if constexpr (S == Score::entropy) entropy_channels(level, options, image, begin, end, e);
  } else {
    if constexpr (S == Score::entropy) {
      alignas(64) double scores[kRun];  // first, so that the second sweep finds the teacher in cache
      entropy_cells(level, options, image, begin, end, scores);
      measure_cells<S, P>(level, options, image, begin, end, e, d);
      for (int64_t j = 0; j < end - begin; ++j) e[j] = scores[j];
    } else {
      measure_cells<S, P>(level, options, image, begin, end, e, d);
    }
  }
}

template <Penalty P, class Acc>
void measure_by_score(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  switch (options.score) {
    case Score::uniform: return measure_block<Score::uniform, P>(level, options, image, begin, end);
    case Score::magnitude: return measure_block<Score::magnitude, P>(level, options, image, begin, end);
    case Score::energy: return measure_block<Score::energy, P>(level, options, image, begin, end);
    case Score::entropy: return measure_block<Score::entropy, P>(level, options, image, begin, end);
  }
}

template <class Acc>
void measure(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  switch (options.penalty) {
    case Penalty::l2: return measure_by_score<Penalty::l2>(level, options, image, begin, end);
    case Penalty::l1: return measure_by_score<Penalty::l1>(level, options, image, begin, end);
    case Penalty::smooth_l1: return measure_by_score<Penalty::smooth_l1>(level, options, image, begin, end);
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
Sums weigh(const Level<Acc>& level, const Options& options, int64_t image) {
  const int64_t count = level.cells(), first = image * count;
  double* e = level.score + first;
  if (options.norm != Norm::none) normalise<Acc>(e, count, options);
  if (level.prior) {
    const Acc* q = level.prior + first;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) e[j] *= double(q[j]);
  }
  const double* d = level.distance + first;
  Acc* w = level.map + first;
  double loss = 0, mass = 0;
#pragma omp simd reduction(+ : loss, mass)
  for (int64_t j = 0; j < count; ++j) {
    w[j] = Acc(e[j]);
    loss += e[j] * d[j];
    mass += e[j];
  }
  return {loss, mass};
}

// ---- differentiate ----

template <Penalty P, class Acc>
void differentiate_cells(const Level<Acc>& level, Acc beta, int64_t image, int64_t begin, int64_t end) {
  CellRuns<Acc> runs(level, image, begin, end);
  alignas(64) Acc slope[kRun], buffer[kRun];
  const int64_t count = runs.count;
  const Acc* w = level.map + image * level.cells() + begin;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) slope[j] = level.slope * w[j];
  for (int64_t c = 0; c < level.channels; ++c) {
    runs.read(0, c);
    const Run run = cells_run(level, level.grad, image, c, begin, count);
    const Acc *s = runs.student[0], *t = runs.teacher[0], mean = runs.mean[0], rstd = runs.rstd[0];
    Acc* out = target(level.grad, run, buffer);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) out[j] = slope[j] * penalty_slope<P>(s[j] - (t[j] - mean) * rstd, beta);
    store(out, level.grad, run);
  }
}

template <Penalty P, class Acc>
void differentiate_channels(const Level<Acc>& level, Acc beta, int64_t image, int64_t begin, int64_t end) {
  alignas(64) Acc buffer[kRun];
  for (int64_t cell = begin; cell < end; ++cell) {
    const Acc slope = level.slope * level.map[image * level.cells() + cell];
    each_channels_run(level, image, cell, [&](const Acc* s, const Acc* t, int64_t channel, int64_t count) {
      const Run run = channels_run(level, level.grad, image, cell, channel, count);
      Acc* out = target(level.grad, run, buffer);
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) out[j] = slope * penalty_slope<P>(s[j] - t[j], beta);
      store(out, level.grad, run);
    });
  }
}

template <Penalty P, class Acc>
void differentiate_block(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  if (channels_last(level))
    differentiate_channels<P>(level, Acc(options.beta), image, begin, end);
  else
    differentiate_cells<P>(level, Acc(options.beta), image, begin, end);
}

template <class Acc>
void differentiate(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end) {
  switch (options.penalty) {
    case Penalty::l2: return differentiate_block<Penalty::l2>(level, options, image, begin, end);
    case Penalty::l1: return differentiate_block<Penalty::l1>(level, options, image, begin, end);
    case Penalty::smooth_l1: return differentiate_block<Penalty::smooth_l1>(level, options, image, begin, end);
  }
}

template <class Acc>
constexpr Kernels<Acc> kKernels{measure<Acc>, weigh<Acc>, differentiate<Acc>};

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
