// Random programs (tests/sim/durable_program.h) with checkpoints and rebuilds at any moment.
//
// ENGRAM_DURABLE_SEED=n runs the program of that seed alone, and says what it
// does; ENGRAM_DURABLE_SEEDS=n runs so many, from ENGRAM_DURABLE_FIRST on.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "index/log/log_verifier.h"
#include "src/core/log_files.h"
#include "tests/sim/durable_program.h"
#include "tests/sim/program_seeds.h"

namespace engram {
namespace {

uint64_t CheckpointSeeds() { return UsualSeeds(400, 30); }

TEST(CheckpointProgramsTest, WhatWasAcknowledgedIsThere) {
  ProgramStats stats;
  ProgramOptions options;
  options.checkpoints = true;
  options.reshards = FromEnvironment("ENGRAM_DURABLE_RESHARD", 1) != 0;
  const auto seeds = Seeds::FromPrefix("ENGRAM_DURABLE", CheckpointSeeds());
  options.talks = seeds.alone;
  const auto [seed, violation] = RunSeeds(seeds, options, &stats);
  ASSERT_EQ(seed, 0u) << violation << "\nagain: ENGRAM_DURABLE_SEED=" << seed;
  ExpectAllHappened({{"acks", stats.acks},
                     {"checkpoints", stats.checkpoints},
                     {"failed_checkpoints", stats.failed_checkpoints},
                     {"crashes_in_checkpoints", stats.crashes_in_checkpoints},
                     {"crashes_before_recovery", stats.crashes_before_recovery},
                     {"crashes_in_recovery", stats.cuts_in_recovery},
                     {"power_cuts", stats.power_cuts},
                     {"kills", stats.kills},
                     {"starts", stats.starts},
                     {"failed_starts", stats.failed_starts},
                     {"files_loaded", stats.loaded},
                     {"files_loaded_elsewhere", stats.loaded_elsewhere},
                     {"segments_freed", stats.segments_freed},
                     {"records_taken_over", stats.records_taken_over},
                     {"rebuilds", stats.rebuilds},
                     {"relinked_by_rebuilds", stats.relinked},
                     {"crashes_in_rebuilds", stats.crashes_in_rebuilds},
                     {"pinned_reads", stats.pinned_reads},
                     {"recalls", stats.recalls},
                     {"records_read", stats.records_read},
                     {"verified", stats.verified},
                     {"spaces_grown", stats.grown},
                     {"sessions_lowered", stats.lowered}},
                    seeds.count >= 400);
}

// As many shards as before, so that spaces are loaded into their places, also those that have
// grown.
TEST(CheckpointProgramsTest, WhatIsLoadedInPlaceMeetsWhatIsReplayed) {
  ProgramStats stats;
  ProgramOptions options;
  options.checkpoints = true;
  options.reshards = false;
  const auto [seed, violation] =
      RunSeeds({.first = 1, .count = CheckpointSeeds() * 5 / 8}, options, &stats);
  ASSERT_EQ(seed, 0u) << violation
                      << "\nagain: ENGRAM_DURABLE_RESHARD=0 ENGRAM_DURABLE_SEED=" << seed;
}

// Segments fill, are rewritten and freed, and it crashes amid that.
TEST(CheckpointProgramsTest, WhatIsTakenOverIsThere) {
  ProgramStats stats;
  ProgramOptions options;
  options.checkpoints = true;
  options.rewrites = true;
  options.reshards = FromEnvironment("ENGRAM_DURABLE_RESHARD", 1) != 0;
  const auto seeds = Seeds::FromPrefix("ENGRAM_DURABLE", CheckpointSeeds() / 2);
  options.talks = seeds.alone;
  const auto [seed, violation] = RunSeeds(seeds, options, &stats);
  ASSERT_EQ(seed, 0u) << violation << "\nagain: ENGRAM_DURABLE_SEED=" << seed;
  ExpectAllHappened({{"acks", stats.acks},
                     {"checkpoints", stats.checkpoints},
                     {"power_cuts", stats.power_cuts},
                     {"kills", stats.kills},
                     {"segments_freed", stats.segments_freed},
                     {"records_taken_over", stats.records_taken_over},
                     {"crashes_in_takeovers", stats.crashes_in_takeovers},
                     {"pinned_reads", stats.pinned_reads},
                     {"pinned_reads_from_vault", stats.reads_from_vault},
                     {"logs_kept", stats.logs_kept},
                     {"files_loaded_elsewhere", stats.loaded_elsewhere}},
                    seeds.count >= 200);
}

// One space on a machine that a test steps itself.
class CheckpointStepsTest : public testing::Test {
 protected:
  explicit CheckpointStepsTest(uint16_t shards = 1) : rig_(7) {
    setup_.shards = shards;
    setup_.max_partitions = shards;
    setup_.shard = DurableRig::SmallShard();
    setup_.writer = DurableRig::SmallWriter();
    setup_.keeper = DurableRig::SmallKeeper();
    setup_.checkpointer.retention.free_after_ns = kNanosPerMilli;
    setup_.checkpointer.retention.rewrite_bytes_per_second = uint64_t{1} << 30;
    SpaceSettings settings;
    settings.metric = Metric::kL2;
    settings.durability = Durability::kFsync;
    settings.partitions = shards;
    setup_.spaces = {{"space", settings}};
  }

