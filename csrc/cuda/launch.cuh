// Scratch memory and launches of the CUDA kernels, in stream order. Nothing here waits for the device or reads from it.
#pragma once

#include <cuda_runtime.h>

#include <limits>
#include <utility>

#include "../op.h"
#include "backward.cuh"
#include "error.cuh"
#include "forward.cuh"
#include "rescale.cuh"
#include "stream.cuh"

namespace fastkd::cuda {

template <class L>
void run(void (*kernel)(const L), int64_t blocks, const L& launch, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, launch));
  check(cudaGetLastError());
}

// Calls f with a value of the element type that all features have, or with Any.
template <class Acc, class F>
void with_type(const std::vector<Level<Acc>>& levels, const F& f) {
  const DType first = levels[0].student.dtype;
  bool same = std::is_same_v<Acc, float>;
  for (const auto& level : levels) same &= level.student.dtype == first && level.teacher.dtype == first;
  if constexpr (std::is_same_v<Acc, float>) {
    if (same && first == DType::float16) return f(Half());
    if (same && first == DType::bfloat16) return f(BFloat16());
    if (same && first == DType::float32) return f(float());
  }
  f(Any());
}

// Sets beta to at least 1e-20: below that smooth_l1 equals l1 in float, and a division by beta could overflow.
inline Options clamp_beta(Options options) {
  if (options.beta < 1e-20) options.beta = 1e-20;
  return options;
}

// Distributes levels over launches of at most kMaxLevels, and calls f(launch, blocks, first level) for each launch with
// blocks. plan_of(level, index) returns the layout of a level and may normalise its strides.
template <class L, class Acc, class PlanOf, class F>
void each_launch(const Call<Acc>& call, L launch, const PlanOf& plan_of, const F& f) {
  int64_t images = 0;
  for (size_t begin = 0; begin < call.levels.size(); begin += kMaxLevels) {
    int64_t blocks = 0;
    launch.count = int(smaller(kMaxLevels, int64_t(call.levels.size() - begin)));
    for (int i = 0; i < launch.count; ++i) {
      const size_t l = begin + size_t(i);
      launch.level[i] = call.levels[l];
      launch.weight[i] = call.weights[l];
      STD_TORCH_CHECK(launch.level[i].channels <= std::numeric_limits<int>::max() / 2, "too many channels");
      launch.plan[i] = plan_of(launch.level[i], l);
      launch.plan[i].first_block = int(blocks);
      launch.plan[i].first_image = int(images);
      images += launch.level[i].images;
      blocks += launch.level[i].images * launch.plan[i].tiles;
      STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max() && images <= std::numeric_limits<int>::max(),
                      "fastkd: more cells than a launch has blocks for; split the batch");
    }
    if (blocks) f(launch, blocks, int64_t(begin));
  }
}

template <class E, class Acc>
auto plan_by_tiles() {
  return [](Level<Acc>& level, size_t) { return make_plan(level, kVector<E, Acc>); };
}

template <class Acc>
int64_t all_images(const std::vector<Level<Acc>>& levels) {
  int64_t images = 0;
  for (const auto& level : levels) images += level.images;
  return images;
}

template <class Acc>
bool is_empty(const Level<Acc>& level) {
  return level.images == 0 || level.channels == 0 || level.cells() == 0;
}

inline double* doubles(const Tensor& scratch) { return static_cast<double*>(scratch.mutable_data_ptr()); }

