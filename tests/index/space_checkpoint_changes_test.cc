// Spaces that are saved while they change: one hazard each, and how good the graph is that comes
// back. By chance: space_checkpoint_programs_test.cc.

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "index/checkpoint/space_loader.h"
#include "index/checkpoint/space_saver.h"
#include "index/recall_job.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "tests/index/space_checkpoint_rig.h"

namespace engram {
namespace {

// ---------------------------------------------------------------------------------------------
// Hazards

// With a graph and without.
class HazardTest : public testing::TestWithParam<uint32_t> {
 protected:
  SpaceOptions Options(uint64_t seed) const {
    SpaceOptions options = OptionsOf(kL2Form, 2, seed);
    options.graph_from = GetParam();
    return options;
  }
  void Upsert(CheckpointRig* rig, const std::string& id, float x, CommitStamp stamp) {
    const std::vector<float> vector{x, 1};
    ASSERT_EQ(rig->Upsert(id, vector, stamp, id + std::to_string(stamp), true).reason,
              RefusalReason::kNone);
  }
  // Places 0 to 7, each with an id; place 0 is free then.
  void Fill(CheckpointRig* rig) {
    for (uint32_t i = 0; i < 8; ++i) {
      ASSERT_NO_FATAL_FAILURE(Upsert(rig, "id" + std::to_string(i), static_cast<float>(i), 10 + i));
    }
    rig->space.Delete("id0", 30, false);
    rig->Settle();
    ASSERT_EQ(rig->space.retired(), 0u);
    ASSERT_EQ(rig->space.node_count(), 8u);
  }
  void Step(SpaceSaver* saver, size_t nodes) { SaveStep(saver, nodes, &buffer_, &bytes_); }
  static float FirstOf(const CheckpointRig& rig, const std::string& id) {
    std::array<float, 2> vector{};
    const NodeId node = rig.space.FindLive(id);
    EXPECT_NE(node, kNoNode);
    if (node != kNoNode) rig.space.GetVector(node, vector.data());
    return vector[0];
  }

