// The device of a tensor, and its current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "error.cuh"

// Only libtorch_cuda defines it. It is weak, so that the extension also loads with a torch without CUDA.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret);

namespace fastkd::cuda {

// Makes the device of a tensor current until the end of the scope.
struct OnDeviceOf {
  explicit OnDeviceOf(const torch::stable::Tensor& x) : guard(x.get_device_index()) {
    check(cudaSetDevice(x.get_device_index()));  // the extension's own CUDA runtime does not see torch's choice
  }
  torch::stable::accelerator::DeviceGuard guard;
};

inline cudaStream_t current_stream(const torch::stable::Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "fastkd: this torch has no CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fastkd::cuda
