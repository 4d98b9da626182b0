// 64-bit lanes whose low halves hold random words (philox.h): the products of Philox are 64 bits.
// As vec.h: intrinsics for each instruction set behind one interface.
#pragma once
#include "vec.h"

namespace fastattn {
namespace {

struct Vec64 {
#if defined(FASTATTN_X86_VECTORS) && defined(__AVX512F__)
  static constexpr int kWidth = 8;
  __m512i v;
#elif defined(FASTATTN_X86_VECTORS)
  static constexpr int kWidth = 4;
  __m256i v;
#elif defined(FASTATTN_NEON)
  static constexpr int kWidth = 4;
  uint64x2_t v[2];
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
#elif defined(FASTATTN_NEON)
FASTATTN_INLINE Vec64 splat64(uint32_t x) { return {{vdupq_n_u64(x), vdupq_n_u64(x)}}; }
FASTATTN_INLINE Vec64 iota64() {
  const uint64_t lanes[4] = {0, 1, 2, 3};
  return {{vld1q_u64(lanes), vld1q_u64(lanes + 2)}};
}
FASTATTN_INLINE Vec64 add64(Vec64 a, Vec64 b) {
  return {{vaddq_u64(a.v[0], b.v[0]), vaddq_u64(a.v[1], b.v[1])}};
}
FASTATTN_INLINE Vec64 xor64(Vec64 a, Vec64 b) {
  return {{veorq_u64(a.v[0], b.v[0]), veorq_u64(a.v[1], b.v[1])}};
}
FASTATTN_INLINE Vec64 high64(Vec64 a) {
  return {{vshrq_n_u64(a.v[0], 32), vshrq_n_u64(a.v[1], 32)}};
}
FASTATTN_INLINE Vec64 multiply_low(Vec64 a, Vec64 b) {
  return {{vmull_u32(vmovn_u64(a.v[0]), vmovn_u64(b.v[0])),
           vmull_u32(vmovn_u64(a.v[1]), vmovn_u64(b.v[1]))}};
}
FASTATTN_INLINE void store_words(uint32_t* dst, Vec64 a, Vec64 b, Vec64 c, Vec64 d) {
  const auto low = [](Vec64 x) FASTATTN_INLINE_LAMBDA {
    return vuzp1q_u32(vreinterpretq_u32_u64(x.v[0]), vreinterpretq_u32_u64(x.v[1]));
  };
  const uint32x4x4_t words = {{low(a), low(b), low(c), low(d)}};
  vst4q_u32(dst, words);
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

}  // namespace
}  // namespace fastattn
