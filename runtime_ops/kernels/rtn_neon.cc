#include "kernels/simd_neon.h"
// The vector type comes first.
#include "kernels/rtn_search.h"

void qg_rtn__neon(const RtnProblem& problem) { search_all(problem); }
