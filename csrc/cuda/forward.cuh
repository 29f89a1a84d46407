// Forward: losses, masses and maps of all levels in one launch.
//
//   x = (s + bias_c) - t',   t' = (t - mean_c) rstd_c,   e_p = score(t'_p),   w_p = prior_p map_norm(e)_p
//   D_p = sum_c rho(x_pc),   L = weight / Z sum_p w_p D_p,   mass = sum_p w_p
//
// It must move 2 b bytes per element of b bytes, student and teacher, which are 2 units (one unit is the bytes of all
// student features), and per cell 36 bytes of e, D (written and read back from L2) and w: under 2 % of the total from
// 512 channels of bfloat16 on. It does 6 operations per element (l2, energy: bias, difference, 2 multiply-adds, 2 to
// standardise; 2 more choose the score) and 2 conversions; for entropy about 25. The floor is 2 units / bandwidth: in
// the time in which the memory of an H200 delivers a pair of bfloat16 elements, its lanes can do about 24 operations.
//
// Every block computes score e and penalty sum D of the cells of its tile, in one read of student and teacher. The last
// block of an image, determined by an integer ticket, computes the weights w of the image and sums w D and w; the last
// block of a level adds up its images. Each sum has a fixed order, whichever block is last.
//
// The score pass, which runs before the one pass (stream.cuh), is the same without student and D: it computes only maps
// and masses, and must move 1 unit.
#pragma once

#include "tile.cuh"

namespace fastkd::cuda {

// ---- measure ----

// The sums of one thread over its channels, per cell. For the entropy they are those of an online softmax: the highest
// value so far, the sum of exp(u) and that of u exp(u), where u is the logit minus the highest.
template <class Acc, int kCells, bool kEntropy>
struct Sums {
  static constexpr bool kOfEntropy = kEntropy;
  static constexpr int kValues = kEntropy ? 4 : 2;
  Acc value[kValues][kCells];  // D; e, or highest, sum, weighted

  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int k = 0; k < kValues; ++k)
#pragma unroll
      for (int i = 0; i < kCells; ++i)
        value[k][i] = kEntropy && k == 1 ? -std::numeric_limits<Acc>::infinity() : Acc(0);
  }
};

template <class Acc>
__device__ __forceinline__ Acc below(Acc x, Acc highest, Acc inverse_temperature) {
  const Acc u = difference(x, highest) * inverse_temperature;
  return u < Acc(kLowestLogit) ? Acc(kLowestLogit) : u;
}

template <class P, class Acc>
__device__ __forceinline__ void add_entropy(const Acc (&t)[P::kRows][P::kVector], int rows, Acc inverse_temperature,
                                            Sums<Acc, P::kCells, true>& sums) {
  constexpr int V = P::kVector, kRows = P::kRows, kCells = P::kCells;
  auto& [_, highest, sum, weighted] = sums.value;
  Acc top[kCells];
#pragma unroll
  for (int i = 0; i < kCells; ++i) top[i] = highest[i];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (i < rows)
#pragma unroll
      for (int v = 0; v < V; ++v) top[P::cell(i, v)] = t[i][v] > top[P::cell(i, v)] ? t[i][v] : top[P::cell(i, v)];
#pragma unroll
  for (int i = 0; i < kCells; ++i)
    if (top[i] != highest[i]) {  // rescale the sums so far to the new highest value
      const Acc u = below(highest[i], top[i], inverse_temperature), p = std::exp(u);
      weighted[i] = (weighted[i] + u * sum[i]) * p;
      sum[i] *= p;
      highest[i] = top[i];
    }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (i < rows)
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Acc u = below(t[i][v], top[P::cell(i, v)], inverse_temperature), p = std::exp(u);
        sum[P::cell(i, v)] += p;
        weighted[P::cell(i, v)] += u * p;
      }
}

// |t| or t^2 without a branch, as straight-line code needs the fewest registers.
template <class Acc>
__device__ __forceinline__ Acc score_of(Acc t, bool energy) {
  const Acc size = score_term<Score::magnitude>(t);
  return size * (energy ? size : Acc(1));
}

