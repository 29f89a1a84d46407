// Scratch and launches of the CUDA kernels, in the order of a stream. Nothing here waits for the device or reads from
// it.
#pragma once

#include <cuda_runtime.h>

#include <limits>

#include "../op.h"
#include "backward.cuh"
#include "forward.cuh"

namespace fastkd::cuda {

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastkd: CUDA: ", cudaGetErrorString(error));
}

template <class Acc>
using Kernel = void (*)(const Launch<Acc>);

template <class Acc>
void run(Kernel<Acc> kernel, int blocks, const Launch<Acc>& launch, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, launch));
  check(cudaGetLastError());
}

// Calls f with a value of the element type that all features have, or of Any.
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

// Under a beta of 1e-20 smooth_l1 is l1 to the last bit of a sum; what is divided by it later must not overflow.
inline Options usable(Options options) {
  if (options.beta < 1e-20) options.beta = 1e-20;
  return options;
}

// Lays levels out over launches, kMaxLevels each, and calls f(launch, blocks) for those that have blocks.
template <int V, class Acc, class F>
void each_launch(const Call<Acc>& call, Launch<Acc> launch, const F& f) {
  int64_t images = 0;
  for (size_t begin = 0; begin < call.levels.size(); begin += kMaxLevels) {
    int64_t blocks = 0;
    launch.count = smaller(kMaxLevels, int(call.levels.size() - begin));
    for (int i = 0; i < launch.count; ++i) {
      launch.level[i] = call.levels[begin + size_t(i)];
      launch.weight[i] = call.weights[begin + size_t(i)];
      STD_TORCH_CHECK(launch.level[i].channels <= std::numeric_limits<int>::max() / 2, "too many channels");
      Plan plan = make_plan(launch.level[i], V);
      plan.first_block = int(blocks);
      plan.first_image = int(images);
      launch.plan[i] = plan;
      images += launch.level[i].images;
      blocks += launch.level[i].images * plan.tiles;
      STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max() && images <= std::numeric_limits<int>::max(),
                      "fastkd: more cells than a launch has blocks for; split the batch");
    }
    if (blocks) f(launch, int(blocks), int64_t(begin));
  }
}

template <class Acc>
void launch_forward(Call<Acc>& call, const Tensor& like, int64_t cells, Acc* losses, Acc* mass, cudaStream_t stream) {
  const int64_t count = int64_t(call.levels.size());
  int64_t images = 0;
  bool empty = false;
  for (const auto& level : call.levels) {
    images += level.images;
    empty |= level.images == 0 || level.channels == 0 || level.cells() == 0;
  }
  if (empty) {  // no block writes the sums of a level without cells
    check(cudaMemsetAsync(losses, 0, size_t(count) * sizeof(Acc), stream));
    check(cudaMemsetAsync(mass, 0, size_t(count) * sizeof(Acc), stream));
  }
  if (cells == 0) return;
  // e, D: one double a cell; loss and mass: one double an image; tickets: one 32-bit integer an image and a level
  const Tensor scratch =
      torch::stable::new_empty(like, {2 * cells + 2 * images + (images + count + 1) / 2}, ScalarType::Double);
  double* at = static_cast<double*>(scratch.mutable_data_ptr());
  for (auto& level : call.levels) {
    level.score = at;
    level.distance = at + cells;
    at += level.images * level.cells();
  }
  Launch<Acc> launch;
  launch.options = usable(call.options);
  launch.normalizer = call.normalizer;
  const double largest = double(std::numeric_limits<Acc>::max());
  launch.inverse_temperature = 1 / call.options.temperature < largest ? 1 / call.options.temperature : largest;
  launch.sums = at + cells;
  launch.images_done = reinterpret_cast<unsigned*>(launch.sums + 2 * images);
  check(cudaMemsetAsync(launch.images_done, 0, size_t(images + count) * sizeof(unsigned), stream));
  with_type<Acc>(call.levels, [&](auto type) {
    using E = decltype(type);
    each_launch<kVector<E, Acc>>(call, launch, [&](Launch<Acc>& part, int blocks, int64_t begin) {
      part.levels_done = launch.images_done + images + begin;
      part.losses = losses + begin;
      part.mass = mass + begin;
      const bool entropy = call.options.score == Score::entropy;
      run<Acc>(entropy ? forward<E, true, Acc> : forward<E, false, Acc>, blocks, part, stream);
    });
  });
}

template <class Acc>
void launch_backward(Call<Acc>& call, const Acc* upstream, int64_t stride, const Acc* assumed, const Acc* mass,
                     cudaStream_t stream) {
  for (auto& level : call.levels)
    if (!level.grad.data) level.images = 0;  // nobody asks for its gradient
  Launch<Acc> launch;
  launch.options = usable(call.options);
  launch.normalizer = call.normalizer;
  launch.upstream_stride = stride;
  with_type<Acc>(call.levels, [&](auto type) {
    using E = decltype(type);
    each_launch<kVector<E, Acc>>(call, launch, [&](Launch<Acc>& part, int blocks, int64_t begin) {
      part.upstream = upstream + begin * stride;
      part.assumed = assumed ? assumed + begin : nullptr;
      part.forward_mass = mass + begin;
      run<Acc>(backward<E, Acc>, blocks, part, stream);
    });
  });
}

}  // namespace fastkd::cuda
