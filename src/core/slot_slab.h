#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "src/core/huge_page_arena.h"
#include "src/core/result.h"

namespace engram {

// Names a slot of one slab: size class in the upper 4 bits, index below.
using SlotId = uint32_t;
inline constexpr SlotId kNoSlot = UINT32_MAX;

// One size of slot: how large and how many.
struct SlotClass {
  size_t slot_bytes = 0;
  uint32_t count = 0;
};

// The slots into which one core copies what it hands to other cores. All are made at the start.
//
// Thread safety: Acquire and Release are the owner core's alone. At may be called by whoever holds
// a slot's number, which travels by ring; the ring orders the accesses.
// Invariants: a slot is either free (owner's list) or held by exactly one party.
class SlotSlab {
 public:
  // `classes` rise in slot_bytes (multiples of 64); at most 8 of them.
  static Result<SlotSlab> Create(std::span<const SlotClass> classes, HugePagePolicy huge_pages,
                                 int numa_node);
  SlotSlab(SlotSlab&&) noexcept = default;
  SlotSlab& operator=(SlotSlab&&) noexcept = default;

  // A slot of at least `bytes`, or kNoSlot when that size is used up but for `keep_free_percent`
  // of its slots (the room that is kept for requests that go first). A smaller observation never
  // takes a larger one's place, so a flood of one size does not shut out the others.
  SlotId Acquire(size_t bytes, uint32_t keep_free_percent = 0);
  // `slot` was acquired and not released since.
  void Release(SlotId slot);

  std::byte* At(SlotId slot) const {
    const Pool& pool = pools_[slot >> kIndexBits];
    return pool.base + size_t{slot & kIndexMask} * pool.slot_bytes;
  }
  size_t SlotBytes(SlotId slot) const { return pools_[slot >> kIndexBits].slot_bytes; }

  size_t max_slot_bytes() const { return pools_[classes_ - 1].slot_bytes; }
  uint32_t total_slots() const { return total_slots_; }
  // Slots of the size that `bytes` would take, free or not.
  uint32_t SlotsFor(size_t bytes) const;
  uint32_t free_slots() const;
  PageKind page_kind() const { return arena_.page_kind(); }

 private:
  static constexpr int kIndexBits = 28;
  static constexpr uint32_t kIndexMask = (1u << kIndexBits) - 1;
  static constexpr size_t kMaxClasses = 8;
  struct Pool {
    std::byte* base = nullptr;
    size_t slot_bytes = 0;
    size_t count = 0;
    std::vector<uint32_t> free;  // Stack, so that the warmest slot is taken first.
    std::vector<uint64_t> held;  // A bit a slot, so that a second release is caught at once.
  };

  explicit SlotSlab(HugePageArena arena) : arena_(std::move(arena)) {}

  HugePageArena arena_;
  std::array<Pool, kMaxClasses> pools_{};
  size_t classes_ = 0;
  uint32_t total_slots_ = 0;
};

}  // namespace engram
