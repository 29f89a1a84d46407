// ---- sweeps over student and teacher ----

// What a sweep computes: for each cell its score e, its penalty sum D and the student's gradient, and for each channel
// the bias gradient. The score does not read the student. kernels.h has the formulas and costs.
enum Parts { kScore = 1, kDistance = 2, kGradient = 4, kBias = 8 };

// ---- a run = cells of one channel ----

constexpr int kGroup = 4;    // channels combined in registers before the sums in cache are touched
constexpr int kPartial = 8;  // groups summed in Acc before they are added in double, which keeps scores accurate

// One image of a feature; data is null unless its cells can be read and written in place.
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
  Affine<Acc> affine;
  Plane<E, Acc> student_plane, teacher_plane, grad_plane;
  alignas(64) E student_buffer[kGroup][kRun], teacher_buffer[kGroup][kRun], grad_buffer[kGroup][kRun];
  const E *student[kGroup] = {}, *teacher[kGroup] = {};
  E* grad[kGroup] = {};
  Acc mean[kGroup], rstd[kGroup], bias[kGroup];

  CellRuns(const Level<Acc>& level, int64_t image)
      : level(level),
        image(image),
        affine(level),
        student_plane(level, level.student, image),
        teacher_plane(level, level.teacher, image),
        grad_plane(level, level.grad, image) {}

  Run run(const Feature& f, int64_t channel) const { return cells_run(level, f, image, channel, begin, count); }
  const E* load_cells(const Plane<E, Acc>& plane, const Feature& f, int64_t channel, E* buffer) const {
    return plane.data ? plane.at(channel, begin) : load<E, Acc>(f, run(f, channel), buffer);
  }
  void read_teacher(int g, int64_t channel) {
    teacher[g] = load_cells(teacher_plane, level.teacher, channel, teacher_buffer[g]);
    mean[g] = affine.mean_of(channel);
    rstd[g] = affine.rstd_of(channel);
  }
  template <int kParts>
  void read(int g, int64_t channel) {
    read_teacher(g, channel);
    if constexpr (kParts & (kDistance | kGradient)) {
      student[g] = load_cells(student_plane, level.student, channel, student_buffer[g]);
      bias[g] = affine.bias_of(channel);
    }
    if constexpr (kParts & kGradient) grad[g] = grad_plane.data ? grad_plane.at(channel, begin) : grad_buffer[g];
  }
  void write(int g, int64_t channel) {
    if (!grad_plane.data && level.grad.data) store<E, Acc>(grad[g], level.grad, run(level.grad, channel));
  }
};

