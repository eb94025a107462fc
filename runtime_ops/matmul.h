// A matrix product with packed weights, from float activations to float results: sizes, scratch
// memory, and how the work is cut into tasks. The operators and the C interface both come here.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/kernel.h"

namespace qgraph {

enum class Format { kInt4, kTernary };

// The attributes of a node.
struct MatMulSpec {
  Format format;
  int64_t n, k;
  int64_t group;             // INT4: columns that share a scale; 0 is the whole row
  int64_t activation_bits;   // 0 (float), 4 or 8
  int64_t activation_block;  // columns of activations that share a scale; 0 is the whole row
};

struct MatMulWeights {
  const uint8_t* codes;
  const void* scales;
  bool scales_are_float16;
  const uint8_t* zero_points;  // or null
  const float* row_scales;     // ternary: [tiles * 16]
};

// Everything that follows from a spec.
struct MatMulPlan {
  // Throws std::invalid_argument, whose text names the numbers.
  explicit MatMulPlan(const MatMulSpec& spec);

  // Bytes of scratch memory for m rows.
  int64_t scratch_bytes(const Kernels& kernels, int64_t m) const;

  MatMulSpec spec;
  int64_t tiles, steps, groups, padded;
  int64_t block, unit_steps, group_units, block_units;
  int64_t weight_bytes;  // of one tile
};

// Runs tasks 0 .. count - 1, in any order and on any thread.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual void run(void (*task)(void*, size_t), size_t count, void* context) = 0;
};

void run_matmul(const Kernels& kernels, const MatMulPlan& plan, const MatMulWeights& weights,
                const float* x, int64_t m, const float* bias, float* y, void* scratch,
                Executor& executor);

}  // namespace qgraph
