// Rounding with feedback (GPTQ; LDLQ is the same), written once over the vector type V.
//
// With H = R R^T, R upper triangular, the error e = w - quantized of a row costs
//
//     e H e^T = sum over j of (R_jj (e_j + sum over i < j of e_i R_ij / R_jj))^2
//
// so the best that column j can do after the columns before it are rounded is
//
//     quantized_j = nearest(w_j + sum over i < j of e_i F_ji),   F_ji = R_ij / R_jj
//
// Frantar et al. 2022 (arXiv:2210.17323) write the same with the inverse of H; this needs no
// inverse. Scales are given (static groups), so any order of columns leaves plain blocks.
//
// Lanes are rows and every sum runs over i in order, so all instruction sets agree bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/rounding.h"

namespace {

class Feedback {
 public:
  explicit Feedback(const FeedbackProblem& problem) : p_(problem), g_(problem.grid) {}

  void run(int64_t first_row) {
    first_ = first_row;
    const int64_t left = g_.rows - first_row;
    count_ = static_cast<int>(left < kFeedbackRows ? left : kFeedbackRows);
    strips_ = (count_ + kStrip - 1) / kStrip;
    double total[kFeedbackRows] = {};
    for (int s = 0; s < strips_; ++s) read_weights(s);
    for (int64_t start = 0; start < g_.cols; start += kBlock) {
      const int64_t rest = g_.cols - start;
      const int n = static_cast<int>(rest < kBlock ? rest : kBlock);
      std::memset(cost_, 0, sizeof cost_);
      gather_errors(start, n);
      for (int s = 0; s < strips_; ++s) {
        for (int c = 0; c < n; ++c) {
          round(start + c, c, s);
          pass_on(start, c, n, s);
        }
      }
      for (int l = 0; l < count_; ++l) total[l] += static_cast<double>(cost_[l]);
    }
    if (p_.energies == nullptr) return;
    for (int l = 0; l < count_; ++l) p_.row_cost[first_ + l] = total[l];
  }

 private:
  static constexpr int kStrip = 32;                       // rows whose sums are in registers
  static constexpr int kStrips = kFeedbackRows / kStrip;  // that share what is read of the factor
  static constexpr int kBlock = 64;                       // columns whose sums are held at once
  static constexpr int kPanel = 256;  // errors of a strip that stay in the first cache
  static constexpr int kColumns = V::kLanes > 8 ? 8 : 4;  // of the block in registers
  static constexpr int kVectors = V::kLanes > 1 ? 2 : 1;

  const float* factor(int64_t j) const { return p_.factor + j * g_.cols; }
  // What the j-th column is until it is rounded: its weights; then, its errors.
  float* column(int s, int64_t j) const { return p_.scratch + (s * g_.cols + j) * kStrip; }

  int rows_of(int s) const {
    const int left = count_ - s * kStrip;
    return left < kStrip ? left : kStrip;
  }

  void read_weights(int s) {
    const int rows = rows_of(s);
    const float* w = p_.w + (first_ + s * kStrip) * g_.cols;
    for (int64_t j = 0; j < g_.cols; ++j) {
      float* to = column(s, j);
      const float* from = w + p_.order[j];
      for (int l = 0; l < rows; ++l) to[l] = from[l * g_.cols];
      for (int l = rows; l < kStrip; ++l) to[l] = 0;
    }
  }

  // sums_[s][c] = what the errors of all columns before the block add to its columns.
  void gather_errors(int64_t start, int n) {
    std::memset(sums_, 0, sizeof sums_);
    for (int64_t first = 0; first < start; first += kPanel) {
      const int count = static_cast<int>(start - first < kPanel ? start - first : kPanel);
      int c = 0;
      for (; c + kColumns <= n; c += kColumns) gather<kColumns>(start, first, count, c);
      for (; c < n; ++c) gather<1>(start, first, count, c);
    }
  }

