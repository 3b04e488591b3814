// What is done to a whole space: compacting and dropping it, by a clock of the test's own.

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "tests/index/shard_rig.h"

namespace engram {
namespace {

class ShardCommandsTest : public testing::Test {
 protected:
  void Make(uint16_t shards = 1, const RigWorld& world = {}) {
    ShardOptions options = ShardRig::SmallOptions();
    options.snapshot_keep_ns = kNanosPerMilli;
    rig_.emplace(options, 1, 256, 4,
                 RigShards{.shards = shards, .partitions = shards, .max_partitions = shards},
                 world);
  }
  RigSession Open(const HelloParams& params = {.metric = Metric::kL2}) {
    return rig_->Open(0, ++origins_, "s", params);
  }
  RefusalReason Upsert(RigSession* session, const std::string& id, std::vector<float> vector) {
    return rig_->Observe(session, {.id = id, .vector = std::move(vector)}).reason;
  }
  void Fill(RigSession* session, int count) {
    for (int i = 0; i < count; ++i) {
      ASSERT_EQ(Upsert(session, "id" + std::to_string(i), {static_cast<float>(i), 1}),
                RefusalReason::kNone);
    }
  }
  std::set<std::string> Recalled(const std::vector<float>& query) {
    std::set<std::string> ids;
    for (size_t s = 0; s < rig_->shards.size(); ++s) {
      for (const Hit& hit : rig_->Recall("s", query, {.k = 1'000}, s).hits) ids.insert(hit.id);
    }
    return ids;
  }
  const Space& space() { return *rig_->shard->FindSpace("s"); }

  std::optional<ShardRig> rig_;
  Origin origins_ = 10;
};

// A few deletes in a large graph do not make a sweep pay, until somebody asks for one.
TEST_F(ShardCommandsTest, CompactSweepsWhatIsTooLittleForUpkeep) {
  Make();
  RigSession session = Open();
  Fill(&session, 5'000);
  rig_->Settle();
  ASSERT_EQ(space().linked(), 5'000u);
  for (const char* id : {"id7", "id8"}) {
    ASSERT_EQ(rig_->Observe(&session, {.op = ObservationOp::kDelete, .id = id}).reason,
              RefusalReason::kNone);
  }
  rig_->clock.AdvanceNs(10 * kNanosPerMilli);
  rig_->Settle();
  ASSERT_EQ(space().retired(), 2u) << "nothing is shown";
  const CommandRequest done = rig_->Command(SpaceCommand::kCompact, "s");
  EXPECT_EQ(done.observations, 2u);
  EXPECT_LT(done.bytes_after, done.bytes_before);
  EXPECT_EQ(space().retired(), 0u);
  EXPECT_TRUE(rig_->shard->CheckInvariants().has_value());
  EXPECT_EQ(Recalled({0, 1}).size(), 1'000u);
}

TEST_F(ShardCommandsTest, CompactOfNothingIsDoneAtOnce) {
  Make();
  RigSession session = Open();
  Fill(&session, 3);
  EXPECT_EQ(rig_->Command(SpaceCommand::kCompact, "s").observations, 0u);
}

TEST_F(ShardCommandsTest, ADroppedSpaceIsAsIfItHadNeverBeen) {
  Make();
  RigSession session = Open();
  Fill(&session, 100);
  rig_->Settle();
  const uint64_t before = rig_->counter(ShardCounter::kMemoryUsedBytes);
  const CommandRequest done = rig_->Command(SpaceCommand::kDrop, "s");
  EXPECT_EQ(done.observations, 100u);
  EXPECT_GT(done.bytes_before, 0u);
  EXPECT_EQ(done.bytes_after, 0u);
  EXPECT_EQ(rig_->shard->FindSpace("s"), nullptr);
  EXPECT_EQ(rig_->Recall("s", {0, 1}).reason, RefusalReason::kUnknownSpace);
  // Its session is gone, with a connection and for a resume.
  EXPECT_EQ(Upsert(&session, "late", {1, 1}), RefusalReason::kSessionExpired);
  EXPECT_EQ(rig_->Hello(0, 99, "s", {.session = session.id}).first, RefusalReason::kSessionExpired);
  const uint64_t asked = rig_->PushIntrospect(0);
  ASSERT_TRUE(rig_->PollUntil([&] { return rig_->answers[asked].done; }));
  EXPECT_TRUE(rig_->answers[asked].records.empty());
  rig_->Settle();
  EXPECT_LT(rig_->counter(ShardCounter::kMemoryUsedBytes), before);
}

// The name takes no second place of the four that there are.
TEST_F(ShardCommandsTest, TheNameIsUsedAgainWithAnotherMetricAndDimension) {
  Make();
  for (int round = 0; round < 10; ++round) {
    const bool is_even = round % 2 == 0;
    RigSession session = Open({.metric = is_even ? Metric::kL2 : Metric::kInnerProduct});
    const std::vector<float> vector(is_even ? 2 : 5, 1.0F);
    ASSERT_EQ(Upsert(&session, "r" + std::to_string(round), vector), RefusalReason::kNone);
    EXPECT_EQ(Recalled(vector), (std::set<std::string>{"r" + std::to_string(round)}));
    EXPECT_EQ(rig_->Command(SpaceCommand::kDrop, "s").observations, 1u);
  }
  EXPECT_TRUE(rig_->shard->CheckInvariants().has_value());
}

TEST_F(ShardCommandsTest, AConfiguredSpaceIsThereAgainAndEmpty) {
  RigWorld world;
  world.spaces = {{"s", {.metric = Metric::kL2, .dimension = 2, .quota_observations = 2}}};
  Make(1, world);
  for (int round = 0; round < 2; ++round) {
    RigSession session = Open({});
    ASSERT_EQ(Upsert(&session, "a", {1, 1}), RefusalReason::kNone);
    ASSERT_EQ(Upsert(&session, "b", {1, 1}), RefusalReason::kNone);
    EXPECT_EQ(Upsert(&session, "c", {1, 1}), RefusalReason::kQuotaObservations);
    ASSERT_EQ(rig_->Command(SpaceCommand::kDrop, "s").observations, 2u);
    ASSERT_NE(rig_->shard->FindSpace("s"), nullptr);
    EXPECT_EQ(Recalled({1, 1}), std::set<std::string>());
    EXPECT_EQ(rig_->Hello(0, 50, "s", {.metric = Metric::kCosine}).first,
              RefusalReason::kMetricMismatch);
  }
}

// While it lasts nothing is found, in any shard, and nothing taken.
TEST_F(ShardCommandsTest, AllShardsLetGoTogether) {
  Make(4);
  RigSession session = Open();
  Fill(&session, 64);
  ASSERT_EQ(Recalled({0, 1}).size(), 64u);
  rig_->PushCommand(SpaceCommand::kDrop, "s");
  for (size_t s = 0; s < 4; ++s) {
    const uint64_t recall = rig_->PushRecall(0, "s", {0, 1}, {}, s);
    while (!rig_->answers[recall].done) rig_->PollShard(s);
    EXPECT_EQ(rig_->answers[recall].reason, RefusalReason::kUnknownSpace);
  }
  EXPECT_TRUE(rig_->PollUntil([&] { return rig_->commands_under_way == 0; }));
  EXPECT_EQ(rig_->commanded.observations, 64u);
  session = Open({.metric = Metric::kCosine});
  ASSERT_EQ(Upsert(&session, "new", {1, 2, 3}), RefusalReason::kNone);
  EXPECT_EQ(Recalled({1, 2, 3}), (std::set<std::string>{"new"}));
}

// What had been taken when the drop began is answered, and then gone: it is not stored afterwards.
TEST_F(ShardCommandsTest, WhatIsUnderWayIsAnsweredFirst) {
  Make(4);
  RigSession session = Open();
  Fill(&session, 8);
  const SlotId first = rig_->PushObserve(session, 9, {.id = "under way", .vector = {1, 1}});
  rig_->PollShard(0);
  rig_->PushCommand(SpaceCommand::kDrop, "s");
  EXPECT_TRUE(rig_->PollUntil([&] { return rig_->commands_under_way == 0; }));
  bool answered = false;
  for (const auto& [producer, completion] : rig_->completions) {
    if (completion.slot == first && completion.sequence == 9) answered = true;
  }
  EXPECT_TRUE(answered);
  session = Open();
  ASSERT_EQ(Upsert(&session, "new", {1, 2}), RefusalReason::kNone);
  EXPECT_EQ(Recalled({1, 2}), (std::set<std::string>{"new"}));
}

// Also where another shard has drawn stamps ahead of the clock.
TEST_F(ShardCommandsTest, WhatComesAfterADropIsLaterThanIt) {
  Make(2);
  RigSession session = Open({.metric = Metric::kL2, .shard = 1});
  Fill(&session, 8);
  rig_->clock.StepWallNs(-kNanosPerSecond);
  ASSERT_EQ(rig_->Command(SpaceCommand::kDrop, "s").observations, 8u);
  session = Open();
  Fill(&session, 4);
  EXPECT_EQ(Recalled({0, 1}), (std::set<std::string>{"id0", "id1", "id2", "id3"}));
}

// Memory is given back in parts, between other work.
TEST_F(ShardCommandsTest, ALargeSpaceIsFreedInSlices) {
  Make();
  uint64_t left = 0;
  for (int round = 0; round < 3; ++round) {
    RigSession session = Open();
    Fill(&session, 10'000);
    rig_->Settle();
    const uint64_t before = rig_->counter(ShardCounter::kMemoryUsedBytes);
    ASSERT_EQ(rig_->Command(SpaceCommand::kDrop, "s").observations, 10'000u);
    EXPECT_FALSE(rig_->shard->Idle()) << "all of it at once";
    rig_->Settle();
    const uint64_t after = rig_->counter(ShardCounter::kMemoryUsedBytes);
    EXPECT_LT(after, before / 2);
    // What recalls and linking need room for stays.
    EXPECT_TRUE(round == 0 || after == left) << after << " and before " << left;
    left = after;
  }
}

}  // namespace
}  // namespace engram