  TestHeap memory_{size_t{64} << 20};
  Bytes buffer_ = Bytes(kMaxExtentBytes);
  Bytes bytes_;
};

TEST_P(HazardTest, AnIdThatMovedIsThereTwice) {
  CheckpointRig original(Options(1), &memory_);
  SpaceSaver saver(&memory_.heap);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  original.space.Delete("id6", 29, false);
  original.Settle();
  ASSERT_TRUE(saver.Begin(&original.space, 30));
  Step(&saver, 3);  // Places 0 to 2 at most.
  // id1 has been saved at its place; its update gets that of id6.
  ASSERT_NO_FATAL_FAILURE(Upsert(&original, "id1", 101, 42));
  SaveRest(&saver, &bytes_);
  CheckpointRig loaded(Options(2), &memory_);
  SpaceLoader loader(&loaded.space);
  ASSERT_TRUE(loader.Take(bytes_).has_value());
  ASSERT_TRUE(loader.Finish().has_value());
  ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
  EXPECT_EQ(loader.ended_duplicates(), 1u);
  EXPECT_EQ(FirstOf(loaded, "id1"), 101);
}

TEST_P(HazardTest, ASuppressMovesWhatIsStillToBeSavedToWhereTheSaveHasBeen) {
  for (const bool restored : {false, true}) {
    SCOPED_TRACE(restored);
    CheckpointRig original(Options(1), &memory_);
    SpaceSaver saver(&memory_.heap);
    bytes_.clear();
    ASSERT_NO_FATAL_FAILURE(Fill(&original));
    ASSERT_TRUE(saver.Begin(&original.space, 30));
    Step(&saver, 3);
    ASSERT_TRUE(original.space.Suppress("id7", 40, true).existed);  // To place 0.
    if (restored) {
      ASSERT_TRUE(original.space.Restore("id7", 41).existed);
    }
    // All that may be given back is, and its place is used again.
    original.Settle();
    for (int i = 0; i < 3; ++i) {
      ASSERT_NO_FATAL_FAILURE(Upsert(&original, "new" + std::to_string(i), 7, 50 + i));
    }
    SaveRest(&saver, &bytes_);
    original.Settle();
    EXPECT_EQ(original.space.retired(), 0u) << "what was kept is given back";
    ASSERT_TRUE(original.space.CheckInvariants().has_value());

    CheckpointRig loaded(Options(2), &memory_);
    ASSERT_NO_FATAL_FAILURE(LoadAll(bytes_, &loaded.space));
    EXPECT_EQ(FirstOf(loaded, "id7"), 7) << "as before the suppress, which is replayed";
    loaded.space.Suppress("id7", 40, true);
    EXPECT_EQ(loaded.space.FindLive("id7"), kNoNode);
    if (restored) {
      ASSERT_TRUE(loaded.space.Restore("id7", 41).existed);
      EXPECT_EQ(FirstOf(loaded, "id7"), 7);
      EXPECT_EQ(loaded.PayloadOf(loaded.space.FindLive("id7")), "id717");
    }
    ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
  }
}

TEST_P(HazardTest, OfACopyAndItsOriginalTheOneThatBeganLastStands) {
  CheckpointRig original(Options(1), &memory_);
  SpaceSaver saver(&memory_.heap);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  ASSERT_TRUE(saver.Begin(&original.space, 30));
  ASSERT_TRUE(original.space.Suppress("id7", 40, true).existed);  // Both are still to come.
  SaveRest(&saver, &bytes_);
  CheckpointRig loaded(Options(2), &memory_);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes_, &loaded.space));
  EXPECT_EQ(loaded.space.FindLive("id7"), kNoNode);
  EXPECT_EQ(loaded.space.hidden(), 1u);
  EXPECT_FALSE(loaded.space.Suppress("id7", 40, true).existed);
  EXPECT_TRUE(loaded.space.Restore("id7", 41).existed);
  EXPECT_EQ(FirstOf(loaded, "id7"), 7);
}

TEST_P(HazardTest, TheLatestContentStandsNotTheLatestBeginning) {
  CheckpointRig original(Options(1), &memory_);
  SpaceSaver saver(&memory_.heap);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  ASSERT_TRUE(original.space.Suppress("id1", 40, true).existed);  // To place 0.
  ASSERT_TRUE(original.space.Restore("id1", 41).existed);
  original.Settle();
  original.space.Delete("id6", 42, false);
  original.Settle();
  ASSERT_TRUE(saver.Begin(&original.space, 30));
  Step(&saver, 3);
  // Another home's upsert comes late, for id6's place. It has not met the suppress.
  ASSERT_NO_FATAL_FAILURE(Upsert(&original, "id1", 101, 35));
  ASSERT_EQ(FirstOf(original, "id1"), 101);
  SaveRest(&saver, &bytes_);
  CheckpointRig loaded(Options(2), &memory_);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes_, &loaded.space));
  EXPECT_EQ(FirstOf(loaded, "id1"), 101);
}

TEST_P(HazardTest, WhatWasDeletedBeforeTheSaveStaysDeleted) {
  // A delete with a stamp above `hold` that need not be replayed: another home was behind.
  CheckpointRig original(Options(1), &memory_);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  original.space.Delete("id5", 60, false);
  ASSERT_EQ(original.space.retired(), 1u);
  CheckpointRig loaded(Options(2), &memory_);
  ASSERT_NO_FATAL_FAILURE(LoadAll(Save(&original, &memory_, /*hold=*/30), &loaded.space));
  EXPECT_EQ(loaded.space.FindLive("id5"), kNoNode);
  EXPECT_EQ(loaded.space.live(), 6u);
}

