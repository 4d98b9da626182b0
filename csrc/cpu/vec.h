// The only file with intrinsics: one vector of floats or doubles per instruction set, behind one
// interface, so that the kernels are written once. setup.py compiles each module with its own
// flags; the compiler's predefined macros choose the implementation here.
//
//   Vec<A>       A is the accumulation type, float or double; Vec<A>::kWidth lanes
//   load, store  any alignment; load_n, store_n touch only the first n lanes (the rest load as 0)
//   the stored types float, double, bf16, f16 are widened by load and rounded (to nearest even) by
//   store vmax(a, b), vmin(a, b)  return b when either is NaN, as x86 does: put what must survive
//   second
#pragma once
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
#if defined(__GNUC__) && !defined(FASTATTN_X86_VECTORS) && !defined(__aarch64__)
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
template <typename A>
FASTATTN_INLINE A fma(A a, A b, A c) {
#if defined(FASTATTN_X86_VECTORS) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}
template <typename A>
FASTATTN_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(FASTATTN_X86_VECTORS) || defined(__aarch64__)
  Vec<A> r;
  for (int i = 0; i < Vec<A>::kWidth; ++i) r.lane[i] = fma(a.lane[i], b.lane[i], c.lane[i]);
  return r;
#else
  return a * b + c;
#endif
}
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
// The polynomial for 2^f on [-1/2, 1/2]: minimax with 2^0 = 1 exact, relative error 2e-9. One
// degree less would do for softmax (1e-7), but shows in gradients beside libm's exp.
constexpr float kExp2Poly[6] = {0.6931472f,   0.24022648f,   0.055503324f,
                                0.009618437f, 0.0013398874f, 0.00015353362f};

#if !defined(FASTATTN_X86_VECTORS) && !(defined(__ARM_NEON) && defined(__aarch64__))
FASTATTN_INLINE Vec<float> exp2_parts(Vec<float> rounded, Vec<float> f) {
  for (int i = 0; i < Vec<float>::kWidth; ++i) {
    float p = kExp2Poly[5];
    for (int k = 4; k >= 0; --k) p = fma(p, f.lane[i], kExp2Poly[k]);
    p = fma(p, f.lane[i], 1.0f);
    f.lane[i] = bits_to_float(float_to_bits(p) + (float_to_bits(rounded.lane[i]) << 23));
  }
  return f;
}
#endif

#if defined(FASTATTN_X86_VECTORS) && !defined(__AVX512F__)
// ---- AVX2 + FMA + F16C -------------------------------------------------------------------------
template <>
struct Vec<float> {
  static constexpr int kWidth = 8;
  __m256 v;
};
template <>
struct VecMask<float> {
  __m256 v;
};
using VecF = Vec<float>;

