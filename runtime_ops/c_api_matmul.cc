#include <stdexcept>

#include "matmul.h"
#include "qgraph_ops.h"

namespace {

using namespace qgraph;

// One thread, tasks in either order.
class Serial : public Executor {
 public:
  explicit Serial(bool is_reversed) : is_reversed_(is_reversed) {}

  void run(void (*task)(void*, size_t), size_t count, void* context) override {
    for (size_t i = 0; i < count; ++i) task(context, is_reversed_ ? count - 1 - i : i);
  }

 private:
  bool is_reversed_;
};

const Kernels* find_kernels(int32_t isa) {
  if (isa >= 0 && !qg_isa_is_supported(isa)) return nullptr;
  return kernels_for(isa < 0 ? best_isa() : static_cast<Isa>(isa));
}

MatMulPlan plan_of(const QgMatMul& p) {
  if (p.format != QG_INT4 && p.format != QG_TERNARY) throw std::invalid_argument("format");
  const Format format = p.format == QG_INT4 ? Format::kInt4 : Format::kTernary;
  return MatMulPlan({format, p.n, p.k, p.group, p.activation_bits, p.activation_block});
}

}  // namespace

int32_t qg_matmul(const QgMatMul* problem) {
  const QgMatMul& p = *problem;
  const Kernels* kernels = find_kernels(p.isa);
  if (kernels == nullptr) return QG_ISA_NOT_AVAILABLE;
  if (p.m < 0 || p.codes == nullptr || p.scales == nullptr) return QG_INVALID_ARGUMENT;
  if (p.m > 0 && (p.x == nullptr || p.y == nullptr || p.scratch == nullptr)) {
    return QG_INVALID_ARGUMENT;
  }
  try {
    const MatMulPlan plan = plan_of(p);
    const bool is_ternary = p.format == QG_TERNARY;
    const MatMulWeights weights{p.codes, is_ternary ? nullptr : p.scales, p.scales_are_float16 != 0,
                                p.zero_points,
                                is_ternary ? static_cast<const float*>(p.scales) : nullptr};
    Serial executor(p.task_order != 0);
    run_matmul(*kernels, plan, weights, p.x, p.m, p.bias, p.y, p.scratch, executor);
  } catch (const std::exception&) {
    return QG_INVALID_ARGUMENT;
  }
  return QG_OK;
}

int64_t qg_matmul_scratch(const QgMatMul* problem) {
  try {
    const Kernels* kernels = find_kernels(problem->isa);
    return kernels == nullptr ? -1 : plan_of(*problem).scratch_bytes(*kernels, problem->m);
  } catch (const std::exception&) {
    return -1;
  }
}

int64_t qg_probe_read(const uint8_t* data, int64_t nbytes, int32_t* sink) {
  const Kernels* kernels = kernels_for(best_isa());
  *sink = kernels->probe_read(data, nbytes / kTileBytes);
  return nbytes / kTileBytes * kTileBytes;
}

int64_t qg_probe_dot(int32_t isa, int64_t rounds, int32_t* sink) {
  const Kernels* kernels = find_kernels(isa);
  return kernels == nullptr ? -1 : kernels->probe_dot(rounds, sink);
}
