// The small ops on CUDA: registration.
#include "small_ops.cuh"

#include "device.cuh"

namespace fastkd::cuda {
namespace {

struct SmallOps {
  static void require(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), "fastkd: the CUDA kernels were called with tensors that are not on a CUDA device");
  }

  template <class T>
  static void iou_mask(T, const priors::Options& options, bool graded, const std::vector<priors::Level>& levels,
                       const Tensor& like) {
    const OnDeviceOf guard(like);
    small::launch_iou_mask<T>(options, graded, levels, like, current_stream(like));
  }

  template <class T>
  static void box_balance(T, const priors::Options& options, bool inclusive, const std::vector<priors::Level>& levels,
                          const Tensor& like) {
    const OnDeviceOf guard(like);
    small::launch_box_balance<T>(options, inclusive, levels, like, current_stream(like));
  }

  static void prior_sums(const std::vector<Weights>& levels, double* sums, const Tensor& like) {
    const OnDeviceOf guard(like);
    small::launch_prior_sums(levels, sums, like, current_stream(like));
  }

  static void update_factor(const FactorStep& call, const Tensor& like) {
    const OnDeviceOf guard(like);
    small::launch_update_factor(call, current_stream(like));
  }
};

}  // namespace
}  // namespace fastkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("iou_mask", TORCH_BOX(&fastkd::iou_mask<fastkd::cuda::SmallOps>));
  m.impl("box_balance", TORCH_BOX(&fastkd::box_balance<fastkd::cuda::SmallOps>));
  m.impl("prior_sums", TORCH_BOX(&fastkd::prior_sums<fastkd::cuda::SmallOps>));
  m.impl("update_factor", TORCH_BOX(&fastkd::update_factor<fastkd::cuda::SmallOps>));
}