template <>
FASTATTN_INLINE VecF set1<float>(float x) {
  return {_mm256_set1_ps(x)};
}
template <>
FASTATTN_INLINE VecF iota<float>() {
  return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)};
}
FASTATTN_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTATTN_INLINE VecF widen(bf16, __m128i x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
FASTATTN_INLINE VecF widen(f16, __m128i x) { return {_mm256_cvtph_ps(x)}; }
// The upper half of each lane is x rounded to bf16; a NaN becomes all ones.
FASTATTN_INLINE __m256i round_to_upper_half(VecF x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_or_si256(r, _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)));
}
FASTATTN_INLINE __m128i narrow(bf16, VecF x) {
  const __m256i r = _mm256_srli_epi32(round_to_upper_half(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
FASTATTN_INLINE __m128i narrow(f16, VecF x) {
  return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT);
}
FASTATTN_INLINE VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
FASTATTN_INLINE VecF load(const bf16* p) {
  return widen(bf16{}, _mm_loadu_si128((const __m128i*)p));
}
FASTATTN_INLINE VecF load(const f16* p) { return widen(f16{}, _mm_loadu_si128((const __m128i*)p)); }
FASTATTN_INLINE VecF load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, first_lanes(n))};
}
template <typename Half>
FASTATTN_INLINE VecF load_half_n(const Half* p, int n) {
  Half copy[8] = {};
  std::memcpy(copy, p, size_t(n) * 2);
  return load(copy);
}
FASTATTN_INLINE VecF load_n(const bf16* p, int n) { return load_half_n(p, n); }
FASTATTN_INLINE VecF load_n(const f16* p, int n) { return load_half_n(p, n); }
FASTATTN_INLINE void store(float* p, VecF x) { _mm256_storeu_ps(p, x.v); }
FASTATTN_INLINE void store(bf16* p, VecF x) { _mm_storeu_si128((__m128i*)p, narrow(bf16{}, x)); }
FASTATTN_INLINE void store(f16* p, VecF x) { _mm_storeu_si128((__m128i*)p, narrow(f16{}, x)); }
FASTATTN_INLINE void store_n(float* p, VecF x, int n) {
  _mm256_maskstore_ps(p, first_lanes(n), x.v);
}
template <typename Half>
FASTATTN_INLINE void store_half_n(Half* p, VecF x, int n) {
  Half copy[8];
  store(copy, x);
  std::memcpy(p, copy, size_t(n) * 2);
}
FASTATTN_INLINE void store_n(bf16* p, VecF x, int n) { store_half_n(p, x, n); }
FASTATTN_INLINE void store_n(f16* p, VecF x, int n) { store_half_n(p, x, n); }
// Stores that pass by the cache; p must be aligned to the vector as stored.
FASTATTN_INLINE void stream(float* p, VecF x) { _mm256_stream_ps(p, x.v); }
FASTATTN_INLINE void stream(bf16* p, VecF x) { _mm_stream_si128((__m128i*)p, narrow(bf16{}, x)); }
FASTATTN_INLINE void stream(f16* p, VecF x) { _mm_stream_si128((__m128i*)p, narrow(f16{}, x)); }
// Two vectors at once in the order that costs least: the even numbers of 2 kWidth, and the odd
// ones.
FASTATTN_INLINE VecF load_even(const bf16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16))};
}
FASTATTN_INLINE VecF load_odd(const bf16* p) {
  return {_mm256_castsi256_ps(
      _mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(int(0xffff0000))))};
}
FASTATTN_INLINE __m256i interleave(VecF even, VecF odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(round_to_upper_half(even), 16),
                            round_to_upper_half(odd), 0xaa);
}
FASTATTN_INLINE void store_pair(bf16* p, VecF even, VecF odd) {
  _mm256_storeu_si256((__m256i*)p, interleave(even, odd));
}
FASTATTN_INLINE void stream_pair(bf16* p, VecF even, VecF odd) {  // p aligned to both vectors
  _mm256_stream_si256((__m256i*)p, interleave(even, odd));
}
FASTATTN_INLINE VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF vmax(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF vmin(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE VecMask<float> less(VecF a, VecF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)};
}
FASTATTN_INLINE VecMask<float> equal(VecF a, VecF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)};
}
FASTATTN_INLINE VecF select(VecMask<float> m, VecF yes, VecF no) {
  return {_mm256_blendv_ps(no.v, yes.v, m.v)};
}
FASTATTN_INLINE VecF vabs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FASTATTN_INLINE float hsum(VecF a) {
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}
FASTATTN_INLINE void transpose(VecF (&r)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
FASTATTN_INLINE float hmax_any(VecF a) {
  __m128 r = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  r = _mm_max_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}
FASTATTN_INLINE VecF exp2_parts(VecF rounded, VecF f) {
  __m256 p = _mm256_set1_ps(kExp2Poly[5]);
  for (int k = 4; k >= 0; --k) p = _mm256_fmadd_ps(p, f.v, _mm256_set1_ps(kExp2Poly[k]));
  p = _mm256_fmadd_ps(p, f.v, _mm256_set1_ps(1.0f));
  const __m256i shift = _mm256_slli_epi32(_mm256_castps_si256(rounded.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), shift))};
}
#elif defined(FASTATTN_X86_VECTORS)
// ---- AVX-512 F, BW, DQ, VL
// ------------------------------------------------------------------------
template <>
struct Vec<float> {
  static constexpr int kWidth = 16;
  __m512 v;
};
template <>
struct VecMask<float> {
  __mmask16 v;
};
using VecF = Vec<float>;

