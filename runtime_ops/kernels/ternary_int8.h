// Ternary weights against int8 activations.
#pragma once

#include "kernels/product.h"

namespace qgraph {
namespace {

template <int F, int Rows, int Tiles, int C>
QG_INLINED void ternary_field(Sums<Rows, Tiles, C>& sums, const Codes (&codes)[Tiles],
                              const int8_t* x) {
  Codes field[Tiles];
  QG_UNROLL for (int i = 0; i < Tiles; ++i) field[i] = Lanes::field2<F>(codes[i]);
  auto& chain = sums.v[F % C];
  QG_UNROLL for (int r = 0; r < Rows; ++r) {
    dots<Rows, Tiles>(chain, r, field, x + 4 * (F * Rows + r));
  }
}

// The whole of K in one int32 sum. With few rows, a chain for each of the four fields or two of
// them.
template <int Rows, int Tiles>
QG_OUTLINED void ternary_int8_rows(const MatMulTask& t, int64_t tile, int64_t row, bool prefetch) {
  constexpr int C = chains<Rows, Tiles>();
  const int64_t stride = t.steps * kTileBytes;
  const int64_t ahead = prefetch ? kAhead : 0;
  const uint8_t* codes = t.codes + tile * stride;
  const int8_t* x = t.x + row * t.steps * kTernaryStep;
  Sums<Rows, Tiles, C> sums;
  QG_UNROLL for (int i = 0; i < Tiles; ++i) {
    QG_UNROLL for (int r = 0; r < Rows; ++r) {
      sums.v[0][i][r] = Lanes::all(t.x_negative_sums[row + r]);
      QG_UNROLL for (int c = 1; c < C; ++c) sums.v[c][i][r] = Lanes::zero();
    }
  }
  for (int64_t s = 0; s < t.steps; ++s) {
    Codes all[Tiles];
    prefetch_codes<Tiles>(codes, stride, ahead);
    QG_UNROLL for (int i = 0; i < Tiles; ++i) all[i] = Lanes::load(codes + i * stride);
    ternary_field<0>(sums, all, x);
    ternary_field<1>(sums, all, x);
    ternary_field<2>(sums, all, x);
    ternary_field<3>(sums, all, x);
    codes += kTileBytes;
    x += kTernaryStep * Rows;
  }
  QG_UNROLL for (int i = 0; i < Tiles; ++i) {
    const Floats scale = Lanes::load(t.row_scales + (tile + i) * kTileRows);
    QG_UNROLL for (int r = 0; r < Rows; ++r) {
      Ints sum = sums.v[0][i][r];
      QG_UNROLL for (int c = 1; c < C; ++c) sum = Lanes::add(sum, sums.v[c][i][r]);
      const Floats both = Lanes::multiply(scale, Lanes::all(t.x_scales[row + r]));
      write(t, row + r, tile + i, Lanes::multiply(Lanes::to_float(sum), both));
    }
  }
}

}  // namespace
}  // namespace qgraph
