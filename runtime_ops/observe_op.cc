// ai.qgraph.calibration::Observe: what ONNX Runtime calls. Counts a tensor where it is produced,
// into a table that calibration opened.
//
// Input `control` [nodes, 3] says in the node's own row how this run is counted:
//     parts    the tensor is cut into so many equal ones, each told apart in the output
//     weight   each value counts so often; 0 counts nothing
//     is_sum   whether checksums are wanted
// The output [parts, 4] holds the least and the largest finite value of each part (inf and -inf
// where there is none) and the two halves of its checksum as bit patterns: equal ones mean equal
// bits. Parts that are not equal in size are none: their checksums are all ones.
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
constexpr int64_t kControls = 3;
constexpr int64_t kResults = 4;

void mix(uint64_t& sum, uint64_t more) {
  sum = (sum + more) * 0x9E3779B97F4A7C15u;
  sum ^= sum >> 29;
}

// Several chains: a step of one need not wait for the last step of another.
uint64_t checksum(const float* x, int64_t n) {
  constexpr int64_t kChains = 8;
  uint64_t sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= n; i += kChains) {
    uint32_t bits[kChains];
    std::memcpy(bits, x + i, sizeof bits);
    for (int64_t j = 0; j < kChains; ++j) mix(sums[j], bits[j]);
  }
  uint64_t sum = static_cast<uint64_t>(n);
  for (; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    mix(sum, bits);
  }
  for (const uint64_t each : sums) mix(sum, each);
  return sum;
}

class Observe {
 public:
  static constexpr const char* kName = "Observe";
  static constexpr ort::OrtElementType kInputs[] = {ort::kFloat, ort::kInt64};

  explicit Observe(const NodeInfo& info)
      : where_(info.where()),
        threads_(info.attribute("threads", 1)),
        row_(info.attribute("row", 0)),
        table_(find_table(info.attribute("table"))) {
    if (table_ == nullptr) throw std::invalid_argument(where_ + closed());
  }

  static void infer(const ort::OrtApi&, ort::OrtShapeInferContext*) {}

  void run(const Run& run) const {
    const Tensor x = run.input(0);
    const Control control = control_of(run.input(1));
    RuntimeThreads threads(run);
    const Floats floats(run, x, threads);
    const int64_t n = x.size(), size = n / control.parts;
    const bool is_even = size * control.parts == n;
    if (!is_even && control.weight > 0) {
      throw std::invalid_argument(where_ + ": a tensor " + to_text(x.dims) + " has no " +
                                  std::to_string(control.parts) + " equal parts");
    }
    auto* out = static_cast<float*>(run.output({control.parts, kResults}));
    const std::lock_guard<std::mutex> held(table_->mutex);
    if (table_->counts == nullptr) throw std::runtime_error(where_ + closed());
    for (int64_t i = 0; i < control.parts; ++i) {
      const float* part = floats.get() + i * size;
      floats_of(control.weight > 0 ? count(run, part, size, control.weight) : FloatExtremes{}, out);
      uint64_t sum = 0;
      if (control.is_sum) sum = is_even ? checksum(part, size) : ~uint64_t{0};
      std::memcpy(out + 2, &sum, sizeof sum);
      out += kResults;
    }
  }

 private:
  struct Control {
    int64_t parts, weight;
    bool is_sum;
  };

  struct Part {
    FloatExtremes found;
    int64_t lost = 0;
  };

  struct Work {
    const float* x;
    int64_t n, tasks;
    uint32_t* counts;  // [tasks, 65536]
    Part* parts;

    static void task(void* context, size_t index) {
      const auto& w = *static_cast<const Work*>(context);
      const auto i = static_cast<int64_t>(index);
      const int64_t first = w.n * i / w.tasks, size = w.n * (i + 1) / w.tasks - first;
      uint32_t* own = w.counts + i * kFloatBuckets;
      std::memset(own, 0, kFloatBuckets * sizeof *own);
      Part& part = w.parts[i];
      part.lost = kernels().count_floats_32(w.x + first, size, own, &part.found);
    }
  };