// Launches the forward, or without the student the score pass. `outputs` has the pointers for the results.
template <bool kStudent, class E, class Acc>
void launch_measure(Call<Acc>& call, const Tensor& like, int64_t cells, const Launch<Acc>& outputs,
                    cudaStream_t stream) {
  const int64_t count = int64_t(call.levels.size()), images = all_images(call.levels);
  // e, D: a double per cell; loss and mass: a double per image; tickets: 32-bit integers per image and per level
  const Tensor scratch = torch::stable::new_empty(
      like, {(kStudent ? 2 : 1) * cells + 2 * images + ceil_div(images + count, 2)}, ScalarType::Double);
  double* at = doubles(scratch);
  for (auto& level : call.levels) {
    level.score = at;
    level.distance = kStudent ? at + cells : nullptr;
    at += level.images * level.cells();
  }
  Launch<Acc> launch = outputs;
  launch.options = clamp_beta(call.options);
  const double largest = double(std::numeric_limits<Acc>::max());
  launch.inverse_temperature = 1 / call.options.temperature < largest ? 1 / call.options.temperature : largest;
  launch.sums = at + (kStudent ? cells : 0);
  launch.images_done = reinterpret_cast<unsigned*>(launch.sums + 2 * images);
  check(cudaMemsetAsync(launch.images_done, 0, size_t(images + count) * sizeof(unsigned), stream));
  each_launch(call, launch, plan_by_tiles<E, Acc>(), [&](Launch<Acc>& part, int64_t blocks, int64_t begin) {
    part.levels_done = launch.images_done + images + begin;
    const bool entropy = call.options.score == Score::entropy;
    if constexpr (kStudent) {
      part.losses = outputs.losses + begin;
      part.mass = outputs.mass + begin;
      run(entropy ? forward<E, true, Acc> : forward<E, false, Acc>, blocks, part, stream);
    } else {
      part.score_mass = outputs.score_mass + begin;
      run(entropy ? score<E, true, Acc> : score<E, false, Acc>, blocks, part, stream);
    }
  });
}

template <class Acc>
void launch_forward(Call<Acc>& call, const Tensor& like, int64_t cells, Acc* losses, Acc* mass, cudaStream_t stream) {
  for (const auto& level : call.levels)
    if (is_empty(level)) {  // no block writes the results of a level without cells
      check(cudaMemsetAsync(losses, 0, call.levels.size() * sizeof(Acc), stream));
      check(cudaMemsetAsync(mass, 0, call.levels.size() * sizeof(Acc), stream));
      break;
    }
  if (cells == 0) return;
  Launch<Acc> outputs;
  outputs.losses = losses;
  outputs.mass = mass;
  with_type<Acc>(call.levels,
                 [&](auto type) { launch_measure<true, decltype(type)>(call, like, cells, outputs, stream); });
}

template <class Acc>
void launch_backward(Call<Acc>& call, const Acc* upstream, int64_t stride, const Acc* mass, cudaStream_t stream) {
  for (auto& level : call.levels)
    if (!level.grad.data) level.images = 0;  // its gradient is not wanted
  Launch<Acc> launch;
  launch.options = clamp_beta(call.options);
  launch.upstream_stride = stride;
  with_type<Acc>(call.levels, [&](auto type) {
    using E = decltype(type);
    each_launch(call, launch, plan_by_tiles<E, Acc>(), [&](Launch<Acc>& part, int64_t blocks, int64_t begin) {
      part.upstream = upstream + begin * stride;
      part.forward_mass = mass + begin;
      run(backward<E, Acc>, blocks, part, stream);
    });
  });
}

// ---- one pass ----

// Computes the maps of all levels and their sums, from the teacher alone. The returned memory has the sums, then the
// maps, which the levels point to.
template <class E>
Tensor launch_score(Call<float>& call, const Tensor& like, int64_t cells, cudaStream_t stream) {
  const auto maps_of = [](const Level<float>& level) { return ceil_div(level.images * level.cells(), 4) * 4; };
  const int64_t count = ceil_div(int64_t(call.levels.size()), 2) * 2;  // even, so that each map is aligned
  int64_t floats = 0;
  for (const auto& level : call.levels) floats += maps_of(level);
  const Tensor memory = torch::stable::new_empty(like, {count + floats / 2}, ScalarType::Double);
  float* map = reinterpret_cast<float*>(doubles(memory) + count);
  Call<float> teacher = call;
  for (size_t l = 0; l < call.levels.size(); ++l) {
    call.levels[l].map = teacher.levels[l].map = map;
    map += maps_of(call.levels[l]);
    teacher.levels[l].student = teacher.levels[l].teacher;  // the teacher alone determines the layout
    teacher.levels[l].grad = {};
  }
  Launch<float> outputs;
  outputs.score_mass = doubles(memory);
  launch_measure<false, E>(teacher, like, cells, outputs, stream);
  return memory;
}

