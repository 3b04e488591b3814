// Random programs (tests/sim/durable_program.h) with checkpoints at any moment.
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

#include "src/core/log_files.h"
#include "tests/sim/durable_program.h"

namespace engram {
namespace {

// A sanitizer takes its time.
uint64_t UsualSeeds() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return 30;
#else
  return 400;
#endif
}

TEST(CheckpointProgramsTest, WhatWasAcknowledgedIsThere) {
  ProgramStats stats;
  ProgramOptions options;
  options.checkpoints = true;
  options.reshards = FromEnvironment("ENGRAM_DURABLE_RESHARD", 1) != 0;
  uint64_t first = FromEnvironment("ENGRAM_DURABLE_FIRST", 1);
  uint64_t seeds = FromEnvironment("ENGRAM_DURABLE_SEEDS", UsualSeeds());
  if (const uint64_t seed = FromEnvironment("ENGRAM_DURABLE_SEED", 0); seed != 0) {
    options.talks = true;
    first = seed;
    seeds = 1;
  }
  const auto [seed, violation] = RunSeeds(first, seeds, options, &stats);
  ASSERT_EQ(seed, 0u) << violation << "\nagain: ENGRAM_DURABLE_SEED=" << seed;
  const std::vector<std::pair<std::string, uint64_t>> counts = {
      {"acks", stats.acks},
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
      {"recalls", stats.recalls},
      {"verified", stats.verified},
      {"spaces_grown", stats.grown},
      {"sessions_lowered", stats.lowered}};
  for (const auto& [name, count] : counts) {
    std::printf("%s %llu\n", name.c_str(), static_cast<unsigned long long>(count));
    if (seeds >= 400) {
      EXPECT_GT(count, 0u) << name << ": the programs no longer come to that";
    }
  }
}

// As many shards as before, so that spaces are loaded into their places, also those that have
// grown.
TEST(CheckpointProgramsTest, WhatIsLoadedInPlaceMeetsWhatIsReplayed) {
  ProgramStats stats;
  ProgramOptions options;
  options.checkpoints = true;
  options.reshards = false;
  const auto [seed, violation] = RunSeeds(1, UsualSeeds() * 5 / 8, options, &stats);
  ASSERT_EQ(seed, 0u) << violation
                      << "\nagain: ENGRAM_DURABLE_RESHARD=0 ENGRAM_DURABLE_SEED=" << seed;
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
      const auto payload = part->Get(node).payload;
      return {reinterpret_cast<const char*>(payload.data()), payload.size()};
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
    for (int i = 0; i < 2'000; ++i) Poll();
    // The one that is written, those ahead, those to be used again.
    EXPECT_LE(CountSegments(0), 1 + setup_.keeper.ahead + setup_.keeper.spare) << round;
    if (round % 4 == 3) {
      ASSERT_EQ(StartAgain(), "");
    }
  }
  for (uint64_t i = stored - 5; i < stored; ++i) {
    const std::string payload = PayloadOf("id" + std::to_string(i % 5));
    EXPECT_EQ(payload.substr(0, payload.find('x')), std::to_string(i));
  }
}

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
