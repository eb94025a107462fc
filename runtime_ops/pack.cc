#include "pack.h"

#include <cstring>

namespace qgraph {
namespace {

// Two codes arrive as one 16-bit and four as one 32-bit little-endian word: a form that compilers
// turn into vector code.
void pack4(const uint8_t* codes, int64_t nbytes, uint8_t* packed) {
  for (int64_t i = 0; i < nbytes; ++i) {
    uint16_t two;
    std::memcpy(&two, codes + 2 * i, sizeof two);
    packed[i] = static_cast<uint8_t>((two & 0x0Fu) | ((two >> 4) & 0xF0u));
  }
}

void pack2(const uint8_t* codes, int64_t nbytes, uint8_t* packed) {
  for (int64_t i = 0; i < nbytes; ++i) {
    uint32_t four;
    std::memcpy(&four, codes + 4 * i, sizeof four);
    packed[i] = static_cast<uint8_t>((four & 0x03u) | ((four >> 6) & 0x0Cu) |
                                     ((four >> 12) & 0x30u) | ((four >> 18) & 0xC0u));
  }
}

}  // namespace

void pack_rows(const uint8_t* codes, int64_t rows, int64_t cols, int bits, uint8_t* packed) {
  const int64_t per_byte = 8 / bits;
  const int64_t whole = cols / per_byte;
  const int64_t rest = cols % per_byte;
  const int64_t stride = whole + (rest != 0);
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = codes + r * cols;
    uint8_t* out = packed + r * stride;
    if (bits == 8) {
      if (cols != 0) std::memcpy(out, row, static_cast<size_t>(cols));
    } else if (bits == 4) {
      pack4(row, whole, out);
    } else {
      pack2(row, whole, out);
    }
    if (rest == 0) continue;
    unsigned last = 0;
    for (int64_t i = 0; i < rest; ++i) {
      const unsigned code = row[whole * per_byte + i] & ((1u << bits) - 1);
      last |= code << (bits * i);
    }
    out[whole] = static_cast<uint8_t>(last);
  }
}

}  // namespace qgraph
