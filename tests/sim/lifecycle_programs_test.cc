// Random programs with spaces that end their observations by age, on a simulated disk: upserts,
// deletes, suppresses and restores by the clock, with checkpoints at any moment, crashes and
// restarts. What is there is compared with a map from ids to stamps.
//
// ENGRAM_LIFECYCLE_SEED=n runs the program of that seed alone; ENGRAM_LIFECYCLE_SEEDS=n so many.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "src/core/hash.h"
#include "tests/sim/durable_rig.h"
#include "tests/sim/program_seeds.h"

namespace engram {
namespace {

struct Stats {
  uint64_t expired = 0;
  uint64_t evicted = 0;
  uint64_t refused = 0;
  uint64_t checkpoints = 0;
  uint64_t crashes_in_checkpoints = 0;
  uint64_t power_cuts = 0;
  uint64_t kills = 0;
  uint64_t compared = 0;
  uint64_t reshards = 0;
};

// The definition: what a space holds.
class AgeModel {
 public:
  struct Content {
    CommitStamp stamp;
    bool hidden = false;
  };
  explicit AgeModel(const SpaceSettings& settings) : settings_(settings) {}

  bool HasRoomFor(const std::string& id) const {
    return settings_.quota_observations == 0 || settings_.when_full == WhenFull::kEvictOldest ||
           contents.contains(id) || contents.size() < settings_.quota_observations;
  }
  void Apply(ObservationOp op, const std::string& id, CommitStamp stamp) {
    if (op == ObservationOp::kUpsert) contents[id] = {.stamp = stamp};
    if (op == ObservationOp::kDelete) contents.erase(id);
    const auto found = contents.find(id);
    if (found != contents.end() && op == ObservationOp::kSuppress) found->second.hidden = true;
    if (found != contents.end() && op == ObservationOp::kRestore) found->second.hidden = false;
    if (settings_.when_full != WhenFull::kEvictOldest) return;
    while (settings_.quota_observations > 0 && contents.size() > settings_.quota_observations) {
      contents.erase(std::ranges::min_element(contents, {},
                                              [](const auto& each) { return each.second.stamp; }));
    }
  }
  void Expire(CommitStamp now) {
    if (settings_.ttl_ns == 0) return;
    std::erase_if(contents, [&](const auto& each) {
      return each.second.stamp + static_cast<CommitStamp>(settings_.ttl_ns) <= now;
    });
  }
  std::set<std::string> Live() const {
    std::set<std::string> live;
    for (const auto& [id, content] : contents) {
      if (!content.hidden) live.insert(id);
    }
    return live;
  }

  std::map<std::string, Content> contents;

 private:
  SpaceSettings settings_;
};

// One program: a machine, one space, and what it must hold.
class LifecycleProgram {
 public:
  LifecycleProgram(uint64_t seed, Stats* stats)
      : random_(seed), stats_(stats), rig_(seed), settings_(Draw()), model_(settings_) {
    setup_ = DurableRig::SmallSetup();
    DrawShards();
    setup_.spaces = {{"space", settings_}};
  }

  void Run() {
    ASSERT_NO_FATAL_FAILURE(Start());
    const int lives = 2 + static_cast<int>(random_.Next() % 4);
    for (int life = 0; life < lives; ++life) {
      const int steps = 5 + static_cast<int>(random_.Next() % 120);
      for (int step = 0; step < steps; ++step) {
        const uint64_t completed = rig_.checkpointer->completed();
        ASSERT_NO_FATAL_FAILURE(Step());
        // Before what the checkpoint got wrong is evicted.
        if (rig_.checkpointer->completed() > completed && random_.Next() % 2 == 0) break;
      }
      ASSERT_NO_FATAL_FAILURE(CrashAndStart());
    }
  }

