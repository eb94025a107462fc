// y = x H / sqrt(block) for blocks along a row, H = factor (x) Sylvester: log2 passes of
// butterflies.
//
// Vectors are the compiler's own, so that one text serves every instruction set with the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/kernel.h"
#include "kernels/probe.h"

namespace qgraph {
namespace {

typedef float Vector16 __attribute__((vector_size(64)));

// Scaling and the passes over distances 1, 2, 4, 8, within 16 floats.
inline void butterflies_of_16(const float* x, float scale, float* y) {
  Vector16 v;
  std::memcpy(&v, x, sizeof v);
  v *= scale;
  v = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) +
      v * Vector16{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
  v = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) +
      v * Vector16{1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  v = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) +
      v * Vector16{1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
  v = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) +
      v * Vector16{1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
  std::memcpy(y, &v, sizeof v);
}

// Two passes at once: distances h and 2h.
inline void two_passes(float* y, int64_t n, int64_t h) {
  for (int64_t i = 0; i < n; i += 4 * h) {
    float* a = y + i;
    for (int64_t j = 0; j < h; ++j) {
      const float p = a[j] + a[j + h], q = a[j] - a[j + h];
      const float r = a[j + 2 * h] + a[j + 3 * h], s = a[j + 2 * h] - a[j + 3 * h];
      a[j] = p + r;
      a[j + h] = q + s;
      a[j + 2 * h] = p - r;
      a[j + 3 * h] = q - s;
    }
  }
}

inline void one_pass(float* y, int64_t n, int64_t h) {
  for (int64_t i = 0; i < n; i += 2 * h) {
    for (int64_t j = i; j < i + h; ++j) {
      const float p = y[j], q = y[j + h];
      y[j] = p + q;
      y[j + h] = p - q;
    }
  }
}

inline void sylvester(const float* x, float scale, float* y, int64_t n) {
  int64_t h = 1;
  if (n >= 16) {
    for (int64_t i = 0; i < n; i += 16) butterflies_of_16(x + i, scale, y + i);
    h = 16;
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * scale;
  }
  for (; 4 * h <= n; h *= 4) two_passes(y, n, h);
  if (h < n) one_pass(y, n, h);
}

// `Columns` vectors of columns of the factor's product, four rows of it at once: the sums stay in
// registers. A factor is made of 1 and -1, so a fused product rounds no differently.
template <int Columns>
inline void factor_columns(const HadamardTask& t, float* y, int64_t n) {
  float panel[kMaxHadamardFactor * 16 * Columns];
  for (int64_t k = 0; k < t.factor_size; ++k) {
    std::memcpy(panel + k * 16 * Columns, y + k * n, sizeof(float) * 16 * Columns);
  }
  for (int64_t i = 0; i < t.factor_size; i += 4) {
    const int64_t rows = std::min<int64_t>(4, t.factor_size - i);
    Lanes::Floats sums[4][Columns];
    QG_UNROLL for (int r = 0; r < 4; ++r) {
      QG_UNROLL for (int c = 0; c < Columns; ++c) sums[r][c] = Lanes::float_zero();
    }
    for (int64_t k = 0; k < t.factor_size; ++k) {
      QG_UNROLL for (int r = 0; r < 4; ++r) {
        // Rows beyond the last are computed again and not stored.
        const Lanes::Floats sign =
            Lanes::all(t.factor[std::min(i + r, t.factor_size - 1) * t.factor_size + k]);
        QG_UNROLL for (int c = 0; c < Columns; ++c) {
          const Lanes::Floats v = Lanes::load(panel + (k * Columns + c) * 16);
          sums[r][c] = Lanes::fma(v, sign, sums[r][c]);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      QG_UNROLL for (int c = 0; c < Columns; ++c) {
        Lanes::store(y + (i + r) * n + 16 * c, sums[r][c]);
      }
    }
  }
}

// Fewer than 16 columns.
inline void factor_narrow(const HadamardTask& t, float* y, int64_t n) {
  float column[kMaxHadamardFactor];
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t k = 0; k < t.factor_size; ++k) column[k] = y[k * n + j];
    for (int64_t i = 0; i < t.factor_size; ++i) {
      float sum = 0.0f;
      for (int64_t k = 0; k < t.factor_size; ++k)
        sum += t.factor[i * t.factor_size + k] * column[k];
      y[i * n + j] = sum;
    }
  }
}

// The dense factor acts across the f runs of n floats; n is a power of two.
inline void apply_factor(const HadamardTask& t, float* y, int64_t n) {
  if (n < 16) return factor_narrow(t, y, n);
  if (n == 16) return factor_columns<1>(t, y, n);
  for (int64_t start = 0; start < n; start += 32) factor_columns<2>(t, y + start, n);
}

void hadamard(const HadamardTask& t) {
  const int64_t n = t.block / t.factor_size;
  const float scale = 1.0f / std::sqrt(static_cast<float>(t.block));
  for (int64_t b = t.first; b < t.last; ++b) {
    const float* x = t.x + b * t.block;
    float* y = t.y + b * t.block;
    for (int64_t f = 0; f < t.factor_size; ++f) sylvester(x + f * n, scale, y + f * n, n);
    if (t.factor_size > 1 || t.factor[0] != 1.0f) apply_factor(t, y, n);
  }
}

}  // namespace
}  // namespace qgraph
