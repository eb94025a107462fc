// Round-to-nearest weight quantization with a scale search, written once over the vector type V.
//
// A group of weights w becomes codes q and a scale s (and a zero point z):
//
//     w ~ s * q',   q' = clamp(round(w / s), first - z, last - z),   minimize  sum i * (s * q' -
//     w)^2
//
// Symmetric codes are q' itself, -half..half-1; asymmetric ones are q' + z, 0..2^bits-1.
//   1. Candidates: the plain grids first, then scales spaced evenly between a little above the
//   plain
//      scale and the smaller of `narrow` times it and a multiple of the group's RMS (which reaches
//      far enough down where a few outliers stretch the range). Symmetric scales are tried with
//      both signs; asymmetric ones with the plain zero point and its two neighbours.
//   2. The best candidate is refined: s = sum i*w*q' / sum i*q'^2 for its codes, twice.
//   3. Codes are made by a true division, so they equal ONNX QuantizeLinear with the stored scale.
// Every error is measured with the scale as stored, so the result is never worse than a plain grid.
//
// Lanes are groups: 16 groups lie side by side, element k of lane l at tile[16 * k + l], and no sum
// crosses lanes. Sums run over k in order, in segments of 128. So all instruction sets agree bit
// for bit, rows are independent of each other, and no memory is allocated however long a group is.
#pragma once

#include <cstdint>

#include "kernels/rtn.h"
#include "kernels/rtn_grid.h"

namespace {

constexpr int kTile = 16;      // groups side by side
constexpr int kSegment = 128;  // elements of each group that are in the tile at once
constexpr int kBatch = 4;      // candidates measured in one sweep
constexpr int kMaxCandidates = 48;

using Lanes = float[kTile];

// A sixteen-group tile on its way through the search.
class Search {
 public:
  Search(const RtnProblem& problem, int64_t first_group, int groups)
      : p_(problem), grid_(grid_for(problem.bits, problem.is_symmetric)) {
    const int64_t per_row = p_.groups_per_row();
    for (int l = 0; l < kTile; ++l) {
      const int64_t g = first_group + l;
      const int64_t column = (g % per_row) * p_.group;
      const int64_t left = p_.cols - column;
      offset_[l] = (g / per_row) * p_.cols + column;
      column_[l] = column;
      length_[l] = l >= groups ? 0 : (left < p_.group ? left : p_.group);
      longest_ = length_[l] > longest_ ? length_[l] : longest_;
    }
    half_ = static_cast<float>(1 << (p_.bits - 1));
    last_ = 2 * half_ - 1;
  }

  void run(int64_t first_group, int groups) {
    measure_range();
    propose();
    measure_candidates();
    pick();
    refine();
    encode(first_group, groups);
  }

 private:
  // Calls body(n) for each segment, with the tile holding its n elements of every group.
  template <typename Body>
  void for_each_segment(Body body) {
    for (int64_t start = 0; start < longest_; start += kSegment) {
      const int64_t left = longest_ - start;
      const int n = static_cast<int>(left < kSegment ? left : kSegment);
      if (start != loaded_) fill(start, n);
      body(n, start);
    }
  }

  // How many of the n elements from `start` on lane l has.
  int elements(int l, int64_t start, int n) const {
    const int64_t left = length_[l] - start;
    return static_cast<int>(left < 0 ? 0 : (left < n ? left : n));
  }

  void fill(int64_t start, int n) {
    loaded_ = start;
    for (int l = 0; l < kTile; ++l) {
      const int have = elements(l, start, n);
      const int64_t at = offset_[l] + start;
      for (int k = 0; k < have; ++k) w_[k * kTile + l] = p_.w[at + k];
      for (int k = have; k < n; ++k) w_[k * kTile + l] = 0.0f;
      if (p_.importance == nullptr) continue;
      const int64_t column = column_[l] + start;
      for (int k = 0; k < have; ++k) i_[k * kTile + l] = p_.importance[column + k];
      for (int k = have; k < n; ++k) i_[k * kTile + l] = 0.0f;
    }
  }

  static void zero(float* lanes) {
    for (int l = 0; l < kTile; ++l) lanes[l] = 0.0f;
  }

