// Spaces that are walked with codes and linked in batches, saved and loaded. Codes and lists are
// not saved: a space that was loaded is walked by int8 until it has learned them again.

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "index/recall_job.h"
#include "src/core/hash.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/index/space_checkpoint_rig.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr uint32_t kDimension = 96;
constexpr uint32_t kVectors = kSanitized ? 600 : 1'500;

using Vectors = std::map<uint64_t, std::vector<float>>;

SpaceOptions Options(uint64_t hash_seed, Metric metric = Metric::kL2) {
  SpaceOptions options =
      OptionsOf({metric, Precision::kF32, Traversal::kRabitq}, kDimension, hash_seed);
  options.build = {.M = 12, .M0 = 24, .ef_construction = 80};
  options.graph_from = 300;
  return options;
}

class CodesCheckpointTest : public testing::Test {
 protected:
  void Store(CheckpointRig* rig, uint64_t id, float shift = 0) {
    vectors_[id] = LatentVector(id, kDimension, shift);
    ASSERT_EQ(rig->Upsert(std::to_string(id), vectors_[id], ++stamp_).reason, RefusalReason::kNone);
  }
  void StoreAll(CheckpointRig* rig, uint64_t from, uint64_t to, float shift = 0) {
    for (uint64_t id = from; id < to; ++id) {
      ASSERT_NO_FATAL_FAILURE(Store(rig, id, shift));
    }
  }
  void Remove(CheckpointRig* rig, uint64_t id) {
    vectors_.erase(id);
    ASSERT_TRUE(rig->space.Delete(std::to_string(id), ++stamp_, false).existed);
  }
  void ExpectSound(const CheckpointRig& rig) const {
    const Result<void> sound = rig.space.CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
    ASSERT_EQ(SpaceTestPeer::CodesViolation(rig.space), "");
    ASSERT_EQ(rig.space.live(), vectors_.size());
    for (const auto& [id, vector] : vectors_) {
      const NodeId node = rig.space.FindLive(std::to_string(id));
      ASSERT_NE(node, kNoNode) << id;
      if (rig.space.metric() == Metric::kCosine) continue;
      std::array<float, kDimension> stored;
      rig.space.GetVector(node, stored.data());
      ASSERT_TRUE(std::equal(stored.begin(), stored.end(), vector.begin())) << id;
    }
  }
  // recall@10 with ef 64
  double Recall(const CheckpointRig& rig) {
    std::vector<std::vector<float>> queries;
    for (uint64_t i = 0; i < 100; ++i) queries.push_back(LatentVector(1'000'000 + i, kDimension));
    const TrueNearest truth(rig.space.metric(), &vectors_, std::move(queries));
    int hits = 0;
    for (size_t query = 0; query < truth.queries().size(); ++query) {
      const RecallAnswer answer =
          RunRecall(rig.space, &job_, truth.queries()[query], {.k = 10, .ef = 64});
      EXPECT_EQ(answer.reason, RefusalReason::kNone);
      const int found = truth.CountTrue(query, answer.hits);
      EXPECT_GE(found, 0) << "a hit that is not there, or twice";
      hits += found;
    }
    return hits / 1'000.0;
  }

  TestHeap memory_{size_t{256} << 20};
  TestHeap scratch_{size_t{64} << 20};
  RecallJob job_{&scratch_.heap};
  Vectors vectors_;
  CommitStamp stamp_ = 100;
};

TEST_F(CodesCheckpointTest, ALoadedSpaceRecallsAtOnceAndLearnsItsCodesAgain) {
  for (const Metric metric : {Metric::kL2, Metric::kCosine, Metric::kInnerProduct}) {
    SCOPED_TRACE(MetricName(metric));
    vectors_.clear();
    CheckpointRig original(Options(1, metric), &memory_);
    ASSERT_NO_FATAL_FAILURE(StoreAll(&original, 0, kVectors));
    original.Settle();
    ASSERT_NE(original.space.walk_codes(), nullptr);
    const double wanted = Recall(original);
    CheckpointRig loaded(Options(2, metric), &memory_);
    ASSERT_NO_FATAL_FAILURE(LoadAll(Save(&original, &memory_), &loaded.space));
    EXPECT_EQ(loaded.space.linked(), kVectors);
    EXPECT_EQ(loaded.space.walk_codes(), nullptr);
    EXPECT_GE(Recall(loaded), wanted - 0.005) << "by int8";
    // Nothing waits to be linked, and codes are learned all the same.
    loaded.Settle();
    EXPECT_NE(loaded.space.walk_codes(), nullptr);
    EXPECT_EQ(loaded.space.unlinked_count(), 0u);
    EXPECT_TRUE(loaded.space.LinksInBatches());
    ASSERT_NO_FATAL_FAILURE(ExpectSound(loaded));
    EXPECT_GE(Recall(loaded), wanted - 0.01);
    // All of the graph is in the lists, so batches link to what was loaded.
    for (uint64_t id = 0; id < kVectors; id += 3) {
      ASSERT_NO_FATAL_FAILURE(Remove(&loaded, id));
    }
    ASSERT_NO_FATAL_FAILURE(StoreAll(&loaded, kVectors, 2 * kVectors));
    loaded.Settle();
    EXPECT_EQ(loaded.space.unlinked_count(), 0u);
    ASSERT_NO_FATAL_FAILURE(ExpectSound(loaded));
    EXPECT_GE(Recall(loaded), wanted - 0.01);
  }
}