 private:
  SpaceSettings Draw() {
    SpaceSettings settings;
    settings.metric = Metric::kL2;
    settings.durability = Durability::kFsync;
    settings.partitions = 1;
    const uint64_t kind = random_.Next() % 4;
    if (kind != 1) settings.ttl_ns = (1 + static_cast<int64_t>(random_.Next() % 4)) * kTickNs * 20;
    if (kind != 0) settings.quota_observations = 1 + random_.Next() % (kind == 3 ? 60 : 6);
    if (kind >= 2) settings.when_full = WhenFull::kEvictOldest;
    if (kind == 1 && random_.Next() % 2 == 0) settings.when_full = WhenFull::kEvictOldest;
    return settings;
  }

  // A TTL holds to the observation over any number of shards.
  void DrawShards() {
    if (settings_.quota_observations > 0) return;
    const auto shards = static_cast<uint16_t>(1 + random_.Next() % 2);
    if (shards != setup_.shards) ++stats_->reshards;
    setup_.shards = shards;
    setup_.max_partitions = shards;
    settings_.partitions = shards;
    setup_.spaces = {{"space", settings_}};
  }

  void Step() {
    const uint64_t dice = random_.Next() % 32;
    if (dice == 3) rig_.clock.AdvanceNs(static_cast<int64_t>(random_.Next() % 20) * kTickNs);
    if (dice <= 1 && !rig_.checkpointer->busy()) rig_.checkpointer->Request();
    if (dice == 2) {
      ASSERT_NO_FATAL_FAILURE(Compare());
    }
    for (uint64_t polls = random_.Next() % 8; polls > 0; --polls) Poll();
    // What is due has ended before the model is asked.
    Poll();
    std::string id = "id" + std::to_string(random_.Next() % ids_);
    const uint64_t kind = random_.Next() % 16;
    if (kind >= 11 && !model_.contents.empty() && random_.Next() % 4 > 0) {
      const auto place = static_cast<ptrdiff_t>(random_.Next() % model_.contents.size());
      id = std::next(model_.contents.begin(), place)->first;
    }
    const ObservationOp op = kind < 11   ? ObservationOp::kUpsert
                             : kind < 13 ? ObservationOp::kDelete
                             : kind < 15 ? ObservationOp::kSuppress
                                         : ObservationOp::kRestore;
    Do(op, id);
  }

  RigSession Nobody(const std::string& id) {
    RigSession nobody;
    nobody.origin = 1;
    nobody.space = "space";
    const SpaceEntry& entry = *rig_.shards->entry("space");
    nobody.shard =
        entry.ShardOf(PartitionOf(SpaceCatalogue::HashOfId(id), entry.partitions())).value();
    return nobody;
  }
  Observation Make(ObservationOp op, const std::string& id) {
    Observation observation{.op = op, .id = id};
    if (op == ObservationOp::kUpsert) {
      observation.vector = {static_cast<float>(random_.Next() % 100), 1, 2, 3};
      observation.payload = std::string(random_.Next() % 300, 'p');
    }
    return observation;
  }

  void Do(ObservationOp op, const std::string& id) {
    // Nothing may end while it is judged: the model does not know when that is.
    if (EndsSoon(kJudgedWithinNs)) rig_.clock.AdvanceNs(kJudgedWithinNs);
    Poll();
    model_.Expire(Now());
    for (int tries = 0; tries < 2'000; ++tries) {
      const bool has_room = op != ObservationOp::kUpsert || model_.HasRoomFor(id);
      const auto [completion, request] = rig_.shards->ObserveAlone(Nobody(id), Make(op, id));
      if (completion.reason == RefusalReason::kQuotaObservations) {
        EXPECT_FALSE(has_room) << id;
        ++stats_->refused;
        return;
      }
      if (completion.reason == RefusalReason::kNone) {
        EXPECT_TRUE(has_room) << id;
        model_.Expire(request.stamp);
        model_.Apply(op, id, request.stamp);
        return;
      }
      // The log's disk is slow, or the next segment not there yet.
      for (int polls = 0; polls < 20; ++polls) Poll();
      model_.Expire(Now());
      if (EndsSoon(kJudgedWithinNs)) rig_.clock.AdvanceNs(kJudgedWithinNs);
      rig_.shards->Poll();
      model_.Expire(Now());
    }
    ADD_FAILURE() << "the log takes nothing";
  }

