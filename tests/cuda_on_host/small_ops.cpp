// The CUDA kernels of the small ops and their launches, compiled for the host: fastkd_small_on_host on CPU tensors.
#include "cuda_runtime.h"

#include "../../csrc/cuda/small_ops.cuh"

namespace fastkd::cuda {

struct SmallOnHost {
  static void require(const Tensor&) {}

  template <class T>
  static void iou_mask(T, const priors::Options& options, bool graded, const std::vector<priors::Level>& levels,
                       const Tensor& like) {
    small::launch_iou_mask<T>(options, graded, levels, like, nullptr);
  }
  template <class T>
  static void box_balance(T, const priors::Options& options, bool inclusive, const std::vector<priors::Level>& levels,
                          const Tensor& like) {
    small::launch_box_balance<T>(options, inclusive, levels, like, nullptr);
  }
  static void prior_sums(const std::vector<Weights>& levels, double* sums, const Tensor& like) {
    small::launch_prior_sums(levels, sums, like, nullptr);
  }
  static void update_factor(const FactorStep& call, const Tensor&) { small::launch_update_factor(call, nullptr); }
};

}  // namespace fastkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fastkd_small_on_host, CPU, m) {
  m.impl("iou_mask", TORCH_BOX(&fastkd::iou_mask<fastkd::cuda::SmallOnHost>));
  m.impl("box_balance", TORCH_BOX(&fastkd::box_balance<fastkd::cuda::SmallOnHost>));
  m.impl("prior_sums", TORCH_BOX(&fastkd::prior_sums<fastkd::cuda::SmallOnHost>));
  m.impl("update_factor", TORCH_BOX(&fastkd::update_factor<fastkd::cuda::SmallOnHost>));
}
