// 16 lanes in two AVX2 registers. Needs FMA and F16C too, which every CPU with AVX2 has.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qgraph {
namespace {

struct Lanes {
  static constexpr int kBlockRows = 2;
  static constexpr int kFewRows = 2;
  static constexpr int kFloatRows = 2;
  static constexpr int kTiles = 1;
  static constexpr int kSums = 4;  // that are best kept at once
  struct Ints {
    __m256i v[2];
  };
  using Codes = Ints;
  struct Floats {
    __m256 v[2];
  };

  static __m256i read(const void* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Codes load(const uint8_t* p) { return {{read(p), read(p + 32)}}; }
  static void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }
  template <int Shift>
  static Codes masked(Codes c, int mask) {
    const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
    return {{_mm256_and_si256(_mm256_srli_epi16(c.v[0], Shift), m),
             _mm256_and_si256(_mm256_srli_epi16(c.v[1], Shift), m)}};
  }
  static Codes low4(Codes c) { return masked<0>(c, 15); }
  static Codes high4(Codes c) { return masked<4>(c, 15); }
  template <int F>
  static Codes field2(Codes c) {
    return masked<2 * F>(c, 3);
  }

  static Ints zero() { return all(0); }
  static Ints all(int32_t v) { return {{_mm256_set1_epi32(v), _mm256_set1_epi32(v)}}; }
  static Ints add(Ints a, Ints b) {
    return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}};
  }
  static Ints multiply(Ints a, Ints b) {
    return {{_mm256_mullo_epi32(a.v[0], b.v[0]), _mm256_mullo_epi32(a.v[1], b.v[1])}};
  }
  static Ints times_middle(Ints a) {
    return {{_mm256_slli_epi32(a.v[0], 3), _mm256_slli_epi32(a.v[1], 3)}};
  }
  static Ints bytes(const uint8_t* p) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {{_mm256_cvtepu8_epi32(b), _mm256_cvtepu8_epi32(_mm_srli_si128(b, 8))}};
  }
  // 16-bit sums of two products cannot saturate: 2 * 15 * 127.
  static Ints dot(Ints sum, Codes codes, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, sizeof four);
    const __m256i a = _mm256_set1_epi32(four), one = _mm256_set1_epi16(1);
    const __m256i p0 = _mm256_madd_epi16(_mm256_maddubs_epi16(codes.v[0], a), one);
    const __m256i p1 = _mm256_madd_epi16(_mm256_maddubs_epi16(codes.v[1], a), one);
    return {{_mm256_add_epi32(sum.v[0], p0), _mm256_add_epi32(sum.v[1], p1)}};
  }

  static void dot2(Ints& a, Ints& b, const Codes& codes_a, const Codes& codes_b, const int8_t* x) {
    a = dot(a, codes_a, x);
    b = dot(b, codes_b, x);
  }

  static Floats float_zero() { return all(0.0f); }
  static Floats all(float v) { return {{_mm256_set1_ps(v), _mm256_set1_ps(v)}}; }
  static Floats to_float(Ints i) {
    return {{_mm256_cvtepi32_ps(i.v[0]), _mm256_cvtepi32_ps(i.v[1])}};
  }
  static Floats load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  static Floats load_half(const uint16_t* p) {
    const auto* h = reinterpret_cast<const __m128i*>(p);
    return {{_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))}};
  }
  static void store(float* p, Floats f) {
    _mm256_storeu_ps(p, f.v[0]);
    _mm256_storeu_ps(p + 8, f.v[1]);
  }
  static Floats add(Floats a, Floats b) {
    return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
  }
  static Floats subtract(Floats a, Floats b) {
    return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}};
  }
  static Floats multiply(Floats a, Floats b) {
    return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
  }
  static Floats fma(Floats a, Floats b, Floats c) {
    return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
  }

  // Two permutations of 8, and bit 3 of the index chooses between them.
  struct Table {
    __m256 low, high;
    explicit Table(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
    __m256 pick(__m256i index) const {
      const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                              _mm256_permutevar8x32_ps(high, index), bit3);
    }
    template <int Shift>
    Floats at(Codes c) const {
      return {{pick(_mm256_srli_epi32(c.v[0], Shift)), pick(_mm256_srli_epi32(c.v[1], Shift))}};
    }
  };
};

}  // namespace
}  // namespace qgraph
