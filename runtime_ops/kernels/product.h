// What the matrix kernels share (include a lanes_*.h first).
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/kernel.h"
#include "kernels/probe.h"

namespace qgraph {
namespace {

using Ints = Lanes::Ints;
using Floats = Lanes::Floats;
using Codes = Lanes::Codes;

constexpr int64_t kAhead = 8192;  // bytes; more than a page, less than a tile of a large matrix

// Where N is not a multiple of a tile's rows. Apart, or this little used loop, inlined for every
// row, would be most of the code.
QG_OUTLINED void write_part(const MatMulTask& t, int64_t row, int64_t n, const float* sum) {
  float* y = t.y + row * t.n;
  for (int64_t i = n; i < t.n; ++i) y[i] = t.bias ? sum[i - n] + t.bias[i] : sum[i - n];
}

inline void write(const MatMulTask& t, int64_t row, int64_t tile, Floats sum) {
  const int64_t n = tile * kTileRows;
  if (n + kTileRows <= t.n) {
    Lanes::store(t.y + row * t.n + n, t.bias ? Lanes::add(sum, Lanes::load(t.bias + n)) : sum);
    return;
  }
  float all[kTileRows];
  Lanes::store(all, sum);
  write_part(t, row, n, all);
}

inline Floats scales_at(const MatMulTask& t, int64_t index) {
  return t.scales_are_float16
             ? Lanes::load_half(static_cast<const uint16_t*>(t.scales) + index * kTileRows)
             : Lanes::load(static_cast<const float*>(t.scales) + index * kTileRows);
}

// Few rows leave too few independent sums to hide the latency of a dot product: split them.
template <int Rows, int Tiles>
constexpr int chains() {
  constexpr int kFit = Lanes::kSums / (Rows * Tiles);
  return kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
}

// Sums of Rows activations with each of Tiles tiles, in C chains.
template <int Rows, int Tiles, int C>
struct Sums {
  Ints v[C][Tiles][Rows];
};

// Row r against a step of each tile.
template <int Rows, int Tiles>
QG_INLINED void dots(Ints (&sums)[Tiles][Rows], int r, const Codes (&codes)[Tiles],
                     const int8_t* x) {
  static_assert(Tiles == 1 || Tiles == 2, "");
  if (Tiles == 1) {
    sums[0][r] = Lanes::dot(sums[0][r], codes[0], x);
  } else {
    Lanes::dot2(sums[0][r], sums[Tiles - 1][r], codes[0], codes[Tiles - 1], x);
  }
}

// Codes this far ahead, or none: then it asks for the line that is read anyway.
template <int Tiles>
inline void prefetch_codes(const uint8_t* codes, int64_t stride, int64_t ahead) {
  QG_UNROLL for (int i = 0; i < Tiles; ++i) Lanes::prefetch(codes + i * stride + ahead);
}

}  // namespace
}  // namespace qgraph
