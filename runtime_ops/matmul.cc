#include "matmul.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

namespace qgraph {
namespace {

// Rough speeds of one thread, only to cut work into tasks of a useful size.
constexpr double kBytesPerMicrosecond = 4e4;
constexpr double kProductsPerMicrosecond = 4e5;
constexpr double kFloatProductsPerMicrosecond = 4e4;
// Tasks are taken one by one, so that a busy core leaves more of them to the others. One shorter
// than this costs more to hand over than it saves.
constexpr double kTaskMicroseconds = 2.5;
// Rounding this much is worth a thread.
constexpr int64_t kRoundingElements = int64_t{1} << 16;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

std::string text(std::initializer_list<std::string> parts) {
  std::string all;
  for (const std::string& part : parts) all += part;
  return all;
}

void require(bool holds, std::initializer_list<std::string> parts) {
  if (!holds) throw std::invalid_argument(text(parts));
}

std::string number(int64_t value) { return std::to_string(value); }

void check(const MatMulSpec& s) {
  require(s.n >= 1 && s.k >= 1, {"N=", number(s.n), " and K=", number(s.k), " must be positive"});
  require(s.k <= kMaxColumns, {"K=", number(s.k), " is larger than ", number(kMaxColumns)});
  require(s.n <= int64_t{1} << 31, {"N=", number(s.n), " is larger than 2^31"});
  require(s.activation_bits == 0 || s.activation_bits == 4 || s.activation_bits == 8,
          {"activation_bits=", number(s.activation_bits), ", expected 0, 4 or 8"});
  require(s.activation_block >= 0 && s.activation_block % 16 == 0,
          {"activation_block=", number(s.activation_block), ", expected a multiple of 16, or 0"});
  if (s.format == Format::kTernary) {
    require(s.activation_bits == 0 || s.activation_block == 0,
            {"activation_block=", number(s.activation_block), ", expected 0 (a scale per row)"});
    return;
  }
  const bool is_group =
      s.group == 0 || (s.group >= 16 && s.group <= 256 && !(s.group & (s.group - 1)));
  require(is_group, {"block_size=", number(s.group), ", expected 0, 16, 32, 64, 128 or 256"});
  const int64_t block = s.activation_block;
  require(s.group == 0 || block == 0 || block % s.group == 0 || s.group % block == 0,
          {"activation_block=", number(block), " and block_size=", number(s.group),
           ", expected one to be a multiple of the other"});
}

// Scratch: int8 codes, scales, sums; or floats.
struct Scratch {
  Scratch(const MatMulPlan& p, int64_t m, void* base) {
    auto* bytes = static_cast<uint8_t*>(base);
    const int64_t unit = p.unit_steps * (p.padded / p.steps);
    const int64_t units = (p.padded + unit - 1) / unit;
    const int64_t blocks = (p.padded + p.block - 1) / p.block;
    codes = reinterpret_cast<int8_t*>(bytes);
    floats = reinterpret_cast<float*>(bytes);
    if (p.spec.activation_bits == 0) {
      total = m * p.padded * 4;
      return;
    }
    int64_t used = round_up(m * p.padded, 64);
    scales = reinterpret_cast<float*>(bytes + used);
    used += round_up(m * blocks * 4, 64);
    sums = reinterpret_cast<int32_t*>(bytes + used);
    total = used + m * units * 4;
  }

  int8_t* codes;
  float* floats;
  float* scales = nullptr;
  int32_t* sums = nullptr;
  int64_t total;
};

struct Rounding {
  void (*quantize)(const QuantizeTask&);
  void (*arrange)(const ArrangeTask&);
  QuantizeTask q;
  ArrangeTask a;
  bool is_float;
  int64_t blocks, per_task;

  static void task(void* context, size_t index) {
    const auto& r = *static_cast<const Rounding*>(context);
    const int64_t first = static_cast<int64_t>(index) * r.per_task;
    const int64_t last = std::min(first + r.per_task, r.blocks);
    if (r.is_float) {
      ArrangeTask part = r.a;
      part.first = first, part.last = last;
      r.arrange(part);
    } else {
      QuantizeTask part = r.q;
      part.first = first, part.last = last;
      r.quantize(part);
    }
  }
};

struct Product {
  void (*kernel)(const MatMulTask&);
  MatMulTask all;
  int64_t tiles, per_task;