  static void add(float* lanes, V x) { store(lanes, load(lanes) + x); }

  // Smallest and largest weight, sum i * w^2 and sum i.
  void measure_range() {
    zero(low_);
    zero(high_);
    zero(energy_);
    zero(mass_);
    for_each_segment([this](int n, int64_t) {
      for (int j = 0; j < kTile; j += V::kLanes) {
        V low = load(low_ + j), high = load(high_ + j);
        V energy = splat(0), mass = splat(0);
        for (int k = 0; k < n; ++k) {
          const V w = load(w_ + k * kTile + j);
          low = min(w, low);
          high = max(w, high);
          if (p_.importance == nullptr) {
            energy = energy + w * w;
          } else {
            const V i = load(i_ + k * kTile + j);
            energy = energy + i * (w * w);
            mass = mass + i;
          }
        }
        store(low_ + j, low);
        store(high_ + j, high);
        add(energy_ + j, energy);
        add(mass_ + j, mass);
      }
    });
    if (p_.importance == nullptr) {
      for (int l = 0; l < kTile; ++l) mass_[l] = static_cast<float>(length_[l]);
    }
  }

  // The scale that will be stored: rounded to float16 if asked, never zero or infinite.
  V stored(V s) const {
    const V magnitude = keep_bits(s, 0x7FFFFFFFu);
    V m = magnitude;
    if (p_.scale_is_float16) {
      // Adding 2^13 times its power of two leaves x exactly the 11 significant bits of float16.
      const V power = max(keep_bits(m, 0x7F800000u), splat(6.103515625e-05f));
      const V shift = power * splat(8192.0f);
      m = min((m + shift) - shift, splat(65504.0f));
      m = max(m, splat(5.9604645e-08f));
    } else {
      m = max(min(m, splat(3.4028235e+38f)), splat(1.1754944e-38f));
    }
    return select(s < splat(0), splat(0) - m, m);
  }

  void propose() {
    for (int j = 0; j < kTile; j += V::kLanes) {
      count_ = 0;
      if (p_.is_symmetric) {
        propose_symmetric(j);
      } else {
        propose_asymmetric(j);
      }
    }
  }

  void put(int j, V s, int zero_point) {
    s = stored(s);
    store(scale_[count_] + j, s);
    store(inverse_[count_] + j, splat(1) / s);
    which_[count_++] = zero_point;
  }

  V smallest(V plain, int j) const {
    const V rms = square_root(load(energy_ + j) / load(mass_ + j));
    return min(splat(grid_.rms_share) * rms, splat(grid_.narrow) * plain);
  }

  void propose_symmetric(int j) {
    store(floor_[0] + j, splat(-half_));
    store(ceiling_[0] + j, splat(half_ - 1));
    store(zero_[0] + j, splat(0));
    const V low = load(low_ + j), high = load(high_ + j), below = splat(0) - low;
    const V peak = max(high, below);
    const V plain = peak / splat(half_);
    // The code range reaches one further on the negative side: the largest weight goes there.
    const bool is_signed = p_.scale_is_signed;
    const V sign = is_signed ? select(high < below, splat(1), splat(-1)) : splat(1);
    put(j, peak / splat(half_ - 1), 0);
    put(j, sign * plain, 0);
    const V from = splat(grid_.wide) * plain, to = smallest(plain, j);
    spread(j, sign * from, sign * to, grid_.same_sign, 0);
    if (is_signed) spread(j, splat(0) - sign * from, splat(0) - sign * to, grid_.opposite_sign, 0);
  }

  void propose_asymmetric(int j) {
    const V low = load(low_ + j), high = load(high_ + j);
    const V plain = (high - low) / splat(last_);
    const V z = round_even(min(max((splat(0) - low) / stored(plain), splat(0)), splat(last_)));
    const float step[3] = {0, -1, 1};
    for (int c = 0; c < grid_.zero_points; ++c) {
      const V moved = min(max(z + splat(step[c]), splat(0)), splat(last_));
      store(zero_[c] + j, moved);
      store(floor_[c] + j, splat(0) - moved);
      store(ceiling_[c] + j, splat(last_) - moved);
    }
    put(j, plain, 0);
    const V from = splat(grid_.wide) * plain, to = smallest(plain, j);
    for (int c = 0; c < grid_.zero_points; ++c) spread(j, from, to, grid_.shrinks, c);
  }

