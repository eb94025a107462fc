#include "cpu.h"
#include "kernels/rtn.h"
#include "pack.h"
#include "qgraph_ops.h"

namespace {

using qgraph::Isa;
using RtnKernel = void (*)(const RtnProblem&);

RtnKernel rtn_kernel(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2: return qg_rtn__avx2;
    case Isa::kAvx512Vnni: return qg_rtn__avx512;
#elif defined(__aarch64__)
    case Isa::kNeon:
    case Isa::kNeonDot: return qg_rtn__neon;
#endif
    default: return qg_rtn__scalar;
  }
}

bool is_code_width(int32_t bits) { return bits == 2 || bits == 4 || bits == 8; }

}  // namespace

int32_t qg_abi_version(void) { return QG_ABI_VERSION; }

int32_t qg_cpu_isa(void) { return static_cast<int32_t>(qgraph::best_isa()); }

const char* qg_isa_name(int32_t isa) {
  return isa >= 0 && isa < qgraph::kIsaCount ? qgraph::isa_name(static_cast<Isa>(isa)) : nullptr;
}

int32_t qg_isa_is_supported(int32_t isa) {
  return isa >= 0 && isa < qgraph::kIsaCount && qgraph::is_supported(static_cast<Isa>(isa));
}

const char* qg_isa_problem(void) { return qgraph::isa_problem(); }

int32_t qg_rtn_search(int32_t isa, const float* w, int64_t rows, int64_t cols, int64_t group,
                      int32_t bits, int32_t mode, int32_t scale_is_float16, const float* importance,
                      uint8_t* codes, float* scales, uint8_t* zero_points, double* row_error) {
  if (rows < 0 || cols < 0 || group < 1) return QG_INVALID_ARGUMENT;
  if (!is_code_width(bits) && bits != 3 && bits != 7) return QG_INVALID_ARGUMENT;
  if (mode < QG_ASYMMETRIC || mode > QG_SYMMETRIC_SIGNED) return QG_INVALID_ARGUMENT;
  if (rows > 0 && row_error == nullptr) return QG_INVALID_ARGUMENT;
  const bool is_symmetric = mode != QG_ASYMMETRIC;
  if (rows > 0 && cols > 0) {
    if (w == nullptr || codes == nullptr || scales == nullptr) return QG_INVALID_ARGUMENT;
    if (!is_symmetric && zero_points == nullptr) return QG_INVALID_ARGUMENT;
  }
  if (isa >= 0 && !qg_isa_is_supported(isa)) return QG_ISA_NOT_AVAILABLE;
  RtnProblem problem{};
  problem.w = w;
  problem.importance = importance;
  problem.rows = rows;
  problem.cols = cols;
  problem.group = group;
  problem.bits = bits;
  problem.is_symmetric = is_symmetric;
  problem.scale_is_signed = mode == QG_SYMMETRIC_SIGNED;
  problem.scale_is_float16 = scale_is_float16 != 0;
  problem.codes = codes;
  problem.scales = scales;
  problem.zero_points = zero_points;
  problem.row_error = row_error;
  rtn_kernel(isa < 0 ? qgraph::best_isa() : static_cast<Isa>(isa))(problem);
  return QG_OK;
}

int32_t qg_pack(const uint8_t* codes, int64_t rows, int64_t cols, int32_t bits, uint8_t* packed) {
  if (rows < 0 || cols < 0 || !is_code_width(bits)) return QG_INVALID_ARGUMENT;
  if (rows > 0 && cols > 0 && (codes == nullptr || packed == nullptr)) return QG_INVALID_ARGUMENT;
  qgraph::pack_rows(codes, rows, cols, bits, packed);
  return QG_OK;
}
