// The small ops on the CPU: priors from boxes, their sums, and the factor of the loss. Formulas are in priors.h and
// factor.h.
//
// iou_mask and box_balance must write 4 bytes per cell, box_balance also reads and writes the map again (12). A box
// does 1 operation per cell and anchor in its reach (graded), fills its rows (mask), or 1 per cell that it covers
// (balance). prior_sums must read each prior once, and does 2 operations per cell: sum and minimum.
#include "small_ops.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

namespace fastkd::cpu {
namespace {

using priors::Anchor;
using priors::Box;
using priors::Interval;
using priors::Place;

// Calls f(i) for all i, in parallel unless the work is small.
template <class F>
void for_each(int64_t count, bool small, const F& f) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  };
  if (small || count < 2) return run(0, count);
  torch::stable::parallel_for(0, count, 1, run);
}

// ---- sums ----

struct Sum {
  double total = 0, least = HUGE_VAL;

  void include(const Sum& other) {
    total += other.total;
    least = std::min(least, other.least);
  }
};

// Sum and minimum, in lanes that fit vector registers and have a fixed order.
template <class T>
Sum sum_of(const T* x, int64_t count) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr int kLanes = 8;
  double total[kLanes] = {};
  Wide least[kLanes];
  std::fill(least, least + kLanes, std::numeric_limits<Wide>::infinity());
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) {
      const Wide value = Wide(x[i + k]);
      total[k] += double(value);
      least[k] = value < least[k] ? value : least[k];
    }
  Sum sum;
  for (int k = 0; k < kLanes; ++k) sum.include({total[k], double(least[k])});
  for (; i < count; ++i) sum.include({double(Wide(x[i])), double(Wide(x[i]))});
  return sum;
}

template <class F>
auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float16: return f(torch::headeronly::Half());
    case DType::bfloat16: return f(torch::headeronly::BFloat16());
    case DType::float32: return f(float());
    default: return f(double());
  }
}

// ---- boxes ----

// The valid boxes, sorted by image.
struct Boxes {
  std::vector<Box> boxes;
  std::vector<int64_t> begin;  // index of the first box of each image, and the end

  template <class T>
  Boxes(T, const priors::Options& options) : begin(size_t(options.batch) + 2) {
    const auto each = [&](const auto& f) {
      Box box;
      int64_t image;
      for (int64_t i = 0; i < options.count; ++i)
        if (priors::read_box<T>(options, i, box, image)) f(size_t(image), box);
    };
    each([&](size_t image, const Box&) { ++begin[image + 2]; });
    for (size_t i = 1; i < begin.size(); ++i) begin[i] += begin[i - 1];
    boxes.resize(size_t(begin.back()));
    each([&](size_t image, const Box& box) { boxes[size_t(begin[image + 1]++)] = box; });
  }

  template <class F>
  void each_of(int64_t image, const F& f) const {
    for (int64_t i = begin[size_t(image)]; i < begin[size_t(image) + 1]; ++i) f(boxes[size_t(i)]);
  }
};

// fastkd/ops/prior_ops.py turns these errors into more detailed ones.
template <class T>
void require_images(T, const priors::Options& options, int64_t rows) {
  const T* const boxes = static_cast<const T*>(options.boxes);
  for (int64_t i = 0; i < rows; ++i) {
    const double image = double(boxes[5 * i]);
    STD_TORCH_CHECK(!priors::finite(image) || priors::in_batch(image, options.batch),
                    "boxes: expected whole image indices from 0 to ", options.batch - 1, " in column 0, got ", image);
  }
}

void require_anchors(const std::vector<priors::Level>& levels) {
  for (const auto& level : levels)
    for (int i = 0; i < 2 * level.anchor_count; ++i) {
      const double length = Anchor::pixels(level, i);
      STD_TORCH_CHECK(priors::finite(length) && length > 0, "anchors: expected finite widths and heights > 0, got ",
                      length);
    }
}

// ---- iou_mask: a cell's largest IoU / m_k, or 1 where it is above threshold * m_k, m_k being the box's largest ----

// The anchors of one level, and a buffer for g = column * row of one box at each cell.
struct Painter {
  const priors::Options& options;
  const priors::Level& level;
  std::vector<Anchor> anchors;
  std::vector<float> column, share;

