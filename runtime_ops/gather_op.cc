// ai.qgraph::GatherInt4: what ONNX Runtime calls. Rows of a table that lies as MatMulInt4 reads it.
#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>

#include "half.h"
#include "packed_memory.h"
#include "packed_node.h"

namespace qgraph {
namespace {

// Elements per task: unpacking these takes some 10 microseconds.
constexpr int64_t kTaskElements = int64_t{1} << 14;

typedef uint8_t Bytes4 __attribute__((vector_size(4)));
typedef float Floats4 __attribute__((vector_size(16)));

class GatherInt4 : public PackedNode {
 public:
  static constexpr const char* kName = "GatherInt4";
  static constexpr ort::OrtElementType kInputs[] = {ort::kUndefined, ort::kUint8, ort::kUndefined,
                                                    ort::kUint8};

  explicit GatherInt4(const NodeInfo& info)
      : PackedNode(info,
                   make_plan(info, {Format::kInt4, info.attribute("N"), info.attribute("K"),
                                    info.attribute("block_size"), 0, 0}),
                   4) {
    for (size_t i = 1; i < 4; ++i) {
      if (held_[i].is_constant) check_int4(i, held_[i].tensor);
    }
  }

  static void infer(const ort::OrtApi& api, ort::OrtShapeInferContext* context) {
    infer_more_dimensions(api, context, "K");
  }

  void run(const Run& run) const {
    std::call_once(copies_->is_known, [this] { find_copies(); });
    const Tensor indices = run.input(0);
    require(indices.type == ort::kInt64 || indices.type == ort::kInt32,
            "indices have element type " + std::to_string(indices.type) + ", expected " +
                std::to_string(ort::kInt64) + " or " + std::to_string(ort::kInt32));
    const Held codes = table(run, 1), scales = table(run, 2), points = table(run, 3);
    Dims dims = indices.dims;
    dims.push_back(plan_.spec.k);
    Work work{};
    work.plan = &plan_;
    work.y = static_cast<float*>(run.output(dims));
    work.count = indices.size();
    if (work.count == 0) return;
    const std::vector<int64_t> rows = rows_of(indices);
    work.rows = rows.data();
    work.codes = static_cast<const uint8_t*>(codes.data());
    work.scales = scales.data();
    work.scales_are_half = scales.tensor.type == ort::kFloat16;
    work.points = static_cast<const uint8_t*>(points.data());
    work.has_one_point = is_single(points.tensor);
    work.per_task = std::max<int64_t>(1, kTaskElements / plan_.padded);
    const int64_t tasks = (work.count + work.per_task - 1) / work.per_task;
    if (tasks == 1) {
      Work::task(&work, 0);
    } else {
      RuntimeThreads(run).run(Work::task, static_cast<size_t>(tasks), &work);
    }
  }

 private:
  struct Work {
    const MatMulPlan* plan;
    const int64_t* rows;
    const uint8_t* codes;
    const void* scales;
    bool scales_are_half;
    const uint8_t* points;
    bool has_one_point;
    float* y;
    int64_t count, per_task;

    static void task(void* context, size_t index) {
      const auto& w = *static_cast<const Work*>(context);
      const int64_t first = static_cast<int64_t>(index) * w.per_task;
      const int64_t last = std::min(first + w.per_task, w.count);
      for (int64_t i = first; i < last; ++i) w.unpack(w.rows[i], w.y + i * w.plan->spec.k);
    }

    float scale(int64_t at) const {
      if (!scales_are_half) return static_cast<const float*>(scales)[at];
      float value;
      float_of_half(static_cast<const uint16_t*>(scales) + at, 1, &value);
      return value;
    }

    void unpack(int64_t row, float* out) const {
      const int64_t tile = row / kTileRows, lane = row % kTileRows;
      const int64_t k = plan->spec.k, width = plan->padded / plan->groups;
      const uint8_t* bytes = codes + tile * plan->steps * kTileBytes + lane * 4;
      for (int64_t g = 0; g < plan->groups; ++g) {
        const int64_t at = (tile * plan->groups + g) * kTileRows + lane;
        const float s = scale(at);
        const float point = points[has_one_point ? 0 : at];
        // Groups are whole steps; only the last step of a row is cut off.
        const int64_t end = std::min((g + 1) * width, k);
        for (int64_t column = g * width; column < end; column += kInt4Step) {
          Bytes4 step;
          std::memcpy(&step, bytes + column / kInt4Step * kTileBytes, sizeof step);
          const Floats4 values[] = {
              (__builtin_convertvector(step & 15, Floats4) - point) * s,
              (__builtin_convertvector(step >> 4, Floats4) - point) * s,
          };
          if (column + kInt4Step <= end) {
            std::memcpy(out + column, values, sizeof values);
          } else {
            std::memcpy(out + column, values, static_cast<size_t>(end - column) * sizeof(float));
          }
        }
      }
    }
  };

  // Few rows are read, so a table of its own stays where it is. One that a MatMulInt4 has copied is
  // read from that copy: the pages of its mapping were given back. All nodes exist by the first
  // run.
  struct Copies {
    std::once_flag is_known;
    std::shared_ptr<const void> of[4];
  };

  void find_copies() const {
    for (size_t i = 1; i < 4; ++i) {
      const Held& held = held_[i];
      if (held.is_constant) {
        copies_->of[i] = known_copy(held.tensor.data, static_cast<size_t>(held.tensor.nbytes()));
      }
    }
  }

  Held table(const Run& run, size_t index) const {
    Held held = get(run, index);
    held.copy = copies_->of[index];
    if (!held.is_constant) check_int4(index, held.tensor);
    return held;
  }

  std::vector<int64_t> rows_of(const Tensor& indices) const {
    std::vector<int64_t> rows(static_cast<size_t>(indices.size()));
    const int64_t n = plan_.spec.n;
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t given = indices.type == ort::kInt64
                                ? static_cast<const int64_t*>(indices.data)[i]
                                : static_cast<const int32_t*>(indices.data)[i];
      require(given >= -n && given < n, "index " + std::to_string(given) + " at position " +
                                            std::to_string(i) + ", expected " + std::to_string(-n) +
                                            " to " + std::to_string(n - 1));
      rows[i] = given < 0 ? given + n : given;
    }
    return rows;
  }

  std::unique_ptr<Copies> copies_ = std::make_unique<Copies>();
};

}  // namespace

std::vector<const ort::OrtCustomOp*> gather_ops(const ort::OrtApi* api) {
  static Op<GatherInt4> op;
  Op<GatherInt4>::shape_api = api;
  return {&op};
}

}  // namespace qgraph
