// 16 lanes in one AVX-512 register; the dot product is VNNI's.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qgraph {
namespace {

struct Lanes {
  static constexpr int kBlockRows = 6;
  static constexpr int kFewRows = 8;
  static constexpr int kFloatRows = 8;
  static constexpr int kTiles = 2;
  static constexpr int kSums = 12;  // that are best kept at once
  using Codes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;

  static Codes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void prefetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }
  static Codes low4(Codes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static Codes high4(Codes v) { return low4(_mm512_srli_epi16(v, 4)); }
  template <int F>
  static Codes field2(Codes v) {
    return _mm512_and_si512(_mm512_srli_epi16(v, 2 * F), _mm512_set1_epi8(3));
  }

  static Ints zero() { return _mm512_setzero_si512(); }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints all(int32_t v) { return _mm512_set1_epi32(v); }
  static Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
  static Ints times_middle(Ints v) { return _mm512_slli_epi32(v, 3); }
  static Ints bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // sum + the products of 4 codes per lane with the 4 activations at x.
  static Ints dot(Ints sum, Codes codes, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, sizeof four);
    return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
  }

  // The same for two tiles: the activations are read once. In assembly, because compilers move the
  // reads ahead of the products and run out of registers.
  static void dot2(Ints& a, Ints& b, Codes codes_a, Codes codes_b, const int8_t* x) {
    Ints four;
    __asm__ volatile(
        "vpbroadcastd %5, %2\n\t"
        "vpdpbusd %2, %3, %0\n\t"
        "vpdpbusd %2, %4, %1"
        : "+v"(a), "+v"(b), "=&v"(four)
        : "v"(codes_a), "v"(codes_b), "m"(*reinterpret_cast<const int32_t*>(x)));
  }

  static Floats float_zero() { return _mm512_setzero_ps(); }
  static Floats all(float v) { return _mm512_set1_ps(v); }
  static Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  // Bits Shift .. Shift + 3 of each 32-bit lane, through a table of 16 floats: one permutation.
  struct Table {
    __m512 values;
    explicit Table(const float* p) : values(_mm512_loadu_ps(p)) {}
    template <int Shift>
    Floats at(Codes v) const {
      return _mm512_permutexvar_ps(_mm512_srli_epi32(v, Shift), values);
    }
  };
};

}  // namespace
}  // namespace qgraph
