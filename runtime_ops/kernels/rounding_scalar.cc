#include "kernels/simd_scalar.h"
// The vector type comes first.
#include "kernels/descent.h"
#include "kernels/feedback.h"

void qg_feedback__scalar(const FeedbackProblem& problem) { feedback_all(problem); }
void qg_descent__scalar(const DescentProblem& problem) { descend_all(problem); }
