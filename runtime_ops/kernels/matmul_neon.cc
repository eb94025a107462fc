#include "kernels/lanes_neon.h"
// The lanes come first.
#include "kernels/matmul.h"

namespace qgraph {

QG_DEFINE_KERNELS(neon, Isa::kNeon)

}  // namespace qgraph
