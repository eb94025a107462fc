// The matrix kernels, written once over `Lanes` (include a lanes_*.h first).
//
// A few tiles of 16 weight rows against a block of rows of activations; all sums stay in registers.
// The codes of a tile are one stream from memory, which the next tile continues.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/count.h"
#include "kernels/float_products.h"
#include "kernels/hadamard.h"
#include "kernels/int4_int8.h"
#include "kernels/kernel.h"
#include "kernels/probe.h"
#include "kernels/quantize.h"
#include "kernels/range_errors.h"
#include "kernels/ternary_int8.h"

namespace qgraph {
namespace {

// How the int8 and the float kernels cut rows, and how many tiles they take at once where the rows
// are many. With few rows the time goes into reading codes, which is fastest tile after tile.
struct IntShape {
  static constexpr RowBlocks kBlocks = {Lanes::kBlockRows, Lanes::kFewRows};
  static constexpr int kTiles = Lanes::kTiles;
};
struct FloatShape {
  static constexpr RowBlocks kBlocks = {Lanes::kFloatRows, Lanes::kFloatRows};
  static constexpr int kTiles = 1;
};

// All blocks of rows against `Tiles` tiles: their codes stay in the cache meanwhile, so only the
// first block asks for those ahead.
#define QG_ROWS(kernel, rows)                                                                    \
  case rows:                                                                                     \
    if (rows <= kMost) kernel##_rows<(rows <= kMost ? rows : 1), Tiles>(t, tile, row, row == 0); \
    break;
#define QG_BLOCKS(kernel, Shape)                                                     \
  template <int Tiles>                                                               \
  void kernel##_tiles(const MatMulTask& t, int64_t tile) {                           \
    constexpr int kMost = Tiles > 1 ? Shape::kBlocks.rows : Shape::kBlocks.few_rows; \
    const int64_t blocks = Shape::kBlocks.count(t.m);                                \
    for (int64_t b = 0; b < blocks; ++b) {                                           \
      const int64_t row = block_start(t.m, blocks, b);                               \
      switch (block_start(t.m, blocks, b + 1) - row) {                               \
        QG_ROWS(kernel, 1)                                                           \
        QG_ROWS(kernel, 2)                                                           \
        QG_ROWS(kernel, 3)                                                           \
        QG_ROWS(kernel, 4)                                                           \
        QG_ROWS(kernel, 5)                                                           \
        QG_ROWS(kernel, 6)                                                           \
        QG_ROWS(kernel, 7)                                                           \
        QG_ROWS(kernel, 8)                                                           \
      }                                                                              \
    }                                                                                \
  }                                                                                  \
  void kernel(const MatMulTask& t) {                                                 \
    int64_t tile = t.first_tile;                                                     \
    if (Shape::kTiles > 1 && t.m > Shape::kBlocks.few_rows) {                        \
      for (; tile + Shape::kTiles <= t.last_tile; tile += Shape::kTiles) {           \
        kernel##_tiles<Shape::kTiles>(t, tile);                                      \
      }                                                                              \
    }                                                                                \
    for (; tile < t.last_tile; ++tile) kernel##_tiles<1>(t, tile);                   \
  }

QG_BLOCKS(int4_int8, IntShape)
QG_BLOCKS(int4_float, FloatShape)
QG_BLOCKS(ternary_int8, IntShape)
QG_BLOCKS(ternary_float, FloatShape)

#undef QG_BLOCKS
#undef QG_ROWS

}  // namespace

#define QG_DEFINE_KERNELS(name, isa)                         \
  extern const Kernels kKernels_##name;                      \
  const Kernels kKernels_##name = {#name,                    \
                                   isa,                      \
                                   IntShape::kBlocks,        \
                                   FloatShape::kBlocks,      \
                                   IntShape::kTiles,         \
                                   quantize_rows<IntShape>,  \
                                   arrange_rows<FloatShape>, \
                                   int4_int8,                \
                                   int4_float,               \
                                   ternary_int8,             \
                                   ternary_float,            \
                                   hadamard,                 \
                                   count_floats<int64_t>,    \
                                   count_floats<uint32_t>,   \
                                   range_errors,             \
                                   probe_read,               \
                                   probe_dot};

}  // namespace qgraph
