#include "src/core/arena_heap.h"

#include <algorithm>
#include <bit>

#include "src/core/check.h"
#include "src/core/spsc_ring.h"

namespace engram {

namespace {

// Classes are sizes: multiples of 8 up to a cache line, whole lines up to kFewLinesBytes, then
// steps of a power of two.
constexpr size_t kSmallStep = 8;
constexpr size_t kSmallClasses = kCacheLineBytes / kSmallStep + 1;
constexpr size_t kFewLinesBytes = 1'024;
constexpr size_t kLineClasses = kFewLinesBytes / kCacheLineBytes - 1;
constexpr size_t kSteps = 16;
constexpr size_t kFirstExponent = 10;  // of kFewLinesBytes

constexpr size_t DivideUp(size_t bytes, size_t step) { return (bytes + step - 1) / step; }

}  // namespace

size_t ArenaHeap::ClassOf(size_t bytes) {
  CHECK(bytes <= kMaxBytes, "block size out of range");
  bytes = std::max(bytes, kMinBytes);
  if (bytes <= kCacheLineBytes) return DivideUp(bytes, kSmallStep);
  if (bytes <= kFewLinesBytes) return kSmallClasses + DivideUp(bytes, kCacheLineBytes) - 2;
  const size_t exponent = static_cast<size_t>(std::bit_width(bytes - 1)) - 1;  // floor(log2)
  // kSteps + 1 to 2 * kSteps of them.
  const size_t steps = DivideUp(bytes, (size_t{1} << exponent) / kSteps);
  return kSmallClasses + kLineClasses + (exponent - kFirstExponent) * kSteps + steps - kSteps - 1;
}

size_t ArenaHeap::SizeOfClass(size_t size_class) {
  if (size_class < kSmallClasses) return size_class * kSmallStep;
  size_class -= kSmallClasses;
  if (size_class < kLineClasses) return (size_class + 2) * kCacheLineBytes;
  size_class -= kLineClasses;
  const size_t exponent = kFirstExponent + size_class / kSteps;
  return (size_t{1} << exponent) / kSteps * (kSteps + 1 + size_class % kSteps);
}

std::byte* ArenaHeap::Allocate(size_t bytes) {
  const size_t size_class = ClassOf(bytes);
  const size_t block_bytes = SizeOfClass(size_class);
  if (FreeBlock* block = free_[size_class]; block != nullptr) {
    free_[size_class] = block->next;
    live_bytes_ += block_bytes;
    return reinterpret_cast<std::byte*>(block);
  }
  const size_t alignment = block_bytes >= kCacheLineBytes ? kCacheLineBytes : size_t{8};
  std::byte* block = arena_->Allocate(block_bytes, alignment);
  if (block != nullptr) live_bytes_ += block_bytes;
  return block;
}

void ArenaHeap::Free(std::byte* block, size_t bytes) {
  const size_t size_class = ClassOf(bytes);
  auto* entry = reinterpret_cast<FreeBlock*>(block);
  entry->next = free_[size_class];
  free_[size_class] = entry;
  CHECK(live_bytes_ >= SizeOfClass(size_class), "more was freed than handed out");
  live_bytes_ -= SizeOfClass(size_class);
}

}  // namespace engram
