// A rebuild of a space, in all its partitions, by a clock of the test's own.

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "tests/index/latent_vector.h"
#include "tests/index/shard_rig.h"

namespace engram {
namespace {

class ShardRebuildTest : public testing::Test {
 protected:
  static ShardOptions Options() {
    ShardOptions options = ShardRig::SmallOptions();
    options.snapshot_keep_ns = kNanosPerMilli;
    options.graph_from = 50;
    options.unlinked_limit_bytes = size_t{32} * 20 * 64;  // 20 nodes leave a graph at once
    options.grow_partition_at = 0;
    return options;
  }
  void Make(uint16_t shards = 1, const RigWorld& world = {},
            const ShardOptions& options = Options()) {
    rig_.emplace(options, 1, 256, 4,
                 RigShards{.shards = shards, .partitions = shards, .max_partitions = shards},
                 world);
  }
  RigSession Open(const std::string& space = "s") {
    return rig_->Open(0, ++origins_, space, {.metric = Metric::kL2});
  }
  void Upsert(RigSession* session, int number, float second = 1) {
    Upsert(session, number, std::vector<float>{static_cast<float>(number), second});
  }
  void Upsert(RigSession* session, int number, const std::vector<float>& vector) {
    const Observation observation{.op = ObservationOp::kUpsert,
                                  .id = "id" + std::to_string(number),
                                  .vector = vector,
                                  .payload = "payload" + std::to_string(number)};
    for (int tries = 0; tries < 10'000; ++tries) {
      if (rig_->Observe(session, observation).reason == RefusalReason::kNone) return;
      rig_->Poll();
    }
    FAIL() << number << " is not taken";
  }
  void Fill(RigSession* session, int count) {
    for (int i = 0; i < count; ++i) {
      ASSERT_NO_FATAL_FAILURE(Upsert(session, i));
    }
  }
  std::set<std::string> Recalled(const std::vector<float>& query, uint32_t k = 1'000) {
    std::set<std::string> ids;
    for (size_t s = 0; s < rig_->shards.size(); ++s) {
      for (const Hit& hit :
           rig_->Recall("s", query, {.k = k, .ef = 2'000, .with_payload = true}, s).hits) {
        EXPECT_EQ(hit.payload, "payload" + hit.id.substr(2));
        EXPECT_TRUE(ids.insert(hit.id).second) << hit.id << " came twice";
      }
    }
    return ids;
  }
  uint64_t Linked() {
    uint64_t linked = 0;
    for (const auto& shard : rig_->shards) linked += shard->FindSpace("s")->linked();
    return linked;
  }
  uint64_t RebuildLeft() {
    uint64_t left = 0;
    for (const auto& shard : rig_->shards)
      left += shard->counter(ShardCounter::kRebuildLeft).Read();
    return left;
  }

  std::optional<ShardRig> rig_;
  Origin origins_ = 10;
};

TEST_F(ShardRebuildTest, AllPartitionsAreLinkedAnewWhileTheyServe) {
  constexpr int kCount = 900;
  for (const uint16_t shards : {1, 4}) {
    SCOPED_TRACE(shards);
    Make(shards);
    RigSession session = Open();
    ASSERT_NO_FATAL_FAILURE(Fill(&session, kCount));
    rig_->Settle();
    ASSERT_EQ(Linked(), kCount);
    EXPECT_EQ(RebuildLeft(), 0u);
    rig_->PushCommand(SpaceCommand::kRebuild, "s");
    rig_->Poll();
    rig_->Poll();
    EXPECT_EQ(RebuildLeft(), kCount);
    int next = kCount;
    uint64_t left = kCount;
    uint64_t halfway = 0;
    while (rig_->commands_under_way > 0) {
      for (int i = 0; i < 5; ++i) rig_->Poll();
      ASSERT_NO_FATAL_FAILURE(Upsert(&session, next++));
      if (next % 4 == 0) {
        ASSERT_NO_FATAL_FAILURE(Upsert(&session, next % kCount, 2));
      }
      const std::string wanted = "id" + std::to_string(next % kCount);
      ASSERT_TRUE(Recalled({static_cast<float>(next % kCount), 1}, 5).contains(wanted)) << wanted;
      ASSERT_LE(RebuildLeft(), left + 40);
      left = RebuildLeft();
      if (left > 0 && left < kCount / 2) ++halfway;
      ASSERT_LT(next, 100 * kCount) << "it does not end";
    }
    EXPECT_GT(halfway, 0u);
    EXPECT_EQ(RebuildLeft(), 0u);
    EXPECT_EQ(rig_->command_reason, RefusalReason::kNone);
    EXPECT_GT(rig_->commanded.observations, kCount / 2);
    EXPECT_LE(rig_->commanded.observations, kCount) << "those that there were";
    rig_->Settle();
    EXPECT_EQ(Linked(), static_cast<uint64_t>(next));
    for (const auto& shard : rig_->shards) {
      const auto sound = shard->CheckInvariants();
      ASSERT_TRUE(sound.has_value()) << sound.error().message;
      EXPECT_EQ(shard->counter(ShardCounter::kSpacesGrown).Read(), 0u);
    }
    // And once more, of all that there is now.
    EXPECT_EQ(rig_->Command(SpaceCommand::kRebuild, "s").observations, static_cast<uint64_t>(next));
  }
}

TEST_F(ShardRebuildTest, WhereThereIsNoGraphItIsDoneAtOnce) {
  Make(2);
  RigSession session = Open();
  EXPECT_EQ(rig_->Command(SpaceCommand::kRebuild, "s").observations, 0u);
  ASSERT_NO_FATAL_FAILURE(Fill(&session, 20));
  EXPECT_EQ(rig_->Command(SpaceCommand::kRebuild, "s").observations, 0u);
  EXPECT_EQ(rig_->command_reason, RefusalReason::kNone);
  EXPECT_EQ(Recalled({1, 1}).size(), 20u);
}

// It says that it was not done, and the space that takes the name may be rebuilt.
TEST_F(ShardRebuildTest, ADropEndsIt) {
  Make(2);
  RigSession session = Open();
  ASSERT_NO_FATAL_FAILURE(Fill(&session, 900));
  rig_->Settle();
  rig_->PushCommand(SpaceCommand::kRebuild, "s");
  for (int i = 0; i < 60; ++i) rig_->Poll();
  ASSERT_EQ(rig_->commands_under_way, 2u);
  rig_->PushCommand(SpaceCommand::kDrop, "s");
  EXPECT_TRUE(rig_->PollUntil([&] { return rig_->commands_under_way == 0; }));
  EXPECT_EQ(rig_->command_reason, RefusalReason::kSpaceDropping);
  EXPECT_EQ(RebuildLeft(), 0u);
  session = Open();
  ASSERT_NO_FATAL_FAILURE(Fill(&session, 400));
  rig_->Settle();
  EXPECT_EQ(rig_->Command(SpaceCommand::kRebuild, "s").observations, 400u);
  EXPECT_EQ(rig_->command_reason, RefusalReason::kNone);
  EXPECT_EQ(Recalled({1, 1}).size(), 400u);
}

TEST_F(ShardRebuildTest, OneOfASpaceAtATime) {
  Make();
  RigSession session = Open();
  ASSERT_NO_FATAL_FAILURE(Fill(&session, 300));
  rig_->Settle();
  rig_->PushCommand(SpaceCommand::kRebuild, "s");
  rig_->Poll();
  EXPECT_FALSE(rig_->entry("s")->BeginRebuild(1));
  EXPECT_TRUE(rig_->PollUntil([&] { return rig_->commands_under_way == 0; }));
  EXPECT_EQ(rig_->Command(SpaceCommand::kRebuild, "s").observations, 300u);
}

// A compaction does not wait for it, nor it for a compaction.
TEST_F(ShardRebuildTest, ACompactionMayGoOnBesideIt) {
  Make();
  RigSession session = Open();
  ASSERT_NO_FATAL_FAILURE(Fill(&session, 300));
  rig_->Settle();
  ASSERT_EQ(rig_->Observe(&session, {.op = ObservationOp::kDelete, .id = "id7"}).reason,
            RefusalReason::kNone);
  ASSERT_EQ(Linked(), 299u);
  rig_->PushCommand(SpaceCommand::kRebuild, "s");
  rig_->Poll();
  EXPECT_EQ(RebuildLeft(), 300u) << "with what has ended";
  rig_->PushCommand(SpaceCommand::kCompact, "s");
  EXPECT_TRUE(rig_->PollUntil([&] { return rig_->commands_under_way == 0; }));
  EXPECT_EQ(rig_->shard->FindSpace("s")->retired(), 0u);
  EXPECT_EQ(rig_->shard->FindSpace("s")->relinked(), 299u);
  EXPECT_EQ(Recalled({1, 1}).size(), 299u);
}

// Observations end by age and by quota while they are on their way.
TEST_F(ShardRebuildTest, WhatEndsByAgeEnds) {
  RigWorld world;
  world.spaces = {{"s",
                   {.metric = Metric::kL2,
                    .ttl_ns = 200 * kNanosPerMilli,
                    .quota_observations = 500,
                    .when_full = WhenFull::kEvictOldest}}};
  Make(1, world);
  RigSession session = Open();
  ASSERT_NO_FATAL_FAILURE(Fill(&session, 500));
  rig_->PollUntil([&] { return rig_->shard->FindSpace("s")->unlinked_count() == 0; });
  rig_->PushCommand(SpaceCommand::kRebuild, "s");
  for (int i = 500; i < 700; ++i) {
    ASSERT_NO_FATAL_FAILURE(Upsert(&session, i));
    ASSERT_EQ(rig_->shard->FindSpace("s")->live(), 500u);
    if (i % 20 == 0) {
      const auto sound = rig_->shard->CheckInvariants();
      ASSERT_TRUE(sound.has_value()) << sound.error().message;
    }
  }
  rig_->clock.AdvanceNs(190 * kNanosPerMilli);
  EXPECT_TRUE(rig_->PollUntil([&] { return rig_->commands_under_way == 0; }));
  EXPECT_LT(rig_->commanded.observations, 500u);
  rig_->clock.AdvanceNs(200 * kNanosPerMilli);
  rig_->Poll();
  rig_->Poll();
  rig_->Settle();
  EXPECT_EQ(rig_->shard->FindSpace("s")->live(), 0u);
  EXPECT_TRUE(rig_->shard->CheckInvariants().has_value());
}

// Few nodes wait for others to be linked with them; not those that a rebuild waits for.
TEST_F(ShardRebuildTest, ItsBatchesDoNotWaitForOthers) {
  constexpr int kCount = 600;
  constexpr uint32_t kDimension = 80;  // walked with codes, and linked in batches
  ShardOptions options = Options();
  options.link_wait_ns = kNanosPerSecond;
  options.unlinked_limit_bytes = size_t{32} * 40 * (128 + 64);  // 40 nodes leave a graph at once
  Make(1, {}, options);
  RigSession session = Open();
  for (int i = 0; i < kCount; ++i) {
    ASSERT_NO_FATAL_FAILURE(Upsert(&session, i, LatentVector(i, kDimension)));
  }
  const Space& space = *rig_->shard->FindSpace("s");
  const auto all_linked = [&] { return space.unlinked_count() == 0; };
  rig_->PollUntil(all_linked);
  rig_->clock.AdvanceNs(options.link_wait_ns);
  ASSERT_TRUE(rig_->PollUntil(all_linked));
  ASSERT_TRUE(space.LinksInBatches());
  const int64_t began = rig_->clock.MonotonicNs();
  EXPECT_EQ(rig_->Command(SpaceCommand::kRebuild, "s").observations, uint64_t{kCount});
  EXPECT_LT(rig_->clock.MonotonicNs() - began, options.link_wait_ns / 2);
  // Afterwards they do again.
  ASSERT_NO_FATAL_FAILURE(Upsert(&session, kCount, LatentVector(kCount, kDimension)));
  EXPECT_FALSE(rig_->PollUntil(all_linked, 1'000));
  rig_->clock.AdvanceNs(options.link_wait_ns);
  EXPECT_TRUE(rig_->PollUntil(all_linked));
}

TEST_F(ShardRebuildTest, NothingOfItAllocates) {
  Make();
  RigSession session = Open();
  ASSERT_NO_FATAL_FAILURE(Fill(&session, 600));
  rig_->Settle();
  (void)rig_->Command(SpaceCommand::kCompact, "s");
  rig_->PushCommand(SpaceCommand::kRebuild, "s");
  rig_->Poll();
  rig_->poll_allocations = 0;
  EXPECT_TRUE(rig_->PollUntil([&] { return rig_->commands_under_way == 0; }));
  EXPECT_EQ(rig_->commanded.observations, 600u);
  EXPECT_EQ(rig_->poll_allocations, 0u);
}

}  // namespace
}  // namespace engram
