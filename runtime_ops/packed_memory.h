// Where kernels read packed weights from.
//
// A large weight is copied once into huge pages: a file's mapping has pages of 4 KiB, which costs a
// quarter of the read bandwidth. The pages of the mapping are given back to the system, so that
// memory stays at the packed size. QGRAPH_WEIGHTS=mapped reads the mapping itself instead, which
// processes share; what a file holds in another form than kernels read is made anew in any case.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace qgraph {

constexpr size_t kPiece = size_t{8} << 20;  // read and given back at a time: memory never doubles

// Gives pages of a file's mapping back while [data, data + nbytes) is read from its start on, for
// it will hardly be read again. Any other memory is left alone.
class PageReturner {
 public:
  PageReturner(const void* data, size_t nbytes);
  void done(size_t nbytes) const;  // so many bytes have been read

 private:
  uintptr_t start_;
  bool is_file_backed_;
};

using Fill = std::function<void(uint8_t* to, const PageReturner& pages)>;

// A copy in huge pages of [data, data + nbytes), shared by all who ask for the same range while one
// of them lives. Null where the range is small, where mapped weights were asked for, or where the
// system gives no memory: then read the range itself.
std::shared_ptr<const void> huge_copy(const void* data, size_t nbytes);

// `made_bytes` that `fill` computes from [data, data + nbytes), shared by all who ask for the same
// `kind` (0 or more) of the same range while one of them lives; in huge pages where these pay.
std::shared_ptr<const void> derived_weight(const void* data, size_t nbytes, int kind,
                                           size_t made_bytes, const Fill& fill);

// The copy of that range that somebody holds, or null.
std::shared_ptr<const void> known_copy(const void* data, size_t nbytes);

}  // namespace qgraph
