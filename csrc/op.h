// The host's half of the ops, the same on every device: checks, levels, outputs. Schemas, fakes and autograd are in
// fastkd/ops.py, and so are the messages that users read: the checks here only keep a direct call of the op from
// touching memory that is not there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>
#include <type_traits>
#include <vector>

#include "level.h"

namespace fastkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

template <class Acc>
constexpr ScalarType kScalar = std::is_same_v<Acc, float> ? ScalarType::Float : ScalarType::Double;

// What a device computes: levels with everything set but the scratch (score, distance), which is the device's own.
template <class Acc>
struct Call {
  Options options;
  Normalizer normalizer = Normalizer::elements;
  std::vector<double> weights;
  std::vector<Level<Acc>> levels;
};

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    default: STD_TORCH_CHECK(false, "features must be float16, bfloat16, float32 or float64");
  }
}

inline Feature feature(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "features must be (N, C, H, W)");
  return {const_cast<void*>(x.const_data_ptr()), dtype_of(x), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// Pointer to a contiguous companion of `count` elements; null where it is absent (empty).
template <class Acc>
const Acc* companion(const Tensor& x, int64_t count) {
  if (x.numel() == 0) return nullptr;
  STD_TORCH_CHECK(x.numel() == count && x.is_contiguous() && x.scalar_type() == kScalar<Acc>,
                  "prior, mean, rstd, mass and maps must be contiguous, of the sums' dtype and of their level's size");
  return static_cast<const Acc*>(x.const_data_ptr());
}

inline int64_t total_cells(const Tensors& features) {
  int64_t total = 0;
  for (const auto& x : features) total += x.size(0) * x.size(2) * x.size(3);
  return total;
}

inline void require_device(const Tensor& x, const Tensor& first) {
  STD_TORCH_CHECK(x.is_cpu() == first.is_cpu() && x.is_cuda() == first.is_cuda() &&
                      x.get_device_index() == first.get_device_index(),
                  "all tensors must be on the device of the first student feature");
}

inline void require_devices(const Tensors& tensors, const Tensor& first) {
  for (const auto& x : tensors) require_device(x, first);
}

template <class Acc>
void set_shape(Level<Acc>& level, const Tensor& student) {
  level.student = feature(student);
  level.images = student.size(0);
  level.channels = student.size(1);
  level.height = student.size(2);
  level.width = student.size(3);
}

template <class Acc>
std::vector<Level<Acc>> make_levels(const Tensors& student, const Tensors& teacher, const Tensors& mean,
                                    const Tensors& rstd, Acc* maps) {
  const size_t count = student.size();
  STD_TORCH_CHECK(teacher.size() == count && mean.size() == count && rstd.size() == count,
                  "lists must have one entry per level");
  for (const Tensors* tensors : {&student, &teacher, &mean, &rstd}) require_devices(*tensors, student[0]);
  std::vector<Level<Acc>> levels(count);
  for (size_t i = 0; i < count; ++i) {
    Level<Acc>& level = levels[i];
    set_shape(level, student[i]);
    level.teacher = feature(teacher[i]);
    for (int d = 0; d < 4; ++d)
      STD_TORCH_CHECK(student[i].size(d) == teacher[i].size(d), "student and teacher must have the same shape");
    level.mean = companion<Acc>(mean[i], level.channels);
    level.rstd = companion<Acc>(rstd[i], level.channels);
    STD_TORCH_CHECK((level.mean == nullptr) == (level.rstd == nullptr), "mean and rstd go together");
    level.map = maps;
    maps += level.images * level.cells();
  }
  return levels;
}

inline bool any_double(const Tensors& student, const Tensors& teacher) {
  for (const Tensors* features : {&student, &teacher})
    for (const auto& x : *features)
      if (x.scalar_type() == ScalarType::Double) return true;
  return false;
}

template <class E>
E checked(int64_t code, E last) {
  STD_TORCH_CHECK(code >= 0 && code <= int64_t(last), "unknown code");
  return E(code);
}

// Upstream gradients that a call takes for given, (levels,); null where it takes none.
template <class Acc>
const Acc* assumption(const Tensor& x, const Tensor& first, size_t count) {
  require_device(x, first);
  return companion<Acc>(x, int64_t(count));
}

// Where the student's gradient goes; nothing is computed for a level whose entry is empty.
template <class Acc>
void set_gradient(std::vector<Level<Acc>>& levels, const Tensors& gradient, const Tensors& student) {
  STD_TORCH_CHECK(gradient.size() == levels.size(), "lists must have one entry per level");
  require_devices(gradient, student[0]);
  for (size_t l = 0; l < levels.size(); ++l) {
    if (gradient[l].numel() == 0) continue;
    levels[l].grad = feature(gradient[l]);
    for (int d = 0; d < 4; ++d)
      STD_TORCH_CHECK(gradient[l].size(d) == student[l].size(d), "a gradient must have its student's shape");
  }
}

// With `gradient`, the one-pass forward, which writes it for the upstream gradient `assumed`.
template <class Device, class Acc>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensors& student, const Tensors& teacher, const Tensors& prior,
                                           const Tensors& mean, const Tensors& rstd, const Tensor* assumed,
                                           const Tensors* gradient, Call<Acc>& call) {
  const int64_t count = int64_t(student.size()), cells = total_cells(student);
  const auto empty = [&](int64_t n) { return torch::stable::new_empty(student[0], {n}, kScalar<Acc>); };
  Tensor losses = empty(count), mass = empty(count), maps = empty(cells);
  call.levels = make_levels(student, teacher, mean, rstd, static_cast<Acc*>(maps.mutable_data_ptr()));
  STD_TORCH_CHECK(prior.size() == student.size() && call.weights.size() == student.size(),
                  "lists must have one entry per level");
  require_devices(prior, student[0]);
  for (int64_t l = 0; l < count; ++l)
    call.levels[l].prior = companion<Acc>(prior[l], call.levels[l].images * call.levels[l].cells());
  Acc *const loss = static_cast<Acc*>(losses.mutable_data_ptr()), *const sum =
                                                                      static_cast<Acc*>(mass.mutable_data_ptr());
  if constexpr (Device::kOnePass) {
    if (gradient) {
      set_gradient(call.levels, *gradient, student);
      const Acc* const upstream = assumption<Acc>(*assumed, student[0], student.size());
      STD_TORCH_CHECK(upstream, "the assumed upstream gradient must have one entry per level");
      Device::one_pass(call, student[0], cells, upstream, loss, sum);
      return {losses, mass, maps};
    }
  }
  Device::forward(call, student[0], cells, loss, sum);
  return {losses, mass, maps};
}