template <>
FASTATTN_INLINE VecF set1<float>(float x) {
  return {_mm512_set1_ps(x)};
}
template <>
FASTATTN_INLINE VecF iota<float>() {
  return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
FASTATTN_INLINE __mmask16 first_lanes(int n) {
  return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << (n < 0 ? 0 : n)) - 1u);
}
FASTATTN_INLINE VecF widen(bf16, __m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
FASTATTN_INLINE VecF widen(f16, __m256i x) { return {_mm512_cvtph_ps(x)}; }
FASTATTN_INLINE __m256i narrow(bf16, VecF x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(x.v);
  __m256i r;
  std::memcpy(&r, &half, sizeof r);
  return r;
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), bits,
                           _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
#endif
}
FASTATTN_INLINE __m256i narrow(f16, VecF x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FASTATTN_INLINE VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTATTN_INLINE VecF load(const bf16* p) {
  return widen(bf16{}, _mm256_loadu_si256((const __m256i*)p));
}
FASTATTN_INLINE VecF load(const f16* p) {
  return widen(f16{}, _mm256_loadu_si256((const __m256i*)p));
}
FASTATTN_INLINE VecF load_n(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
FASTATTN_INLINE VecF load_n(const bf16* p, int n) {
  return widen(bf16{}, _mm256_maskz_loadu_epi16(first_lanes(n), p));
}
FASTATTN_INLINE VecF load_n(const f16* p, int n) {
  return widen(f16{}, _mm256_maskz_loadu_epi16(first_lanes(n), p));
}
FASTATTN_INLINE void store(float* p, VecF x) { _mm512_storeu_ps(p, x.v); }
FASTATTN_INLINE void store(bf16* p, VecF x) { _mm256_storeu_si256((__m256i*)p, narrow(bf16{}, x)); }
FASTATTN_INLINE void store(f16* p, VecF x) { _mm256_storeu_si256((__m256i*)p, narrow(f16{}, x)); }
FASTATTN_INLINE void store_n(float* p, VecF x, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), x.v);
}
FASTATTN_INLINE void store_n(bf16* p, VecF x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(bf16{}, x));
}
FASTATTN_INLINE void store_n(f16* p, VecF x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(f16{}, x));
}
FASTATTN_INLINE void stream(float* p, VecF x) { _mm512_stream_ps(p, x.v); }
FASTATTN_INLINE void stream(bf16* p, VecF x) {
  _mm256_stream_si256((__m256i*)p, narrow(bf16{}, x));
}
FASTATTN_INLINE void stream(f16* p, VecF x) { _mm256_stream_si256((__m256i*)p, narrow(f16{}, x)); }
// As in the AVX2 part.
FASTATTN_INLINE VecF load_even(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
}
FASTATTN_INLINE VecF load_odd(const bf16* p) {
  return {_mm512_castsi512_ps(
      _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))))};
}
FASTATTN_INLINE __m512i interleave(VecF even, VecF odd) {
  const __m512i low = _mm512_cvtepu16_epi32(narrow(bf16{}, even));
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(bf16{}, odd)), 16);
  return _mm512_or_si512(low, high);
}
FASTATTN_INLINE void store_pair(bf16* p, VecF even, VecF odd) {
  _mm512_storeu_si512(p, interleave(even, odd));
}
FASTATTN_INLINE void stream_pair(bf16* p, VecF even, VecF odd) {
  _mm512_stream_si512((__m512i*)p, interleave(even, odd));
}
FASTATTN_INLINE VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF vmax(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF vmin(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTATTN_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FASTATTN_INLINE VecMask<float> less(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
FASTATTN_INLINE VecMask<float> equal(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
}
FASTATTN_INLINE VecF select(VecMask<float> m, VecF yes, VecF no) {
  return {_mm512_mask_blend_ps(m.v, no.v, yes.v)};
}
FASTATTN_INLINE VecF vabs(VecF a) { return {_mm512_abs_ps(a.v)}; }
FASTATTN_INLINE float hsum(VecF a) { return _mm512_reduce_add_ps(a.v); }
FASTATTN_INLINE void transpose(VecF (&r)[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  // b[4 g + c] holds, in its 128-bit lane l, column 4 l + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 lo01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x44);
    const __m512 hi01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xee);
    const __m512 lo23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x44);
    const __m512 hi23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xee);
    r[c].v = _mm512_shuffle_f32x4(lo01, lo23, 0x88);
    r[4 + c].v = _mm512_shuffle_f32x4(lo01, lo23, 0xdd);
    r[8 + c].v = _mm512_shuffle_f32x4(hi01, hi23, 0x88);
    r[12 + c].v = _mm512_shuffle_f32x4(hi01, hi23, 0xdd);
  }
}
FASTATTN_INLINE float hmax_any(VecF a) { return _mm512_reduce_max_ps(a.v); }
FASTATTN_INLINE VecF exp2_parts(VecF rounded, VecF f) {
  __m512 p = _mm512_set1_ps(kExp2Poly[5]);
  for (int k = 4; k >= 0; --k) p = _mm512_fmadd_ps(p, f.v, _mm512_set1_ps(kExp2Poly[k]));
  p = _mm512_fmadd_ps(p, f.v, _mm512_set1_ps(1.0f));
  const __m512i shift = _mm512_slli_epi32(_mm512_castps_si512(rounded.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), shift))};
}
// 2^x for x < 128, NaN for any NaN, in fewer instructions than exp2_below, but more that compete
// with FMA for its slots. The bound is far enough down for the result to round to 0.
// Vectors go in step, so that each waits for its own last result while the others work.
template <int kCount>
FASTATTN_INLINE void exp2_scaled(VecF (&x)[kCount]) {
  __m512 whole[kCount], p[kCount];
  const auto each = [](auto&& step) FASTATTN_INLINE_LAMBDA {
    for (int i = 0; i < kCount; ++i) step(i);
  };
  each([&](int i)
           FASTATTN_INLINE_LAMBDA { x[i].v = _mm512_max_ps(_mm512_set1_ps(-200.0f), x[i].v); });
  each([&](int i) FASTATTN_INLINE_LAMBDA {
    whole[i] = _mm512_roundscale_ps(x[i].v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  });
  each([&](int i) FASTATTN_INLINE_LAMBDA { x[i].v = _mm512_sub_ps(x[i].v, whole[i]); });
  each([&](int i) FASTATTN_INLINE_LAMBDA { p[i] = _mm512_set1_ps(kExp2Poly[5]); });
  for (int k = 4; k >= 0; --k)
    each([&](int i) FASTATTN_INLINE_LAMBDA {
      p[i] = _mm512_fmadd_ps(p[i], x[i].v, _mm512_set1_ps(kExp2Poly[k]));
    });
  each([&](int i)
           FASTATTN_INLINE_LAMBDA { p[i] = _mm512_fmadd_ps(p[i], x[i].v, _mm512_set1_ps(1.0f)); });
  each([&](int i) FASTATTN_INLINE_LAMBDA { x[i].v = _mm512_scalef_ps(p[i], whole[i]); });
}
#elif defined(__ARM_NEON) && defined(__aarch64__)
// ---- Arm NEON (AArch64)
// ---------------------------------------------------------------------------
template <>
struct Vec<float> {
  static constexpr int kWidth = 4;
  float32x4_t v;
};
template <>
struct VecMask<float> {
  uint32x4_t v;
};
using VecF = Vec<float>;

template <>
FASTATTN_INLINE VecF set1<float>(float x) {
  return {vdupq_n_f32(x)};
}
template <>
FASTATTN_INLINE VecF iota<float>() {
  const float lanes[4] = {0, 1, 2, 3};
  return {vld1q_f32(lanes)};
}
FASTATTN_INLINE VecF widen(bf16, uint16x4_t x) {
  return {vreinterpretq_f32_u32(vshll_n_u16(x, 16))};
}
FASTATTN_INLINE VecF widen(f16, uint16x4_t x) { return {vcvt_f32_f16(vreinterpret_f16_u16(x))}; }
FASTATTN_INLINE uint16x4_t narrow(bf16, VecF x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x.v, x.v), rounded, quiet), 16);
}
FASTATTN_INLINE uint16x4_t narrow(f16, VecF x) { return vreinterpret_u16_f16(vcvt_f16_f32(x.v)); }
FASTATTN_INLINE VecF load(const float* p) { return {vld1q_f32(p)}; }
FASTATTN_INLINE VecF load(const bf16* p) { return widen(bf16{}, vld1_u16((const uint16_t*)p)); }
FASTATTN_INLINE VecF load(const f16* p) { return widen(f16{}, vld1_u16((const uint16_t*)p)); }
template <typename T>
FASTATTN_INLINE VecF load_copy_n(const T* p, int n) {
  T copy[4] = {};
  std::memcpy(copy, p, size_t(n) * sizeof(T));
  return load(copy);
}
FASTATTN_INLINE VecF load_n(const float* p, int n) { return load_copy_n(p, n); }
FASTATTN_INLINE VecF load_n(const bf16* p, int n) { return load_copy_n(p, n); }
FASTATTN_INLINE VecF load_n(const f16* p, int n) { return load_copy_n(p, n); }
FASTATTN_INLINE void store(float* p, VecF x) { vst1q_f32(p, x.v); }
FASTATTN_INLINE void store(bf16* p, VecF x) { vst1_u16((uint16_t*)p, narrow(bf16{}, x)); }
FASTATTN_INLINE void store(f16* p, VecF x) { vst1_u16((uint16_t*)p, narrow(f16{}, x)); }
template <typename T>
FASTATTN_INLINE void store_copy_n(T* p, VecF x, int n) {
  T copy[4];
  store(copy, x);
  std::memcpy(p, copy, size_t(n) * sizeof(T));
}
FASTATTN_INLINE void store_n(float* p, VecF x, int n) { store_copy_n(p, x, n); }
FASTATTN_INLINE void store_n(bf16* p, VecF x, int n) { store_copy_n(p, x, n); }
FASTATTN_INLINE void store_n(f16* p, VecF x, int n) { store_copy_n(p, x, n); }
FASTATTN_INLINE void stream(float* p, VecF x) { store(p, x); }
FASTATTN_INLINE void stream(bf16* p, VecF x) { store(p, x); }
FASTATTN_INLINE void stream(f16* p, VecF x) { store(p, x); }
FASTATTN_INLINE VecF operator+(VecF a, VecF b) { return {vaddq_f32(a.v, b.v)}; }
FASTATTN_INLINE VecF operator-(VecF a, VecF b) { return {vsubq_f32(a.v, b.v)}; }
FASTATTN_INLINE VecF operator*(VecF a, VecF b) { return {vmulq_f32(a.v, b.v)}; }
FASTATTN_INLINE VecF operator/(VecF a, VecF b) { return {vdivq_f32(a.v, b.v)}; }
// NEON's own maximum returns NaN when either side is NaN; the comparison gives the x86 rule.
FASTATTN_INLINE VecF vmax(VecF a, VecF b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
FASTATTN_INLINE VecF vmin(VecF a, VecF b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
FASTATTN_INLINE VecF fma(VecF a, VecF b, VecF c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
FASTATTN_INLINE VecMask<float> less(VecF a, VecF b) { return {vcltq_f32(a.v, b.v)}; }
FASTATTN_INLINE VecMask<float> equal(VecF a, VecF b) { return {vceqq_f32(a.v, b.v)}; }
FASTATTN_INLINE VecF select(VecMask<float> m, VecF yes, VecF no) {
  return {vbslq_f32(m.v, yes.v, no.v)};
}
FASTATTN_INLINE VecF vabs(VecF a) { return {vabsq_f32(a.v)}; }
FASTATTN_INLINE float hsum(VecF a) { return vaddvq_f32(a.v); }
FASTATTN_INLINE void transpose(VecF (&r)[4]) {
  const float32x4x2_t a = vtrnq_f32(r[0].v, r[1].v), b = vtrnq_f32(r[2].v, r[3].v);
  r[0].v = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  r[1].v = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  r[2].v = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  r[3].v = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}
FASTATTN_INLINE float hmax_any(VecF a) { return vmaxvq_f32(a.v); }
FASTATTN_INLINE VecF exp2_parts(VecF rounded, VecF f) {
  float32x4_t p = vdupq_n_f32(kExp2Poly[5]);
  for (int k = 4; k >= 0; --k) p = vfmaq_f32(vdupq_n_f32(kExp2Poly[k]), p, f.v);
  p = vfmaq_f32(vdupq_n_f32(1.0f), p, f.v);
  const int32x4_t shift = vshlq_n_s32(vreinterpretq_s32_f32(rounded.v), 23);
  return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), shift))};
}
#endif

