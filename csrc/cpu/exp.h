// Exponentials of vectors, and what is made of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "vec.h"

namespace fastattn {
namespace {

constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

// In double the functions of libm do, lane by lane.
FASTATTN_NOINLINE inline Vec<double> each_lane(Vec<double> x, double (*function)(double)) {
  double lanes[Vec<double>::kWidth];
  store(lanes, x);
  for (double& lane : lanes) lane = function(lane);
  return load(lanes);
}

// 2^x, to 1e-7 in float; below the smallest normal 0 or a subnormal, inf above the largest, NaN for
// NaN. exp2_below is for x < 128, or NaN: a little faster.
FASTATTN_INLINE Vec<double> exp2(Vec<double> x) { return each_lane(x, std::exp2); }
FASTATTN_INLINE Vec<double> exp2_below(Vec<double> x) { return exp2(x); }

// How the float versions work: x = n + f with n whole; 2^f by a polynomial whose exponent bits then
// grow by n. Adding 1.5 * 2^23 rounds to n and leaves n in the low bits. x is first raised to
// -127, where the exponent bits become those of exactly 0. exp2_below leaves out the bound above.
constexpr float kRoundMagic = 12582912.0f;
// Polynomials for 2^f on [-1/2, 1/2]: minimax with 2^0 = 1 exact, relative error 2e-9, and 1e-7,
// which would do for softmax, but shows in gradients beside libm's exp.
constexpr float kExp2Poly[6] = {0.6931472f,   0.24022648f,   0.055503324f,
                                0.009618437f, 0.0013398874f, 0.00015353362f};
constexpr float kExp2ShortPoly[5] = {0.693147f, 0.240222424f, 0.0555073358f, 0.00967151299f,
                                     0.00132647273f};

// What follows takes several vectors at once, in step: each waits for its own last result while the
// others work, and the processor need not look far ahead for work.

// f -> 2^f for f in [-1/2, 1/2]
template <bool kShort, int kCount>
FASTATTN_INLINE void exp2_of_fraction(Vec<float> (&f)[kCount]) {
  constexpr int terms = kShort ? 5 : 6;
  const auto c = [](int k) { return set1(kShort ? kExp2ShortPoly[k % 5] : kExp2Poly[k]); };
  Vec<float> p[kCount];
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { p[i] = c(terms - 1); });
  unroll<terms - 1>([&](auto k) FASTATTN_INLINE_LAMBDA {
    unroll<kCount>([&](auto i)
                       FASTATTN_INLINE_LAMBDA { p[i] = fma(p[i], f[i], c(terms - 2 - k)); });
  });
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { f[i] = fma(p[i], f[i], set1(1.0f)); });
}
#if defined(FASTATTN_X86_VECTORS) && defined(__AVX512F__)
// 2^(i / kSize) for 0 <= i < kSize, where vectors hold such a table.
template <int kSize>
struct PowerTable {
  // The bits of the floats, less those of i where add_exponent will have shifted it.
  static constexpr int kShift = kSize == 32 ? 18 : 19;
  alignas(64) uint32_t bits[kSize] = {};
  alignas(64) float rest[kSize] = {};  // what rounding took off them, relative

  constexpr PowerTable() {
    for (int i = 0; i < kSize; ++i) {
      double exact = 1, term = 1;
      for (int k = 1; k < 20; ++k) exact += term *= kLn2 * i / kSize / k;
      const uint32_t mantissa = uint32_t((exact - 1) * 0x800000 + 0.5);
      bits[i] = 0x3f800000u + mantissa - (uint32_t(i) << kShift);
      rest[i] = float(exact / (1 + mantissa / double(0x800000)) - 1);
    }
  }
};
template <bool kExact>
constexpr int kParts = kExact ? 16 : 32;

