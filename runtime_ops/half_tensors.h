// Activations and results of float16: the kernels work on float32, in scratch memory.
#pragma once

#include <memory>

#include "ort_op.h"

namespace qgraph {

// A float or float16 tensor as floats.
class Floats {
 public:
  Floats(const Run& run, const Tensor& tensor, Executor& executor);
  const float* get() const { return values_; }

 private:
  std::unique_ptr<ScratchMemory> scratch_;
  const float* values_;
};

// The output of a node: floats to write, which `finish` rounds where the output is float16.
class Output {
 public:
  Output(const Run& run, const Dims& dims, ort::OrtElementType type);
  float* get() const { return values_; }
  void finish(Executor& executor) const;

 private:
  std::unique_ptr<ScratchMemory> scratch_;
  float* values_;
  uint16_t* halves_ = nullptr;
  int64_t size_;
};

}  // namespace qgraph
