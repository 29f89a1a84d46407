// Just enough of CUDA to run our kernels on the host: a block's threads are fibers that hand over at __syncthreads.
// Threads run in an order that changes from barrier to barrier, and blocks in one that changes from launch to launch,
// so that a missing barrier or a sum that depends on order shows. It says nothing of memory fences or of time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx;

namespace on_host {

struct Block {
  std::vector<ucontext_t> fibers;
  std::vector<std::vector<char>> stacks;
  std::vector<char> done;
  ucontext_t scheduler;
  unsigned current = 0;
  std::function<void()> body;
  std::mt19937 random{0};
};
inline Block block;

inline void fiber() {
  block.body();
  block.done[block.current] = 1;
  swapcontext(&block.fibers[block.current], &block.scheduler);
}

inline std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), block.random);
  return order;
}

inline void run_block(unsigned threads) {
  block.fibers.resize(threads);
  block.stacks.resize(threads, std::vector<char>(64 << 10));
  block.done.assign(threads, 0);
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&block.fibers[t]);
    block.fibers[t].uc_stack.ss_sp = block.stacks[t].data();
    block.fibers[t].uc_stack.ss_size = block.stacks[t].size();
    makecontext(&block.fibers[t], fiber, 0);
  }
  for (;;) {
    for (const unsigned t : shuffled(threads)) {
      block.current = threadIdx.x = t;
      swapcontext(&block.scheduler, &block.fibers[t]);
    }
    const auto ended = std::count(block.done.begin(), block.done.end(), 1);
    if (ended == threads) return;
    if (ended) std::fputs("some threads ended while others wait at a barrier\n", stderr), std::abort();
  }
}

}  // namespace on_host

inline void __syncthreads() { swapcontext(&on_host::block.fibers[on_host::block.current], &on_host::block.scheduler); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* x, unsigned y) { return (*x += y) - y; }
inline double __ldcg(const double* x) { return *x; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline double __dsub_rn(double x, double y) { return x - y; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return std::memset(data, value, bytes), cudaSuccess;
}
template <class Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments),
                               const Arguments& arguments) {
  on_host::block.body = [&] { kernel(arguments); };
  for (const unsigned b : on_host::shuffled(config->gridDim.x)) {
    blockIdx.x = b;
    on_host::run_block(config->blockDim.x);
  }
  return cudaSuccess;
}