  // Why it does not start; empty: it does.
  std::string Start() {
    if (auto started = rig_.Start(setup_); !started) return started.error().message;
    for (int i = 0; i < 100'000 && rig_.IsRecovering(); ++i) {
      rig_.shards->Poll();
      if (const std::string error = rig_.RecoveryError(); !error.empty()) return error;
    }
    if (rig_.IsRecovering()) return "recovery does not end";
    if (auto prepared = rig_.store->PrepareFirst(); !prepared) return prepared.error().message;
    return "";
  }
  std::string StartAgain() {
    rig_.Kill();
    return Start();
  }
  void Poll() {
    rig_.shards->Poll();
    rig_.store->Poll();
  }
  void PollCheckpointer() {
    rig_.checkpointer->Poll([this](const std::string& line) { notes_.push_back(line); });
  }
  // Whether it succeeds.
  bool Checkpoint() {
    const uint64_t before = rig_.checkpointer->completed();
    rig_.checkpointer->Request();
    for (int i = 0; i < 100'000 && rig_.checkpointer->busy(); ++i) {
      Poll();
      PollCheckpointer();
    }
    return rig_.checkpointer->completed() > before;
  }
  void BeginCheckpoint();
  bool EndCheckpoint() {
    const uint64_t before = rig_.checkpointer->completed();
    for (int i = 0; i < 100'000 && rig_.checkpointer->busy(); ++i) {
      Poll();
      PollCheckpointer();
    }
    return rig_.checkpointer->completed() > before;
  }
  // Nothing is taken over and nothing waits to be freed any more, but for who reads.
  void Settle() {
    for (int i = 0; i < 5'000; ++i) {
      Poll();
      PollCheckpointer();
    }
    EXPECT_FALSE(rig_.checkpointer->retention().is_taking_over());
  }
  StoredObservation Stored(const std::string& id) const {
    for (const auto& shard : rig_.shards->shards) {
      const Space* part = shard->FindSpace("space");
      const NodeId node = part == nullptr ? kNoNode : part->FindLive(id);
      if (node != kNoNode) return part->Get(node);
    }
    return {};
  }
  bool IsThere(LogSegment segment) {
    return rig_.medium.ContentOf(LogFolder(segment.log), SegmentName(segment.number)).has_value();
  }
  // `id` alone lives in its segment, which is not replayed any more; `other` has filled the rest.
  LogSegment LeaveAlone(const std::string& id, const std::string& other) {
    Store(id, "payload of " + id);
    for (int i = 0; i < 20; ++i) Store(other, std::to_string(i) + std::string(30'000, 'x'));
    EXPECT_TRUE(Checkpoint());
    Settle();
    return SegmentAt(Stored(id).origin);
  }
  RigSession Alone(size_t shard) const {
    RigSession nobody;
    nobody.origin = 1;
    nobody.space = "space";
    nobody.shard = shard;
    return nobody;
  }
  static Observation Upsert(const std::string& id, const std::string& payload) {
    return {.op = ObservationOp::kUpsert, .id = id, .vector = {1, 2, 3, 4}, .payload = payload};
  }
  // Until it is taken.
  void Store(const std::string& id, const std::string& payload) {
    for (int i = 0; i < 1'000; ++i) {
      const auto [completion, request] = rig_.shards->ObserveAlone(Alone(0), Upsert(id, payload));
      if (completion.reason == RefusalReason::kNone) return;
      for (int n = 0; n < 20; ++n) Poll();
    }
    ADD_FAILURE() << id << " is not taken";
  }
  std::string PayloadOf(const std::string& id) const {
    for (const auto& shard : rig_.shards->shards) {
      const Space* part = shard->FindSpace("space");
      const NodeId node = part == nullptr ? kNoNode : part->FindLive(id);
      if (node == kNoNode) continue;
      return rig_.PayloadOf(part->Get(node)).value_or("unreadable");
    }
    return "";
  }
  size_t CountSegments(uint16_t log) {
    const auto disk = rig_.medium.Open(LogFolder(log));
    return static_cast<size_t>(std::ranges::count_if(
        *disk->List(), [](const auto& entry) { return SegmentNumber(entry.name).has_value(); }));
  }

  DurableRig rig_;
  DurableSetup setup_;
  std::vector<std::string> notes_;
};

class TwoShardsTest : public CheckpointStepsTest {
 protected:
  TwoShardsTest() : CheckpointStepsTest(2) {}
  // An id that the shard owns.
  std::string IdOf(uint16_t shard) {
    for (int i = 0;; ++i) {
      const std::string id = "id" + std::to_string(i);
      const SpaceEntry& entry = *rig_.shards->entry("space");
      const uint16_t partition = PartitionOf(SpaceCatalogue::HashOfId(id), 2);
      if (entry.ShardOf(partition) == ShardId(shard)) return id;
    }
  }
};

TEST_F(CheckpointStepsTest, TheLogStaysSmallOverManyRounds) {
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

// ---- Segments that live ----

TEST_F(CheckpointStepsTest, WhatIsReadIsNotFreed) {
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

TEST_F(CheckpointStepsTest, WhatIsFreedDuringARoundIsFreedOnce) {
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
TEST_F(CheckpointStepsTest, ASegmentOverTheBoundOfARoundIsRewrittenAlone) {
  setup_.checkpointer.retention.max_rewrite_bytes = 1;
  ASSERT_EQ(Start(), "");
  LeaveAlone("a", "b");
  ASSERT_TRUE(Checkpoint());
  Settle();
  EXPECT_EQ(LogOf(Stored("a").origin), kVaultLog);
}

TEST_F(CheckpointStepsTest, ASegmentOfMoreRecordsThanARoundTakesIsRewrittenBySeveral) {
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
TEST_F(CheckpointStepsTest, AStartLeavesWhatIsDurableAsItIs) {
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
TEST_F(TwoShardsTest, ASegmentLivesByWhatAnyShardNames) {
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
TEST_F(CheckpointStepsTest, TheOldPlaceStaysUntilARoundHasFoundItEmpty) {
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
TEST_F(CheckpointStepsTest, TheVaultIsRewrittenAsTheLogs) {
  ASSERT_EQ(Start(), "");
  for (int i = 0; i < 12; ++i) {
    Store("a" + std::to_string(i), std::to_string(i) + std::string(5'000, 'a'));
  }
  (void)LeaveAlone("b", "c");
  rig_.checkpointer->RequestCompaction();
  for (int i = 0; i < 100'000 && rig_.checkpointer->busy(); ++i) {
    Poll();
    PollCheckpointer();
  }
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

TEST_F(CheckpointStepsTest, ADamagedRecordKeepsItsSegment) {
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

TEST_F(CheckpointStepsTest, AFullDiskLeavesNothingOfTheVault) {
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

// At each operation of the disks the power fails, from the round that lists to the one that frees.
TEST_F(CheckpointStepsTest, APowerCutAnywhereOfATakeoverLosesNothing) {
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
TEST_F(TwoShardsTest, ALogOutlivesItsShardAndGoesOnWithIt) {
  setup_.spaces[0].second.partitions = 1;
  setup_.checkpointer.retention.rewrite_below_permille = 0;
  ASSERT_EQ(Start(), "");
  const auto store_at = [this](size_t shard, const std::string& id, const std::string& payload) {
    for (int i = 0; i < 1'000; ++i) {
      const auto [completion, request] =
          rig_.shards->ObserveAlone(Alone(shard), Upsert(id, payload));
      if (completion.reason == RefusalReason::kNone) return;
      for (int n = 0; n < 20; ++n) Poll();
    }
    ADD_FAILURE() << id << " is not taken";
  };
  const auto in_one_shard = [this](uint16_t shards) {
    setup_.shards = shards;
    setup_.max_partitions = shards;
    return StartAgain();
  };
  store_at(1, "a", "in log 1");
  for (int i = 0; i < 10; ++i) store_at(1, "b", std::string(30'000, 'b'));
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
  store_at(1, "c", "in log 1 again");
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
  for (const char* id : {"a", "b", "c"}) store_at(0, id, "in log 0");
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(Checkpoint());
    Settle();
  }
  EXPECT_TRUE(rig_.medium.Open(LogFolder(1))->List()->empty());
  const auto root = rig_.medium.Open(DurableRig::kRootFolder);
  EXPECT_TRUE((*ReadManifest(*root))->kept.empty());
  ASSERT_EQ(in_one_shard(2), "");
  store_at(1, "d", "in log 1 once more");
  ASSERT_EQ(in_one_shard(2), "");
  for (const char* id : {"a", "b", "c"}) EXPECT_EQ(PayloadOf(id), "in log 0");
  EXPECT_EQ(PayloadOf("d"), "in log 1 once more");
}

// ---- Rounds ----

// An upsert is under way while a later delete of the same id is answered. Its record is replayed,
// the delete's is not: so the delete must be in what was saved.
TEST_F(TwoShardsTest, ADeleteThatIsNotReplayedWinsAgainstAnUpsertThatIs) {
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

// Nothing is forgotten from here on, and whatever comes is replayed.
void CheckpointStepsTest::BeginCheckpoint() {
  rig_.checkpointer->Request();
  PollCheckpointer();
  Poll();
  for (uint16_t s = 0; s < setup_.shards; ++s) {
    ASSERT_EQ(rig_.store->checkpoint(s).noted.load(), rig_.store->checkpoint(s).note.load());
    ASSERT_GT(rig_.store->checkpoint(s).noted.load(), rig_.store->checkpoint(s).ended.load());
  }
}

// An update of an id that has moved leaves a tombstone where it was, with the update's own stamp.
// With another number of shards both come to the same one, the tombstone maybe first.
TEST_F(TwoShardsTest, AnObservationStandsBeforeTheTombstoneThatItHasLeft) {
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
TEST_F(TwoShardsTest, WhatIsReplayedElsewhereEndsWithoutATrace) {
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
TEST_F(TwoShardsTest, ADeleteThatIsHandedOnWinsAgainstAnUpsertThatIsReplayed) {
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

TEST_F(TwoShardsTest, NobodySavesBeforeAllHaveNoted) {
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
TEST_F(TwoShardsTest, NoManifestBeforeAllLogsAreDurable) {
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
TEST_F(CheckpointStepsTest, AManifestThatMayNotStayKeepsTheFilesOfBothRounds) {
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
TEST_F(CheckpointStepsTest, AFullDiskFailsOneAndNotTheNext) {
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
TEST_F(CheckpointStepsTest, ARoundThatFailsEndsTheCompaction) {
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

TEST_F(CheckpointStepsTest, WhatStopsCompactsNoMore) {
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
TEST_F(CheckpointStepsTest, AHoldLetsARoundEndAndNoneBegin) {
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
TEST_F(CheckpointStepsTest, EveryFlippedBitOfAFileKeepsItFromStarting) {
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
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr uint64_t step = 53;
#else
  const uint64_t step = FromEnvironment("ENGRAM_EVERY_BIT", 0) != 0 ? 1 : 7;
#endif
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
