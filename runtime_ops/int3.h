// 3-bit codes as a file holds them, and as the kernels read them.
#pragma once

#include <cstdint>

namespace qgraph {

constexpr int64_t kInt3Step = 16;   // columns of one step
constexpr int64_t kInt3Bytes = 96;  // of 16 rows of one step

// INT3 codes [tiles, ceil(steps / 2), 96] to INT4 codes [tiles, steps, 64], `shift` added to each.
// qgraph/ops/layout.py says where which code lies. A shift of up to 8 keeps codes within 4 bits.
void widen_int3(const uint8_t* packed, int64_t tiles, int64_t steps, uint8_t shift, uint8_t* codes);

}  // namespace qgraph
