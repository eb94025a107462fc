#include "kernels/kernel.h"

namespace qgraph {

const Kernels* kernels_for(Isa isa) {
  switch (isa) {
#define QG_KERNELS(name, value) \
  case value: return &kKernels_##name;
#include "kernels/kernels.inc"
#undef QG_KERNELS
    default: return nullptr;
  }
}

}  // namespace qgraph