// A save goes on while codes are learned, nodes are encoded and batches are linked. Whatever it has
// of a batch that is under way, the space that comes of it is sound and has everything.
TEST_F(CodesCheckpointTest, SavedWhileItLearnsEncodesAndLinks) {
  SplitMix64 random(5);
  int with_batch = 0;
  for (int run = 0; run < (kSanitized ? 6 : 25); ++run) {
    SCOPED_TRACE(run);
    vectors_.clear();
    CheckpointRig original(Options(1), &memory_);
    ASSERT_NO_FATAL_FAILURE(StoreAll(&original, 0, 301));
    original.Settle();
    ASSERT_NO_FATAL_FAILURE(StoreAll(&original, 301, 700 + random.Below(600), 1));
    const uint64_t before = random.Below(run % 2 == 0 ? 2'000 : 300);
    for (uint64_t slice = 0; slice < before; ++slice) original.upkeep.Step(1'000);
    // What ends during the save is replayed over what is loaded; here nothing does.
    SpaceSaver saver(&memory_.heap);
    ASSERT_TRUE(saver.Begin(&original.space, stamp_));
    Bytes bytes;
    Bytes buffer(kMaxExtentBytes);
    while (!saver.done()) {
      SaveStep(&saver, 1 + random.Below(40), &buffer, &bytes);
      const uint64_t slices = random.Below(60);
      for (uint64_t slice = 0; slice < slices; ++slice) original.upkeep.Step(1'000);
      with_batch +=
          static_cast<int>(original.upkeep.linker().active() && original.space.LinksInBatches());
    }
    CheckpointRig loaded(Options(3), &memory_);
    ASSERT_NO_FATAL_FAILURE(LoadAll(bytes, &loaded.space));
    ASSERT_NO_FATAL_FAILURE(ExpectSound(loaded));
    const double wanted = [&] {
      original.Settle();
      return Recall(original);
    }();
    loaded.Settle();
    ASSERT_NO_FATAL_FAILURE(ExpectSound(loaded));
    ASSERT_NO_FATAL_FAILURE(ExpectSound(original));
    EXPECT_GE(Recall(loaded), wanted - 0.02);
  }
  EXPECT_GT(with_batch, 10);
}

// Saved with int8 and loaded with codes, and the other way round: an operator may change it.
TEST_F(CodesCheckpointTest, TheTraversalMayChangeOverARestart) {
  for (const bool to_codes : {true, false}) {
    SCOPED_TRACE(to_codes);
    vectors_.clear();
    SpaceOptions with_codes = Options(1);
    SpaceOptions with_int8 = Options(1);
    with_int8.traversal = Traversal::kInt8;
    CheckpointRig original(to_codes ? with_int8 : with_codes, &memory_);
    ASSERT_NO_FATAL_FAILURE(StoreAll(&original, 0, 600));
    original.Settle();
    CheckpointRig loaded(to_codes ? with_codes : with_int8, &memory_);
    ASSERT_NO_FATAL_FAILURE(LoadAll(Save(&original, &memory_), &loaded.space));
    ASSERT_NO_FATAL_FAILURE(StoreAll(&loaded, 600, 900));
    loaded.Settle();
    EXPECT_EQ(loaded.space.walk_codes() != nullptr, to_codes);
    ASSERT_NO_FATAL_FAILURE(ExpectSound(loaded));
    EXPECT_GE(Recall(loaded), 0.97);
  }
}

}  // namespace
}  // namespace engram
