// The arithmetic of the priors from boxes for one box, anchor or cell. csrc/small_ops.cpp and csrc/cuda/small_ops.cuh
// share it, so that both return the same bits; fastkd/ops/prior_ops.py has the same formulas in PyTorch.
//
//   iou_mask:    q_p = 1 if IoU > threshold * m_k for any box k and anchor at p; graded: q_p = max IoU / m_k;
//                m_k = max over cells and anchors of the level of the IoU with box k
//   box_balance: q_p = 1 / area of the smallest box that covers p, or background / number of cells in no box
//
// Lengths are in units of a level's cells, in double; an IoU does not change when an axis is scaled. On every device a
// product is rounded before it is added to anything, see product().
#pragma once

#include <cmath>
#include <cstdint>

#include "level.h"

namespace fastkd::priors {

constexpr double kTie = 1e-9;  // relative; far above the rounding of double, far below the resolution of float boxes
constexpr double kSmallest = 2.2250738585072014e-308;  // smallest normal float64: no area is 0

FASTKD_INLINE double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

FASTKD_INLINE float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <class T>
FASTKD_INLINE T lower(T a, T b) {
  return b < a ? b : a;
}

template <class T>
FASTKD_INLINE T higher(T a, T b) {
  return b > a ? b : a;
}

template <class T>
FASTKD_INLINE T clamped(T x, T low, T high) {
  return lower(higher(x, low), high);
}

FASTKD_INLINE bool finite(double x) { return x - x == 0; }

// One level: its anchors, its map and the place of the map's sum.
struct Level {
  const void* anchors = nullptr;  // (A, 2) widths and heights in pixels, float64 if `wide`, else float32
  bool wide = false;
  int anchor_count = 0, height = 0, width = 0;
  float* map = nullptr;   // (N, height, width)
  double* sum = nullptr;  // of the map

  FASTKD_INLINE int64_t cells() const { return int64_t(height) * width; }
};

// The arguments of a call except its levels. `number` is iou_mask's threshold or box_balance's background.
struct Options {
  const void* boxes = nullptr;  // (M, 5): image index, x1, y1, x2, y2 in pixels
  int64_t count = 0, batch = 0;
  int height = 0, width = 0;  // of the network's input, in pixels
  double number = 0;
};

// ---- boxes and anchors on a level ----

struct Box {
  double x1, y1, x2, y2;  // clipped to the image, in pixels
};

FASTKD_INLINE bool in_batch(double image, int64_t batch) {
  return image >= 0 && image < double(batch) && image == floor(image);
}

// Reads a box and its image index, and clips the box; returns false for a box to ignore.
template <class T>
FASTKD_INLINE bool read_box(const Options& options, int64_t index, Box& box, int64_t& image) {
  const T* const row = static_cast<const T*>(options.boxes) + 5 * index;
  const double number = double(row[0]);
  if (!in_batch(number, options.batch)) return false;
  for (int i = 1; i < 5; ++i)
    if (!finite(double(row[i]))) return false;
  image = int64_t(number);
  const double width = options.width, height = options.height;
  box = {clamped(double(row[1]), 0.0, width), clamped(double(row[2]), 0.0, height), clamped(double(row[3]), 0.0, width),
         clamped(double(row[4]), 0.0, height)};
  return box.x1 < box.x2 && box.y1 < box.y2;
}

// The product comes first, so that integer pixels are exact at strides that are powers of two.
FASTKD_INLINE double in_cells(double pixels, int cells, int image) { return product(pixels, double(cells)) / image; }

// One axis of a box.
struct Side {
  double length, centre;
  int cells;  // of the level

  Side() = default;
  FASTKD_INLINE Side(double low, double high, int cells, int image) : cells(cells) {
    low = in_cells(low, cells, image);
    high = in_cells(high, cells, image);
    length = high - low;
    centre = (low + high) / 2;
  }
  // distance from the centre of a cell to that of the box
  FASTKD_INLINE double distance(int cell) const {
    const double d = cell + 0.5 - centre;
    return d < 0 ? -d : d;
  }
  // the same for the nearest cell
  FASTKD_INLINE double least_distance() const { return distance(lower(int(centre), cells - 1)); }
};

struct Place {
  Side x, y;

  Place() = default;
  FASTKD_INLINE Place(const Box& box, const Options& options, const Level& level)
      : x(box.x1, box.x2, level.width, options.width), y(box.y1, box.y2, level.height, options.height) {}
};

// One axis of a box and an anchor. Their overlap is min(smaller, reach - distance of their centres).
struct Fit {
  double smaller;  // the shorter of the two
  double reach;    // distance of the centres at which they only touch

  FASTKD_INLINE Fit(const Side& side, double anchor)
      : smaller(lower(side.length, anchor)), reach((side.length + anchor) / 2) {}
  FASTKD_INLINE double overlap(double distance) const { return higher(lower(reach - distance, smaller), 0.0); }
};

struct Anchor {
  double x, y;  // lengths; 0 for a length that is not finite and positive, so that it overlaps nothing

