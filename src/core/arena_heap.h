#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "src/core/huge_page_arena.h"

namespace engram {

// Blocks of any size out of one arena, without malloc: sizes are rounded up to one of four steps a
// power of two (at most 25 % more than asked), from 64 bytes on also to whole cache lines (at most
// one line more). Freed blocks wait in a list of their size. Constant time.
//
// Thread safety: the owner core's alone; readers of other cores may read blocks, which never move.
// Invariants: a block is either handed out or in exactly one free list; blocks of 64 bytes and more
// start at a cache line.
class ArenaHeap {
 public:
  // `arena` must outlive the heap.
  explicit ArenaHeap(HugePageArena* arena) : arena_(arena) {}
  ArenaHeap(const ArenaHeap&) = delete;
  ArenaHeap& operator=(const ArenaHeap&) = delete;

  // At least `bytes` bytes with unspecified content; nullptr when the arena is spent.
  std::byte* Allocate(size_t bytes);
  // `bytes` as it was given to Allocate.
  void Free(std::byte* block, size_t bytes);

  template <typename T>
  T* AllocateArray(size_t count) {
    return reinterpret_cast<T*>(Allocate(count * sizeof(T)));
  }
  template <typename T>
  void FreeArray(T* block, size_t count) {
    Free(reinterpret_cast<std::byte*>(block), count * sizeof(T));
  }

  // What a block of `bytes` takes, in bytes.
  static size_t BlockBytes(size_t bytes) { return SizeOfClass(ClassOf(bytes)); }
  // Handed out now, rounding included.
  size_t live_bytes() const { return live_bytes_; }
  // That are not handed out. Not every size may be had of it.
  size_t available_bytes() const { return arena_->reserve_bytes() - live_bytes_; }
  const HugePageArena& arena() const { return *arena_; }

 private:
  struct FreeBlock {
    FreeBlock* next;
  };
  static constexpr size_t kMinBytes = 32;
  static constexpr size_t kClasses = 160;
  static constexpr size_t kMaxBytes = size_t{1} << 42;
  static size_t ClassOf(size_t bytes);
  static size_t SizeOfClass(size_t size_class);

  HugePageArena* arena_;
  std::array<FreeBlock*, kClasses> free_{};
  size_t live_bytes_ = 0;
};

}  // namespace engram
