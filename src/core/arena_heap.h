#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "src/core/huge_page_arena.h"

namespace engram {

// Blocks of any size out of one arena, without malloc: sizes are rounded up to 8 bytes, beyond 48
// to whole cache lines, and beyond 2 KiB to one of 32 steps a power of two (at most 3.1 % more than
// asked). Freed blocks wait in a list of their size. Constant time.
//
// Allocate takes, in this order:
// 1. A free block of its size.
// 2. A part of a free block that is at least kGenerous times as large, and 1 KiB.
// 3. New memory of the arena.
// 4. A part of any larger free block: the smallest that there is.
// Parts of a line are made together, as many as fill whole lines.
//
// What is left of a block that was cut is free in pieces, without loss; pieces are never joined
// again. That stays bounded for as long as it runs, since blocks are cut, or taken of the arena,
// for a size only while all of that size is handed out: no size grows by more than a few blocks
// beyond what was once needed of it. Large blocks that are wanted again come out of the arena
// again, once for each time that smaller sizes have grown into them, instead of having these grow
// out of the arena. Step 4 happens instead of a refusal.
//
// Thread safety: the owner core's alone; readers of other cores may read blocks, which never move.
// Invariants: a block is either handed out or in exactly one free list; blocks of 64 bytes and more
// start at a cache line; what was taken of the arena is whole cache lines, and either handed out or
// in a list.
class ArenaHeap {
 public:
  // `arena` must outlive the heap.
  explicit ArenaHeap(HugePageArena* arena) : arena_(arena) {}
  ArenaHeap(const ArenaHeap&) = delete;
  ArenaHeap& operator=(const ArenaHeap&) = delete;

  // At least `bytes` bytes with unspecified content; nullptr when the arena is spent and no free
  // block is large enough.
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
  // Taken of the arena and not handed out.
  size_t free_bytes() const { return free_bytes_; }
  // That are not handed out. Not every size may be had of it.
  size_t available_bytes() const { return arena_->reserve_bytes() - live_bytes_; }
  const HugePageArena& arena() const { return *arena_; }

 private:
  struct FreeBlock {
    FreeBlock* next;
  };
  static constexpr size_t kMinBytes = 16;
  static constexpr size_t kMaxBytes = size_t{1} << 42;
  static constexpr size_t kClasses = 1'032;
  static constexpr size_t kNoClass = kClasses;
  static constexpr size_t kClassesInWord = 64;
  static constexpr size_t kGenerous = 4;
  // More than that of a block that small parts were cut of would be left to no other size.
  static constexpr size_t kLeastGenerous = 1'024;
  // Of blocks up to kLargestInFew bytes so many are cut at once.
  static constexpr size_t kLargestInFew = 16'384;
  static constexpr size_t kFewest = 16;
  static constexpr size_t kMost = 32;
  static size_t ClassOf(size_t bytes);
  static size_t LargestClassWithin(size_t bytes);
  static size_t SizeOfClass(size_t size_class);
  size_t FirstFreeFrom(size_t size_class) const;
  void Push(size_t size_class, std::byte* block);
  std::byte* Pop(size_t size_class);
  std::byte* TakeLines(size_t size_class);
  std::byte* TakePart(size_t size_class);
  std::byte* CutLines(size_t from, size_t size_class);
  void FileLines(std::byte* from, size_t bytes);

  HugePageArena* arena_;
  std::array<FreeBlock*, kClasses> free_{};
  std::array<uint64_t, (kClasses + kClassesInWord - 1) / kClassesInWord> has_free_{};  // bits
  size_t live_bytes_ = 0;
  size_t free_bytes_ = 0;
};

}  // namespace engram