  static const Kernels& kernels() { return *kernels_for(best_isa()); }

  static std::string closed() { return ": its table is not open; run it through qgraph.calibrate"; }

  Control control_of(const Tensor& t) const {
    if (t.type != ort::kInt64 || t.dims.size() != 2 || t.dims[1] != kControls || row_ < 0 ||
        row_ >= t.dims[0]) {
      throw std::invalid_argument(where_ + ": control is " + to_text(t.dims) +
                                  ", expected int64 [nodes, 3] with a row " + std::to_string(row_));
    }
    const int64_t* row = static_cast<const int64_t*>(t.data) + row_ * kControls;
    if (row[0] < 1 || row[1] < 0) {
      throw std::invalid_argument(where_ + ": control asks for " + std::to_string(row[0]) +
                                  " parts of weight " + std::to_string(row[1]));
    }
    return {row[0], row[1], row[2] != 0};
  }

  FloatExtremes count(const Run& run, const float* x, int64_t n, int64_t weight) const {
    const int64_t tasks = std::clamp(n / kTaskElements, int64_t{1}, std::min(threads_, kMaxTasks));
    Part parts[kMaxTasks];
    if (tasks == 1 && weight == 1) {
      parts[0].lost = kernels().count_floats(x, n, table_->counts, &parts[0].found);
    } else {
      count_apart(run, x, n, weight, tasks, parts);
    }
    FloatExtremes all;
    for (int64_t i = 0; i < tasks; ++i) {
      all.low = std::min(all.low, parts[i].found.low);
      all.high = std::max(all.high, parts[i].found.high);
      table_->totals[0] += weight * parts[i].lost;
    }
    table_->totals[1] += weight * n;
    return all;
  }

  // Each task into a table of its own, which are then added up.
  void count_apart(const Run& run, const float* x, int64_t n, int64_t weight, int64_t tasks,
                   Part* parts) const {
    if (n / tasks >= int64_t{1} << 31) {
      throw std::invalid_argument(where_ + ": a tensor of " + std::to_string(n) +
                                  " elements is too large to count");
    }
    const ScratchMemory memory(run, tasks * kFloatBuckets * static_cast<int64_t>(sizeof(uint32_t)));
    Work work{x, n, tasks, static_cast<uint32_t*>(memory.get()), parts};
    if (tasks == 1) {
      Work::task(&work, 0);
    } else {
      RuntimeThreads(run).run(Work::task, static_cast<size_t>(tasks), &work);
    }
    for (int64_t i = 0; i < tasks; ++i) add(work.counts + i * kFloatBuckets, weight);
  }

  // Most buckets are empty, and pages of the table that stay so take no memory.
  void add(const uint32_t* more, int64_t weight) const {
    constexpr int64_t kStretch = 16;
    for (int64_t i = 0; i < kFloatBuckets; i += kStretch) {
      uint32_t any = 0;
      for (int64_t j = i; j < i + kStretch; ++j) any |= more[j];
      if (any == 0) continue;
      for (int64_t j = i; j < i + kStretch; ++j) table_->counts[j] += weight * more[j];
    }
  }

  std::string where_;
  int64_t threads_, row_;
  std::shared_ptr<CountTable> table_;
};

// The output is float whatever the input is.
template <ort::OrtElementType kType>
struct ObserveOp : Op<Observe, kType> {
  ObserveOp() {
    this->GetOutputType = [](const ort::OrtCustomOp*, size_t) { return ort::kFloat; };
  }
};

}  // namespace

std::vector<const ort::OrtCustomOp*> observe_ops(const ort::OrtApi* api) {
  static ObserveOp<ort::kFloat> op;
  static ObserveOp<ort::kFloat16> half;
  op.shape_api = half.shape_api = api;
  return {&op, &half};
}

}  // namespace qgraph
