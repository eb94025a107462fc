// Sub-byte packing along rows, first code in the lowest bits (as ONNX stores int4 and int2).
#pragma once

#include <cstdint>

namespace qgraph {

void pack_rows(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint8_t* packed);

}  // namespace qgraph