TEST_P(HazardTest, TombstonesStayForWhatIsReplayed) {
  CheckpointRig original(Options(1), &memory_);
  SpaceSaver saver(&memory_.heap);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  original.space.Delete("id3", 50, true);
  ASSERT_TRUE(saver.Begin(&original.space, 45));
  // Another home's upsert was under way, is stored and answered: then all are complete.
  ASSERT_NO_FATAL_FAILURE(Upsert(&original, "id3", 77, 48));
  original.space.ForgetTombstones(60);
  SaveRest(&saver, &bytes_);
  EXPECT_TRUE(original.space.has_tombstones());
  original.space.ForgetTombstones(60);
  EXPECT_FALSE(original.space.has_tombstones()) << "once it has been saved";

  CheckpointRig loaded(Options(2), &memory_);
  ASSERT_NO_FATAL_FAILURE(LoadAll(bytes_, &loaded.space));
  EXPECT_EQ(loaded.space.tombstones(), 1u);
  ASSERT_NO_FATAL_FAILURE(Upsert(&loaded, "id3", 77, 48));
  EXPECT_EQ(loaded.space.FindLive("id3"), kNoNode);
  ASSERT_NO_FATAL_FAILURE(Upsert(&loaded, "id3", 78, 55));
  EXPECT_EQ(FirstOf(loaded, "id3"), 78);
  EXPECT_EQ(loaded.space.tombstones(), 1u) << "superseded, and still in line";
  loaded.space.ForgetTombstones(60);
  EXPECT_EQ(loaded.space.tombstones(), 0u);
  ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
}

// Of an observation and a tombstone with its stamp, in whatever places they are.
TEST_P(HazardTest, AnObservationStandsBeforeATombstoneWithItsStamp) {
  for (const bool behind : {false, true}) {
    SCOPED_TRACE(behind);
    bytes_.clear();
    CheckpointRig original(Options(1), &memory_);
    ASSERT_NO_FATAL_FAILURE(Fill(&original));
    if (behind) {
      // The tombstone gets a new place, and the observation that of the version before.
      ASSERT_NO_FATAL_FAILURE(Upsert(&original, "id8", 8, 49));
      original.space.Delete("id3", 50, true);
      original.Settle();
    } else {
      original.space.Delete("id3", 50, true);
    }
    ASSERT_NO_FATAL_FAILURE(Upsert(&original, "id3", 77, 50));
    EXPECT_EQ(original.space.FindLive("id3") == 3, behind);
    ASSERT_EQ(original.space.tombstones(), 1u);
    SpaceSaver saver(&memory_.heap);
    ASSERT_TRUE(saver.Begin(&original.space, 45));
    SaveRest(&saver, &bytes_);
    CheckpointRig loaded(Options(2), &memory_);
    ASSERT_NO_FATAL_FAILURE(LoadAll(bytes_, &loaded.space));
    EXPECT_EQ(FirstOf(loaded, "id3"), 77);
    EXPECT_EQ(loaded.space.tombstones(), 1u);
  }
}

TEST_P(HazardTest, SnapshotsBeforeTheRestartAreRefused) {
  CheckpointRig original(Options(1), &memory_);
  ASSERT_NO_FATAL_FAILURE(Fill(&original));
  CheckpointRig loaded(Options(2), &memory_);
  ASSERT_NO_FATAL_FAILURE(LoadAll(Save(&original, &memory_), &loaded.space));
  RecallJob job(&memory_.heap);
  const std::vector<float> query{1, 1};
  const CommitStamp latest = loaded.space.latest_stamp();
  EXPECT_EQ(RunRecall(loaded.space, &job, query, {.k = 3, .snapshot = latest - 1}).reason,
            RefusalReason::kSnapshotTooOld);
  EXPECT_EQ(RunRecall(loaded.space, &job, query, {.k = 3, .snapshot = latest}).hits.size(), 3u);
}

