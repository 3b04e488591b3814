#include "src/core/arena_heap.h"

#include <algorithm>
#include <bit>

#include "src/core/check.h"
#include "src/core/spsc_ring.h"

namespace engram {

// Class c stands for the size (4 + c % 4) << (c / 4 + 3): 32, 40, 48, 56, 64, 80, 96, 112, 128, ...
// A block of 64 bytes and more starts at a cache line, so the rest of its last line is lost to
// others: it is made part of the block, which leaves the classes 80, 96, 112, 160 and 224 unused.
size_t ArenaHeap::ClassOf(size_t bytes) {
  CHECK(bytes <= kMaxBytes, "block size out of range");
  bytes = std::max(bytes, kMinBytes);
  if (bytes > kCacheLineBytes) {
    bytes = (bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
  }
  const size_t exponent = static_cast<size_t>(std::bit_width(bytes - 1)) - 1;  // floor(log2)
  // With 2^e < bytes <= 2^(e+1), the step is a quarter of 2^e.
  const size_t quarter = size_t{1} << (exponent - 2);
  const size_t steps = (bytes + quarter - 1) / quarter;  // 5..8 quarters, or 4 exactly at 2^e
  return (exponent - 5) * 4 + (steps - 4);
}

size_t ArenaHeap::SizeOfClass(size_t size_class) {
  return (4 + size_class % 4) << (size_class / 4 + 3);
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
