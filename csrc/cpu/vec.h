// One vector of floats or doubles per instruction set, behind one interface, so that the kernels
// are written once; only here, in vec_*.h and in vec64.h are there intrinsics. setup.py compiles
// each module with its own flags; the compiler's predefined macros choose the implementation.
//
//   Vec<A>       A is the accumulation type, float or double; Vec<A>::kWidth lanes
//   load, store  any alignment; load_n, store_n touch only the first n lanes (the rest load as 0)
//   the stored types float, double, bf16, f16 are widened by load and rounded (to nearest even) by
//   store vmax(a, b), vmin(a, b)  return b when either is NaN, as x86 does: put what must survive
//   second
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define FASTATTN_X86_VECTORS 1
#elif defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define FASTATTN_NEON 1
#endif
#if defined(_MSC_VER)
#define FASTATTN_INLINE __forceinline
#define FASTATTN_INLINE_LAMBDA
#define FASTATTN_NOINLINE __declspec(noinline)
#else
#if defined(FASTATTN_X86_VECTORS) || defined(__aarch64__)
#define FASTATTN_INLINE inline __attribute__((always_inline))
#define FASTATTN_INLINE_LAMBDA __attribute__((always_inline))
#else  // the portable vector: forcing all of it inline takes half as long again, and is no faster
#define FASTATTN_INLINE inline
#define FASTATTN_INLINE_LAMBDA
#endif
#define FASTATTN_NOINLINE __attribute__((noinline))  // spares compile time, not run time
#endif

namespace fastattn {
namespace {  // one copy per module: modules for different instruction sets must never share code

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;  // statistics and accumulation type of a stored type

// ---- scalars ---------------------------------------------------------------------------------

FASTATTN_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
FASTATTN_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

FASTATTN_INLINE float to_acc(float x) { return x; }
FASTATTN_INLINE double to_acc(double x) { return x; }
FASTATTN_INLINE float to_acc(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
FASTATTN_INLINE float to_acc(f16 x) {
#if defined(FASTATTN_X86_VECTORS)
  return _cvtsh_ss(x.bits);
#elif defined(FASTATTN_NEON)
  __fp16 half;
  std::memcpy(&half, &x.bits, 2);
  return half;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400) return bits_to_float(sign | float_to_bits(float(magnitude) * 0x1p-24f));
  return bits_to_float(sign | (magnitude + (112 << 10)) << 13);
#endif
}

template <typename T>
FASTATTN_INLINE T from_acc(Acc<T> x) {
  return x;
}
template <>
FASTATTN_INLINE bf16 from_acc<bf16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
FASTATTN_INLINE f16 from_acc<f16>(float x) {
#if defined(FASTATTN_X86_VECTORS)
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#elif defined(FASTATTN_NEON)
  const __fp16 half = __fp16(x);
  f16 r;
  std::memcpy(&r.bits, &half, 2);
  return r;
#else
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                                   // subnormal: let the adder round
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13)};
#endif
}

// ---- the portable vector: 16 bytes. An array where there are wider registers: it serves double
// alone there, and compilers join the lanes of several. Elsewhere the compiler's own vector, if it
// has one, whose operators take all lanes at once: faster than what compilers make of arrays, and
// compiled in half the time.
#if defined(__GNUC__) && !defined(FASTATTN_X86_VECTORS)
#define FASTATTN_LANES
#define FASTATTN_EACH
template <typename A>
struct LanesOf {
  typedef A type __attribute__((vector_size(16)));
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> mask_type
      __attribute__((vector_size(16)));
};
#else
#define FASTATTN_LANES for (int i = 0; i < Vec<A>::kWidth; ++i)
#define FASTATTN_EACH [i]
template <typename A>
struct LanesOf {
  typedef A type[16 / sizeof(A)];
  typedef bool mask_type[16 / sizeof(A)];
};
#endif

