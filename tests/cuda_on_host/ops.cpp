// The CUDA kernels and their launches, compiled for the host: fastkd_on_host::distill_cpp computes on CPU tensors.
#include "cuda_runtime.h"

#include "../../csrc/cuda/launch.cuh"

namespace fastkd::cuda {

struct OnHost {
  static constexpr bool kOnePass = false;

  static void require(const Tensor&) {}

  template <class Acc>
  static void forward(Call<Acc>& call, const Tensor& like, int64_t cells, Acc* losses, Acc* mass) {
    launch_forward(call, like, cells, losses, mass, nullptr);
  }
  template <class Acc>
  static void backward(Call<Acc>& call, const Tensor&, const Acc* upstream, int64_t stride, const Acc* assumed,
                       const Acc* mass) {
    launch_backward(call, upstream, stride, assumed, mass, nullptr);
  }
};

}  // namespace fastkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fastkd_on_host, CPU, m) {
  m.impl("distill_cpp", TORCH_BOX(&fastkd::distill<fastkd::cuda::OnHost>));
  m.impl("distill_cpp_backward", TORCH_BOX(&fastkd::distill_backward<fastkd::cuda::OnHost>));
  m.impl("distill_cpp_backward_into", TORCH_BOX(&fastkd::distill_backward_into<fastkd::cuda::OnHost>));
}
