#include "kernels/lanes_avx2.h"
// The lanes come first.
#include "kernels/matmul.h"

namespace qgraph {

QG_DEFINE_KERNELS(avx2, Isa::kAvx2)

}  // namespace qgraph
