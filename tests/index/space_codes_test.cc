// A space that is walked with codes that it learns: when it has some, and that recalls are as good
// as without.

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/latent_vector.h"
#include "tests/index/space_testing.h"
#include "tests/index/space_upkeep.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr HnswBuildParams kBuild{.M = 12, .M0 = 24, .ef_construction = 80};
constexpr uint32_t kGraphFrom = 300;
constexpr uint32_t kVectors = kSanitized ? 1'000 : 3'000;
using Draw = std::function<std::vector<float>(uint64_t)>;

class CodesRig {
 public:
  CodesRig(Traversal traversal, uint32_t dimension)
      : memory_(size_t{256} << 20),
        space_("codes", Options(traversal, dimension), &memory_.heap, &epochs_),
        upkeep_(&space_, &memory_.heap, kBuild),
        job_(&memory_.heap) {}

  void Store(uint64_t id, const std::vector<float>& vector) {
    const std::string name = "id" + std::to_string(id);
    ObservationRef observation;
    observation.id = name;
    observation.dtype = VectorDtype::kF32;
    observation.dimension = static_cast<uint32_t>(vector.size());
    observation.vector = reinterpret_cast<const std::byte*>(vector.data());
    ASSERT_EQ(space_.Upsert(observation, ++stamp_).reason, RefusalReason::kNone);
    space_.SetHorizon(stamp_);
    model.entries()[name] = {.vector = vector, .payload = "", .when_ns = 0, .confidence = 1};
  }
  void Fill(const Draw& draw, uint64_t from, uint64_t to) {
    for (uint64_t id = from; id < to; ++id) {
      ASSERT_NO_FATAL_FAILURE(Store(id, draw(id)));
    }
    upkeep_.Run();
    const Result<void> sound = space_.CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
    if (space_.has_graph()) {
      ASSERT_EQ(space_.unlinked_count(), 0u);
    }
  }
  double Recall(const Draw& draw) {
    constexpr size_t kQueries = 200;
    size_t hits = 0;
    for (size_t i = 0; i < kQueries; ++i) {
      const std::vector<float> query = draw(1'000'000 + i);
      const RecallAnswer answer = RunRecall(space_, &job_, query, {.k = 10, .ef = 64});
      hits += model.CountTrue(answer.hits, query, 10);
    }
    return static_cast<double>(hits) / (10 * kQueries);
  }
  bool HasCodes() const { return space_.walk_codes() != nullptr; }
  Space& space() { return space_; }
  SpaceUpkeep& upkeep() { return upkeep_; }
  ReaderEpochs& epochs() { return epochs_; }

  SpaceModel model{Metric::kL2};

 private:
  static SpaceOptions Options(Traversal traversal, uint32_t dimension) {
    SpaceOptions options = TestSpaceOptions(Metric::kL2, dimension, kBuild);
    options.traversal = traversal;
    options.graph_from = kGraphFrom;
    return options;
  }
  TestHeap memory_;
  ReaderEpochs epochs_{1};
  Space space_;
  SpaceUpkeep upkeep_;
  RecallJob job_;
  CommitStamp stamp_ = 0;
};

void ExpectAsGoodAsInt8(const Draw& draw, uint32_t dimension, bool has_codes) {
  CodesRig rig(Traversal::kRabitq, dimension);
  ASSERT_NO_FATAL_FAILURE(rig.Fill(draw, 0, kVectors));
  EXPECT_EQ(rig.HasCodes(), has_codes);
  CodesRig plain(Traversal::kInt8, dimension);
  ASSERT_NO_FATAL_FAILURE(plain.Fill(draw, 0, kVectors));
  EXPECT_FALSE(plain.HasCodes());
  EXPECT_GE(rig.Recall(draw), plain.Recall(draw) - 0.01);
}

TEST(SpaceCodesTest, CodesAreLearnedOnceThereIsAGraph) {
  const Draw draw = [](uint64_t number) { return LatentVector(number, 96); };
  CodesRig rig(Traversal::kRabitq, 96);
  for (uint64_t id = 0; id < kGraphFrom; ++id) ASSERT_NO_FATAL_FAILURE(rig.Store(id, draw(id)));
  rig.upkeep().Run();
  EXPECT_FALSE(rig.HasCodes());
  ASSERT_NO_FATAL_FAILURE(rig.Fill(draw, kGraphFrom, kGraphFrom + 10));
  EXPECT_TRUE(rig.HasCodes());
}

TEST(SpaceCodesTest, RecallIsThatOfInt8) {
  ExpectAsGoodAsInt8([](uint64_t number) { return LatentVector(number, 96); }, 96, true);
}

TEST(SpaceCodesTest, FewDimensionsGetNoCodes) {
  ExpectAsGoodAsInt8([](uint64_t number) { return LatentVector(number, 64); }, 64, false);
}

TEST(SpaceCodesTest, ManyEqualVectors) {
  const Draw draw = [](uint64_t number) {
    return LatentVector(number % 3 == 0 ? number : number % 7, 96);
  };
  CodesRig rig(Traversal::kRabitq, 96);
  ASSERT_NO_FATAL_FAILURE(rig.Fill(draw, 0, kVectors));
  CodesRig plain(Traversal::kInt8, 96);
  ASSERT_NO_FATAL_FAILURE(plain.Fill(draw, 0, kVectors));
  EXPECT_GE(rig.Recall(draw), plain.Recall(draw) - 0.01);
}

// All moves to a far place after codes were learned: they are learned anew, or withdrawn.
TEST(SpaceCodesTest, DriftIsLearnedAnew) {
  const Draw near = [](uint64_t number) { return LatentVector(number, 96); };
  const Draw far = [](uint64_t number) { return LatentVector(number, 96, 20); };
  CodesRig rig(Traversal::kRabitq, 96);
  CodesRig plain(Traversal::kInt8, 96);
  for (CodesRig* one : {&rig, &plain}) {
    ASSERT_NO_FATAL_FAILURE(one->Fill(near, 0, kGraphFrom + 50));
    for (uint64_t part = 1; part < 8; ++part) {
      ASSERT_NO_FATAL_FAILURE(one->Fill(far, part * kVectors / 8, (part + 1) * kVectors / 8));
    }
  }
  EXPECT_GE(rig.Recall(far), plain.Recall(far) - 0.01);
  EXPECT_GE(rig.Recall(near), plain.Recall(near) - 0.01);
}

}  // namespace
}  // namespace engram
