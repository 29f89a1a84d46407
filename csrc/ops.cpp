// The C++ backend on the CPU: the choice of the kernels, and the pieces of work that threads take.
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
int64_t image_elements(const Level<Acc>& level) {
  return level.channels * level.cells();
}

// Calls f(index) for all work. Each thread takes the next piece when it has finished one, as pieces differ in size; a
// result does not depend on the thread that computes it.
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

template <class Acc>
int64_t elements(const std::vector<Level<Acc>>& levels) {
  int64_t sum = 0;
  for (const auto& level : levels) sum += level.images * image_elements(level);
  return sum;
}

// Below this number of elements a second thread costs more time than it saves.
template <class Acc>
bool is_small(const std::vector<Level<Acc>>& levels) {
  return elements(levels) < 16384;
}

// Whether threads that take whole images have about equal work.
template <class Acc>
bool images_balance(const std::vector<Level<Acc>>& levels) {
  int64_t largest = 0;
  for (const auto& level : levels)
    if (level.images && image_elements(level) > largest) largest = image_elements(level);
  return largest * int64_t(torch::stable::get_num_threads()) <= elements(levels);
}

// Images in pieces of block(level) cells.
template <class Acc, class F>
std::vector<Work> pieces(const std::vector<Level<Acc>>& levels, const F& block) {
  std::vector<Work> work;
  for (size_t l = 0; l < levels.size(); ++l) {
    const int64_t cells = levels[l].channels ? levels[l].cells() : 0, step = block(levels[l]);
    for (int64_t n = 0; n < levels[l].images; ++n)
      for (int64_t p = 0; p < cells; p += step) work.push_back({int64_t(l), n, p, p + step < cells ? p + step : cells});
  }
  return work;
}

template <class Acc>
std::vector<Work> whole_images(const std::vector<Level<Acc>>& levels) {
  return pieces(levels, [](const Level<Acc>& level) { return level.cells(); });
}

// Whole images if they keep all threads busy, as memory is read fastest in long runs; else pieces of images.
template <class Acc>
std::vector<Work> blocks(const std::vector<Level<Acc>>& levels) {
  const bool whole = images_balance(levels);
  return pieces(levels, [&](const Level<Acc>& level) { return whole ? level.cells() : bias_cells(level); });
}

// Partial sums of the bias gradient, one row per bias_cells(level) cells, and their sum in the order of the cells, so
// that the result does not depend on the number of threads.
template <class Acc>
class BiasGradients {
 public:
  explicit BiasGradients(std::vector<Level<Acc>>& levels) : levels_(levels) {
    int64_t count = 0;
    for (const auto& level : levels) count += level.bias_grad ? partial_sums(level) : 0;
    partial_.reset(new Acc[size_t(count)]);
    Acc* at = partial_.get();
    for (auto& level : levels) {
      sums_.push_back(level.bias_grad);
      if (!level.bias_grad) continue;
      level.bias_grad = at;
      at += partial_sums(level);
    }
  }

  void finish() {
    for (size_t l = 0; l < levels_.size(); ++l) {
      if (!sums_[l]) continue;
      const int64_t channels = levels_[l].channels;
      std::vector<double> sums(channels);
      for (int64_t i = 0; i < partial_sums(levels_[l]); i += channels)
        for (int64_t c = 0; c < channels; ++c) sums[c] += double(levels_[l].bias_grad[i + c]);
      for (int64_t c = 0; c < channels; ++c) sums_[l][c] = Acc(sums[c]);
    }
  }

 private:
  static int64_t partial_sums(const Level<Acc>& level) { return level.images * bias_rows(level) * level.channels; }

  std::vector<Level<Acc>>& levels_;
  std::vector<Acc*> sums_;
  std::unique_ptr<Acc[]> partial_;
};

template <class Acc>
void run_pieces(const std::vector<Level<Acc>>& levels, const Options& options,
                void (*kernel)(const Level<Acc>&, const Options&, int64_t, int64_t, int64_t)) {
  const std::vector<Work> work = blocks(levels);
  for_each(work.size(), is_small(levels), [&](size_t i) {
    const Work& w = work[i];
    kernel(levels[w.level], options, w.image, w.begin, w.end);
  });
}

struct Cpu {
  static void require(const Tensor& x) {
    STD_TORCH_CHECK(x.is_cpu(), "the CPU kernels were called with other tensors");
  }

  // A call with losses: it computes the sums of each image and adds them up per level, in the order of the images.
  template <class Acc>
  struct Pass {
    Call<Acc>& call;
    std::vector<Level<Acc>>& levels = call.levels;
    const bool scored;
    const Kernels<Acc>& run = kernels<Acc>();
    const std::vector<Work> images = whole_images(levels);
    const std::unique_ptr<double[]> scratch;
    std::vector<double> image_loss = std::vector<double>(images.size()), image_mass = image_loss;
    std::vector<double> loss = std::vector<double>(levels.size()), mass = loss;

