#include "index/fair_queue.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "src/core/hash.h"

namespace engram {
namespace {

FairQueue::Item ItemOf(uint32_t number) { return {ProducerId(0), SlotId(number)}; }

std::vector<uint32_t> TakeAll(FairQueue* queue) {
  std::vector<uint32_t> taken;
  while (const auto item = queue->Pop()) taken.push_back(item->slot);
  return taken;
}

TEST(FairQueueTest, OneSessionComesInItsOrder) {
  FairQueue queue(100);
  EXPECT_EQ(queue.Pop().has_value(), false);
  std::vector<uint32_t> pushed;
  for (uint32_t i = 0; i < 100; ++i) {
    queue.Push(3, 7, ItemOf(i));
    pushed.push_back(i);
  }
  EXPECT_EQ(queue.size(), 100u);
  EXPECT_EQ(queue.WaitingOf(3), 100u);
  EXPECT_EQ(queue.WaitingOf(4), 0u);
  EXPECT_EQ(TakeAll(&queue), pushed);
  EXPECT_EQ(queue.size(), 0u);
  EXPECT_EQ(queue.spaces(), 0u);
}

// Who comes into a long line of another space waits for one turn of it, not for the line.
TEST(FairQueueTest, AQuietSpaceWaitsForOneTurnOfANoisyOne) {
  FairQueue queue(2'000);
  for (uint32_t i = 0; i < 1'000; ++i) queue.Push(0, i % 50, ItemOf(i));
  for (uint32_t i = 0; i < 3; ++i) (void)queue.Pop();
  queue.Push(1, 60, ItemOf(5'000));
  EXPECT_EQ(queue.spaces(), 2u);
  uint32_t before = 0;
  while (queue.Pop()->slot != 5'000) ++before;
  EXPECT_LT(before, FairQueue::kSpaceTurn);
}

TEST(FairQueueTest, AQuietSessionWaitsForOneTurnOfEachOther) {
  FairQueue queue(2'000);
  for (uint32_t i = 0; i < 1'000; ++i) queue.Push(0, i % 3, ItemOf(i));
  queue.Push(0, 9, ItemOf(5'000));
  uint32_t before = 0;
  while (queue.Pop()->slot != 5'000) ++before;
  EXPECT_LE(before, 3 * FairQueue::kSessionTurn);
}

// A space with many sessions gets no more than one with few.
TEST(FairQueueTest, SpacesShareAlikeWhateverTheirSessions) {
  FairQueue queue(10'000);
  std::map<uint32_t, uint32_t> space_of;
  uint32_t next = 0;
  for (uint32_t i = 0; i < 4'000; ++i) {
    queue.Push(0, i % 200, ItemOf(next));
    space_of[next++] = 0;
    queue.Push(1, 500, ItemOf(next));
    space_of[next++] = 1;
  }
  std::map<uint32_t, uint32_t> taken;
  for (int i = 0; i < 3'200; ++i) ++taken[space_of[queue.Pop()->slot]];
  EXPECT_EQ(taken[0], 1'600u);
  EXPECT_EQ(taken[1], 1'600u);
}

// Random pushes and pops beside deques: nothing is lost or doubled, each session keeps its order,
// and nobody who waits is passed over for longer than a turn of each other.
TEST(FairQueueTest, AgreesWithAModelOfDeques) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SplitMix64 random(seed);
    FairQueue queue(500);
    std::map<uint32_t, std::deque<uint32_t>> model;  // by session
    std::map<uint32_t, uint32_t> session_of;         // by number
    std::map<uint32_t, uint32_t> passed;             // by space that waits
    const uint32_t spaces = 1 + random.Next() % 6;
    const auto space_of = [&](uint32_t session) { return session % spaces; };
    uint32_t next = 0;
    for (int step = 0; step < 20'000; ++step) {
      const bool pushes = random.Next() % 100 < (step / 1'000 % 2 == 0 ? 60 : 40);
      if (pushes && queue.size() < queue.capacity()) {
        // The first session of each space is the noisy one.
        const uint32_t session =
            random.Next() % 3 == 0 ? random.Next() % 40 : random.Next() % spaces;
        model[session].push_back(next);
        session_of[next] = session;
        queue.Push(space_of(session), session, ItemOf(next++));
        continue;
      }
      const auto item = queue.Pop();
      const bool any = std::ranges::any_of(model, [](const auto& e) { return !e.second.empty(); });
      ASSERT_EQ(item.has_value(), any);
      if (!item) continue;
      const uint32_t number = item->slot;
      const uint32_t session = session_of.at(number);
      ASSERT_EQ(model[session].front(), number);
      model[session].pop_front();
      std::map<uint32_t, uint32_t> waiting;
      for (const auto& [each, line] : model) {
        if (!line.empty()) waiting[space_of(each)] += static_cast<uint32_t>(line.size());
      }
      ASSERT_EQ(queue.spaces(), waiting.size());
      for (uint32_t space = 0; space < spaces; ++space) {
        ASSERT_EQ(queue.WaitingOf(space), waiting.contains(space) ? waiting[space] : 0);
        if (space == space_of(session) || !waiting.contains(space)) {
          passed[space] = 0;
        } else {
          ASSERT_LE(++passed[space], spaces * FairQueue::kSpaceTurn);
        }
      }
    }
  }
}

}  // namespace
}  // namespace engram
