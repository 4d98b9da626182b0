// Arm NEON (AArch64): the part of vec.h that is this instruction set's own.
#pragma once

namespace fastattn {
namespace {

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
// Lane by lane: memcpy of a length known at run time is a call, before which every vector at work
// goes to the stack.
template <typename T>
FASTATTN_INLINE VecF load_copy_n(const T* p, int n) {
  if (n >= 4) return load(p);
  T copy[4] = {};
  for (int i = 0; i < 3; ++i)
    if (i < n) copy[i] = p[i];
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
  if (n >= 4) return store(p, x);
  T copy[4];
  store(copy, x);
  for (int i = 0; i < 3; ++i)
    if (i < n) p[i] = copy[i];
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
  const float64x2_t a0 = vreinterpretq_f64_f32(vtrn1q_f32(r[0].v, r[1].v));
  const float64x2_t a1 = vreinterpretq_f64_f32(vtrn2q_f32(r[0].v, r[1].v));
  const float64x2_t b0 = vreinterpretq_f64_f32(vtrn1q_f32(r[2].v, r[3].v));
  const float64x2_t b1 = vreinterpretq_f64_f32(vtrn2q_f32(r[2].v, r[3].v));
  r[0].v = vreinterpretq_f32_f64(vtrn1q_f64(a0, b0));
  r[1].v = vreinterpretq_f32_f64(vtrn1q_f64(a1, b1));
  r[2].v = vreinterpretq_f32_f64(vtrn2q_f64(a0, b0));
  r[3].v = vreinterpretq_f32_f64(vtrn2q_f64(a1, b1));
}
FASTATTN_INLINE float hmax_any(VecF a) { return vmaxvq_f32(a.v); }
FASTATTN_INLINE VecF add_exponent(VecF x, VecF rounded) {
  const int32x4_t shift = vshlq_n_s32(vreinterpretq_s32_f32(rounded.v), 23);
  return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x.v), shift))};
}

// The portable vector serves doubles, but for what compilers take lane by lane.
template <>
FASTATTN_INLINE Vec<double> set1<double>(double x) {
  return {vdupq_n_f64(x)};
}
FASTATTN_INLINE Vec<double> load(const double* p) { return {vld1q_f64(p)}; }
FASTATTN_INLINE void store(double* p, Vec<double> x) { vst1q_f64(p, x.lane); }
FASTATTN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {vfmaq_f64(c.lane, a.lane, b.lane)};
}

}  // namespace
}  // namespace fastattn