FASTATTN_INLINE void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p);
#elif defined(_M_X64)
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
#else
  (void)p;
#endif
}

// ---- 64-bit lanes whose low halves hold random words (philox.h): the products of Philox are 64
// bits
struct Vec64 {
#if defined(FASTATTN_X86_VECTORS) && defined(__AVX512F__)
  static constexpr int kWidth = 8;
  __m512i v;
#elif defined(FASTATTN_X86_VECTORS)
  static constexpr int kWidth = 4;
  __m256i v;
#else
  static constexpr int kWidth = 4;
  uint64_t lane[4];
#endif
};

#if defined(FASTATTN_X86_VECTORS) && defined(__AVX512F__)
FASTATTN_INLINE Vec64 splat64(uint32_t x) { return {_mm512_set1_epi64(x)}; }
FASTATTN_INLINE Vec64 iota64() { return {_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)}; }
FASTATTN_INLINE Vec64 add64(Vec64 a, Vec64 b) { return {_mm512_add_epi64(a.v, b.v)}; }
FASTATTN_INLINE Vec64 xor64(Vec64 a, Vec64 b) { return {_mm512_xor_si512(a.v, b.v)}; }
FASTATTN_INLINE Vec64 high64(Vec64 a) { return {_mm512_srli_epi64(a.v, 32)}; }
FASTATTN_INLINE Vec64 multiply_low(Vec64 a, Vec64 b) { return {_mm512_mul_epu32(a.v, b.v)}; }
FASTATTN_INLINE void store_words(uint32_t* dst, Vec64 a, Vec64 b, Vec64 c, Vec64 d) {
  const __mmask16 odd = 0xaaaa;
  const __m512i ab = _mm512_mask_blend_epi32(odd, a.v, _mm512_slli_epi64(b.v, 32));
  const __m512i cd = _mm512_mask_blend_epi32(odd, c.v, _mm512_slli_epi64(d.v, 32));
  const __m512i even_groups = _mm512_unpacklo_epi64(ab, cd),
                odd_groups = _mm512_unpackhi_epi64(ab, cd);
  const __m512i lo = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i hi = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  _mm512_storeu_si512(dst, _mm512_permutex2var_epi64(even_groups, lo, odd_groups));
  _mm512_storeu_si512(dst + 16, _mm512_permutex2var_epi64(even_groups, hi, odd_groups));
}
#elif defined(FASTATTN_X86_VECTORS)
FASTATTN_INLINE Vec64 splat64(uint32_t x) { return {_mm256_set1_epi64x(x)}; }
FASTATTN_INLINE Vec64 iota64() { return {_mm256_setr_epi64x(0, 1, 2, 3)}; }
FASTATTN_INLINE Vec64 add64(Vec64 a, Vec64 b) { return {_mm256_add_epi64(a.v, b.v)}; }
FASTATTN_INLINE Vec64 xor64(Vec64 a, Vec64 b) { return {_mm256_xor_si256(a.v, b.v)}; }
FASTATTN_INLINE Vec64 high64(Vec64 a) { return {_mm256_srli_epi64(a.v, 32)}; }
FASTATTN_INLINE Vec64 multiply_low(Vec64 a, Vec64 b) { return {_mm256_mul_epu32(a.v, b.v)}; }
FASTATTN_INLINE void store_words(uint32_t* dst, Vec64 a, Vec64 b, Vec64 c, Vec64 d) {
  const __m256i ab = _mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xaa);
  const __m256i cd = _mm256_blend_epi32(c.v, _mm256_slli_epi64(d.v, 32), 0xaa);
  const __m256i even_groups = _mm256_unpacklo_epi64(ab, cd),
                odd_groups = _mm256_unpackhi_epi64(ab, cd);
  _mm256_storeu_si256((__m256i*)dst, _mm256_permute2x128_si256(even_groups, odd_groups, 0x20));
  _mm256_storeu_si256((__m256i*)(dst + 8),
                      _mm256_permute2x128_si256(even_groups, odd_groups, 0x31));
}
#else
#define FASTATTN_BINARY64(name, expression)                         \
  FASTATTN_INLINE Vec64 name(Vec64 a, Vec64 b) {                    \
    for (int i = 0; i < Vec64::kWidth; ++i) a.lane[i] = expression; \
    return a;                                                       \
  }
