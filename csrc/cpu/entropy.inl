// Score of the entropy: e_p = 1 - H / log C, H = log(sum_c exp(u_c)) - sum_c u_c exp(u_c) / sum_c exp(u_c), with the
// logits u_c = (t'_c - max_c t'_c) / T. It must read the teacher once from memory (1 unit) and once from the cache, for
// about 25 operations per element.

// Two sweeps over the channels: the highest value of each cell (teacher from memory), then the sums (from the cache).
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
  for (int64_t j = 0; j < count; ++j) e[j] = entropy_score(sum[j], weighted[j], double(level.channels));
}

template <class Acc>
void entropy_channels(const Level<Acc>& level, const Options& options, int64_t image, int64_t begin, int64_t end,
                      double* e) {
  const Acc temperature = Acc(options.temperature);
  const Affine<Acc> affine(level);
  for (int64_t cell = begin; cell < end; ++cell) {
    Acc highest = -__builtin_inf();
    each_channels_run<false, Acc>(level, image, cell, [&](const Acc*, const Acc* t, int64_t c, int64_t count) {
      affine.from(c, [&](const auto&, const auto& standardise) {
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
      affine.from(c, [&](const auto&, const auto& standardise) {
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
    e[cell - begin] = entropy_score(sum, weighted, double(level.channels));
  }
}
