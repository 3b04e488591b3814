// Which segments of the logs and of the vault live, step by step: what is read or named stays, what
// lives in a mostly dead one is taken over, the rest is freed.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "index/log/log_verifier.h"
#include "src/checkpoint_manifest.h"
#include "src/core/log_files.h"
#include "tests/sim/checkpoint_steps.h"

namespace engram {
namespace {

class SegmentRetentionTest : public CheckpointSteps {};
class SegmentRetentionOfTwoTest : public TwoShardSteps {};

TEST_F(SegmentRetentionTest, TheLogStaysSmallOverManyRounds) {
  ASSERT_EQ(Start(), "");
  uint64_t stored = 0;
  for (int round = 0; round < 12; ++round) {
    for (int i = 0; i < 8; ++i, ++stored) {
      Store("id" + std::to_string(stored % 5), std::to_string(stored) + std::string(30'000, 'x'));
    }
    ASSERT_TRUE(Checkpoint()) << (notes_.empty() ? "" : notes_.back());
    Settle();
    // The one that is written, those ahead, those to be used again; those that five live in.
    EXPECT_LE(CountSegments(0), 1 + setup_.keeper.ahead + setup_.keeper.spare + 3) << round;
    if (round % 4 == 3) {
      ASSERT_EQ(StartAgain(), "");
    }
  }
  for (uint64_t i = stored - 5; i < stored; ++i) {
    const std::string payload = PayloadOf("id" + std::to_string(i % 5));
    EXPECT_EQ(payload.substr(0, payload.find('x')), std::to_string(i));
  }
}

TEST_F(SegmentRetentionTest, WhatIsReadIsNotFreed) {
  ASSERT_EQ(Start(), "");
  for (int i = 0; i < 20; ++i) Store("a", std::to_string(i) + std::string(30'000, 'x'));
  const StoredObservation read = Stored("a");
  const LogSegment segment = SegmentAt(read.origin);
  const ReadPins::Epoch pin = rig_.pins->Enter(1);
  for (int i = 0; i < 20; ++i) Store("a", std::to_string(i) + std::string(30'000, 'y'));
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(Checkpoint());
    Settle();
  }
  EXPECT_TRUE(rig_.checkpointer->retention().has_dead());
  EXPECT_TRUE(rig_.PayloadOf(read) == "19" + std::string(30'000, 'x'));
  rig_.pins->Leave(1, pin);
  Settle();
  EXPECT_FALSE(rig_.checkpointer->retention().has_dead());
  EXPECT_EQ(rig_.PayloadOf(read), std::nullopt);
  EXPECT_FALSE(IsThere(segment) && CountSegments(0) > 5);
}

TEST_F(SegmentRetentionTest, WhatIsFreedDuringARoundIsFreedOnce) {
  ASSERT_EQ(Start(), "");
  const ReadPins::Epoch pin = rig_.pins->Enter(1);
  for (int i = 0; i < 40; ++i) Store("a", std::to_string(i) + std::string(30'000, 'x'));
  ASSERT_TRUE(Checkpoint());
  Settle();
  const Retention& retention = rig_.checkpointer->retention();
  ASSERT_TRUE(retention.has_dead());
  BeginCheckpoint();
  PollCheckpointer();  // The round looks at what is there.
  rig_.pins->Leave(1, pin);
  while (retention.has_dead()) PollCheckpointer();
  const uint64_t freed = retention.counter(RetentionCounter::kFreed);
  ASSERT_GT(freed, 0u);
  ASSERT_TRUE(EndCheckpoint());
  Settle();
  EXPECT_EQ(retention.counter(RetentionCounter::kFreed), freed);
}

// The bound of a round would otherwise keep the largest segment for ever, and those behind it.
TEST_F(SegmentRetentionTest, ASegmentOverTheBoundOfARoundIsRewrittenAlone) {
  setup_.checkpointer.retention.max_rewrite_bytes = 1;
  ASSERT_EQ(Start(), "");
  LeaveAlone("a", "b");
  ASSERT_TRUE(Checkpoint());
  Settle();
  EXPECT_EQ(LogOf(Stored("a").origin), kVaultLog);
}

TEST_F(SegmentRetentionTest, ASegmentOfMoreRecordsThanARoundTakesIsRewrittenBySeveral) {
  setup_.checkpointer.retention.max_rewrite_records = 2;
  ASSERT_EQ(Start(), "");
  for (const char* id : {"a", "c", "d"}) Store(id, "payload of " + std::string(id));
  LeaveAlone("e", "b");
  const auto in_vault = [this] {
    return std::ranges::count_if(std::to_array({"a", "c", "d", "e"}), [this](const char* id) {
      return LogOf(Stored(id).origin) == kVaultLog;
    });
  };
  ASSERT_TRUE(Checkpoint());
  Settle();
  EXPECT_EQ(in_vault(), 2);
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(Checkpoint());
    Settle();
  }
  EXPECT_EQ(in_vault(), 4);
  for (const char* id : {"a", "c", "d", "e"}) {
    EXPECT_EQ(PayloadOf(id), "payload of " + std::string(id));
  }
}

// Of a log that a checkpoint covers a start writes no more than its marker: the rest is the only
// copy of what is there.
TEST_F(SegmentRetentionTest, AStartLeavesWhatIsDurableAsItIs) {
  ASSERT_EQ(Start(), "");
  for (int i = 0; i < 10; ++i) Store("id" + std::to_string(i), std::string(30'000, 'x'));
  ASSERT_TRUE(Checkpoint());
  Settle();
  rig_.disks.bytes_written = 0;
  ASSERT_EQ(StartAgain(), "");
  for (int i = 0; i < 100; ++i) Poll();
  EXPECT_LE(rig_.disks.bytes_written, 16 * kLogPageBytes);
  EXPECT_EQ(PayloadOf("id3"), std::string(30'000, 'x'));
}

// Logged by shard 0, kept by shard 1: the table of either alone says that nothing lives.
TEST_F(SegmentRetentionOfTwoTest, ASegmentLivesByWhatAnyShardNames) {
  ASSERT_EQ(Start(), "");
  setup_.checkpointer.retention.rewrite_below_permille = 0;
  ASSERT_EQ(StartAgain(), "");
  const LogSegment first = LeaveAlone(IdOf(1), IdOf(0));
  ASSERT_EQ(first.log, 0);
  ASSERT_TRUE(Checkpoint());
  Settle();
  EXPECT_EQ(PayloadOf(IdOf(1)), "payload of " + IdOf(1));
  EXPECT_GT(rig_.checkpointer->retention().counter(RetentionCounter::kFreed), 0u);
  ASSERT_EQ(StartAgain(), "");
  EXPECT_EQ(PayloadOf(IdOf(1)), "payload of " + IdOf(1));
}

// What lives in a mostly dead segment moves to the vault. Until the next round has found the old
// place empty, a crash comes back to that.
TEST_F(SegmentRetentionTest, TheOldPlaceStaysUntilARoundHasFoundItEmpty) {
  ASSERT_EQ(Start(), "");
  const LogSegment first = LeaveAlone("a", "b");
  ASSERT_TRUE(Checkpoint());  // It lists.
  Settle();
  EXPECT_EQ(LogOf(Stored("a").origin), kVaultLog);
  EXPECT_EQ(PayloadOf("a"), "payload of a");
  // A segment that was freed would be used again for these.
  for (int i = 0; i < 20; ++i) Store("b", std::to_string(i) + std::string(30'000, 'y'));
  for (int i = 0; i < 100; ++i) Poll();
  EXPECT_TRUE(IsThere(first));
  rig_.CutPower();
  ASSERT_EQ(Start(), "");
  EXPECT_EQ(SegmentAt(Stored("a").origin), first);
  EXPECT_EQ(PayloadOf("a"), "payload of a");
  // The file that nobody names is found dead, and its number is not used again.
  ASSERT_TRUE(Checkpoint());
  Settle();
  EXPECT_EQ(CountSegments(kVaultLog), 0u);
  ASSERT_TRUE(Checkpoint());
  Settle();
  ASSERT_EQ(LogOf(Stored("a").origin), kVaultLog);
  EXPECT_EQ(SegmentAt(Stored("a").origin).number, 2u);
  ASSERT_TRUE(Checkpoint());
  Settle();
  EXPECT_LE(CountSegments(0), 1 + setup_.keeper.ahead + setup_.keeper.spare + 1);
  rig_.CutPower();
  ASSERT_EQ(Start(), "");
  EXPECT_EQ(LogOf(Stored("a").origin), kVaultLog);
  EXPECT_EQ(PayloadOf("a"), "payload of a");
}

// Several in one file, and what the vault holds is rewritten by the same rule.
TEST_F(SegmentRetentionTest, TheVaultIsRewrittenAsTheLogs) {
  ASSERT_EQ(Start(), "");
  for (int i = 0; i < 12; ++i) {
    Store("a" + std::to_string(i), std::to_string(i) + std::string(5'000, 'a'));
  }
  (void)LeaveAlone("b", "c");
  rig_.checkpointer->RequestCompaction();
  (void)EndCheckpoint();
  Settle();
  const LogSegment before = SegmentAt(Stored("a0").origin);
  ASSERT_EQ(before.log, kVaultLog);
  EXPECT_EQ(SegmentAt(Stored("a11").origin), before);
  for (int i = 0; i < 10; ++i) Store("a" + std::to_string(i), "new");
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(Checkpoint());
    Settle();
  }
  EXPECT_GT(SegmentAt(Stored("a11").origin), before);
  EXPECT_FALSE(IsThere(before));
  ASSERT_EQ(StartAgain(), "");
  EXPECT_EQ(PayloadOf("a11"), "11" + std::string(5'000, 'a'));
  EXPECT_EQ(PayloadOf("a3"), "new");
}

TEST_F(SegmentRetentionTest, ADamagedRecordKeepsItsSegment) {
  ASSERT_EQ(Start(), "");
  const LogSegment first = LeaveAlone("a", "b");
  const StoredObservation damaged = Stored("a");
  const uint32_t offset = OffsetOf(PositionOf(damaged.origin));
  rig_.medium.FlipBit("log-000", SegmentName(first.number), (offset + 100) * uint64_t{8});
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(Checkpoint());
    Settle();
  }
  EXPECT_EQ(Stored("a").origin, damaged.origin);
  EXPECT_TRUE(IsThere(first));
  const auto says = [&](const std::string& note) {
    return note.find("log-000/" + SegmentName(first.number)) != std::string::npos &&
           note.find("offset " + std::to_string(offset) + " ") != std::string::npos;
  };
  EXPECT_EQ(std::ranges::count_if(notes_, says), 1) << "once, and not in each round";
}

TEST_F(SegmentRetentionTest, AMissingSegmentIsNamedOnceWithWhatItHeld) {
  setup_.checkpointer.retention.rewrite_below_permille = 0;
  ASSERT_EQ(Start(), "");
  Store("c", "payload of c");
  const LogSegment first = LeaveAlone("a", "b");
  ASSERT_EQ(SegmentAt(Stored("c").origin), first);
  rig_.Kill();
  ASSERT_TRUE(rig_.medium.Open(LogFolder(0))->Remove(SegmentName(first.number)).has_value());
  ASSERT_EQ(Start(), "");
  const auto says = [&](const std::string& note) {
    return note.starts_with("log-000/" + SegmentName(first.number) + " is missing") &&
           note.find(" of 2 observations ") != std::string::npos;
  };
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(Checkpoint());
    Settle();
    EXPECT_EQ(std::ranges::count_if(notes_, says), 1) << "round " << i;
  }
}

TEST_F(SegmentRetentionTest, AFullDiskLeavesNothingOfTheVault) {
  ASSERT_EQ(Start(), "");
  const LogSegment first = LeaveAlone("a", "b");
  rig_.checkpointer->Request();
  for (int i = 0; i < 100'000 && !rig_.checkpointer->retention().is_taking_over(); ++i) {
    Poll();
    PollCheckpointer();
  }
  SimulatedDiskFaults full;
  full.capacity_bytes = rig_.medium.used_bytes();
  rig_.medium.SetFaults(full);
  Settle();
  EXPECT_NE(notes_.back().find("No space left"), std::string::npos) << notes_.back();
  EXPECT_EQ(rig_.medium.Open("vault")->List()->size(), 0u);
  EXPECT_EQ(SegmentAt(Stored("a").origin), first);
  rig_.medium.SetFaults({});
  ASSERT_TRUE(Checkpoint());
  Settle();
  EXPECT_EQ(LogOf(Stored("a").origin), kVaultLog);
  EXPECT_EQ(PayloadOf("a"), "payload of a");
}

// What the log leaves free of the disk is enough for the checkpoint that frees what was dropped.
TEST_F(SegmentRetentionTest, ADiskThatTheLogHasFilledRecoversByItselfAfterADrop) {
  constexpr uint64_t kCheckpointBytes = 64 << 10;
  setup_.checkpointer.every_bytes = uint64_t{1} << 40;
  setup_.checkpointer.full_retry_ns = kNanosPerMilli;
  setup_.spaces.emplace_back("bulk", setup_.spaces[0].second);
  ASSERT_EQ(Start(), "");
  Store("kept", "payload");
  rig_.store->KeepFree(kCheckpointBytes);
  SimulatedDiskFaults small;
  small.capacity_bytes = rig_.medium.used_bytes() + 4 * setup_.keeper.segment_bytes;
  rig_.medium.SetFaults(small);
  RigSession bulk = Alone(0);
  bulk.space = "bulk";
  int stored = 0;
  for (RefusalReason reason = RefusalReason::kNone; reason != RefusalReason::kDiskFull;) {
    const Observation next = Upsert(std::to_string(stored), std::string(30'000, 'x'));
    reason = rig_.shards->ObserveAlone(bulk, next).first.reason;
    stored += reason == RefusalReason::kNone ? 1 : 0;
    Poll();
    PollCheckpointer();
  }
  ASSERT_GT(stored, 10);
  EXPECT_GE(small.capacity_bytes - rig_.medium.used_bytes(), kCheckpointBytes);
  rig_.shards->Command(SpaceCommand::kDrop, "bulk");
  Settle();
  EXPECT_GT(rig_.checkpointer->completed(), 0u) << "without being asked";
  for (int i = 0; i < stored; ++i) {
    Store("again" + std::to_string(i % 3), std::string(20'000, 'y'));
    PollCheckpointer();
  }
  EXPECT_EQ(PayloadOf("kept"), "payload");
}

// At each operation of the disks the power fails, from the round that lists to the one that frees.
TEST_F(SegmentRetentionTest, APowerCutAnywhereOfATakeoverLosesNothing) {
  uint64_t cuts = 0;
  for (uint64_t at = 1;; ++at) {
    SCOPED_TRACE(at);
    ASSERT_EQ(rig_.running() ? StartAgain() : Start(), "");
    (void)LeaveAlone("a", "b");
    const std::string last = PayloadOf("b");
    rig_.disks.power_cut_in = at;
    for (int round = 0; round < 2 && !rig_.disks.power_failed; ++round) {
      rig_.checkpointer->Request();
      for (int i = 0; i < 5'000 && !rig_.disks.power_failed; ++i) {
        Poll();
        PollCheckpointer();
      }
    }
    const bool was_cut = rig_.disks.power_failed;
    rig_.disks.power_cut_in = 0;
    rig_.CutPower();
    ASSERT_EQ(Start(), "");
    ASSERT_EQ(PayloadOf("a"), "payload of a");
    ASSERT_EQ(PayloadOf("b"), last);
    if (!was_cut) break;
    ++cuts;
  }
  EXPECT_GT(cuts, 25u);
}

// The log of a shard that is gone lives as long as something in it does, and goes on where it ended
// when the shard is back, whatever was freed meanwhile.
TEST_F(SegmentRetentionOfTwoTest, ALogOutlivesItsShardAndGoesOnWithIt) {
  setup_.spaces[0].second.partitions = 1;
  setup_.checkpointer.retention.rewrite_below_permille = 0;
  ASSERT_EQ(Start(), "");
  const auto in_one_shard = [this](uint16_t shards) {
    setup_.shards = shards;
    setup_.max_partitions = shards;
    return StartAgain();
  };
  Store("a", "in log 1", 1);
  for (int i = 0; i < 10; ++i) Store("b", std::string(30'000, 'b'), 1);
  ASSERT_EQ(LogOf(Stored("a").origin), 1);
  ASSERT_EQ(in_one_shard(1), "");
  ASSERT_TRUE(Checkpoint());
  Settle();
  EXPECT_EQ(PayloadOf("a"), "in log 1");
  ASSERT_EQ(in_one_shard(1), "");
  EXPECT_EQ(PayloadOf("a"), "in log 1");
  const uint32_t last = SegmentAt(Stored("b").origin).number;
  // Back, and it dies before a checkpoint; then gone again.
  ASSERT_EQ(in_one_shard(2), "");
  EXPECT_EQ(PayloadOf("a"), "in log 1");
  Store("c", "in log 1 again", 1);
  // What is written now does not follow what was there, whose last segments were never used.
  const auto log = rig_.medium.Open(LogFolder(1));
  const auto manifest = ReadManifest(*rig_.medium.Open(DurableRig::kRootFolder));
  ASSERT_TRUE(manifest && *manifest && (*manifest)->kept.size() == 1);
  const auto report = VerifyLog(*log, 1, rig_.store->instance(), (*manifest)->kept[0].from);
  ASSERT_TRUE(report) << report.error().message;
  EXPECT_TRUE(report->sound()) << report->damages[0].file << " " << report->damages[0].text;
  EXPECT_GT(SegmentAt(Stored("c").origin).number, last);
  ASSERT_EQ(in_one_shard(2), "");
  EXPECT_EQ(PayloadOf("c"), "in log 1 again");
  ASSERT_EQ(in_one_shard(1), "");
  EXPECT_EQ(PayloadOf("c"), "in log 1 again");
  EXPECT_EQ(PayloadOf("a"), "in log 1");
  // Nothing is left in it.
  for (const char* id : {"a", "b", "c"}) Store(id, "in log 0", 0);
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(Checkpoint());
    Settle();
  }
  EXPECT_TRUE(rig_.medium.Open(LogFolder(1))->List()->empty());
  const auto root = rig_.medium.Open(DurableRig::kRootFolder);
  EXPECT_TRUE((*ReadManifest(*root))->kept.empty());
  ASSERT_EQ(in_one_shard(2), "");
  Store("d", "in log 1 once more", 1);
  ASSERT_EQ(in_one_shard(2), "");
  for (const char* id : {"a", "b", "c"}) EXPECT_EQ(PayloadOf(id), "in log 0");
  EXPECT_EQ(PayloadOf("d"), "in log 1 once more");
}

}  // namespace
}  // namespace engram
