#include "index/time_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <set>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/space_testing.h"

namespace engram {
namespace {

class TimeIndexTest : public testing::Test {
 protected:
  explicit TimeIndexTest(size_t bytes = size_t{64} << 20) : memory_(bytes), index_(&memory_.heap) {}

  int64_t WhenOf(NodeId node) const { return model_.at(node); }
  bool Add(NodeId node, int64_t when) {
    const bool added = index_.Add(node, when, [this](NodeId other) { return model_.at(other); });
    if (added) model_[node] = when;
    return added;
  }
  void Remove(NodeId node) {
    index_.Remove(node, model_.at(node));
    model_.erase(node);
  }
  void ExpectSound() const {
    const Result<void> sound =
        index_.CheckInvariants([this](NodeId node) { return model_.at(node); });
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
    ASSERT_EQ(index_.size(), model_.size());
  }
  void ExpectRange(const TimeRange& range) const {
    std::set<NodeId> wanted;
    for (const auto& [node, when] : model_) {
      if (range.Has(when)) wanted.insert(node);
    }
    std::set<NodeId> found;
    TimeIndex::Candidates candidates;
    candidates.Begin(&index_, range);
    std::span<const NodeId> nodes;
    bool are_certain = false;
    while (candidates.Next(&nodes, &are_certain)) {
      ASSERT_LE(nodes.size(), TimeIndex::kBlockNodes);
      for (const NodeId node : nodes) {
        if (are_certain) {
          ASSERT_TRUE(range.Has(WhenOf(node)));
        }
        if (!range.Has(WhenOf(node))) continue;
        ASSERT_TRUE(found.insert(node).second) << "node " << node << " came twice";
      }
    }
    ASSERT_EQ(found, wanted);
    ASSERT_GE(index_.CountAtMost(range), wanted.size());
    ASSERT_LE(index_.CountAtMost(range), wanted.size() + size_t{2} * (TimeIndex::kBlockNodes - 1));
  }

