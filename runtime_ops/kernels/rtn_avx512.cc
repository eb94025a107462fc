#include "kernels/simd_avx512.h"
// The vector type comes first.
#include "kernels/rtn_search.h"

void qg_rtn__avx512(const RtnProblem& problem) { search_all(problem); }