INSTANTIATE_TEST_SUITE_P(GraphFrom, HazardTest, testing::Values(0U, 1'000U));

// ---------------------------------------------------------------------------------------------
// Quality

std::vector<float> NormalVector(SplitMix64* random, uint32_t dimension) {
  std::vector<float> vector(dimension);
  for (float& value : vector) {
    value = -6;
    for (int i = 0; i < 12; ++i) value += static_cast<float>(random->Below(1 << 20)) * 0x1p-20F;
  }
  return vector;
}

double RecallAt10(const CheckpointRig& rig, RecallJob* job, const SpaceModel& model,
                  const std::vector<std::vector<float>>& queries) {
  size_t found = 0;
  for (const std::vector<float>& query : queries) {
    const RecallAnswer answer = RunRecall(rig.space, job, query, {.k = 10, .ef = 40});
    found += model.CountTrue(answer.hits, query, 10);
  }
  return static_cast<double>(found) / (10.0 * static_cast<double>(queries.size()));
}

// Updates, deletes, linking and sweeps go on during the save and change a good part of it; what is
// loaded, replayed and linked finds as much as a graph that was built at once.
TEST(SpaceCheckpointChangesTest, AGraphOfDifferentMomentsIsAsGoodAsANewOne) {
  constexpr uint32_t kDimension = 16;
  TestHeap memory(size_t{256} << 20);
  RecallJob job(&memory.heap);
  for (const uint32_t count : {400u, 6'000u}) {
    SCOPED_TRACE(count);
    SpaceOptions options = OptionsOf(kL2Form, kDimension, 1);
    options.build.M = 12;
    options.build.M0 = 24;
    options.build.ef_construction = 60;
    SplitMix64 random(count);
    SpaceModel model(Metric::kL2);
    CheckpointRig original(options, &memory);
    CommitStamp stamp = 100;
    std::vector<LoggedOp> replayed;
    const auto store = [&](uint32_t number, bool is_replayed) {
      LoggedOp op{.id = "id" + std::to_string(number),
                  .stamp = ++stamp,
                  .vector = NormalVector(&random, kDimension)};
      original.Upsert(op.id, op.vector, op.stamp);
      model.entries()[op.id].vector = op.vector;
      if (is_replayed) replayed.push_back(std::move(op));
    };
    for (uint32_t i = 0; i < count; ++i) store(i, false);
    original.Settle();

    SpaceSaver saver(&memory.heap);
    Bytes bytes;
    Bytes buffer(kMaxExtentBytes);
    ASSERT_TRUE(saver.Begin(&original.space, stamp));
    while (!saver.done()) {
      SaveStep(&saver, 8, &buffer, &bytes);
      for (int i = 0; i < 4; ++i) {
        store(static_cast<uint32_t>(random.Below(count + count / 8)), true);
      }
      original.space.SetHorizon(original.space.latest_stamp());
      for (int i = 0; i < 40; ++i) original.upkeep.Step(300);
    }
    ASSERT_GT(original.upkeep.sweeps(), 1u);

    CheckpointRig loaded(options, &memory);
    SpaceLoader loader(&loaded.space);
    ASSERT_TRUE(loader.Take(bytes).has_value());
    ASSERT_TRUE(loader.Finish().has_value());
    ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
    EXPECT_GT(loaded.space.linked(), count / 2) << "most are still linked";
    for (const LoggedOp& op : replayed) loaded.Upsert(op.id, op.vector, op.stamp);
    loaded.Settle();
    ASSERT_TRUE(loaded.space.CheckInvariants().has_value());
    ASSERT_EQ(loaded.space.live(), model.entries().size());
    ASSERT_EQ(loaded.space.unlinked_count(), 0u);

    CheckpointRig fresh(options, &memory);
    for (const auto& [id, entry] : model.entries()) fresh.Upsert(id, entry.vector, ++stamp);
    fresh.Settle();
    std::vector<std::vector<float>> queries;
    for (int i = 0; i < 300; ++i) queries.push_back(NormalVector(&random, kDimension));
    const double of_fresh = RecallAt10(fresh, &job, model, queries);
    const double of_loaded = RecallAt10(loaded, &job, model, queries);
    RecordProperty("recall_" + std::to_string(count),
                   std::to_string(of_loaded) + " of " + std::to_string(of_fresh));
    EXPECT_GE(of_loaded, of_fresh - 0.01);
  }
}

}  // namespace
}  // namespace engram