FASTATTN_BINARY64(add64, a.lane[i] + b.lane[i])
FASTATTN_BINARY64(xor64, a.lane[i] ^ b.lane[i])
FASTATTN_BINARY64(multiply_low, (a.lane[i] & 0xffffffffu) * (b.lane[i] & 0xffffffffu))
#undef FASTATTN_BINARY64
FASTATTN_INLINE Vec64 splat64(uint32_t x) { return {{x, x, x, x}}; }
FASTATTN_INLINE Vec64 iota64() { return {{0, 1, 2, 3}}; }
FASTATTN_INLINE Vec64 high64(Vec64 a) {
  for (uint64_t& x : a.lane) x >>= 32;
  return a;
}
FASTATTN_INLINE void store_words(uint32_t* dst, Vec64 a, Vec64 b, Vec64 c, Vec64 d) {
  for (int i = 0; i < Vec64::kWidth; ++i, dst += 4) {
    dst[0] = uint32_t(a.lane[i]);
    dst[1] = uint32_t(b.lane[i]);
    dst[2] = uint32_t(c.lane[i]);
    dst[3] = uint32_t(d.lane[i]);
  }
}
#endif

FASTATTN_INLINE void prefetch_bytes(const void* p, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at);
#endif
}

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

FASTATTN_INLINE Vec<float> exp2_below(Vec<float> x) {
  const Vec<float> magic = set1(kRoundMagic), c = vmax(set1(-127.0f), x);  // NaN passes through
  const Vec<float> rounded = c + magic;
  return exp2_parts(rounded, c - (rounded - magic));
}
FASTATTN_INLINE Vec<float> exp2(Vec<float> x) { return exp2_below(vmin(set1(128.0f), x)); }

