// ai.qgraph::MatMulInt4 and ai.qgraph::MatMulTernary: what ONNX Runtime calls.
#include <memory>
#include <utility>

#include "cpu.h"
#include "ort_op.h"
#include "packed_memory.h"

namespace qgraph {
namespace {

// A weight tensor: a constant looked at once, or read anew at each run.
struct Held {
  bool is_constant = false;
  Tensor tensor{};
  std::shared_ptr<const void> copy;  // where the constant is large

  const void* data() const { return copy ? copy.get() : tensor.data; }
};

class MatMulNode {
 public:
  static void infer(const ort::OrtApi& api, ort::OrtShapeInferContext* context) {
    infer_last_dimension(api, context, "N");
  }

 protected:
  MatMulNode(const NodeInfo& info, Format format, size_t inputs)
      : where_(info.where()), plan_(make_plan(info, format)), held_(inputs) {
    kernels_ = kernels_for(best_isa());
    for (size_t i = 1; i < inputs; ++i) {
      Held& held = held_[i];
      held.is_constant = info.constant(i, &held.tensor);
    }
  }

  // After the shapes have been checked.
  void keep(size_t index) {
    Held& held = held_[index];
    if (held.is_constant) {
      held.copy = huge_copy(held.tensor.data, static_cast<size_t>(held.tensor.nbytes()));
    }
  }

  Held get(const Run& run, size_t index) const {
    if (held_[index].is_constant) return held_[index];
    Held held;
    held.tensor = run.input(index);
    return held;
  }

  void require(bool holds, const std::string& text) const {
    if (!holds) throw std::invalid_argument(where_ + ": " + text);
  }

  void require_dims(const Tensor& t, const char* name, ort::OrtElementType type,
                    const Dims& expected) const {
    require(t.type == type, std::string(name) + " has element type " + std::to_string(t.type) +
                                ", expected " + std::to_string(type));
    require(t.dims == expected, std::string(name) + " is " + to_text(t.dims) + ", expected " +
                                    to_text(expected) + " for N=" + std::to_string(plan_.spec.n) +
                                    ", K=" + std::to_string(plan_.spec.k));
  }

  // [N], or [1] with a single value for all.
  void require_row(const Tensor& t, const char* name) const {
    require(t.dims == Dims{1} || t.dims == Dims{plan_.spec.n},
            std::string(name) + " is " + to_text(t.dims) + ", expected [1] or [" +
                std::to_string(plan_.spec.n) + "]");
  }

  // Null for a bias of zero; `spread` holds a single value for all N.
  const float* bias_of(const Tensor& t, std::vector<float>* spread) const {
    const auto* values = static_cast<const float*>(t.data);
    if (t.dims == Dims{plan_.spec.n} && plan_.spec.n != 1) return values;
    if (values[0] == 0.0f) return nullptr;
    spread->assign(static_cast<size_t>(plan_.spec.n), values[0]);
    return spread->data();
  }

  void multiply(const Run& run, const MatMulWeights& weights, const Tensor& bias) const {
    const Tensor x = run.input(0);
    require(!x.dims.empty() && x.dims.back() == plan_.spec.k,
            "the input is " + to_text(x.dims) + ", expected [..., " + std::to_string(plan_.spec.k) +
                "]");
    Dims dims = x.dims;
    dims.back() = plan_.spec.n;
    auto* y = static_cast<float*>(run.output(dims));
    const int64_t m = x.size() / plan_.spec.k;
    if (m == 0) return;
    std::vector<float> spread;
    const ScratchMemory scratch(run, plan_.scratch_bytes(*kernels_, m));
    RuntimeThreads threads(run);
    run_matmul(*kernels_, plan_, weights, static_cast<const float*>(x.data), m,
               bias_of(bias, &spread), y, scratch.get(), threads);
  }

  std::string where_;
  MatMulPlan plan_;
  const Kernels* kernels_;
  std::vector<Held> held_;

 private:
  static MatMulPlan make_plan(const NodeInfo& info, Format format) {
    const bool is_int4 = format == Format::kInt4;
    try {
      return MatMulPlan({format, info.attribute("N"), info.attribute("K"),
                         is_int4 ? info.attribute("block_size") : 0,
                         info.attribute("activation_bits"), info.attribute("activation_block")});
    } catch (const std::invalid_argument& e) {
      const std::string text = e.what();
      // A missing attribute has named the node already.
      if (text.rfind(info.where(), 0) == 0) throw;
      throw std::invalid_argument(info.where() + ": " + text);
    }
  }
};

class MatMulInt4 : public MatMulNode {
 public:
  static constexpr const char* kName = "MatMulInt4";
  static constexpr ort::OrtElementType kInputs[] = {ort::kFloat, ort::kUint8, ort::kUndefined,
                                                    ort::kUint8, ort::kFloat};

