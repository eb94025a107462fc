#include <algorithm>
#include <cstring>
#include <limits>

#include "qgraph_ops.h"

namespace {

constexpr int64_t kBlock = 4096;  // floats; read twice, the second time from the first-level cache
constexpr int32_t kInfinity = 0x7F800000;
constexpr int kLanes = 4;

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Integers in the order of the floats, NaNs outermost; its own inverse.
int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

struct Extremes {
  int32_t low = std::numeric_limits<int32_t>::max();
  int32_t high = std::numeric_limits<int32_t>::min();
};

bool is_finite(int32_t key) {
  return key < kInfinity && key > ordered(bits_of(-std::numeric_limits<float>::infinity()));
}

Extremes extremes_of(const float* x, int64_t n) {
  Extremes found;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = ordered(bits_of(x[i]));
    found.low = std::min(found.low, key);
    found.high = std::max(found.high, key);
  }
  if (is_finite(found.low) && is_finite(found.high)) return found;
  found = {};
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = ordered(bits_of(x[i]));
    if (!is_finite(key)) continue;
    found.low = std::min(found.low, key);
    found.high = std::max(found.high, key);
  }
  return found;
}

void count_block(const float* x, int64_t n, int64_t* counts) {
  // Equal values in a row (zeros after ReLU) would wait for each other's counter: count a run at
  // once.
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    uint32_t b[kLanes];
    std::memcpy(b, x + i, sizeof b);
    for (uint32_t& each : b) each >>= 16;
    if (b[0] == b[1] && b[1] == b[2] && b[2] == b[3]) {
      counts[b[0]] += kLanes;
      continue;
    }
    for (const uint32_t each : b) ++counts[each];
  }
  for (; i < n; ++i) ++counts[static_cast<uint32_t>(bits_of(x[i])) >> 16];
}

// Takes the counts of NaN and infinity away; returns how many they were.
int64_t take_non_finite(int64_t* counts) {
  int64_t taken = 0;
  for (const int sign : {0, 0x8000}) {
    for (int bucket = sign + (kInfinity >> 16); bucket <= sign + 0x7FFF; ++bucket) {
      taken += counts[bucket];
      if (counts[bucket] != 0) counts[bucket] = 0;
    }
  }
  return taken;
}

}  // namespace

int64_t qg_count_floats(const float* x, int64_t n, int64_t* counts, float* extremes) {
  Extremes found;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = std::min(kBlock, n - start);
    const Extremes here = extremes_of(x + start, size);
    found.low = std::min(found.low, here.low);
    found.high = std::max(found.high, here.high);
    count_block(x + start, size, counts);
  }
  const bool is_empty = found.low > found.high;
  const float infinity = std::numeric_limits<float>::infinity();
  extremes[0] = is_empty ? infinity : float_of(ordered(found.low));
  extremes[1] = is_empty ? -infinity : float_of(ordered(found.high));
  return take_non_finite(counts);
}
