// The C++ backend on CUDA: the card, its current stream, registration.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <iterator>
#include <string>

#include "launch.cuh"

// Only libtorch_cuda has it: weak, so that the extension also loads under a torch without CUDA.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret);

namespace fastkd::cuda {
namespace {

constexpr int kArchs[] = {FASTKD_CUDA_ARCHS};  // by setup.py, such as 80, 90; of the last there is PTX too

// Machine code runs on cards of its major version and no smaller minor; PTX on whatever is not older.
constexpr bool has_code(int capability) {
  for (const int arch : kArchs)
    if (arch / 10 == capability / 10 && arch <= capability) return true;
  return kArchs[std::size(kArchs) - 1] <= capability;
}

void require_code(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (has_code(10 * major + minor)) return;
  std::string archs;
  for (const int arch : kArchs) archs += " " + std::to_string(arch);
  STD_TORCH_CHECK(false, "fastkd: this card has compute capability ", 10 * major + minor,
                  ", and the extension code for", archs,
                  " only; build it again with FASTKD_CUDA_ARCH=", 10 * major + minor);
}

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
  static void require(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "fastkd: the CUDA kernels were called with tensors that are not on a CUDA device");
    require_code(x.get_device_index());
  }

  template <class Acc>
  static void forward(Call<Acc>& call, const Tensor& like, int64_t cells, Acc* losses, Acc* mass) {
    const OnDeviceOf guard(like);
    launch_forward(call, like, cells, losses, mass, current_stream(like.get_device_index()));
  }

  template <class Acc>
  static void backward(Call<Acc>& call, const Tensor& like, const Acc* upstream, int64_t stride, const Acc* mass) {
    const OnDeviceOf guard(like);
    launch_backward(call, upstream, stride, mass, current_stream(like.get_device_index()));
  }
};

}  // namespace
}  // namespace fastkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("distill_cpp", TORCH_BOX(&fastkd::distill<fastkd::cuda::Cuda>));
  m.impl("distill_cpp_backward", TORCH_BOX(&fastkd::distill_backward<fastkd::cuda::Cuda>));
}
