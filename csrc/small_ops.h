// The host code of the small ops, the same for every device: checks, outputs. Schemas and fakes are in
// fastkd/ops/prior_ops.py and fastkd/ops/factor.py, and the messages for users in fastkd/priors.py.
#pragma once

#include <limits>
#include <tuple>
#include <vector>

#include "factor.h"
#include "op.h"
#include "priors.h"

namespace fastkd {

inline bool is_double(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) && x.is_contiguous(),
                  "fastkd: boxes, anchors and losses must be contiguous float32 or float64");
  return type == ScalarType::Double;
}

inline int dimension(int64_t x) {
  STD_TORCH_CHECK(x > 0 && x <= std::numeric_limits<int>::max(), "fastkd: sizes must be above 0 and fit 32 bits");
  return int(x);
}

// Calls f with a value of the element type: double if `wide`, else float.
template <class F>
void with_float(bool wide, const F& f) {
  wide ? f(double()) : f(float());
}

// The maps of a prior, level after level, and their sums. `levels` has the pointers to both.
struct PriorMaps {
  Tensor maps, sums;
  std::vector<priors::Level> levels;

  PriorMaps(const Tensor& boxes, const std::vector<int64_t>& sizes, int64_t batch)
      : maps(boxes), sums(boxes), levels(sizes.size() / 2) {
    STD_TORCH_CHECK(sizes.size() % 2 == 0 && batch >= 0, "fastkd: sizes must be height and width of each level");
    int64_t total = 0;
    for (size_t l = 0; l < levels.size(); ++l) {
      levels[l].height = dimension(sizes[2 * l]);
      levels[l].width = dimension(sizes[2 * l + 1]);
      total += batch * levels[l].cells();
    }
    maps = torch::stable::new_empty(boxes, {total}, ScalarType::Float);
    sums = torch::stable::new_empty(boxes, {int64_t(levels.size())}, ScalarType::Double);
    float* map = static_cast<float*>(maps.mutable_data_ptr());
    double* sum = static_cast<double*>(sums.mutable_data_ptr());
    for (auto& level : levels) {
      level.map = map;
      level.sum = sum++;
      map += batch * level.cells();
    }
  }
};

inline priors::Options prior_options(const Tensor& boxes, int64_t height, int64_t width, int64_t batch, double number) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 5, "fastkd: boxes must be (M, 5)");
  priors::Options options;
  options.boxes = boxes.const_data_ptr();
  options.count = batch ? boxes.size(0) : 0;
  options.batch = batch;
  options.height = dimension(height);
  options.width = dimension(width);
  options.number = number;
  return options;
}

inline void set_anchors(std::vector<priors::Level>& levels, const Tensors& anchors, const Tensor& boxes) {
  STD_TORCH_CHECK(anchors.size() == levels.size(), "fastkd: anchors must have one entry per level");
  for (size_t l = 0; l < levels.size(); ++l) {
    const Tensor& x = anchors[l];
    require_device(x, boxes);
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == 2, "fastkd: anchors must be (A, 2)");
    levels[l].anchors = x.const_data_ptr();
    levels[l].wide = is_double(x);
    levels[l].anchor_count = dimension(x.size(0));
  }
}

// ---- the ops, by their names ----

template <class Device>
std::tuple<Tensor, Tensor> iou_mask(Tensor boxes, Tensors anchors, std::vector<int64_t> sizes, int64_t height,
                                    int64_t width, int64_t batch, double threshold, bool graded) {
  Device::require(boxes);
  PriorMaps out(boxes, sizes, batch);
  set_anchors(out.levels, anchors, boxes);
  const priors::Options options = prior_options(boxes, height, width, batch, threshold);
  with_float(is_double(boxes), [&](auto type) { Device::iou_mask(type, options, graded, out.levels, boxes); });
  return {out.maps, out.sums};
}

template <class Device>
std::tuple<Tensor, Tensor> box_balance(Tensor boxes, std::vector<int64_t> sizes, int64_t height, int64_t width,
                                       int64_t batch, double background, bool inclusive) {
  Device::require(boxes);
  PriorMaps out(boxes, sizes, batch);
  const priors::Options options = prior_options(boxes, height, width, batch, background);
  with_float(is_double(boxes), [&](auto type) { Device::box_balance(type, options, inclusive, out.levels, boxes); });
  return {out.maps, out.sums};
}

// The prior of a level, for prior_sums; without elements it is absent, and the weight of each cell is 1.
struct Weights {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t count = 0;
  int64_t cells = 0;
};

template <class Device>
Tensor prior_sums(Tensors prior, std::vector<int64_t> cells) {
  STD_TORCH_CHECK(!prior.empty() && prior.size() == cells.size(), "fastkd: cells must have one entry per prior");
  Device::require(prior[0]);
  std::vector<Weights> levels(prior.size());
  for (size_t l = 0; l < prior.size(); ++l) {
    require_device(prior[l], prior[0]);
    STD_TORCH_CHECK(prior[l].is_contiguous(), "fastkd: a prior must be contiguous");
    levels[l] = {prior[l].const_data_ptr(), dtype_of(prior[l]), prior[l].numel(), cells[l]};
  }
  const int64_t count = int64_t(levels.size());
  Tensor sums = torch::stable::new_empty(prior[0], {2, count}, ScalarType::Double);
  Device::prior_sums(levels, static_cast<double*>(sums.mutable_data_ptr()), prior[0]);
  return sums;
}

// The arguments of update_factor; all pointers are to memory of the device.
struct FactorStep {
  Schedule schedule;
  float *factor = nullptr, *averages = nullptr;
  int64_t* step = nullptr;
  const void *losses = nullptr, *task = nullptr;
  int64_t loss_count = 0;
  bool wide_losses = false;
  DType task_dtype = DType::float32;
};

template <class Device>
void update_factor(Tensor factor, Tensor averages, Tensor step, Tensor losses, Tensor task_loss, double weight,
                   double share, int64_t warmup_steps, int64_t decay, int64_t stop_step, int64_t advance) {
  Device::require(factor);
  for (const Tensor* x : {&averages, &step}) require_device(*x, factor);
  STD_TORCH_CHECK(factor.numel() == 1 && factor.scalar_type() == ScalarType::Float && averages.numel() == 3 &&
                      averages.scalar_type() == ScalarType::Float && averages.is_contiguous() && step.numel() == 1 &&
                      step.scalar_type() == ScalarType::Long,
                  "fastkd: expected a factor () and averages (3,) in float32, and a step () in int64");
  STD_TORCH_CHECK(decay >= 0 && decay <= int64_t(Decay::cosine), "fastkd: unknown decay");
  FactorStep call;
  call.schedule = {weight, share, warmup_steps, Decay(decay), stop_step, advance};
  call.factor = static_cast<float*>(factor.mutable_data_ptr());
  call.averages = static_cast<float*>(averages.mutable_data_ptr());
  call.step = static_cast<int64_t*>(step.mutable_data_ptr());
  if (weight < 0 && losses.numel()) {
    for (const Tensor* x : {&losses, &task_loss}) require_device(*x, factor);
    STD_TORCH_CHECK(task_loss.numel() == 1, "fastkd: losses can be balanced against a task loss of one element only");
    call.losses = losses.const_data_ptr();
    call.loss_count = losses.numel();
    call.wide_losses = is_double(losses);
    call.task = task_loss.const_data_ptr();
    call.task_dtype = dtype_of(task_loss);
  }
  Device::update_factor(call, factor);
}

}  // namespace fastkd
