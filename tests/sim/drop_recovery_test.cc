// Recoveries after a drop, step by step, where the programs of drop_programs_test.cc seldom come.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "src/core/space_catalogue.h"
#include "tests/sim/durable_rig.h"

namespace engram {
namespace {

class DropRecoveryTest : public testing::Test {
 protected:
  void Start(uint16_t shards) {
    DurableSetup setup = DurableRig::SmallSetup();
    setup.shards = shards;
    setup.keeper.ahead = 4;
    auto started = rig_.Start(setup);
    ASSERT_TRUE(started.has_value()) << started.error().message;
  }
  void PollShard(size_t shard) {
    rig_.clock.AdvanceNs(10 * kNanosPerMicro);
    rig_.shards->PollShard(shard);
  }
  void Poll() {
    rig_.shards->Poll();
    rig_.store->Poll();
    rig_.checkpointer->Poll([](const Note&) {});
  }
  RigSession Open(size_t shard) {
    return rig_.shards->Open(0, ++origins_, space_, {.metric = Metric::kL2, .shard = shard});
  }
  // Many, as long as they are taken; how many were.
  uint64_t Fill(RigSession* session, uint64_t most, size_t dimension) {
    const Sequence first = session->next;
    while (session->next < first + most) {
      const size_t from = rig_.shards->completions.size();
      const Sequence before = session->next;
      for (Sequence next = before; next < before + 32; ++next) {
        rig_.shards->PushObserve(
            *session, next,
            {.id = "id" + std::to_string(next), .vector = std::vector<float>(dimension, 1.0F)});
      }
      while (rig_.shards->outstanding(0) > 0) Poll();
      bool is_full = false;
      for (size_t i = from; i < rig_.shards->completions.size(); ++i) {
        const Completion& completion = rig_.shards->completions[i].second;
        if (completion.reason == RefusalReason::kNone) {
          session->next = std::max(session->next, completion.sequence + 1);
        }
        is_full = is_full || completion.reason == RefusalReason::kMemoryFull;
      }
      if (is_full) break;
    }
    return session->next - first;
  }
  void Drop() {
    rig_.shards->PushCommand(SpaceCommand::kDrop, space_);
    while (rig_.shards->commands_under_way > 0) Poll();
  }

