// Just enough of CUDA to run our kernels on the host: a block's threads are fibers that hand over at __syncthreads, and
// at shuffles, where those of a warp wait for each other.
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
inline dim3 threadIdx, blockIdx, gridDim;
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace on_host {

enum State : char { runs, at_barrier, at_shuffle, ended };

struct Block {
  std::vector<ucontext_t> fibers;
  std::vector<std::vector<char>> stacks;
  std::vector<State> state;
  std::vector<double> shuffled;  // what each thread offers to its warp
  ucontext_t scheduler;
  unsigned current = 0;
  std::function<void()> body;
  std::mt19937 random{0};
};
inline Block block;

inline void stop(State state) {
  block.state[block.current] = state;
  swapcontext(&block.fibers[block.current], &block.scheduler);
}

inline void fiber() {
  block.body();
  stop(ended);
}

// Lets threads [begin, end) run again if all of them wait in this state.
inline bool release(unsigned begin, unsigned end, State state) {
  const auto first = block.state.begin() + begin, last = block.state.begin() + end;
  if (!std::all_of(first, last, [&](State s) { return s == state; })) return false;
  std::fill(first, last, runs);
  return true;
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
  block.state.assign(threads, runs);
  block.shuffled.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&block.fibers[t]);
    block.fibers[t].uc_stack.ss_sp = block.stacks[t].data();
    block.fibers[t].uc_stack.ss_size = block.stacks[t].size();
    makecontext(&block.fibers[t], fiber, 0);
  }
  for (bool released = true; released;) {
    for (const unsigned t : shuffled(threads)) {
      if (block.state[t] != runs) continue;
      block.current = threadIdx.x = t;
      swapcontext(&block.scheduler, &block.fibers[t]);
    }
    released = release(0, threads, at_barrier);
    for (unsigned t = 0; t < threads; t += 32) released |= release(t, std::min(t + 32, threads), at_shuffle);
  }
  if (!std::all_of(block.state.begin(), block.state.end(), [](State s) { return s == ended; }))
    std::fputs("some threads wait where others do not come\n", stderr), std::abort();
}

}  // namespace on_host

inline void __syncthreads() { on_host::stop(on_host::at_barrier); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* x, unsigned y) { return (*x += y) - y; }
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  const unsigned me = threadIdx.x;
  on_host::block.shuffled[me] = double(x);
  on_host::stop(on_host::at_shuffle);
  const T got = T(on_host::block.shuffled[me ^ unsigned(mask)]);
  on_host::stop(on_host::at_shuffle);  // before the next one overwrites it
  return got;
}
template <class T>
T __ldg(const T* x) {
  return *x;
}
template <class T>
T __ldcg(const T* x) {
  return *x;
}
template <class T>
T __ldcs(const T* x) {
  return *x;
}
template <class T>
void __stcs(T* x, T value) {
  *x = value;
}
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
  gridDim = config->gridDim;
  for (const unsigned b : on_host::shuffled(config->gridDim.x)) {
    blockIdx.x = b;
    on_host::run_block(config->blockDim.x);
  }
  return cudaSuccess;
}
