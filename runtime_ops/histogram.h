// Tables of counts that sessions fill while they run. The memory is the caller's.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

namespace qgraph {

constexpr int64_t kFloatBuckets = 1 << 16;

struct CountTable {
  std::mutex mutex;  // guards what the pointers point to, and the pointers
  int64_t* counts;   // [65536], null once closed
  int64_t* totals;   // [2]: values that were NaN or infinite, all values
};

// The extremes as floats: inf and -inf where there are none.
void floats_of(const struct FloatExtremes& found, float* low_high);

// The open table of a key, or null.
std::shared_ptr<CountTable> find_table(int64_t key);

}  // namespace qgraph
