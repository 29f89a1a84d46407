// The host code of the ops, the same for every device: checks, levels, outputs. Schemas, fakes and autograd are in
// fastkd/ops/schema.py, and the messages for users in fastkd/ops/levels.py: the checks here only keep a direct call of
// an op from accessing invalid memory.
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

// A call. The levels have everything set except the scratch memory (score, distance), which the device allocates.
template <class Acc>
struct Call {
  Options options;
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

// Pointer to a small contiguous tensor of `count` elements; null if it is absent (empty).
template <class Acc>
const Acc* companion(const Tensor& x, int64_t count) {
  if (x.numel() == 0) return nullptr;
  STD_TORCH_CHECK(
      x.numel() == count && x.is_contiguous() && x.scalar_type() == kScalar<Acc>,
      "prior, mean, rstd, bias, mass and maps must be contiguous, of the sums' dtype and of their level's size");
  return static_cast<const Acc*>(x.const_data_ptr());
}

// The same for one level of a list; null too if the whole list is empty, as no level has an entry.
template <class Acc>
const Acc* companion(const Tensors& list, size_t level, int64_t count) {
  return list.empty() ? nullptr : companion<Acc>(list[level], count);
}

inline void require_length(const Tensors& list, size_t count) {
  STD_TORCH_CHECK(list.empty() || list.size() == count, "lists must have one entry per level");
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
                                    const Tensors& rstd, const Tensors& bias, Acc* maps) {
  const size_t count = student.size();
  STD_TORCH_CHECK(teacher.size() == count, "lists must have one entry per level");
  for (const Tensors* tensors : {&student, &teacher, &mean, &rstd, &bias}) {
    require_length(*tensors, count);
    require_devices(*tensors, student[0]);
  }
  std::vector<Level<Acc>> levels(count);
  for (size_t i = 0; i < count; ++i) {
    Level<Acc>& level = levels[i];
    set_shape(level, student[i]);
    level.teacher = feature(teacher[i]);
    for (int d = 0; d < 4; ++d)
      STD_TORCH_CHECK(student[i].size(d) == teacher[i].size(d), "student and teacher must have the same shape");
    level.mean = companion<Acc>(mean, i, level.channels);
    level.rstd = companion<Acc>(rstd, i, level.channels);
    level.bias = companion<Acc>(bias, i, level.channels);
    STD_TORCH_CHECK(!level.mean == !level.rstd && !level.mean == !level.bias,
                    "mean, rstd and bias must be given together");
    if (maps) level.map = maps;
    maps += maps ? level.images * level.cells() : 0;
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

// Sets where the gradients of the student and of its adapter's bias are written; an empty entry is not computed.
template <class Acc>
void set_gradients(std::vector<Level<Acc>>& levels, const Tensors& gradient, const Tensors& bias_gradient,
                   const Tensors& student) {
  STD_TORCH_CHECK(gradient.size() == levels.size(), "lists must have one entry per level");
  require_length(bias_gradient, levels.size());
  require_devices(gradient, student[0]);
  require_devices(bias_gradient, student[0]);
  for (size_t l = 0; l < levels.size(); ++l) {
    levels[l].bias_grad = const_cast<Acc*>(companion<Acc>(bias_gradient, l, levels[l].channels));
    if (gradient[l].numel() == 0) continue;
    levels[l].grad = feature(gradient[l]);
    for (int d = 0; d < 4; ++d)
      STD_TORCH_CHECK(gradient[l].size(d) == student[l].size(d), "a gradient must have its student's shape");
  }
}

template <class Acc>
void set_priors(std::vector<Level<Acc>>& levels, const Tensors& prior, const Tensor& first) {
  require_length(prior, levels.size());
  require_devices(prior, first);
  for (size_t l = 0; l < levels.size(); ++l)
    levels[l].prior = companion<Acc>(prior, l, levels[l].images * levels[l].cells());
}

template <class Acc>
Call<Acc> make_call(const std::vector<double>& weights, int64_t score, int64_t map_norm, double temperature,
                    int64_t penalty, double beta, int64_t divisor) {
  Call<Acc> call;
  call.options.score = checked(score, Score::entropy);
  call.options.map_norm = checked(map_norm, MapNorm::minmax);
  call.options.temperature = temperature;
  call.options.penalty = checked(penalty, Penalty::smooth_l1);
  call.options.beta = beta;
  call.options.divisor = checked(divisor, Divisor::map_all_ranks);
  call.weights = weights;
  return call;
}

// Calls f with a value of the type of sums: double if any feature is double, else float.
template <class F>
auto with_sums(const Tensors& student, const Tensors& teacher, const F& f) {
  STD_TORCH_CHECK(!student.empty(), "expected at least one level");
  return any_double(student, teacher) ? f(double()) : f(float());
}

// ---- the ops, by the names of fastkd/ops/schema.py ----

// The first of two passes: returns losses and masses (sums of the maps), (L,), and all maps, level after level.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> distill(Tensors student, Tensors teacher, Tensors prior, Tensors mean, Tensors rstd,
                                           Tensors bias, std::vector<double> weights, int64_t score, int64_t map_norm,
                                           double temperature, int64_t penalty, double beta, int64_t divisor) {
  return with_sums(student, teacher, [&](auto sum) {
    using Acc = decltype(sum);
    Device::require(student[0]);
    auto call = make_call<Acc>(weights, score, map_norm, temperature, penalty, beta, divisor);
    const int64_t count = int64_t(student.size()), cells = total_cells(student);
    const auto empty = [&](int64_t n) { return torch::stable::new_empty(student[0], {n}, kScalar<Acc>); };
    Tensor losses = empty(count), mass = empty(count), maps = empty(cells);
    call.levels = make_levels(student, teacher, mean, rstd, bias, static_cast<Acc*>(maps.mutable_data_ptr()));
    STD_TORCH_CHECK(call.weights.size() == student.size(), "lists must have one entry per level");
    set_priors(call.levels, prior, student[0]);
    Device::forward(call, student[0], cells, static_cast<Acc*>(losses.mutable_data_ptr()),
                    static_cast<Acc*>(mass.mutable_data_ptr()));
    return std::tuple(losses, mass, maps);
  });
}

// The second of two passes: returns the student's gradients for the upstream gradients `grad`, (L,).
template <class Device>
Tensors distill_backward(Tensor grad, Tensor mass, Tensor maps, Tensors student, Tensors teacher, Tensors mean,
                         Tensors rstd, Tensors bias, std::vector<double> weights, int64_t penalty, double beta,
                         int64_t divisor) {
  return with_sums(student, teacher, [&](auto sum) {
    using Acc = decltype(sum);
    Device::require(student[0]);
    auto call = make_call<Acc>(weights, 0, 0, 1, penalty, beta, divisor);
    Tensors out;
    for (const auto& x : student) out.push_back(torch::stable::empty_like(x));
    const int64_t count = int64_t(student.size());
    for (const Tensor* x : {&grad, &mass, &maps}) require_device(*x, student[0]);
    Acc* const map = const_cast<Acc*>(companion<Acc>(maps, total_cells(student)));
    call.levels = make_levels(student, teacher, mean, rstd, bias, map);
    const Acc* const masses = companion<Acc>(mass, count);
    STD_TORCH_CHECK(masses && (map || total_cells(student) == 0), "mass and maps must be those of the forward");
    STD_TORCH_CHECK(grad.dim() == 1 && grad.numel() == count && grad.scalar_type() == kScalar<Acc> &&
                        int64_t(call.weights.size()) == count,
                    "grad must have one entry per level, of the sums' dtype");
    set_gradients(call.levels, out, {}, student);
    Device::backward(call, student[0], static_cast<const Acc*>(grad.const_data_ptr()), grad.stride(0), masses);
    return out;
  });
}

// One pass: returns factor * the sum of the level losses, a scalar, and the level losses without the factor, (L,). It
// writes the gradients of the scalar into `gradient` and `bias_gradient`. `factor` is a float32 scalar on the device,
// or empty for 1. `mass` has the sums of the maps, (L,) float64; if it is empty, they are computed. It is required if
// the weights are known (Options::weights_are_known) and Z depends on the map.
template <class Device>
std::tuple<Tensor, Tensor> distill_one_pass(Tensors student, Tensors teacher, Tensors prior, Tensors mean, Tensors rstd,
                                            Tensors bias, std::vector<double> weights, int64_t score, int64_t map_norm,
                                            double temperature, int64_t penalty, double beta, int64_t divisor,
                                            Tensor mass, Tensor factor, Tensors gradient, Tensors bias_gradient) {
  return with_sums(student, teacher, [&](auto sum) {
    using Acc = decltype(sum);
    Device::require(student[0]);
    auto call = make_call<Acc>(weights, score, map_norm, temperature, penalty, beta, divisor);
    const int64_t count = int64_t(student.size());
    call.levels = make_levels<Acc>(student, teacher, mean, rstd, bias, nullptr);
    STD_TORCH_CHECK(call.weights.size() == student.size(), "lists must have one entry per level");
    set_priors(call.levels, prior, student[0]);
    set_gradients(call.levels, gradient, bias_gradient, student);
    for (const Tensor* x : {&mass, &factor}) require_device(*x, student[0]);
    const double* const masses = companion<double>(mass, count);
    const float* const scale = companion<float>(factor, 1);
    STD_TORCH_CHECK(call.options.divisor != Divisor::map_all_ranks,
                    "one pass: pass divisor map, with the mass averaged over all ranks");
    STD_TORCH_CHECK(masses || !call.options.weights_are_known() || call.options.divisor != Divisor::map,
                    "one pass: mass must be given if the map is the prior");
    Tensor total = torch::stable::new_empty(student[0], {}, kScalar<Acc>);
    Tensor losses = torch::stable::new_empty(student[0], {count}, kScalar<Acc>);
    Device::one_pass(call, student[0], total_cells(student), masses, scale, static_cast<Acc*>(total.mutable_data_ptr()),
                     static_cast<Acc*>(losses.mutable_data_ptr()));
    return std::tuple(total, losses);
  });
}

}  // namespace fastkd
