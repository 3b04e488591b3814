// Suppressing and restoring what a space holds.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "tests/index/space_rig.h"

namespace engram {
namespace {

// A space beside its model, with what is hidden.
class HidingRig : public SpaceRig {
 public:
  using SpaceRig::SpaceRig;
  void Suppress(const std::string& id) {
    auto entry = model.entries().extract(id);
    const StoreOutcome outcome = space->Suppress(id, ++stamp, false);
    EXPECT_EQ(outcome.reason, RefusalReason::kNone);
    EXPECT_EQ(outcome.existed, !entry.empty()) << id;
    if (!entry.empty()) hidden.insert(std::move(entry));
    space->SetHorizon(stamp - std::min(stamp, keep));
  }
  void Restore(const std::string& id) {
    auto entry = hidden.extract(id);
    const StoreOutcome outcome = space->Restore(id, ++stamp);
    EXPECT_EQ(outcome.reason, RefusalReason::kNone);
    EXPECT_EQ(outcome.existed, !entry.empty()) << id;
    if (!entry.empty()) model.entries().insert(std::move(entry));
    space->SetHorizon(stamp - std::min(stamp, keep));
  }
  // As SpaceRig's, which know nothing of what is hidden.
  void Store(const std::string& id, const std::vector<float>& vector, const std::string& payload) {
    const std::vector<std::byte> bytes = EncodeVector(VectorDtype::kF32, vector);
    ObservationRef observation;
    observation.id = id;
    observation.payload = BytesOf(payload);
    observation.payload_kind = PayloadKind::kEpisode;
    observation.dtype = VectorDtype::kF32;
    observation.dimension = static_cast<uint32_t>(vector.size());
    observation.vector = bytes.data();
    observation.when_ns = static_cast<int64_t>(++stamp);
    observation.confidence = 0.25F;
    const StoreOutcome outcome = space->Upsert(observation, stamp);
    EXPECT_EQ(outcome.reason, RefusalReason::kNone);
    EXPECT_EQ(outcome.existed, model.entries().contains(id) || hidden.contains(id)) << id;
    hidden.erase(id);
    model.entries()[id] = {vector, payload, observation.when_ns, observation.confidence};
  }
  void Remove(const std::string& id) {
    const bool existed = model.entries().erase(id) + hidden.erase(id) > 0;
    EXPECT_EQ(space->Delete(id, ++stamp, false).existed, existed) << id;
    space->SetHorizon(stamp - std::min(stamp, keep));
  }
  // Recalled, got and scrolled is what the model has.
  void ExpectIsModel(const std::vector<float>& query) {
    ASSERT_NO_FATAL_FAILURE(ExpectSound());
    ASSERT_EQ(space->hidden(), hidden.size());
    const RecallAnswer answer = Recall(query, {.k = 100, .ef = 400, .with_payload = true});
    ASSERT_NO_FATAL_FAILURE(model.ExpectExact(answer.hits, query, 100, true));
    for (const auto& [id, entry] : hidden) ASSERT_EQ(space->FindLive(id), kNoNode) << id;
    for (const auto& [id, entry] : model.entries()) ASSERT_NE(space->FindLive(id), kNoNode) << id;
    uint64_t cursor = 0;
    std::vector<NodeId> nodes;
    space->Scroll(&cursor, 1'000, &nodes);
    ASSERT_EQ(nodes.size(), model.entries().size());
  }

  std::map<std::string, SpaceModel::Entry> hidden;
};

HidingRig MakeHidingRig(bool with_graph) {
  SpaceOptions options = TestSpaceOptions(Metric::kL2, 2, kLightBuild, 77);
  if (with_graph) options.graph_from = 0;
  return {options, size_t{64} << 20};
}

class SuppressTest : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(WithGraph, SuppressTest, testing::Bool());

TEST_P(SuppressTest, WhatIsSuppressedIsNotThereUntilItIsRestored) {
  HidingRig rig = MakeHidingRig(GetParam());
  SplitMix64 random(1);
  for (int i = 0; i < 40; ++i) {
    rig.Store("id" + std::to_string(i), QuarterVector(&random, 2), "about " + std::to_string(i));
  }
  if (GetParam()) rig.LinkAll();
  const std::vector<float> query = rig.model.entries()["id7"].vector;
  rig.Suppress("id7");
  rig.Suppress("id9");
  EXPECT_EQ(rig.space->live(), 38u);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query)) << "at once";
  // The version that was live is gone for good, and still it comes back.
  rig.LinkAll();
  rig.space->Reclaim(1'000);
  if (GetParam()) {
    EXPECT_EQ(rig.space->retired(), 0u) << "it was swept";
  }
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query)) << "after upkeep";
  rig.Restore("id7");
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query)) << "at once, with content and vector";
  const StoredObservation stored = rig.space->Get(rig.space->FindLive("id7"));
  EXPECT_EQ(stored.payload_kind, PayloadKind::kEpisode);
  EXPECT_EQ(stored.stamp, rig.stamp) << "it is there since";
  rig.LinkAll();
  EXPECT_EQ(rig.space->unlinked_count(), GetParam() ? 0u : 39u);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query)) << "linked";
  for (int times = 0; times < 3; ++times) {
    rig.Suppress("id7");
    ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query));
    rig.Restore("id7");
    ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query));
  }
  rig.space.reset();
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