template <typename A>
struct Vec {
  static constexpr int kWidth = 16 / sizeof(A);
  typename LanesOf<A>::type lane;
};
template <typename A>
struct VecMask {
  typename LanesOf<A>::mask_type lane;
};

template <typename A>
FASTATTN_INLINE Vec<A> set1(A x) {
  Vec<A> r;
  for (int i = 0; i < Vec<A>::kWidth; ++i) r.lane[i] = x;
  return r;
}
template <typename A>
FASTATTN_INLINE Vec<A> iota() {
  Vec<A> r;
  for (int i = 0; i < Vec<A>::kWidth; ++i) r.lane[i] = A(i);
  return r;
}
template <typename T, typename A = Acc<T>>
FASTATTN_INLINE Vec<A> load(const T* p) {
  Vec<A> r;
  for (int i = 0; i < Vec<A>::kWidth; ++i) r.lane[i] = to_acc(p[i]);
  return r;
}
template <typename T, typename A = Acc<T>>
FASTATTN_INLINE Vec<A> load_n(const T* p, int n) {
  Vec<A> r;
  for (int i = 0; i < Vec<A>::kWidth; ++i) r.lane[i] = i < n ? to_acc(p[i]) : A(0);
  return r;
}
template <typename T, typename A = Acc<T>>
FASTATTN_INLINE void store(T* p, Vec<A> x) {
  for (int i = 0; i < Vec<A>::kWidth; ++i) p[i] = from_acc<T>(x.lane[i]);
}
template <typename T, typename A = Acc<T>>
FASTATTN_INLINE void store_n(T* p, Vec<A> x, int n) {
  for (int i = 0; i < n; ++i) p[i] = from_acc<T>(x.lane[i]);
}
#define FASTATTN_BINARY(name, expression)             \
  template <typename A>                               \
  FASTATTN_INLINE Vec<A> name(Vec<A> a, Vec<A> b) {   \
    Vec<A> r;                                         \
    FASTATTN_LANES r.lane FASTATTN_EACH = expression; \
    return r;                                         \
  }
FASTATTN_BINARY(operator+, a.lane FASTATTN_EACH + b.lane FASTATTN_EACH)
FASTATTN_BINARY(operator-, a.lane FASTATTN_EACH - b.lane FASTATTN_EACH)
FASTATTN_BINARY(operator*, a.lane FASTATTN_EACH* b.lane FASTATTN_EACH)
FASTATTN_BINARY(operator/, a.lane FASTATTN_EACH / b.lane FASTATTN_EACH)
FASTATTN_BINARY(vmax, a.lane FASTATTN_EACH > b.lane FASTATTN_EACH ? a.lane FASTATTN_EACH
                                                                  : b.lane FASTATTN_EACH)
FASTATTN_BINARY(vmin, a.lane FASTATTN_EACH < b.lane FASTATTN_EACH ? a.lane FASTATTN_EACH
                                                                  : b.lane FASTATTN_EACH)
