// Turns an error of the CUDA runtime into an exception.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

namespace fastkd::cuda {

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastkd: CUDA: ", cudaGetErrorString(error));
}

}  // namespace fastkd::cuda
