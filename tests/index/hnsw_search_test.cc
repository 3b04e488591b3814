#include "index/hnsw_search.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "tests/index/graph_fixture.h"
#include "tests/index/graph_search.h"
#include "tests/index/real_vectors.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr size_t kVectors = kSanitized ? 2'000 : 5'000;
constexpr size_t kRealVectors = kSanitized ? 3'000 : 20'000;

TEST(NeighbourKeyTest, OrdersByDistanceThenNodeAndComesBack) {
  const float distances[] = {-std::numeric_limits<float>::infinity(),
                             -3e38F,
                             -1.5F,
                             -1e-45F,
                             -0.0F,
                             0.0F,
                             1e-45F,
                             1.0F,
                             3e38F,
                             std::numeric_limits<float>::infinity()};
  for (size_t i = 0; i < std::size(distances); ++i) {
    EXPECT_EQ(DistanceOf(KeyOf(distances[i], 17)), distances[i]);
    EXPECT_EQ(NodeOf(KeyOf(distances[i], 17)), 17u);
    EXPECT_LT(KeyOf(distances[i], 3), KeyOf(distances[i], 4));
    if (i != 0) {
      EXPECT_LT(KeyOf(distances[i - 1], UINT32_MAX), KeyOf(distances[i], 0));
    }
  }
}

TEST(KeyHeapTest, PopsInOrderAfterAnyMixOfOperations) {
  std::mt19937_64 random(3);
  std::vector<NeighbourKey> memory(300);
  KeyHeap<NearestFirst> heap;
  heap.Attach(memory.data());
  std::vector<NeighbourKey> model;
  const auto least_of_model = [&model] { return std::min_element(model.begin(), model.end()); };
  for (int i = 0; i < 20'000; ++i) {
    const NeighbourKey key = random() % 1'000;
    switch (random() % 4) {
      case 0:
      case 1:
        if (heap.size() == memory.size()) break;
        heap.Push(key);
        model.push_back(key);
        break;
      case 2:
        if (heap.empty()) break;
        heap.Pop();
        model.erase(least_of_model());
        break;
      default:
        if (heap.empty()) break;
        heap.ReplaceTop(key);
        *least_of_model() = key;
    }
    ASSERT_EQ(heap.size(), model.size());
    if (!model.empty()) {
      ASSERT_EQ(heap.top(), *least_of_model());
    }
  }
}

struct Case {
  const char* name;
  Metric metric;
  bool clustered;
};
class HnswRecallTest : public testing::TestWithParam<Case> {};

TEST_P(HnswRecallTest, RecallIsHighAndRisesWithEf) {
  constexpr uint32_t kDimension = 24;
  const auto make = [](size_t count, uint32_t seed) {
    return GetParam().clustered ? ClusteredVectors(count, kDimension, 40, seed)
                                : GaussianVectors(count, kDimension, seed);
  };
  GraphFixture fixture(GetParam().metric, kDimension, {});
  fixture.Build(make(kVectors, 11));
  const Result<void> sound = fixture.graph.CheckInvariants();
  ASSERT_TRUE(sound.has_value()) << sound.error().message;
  TestVectors queries = make(200, 11);  // the same centres
  for (float& value : queries.values) value += 0.01F;
  const double at_10 = fixture.RecallAt(10, 10, queries);
  const double at_40 = fixture.RecallAt(10, 40, queries);
  const double at_200 = fixture.RecallAt(10, 200, queries);
  RecordProperty("recall_at_10_ef_200", std::to_string(at_200));
  EXPECT_LE(at_10, at_40);
  EXPECT_LE(at_40, at_200);
  EXPECT_GE(at_200, 0.95) << at_10 << " " << at_40;
}

