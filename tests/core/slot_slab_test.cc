#include "src/core/slot_slab.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace engram {
namespace {

constexpr std::array<SlotClass, 3> kClasses{{{256, 4}, {1'024, 3}, {65'536, 1}}};

SlotSlab MakeSlab(std::span<const SlotClass> classes = kClasses) {
  Result<SlotSlab> slab = SlotSlab::Create(classes, HugePagePolicy::kOff, -1);
  EXPECT_TRUE(slab.has_value());
  return *std::move(slab);
}

TEST(SlotSlabTest, GivesTheSmallestSizeThatFits) {
  SlotSlab slab = MakeSlab();
  EXPECT_EQ(slab.total_slots(), 8u);
  EXPECT_EQ(slab.free_slots(), 8u);
  EXPECT_EQ(slab.max_slot_bytes(), 65'536u);
  for (const auto& [bytes, want] : std::vector<std::pair<size_t, size_t>>{
           {0, 256}, {256, 256}, {257, 1'024}, {1'024, 1'024}, {1'025, 65'536}, {65'536, 65'536}}) {
    const SlotId slot = slab.Acquire(bytes);
    ASSERT_NE(slot, kNoSlot) << bytes;
    EXPECT_EQ(slab.SlotBytes(slot), want) << bytes;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(slab.At(slot)) % 64, 0u);
    slab.Release(slot);
  }
  EXPECT_EQ(slab.free_slots(), 8u);
}

TEST(SlotSlabTest, RefusesWhatNoSlotHolds) {
  SlotSlab slab = MakeSlab();
  EXPECT_EQ(slab.Acquire(65'537), kNoSlot);
  EXPECT_EQ(slab.Acquire(SIZE_MAX), kNoSlot);
  EXPECT_EQ(slab.free_slots(), 8u);
}

// A flood of small ones leaves the large ones free.
TEST(SlotSlabTest, AUsedUpSizeDoesNotTakeALargerOne) {
  SlotSlab slab = MakeSlab();
  for (int i = 0; i < 4; ++i) ASSERT_NE(slab.Acquire(100), kNoSlot);
  EXPECT_EQ(slab.Acquire(100), kNoSlot);
  EXPECT_EQ(slab.free_slots(), 4u);
  EXPECT_NE(slab.Acquire(1'000), kNoSlot);
}

TEST(SlotSlabTest, KeepsAShareFree) {
  const std::array<SlotClass, 1> classes{{{64, 100}}};
  SlotSlab slab = MakeSlab(classes);
  for (int i = 0; i < 90; ++i) ASSERT_NE(slab.Acquire(64, 10), kNoSlot) << i;
  EXPECT_EQ(slab.Acquire(64, 10), kNoSlot);
  for (int i = 0; i < 10; ++i) ASSERT_NE(slab.Acquire(64), kNoSlot) << i;
  EXPECT_EQ(slab.Acquire(64), kNoSlot);
}

TEST(SlotSlabTest, BehavesLikeAModel) {
  std::mt19937_64 random(1);
  SlotSlab slab = MakeSlab();
  std::map<SlotId, uint8_t> held;
  for (int step = 0; step < 20'000; ++step) {
    if (random() % 2 == 0) {
      const SlotId slot = slab.Acquire(random() % 70'000 >> (random() % 10));
      if (slot == kNoSlot) continue;
      const auto fill = static_cast<uint8_t>(random());
      ASSERT_TRUE(held.emplace(slot, fill).second) << "handed out twice";
      std::memset(slab.At(slot), fill, slab.SlotBytes(slot));
    } else if (!held.empty()) {
      auto at = held.begin();
      std::advance(at, static_cast<std::ptrdiff_t>(random() % held.size()));
      const auto [slot, fill] = *at;
      const std::byte* bytes = slab.At(slot);
      ASSERT_EQ(bytes[0], std::byte{fill});  // And each byte is like the one before it.
      ASSERT_EQ(std::memcmp(bytes, bytes + 1, slab.SlotBytes(slot) - 1), 0);
      slab.Release(slot);
      held.erase(at);
    }
    ASSERT_EQ(slab.free_slots() + held.size(), slab.total_slots());
  }
}

TEST(SlotSlabTest, MovesWithItsSlots) {
  SlotSlab first = MakeSlab();
  const SlotId slot = first.Acquire(10);
  first.At(slot)[0] = std::byte{9};
  SlotSlab second = std::move(first);
  EXPECT_EQ(second.At(slot)[0], std::byte{9});
  second.Release(slot);
  EXPECT_EQ(second.free_slots(), 8u);
}

TEST(SlotSlabTest, AnImpossibleSizeIsAnError) {
  const std::array<SlotClass, 1> classes{{{size_t{1} << 40, 1u << 20}}};
  const Result<SlotSlab> slab = SlotSlab::Create(classes, HugePagePolicy::kOff, -1);
  ASSERT_FALSE(slab.has_value());
  EXPECT_EQ(slab.error().code, ErrorCode::kResourceExhausted);
}

// While others are held, so that a count alone would not notice.
TEST(SlotSlabDeathTest, CatchesASecondReleaseAtOnce) {
  SlotSlab slab = MakeSlab();
  const SlotId first = slab.Acquire(10);
  ASSERT_NE(slab.Acquire(10), kNoSlot);
  slab.Release(first);
  EXPECT_DEATH(slab.Release(first), "released twice");
}

TEST(SlotSlabDeathTest, CatchesNumbersThatAreNoSlots) {
  SlotSlab slab = MakeSlab();
  ASSERT_EQ(slab.Acquire(10) >> 28, 0u);
  EXPECT_DEATH(slab.Release(kNoSlot), "not a slot");
  EXPECT_DEATH(slab.Release(4), "not a slot") << "past the class's last";
  EXPECT_DEATH(slab.Release(3u << 28), "not a slot") << "a class that is not there";
  EXPECT_DEATH(slab.Release((1u << 28) | 3), "not a slot");
}

TEST(SlotSlabDeathTest, ClassesRiseInWholeCacheLines) {
  const std::array<SlotClass, 2> falling{{{256, 1}, {128, 1}}};
  EXPECT_DEATH((void)SlotSlab::Create(falling, HugePagePolicy::kOff, -1), "rise");
  const std::array<SlotClass, 1> odd{{{100, 1}}};
  EXPECT_DEATH((void)SlotSlab::Create(odd, HugePagePolicy::kOff, -1), "whole cache lines");
}

}  // namespace
}  // namespace engram