TEST_P(SuppressTest, WhereThereIsNothingToDoNothingIsDone) {
  HidingRig rig = MakeHidingRig(GetParam());
  rig.Suppress("a");
  rig.Restore("a");
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
  rig.Store("a", {1, 1}, "a");
  rig.Store("b", {2, 1}, "b");
  EXPECT_TRUE(rig.space->Delete("dead", ++rig.stamp, true).reason == RefusalReason::kNone);
  const size_t before = rig.memory.heap.live_bytes();
  const CommitStamp latest = rig.space->latest_stamp();
  rig.Restore("a");
  rig.Suppress("c");
  rig.Restore("c");
  rig.Suppress("dead");
  rig.Restore("dead");
  EXPECT_EQ(rig.memory.heap.live_bytes(), before);
  EXPECT_EQ(rig.space->latest_stamp(), latest);
  rig.Suppress("a");
  const size_t hidden = rig.memory.heap.live_bytes();
  rig.Suppress("a");
  EXPECT_EQ(rig.memory.heap.live_bytes(), hidden);
  rig.Restore("a");
  rig.Restore("a");
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({1, 1}));
}

TEST_P(SuppressTest, UpsertAndDeleteTakeThePlaceOfWhatIsHidden) {
  for (const bool several_homes : {false, true}) {
    HidingRig rig = MakeHidingRig(GetParam());
    rig.Store("stays", {5, 5}, "stays");
    uint32_t places = 0;
    for (int times = 0; times < 20; ++times) {
      rig.Store("a", {1, 1}, "old");
      rig.Suppress("a");
      rig.Store("a", {2, 1}, "new");
      ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({1, 1}));
      rig.Restore("a");
      ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({1, 1})) << "nothing is hidden any more";
      rig.Suppress("a");
      EXPECT_EQ(rig.space->Delete("a", ++rig.stamp, several_homes).existed, true);
      EXPECT_EQ(rig.space->Delete("a", ++rig.stamp, several_homes).existed, false);
      rig.hidden.clear();
      rig.Restore("a");
      ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({1, 1}));
      rig.space->SetHorizon(rig.stamp);
      rig.space->ForgetTombstones(rig.stamp);
      rig.LinkAll();
      rig.space->Reclaim(1'000);
      if (times == 9) places = rig.space->node_count();
    }
    EXPECT_LE(rig.space->node_count(), places + 8) << "their places are used again";
    rig.space.reset();
    EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
  }
}

