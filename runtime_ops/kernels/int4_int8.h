// 4-bit weights against int8 activations.
#pragma once

#include "kernels/product.h"

namespace qgraph {
namespace {

// One step of codes against Rows activations; `parity` chooses among the chains. The activations
// that a product reads serve all tiles.
template <int Rows, int Tiles, int C>
QG_INLINED void int4_step(Sums<Rows, Tiles, C>& sums, int parity, const uint8_t* codes,
                          int64_t stride, const int8_t* x) {
  Codes low[Tiles], high[Tiles];
  QG_UNROLL for (int i = 0; i < Tiles; ++i) {
    const Codes both = Lanes::load(codes + i * stride);
    low[i] = Lanes::low4(both), high[i] = Lanes::high4(both);
  }
  auto& first = sums.v[C == 4 ? 2 * parity : 0];
  auto& second = sums.v[C == 4 ? 2 * parity + 1 : C - 1];
  QG_UNROLL for (int r = 0; r < Rows; ++r) dots<Rows, Tiles>(first, r, low, x + 4 * r);
  QG_UNROLL for (int r = 0; r < Rows; ++r) dots<Rows, Tiles>(second, r, high, x + 4 * (Rows + r));
}

// UnitSteps is 0 where it is known only at run time.
template <int Rows, int Tiles, int UnitSteps, bool HasBlocks, bool HasZeroPoints>
QG_OUTLINED void int4_int8_tile(const MatMulTask& t, int64_t tile, int64_t row, bool prefetch) {
  constexpr int C = chains<Rows, Tiles>();
  constexpr int kUnrolled = C == 4 ? 2 : 4;  // steps
  const int64_t unit_steps = UnitSteps ? UnitSteps : t.unit_steps;
  const int64_t units = (t.steps + unit_steps - 1) / unit_steps;
  const int64_t blocks = (units + t.block_units - 1) / t.block_units;
  const int64_t stride = t.steps * kTileBytes;
  const int64_t ahead = prefetch ? kAhead : 0;
  const uint8_t* codes = t.codes + tile * stride;
  const int8_t* x = t.x + row * t.steps * kInt4Step;
  const int32_t* negative_sums = t.x_negative_sums + row * units;
  const float* x_scales = t.x_scales + row * blocks;
  int64_t group = tile * t.groups, units_left = t.group_units;
  Floats totals[Tiles][Rows], partial[Tiles][Rows];
  QG_UNROLL for (int i = 0; i < Tiles; ++i) {
    QG_UNROLL for (int r = 0; r < Rows; ++r) totals[i][r] = partial[i][r] = Lanes::float_zero();
  }
  int64_t block_left = t.block_units;
  for (int64_t u = 0; u < units; ++u) {
    Sums<Rows, Tiles, C> sums;
    QG_UNROLL for (int i = 0; i < Tiles; ++i) {
      if (HasZeroPoints) {
        const Ints zero_points = Lanes::bytes(t.zero_points + (group + i * t.groups) * kTileRows);
        QG_UNROLL for (int r = 0; r < Rows; ++r) {
          sums.v[0][i][r] = Lanes::multiply(zero_points, Lanes::all(negative_sums[r]));
        }
      } else {
        QG_UNROLL for (int r = 0; r < Rows; ++r) {
          sums.v[0][i][r] = Lanes::times_middle(Lanes::all(negative_sums[r]));
        }
      }
      QG_UNROLL for (int c = 1; c < C; ++c) {
        QG_UNROLL for (int r = 0; r < Rows; ++r) sums.v[c][i][r] = Lanes::zero();
      }
    }
    const int64_t steps =
        UnitSteps ? UnitSteps : std::min<int64_t>(unit_steps, t.steps - u * unit_steps);
    int64_t s = 0;
    for (; s + kUnrolled <= steps; s += kUnrolled) {
      QG_UNROLL for (int j = 0; j < kUnrolled; ++j) {
        prefetch_codes<Tiles>(codes + j * kTileBytes, stride, ahead);

        int4_step<Rows, Tiles, C>(sums, j & 1, codes + j * kTileBytes, stride,
                                  x + j * Rows * kInt4Step);
      }
      codes += kUnrolled * kTileBytes;
      x += kUnrolled * Rows * kInt4Step;
    }
    if (UnitSteps % kUnrolled != 0 || UnitSteps == 0) {
      for (; s < steps; ++s) {
        int4_step<Rows, Tiles, C>(sums, s & 1, codes, stride, x);
        codes += kTileBytes;
        x += Rows * kInt4Step;
      }
    }
    QG_UNROLL for (int i = 0; i < Tiles; ++i) {
      const Floats scale = scales_at(t, group + i * t.groups);
      QG_UNROLL for (int r = 0; r < Rows; ++r) {
        Ints sum = sums.v[0][i][r];
        QG_UNROLL for (int c = 1; c < C; ++c) sum = Lanes::add(sum, sums.v[c][i][r]);
        const Floats value = Lanes::to_float(sum);
        if (HasBlocks) {
          partial[i][r] = Lanes::fma(value, scale, partial[i][r]);
        } else {
          const Floats both = Lanes::multiply(scale, Lanes::all(x_scales[r]));
          totals[i][r] = Lanes::fma(value, both, totals[i][r]);
        }
      }
    }
    if (HasBlocks && (--block_left == 0 || u + 1 == units)) {
      block_left = t.block_units;
      // Rarely needed: these stay in memory, the registers are for what each unit needs.
      if (Tiles > 1) __asm__ volatile("" : "+m"(totals));
      QG_UNROLL for (int i = 0; i < Tiles; ++i) {
        QG_UNROLL for (int r = 0; r < Rows; ++r) {
          totals[i][r] = Lanes::fma(partial[i][r], Lanes::all(x_scales[r]), totals[i][r]);
          partial[i][r] = Lanes::float_zero();
        }
      }
      x_scales += Rows;
    }
    if (!HasBlocks) x_scales += Rows;
    negative_sums += Rows;
    if (--units_left == 0) {
      ++group;
      units_left = t.group_units;
    }
  }
  QG_UNROLL for (int i = 0; i < Tiles; ++i) {
    QG_UNROLL for (int r = 0; r < Rows; ++r) write(t, row + r, tile + i, totals[i][r]);
  }
}

template <int Rows, int Tiles, bool HasZeroPoints>
void int4_int8_points(const MatMulTask& t, int64_t tile, int64_t row, bool prefetch) {
  if (t.block_units > 1) {
    if (t.unit_steps == 4 && t.steps % 4 == 0) {
      return int4_int8_tile<Rows, Tiles, 4, true, HasZeroPoints>(t, tile, row, prefetch);
    }
    return int4_int8_tile<Rows, Tiles, 0, true, HasZeroPoints>(t, tile, row, prefetch);
  }
  if (t.unit_steps == 4 && t.steps % 4 == 0) {
    return int4_int8_tile<Rows, Tiles, 4, false, HasZeroPoints>(t, tile, row, prefetch);
  }
  if (t.unit_steps == 16 && t.steps % 16 == 0) {
    return int4_int8_tile<Rows, Tiles, 16, false, HasZeroPoints>(t, tile, row, prefetch);
  }
  int4_int8_tile<Rows, Tiles, 0, false, HasZeroPoints>(t, tile, row, prefetch);
}

template <int Rows, int Tiles>
void int4_int8_rows(const MatMulTask& t, int64_t tile, int64_t row, bool prefetch) {
  if (t.zero_points) return int4_int8_points<Rows, Tiles, true>(t, tile, row, prefetch);
  int4_int8_points<Rows, Tiles, false>(t, tile, row, prefetch);
}

}  // namespace
}  // namespace qgraph