  TestHeap memory_;
  std::map<NodeId, int64_t> model_;
  TimeIndex index_;
};

TEST_F(TimeIndexTest, AnEmptyOneHasNoneAndTakesNothing) {
  ASSERT_NO_FATAL_FAILURE(ExpectRange({}));
  index_.Remove(3, 4);
  EXPECT_FALSE(index_.Has(3, 4));
  EXPECT_EQ(index_.bytes(), 0u);
  EXPECT_EQ(memory_.heap.live_bytes(), 0u);
}

TEST_F(TimeIndexTest, WhatComesInOrderTakesFourBytesANode) {
  for (NodeId node = 0; node < 100'000; ++node) ASSERT_TRUE(Add(node, node * 10LL));
  ASSERT_NO_FATAL_FAILURE(ExpectSound());
  EXPECT_LT(static_cast<double>(index_.bytes()), 4.5 * 100'000);
  ASSERT_NO_FATAL_FAILURE(ExpectRange({123'455, 123'505}));
  ASSERT_NO_FATAL_FAILURE(ExpectRange({}));
}

// Two that come in order, each at a time of its own.
TEST_F(TimeIndexTest, SoDoesWhatIsFilledInBehind) {
  for (NodeId node = 0; node < 50'000; ++node) {
    ASSERT_TRUE(Add(2 * node, 1'000'000 + node));
    ASSERT_TRUE(Add(2 * node + 1, node));
  }
  ASSERT_NO_FATAL_FAILURE(ExpectSound());
  EXPECT_LT(static_cast<double>(index_.bytes()), 5.0 * 100'000);
}

TEST_F(TimeIndexTest, WhatComesInAnyOrderTakesEightBytesANodeAtMost) {
  SplitMix64 random(5);
  for (NodeId node = 0; node < 100'000; ++node) {
    ASSERT_TRUE(Add(node, static_cast<int64_t>(random.Next() >> 1)));
  }
  ASSERT_NO_FATAL_FAILURE(ExpectSound());
  EXPECT_LT(static_cast<double>(index_.bytes()), 8.5 * 100'000);
}

TEST_F(TimeIndexTest, ManyOfOneTimeAreToldApartByTheirNumbers) {
  SplitMix64 random(6);
  for (int i = 0; i < 5'000; ++i) {
    const auto node = static_cast<NodeId>(random.Below(4'000));
    if (model_.contains(node)) {
      Remove(node);
    } else {
      ASSERT_TRUE(Add(node, 7));
    }
  }
  ASSERT_NO_FATAL_FAILURE(ExpectSound());
  ASSERT_NO_FATAL_FAILURE(ExpectRange({7, 8}));
  ASSERT_NO_FATAL_FAILURE(ExpectRange({8, 9}));
}

TEST_F(TimeIndexTest, TheEdgesOfTimeAreTimes) {
  constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  ASSERT_TRUE(Add(1, kLeast));
  ASSERT_TRUE(Add(2, kMost));
  ASSERT_TRUE(Add(3, 0));
  ASSERT_NO_FATAL_FAILURE(ExpectRange({kLeast, kLeast + 1}));
  ASSERT_NO_FATAL_FAILURE(ExpectRange({kMost, kMost}));
  ASSERT_NO_FATAL_FAILURE(ExpectRange({0, kMost}));
  ASSERT_NO_FATAL_FAILURE(ExpectRange({5, 5}));
  ASSERT_NO_FATAL_FAILURE(ExpectRange({5, 4}));
}

TEST_F(TimeIndexTest, RandomProgramsAgreeWithAMap) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    SplitMix64 random(seed);
    const uint64_t times = seed % 3 == 0 ? 50 : 100'000;
    for (int step = 0; step < 20'000; ++step) {
      const auto node = static_cast<NodeId>(random.Below(20'000));
      // Mostly added, then mostly taken out, and so on.
      const bool adds = (random.Below(4) != 0) == (step / 5'000 % 2 == 0);
      if (adds && !model_.contains(node)) {
        const int64_t when = seed % 2 == 0 ? static_cast<int64_t>(random.Below(times)) : step;
        ASSERT_TRUE(Add(node, when));
      } else if (!adds && !model_.empty()) {
        const auto found = model_.lower_bound(node);
        Remove(found == model_.end() ? model_.begin()->first : found->first);
      }
      if (step % 1'000 == 0) {
        ASSERT_NO_FATAL_FAILURE(ExpectSound());
        const auto from = static_cast<int64_t>(random.Below(times));
        ASSERT_NO_FATAL_FAILURE(
            ExpectRange({from, from + static_cast<int64_t>(random.Below(times))}));
      }
    }
    while (!model_.empty()) Remove(model_.begin()->first);
    ASSERT_NO_FATAL_FAILURE(ExpectSound());
    ASSERT_EQ(memory_.heap.live_bytes(), index_.bytes());
    ASSERT_LT(index_.bytes(), 512u);
  }
}

// Whatever step it is that finds no memory.
TEST_F(TimeIndexTest, WhereMemoryIsSpentNothingHasChanged) {
  for (const size_t left : {size_t{0}, size_t{700}, size_t{5'000}, size_t{40'000}}) {
    TestHeap memory(size_t{4} << 20);
    memory.LeaveOnly(left);
    std::map<NodeId, int64_t> model;
    {
      TimeIndex index(&memory.heap);
      SplitMix64 random(left);
      const auto when_of = [&model](NodeId node) { return model.at(node); };
      int refused = 0;
      for (NodeId node = 0; node < 20'000; ++node) {
        const auto when = static_cast<int64_t>(random.Below(1'000));
        if (index.Add(node, when, when_of)) {
          model[node] = when;
        } else {
          ++refused;
        }
        if (random.Below(200) != 0) continue;
        ASSERT_TRUE(index.CheckInvariants(when_of).has_value());
        ASSERT_EQ(index.size(), model.size());
        for (int n = 0; n < 20 && !model.empty(); ++n) {
          index.Remove(model.begin()->first, model.begin()->second);
          model.erase(model.begin());
        }
      }
      EXPECT_GT(refused, 2'000);
    }
    EXPECT_EQ(memory.heap.live_bytes(), 0u);
  }
}

}  // namespace
}  // namespace engram
