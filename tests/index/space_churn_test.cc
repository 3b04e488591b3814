// What is left of a space after everything in it was replaced: as good as one that was filled with
// the same vectors at once.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "index/recall_job.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/hash.h"
#include "src/core/reader_epochs.h"
#include "tests/index/cloud_vector.h"
#include "tests/index/latent_vector.h"
#include "tests/index/space_testing.h"
#include "tests/index/space_upkeep.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr HnswBuildParams kBuild{.M = 12, .M0 = 24, .ef_construction = 80};
constexpr uint32_t kDimension = 32;
constexpr uint32_t kCodedDimension = 96;  // of a case whose graph is walked with codes
constexpr uint32_t kGraphFrom = 500;
constexpr uint32_t kEf = 64;
constexpr uint32_t kWideEf = 600;
constexpr size_t kQueries = 300;
constexpr uint32_t kVectors = kSanitized ? 1'050 : 4'500;
// More vectors in a cloud than a recall looks at, so that one that begins in the wrong cloud must
// find a link to the right one.
constexpr uint32_t kClouds = kVectors / 150;

std::vector<float> VectorOf(uint64_t generation, uint64_t number, uint32_t dimension) {
  if (dimension == kCodedDimension) {
    return LatentVector(generation * 1'000'003 + number, dimension);
  }
  SplitMix64 noise(MixBits(generation * 1'000'003 + number));
  const SplitMix64 centre(MixBits(noise.Below(kClouds)));
  return CloudVector(centre, noise, dimension, 0.7F);
}
constexpr uint64_t kQuery = 0;
constexpr uint64_t kFinal = 1;  // the vectors that are there in the end; above: earlier ones

std::string IdOf(uint32_t number) { return "id" + std::to_string(number); }

struct Quality {
  double recall_at_10 = 0;
  double self_found = 0;  // share of the vectors that find themselves
  uint32_t lost = 0;      // those that do not with kWideEf either
};

class ChurnRig {
 public:
  explicit ChurnRig(Metric metric, Traversal traversal)
      : memory_(size_t{256} << 20),
        other_memory_(size_t{64} << 20),
        space_("churn", Options(metric, traversal), &memory_.heap, &epochs_),
        upkeep_(&space_, &memory_.heap, kBuild),
        job_(&other_memory_.heap) {}

  void Upsert(uint32_t number, uint64_t generation) {
    const std::string id = IdOf(number);
    const std::vector<float> vector = VectorOf(generation, number, Dimension());
    ObservationRef observation;
    observation.id = id;
    observation.dtype = VectorDtype::kF32;
    observation.dimension = Dimension();
    observation.vector = reinterpret_cast<const std::byte*>(vector.data());
    ASSERT_EQ(space_.Upsert(observation, ++stamp_).reason, RefusalReason::kNone);
    Upkeep();
  }
  void Delete(uint32_t number) {
    ASSERT_TRUE(space_.Delete(IdOf(number), ++stamp_, false).existed);
    Upkeep();
  }
  // Links about as fast as vectors come, so that a backlog of a few hundred is there throughout.
  void Upkeep() {
    space_.SetHorizon(stamp_ - std::min<CommitStamp>(stamp_, 50));
    const int slices = space_.backlog() > 300 ? 30 : 3;
    for (int i = 0; i < slices && upkeep_.Step(400); ++i) {
    }
  }
  void Rest() {
    space_.SetHorizon(stamp_);
    upkeep_.Run();
    ASSERT_EQ(space_.unlinked_count(), 0u);
    ASSERT_EQ(space_.retired(), 0u);
    const Result<void> sound = space_.CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
  }
  // Of the last vectors of all ids.
  Quality Measure() {
    Quality quality;
    const Metric metric = space_.metric();
    for (size_t query = 0; query < kQueries; ++query) {
      const std::vector<float> vector = VectorOf(kQuery, query, Dimension());
      const double bound = TenthScore(vector);
      for (const Hit& hit : RunRecall(space_, &job_, vector, {.k = 10, .ef = kEf}).hits) {
        const bool near =
            metric == Metric::kL2 ? hit.score <= bound + 1e-5 : hit.score >= bound - 1e-6;
        quality.recall_at_10 += static_cast<double>(near) / (10 * kQueries);
      }
    }
    for (uint32_t number = 0; number < kVectors; ++number) {
      const bool found = FindsItself(number, kEf);
      quality.self_found += static_cast<double>(found) / kVectors;
      quality.lost += static_cast<uint32_t>(!found && !FindsItself(number, kWideEf));
    }
    return quality;
  }
  const Space& space() const { return space_; }
  uint64_t sweeps() const { return upkeep_.sweeps(); }

