// The weight search as a plain function, one per instruction set. See rtn_search.h.
#pragma once

#include <cstdint>

// Plain pointers and sizes; who calls has checked them.
struct RtnProblem {
  const float* w;           // [rows, cols]
  const float* importance;  // [cols], or null
  int64_t rows, cols, group;
  int bits;  // 2, 3, 4, 7 or 8
  bool is_symmetric;
  bool scale_is_signed;   // symmetric: the scale may be negative
  bool scale_is_float16;  // round scales to float16
  uint8_t* codes;         // [rows, cols], int8 bytes if symmetric
  float* scales;          // [rows, ceil(cols / group)]
  uint8_t* zero_points;   // like scales; unused if symmetric
  double* row_error;      // [rows]

  int64_t groups_per_row() const { return (cols + group - 1) / group; }
};

void qg_rtn__scalar(const RtnProblem& problem);
void qg_rtn__avx2(const RtnProblem& problem);
void qg_rtn__avx512(const RtnProblem& problem);
void qg_rtn__neon(const RtnProblem& problem);
