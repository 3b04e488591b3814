// A space whose vectors change while it grows: codes that were learned from the first ones are
// learned anew, or withdrawn, and recalls stay as good as with int8.

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "index/space.h"
#include "src/core/hash.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr uint32_t kDimension = 96;
// Codes are learned with the first 500, and again with 2,000.
constexpr uint64_t kVectors = 2'200;
constexpr uint64_t kQueries = 40;
// Below what the same vectors are recalled with by int8. A batch chooses links among fewer
// candidates than a search by int8, which shows most with a small ef.
constexpr double AllowedAt(uint32_t ef) { return ef < 128 ? 0.03 : 0.02; }

using Draw = std::function<std::vector<float>(uint64_t)>;

Draw Shifted(float shift) {
  return [shift](uint64_t number) { return LatentVector(number, kDimension, shift); };
}
Draw Scaled(float scale) {
  return [scale](uint64_t number) {
    std::vector<float> vector = LatentVector(number, kDimension);
    for (float& value : vector) value *= scale;
    return vector;
  };
}
// About one of the first vectors.
Draw Cloud(float width) {
  return [width](uint64_t number) {
    std::vector<float> vector = LatentVector(5, kDimension);
    const std::vector<float> other = LatentVector(number, kDimension);
    for (uint32_t i = 0; i < kDimension; ++i) vector[i] += width * other[i];
    return vector;
  };
}

struct Drift {
  std::string name;
  std::vector<Draw> parts;  // one after the other
};

std::vector<Drift> AllDrifts() {
  return {{"ALittle", {Shifted(0), Shifted(0.7F)}},
          {"AsMuchAsItIsWide", {Shifted(0), Shifted(1)}},
          {"FarAway", {Shifted(0), Shifted(20)}},
          {"FarAwayAndBack", {Shifted(0), Shifted(20), Shifted(0)}},
          {"ThereAndToTheOtherSide", {Shifted(0), Shifted(1), Shifted(-1)}},
          {"Wider", {Shifted(0), Scaled(3)}},
          {"MuchWider", {Shifted(0), Scaled(10)}},
          {"WiderAndNarrower", {Scaled(10), Scaled(100), Scaled(10)}},
          {"IntoACloud", {Shifted(0), Cloud(0.1F)}},
          {"IntoATightCloud", {Shifted(0), Cloud(0.03F)}}};
}

struct Case {
  Drift drift;
  Metric metric;
};
std::vector<Case> AllCases() {
  std::vector<Case> all;
  for (const Drift& drift : AllDrifts()) {
    if (kSanitized && all.size() == 3) break;
    all.push_back({drift, Metric::kL2});
    // There all that lies far away in one direction is a narrow cone, of which codes are less good
    // than a whole space's quality lets on.
    if (!kSanitized && drift.name != "FarAwayAndBack") all.push_back({drift, Metric::kCosine});
  }
  return all;
}

class DriftTest : public testing::TestWithParam<Case> {
 protected:
  static void ExpectRecallsAs(CodedSpaceRig* rig, CodedSpaceRig* plain, const Draw& draw) {
    std::vector<std::vector<float>> queries;
    for (uint64_t i = 0; i < kQueries; ++i) queries.push_back(draw(1'000'000 + i));
    const TrueNearest truth = rig->NearestOf(queries);
    for (const uint32_t ef : {64U, 128U}) {
      EXPECT_GE(rig->Recall(truth, ef), plain->Recall(truth, ef) - AllowedAt(ef)) << "ef " << ef;
    }
  }
};

TEST_P(DriftTest, IsRecalledAsByInt8) {
  const std::vector<Draw>& parts = GetParam().drift.parts;
  CodedSpaceRig rig({.metric = GetParam().metric, .dimension = kDimension});
  CodedSpaceRig plain(
      {.metric = GetParam().metric, .traversal = Traversal::kInt8, .dimension = kDimension});
  for (CodedSpaceRig* one : {&rig, &plain}) {
    for (uint64_t id = 0; id < kVectors; ++id) {
      ASSERT_NO_FATAL_FAILURE(one->Store(id, parts[id * parts.size() / kVectors](id)));
      if (id % 250 == 249) {
        ASSERT_NO_FATAL_FAILURE(one->Settle());
      }
    }
    ASSERT_NO_FATAL_FAILURE(one->Settle());
  }
  for (size_t part = 0; part < parts.size(); ++part) {
    SCOPED_TRACE("part " + std::to_string(part));
    ExpectRecallsAs(&rig, &plain, parts[part]);
  }
  for (CodedSpaceRig* one : {&rig, &plain}) {
    for (uint64_t id = 0; id < kVectors; ++id) {
      if (MixBits(id) % 2 == 0) {
        ASSERT_NO_FATAL_FAILURE(one->Remove(id));
      }
    }
    ASSERT_NO_FATAL_FAILURE(one->Settle());
  }
  for (size_t part = 0; part < parts.size(); ++part) {
    SCOPED_TRACE("half of part " + std::to_string(part));
    ExpectRecallsAs(&rig, &plain, parts[part]);
  }
}

