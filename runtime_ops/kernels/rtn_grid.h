// How far and how finely rtn_search.h looks for a scale.
#pragma once

namespace {

// What the search tries for each bit width, at about the knee of error against time: ten times as
// many candidates gain 0.1 % of the error at 4 bits and a few percent at 8.
struct Grid {
  int same_sign;      // symmetric: scales with the sign that the largest weight asks for
  int opposite_sign;  // symmetric: scales with the other sign
  int shrinks;        // asymmetric: scales for each zero point
  int zero_points;    // asymmetric: 1 = the plain one, 3 = its neighbours too
  float wide;         // largest scale tried, as a multiple of the plain one
  float narrow;       // smallest scale tried, likewise ...
  float rms_share;    // ... or this multiple of the RMS where that is smaller
};

inline Grid grid_for(int bits, bool is_symmetric) {
  if (bits == 2) return {12, 8, 12, 3, is_symmetric ? 1.25f : 1.05f, 0.7f, 0.8f};
  if (bits == 3) return {16, 12, 12, 3, is_symmetric ? 1.25f : 1.05f, 0.7f, 0.5f};
  if (bits == 4) return {24, 16, 12, 3, is_symmetric ? 1.25f : 1.05f, 0.7f, 0.27f};
  return {12, 4, 16, 1, is_symmetric ? 1.15f : 1.05f, 0.75f, 0.028f};
}

}  // namespace
