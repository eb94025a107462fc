#include "packed_memory.h"

namespace qgraph {
namespace {

std::shared_ptr<uint8_t> heap(size_t nbytes) {
  return std::shared_ptr<uint8_t>(new uint8_t[nbytes], std::default_delete<uint8_t[]>());
}

}  // namespace
}  // namespace qgraph

#if defined(__linux__)

#include <sys/mman.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace qgraph {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Below this, a weight stays in the caches of the CPU, and pages do not matter.
constexpr size_t kSmall = size_t{1} << 20;
constexpr size_t kPiece = size_t{8} << 20;  // copied and given back at a time: memory never doubles

bool wants_mapping() {
  const char* text = std::getenv("QGRAPH_WEIGHTS");
  if (text == nullptr || *text == '\0' || std::strcmp(text, "huge") == 0) return false;
  if (std::strcmp(text, "mapped") == 0) return true;
  throw std::invalid_argument(std::string("the environment variable QGRAPH_WEIGHTS is ") + text +
                              "; it must be huge or mapped");
}

// Whether all of [start, end) is a private mapping of a file. Pages of the heap must not be
// dropped: nothing could bring them back.
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

// Whole pages inside a file-backed range only; the others belong to its neighbours too.
void drop_pages(uintptr_t start, uintptr_t end) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t low = (start + page - 1) / page * page;
  const uintptr_t high = end / page * page;
  if (high > low) madvise(reinterpret_cast<void*>(low), high - low, MADV_DONTNEED);
}

void copy(const uint8_t* from, uint8_t* to, size_t nbytes) {
  const auto start = reinterpret_cast<uintptr_t>(from);
  const bool drops = is_file_backed(start, start + nbytes);
  for (size_t at = 0; at < nbytes; at += kPiece) {
    const size_t count = nbytes - at < kPiece ? nbytes - at : kPiece;
    std::memcpy(to + at, from + at, count);
    if (drops) drop_pages(start, start + at + count);
  }
}

struct Region {
  void* base;
  size_t nbytes;
};

// Memory in huge pages, or null where the system gives none; `whole` is what was mapped.
std::shared_ptr<uint8_t> huge_pages(size_t nbytes, Region* whole) {
  const size_t reserved = nbytes + kHugePage;
  void* base = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  const auto address = reinterpret_cast<uintptr_t>(base);
  auto* aligned = reinterpret_cast<uint8_t*>((address + kHugePage - 1) / kHugePage * kHugePage);
  // The last pages stay small, so that rounding up wastes nothing.
  madvise(aligned, nbytes / kHugePage * kHugePage, MADV_HUGEPAGE);
  const Region region{base, reserved};
  if (whole != nullptr) *whole = region;
  return std::shared_ptr<uint8_t>(aligned,
                                  [region](uint8_t*) { munmap(region.base, region.nbytes); });
}

std::shared_ptr<const void> make_copy(const void* data, size_t nbytes) {
  Region whole{};
  const std::shared_ptr<uint8_t> made = huge_pages(nbytes, &whole);
  if (made == nullptr) return nullptr;
  copy(static_cast<const uint8_t*>(data), made.get(), nbytes);
  mprotect(whole.base, whole.nbytes, PROT_READ);
  return made;
}

// Every copy that somebody holds, by what it was copied from.
struct Copies {
  std::mutex mutex;
  std::map<std::pair<const void*, size_t>, std::weak_ptr<const void>> held;
};

Copies& copies() {
  static Copies all;
  return all;
}

}  // namespace

std::shared_ptr<const void> huge_copy(const void* data, size_t nbytes) {
  if (nbytes < kSmall || wants_mapping()) return nullptr;
  const std::lock_guard<std::mutex> lock(copies().mutex);
  std::weak_ptr<const void>& known = copies().held[{data, nbytes}];
  std::shared_ptr<const void> found = known.lock();
  if (found == nullptr) known = found = make_copy(data, nbytes);
  return found;
}

std::shared_ptr<uint8_t> weight_memory(size_t nbytes) {
  std::shared_ptr<uint8_t> found = nbytes < kSmall ? nullptr : huge_pages(nbytes, nullptr);
  return found != nullptr ? found : heap(nbytes);
}

void give_back(const void* data, size_t nbytes) {
  const auto start = reinterpret_cast<uintptr_t>(data);
  if (is_file_backed(start, start + nbytes)) drop_pages(start, start + nbytes);
}

std::shared_ptr<const void> known_copy(const void* data, size_t nbytes) {
  const std::lock_guard<std::mutex> lock(copies().mutex);
  const auto at = copies().held.find({data, nbytes});
  return at == copies().held.end() ? nullptr : at->second.lock();
}

}  // namespace qgraph

#else

namespace qgraph {

std::shared_ptr<const void> huge_copy(const void*, size_t) { return nullptr; }
std::shared_ptr<const void> known_copy(const void*, size_t) { return nullptr; }
std::shared_ptr<uint8_t> weight_memory(size_t nbytes) { return heap(nbytes); }
void give_back(const void*, size_t) {}

}  // namespace qgraph

#endif