  static void task(void* context, size_t index) {
    const auto& p = *static_cast<const Product*>(context);
    MatMulTask part = p.all;
    part.first_tile = static_cast<int64_t>(index) * p.per_task;
    part.last_tile = std::min(part.first_tile + p.per_task, p.tiles);
    p.kernel(part);
  }
};

void run_tasks(Executor& executor, void (*task)(void*, size_t), int64_t count, void* context) {
  if (count == 1) {
    task(context, 0);
  } else {
    executor.run(task, static_cast<size_t>(count), context);
  }
}

int64_t tiles_per_task(const MatMulPlan& p, int64_t m, int64_t tiles_at_once) {
  const double products = static_cast<double>(m) * kTileRows * static_cast<double>(p.padded);
  const double speed =
      p.spec.activation_bits == 0 ? kFloatProductsPerMicrosecond : kProductsPerMicrosecond;
  const double one =
      std::max(static_cast<double>(p.weight_bytes) / kBytesPerMicrosecond, products / speed);
  // Work of less than two tasks is not cut at all.
  if (one * static_cast<double>(p.tiles) < 2 * kTaskMicroseconds) return p.tiles;
  return round_up(std::max<int64_t>(1, static_cast<int64_t>(kTaskMicroseconds / one)),
                  tiles_at_once);
}

}  // namespace

MatMulPlan::MatMulPlan(const MatMulSpec& given) : spec(given) {
  check(spec);
  const bool is_ternary = spec.format == Format::kTernary;
  const int64_t step = is_ternary ? kTernaryStep : kInt4Step;
  padded = round_up(spec.k, is_ternary || spec.group == 0 ? step : spec.group);
  tiles = round_up(spec.n, kTileRows) / kTileRows;
  steps = padded / step;
  const int64_t group = is_ternary || spec.group == 0 ? padded : spec.group;
  groups = padded / group;
  // A block beyond the row is the row; the last block may be short.
  block = spec.activation_block == 0 ? padded : std::min(spec.activation_block, padded);
  const int64_t unit = std::min(group, block);
  unit_steps = unit / step;
  group_units = (group + unit - 1) / unit;
  block_units = (block + unit - 1) / unit;
  weight_bytes = steps * kTileBytes + (is_ternary ? 0 : groups * kTileRows * 2);
}

int64_t MatMulPlan::scratch_bytes(const Kernels&, int64_t m) const {
  return Scratch(*this, m, nullptr).total;
}

void run_matmul(const Kernels& kernels, const MatMulPlan& plan, const MatMulWeights& weights,
                const float* x, int64_t m, const float* bias, float* y, void* scratch,
                Executor& executor) {
  if (m == 0) return;
  const MatMulSpec& spec = plan.spec;
  const bool is_float = spec.activation_bits == 0;
  const Scratch at(plan, m, scratch);
  const int64_t step = plan.padded / plan.steps;

  Rounding rounding{};
  rounding.quantize = kernels.quantize;
  rounding.arrange = kernels.arrange;
  rounding.is_float = is_float;
  rounding.q = {x,
                m,
                spec.k,
                plan.padded,
                plan.block,
                plan.unit_steps * step,
                spec.activation_bits == 4 ? 7 : 127,
                at.codes,
                at.scales,
                at.sums,
                0,
                0};
  rounding.a = {x, m, spec.k, plan.padded, at.floats, 0, 0};
  const RowBlocks& cut = is_float ? kernels.float_blocks : kernels.blocks;
  rounding.blocks = cut.count(m);
  const int64_t block_elements = cut.rows * plan.padded;
  rounding.per_task = std::max<int64_t>(1, kRoundingElements / block_elements);
  run_tasks(executor, Rounding::task, (rounding.blocks + rounding.per_task - 1) / rounding.per_task,
            &rounding);

  Product product{};
  if (spec.format == Format::kInt4) {
    product.kernel = is_float ? kernels.int4_float : kernels.int4_int8;
  } else {
    product.kernel = is_float ? kernels.ternary_float : kernels.ternary_int8;
  }
  MatMulTask& t = product.all;
  t.codes = weights.codes;
  t.steps = plan.steps;
  t.scales = weights.scales;
  t.scales_are_float16 = weights.scales_are_float16;
  t.zero_points = weights.zero_points;
  t.groups = plan.groups;
  t.unit_steps = plan.unit_steps;
  t.group_units = plan.group_units;
  t.block_units = plan.block_units;
  t.row_scales = weights.row_scales;
  t.m = m;
  t.n = spec.n;
  t.x = at.codes;
  t.x_scales = at.scales;
  t.x_negative_sums = at.sums;
  t.x_float = at.floats;
  t.bias = bias;
  t.y = y;
  product.tiles = plan.tiles;
  product.per_task = tiles_per_task(plan, m, kernels.tiles_at_once);
  run_tasks(executor, Product::task, (plan.tiles + product.per_task - 1) / product.per_task,
            &product);
}

}  // namespace qgraph