// x = 2^(k / kParts + f) where it is kept, else 0; k is in the low bits of index. The table makes a
// shorter polynomial do, by two multiply-adds, with which looking up and shifting do not compete.
// kExact: to 6e-8, else 1e-7.
template <bool kExact, int kCount>
FASTATTN_INLINE void exp2_by_table(Vec<float> (&x)[kCount], const Vec<float> (&index)[kCount],
                                   const Vec<float> (&f)[kCount],
                                   const VecMask<float> (&kept)[kCount]) {
  static constexpr PowerTable<kParts<kExact>> table{};
  // 2^f = 1 + f p
  constexpr float poly[3] = {kExact ? 0.6931472f : 0.6931573f, kExact ? 0.24023429f : 0.24022867f,
                             0.05550595f};
  Vec<float> p[kCount];
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA {
    x[i] = add_exponent<table.kShift>(look_up(table.bits, index[i]), index[i]);
    p[i] = kExact ? fma(f[i], set1(poly[2]), set1(poly[1])) : set1(poly[1]);
  });
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { p[i] = fma(f[i], p[i], set1(poly[0])); });
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA {
    p[i] = kExact ? fma(f[i], p[i], look_up(table.rest, index[i])) : f[i] * p[i];
  });
  unroll<kCount>([&](auto i)
                     FASTATTN_INLINE_LAMBDA { x[i] = fma_where(kept[i], x[i], p[i], x[i]); });
}
#endif

// NaN passes through.
template <bool kShort, int kCount>
FASTATTN_INLINE void exp2_below(Vec<float> (&x)[kCount]) {
  const Vec<float> magic = set1(kRoundMagic);
  Vec<float> rounded[kCount];
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { x[i] = vmax(set1(-127.0f), x[i]); });
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { rounded[i] = x[i] + magic; });
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { x[i] = x[i] - (rounded[i] - magic); });
  exp2_of_fraction<kShort>(x);
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { x[i] = add_exponent(x[i], rounded[i]); });
}
FASTATTN_INLINE Vec<float> exp2_below(Vec<float> x) {
  Vec<float> one[] = {x};
  exp2_below<false>(one);
  return one[0];
}
FASTATTN_INLINE Vec<float> exp2(Vec<float> x) { return exp2_below(vmin(set1(128.0f), x)); }

// 2^x for x < 128, or NaN, for rows that may hold any NaN: exp2_below keeps those without a
// payload. kShort as in exp2_of_fraction.
template <bool kShort, int kCount>
FASTATTN_INLINE void exp2_or_nan(Vec<float> (&x)[kCount]) {
#if defined(FASTATTN_X86_VECTORS) && defined(__AVX512F__)
  const Vec<float> magic = set1(kRoundMagic / kParts<!kShort>);
  Vec<float> index[kCount], f[kCount];
  VecMask<float> kept[kCount];
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { index[i] = x[i] + magic; });
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { f[i] = index[i] - magic; });
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA {
    f[i] = x[i] - f[i];
    kept[i] = not_less(x[i], set1(-126.0f));
  });
  exp2_by_table<!kShort>(x, index, f, kept);
#else
  for (Vec<float>& v : x) v = select(equal(v, v), exp2_below(v), v);
#endif
}
template <bool kShort, int kCount>
FASTATTN_INLINE void exp2_or_nan(Vec<double> (&x)[kCount]) {
  for (Vec<double>& v : x) v = select(equal(v, v), exp2_below(v), v);
}
template <typename A>
FASTATTN_INLINE Vec<A> exp2_or_nan(Vec<A> x) {
  Vec<A> one[] = {x};
  exp2_or_nan<false>(one);
  return one[0];
}

// x -> e^(scale x) for scale > 0 and scale x < 88, or NaN. kExact: to 1e-7 whatever the size of x:
// no product is rounded on the way, as exp2(x * log2(e)) rounds one. For gradients, where that
// shows beside libm.
template <typename A, bool kExact>
class ScaledExp;

