#include "kernels/simd_avx2.h"
// The vector type comes first.
#include "kernels/rtn_search.h"

void qg_rtn__avx2(const RtnProblem& problem) { search_all(problem); }
