#include "src/core/slot_slab.h"

#include "src/core/check.h"
#include "src/core/spsc_ring.h"

namespace engram {

Result<SlotSlab> SlotSlab::Create(std::span<const SlotClass> classes, HugePagePolicy huge_pages,
                                  int numa_node) {
  CHECK(!classes.empty() && classes.size() <= kMaxClasses, "1 to 8 slot classes");
  size_t bytes = 0;
  for (const SlotClass& c : classes) bytes += c.slot_bytes * c.count;
  auto arena = HugePageArena::Create(
      {.reserve_bytes = bytes, .huge_pages = huge_pages, .numa_node = numa_node});
  if (!arena) return std::unexpected(arena.error());
  SlotSlab slab(*std::move(arena));
  for (const SlotClass& c : classes) {
    CHECK(c.slot_bytes > 0 && c.slot_bytes % kCacheLineBytes == 0, "slots are whole cache lines");
    CHECK(slab.classes_ == 0 || slab.pools_[slab.classes_ - 1].slot_bytes < c.slot_bytes,
          "slot classes rise");
    CHECK(c.count > 0 && c.count <= kIndexMask, "slot count out of range");
    Pool& pool = slab.pools_[slab.classes_++];
    pool.slot_bytes = c.slot_bytes;
    pool.count = c.count;
    pool.base = slab.arena_.Allocate(c.slot_bytes * c.count, kCacheLineBytes);
    CHECK(pool.base != nullptr, "the arena was sized for all slots");
    pool.free.reserve(c.count);
    for (uint32_t i = c.count; i > 0; --i) pool.free.push_back(i - 1);
    pool.held.resize((size_t{c.count} + 63) / 64);
    slab.total_slots_ += c.count;
  }
  return slab;
}

SlotId SlotSlab::Acquire(size_t bytes, uint32_t keep_free_percent) {
  for (size_t c = 0; c < classes_; ++c) {
    Pool& pool = pools_[c];
    if (bytes > pool.slot_bytes) continue;
    if (pool.free.size() * 100 <= pool.count * keep_free_percent) return kNoSlot;
    const uint32_t index = pool.free.back();
    pool.free.pop_back();
    pool.held[index / 64] |= uint64_t{1} << (index % 64);
    return static_cast<SlotId>(c << kIndexBits) | index;
  }
  return kNoSlot;
}

void SlotSlab::Release(SlotId slot) {
  CHECK(slot >> kIndexBits < classes_, "not a slot of this slab");
  Pool& pool = pools_[slot >> kIndexBits];
  const uint32_t index = slot & kIndexMask;
  CHECK(index < pool.count, "not a slot of this slab");
  const uint64_t bit = uint64_t{1} << (index % 64);
  CHECK((pool.held[index / 64] & bit) != 0, "a slot was released twice");
  pool.held[index / 64] &= ~bit;
  // push_back stays within what Create reserved: no allocation.
  pool.free.push_back(index);
}

uint32_t SlotSlab::SlotsFor(size_t bytes) const {
  for (size_t c = 0; c < classes_; ++c) {
    if (bytes <= pools_[c].slot_bytes) return static_cast<uint32_t>(pools_[c].count);
  }
  return 0;
}

uint32_t SlotSlab::free_slots() const {
  size_t free = 0;
  for (size_t c = 0; c < classes_; ++c) free += pools_[c].free.size();
  return static_cast<uint32_t>(free);
}

}  // namespace engram