  template <int kCount>
  void gather(int64_t start, int64_t first, int count, int c) {
    for (int m = 0; m < kCount; ++m) {
      const float* f = factor(start + c + m) + first;
      for (int i = 0; i < count; ++i) packed_[i * kCount + m] = f[i];
    }
    for (int s = 0; s < strips_; ++s) {
      for (int l = 0; l < kStrip; l += kVectors * V::kLanes) {
        add_errors<kCount>(column(s, first) + l, count, &sums_[s][c][l]);
      }
    }
  }

  template <int kCount>
  void add_errors(const float* errors, int count, float* sums) const {
    V sum[kCount][kVectors];
    for (int m = 0; m < kCount; ++m) {
      for (int v = 0; v < kVectors; ++v) sum[m][v] = load(sums + m * kStrip + v * V::kLanes);
    }
    for (int i = 0; i < count; ++i) {
      V e[kVectors];
      for (int v = 0; v < kVectors; ++v) e[v] = load(errors + i * kStrip + v * V::kLanes);
      for (int m = 0; m < kCount; ++m) {
        const V by = splat(packed_[i * kCount + m]);
        for (int v = 0; v < kVectors; ++v) sum[m][v] = fused(by, e[v], sum[m][v]);
      }
    }
    for (int m = 0; m < kCount; ++m) {
      for (int v = 0; v < kVectors; ++v) store(sums + m * kStrip + v * V::kLanes, sum[m][v]);
    }
  }

  // Rounds the j-th column in order, the c-th of the block.
  void round(int64_t j, int c, int s) {
    const int64_t at = p_.order[j], group = at / g_.group, groups = g_.groups();
    const int rows = rows_of(s);
    const int64_t first = first_ + s * kStrip;
    alignas(64) float scales[kStrip], zeros[kStrip], codes[kStrip];
    for (int l = 0; l < kStrip; ++l) {
      const int64_t block = (first + l) * groups + group;
      scales[l] = l < rows ? g_.scales[block] : 1.0f;
      zeros[l] = l < rows ? g_.zero_points[block] : 0.0f;
    }
    const V energy = splat(p_.energies == nullptr ? 0.0f : p_.energies[j]);
    float* weights = column(s, j);
    for (int l = 0; l < kStrip; l += V::kLanes) {
      const V weight = load(weights + l), scale = load(scales + l), zero = load(zeros + l);
      const V x = weight + load(sums_[s][c] + l);
      const V floor = splat(g_.low) - zero, ceiling = splat(g_.high) - zero;
      const V code = round_even(min(max(x / scale, floor), ceiling));
      store(weights + l, weight - code * scale);
      const V lost = x - code * scale;
      float* cost = cost_ + s * kStrip + l;
      store(cost, load(cost) + energy * (lost * lost));
      store(codes + l, code + zero);
    }
    int8_t* to = g_.codes + first * g_.cols + at;
    for (int l = 0; l < rows; ++l)
      to[l * g_.cols] = static_cast<int8_t>(static_cast<int>(codes[l]));
  }

  // Adds the errors of the block's column c to the sums of those after it.
  void pass_on(int64_t start, int c, int n, int s) {
    const float* errors = column(s, start + c);
    for (int m = c + 1; m < n; ++m) {
      const V by = splat(factor(start + m)[start + c]);
      for (int l = 0; l < kStrip; l += V::kLanes) {
        float* sum = sums_[s][m] + l;
        store(sum, fused(by, load(errors + l), load(sum)));
      }
    }
  }

  const FeedbackProblem& p_;
  const RoundingGrid& g_;
  int64_t first_ = 0;
  int count_ = 0, strips_ = 0;
  alignas(64) float sums_[kStrips][kBlock][kStrip];
  alignas(64) float cost_[kFeedbackRows];
  alignas(64) float packed_[kPanel * kColumns];
};

inline void feedback_all(const FeedbackProblem& problem) {
  Feedback feedback(problem);
  for (int64_t r = 0; r < problem.grid.rows; r += kFeedbackRows) feedback.run(r);
}

}  // namespace
