// The order of stamps in a space: which version stands, and what a recall at a snapshot sees.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "index/recall_job.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/space_rig.h"

namespace engram {
namespace {

// Of two versions the later stamp stands, whichever comes first.
TEST(SpaceStampsTest, TheLaterStampWins) {
  SpaceRig rig(Metric::kL2, 1, size_t{8} << 20);
  const auto upsert = [&](float value, CommitStamp stamp) {
    const StoreOutcome outcome = UpsertNumber(rig.space.get(), "a", value, stamp);
    EXPECT_EQ(outcome.reason, RefusalReason::kNone);
    return outcome.existed;
  };
  const auto value = [&] { return rig.NumberAt(kNoStamp); };
  EXPECT_FALSE(upsert(1, 500));
  EXPECT_TRUE(upsert(2, 400));
  EXPECT_EQ(value(), 1.0F);
  EXPECT_TRUE(upsert(3, 600));
  EXPECT_EQ(value(), 3.0F);
  // A delete of an earlier stamp changes nothing; one of a later stamp keeps out what was stamped
  // before it, until it is certain that nothing of that kind is under way.
  rig.space->Delete("a", 550, true);
  EXPECT_EQ(value(), 3.0F);
  EXPECT_TRUE(rig.space->Delete("a", 700, true).existed);
  EXPECT_FALSE(upsert(4, 650));
  EXPECT_EQ(value(), -1.0F);
  EXPECT_TRUE(rig.space->has_tombstones());
  EXPECT_FALSE(upsert(5, 800));
  EXPECT_EQ(value(), 5.0F);
  EXPECT_FALSE(rig.space->Delete("b", 900, true).existed) << "also of an id that is not there yet";
  ASSERT_TRUE(rig.space->CheckInvariants().has_value());
  rig.space->ForgetTombstones(899);
  EXPECT_TRUE(rig.space->has_tombstones());
  rig.space->ForgetTombstones(900);
  EXPECT_FALSE(rig.space->has_tombstones());
  EXPECT_EQ(rig.space->live(), 1u);
  ASSERT_TRUE(rig.space->CheckInvariants().has_value());
}

TEST(SpaceStampsTest, WhatComesLateAndAgainChangesNothing) {
  SpaceRig rig(Metric::kL2, 1, size_t{8} << 20);
  const auto upsert = [&](float value, CommitStamp stamp) {
    return UpsertNumber(rig.space.get(), "a", value, stamp, true).later;
  };
  EXPECT_EQ(upsert(1, 100), kNoStamp);
  EXPECT_EQ(upsert(2, 200), kNoStamp);
  for (int times = 0; times < 2; ++times) {
    EXPECT_EQ(upsert(3, 150), 200u);
    EXPECT_EQ(upsert(2, 200), 200u);
    EXPECT_EQ(rig.space->Delete("a", 180, true).later, 200u);
    EXPECT_EQ(upsert(4, 170), 200u) << "before the late delete, and after it in time";
    EXPECT_EQ(rig.space->live(), 1u);
    EXPECT_EQ(rig.space->retired(), 4u);
    for (const auto& [snapshot, value] : std::map<CommitStamp, float>{{99, -1},
                                                                      {100, 1},
                                                                      {149, 1},
                                                                      {150, 3},
                                                                      {169, 3},
                                                                      {170, 4},
                                                                      {179, 4},
                                                                      {180, -1},
                                                                      {199, -1},
                                                                      {200, 2}}) {
      EXPECT_EQ(rig.NumberAt(snapshot), value) << snapshot;
    }
  }
  ASSERT_TRUE(rig.space->CheckInvariants().has_value());
}

// What left it may come to where it lies: after a restart with other partitions.
TEST(SpaceStampsTest, AnObservationStandsBeforeATombstoneWithItsStamp) {
  OneId one;
  ExpectDid(one.Upsert(1, 100), false);
  ExpectDid(one.Delete(200), true);
  ExpectDid(one.Upsert(2, 199), false, 200);
  ExpectDid(one.Upsert(3, 200), false);
  one.ExpectLives({{100, 1}, {199, 2}, {200, 3}});
  // In the other order, and again.
  ExpectDid(one.Delete(200), true, 200);
  ExpectDid(one.Upsert(4, 200), true, 200);
  ExpectDid(one.Upsert(5, 150), true, 200);
  ExpectDid(one.Delete(201), true);
  one.ExpectLives({{100, 1}, {150, 5}, {199, 2}, {200, 3}, {201, -1}});
}

TEST(SpaceStampsTest, WhatYieldsEndsUpToItsStampAndLeavesNothingLater) {
  OneId one;
  ExpectDid(one.Upsert(1, 100), false);
  ExpectDid(one.Yield(99), true, 100);
  ExpectDid(one.Yield(100), true);
  ExpectDid(one.Yield(100), false, 100);
  one.ExpectLives({{100, -1}});
  ExpectDid(one.Upsert(2, 100), false);
  one.ExpectLives({{100, 2}});
  ExpectDid(one.Suppress(110), true);
  ExpectDid(one.Yield(100), true);
  ExpectDid(one.Restore(120), false);
  ExpectDid(one.Upsert(3, 121), false);
  one.ExpectLives({{120, -1}, {121, 3}});
}

// A recall at a snapshot sees what lived then, back to the horizon.
TEST(SpaceStampsTest, ASnapshotSeesWhatLivedThen) {
  SpaceRig rig(Metric::kL2, 2, size_t{64} << 20);
  rig.keep = 100;
  SplitMix64 random(5);
  std::vector<std::pair<CommitStamp, SpaceModel>> history;
  for (int step = 0; step < 400; ++step) {
    const std::string id = "id" + std::to_string(random.Below(40));
    if (random.Below(4) == 0) {
      rig.Delete(id);
    } else {
      rig.Upsert(id, VectorDtype::kF32, QuarterVector(&random, 2));
    }
    history.emplace_back(rig.stamp, rig.model);
    const size_t back = random.Below(std::min<size_t>(history.size(), rig.keep));
    const auto& [snapshot, model] = history[history.size() - 1 - back];
    const std::vector<float> query = QuarterVector(&random, 2);
    const RecallAnswer answer = rig.Recall(query, {.k = 50, .snapshot = snapshot});
    ASSERT_NO_FATAL_FAILURE(model.ExpectExact(answer.hits, query, 50, false)) << step;
    rig.space->Reclaim(100);
    if (step > 200) {
      EXPECT_EQ(rig.Recall(query, {.snapshot = rig.stamp - 150}).reason,
                RefusalReason::kSnapshotTooOld);
    }
  }
  EXPECT_LT(rig.space->node_count(), 300u) << "what is past the horizon gives its place";
}

// On another core: a recall of a snapshot that was allowed when it began finds what lived then, to
// its end, whatever the horizon does meanwhile and however late the reader came.
TEST(SpaceStampsTest, ASweepWaitsForWhoBeganBeforeTheHorizonRose) {
  SpaceOptions options = TestSpaceOptions(Metric::kL2, 1, kLightBuild);
  options.graph_from = 0;
  SpaceRig rig(options, size_t{8} << 20);
  rig.keep = 1'000;
  ASSERT_NO_FATAL_FAILURE(rig.StoreNumbers("id", 200));
  rig.LinkAll();
  const CommitStamp before_delete = rig.stamp;
  ASSERT_TRUE(rig.Delete("id7"));
  // The writer finds that the sweep would be too early. Only then comes the reader.
  ASSERT_TRUE(rig.space->WantsSweep());
  ASSERT_FALSE(rig.space->BeginSweep(&rig.sweep));
  const float seven = 7;
  RecallRequest request;
  request.dtype = VectorDtype::kF32;
  request.dimension = 1;
  request.k = 1;
  request.snapshot = before_delete;
  RecallJob reader(&rig.other_memory.heap);
  {
    const ReaderGuard guard(&rig.epochs, 0);
    ASSERT_EQ(reader.Begin(*rig.space, request, reinterpret_cast<const std::byte*>(&seven), 64),
              RefusalReason::kNone);
    rig.space->SetHorizon(rig.stamp);
    EXPECT_FALSE(rig.space->BeginSweep(&rig.sweep)) << "the reader is inside";
    for (int i = 0; i < 50; ++i) rig.Link(UINT32_MAX);
    while (!reader.Search(1)) {
    }
    std::vector<std::byte> slot(4'096);
    ASSERT_TRUE(reader.EmitBatch(slot));
    std::vector<Hit> hits;
    ReadBatch(slot.data(), &hits);
    ASSERT_EQ(hits.size(), 1u);
    EXPECT_EQ(hits[0].id, "id7");
    EXPECT_EQ(reader.Begin(*rig.space, request, reinterpret_cast<const std::byte*>(&seven), 64),
              RefusalReason::kSnapshotTooOld);
  }
  rig.LinkAll();
  rig.space->Reclaim(100);
  EXPECT_EQ(rig.space->retired(), 0u);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
}

}  // namespace
}  // namespace engram
