// Forward: losses, masses and maps of all levels in one launch.
//
// Every block measures its tile: score e and penalty sum D of each cell, in one read of student and teacher. The block
// that comes last of an image, by an integer ticket, turns the image's scores into weights w and sums w D and w; the
// one that comes last of a level adds its images up. Who comes last changes nothing: each sum has one fixed order.
//
// Must move, for an element of b bytes: 2 b (student and teacher once), and per cell 36 bytes of e, D (written, read
// back from L2) and w: under 2 % of it from 512 channels of bfloat16 on. Must do 6 operations an element (l2, energy:
// bias, difference, 2 multiply-adds, and 2 to standardise; 2 more choose the score) and 2 conversions; entropy
// about 25. One unit being the bytes of all student features, the floor is 2 units / bandwidth: an SM of an H200 has 24
// lane-operations a pair of bfloat16 until memory brings the next.
//
// The score pass is the same without student and D, before one pass (stream.cuh): maps and their sums w alone, 1 unit.
#pragma once

#include "tile.cuh"

namespace fastkd::cuda {

// ---- measure ----

// Sums of one thread over its channels, by cell. An entropy is that of a softmax kept online: highest value so far,
// sum of exp(u) and of u exp(u), u being the logit below the highest.
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
    if (top[i] != highest[i]) {  // what was summed so far moves down by u
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

// |t| or t^2, without a branch: straight code needs the fewest registers.
template <class Acc>
__device__ __forceinline__ Acc score_of(Acc t, bool energy) {
  const Acc size = score_term<Score::magnitude>(t);
  return size * (energy ? size : Acc(1));
}

// Adds up a patch, then that to the sums: chains of additions stay short, and their rounding small.
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

// Where threads leave their sums: [value][cell of the thread][thread]. The padding keeps the reads of consecutive
// cells, several of which are of one thread, in different banks.
template <int kCells>
constexpr int kRowLength = kThreads + 32 / kCells;

// e of a cell from its parts, see Sums
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

// Adds the threads' sums of each cell of the tile up, in double, and writes e and D.
template <class P, int kCells, bool kEntropy, class Acc>
__device__ __forceinline__ void join(const Launch<Acc>& launch, const Level<Acc>& level, const Tile& tile,
                                     const Acc* shared) {
  constexpr int kLength = kRowLength<kCells>, kStep = kCells * kLength;
  constexpr bool kLast = P::kChannelsLast;
  const int parts = kLast ? tile.lanes : tile.groups, units = kLast ? tile.groups : tile.lanes;
  const int64_t first = tile.image * level.cells() + tile.begin, left = level.cells() - tile.begin;
  for (int j = int(threadIdx.x); j < units * kCells && j < left; j += kThreads) {
    const int unit = j / kCells;  // a cell's parts: one thread of each lane (channels_last) or group
    const auto thread = [&](int p) {
      const int part = (p + unit) & (parts - 1);  // each cell begins elsewhere: again for the banks
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

// ---- weigh, in the image's last block ----

// A NaN spoils its whole image, as in PyTorch: so it is lower and higher than any number.
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

// The normaliser of one image; reads what other blocks wrote, hence past the L1 cache.
template <class Acc>
__device__ __forceinline__ Weight<Acc> normaliser(const Options& options, const double* e, int64_t cells,
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

// Writes the image's map, and its sums of w D (with the student) and w.
template <bool kStudent, class Acc>
__device__ __forceinline__ void weigh(const Launch<Acc>& launch, const Level<Acc>& level, int64_t image, double* sums,
                                      double* shared) {
  const int64_t cells = level.cells(), first = image * cells;
  const double *e = level.score + first, *d = level.distance + first;
  const Weight<Acc> weight = normaliser<Acc>(launch.options, e, cells, shared);
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

// ---- add images up, in the level's last block ----

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
  constexpr int V = kVector<E, Acc>, kMost = V > kThreadCells<Acc> ? V : kThreadCells<Acc>;  // cells of a thread
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
