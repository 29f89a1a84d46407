// The options and tensors of a call, the same for every device. Each enum has the order of the names in
// fastkd/ops/presets.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTKD_INLINE __host__ __device__ __forceinline__
#else
#define FASTKD_INLINE inline __attribute__((always_inline))
#endif

namespace fastkd {

enum class Score : int64_t { uniform, magnitude, energy, entropy };
enum class MapNorm : int64_t { none, mean, softmax, minmax };
enum class Penalty : int64_t { l2, l1, smooth_l1 };
enum class Divisor : int64_t { elements, map, batch, map_all_ranks };
enum class DType { float16, bfloat16, float32, float64 };

constexpr double kEps = 1e-9;  // added to the denominators of min-max and of Z = map, as in fastkd/ops/reference.py
constexpr double kTiny = 1.17549435082228751e-38;  // smallest normal float32: guards mean = 0 and log C = 0
constexpr double kLowestLogit = -1000;             // exp() of it is 0 in every dtype

// An (N, C, H, W) tensor with its strides in elements.
struct Feature {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t image_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;
};

// One level. Acc, the type of arithmetic and maps, is double if any feature is, else float.
template <class Acc>
struct Level {
  int64_t images = 0, channels = 0, height = 0, width = 0;
  Feature student, teacher, grad;
  const Acc* mean = nullptr;   // (C,); mean, rstd and bias are all given, or all null: t' = t and no bias
  const Acc* rstd = nullptr;   // (C,)
  const Acc* bias = nullptr;   // (C,): of the student's adapter, whose output lacks it: x = (s + bias) - t'
  const Acc* prior = nullptr;  // (N, H, W), null: 1
  double* score = nullptr;     // (N, H, W): e; double, as the difference of nearly equal scores may decide a weight
  double* distance = nullptr;  // (N, H, W): D, the penalty summed over channels
  Acc* map = nullptr;          // (N, H, W): the weight w
  Acc* bias_grad = nullptr;    // (C,): the gradient summed over images and cells; null: not wanted
  Acc slope = 0;               // derivative of the loss by sum w D: upstream gradient or factor * weight / Z

  FASTKD_INLINE int64_t cells() const { return height * width; }
};

// The options of a call, as in fastkd/ops/options.py.
struct Options {
  Score score = Score::energy;
  MapNorm map_norm = MapNorm::mean;
  Penalty penalty = Penalty::l2;
  Divisor divisor = Divisor::elements;
  double temperature = 1, beta = 1;

  // Whether the weight of each cell is its prior, and so known before any feature is read.
  FASTKD_INLINE bool weights_are_known() const { return score == Score::uniform && map_norm == MapNorm::none; }
};

}  // namespace fastkd
