#include "index/graph_walk.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tests/index/graph_search.h"
#include "tests/index/real_vectors.h"
#include "tests/index/walk_fixture.h"
#include "tests/support/allocation_counter.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr size_t kVectors = kSanitized ? 2'000 : 5'000;

struct Case {
  const char* name;
  Metric metric;
  bool clustered;
};
class GraphWalkRecallTest : public testing::TestWithParam<Case> {};

// With the list and, at the largest ef, with the heaps.
TEST_P(GraphWalkRecallTest, RecallIsThatOfGraphSearch) {
  constexpr uint32_t kDimension = 24;
  const auto make = [](size_t count, uint32_t seed) {
    return GetParam().clustered ? ClusteredVectors(count, kDimension, 40, seed)
                                : GaussianVectors(count, kDimension, seed);
  };
  WalkFixture fixture(GetParam().metric, kDimension, {});
  fixture.Build(make(kVectors, 11));
  TestVectors queries = make(200, 11);  // the same centres
  for (float& value : queries.values) value += 0.01F;
  for (const uint32_t ef : {10U, 40U, 200U, 600U}) {
    double by_walk = 0;
    double by_search = 0;
    for (size_t q = 0; q < queries.size(); ++q) {
      const float bound = fixture.ExactSearch(queries[q], 10).back().distance;
      by_walk += HitsAmong(fixture.Walk(queries[q], 10, ef), bound);
      by_search += HitsAmong(fixture.Search(queries[q], 10, ef), bound);
    }
    const double all = 10.0 * static_cast<double>(queries.size());
    EXPECT_GE(by_walk / all, by_search / all - 0.005) << ef;
    if (ef >= 200) {
      EXPECT_GE(by_walk / all, 0.95) << ef;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Data, GraphWalkRecallTest,
                         testing::Values(Case{"GaussianL2", Metric::kL2, false},
                                         Case{"GaussianCosine", Metric::kCosine, false},
                                         Case{"GaussianInnerProduct", Metric::kInnerProduct, false},
                                         Case{"ClusteredL2", Metric::kL2, true},
                                         Case{"ClusteredCosine", Metric::kCosine, true}),
                         [](const testing::TestParamInfo<Case>& data) { return data.param.name; });

// Distances far from 0 and close to each other keep their order: keys count from a reference.
TEST(GraphWalkTest, DistancesMayAllBeFarFromZero) {
  constexpr uint32_t kDimension = 16;
  TestVectors data = GaussianVectors(kVectors, kDimension, 3);
  // Every inner product is about 10^6, their differences about 10.
  data.dimension = kDimension + 1;
  std::vector<float> values;
  for (size_t i = 0; i < kVectors; ++i) {
    for (uint32_t d = 0; d < kDimension; ++d) values.push_back(data.values[i * kDimension + d]);
    values.push_back(1'000);
  }
  data.values = values;
  WalkFixture fixture(Metric::kInnerProduct, kDimension + 1, {});
  fixture.Build(data);
  double by_walk = 0;
  double by_search = 0;
  for (size_t q = 0; q < 100; ++q) {
    const float bound = fixture.ExactSearch(data[q], 10).back().distance;
    by_walk += HitsAmong(fixture.Walk(data[q], 10, 60), bound);
    by_search += HitsAmong(fixture.Search(data[q], 10, 60), bound);
  }
  EXPECT_GE(by_walk, by_search - 5);
}

// So do those of tight clusters, though the descent ends in another cluster and all distances are
// close to each other as seen from there.
TEST(GraphWalkTest, ClustersMayBeFarFromWhereTheWalkBegins) {
  for (const size_t count : {1'000, 2'000, 3'000}) {
    WalkFixture fixture(Metric::kL2, 24, {});
    const TestVectors data = ClusteredVectors(count, 24, 40, 11);
    fixture.Build(data);
    for (const uint32_t ef : {10U, 40U}) {
      double by_walk = 0;
      double by_search = 0;
      for (size_t q = 0; q < 200; ++q) {
        const float bound = fixture.ExactSearch(data[q], 10).back().distance;
        by_walk += HitsAmong(fixture.Walk(data[q], 10, ef), bound);
        by_search += HitsAmong(fixture.Search(data[q], 10, ef), bound);
      }
      EXPECT_GE(by_walk, by_search - 10) << count << " " << ef;
    }
  }
}

TEST(GraphWalkTest, FashionMnist) {
  TestVectors data;
  TestVectors queries;
  if (const std::string reason =
          LoadFashionMnist(kSanitized ? 3'000 : 20'000, 200, &data, &queries);
      !reason.empty()) {
    GTEST_SKIP() << reason;
  }
  WalkFixture fixture(Metric::kL2, data.dimension, {}, Precision::kInt8);
  fixture.Build(data);
  fixture.EncodeCodes(data);
  double by_walk = 0;
  double by_search = 0;
  double by_code = 0;
  double by_code_search = 0;
  const auto count_near = [&](std::vector<Neighbour> found, std::span<const float> query) {
    const float bound = fixture.ExactSearch(query, 10).back().distance;
    const SearchTarget target = fixture.Target(query);
    for (Neighbour& neighbour : found) neighbour.distance = target.DistanceTo(neighbour.node);
    return HitsAmong(found, bound);
  };
  for (size_t q = 0; q < queries.size(); ++q) {
    const float bound = fixture.ExactSearch(queries[q], 10).back().distance;
    by_walk += HitsAmong(fixture.Walk(queries[q], 10, 64), bound);
    by_search += HitsAmong(fixture.Search(queries[q], 10, 64), bound);
    const SearchTarget target = fixture.CodeTarget(queries[q]);
    by_code +=
        count_near(WalkGraph(target, 100, 100, AllLive(), &fixture.walk_scratch), queries[q]);
    std::vector<Neighbour> found(100);
    found.resize(SearchGraph(target, 100, 100, AllLive(), &fixture.scratch, found));
    by_code_search += count_near(found, queries[q]);
  }
  const double all = 10.0 * static_cast<double>(queries.size());
  EXPECT_GE(by_walk / all, by_search / all - 0.005);
  EXPECT_GE(by_code / all, by_code_search / all - 0.005);
  EXPECT_GE(by_code / all, 0.95);
}

// With ef as large as the graph the answer is exact, order and ties included.
TEST(GraphWalkTest, ResultsAreNearestFirstAndTiesByLowerNode) {
  constexpr size_t kNodes = 400;
  WalkFixture fixture(Metric::kL2, 3, {.M = 8, .M0 = 16, .ef_construction = 50});
  TestVectors data = GaussianVectors(kNodes, 3, 9);
  for (float& value : data.values) value = std::round(value);  // many ties
  fixture.Build(data);
  for (size_t q = 0; q < 50; ++q) {
    for (const uint32_t ef : {400U, 600U}) {  // by the list and by the heaps
      EXPECT_EQ(PairsOf(fixture.Walk(data[q], 40, ef)), PairsOf(fixture.ExactSearch(data[q], 40)))
          << "query " << q;
    }
  }
}

TEST(GraphWalkTest, EveryVectorFindsItself) {
  for (const Metric metric : {Metric::kL2, Metric::kCosine}) {
    WalkFixture fixture(metric, 24, {});
    const TestVectors data = GaussianVectors(kVectors, 24, 5);
    fixture.Build(data);
    for (NodeId node = 0; node < data.size(); ++node) {
      const std::vector<Neighbour> nearest = fixture.Walk(data[node], 1, 64);
      ASSERT_EQ(nearest.size(), 1u);
      ASSERT_EQ(nearest[0].node, node) << MetricName(metric);
    }
  }
}

// What is found has the distances that the target says, though keys are short of some bits.
TEST(GraphWalkTest, DistancesAreInFull) {
  WalkFixture fixture(Metric::kCosine, 100, {});
  const TestVectors data = GaussianVectors(600, 100, 15);
  fixture.Build(data);
  fixture.EncodeCodes(data);
  for (NodeId q = 0; q < 20; ++q) {
    for (const SearchTarget& target : {fixture.TargetOf(q), fixture.CodeTarget(data[q])}) {
      const std::vector<Neighbour> found =
          WalkGraph(target, 64, 64, AllLive(), &fixture.walk_scratch);
      ASSERT_EQ(found.size(), 64u);
      for (size_t i = 0; i < found.size(); ++i) {
        ASSERT_EQ(found[i].distance, target.DistanceTo(found[i].node));
        if (i != 0) {
          ASSERT_LT(KeyOf(found[i - 1].distance, found[i - 1].node),
                    KeyOf(found[i].distance, found[i].node));
        }
      }
    }
  }
}

TEST(GraphWalkTest, TinyGraphs) {
  WalkFixture fixture(Metric::kL2, 2, {});
  const float origin[2] = {0, 0};
  ASSERT_TRUE(fixture.walk_scratch.Reserve(10));
  EXPECT_TRUE(fixture.Walk(origin, 10, 10).empty());

  const float first[2] = {3, 4};
  fixture.Link(fixture.Store(first));
  EXPECT_EQ(PairsOf(fixture.Walk(origin, 10, 10)),
            (std::vector<std::pair<float, NodeId>>{{25.0F, 0}}));
  const float second[2] = {0, 1};
  fixture.Link(fixture.Store(second));
  // ef is raised to k.
  EXPECT_EQ(PairsOf(fixture.Walk(origin, 10, 1)),
            (std::vector<std::pair<float, NodeId>>{{1.0F, 1}, {25.0F, 0}}));
  EXPECT_EQ(PairsOf(fixture.Walk(origin, 1, 1)),
            (std::vector<std::pair<float, NodeId>>{{1.0F, 1}}));
  EXPECT_EQ(fixture.Walk(origin, 2, kMaxEf).size(), 2u);
  // After a graph with results an empty one has none.
  WalkFixture empty(Metric::kL2, 2, {});
  const SearchTarget full_target = fixture.TargetOf(0);
  const SearchTarget empty_target = empty.Target(origin);
  GraphWalk<AllLive> walk;
  for (const uint32_t ef : {10U, kMaxEf}) {
    for (const SearchTarget& target : {full_target, empty_target}) {
      walk.Begin(target, 10, ef, &fixture.walk_scratch);
      while (!walk.Step(1)) {
      }
      std::vector<Neighbour> found(10);
      EXPECT_EQ(walk.TakeResults(found), target.graph == &empty.graph ? 0u : 2u);
    }
  }
}
TEST(GraphWalkTest, TakesMemoryFromItsHeapAloneAndGivesItBack) {
  WalkFixture fixture(Metric::kL2, 8, {});
  const TestVectors data = GaussianVectors(1'000, 8, 57);
  fixture.Build(data);
  const size_t before = fixture.heap.live_bytes();
  {
    WalkScratch scratch(&fixture.heap);
    EXPECT_EQ(fixture.heap.live_bytes(), before);
    ASSERT_TRUE(scratch.Reserve(fixture.stored));
    const size_t reserved = fixture.heap.live_bytes();
    const SearchTarget target = fixture.TargetOf(1);
    GraphWalk<AllLive> walk;
    std::vector<Neighbour> found(100);
    const uint64_t allocations = AllocationCount();
    for (const uint32_t ef : {1U, 100U, 512U, 10'000U}) {
      walk.Begin(target, 1, ef, &scratch);
      while (!walk.Step(100)) {
      }
      EXPECT_EQ(walk.TakeResults(found), 1u);
    }
    EXPECT_EQ(AllocationCount(), allocations);
    EXPECT_EQ(fixture.heap.live_bytes(), reserved);
  }
  EXPECT_EQ(fixture.heap.live_bytes(), before);
}

// A scratch that the heap has no memory for says so, and may be tried again.
TEST(GraphWalkTest, ASpentHeapIsNoBug) {
  WalkFixture fixture(Metric::kL2, 8, {});
  fixture.Build(GaussianVectors(200, 8, 59));
  WalkScratch scratch(&fixture.heap);
  ASSERT_TRUE(scratch.Reserve(200));
  EXPECT_FALSE(scratch.Reserve(size_t{1} << 33));
  EXPECT_GE(scratch.capacity(), 200u);
  EXPECT_EQ(WalkGraph(fixture.TargetOf(3), 1, 10, AllLive(), &scratch)[0].node, 3u);
}

}  // namespace
}  // namespace engram