  bool EndsSoon(int64_t within_ns) {
    if (settings_.ttl_ns == 0) return false;
    return std::ranges::any_of(model_.contents, [&](const auto& each) {
      const CommitStamp end = each.second.stamp + static_cast<CommitStamp>(settings_.ttl_ns);
      return end <= Now() + static_cast<CommitStamp>(within_ns);
    });
  }

  CommitStamp Now() { return static_cast<CommitStamp>(rig_.clock.WallNs()); }
  void Poll() {
    rig_.shards->Poll();
    rig_.store->Poll();
    // Seldom, so that much happens between the steps of a checkpoint.
    if (random_.Next() % slowness_ == 0) rig_.checkpointer->Poll([](const Note&) {});
  }

  std::set<std::string> Stored() {
    std::set<std::string> stored;
    uint64_t contents = 0;
    for (const auto& shard : rig_.shards->shards) {
      const auto sound = shard->CheckInvariants();
      EXPECT_TRUE(sound.has_value()) << sound.error().message;
      const Space* part = shard->FindSpace("space");
      if (part == nullptr) continue;
      contents += part->live() + part->hidden();
      for (const NodeId node : LiveNodes(*part)) {
        EXPECT_TRUE(stored.insert(std::string(part->Get(node).id)).second) << "twice";
      }
    }
    contents_ = contents;
    return stored;
  }

  void Compare() {
    if (EndsSoon(kJudgedWithinNs)) rig_.clock.AdvanceNs(kJudgedWithinNs);
    for (int polls = 0; polls < 3; ++polls) Poll();
    model_.Expire(Now());
    ++stats_->compared;
    ASSERT_EQ(Stored(), model_.Live());
    ASSERT_EQ(contents_, model_.contents.size());
  }

  // With something under way, which may be there afterwards or not.
  void CrashAndStart() {
    if (rig_.checkpointer->busy()) ++stats_->crashes_in_checkpoints;
    stats_->checkpoints += rig_.checkpointer->completed();
    for (const auto& shard : rig_.shards->shards) {
      stats_->expired += shard->counter(ShardCounter::kObservationsExpired).Read();
      stats_->evicted += shard->counter(ShardCounter::kObservationsEvicted).Read();
    }
    const bool under_way = random_.Next() % 2 == 0;
    const std::string id = "id" + std::to_string(random_.Next() % 100);
    if (under_way) {
      (void)rig_.shards->PushObserve(Nobody(id), 1, Make(ObservationOp::kUpsert, id));
      for (uint64_t polls = random_.Next() % 6; polls > 0; --polls) Poll();
    }
    if (random_.Next() % 2 == 0) {
      rig_.CutPower();
      ++stats_->power_cuts;
    } else {
      rig_.Kill();
      ++stats_->kills;
    }
    rig_.clock.AdvanceNs(static_cast<int64_t>(random_.Next() % 8) * kTickNs);
    DrawShards();
    ASSERT_NO_FATAL_FAILURE(Start());
    if (EndsSoon(kJudgedWithinNs)) rig_.clock.AdvanceNs(kJudgedWithinNs);
    for (int polls = 0; polls < 3; ++polls) Poll();
    model_.Expire(Now());
    const auto known = model_.contents.find(id);
    const CommitStamp before = known == model_.contents.end() ? kNoStamp : known->second.stamp;
    // It was logged: then all of it has happened.
    if (const CommitStamp stamp = StampOf(id); under_way && stamp > before) {
      model_.Apply(ObservationOp::kUpsert, id, stamp);
    }
    ASSERT_NO_FATAL_FAILURE(Compare());
  }
  // Of a live one; kNoStamp: there is none.
  CommitStamp StampOf(const std::string& id) {
    for (const auto& shard : rig_.shards->shards) {
      const Space* part = shard->FindSpace("space");
      const NodeId node = part == nullptr ? kNoNode : part->FindLive(id);
      if (node != kNoNode) return part->ContentOf(node)->stamp;
    }
    return kNoStamp;
  }

