// The matrix kernels as plain functions over raw pointers: no allocation, exceptions, threads, ORT.
//
// Weights lie in tiles of 16 rows, as qgraph/ops/layout.py says. Activations [m, k] are rearranged
// by `quantize` or `arrange` into blocks of rows, all of nearly the same size:
// int8 [block][k / 4][rows][4] or float [block][k][rows], so that one step of a tile reads them in
// sequence. Every instruction set adds in the same order and gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu.h"

namespace qgraph {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;                     // of codes, per step
constexpr int kInt4Step = 8;                       // columns
constexpr int kTernaryStep = 16;                   // columns
constexpr int kInt4Middle = 8;                     // the code of zero without zero points
constexpr int64_t kMaxColumns = int64_t{1} << 18;  // int32 sums cannot overflow

// How rows are cut into blocks: all in one where they are few.
struct RowBlocks {
  int rows, few_rows;

  constexpr int64_t count(int64_t m) const { return m <= few_rows ? 1 : (m + rows - 1) / rows; }
};
inline int64_t block_start(int64_t m, int64_t blocks, int64_t index) { return m * index / blocks; }

// Rounds activations: x ~ codes * scale, a scale for each row and `block` columns.
struct QuantizeTask {
  const float* x;  // [m, k]
  int64_t m, k;
  int64_t padded;          // columns written, zeros from k on; a multiple of 4 and of `unit`'s step
  int64_t block;           // columns that share a scale; a multiple of `unit`, or `padded`
  int64_t unit;            // columns that share a sum
  int levels;              // 127 or 7
  int8_t* codes;           // [blocks of rows][padded / 4][rows][4]
  float* scales;           // [blocks of rows][ceil(padded / block)][rows]
  int32_t* negative_sums;  // [blocks of rows][ceil(padded / unit)][rows], -sum(codes)
  int64_t first, last;     // blocks of rows to do
};

struct ArrangeTask {
  const float* x;
  int64_t m, k, padded;
  float* out;
  int64_t first, last;
};

struct MatMulTask {
  const uint8_t* codes;  // [tiles, steps, 64]
  int64_t steps;
  // INT4: [tiles, groups, 16] float16 or float, and uint8 or null (8 everywhere).
  const void* scales;
  bool scales_are_float16;
  const uint8_t* zero_points;
  int64_t groups;
  // INT4: int32 sums run over `unit_steps` steps; a weight group has `group_units` units and an
  // activation block `block_units`. One of the two is 1.
  int64_t unit_steps, group_units, block_units;
  const float* row_scales;  // ternary: [tiles * 16]

  int64_t m, n;
  const int8_t* x;
  const float* x_scales;
  const int32_t* x_negative_sums;
  const float* x_float;  // float kernels, instead of the three above
  const float* bias;     // [n] or null
  float* y;              // [m, n]
  int64_t first_tile, last_tile;
};

constexpr int64_t kMaxHadamardFactor = 64;

struct HadamardTask {
  const float* x;  // [blocks, block]
  float* y;
  const float* factor;  // [factor_size, factor_size]; block / factor_size is a power of two
  int64_t factor_size, block;
  int64_t first, last;  // blocks to do
};

// Floats as integers in the same order, NaNs outermost; its own inverse.
inline int32_t float_order(int32_t pattern) { return pattern ^ ((pattern >> 31) & 0x7FFFFFFF); }

constexpr int32_t kInfinityOrder = 0x7F800000;
inline bool is_finite_order(int32_t key) { return key < kInfinityOrder && key >= -kInfinityOrder; }

// The least and the largest, by float_order; low > high where there was none.
struct FloatExtremes {
  int32_t low = INT32_MAX;
  int32_t high = INT32_MIN;
};

// Sums over the edges of a histogram for each of several grids, in units of the cubed scale.
struct RangeErrorsTask {
  const double* at;      // [edges], a multiple of 8
  const double* weight;  // [edges]
  int64_t edges, ranges;
  const double* grids;  // [3, ranges]: one over the scale, the codes' ends less the zero point
  double outside, within, step;  // of t^3, of what of it lies within half a step, of the integer
  double* errors;                // [ranges]
};

struct Kernels {
  const char* name;
  Isa isa;
  RowBlocks blocks, float_blocks;
  int tiles_at_once;  // products with several rows are fastest with a multiple of so many tiles
  void (*quantize)(const QuantizeTask&);
  void (*arrange)(const ArrangeTask&);
  void (*int4_int8)(const MatMulTask&);
  void (*int4_float)(const MatMulTask&);
  void (*ternary_int8)(const MatMulTask&);
  void (*ternary_float)(const MatMulTask&);
  void (*hadamard)(const HadamardTask&);
  // Adds the finite values of x [n] to counts [65536], by the upper 16 bits of their pattern, and
  // widens the extremes to them. Returns how many values were NaN or infinite.
  int64_t (*count_floats)(const float* x, int64_t n, int64_t* counts, FloatExtremes*);
  int64_t (*count_floats_32)(const float* x, int64_t n, uint32_t* counts, FloatExtremes*);
  void (*range_errors)(const RangeErrorsTask&);
  int32_t (*probe_read)(const uint8_t* data, int64_t lines);
  int64_t (*probe_dot)(int64_t rounds, int32_t* sink);
};

#define QG_KERNELS(isa, value) extern const Kernels kKernels_##isa;
#include "kernels/kernels.inc"
#undef QG_KERNELS

// The kernels of an instruction set, or null where this build has none.
const Kernels* kernels_for(Isa isa);

}  // namespace qgraph
