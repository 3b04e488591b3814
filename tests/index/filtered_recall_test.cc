// Recalls with a filter of a space that is large enough for its graph to be walked for them.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "src/core/attributes.h"
#include "src/core/hash.h"
#include "tests/index/coded_space_rig.h"

namespace engram {
namespace {

constexpr uint64_t kNodes = 8'000;
constexpr uint32_t kDimension = 66;
constexpr uint32_t kAround = 20;  // what the rows of a side are about

// Rows about two places; `left` and `right` name the side, `half` and `most` nothing of the kind.
class RecallFilterTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    rig_ = new CodedSpaceRig({.metric = Metric::kL2, .dimension = kDimension});
    SplitMix64 random(3);
    for (uint64_t id = 0; id < kNodes; ++id) Store(id, DrawRow(&random, id % 2 == 0));
    rig_->Settle();
  }
  static void TearDownTestSuite() {
    delete rig_;
    rig_ = nullptr;
  }

  static std::vector<float> DrawRow(SplitMix64* random, bool is_left) {
    std::vector<float> row = QuarterVector(random, kDimension);
    for (size_t i = 0; i < 8; ++i) row[i] += is_left ? -float{kAround} : float{kAround};
    return row;
  }
  static int64_t WhenOf(uint64_t id) { return static_cast<int64_t>(MixBits(id) % 1'000); }
  static bool IsHalf(uint64_t id) { return MixBits(id + 9) % 2 == 0; }
  static bool IsMost(uint64_t id) { return MixBits(id + 8) % 20 != 0; }
  static void Store(uint64_t id, const std::vector<float>& row) {
    std::string attributes;
    const auto add = [&attributes](std::string_view tag) {
      ASSERT_TRUE(AppendAttribute(kTagKey, tag, &attributes));
    };
    add(id % 2 == 0 ? "left" : "right");
    if (IsHalf(id)) add("half");
    if (IsMost(id)) add("most");
    const std::string name = std::to_string(id);
    ObservationRef observation;
    observation.id = name;
    observation.dtype = VectorDtype::kF32;
    observation.dimension = kDimension;
    observation.vector = reinterpret_cast<const std::byte*>(row.data());
    observation.when_ns = WhenOf(id);
    observation.attributes = BytesOf(attributes);
    ASSERT_EQ(rig_->space.Upsert(observation, ++rig_->stamp).reason, RefusalReason::kNone);
    rig_->vectors[id] = row;
  }

  static std::string Requiring(std::string_view tag, const TimeRange& times = {}) {
    FilterWriter writer;
    writer.SetTimes(times);
    EXPECT_TRUE(writer.Require(kTagKey, {&tag, 1}));
    return writer.Bytes();
  }
  static std::string Excluding(std::string_view tag) {
    FilterWriter writer;
    EXPECT_TRUE(writer.Exclude(kTagKey, {&tag, 1}));
    return writer.Bytes();
  }
  static RecallAnswer Ask(const std::string& filter, const std::vector<float>& query, uint32_t k,
                          uint32_t ef, uint32_t slice = UINT32_MAX) {
    return RunRecall(rig_->space, &rig_->job, query,
                     {.k = k, .ef = ef, .slice = slice, .filter = filter});
  }
  // recall@10 of queries on the left; all hits match.
  template <typename Matches>
  static double RecallOf(const std::string& filter, uint32_t ef, Matches&& matches) {
    SplitMix64 random(77);
    TrueNearest::Vectors matching;
    for (const auto& [id, row] : rig_->vectors) {
      if (matches(id)) matching[id] = row;
    }
    std::vector<std::vector<float>> queries;
    for (int i = 0; i < 50; ++i) queries.push_back(DrawRow(&random, true));
    const TrueNearest truth(Metric::kL2, &matching, queries);
    int found = 0;
    for (size_t query = 0; query < queries.size(); ++query) {
      const RecallAnswer answer = Ask(filter, queries[query], TrueNearest::kNearest, ef, 300);
      EXPECT_EQ(answer.hits.size(), size_t{TrueNearest::kNearest});
      const int count = truth.CountTrue(query, answer.hits);
      EXPECT_GE(count, 0) << "a hit that does not match, or twice";
      found += count;
    }
    return found / (50.0 * TrueNearest::kNearest);
  }
  static uint64_t DistancesOf(const std::string& filter, uint32_t ef) {
    SplitMix64 random(78);
    const uint64_t before = rig_->job.distances();
    (void)Ask(filter, DrawRow(&random, true), 10, ef);
    return rig_->job.distances() - before;
  }

  static CodedSpaceRig* rig_;
};
CodedSpaceRig* RecallFilterTest::rig_ = nullptr;

TEST_F(RecallFilterTest, WhatMatchesOftenIsFoundByAWalk) {
  EXPECT_GT(RecallOf(Requiring("half"), 128, IsHalf), 0.93);
  EXPECT_GT(RecallOf(Requiring("most"), 128, IsMost), 0.93);
  EXPECT_GT(RecallOf(Excluding("half"), 128, [](uint64_t id) { return !IsHalf(id); }), 0.93);
  const TimeRange times{.begin_ns = 100, .end_ns = 700};
  EXPECT_GT(RecallOf(Requiring("most", times), 128,
                     [&](uint64_t id) { return IsMost(id) && times.Has(WhenOf(id)); }),
            0.93);
  EXPECT_LT(DistancesOf(Requiring("half"), 128), kNodes / 2) << "not all that match were compared";
}

TEST_F(RecallFilterTest, SoIsItWithAnEfThatNoListHasRoomFor) {
  EXPECT_GT(RecallOf(Requiring("most"), 520, IsMost), 0.99);
  EXPECT_LT(DistancesOf(Requiring("most"), 520), 2 * kNodes);
}

// All about the query lack it: a walk alone would find none, or too few.
TEST_F(RecallFilterTest, WhatIsFarFromTheQueryIsFoundAllTheSame) {
  EXPECT_EQ(RecallOf(Requiring("right"), 64, [](uint64_t id) { return id % 2 == 1; }), 1);
  EXPECT_EQ(RecallOf(Excluding("left"), 64, [](uint64_t id) { return id % 2 == 1; }), 1);
}

TEST_F(RecallFilterTest, WhatIsNearTheQueryIsFoundAsWell) {
  EXPECT_GT(RecallOf(Requiring("left"), 128, [](uint64_t id) { return id % 2 == 0; }), 0.97);
}

TEST_F(RecallFilterTest, WhatMatchesRarelyIsComparedAsAWhole) {
  const TimeRange times{.begin_ns = 500, .end_ns = 510};
  EXPECT_EQ(RecallOf(Requiring("half", times), 64,
                     [&](uint64_t id) { return IsHalf(id) && times.Has(WhenOf(id)); }),
            1);
  EXPECT_LT(DistancesOf(Requiring("half", times), 64), 1'000u);
}

TEST_F(RecallFilterTest, WithoutAVectorTheLatestComeFirst) {
  const TimeRange times{.begin_ns = 100, .end_ns = 900};
  std::vector<std::pair<int64_t, uint64_t>> wanted;  // the latest first, then by number
  for (const auto& [id, row] : rig_->vectors) {
    if (IsHalf(id) && times.Has(WhenOf(id))) wanted.emplace_back(-WhenOf(id), id);
  }
  std::ranges::sort(wanted);
  for (const uint32_t slice : {1U, UINT32_MAX}) {
    for (const uint32_t k : {1U, 10U, 10'000U}) {
      const RecallAnswer answer = Ask(Requiring("half", times), {}, k, 64, slice);
      ASSERT_EQ(answer.hits.size(), std::min<size_t>(k, wanted.size()));
      for (size_t i = 0; i < answer.hits.size(); ++i) {
        ASSERT_EQ(answer.hits[i].when_ns, -wanted[i].first);
        ASSERT_EQ(answer.hits[i].score, 0);
      }
    }
  }
  EXPECT_TRUE(Ask(Requiring("nowhere"), {}, 10, 64).hits.empty());
  EXPECT_EQ(Ask(FilterWriter().BytesOfAny(), {}, 10'000, 64).hits.size(),
            std::min<size_t>(10'000, rig_->vectors.size()));
}

TEST_F(RecallFilterTest, AFilterThatNothingMeetsFindsNothing) {
  SplitMix64 random(5);
  const std::vector<float> query = DrawRow(&random, true);
  EXPECT_TRUE(Ask(Requiring("nobody's"), query, 10, 64).hits.empty());
  EXPECT_TRUE(Ask(Requiring("half", {.begin_ns = 2'000}), query, 10, 64).hits.empty());
}

TEST_F(RecallFilterTest, WhatIsNoFilterIsRefusedAndTheNextRecallIsServed) {
  SplitMix64 random(5);
  const std::vector<float> query = DrawRow(&random, true);
  FilterWriter writer;
  const std::string_view value = "x";
  ASSERT_TRUE(writer.Require("nobody's key", {&value, 1}));
  EXPECT_EQ(Ask(writer.Bytes(), query, 10, 64).reason, RefusalReason::kUnknownFilterKey);
  EXPECT_EQ(Ask("no filter", query, 10, 64).reason, RefusalReason::kBadFilter);
  EXPECT_EQ(Ask("", query, 10, 64).hits.size(), 10u);
}

// As a recall of a snapshot does: what was replaced since has its attributes as long as it may be
// seen.
TEST_F(RecallFilterTest, ASnapshotIsFilteredByWhatItSaw) {
  SplitMix64 random(5);
  const std::vector<float> row = rig_->vectors.at(4);
  const CommitStamp before = rig_->stamp;
  const std::string name = "4";
  ObservationRef observation;
  observation.id = name;
  observation.dtype = VectorDtype::kF32;
  observation.dimension = kDimension;
  observation.vector = reinterpret_cast<const std::byte*>(row.data());
  observation.when_ns = WhenOf(4);
  ASSERT_EQ(rig_->space.Upsert(observation, ++rig_->stamp).reason, RefusalReason::kNone);
  const auto first_of = [&](CommitStamp snapshot) {
    const RecallAnswer answer =
        RunRecall(rig_->space, &rig_->job, row,
                  {.k = 1, .ef = 64, .snapshot = snapshot, .filter = Requiring("left")});
    return answer.hits.empty() ? "" : answer.hits[0].id;
  };
  EXPECT_EQ(first_of(before), "4");
  EXPECT_NE(first_of(kNoStamp), "4");
  Store(4, row);
  EXPECT_EQ(first_of(kNoStamp), "4");
}

}  // namespace
}  // namespace engram
