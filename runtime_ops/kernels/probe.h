// What the machine can do at most: one stream of reads, and dot products from registers.
#pragma once

#include <cstdint>

#include "kernels/kernel.h"

namespace qgraph {
namespace {

int32_t probe_read(const uint8_t* data, int64_t lines) {
  Lanes::Codes code = Lanes::load(data);
  const int8_t ones[4] = {1, 1, 1, 1};
  Lanes::Ints sums[4];
  for (Lanes::Ints& sum : sums) sum = Lanes::zero();
  int64_t i = 0;
  for (; i + 4 <= lines; i += 4) {
    for (int j = 0; j < 4; ++j) {
      code = Lanes::load(data + (i + j) * kTileBytes);
      sums[j] = Lanes::dot(sums[j], code, ones);
    }
  }
  for (; i < lines; ++i) sums[0] = Lanes::dot(sums[0], Lanes::load(data + i * kTileBytes), ones);
  for (int j = 1; j < 4; ++j) sums[0] = Lanes::add(sums[0], sums[j]);
  float all[kTileRows];
  Lanes::store(all, Lanes::to_float(sums[0]));
  return static_cast<int32_t>(all[0]);
}

// The activations come from memory, as in the kernels, or the compiler could move the work out.
int64_t probe_dot(int64_t rounds, int32_t* sink) {
  constexpr int kChains = 8;
  alignas(64) uint8_t codes[kTileBytes];
  alignas(64) int8_t x[4 * kChains];
  for (int i = 0; i < kTileBytes; ++i) codes[i] = static_cast<uint8_t>(i & 15);
  for (int i = 0; i < 4 * kChains; ++i) x[i] = static_cast<int8_t>(i);
  const Lanes::Codes code = Lanes::load(codes);
  Lanes::Ints sums[kChains];
  for (Lanes::Ints& sum : sums) sum = Lanes::zero();
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : : "r"(x) : "memory");
    _Pragma("GCC unroll 8") for (int c = 0; c < kChains; ++c) {
      sums[c] = Lanes::dot(sums[c], code, x + 4 * c);
    }
  }
  for (int c = 1; c < kChains; ++c) sums[0] = Lanes::add(sums[0], sums[c]);
  float all[kTileRows];
  Lanes::store(all, Lanes::to_float(sums[0]));
  *sink = static_cast<int32_t>(all[0] * 0.5f);
  return rounds * kChains * kTileBytes;
}

}  // namespace
}  // namespace qgraph
