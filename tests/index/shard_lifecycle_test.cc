// What ends by age in a shard, and quotas, by a clock of the test's own.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/shard_rig.h"

namespace engram {
namespace {

constexpr int64_t kTtlNs = 10 * kNanosPerSecond;

class ShardLifecycleTest : public testing::Test {
 protected:
  struct Layout {
    uint16_t shards = 1;
    uint16_t max_partitions = 1;
  };
  void Make(const SpaceSettings& settings) { Make(settings, Layout(), ShardRig::SmallOptions()); }
  void Make(const SpaceSettings& settings, const Layout& layout, const ShardOptions& options) {
    RigWorld world;
    world.spaces = {{"s", settings}};
    rig_.emplace(options, 1, 256, 16,
                 RigShards{.shards = layout.shards,
                           .partitions = layout.max_partitions,
                           .max_partitions = layout.max_partitions},
                 world);
  }
  static SpaceSettings Settings() {
    SpaceSettings settings;
    settings.metric = Metric::kL2;
    settings.partitions = 1;
    return settings;
  }

  RigSession Nobody(const std::string& id) {
    RigSession nobody;
    nobody.origin = 1;
    nobody.space = "s";
    const SpaceEntry& entry = *rig_->entry("s");
    nobody.shard =
        entry.ShardOf(PartitionOf(SpaceCatalogue::HashOfId(id), entry.partitions())).value();
    return nobody;
  }
  RefusalReason Do(ObservationOp op, const std::string& id, CommitStamp* stamp = nullptr) {
    Observation observation{.op = op, .id = id};
    if (op == ObservationOp::kUpsert) {
      observation.vector = {static_cast<float>(MixBits(std::hash<std::string>()(id)) % 97), 1};
    }
    const auto [completion, request] = rig_->ObserveAlone(Nobody(id), observation);
    if (stamp != nullptr) *stamp = request.stamp;
    return completion.reason;
  }
  RefusalReason Upsert(const std::string& id) { return Do(ObservationOp::kUpsert, id); }