 private:
  double TenthScore(const std::vector<float>& query) const {
    std::vector<double> scores;
    for (uint32_t number = 0; number < kVectors; ++number) {
      scores.push_back(ExactScore(space_.metric(), VectorOf(kFinal, number, Dimension()), query));
    }
    std::sort(scores.begin(), scores.end());
    return space_.metric() == Metric::kL2 ? scores[9] : scores[scores.size() - 10];
  }
  bool FindsItself(uint32_t number, uint32_t ef) {
    const std::vector<Hit> hits =
        RunRecall(space_, &job_, VectorOf(kFinal, number, Dimension()), {.k = 1, .ef = ef}).hits;
    return hits.size() == 1 && hits[0].id == IdOf(number);
  }
  static uint32_t DimensionFor(Traversal traversal) {
    return traversal == Traversal::kRabitq ? kCodedDimension : kDimension;
  }
  uint32_t Dimension() const { return space_.dimension(); }
  static SpaceOptions Options(Metric metric, Traversal traversal) {
    SpaceOptions options = TestSpaceOptions(metric, DimensionFor(traversal), kBuild);
    options.traversal = traversal;
    options.graph_from = kGraphFrom;
    return options;
  }
  TestHeap memory_;
  TestHeap other_memory_;
  ReaderEpochs epochs_{1};
  Space space_;
  SpaceUpkeep upkeep_;
  RecallJob job_;
  CommitStamp stamp_ = 0;
};

struct Case {
  const char* name;
  Metric metric;
  Traversal traversal;
};
class SpaceChurnTest : public testing::TestWithParam<Case> {
 protected:
  SpaceChurnTest() : rig_(GetParam().metric, GetParam().traversal) {
    for (uint32_t number = 0; number < kVectors; ++number) in_order_.push_back(number);
    shuffled_ = in_order_;
    SplitMix64 random(3);
    for (uint32_t i = kVectors; i > 1; --i) std::swap(shuffled_[i - 1], shuffled_[random.Below(i)]);
  }

  void Fill(uint64_t generation, const std::vector<uint32_t>& order) {
    for (const uint32_t number : order) {
      ASSERT_NO_FATAL_FAILURE(rig_.Upsert(number, generation));
    }
  }
  // The vectors of kFinal are there, and nothing else.
  void ExpectAsGoodAsFresh() {
    ASSERT_NO_FATAL_FAILURE(rig_.Rest());
    ChurnRig fresh(GetParam().metric, GetParam().traversal);
    for (const uint32_t number : in_order_) {
      ASSERT_NO_FATAL_FAILURE(fresh.Upsert(number, kFinal));
    }
    ASSERT_NO_FATAL_FAILURE(fresh.Rest());
    const Quality wanted = fresh.Measure();
    const Quality got = rig_.Measure();
    RecordProperty("recall_at_10", std::to_string(got.recall_at_10));
    RecordProperty("recall_at_10_fresh", std::to_string(wanted.recall_at_10));
    RecordProperty("self_found", std::to_string(got.self_found));
    EXPECT_GE(wanted.recall_at_10, 0.99);
    EXPECT_GE(got.recall_at_10, wanted.recall_at_10 - 0.01);
    EXPECT_GE(got.self_found, wanted.self_found - 0.01);
    EXPECT_EQ(got.lost, 0u);
    EXPECT_EQ(rig_.space().live(), kVectors);
    EXPECT_EQ(rig_.space().walk_codes() != nullptr, GetParam().traversal == Traversal::kRabitq);
    EXPECT_LE(rig_.space().node_count(), 3 * kVectors) << "places of swept nodes are used again";
  }

  ChurnRig rig_;
  std::vector<uint32_t> in_order_;
  std::vector<uint32_t> shuffled_;
};

TEST_P(SpaceChurnTest, ReplacedInTheOrderOfArrival) {
  ASSERT_NO_FATAL_FAILURE(Fill(2, in_order_));
  ASSERT_NO_FATAL_FAILURE(Fill(kFinal, in_order_));
  EXPECT_GT(rig_.sweeps(), 2u);
  ExpectAsGoodAsFresh();
}

// Each generation inherits what the mending of the one before has left.
TEST_P(SpaceChurnTest, ReplacedInRandomOrderSixTimes) {
  ASSERT_NO_FATAL_FAILURE(Fill(7, in_order_));
  for (uint64_t generation = 6; generation >= kFinal; --generation) {
    ASSERT_NO_FATAL_FAILURE(Fill(generation, shuffled_));
  }
  ExpectAsGoodAsFresh();
}

TEST_P(SpaceChurnTest, AllDeletedThenFilledAgain) {
  ASSERT_NO_FATAL_FAILURE(Fill(2, in_order_));
  for (const uint32_t number : shuffled_) {
    ASSERT_NO_FATAL_FAILURE(rig_.Delete(number));
  }
  EXPECT_EQ(rig_.space().live(), 0u);
  ASSERT_NO_FATAL_FAILURE(Fill(kFinal, shuffled_));
  ExpectAsGoodAsFresh();
}

INSTANTIATE_TEST_SUITE_P(Rows, SpaceChurnTest,
                         testing::Values(Case{"CodesAndExact", Metric::kCosine, Traversal::kInt8},
                                         Case{"ExactAlone", Metric::kL2, Traversal::kExact},
                                         Case{"Rabitq", Metric::kCosine, Traversal::kRabitq}),
                         [](const auto& param) { return std::string(param.param.name); });

}  // namespace
}  // namespace engram
