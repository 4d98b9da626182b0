// AVX2, FMA and F16C: the part of vec.h that is this instruction set's own.
#pragma once

namespace fastattn {
namespace {

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
FASTATTN_INLINE VecF add_exponent(VecF x, VecF rounded) {
  const __m256i shift = _mm256_slli_epi32(_mm256_castps_si256(rounded.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.v), shift))};
}

template <>
struct Vec<double> {
  static constexpr int kWidth = 4;
  __m256d v;
};
template <>
struct VecMask<double> {
  __m256d v;
};
using VecD = Vec<double>;

template <>
FASTATTN_INLINE VecD set1<double>(double x) {
  return {_mm256_set1_pd(x)};
}
template <>
FASTATTN_INLINE VecD iota<double>() {
  return {_mm256_setr_pd(0, 1, 2, 3)};
}
FASTATTN_INLINE __m256i first_doubles(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FASTATTN_INLINE VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
FASTATTN_INLINE VecD load_n(const double* p, int n) {
  return {_mm256_maskload_pd(p, first_doubles(n))};
}
FASTATTN_INLINE void store(double* p, VecD x) { _mm256_storeu_pd(p, x.v); }
FASTATTN_INLINE void store_n(double* p, VecD x, int n) {
  _mm256_maskstore_pd(p, first_doubles(n), x.v);
}
FASTATTN_INLINE void stream(double* p, VecD x) { _mm256_stream_pd(p, x.v); }
FASTATTN_INLINE VecD operator+(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
FASTATTN_INLINE VecD operator-(VecD a, VecD b) { return {_mm256_sub_pd(a.v, b.v)}; }
FASTATTN_INLINE VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
FASTATTN_INLINE VecD operator/(VecD a, VecD b) { return {_mm256_div_pd(a.v, b.v)}; }
FASTATTN_INLINE VecD vmax(VecD a, VecD b) { return {_mm256_max_pd(a.v, b.v)}; }
FASTATTN_INLINE VecD vmin(VecD a, VecD b) { return {_mm256_min_pd(a.v, b.v)}; }
FASTATTN_INLINE VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
FASTATTN_INLINE VecMask<double> less(VecD a, VecD b) {
  return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)};
}
FASTATTN_INLINE VecMask<double> equal(VecD a, VecD b) {
  return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)};
}
FASTATTN_INLINE VecD select(VecMask<double> m, VecD yes, VecD no) {
  return {_mm256_blendv_pd(no.v, yes.v, m.v)};
}
FASTATTN_INLINE VecD vabs(VecD a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
FASTATTN_INLINE double hsum(VecD a) {
  const __m128d r = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(r, _mm_unpackhi_pd(r, r)));
}
FASTATTN_INLINE double hmax_any(VecD a) {
  const __m128d r = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(r, _mm_unpackhi_pd(r, r)));
}

}  // namespace
}  // namespace fastattn
