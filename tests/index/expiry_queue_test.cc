#include "index/expiry_queue.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <set>
#include <utility>

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

}  // namespace
}  // namespace engram
