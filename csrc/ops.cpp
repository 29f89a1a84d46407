// The C++ backend on the CPU. Schemas, fakes and autograd are in fastkd/ops.py, and so are the messages that users
// read: the checks here only keep a direct call of the op from touching memory that is not there.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace fastkd::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// The widest instruction set that the processor has and that FASTKD_CPU_CAPABILITY (baseline, avx2, avx512) allows.
template <class Acc>
const Kernels<Acc>& widest_kernels() {
  const char* const set = std::getenv("FASTKD_CPU_CAPABILITY");
  const std::string allowed = set ? set : "avx512";
  STD_TORCH_CHECK(allowed == "baseline" || allowed == "avx2" || allowed == "avx512",
                  "FASTKD_CPU_CAPABILITY: expected baseline, avx2 or avx512, got ", allowed);
  if (allowed == "avx512" && __builtin_cpu_supports("x86-64-v4")) return avx512<Acc>();
  if (allowed != "baseline" && __builtin_cpu_supports("x86-64-v3")) return avx2<Acc>();
  return baseline<Acc>();
}

template <class Acc>
const Kernels<Acc>& kernels() {
  static const Kernels<Acc>& chosen = widest_kernels<Acc>();
  return chosen;
}
#else
template <class Acc>
const Kernels<Acc>& kernels() {
  return baseline<Acc>();
}
#endif

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    default: STD_TORCH_CHECK(false, "features must be float16, bfloat16, float32 or float64");
  }
}

Feature feature(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "features must be (N, C, H, W)");
  return {const_cast<void*>(x.const_data_ptr()), dtype_of(x), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <class Acc>
constexpr ScalarType kScalar = std::is_same_v<Acc, float> ? ScalarType::Float : ScalarType::Double;

// Pointer to a contiguous companion of `count` elements; null where it is absent (empty).
template <class Acc>
const Acc* companion(const Tensor& x, int64_t count) {
  if (x.numel() == 0) return nullptr;
  STD_TORCH_CHECK(x.numel() == count && x.is_contiguous() && x.scalar_type() == kScalar<Acc>,
                  "prior, mean, rstd, mass and maps must be contiguous, of the sums' dtype and of their level's size");
  return static_cast<const Acc*>(x.const_data_ptr());
}

int64_t total_cells(const Tensors& features) {
  int64_t total = 0;
  for (const auto& x : features) total += x.size(0) * x.size(2) * x.size(3);
  return total;
}

template <class Acc>
std::vector<Level<Acc>> make_levels(const Tensors& student, const Tensors& teacher, const Tensors& mean,
                                    const Tensors& rstd, Acc* maps) {
  const size_t count = student.size();
  STD_TORCH_CHECK(teacher.size() == count && mean.size() == count && rstd.size() == count,
                  "lists must have one entry per level");
  std::vector<Level<Acc>> levels(count);
  for (size_t i = 0; i < count; ++i) {
    Level<Acc>& level = levels[i];
    level.student = feature(student[i]);
    level.teacher = feature(teacher[i]);
    for (int d = 0; d < 4; ++d)
      STD_TORCH_CHECK(student[i].size(d) == teacher[i].size(d), "student and teacher must have the same shape");
    level.images = student[i].size(0);
    level.channels = student[i].size(1);
    level.height = student[i].size(2);
    level.width = student[i].size(3);
    level.mean = companion<Acc>(mean[i], level.channels);
    level.rstd = companion<Acc>(rstd[i], level.channels);
    STD_TORCH_CHECK((level.mean == nullptr) == (level.rstd == nullptr), "mean and rstd go together");
    level.map = maps;
    maps += level.images * level.cells();
  }
  return levels;
}

double divisor(const Tensor& student, Normalizer normalizer, double mass) {
  const double n = double(student.size(0)), c = double(student.size(1));
  const double elements = n * c * double(student.size(2) * student.size(3));
  switch (normalizer) {
    case Normalizer::elements: return elements > 1 ? elements : 1;
    case Normalizer::batch: return n > 1 ? n : 1;
    case Normalizer::map: return c * mass + kEps;
    case Normalizer::map_all_ranks: return 1;
  }
  return 1;
}

// A piece of one image of one level.
struct Work {
  int64_t level, image, begin, end;
};

template <class Acc>
std::vector<Work> blocks(const std::vector<Level<Acc>>& levels) {
  std::vector<Work> work;
  for (size_t l = 0; l < levels.size(); ++l)
    for (int64_t n = 0; n < levels[l].images && levels[l].channels; ++n)
      for (int64_t p = 0, step = block_cells(levels[l]); p < levels[l].cells(); p += step)
        work.push_back({int64_t(l), n, p, p + step < levels[l].cells() ? p + step : levels[l].cells()});
  return work;
}

template <class Acc>
std::vector<Work> whole_images(const std::vector<Level<Acc>>& levels) {
  std::vector<Work> work;
  for (size_t l = 0; l < levels.size(); ++l)
    for (int64_t n = 0; n < levels[l].images && levels[l].channels && levels[l].cells(); ++n)
      work.push_back({int64_t(l), n, 0, levels[l].cells()});
  return work;
}

// Calls f(index) for all work, each thread taking the next piece when it is done with one: pieces differ in size, and
// what each computes does not depend on who computes it.
template <class F>
void for_each(size_t count, bool small, const F& f) {
  std::atomic<size_t> next{0};
  const auto take = [&](int64_t, int64_t) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  };
  const int64_t threads = small ? 1 : torch::stable::get_num_threads();
  if (threads == 1 || count == 1) return take(0, 1);
  torch::stable::parallel_for(0, threads, 1, take);
}

