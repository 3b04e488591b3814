#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "src/core/spsc_ring.h"

namespace engram {

// What a walk knows of a node that it has evaluated, in 32 bits, nearest first as a number:
//   18 bits  the distance as an ordered number: sign, exponent, 9 bits of mantissa
//   13 bits  the slot, which is the node's place in the order of evaluation
//    1 bit   the node has been expanded
// Distances count from a reference of the walk's, so that near it they differ by less than 2^-9 of
// how far they are from it. No two keys of a walk are equal. kNoKey is farther than every other.
using WalkKey = uint32_t;
inline constexpr WalkKey kNoKey = UINT32_MAX;
inline constexpr WalkKey kExpanded = 1;
// Slots 0 to kMaxWalkSlots - 1: with one more, a key could be kNoKey.
inline constexpr uint32_t kMaxWalkSlots = (1U << 13) - 1;
inline uint32_t SlotOf(WalkKey key) { return key >> 1 & kMaxWalkSlots; }

// The loops of WalkList, once for each instruction set. `list` starts at a cache line and has whole
// blocks of kBlockKeys; before it lies a block of zeros.
struct WalkListKernels {
  // For this machine.
  static WalkListKernels Get();

  // The keys below `bound` of slots `first_slot` to `first_slot` + `count` - 1, whose distances are
  // `distances`, in this order; returns how many. `distances` and `keys` have room for kBlockKeys
  // more than `count`.
  size_t (*keys_below)(const float* distances, size_t count, float reference, uint32_t first_slot,
                       WalkKey bound, WalkKey* keys);
  // Inserts those of `keys` that are below list[last]; the farthest drop out.
  void (*insert)(WalkKey* list, size_t blocks, size_t last, const WalkKey* keys, size_t count);
  // The places of the first key that is not expanded and of the next one in the same block, `end`
  // where there is none before `end`.
  struct Places {
    uint32_t first;
    uint32_t second;
  };
  Places (*first_open)(const WalkKey* list, size_t end);
};

// The nearest nodes that a walk has evaluated: candidates and results in one sorted array, as in
// Vamana (Subramanya et al., "DiskANN", 2019). A node below the bound that has not been expanded is
// a candidate; a live one is a result.
//
// Retired nodes take places of their own: the list is as long as it must be for `ef` others. So a
// walk through retired nodes goes as far as its live results ask for.
//
// Keys are inserted into all blocks from the last to the first, x' = max(the key before x, min(x,
// key)), without a branch: where a key belongs cannot be predicted, and a block takes a nanosecond.
//
// Thread safety: one core's alone.
// Invariants: the keys are sorted. The first size() of them hold `ef` that are not of retired
// nodes, kNoKey among them; the last of these is not of a retired node.
class WalkList {
 public:
  static constexpr size_t kBlockKeys = kCacheLineBytes / sizeof(WalkKey);
  // The most places. Beyond some hundreds a heap is faster.
  static constexpr size_t kMaxSize = 1024;
  static constexpr size_t kRetiredBytes = (kMaxWalkSlots + 1) / 8;
  static constexpr size_t kBytes = (kBlockKeys + kMaxSize) * sizeof(WalkKey) + kRetiredBytes;

  // `memory`: kBytes from a cache line on, of the caller's. Before anything else.
  void Attach(std::byte* memory);
  // An empty list. 1 <= ef <= kMaxSize.
  void Begin(uint32_t ef);

  // Keys at and beyond this one are of no use.
  WalkKey bound() const { return keys_[size_ - 1]; }
  // `ef` and the places of retired nodes.
  size_t size() const { return size_; }
  bool IsRetired(WalkKey key) const {
    const uint32_t slot = SlotOf(key);
    return retired_count_ != 0 && key != kNoKey && (retired_[slot / 32] >> slot % 32 & 1) != 0;
  }
  // The first size() places, nearest first.
  std::span<const WalkKey> keys() const { return {keys_, size_}; }

  // See WalkListKernels.
  size_t KeysBelowBound(const float* distances, size_t count, float reference, uint32_t first_slot,
                        WalkKey* keys) const {
    return kernels_.keys_below(distances, count, reference, first_slot, bound(), keys);
  }
  // Those of live nodes; what is not below the bound is left out.
  void Insert(const WalkKey* keys, size_t count) {
    if (retired_count_ == 0) {
      kernels_.insert(keys_, blocks(), size_ - 1, keys, count);
    } else {
      InsertAmongRetired(keys, count);
    }
  }
  // False where the list would be longer than kMaxSize; nothing has changed then. `key` is below
  // the bound.
  bool InsertRetired(WalkKey key);

  // Marks the nearest candidate as expanded. False when there is none. `*runner_up` is the one
  // after it, kNoKey where that is not at hand.
  bool TakeNearest(WalkKey* nearest, WalkKey* runner_up) {
    const WalkListKernels::Places places = kernels_.first_open(keys_, size_);
    if (places.first == size_) return false;
    *nearest = keys_[places.first];
    // An empty place counts as expanded.
    *runner_up = places.second == size_ ? kNoKey : keys_[places.second];
    keys_[places.first] |= kExpanded;
    return true;
  }

 private:
  size_t blocks() const { return (size_ + kBlockKeys - 1) / kBlockKeys; }
  void InsertAmongRetired(const WalkKey* keys, size_t count);

  WalkListKernels kernels_{};
  WalkKey* keys_ = nullptr;      // blocks() whole blocks
  uint32_t* retired_ = nullptr;  // a bit for each slot
  size_t size_ = 1;
  size_t retired_count_ = 0;  // below size_
};

}  // namespace engram