  void Start() {
    auto started = rig_.Start(setup_);
    ASSERT_TRUE(started.has_value()) << started.error().message;
    ASSERT_EQ(rig_.Recover(), "");
  }

  static constexpr int64_t kTickNs = 50 * kNanosPerMilli;
  // Between the model's look and the shard's.
  static constexpr int64_t kJudgedWithinNs = 5 * kNanosPerMilli;

  SplitMix64 random_;
  Stats* const stats_;
  DurableRig rig_;
  DurableSetup setup_;
  SpaceSettings settings_;
  AgeModel model_;
  const uint64_t ids_ = 4 + random_.Next() % 100;
  const uint64_t slowness_ = 1 + random_.Next() % 40;  // of the checkpointer
  uint64_t contents_ = 0;
};

// A log, or a checkpoint, that a test steps itself, of a space with a quota.
class LifecycleStepsTest : public testing::Test {
 protected:
  LifecycleStepsTest() : rig_(3), setup_(DurableRig::SmallSetup()) {}
  void Start(uint64_t quota, WhenFull when_full = WhenFull::kEvictOldest) {
    SpaceSettings settings;
    settings.metric = Metric::kL2;
    settings.durability = Durability::kFsync;
    settings.quota_observations = quota;
    settings.when_full = when_full;
    setup_.spaces = {{"space", settings}};
    ASSERT_TRUE(rig_.Start(setup_).has_value());
    ASSERT_EQ(rig_.Recover(), "");
  }
  void Push(ObservationOp op, const std::string& id) {
    RigSession nobody;
    nobody.origin = 1;
    nobody.space = "space";
    Observation observation{.op = op, .id = id};
    if (op == ObservationOp::kUpsert) observation.vector = {1, 2};
    (void)rig_.shards->PushObserve(nobody, 1, observation);
  }
  void AwaitAll() {
    EXPECT_TRUE(rig_.shards->PollUntil([&] { return rig_.shards->outstanding(0) == 0; }));
    rig_.store->Poll();
  }
  void Apply(ObservationOp op, const std::string& id) {
    Push(op, id);
    AwaitAll();
  }
  void Upsert(const std::string& id) { Apply(ObservationOp::kUpsert, id); }
  void Delete(const std::string& id) { Apply(ObservationOp::kDelete, id); }
  void PollCheckpointer() {
    rig_.checkpointer->Poll([](const Note&) {});
  }
  // The shard has noted from where it will be replayed.
  void BeginCheckpoint() {
    for (int i = 0; i < 100; ++i) rig_.shards->Poll();
    rig_.checkpointer->Request();
    PollCheckpointer();
    rig_.shards->Poll();
    ASSERT_EQ(rig_.store->checkpoint(0).noted.load(), 1u);
  }
  void BeginSave() {
    for (int i = 0; i < 100 && rig_.store->checkpoint(0).save.load() == 0; ++i) PollCheckpointer();
    ASSERT_EQ(rig_.store->checkpoint(0).save.load(), 1u);
  }
  void FinishAndRestart(uint64_t quota) {
    for (int i = 0; i < 10'000 && rig_.checkpointer->completed() == 0; ++i) {
      PollCheckpointer();
      rig_.shards->Poll();
    }
    ASSERT_EQ(rig_.checkpointer->completed(), 1u);
    before_ = Ids();
    rig_.Kill();
    Start(quota);
    EXPECT_GT(rig_.shards->shard->recovery().replayed.load(), 0u) << "nothing was shown";
    const auto sound = rig_.shards->shard->CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
  }
  std::set<std::string> Ids() const {
    const Space& space = *rig_.shards->shard->FindSpace("space");
    std::set<std::string> ids;
    for (const NodeId node : LiveNodes(space)) ids.emplace(space.Get(node).id);
    return ids;
  }

