#include "index/fresh_list.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/space_testing.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr size_t kFirstRun = 64;  // places

class FreshListTest : public testing::Test {
 protected:
  FreshListTest() : memory_(size_t{1} << 20), list_(&memory_.heap, &epochs_) {}

  static bool Reserve(FreshList* list) {
    return list->Reserve([](NodeId) { return true; }, [](NodeId) { FAIL() << "all are kept"; });
  }
  void Append(NodeId node) {
    ASSERT_TRUE(Reserve(&list_));
    list_.Append(node);
  }
  static std::vector<NodeId> NodesOf(const FreshList::Snapshot& snapshot) {
    std::vector<NodeId> nodes;
    for (size_t i = 0; i < snapshot.size(); ++i) nodes.push_back(snapshot[i]);
    return nodes;
  }

  TestHeap memory_;
  ReaderEpochs epochs_{2};
  FreshList list_;
};

TEST_F(FreshListTest, AnEmptyListTakesNothingAndHasNothing) {
  EXPECT_EQ(list_.size(), 0u);
  EXPECT_EQ(list_.first(), kNoNode);
  EXPECT_EQ(list_.TakeSnapshot().size(), 0u);
  EXPECT_EQ(list_.bytes(), 0u);
  EXPECT_EQ(memory_.heap.live_bytes(), 0u);
  list_.Reclaim();
}

// Random programs against a queue, over many runs.
TEST_F(FreshListTest, IsAQueue) {
  SplitMix64 random(1);
  std::deque<NodeId> model;
  NodeId next = 0;
  for (int step = 0; step < 20'000; ++step) {
    const bool filling = step / 2'000 % 2 == 0;
    const uint64_t what = random.Below(10);
    if (what == 0 && !model.empty()) {
      ASSERT_TRUE(Reserve(&list_));
      list_.MoveFirstToEnd();
      model.push_back(model.front());
      model.pop_front();
    } else if (what < (filling ? 7 : 3)) {
      ASSERT_NO_FATAL_FAILURE(Append(next));
      model.push_back(next++);
    } else if (!model.empty()) {
      list_.PopFirst();
      model.pop_front();
    }
    ASSERT_EQ(list_.size(), model.size());
    ASSERT_EQ(list_.first(), model.empty() ? kNoNode : model.front());
    if (step % 100 == 0) {
      ASSERT_EQ(NodesOf(list_.TakeSnapshot()), std::vector<NodeId>(model.begin(), model.end()));
    }
  }
}

