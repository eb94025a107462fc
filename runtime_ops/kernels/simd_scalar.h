// One lane: the reference that every wider vector must match bit for bit.
//
// A vector type V offers the few operations below, each with one IEEE result, so a kernel that is
// written once over V gives the same bits on every instruction set. A product and a sum are two
// roundings unless the kernel says `fused`; max/min return the second operand when one is NaN (as
// x86 does).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct V {
  static constexpr int kLanes = 1;
  float v;
};
using Mask = bool;

inline V load(const float* p) { return {*p}; }
inline void store(float* p, V a) { *p = a.v; }
inline V splat(float x) { return {x}; }
inline V operator+(V a, V b) { return {a.v + b.v}; }
inline V operator-(V a, V b) { return {a.v - b.v}; }
inline V operator*(V a, V b) { return {a.v * b.v}; }
inline V fused(V a, V b, V c) { return {std::fma(a.v, b.v, c.v)}; }  // a b + c
inline V operator/(V a, V b) { return {a.v / b.v}; }
inline V max(V a, V b) { return {a.v > b.v ? a.v : b.v}; }
inline V min(V a, V b) { return {a.v < b.v ? a.v : b.v}; }
inline Mask operator<(V a, V b) { return a.v < b.v; }
inline V select(Mask m, V a, V b) { return m ? a : b; }
inline V square_root(V a) { return {std::sqrt(a.v)}; }

inline V keep_bits(V a, uint32_t mask) {
  uint32_t bits;
  std::memcpy(&bits, &a.v, sizeof bits);
  bits &= mask;
  std::memcpy(&a.v, &bits, sizeof bits);
  return a;
}

// Half to even, for |a| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
inline V round_even(V a) {
  const float magic = 12582912.0f;
  return {(a.v + magic) - magic};
}

// Integers in -128..255, one byte per lane.
inline void store_bytes(uint8_t* p, V a) { *p = static_cast<uint8_t>(static_cast<int>(a.v)); }

}  // namespace
