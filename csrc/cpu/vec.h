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
template <typename T, typename A>
FASTATTN_INLINE void stream(T* p, Vec<A> x) {
  store(p, x);
}
template <typename A>
FASTATTN_INLINE Vec<A> zero() {
  return set1(A(0));
}

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

// Where the instruction set has nothing better.
template <typename A>
FASTATTN_NOINLINE void transpose(Vec<A> (&r)[Vec<A>::kWidth]) {
  constexpr int w = Vec<A>::kWidth;
  A rows[w * w];
  for (int i = 0; i < w; ++i) store(rows + i * w, r[i]);
  for (int i = 0; i < w; ++i)
    for (int j = 0; j < i; ++j) std::swap(rows[i * w + j], rows[j * w + i]);
  for (int i = 0; i < w; ++i) r[i] = load(rows + i * w);
}

// a + b, and what rounding takes off it (Knuth's two-sum).
template <typename A>
FASTATTN_INLINE std::pair<Vec<A>, Vec<A>> exact_sum(Vec<A> a, Vec<A> b) {
  const Vec<A> sum = a + b, part = sum - a;
  return {sum, (a - (sum - part)) + (b - part)};
}

// Two vectors, one after the other.
template <typename T, typename V>
FASTATTN_INLINE void store_two(T* p, V first, V second) {
  store(p, first);
  store(p + V::kWidth, second);
}

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

}  // namespace
}  // namespace fastattn
