// Coordinate descent on e H e^T, e = w - quantized, written once over the vector type V.
//
// Changing the quantized row by d * u changes the cost by d^2 uHu^T - 2 d g u^T with the gradient
// g = e H, so the best d is g u^T / uHu^T. Three kinds of u are tried in turn until nothing
// changes:
//
//     one code         u = unit vector j    the code moves to the nearest of quantized_j + g_j /
//     H_jj one scale        u = q - z of a group one zero point   u = ones of a group  in whole
//     steps
//
// No step is taken that does not lower the cost. Lanes are columns and no sum crosses lanes but in
// plain order, so all instruction sets agree bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/rounding.h"

namespace {

class Descent {
 public:
  static constexpr int kRows = 16;

  explicit Descent(const DescentProblem& problem) : p_(problem), g_(problem.grid) {}

  void run(int64_t first_row) {
    const int64_t left = g_.rows - first_row;
    const int count = static_cast<int>(left < kRows ? left : kRows);
    bool is_done[kRows] = {};
    for (int sweep = 0; sweep < p_.sweeps; ++sweep) {
      bool is_any = false;
      for (int r = 0; r < count; ++r) {
        if (is_done[r]) continue;
        is_done[r] = !move_codes(first_row + r) && sweep > 0;
        is_any = is_any || !is_done[r];
      }
      if (!is_any) break;
      if (!p_.fits_scales && !p_.fits_zero_points) continue;
      // Group by group over all rows: the rows of the Gram matrix that a group has stay in the
      // cache.
      for (int64_t group = 0; group < g_.groups(); ++group) {
        for (int r = 0; r < count; ++r) {
          if (!is_done[r]) fit(first_row + r, group);
        }
      }
    }
  }

 private:
  float code(int64_t at) const {
    return g_.low < 0 ? static_cast<float>(g_.codes[at])
                      : static_cast<float>(static_cast<uint8_t>(g_.codes[at]));
  }

  // y += factor * x
  void add(float* y, float factor, const float* x) const {
    int64_t k = 0;
    const V by = splat(factor);
    for (; k + V::kLanes <= g_.cols; k += V::kLanes) store(y + k, load(y + k) + by * load(x + k));
    for (; k < g_.cols; ++k) y[k] = y[k] + factor * x[k];
  }

  // One sweep over the codes of a row; whether any changed.
  bool move_codes(int64_t row) {
    float* gradient = p_.gradient + row * g_.cols;
    bool is_changed = false;
    for (int64_t j = 0; j < g_.cols; ++j) {
      const float* h = p_.gram + j * g_.cols;
      if (!(h[j] > 0)) continue;
      const int64_t at = row * g_.cols + j, block = row * g_.groups() + j / g_.group;
      const float s = g_.scales[block], old = code(at);
      const float step = gradient[j] / (h[j] * s);  // in codes
      if (!(step > 0.5f || step < -0.5f)) continue;
      float moved = old + step;
      moved = moved < g_.low ? g_.low : (moved > g_.high ? g_.high : moved);
      moved = std::nearbyint(moved);
      if (moved == old) continue;
      g_.codes[at] = static_cast<int8_t>(static_cast<int>(moved));
      add(gradient, (old - moved) * s, h);
      is_changed = true;
    }
    return is_changed;
  }

  void fit(int64_t row, int64_t group) {
    const int64_t first = group * g_.group;
    const int64_t last = first + g_.group < g_.cols ? first + g_.group : g_.cols;
    if (p_.fits_scales) fit_scale(row, group, first, last);
    if (p_.fits_zero_points) fit_zero_point(row, group, first, last);
  }

