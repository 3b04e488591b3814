#pragma once

#include <cstdint>

namespace engram {

// Calls of operator new in this program so far. Does not count under a sanitizer, which has its
// own.
uint64_t AllocationCount();
bool AllocationsAreCounted();

}  // namespace engram
