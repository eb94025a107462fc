// 4-bit and ternary weights against float activations.
#pragma once

#include "kernels/product.h"

namespace qgraph {
namespace {

// Columns 8s .. 8s + 3 are added in one chain, 8s + 4 .. 8s + 7 in another.
template <int Rows, int Shift, bool HasZeroPoints>
inline void float_column(Floats (&sums)[Rows], const Lanes::Table& table, Codes codes,
                         Floats zero_point, const float* x) {
  Floats w = table.template at<Shift>(codes);
  if (HasZeroPoints) w = Lanes::subtract(w, zero_point);
  QG_UNROLL for (int r = 0; r < Rows; ++r) sums[r] = Lanes::fma(w, Lanes::all(x[r]), sums[r]);
}

template <int Rows, bool HasZeroPoints>
void int4_float_tile(const MatMulTask& t, int64_t tile, int64_t row) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(HasZeroPoints ? i : i - kInt4Middle);
  const Lanes::Table table(values);
  const int64_t group_steps = t.unit_steps * t.group_units;
  const uint8_t* codes = t.codes + tile * t.steps * kTileBytes;
  const float* x = t.x_float + row * t.steps * kInt4Step;
  Floats totals[Rows];
  QG_UNROLL for (int r = 0; r < Rows; ++r) totals[r] = Lanes::float_zero();
  for (int64_t g = 0; g < t.groups; ++g) {
    const int64_t group = tile * t.groups + g;
    Floats zero_point = Lanes::float_zero();
    if (HasZeroPoints) {
      zero_point = Lanes::to_float(Lanes::bytes(t.zero_points + group * kTileRows));
    }
    Floats low[Rows], high[Rows];
    QG_UNROLL for (int r = 0; r < Rows; ++r) low[r] = high[r] = Lanes::float_zero();
    const int64_t steps = std::min(group_steps, t.steps - g * group_steps);
    for (int64_t s = 0; s < steps; ++s) {
      const Codes c = Lanes::load(codes);
      float_column<Rows, 0, HasZeroPoints>(low, table, c, zero_point, x);
      float_column<Rows, 4, HasZeroPoints>(high, table, c, zero_point, x + 4 * Rows);
      float_column<Rows, 8, HasZeroPoints>(low, table, c, zero_point, x + Rows);
      float_column<Rows, 12, HasZeroPoints>(high, table, c, zero_point, x + 5 * Rows);
      float_column<Rows, 16, HasZeroPoints>(low, table, c, zero_point, x + 2 * Rows);
      float_column<Rows, 20, HasZeroPoints>(high, table, c, zero_point, x + 6 * Rows);
      float_column<Rows, 24, HasZeroPoints>(low, table, c, zero_point, x + 3 * Rows);
      float_column<Rows, 28, HasZeroPoints>(high, table, c, zero_point, x + 7 * Rows);
      codes += kTileBytes;
      x += kInt4Step * Rows;
    }
    const Floats scale = scales_at(t, group);
    QG_UNROLL for (int r = 0; r < Rows; ++r) {
      totals[r] = Lanes::fma(Lanes::add(low[r], high[r]), scale, totals[r]);
    }
  }
  QG_UNROLL for (int r = 0; r < Rows; ++r) write(t, row + r, tile, totals[r]);
}

template <int Rows, int>
void int4_float_rows(const MatMulTask& t, int64_t tile, int64_t row, bool) {
  if (t.zero_points) return int4_float_tile<Rows, true>(t, tile, row);
  int4_float_tile<Rows, false>(t, tile, row);
}

template <int Rows, int>
void ternary_float_rows(const MatMulTask& t, int64_t tile, int64_t row, bool) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>((i & 3) - 1);
  const Lanes::Table table(values);
  const uint8_t* codes = t.codes + tile * t.steps * kTileBytes;
  const float* x = t.x_float + row * t.steps * kTernaryStep;
  const Floats none = Lanes::float_zero();
  Floats even[Rows], odd[Rows];
  QG_UNROLL for (int r = 0; r < Rows; ++r) even[r] = odd[r] = none;
  for (int64_t s = 0; s < t.steps; ++s) {
    const Codes c = Lanes::load(codes);
#define QG_FIELD(f)                                                                    \
  float_column<Rows, 2 * f, false>(even, table, c, none, x + 4 * f * Rows);            \
  float_column<Rows, 8 + 2 * f, false>(odd, table, c, none, x + (4 * f + 1) * Rows);   \
  float_column<Rows, 16 + 2 * f, false>(even, table, c, none, x + (4 * f + 2) * Rows); \
  float_column<Rows, 24 + 2 * f, false>(odd, table, c, none, x + (4 * f + 3) * Rows);
    QG_FIELD(0)
    QG_FIELD(1)
    QG_FIELD(2)
    QG_FIELD(3)
#undef QG_FIELD
    codes += kTileBytes;
    x += kTernaryStep * Rows;
  }
  const Floats scale = Lanes::load(t.row_scales + tile * kTileRows);
  QG_UNROLL for (int r = 0; r < Rows; ++r) {
    write(t, row + r, tile, Lanes::multiply(Lanes::add(even[r], odd[r]), scale));
  }
}

}  // namespace
}  // namespace qgraph