  void fit_scale(int64_t row, int64_t group, int64_t first, int64_t last) {
    float* gradient = p_.gradient + row * g_.cols;
    const int64_t block = row * g_.groups() + group;
    const float zero = g_.zero_points[block], s = g_.scales[block];
    product(row, first, last, zero);
    double along = 0, square = 0;
    for (int64_t k = first; k < last; ++k) {
      const double u = static_cast<double>(code(row * g_.cols + k) - zero);
      along += u * static_cast<double>(gradient[k]);
      square += u * static_cast<double>(p_.scratch[k]);
    }
    if (!(square > 0)) return;
    const float wanted = stored(static_cast<float>(static_cast<double>(s) + along / square));
    const double d = static_cast<double>(wanted) - static_cast<double>(s);
    if (!(wanted * s > 0) || !(d * d * square - 2 * d * along < 0)) return;
    g_.scales[block] = wanted;
    add(gradient, static_cast<float>(-d), p_.scratch);
  }

  // scratch = (q - z of the group) * H
  void product(int64_t row, int64_t first, int64_t last, float zero) {
    float* y = p_.scratch;
    std::memset(y, 0, static_cast<size_t>(g_.cols) * sizeof(float));
    int64_t j = first;
    for (; j + 4 <= last; j += 4) {
      float u[4];
      for (int m = 0; m < 4; ++m) u[m] = code(row * g_.cols + j + m) - zero;
      const float* h = p_.gram + j * g_.cols;
      int64_t k = 0;
      for (; k + V::kLanes <= g_.cols; k += V::kLanes) {
        V sum = load(y + k);
        for (int m = 0; m < 4; ++m) sum = sum + splat(u[m]) * load(h + m * g_.cols + k);
        store(y + k, sum);
      }
      for (; k < g_.cols; ++k) {
        for (int m = 0; m < 4; ++m) y[k] = y[k] + u[m] * h[m * g_.cols + k];
      }
    }
    for (; j < last; ++j) add(y, code(row * g_.cols + j) - zero, p_.gram + j * g_.cols);
  }

  void fit_zero_point(int64_t row, int64_t group, int64_t first, int64_t last) {
    float* gradient = p_.gradient + row * g_.cols;
    const int64_t block = row * g_.groups() + group;
    const float* sums = p_.group_sums + group * g_.cols;
    const float zero = g_.zero_points[block], s = g_.scales[block];
    double along = 0, square = 0;
    for (int64_t k = first; k < last; ++k) {
      along += static_cast<double>(gradient[k]);
      square += static_cast<double>(sums[k]);
    }
    const double step = square * static_cast<double>(s);
    if (!(step != 0)) return;
    // A zero point one lower lifts the group by one scale.
    float wanted = static_cast<float>(std::nearbyint(static_cast<double>(zero) - along / step));
    wanted = wanted < g_.low ? g_.low : (wanted > g_.high ? g_.high : wanted);
    const double d = (static_cast<double>(zero) - static_cast<double>(wanted)) * s;
    if (!(d * d * square - 2 * d * along < 0)) return;
    g_.zero_points[block] = wanted;
    add(gradient, static_cast<float>(-d), sums);
  }

  // The scale as it will be stored: rounded to float16 if asked, never zero or infinite.
  float stored(float s) const {
    float m = std::fabs(s);
    if (p_.scale_is_float16) {
      const float smallest = 6.103515625e-05f;  // adding 2^13 times its power of two leaves 11 bits
      float power = std::ldexp(1.0f, std::ilogb(m > smallest ? m : smallest));
      const float shift = power * 8192.0f;
      m = (m + shift) - shift;
      m = m > 65504.0f ? 65504.0f : (m < 5.9604645e-08f ? 5.9604645e-08f : m);
    } else {
      m = m > 3.4028235e+38f ? 3.4028235e+38f : (m < 1.1754944e-38f ? 1.1754944e-38f : m);
    }
    return s < 0 ? -m : m;
  }

  const DescentProblem& p_;
  const RoundingGrid& g_;
};

inline void descend_all(const DescentProblem& problem) {
  Descent descent(problem);
  for (int64_t r = 0; r < problem.grid.rows; r += Descent::kRows) descent.run(r);
}

}  // namespace
