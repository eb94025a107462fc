#include "half.h"

#include <cstring>

#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qgraph {
namespace {

// Branches that compilers turn into vector selects.
inline float plain_float(uint16_t half) {
  const uint32_t rest = half & 0x7FFFu;
  const float tiny = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &tiny, sizeof bits);
  const uint32_t quiet = rest > 0x7C00u ? 0x400000u : 0u;
  const uint32_t normal = (rest << 13) + (112u << 23);
  bits = rest < 0x400u ? bits : rest < 0x7C00u ? normal : (0x7F800000u | rest << 13 | quiet);
  bits |= (half & 0x8000u) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t plain_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t rest = bits & 0x7FFFFFFFu;
  // The lowest bit of 0.5 stands for 2^-24, as that of a subnormal float16.
  float shifted;
  std::memcpy(&shifted, &rest, sizeof shifted);
  shifted += 0.5f;
  uint32_t tiny;
  std::memcpy(&tiny, &shifted, sizeof tiny);
  tiny -= 0x3F000000u;
  const uint32_t normal = ((rest + 0xFFFu + (rest >> 13 & 1u)) >> 13) - (112u << 10);
  const uint32_t special = rest > 0x7F800000u ? (0x7E00u | (rest >> 13 & 0x3FFu)) : 0x7C00u;
  const uint32_t found = rest < 0x38800000u ? tiny : rest < 0x47800000u ? normal : special;
  return static_cast<uint16_t>(sign | found);
}

#if defined(__x86_64__)

// Converted, a multiple of 8.
__attribute__((target("avx,f16c"))) int64_t fast_floats(const uint16_t* from, int64_t count,
                                                        float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  return i;
}

__attribute__((target("avx,f16c"))) int64_t fast_halves(const float* from, int64_t count,
                                                        uint16_t* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}

// The AVX2 kernels need F16C too.
bool is_fast() { return best_isa() >= Isa::kAvx2; }

#else

int64_t fast_floats(const uint16_t*, int64_t, float*) { return 0; }
int64_t fast_halves(const float*, int64_t, uint16_t*) { return 0; }
bool is_fast() { return false; }

#endif

}  // namespace

void float_of_half(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = is_fast() ? fast_floats(from, count, to) : 0; i < count; ++i) {
    to[i] = plain_float(from[i]);
  }
}

void half_of_float(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = is_fast() ? fast_halves(from, count, to) : 0; i < count; ++i) {
    to[i] = plain_half(from[i]);
  }
}

}  // namespace qgraph