  DurableRig rig_{1};
  std::string space_ = "s";
  Origin origins_ = 1;
};

// One shard was saved before the drop, and another one, which alone says so, after it. Wherever
// what was saved belongs, sessions as well.
TEST_F(DropRecoveryTest, WhatIsBeingLoadedGoesOnceADropIsKnown) {
  constexpr uint64_t kMany = 4'000;
  constexpr size_t before = 0;
  constexpr size_t after = 1;
  while (SpaceCatalogue::RankShards(space_, 2, 1)[0].value() != before) space_ += "s";
  // A session that the first of two shards knows, and the last of three.
  ASSERT_NO_FATAL_FAILURE(Start(3));
  ASSERT_EQ(rig_.Recover(), "");
  RigSession moves = Open(2);
  ASSERT_GE(Fill(&moves, 1, 2), 1u);
  rig_.Kill();
  ASSERT_NO_FATAL_FAILURE(Start(2));
  ASSERT_EQ(rig_.Recover(), "");
  RigSession session = Open(before);
  ASSERT_GE(Fill(&session, kMany, 2), kMany);
  RigSession other = Open(after);
  ASSERT_GE(Fill(&other, 1, 2), 1u);
  rig_.shards->Settle();
  // While one observation waits for the disk, the shard does not join.
  rig_.shards->PushObserve(session, session.next, {.id = "last", .vector = {1, 1}});
  rig_.shards->PollShard(before);
  rig_.shards->PushCommand(SpaceCommand::kDrop, space_);
  for (int polls = 0; polls < 8; ++polls) rig_.shards->PollShard(after);
  rig_.checkpointer->Request();
  const auto conduct = [this] { rig_.checkpointer->Poll([](const Note&) {}); };
  conduct();
  rig_.shards->PollShard(before);
  rig_.shards->PollShard(after);
  conduct();
  CheckpointHandoff& handoff = rig_.store->checkpoint(static_cast<uint16_t>(before));
  ASSERT_NE(handoff.save.load(), 0u);
  for (int polls = 0; polls < 10'000 && handoff.saved.load() != handoff.save.load(); ++polls) {
    PollShard(before);
  }
  ASSERT_EQ(handoff.saved.load(), handoff.save.load());
  ASSERT_EQ(rig_.shards->commands_under_way, 2u) << "it is saved as it was before";
  for (int polls = 0; polls < 10'000 && rig_.checkpointer->busy(); ++polls) Poll();
  ASSERT_EQ(rig_.checkpointer->completed(), 1u);
  ASSERT_EQ(rig_.shards->commands_under_way, 0u);

  for (const uint16_t shards : {2, 3}) {
    rig_.Kill();
    ASSERT_NO_FATAL_FAILURE(Start(shards));
    const RecoveryProgress& progress = rig_.shards->shards[before]->recovery();
    for (int polls = 0; polls < 1'000 && progress.checkpoint_bytes_read.load() == 0; ++polls) {
      PollShard(before);
    }
    ASSERT_GT(progress.checkpoint_bytes_read.load(), 0u);
    ASSERT_NE(rig_.shards->entry(space_), nullptr);
    for (int polls = 0; polls < 1'000 && rig_.shards->entry(space_) != nullptr; ++polls) {
      PollShard(after);
    }
    ASSERT_EQ(rig_.shards->entry(space_), nullptr);
    ASSERT_EQ(rig_.Recover(), "");
    EXPECT_EQ(progress.observations.load(), 0u);
    EXPECT_EQ(rig_.shards->entry(space_), nullptr);
    for (const RigSession& known : {session, moves}) {
      const size_t home = HomeOfSession(known.id).value() % shards;
      const auto resumed =
          rig_.shards->Hello(0, ++origins_, space_, {.session = known.id, .shard = home});
      EXPECT_EQ(resumed.first, RefusalReason::kSessionExpired) << home << " of " << shards;
    }
  }
  RigSession next = Open(after);
  EXPECT_EQ(Fill(&next, 32, 5), 32u);
}

// Also in a shard whose stamps are ahead of the clock, and that is not the first to join.
TEST_F(DropRecoveryTest, ADropIsLaterThanAllThatItEnds) {
  ASSERT_NO_FATAL_FAILURE(Start(2));
  ASSERT_EQ(rig_.Recover(), "");
  for (const size_t shard : {0, 1}) {
    RigSession session = Open(shard);
    ASSERT_EQ(Fill(&session, 32, 2), 32u);
  }
  rig_.clock.StepWallNs(-kNanosPerSecond);
  RigSession session = Open(0);
  rig_.shards->Settle();
  Drop();
  rig_.Kill();
  ASSERT_NO_FATAL_FAILURE(Start(2));
  // The first one has read of the drop before the other one reads anything.
  PollShard(1);
  for (int polls = 0; polls < 1'000; ++polls) PollShard(0);
  ASSERT_EQ(rig_.Recover(), "");
  EXPECT_EQ(rig_.shards->entry(space_), nullptr);
}

// Incarnations that fit the memory one after the other, and not together.
TEST_F(DropRecoveryTest, MemoryOfWhatWasDroppedIsFreeForWhatComesAfterIt) {
  ASSERT_NO_FATAL_FAILURE(Start(1));
  ASSERT_EQ(rig_.Recover(), "");
  uint64_t taken = 0;
  for (int incarnation = 0; incarnation < 4; ++incarnation) {
    if (taken > 0) Drop();
    rig_.shards->Settle();
    RigSession session = Open(0);
    taken = Fill(&session, 1'000'000, 128);
    ASSERT_GT(taken, 1'000u);
  }
  rig_.Kill();
  ASSERT_NO_FATAL_FAILURE(Start(1));
  ASSERT_EQ(rig_.Recover(), "");
  EXPECT_EQ(rig_.shards->shard->FindSpace(space_)->live(), taken);
}

}  // namespace
}  // namespace engram