// scale log2(e) = high + low; x below least is taken for one whose power is 0.
struct ScaledLog2E {
  float high, low, least;
  explicit ScaledLog2E(double scale)
      : high(float(scale * kLog2E)),
        low(float(scale * kLog2E - double(high))),
        least(float(std::max(-87.0 / scale, double(std::numeric_limits<float>::lowest())))) {}

  // x scale log2(e) = k / kSteps + f, with k in the low bits of index. Without kLow, high is all.
  template <int kSteps, bool kLow, int kCount>
  FASTATTN_INLINE void split(const Vec<float> (&x)[kCount], Vec<float> (&index)[kCount],
                             Vec<float> (&f)[kCount]) const {
    const Vec<float> magic = set1(kRoundMagic / kSteps), by = set1(high), rest = set1(low);
    unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { index[i] = fma(x[i], by, magic); });
    unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { f[i] = magic - index[i]; });
    unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { f[i] = fma(x[i], by, f[i]); });
    if constexpr (kLow)
      unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { f[i] = fma(x[i], rest, f[i]); });
  }
};

#if defined(FASTATTN_X86_VECTORS) && defined(__AVX512F__)
template <bool kExact>
class ScaledExp<float, kExact> {
 public:
  explicit ScaledExp(double scale) : scale_(scale) {}

  template <int kCount>
  FASTATTN_INLINE void operator()(Vec<float> (&x)[kCount]) const {
    Vec<float> index[kCount], f[kCount];
    VecMask<float> kept[kCount];
    scale_.split<kParts<kExact>, kExact>(x, index, f);
    unroll<kCount>([&](auto i)
                       FASTATTN_INLINE_LAMBDA { kept[i] = not_less(x[i], set1(scale_.least)); });
    exp2_by_table<kExact>(x, index, f, kept);
  }

 private:
  ScaledLog2E scale_;
};

#else
template <>
class ScaledExp<float, true> {
 public:
  explicit ScaledExp(double scale) : scale_(scale) {}

  template <int kCount>
  FASTATTN_INLINE void operator()(Vec<float> (&x)[kCount]) const {
    const Vec<float> least = set1(scale_.least);
    Vec<float> rounded[kCount], f[kCount];
    scale_.split<1, true>(x, rounded, f);
    exp2_of_fraction<false>(f);
    unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA {
      x[i] = select(less(x[i], least), zero<float>(), add_exponent(f[i], rounded[i]));
    });
  }

 private:
  ScaledLog2E scale_;
};

template <>
class ScaledExp<float, false> {
 public:
  explicit ScaledExp(double scale) : scale_(float(scale * kLog2E)) {}
  template <int kCount>
  FASTATTN_INLINE void operator()(Vec<float> (&x)[kCount]) const {
    unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { x[i] = x[i] * set1(scale_); });
    exp2_below<true>(x);
  }

 private:
  float scale_;
};
#endif

template <>
class ScaledExp<double, true> {
 public:
  explicit ScaledExp(double scale) : scale_(scale) {}
  template <int kCount>
  void operator()(Vec<double> (&x)[kCount]) const {
    for (Vec<double>& v : x) v = each_lane(v * set1(scale_), std::exp);
  }

 private:
  double scale_;
};

FASTATTN_INLINE Vec<double> vtanh(Vec<double> x) { return each_lane(x, std::tanh); }
// tanh to 2e-7 relative: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
FASTATTN_INLINE Vec<float> vtanh(Vec<float> x) {
  const Vec<float> a = vabs(x), z = x * x;
  Vec<float> p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const Vec<float> near = fma(p * z, x, x);
  const Vec<float> e = exp2(a * set1(float(2 * kLog2E)));
  const Vec<float> far = set1(1.0f) - set1(2.0f) / (e + set1(1.0f));
  const Vec<float> signed_far = select(less(x, set1(0.0f)), set1(0.0f) - far, far);
  return select(less(a, set1(0.625f)), near, signed_far);
}

}  // namespace
}  // namespace fastattn
