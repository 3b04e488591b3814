// Rounds of checkpoints, step by step: what they must not lose however their steps and those of the
// shards fall, and how they fail, are held and are stopped.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>

#include "src/checkpoint_manifest.h"
#include "src/core/counters.h"
#include "src/core/file_lease.h"
#include "src/core/log_files.h"
#include "tests/sim/checkpoint_steps.h"
#include "tests/sim/program_seeds.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

class CheckpointRoundsTest : public CheckpointSteps {};
class CheckpointRoundsOfTwoTest : public TwoShardSteps {};

// An upsert is under way while a later delete of the same id is answered. Its record is replayed,
// the delete's is not: so the delete must be in what was saved.
TEST_F(CheckpointRoundsOfTwoTest, ADeleteThatIsNotReplayedWinsAgainstAnUpsertThatIs) {
  ASSERT_EQ(Start(), "");
  const std::string id = IdOf(1);
  ShardRig& shards = *rig_.shards;
  Store(id, "first");
  const SlotId upsert = shards.PushObserve(Alone(0), 1'000'000, Upsert(id, "second"));
  shards.clock.AdvanceNs(10'000);
  shards.PollShard(0);  // It is taken; its record is not durable yet.
  shards.clock.AdvanceNs(10'000);
  const SlotId removal =
      shards.PushObserve(Alone(1), 1'000'001, {.op = ObservationOp::kDelete, .id = id});
  const auto answered = [&](SlotId slot) {
    return std::ranges::any_of(shards.completions, [&](const auto& each) {
      return each.second.kind == CompletionKind::kObserve && each.second.slot == slot;
    });
  };
  shards.completions.clear();
  for (int i = 0; i < 10'000 && !answered(removal); ++i) {
    shards.clock.AdvanceNs(10'000);
    shards.PollShard(1);
  }
  ASSERT_TRUE(answered(removal));
  ASSERT_FALSE(answered(upsert));
  for (int i = 0; i < 1'000; ++i) {
    shards.clock.AdvanceNs(10'000);
    shards.PollShard(1);
  }
  rig_.checkpointer->Request();
  PollCheckpointer();
  shards.PollShard(1);
  shards.PollShard(0);
  for (int i = 0; i < 10'000; ++i) Poll();
  ASSERT_TRUE(answered(upsert));
  EXPECT_EQ(PayloadOf(id), "");
  for (int i = 0; i < 10'000 && rig_.checkpointer->busy(); ++i) {
    PollCheckpointer();
    Poll();
  }
  ASSERT_EQ(rig_.checkpointer->completed(), 1u);
  ASSERT_EQ(StartAgain(), "");
  EXPECT_EQ(PayloadOf(id), "");
}

// An update of an id that has moved leaves a tombstone where it was, with the update's own stamp.
// With another number of shards both come to the same one, the tombstone maybe first.
TEST_F(CheckpointRoundsOfTwoTest, AnObservationStandsBeforeTheTombstoneThatItHasLeft) {
  setup_.spaces[0].second.partitions = 1;
  ASSERT_EQ(Start(), "");
  ASSERT_TRUE(rig_.shards->entry("space")->Grow(1));
  ASSERT_NO_FATAL_FAILURE(BeginCheckpoint());
  for (int i = 0; i < 40; ++i) Store("id" + std::to_string(i), std::to_string(i));
  ASSERT_TRUE(EndCheckpoint());
  for (const uint16_t shards : {3, 1, 2, 4}) {
    SCOPED_TRACE(shards);
    setup_.shards = setup_.max_partitions = shards;
    ASSERT_EQ(StartAgain(), "");
    for (int i = 0; i < 40; ++i) {
      EXPECT_EQ(PayloadOf("id" + std::to_string(i)), std::to_string(i)) << "id" << i;
    }
  }
}

// What was saved in its first place is replayed into a later one, and ends there: it must not leave
// anything that is later than the observation itself.
TEST_F(CheckpointRoundsOfTwoTest, WhatIsReplayedElsewhereEndsWithoutATrace) {
  setup_.spaces[0].second.partitions = 1;
  ASSERT_EQ(Start(), "");
  constexpr int kIds = 1'200;  // More than are forgotten at once.
  ASSERT_NO_FATAL_FAILURE(BeginCheckpoint());
  for (int i = 0; i < kIds; ++i) Store("id" + std::to_string(i), std::to_string(i));
  ASSERT_TRUE(rig_.shards->entry("space")->Grow(1));
  Store("last", "");  // The log says so.
  ASSERT_TRUE(EndCheckpoint());
  ASSERT_EQ(StartAgain(), "");
  const size_t later = rig_.shards->entry("space")->ShardOf(1).value();
  EXPECT_GE(rig_.shards->shards[1 - later]->FindSpace("space")->live(), kIds + 0u);
  ASSERT_NO_FATAL_FAILURE(BeginCheckpoint());
  EXPECT_TRUE(rig_.shards->shards[later]->FindSpace("space")->has_tombstones());
  ASSERT_TRUE(EndCheckpoint());
  for (const uint16_t shards : {3, 2, 1, 4}) {
    SCOPED_TRACE(shards);
    setup_.shards = setup_.max_partitions = shards;
    ASSERT_EQ(StartAgain(), "");
    for (int i = 0; i < kIds; ++i) {
      EXPECT_EQ(PayloadOf("id" + std::to_string(i)), std::to_string(i)) << "id" << i;
    }
  }
}

// As ADeleteThatIsNotReplayedWinsAgainstAnUpsertThatIs, with one shard for the two afterwards:
// there nothing earlier would come from another home, but for what they saved.
TEST_F(CheckpointRoundsOfTwoTest, ADeleteThatIsHandedOnWinsAgainstAnUpsertThatIsReplayed) {
  ASSERT_EQ(Start(), "");
  const std::string id = IdOf(1);
  ShardRig& shards = *rig_.shards;
  Store(id, "first");
  shards.completions.clear();
  (void)shards.PushObserve(Alone(0), 1'000'000, Upsert(id, "second"));
  shards.clock.AdvanceNs(10'000);
  shards.PollShard(0);  // It is taken; its record is not durable yet.
  shards.clock.AdvanceNs(10'000);
  (void)shards.PushObserve(Alone(1), 1'000'001, {.op = ObservationOp::kDelete, .id = id});
  for (int i = 0; i < 1'000; ++i) {
    shards.clock.AdvanceNs(10'000);
    shards.PollShard(1);
  }
  ASSERT_EQ(shards.completions.size(), 1u) << "the delete alone is answered";
  rig_.checkpointer->Request();
  PollCheckpointer();
  shards.PollShard(1);
  shards.PollShard(0);
  ASSERT_TRUE(EndCheckpoint());
  EXPECT_EQ(PayloadOf(id), "");
  for (const uint16_t count : {1, 2, 1}) {
    SCOPED_TRACE(count);
    setup_.shards = setup_.max_partitions = setup_.spaces[0].second.partitions = count;
    ASSERT_EQ(StartAgain(), "");
    EXPECT_EQ(PayloadOf(id), "");
  }
}

TEST_F(CheckpointRoundsOfTwoTest, NobodySavesBeforeAllHaveNoted) {
  ASSERT_EQ(Start(), "");
  rig_.checkpointer->Request();
  for (int i = 0; i < 1'000; ++i) {
    PollCheckpointer();
    rig_.clock.AdvanceNs(10'000);
    rig_.shards->PollShard(0);
  }
  EXPECT_EQ(rig_.store->checkpoint(0).noted.load(), 1u);
  EXPECT_EQ(rig_.store->checkpoint(0).save.load(), 0u);
  EXPECT_FALSE(rig_.medium.ContentOf("log-000", CheckpointName(1)));
  ASSERT_TRUE(Checkpoint());
}

// What another shard holds of an observation is as good as lost while its record may be.
TEST_F(CheckpointRoundsOfTwoTest, NoManifestBeforeAllLogsAreDurable) {
  setup_.spaces[0].second.durability = Durability::kMemory;
  ASSERT_EQ(Start(), "");
  Store(IdOf(1), "taken by 0, kept by 1");
  rig_.checkpointer->Request();
  // Only shard 1 goes on from when it is to be synced.
  for (int i = 0; i < 10'000 && rig_.store->checkpoint(0).sync.load() == 0; ++i) {
    PollCheckpointer();
    rig_.shards->PollShard(0);
    rig_.shards->PollShard(1);
    rig_.clock.AdvanceNs(i < 8 ? 0 : 1'000);
  }
  ASSERT_EQ(rig_.store->checkpoint(0).sync.load(), 1u);
  for (int i = 0; i < 1'000; ++i) {
    PollCheckpointer();
    rig_.clock.AdvanceNs(10'000);
    rig_.shards->PollShard(1);
  }
  EXPECT_EQ(rig_.store->checkpoint(1).synced.load(), 1u);
  EXPECT_FALSE(rig_.medium.ContentOf(DurableRig::kRootFolder, kCheckpointManifestName));
  ASSERT_TRUE(Checkpoint());
  ASSERT_EQ(StartAgain(), "");
  EXPECT_EQ(PayloadOf(IdOf(1)), "taken by 0, kept by 1");
}

// The manifest is in place, but may not stay: either of the two rounds may be found after a crash.
TEST_F(CheckpointRoundsTest, AManifestThatMayNotStayKeepsTheFilesOfBothRounds) {
  ASSERT_EQ(Start(), "");
  Store("a", "1");
  ASSERT_TRUE(Checkpoint());
  Store("b", "2");
  rig_.disks.fails_to_sync = DurableRig::kRootFolder;
  EXPECT_FALSE(Checkpoint());
  EXPECT_NE(notes_.back().find("failed"), std::string::npos);
  EXPECT_FALSE(Checkpoint());
  rig_.disks.fails_to_sync.clear();
  ASSERT_EQ(StartAgain(), "");
  EXPECT_EQ(PayloadOf("a"), "1");
  EXPECT_EQ(PayloadOf("b"), "2");
  ASSERT_TRUE(Checkpoint());
  ASSERT_EQ(StartAgain(), "");
  EXPECT_EQ(PayloadOf("b"), "2");
}

// With a full disk the one before stands, and once there is room again the next one succeeds.
TEST_F(CheckpointRoundsTest, AFullDiskFailsOneAndNotTheNext) {
  ASSERT_EQ(Start(), "");
  Store("a", "1");
  ASSERT_TRUE(Checkpoint());
  for (int i = 0; i < 1'000; ++i) Poll();
  SimulatedDiskFaults faults;
  faults.capacity_bytes = rig_.medium.used_bytes();
  rig_.medium.SetFaults(faults);
  EXPECT_FALSE(Checkpoint());
  EXPECT_NE(notes_.back().find("No space left"), std::string::npos) << notes_.back();
  EXPECT_NE(notes_.back().find("shard 0"), std::string::npos) << notes_.back();
  rig_.medium.SetFaults({});
  ASSERT_EQ(StartAgain(), "");
  EXPECT_EQ(PayloadOf("a"), "1");
  Store("b", "2");
  ASSERT_TRUE(Checkpoint());
  const auto files = rig_.medium.Open(LogFolder(0))->List();
  EXPECT_EQ(std::ranges::count_if(
                *files, [](const auto& entry) { return CheckpointRound(entry.name).has_value(); }),
            1);
}

// A failed round is not made again for a compaction that has been asked for: a daemon that stops
// would wait for it.
TEST_F(CheckpointRoundsTest, ARoundThatFailsEndsTheCompaction) {
  ASSERT_EQ(Start(), "");
  Store("a", "1");
  rig_.checkpointer->RequestCompaction();
  rig_.disks.fails_to_sync = DurableRig::kRootFolder;
  EXPECT_FALSE(EndCheckpoint());
  EXPECT_FALSE(rig_.checkpointer->busy());
  rig_.disks.fails_to_sync.clear();
  rig_.clock.AdvanceNs(setup_.checkpointer.retry_ns);
  rig_.checkpointer->RequestCompaction();
  EXPECT_TRUE(EndCheckpoint());
  EXPECT_EQ(rig_.checkpointer->completed(), 3u);
}

TEST_F(CheckpointRoundsTest, WhatStopsCompactsNoMore) {
  ASSERT_EQ(Start(), "");
  Store("a", "1");
  rig_.checkpointer->RequestCompaction();
  ASSERT_NO_FATAL_FAILURE(BeginCheckpoint());
  rig_.checkpointer->RequestCompaction();
  // Whoever holds the files has no say any more.
  const FileLease::Owner owner = rig_.checkpointer->lease().NewOwner();
  ASSERT_EQ(rig_.checkpointer->lease().Extend(owner, rig_.clock.MonotonicNs(), INT64_C(1) << 40),
            0);
  rig_.checkpointer->BeginStop();
  EXPECT_TRUE(EndCheckpoint());
  EXPECT_EQ(rig_.checkpointer->completed(), 1u);
  EXPECT_FALSE(rig_.checkpointer->busy());
  EXPECT_TRUE(Checkpoint()) << "on request";
}

// Until a round ends the shards keep every tombstone, so a hold that lasts for hours must not find
// one half-way.
TEST_F(CheckpointRoundsTest, AHoldLetsARoundEndAndNoneBegin) {
  CounterCatalogue catalogue;
  const auto is_held = [&] {
    catalogue.clear();
    rig_.checkpointer->AddCounters(&catalogue);
    return std::ranges::find(catalogue, "checkpoints_held", &CounterView::name)->counter->Read();
  };
  const auto poll_often = [&] {
    for (int i = 0; i < 5'000; ++i) {
      Poll();
      PollCheckpointer();
    }
  };
  ASSERT_EQ(Start(), "");
  (void)LeaveAlone("a", "b");
  for (int i = 0; i < 20; ++i) Store("b", std::to_string(i) + std::string(30'000, 'y'));
  ASSERT_NO_FATAL_FAILURE(BeginCheckpoint());
  FileLease& lease = rig_.checkpointer->lease();
  const FileLease::Owner owner = lease.NewOwner();
  ASSERT_EQ(lease.Extend(owner, rig_.clock.MonotonicNs(), INT64_C(1) << 40), 0);
  PollCheckpointer();
  EXPECT_EQ(is_held(), 0u) << "the round goes on";
  ASSERT_TRUE(EndCheckpoint());
  EXPECT_EQ(rig_.store->checkpoint(0).ended.load(), 2u);
  rig_.checkpointer->Request();
  poll_often();
  EXPECT_EQ(is_held(), 1u);
  EXPECT_EQ(rig_.checkpointer->completed(), 2u);
  EXPECT_EQ(rig_.store->checkpoint(0).note.load(), 2u);
  EXPECT_TRUE(rig_.checkpointer->retention().has_dead());
  lease.End(owner);
  poll_often();
  EXPECT_EQ(is_held(), 0u);
  EXPECT_EQ(rig_.checkpointer->completed(), 3u);
  EXPECT_FALSE(rig_.checkpointer->retention().has_dead());
}

// Of the bytes that the manifest counts, in a file with every kind of extent. ENGRAM_EVERY_BIT=1
// flips each of them.
TEST_F(CheckpointRoundsTest, EveryFlippedBitOfAFileKeepsItFromStarting) {
  ASSERT_EQ(Start(), "");
  RigSession session = rig_.shards->Open(0, 5, "space", {.metric = Metric::kL2, .dimension = 4});
  rig_.shards->Observe(&session, Upsert("a", "payload"));
  rig_.shards->Observe(&session, Upsert("b", ""));
  ASSERT_TRUE(Checkpoint());
  rig_.Kill();
  const auto root = rig_.medium.Open(DurableRig::kRootFolder);
  const auto manifest = ReadManifest(*root);
  ASSERT_TRUE(manifest && *manifest);
  const uint64_t bits = (*manifest)->logs[0].file_bytes * 8;
  const std::string name = CheckpointName((*manifest)->round);
  const uint64_t step = kSanitized ? 53 : FromEnvironment("ENGRAM_EVERY_BIT", 0) != 0 ? 1 : 7;
  for (uint64_t bit = 0; bit < bits; bit += step) {
    rig_.medium.FlipBit("log-000", name, bit);
    const std::string error = StartAgain();
    EXPECT_NE(error.find("log-000/" + name + " at offset "), std::string::npos)
        << "bit " << bit << ": " << error;
    const RecoveryProgress& progress = rig_.shards->shard->recovery();
    EXPECT_TRUE(progress.failed.load() && progress.error.code == ErrorCode::kCorrupt)
        << "bit " << bit << ": " << error;
    rig_.medium.FlipBit("log-000", name, bit);
    if (HasFailure()) return;
  }
  std::printf("bits_flipped %llu\n", static_cast<unsigned long long>(bits / step));
  ASSERT_EQ(StartAgain(), "");
  EXPECT_EQ(PayloadOf("a"), "payload");
}

}  // namespace
}  // namespace engram
