#include "index/expiry_queue.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "src/core/huge_page_arena.h"

namespace engram {
namespace {

class ExpiryQueueTest : public testing::Test {
 protected:
  ExpiryQueueTest()
      : arena_(*HugePageArena::Create(
            {.reserve_bytes = size_t{64} << 20, .huge_pages = HugePagePolicy::kOff})),
        heap_(&arena_) {}

  HugePageArena arena_;
  ArenaHeap heap_;
};

// Against a set of pairs: stamps that come late, of several homes, replaced and removed anywhere.
TEST_F(ExpiryQueueTest, TheOldestIsFirstWhateverCameInWhichOrder) {
  for (const uint16_t homes : {1, 3}) {
    ExpiryQueue queue(&heap_, homes);
    constexpr NodeId kNodes = 200;
    ASSERT_TRUE(queue.Reserve(kNodes));
    std::set<std::pair<CommitStamp, NodeId>> model;
    std::map<NodeId, CommitStamp> stamp_of;
    SplitMix64 random(homes);
    const auto remove = [&](NodeId node) {
      model.erase({stamp_of.at(node), node});
      stamp_of.erase(node);
    };
    CommitStamp now = 1'000;
    for (int step = 0; step < 20'000; ++step) {
      const auto node = static_cast<NodeId>(random.Next() % kNodes);
      const auto other = static_cast<NodeId>(random.Next() % kNodes);
      now += 256;
      if (!stamp_of.contains(node)) {
        ASSERT_FALSE(queue.Has(node));
        const bool is_late = random.Next() % 4 == 0;
        const CommitStamp stamp =
            (now - (is_late ? 256 * (random.Next() % 3) : 0)) / 256 * 256 + random.Next() % homes;
        queue.Add(node, stamp);
        model.emplace(stamp, node);
        stamp_of[node] = stamp;
      } else if (random.Next() % 2 == 0 && !stamp_of.contains(other)) {
        const CommitStamp stamp = stamp_of.at(node);
        queue.Replace(node, other);
        remove(node);
        model.emplace(stamp, other);
        stamp_of[other] = stamp;
      } else {
        queue.Remove(node);
        queue.Remove(node);  // Once is enough.
        remove(node);
      }
      ASSERT_EQ(queue.size(), model.size());
      if (model.empty()) {
        ASSERT_EQ(queue.oldest(), kNoNode);
      } else {
        ASSERT_EQ(queue.StampOf(queue.oldest()), model.begin()->first);
      }
      if (step % 64 == 0) {
        ASSERT_TRUE(queue.IsSound());
      }
    }
  }
}

constexpr CommitStamp StampAt(uint64_t time, uint16_t home = 0) {
  return (time << kStampShardBits) + home;
}

// A restart with fewer shards: two files of the same homes and times come one after the other.
TEST_F(ExpiryQueueTest, ASecondFileOfTheSameTimesIsNoSearch) {
  constexpr NodeId kEach = 20'000;
  ExpiryQueue queue(&heap_, 1);
  ASSERT_TRUE(queue.Reserve(2 * kEach));
  for (NodeId file : {0u, 1u}) {
    for (NodeId n = 0; n < kEach; ++n) queue.Add(file * kEach + n, StampAt(1 + 2 * n + file));
  }
  EXPECT_LE(queue.steps(), 2 * kEach * 16);
  EXPECT_EQ(queue.lists(), 2u);
  ASSERT_TRUE(queue.IsSound());
  for (CommitStamp time = 1; time <= 2 * kEach; ++time) {
    ASSERT_EQ(queue.StampOf(queue.oldest()), StampAt(time));
    queue.Remove(queue.oldest());
  }
  EXPECT_EQ(queue.lists(), 0u);
}

// Files and logs of many shards that are read side by side, each from another time on, while what
// comes overtakes what came a few before it.
TEST_F(ExpiryQueueTest, ThereAreNoMoreListsThanSourcesAndLittleIsLookedBackOver) {
  constexpr uint64_t kSources = 40;
  constexpr NodeId kEach = 1'000;
  constexpr NodeId kNodes = kSources * kEach;
  ExpiryQueue queue(&heap_, 4);
  ASSERT_TRUE(queue.Reserve(kNodes));
  SplitMix64 random(7);
  std::vector<uint64_t> times(kSources);
  for (uint64_t& time : times) time = 100 + random.Next() % 5'000;
  std::multiset<CommitStamp> model;
  for (NodeId node = 0; node < kNodes; ++node) {
    const uint64_t source = random.Next() % kSources;
    times[source] += random.Next() % 8;
    const CommitStamp stamp =
        StampAt(times[source] - random.Next() % 3, static_cast<uint16_t>(source % 4));
    queue.Add(node, stamp);
    model.insert(stamp);
  }
  EXPECT_LE(queue.lists(), kSources);
  EXPECT_LE(queue.steps(), uint64_t{kNodes} * 16);
  ASSERT_TRUE(queue.IsSound());
  for (const CommitStamp stamp : model) {
    ASSERT_EQ(queue.StampOf(queue.oldest()), stamp);
    queue.Remove(queue.oldest());
  }
}

// More sources than there may be lists: slow, and still in order.
TEST_F(ExpiryQueueTest, MoreSourcesThanLists) {
  constexpr NodeId kSources = 100;
  constexpr NodeId kEach = 40;
  ExpiryQueue queue(&heap_, 1);
  ASSERT_TRUE(queue.Reserve(kSources * kEach));
  NodeId node = 0;
  for (uint64_t source = kSources; source > 0; --source) {
    for (uint64_t n = 0; n < kEach; ++n) queue.Add(node++, StampAt(source + n * kSources));
  }
  EXPECT_LT(queue.lists(), kSources);
  ASSERT_TRUE(queue.IsSound());
  for (CommitStamp time = 1; queue.size() > 0; ++time) {
    ASSERT_EQ(queue.StampOf(queue.oldest()), StampAt(time));
    queue.Remove(queue.oldest());
  }
}

}  // namespace
}  // namespace engram