// Sums a patch first, then adds it to the sums, which keeps chains of additions short and rounding errors small.
template <Penalty kPenalty, class P, class Read, class Acc, class Totals>
__device__ __forceinline__ void add_patch(const Launch<Acc>& launch, const Read& features, Totals& sums) {
  const Acc beta = Acc(launch.options.beta);
  const bool energy = launch.options.score == Score::energy;
  Acc d[P::kCells] = {}, e[P::kCells] = {};
  features.each([&](int i, int v, Acc t, Acc x) {
    if constexpr (P::kStudent) d[P::cell(i, v)] += scaled_penalty<kPenalty>(x, beta);
    if constexpr (!Totals::kOfEntropy) e[P::cell(i, v)] += score_of(t, energy);
  });
#pragma unroll
  for (int i = 0; i < P::kCells; ++i) {
    if constexpr (P::kStudent) sums.value[0][i] += d[i];
    if constexpr (!Totals::kOfEntropy) sums.value[1][i] += e[i];
  }
}

template <class E, class P, bool kEntropy, class Acc>
__device__ __forceinline__ auto measure(const Launch<Acc>& launch, const Level<Acc>& level, const Tile& tile,
                                        int64_t first) {
  const Places<P> places(level, tile, first);
  const Rows<P> student(level.student, tile, places), teacher(level.teacher, tile, places);
  Sums<Acc, P::kCells, kEntropy> sums;
  each_patch<P>(level, tile, first, [&](int c, int rows) {
    const Features<E, P> features(level, tile, student, teacher, c, rows);
    if constexpr (kEntropy) {
      Acc t[P::kRows][P::kVector] = {};
      features.each([&](int i, int v, Acc u, Acc) { t[i][v] = u; });
      add_entropy<P>(t, rows, Acc(launch.inverse_temperature), sums);
    }
    if constexpr (P::kStudent)
      with_penalty(launch.options.penalty, [&](auto penalty) { add_patch<penalty, P>(launch, features, sums); });
    else if constexpr (!kEntropy)
      add_patch<Penalty::l2, P>(launch, features, sums);
  });
  return sums;
}

// ---- from threads to cells ----

// Row length of the threads' sums in shared memory: [value][cell of the thread][thread]. With the padding, reads of
// consecutive cells, several of which belong to one thread, use different banks.
template <int kCells>
constexpr int kRowLength = kThreads + 32 / kCells;

// The score e of a cell from the parts of several threads, see Sums.
template <int kStep, class Acc, class Thread>
__device__ __forceinline__ double join_entropy(const Acc* shared, int parts, const Thread& thread, double channels,
                                               Acc inverse_temperature) {
  const Acc *highest = shared + kStep, *sum = highest + kStep, *weighted = sum + kStep;
  Acc top = highest[thread(0)];
  for (int p = 1; p < parts; ++p) top = highest[thread(p)] > top ? highest[thread(p)] : top;
  double total = 0, total_weighted = 0;
  for (int p = 0; p < parts; ++p) {
    const int i = thread(p);
    const Acc u = below(highest[i], top, inverse_temperature), factor = std::exp(u);
    total += double(sum[i]) * double(factor);
    total_weighted += (double(weighted[i]) + double(u) * double(sum[i])) * double(factor);
  }
  return entropy_score(total, total_weighted, channels);
}