  void spread(int j, V from, V to, int count, int zero_point) {
    for (int c = 0; c < count; ++c) {
      const float t = static_cast<float>(c) / static_cast<float>(count - 1);
      put(j, from + (to - from) * splat(t), zero_point);
    }
  }

  void measure_candidates() {
    const int batches = (count_ + kBatch - 1) / kBatch;
    // Fill the last batch with repeats; they are never picked because they are not better.
    for (int c = count_; c < batches * kBatch; ++c) {
      for (int l = 0; l < kTile; ++l) {
        scale_[c][l] = scale_[0][l];
        inverse_[c][l] = inverse_[0][l];
      }
      which_[c] = which_[0];
    }
    for (int c = 0; c < batches * kBatch; ++c) zero(error_[c]);
    for_each_segment([this, batches](int n, int64_t) {
      for (int b = 0; b < batches; ++b) {
        for (int j = 0; j < kTile; j += V::kLanes) {
          if (p_.importance == nullptr) {
            sweep<false>(n, j, b * kBatch);
          } else {
            sweep<true>(n, j, b * kBatch);
          }
        }
      }
    });
  }

  // Adds the errors of kBatch candidates over one segment.
  template <bool kWeighted>
  void sweep(int n, int j, int first) {
    V inverse[kBatch], scale[kBatch], floor[kBatch], ceiling[kBatch], error[kBatch];
    for (int c = 0; c < kBatch; ++c) {
      inverse[c] = load(inverse_[first + c] + j);
      scale[c] = load(scale_[first + c] + j);
      floor[c] = load(floor_[which_[first + c]] + j);
      ceiling[c] = load(ceiling_[which_[first + c]] + j);
      error[c] = splat(0);
    }
    for (int k = 0; k < n; ++k) {
      const V w = load(w_ + k * kTile + j);
      for (int c = 0; c < kBatch; ++c) {
        const V q = round_even(min(max(w * inverse[c], floor[c]), ceiling[c]));
        const V d = q * scale[c] - w;
        error[c] = error[c] + (kWeighted ? load(i_ + k * kTile + j) * (d * d) : d * d);
      }
    }
    for (int c = 0; c < kBatch; ++c) add(error_[first + c] + j, error[c]);
  }

  // Takes the first of the best candidates.
  void pick() {
    for (int j = 0; j < kTile; j += V::kLanes) {
      V error = load(error_[0] + j), scale = load(scale_[0] + j);
      V zero = load(zero_[0] + j), floor = load(floor_[0] + j), ceiling = load(ceiling_[0] + j);
      for (int c = 1; c < count_; ++c) {
        const Mask better = load(error_[c] + j) < error;
        const int z = which_[c];
        error = select(better, load(error_[c] + j), error);
        scale = select(better, load(scale_[c] + j), scale);
        zero = select(better, load(zero_[z] + j), zero);
        floor = select(better, load(floor_[z] + j), floor);
        ceiling = select(better, load(ceiling_[z] + j), ceiling);
      }
      store(best_error_ + j, error);
      store(best_scale_ + j, scale);
      store(best_zero_ + j, zero);
      store(best_floor_ + j, floor);
      store(best_ceiling_ + j, ceiling);
    }
  }

  // Two least-squares steps from the best candidate; a step that stores a worse scale is not taken.
  void refine() {
    Lanes scale, error, cross, square;
    for (int l = 0; l < kTile; ++l) scale[l] = best_scale_[l];
    for (int step = 0; step < 3; ++step) {
      zero(error);
      zero(cross);
      zero(square);
      for_each_segment([&](int n, int64_t) {
        for (int j = 0; j < kTile; j += V::kLanes) fit(n, j, scale, error, cross, square);
      });
      for (int j = 0; j < kTile; j += V::kLanes) {
        const V s = load(scale + j);
        const Mask better = load(error + j) < load(best_error_ + j);
        store(best_error_ + j, select(better, load(error + j), load(best_error_ + j)));
        store(best_scale_ + j, select(better, s, load(best_scale_ + j)));
        const V next = stored(load(cross + j) / load(square + j));
        store(scale + j, select(splat(0) < load(square + j), next, s));
      }
    }
  }