// exp2_below for rows that may hold any NaN: exp2_below keeps those without a payload.
template <typename A, int kCount>
FASTATTN_INLINE void exp2_or_nan(Vec<A> (&x)[kCount]) {
#if defined(FASTATTN_X86_VECTORS) && defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return exp2_scaled(x);
#endif
  for (Vec<A>& v : x) v = select(equal(v, v), exp2_below(v), v);
}
template <typename A>
FASTATTN_INLINE Vec<A> exp2_or_nan(Vec<A> x) {
  Vec<A> one[] = {x};
  exp2_or_nan(one);
  return one[0];
}

// e^x for x < 88, or NaN, to 1e-7 whatever the size of x: no product is rounded on the way, as
// exp2(x * log2(e)) rounds one. For gradients, where that shows beside libm.
FASTATTN_INLINE Vec<float> exp_below(Vec<float> x) {
  const Vec<float> magic = set1(kRoundMagic), high = set1(float(kLog2E));
  const Vec<float> low = set1(float(kLog2E - float(kLog2E)));
  const Vec<float> rounded = fma(x, high, magic);
  const Vec<float> f = fma(x, low, fma(x, high, magic - rounded));
  return select(less(x, set1(-87.0f)), zero<float>(), exp2_parts(rounded, f));
}
FASTATTN_INLINE Vec<double> exp_below(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kWidth; ++i) x.lane[i] = std::exp(x.lane[i]);
  return x;
}

// e^x, given x times kExpUnit: float counts exponents in units of log2, which its exp2 wants;
// double takes them as they are, and loses no bit to the conversion.
template <typename A>
constexpr A kExpUnit = A(kLog2E);
template <>
constexpr double kExpUnit<double> = 1.0;
FASTATTN_INLINE Vec<float> exp_units(Vec<float> x) { return exp2_below(x); }
FASTATTN_INLINE Vec<double> exp_units(Vec<double> x) { return exp_below(x); }

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