    Pass(Call<Acc>& call, int64_t cells, bool scored)
        : call(call), scored(scored), scratch(new double[size_t((scored ? 2 : 1) * cells)]) {
      double* at = scratch.get();
      for (auto& level : levels) {
        level.distance = at;
        if (scored) level.score = at + cells;
        at += level.images * level.cells();
      }
    }

    void weigh(size_t i) { image_mass[i] = run.weigh(levels[images[i].level], call.options, images[i].image); }
    void sum_loss(size_t i) { image_loss[i] = run.loss(levels[images[i].level], images[i].image); }
    template <class F>
    void each_image(const F& f) {
      for_each(images.size(), is_small(levels), f);
    }
    void total(const std::vector<double>& of_images, std::vector<double>& of_levels) {
      for (size_t i = 0; i < images.size(); ++i) of_levels[images[i].level] += of_images[i];
    }
    double weight_by_z(size_t l) { return call.weights[l] / divisor(levels[l], call.options.divisor, mass[l]); }
    void slopes(double factor) {
      for (size_t l = 0; l < levels.size(); ++l) levels[l].slope = Acc(factor * weight_by_z(l));
    }
    // Writes the losses and returns their sum.
    double finish(Acc* losses) {
      total(image_loss, loss);
      double sum = 0;
      for (size_t l = 0; l < levels.size(); ++l) {
        losses[l] = Acc(weight_by_z(l) * loss[l]);
        sum += weight_by_z(l) * loss[l];
      }
      return sum;
    }
  };

  template <class Acc>
  static void forward(Call<Acc>& call, const Tensor&, int64_t cells, Acc* losses, Acc* mass) {
    Pass<Acc> pass(call, cells, true);
    run_pieces(call.levels, call.options, pass.run.measure);
    pass.each_image([&](size_t i) {
      pass.weigh(i);
      pass.sum_loss(i);
    });
    pass.total(pass.image_mass, pass.mass);
    for (size_t l = 0; l < call.levels.size(); ++l) mass[l] = Acc(pass.mass[l]);
    pass.finish(losses);
  }

  // The same sums in the same order, and the gradient. If Z and the weights of an image follow from that image alone, a
  // thread finishes an image before it takes the next, so that its teacher is still in the cache. If the weights are
  // the prior, no score is computed. Both must move 3 units: student and teacher are read, the gradient is written.
  template <class Acc>
  static void one_pass(Call<Acc>& call, const Tensor&, int64_t cells, const double* masses, const float* factor,
                       Acc* total, Acc* losses) {
    Pass<Acc> pass(call, cells, !call.options.weights_are_known());
    BiasGradients<Acc> bias(call.levels);
    const double scale = factor ? double(*factor) : 1;
    if (masses) pass.mass.assign(masses, masses + call.levels.size());
    if ((masses || call.options.divisor != Divisor::map) && images_balance(call.levels)) {
      pass.slopes(scale);
      pass.each_image([&](size_t i) {
        const Work& w = pass.images[i];
        const Level<Acc>& level = call.levels[w.level];
        if (pass.scored) {
          pass.run.score(level, call.options, w.image, w.begin, w.end);
          pass.weigh(i);
        }
        pass.run.penalty_and_grad(level, call.options, w.image, w.begin, w.end);
        pass.sum_loss(i);
      });
    } else {
      if (pass.scored) {
        run_pieces(call.levels, call.options, pass.run.score);
        pass.each_image([&](size_t i) { pass.weigh(i); });
        if (!masses) pass.total(pass.image_mass, pass.mass);
      }
      pass.slopes(scale);
      run_pieces(call.levels, call.options, pass.run.penalty_and_grad);
      pass.each_image([&](size_t i) { pass.sum_loss(i); });
    }
    bias.finish();
    *total = Acc(scale * pass.finish(losses));
  }

  template <class Acc>
  static void backward(Call<Acc>& call, const Tensor&, const Acc* upstream, int64_t stride, const Acc* mass) {
    for (size_t l = 0; l < call.levels.size(); ++l) {
      const double z = divisor(call.levels[l], call.options.divisor, double(mass[l]));
      call.levels[l].slope = Acc(double(upstream[int64_t(l) * stride]) * call.weights[l] / z);
    }
    run_pieces(call.levels, call.options, kernels<Acc>().differentiate);
  }
};

}  // namespace
}  // namespace fastkd::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("distill_cpp", TORCH_BOX(&fastkd::distill<fastkd::cpu::Cpu>));
  m.impl("distill_cpp_backward", TORCH_BOX(&fastkd::distill_backward<fastkd::cpu::Cpu>));
  m.impl("distill_cpp_one_pass", TORCH_BOX(&fastkd::distill_one_pass<fastkd::cpu::Cpu>));
}

// Python imports this module for the registrations above, and reads from it which cards have kernels.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "cuda_archs", FASTKD_CUDA_ARCHS) == 0) return module;
  Py_XDECREF(module);
  return nullptr;
}
