#include "kernels/lanes_avx512.h"
// The lanes come first.
#include "kernels/matmul.h"

namespace qgraph {

QG_DEFINE_KERNELS(avx512vnni, Isa::kAvx512Vnni)

}  // namespace qgraph
