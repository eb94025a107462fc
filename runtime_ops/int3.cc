#include "int3.h"

#include "kernels/kernel.h"

namespace qgraph {
namespace {

constexpr int kLanes = 64;
constexpr int kHalf = 32;  // lanes whose high bits lie in the low halves of bytes

// One INT4 step: columns of fields f and f + 1. Plain loops over bytes, which compilers turn into
// vector code.
void widen_step(const uint8_t* low, const uint8_t* high, int f, uint8_t shift, uint8_t* codes) {
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < kHalf; ++i) {
      const int lane = half * kHalf + i;
      const unsigned bits = static_cast<unsigned>(high[i]) >> (4 * half + f);
      const unsigned pair = static_cast<unsigned>(low[lane]) >> (2 * f);
      const unsigned first = ((pair & 3u) | ((bits & 1u) << 2)) + shift;
      const unsigned second = (((pair >> 2) & 3u) | ((bits & 2u) << 1)) + shift;
      codes[lane] = static_cast<uint8_t>(first | (second << 4));
    }
  }
}

}  // namespace

void widen_int3(const uint8_t* packed, int64_t tiles, int64_t steps, uint8_t shift,
                uint8_t* codes) {
  static_assert(kLanes == kTileBytes && 2 * kInt4Step == kInt3Step, "two steps of INT4 in one");
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t step = 0; step < steps; ++step) {
      const uint8_t* from = packed + step / 2 * kInt3Bytes;
      widen_step(from, from + kLanes, step % 2 * 2, shift, codes);
      codes += kTileBytes;
    }
    packed += (steps + 1) / 2 * kInt3Bytes;
  }
}

}  // namespace qgraph