// Adds up the threads' sums of each cell of the tile, in double, and writes e and D.
template <class P, int kCells, bool kEntropy, class Acc>
__device__ __forceinline__ void join(const Launch<Acc>& launch, const Level<Acc>& level, const Tile& tile,
                                     const Acc* shared) {
  constexpr int kLength = kRowLength<kCells>, kStep = kCells * kLength;
  constexpr bool kLast = P::kChannelsLast;
  const int parts = kLast ? tile.lanes : tile.groups, units = kLast ? tile.groups : tile.lanes;
  const int64_t first = tile.image * level.cells() + tile.begin, left = level.cells() - tile.begin;
  for (int j = int(threadIdx.x); j < units * kCells && j < left; j += kThreads) {
    const int unit = j / kCells;  // the parts of a cell: one thread per lane (channels_last) or per group
    const auto thread = [&](int p) {
      const int part = (p + unit) & (parts - 1);  // each cell begins at another part, also for the banks
      return j % kCells * kLength + (kLast ? unit * tile.lanes + part : part * tile.lanes + unit);
    };
    double d = 0, e = 0;
    if constexpr (kEntropy) {
      e = join_entropy<kStep>(shared, parts, thread, double(level.channels), Acc(launch.inverse_temperature));
    } else {
      for (int p = 0; p < parts; ++p) e += double(shared[kStep + thread(p)]);
      e = launch.options.score == Score::uniform ? 1 : e / double(level.channels);
    }
    level.score[first + j] = e;
    if constexpr (P::kStudent) {
      for (int p = 0; p < parts; ++p) d += double(shared[thread(p)]);
      level.distance[first + j] = launch.options.penalty == Penalty::smooth_l1 ? d / launch.options.beta : d;
    }
  }
}

template <class E, class P, bool kEntropy, class Acc>
__device__ __forceinline__ void measure_tile(const Launch<Acc>& launch, const Level<Acc>& level, const Tile& tile,
                                             Acc* shared) {
  constexpr int kCells = P::kPasses * P::kCells, kLength = kRowLength<kCells>;
#pragma unroll 1
  for (int pass = 0; pass < P::kPasses; ++pass) {
    const auto sums = measure<E, P, kEntropy>(launch, level, tile, P::first(tile, pass));
    Acc* to = shared + pass * P::kCells * kLength + int(threadIdx.x);
#pragma unroll
    for (int k = P::kStudent ? 0 : 1; k < sums.kValues; ++k)
#pragma unroll
      for (int i = 0; i < P::kCells; ++i) to[(k * kCells + i) * kLength] = sums.value[k][i];
  }
  __syncthreads();
  join<P, kCells, kEntropy>(launch, level, tile, shared);
}

// ---- weigh, in the last block of an image ----

// Minimum and maximum that propagate a NaN, which makes the whole image NaN as in PyTorch.
struct Lower {
  __device__ double operator()(double a, double b) const { return b < a || b != b ? b : a; }
};
struct Higher {
  __device__ double operator()(double a, double b) const { return b > a || b != b ? b : a; }
};

// Weight of a cell before its prior: (e - shift) * factor, or exp((e - shift) / temperature) * factor.
template <class Acc>
struct Weight {
  double shift = 0, factor = 1, temperature = 0;

  __device__ __forceinline__ double operator()(double e) const {
    if (temperature == 0) return (e - shift) * factor;
    const double u = (e - shift) / temperature;
    return double(std::exp(Acc(u < kLowestLogit ? kLowestLogit : u))) * factor;
  }
};

// The map norm of one image. It reads data of other blocks, hence past the L1 cache.
template <class Acc>
__device__ __forceinline__ Weight<Acc> map_norm_of(const Options& options, const double* e, int64_t cells,
                                                   double* shared) {
  Weight<Acc> weight;
  if (options.map_norm == MapNorm::none) return weight;
  double lowest = std::numeric_limits<double>::infinity(), highest = -lowest, sum = 0;
  for (int64_t j = threadIdx.x; j < cells; j += kThreads) {
    const double x = __ldcg(e + j);
    lowest = Lower()(lowest, x);
    highest = Higher()(highest, x);
    sum += x;
  }
  if (options.map_norm == MapNorm::mean) {
    const double mean = combine(sum, shared, Add()) / double(cells);
    weight.factor = 1 / (mean < kTiny ? kTiny : mean);
    return weight;
  }
  highest = combine(highest, shared, Higher());
  if (options.map_norm == MapNorm::minmax) {
    weight.shift = combine(lowest, shared, Lower());
    weight.factor = 1 / (highest - weight.shift + kEps);
    return weight;
  }
  weight.shift = highest;
  weight.temperature = options.temperature;
  sum = 0;
  for (int64_t j = threadIdx.x; j < cells; j += kThreads) sum += weight(__ldcg(e + j));
  weight.factor = double(cells) / combine(sum, shared, Add());
  return weight;
}