// Under this many elements a second thread costs more than it brings.
template <class Acc>
bool is_small(const std::vector<Level<Acc>>& levels) {
  int64_t elements = 0;
  for (const auto& level : levels) elements += level.images * level.channels * level.cells();
  return elements < 16384;
}

template <class Acc>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensors& student, const Tensors& teacher, const Tensors& prior,
                                           const Tensors& mean, const Tensors& rstd, const std::vector<double>& weights,
                                           const Options& options, Normalizer normalizer) {
  const int64_t count = int64_t(student.size()), cells = total_cells(student);
  const auto empty = [&](int64_t n) { return torch::stable::new_empty(student[0], {n}, kScalar<Acc>); };
  Tensor losses = empty(count), mass = empty(count), maps = empty(cells);
  auto levels = make_levels(student, teacher, mean, rstd, static_cast<Acc*>(maps.mutable_data_ptr()));
  STD_TORCH_CHECK(prior.size() == student.size() && weights.size() == student.size(),
                  "lists must have one entry per level");
  const std::unique_ptr<double[]> measured(new double[size_t(2 * cells)]);
  for (int64_t l = 0, first = 0; l < count; ++l) {
    levels[l].prior = companion<Acc>(prior[l], levels[l].images * levels[l].cells());
    levels[l].score = measured.get() + first;
    levels[l].distance = measured.get() + cells + first;
    first += levels[l].images * levels[l].cells();
  }
  const Kernels<Acc>& run = kernels<Acc>();
  const auto pieces = blocks(levels);
  for_each(pieces.size(), is_small(levels), [&](size_t i) {
    const Work& w = pieces[i];
    run.measure(levels[w.level], options, w.image, w.begin, w.end);
  });
  const auto images = whole_images(levels);
  std::vector<Sums> sums(images.size());
  for_each(images.size(), is_small(levels),
           [&](size_t i) { sums[i] = run.weigh(levels[images[i].level], options, images[i].image); });

  std::vector<Sums> totals(student.size());
  for (size_t i = 0; i < images.size(); ++i) {
    totals[images[i].level].loss += sums[i].loss;
    totals[images[i].level].mass += sums[i].mass;
  }
  Acc *loss_out = static_cast<Acc*>(losses.mutable_data_ptr()), *mass_out = static_cast<Acc*>(mass.mutable_data_ptr());
  for (int64_t l = 0; l < count; ++l) {
    mass_out[l] = Acc(totals[l].mass);
    loss_out[l] = Acc(weights[l] * totals[l].loss / divisor(student[l], normalizer, totals[l].mass));
  }
  return {losses, mass, maps};
}

