// The CUDA kernels and their launches, compiled for the host: the ops of fastkd_on_host compute on CPU tensors.
#include "cuda_runtime.h"

#include "../../csrc/cuda/launch.cuh"

namespace fastkd::cuda {

struct OnHost {
  static void require(const Tensor&) {}

  template <class Acc>
  static void forward(Call<Acc>& call, const Tensor& like, int64_t cells, Acc* losses, Acc* mass) {
    launch_forward(call, like, cells, losses, mass, nullptr);
  }
  template <class Acc>
  static void backward(Call<Acc>& call, const Tensor&, const Acc* upstream, int64_t stride, const Acc* mass) {
    launch_backward(call, upstream, stride, mass, nullptr);
  }
  template <class Acc>
  static void one_pass(Call<Acc>& call, const Tensor& like, int64_t cells, const double* masses, const float* factor,
                       Acc* total, Acc* losses) {
    if constexpr (std::is_same_v<Acc, float>)
      launch_one_pass(call, like, cells, masses, factor, total, losses, nullptr);
    else
      STD_TORCH_CHECK(false, "one pass: on a GPU features must be bfloat16 or float32");
  }
  static void rescale(Tensor upstream, Tensors gradients) { launch_rescale(upstream, gradients, 8, nullptr); }
};

}  // namespace fastkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fastkd_on_host, CPU, m) {
  m.impl("distill_cpp", TORCH_BOX(&fastkd::distill<fastkd::cuda::OnHost>));
  m.impl("distill_cpp_backward", TORCH_BOX(&fastkd::distill_backward<fastkd::cuda::OnHost>));
  m.impl("distill_cpp_one_pass", TORCH_BOX(&fastkd::distill_one_pass<fastkd::cuda::OnHost>));
  m.impl("distill_cpp_rescale", TORCH_BOX(&fastkd::cuda::OnHost::rescale));
}