// Writes the map of the image, and its sums of w D (with the student) and of w.
template <bool kStudent, class Acc>
__device__ __forceinline__ void weigh(const Launch<Acc>& launch, const Level<Acc>& level, int64_t image, double* sums,
                                      double* shared) {
  const int64_t cells = level.cells(), first = image * cells;
  const double *e = level.score + first, *d = level.distance + first;
  const Weight<Acc> weight = map_norm_of<Acc>(launch.options, e, cells, shared);
  double loss = 0, mass = 0;
  for (int64_t j = threadIdx.x; j < cells; j += kThreads) {
    double w = weight(__ldcg(e + j));
    if (level.prior) w *= double(level.prior[first + j]);
    level.map[first + j] = Acc(w);
    if constexpr (kStudent) loss += w * __ldcg(d + j);
    mass += w;
  }
  if constexpr (kStudent) loss = combine(loss, shared, Add());
  mass = combine(mass, shared, Add());
  if (threadIdx.x == 0) {
    sums[0] = loss;
    sums[1] = mass;
  }
}

// ---- sums over images, in the last block of a level ----

template <bool kStudent, class Acc>
__device__ __forceinline__ void total(const Launch<Acc>& launch, int l, double* shared) {
  const Level<Acc>& level = launch.level[l];
  const double* sums = launch.sums + 2 * int64_t(launch.plan[l].first_image);
  double loss = 0, mass = 0;
  for (int64_t n = threadIdx.x; n < level.images; n += kThreads) {
    if constexpr (kStudent) loss += __ldcg(sums + 2 * n);
    mass += __ldcg(sums + 2 * n + 1);
  }
  if constexpr (kStudent) loss = combine(loss, shared, Add());
  mass = combine(mass, shared, Add());
  if (threadIdx.x != 0) return;
  if constexpr (kStudent) {
    launch.mass[l] = Acc(mass);
    launch.losses[l] = Acc(launch.weight[l] * loss / divisor(level, launch.options.divisor, mass));
  } else {
    launch.score_mass[l] = mass;
  }
}

template <class E, bool kEntropy, bool kStudent, class Acc>
__device__ __forceinline__ void measure_and_weigh(const Launch<Acc>& launch) {
  constexpr int V = kVector<E, Acc>, kMost = V > kThreadCells<Acc> ? V : kThreadCells<Acc>;  // cells per thread
  __shared__ Acc parts[(kEntropy ? 4 : 2) * kMost * kRowLength<kMost>];
  __shared__ double shared[kThreads];
  const Tile tile = find_tile(launch, V);
  const Level<Acc>& level = launch.level[tile.level];
  const Plan& plan = launch.plan[tile.level];
  if (V > 1 && plan.vector)
    plan.channels_last ? measure_tile<E, Patch<true, V, Acc, kStudent>, kEntropy>(launch, level, tile, parts)
                       : measure_tile<E, Patch<false, V, Acc, kStudent>, kEntropy>(launch, level, tile, parts);
  else
    plan.channels_last ? measure_tile<E, Patch<true, 1, Acc, kStudent>, kEntropy>(launch, level, tile, parts)
                       : measure_tile<E, Patch<false, 1, Acc, kStudent>, kEntropy>(launch, level, tile, parts);
  const int64_t image = plan.first_image + tile.image;
  if (!comes_last(launch.images_done + image, unsigned(plan.tiles))) return;
  weigh<kStudent>(launch, level, tile.image, launch.sums + 2 * image, shared);
  if (!comes_last(launch.levels_done + tile.level, unsigned(level.images))) return;
  total<kStudent>(launch, tile.level, shared);
}

template <class E, bool kEntropy, class Acc>
__global__ void __launch_bounds__(kThreads, kBlocks<kEntropy>) forward(const __grid_constant__ Launch<Acc> launch) {
  measure_and_weigh<E, kEntropy, true>(launch);
}

template <class E, bool kEntropy, class Acc>
__global__ void __launch_bounds__(kThreads, kBlocks<kEntropy>) score(const __grid_constant__ Launch<Acc> launch) {
  measure_and_weigh<E, kEntropy, false>(launch);
}

}  // namespace fastkd::cuda
