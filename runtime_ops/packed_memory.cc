#include "packed_memory.h"

#include <map>
#include <mutex>
#include <new>
#include <tuple>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#endif

namespace qgraph {
namespace {

constexpr int kCopy = -1;  // as it is, in huge pages

// Every weight that somebody holds, by what it was made from and how.
struct Made {
  std::mutex mutex;
  std::map<std::tuple<const void*, size_t, int>, std::weak_ptr<const void>> held;
};

Made& made() {
  static Made all;
  return all;
}

template <class Make>
std::shared_ptr<const void> shared(const void* data, size_t nbytes, int kind, const Make& make) {
  const std::lock_guard<std::mutex> lock(made().mutex);
  std::weak_ptr<const void>& known = made().held[{data, nbytes, kind}];
  std::shared_ptr<const void> found = known.lock();
  if (found == nullptr) known = found = make();
  return found;
}

std::shared_ptr<uint8_t> heap(size_t nbytes) {
  return std::shared_ptr<uint8_t>(new uint8_t[nbytes], std::default_delete<uint8_t[]>());
}

#if !defined(__linux__)

std::shared_ptr<uint8_t> memory(size_t nbytes) { return heap(nbytes); }

#else

constexpr size_t kHugePage = size_t{2} << 20;
// Below this, a weight stays in the caches of the CPU, and pages do not matter.
constexpr size_t kSmall = size_t{1} << 20;

bool wants_mapping() {
  const char* text = std::getenv("QGRAPH_WEIGHTS");
  if (text == nullptr || *text == '\0' || std::strcmp(text, "huge") == 0) return false;
  if (std::strcmp(text, "mapped") == 0) return true;
  throw std::invalid_argument(std::string("the environment variable QGRAPH_WEIGHTS is ") + text +
                              "; it must be huge or mapped");
}

// Whether all of [start, end) is one mapping of a file. Pages of the heap must not be dropped:
// nothing could bring them back. (Nobody writes to weights, so no page differs from the file.)
bool is_file_backed(uintptr_t start, uintptr_t end) {
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  if (maps == nullptr) return false;
  char line[512];
  bool is_backed = false;
  while (std::fgets(line, sizeof line, maps) != nullptr) {
    uintptr_t low = 0, high = 0;
    unsigned long long inode = 0;
    if (std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %*s %*s %*s %llu", &low, &high, &inode) != 3) {
      continue;
    }
    if (low <= start && start < high) {
      is_backed = inode != 0 && end <= high;
      break;
    }
  }
  std::fclose(maps);
  return is_backed;
}

struct Region {
  void* base;
  size_t nbytes;
};

// Memory in huge pages, or null where the system gives none.
std::shared_ptr<uint8_t> huge_pages(size_t nbytes) {
  const size_t reserved = nbytes + kHugePage;
  void* base = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  const auto address = reinterpret_cast<uintptr_t>(base);
  auto* aligned = reinterpret_cast<uint8_t*>((address + kHugePage - 1) / kHugePage * kHugePage);
  // The last pages stay small, so that rounding up wastes nothing.
  madvise(aligned, nbytes / kHugePage * kHugePage, MADV_HUGEPAGE);
  const Region region{base, reserved};
  return std::shared_ptr<uint8_t>(aligned,
                                  [region](uint8_t*) { munmap(region.base, region.nbytes); });
}

std::shared_ptr<uint8_t> memory(size_t nbytes) {
  std::shared_ptr<uint8_t> found = nbytes < kSmall ? nullptr : huge_pages(nbytes);
  return found != nullptr ? found : heap(nbytes);
}

std::shared_ptr<uint8_t> make_copy(const void* data, size_t nbytes) {
  std::shared_ptr<uint8_t> to = huge_pages(nbytes);
  if (to == nullptr) return nullptr;
  PageReturner pages(data, nbytes);
  for (size_t at = 0; at < nbytes; at += kPiece) {
    const size_t count = nbytes - at < kPiece ? nbytes - at : kPiece;
    std::memcpy(to.get() + at, static_cast<const uint8_t*>(data) + at, count);
    pages.done(at + count);
  }
  mprotect(to.get(), nbytes, PROT_READ);
  return to;
}

#endif

}  // namespace

std::shared_ptr<const void> derived_weight(const void* data, size_t nbytes, int kind,
                                           size_t made_bytes, const Fill& fill) {
  return shared(data, nbytes, kind, [&] {
    std::shared_ptr<uint8_t> to = memory(made_bytes);
    PageReturner pages(data, nbytes);
    fill(to.get(), pages);
    return to;
  });
}

std::shared_ptr<const void> known_copy(const void* data, size_t nbytes) {
  const std::lock_guard<std::mutex> lock(made().mutex);
  const auto at = made().held.find({data, nbytes, kCopy});
  return at == made().held.end() ? nullptr : at->second.lock();
}

#if defined(__linux__)

std::shared_ptr<const void> huge_copy(const void* data, size_t nbytes) {
  if (nbytes < kSmall || wants_mapping()) return nullptr;
  return shared(data, nbytes, kCopy, [&] { return make_copy(data, nbytes); });
}

PageReturner::PageReturner(const void* data, size_t nbytes)
    : start_(reinterpret_cast<uintptr_t>(data)),
      is_file_backed_(is_file_backed(start_, start_ + nbytes)) {}

void PageReturner::done(size_t nbytes) const {
  if (!is_file_backed_) return;
  // Whole pages inside the weight only; the others belong to its neighbours too.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t low = (start_ + page - 1) / page * page;
  const uintptr_t high = (start_ + nbytes) / page * page;
  if (high > low) madvise(reinterpret_cast<void*>(low), high - low, MADV_DONTNEED);
}

#else

std::shared_ptr<const void> huge_copy(const void*, size_t) { return nullptr; }
PageReturner::PageReturner(const void*, size_t) : start_(0), is_file_backed_(false) {}
void PageReturner::done(size_t) const {}

#endif

}  // namespace qgraph
