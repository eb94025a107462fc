#include "half_tensors.h"

#include <algorithm>

#include "half.h"

namespace qgraph {
namespace {

// Converting this much is worth a thread.
constexpr int64_t kTaskElements = int64_t{1} << 16;

// One of the two directions.
struct Conversion {
  const uint16_t* halves;
  float* floats;
  uint16_t* out;
  int64_t size;

  static void task(void* context, size_t index) {
    const auto& c = *static_cast<const Conversion*>(context);
    const int64_t first = static_cast<int64_t>(index) * kTaskElements;
    const int64_t count = std::min(kTaskElements, c.size - first);
    if (c.out == nullptr) {
      float_of_half(c.halves + first, count, c.floats + first);
    } else {
      half_of_float(c.floats + first, count, c.out + first);
    }
  }

  void run(Executor& executor) {
    const int64_t tasks = (size + kTaskElements - 1) / kTaskElements;
    if (tasks == 1) {
      task(this, 0);
    } else if (tasks > 1) {
      executor.run(task, static_cast<size_t>(tasks), this);
    }
  }
};

}  // namespace

Floats::Floats(const Run& run, const Tensor& tensor, Executor& executor)
    : values_(static_cast<const float*>(tensor.data)) {
  if (tensor.type != ort::kFloat16) return;
  scratch_ = std::make_unique<ScratchMemory>(run, tensor.size() * 4);
  auto* floats = static_cast<float*>(scratch_->get());
  values_ = floats;
  Conversion{static_cast<const uint16_t*>(tensor.data), floats, nullptr, tensor.size()}.run(
      executor);
}

Output::Output(const Run& run, const Dims& dims, ort::OrtElementType type)
    : values_(static_cast<float*>(run.output(dims))), size_(1) {
  if (type != ort::kFloat16) return;
  for (const int64_t d : dims) size_ *= d;
  halves_ = reinterpret_cast<uint16_t*>(values_);
  scratch_ = std::make_unique<ScratchMemory>(run, size_ * 4);
  values_ = static_cast<float*>(scratch_->get());
}

void Output::finish(Executor& executor) const {
  if (halves_ != nullptr) Conversion{nullptr, values_, halves_, size_}.run(executor);
}

}  // namespace qgraph
