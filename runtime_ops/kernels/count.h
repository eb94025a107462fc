// Floats counted by the upper 16 bits of their pattern, with their extremes. Plain loops that the
// compiler turns into vectors of the file's instruction set; all give the same numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/kernel.h"

namespace qgraph {
namespace {

constexpr int64_t kCountBlock = 4096;  // floats; read twice, the second time from the closest cache
constexpr int kZeroSlots = 16;
// Buckets of negative NaNs, which no block without NaNs fills: zeros wait there for each other.
constexpr uint32_t kFirstZeroSlot = 0xFFC0;

inline int32_t pattern_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint32_t bucket_of(float x) { return static_cast<uint32_t>(pattern_of(x)) >> 16; }

inline void find_extremes(const float* x, int64_t n, FloatExtremes& found) {
  int32_t low = found.low, high = found.high;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = float_order(pattern_of(x[i]));
    low = std::min(low, key);
    high = std::max(high, key);
  }
  found = {low, high};
}

template <typename Count>
inline void count_each(const float* x, int64_t n, Count* counts) {
  constexpr int kAtOnce = 8;
  int64_t i = 0;
  for (; i + kAtOnce <= n; i += kAtOnce) {
    uint32_t buckets[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) buckets[j] = bucket_of(x[i + j]);
    for (const uint32_t each : buckets) ++counts[each];
  }
  for (; i < n; ++i) ++counts[bucket_of(x[i])];
}

// Zeros among other values (after ReLU) would wait for each other's counter: they take turns.
template <typename Count>
inline void count_with_zeros(const float* x, int64_t n, Count* counts) {
  int64_t i = 0;
  for (; i + kZeroSlots <= n; i += kZeroSlots) {
    alignas(64) uint32_t buckets[kZeroSlots];
    for (uint32_t j = 0; j < kZeroSlots; ++j) {
      const uint32_t bucket = bucket_of(x[i + j]);
      buckets[j] = bucket == 0 ? kFirstZeroSlot + j : bucket;
    }
    for (const uint32_t each : buckets) ++counts[each];
  }
  for (; i < n; ++i) ++counts[bucket_of(x[i])];
  for (int j = 0; j < kZeroSlots; ++j) {
    counts[0] += counts[kFirstZeroSlot + j];
    counts[kFirstZeroSlot + j] = 0;
  }
}

// A block that holds NaN or infinity.
template <typename Count>
inline int64_t count_finite(const float* x, int64_t n, Count* counts, FloatExtremes& found) {
  int64_t lost = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = float_order(pattern_of(x[i]));
    if (!is_finite_order(key)) {
      ++lost;
      continue;
    }
    ++counts[bucket_of(x[i])];
    found.low = std::min(found.low, key);
    found.high = std::max(found.high, key);
  }
  return lost;
}

template <typename Count>
int64_t count_floats(const float* x, int64_t n, Count* counts, FloatExtremes* extremes) {
  int64_t lost = 0;
  for (int64_t start = 0; start < n; start += kCountBlock) {
    const int64_t size = std::min(kCountBlock, n - start);
    FloatExtremes here;
    find_extremes(x + start, size, here);
    if (!is_finite_order(here.low) || !is_finite_order(here.high)) {
      lost += count_finite(x + start, size, counts, *extremes);
      continue;
    }
    // Where zero is the least there are likely many.
    if (here.low == 0) {
      count_with_zeros(x + start, size, counts);
    } else {
      count_each(x + start, size, counts);
    }
    extremes->low = std::min(extremes->low, here.low);
    extremes->high = std::max(extremes->high, here.high);
  }
  return lost;
}

}  // namespace
}  // namespace qgraph
