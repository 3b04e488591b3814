// A space whose vectors change while it grows: codes that were learned from the first ones are
// learned anew, or withdrawn, and recalls stay as good as with int8.

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "index/batch_linker.h"
#include "index/space.h"
#include "src/core/hash.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr uint32_t kDimension = 96;
constexpr uint64_t kSettled = 250;  // stored between two times that all is linked
// Now and then a query's walk ends in a cloud that its nearest do not lie in, whatever the graph is
// linked by: so many that one of these does not matter.
constexpr uint64_t QueriesFor(uint32_t dimension) {
  return dimension > kDimension || kSanitized ? 60 : 200;
}
// Below what the same vectors are recalled with by int8. A batch chooses links among fewer
// candidates than a search by int8, and a walk by codes loses some: both show with a small ef.
constexpr double kAllowed = 0.02;
constexpr double kAllowedWithSmallEf = 0.03;

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
Draw Cloud(float width, uint32_t dimension = kDimension, uint64_t about = 5) {
  return [width, dimension, about](uint64_t number) {
    std::vector<float> vector = LatentVector(about, dimension);
    const std::vector<float> other = LatentVector(number, dimension);
    for (uint32_t i = 0; i < dimension; ++i) vector[i] += width * other[i];
    return vector;
  };
}
Draw Spread(uint32_t dimension) {
  return [dimension](uint64_t number) { return LatentVector(number, dimension); };
}