template <int kParts, Score S, Penalty P, int G, class E, class Acc>
inline void combine_channels(const CellRuns<E, Acc>& runs, Acc beta, const Acc* slope, Acc* e, Acc* d, Acc* bias_grad) {
  const int64_t count = runs.count;
  const E *student[G], *teacher[G];  // copies in registers, as stores could otherwise alias them
  E* grad[G];
  Acc mean[G], rstd[G], bias[G];
  for (int g = 0; g < G; ++g) {
    student[g] = runs.student[g], teacher[g] = runs.teacher[g], grad[g] = runs.grad[g];
    mean[g] = runs.mean[g], rstd[g] = runs.rstd[g], bias[g] = runs.bias[g];
  }
  Acc sum_0 = 0, sum_1 = 0, sum_2 = 0, sum_3 = 0;  // not an array, which the compiler would keep in memory
#pragma omp simd reduction(+ : sum_0, sum_1, sum_2, sum_3)
  for (int64_t j = 0; j < count; ++j) {
    Acc e_sum = 0, d_sum = 0;
    for (int g = 0; g < G; ++g) {
      const Acc t = (widen(teacher[g][j]) - mean[g]) * rstd[g];
      if constexpr (kParts & kScore) e_sum += score_term<S>(t);
      if constexpr (kParts == kScore) continue;
      const Acc x = (widen(student[g][j]) + bias[g]) - t;
      if constexpr (kParts & kDistance) d_sum += penalty<P>(x, beta);
      if constexpr (kParts & kGradient) {
        const Acc ds = slope[j] * penalty_slope<P>(x, beta);
        narrow(ds, grad[g][j]);
        if constexpr (kParts & kBias) {
          if (g == 0) sum_0 += ds;
          if (g == 1) sum_1 += ds;
          if (g == 2) sum_2 += ds;
          if (g == 3) sum_3 += ds;
        }
      }
    }
    if constexpr (kParts & kScore) e[j] += e_sum;
    if constexpr (kParts & kDistance) d[j] += d_sum;
  }
  const Acc sums[kGroup] = {sum_0, sum_1, sum_2, sum_3};
  if constexpr (kParts & kBias)
    for (int g = 0; g < G; ++g) bias_grad[g] = sums[g];
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

// The channels in the order of memory, which the processor prefetches.
template <int kParts, Score S, Penalty P, class E, class Acc>
void sweep_cells(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end, double* e,
                 double* d) {
  CellRuns<E, Acc> runs(level, image);
  alignas(64) Acc e_part[kBlock], d_part[kBlock], slope[kBlock];
  const Acc beta = Acc(options.beta);
  const int64_t count = end - begin;
  if constexpr (kParts & kScore) clear(e, count);
  if constexpr (kParts & kDistance) clear(d, count);
  if constexpr (kParts & kGradient)
    for (int64_t j = 0; j < count; ++j) slope[j] = level.slope * Acc(weight(level, image * level.cells() + begin + j));
  const auto combine = [&](auto group, int64_t channel) {
    constexpr int G = decltype(group)::value;
    for (int64_t j = 0; j < count; j += kRun) {
      runs.begin = begin + j;
      runs.count = smaller(kRun, count - j);
      for (int g = 0; g < G; ++g) runs.template read<kParts>(g, channel + g);
      Acc* const bias_grad = kParts & kBias ? bias_row(level, image, begin + j) + channel : nullptr;
      combine_channels<kParts, S, P, G>(runs, beta, slope + j, e_part + j, d_part + j, bias_grad);
      if constexpr (kParts & kGradient)
        for (int g = 0; g < G; ++g) runs.write(g, channel + g);
    }
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
    for (int64_t j = 0; j < count; ++j) e[j] /= double(level.channels);
}

// ---- a run = channels of one cell ----

// Calls f(student, teacher, first channel, count) for each run of the cell's channels.
template <bool kStudent, class E, class Acc, class F>
inline void each_channels_run(const Level<Acc>& level, int64_t image, int64_t cell, const F& f) {
  alignas(64) E student_buffer[kRun], teacher_buffer[kRun];
  for (int64_t c = 0; c < level.channels; c += kRun) {
    const int64_t count = smaller(kRun, level.channels - c);
    const E* const t =
        load<E, Acc>(level.teacher, channels_run(level, level.teacher, image, cell, c, count), teacher_buffer);
    const E* s = t;  // if the student is not needed
    if constexpr (kStudent)
      s = load<E, Acc>(level.student, channels_run(level, level.student, image, cell, c, count), student_buffer);
    f(s, t, c, count);
  }
}

constexpr int kLanes = 32;  // independent sums in registers, as short chains of additions are faster and more accurate

template <int kParts, Score S, Penalty P, class E, class Acc>
FASTKD_INLINE void combine_lane(Acc s, Acc t, Acc beta, Acc slope, Acc& e, Acc& d, E* grad, Acc* bias_grad) {
  if constexpr (kParts & kScore) e += score_term<S>(t);
  if constexpr (kParts & kDistance) d += penalty<P>(s - t, beta);
  if constexpr (kParts & kGradient) {
    const Acc ds = slope * penalty_slope<P>(s - t, beta);
    narrow(ds, *grad);
    if constexpr (kParts & kBias) *bias_grad += ds;
  }
}

template <int kParts, Score S, Penalty P, class E, class Acc, class Shift, class Standardise>
FASTKD_INLINE void combine_run(const E* s, const E* t, const Shift& shift, const Standardise& standardise,
                               int64_t count, Acc beta, Acc slope, Acc* __restrict e, Acc* __restrict d, E* grad,
                               Acc* __restrict bias_grad) {
  const auto combine = [&](int64_t j, int k) {
    combine_lane<kParts, S, P>(shift(j, Acc(widen(s[j]))), standardise(j, Acc(widen(t[j]))), beta, slope, e[k], d[k],
                               grad + j, bias_grad + j);
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
  alignas(64) E buffer[kRun];
  const Acc beta = Acc(options.beta);
  const Affine<Acc> affine(level);
  for (int64_t cell = begin; cell < end; ++cell) {
    Acc e_sums[kLanes] = {}, d_sums[kLanes] = {};
    const Acc slope = kParts & kGradient ? level.slope * Acc(weight(level, image * level.cells() + cell)) : Acc(0);
    Acc* const bias_grad = kParts & kBias ? bias_row(level, image, cell) : nullptr;
    if (bias_grad && cell % bias_cells(level) == 0) clear(bias_grad, level.channels);
    each_channels_run<kParts != kScore, E>(level, image, cell, [&](const E* s, const E* t, int64_t c, int64_t count) {
      const auto combine = [&](E* grad) {
        affine.from(c, [&](const auto& shift, const auto& standardise) {
          combine_run<kParts, S, P>(s, t, shift, standardise, count, beta, slope, e_sums, d_sums, grad, bias_grad + c);
        });
      };
      if constexpr (kParts & kGradient) {
        const Run run = channels_run(level, level.grad, image, cell, c, count);
        E* const grad = level.grad.data ? target<E, Acc>(level.grad, run, buffer) : buffer;
        combine(grad);
        if (level.grad.data) store<E, Acc>(grad, level.grad, run);
      } else {
        combine(buffer);
      }
    });
    if constexpr (kParts & kScore) e[cell - begin] = sum_lanes(e_sums) / double(level.channels);
    if constexpr (kParts & kDistance) d[cell - begin] = sum_lanes(d_sums);
  }
}
