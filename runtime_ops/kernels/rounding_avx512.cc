#include "kernels/simd_avx512.h"
// The vector type comes first.
#include "kernels/descent.h"
#include "kernels/feedback.h"

void qg_feedback__avx512(const FeedbackProblem& problem) { feedback_all(problem); }
void qg_descent__avx512(const DescentProblem& problem) { descend_all(problem); }