INSTANTIATE_TEST_SUITE_P(Data, HnswRecallTest,
                         testing::Values(Case{"GaussianL2", Metric::kL2, false},
                                         Case{"GaussianCosine", Metric::kCosine, false},
                                         Case{"GaussianInnerProduct", Metric::kInnerProduct, false},
                                         Case{"ClusteredL2", Metric::kL2, true},
                                         Case{"ClusteredCosine", Metric::kCosine, true}),
                         [](const testing::TestParamInfo<Case>& data) { return data.param.name; });

TEST(HnswRealDataTest, FashionMnist) {
  TestVectors data;
  TestVectors queries;
  if (const std::string reason = LoadFashionMnist(kRealVectors, 200, &data, &queries);
      !reason.empty()) {
    GTEST_SKIP() << reason;
  }
  GraphFixture fixture(Metric::kL2, data.dimension, {}, size_t{512} << 20);
  fixture.Build(data);
  const Result<void> sound = fixture.graph.CheckInvariants();
  ASSERT_TRUE(sound.has_value()) << sound.error().message;
  const double at_16 = fixture.RecallAt(10, 16, queries);
  const double at_128 = fixture.RecallAt(10, 128, queries);
  EXPECT_LT(at_16, at_128);
  EXPECT_GE(at_128, 0.99);
}

TEST(HnswSearchTest, EveryVectorFindsItself) {
  for (const Metric metric : {Metric::kL2, Metric::kCosine}) {
    GraphFixture fixture(metric, 24, {});
    const TestVectors data = GaussianVectors(kVectors, 24, 5);
    fixture.Build(data);
    size_t found = 0;
    for (NodeId node = 0; node < data.size(); ++node) {
      const std::vector<Neighbour> nearest = fixture.Search(data[node], 1, 64);
      found += static_cast<size_t>(nearest.size() == 1 && nearest[0].node == node);
    }
    EXPECT_EQ(found, data.size()) << MetricName(metric);
  }
}

// With ef as large as the graph the answer is exact, order and ties included.
TEST(HnswSearchTest, ResultsAreNearestFirstAndTiesByLowerNode) {
  constexpr size_t kNodes = 600;
  GraphFixture fixture(Metric::kL2, 3, {.M = 8, .M0 = 16, .ef_construction = 50});
  TestVectors data = GaussianVectors(kNodes, 3, 9);
  for (float& value : data.values) value = std::round(value);  // many ties
  fixture.Build(data);
  for (size_t q = 0; q < 50; ++q) {
    const std::vector<Neighbour> found = fixture.Search(data[q], 40, kNodes);
    const std::vector<Neighbour> exact = fixture.ExactSearch(data[q], 40);
    ASSERT_EQ(found.size(), exact.size());
    for (size_t i = 0; i < exact.size(); ++i) {
      EXPECT_EQ(found[i].node, exact[i].node) << "query " << q << " place " << i;
      EXPECT_EQ(found[i].distance, exact[i].distance);
    }
  }
}

