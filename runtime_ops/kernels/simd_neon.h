// Four lanes: Advanced SIMD on aarch64. See simd_scalar.h for the contract.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct V {
  static constexpr int kLanes = 4;
  float32x4_t v;
};
struct Mask {
  uint32x4_t m;
};

inline V load(const float* p) { return {vld1q_f32(p)}; }
inline void store(float* p, V a) { vst1q_f32(p, a.v); }
inline V splat(float x) { return {vdupq_n_f32(x)}; }
inline V operator+(V a, V b) { return {vaddq_f32(a.v, b.v)}; }
inline V operator-(V a, V b) { return {vsubq_f32(a.v, b.v)}; }
inline V operator*(V a, V b) { return {vmulq_f32(a.v, b.v)}; }
inline V fused(V a, V b, V c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline V operator/(V a, V b) { return {vdivq_f32(a.v, b.v)}; }
inline Mask operator<(V a, V b) { return {vcltq_f32(a.v, b.v)}; }
inline V select(Mask m, V a, V b) { return {vbslq_f32(m.m, a.v, b.v)}; }
// Not vmaxq/vminq: those return NaN when either operand is one.
inline V max(V a, V b) { return select(b < a, a, b); }
inline V min(V a, V b) { return select(a < b, a, b); }
inline V square_root(V a) { return {vsqrtq_f32(a.v)}; }

inline V keep_bits(V a, uint32_t mask) {
  return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a.v), vdupq_n_u32(mask)))};
}

inline V round_even(V a) { return {vrndnq_f32(a.v)}; }

inline void store_bytes(uint8_t* p, V a) {
  const int16x4_t words = vmovn_s32(vcvtnq_s32_f32(a.v));
  const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
  std::memcpy(p, &four, sizeof four);
}

}  // namespace
