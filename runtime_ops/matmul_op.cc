// ai.qgraph::MatMulInt4, MatMulInt3 and MatMulTernary: what ONNX Runtime calls.
#include <algorithm>
#include <utility>

#include "cpu.h"
#include "half_tensors.h"
#include "int3.h"
#include "packed_memory.h"
#include "packed_node.h"

namespace qgraph {
namespace {

class MatMulNode : public PackedNode {
 public:
  static void infer(const ort::OrtApi& api, ort::OrtShapeInferContext* context) {
    infer_last_dimension(api, context, "N");
  }

 protected:
  MatMulNode(const NodeInfo& info, Format format, size_t inputs)
      : PackedNode(info,
                   make_plan(info, {format, info.attribute("N"), info.attribute("K"),
                                    format == Format::kInt4 ? info.attribute("block_size") : 0,
                                    info.attribute("activation_bits"),
                                    info.attribute("activation_block")}),
                   inputs) {
    kernels_ = kernels_for(best_isa());
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
    const Output y(run, dims, x.type);
    const int64_t m = x.size() / plan_.spec.k;
    if (m == 0) return;
    std::vector<float> spread;
    RuntimeThreads threads(run);
    const Floats floats(run, x, threads);
    const ScratchMemory scratch(run, plan_.scratch_bytes(*kernels_, m));
    run_matmul(*kernels_, plan_, weights, floats.get(), m, bias_of(bias, &spread), y.get(),
               scratch.get(), threads);
    y.finish(threads);
  }

  const Kernels* kernels_;
};

// `is_narrow`: the file holds codes of 3 bits; constant ones are widened once.
class MatMulInt4 : public MatMulNode {
 public:
  static constexpr const char* kName = "MatMulInt4";
  static constexpr ort::OrtElementType kInputs[] = {ort::kFloat, ort::kUint8, ort::kUndefined,
                                                    ort::kUint8, ort::kFloat};

  explicit MatMulInt4(const NodeInfo& info, bool is_narrow = false)
      : MatMulNode(info, Format::kInt4, 5), is_narrow_(is_narrow) {
    for (size_t i = 1; i < 5; ++i) {
      if (held_[i].is_constant) check_input(i, held_[i].tensor);
    }
    for (size_t i = is_narrow_ ? 2 : 1; i < 4; ++i) keep(i);
    if (is_narrow_ && held_[1].is_constant) {
      const Tensor& codes = held_[1].tensor;
      shift_ = held_[3].is_constant ? shift_of(held_[3].tensor) : 0;
      held_[1].copy = derived_weight(
          codes.data, static_cast<size_t>(codes.nbytes()), shift_, wide_bytes(),
          [&](uint8_t* wide, const PageReturner& pages) { widen(codes, shift_, wide, &pages); });
    }
  }

  void run(const Run& run) const {
    const Held codes = get(run, 1), scales = get(run, 2), points = get(run, 3), bias = get(run, 4);
    const std::pair<size_t, const Held*> all[] = {
        {1, &codes}, {2, &scales}, {3, &points}, {4, &bias}};
    for (const auto& [index, held] : all) {
      if (!held->is_constant) check_input(index, held->tensor);
    }
    std::vector<uint8_t> wide;
    if (is_narrow_ && !codes.is_constant) {
      wide.resize(wide_bytes());
      widen(codes.tensor, 0, wide.data(), nullptr);
    }
    const auto* values = static_cast<const uint8_t*>(points.data());
    std::vector<uint8_t> spread;
    if (is_single(points.tensor)) {
      if (values[0] + shift_ == kInt4Middle) {
        values = nullptr;
      } else {
        spread.assign(static_cast<size_t>(plan_.tiles * plan_.groups * kTileRows), values[0]);
        values = spread.data();
      }
    }
    multiply(run,
             {wide.empty() ? static_cast<const uint8_t*>(codes.data()) : wide.data(), scales.data(),
              scales.tensor.type == ort::kFloat16, values, nullptr},
             bias.tensor);
  }

 private:
  void check_input(size_t index, const Tensor& t) const {
    if (index == 1 && is_narrow_) {
      require_dims(t, "codes", ort::kUint8, {plan_.tiles, (plan_.steps + 1) / 2, kInt3Bytes});
    } else {
      index < 4 ? check_int4(index, t) : require_row(t, "bias");
    }
  }

  // What makes the one zero point of all groups that for which kernels need none.
  int shift_of(const Tensor& points) const {
    const int point = is_single(points) ? *static_cast<const uint8_t*>(points.data) : kInt4Middle;
    return point < kInt4Middle ? kInt4Middle - point : 0;
  }

  size_t wide_bytes() const { return static_cast<size_t>(plan_.tiles * plan_.steps * kTileBytes); }

  void widen(const Tensor& codes, int shift, uint8_t* wide, const PageReturner* pages) const {
    const auto* packed = static_cast<const uint8_t*>(codes.data);
    const int64_t from = (plan_.steps + 1) / 2 * kInt3Bytes, to = plan_.steps * kTileBytes;
    const int64_t at_once = std::max<int64_t>(1, static_cast<int64_t>(kPiece) / from);
    for (int64_t tile = 0; tile < plan_.tiles; tile += at_once) {
      const int64_t count = std::min(at_once, plan_.tiles - tile);
      widen_int3(packed + tile * from, count, plan_.steps, static_cast<uint8_t>(shift),
                 wide + tile * to);
      if (pages != nullptr) pages->done(static_cast<size_t>((tile + count) * from));
    }
  }

  bool is_narrow_;
  int shift_ = 0;  // added to each code
};

class MatMulInt3 : public MatMulInt4 {
 public:
  static constexpr const char* kName = "MatMulInt3";

  explicit MatMulInt3(const NodeInfo& info) : MatMulInt4(info, true) {}
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
  static Op<MatMulInt4, ort::kFloat16> int4_half;
  static Op<MatMulInt3> int3;
  static Op<MatMulInt3, ort::kFloat16> int3_half;
  static Op<MatMulTernary> ternary;
  static Op<MatMulTernary, ort::kFloat16> ternary_half;
  int4.shape_api = int4_half.shape_api = api;
  int3.shape_api = int3_half.shape_api = api;
  ternary.shape_api = ternary_half.shape_api = api;
  return {&int4, &int4_half, &int3, &int3_half, &ternary, &ternary_half};
}

}  // namespace qgraph
