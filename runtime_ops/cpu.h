// Which instruction set the kernels use.
#pragma once

namespace qgraph {

// Ascending within one architecture.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512Vnni = 2, kNeon = 3, kNeonDot = 4 };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// Whether this CPU (and this build) can run kernels of an instruction set.
bool is_supported(Isa isa);

// The best supported instruction set, capped by the environment variable QGRAPH_ISA. Found once.
Isa best_isa();

// Why QGRAPH_ISA cannot be obeyed, or null.
const char* isa_problem();

}  // namespace qgraph
