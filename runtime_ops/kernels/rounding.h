// Rounding a matrix under a Gram matrix, as plain functions, one per instruction set. See
// feedback.h and descent.h.
#pragma once

#include <cstdint>

// Both problems work on rows [rows, cols] of codes q with scale s and zero point z for each group
// of `group` columns: w ~ s * (q - z), low <= q <= high. Plain pointers; who calls has checked
// them.
struct RoundingGrid {
  int64_t rows, cols, group;
  float low, high;     // the range of codes
  int8_t* codes;       // [rows, cols]; uint8 bytes where low is 0
  float* scales;       // [rows, groups]
  float* zero_points;  // [rows, groups], whole numbers

  int64_t groups() const { return (cols + group - 1) / group; }
};

// Rounds column by column and makes up for each error in the columns that follow.
struct FeedbackProblem {
  RoundingGrid grid;
  const float* w;        // [rows, cols]
  const int32_t* order;  // [cols]: the columns as they are rounded
  const float* factor;  // [cols, cols] in that order: row j holds what the errors before j add to j
  const float* energies;  // [cols] in that order: R_jj^2, or null
  double* row_cost;       // [rows]: e H e^T, only with energies
  float* scratch;         // [cols, kFeedbackRows]
};

// Improves codes, scales and zero points one at a time.
struct DescentProblem {
  RoundingGrid grid;
  const float* gram;        // [cols, cols], symmetric
  const float* group_sums;  // [groups, cols]: the sum of the rows of gram that a group has
  float* gradient;          // [rows, cols]: (w - quantized) * gram, kept up to date
  bool fits_scales, fits_zero_points, scale_is_float16;
  int sweeps;
  float* scratch;  // [cols]
};

constexpr int kFeedbackRows = 128;  // rows that are rounded side by side

void qg_feedback__scalar(const FeedbackProblem& problem);
void qg_feedback__avx2(const FeedbackProblem& problem);
void qg_feedback__avx512(const FeedbackProblem& problem);
void qg_feedback__neon(const FeedbackProblem& problem);

void qg_descent__scalar(const DescentProblem& problem);
void qg_descent__avx2(const DescentProblem& problem);
void qg_descent__avx512(const DescentProblem& problem);
void qg_descent__neon(const DescentProblem& problem);