// Writes the gradient of each level; given `assumed`, of those levels only whose upstream gradient is another.
template <class Device, class Acc>
void backward(const Tensor& grad, const Tensor* assumed, const Tensor& mass, const Tensor& maps, const Tensors& student,
              const Tensors& teacher, const Tensors& mean, const Tensors& rstd, const Tensors& out, Call<Acc>& call) {
  const int64_t count = int64_t(student.size());
  for (const Tensor* x : {&grad, &mass, &maps}) require_device(*x, student[0]);
  Acc* const map = const_cast<Acc*>(companion<Acc>(maps, total_cells(student)));
  call.levels = make_levels(student, teacher, mean, rstd, map);
  const Acc* const masses = companion<Acc>(mass, count);
  STD_TORCH_CHECK(masses && (map || total_cells(student) == 0), "mass and maps must be those of the forward");
  STD_TORCH_CHECK(grad.dim() == 1 && grad.numel() == count && grad.scalar_type() == kScalar<Acc> &&
                      int64_t(call.weights.size()) == count,
                  "grad must have one entry per level, of the sums' dtype");
  set_gradient(call.levels, out, student);
  const Acc* const known = assumed ? assumption<Acc>(*assumed, student[0], student.size()) : nullptr;
  Device::backward(call, student[0], static_cast<const Acc*>(grad.const_data_ptr()), grad.stride(0), known, masses);
}