TEST(HnswSearchTest, RetiredNodesAreWalkedThroughAndNeverReturned) {
  GraphFixture fixture(Metric::kL2, 8, {});
  const TestVectors data = GaussianVectors(3'000, 8, 13);
  fixture.Build(data);
  // Nine in ten are retired: the way to the live ones leads through them.
  const auto is_live = [](NodeId node) { return node % 10 == 3; };
  size_t hits = 0;
  for (NodeId q = 0; q < 100; ++q) {
    std::vector<Neighbour> exact = fixture.ExactSearch(data[q], 3'000);
    std::erase_if(exact, [&](const Neighbour& n) { return !is_live(n.node); });
    const std::vector<Neighbour> found = fixture.Search(data[q], 10, 32, is_live);
    ASSERT_EQ(found.size(), 10u);
    for (const Neighbour& neighbour : found) {
      ASSERT_TRUE(is_live(neighbour.node));
      hits += static_cast<size_t>(neighbour.distance <= exact[9].distance);
    }
  }
  EXPECT_GE(hits, 990u);
  EXPECT_TRUE(fixture.Search(data[0], 10, 32, [](NodeId) { return false; }).empty());
}

TEST(HnswSearchTest, TinyGraphs) {
  GraphFixture fixture(Metric::kL2, 2, {});
  const float origin[2] = {0, 0};
  ASSERT_TRUE(fixture.scratch.Reserve(1));
  EXPECT_TRUE(fixture.Search(origin, 10, 10).empty());
  EXPECT_TRUE(fixture.graph.CheckInvariants().has_value());

  const float first[2] = {3, 4};
  fixture.Link(fixture.Store(first));
  EXPECT_TRUE(fixture.graph.CheckInvariants().has_value());
  std::vector<Neighbour> found = fixture.Search(origin, 10, 10);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].node, 0u);
  EXPECT_EQ(found[0].distance, 25.0F);

  const float second[2] = {0, 1};
  fixture.Link(fixture.Store(second));
  EXPECT_TRUE(fixture.graph.CheckInvariants().has_value());
  found = fixture.Search(origin, 10, 1);
  ASSERT_EQ(found.size(), 2u);  // ef is raised to k
  EXPECT_EQ(found[0].node, 1u);
  EXPECT_EQ(found[1].node, 0u);
  EXPECT_EQ(fixture.Search(origin, 1, 1).size(), 1u);
}

TEST(HnswSearchTest, TheEndsOfTheRangeOfDimensions) {
  for (const uint32_t dimension : {1U, 4096U}) {
    GraphFixture fixture(Metric::kL2, dimension, {});
    const TestVectors data = GaussianVectors(300, dimension, 21);
    fixture.Build(data);
    EXPECT_TRUE(fixture.graph.CheckInvariants().has_value());
    for (NodeId node = 0; node < data.size(); ++node) {
      const std::vector<Neighbour> found = fixture.Search(data[node], 1, 32);
      ASSERT_EQ(found.size(), 1u);
      EXPECT_EQ(found[0].distance, 0.0F) << dimension << " node " << node;
    }
  }
}

