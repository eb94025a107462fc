#include "kernels/lanes_neon.h"
// The lanes come first.
#include "kernels/matmul.h"

namespace qgraph {

QG_DEFINE_KERNELS(neondot, Isa::kNeonDot)

}  // namespace qgraph