  Painter(const priors::Options& options, const priors::Level& level)
      : options(options), level(level), column(size_t(level.width)), share(size_t(level.cells())) {
    for (int a = 0; a < level.anchor_count; ++a) anchors.emplace_back(options, level, a);
  }

  // Sets the widest interval of all anchors in each row to 1.
  void mark(const Box& box, float* map) {
    const Place place(box, options, level);
    double best = 0;
    priors::Reach reach;
    for (const Anchor& anchor : anchors) {
      best = priors::higher(best, priors::best_iou(place, anchor));
      reach.include(place, anchor);
    }
    const double least = priors::least_share(best, options.number);
    const Interval rows = priors::reached(place.y, reach.y);
    for (int y = rows.first; y < rows.end; ++y) {
      double half = -HUGE_VAL;
      for (const Anchor& anchor : anchors)
        half = priors::higher(half, priors::half_interval(place, anchor, least, place.y.distance(y)));
      const Interval cells = priors::interval(place.x, half);
      if (cells.first < cells.end)
        std::fill(map + y * int64_t(level.width) + cells.first, map + y * int64_t(level.width) + cells.end, 1.0f);
    }
  }

  // Computes the largest g over anchors for the cells that an anchor reaches, then their grades.
  void grade(const Box& box, float* map) {
    const Place place(box, options, level);
    float best = 0;
    priors::Reach reach;
    for (const Anchor& anchor : anchors) {
      best = priors::higher(best, priors::largest_share(place, anchor));
      reach.include(place, anchor);
    }
    if (best == 0) return;
    const Interval rows = priors::reached(place.y, reach.y), cells = priors::reached(place.x, reach.x);
    for (int y = rows.first; y < rows.end; ++y) std::fill(row(y) + cells.first, row(y) + cells.end, 0.0f);
    for (const Anchor& anchor : anchors) add(place, anchor);
    const float largest = priors::largest_iou(best);
    for (int y = rows.first; y < rows.end; ++y) {
      const float* const g = row(y);
      float* const to = map + y * int64_t(level.width);
      for (int x = cells.first; x < cells.end; ++x) to[x] = priors::higher(to[x], priors::grade(g[x], largest));
    }
  }

  float* row(int y) { return share.data() + y * int64_t(level.width); }

  void add(const Place& place, const Anchor& anchor) {
    const priors::Fit x_fit(place.x, anchor.x), y_fit(place.y, anchor.y);
    const Interval rows = priors::reached(place.y, y_fit.reach), cells = priors::reached(place.x, x_fit.reach);
    const double areas = anchor.both_areas(place);
    for (int x = cells.first; x < cells.end; ++x)
      column[size_t(x)] = priors::column(place, anchor, areas, place.x.distance(x));
    for (int y = rows.first; y < rows.end; ++y) {
      const float in_y = priors::row(place, anchor, place.y.distance(y)), *const in_x = column.data();
      float* const to = row(y);
      for (int x = cells.first; x < cells.end; ++x) to[x] = priors::higher(to[x], priors::product(in_y, in_x[x]));
    }
  }
};

// ---- box_balance: 1 / the area of the smallest box that covers a cell, else background / the number of other cells --

void paint_balance(const Boxes& boxes, const priors::Options& options, const priors::Level& level, int64_t image,
                   bool inclusive, float* map) {
  boxes.each_of(image, [&](const Box& box) {
    const priors::Covered covered(box, options, level, inclusive);
    for (int y = covered.y.first; y < covered.y.end; ++y) {
      float* const row = map + y * int64_t(level.width);
      for (int x = covered.x.first; x < covered.x.end; ++x) row[x] = priors::higher(row[x], covered.weight);
    }
  });
  const float weight = priors::background_weight(options.number, std::count(map, map + level.cells(), 0.0f));
  for (int64_t i = 0; i < level.cells(); ++i) map[i] = map[i] > 0 ? map[i] : weight;
}

