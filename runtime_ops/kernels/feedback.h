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

#include "kernels/rounding.h"

namespace {

class Feedback {
 public:
  explicit Feedback(const FeedbackProblem& problem) : p_(problem), g_(problem.grid) {}

  void run(int64_t first_row) {
    first_ = first_row;
    const int64_t left = g_.rows - first_row;
    count_ = static_cast<int>(left < kFeedbackRows ? left : kFeedbackRows);
    double total[kFeedbackRows] = {};
    for (int64_t start = 0; start < g_.cols; start += kBlock) {
      for (int l = 0; l < kFeedbackRows; ++l) cost_[l] = 0;
      const int64_t rest = g_.cols - start;
      const int n = static_cast<int>(rest < kBlock ? rest : kBlock);
      gather_errors(start, n);
      for (int c = 0; c < n; ++c) {
        round(start + c, c);
        pass_on(start, c, n);
      }
      for (int l = 0; l < kFeedbackRows; ++l) total[l] += static_cast<double>(cost_[l]);
    }
    if (p_.energies == nullptr) return;
    for (int l = 0; l < count_; ++l) p_.row_cost[first_ + l] = total[l];
  }

 private:
  static constexpr int kBlock = 64;                       // columns whose sums are held at once
  static constexpr int kColumns = V::kLanes > 8 ? 8 : 4;  // of these in registers
  static constexpr int kVectors = V::kLanes > 1 ? 2 : 1;

  const float* factor(int64_t j) const { return p_.factor + j * g_.cols; }
  float* error(int64_t i) const { return p_.scratch + i * kFeedbackRows; }

  // sums_[c] = what the errors of all columns before the block add to its columns.
  void gather_errors(int64_t start, int n) {
    int c = 0;
    for (; c + kColumns <= n; c += kColumns) gather<kColumns>(start, c);
    for (; c < n; ++c) gather<1>(start, c);
  }

  template <int kCount>
  void gather(int64_t start, int c) {
    for (int l = 0; l < kFeedbackRows; l += kVectors * V::kLanes) {
      V sum[kCount][kVectors];
      const float* f[kCount];
      for (int m = 0; m < kCount; ++m) {
        f[m] = factor(start + c + m);
        for (int v = 0; v < kVectors; ++v) sum[m][v] = splat(0);
      }
      for (int64_t i = 0; i < start; ++i) {
        V e[kVectors];
        for (int v = 0; v < kVectors; ++v) e[v] = load(error(i) + l + v * V::kLanes);
        for (int m = 0; m < kCount; ++m) {
          const V by = splat(f[m][i]);
          for (int v = 0; v < kVectors; ++v) sum[m][v] = sum[m][v] + by * e[v];
        }
      }
      for (int m = 0; m < kCount; ++m) {
        for (int v = 0; v < kVectors; ++v) store(sums_[c + m] + l + v * V::kLanes, sum[m][v]);
      }
    }
  }

  // Rounds the j-th column in order, the c-th of the block.
  void round(int64_t j, int c) {
    const int64_t column = p_.order[j], group = column / g_.group, groups = g_.groups();
    alignas(64) float w[kFeedbackRows], s[kFeedbackRows], z[kFeedbackRows];
    alignas(64) float q[kFeedbackRows];
    const V energy = splat(p_.energies == nullptr ? 0.0f : p_.energies[j]);
    for (int l = 0; l < kFeedbackRows; ++l) {
      const bool is_row = l < count_;
      const int64_t at = (first_ + l) * groups + group;
      w[l] = is_row ? p_.w[(first_ + l) * g_.cols + column] : 0.0f;
      s[l] = is_row ? g_.scales[at] : 1.0f;
      z[l] = is_row ? g_.zero_points[at] : 0.0f;
    }
    for (int l = 0; l < kFeedbackRows; l += V::kLanes) {
      const V weight = load(w + l), scale = load(s + l), zero = load(z + l);
      const V x = weight + load(sums_[c] + l);
      const V floor = splat(g_.low) - zero, ceiling = splat(g_.high) - zero;
      const V code = round_even(min(max(x / scale, floor), ceiling));
      store(error(j) + l, weight - code * scale);
      const V lost = x - code * scale;
      store(cost_ + l, load(cost_ + l) + energy * (lost * lost));
      store(q + l, code + zero);
    }
    for (int l = 0; l < count_; ++l) {
      g_.codes[(first_ + l) * g_.cols + column] = static_cast<int8_t>(static_cast<int>(q[l]));
    }
  }

  // Adds the error of the block's column c to the sums of those after it.
  void pass_on(int64_t start, int c, int n) {
    const float* e = error(start + c);
    for (int m = c + 1; m < n; ++m) {
      const V by = splat(factor(start + m)[start + c]);
      for (int l = 0; l < kFeedbackRows; l += V::kLanes) {
        store(sums_[m] + l, load(sums_[m] + l) + by * load(e + l));
      }
    }
  }

  const FeedbackProblem& p_;
  const RoundingGrid& g_;
  int64_t first_ = 0;
  int count_ = 0;
  alignas(64) float sums_[kBlock][kFeedbackRows];
  alignas(64) float cost_[kFeedbackRows];
};

inline void feedback_all(const FeedbackProblem& problem) {
  Feedback feedback(problem);
  for (int64_t r = 0; r < problem.grid.rows; r += kFeedbackRows) feedback.run(r);
}

}  // namespace
