// What the machine can do at most: one stream of reads, and dot products from registers.
#pragma once

#include <cstdint>

#include "kernels/kernel.h"

#define QG_UNROLL _Pragma("GCC unroll 16")
// A body of its own for each kernel: inlined into its caller, compilers spill its registers.
#define QG_OUTLINED __attribute__((noinline))
// Part of such a body: as a call, its sums would pass through memory.
#define QG_INLINED __attribute__((always_inline)) inline

namespace qgraph {
namespace {

int32_t probe_read(const uint8_t* data, int64_t lines) {
  Lanes::Codes code = Lanes::load(data);
  const int8_t ones[4] = {1, 1, 1, 1};
  Lanes::Ints sums[4];
  QG_UNROLL for (int j = 0; j < 4; ++j) sums[j] = Lanes::zero();
  int64_t i = 0;
  for (; i + 4 <= lines; i += 4) {
    QG_UNROLL for (int j = 0; j < 4; ++j) {
      code = Lanes::load(data + (i + j) * kTileBytes);
      sums[j] = Lanes::dot(sums[j], code, ones);
    }
  }
  for (; i < lines; ++i) sums[0] = Lanes::dot(sums[0], Lanes::load(data + i * kTileBytes), ones);
  QG_UNROLL for (int j = 1; j < 4; ++j) sums[0] = Lanes::add(sums[0], sums[j]);
  float all[kTileRows];
  Lanes::store(all, Lanes::to_float(sums[0]));
  return static_cast<int32_t>(all[0]);
}

// Sums start apart from each other, or the compiler would see that all chains are one.
int64_t probe_dot(int64_t rounds, int32_t* sink) {
  constexpr int kChains = 16;  // enough for two dot products per cycle
  uint8_t codes[kTileBytes];
  const int8_t x[4] = {1, 2, 3, 4};
  for (int i = 0; i < kTileBytes; ++i) codes[i] = static_cast<uint8_t>(i & 15);
  const Lanes::Codes code = Lanes::load(codes);
  Lanes::Ints sums[kChains];
  QG_UNROLL for (int c = 0; c < kChains; ++c) sums[c] = Lanes::all(c);
  for (int64_t i = 0; i < rounds; ++i) {
    QG_UNROLL for (int c = 0; c < kChains; ++c) sums[c] = Lanes::dot(sums[c], code, x);
  }
  QG_UNROLL for (int c = 1; c < kChains; ++c) sums[0] = Lanes::add(sums[0], sums[c]);
  float all[kTileRows];
  Lanes::store(all, Lanes::to_float(sums[0]));
  *sink = static_cast<int32_t>(all[0] * 0.5f);
  return rounds * kChains * kTileBytes;
}

}  // namespace
}  // namespace qgraph
