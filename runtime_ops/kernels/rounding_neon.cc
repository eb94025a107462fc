#include "kernels/simd_neon.h"
// The vector type comes first.
#include "kernels/descent.h"
#include "kernels/feedback.h"

void qg_feedback__neon(const FeedbackProblem& problem) { feedback_all(problem); }
void qg_descent__neon(const DescentProblem& problem) { descend_all(problem); }
