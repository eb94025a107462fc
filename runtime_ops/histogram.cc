#include "histogram.h"

#include <cstring>
#include <limits>
#include <map>

#include "cpu.h"
#include "kernels/kernel.h"
#include "qgraph_ops.h"

namespace qgraph {
namespace {

struct Tables {
  std::mutex mutex;
  int64_t last = 0;
  std::map<int64_t, std::shared_ptr<CountTable>> open;
};

Tables& tables() {
  static Tables* const all = new Tables;  // sessions may outlive the static objects of a library
  return *all;
}

}  // namespace

std::shared_ptr<CountTable> find_table(int64_t key) {
  Tables& all = tables();
  const std::lock_guard<std::mutex> held(all.mutex);
  const auto found = all.open.find(key);
  return found == all.open.end() ? nullptr : found->second;
}

void floats_of(const FloatExtremes& found, float* low_high) {
  const float infinity = std::numeric_limits<float>::infinity();
  low_high[0] = infinity;
  low_high[1] = -infinity;
  if (found.low > found.high) return;
  const int32_t bits[2] = {float_order(found.low), float_order(found.high)};
  std::memcpy(low_high, bits, sizeof bits);
}

}  // namespace qgraph

int64_t qg_count_floats(const float* x, int64_t n, int64_t* counts, float* extremes) {
  using namespace qgraph;
  FloatExtremes found;
  const int64_t lost = kernels_for(best_isa())->count_floats(x, n, counts, &found);
  floats_of(found, extremes);
  return lost;
}

int32_t qg_range_errors(int32_t isa, const QgRangeErrors* task) {
  using namespace qgraph;
  if (task == nullptr || task->edges < 0 || task->ranges < 0 || task->edges % 8 != 0) {
    return QG_INVALID_ARGUMENT;
  }
  if (isa >= 0 && !qg_isa_is_supported(isa)) return QG_ISA_NOT_AVAILABLE;
  kernels_for(isa < 0 ? best_isa() : static_cast<Isa>(isa))
      ->range_errors({task->at, task->weight, task->edges, task->ranges, task->grids, task->outside,
                      task->within, task->step, task->errors});
  return QG_OK;
}

int64_t qg_table_open(int64_t* counts, int64_t* totals) {
  using namespace qgraph;
  try {
    auto table = std::make_shared<CountTable>();
    table->counts = counts;
    table->totals = totals;
    Tables& all = tables();
    const std::lock_guard<std::mutex> held(all.mutex);
    all.open.emplace(++all.last, std::move(table));
    return all.last;
  } catch (const std::exception&) {
    return 0;
  }
}

int32_t qg_table_close(int64_t key) {
  using namespace qgraph;
  std::shared_ptr<CountTable> table;
  {
    Tables& all = tables();
    const std::lock_guard<std::mutex> held(all.mutex);
    const auto found = all.open.find(key);
    if (found == all.open.end()) return QG_INVALID_ARGUMENT;
    table = std::move(found->second);
    all.open.erase(found);
  }
  // A session that still runs counts to its end of the tensor first.
  const std::lock_guard<std::mutex> held(table->mutex);
  table->counts = table->totals = nullptr;
  return QG_OK;
}