inline void require_dense(const std::vector<Level<float>>& levels) {
  const DType dtype = levels[0].student.dtype;
  for (const auto& level : levels) {
    STD_TORCH_CHECK(
        level.student.dtype == dtype && level.teacher.dtype == dtype && (!level.grad.data || level.grad.dtype == dtype),
        "one pass: features and gradients must have one dtype");
    STD_TORCH_CHECK(is_empty(level) || are_dense(level, true) || are_dense(level, false),
                    "one pass: features and gradients of a level must be dense and of one layout");
    STD_TORCH_CHECK(level.cells() <= std::numeric_limits<int>::max() / 2, "too many cells");
  }
}

// Clears the results that no block writes: losses and bias gradients of levels without cells, and the total if all are.
inline void clear_empty(const Call<float>& call, float* total, float* losses, cudaStream_t stream) {
  bool any = false;
  for (const auto& level : call.levels) {
    if (!is_empty(level)) continue;
    any = true;
    if (level.bias_grad) check(cudaMemsetAsync(level.bias_grad, 0, size_t(level.channels) * sizeof(float), stream));
  }
  if (!any) return;
  check(cudaMemsetAsync(losses, 0, call.levels.size() * sizeof(float), stream));
  check(cudaMemsetAsync(total, 0, sizeof(float), stream));
}

// Allocates the scratch memory of a launch, sets the pointers in launch and plans, and clears counters and losses.
inline Tensor set_scratch(StreamLaunch& launch, const std::vector<Level<float>>& levels, std::vector<StreamPlan>& plans,
                          const Tensor& like, cudaStream_t stream) {
  const int64_t count = int64_t(levels.size()), images = all_images(levels);
  const int64_t zeros = count + ceil_div(images + count + 1, 2);  // losses of levels; 32-bit tickets
  const auto columns = [&](size_t l) { return ceil_div(levels[l].images * plans[l].tiles * levels[l].channels, 2); };
  int64_t size = zeros + images;
  for (size_t l = 0; l < levels.size(); ++l) {
    size += levels[l].images * plans[l].tiles;
    if (levels[l].bias_grad) size += levels[l].images * levels[l].channels + columns(l);
  }
  const Tensor scratch = torch::stable::new_empty(like, {size}, ScalarType::Double);
  double* at = doubles(scratch);
  const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
  check(cudaMemsetAsync(at, 0, size_t(zeros) * sizeof(double), stream));
  launch.call_losses = take(count);
  launch.images_done = reinterpret_cast<unsigned*>(take(zeros - count));
  launch.call_done = launch.images_done + images + count;
  launch.image_losses = take(images);
  for (size_t l = 0; l < levels.size(); ++l) {
    if (!levels[l].bias_grad) continue;
    plans[l].image_columns = take(levels[l].images * levels[l].channels);
    plans[l].tile_columns = reinterpret_cast<float*>(take(columns(l)));
  }
  launch.tile_losses = at;
  return scratch;
}