INSTANTIATE_TEST_SUITE_P(SpaceCodes, DriftTest, testing::ValuesIn(AllCases()),
                         [](const auto& param) {
                           const bool is_l2 = param.param.metric == Metric::kL2;
                           return param.param.drift.name + (is_l2 ? "ByL2" : "ByCosine");
                         });

// Places are in the order of arrival as long as nothing ends: the last ones count as much as the
// first when it is looked whether the centroid is still where the vectors are, however many there
// are to one of the sample.
TEST(SpaceCodesDriftTest, WhatCameLastIsLearnedFrom) {
  constexpr uint32_t kSpread = RabitqLearner::kMaxSample - RabitqLearner::kMaxSample / 4;
  constexpr uint64_t kFirstLearned = 1'300;
  constexpr uint64_t kAll = 4 * kFirstLearned;  // when it is thought of again
  static_assert(kAll > kSpread + 1'000 && kAll < 2 * kSpread);
  CodedSpaceRig rig({.dimension = kDimension, .graph_from = kFirstLearned - 1});
  for (uint64_t id = 0; id < kFirstLearned; ++id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(id, LatentVector(id, kDimension)));
  }
  ASSERT_NO_FATAL_FAILURE(rig.Settle());
  ASSERT_TRUE(rig.HasCodes());
  const WalkCodes* const before = rig.space.walk_codes();
  for (uint64_t id = kFirstLearned; id < kSpread; ++id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(id, LatentVector(id, kDimension)));
  }
  for (uint64_t id = kSpread; id < kAll; ++id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(id, LatentVector(id, kDimension, 1)));
  }
  ASSERT_NO_FATAL_FAILURE(rig.Settle());
  EXPECT_TRUE(rig.HasCodes());
  EXPECT_NE(rig.space.walk_codes(), before) << "a third of the vectors lie elsewhere";
}

// Also where every node gets another code, no slice is much longer than it is told to be.
TEST(SpaceCodesDriftTest, CodesAreRenewedInShortSlices) {
  constexpr uint64_t kFirst = 301;
  constexpr uint64_t kAll = 4 * kFirst;
  CodedSpaceRig rig({.dimension = kDimension});
  for (uint64_t id = 0; id < kFirst; ++id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(id, LatentVector(id, kDimension)));
  }
  ASSERT_NO_FATAL_FAILURE(rig.Settle());
  const WalkCodes* const before = rig.space.walk_codes();
  // Linked before it is learned again.
  for (uint64_t id = kFirst; id < kAll - 1; ++id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(id, LatentVector(id, kDimension, 1)));
  }
  ASSERT_NO_FATAL_FAILURE(rig.Settle());
  ASSERT_EQ(rig.space.walk_codes(), before);
  ASSERT_NO_FATAL_FAILURE(rig.Store(kAll, LatentVector(kAll, kDimension, 1)));
  ASSERT_TRUE(rig.space.WantsCodes());
  size_t encoding = 0;
  size_t recoding = 0;
  for (int slice = 0; slice < 100'000 && rig.space.WantsCodes(); ++slice) {
    rig.upkeep.Step(200);
    encoding += static_cast<size_t>(SpaceTestPeer::IsEncoding(rig.space));
    recoding += static_cast<size_t>(SpaceTestPeer::IsRecoding(rig.space));
    if (slice % 16 == 0 || SpaceTestPeer::IsRecoding(rig.space)) {
      ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
    }
  }
  EXPECT_NE(rig.space.walk_codes(), before);
  EXPECT_GE(encoding, kAll / 2) << "one or two nodes a slice";
  EXPECT_GE(recoding, 2u) << "a list or so a slice";
  ASSERT_NO_FATAL_FAILURE(rig.Settle());
}

}  // namespace
}  // namespace engram
