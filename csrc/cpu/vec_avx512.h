// AVX-512 F, BW, DQ and VL, and BF16 where there is that: the part of vec.h that is this
// instruction set's own.
#pragma once

namespace fastattn {
namespace {

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
#if defined(__AVX512BF16__)
FASTATTN_INLINE void store_two(bf16* p, VecF first, VecF second) {
  const __m512bh halves = _mm512_cvtne2ps_pbh(second.v, first.v);
  std::memcpy(p, &halves, sizeof halves);
}
#endif
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
#if defined(__AVX512BF16__)
  const __m512bh halves = _mm512_cvtne2ps_pbh(odd.v, even.v);  // all even ones, then all odd ones
  __m512i bits;
  std::memcpy(&bits, &halves, sizeof bits);
  alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), bits);
#else
  const __m512i low = _mm512_cvtepu16_epi32(narrow(bf16{}, even));
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(bf16{}, odd)), 16);
  return _mm512_or_si512(low, high);
#endif
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
template <int kShift = 23>
FASTATTN_INLINE VecF add_exponent(VecF x, VecF rounded) {
  const __m512i shift = _mm512_slli_epi32(_mm512_castps_si512(rounded.v), kShift);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), shift))};
}
FASTATTN_INLINE VecMask<float> not_less(VecF a, VecF b) {  // also where one is NaN
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)};
}
FASTATTN_INLINE VecF fma_where(VecMask<float> m, VecF a, VecF b, VecF c) {  // 0 elsewhere
  return {_mm512_maskz_fmadd_ps(m.v, a.v, b.v, c.v)};
}
// table[the lowest bits of index], for a table of 16 or 32 numbers of 32 bits
template <typename Number, int kSize>
FASTATTN_INLINE VecF look_up(const Number (&table)[kSize], VecF index) {
  static_assert(sizeof(Number) == 4 && (kSize == 16 || kSize == 32));
  const __m512i i = _mm512_castps_si512(index.v), low = _mm512_load_si512(table);
  if constexpr (kSize == 16) return {_mm512_castsi512_ps(_mm512_permutexvar_epi32(i, low))};
  const __m512i high = _mm512_load_si512(table + kSize - 16);
  return {_mm512_castsi512_ps(_mm512_permutex2var_epi32(low, i, high))};
}

}  // namespace
}  // namespace fastattn
