// float16 and float32, whole arrays, rounded to nearest even. Every CPU gives the same bits.
#pragma once

#include <cstdint>

namespace qgraph {

void float_of_half(const uint16_t* from, int64_t count, float* to);
void half_of_float(const float* from, int64_t count, uint16_t* to);

}  // namespace qgraph
