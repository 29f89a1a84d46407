// The C++ backend on the CPU: which kernels, and in what pieces threads take the work.
#include <Python.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>

#include "cpu/kernels.h"
#include "op.h"
#include "terms.h"

namespace fastkd::cpu {
namespace {

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

struct Cpu {
  static void require(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cpu(), "the CPU kernels were called with other tensors");
  }

  template <class Acc>
  static void forward(Call<Acc>& call, const Tensor&, int64_t cells, Acc* losses, Acc* mass) {
    auto& levels = call.levels;
    const std::unique_ptr<double[]> measured(new double[size_t(2 * cells)]);
    double* scratch = measured.get();
    for (auto& level : levels) {
      level.score = scratch;
      level.distance = scratch + cells;
      scratch += level.images * level.cells();
    }
    const Kernels<Acc>& run = kernels<Acc>();
    const auto pieces = blocks(levels);
    for_each(pieces.size(), is_small(levels), [&](size_t i) {
      const Work& w = pieces[i];
      run.measure(levels[w.level], call.options, w.image, w.begin, w.end);
    });
    const auto images = whole_images(levels);
    std::vector<Sums> sums(images.size());
    for_each(images.size(), is_small(levels),
             [&](size_t i) { sums[i] = run.weigh(levels[images[i].level], call.options, images[i].image); });

    std::vector<Sums> totals(levels.size());
    for (size_t i = 0; i < images.size(); ++i) {
      totals[images[i].level].loss += sums[i].loss;
      totals[images[i].level].mass += sums[i].mass;
    }
    for (size_t l = 0; l < levels.size(); ++l) {
      mass[l] = Acc(totals[l].mass);
      losses[l] = Acc(call.weights[l] * totals[l].loss / divisor(levels[l], call.normalizer, totals[l].mass));
    }
  }

  template <class Acc>
  static void backward(Call<Acc>& call, const Tensor&, const Acc* upstream, int64_t stride, const Acc* mass) {
    auto& levels = call.levels;
    for (size_t l = 0; l < levels.size(); ++l) {
      const double z = divisor(levels[l], call.normalizer, double(mass[l]));
      levels[l].slope = Acc(double(upstream[int64_t(l) * stride]) * call.weights[l] / z);
    }
    const Kernels<Acc>& run = kernels<Acc>();
    const auto pieces = blocks(levels);
    for_each(pieces.size(), is_small(levels), [&](size_t i) {
      const Work& w = pieces[i];
      run.differentiate(levels[w.level], call.options, w.image, w.begin, w.end);
    });
  }
};

}  // namespace
}  // namespace fastkd::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("distill_cpp", TORCH_BOX(&fastkd::distill<fastkd::cpu::Cpu>));
  m.impl("distill_cpp_backward", TORCH_BOX(&fastkd::distill_backward<fastkd::cpu::Cpu>));
}

// Python imports this module for the registrations above, and asks it for which cards there are kernels.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "cuda_archs", FASTKD_CUDA_ARCHS) == 0) return module;
  Py_XDECREF(module);
  return nullptr;
}
