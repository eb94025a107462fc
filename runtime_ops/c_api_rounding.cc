#include "cpu.h"
#include "kernels/rounding.h"
#include "qgraph_ops.h"

namespace {

using qgraph::Isa;

bool is_valid(const QgRounding& g) {
  const bool is_known = (g.bits >= 2 && g.bits <= 4) || g.bits == 7 || g.bits == 8;
  if (g.rows < 0 || g.cols < 0 || g.group < 1 || !is_known) return false;
  const float span = static_cast<float>((1 << g.bits) - 1);
  const float least = g.codes_are_signed ? -static_cast<float>(1 << (g.bits - 1)) : 0.0f;
  if (!(g.low >= least && g.low <= g.high && g.high <= least + span)) return false;
  const bool is_empty = g.rows == 0 || g.cols == 0;
  return is_empty || (g.codes != nullptr && g.scales != nullptr && g.zero_points != nullptr);
}

Isa chosen(const QgRounding& g) { return g.isa < 0 ? qgraph::best_isa() : static_cast<Isa>(g.isa); }

RoundingGrid grid_of(const QgRounding& g) {
  return {g.rows,   g.cols,       g.group, g.low, g.high, reinterpret_cast<int8_t*>(g.codes),
          g.scales, g.zero_points};
}

}  // namespace

int32_t qg_feedback(const QgRounding* grid, const float* w, const int32_t* order,
                    const float* factor, const float* energies, double* row_cost, float* scratch) {
  if (grid == nullptr || !is_valid(*grid)) return QG_INVALID_ARGUMENT;
  if (grid->isa >= 0 && !qg_isa_is_supported(grid->isa)) return QG_ISA_NOT_AVAILABLE;
  if (grid->rows == 0 || grid->cols == 0) return QG_OK;
  if (w == nullptr || order == nullptr || factor == nullptr || scratch == nullptr) {
    return QG_INVALID_ARGUMENT;
  }
  if ((energies == nullptr) != (row_cost == nullptr)) return QG_INVALID_ARGUMENT;
  for (int64_t j = 0; j < grid->cols; ++j) {
    if (order[j] < 0 || order[j] >= grid->cols) return QG_INVALID_ARGUMENT;
  }
  const FeedbackProblem problem{grid_of(*grid), w, order, factor, energies, row_cost, scratch};
  switch (chosen(*grid)) {
#if defined(__x86_64__)
    case Isa::kAvx2: qg_feedback__avx2(problem); break;
    case Isa::kAvx512Vnni: qg_feedback__avx512(problem); break;
#elif defined(__aarch64__)
    case Isa::kNeon:
    case Isa::kNeonDot: qg_feedback__neon(problem); break;
#endif
    default: qg_feedback__scalar(problem);
  }
  return QG_OK;
}

int32_t qg_descent(const QgRounding* grid, const float* gram, const float* group_sums,
                   float* gradient, int32_t fits_scales, int32_t fits_zero_points, int32_t sweeps,
                   float* scratch) {
  if (grid == nullptr || !is_valid(*grid) || sweeps < 0) return QG_INVALID_ARGUMENT;
  if (grid->isa >= 0 && !qg_isa_is_supported(grid->isa)) return QG_ISA_NOT_AVAILABLE;
  if (grid->rows == 0 || grid->cols == 0) return QG_OK;
  if (gram == nullptr || gradient == nullptr || scratch == nullptr) return QG_INVALID_ARGUMENT;
  if (fits_zero_points && group_sums == nullptr) return QG_INVALID_ARGUMENT;
  const DescentProblem problem{grid_of(*grid),
                               gram,
                               group_sums,
                               gradient,
                               fits_scales != 0,
                               fits_zero_points != 0,
                               grid->scale_is_float16 != 0,
                               sweeps,
                               scratch};
  switch (chosen(*grid)) {
#if defined(__x86_64__)
    case Isa::kAvx2: qg_descent__avx2(problem); break;
    case Isa::kAvx512Vnni: qg_descent__avx512(problem); break;
#elif defined(__aarch64__)
    case Isa::kNeon:
    case Isa::kNeonDot: qg_descent__neon(problem); break;
#endif
    default: qg_descent__scalar(problem);
  }
  return QG_OK;
}