  DurableRig rig_;
  DurableSetup setup_;
  std::set<std::string> before_;
};

// The log that is replayed over the checkpoint has what was evicted meanwhile, and also the delete
// because of which nothing would evict it again.
TEST_F(LifecycleStepsTest, WhatWasEvictedDuringACheckpointDoesNotComeBack) {
  Start(2);
  Upsert("a");
  BeginCheckpoint();
  for (const char* id : {"b", "c", "d"}) Upsert(id);
  Delete("c");
  FinishAndRestart(2);
  EXPECT_EQ(Ids(), (std::set<std::string>{"d"}));
}

// It also has what was deleted again, and was never one too many.
TEST_F(LifecycleStepsTest, WhatComesBackForAMomentEvictsNothing) {
  Start(2);
  Upsert("a");
  BeginCheckpoint();
  Upsert("b");
  Delete("b");
  Upsert("c");
  FinishAndRestart(2);
  EXPECT_EQ(Ids(), (std::set<std::string>{"a", "c"}));
}

// It was saved before it was evicted.
TEST_F(LifecycleStepsTest, WhatIsEvictedAfterItWasSavedIsNotLoaded) {
  constexpr int kQuota = 4'000;
  Start(kQuota);
  for (int i = 0; i < kQuota; ++i) Upsert("old" + std::to_string(i));
  BeginCheckpoint();
  BeginSave();
  for (int i = 0; i < 20; ++i) rig_.shards->Poll();
  for (int i = 0; i < 6; ++i) Push(ObservationOp::kUpsert, "new" + std::to_string(i));
  for (int i = 20; i < 26; ++i) Push(ObservationOp::kDelete, "old" + std::to_string(i));
  AwaitAll();
  ASSERT_EQ(rig_.store->checkpoint(0).saved.load(), 0u) << "the save is to last longer";
  FinishAndRestart(kQuota);
  EXPECT_EQ(Ids(), before_);
}

// The delete is stored, and its place free, while the update is in the log still: nobody else takes
// that place.
TEST_F(LifecycleStepsTest, AnUpdateKeepsThePlaceOfWhatADeleteBeforeItEnds) {
  Start(3, WhenFull::kRefuse);
  for (const char* id : {"a", "b", "c"}) Upsert(id);
  int between = 0;
  for (int round = 0; round < 20; ++round) {
    Push(ObservationOp::kDelete, "a");
    rig_.shards->Poll();
    Push(ObservationOp::kUpsert, "a");
    while (rig_.shards->outstanding(0) > 1) rig_.shards->Poll();
    between += static_cast<int>(Ids() == std::set<std::string>{"b", "c"});
    Push(ObservationOp::kUpsert, "d");
    AwaitAll();
    EXPECT_EQ(Ids(), (std::set<std::string>{"a", "b", "c"}));
  }
  EXPECT_GT(between, 0) << "nothing was shown";
}

TEST(LifecycleProgramsTest, WhatIsThereIsWhatItsAgeAndQuotaSay) {
  Stats stats;
  const auto seeds = Seeds::FromPrefix("ENGRAM_LIFECYCLE", UsualSeeds(400, 30));
  seeds.ForEach([&](uint64_t seed) { LifecycleProgram(seed, &stats).Run(); });
  if (HasFailure()) return;
  ExpectAllHappened({{"expired", stats.expired},
                     {"evicted", stats.evicted},
                     {"refused", stats.refused},
                     {"checkpoints", stats.checkpoints},
                     {"crashes_in_checkpoints", stats.crashes_in_checkpoints},
                     {"power_cuts", stats.power_cuts},
                     {"kills", stats.kills},
                     {"other_shards", stats.reshards},
                     {"compared", stats.compared}},
                    seeds.count >= 400);
}

}  // namespace
}  // namespace engram
