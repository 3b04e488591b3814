#include "index/walk_list.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <array>

#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace engram {
namespace {

constexpr size_t kBlockKeys = WalkList::kBlockKeys;

class WalkListTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    hwy::SetSupportedTargetsForTest(GetParam());
    list_.Attach(memory_.data());
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }

  alignas(kCacheLineBytes) std::array<std::byte, WalkList::kBytes> memory_;
  WalkList list_;
};

INSTANTIATE_TEST_SUITE_P(Targets, WalkListTest,
                         testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const testing::TestParamInfo<int64_t>& target) {
                           return std::string(hwy::TargetName(target.param));
                         });

WalkKey Key(uint32_t distance, uint32_t slot) { return distance << 14 | slot << 1; }

// The bits of a float, ordered, cut to 18.
uint32_t OrderedBits(float distance) {
  uint32_t bits = 0;
  std::memcpy(&bits, &distance, sizeof(bits));
  return (bits >> 31 != 0 ? ~bits : bits | 1U << 31) >> 14;
}

TEST_P(WalkListTest, KeysAreThoseBelowTheBoundInOrder) {
  std::mt19937 random(1);
  for (size_t round = 0; round < 2'000; ++round) {
    const size_t count = random() % 130;
    std::vector<float> distances(count + kBlockKeys);
    std::normal_distribution<float> normal(round % 3 == 0 ? 0.0F : 5.0F);
    for (float& distance : distances) distance = normal(random);
    if (count > 5) {
      distances[1] = 0;
      distances[2] = -0.0F;
      distances[3] = std::numeric_limits<float>::max();
      distances[4] = std::numeric_limits<float>::infinity();
      distances[5] = -std::numeric_limits<float>::max();
    }
    const float reference = round % 2 == 0 ? 0.0F : 4.5F;
    const uint32_t first_slot = random() % (kMaxWalkSlots - 130);
    // A list whose bound is somewhere among them.
    list_.Begin(1);
    if (round % 5 != 0) {
      const WalkKey bound = Key(OrderedBits(normal(random) - reference), random() % kMaxWalkSlots);
      list_.Insert(&bound, 1);
    }
    std::vector<WalkKey> expected;
    for (size_t i = 0; i < count; ++i) {
      const WalkKey key =
          Key(OrderedBits(distances[i] - reference), first_slot + static_cast<uint32_t>(i));
      if (key < list_.bound()) expected.push_back(key);
    }
    std::vector<WalkKey> keys(count + kBlockKeys);
    keys.resize(list_.KeysBelowBound(distances.data(), count, reference, first_slot, keys.data()));
    ASSERT_EQ(keys, expected) << round;
    for (const WalkKey key : keys) {
      ASSERT_GE(SlotOf(key), first_slot);
      ASSERT_LT(SlotOf(key), first_slot + count);
      ASSERT_EQ(key & kExpanded, 0u);
    }
  }
}

TEST_P(WalkListTest, KeysAreOrderedAsTheDistancesAreFromTheReference) {
  const std::vector<float> ascending = {-std::numeric_limits<float>::infinity(),
                                        -3e38F,
                                        -100,
                                        -2,
                                        -1.5F,
                                        -1e-30F,
                                        0,
                                        1e-30F,
                                        1e-3F,
                                        0.5F,
                                        0.501F,
                                        0.503F,
                                        1,
                                        1e10F,
                                        3e38F,
                                        std::numeric_limits<float>::infinity()};
  std::vector<float> distances = ascending;
  distances.resize(ascending.size() + kBlockKeys);
  list_.Begin(1);
  std::vector<WalkKey> keys(ascending.size() + kBlockKeys);
  ASSERT_EQ(list_.KeysBelowBound(distances.data(), ascending.size(), 0, 7, keys.data()),
            ascending.size());
  for (size_t i = 1; i < ascending.size(); ++i) {
    EXPECT_LT(keys[i - 1] >> 14, keys[i] >> 14) << ascending[i];
  }
  EXPECT_LT(keys[ascending.size() - 1], kNoKey);
}

