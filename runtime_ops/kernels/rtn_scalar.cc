#include "kernels/simd_scalar.h"
// The vector type comes first.
#include "kernels/rtn_search.h"

void qg_rtn__scalar(const RtnProblem& problem) { search_all(problem); }
