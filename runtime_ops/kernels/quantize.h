// Rounding and rearranging activations. Plain loops that compilers vectorise for each file's
// instruction set; all give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/kernel.h"

namespace qgraph {
namespace {

constexpr uint32_t kInfinityBits = 0x7F800000u;

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// As integers, so that the result does not depend on the order, and NaN is the largest of all.
inline uint32_t largest_bits(const float* x, int64_t count) {
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = static_cast<int32_t>(bits_of(x[i]) & 0x7FFFFFFFu);
    found = bits > found ? bits : found;
  }
  return static_cast<uint32_t>(found);
}

// Half to even, for |v| < 2^22: the sum's lowest bit stands for 1.
inline void round_to_bytes(const float* x, int64_t count, float factor, int8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = x[i] * factor + 12582912.0f;
    out[i] = static_cast<int8_t>(static_cast<int32_t>(bits_of(shifted) - 0x4B400000u));
  }
}

template <class Shape>
void quantize_rows(const QuantizeTask& t) {
  constexpr int64_t kPiece = 1024;  // a multiple of 4; codes of one piece lie on the stack
  int8_t piece[kPiece];
  const int64_t units = (t.padded + t.unit - 1) / t.unit;
  const int64_t scale_count = (t.padded + t.block - 1) / t.block;
  const int64_t blocks = Shape::kBlocks.count(t.m);
  for (int64_t b = t.first; b < t.last; ++b) {
    const int64_t start = block_start(t.m, blocks, b);
    const int64_t rows = block_start(t.m, blocks, b + 1) - start;
    int8_t* codes = t.codes + start * t.padded;
    float* scales = t.scales + start * scale_count;
    int32_t* sums = t.negative_sums + start * units;
    std::fill(sums, sums + rows * units, 0);
    for (int64_t r = 0; r < rows; ++r) {
      const float* x = t.x + (start + r) * t.k;
      for (int64_t s = 0; s < scale_count; ++s) {
        const int64_t begin = s * t.block, end = std::min(begin + t.block, t.padded);
        const int64_t given = std::max<int64_t>(0, std::min(end, t.k) - begin);
        const uint32_t peak = largest_bits(x + begin, given);
        const float size = float_of(peak);
        const bool is_finite = peak < kInfinityBits;
        const bool is_zero = size < 7.888609052210118e-31f;  // 2^-100: 1 / size stays finite
        const float levels = static_cast<float>(t.levels);
        scales[s * rows + r] = !is_finite ? std::numeric_limits<float>::quiet_NaN()
                               : is_zero  ? 0.0f
                                          : size / levels;
        // NaN and Inf must not reach the conversion to integers.
        const float factor = is_finite && !is_zero ? levels / size : 0.0f;
        for (int64_t at = begin; at < end;) {
          // A piece never crosses a unit.
          const int64_t unit = at / t.unit;
          const int64_t stop = std::min({end, at + kPiece, (unit + 1) * t.unit});
          const int64_t count = std::max<int64_t>(0, std::min(stop, t.k) - at);
          std::memset(piece + count, 0, static_cast<size_t>(stop - at - count));
          if (factor != 0.0f) {
            round_to_bytes(x + at, count, factor, piece);
          } else {
            std::memset(piece, 0, static_cast<size_t>(count));
          }
          int32_t sum = 0;
          for (int64_t i = 0; i < stop - at; ++i) sum -= piece[i];
          sums[unit * rows + r] += sum;
          if (rows == 1) {
            std::memcpy(codes + at, piece, static_cast<size_t>(stop - at));
          } else {
            for (int64_t i = 0; i < stop - at; i += 4) {
              std::memcpy(codes + (at + i) * rows + 4 * r, piece + i, 4);
            }
          }
          at = stop;
        }
      }
    }
  }
}

template <class Shape>
void arrange_rows(const ArrangeTask& t) {
  const int64_t blocks = Shape::kBlocks.count(t.m);
  for (int64_t b = t.first; b < t.last; ++b) {
    const int64_t start = block_start(t.m, blocks, b);
    const int64_t rows = block_start(t.m, blocks, b + 1) - start;
    const float* x = t.x + start * t.k;
    float* out = t.out + start * t.padded;
    for (int64_t k = 0; k < t.k; ++k) {
      for (int64_t r = 0; r < rows; ++r) out[k * rows + r] = x[r * t.k + k];
    }
    std::fill(out + t.k * rows, out + t.padded * rows, 0.0f);
  }
}

}  // namespace
}  // namespace qgraph