#undef FASTATTN_BINARY
// a * b + c as the vectors do it: with one rounding where the instruction set has it. Nothing else
// is ever fused (setup.py: -ffp-contract=off), so that a product rounds alike wherever it is made.
#if defined(FASTATTN_X86_VECTORS) || defined(__aarch64__)
constexpr bool kFmaIsExact = true;
template <typename A>
FASTATTN_INLINE A fma(A a, A b, A c) {
  return std::fma(a, b, c);
}
template <typename A>
FASTATTN_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
  Vec<A> r;
  for (int i = 0; i < Vec<A>::kWidth; ++i) r.lane[i] = fma(a.lane[i], b.lane[i], c.lane[i]);
  return r;
}
#else
constexpr bool kFmaIsExact = false;
template <typename A>
FASTATTN_INLINE A fma(A a, A b, A c) {
  return a * b + c;
}
template <typename A>
FASTATTN_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
  return a * b + c;
}
#endif
template <typename A>
FASTATTN_INLINE VecMask<A> less(Vec<A> a, Vec<A> b) {  // false where either is NaN
  VecMask<A> r;
  FASTATTN_LANES r.lane FASTATTN_EACH = a.lane FASTATTN_EACH < b.lane FASTATTN_EACH;
  return r;
}
template <typename A>
FASTATTN_INLINE VecMask<A> equal(Vec<A> a, Vec<A> b) {
  VecMask<A> r;
  FASTATTN_LANES r.lane FASTATTN_EACH = a.lane FASTATTN_EACH == b.lane FASTATTN_EACH;
  return r;
}
template <typename A>
FASTATTN_INLINE Vec<A> select(VecMask<A> m, Vec<A> yes, Vec<A> no) {
  Vec<A> r;
  FASTATTN_LANES r.lane FASTATTN_EACH =
      m.lane FASTATTN_EACH ? yes.lane FASTATTN_EACH : no.lane FASTATTN_EACH;
  return r;
}
template <typename A>
FASTATTN_INLINE Vec<A> vabs(Vec<A> a) {
  for (int i = 0; i < Vec<A>::kWidth; ++i) a.lane[i] = a.lane[i] < 0 ? -a.lane[i] : a.lane[i];
  return a;
}
template <typename A>
FASTATTN_INLINE A hsum(Vec<A> a) {
  A r = 0;
  for (int i = 0; i < Vec<A>::kWidth; ++i) r += a.lane[i];
  return r;
}
template <typename A>
FASTATTN_INLINE A hmax_any(Vec<A> a) {  // unspecified if any lane is NaN
  A r = a.lane[0];
  for (int i = 0; i < Vec<A>::kWidth; ++i) r = r > a.lane[i] ? r : a.lane[i];
  return r;
}
template <typename A>
FASTATTN_INLINE void transpose(Vec<A> (&r)[Vec<A>::kWidth]) {
  for (int i = 0; i < Vec<A>::kWidth; ++i)
    for (int j = 0; j < i; ++j) {
      const A x = r[i].lane[j];
      r[i].lane[j] = r[j].lane[i];
      r[j].lane[i] = x;
    }
}
// 2^x, to 1e-7 in float; below the smallest normal 0 or a subnormal, inf above the largest, NaN for
// NaN. exp2_below is for x < 128, or NaN: a little faster.
FASTATTN_INLINE Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kWidth; ++i) x.lane[i] = std::exp2(x.lane[i]);
  return x;
}
template <typename T, typename A>
FASTATTN_INLINE void stream(T* p, Vec<A> x) {
  store(p, x);
}
template <typename A>
FASTATTN_INLINE Vec<A> zero() {
  return set1(A(0));
}

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

#if !defined(FASTATTN_X86_VECTORS) && !defined(FASTATTN_NEON)
// x times 2^n, where the low bits of `rounded` are n.
FASTATTN_INLINE Vec<float> add_exponent(Vec<float> x, Vec<float> rounded) {
  for (int i = 0; i < Vec<float>::kWidth; ++i)
    x.lane[i] = bits_to_float(float_to_bits(x.lane[i]) + (float_to_bits(rounded.lane[i]) << 23));
  return x;
}
#endif

}  // namespace
}  // namespace fastattn

#if defined(FASTATTN_X86_VECTORS) && defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(FASTATTN_X86_VECTORS)
#include "vec_avx2.h"
#elif defined(FASTATTN_NEON)
#include "vec_neon.h"
#endif

namespace fastattn {
namespace {

// Fetches a line into the second-level cache. Not into the first, which what lies ahead of a kernel
// would fill, and whose few misses at a time keep memory from being read at its speed: half of it,
// on a Zen 4.
FASTATTN_INLINE void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p, 0, 2);
#elif defined(_M_X64)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
#else
  (void)p;
#endif
}

FASTATTN_INLINE void prefetch_bytes(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) prefetch(static_cast<const char*>(p) + at);
}

