#include "packed_node.h"

#include <stdexcept>

#include "packed_memory.h"

namespace qgraph {

PackedNode::PackedNode(const NodeInfo& info, const MatMulPlan& plan, size_t inputs)
    : where_(info.where()), plan_(plan), held_(inputs) {
  for (size_t i = 1; i < inputs; ++i) {
    held_[i].is_constant = info.constant(i, &held_[i].tensor);
  }
}

MatMulPlan PackedNode::make_plan(const NodeInfo& info, const MatMulSpec& spec) {
  try {
    return MatMulPlan(spec);
  } catch (const std::invalid_argument& e) {
    throw std::invalid_argument(info.where() + ": " + e.what());
  }
}

void PackedNode::keep(size_t index) {
  Held& held = held_[index];
  if (held.is_constant) {
    held.copy = huge_copy(held.tensor.data, static_cast<size_t>(held.tensor.nbytes()));
  }
}

Held PackedNode::get(const Run& run, size_t index) const {
  if (held_[index].is_constant) return held_[index];
  Held held;
  held.tensor = run.input(index);
  return held;
}

void PackedNode::require(bool holds, const std::string& text) const {
  if (!holds) throw std::invalid_argument(where_ + ": " + text);
}

void PackedNode::require_dims(const Tensor& t, const char* name, ort::OrtElementType type,
                              const Dims& expected) const {
  require(t.type == type, std::string(name) + " has element type " + std::to_string(t.type) +
                              ", expected " + std::to_string(type));
  require(t.dims == expected, std::string(name) + " is " + to_text(t.dims) + ", expected " +
                                  to_text(expected) + " for N=" + std::to_string(plan_.spec.n) +
                                  ", K=" + std::to_string(plan_.spec.k));
}

void PackedNode::check_int4(size_t index, const Tensor& t) const {
  if (index == 1) {
    require_dims(t, "codes", ort::kUint8, {plan_.tiles, plan_.steps, kTileBytes});
  } else if (index == 2) {
    require_dims(t, "scales", t.type == ort::kFloat16 ? ort::kFloat16 : ort::kFloat, per_group());
  } else if (!is_single(t)) {
    require_dims(t, "zero_points", ort::kUint8, per_group());
  }
}

bool PackedNode::is_single(const Tensor& zero_points) const {
  return zero_points.dims == Dims{1, 1, 1} && zero_points.dims != per_group();
}

}  // namespace qgraph
