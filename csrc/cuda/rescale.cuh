// Rescale: multiplies the gradients of the one pass, which are for an upstream gradient of 1, by the actual one:
// ds = upstream * ds.
//
// If the upstream gradient is not 1, it must move 2 b bytes per element of b bytes, which are 2 units (one unit is the
// bytes of all student features), and do 1 operation per element; else nothing. A launch has few blocks, as it usually
// ends at once.
#pragma once

#include "stream.cuh"

namespace fastkd::cuda {

constexpr int kMaxGradients = 64;  // per launch

struct Gradient {
  void* data = nullptr;
  int64_t count = 0;
  int64_t upstream = 0;  // offset of its upstream gradient
  DType dtype = DType::float32;
};

struct RescaleLaunch {
  Gradient gradient[kMaxGradients];
  int count = 0;
  const void* upstream = nullptr;
  bool upstream_is_double = false;
};
static_assert(sizeof(RescaleLaunch) <= 4096, "more than a kernel's parameters");

// Rescales elements [first, count) in packs of V; a last pack that is not full is left out.
template <class E, int V>
__device__ __forceinline__ void rescale_packs(const Gradient& gradient, int64_t first, float upstream) {
  const int64_t packs = (gradient.count - first) / V, threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += kPacks * threads) {
    Raw<E, V> raw[kPacks] = {};
#pragma unroll
    for (int j = 0; j < kPacks; ++j)
      if (i + j * threads < packs) raw[j] = read<E, V>(gradient.data, first + (i + j * threads) * V);
#pragma unroll
    for (int j = 0; j < kPacks; ++j)
      if (i + j * threads < packs) {
#pragma unroll
        for (int v = 0; v < V; ++v) set<E, V>(raw[j], v, get<E, V>(raw[j], v) * upstream);
        write<E, V>(raw[j], gradient.data, first + (i + j * threads) * V);
      }
  }
}

template <class E>
__device__ __forceinline__ void rescale_gradient(const Gradient& gradient, float upstream) {
  constexpr int V = kVector<E, float>;
  const bool wide = reinterpret_cast<uintptr_t>(gradient.data) % 16 == 0;
  if (wide) rescale_packs<E, V>(gradient, 0, upstream);
  rescale_packs<E, 1>(gradient, wide ? gradient.count / V * V : 0, upstream);
}

__global__ void __launch_bounds__(kThreads, 4) rescale(const __grid_constant__ RescaleLaunch launch) {
  for (int i = 0; i < launch.count; ++i) {
    const Gradient& gradient = launch.gradient[i];
    const float upstream = launch.upstream_is_double
                               ? float(static_cast<const double*>(launch.upstream)[gradient.upstream])
                               : static_cast<const float*>(launch.upstream)[gradient.upstream];
    if (upstream == 1) continue;
    if (gradient.dtype == DType::bfloat16)
      rescale_gradient<BFloat16>(gradient, upstream);
    else
      rescale_gradient<float>(gradient, upstream);
  }
}

}  // namespace fastkd::cuda
