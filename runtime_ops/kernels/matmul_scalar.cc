#include "kernels/lanes_scalar.h"
// The lanes come first.
#include "kernels/matmul.h"

namespace qgraph {

QG_DEFINE_KERNELS(scalar, Isa::kScalar)

}  // namespace qgraph