// Random programs of all four, with linking and sweeping between; exact where there is no graph.
TEST_P(SuppressTest, ASpaceIsItsModelAfterEveryStep) {
  HidingRig rig = MakeHidingRig(GetParam());
  SplitMix64 random(3);
  int hidden_while_linking = 0;
  for (int step = 0; step < 6'000; ++step) {
    const std::string linking = rig.LinkingId();
    const bool take_linking = !linking.empty() && random.Below(4) == 0;
    const std::string id = take_linking ? linking : "id" + std::to_string(random.Below(60));
    switch (random.Below(8)) {
      case 0:
      case 1:
        rig.Store(id, QuarterVector(&random, 2), std::string(random.Below(40), 'p'));
        break;
      case 2:
        rig.Remove(id);
        break;
      case 3:
        rig.Suppress(id);
        hidden_while_linking += static_cast<int>(take_linking);
        break;
      case 4:
        rig.Restore(id);
        break;
      default:
        rig.Link(static_cast<uint32_t>(1 + random.Below(30)));
        break;
    }
    if (step % 5 == 0) {
      ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(QuarterVector(&random, 2))) << "step " << step;
    }
  }
  EXPECT_GT(hidden_while_linking, GetParam() ? 20 : -1);
  rig.LinkAll();
  rig.space->Reclaim(10'000);
  EXPECT_LT(rig.space->retired(), 120u) << "beside 60 ids that live or are hidden";
  rig.space.reset();
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

TEST(SpaceSuppressTest, SnapshotsSeeWhatWasThereThen) {
  for (const bool several_homes : {false, true}) {
    OneId one(several_homes);
    ExpectDid(one.Upsert(1, 100), false);
    ExpectDid(one.Suppress(200), true);
    ExpectDid(one.Restore(300), true);
    ExpectDid(one.Suppress(400), true);
    ExpectDid(one.Upsert(2, 500), true);
    ExpectDid(one.Suppress(600), true);
    one.ExpectLives({{99, -1}, {100, 1}, {200, -1}, {300, 1}, {400, -1}, {500, 2}, {600, -1}});
    ExpectDid(one.Delete(700), true);
    ExpectDid(one.Restore(800), false, kNoStamp);
    one.ExpectLives({{500, 2}, {600, -1}, {900, -1}});
  }
}

// Content goes by the stamps of contents: what was hidden or restored since is superseded with it.
TEST(SpaceSuppressTest, ALateUpsertSupersedesTheContentThatWasHidden) {
  OneId one;
  one.Upsert(1, 100);
  one.Suppress(300);
  ExpectDid(one.Upsert(2, 200), true);
  one.ExpectLives({{99, -1}, {100, 1}, {200, 2}, {500, 2}});
  ExpectDid(one.Restore(400), false);
  ExpectDid(one.Upsert(3, 150), true, 200);  // That one is earlier still.
  one.ExpectLives({{99, -1}, {100, 1}, {150, 3}, {200, 2}});
}

TEST(SpaceSuppressTest, ALateUpsertSupersedesTheContentThatWasRestored) {
  for (const CommitStamp late : {150, 250, 350, 450}) {
    OneId one;
    one.Upsert(1, 100);
    one.Suppress(200);
    one.Restore(300);
    one.Suppress(400);
    if (late < 450) one.Restore(500);
    ExpectDid(one.Upsert(2, late), true);
    std::map<CommitStamp, float> lives = {{99, -1}, {100, 1}, {200, -1}, {300, 1}, {400, -1}};
    lives.erase(lives.upper_bound(late), lives.end());
    lives[late] = 2;
    one.ExpectLives(lives);
    ExpectDid(one.Suppress(600), true);
    ExpectDid(one.Restore(700), true);
    lives[600] = -1;
    lives[700] = 2;
    one.ExpectLives(lives);
  }
}

TEST(SpaceSuppressTest, ALateDeleteRemovesTheContentThatWasHiddenOrRestored) {
  for (const bool restored : {false, true}) {
    OneId one;
    one.Upsert(1, 100);
    one.Suppress(300);
    if (restored) one.Restore(400);
    ExpectDid(one.Delete(200), true);
    one.ExpectLives({{99, -1}, {100, 1}, {200, -1}, {500, -1}});
    ExpectDid(one.Restore(600), false);
    ExpectDid(one.Upsert(2, 150), false, 200);
    ExpectDid(one.Delete(50), false, 200);
    one.ExpectLives({{99, -1}, {100, 1}, {150, 2}, {200, -1}, {500, -1}});
  }
}

TEST(SpaceSuppressTest, WhatIsEarlierThanTheContentLosesAgainstAHiddenOne) {
  OneId one;
  one.Upsert(1, 100);
  one.Suppress(200);
  ExpectDid(one.Upsert(2, 50), true, 100);
  ExpectDid(one.Delete(80), true, 100);
  one.ExpectLives({{49, -1}, {50, 2}, {80, -1}, {100, 1}, {200, -1}});
  ExpectDid(one.Restore(300), true);
  ExpectDid(one.Upsert(3, 60), true, 100);
  one.ExpectLives({{49, -1}, {50, 2}, {60, 3}, {80, -1}, {100, 1}, {200, -1}, {300, 1}});
}

TEST(SpaceSuppressTest, ALateSuppressOrRestoreDoesNothing) {
  OneId one;
  one.Upsert(1, 100);
  one.Upsert(2, 300);
  ExpectDid(one.Suppress(200), true, 300);  // What it hides was replaced.
  one.ExpectLives({{99, -1}, {100, 1}, {200, -1}, {300, 2}});
  one.Suppress(500);
  ExpectDid(one.Suppress(400), false, 500);
  ExpectDid(one.Restore(400), false, 500);
  one.ExpectLives({{300, 2}, {500, -1}});
  one.Restore(700);
  ExpectDid(one.Suppress(600), false, 700);
  ExpectDid(one.Restore(600), false, 700);
  one.ExpectLives({{300, 2}, {500, -1}, {700, 2}});
  one.Delete(900);
  ExpectDid(one.Suppress(800), false, 900);
  ExpectDid(one.Restore(800), false, 900);
  one.ExpectLives({{300, 2}, {500, -1}, {700, 2}, {900, -1}});
}

// Memory runs out at a different place in each run.
TEST(SpaceSuppressTest, ARefusalForMemoryLeavesEverythingAsItWas) {
  int refused_suppresses = 0;
  for (size_t left = 0; left < 24'000; left += left < 6'000 ? 96 : 1'100) {
    HidingRig rig(Metric::kL2, 2, size_t{2} << 20);
    rig.memory.LeaveOnly(left);
    SplitMix64 random(left);
    for (int step = 0; step < 400; ++step) {
      const std::string id = "id" + std::to_string(random.Below(60));
      const uint64_t what = random.Below(8);
      if (what < 3) {
        const std::vector<float> vector = QuarterVector(&random, 2);
        ObservationRef observation;
        observation.id = id;
        observation.dtype = VectorDtype::kF32;
        observation.dimension = 2;
        observation.vector = reinterpret_cast<const std::byte*>(vector.data());
        if (rig.space->Upsert(observation, ++rig.stamp).reason != RefusalReason::kNone) continue;
        rig.hidden.erase(id);
        rig.model.entries()[id] = {vector, "", 0, 1};
      } else if (what < 5) {
        const StoreOutcome outcome = rig.space->Suppress(id, ++rig.stamp, false);
        refused_suppresses += static_cast<int>(outcome.reason == RefusalReason::kMemoryFull);
        if (outcome.existed) rig.hidden.insert(rig.model.entries().extract(id));
      } else if (what < 7) {
        const StoreOutcome outcome = rig.space->Restore(id, ++rig.stamp);
        if (outcome.existed) rig.model.entries().insert(rig.hidden.extract(id));
      } else {
        rig.Remove(id);
      }
      ASSERT_NO_FATAL_FAILURE(rig.ExpectSound()) << left << " bytes, step " << step;
      ASSERT_EQ(rig.space->hidden(), rig.hidden.size());
    }
    for (const auto& [id, entry] : rig.model.entries()) {
      ASSERT_NE(rig.space->FindLive(id), kNoNode) << id;
    }
    rig.space.reset();
    ASSERT_EQ(rig.memory.heap.live_bytes(), 0u);
  }
  EXPECT_GT(refused_suppresses, 0);
}

// The list has no place for it, as long as what was suppressed may still be asked for.
TEST(SpaceSuppressTest, ARestoreWithoutMemoryIsRefusedAndGoesOnLater) {
  HidingRig rig(Metric::kL2, 2, size_t{2} << 20);
  rig.keep = 1'000;
  for (int i = 0; i < 64; ++i) rig.Store("id" + std::to_string(i), {static_cast<float>(i), 0}, "");
  rig.Suppress("id7");
  std::vector<std::pair<std::byte*, size_t>> hoard;
  // Of every size that the heap has.
  for (size_t bytes = size_t{1} << 20; bytes >= 8; bytes -= bytes / 8) {
    while (std::byte* block = rig.memory.heap.Allocate(bytes)) hoard.emplace_back(block, bytes);
  }
  rig.taken_by_others = rig.memory.heap.live_bytes() - rig.space->resident_bytes();
  EXPECT_EQ(rig.space->Restore("id7", ++rig.stamp).reason, RefusalReason::kMemoryFull);
  EXPECT_EQ(rig.space->Suppress("id8", ++rig.stamp, false).reason, RefusalReason::kMemoryFull);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({7, 0}));
  for (const auto& [block, bytes] : hoard) rig.memory.heap.Free(block, bytes);
  rig.taken_by_others = 0;
  rig.space->SetHorizon(rig.stamp);
  rig.space->NextToLink();
  rig.Restore("id7");
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({7, 0}));
}

}  // namespace
}  // namespace engram
