// ai.qgraph::Hadamard: what ONNX Runtime calls.
#include <algorithm>

#include "cpu.h"
#include "half_tensors.h"
#include "ort_op.h"

namespace qgraph {
namespace {

// Elements per task: a copy of these takes about as long as handing over a task.
constexpr int64_t kTaskElements = int64_t{1} << 15;

class Hadamard {
 public:
  static constexpr const char* kName = "Hadamard";
  static constexpr ort::OrtElementType kInputs[] = {ort::kFloat, ort::kFloat};

  explicit Hadamard(const NodeInfo& info)
      : where_(info.where()), block_(info.attribute("block_size")) {
    if (block_ < 1 || block_ > kMaxColumns) {
      throw std::invalid_argument(where_ + ": block_size=" + std::to_string(block_) +
                                  ", expected 1 to " + std::to_string(kMaxColumns));
    }
    Tensor factor{};
    if (info.constant(1, &factor)) check_factor(factor);
  }

  static void infer(const ort::OrtApi& api, ort::OrtShapeInferContext* context) {
    infer_same_shape(api, context);
  }

  void run(const Run& run) const {
    const Tensor x = run.input(0), factor = run.input(1);
    check_factor(factor);
    if (x.dims.empty() || x.dims.back() % block_ != 0) {
      throw std::invalid_argument(where_ + ": the input is " + to_text(x.dims) +
                                  ", expected a last dimension that " + std::to_string(block_) +
                                  " divides");
    }
    const Output y(run, x.dims, x.type);
    if (x.size() == 0) return;
    RuntimeThreads threads(run);
    const Floats floats(run, x, threads);
    Work work{};
    work.kernel = kernels_for(best_isa())->hadamard;
    work.all = {floats.get(),
                y.get(),
                static_cast<const float*>(factor.data),
                factor.dims[0],
                block_,
                0,
                0};
    work.blocks = x.size() / block_;
    work.per_task = std::max<int64_t>(1, kTaskElements / block_);
    const int64_t tasks = (work.blocks + work.per_task - 1) / work.per_task;
    if (tasks == 1) {
      Work::task(&work, 0);
    } else {
      threads.run(Work::task, static_cast<size_t>(tasks), &work);
    }
    y.finish(threads);
  }

 private:
  struct Work {
    void (*kernel)(const HadamardTask&);
    HadamardTask all;
    int64_t blocks, per_task;

    static void task(void* context, size_t index) {
      const auto& w = *static_cast<const Work*>(context);
      HadamardTask part = w.all;
      part.first = static_cast<int64_t>(index) * w.per_task;
      part.last = std::min(part.first + w.per_task, w.blocks);
      w.kernel(part);
    }
  };

  void check_factor(const Tensor& t) const {
    const int64_t size = t.dims.size() == 2 ? t.dims[0] : 0;
    const bool fits = size >= 1 && size <= kMaxHadamardFactor && t.dims[1] == size &&
                      block_ % size == 0 && ((block_ / size) & (block_ / size - 1)) == 0;
    if (!fits) {
      throw std::invalid_argument(
          where_ + ": factor is " + to_text(t.dims) + ", expected [f, f] with f up to " +
          std::to_string(kMaxHadamardFactor) + " and block_size=" + std::to_string(block_) +
          " equal to f times a power of two");
    }
  }

  std::string where_;
  int64_t block_;
};

}  // namespace

std::vector<const ort::OrtCustomOp*> hadamard_ops(const ort::OrtApi* api) {
  static Op<Hadamard> op;
  static Op<Hadamard, ort::kFloat16> half;
  op.shape_api = half.shape_api = api;
  return {&op, &half};
}

}  // namespace qgraph
