// The C++ backend on CUDA: the card, its current stream, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "launch.cuh"

// Only libtorch_cuda has it: weak, so that the extension also loads under a torch without CUDA.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret);

namespace fastkd::cuda {
namespace {

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "fastkd: this torch has no CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the tensor's device current, until the end of the scope.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& x) : guard(x.get_device_index()) {
    check(cudaSetDevice(x.get_device_index()));  // ours is a CUDA runtime of its own: it does not see torch's choice
  }
  torch::stable::accelerator::DeviceGuard guard;
};

struct Cuda {
  static constexpr bool kOnePass = false;

  static void require(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "fastkd: the CUDA kernels were called with tensors that are not on a CUDA device");
  }

  template <class Acc>
  static void forward(Call<Acc>& call, const Tensor& like, int64_t cells, Acc* losses, Acc* mass) {
    const OnDeviceOf guard(like);
    launch_forward(call, like, cells, losses, mass, current_stream(like.get_device_index()));
  }

  template <class Acc>
  static void backward(Call<Acc>& call, const Tensor& like, const Acc* upstream, int64_t stride, const Acc* assumed,
                       const Acc* mass) {
    const OnDeviceOf guard(like);
    launch_backward(call, upstream, stride, assumed, mass, current_stream(like.get_device_index()));
  }
};

}  // namespace
}  // namespace fastkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("distill_cpp", TORCH_BOX(&fastkd::distill<fastkd::cuda::Cuda>));
  m.impl("distill_cpp_backward", TORCH_BOX(&fastkd::distill_backward<fastkd::cuda::Cuda>));
  m.impl("distill_cpp_backward_into", TORCH_BOX(&fastkd::distill_backward_into<fastkd::cuda::Cuda>));
}
