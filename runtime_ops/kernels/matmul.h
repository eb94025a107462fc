// The matrix kernels, written once over `Lanes` (include a lanes_*.h first).
//
// One tile of 16 weight rows against up to 8 rows of activations; all sums stay in registers. The
// codes of a tile are one stream from memory, which the next tile continues.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/hadamard.h"
#include "kernels/kernel.h"
#include "kernels/probe.h"
#include "kernels/quantize.h"

namespace qgraph {
namespace {

using Ints = Lanes::Ints;
using Floats = Lanes::Floats;
using Codes = Lanes::Codes;

constexpr int64_t kAhead = 8192;  // bytes; more than a page, less than a tile of a large matrix

inline void write(const MatMulTask& t, int64_t row, int64_t tile, Floats sum) {
  const int64_t n = tile * kTileRows;
  float* y = t.y + row * t.n + n;
  if (n + kTileRows <= t.n) {
    Lanes::store(y, t.bias ? Lanes::add(sum, Lanes::load(t.bias + n)) : sum);
    return;
  }
  float all[kTileRows];
  Lanes::store(all, sum);
  for (int64_t i = 0; i < t.n - n; ++i) y[i] = t.bias ? all[i] + t.bias[n + i] : all[i];
}

inline Floats scales_at(const MatMulTask& t, int64_t index) {
  return t.scales_are_float16
             ? Lanes::load_half(static_cast<const uint16_t*>(t.scales) + index * kTileRows)
             : Lanes::load(static_cast<const float*>(t.scales) + index * kTileRows);
}

// Few rows leave too few independent sums to hide the latency of a dot product: split them.
template <int Rows>
constexpr int chains() {
  return Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
}

// One step of codes against Rows activations; `parity` chooses among the chains.
template <int Rows, int C>
inline void int4_step(Ints (&sums)[C][Rows], int parity, const uint8_t* codes, const int8_t* x) {
  const Codes both = Lanes::load(codes);
  const Codes low = Lanes::low4(both), high = Lanes::high4(both);
  Ints(&first)[Rows] = sums[C == 4 ? 2 * parity : 0];
  Ints(&second)[Rows] = sums[C == 4 ? 2 * parity + 1 : C - 1];
  QG_UNROLL for (int r = 0; r < Rows; ++r) first[r] = Lanes::dot(first[r], low, x + 4 * r);
  QG_UNROLL for (int r = 0; r < Rows; ++r) {
    second[r] = Lanes::dot(second[r], high, x + 4 * (Rows + r));
  }
}

// UnitSteps is 0 where it is known only at run time.
template <int Rows, int UnitSteps, bool HasBlocks>
void int4_int8_tile(const MatMulTask& t, int64_t tile, int64_t row, bool prefetch) {
  constexpr int C = chains<Rows>();
  const int64_t unit_steps = UnitSteps ? UnitSteps : t.unit_steps;
  const int64_t units = (t.steps + unit_steps - 1) / unit_steps;
  const int64_t blocks = (units + t.block_units - 1) / t.block_units;
  const uint8_t* codes = t.codes + tile * t.steps * kTileBytes;
  const int8_t* x = t.x + row * t.steps * kInt4Step;
  const int32_t* negative_sums = t.x_negative_sums + row * units;
  const float* x_scales = t.x_scales + row * blocks;
  int64_t group = tile * t.groups, units_left = t.group_units;
  Floats totals[Rows], partial[Rows];
  QG_UNROLL for (int r = 0; r < Rows; ++r) totals[r] = partial[r] = Lanes::float_zero();
  int64_t block_left = t.block_units;
  for (int64_t u = 0; u < units; ++u) {
    Ints sums[C][Rows];
    if (t.zero_points) {
      const Ints zero_points = Lanes::bytes(t.zero_points + group * kTileRows);
      QG_UNROLL for (int r = 0; r < Rows; ++r) {
        sums[0][r] = Lanes::multiply(zero_points, Lanes::all(negative_sums[r]));
      }
    } else {
      QG_UNROLL for (int r = 0; r < Rows; ++r) {
        sums[0][r] = Lanes::all(kInt4Middle * negative_sums[r]);
      }
    }
    QG_UNROLL for (int c = 1; c < C; ++c) {
      QG_UNROLL for (int r = 0; r < Rows; ++r) sums[c][r] = Lanes::zero();
    }
    const int64_t steps =
        UnitSteps ? UnitSteps : std::min<int64_t>(unit_steps, t.steps - u * unit_steps);
    int64_t s = 0;
    for (; s + 2 <= steps; s += 2) {
      if (prefetch) {
        Lanes::prefetch(codes + kAhead);
        Lanes::prefetch(codes + kAhead + kTileBytes);
      }
      int4_step<Rows, C>(sums, 0, codes, x);
      int4_step<Rows, C>(sums, 1, codes + kTileBytes, x + Rows * kInt4Step);
      codes += 2 * kTileBytes;
      x += 2 * Rows * kInt4Step;
    }
    if (s < steps) {
      int4_step<Rows, C>(sums, 0, codes, x);
      codes += kTileBytes;
      x += Rows * kInt4Step;
    }
    const Floats scale = scales_at(t, group);
    QG_UNROLL for (int r = 0; r < Rows; ++r) {
      Ints sum = sums[0][r];
      QG_UNROLL for (int c = 1; c < C; ++c) sum = Lanes::add(sum, sums[c][r]);
      const Floats value = Lanes::to_float(sum);
      if (HasBlocks) {
        partial[r] = Lanes::fma(value, scale, partial[r]);
      } else {
        const Floats both = Lanes::multiply(scale, Lanes::all(x_scales[r]));
        totals[r] = Lanes::fma(value, both, totals[r]);
      }
    }
    if (HasBlocks && (--block_left == 0 || u + 1 == units)) {
      block_left = t.block_units;
      QG_UNROLL for (int r = 0; r < Rows; ++r) {
        totals[r] = Lanes::fma(partial[r], Lanes::all(x_scales[r]), totals[r]);
        partial[r] = Lanes::float_zero();
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
  QG_UNROLL for (int r = 0; r < Rows; ++r) write(t, row + r, tile, totals[r]);
}

template <int Rows>
void int4_int8_rows(const MatMulTask& t, int64_t tile, int64_t row, bool prefetch) {
  if (t.block_units > 1) {
    if (t.unit_steps == 4 && t.steps % 4 == 0) {
      return int4_int8_tile<Rows, 4, true>(t, tile, row, prefetch);
    }
    return int4_int8_tile<Rows, 0, true>(t, tile, row, prefetch);
  }
  if (t.unit_steps == 4 && t.steps % 4 == 0) {
    return int4_int8_tile<Rows, 4, false>(t, tile, row, prefetch);
  }
  if (t.unit_steps == 16 && t.steps % 16 == 0) {
    return int4_int8_tile<Rows, 16, false>(t, tile, row, prefetch);
  }
  int4_int8_tile<Rows, 0, false>(t, tile, row, prefetch);
}

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

template <int Rows>
void int4_float_rows(const MatMulTask& t, int64_t tile, int64_t row, bool) {
  if (t.zero_points) return int4_float_tile<Rows, true>(t, tile, row);
  int4_float_tile<Rows, false>(t, tile, row);
}

// The whole of K in one int32 sum. With few rows, a chain for each of the four fields.
template <int Rows>
void ternary_int8_rows(const MatMulTask& t, int64_t tile, int64_t row, bool prefetch) {
  constexpr int C = Rows <= 2 ? 4 : 1;
  const uint8_t* codes = t.codes + tile * t.steps * kTileBytes;
  const int8_t* x = t.x + row * t.steps * kTernaryStep;
  Ints sums[C][Rows];
  QG_UNROLL for (int r = 0; r < Rows; ++r) sums[0][r] = Lanes::all(t.x_negative_sums[row + r]);
  QG_UNROLL for (int c = 1; c < C; ++c) {
    QG_UNROLL for (int r = 0; r < Rows; ++r) sums[c][r] = Lanes::zero();
  }
  for (int64_t s = 0; s < t.steps; ++s) {
    if (prefetch) Lanes::prefetch(codes + kAhead);
    const Codes all = Lanes::load(codes);
    const Codes fields[4] = {Lanes::field2<0>(all), Lanes::field2<1>(all), Lanes::field2<2>(all),
                             Lanes::field2<3>(all)};
    QG_UNROLL for (int f = 0; f < 4; ++f) {
      Ints(&chain)[Rows] = sums[C == 4 ? f : 0];
      QG_UNROLL for (int r = 0; r < Rows; ++r) {
        chain[r] = Lanes::dot(chain[r], fields[f], x + 4 * (f * Rows + r));
      }
    }
    codes += kTileBytes;
    x += kTernaryStep * Rows;
  }
  const Floats scale = Lanes::load(t.row_scales + tile * kTileRows);
  QG_UNROLL for (int r = 0; r < Rows; ++r) {
    Ints sum = sums[0][r];
    QG_UNROLL for (int c = 1; c < C; ++c) sum = Lanes::add(sum, sums[c][r]);
    const Floats both = Lanes::multiply(scale, Lanes::all(t.x_scales[row + r]));
    write(t, row + r, tile, Lanes::multiply(Lanes::to_float(sum), both));
  }
}

template <int Rows>
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

// Every block of rows against each tile: the codes of a tile stay in the cache meanwhile, so only
// the first block asks for those ahead.
#define QG_ROWS(kernel, rows) \
  case rows: kernel##_rows<std::min(rows, Lanes::kBlockRows)>(t, tile, row, row == 0); break;
#define QG_BLOCKS(kernel)                                                           \
  void kernel(const MatMulTask& t) {                                                \
    for (int64_t tile = t.first_tile; tile < t.last_tile; ++tile) {                 \
      for (int64_t row = 0; row < t.m; row += Lanes::kBlockRows) {                  \
        switch (std::min<int64_t>(Lanes::kBlockRows, t.m - row)) {                  \
          QG_ROWS(kernel, 1)                                                        \
          QG_ROWS(kernel, 2)                                                        \
          QG_ROWS(kernel, 3)                                                        \
          QG_ROWS(kernel, 4)                                                        \
          QG_ROWS(kernel, 5)                                                        \
          QG_ROWS(kernel, 6)                                                        \
          QG_ROWS(kernel, 7)                                                        \
          default: kernel##_rows<Lanes::kBlockRows>(t, tile, row, row == 0); break; \
        }                                                                           \
      }                                                                             \
    }                                                                               \
  }

QG_BLOCKS(int4_int8)
QG_BLOCKS(int4_float)
QG_BLOCKS(ternary_int8)
QG_BLOCKS(ternary_float)

#undef QG_BLOCKS
#undef QG_ROWS

}  // namespace

#define QG_DEFINE_KERNELS(name, isa)                                 \
  extern const Kernels kKernels_##name;                              \
  const Kernels kKernels_##name = {#name,                            \
                                   isa,                              \
                                   Lanes::kBlockRows,                \
                                   quantize_rows<Lanes::kBlockRows>, \
                                   arrange_rows<Lanes::kBlockRows>,  \
                                   int4_int8,                        \
                                   int4_float,                       \
                                   ternary_int8,                     \
                                   ternary_float,                    \
                                   hadamard,                         \
                                   probe_read,                       \
                                   probe_dot};

}  // namespace qgraph