template <class Acc>
void backward(const Tensor& grad, const Tensor& mass, const Tensor& maps, const Tensors& student,
              const Tensors& teacher, const Tensors& mean, const Tensors& rstd, const std::vector<double>& weights,
              const Options& options, Normalizer normalizer, const Tensors& out) {
  const int64_t count = int64_t(student.size());
  Acc* const map = const_cast<Acc*>(companion<Acc>(maps, total_cells(student)));
  auto levels = make_levels(student, teacher, mean, rstd, map);
  const Acc* const masses = companion<Acc>(mass, count);
  STD_TORCH_CHECK(masses && (map || total_cells(student) == 0), "mass and maps must be those of the forward");
  STD_TORCH_CHECK(grad.dim() == 1 && grad.numel() == count && grad.scalar_type() == kScalar<Acc> &&
                      int64_t(weights.size()) == count,
                  "grad must have one entry per level, of the sums' dtype");
  const Acc* const upstream = static_cast<const Acc*>(grad.const_data_ptr());
  const int64_t stride = grad.stride(0);
  for (int64_t l = 0; l < count; ++l) {
    levels[l].grad = feature(out[l]);
    levels[l].slope =
        Acc(double(upstream[l * stride]) * weights[l] / divisor(student[l], normalizer, double(masses[l])));
  }
  const Kernels<Acc>& run = kernels<Acc>();
  const auto pieces = blocks(levels);
  for_each(pieces.size(), is_small(levels), [&](size_t i) {
    const Work& w = pieces[i];
    run.differentiate(levels[w.level], options, w.image, w.begin, w.end);
  });
}

bool any_double(const Tensors& student, const Tensors& teacher) {
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

std::tuple<Tensor, Tensor, Tensor> distill(Tensors student, Tensors teacher, Tensors prior, Tensors mean, Tensors rstd,
                                           std::vector<double> weights, int64_t score, int64_t norm, double temperature,
                                           int64_t penalty, double beta, int64_t normalizer) {
  STD_TORCH_CHECK(!student.empty(), "expected at least one level");
  const Options options{checked(score, Score::entropy), checked(norm, Norm::minmax),
                        checked(penalty, Penalty::smooth_l1), temperature, beta};
  const Normalizer z = checked(normalizer, Normalizer::map_all_ranks);
  return any_double(student, teacher) ? forward<double>(student, teacher, prior, mean, rstd, weights, options, z)
                                      : forward<float>(student, teacher, prior, mean, rstd, weights, options, z);
}

Tensors distill_backward(Tensor grad, Tensor mass, Tensor maps, Tensors student, Tensors teacher, Tensors mean,
                         Tensors rstd, std::vector<double> weights, int64_t penalty, double beta, int64_t normalizer) {
  Options options;
  options.penalty = checked(penalty, Penalty::smooth_l1);
  options.beta = beta;
  const Normalizer z = checked(normalizer, Normalizer::map_all_ranks);
  Tensors out;
  for (const auto& x : student) out.push_back(torch::stable::empty_like(x));
  if (any_double(student, teacher))
    backward<double>(grad, mass, maps, student, teacher, mean, rstd, weights, options, z, out);
  else
    backward<float>(grad, mass, maps, student, teacher, mean, rstd, weights, options, z, out);
  return out;
}

}  // namespace
}  // namespace fastkd::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("distill_cpp", TORCH_BOX(&fastkd::cpu::distill));
  m.impl("distill_cpp_backward", TORCH_BOX(&fastkd::cpu::distill_backward));
}

// Python imports this module for the registrations above alone.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