using Parts = std::vector<Draw>;  // one after the other
struct Drift {
  std::string name;
  Parts parts;
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
  uint32_t dimension = kDimension;
  uint64_t vectors = 2'200;
  double allowed_with_small_ef = kAllowedWithSmallEf;
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
  // Codes were learned with the first 500, and are learned again with 2,000 unless they are doubted
  // before. With 768 dimensions recalls walk by them.
  for (const Metric metric : {Metric::kL2, Metric::kCosine}) {
    for (const uint32_t dimension : {kDimension, 768U}) {
      if (kSanitized && (metric == Metric::kL2 || dimension == 768)) continue;
      const auto name = [&](const std::string& text) { return text + std::to_string(dimension); };
      const auto into = [&](float width) {
        return Parts{Spread(dimension), Cloud(width, dimension)};
      };
      const auto add = [&](const std::string& text, float width, uint64_t vectors) {
        const double allowed = dimension == kDimension ? kAllowed : kAllowedWithSmallEf;
        all.push_back({{name(text), into(width)}, metric, dimension, vectors, allowed});
      };
      add("Cloud10Of1000In", 0.1F, 1'000);
      if (kSanitized) continue;
      add("Cloud5Of1000In", 0.05F, 1'000);
      if (dimension == kDimension || metric == Metric::kCosine) {
        add("Cloud20Of3000In", 0.2F, 3'000);
      }
      if (dimension == kDimension) add("Cloud10Of3000In", 0.1F, 3'000);
    }
  }
  return all;
}

class DriftTest : public testing::TestWithParam<Case> {
 protected:
  static void ExpectRecallsAs(CodedSpaceRig* rig, CodedSpaceRig* plain, const Draw& draw) {
    const auto allowed_at = [](uint32_t ef) {
      return ef < 128 ? GetParam().allowed_with_small_ef : kAllowed;
    };
    std::vector<std::vector<float>> queries;
    const uint64_t count = QueriesFor(rig->space.dimension());
    for (uint64_t i = 0; i < count; ++i) queries.push_back(draw(1'000'000 + i));
    const TrueNearest truth = rig->NearestOf(queries);
    for (const uint32_t ef : {64U, 128U}) {
      EXPECT_GE(rig->Recall(truth, ef), plain->Recall(truth, ef) - allowed_at(ef)) << "ef " << ef;
    }
  }
};

TEST_P(DriftTest, IsRecalledAsByInt8) {
  const auto& [drift, metric, dimension, vectors, allowed] = GetParam();
  const Parts& parts = drift.parts;
  CodedSpaceRig rig({.metric = metric, .dimension = dimension});
  CodedSpaceRig plain({.metric = metric, .traversal = Traversal::kInt8, .dimension = dimension});
  for (CodedSpaceRig* one : {&rig, &plain}) {
    for (uint64_t id = 0; id < vectors; ++id) {
      ASSERT_NO_FATAL_FAILURE(one->Store(id, parts[id * parts.size() / vectors](id)));
      if ((id + 1) % kSettled == 0) {
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
    for (uint64_t id = 0; id < vectors; ++id) {
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

// Links that are made before codes are doubted, as all comes in one batch: the nodes whose
// estimates are useless are linked by int8.
TEST(SpaceCodesDriftTest, ACloudInOneBatchIsLinkedAsByInt8) {
  constexpr uint64_t kFirst = kSanitized ? 500 : 1'000;
  constexpr uint64_t kAll = kFirst + BatchLinker::kMaxBatch;
  for (const Metric metric : {Metric::kL2, Metric::kCosine}) {
    if (kSanitized && metric == Metric::kL2) continue;
    CodedSpaceRig rig({.metric = metric, .dimension = kDimension});
    CodedSpaceRig plain({.metric = metric, .traversal = Traversal::kInt8, .dimension = kDimension});
    const Draw cloud = Cloud(0.05F);
    for (CodedSpaceRig* one : {&rig, &plain}) {
      for (uint64_t id = 0; id < kFirst; ++id) {
        ASSERT_NO_FATAL_FAILURE(one->Store(id, LatentVector(id, kDimension)));
      }
      ASSERT_NO_FATAL_FAILURE(one->Settle());
      for (uint64_t id = kFirst; id < kAll; ++id) {
        ASSERT_NO_FATAL_FAILURE(one->Store(id, cloud(id)));
      }
      ASSERT_EQ(one == &rig, one->HasCodes());
      ASSERT_NO_FATAL_FAILURE(one->Settle());
    }
    EXPECT_FALSE(rig.HasCodes()) << "it was doubted behind the batch";
    std::vector<std::vector<float>> queries;
    for (uint64_t i = 0; i < QueriesFor(kDimension); ++i) queries.push_back(cloud(1'000'000 + i));
    const TrueNearest truth = rig.NearestOf(queries);
    EXPECT_GE(rig.Recall(truth, 64), plain.Recall(truth, 64) - kAllowed) << MetricName(metric);
  }
}

// Data that codes are fit for, or nearly: all is well each time, and it is seldom asked.
TEST(SpaceCodesDriftTest, GoodDataAreNotLearnedAgainAndAgain) {
  struct Good {
    std::string name;
    Draw draw;
    uint64_t least;
    uint64_t most;  // learnings
  };
  // A hundred clouds that fill up; codes tell their members apart ever worse.
  const Draw clusters = [](uint64_t number) {
    return Cloud(0.3F, kDimension, 2'000'000 + MixBits(number) % 100)(number);
  };
  const Draw narrow = [](uint64_t number) {
    return Cloud(0.12F, kDimension, 2'000'000 + MixBits(number) % 100)(number);
  };
  const Draw copies = [](uint64_t number) { return LatentVector(number % 400, kDimension); };
  const Draw mostly_equal = [](uint64_t number) {
    return LatentVector(number % 10 == 0 ? number : 0, kDimension);
  };
  // With 500, 2,000 and 8,000.
  const Good all[] = {{"spread", Spread(kDimension), 3, 3},
                      {"clusters", clusters, 3, 3},
                      {"copies", copies, 3, 3},
                      {"mostly equal", mostly_equal, 3, 3},
                      // And maybe for doubts, of which each next one comes later.
                      {"narrow clusters", narrow, 3, 5}};
  for (const Good& good : all) {
    SCOPED_TRACE(good.name);
    if (kSanitized && good.name != "clusters") continue;
    CodedSpaceRig rig({.dimension = kDimension});
    for (uint64_t id = 0; id < (kSanitized ? 1'500 : 8'500); ++id) {
      ASSERT_NO_FATAL_FAILURE(rig.Store(id, good.draw(id)));
      if ((id + 1) % kSettled == 0) {
        rig.space.SetHorizon(rig.stamp);
        rig.upkeep.Run();
      }
    }
    const uint64_t learnings = SpaceTestPeer::CountLearnings(rig.space);
    EXPECT_GE(learnings, kSanitized ? 1 : good.least);
    EXPECT_LE(learnings, good.most);
    EXPECT_TRUE(rig.HasCodes());
  }
}

// The lists of a space whose codes are withdrawn are given back a few at a time. A cloud of one in
// seven: codes are judged where they were doubted, not anywhere.
TEST(SpaceCodesDriftTest, CodesAreWithdrawnInShortSlices) {
  constexpr uint64_t kFirst = 4'000;
  constexpr uint64_t kInCloud = 600;
  CodedSpaceRig rig({.dimension = kDimension});
  const Draw cloud = Cloud(0.1F);
  for (uint64_t id = 0; id < kFirst; ++id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(id, LatentVector(id, kDimension)));
  }
  ASSERT_NO_FATAL_FAILURE(rig.Settle());
  const uint32_t lists = SpaceTestPeer::CountLists(rig.space);
  ASSERT_GE(lists, 16u);
  for (uint64_t id = kFirst; id < kFirst + kInCloud; ++id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(id, cloud(id)));
  }
  for (int slice = 0; slice < 1'000'000 && rig.HasCodes(); ++slice) rig.upkeep.Step(10);
  ASSERT_FALSE(rig.HasCodes());
  size_t releasing = 0;
  for (; SpaceTestPeer::IsReleasing(rig.space); ++releasing) {
    ASSERT_TRUE(rig.space.WantsCodes());
    ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
    rig.upkeep.Step(10);
  }
  EXPECT_GE(releasing, lists / 3) << "a list or two a slice";
  EXPECT_EQ(SpaceTestPeer::CountLists(rig.space), 0u);
  ASSERT_NO_FATAL_FAILURE(rig.Settle());
}

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