// Fills the map of each image and level by paint(level, image, map), from zeros, and sums the maps of each level.
template <class Paint>
void paint_maps(const priors::Options& options, const std::vector<priors::Level>& levels, const Boxes& boxes,
                const Paint& paint) {
  const int64_t count = int64_t(levels.size()), pieces = count * options.batch;
  int64_t cells = 0;
  for (const auto& level : levels) cells += level.cells();
  const bool small = cells * (options.batch + int64_t(boxes.boxes.size())) < 400000;
  std::vector<double> sums(size_t(pieces), 0.0);
  for_each(pieces, small, [&](int64_t i) {  // levels before images, so that threads have about equal work
    const int64_t l = i % count, image = i / count;
    const priors::Level& level = levels[size_t(l)];
    float* const map = level.map + image * level.cells();
    std::fill(map, map + level.cells(), 0.0f);
    paint(level, image, map);
    sums[size_t(i)] = sum_of(map, level.cells()).total;
  });
  for (int64_t l = 0; l < count; ++l) *levels[size_t(l)].sum = 0;
  for (int64_t i = 0; i < pieces; ++i) *levels[size_t(i % count)].sum += sums[size_t(i)];
}

struct Cpu {
  static void require(const Tensor& x) { STD_TORCH_CHECK(x.is_cpu(), "fastkd: the CPU kernels got other tensors"); }

  template <class T>
  static void iou_mask(T type, const priors::Options& options, bool graded, const std::vector<priors::Level>& levels,
                       const Tensor& tensor) {
    require_images(type, options, tensor.size(0));
    require_anchors(levels);
    const Boxes boxes(type, options);
    paint_maps(options, levels, boxes, [&](const priors::Level& level, int64_t image, float* map) {
      Painter painter(options, level);
      boxes.each_of(image, [&](const Box& box) { graded ? painter.grade(box, map) : painter.mark(box, map); });
    });
  }

  template <class T>
  static void box_balance(T type, const priors::Options& options, bool inclusive,
                          const std::vector<priors::Level>& levels, const Tensor& tensor) {
    require_images(type, options, tensor.size(0));
    const Boxes boxes(type, options);
    paint_maps(options, levels, boxes, [&](const priors::Level& level, int64_t image, float* map) {
      paint_balance(boxes, options, level, image, inclusive, map);
    });
  }

  // Sums pieces of a fixed length, so that the order of the sum does not depend on the number of threads.
  static void prior_sums(const std::vector<Weights>& levels, double* sums, const Tensor&) {
    constexpr int64_t kPiece = 16384;
    const size_t count = levels.size();
    for (size_t l = 0; l < count; ++l) {
      const Weights& level = levels[l];
      const int64_t pieces = (level.count + kPiece - 1) / kPiece;
      std::vector<Sum> parts(static_cast<size_t>(pieces));
      with_dtype(level.dtype, [&](auto type) {
        const auto* const x = static_cast<const decltype(type)*>(level.data);
        for_each(pieces, pieces < 8, [&](int64_t i) {
          parts[size_t(i)] = sum_of(x + i * kPiece, std::min(kPiece, level.count - i * kPiece));
        });
      });
      Sum sum;
      for (const Sum& part : parts) sum.include(part);
      sums[l] = level.count ? sum.total : double(level.cells);
      sums[count + l] = level.count ? sum.least : 1;
    }
  }

  static void update_factor(const FactorStep& call, const Tensor&) {
    double task = 0, distillation = 0;
    if (call.losses) {
      task = with_dtype(call.task_dtype,
                        [&](auto type) { return double(*static_cast<const decltype(type)*>(call.task)); });
      with_float(call.wide_losses, [&](auto type) {
        const auto* const losses = static_cast<const decltype(type)*>(call.losses);
        for (int64_t l = 0; l < call.loss_count; ++l) distillation += double(losses[l]);
      });
    }
    fastkd::update_factor(call.schedule, call.losses, task, distillation, call.averages, call.step, call.factor);
  }
};

}  // namespace
}  // namespace fastkd::cpu

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("iou_mask", TORCH_BOX(&fastkd::iou_mask<fastkd::cpu::Cpu>));
  m.impl("box_balance", TORCH_BOX(&fastkd::box_balance<fastkd::cpu::Cpu>));
  m.impl("prior_sums", TORCH_BOX(&fastkd::prior_sums<fastkd::cpu::Cpu>));
  m.impl("update_factor", TORCH_BOX(&fastkd::update_factor<fastkd::cpu::Cpu>));
}