  FASTKD_INLINE Anchor(const Options& options, const Level& level, int index)
      : x(side(level, 2 * index, level.width, options.width)),
        y(side(level, 2 * index + 1, level.height, options.height)) {}
  static FASTKD_INLINE double pixels(const Level& level, int index) {
    return level.wide ? static_cast<const double*>(level.anchors)[index]
                      : double(static_cast<const float*>(level.anchors)[index]);
  }
  static FASTKD_INLINE double side(const Level& level, int index, int cells, int image) {
    const double length = pixels(level, index);
    return in_cells(finite(length) && length > 0 ? length : 0, cells, image);
  }
  // area of the box plus area of the anchor, with the overlap counted twice
  FASTKD_INLINE double both_areas(const Place& box) const {
    return higher(product(box.x.length, box.y.length) + product(x, y), kSmallest);
  }
};

// How far a box's anchors reach, in cells.
struct Reach {
  double x = 0, y = 0;

  FASTKD_INLINE void include(const Place& box, const Anchor& anchor) {
    x = higher(x, Fit(box.x, anchor.x).reach);
    y = higher(y, Fit(box.y, anchor.y).reach);
  }
};

// ---- iou_mask, graded: IoU / m_k ----
//
// g = overlap / (sum of both areas) is monotone in the IoU = g / (1 - g), so anchors are compared by g, and only the
// best is divided. g = column(x) * row(y): one product per cell and anchor.

FASTKD_INLINE float column(const Place& box, const Anchor& anchor, double areas, double distance) {
  return float(Fit(box.x, anchor.x).overlap(distance) / areas);
}

FASTKD_INLINE float row(const Place& box, const Anchor& anchor, double distance) {
  return float(Fit(box.y, anchor.y).overlap(distance));
}

// The largest g of a box and an anchor: the same product as for the nearest cell, so that the best cell is exactly 1.
FASTKD_INLINE float largest_share(const Place& box, const Anchor& anchor) {
  return product(column(box, anchor, anchor.both_areas(box), box.x.least_distance()),
                 row(box, anchor, box.y.least_distance()));
}

// m_k from the largest g; 1 if nothing overlaps
FASTKD_INLINE float largest_iou(float g) { return g > 0 ? g / (1 - g) : 1; }

FASTKD_INLINE float grade(float g, float largest) { return g / (1 - g) / largest; }

// ---- iou_mask: 1 where an IoU is above threshold * m_k ----
//
// IoU > c is equivalent to overlap > c / (1 + c) * (sum of both areas), and the overlap is the product of those in x
// and y. So in a given row an anchor passes where its overlap in x exceeds some t: at distances below reach - t. All
// anchors have the same centres, so the cells of a row that a box marks are one interval, the widest of all anchors.

FASTKD_INLINE double best_iou(const Place& box, const Anchor& anchor) {
  const double overlap = product(Fit(box.x, anchor.x).overlap(box.x.least_distance()),
                                 Fit(box.y, anchor.y).overlap(box.y.least_distance()));
  return overlap / (anchor.both_areas(box) - overlap);
}

// The share of both areas that an overlap must exceed. An equal IoU must not pass because of rounding, and nothing may
// pass if no anchor overlaps the box.
FASTKD_INLINE double least_share(double largest, double threshold) {
  const double bar = product(threshold, largest);
  return bar > 0 ? product(1 + kTie, bar) / (1 + bar) : HUGE_VAL;
}

// Half the length of the interval that the anchor marks at this distance in y; -infinity for none.
FASTKD_INLINE double half_interval(const Place& box, const Anchor& anchor, double least, double distance) {
  const Fit x(box.x, anchor.x);
  const double needed = product(least, anchor.both_areas(box)) / Fit(box.y, anchor.y).overlap(distance);
  return needed < x.smaller ? x.reach - needed : -HUGE_VAL;
}

struct Interval {
  int first, end;  // cells [first, end)
};

FASTKD_INLINE Interval interval(const Side& side, double half) {
  if (half == -HUGE_VAL) return {0, 0};
  return {int(clamped(floor(side.centre - half - 0.5) + 1, 0.0, double(side.cells))),
          int(clamped(ceil(side.centre + half - 0.5), 0.0, double(side.cells)))};
}

// The cells whose anchors, of this reach, can overlap the box, and possibly one more at either end.
FASTKD_INLINE Interval reached(const Side& side, double reach) { return interval(side, reach + 0.5); }

// ---- box_balance: 1 / area of the smallest box ----

struct Covered {
  Interval x, y;
  float weight;

  Covered() = default;
  FASTKD_INLINE Covered(const Box& box, const Options& options, const Level& level, bool inclusive) {
    const double width = side(box.x1, box.x2, level.width, options.width, inclusive, x);
    const double height = side(box.y1, box.y2, level.height, options.height, inclusive, y);
    weight = float(1 / higher(product(width, height), 1.0));
  }
  // The cells that the box overlaps, if inclusive also the one where it ends; returns their number, including one that
  // may lie beyond the last cell.
  static FASTKD_INLINE double side(double low, double high, int cells, int image, bool inclusive, Interval& covered) {
    const double first = floor(in_cells(low, cells, image)), end = ceil(in_cells(high, cells, image)) + inclusive;
    covered = {int(first), int(lower(end, double(cells)))};
    return end - first;
  }
};

FASTKD_INLINE float background_weight(double background, int64_t empty) {
  return float(background / double(empty > 1 ? empty : 1));
}

}  // namespace fastkd::priors