  std::set<std::string> Recalled() {
    std::set<std::string> ids;
    for (size_t s = 0; s < rig_->shards.size(); ++s) {
      for (const Hit& hit : rig_->Recall("s", {1, 1}, {.k = 1'000}, s).hits) ids.insert(hit.id);
    }
    return ids;
  }
  uint64_t Contents() const {
    uint64_t contents = 0;
    for (const auto& shard : rig_->shards) {
      const Space* part = shard->FindSpace("s");
      if (part != nullptr) contents += part->live() + part->hidden();
    }
    return contents;
  }
  void ExpectSound() {
    for (const auto& shard : rig_->shards) {
      const auto sound = shard->CheckInvariants();
      ASSERT_TRUE(sound.has_value()) << sound.error().message;
    }
  }

  std::optional<ShardRig> rig_;
};

TEST_F(ShardLifecycleTest, AnObservationIsThereUntilItsTtlAndNotLonger) {
  SpaceSettings settings = Settings();
  settings.ttl_ns = kTtlNs;
  Make(settings);
  ASSERT_EQ(Upsert("a"), RefusalReason::kNone);
  rig_->clock.AdvanceNs(kTtlNs / 2);
  ASSERT_EQ(Upsert("b"), RefusalReason::kNone);
  rig_->clock.AdvanceNs(kTtlNs / 2 - kNanosPerMilli);
  EXPECT_EQ(Recalled(), (std::set<std::string>{"a", "b"}));
  rig_->clock.AdvanceNs(kNanosPerMilli);
  EXPECT_EQ(Recalled(), (std::set<std::string>{"b"}));
  EXPECT_EQ(rig_->counter(ShardCounter::kObservationsExpired), 1u);
  rig_->clock.AdvanceNs(kTtlNs / 2);
  EXPECT_EQ(Recalled(), std::set<std::string>());
  ExpectSound();
  // Nothing is left of them.
  rig_->clock.AdvanceNs(kTtlNs);
  rig_->Settle();
  EXPECT_EQ(rig_->shard->FindSpace("s")->retired(), 0u);
}

// Nobody asks and nothing comes: it ends all the same, and gives back its place.
TEST_F(ShardLifecycleTest, ItEndsWithoutARecall) {
  SpaceSettings settings = Settings();
  settings.ttl_ns = kTtlNs;
  Make(settings);
  ASSERT_EQ(Upsert("a"), RefusalReason::kNone);
  rig_->clock.AdvanceNs(kTtlNs);
  rig_->Settle();
  EXPECT_EQ(Contents(), 0u);
}

TEST_F(ShardLifecycleTest, AnUpdateBeginsAnewAndHidingDoesNot) {
  SpaceSettings settings = Settings();
  settings.ttl_ns = kTtlNs;
  Make(settings);
  for (const char* id : {"updated", "hidden", "restored", "left"}) {
    ASSERT_EQ(Upsert(id), RefusalReason::kNone);
  }
  rig_->clock.AdvanceNs(kTtlNs - kNanosPerSecond);
  ASSERT_EQ(Upsert("updated"), RefusalReason::kNone);
  ASSERT_EQ(Do(ObservationOp::kSuppress, "hidden"), RefusalReason::kNone);
  ASSERT_EQ(Do(ObservationOp::kSuppress, "restored"), RefusalReason::kNone);
  ASSERT_EQ(Do(ObservationOp::kRestore, "restored"), RefusalReason::kNone);
  EXPECT_EQ(Recalled(), (std::set<std::string>{"updated", "restored", "left"}));
  EXPECT_EQ(Contents(), 4u);
  rig_->clock.AdvanceNs(kNanosPerSecond);
  EXPECT_EQ(Recalled(), (std::set<std::string>{"updated"}));
  EXPECT_EQ(Contents(), 1u) << "the hidden one ends, too";
  ASSERT_EQ(Do(ObservationOp::kRestore, "hidden"), RefusalReason::kNone);
  EXPECT_EQ(Recalled(), (std::set<std::string>{"updated"}));
  ExpectSound();
}

// A recall at an earlier stamp sees what lived then, to the stamp exactly.
TEST_F(ShardLifecycleTest, SnapshotsSeeWhatLivedAtTheirStamp) {
  SpaceSettings settings = Settings();
  settings.ttl_ns = kTtlNs;
  ShardOptions options = ShardRig::SmallOptions();
  options.snapshot_keep_ns = 5 * kNanosPerSecond;
  Make(settings, Layout(), options);
  CommitStamp stamp = kNoStamp;
  ASSERT_EQ(Do(ObservationOp::kUpsert, "a", &stamp), RefusalReason::kNone);
  rig_->clock.AdvanceNs(kTtlNs + kNanosPerSecond);
  const CommitStamp end = stamp + static_cast<CommitStamp>(kTtlNs);
  EXPECT_EQ(rig_->Recall("s", {1, 1}, {.snapshot = end - 1}).hits.size(), 1u);
  EXPECT_EQ(rig_->Recall("s", {1, 1}, {.snapshot = end}).hits.size(), 0u);
}

// With a graph, at a rate: what expires keeps up with what comes, and its places are used again.
TEST_F(ShardLifecycleTest, TheSteadyStateNeedsNoMoreMemoryAndTakesNone) {
  SpaceSettings settings = Settings();
  settings.ttl_ns = 2 * kNanosPerSecond;
  Make(settings, Layout(), ShardRig::SmallOptions());
  RigSession session = rig_->Open(0, 5, "s", {.metric = Metric::kL2, .dimension = 2});
  size_t nodes = 0;
  uint64_t bytes = 0;
  uint64_t allocations = 0;
  constexpr int kRounds = 8;
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < 6'000; ++i) {
      const float at = static_cast<float>(MixBits(static_cast<uint64_t>(i)) % 100'000);
      const Completion completion = rig_->Observe(
          &session, {.id = "id" + std::to_string(round * 6'000 + i), .vector = {at, at / 3}});
      ASSERT_EQ(completion.reason, RefusalReason::kNone);
      rig_->clock.AdvanceNs(2 * kNanosPerSecond / 6'000);
      for (int polls = 0; polls < 4; ++polls) rig_->Poll();
    }
    const Space& space = *rig_->shard->FindSpace("s");
    EXPECT_TRUE(space.has_graph());
    EXPECT_LE(space.live(), 6'001u);
    EXPECT_LT(space.backlog(), 3'000u);
    if (round < kRounds / 2) {
      nodes = space.node_count();
      bytes = space.resident_bytes();
      allocations = rig_->poll_allocations;
    }
  }
  const Space& space = *rig_->shard->FindSpace("s");
  EXPECT_LT(space.node_count(), nodes * 5 / 4);
  EXPECT_LE(space.resident_bytes(), bytes * 5 / 4);
  EXPECT_EQ(rig_->poll_allocations, allocations);
  EXPECT_GE(rig_->counter(ShardCounter::kObservationsExpired), 6'000u * (kRounds - 2));
  ExpectSound();
}

// However much has gathered, a round of upkeep gives back no more than a bound.
TEST_F(ShardLifecycleTest, MuchThatEndsAtOnceIsGivenBackInSlices) {
  constexpr uint64_t kCount = 250'000;
  SpaceSettings settings = Settings();
  settings.ttl_ns = 1'000 * kNanosPerSecond;
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{1} << 30;
  options.snapshot_keep_ns = 5 * kNanosPerSecond;
  Make(settings, Layout(), options);
  for (uint64_t i = 0; i < kCount; ++i) {
    ASSERT_EQ(Upsert("id" + std::to_string(i)), RefusalReason::kNone);
  }
  rig_->clock.AdvanceNs(settings.ttl_ns);
  ASSERT_TRUE(rig_->PollUntil([&] { return Contents() == 0; }));
  rig_->clock.AdvanceNs(options.snapshot_keep_ns);
  const Space& space = *rig_->shard->FindSpace("s");
  ASSERT_GT(space.retired(), kCount / 2);
  for (int polls = 0; polls < 100'000 && space.retired() > 0; ++polls) {
    const uint64_t before = space.reclaimed();
    const uint64_t listed = space.ended_listed();
    rig_->Poll();
    ASSERT_LE(space.reclaimed() - before, 2'048u);
    // But for the last, which go in one pass over the list.
    if (space.ended_listed() > 0) {
      ASSERT_LE(listed - space.ended_listed(), 2'048u);
    }
  }
}

TEST_F(ShardLifecycleTest, AFullQuotaRefusesWhatIsNewAndNotUpdates) {
  SpaceSettings settings = Settings();
  settings.quota_observations = 3;
  Make(settings);
  for (const char* id : {"a", "b", "c"}) ASSERT_EQ(Upsert(id), RefusalReason::kNone);
  EXPECT_EQ(Upsert("d"), RefusalReason::kQuotaObservations);
  EXPECT_EQ(Upsert("b"), RefusalReason::kNone);
  ASSERT_EQ(Do(ObservationOp::kSuppress, "a"), RefusalReason::kNone);
  EXPECT_EQ(Upsert("d"), RefusalReason::kQuotaObservations) << "what is hidden is still there";
  EXPECT_EQ(Upsert("a"), RefusalReason::kNone) << "and may be updated";
  ASSERT_EQ(Do(ObservationOp::kDelete, "c"), RefusalReason::kNone);
  EXPECT_EQ(Upsert("d"), RefusalReason::kNone);
  EXPECT_EQ(Recalled(), (std::set<std::string>{"a", "b", "d"}));
}

// In a session: the number is not used up, and the client is told when to come again.
TEST_F(ShardLifecycleTest, ARefusalOfTheQuotaIsToWait) {
  SpaceSettings settings = Settings();
  settings.quota_observations = 1;
  settings.ttl_ns = kTtlNs;
  Make(settings);
  RigSession session = rig_->Open(0, 5, "s", {.metric = Metric::kL2, .dimension = 2});
  ASSERT_EQ(rig_->Observe(&session, {.id = "a", .vector = {1, 2}}).reason, RefusalReason::kNone);
  const Completion refused = rig_->Observe(&session, {.id = "b", .vector = {1, 2}});
  EXPECT_EQ(refused.reason, RefusalReason::kQuotaObservations);
  EXPECT_GT(refused.retry_after_ms, 0u);
  EXPECT_EQ(session.next, 2u);
  rig_->clock.AdvanceNs(kTtlNs);
  rig_->Poll();
  EXPECT_EQ(rig_->Observe(&session, {.id = "b", .vector = {1, 2}}).reason, RefusalReason::kNone);
}

TEST_F(ShardLifecycleTest, AQuotaOfMemoryRefuses) {
  SpaceSettings settings = Settings();
  settings.quota_bytes = size_t{1} << 20;
  Make(settings);
  int taken = 0;
  while (taken < 100'000 && Upsert("id" + std::to_string(taken)) == RefusalReason::kNone) ++taken;
  ASSERT_LT(taken, 100'000);
  EXPECT_EQ(Upsert("other"), RefusalReason::kQuotaMemory);
  const Space& space = *rig_->shard->FindSpace("s");
  EXPECT_LE(space.content_bytes(), settings.quota_bytes);
  EXPECT_GT(space.content_bytes(), settings.quota_bytes * 9 / 10) << "it is used";
  for (int i = 0; i < 20; ++i) (void)Do(ObservationOp::kDelete, "id" + std::to_string(i));
  EXPECT_EQ(Upsert("other"), RefusalReason::kNone);
}

TEST_F(ShardLifecycleTest, TheOldestMakesRoom) {
  SpaceSettings settings = Settings();
  settings.quota_observations = 3;
  settings.when_full = WhenFull::kEvictOldest;
  Make(settings);
  for (const char* id : {"a", "b", "c", "d"}) ASSERT_EQ(Upsert(id), RefusalReason::kNone);
  EXPECT_EQ(Recalled(), (std::set<std::string>{"b", "c", "d"}));
  ASSERT_EQ(Upsert("b"), RefusalReason::kNone);
  EXPECT_EQ(Recalled(), (std::set<std::string>{"b", "c", "d"})) << "an update needs no room";
  ASSERT_EQ(Upsert("e"), RefusalReason::kNone);
  EXPECT_EQ(Recalled(), (std::set<std::string>{"b", "d", "e"})) << "and makes it young";
  ASSERT_EQ(Do(ObservationOp::kSuppress, "d"), RefusalReason::kNone);
  ASSERT_EQ(Upsert("f"), RefusalReason::kNone);
  ASSERT_EQ(Do(ObservationOp::kRestore, "d"), RefusalReason::kNone);
  EXPECT_EQ(Recalled(), (std::set<std::string>{"b", "e", "f"})) << "also what is hidden";
  EXPECT_EQ(rig_->counter(ShardCounter::kObservationsEvicted), 3u);
  ExpectSound();
}

TEST_F(ShardLifecycleTest, MemoryIsMadeByTheOldest) {
  SpaceSettings settings = Settings();
  settings.quota_bytes = size_t{1} << 20;
  settings.when_full = WhenFull::kEvictOldest;
  Make(settings);
  for (int i = 0; i < 8'000; ++i) {
    ASSERT_EQ(Upsert("id" + std::to_string(i)), RefusalReason::kNone);
    ASSERT_LE(rig_->shard->FindSpace("s")->content_bytes(), settings.quota_bytes);
  }
  EXPECT_GT(rig_->counter(ShardCounter::kObservationsEvicted), 1'000u);
  EXPECT_TRUE(Recalled().contains("id7999"));
  ExpectSound();
}

// Over two partitions: the sum is bounded, by what both may have under way at the same time.
TEST_F(ShardLifecycleTest, AQuotaIsOverAllPartitions) {
  for (const WhenFull when_full : {WhenFull::kRefuse, WhenFull::kEvictOldest}) {
    SpaceSettings settings = Settings();
    settings.partitions = 2;
    settings.quota_observations = 100;
    settings.when_full = when_full;
    Make(settings, {.shards = 2, .max_partitions = 2}, ShardRig::SmallOptions());
    int refused = 0;
    for (int i = 0; i < 400; ++i) {
      const RefusalReason reason = Upsert("id" + std::to_string(i));
      refused += static_cast<int>(reason == RefusalReason::kQuotaObservations);
      ASSERT_TRUE(reason == RefusalReason::kNone || reason == RefusalReason::kQuotaObservations);
    }
    rig_->Settle();
    EXPECT_LE(Contents(), 100u);
    EXPECT_GE(Contents(), 98u);
    EXPECT_EQ(refused, when_full == WhenFull::kRefuse ? 300 : 0);
    ExpectSound();
    rig_.reset();
  }
}

// Fewer observations than partitions: what was acknowledged is there, and an older one goes.
TEST_F(ShardLifecycleTest, WhatWasJustStoredIsNotTheOldest) {
  for (const uint64_t quota : {1, 2, 3}) {
    SpaceSettings settings = Settings();
    settings.partitions = 2;
    settings.quota_observations = quota;
    settings.when_full = WhenFull::kEvictOldest;
    Make(settings, {.shards = 2, .max_partitions = 2}, ShardRig::SmallOptions());
    for (int i = 0; i < 100; ++i) {
      const std::string id = "id" + std::to_string(i);
      ASSERT_EQ(Upsert(id), RefusalReason::kNone);
      ASSERT_TRUE(Recalled().contains(id)) << id << " with a quota of " << quota;
      ASSERT_LE(Contents(), std::max<uint64_t>(quota, 2));
    }
    ExpectSound();
    rig_.reset();
  }
}

// An id that moves to a new partition ends in the old one, which says so at once.
TEST_F(ShardLifecycleTest, WhatEndsInAnEarlierPartitionCountsNoLonger) {
  SpaceSettings settings = Settings();
  settings.quota_observations = 1'000;
  ShardOptions options = ShardRig::SmallOptions();
  options.grow_partition_at = 40;
  Make(settings, {.shards = 2, .max_partitions = 2}, options);
  for (int i = 0; i < 40; ++i) {
    ASSERT_EQ(Upsert("id" + std::to_string(i)), RefusalReason::kNone);
  }
  const SpaceEntry& entry = *rig_->entry("s");
  ASSERT_EQ(entry.partitions(), 2);
  for (int i = 0; i < 40; ++i) {
    ASSERT_EQ(Upsert("id" + std::to_string(i)), RefusalReason::kNone);
    ASSERT_EQ(Contents(), 40u);
    ASSERT_EQ(entry.TotalUse().observations, 40u) << i;
  }
}

// Without a log payloads are in memory, also those of what has ended, until upkeep comes to them.
TEST_F(ShardLifecycleTest, WhatIsGivenBackCountsNoLonger) {
  SpaceSettings settings = Settings();
  settings.quota_bytes = size_t{64} << 20;
  Make(settings);
  RigSession nobody = Nobody("small");
  for (int i = 0; i < 20; ++i) {
    Observation observation{.id = "id" + std::to_string(i), .vector = {1, 2}};
    if (i >= 10) observation.payload.assign(8'000, 'p');
    ASSERT_EQ(rig_->ObserveAlone(nobody, observation).first.reason, RefusalReason::kNone);
  }
  for (int i = 10; i < 20; ++i) (void)Do(ObservationOp::kDelete, "id" + std::to_string(i));
  rig_->clock.AdvanceNs(kNanosPerSecond);
  rig_->Settle();
  const Space& space = *rig_->shard->FindSpace("s");
  ASSERT_LT(space.retired(), 5u);
  EXPECT_EQ(rig_->entry("s")->TotalUse().bytes, space.content_bytes());
}

// Not only once the space has its turn.
TEST_F(ShardLifecycleTest, WhatHasExpiredIsInNobodysWay) {
  SpaceSettings settings = Settings();
  settings.quota_observations = 2;
  settings.ttl_ns = kTtlNs;
  Make(settings);
  ASSERT_EQ(Upsert("a"), RefusalReason::kNone);
  ASSERT_EQ(Upsert("b"), RefusalReason::kNone);
  ASSERT_EQ(Upsert("c"), RefusalReason::kQuotaObservations);
  rig_->clock.AdvanceNs(kTtlNs);
  EXPECT_EQ(Upsert("c"), RefusalReason::kNone);
  EXPECT_EQ(Recalled(), (std::set<std::string>{"c"}));
}

// A shard that has nothing else to do looks at many spaces in each round.
TEST_F(ShardLifecycleTest, ManySpacesHaveTheirTurnSoon) {
  constexpr int kSpaces = 1'000;
  SpaceSettings settings = Settings();
  settings.ttl_ns = kTtlNs;
  RigWorld world;
  for (int i = 0; i < kSpaces; ++i) world.spaces.emplace_back("s" + std::to_string(i), settings);
  rig_.emplace(ShardRig::SmallOptions(), 1, 256, kSpaces, RigShards(), world);
  RigSession nobody;
  nobody.origin = 1;
  for (int i = 0; i < kSpaces; ++i) {
    nobody.space = "s" + std::to_string(i);
    (void)rig_->ObserveAlone(nobody, {.id = "a", .vector = {1, 2}});
  }
  rig_->Settle();
  rig_->clock.AdvanceNs(kTtlNs);
  for (int polls = 0; polls < 10; ++polls) rig_->Poll();
  EXPECT_EQ(rig_->counter(ShardCounter::kObservationsExpired), uint64_t{kSpaces});
}

}  // namespace
}  // namespace engram
