// The C++ backend on CUDA: device, stream and registration.
#include "device.cuh"
#include "launch.cuh"

namespace fastkd::cuda {
namespace {

struct Cuda {
  static void require(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "fastkd: the CUDA kernels were called with tensors that are not on a CUDA device");
  }

  template <class Acc>
  static void forward(Call<Acc>& call, const Tensor& like, int64_t cells, Acc* losses, Acc* mass) {
    const OnDeviceOf guard(like);
    launch_forward(call, like, cells, losses, mass, current_stream(like));
  }

  template <class Acc>
  static void backward(Call<Acc>& call, const Tensor& like, const Acc* upstream, int64_t stride, const Acc* mass) {
    const OnDeviceOf guard(like);
    launch_backward(call, upstream, stride, mass, current_stream(like));
  }

  template <class Acc>
  static void one_pass(Call<Acc>& call, const Tensor& like, int64_t cells, const double* masses, const float* factor,
                       Acc* total, Acc* losses) {
    const OnDeviceOf guard(like);
    if constexpr (std::is_same_v<Acc, float>)
      launch_one_pass(call, like, cells, masses, factor, total, losses, current_stream(like));
    else
      STD_TORCH_CHECK(false, "one pass: on a GPU features must be bfloat16 or float32");
  }
};

void rescale_gradients(Tensor upstream, Tensors gradients) {
  Cuda::require(upstream);
  require_devices(gradients, upstream);
  const OnDeviceOf guard(upstream);
  const int device = upstream.get_device_index();
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  launch_rescale(upstream, gradients, 4 * processors, current_stream(upstream));
}

}  // namespace
}  // namespace fastkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("distill_cpp", TORCH_BOX(&fastkd::distill<fastkd::cuda::Cuda>));
  m.impl("distill_cpp_backward", TORCH_BOX(&fastkd::distill_backward<fastkd::cuda::Cuda>));
  m.impl("distill_cpp_one_pass", TORCH_BOX(&fastkd::distill_one_pass<fastkd::cuda::Cuda>));
  m.impl("distill_cpp_rescale", TORCH_BOX(&fastkd::cuda::rescale_gradients));
}
