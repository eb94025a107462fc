// What the operators with packed weights share: their constants, where these are read from, and
// checks that name the node and the numbers.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "matmul.h"
#include "ort_op.h"

namespace qgraph {

// A weight tensor: a constant looked at once, or read anew at each run.
struct Held {
  bool is_constant = false;
  Tensor tensor{};
  std::shared_ptr<const void> copy;  // where the constant is large

  const void* data() const { return copy ? copy.get() : tensor.data; }
};

class PackedNode {
 protected:
  PackedNode(const NodeInfo& info, const MatMulPlan& plan, size_t inputs);

  // A plan, with errors that name the node.
  static MatMulPlan make_plan(const NodeInfo& info, const MatMulSpec& spec);

  // Huge pages for a large constant, after its shape has been checked.
  void keep(size_t index);
  Held get(const Run& run, size_t index) const;

  void require(bool holds, const std::string& text) const;
  void require_dims(const Tensor& t, const char* name, ort::OrtElementType type,
                    const Dims& expected) const;

  // INT4: codes, scales and zero points are inputs 1, 2 and 3.
  void check_int4(size_t index, const Tensor& t) const;
  // One zero point for all, whatever the size of the weight.
  bool is_single(const Tensor& zero_points) const;

  std::string where_;
  MatMulPlan plan_;
  std::vector<Held> held_;

 private:
  Dims per_group() const { return {plan_.tiles, plan_.groups, kTileRows}; }
};

}  // namespace qgraph
