#include "tests/index/allocation_counter.h"

#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ENGRAM_COUNT_ALLOCATIONS 0
#elif defined(__has_feature)
#define ENGRAM_COUNT_ALLOCATIONS \
  (!__has_feature(address_sanitizer) && !__has_feature(thread_sanitizer))
#else
#define ENGRAM_COUNT_ALLOCATIONS 1
#endif

namespace engram {
namespace {
std::atomic<uint64_t> allocations{0};
}  // namespace

uint64_t AllocationCount() { return allocations.load(std::memory_order_relaxed); }
bool AllocationsAreCounted() { return ENGRAM_COUNT_ALLOCATIONS; }

}  // namespace engram

#if ENGRAM_COUNT_ALLOCATIONS
// The other forms of operator new and delete call these.
void* operator new(size_t bytes) {
  engram::allocations.fetch_add(1, std::memory_order_relaxed);
  void* block = std::malloc(bytes == 0 ? 1 : bytes);
  if (block == nullptr) std::abort();
  return block;
}
void operator delete(void* block) noexcept { std::free(block); }
void operator delete(void* block, size_t) noexcept { std::free(block); }
#endif
