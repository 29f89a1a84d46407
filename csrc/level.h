// What one call computes, and on what: shared by every device. The order of each enum is that of the names in
// fastkd/info_map.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTKD_INLINE __host__ __device__ __forceinline__
#else
#define FASTKD_INLINE inline __attribute__((always_inline))
#endif

namespace fastkd {

enum class Score : int64_t { uniform, magnitude, energy, entropy };
enum class Norm : int64_t { none, mean, softmax, minmax };
enum class Penalty : int64_t { l2, l1, smooth_l1 };
enum class Normalizer : int64_t { elements, map, batch, map_all_ranks };
enum class DType { float16, bfloat16, float32, float64 };

constexpr double kEps = 1e-9;                      // of min-max and of Z = map, as in fastkd/reference.py
constexpr double kTiny = 1.17549435082228751e-38;  // smallest normal float32: guards mean = 0 and log C = 0
constexpr double kLowestLogit = -1000;             // exp() of it is 0 in every dtype

// An (N, C, H, W) tensor by its strides, in elements.
struct Feature {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t image_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;
};

// One level of the backbone or the neck. Acc, the type of arithmetic and maps, is float, or double if any feature is.
template <class Acc>
struct Level {
  int64_t images = 0, channels = 0, height = 0, width = 0;
  Feature student, teacher, grad;
  const Acc* mean = nullptr;   // (C,), null: identity
  const Acc* rstd = nullptr;   // (C,)
  const Acc* prior = nullptr;  // (N, H, W), null: 1
  double* score = nullptr;     // (N, H, W): e, in double, as a difference of near-equal scores may decide the weight
  double* distance = nullptr;  // (N, H, W): D, the penalty summed over channels
  Acc* map = nullptr;          // (N, H, W): the weight w
  Acc slope = 0;               // of the loss by sum w D: upstream gradient * level weight / Z
  bool streams = false;        // CPU: the gradient is written past the caches

  FASTKD_INLINE int64_t cells() const { return height * width; }
};

struct Options {
  Score score = Score::energy;
  Norm norm = Norm::mean;
  Penalty penalty = Penalty::l2;
  double temperature = 1, beta = 1;
};

}  // namespace fastkd
