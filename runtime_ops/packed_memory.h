// Where kernels read packed weights from.
//
// A large weight is copied once into huge pages: a file's mapping has pages of 4 KiB, which costs a
// quarter of the read bandwidth. The pages of the mapping are given back to the system, so that
// memory stays at the packed size. QGRAPH_WEIGHTS=mapped reads the mapping itself instead, which
// processes share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace qgraph {

// A copy in huge pages of [data, data + nbytes), shared by all who ask for the same range while one
// of them lives. Null where the range is small, where mapped weights were asked for, or where the
// system gives no memory: then read the range itself.
std::shared_ptr<const void> huge_copy(const void* data, size_t nbytes);

// Memory for a weight that is computed from another form of it: huge pages where they pay.
std::shared_ptr<uint8_t> weight_memory(size_t nbytes);

// Say that [data, data + nbytes) will hardly be read again: pages of a file's mapping are given
// back, any other memory is left alone.
void give_back(const void* data, size_t nbytes);

// The copy of that range that somebody holds, or null.
std::shared_ptr<const void> known_copy(const void* data, size_t nbytes);

}  // namespace qgraph