// Reads what lies at p, for its page to be known: on a Zen 4, prefetches of rows a page apart bring
// nothing until that has been done.
FASTATTN_INLINE void touch(const void* p) { (void)*static_cast<const volatile char*>(p); }

// The least that keeps streaming stores ordered before the caller's next synchronisation.
FASTATTN_INLINE void stream_fence() {
#if defined(__SSE2__) || defined(_M_X64)
  _mm_sfence();
#endif
}

// ---- built on the interface above -------------------------------------------------------------

template <typename F, int... kIndex>
FASTATTN_INLINE void unroll_indices(F&& f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}
// f(0), f(1), ... with constant arguments, so that arrays indexed by them live in registers.
template <int kCount, typename F>
FASTATTN_INLINE void unroll(F&& f) {
  unroll_indices(f, std::make_integer_sequence<int, kCount>{});
}

// x[0] = all of them reduced, as a tree, which rounds a sum less than a chain does.
template <int kCount, typename A, int kSize, typename Reduce>
FASTATTN_INLINE void reduce_as_tree(Vec<A> (&x)[kSize], const Reduce& reduce) {
  if constexpr (kCount > 1) {
    unroll<kCount / 2>([&](auto i) { x[i] = reduce(x[i], x[i + kCount / 2]); });
    reduce_as_tree<kCount / 2>(x, reduce);
  }
}

constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

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
  // Fewer instructions than exp2_below takes, but more that compete with FMA for its slots. The
  // bound is far enough down for the result to round to 0.
  Vec<float> whole[kCount];
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { x[i] = vmax(set1(-200.0f), x[i]); });
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { whole[i] = nearest_whole(x[i]); });
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { x[i] = x[i] - whole[i]; });
  exp2_of_fraction<kShort>(x);
  unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { x[i] = times_power(x[i], whole[i]); });
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

template <>
class ScaledExp<float, true> {
 public:
  explicit ScaledExp(double scale)
      : high_(float(scale * kLog2E)),
        low_(float(scale * kLog2E - double(high_))),
        least_(float(std::max(-87.0 / scale, double(std::numeric_limits<float>::lowest())))) {}

  template <int kCount>
  FASTATTN_INLINE void operator()(Vec<float> (&x)[kCount]) const {
    const Vec<float> magic = set1(kRoundMagic), high = set1(high_), low = set1(low_);
    const Vec<float> least = set1(least_);
    Vec<float> rounded[kCount], f[kCount];
    unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { rounded[i] = fma(x[i], high, magic); });
    unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { f[i] = magic - rounded[i]; });
    unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { f[i] = fma(x[i], high, f[i]); });
    unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA { f[i] = fma(x[i], low, f[i]); });
    exp2_of_fraction<false>(f);
    unroll<kCount>([&](auto i) FASTATTN_INLINE_LAMBDA {
#if defined(FASTATTN_X86_VECTORS) && defined(__AVX512F__)
      x[i] = add_exponent_from(x[i], least, f[i], rounded[i]);
#else
      x[i] = select(less(x[i], least), zero<float>(), add_exponent(f[i], rounded[i]));
#endif
    });
  }

 private:
  float high_, low_, least_;  // scale log2(e) = high + low; below least the result is 0
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

template <>
class ScaledExp<double, true> {
 public:
  explicit ScaledExp(double scale) : scale_(scale) {}
  template <int kCount>
  void operator()(Vec<double> (&x)[kCount]) const {
    for (Vec<double>& v : x) {
      double lanes[Vec<double>::kWidth];
      store(lanes, v * set1(scale_));
      for (double& lane : lanes) lane = std::exp(lane);
      v = load(lanes);
    }
  }

 private:
  double scale_;
};

FASTATTN_INLINE Vec<double> vtanh(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kWidth; ++i) x.lane[i] = std::tanh(x.lane[i]);
  return x;
}
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