// Memory is what is in the list, however long it was or however much went through it.
TEST_F(FreshListTest, ALongListTakesWhatIsInIt) {
  constexpr size_t kChunkBytes = size_t{72} << 10;
  constexpr NodeId kNodes = 300'000;
  TestHeap memory(size_t{16} << 20);
  FreshList list(&memory.heap, &epochs_);
  for (NodeId node = 0; node < kNodes; ++node) {
    ASSERT_TRUE(Reserve(&list));
    list.Append(node);
    ASSERT_LE(list.bytes(), 8 * list.size() + 4 * kChunkBytes) << node;
  }
  while (list.size() > 1'000) list.PopFirst();
  EXPECT_LE(list.bytes(), 4 * kChunkBytes);
  // Through more tables than one, a reader inside now and then.
  for (NodeId node = kNodes; node < 12 * kNodes; ++node) {
    ASSERT_TRUE(Reserve(&list));
    list.Append(node);
    if (node % 50'000 == 0) epochs_.Enter(0);
    if (node % 50'000 == 20'000) epochs_.Leave(0);
    ASSERT_EQ(list.first(), node - 1'000);
    list.PopFirst();
    ASSERT_LE(list.bytes(), 7 * kChunkBytes) << node;
    ASSERT_EQ(list.bytes(), memory.heap.live_bytes());
  }
}

// A walk over a long list would hold up everything else: nothing of it is copied.
TEST_F(FreshListTest, ALongListIsAQueueThatIsNeverWalked) {
  TestHeap memory(size_t{8} << 20);
  FreshList list(&memory.heap, &epochs_);
  SplitMix64 random(2);
  std::deque<NodeId> model;
  NodeId next = 0;
  size_t walked = 0;
  const auto append = [&](NodeId node) {
    ASSERT_TRUE(list.Reserve([&](NodeId) { return ++walked > 0; }, [](NodeId) { FAIL(); }));
    list.Append(node);
  };
  const auto compare = [&] {
    const FreshList::Snapshot snapshot = list.TakeSnapshot();
    ASSERT_EQ(snapshot.size(), model.size());
    for (size_t i = 0; i < model.size(); ++i) ASSERT_EQ(snapshot[i], model[i]) << i;
  };
  for (; next < 40'000; ++next) {
    append(next);
    model.push_back(next);
  }
  walked = 0;
  // Short and long in turns, so that tables begin far from and near to the front.
  for (int turn = 0; turn < 12; ++turn) {
    const uint64_t pops_of_8 = turn % 3 == 0 ? 1 : 3 + random.Below(3);
    for (int step = 0; step < 40'000; ++step) {
      if (random.Below(8) >= pops_of_8 || model.size() < 20'000) {
        append(next);
        model.push_back(next++);
      } else if (random.Below(4) == 0) {
        ASSERT_TRUE(list.Reserve([&](NodeId) { return ++walked > 0; }, [](NodeId) { FAIL(); }));
        list.MoveFirstToEnd();
        model.push_back(model.front());
        model.pop_front();
      } else {
        list.PopFirst();
        model.pop_front();
      }
      ASSERT_EQ(list.first(), model.front());
    }
    compare();
    list.Reclaim();
  }
  EXPECT_EQ(walked, 0u);
  // Renewed from some place inside a chunk on.
  ASSERT_TRUE(list.Renew([](NodeId node) { return node % 2 == 0; }, [](NodeId) {}));
  std::erase_if(model, [](NodeId node) { return node % 2 != 0; });
  compare();
}

TEST_F(FreshListTest, ASnapshotStaysAsItWasWhateverComesAndGoes) {
  for (NodeId node = 0; node < 40; ++node) Append(node);
  const ReaderGuard guard(&epochs_, 0);
  const FreshList::Snapshot snapshot = list_.TakeSnapshot();
  const std::vector<NodeId> before = NodesOf(snapshot);
  for (NodeId node = 100; node < 2'000; ++node) {
    Append(node);
    if (node % 3 != 0) list_.PopFirst();
    if (node % 7 == 0) list_.Reclaim();
  }
  EXPECT_EQ(NodesOf(snapshot), before);
}

TEST_F(FreshListTest, ANewRunLeavesOutWhatIsNotKept) {
  const auto always = [](NodeId) {
    ADD_FAILURE() << "there is room";
    return true;
  };
  const auto never = [](NodeId) { ADD_FAILURE() << "there is room"; };
  for (NodeId node = 0; node < kFirstRun; ++node) {
    ASSERT_TRUE(list_.Reserve(always, never));
    list_.Append(node);
  }
  for (int i = 0; i < 10; ++i) list_.PopFirst();
  std::vector<NodeId> dropped;
  ASSERT_TRUE(list_.Reserve([](NodeId node) { return node % 3 == 0; },
                            [&](NodeId node) { dropped.push_back(node); }));
  std::vector<NodeId> kept = NodesOf(list_.TakeSnapshot());
  EXPECT_TRUE(std::ranges::all_of(kept, [](NodeId node) { return node % 3 == 0; }));
  EXPECT_TRUE(std::ranges::none_of(dropped, [](NodeId node) { return node % 3 == 0; }));
  EXPECT_TRUE(std::ranges::is_sorted(kept)) << "the order stays";
  kept.insert(kept.end(), dropped.begin(), dropped.end());
  std::ranges::sort(kept);
  std::vector<NodeId> all;
  for (NodeId node = 10; node < kFirstRun; ++node) all.push_back(node);
  EXPECT_EQ(kept, all) << "what was taken out before is neither kept nor dropped";
}

TEST_F(FreshListTest, IsRenewedAlsoWhereThereIsRoom) {
  for (NodeId node = 0; node < 10; ++node) Append(node);
  std::vector<NodeId> dropped;
  ASSERT_TRUE(list_.Renew([](NodeId node) { return node % 2 == 1; },
                          [&](NodeId node) { dropped.push_back(node); }));
  EXPECT_EQ(NodesOf(list_.TakeSnapshot()), (std::vector<NodeId>{1, 3, 5, 7, 9}));
  EXPECT_EQ(dropped, (std::vector<NodeId>{0, 2, 4, 6, 8}));
  FreshList none(&memory_.heap, &epochs_);
  ASSERT_TRUE(none.Renew([](NodeId) { return true; }, [](NodeId) {}));
  EXPECT_EQ(none.size(), 0u);
}

// With the spare run, and then with the one that this one replaced.
TEST_F(FreshListTest, IsRenewedAlsoWhereMemoryIsSpent) {
  for (NodeId node = 0; node < 3 * kFirstRun; ++node) Append(node);
  memory_.LeaveOnly(0);
  while (memory_.heap.Allocate(sizeof(NodeId) * 2 * kFirstRun) != nullptr) {
  }
  NodeId gone = 0;
  for (; gone < 40; ++gone) {
    const size_t before = list_.bytes();
    ASSERT_TRUE(list_.Renew([&](NodeId node) { return node != 3 * gone; }, [](NodeId) {})) << gone;
    EXPECT_LE(list_.bytes(), before);
    EXPECT_EQ(list_.size(), 3 * kFirstRun - gone - 1);
  }
  epochs_.Enter(0);
  ASSERT_TRUE(list_.Renew([](NodeId) { return true; }, [](NodeId) {}));
  EXPECT_FALSE(list_.Renew([](NodeId) { return true; }, [](NodeId) {})) << "a reader has the other";
  EXPECT_EQ(list_.size(), 3 * kFirstRun - gone);
  epochs_.Leave(0);
  list_.Reclaim();
  EXPECT_TRUE(list_.Renew([](NodeId) { return true; }, [](NodeId) {}));
}

TEST_F(FreshListTest, AnOldRunIsGivenBackOnceNoReaderCanBeInIt) {
  for (NodeId node = 0; node < kFirstRun; ++node) Append(node);
  const size_t one_run = list_.bytes() / 2;  // and a spare
  EXPECT_EQ(memory_.heap.live_bytes(), list_.bytes());
  epochs_.Enter(1);
  Append(1'000);
  const size_t held = list_.bytes();
  EXPECT_GT(held, 4 * one_run) << "the old one is kept beside two of twice its size";
  list_.Reclaim();
  EXPECT_EQ(list_.bytes(), held);
  epochs_.Enter(0);  // later: it cannot be in the old run
  epochs_.Leave(1);
  list_.Reclaim();
  EXPECT_EQ(list_.bytes(), held - one_run);
  epochs_.Leave(0);
  // Without a reader it is given back at once.
  while (list_.size() < 2 * kFirstRun) Append(7);
  Append(8);
  EXPECT_EQ(memory_.heap.live_bytes(), list_.bytes());
}

TEST_F(FreshListTest, ASpentHeapIsToldAndNothingChanges) {
  for (NodeId node = 0; node < kFirstRun; ++node) Append(node);
  const std::vector<NodeId> before = NodesOf(list_.TakeSnapshot());
  memory_.LeaveOnly(0);
  const auto never = [](NodeId) { ADD_FAILURE() << "nothing is dropped"; };
  EXPECT_FALSE(list_.Reserve([](NodeId) { return true; }, never)) << "the spare one is as full";
  EXPECT_EQ(NodesOf(list_.TakeSnapshot()), before);
  list_.PopFirst();
  EXPECT_DEATH(list_.Append(1), "Reserve comes before Append") << "places are written once";
  ASSERT_TRUE(list_.Reserve([](NodeId) { return true; }, never)) << "63 fit the spare one";
  list_.Append(64);
  EXPECT_EQ(list_.size(), kFirstRun);

  TestHeap spent(size_t{1} << 20);
  spent.LeaveOnly(0);
  FreshList none(&spent.heap, &epochs_);
  EXPECT_FALSE(Reserve(&none));
  EXPECT_EQ(none.size(), 0u);
}

TEST_F(FreshListTest, GivesAllBackAtItsEndAlsoWhatReadersHeld) {
  {
    FreshList list(&memory_.heap, &epochs_);
    epochs_.Enter(0);
    for (NodeId node = 0; node < 1'000; ++node) {
      ASSERT_TRUE(Reserve(&list));
      list.Append(node);
    }
    EXPECT_GT(list.bytes(), 0u);
    epochs_.Leave(0);
  }
  EXPECT_EQ(memory_.heap.live_bytes(), 0u);
}

TEST_F(FreshListTest, TheFirstBecomesTheLast) {
  Append(1);
  list_.MoveFirstToEnd();
  EXPECT_EQ(NodesOf(list_.TakeSnapshot()), (std::vector<NodeId>{1}));
  Append(2);
  Append(3);
  list_.MoveFirstToEnd();
  EXPECT_EQ(NodesOf(list_.TakeSnapshot()), (std::vector<NodeId>{2, 3, 1}));
}

TEST_F(FreshListTest, WithoutReserveThereIsNoRoom) {
  EXPECT_DEATH(list_.Append(1), "Reserve comes before Append");
  EXPECT_DEATH(list_.PopFirst(), "the list has a first node");
  for (NodeId node = 0; node < kFirstRun; ++node) Append(node);
  EXPECT_DEATH(list_.Append(1), "Reserve comes before Append");
  for (NodeId node = 0; node < kFirstRun; ++node) list_.PopFirst();
  EXPECT_DEATH(list_.PopFirst(), "the list has a first node");
}

// The nodes that stay are moved from the front to the end again and again, between others that come
// and go: a snapshot has each of them, once.
TEST_F(FreshListTest, NoSnapshotOfAnotherThreadMissesWhatStays) {
  constexpr NodeId kStaying = 5;
  constexpr NodeId kTurns = kSanitized ? 600'000 : 20'000'000;
  for (NodeId node = 0; node < kStaying; ++node) Append(node);
  std::atomic<bool> done{false};
  std::array<std::atomic<uint64_t>, 2> looks{};
  std::array<std::string, 2> wrong;
  std::vector<std::thread> threads;
  for (uint32_t reader = 0; reader < 2; ++reader) {
    threads.emplace_back([&, reader] {
      while (!done.load(std::memory_order_acquire) && wrong[reader].empty()) {
        const ReaderGuard guard(&epochs_, reader);
        // Many quick looks: what may go wrong does so within nanoseconds.
        for (int look = 0; look < 100; ++look) {
          const FreshList::Snapshot nodes = list_.TakeSnapshot();
          uint32_t seen = 0;
          uint32_t twice = 0;
          for (size_t i = 0; i < nodes.size(); ++i) {
            if (nodes[i] >= kStaying) continue;
            twice |= seen & 1U << nodes[i];
            seen |= 1U << nodes[i];
          }
          if (twice != 0) wrong[reader] = "a node twice";
          if (seen != (1U << kStaying) - 1) wrong[reader] = "a node missed";
        }
        looks[reader].fetch_add(1, std::memory_order_relaxed);
      }
    });
  }
  for (NodeId turn = 0; turn < kTurns; ++turn) {
    // A reader that is not running just now holds the old runs.
    while (!Reserve(&list_)) {
      list_.Reclaim();
      std::this_thread::yield();
    }
    if (list_.first() < kStaying) {
      list_.MoveFirstToEnd();
    } else {
      list_.PopFirst();
    }
    if (turn % 3 == 0 && Reserve(&list_)) list_.Append(kStaying + turn);
    if (turn % 50 == 0) list_.Reclaim();
    while (turn == kTurns / 2 && (looks[0] == 0 || looks[1] == 0)) std::this_thread::yield();
  }
  done.store(true, std::memory_order_release);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong[0], "");
  EXPECT_EQ(wrong[1], "");
}

}  // namespace
}  // namespace engram
