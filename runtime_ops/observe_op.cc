// ai.qgraph.calibration::Observe: what ONNX Runtime calls. Counts a tensor where it is produced,
// into a table that calibration opened; gives the least and the largest finite value.
#include <algorithm>
#include <cstring>

#include "cpu.h"
#include "half_tensors.h"
#include "histogram.h"
#include "kernels/kernel.h"
#include "ort_op.h"

namespace qgraph {
namespace {

// Elements per task: counting these takes ten times as long as clearing and adding up a table.
constexpr int64_t kTaskElements = int64_t{1} << 17;
constexpr int64_t kMaxTasks = 16;

class Observe {
 public:
  static constexpr const char* kName = "Observe";
  static constexpr ort::OrtElementType kInputs[] = {ort::kFloat};

  explicit Observe(const NodeInfo& info)
      : where_(info.where()),
        threads_(info.attribute("threads", 1)),
        table_(find_table(info.attribute("table"))) {
    if (table_ == nullptr) throw std::invalid_argument(where_ + closed());
  }

  static void infer(const ort::OrtApi&, ort::OrtShapeInferContext*) {}

  void run(const Run& run) const {
    const Tensor x = run.input(0);
    RuntimeThreads threads(run);
    const Floats floats(run, x, threads);
    const float* values = floats.get();
    const int64_t n = x.size();
    const int64_t tasks = std::clamp(n / kTaskElements, int64_t{1}, std::min(threads_, kMaxTasks));
    Part parts[kMaxTasks];
    const std::lock_guard<std::mutex> held(table_->mutex);
    if (table_->counts == nullptr) throw std::runtime_error(where_ + closed());
    if (tasks == 1) {
      parts[0].lost = kernels().count_floats(values, n, table_->counts, &parts[0].found);
    } else {
      count_in_parts(run, values, n, tasks, parts);
    }
    FloatExtremes all;
    for (int64_t i = 0; i < tasks; ++i) {
      all.low = std::min(all.low, parts[i].found.low);
      all.high = std::max(all.high, parts[i].found.high);
      *table_->lost += parts[i].lost;
    }
    const Output low_high(run, {2}, x.type);
    floats_of(all, low_high.get());
    low_high.finish(threads);
  }

 private:
  struct Part {
    FloatExtremes found;
    int64_t lost = 0;
  };

  struct Work {
    const float* x;
    int64_t n, tasks;
    int64_t* counts;
    uint32_t* more;  // [tasks - 1, 65536]
    Part* parts;

    static void task(void* context, size_t index) {
      const auto& w = *static_cast<const Work*>(context);
      const auto i = static_cast<int64_t>(index);
      const int64_t first = w.n * i / w.tasks, size = w.n * (i + 1) / w.tasks - first;
      Part& part = w.parts[i];
      if (i == 0) {
        part.lost = kernels().count_floats(w.x, size, w.counts, &part.found);
        return;
      }
      uint32_t* own = w.more + (i - 1) * kFloatBuckets;
      std::memset(own, 0, kFloatBuckets * sizeof *own);
      part.lost = kernels().count_floats_32(w.x + first, size, own, &part.found);
    }
  };

  static const Kernels& kernels() { return *kernels_for(best_isa()); }

  static std::string closed() { return ": its table is not open; run it through qgraph.calibrate"; }

  void count_in_parts(const Run& run, const float* x, int64_t n, int64_t tasks, Part* parts) const {
    if (n / tasks >= int64_t{1} << 31) {
      throw std::invalid_argument(where_ + ": a tensor of " + std::to_string(n) +
                                  " elements is too large to count");
    }
    const ScratchMemory memory(
        run, (tasks - 1) * kFloatBuckets * static_cast<int64_t>(sizeof(uint32_t)));
    Work work{x, n, tasks, table_->counts, static_cast<uint32_t*>(memory.get()), parts};
    RuntimeThreads(run).run(Work::task, static_cast<size_t>(tasks), &work);
    for (int64_t i = 0; i + 1 < tasks; ++i) add(work.more + i * kFloatBuckets);
  }

  // Most buckets are empty, and pages of the table that stay so take no memory.
  void add(const uint32_t* more) const {
    constexpr int64_t kStretch = 16;
    for (int64_t i = 0; i < kFloatBuckets; i += kStretch) {
      uint32_t any = 0;
      for (int64_t j = i; j < i + kStretch; ++j) any |= more[j];
      if (any == 0) continue;
      for (int64_t j = i; j < i + kStretch; ++j) table_->counts[j] += more[j];
    }
  }

  std::string where_;
  int64_t threads_;
  std::shared_ptr<CountTable> table_;
};

}  // namespace

std::vector<const ort::OrtCustomOp*> observe_ops(const ort::OrtApi* api) {
  static Op<Observe> op;
  static Op<Observe, ort::kFloat16> half;
  op.shape_api = half.shape_api = api;
  return {&op, &half};
}

}  // namespace qgraph