template <class Acc>
void set_constants(Call<Acc>& call, const std::vector<double>& weights, int64_t penalty, double beta,
                   int64_t normalizer) {
  call.options.penalty = checked(penalty, Penalty::smooth_l1);
  call.options.beta = beta;
  call.normalizer = checked(normalizer, Normalizer::map_all_ranks);
  call.weights = weights;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> run_forward(const Tensors& student, const Tensors& teacher, const Tensors& prior,
                                               const Tensors& mean, const Tensors& rstd,
                                               const std::vector<double>& weights, int64_t score, int64_t norm,
                                               double temperature, int64_t penalty, double beta, int64_t normalizer,
                                               const Tensor* assumed, const Tensors* gradient) {
  STD_TORCH_CHECK(!student.empty(), "expected at least one level");
  Device::require(student[0]);
  const auto run = [&](auto call) {
    set_constants(call, weights, penalty, beta, normalizer);
    call.options.score = checked(score, Score::entropy);
    call.options.norm = checked(norm, Norm::minmax);
    call.options.temperature = temperature;
    return forward<Device>(student, teacher, prior, mean, rstd, assumed, gradient, call);
  };
  return any_double(student, teacher) ? run(Call<double>()) : run(Call<float>());
}

template <class Device>
void run_backward(const Tensor& grad, const Tensor* assumed, const Tensor& mass, const Tensor& maps,
                  const Tensors& student, const Tensors& teacher, const Tensors& mean, const Tensors& rstd,
                  const std::vector<double>& weights, int64_t penalty, double beta, int64_t normalizer,
                  const Tensors& out) {
  STD_TORCH_CHECK(!student.empty(), "expected at least one level");
  Device::require(student[0]);
  const auto run = [&](auto call) {
    set_constants(call, weights, penalty, beta, normalizer);
    backward<Device>(grad, assumed, mass, maps, student, teacher, mean, rstd, out, call);
  };
  any_double(student, teacher) ? run(Call<double>()) : run(Call<float>());
}

// ---- the ops, by the names of fastkd/ops.py ----

template <class Device>
std::tuple<Tensor, Tensor, Tensor> distill(Tensors student, Tensors teacher, Tensors prior, Tensors mean, Tensors rstd,
                                           std::vector<double> weights, int64_t score, int64_t norm, double temperature,
                                           int64_t penalty, double beta, int64_t normalizer) {
  return run_forward<Device>(student, teacher, prior, mean, rstd, weights, score, norm, temperature, penalty, beta,
                             normalizer, nullptr, nullptr);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> distill_one_pass(Tensors student, Tensors teacher, Tensors prior, Tensors mean,
                                                    Tensors rstd, std::vector<double> weights, int64_t score,
                                                    int64_t norm, double temperature, int64_t penalty, double beta,
                                                    int64_t normalizer, Tensor assumed, Tensors gradient) {
  return run_forward<Device>(student, teacher, prior, mean, rstd, weights, score, norm, temperature, penalty, beta,
                             normalizer, &assumed, &gradient);
}

template <class Device>
Tensors distill_backward(Tensor grad, Tensor mass, Tensor maps, Tensors student, Tensors teacher, Tensors mean,
                         Tensors rstd, std::vector<double> weights, int64_t penalty, double beta, int64_t normalizer) {
  Tensors out;
  for (const auto& x : student) out.push_back(torch::stable::empty_like(x));
  run_backward<Device>(grad, nullptr, mass, maps, student, teacher, mean, rstd, weights, penalty, beta, normalizer,
                       out);
  return out;
}

template <class Device>
void distill_backward_into(Tensor grad, Tensor assumed, Tensor mass, Tensor maps, Tensors student, Tensors teacher,
                           Tensors mean, Tensors rstd, std::vector<double> weights, int64_t penalty, double beta,
                           int64_t normalizer, Tensors gradient) {
  run_backward<Device>(grad, &assumed, mass, maps, student, teacher, mean, rstd, weights, penalty, beta, normalizer,
                       gradient);
}

// Turns a gradient that was written for the upstream gradient `assumed` into that for `grad`, level by level, where
// they differ.
template <class Device>
void distill_rescale(Tensor grad, Tensor assumed, Tensors gradient) {
  STD_TORCH_CHECK(!gradient.empty(), "expected at least one level");
  Device::require(gradient[0]);
  require_devices(gradient, gradient[0]);
  const auto run = [&](auto call) {
    using Acc = std::remove_const_t<std::remove_pointer_t<decltype(call.levels[0].prior)>>;
    call.levels.resize(gradient.size());
    for (size_t l = 0; l < gradient.size(); ++l)
      if (gradient[l].numel() != 0) set_shape(call.levels[l], gradient[l]);
    for (auto& level : call.levels) level.grad = level.student;
    require_device(grad, gradient[0]);
    STD_TORCH_CHECK(grad.dim() == 1 && size_t(grad.numel()) == gradient.size() && grad.scalar_type() == kScalar<Acc>,
                    "grad must have one entry per level, of the sums' dtype");
    const Acc* const known = assumption<Acc>(assumed, gradient[0], gradient.size());
    STD_TORCH_CHECK(known, "the assumed upstream gradient must have one entry per level");
    Device::rescale(call, gradient[0], static_cast<const Acc*>(grad.const_data_ptr()), grad.stride(0), known);
  };
  any_double(gradient, gradient) ? run(Call<double>()) : run(Call<float>());
}

}  // namespace fastkd
