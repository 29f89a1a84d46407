// exp(x) of x <= 0 to about 1 ulp: 2^n * exp(r) with |r| <= log(2) / 2; 0 below the normal range of float.
inline float exponential(float x) {
  constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, magic = 12582912.f;
  const float n = (x * log2e + magic) - magic;
  const float r = (x - n * ln2_high) - n * ln2_low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.f;
  const float power = as_float(uint32_t(int32_t(x < -87.f ? 0.f : n) + 127) << 23);
  return x < -87.f ? 0.f : p * power;
}
inline double exponential(double x) { return std::exp(x); }

// Standardisation and bias of channel c: t' = (t - mean) * rstd and s + bias; identity if the level has neither.
template <class Acc>
struct Affine {
  const Acc *mean, *rstd, *bias;
  explicit Affine(const Level<Acc>& level) : mean(level.mean), rstd(level.rstd), bias(level.bias) {}
  Acc mean_of(int64_t c) const { return mean ? mean[c] : Acc(0); }
  Acc rstd_of(int64_t c) const { return mean ? rstd[c] : Acc(1); }
  Acc bias_of(int64_t c) const { return mean ? bias[c] : Acc(0); }

  // Calls f with two functions of (j, element): for the student and for the teacher, at channel c + j.
  template <class F>
  FASTKD_INLINE void from(int64_t c, const F& f) const {
    const auto same = [](int64_t, Acc x) { return x; };
    if (!mean) return f(same, same);
    const Acc *m = mean + c, *r = rstd + c, *b = bias + c;
    f([b](int64_t j, Acc x) { return x + b[j]; }, [m, r](int64_t j, Acc x) { return (x - m[j]) * r[j]; });
  }
};

template <class T>
inline T logit(T x, T highest, T temperature) {
  const T u = (x - highest) / temperature;
  return u < T(kLowestLogit) ? T(kLowestLogit) : u;
}

// The weight of a cell: as weigh wrote it, in double; from the forward's map; or the prior, if that is the map.
template <class Acc>
FASTKD_INLINE double weight(const Level<Acc>& level, int64_t cell) {
  if (level.score) return level.score[cell];
  if (level.map) return double(level.map[cell]);
  return level.prior ? double(level.prior[cell]) : 1;
}
