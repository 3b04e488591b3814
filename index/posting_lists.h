#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "index/chunked_array.h"
#include "src/core/arena_heap.h"
#include "src/core/spsc_ring.h"

namespace engram {

// Many lists of numbers, in no order, that are added to and taken from in constant time: for each
// number whoever keeps the list knows its place, and is told where the place changes.
//
// A list of one number takes nothing but its header. A longer one lies in blocks of a cache line,
// linked from the last to the first; all but the last are full. What is taken out of the middle is
// replaced by the last number, so no step moves more than one.
//
// Thread safety: the owner core's alone.
// Invariants: a block is in one list, or free.
class PostingLists {
 public:
  static constexpr uint32_t kInBlock = 15;

  struct List {
    uint32_t count = 0;
    uint32_t tail = 0;  // of one number: that; else the last block
  };

 private:
  struct alignas(kCacheLineBytes) Block {
    uint32_t before;
    std::array<uint32_t, kInBlock> numbers;
  };
  static_assert(sizeof(Block) == kCacheLineBytes);

 public:
  // `heap` outlives the lists.
  explicit PostingLists(ArenaHeap* heap) : blocks_(heap) {}

  // Makes sure that so many calls of Push find room. False when the heap is spent.
  bool Reserve(size_t pushes) {
    return pushes <= free_ || blocks_.Reserve(made_ + (pushes - free_));
  }
  // `moved(number, place)` is called for the number, and for another one whose place changes.
  // Reserve came before.
  template <typename Moved>
  void Push(List* list, uint32_t number, Moved&& moved) {
    if (list->count == 0) {
      *list = {.count = 1, .tail = number};
      moved(number, 0U);
      return;
    }
    const uint32_t at = list->count % kInBlock;
    if (list->count == 1) {
      const uint32_t first = list->tail;
      list->tail = TakeBlock(kNoBlock);
      blocks_[list->tail].numbers[0] = first;
      moved(first, PlaceOf(list->tail, 0));
    } else if (at == 0) {
      list->tail = TakeBlock(list->tail);
    }
    blocks_[list->tail].numbers[at] = number;
    ++list->count;
    moved(number, PlaceOf(list->tail, at));
  }
  // Takes out what is at `place`. `moved` is called for the number that comes there, if one does.
  template <typename Moved>
  void Remove(List* list, uint32_t place, Moved&& moved) {
    if (list->count == 1) {
      *list = {};
      return;
    }
    const uint32_t last = (list->count - 1) % kInBlock;
    const uint32_t tail = list->tail;
    const uint32_t number = blocks_[tail].numbers[last];
    if (place != PlaceOf(tail, last)) {
      blocks_[place / kPlaces].numbers[place % kPlaces] = number;
      moved(number, place);
    }
    --list->count;
    if (list->count == 1) {
      list->tail = blocks_[tail].numbers[0];
      moved(list->tail, 0U);
      FreeBlock(tail);
    } else if (last == 0) {
      list->tail = blocks_[tail].before;
      FreeBlock(tail);
    }
  }

  // Reads a list that does not change meanwhile.
  class Reader {
   public:
    Reader() = default;
    Reader(const PostingLists* lists, const List& list)
        : lists_(lists),
          block_(list.tail),
          left_(list.count),
          in_block_(list.count < 2 ? list.count : (list.count - 1) % kInBlock + 1),
          is_one_(list.count == 1) {}
    // The next numbers, 1 to kInBlock; none at the end. They stay until the list changes or the
    // reader is gone.
    std::span<const uint32_t> Next() {
      if (left_ == 0) return {};
      const size_t count = in_block_;
      left_ -= in_block_;
      in_block_ = kInBlock;
      if (is_one_) return {&block_, 1};
      const Block& block = lists_->blocks_[block_];
      if (left_ > 0) {
        block_ = block.before;
        __builtin_prefetch(&lists_->blocks_[block_]);
      }
      return {block.numbers.data(), count};
    }

   private:
    const PostingLists* lists_ = nullptr;
    uint32_t block_ = 0;
    uint32_t left_ = 0;
    uint32_t in_block_ = 0;
    bool is_one_ = false;
  };
  Reader Read(const List& list) const { return {this, list}; }
  // The number at a place of a list of several.
  uint32_t At(uint32_t place) const { return blocks_[place / kPlaces].numbers[place % kPlaces]; }
  // Blocks that are in lists, and bytes of all there are.
  size_t used_blocks() const { return made_ - free_; }
  size_t bytes() const { return blocks_.bytes(); }

 private:
  static constexpr uint32_t kPlaces = 16;  // numbers of places that a block takes
  static constexpr uint32_t kNoBlock = UINT32_MAX;
  static uint32_t PlaceOf(uint32_t block, uint32_t at) { return block * kPlaces + at; }

  uint32_t TakeBlock(uint32_t before) {
    uint32_t block = first_free_;
    if (block == kNoBlock) {
      block = made_++;
    } else {
      first_free_ = blocks_[block].before;
      --free_;
    }
    blocks_[block].before = before;
    return block;
  }
  void FreeBlock(uint32_t block) {
    blocks_[block].before = first_free_;
    first_free_ = block;
    ++free_;
  }

  ChunkedArray<Block> blocks_;
  uint32_t made_ = 0;
  uint32_t free_ = 0;
  uint32_t first_free_ = kNoBlock;
};

}  // namespace engram
