// The squared error of grids over a histogram: qgraph/observers/mse.py has the formula. Plain loops
// that the compiler turns into vectors of the file's instruction set; all give the same bits, and
// so does numpy: eight sums run side by side, each in the order of the edges, and are added
// pairwise at the end.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/kernel.h"

namespace qgraph {
namespace {

constexpr int kErrorSums = 8;
constexpr int kErrorRanges = 4;  // that share one walk over the edges

// Adding it leaves no bits for a fraction: what is taken off again is rounded, half to even.
constexpr double kNoFraction = 6755399441055744.0;

template <int kRanges>
inline void range_errors_of(const RangeErrorsTask& task, int64_t first) {
  double sums[kRanges][kErrorSums] = {};
  for (int64_t i = 0; i < task.edges; i += kErrorSums) {
    const double* at = task.at + i;
    const double* weight = task.weight + i;
    for (int r = 0; r < kRanges; ++r) {
      const double* grid = task.grids + first + r;
      const double inverse = grid[0], low = grid[task.ranges], high = grid[2 * task.ranges];
      for (int j = 0; j < kErrorSums; ++j) {
        double t = at[j] * inverse;
        double n = std::min(std::max(t, low), high);
        n = (n + kNoFraction) - kNoFraction;
        t -= n;
        const double inside = std::min(std::max(t, -0.5), 0.5);
        const double area = t * t * t * task.outside - inside * inside * inside * task.within;
        sums[r][j] += weight[j] * (area + n * task.step);
      }
    }
  }
  for (int r = 0; r < kRanges; ++r) {
    double* s = sums[r];
    for (int half = kErrorSums / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) s[j] += s[j + half];
    }
    task.errors[first + r] = s[0];
  }
}

void range_errors(const RangeErrorsTask& task) {
  int64_t first = 0;
  for (; first + kErrorRanges <= task.ranges; first += kErrorRanges) {
    range_errors_of<kErrorRanges>(task, first);
  }
  for (; first < task.ranges; ++first) range_errors_of<1>(task, first);
}

}  // namespace
}  // namespace qgraph