// A slice at a time gives the same answer as all at once, and slices are short.
TEST(HnswSearchTest, SlicesGiveTheSameAnswer) {
  GraphFixture fixture(Metric::kL2, 16, {});
  const TestVectors data = GaussianVectors(2'000, 16, 23);
  fixture.Build(data);
  GraphSearch<AllLive> search;
  for (NodeId q = 0; q < 20; ++q) {
    const std::vector<Neighbour> whole = fixture.Search(data[q], 10, 50);
    search.Begin(fixture.TargetOf(q), 10, 50, &fixture.scratch);
    size_t slices = 1;
    for (;; ++slices) {
      const uint64_t before = fixture.scratch.distances;
      const bool complete = search.Step(1);
      EXPECT_LE(fixture.scratch.distances - before, fixture.graph.MaxDegree(0));
      if (complete) break;
    }
    EXPECT_GT(slices, 20u);
    std::vector<Neighbour> sliced(10);
    ASSERT_EQ(search.TakeResults(sliced), 10u);
    for (size_t i = 0; i < 10; ++i) EXPECT_EQ(sliced[i].node, whole[i].node);
  }
}

// More retired nodes than a small scratch has room for candidates: the farther ones are dropped.
TEST(HnswSearchTest, ACrowdOfRetiredNodesDoesNotOverrunTheCandidates) {
  GraphFixture fixture(Metric::kL2, 4, {});
  const TestVectors data = GaussianVectors(5'000, 4, 29);
  fixture.Build(data);
  SearchScratch small(&fixture.heap, 8);
  ASSERT_TRUE(small.Reserve(data.size()));
  std::vector<Neighbour> out(8);
  // The fewer are live, the more candidates there are before the results are full.
  for (const NodeId one_in : {500U, 200U, 100U, 50U}) {
    for (NodeId query = 0; query < 40; ++query) {
      const size_t found = SearchGraph(
          fixture.TargetOf(query), 8, 8, [&](NodeId node) { return node % one_in == 7; }, &small,
          out);
      EXPECT_GT(found, 0u);
      for (size_t i = 0; i < found; ++i) EXPECT_EQ(out[i].node % one_in, 7u);
    }
  }
}

// The graph grows between two slices of a search: no node is found twice.
TEST(HnswSearchTest, TheScratchMayGrowWhileASearchIsUnderWay) {
  GraphFixture fixture(Metric::kL2, 4, {});
  fixture.Build(GaussianVectors(400, 4, 33));
  GraphSearch<AllLive> search;
  search.Begin(fixture.TargetOf(0), 300, 300, &fixture.scratch);
  size_t room = fixture.scratch.capacity();
  for (int slice = 0; !search.Step(1); ++slice) {
    if (slice % 30 != 0 || slice > 150) continue;
    ASSERT_TRUE(fixture.scratch.Reserve(room *= 2));
  }
  std::vector<Neighbour> found(300);
  ASSERT_EQ(search.TakeResults(found), 300u);
  for (size_t i = 1; i < found.size(); ++i) {
    EXPECT_LT(KeyOf(found[i - 1].distance, found[i - 1].node),
              KeyOf(found[i].distance, found[i].node));
  }
}

// The graph grows beyond the scratch's room between two slices, and the descent ends at a node that
// the room does not reach: the others are found all the same.
TEST(HnswSearchTest, ASearchMayBeginAtANodeBeyondItsRoom) {
  GraphFixture fixture(Metric::kL2, 2, {.M = 4, .M0 = 8, .ef_construction = 16});
  const TestVectors data = GaussianVectors(4'096, 2, 41);
  for (NodeId node = 0; node < 60; ++node) fixture.Link(fixture.Store(data[node]));
  SearchScratch scratch(&fixture.heap);
  ASSERT_TRUE(scratch.Reserve(fixture.stored));
  while (fixture.stored < scratch.capacity()) fixture.Store(data[60]);
  // Nodes beyond the room, until one of them is the entry point.
  const SearchTarget target = fixture.TargetOf(5);
  NodeId entry = 0;
  while (entry < scratch.capacity()) {
    fixture.Link(fixture.Store(data[5]));
    entry = fixture.graph.entry_point();
    ASSERT_LT(fixture.stored, 10'000u);
  }
  GraphSearch<AllLive> search;
  search.Begin(target, 1, 1'000, &scratch);
  while (!search.Step(7)) {
  }
  std::vector<Neighbour> found(60);
  ASSERT_EQ(search.TakeResults(found), 1u);
  EXPECT_EQ(found[0].distance, 0.0F);
  EXPECT_EQ(found[0].node, 5u) << "of equal distances the lower node";
}

// Marks of 65,535 searches ago must not pass for this search's. Between the two searches of the
// larger graph, its marks are left alone by searches of a graph of one node.
TEST(HnswSearchTest, VisitedMarksComeRound) {
  GraphFixture fixture(Metric::kL2, 2, {.M = 4, .M0 = 8, .ef_construction = 8});
  const TestVectors data = GaussianVectors(50, 2, 31);
  fixture.Build(data);
  GraphFixture tiny(Metric::kL2, 2, {});
  tiny.Link(tiny.Store(data[0]));
  const auto search = [](const GraphFixture& where, SearchScratch* scratch) {
    std::vector<Neighbour> out(20);
    out.resize(SearchGraph(where.TargetOf(0), 20, 20, AllLive(), scratch, out));
    return out.size();
  };
  for (const int between : {65'533, 65'534, 65'535}) {
    SearchScratch scratch(&fixture.heap, 20);
    ASSERT_TRUE(scratch.Reserve(data.size()));
    ASSERT_EQ(search(fixture, &scratch), 20u);
    for (int i = 0; i < between; ++i) ASSERT_EQ(search(tiny, &scratch), 1u);
    ASSERT_EQ(search(fixture, &scratch), 20u) << between;
  }
}

}  // namespace
}  // namespace engram
