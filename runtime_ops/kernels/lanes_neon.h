// 16 lanes in four NEON registers. Compiled twice: with the dot-product extension, and for CPUs
// that lack it.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace qgraph {
namespace {

// Calls body(i) for each of the four registers.
#define QG_FOUR(i, body) \
  _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i) { body; }

struct Lanes {
  // 32 registers: the sums of four rows take half, and four activations of four rows fill one.
  static constexpr int kBlockRows = 4;
  static constexpr int kFewRows = 4;
  static constexpr int kFloatRows = 4;
  static constexpr int kTiles = 1;
  static constexpr int kSums = 4;  // that are best kept at once
  struct Codes {
    uint8x16_t v[4];
  };
  struct Ints {
    int32x4_t v[4];
  };
  struct Floats {
    float32x4_t v[4];
  };

  static Codes load(const uint8_t* p) {
    return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
  }
  static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
  static Codes low4(Codes c) {
    QG_FOUR(i, c.v[i] = vandq_u8(c.v[i], vdupq_n_u8(15)))
    return c;
  }
  static Codes high4(Codes c) {
    QG_FOUR(i, c.v[i] = vshrq_n_u8(c.v[i], 4))
    return c;
  }
  template <int F>
  static Codes field2(Codes c) {
    QG_FOUR(i, c.v[i] = vandq_u8(shift_right<2 * F>(c.v[i]), vdupq_n_u8(3)))
    return c;
  }

  static Ints zero() { return all(0); }
  static Ints all(int32_t v) {
    return {{vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v)}};
  }
  static Ints add(Ints a, Ints b) {
    QG_FOUR(i, a.v[i] = vaddq_s32(a.v[i], b.v[i]))
    return a;
  }
  static Ints multiply(Ints a, Ints b) {
    QG_FOUR(i, a.v[i] = vmulq_s32(a.v[i], b.v[i]))
    return a;
  }
  static Ints times_middle(Ints a) {
    QG_FOUR(i, a.v[i] = vshlq_n_s32(a.v[i], 3))
    return a;
  }
  static Ints bytes(const uint8_t* p) {
    const uint8x16_t b = vld1q_u8(p);
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(b)));
    const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(b)));
    return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
             vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}};
  }
  // Codes are at most 15, so they are signed bytes as well.
  static Ints dot(Ints sum, Codes codes, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, sizeof four);
    const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(four));
    QG_FOUR(i, sum.v[i] = dot(sum.v[i], vreinterpretq_s8_u8(codes.v[i]), a))
    return sum;
  }
  static void dot2(Ints& a, Ints& b, Codes codes_a, Codes codes_b, const int8_t* x) {
    a = dot(a, codes_a, x);
    b = dot(b, codes_b, x);
  }

  static Floats float_zero() { return all(0.0f); }
  static Floats all(float v) {
    return {{vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v)}};
  }
  static Floats to_float(Ints a) {
    return {{vcvtq_f32_s32(a.v[0]), vcvtq_f32_s32(a.v[1]), vcvtq_f32_s32(a.v[2]),
             vcvtq_f32_s32(a.v[3])}};
  }
  static Floats load(const float* p) {
    return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
  }
  static Floats load_half(const uint16_t* p) {
    return {{half(p), half(p + 4), half(p + 8), half(p + 12)}};
  }
  static void store(float* p, Floats a) { QG_FOUR(i, vst1q_f32(p + 4 * i, a.v[i])) }
  static Floats add(Floats a, Floats b) {
    QG_FOUR(i, a.v[i] = vaddq_f32(a.v[i], b.v[i]))
    return a;
  }
  static Floats subtract(Floats a, Floats b) {
    QG_FOUR(i, a.v[i] = vsubq_f32(a.v[i], b.v[i]))
    return a;
  }
  static Floats multiply(Floats a, Floats b) {
    QG_FOUR(i, a.v[i] = vmulq_f32(a.v[i], b.v[i]))
    return a;
  }
  static Floats fma(Floats a, Floats b, Floats c) {
    QG_FOUR(i, c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]))
    return c;
  }

  // The values are small integers, whose floats end in two zero bytes: byte 2 of each comes from
  // the first register, byte 3 from the second, and an index that is too large gives a zero byte.
  struct Table {
    uint8x16x2_t values;
    explicit Table(const float* p) {
      uint8_t pairs[32];
      for (int i = 0; i < 16; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, p + i, sizeof bits);
        pairs[i] = static_cast<uint8_t>(bits >> 16);
        pairs[16 + i] = static_cast<uint8_t>(bits >> 24);
      }
      values = {{vld1q_u8(pairs), vld1q_u8(pairs + 16)}};
    }
    template <int Shift>
    Floats at(Codes c) const {
      return {{pick<Shift>(c.v[0]), pick<Shift>(c.v[1]), pick<Shift>(c.v[2]), pick<Shift>(c.v[3])}};
    }
    template <int Shift>
    float32x4_t pick(uint8x16_t c) const {
      const uint32x4_t code =
          vandq_u32(shift_right<Shift>(vreinterpretq_u32_u8(c)), vdupq_n_u32(15));
      const uint32x4_t index = vmlaq_u32(vdupq_n_u32(0x1000FFFF), code, vdupq_n_u32(0x01010000));
      return vreinterpretq_f32_u8(vqtbl2q_u8(values, vreinterpretq_u8_u32(index)));
    }
  };

 private:
  // The instructions have no shift by zero.
  template <int Shift>
  static uint8x16_t shift_right(uint8x16_t v) {
    if constexpr (Shift == 0) {
      return v;
    } else {
      return vshrq_n_u8(v, Shift);
    }
  }
  template <int Shift>
  static uint32x4_t shift_right(uint32x4_t v) {
    if constexpr (Shift == 0) {
      return v;
    } else {
      return vshrq_n_u32(v, Shift);
    }
  }
  static float32x4_t half(const uint16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
  }
  static int32x4_t dot(int32x4_t sum, int8x16_t codes, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, codes, x);
#else
    // 16-bit sums of two products cannot overflow: 2 * 15 * 127.
    const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(x));
    const int16x8_t high = vmull_high_s8(codes, x);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
  }
};

#undef QG_FOUR

}  // namespace
}  // namespace qgraph