  explicit MatMulInt4(const NodeInfo& info) : MatMulNode(info, Format::kInt4, 5) {
    for (size_t i = 1; i < 5; ++i) {
      if (held_[i].is_constant) check_input(i, held_[i].tensor);
    }
    for (size_t i = 1; i < 4; ++i) keep(i);
  }

  void run(const Run& run) const {
    const Held codes = get(run, 1), scales = get(run, 2), points = get(run, 3), bias = get(run, 4);
    const std::pair<size_t, const Held*> all[] = {
        {1, &codes}, {2, &scales}, {3, &points}, {4, &bias}};
    for (const auto& [index, held] : all) {
      if (!held->is_constant) check_input(index, held->tensor);
    }
    const auto* values = static_cast<const uint8_t*>(points.data());
    std::vector<uint8_t> spread;
    if (is_single(points.tensor)) {
      if (values[0] == kInt4Middle) {
        values = nullptr;
      } else {
        spread.assign(static_cast<size_t>(plan_.tiles * plan_.groups * kTileRows), values[0]);
        values = spread.data();
      }
    }
    multiply(run,
             {static_cast<const uint8_t*>(codes.data()), scales.data(),
              scales.tensor.type == ort::kFloat16, values, nullptr},
             bias.tensor);
  }

 private:
  // One zero point for all, whatever the size of the weight.
  bool is_single(const Tensor& t) const {
    return t.dims == Dims{1, 1, 1} && Dims{1, 1, 1} != per_group();
  }

  Dims per_group() const { return {plan_.tiles, plan_.groups, kTileRows}; }

  void check_input(size_t index, const Tensor& t) const {
    switch (index) {
      case 1: return require_dims(t, "codes", ort::kUint8, {plan_.tiles, plan_.steps, kTileBytes});
      case 2:
        return require_dims(t, "scales", t.type == ort::kFloat16 ? ort::kFloat16 : ort::kFloat,
                            per_group());
      case 3:
        if (!is_single(t)) require_dims(t, "zero_points", ort::kUint8, per_group());
        return;
      default: return require_row(t, "bias");
    }
  }
};

class MatMulTernary : public MatMulNode {
 public:
  static constexpr const char* kName = "MatMulTernary";
  static constexpr ort::OrtElementType kInputs[] = {ort::kFloat, ort::kUint8, ort::kFloat,
                                                    ort::kFloat};

  explicit MatMulTernary(const NodeInfo& info) : MatMulNode(info, Format::kTernary, 4) {
    for (size_t i = 1; i < 4; ++i) {
      if (held_[i].is_constant) check_input(i, held_[i].tensor);
    }
    keep(1);
    if (held_[2].is_constant) row_scales_ = rows_of(held_[2].tensor);
  }

  void run(const Run& run) const {
    const Held codes = get(run, 1), scale = get(run, 2), bias = get(run, 3);
    if (!codes.is_constant) check_input(1, codes.tensor);
    if (!bias.is_constant) check_input(3, bias.tensor);
    std::vector<float> rows;
    if (!scale.is_constant) {
      check_input(2, scale.tensor);
      rows = rows_of(scale.tensor);
    }
    multiply(run,
             {static_cast<const uint8_t*>(codes.data()), nullptr, false, nullptr,
              scale.is_constant ? row_scales_.data() : rows.data()},
             bias.tensor);
  }

 private:
  // One scale for each row of every tile.
  std::vector<float> rows_of(const Tensor& scale) const {
    const auto* values = static_cast<const float*>(scale.data);
    std::vector<float> rows(static_cast<size_t>(plan_.tiles * kTileRows), 0.0f);
    for (int64_t n = 0; n < plan_.spec.n; ++n) {
      rows[static_cast<size_t>(n)] = values[scale.size() == 1 ? 0 : n];
    }
    return rows;
  }

  void check_input(size_t index, const Tensor& t) const {
    if (index == 1) {
      require_dims(t, "codes", ort::kUint8, {plan_.tiles, plan_.steps, kTileBytes});
    } else {
      require_row(t, index == 2 ? "scale" : "bias");
    }
  }

  std::vector<float> row_scales_;
};

}  // namespace

std::vector<const ort::OrtCustomOp*> matmul_ops(const ort::OrtApi* api) {
  static Op<MatMulInt4> int4;
  static Op<MatMulTernary> ternary;
  Op<MatMulInt4>::shape_api = Op<MatMulTernary>::shape_api = api;
  return {&int4, &ternary};
}

}  // namespace qgraph