template <class E>
void launch_stream(const Call<float>& call, const Tensor& like, const double* masses, const float* factor, float* total,
                   float* losses, cudaStream_t stream) {
  StreamLaunch launch;
  std::vector<StreamPlan> plans;
  for (const auto& level : call.levels) {
    plans.push_back(make_stream_plan(level, kVector<E, float>));
    launch.levels_with_cells += plans.back().tiles > 0;
  }
  const Tensor scratch = set_scratch(launch, call.levels, plans, like, stream);
  launch.levels = int(call.levels.size());
  launch.options = clamp_beta(call.options);
  launch.factor = factor;
  launch.total = total;
  constexpr decltype(&stream_pass<E, Penalty::l2>) kernels[] = {
      stream_pass<E, Penalty::l2>, stream_pass<E, Penalty::l1>, stream_pass<E, Penalty::smooth_l1>};
  const auto plan_of = [&](const Level<float>&, size_t l) { return plans[l]; };
  double* tile_losses = launch.tile_losses;
  each_launch(call, launch, plan_of, [&](StreamLaunch& part, int64_t blocks, int64_t begin) {
    part.tile_losses = std::exchange(tile_losses, tile_losses + blocks);
    part.levels_done = launch.call_done - launch.levels + begin;
    part.level_losses = launch.call_losses + begin;
    part.losses = losses + begin;
    part.mass = masses ? masses + begin : nullptr;
    run(kernels[int(call.options.penalty)], blocks, part, stream);
  });
}

// Launches the one pass. If `masses` is null, those of the score pass are used, or none are needed.
inline void launch_one_pass(Call<float>& call, const Tensor& like, int64_t cells, const double* masses,
                            const float* factor, float* total, float* losses, cudaStream_t stream) {
  require_dense(call.levels);
  clear_empty(call, total, losses, stream);
  if (cells == 0) return;
  const auto as = [&](auto type) {
    using E = decltype(type);
    if (call.options.weights_are_known()) return launch_stream<E>(call, like, masses, factor, total, losses, stream);
    const Tensor scores = launch_score<E>(call, like, cells, stream);
    launch_stream<E>(call, like, masses ? masses : doubles(scores), factor, total, losses, stream);
  };
  switch (call.levels[0].student.dtype) {
    case DType::bfloat16: return as(BFloat16());
    case DType::float32: return as(float());
    default: STD_TORCH_CHECK(false, "one pass: on a GPU features must be bfloat16 or float32");
  }
}

// ---- rescale ----

inline Gradient dense_gradient(const Tensor& x) {
  int64_t extent = 1;
  for (int64_t d = 0; d < x.dim(); ++d) extent += (x.size(d) - 1) * x.stride(d);
  const DType dtype = dtype_of(x);
  STD_TORCH_CHECK(extent == x.numel() && (dtype == DType::bfloat16 || dtype == DType::float32),
                  "rescale: gradients must be dense, and bfloat16 or float32");
  return {x.mutable_data_ptr(), x.numel(), 0, dtype};
}

// Launches at most `blocks` blocks, as they usually have nothing to do.
inline void launch_rescale(const Tensor& upstream, const Tensors& gradients, int64_t blocks, cudaStream_t stream) {
  const int64_t count = upstream.numel();
  const DType dtype = dtype_of(upstream);
  STD_TORCH_CHECK(upstream.dim() <= 1 && count > 0 && (dtype == DType::float32 || dtype == DType::float64),
                  "rescale: upstream must be one number, or one for each level, float32 or float64");
  RescaleLaunch launch;
  launch.upstream = upstream.const_data_ptr();
  launch.upstream_is_double = dtype == DType::float64;
  int64_t packs = 0;
  const auto flush = [&] {
    if (launch.count) run(rescale, smaller(blocks, ceil_div(packs, kThreads * kPacks)), launch, stream);
    launch.count = 0, packs = 0;
  };
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (gradients[i].numel() == 0) continue;
    Gradient gradient = dense_gradient(gradients[i]);
    gradient.upstream = upstream.dim() ? int64_t(i) % count * upstream.stride(0) : 0;
    launch.gradient[launch.count++] = gradient;
    const int64_t mine = ceil_div(gradient.count * size_of(gradient.dtype), 16);
    packs = packs > mine ? packs : mine;
    if (launch.count == kMaxGradients) flush();
  }
  flush();
}

}  // namespace fastkd::cuda