// The list against a sorted vector, with retired nodes or without, expansions between.
TEST_P(WalkListTest, HoldsTheNearestLiveKeysAndTheRetiredOnesBeforeThem) {
  std::mt19937 random(2);
  for (const uint32_t ef : {1U, 2U, 15U, 16U, 17U, 32U, 100U, 512U}) {
    for (const uint32_t retired_in_ten : {0U, 1U, 5U, 9U}) {
      list_.Begin(ef);
      EXPECT_EQ(list_.bound(), kNoKey);
      struct Entry {
        WalkKey key;
        bool retired;
        bool expanded;
      };
      std::vector<Entry> model;
      // Up to the ef-th live entry.
      const auto trim = [&] {
        size_t live = 0;
        for (size_t i = 0; i < model.size(); ++i) {
          live += static_cast<size_t>(!model[i].retired);
          if (live == ef) model.resize(i + 1);
        }
        return live >= ef;
      };
      bool is_full = false;
      for (uint32_t slot = 0; slot < 2'000; ++slot) {
        const WalkKey key = Key(1'000 + random() % 5'000, slot);
        const bool retired = random() % 10 < retired_in_ten;
        if (is_full) {
          // Without the mark of an expansion, which a bound has too.
          ASSERT_EQ(list_.bound() | kExpanded, model.back().key | kExpanded);
        } else {
          ASSERT_EQ(list_.bound(), kNoKey);
        }
        bool fits = true;
        if (!retired) {
          list_.Insert(&key, 1);
        } else if (key < list_.bound()) {
          const bool has_room = list_.size() < WalkList::kMaxSize;
          fits = list_.InsertRetired(key);
          ASSERT_EQ(fits, has_room);
        }
        if (fits) {
          const auto at = std::upper_bound(
              model.begin(), model.end(), key,
              [](WalkKey wanted, const Entry& entry) { return wanted < entry.key; });
          model.insert(at, Entry{key, retired, false});
          is_full = trim();
        }
        if (slot % 3 == 0) {
          WalkKey nearest = 0;
          WalkKey runner_up = 0;
          const bool took = list_.TakeNearest(&nearest, &runner_up);
          const auto open = [](const Entry& entry) { return !entry.expanded; };
          const auto first = std::find_if(model.begin(), model.end(), open);
          ASSERT_EQ(took, first != model.end());
          if (took) {
            ASSERT_EQ(nearest, first->key);
            first->expanded = true;
            const auto second = std::find_if(first + 1, model.end(), open);
            if (runner_up != kNoKey) {
              ASSERT_TRUE(second != model.end());
              ASSERT_EQ(runner_up, second->key);
            }
          }
        }
        size_t place = 0;
        for (const WalkKey found : list_.keys()) {
          if (place == model.size()) {
            ASSERT_EQ(found, kNoKey);
            continue;
          }
          ASSERT_EQ(found, model[place].key | (model[place].expanded ? kExpanded : 0));
          ASSERT_EQ(list_.IsRetired(found), model[place].retired);
          ++place;
        }
        ASSERT_EQ(place, model.size()) << "ef " << ef << " slot " << slot;
      }
    }
  }
}

TEST_P(WalkListTest, TheRunnerUpIsTheNextCandidate) {
  list_.Begin(20);
  const WalkKey keys[] = {Key(5, 0), Key(9, 1), Key(7, 2)};
  list_.Insert(keys, 3);
  WalkKey nearest = 0;
  WalkKey runner_up = 0;
  ASSERT_TRUE(list_.TakeNearest(&nearest, &runner_up));
  EXPECT_EQ(SlotOf(nearest), 0u);
  // Where a register has fewer places the next one may be in another.
  if (runner_up != kNoKey) {
    EXPECT_EQ(SlotOf(runner_up), 2u);
  }
  ASSERT_TRUE(list_.TakeNearest(&nearest, &runner_up));
  EXPECT_EQ(SlotOf(nearest), 2u);
  ASSERT_TRUE(list_.TakeNearest(&nearest, &runner_up));
  EXPECT_EQ(SlotOf(nearest), 1u);
  EXPECT_EQ(runner_up, kNoKey);
  EXPECT_FALSE(list_.TakeNearest(&nearest, &runner_up));
}

// What a list held before does not show in the next one.
TEST_P(WalkListTest, BeginsEmpty) {
  list_.Begin(3);
  for (uint32_t slot = 0; slot < 5; ++slot) {
    if (const WalkKey key = Key(5, slot); key < list_.bound()) {
      ASSERT_TRUE(list_.InsertRetired(key));
    }
  }
  list_.Begin(40);
  for (const WalkKey key : list_.keys()) ASSERT_EQ(key, kNoKey);
  for (uint32_t slot = 0; slot < 5; ++slot) {
    const WalkKey key = Key(5, slot);
    list_.Insert(&key, 1);
    ASSERT_TRUE(list_.InsertRetired(Key(4, 100 + slot)));
    EXPECT_FALSE(list_.IsRetired(key));
    EXPECT_TRUE(list_.IsRetired(Key(4, 100 + slot)));
  }
  EXPECT_EQ(list_.size(), 45u);
}

// A target that the kernels were not compiled for would quietly be tested as another one.
TEST(WalkListTargetsTest, EachHasKernelsOfItsOwn) {
  const std::vector<int64_t> targets = hwy::SupportedAndGeneratedTargets();
  std::vector<void*> kernels;
  for (const int64_t target : targets) {
    hwy::SetSupportedTargetsForTest(target);
    kernels.push_back(reinterpret_cast<void*>(WalkListKernels::Get().insert));
  }
  std::sort(kernels.begin(), kernels.end());
  EXPECT_EQ(std::unique(kernels.begin(), kernels.end()), kernels.end());
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace
}  // namespace engram
