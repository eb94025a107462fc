// Rounding and rearranging activations. Plain loops that compilers vectorise for each file's
// instruction set; all give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

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

// Half to even, for |v| < 2^22: the sum's lowest bit stands for 1. Returns the sum.
inline int32_t round_to_bytes(const float* x, int64_t count, float factor, int8_t* out) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = x[i] * factor + 12582912.0f;
    const int32_t code = static_cast<int32_t>(bits_of(shifted) - 0x4B400000u);
    out[i] = static_cast<int8_t>(code);
    sum += code;
  }
  return sum;
}

// With a length that the compiler knows, these take a third of the time.
template <int64_t... Lengths, class Body>
inline void for_length(int64_t length, Body body) {
  const bool is_known =
      ((length == Lengths ? (body(std::integral_constant<int64_t, Lengths>()), true) : false) ||
       ...);
  if (!is_known) body(length);
}

// One row. `rows` is how many lie side by side, 4 bytes of each.
class RowQuantizer {
 public:
  RowQuantizer(const QuantizeTask& t, const float* x, int64_t rows, int8_t* codes, float* scales,
               int32_t* sums)
      : t_(t), x_(x), rows_(rows), codes_(codes), scales_(scales), sums_(sums) {}

  void run() const {
    int64_t scale = 0;
    for (int64_t start = 0; start < t_.padded; start += t_.block, ++scale) {
      const int64_t end = std::min(start + t_.block, t_.padded);
      const float factor = scale_of(start, std::min(end, t_.k), scale);
      for (int64_t at = start; at < end; at += t_.unit) {
        const int64_t stop = std::min(at + t_.unit, end);
        sums_[at / t_.unit * rows_] -= unit(at, stop, factor);
      }
    }
  }

 private:
  static constexpr int64_t kPiece = 1024;  // columns; a multiple of 4

  // Writes the scale of columns start .. end - 1 and returns what to multiply by, 0 for all zeros.
  float scale_of(int64_t start, int64_t end, int64_t index) const {
    uint32_t peak = 0;
    for_length<16, 32, 64, 128>(std::max<int64_t>(0, end - start),
                                [&](auto n) { peak = largest_bits(x_ + start, n); });
    const float size = float_of(peak), levels = static_cast<float>(t_.levels);
    // NaN and Inf must not reach the conversion to integers.
    const bool is_finite = peak < kInfinityBits;
    const bool is_zero = size < 7.888609052210118e-31f;  // 2^-100: 1 / size stays finite
    scales_[index * rows_] = !is_finite ? std::numeric_limits<float>::quiet_NaN()
                             : is_zero  ? 0.0f
                                        : size / levels;
    return is_finite && !is_zero ? levels / size : 0.0f;
  }

  // Codes of columns at .. stop - 1, which share a sum; returns it.
  int32_t unit(int64_t at, int64_t stop, float factor) const {
    int32_t sum = 0;
    for (; at < stop; at += kPiece) {
      const int64_t length = std::min(kPiece, stop - at);
      if (factor == 0.0f || at + length > t_.k) {
        sum += ragged(at, length, factor);
        continue;
      }
      for_length<16, 32, 64, 128>(length, [&](auto n) {
        alignas(64) int8_t piece[kPiece];
        sum += round_to_bytes(x_ + at, n, factor, piece);
        put(piece, at, n);
      });
    }
    return sum;
  }

  // Columns that are not all there, or of which every code is zero.
  int32_t ragged(int64_t at, int64_t length, float factor) const {
    alignas(64) int8_t piece[kPiece] = {};
    int32_t sum = 0;
    if (factor != 0.0f && at < t_.k) {
      sum = round_to_bytes(x_ + at, std::min(length, t_.k - at), factor, piece);
    }
    put(piece, at, length);
    return sum;
  }

  template <class Length>
  void put(const int8_t* piece, int64_t at, Length length) const {
    for (int64_t i = 0; i < length; i += 4) std::memcpy(codes_ + (at + i) * rows_, piece + i, 4);
  }

  const QuantizeTask& t_;
  const float* x_;
  int64_t rows_;
  int8_t* codes_;
  float* scales_;
  int32_t* sums_;
};

template <class Shape>
void quantize_rows(const QuantizeTask& t) {
  const int64_t units = (t.padded + t.unit - 1) / t.unit;
  const int64_t scale_count = (t.padded + t.block - 1) / t.block;
  const int64_t blocks = Shape::kBlocks.count(t.m);
  for (int64_t b = t.first; b < t.last; ++b) {
    const int64_t start = block_start(t.m, blocks, b);
    const int64_t rows = block_start(t.m, blocks, b + 1) - start;
    int32_t* sums = t.negative_sums + start * units;
    std::fill(sums, sums + rows * units, 0);
    for (int64_t r = 0; r < rows; ++r) {
      RowQuantizer(t, t.x + (start + r) * t.k, rows, t.codes + start * t.padded + 4 * r,
                   t.scales + start * scale_count + r, sums + r)
          .run();
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
