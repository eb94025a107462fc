// 16 lanes in plain C++: the readable reference of what the other files do.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qgraph {
namespace {

struct Lanes {
  static constexpr int kBlockRows = 4;
  static constexpr int kFewRows = 4;
  static constexpr int kFloatRows = 4;
  static constexpr int kTiles = 1;
  static constexpr int kSums = 4;  // that are best kept at once
  struct Codes {
    uint8_t v[64];
  };
  struct Ints {
    int32_t v[16];
  };
  struct Floats {
    float v[16];
  };

  static Codes load(const uint8_t* p) {
    Codes c;
    std::memcpy(c.v, p, sizeof c.v);
    return c;
  }
  static void prefetch(const uint8_t*) {}
  static Codes masked(Codes c, int shift, int mask) {
    for (uint8_t& b : c.v) b = static_cast<uint8_t>(b >> shift & mask);
    return c;
  }
  static Codes low4(Codes c) { return masked(c, 0, 15); }
  static Codes high4(Codes c) { return masked(c, 4, 15); }
  template <int F>
  static Codes field2(Codes c) {
    return masked(c, 2 * F, 3);
  }

  static Ints zero() { return all(0); }
  static Ints all(int32_t v) {
    Ints r;
    for (int32_t& lane : r.v) lane = v;
    return r;
  }
  static Ints add(Ints a, const Ints& b) {
    for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
    return a;
  }
  static Ints multiply(Ints a, const Ints& b) {
    for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static Ints times_middle(Ints a) {
    for (int32_t& lane : a.v) lane *= 8;
    return a;
  }
  static Ints bytes(const uint8_t* p) {
    Ints r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
  }
  static Ints dot(Ints sum, const Codes& codes, const int8_t* x) {
    for (int i = 0; i < 64; ++i) sum.v[i / 4] += codes.v[i] * x[i % 4];
    return sum;
  }

  static void dot2(Ints& a, Ints& b, const Codes& codes_a, const Codes& codes_b, const int8_t* x) {
    a = dot(a, codes_a, x);
    b = dot(b, codes_b, x);
  }

  static Floats float_zero() { return all(0.0f); }
  static Floats all(float v) {
    Floats r;
    for (float& lane : r.v) lane = v;
    return r;
  }
  static Floats to_float(const Ints& a) {
    Floats r;
    for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(a.v[i]);
    return r;
  }
  static Floats load(const float* p) {
    Floats r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static float half(uint16_t h) {
    const int exponent = h >> 10 & 31;
    const float fraction = static_cast<float>(h & 1023);
    const float size = exponent == 0    ? std::ldexp(fraction, -24)
                       : exponent != 31 ? std::ldexp(1024.0f + fraction, exponent - 25)
                       : fraction != 0  ? NAN
                                        : INFINITY;
    return h & 0x8000 ? -size : size;
  }
  static Floats load_half(const uint16_t* p) {
    Floats r;
    for (int i = 0; i < 16; ++i) r.v[i] = half(p[i]);
    return r;
  }
  static void store(float* p, const Floats& a) { std::memcpy(p, a.v, sizeof a.v); }
  static Floats add(Floats a, const Floats& b) {
    for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
    return a;
  }
  static Floats subtract(Floats a, const Floats& b) {
    for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
    return a;
  }
  static Floats multiply(Floats a, const Floats& b) {
    for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static Floats fma(const Floats& a, const Floats& b, Floats c) {
    for (int i = 0; i < 16; ++i) c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
    return c;
  }

  struct Table {
    float values[16];
    explicit Table(const float* p) { std::memcpy(values, p, sizeof values); }
    template <int Shift>
    Floats at(const Codes& c) const {
      Floats r;
      for (int i = 0; i < 16; ++i) {
        uint32_t lane;
        std::memcpy(&lane, c.v + 4 * i, sizeof lane);
        r.v[i] = values[lane >> Shift & 15];
      }
      return r;
    }
  };
};

}  // namespace
}  // namespace qgraph
