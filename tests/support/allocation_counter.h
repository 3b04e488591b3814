#pragma once

#include <cstdint>

namespace engram {

// Calls that took memory from the allocator (malloc, calloc, realloc, aligned_alloc,
// posix_memalign, and operator new through them) in this program so far. Link
// allocation_counter.cc into a test of its own: it stands in for the allocator's functions.
uint64_t AllocationCount();
// False under a sanitizer, which has an allocator of its own.
bool AllocationsAreCounted();

}  // namespace engram