  // Adds error, sum i*w*q and sum i*q^2 of one scale over one segment.
  void fit(int n, int j, const float* scale, float* error, float* cross, float* square) {
    const V s = load(scale + j), inverse = splat(1) / s;
    const V floor = load(best_floor_ + j), ceiling = load(best_ceiling_ + j);
    V e = splat(0), wq = splat(0), qq = splat(0);
    for (int k = 0; k < n; ++k) {
      const V w = load(w_ + k * kTile + j);
      const V q = round_even(min(max(w * inverse, floor), ceiling));
      const V d = q * s - w;
      if (p_.importance == nullptr) {
        e = e + d * d;
        wq = wq + w * q;
        qq = qq + q * q;
      } else {
        const V i = load(i_ + k * kTile + j);
        e = e + i * (d * d);
        wq = wq + i * (w * q);
        qq = qq + i * (q * q);
      }
    }
    add(error + j, e);
    add(cross + j, wq);
    add(square + j, qq);
  }

  void encode(int64_t first_group, int groups) {
    // A group of zeros: scale 1, codes at the zero point.
    for (int j = 0; j < kTile; j += V::kLanes) {
      const V low = load(low_ + j), high = load(high_ + j);
      store(best_scale_ + j, select(low < high, load(best_scale_ + j), splat(1)));
    }
    zero(best_error_);
    for_each_segment([this](int n, int64_t start) {
      for (int j = 0; j < kTile; j += V::kLanes) encode_segment(n, j);
      for (int l = 0; l < kTile; ++l) {
        const int have = elements(l, start, n);
        for (int k = 0; k < have; ++k) p_.codes[offset_[l] + start + k] = codes_[k * kTile + l];
      }
    });
    const int64_t per_row = p_.groups_per_row();
    for (int l = 0; l < groups; ++l) {
      p_.scales[first_group + l] = best_scale_[l];
      if (!p_.is_symmetric) p_.zero_points[first_group + l] = static_cast<uint8_t>(best_zero_[l]);
      p_.row_error[(first_group + l) / per_row] += static_cast<double>(best_error_[l]);
    }
  }

  void encode_segment(int n, int j) {
    const V s = load(best_scale_ + j), zero_point = load(best_zero_ + j);
    const V floor = load(best_floor_ + j), ceiling = load(best_ceiling_ + j);
    V error = splat(0);
    for (int k = 0; k < n; ++k) {
      const V w = load(w_ + k * kTile + j);
      const V q = round_even(min(max(w / s, floor), ceiling));
      const V d = q * s - w;
      error = error + (p_.importance == nullptr ? d * d : load(i_ + k * kTile + j) * (d * d));
      store_bytes(codes_ + k * kTile + j, q + zero_point);
    }
    add(best_error_ + j, error);
  }

  const RtnProblem& p_;
  const Grid grid_;
  float half_, last_;
  int64_t offset_[kTile], column_[kTile], length_[kTile];
  int64_t longest_ = 0;
  int64_t loaded_ = -1;

  alignas(64) float w_[kSegment * kTile];
  alignas(64) float i_[kSegment * kTile];
  alignas(64) uint8_t codes_[kSegment * kTile];

  alignas(64) Lanes low_, high_, energy_, mass_;
  alignas(64) Lanes zero_[3], floor_[3], ceiling_[3];
  alignas(64) Lanes scale_[kMaxCandidates], inverse_[kMaxCandidates], error_[kMaxCandidates];
  int which_[kMaxCandidates];
  int count_ = 0;
  alignas(64) Lanes best_error_, best_scale_, best_zero_, best_floor_, best_ceiling_;
};

inline void search_all(const RtnProblem& problem) {
  const int64_t total = problem.rows * problem.groups_per_row();
  for (int64_t r = 0; r < problem.rows; ++r) problem.row_error[r] = 0.0;
  for (int64_t g = 0; g < total; g += kTile) {
    const int groups = static_cast<int>(total - g < kTile ? total - g : kTile);
    Search(problem, g, groups).run(g, groups);
  }
}

}  // namespace
