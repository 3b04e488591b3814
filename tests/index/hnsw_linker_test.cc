#include "index/hnsw_linker.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "tests/index/graph_fixture.h"
#include "tests/index/graph_search.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

// All links of all levels, node by node.
std::vector<std::vector<NodeId>> LinksOf(const GraphFixture& fixture) {
  std::vector<std::vector<NodeId>> lists;
  for (NodeId node = 0; node < fixture.stored; ++node) {
    for (uint32_t level = 0; level <= fixture.graph.Level(node); ++level) {
      std::vector<NodeId>& list = lists.emplace_back();
      fixture.graph.ForEachLink(node, level, [&](NodeId link) { list.push_back(link); });
    }
  }
  return lists;
}

// m_L = 1 / ln(M): one node in M reaches level 1, one in M^2 level 2.
TEST(HnswLinkerTest, LevelsAreDrawnAsInThePaperAndAgainTheSame) {
  GraphFixture fixture(Metric::kL2, 2, {});
  constexpr uint32_t kDraws = 1'000'000;
  std::array<uint32_t, HnswGraph::kMaxLevel + 1> at_least{};
  for (NodeId node = 0; node < kDraws; ++node) {
    const uint32_t level = fixture.linker.DrawLevel(node);
    for (uint32_t l = 0; l <= level; ++l) ++at_least[l];
  }
  EXPECT_NEAR(at_least[1], kDraws / 24.0, 1'500);
  EXPECT_NEAR(at_least[2], kDraws / 576.0, 250);
  EXPECT_LT(at_least[8], 2u);

  GraphFixture same(Metric::kL2, 2, {});
  GraphFixture other(Metric::kL2, 2, {.seed = 1});
  uint32_t differing = 0;
  for (NodeId node = 0; node < 1'000; ++node) {
    EXPECT_EQ(fixture.linker.DrawLevel(node), same.linker.DrawLevel(node));
    differing +=
        static_cast<uint32_t>(fixture.linker.DrawLevel(node) != other.linker.DrawLevel(node));
  }
  EXPECT_GT(differing, 50u);
}

TEST(HnswLinkerTest, SlicesGiveTheSameGraph) {
  const TestVectors data = GaussianVectors(1'000, 12, 3);
  GraphFixture whole(Metric::kL2, 12, kSmallBuild);
  whole.Build(data);
  EXPECT_EQ(Violation(whole.graph), "");
  for (const uint32_t budget : {1U, 50U}) {
    GraphFixture sliced(Metric::kL2, 12, kSmallBuild);
    sliced.Build(data, budget);
    EXPECT_EQ(LinksOf(sliced), LinksOf(whole)) << "budget " << budget;
    EXPECT_EQ(sliced.linker.distances(), whole.linker.distances());
  }
}

// Beyond its budget a slice may do one expansion or one neighbour's choice of links.
TEST(HnswLinkerTest, SlicesAreShort) {
  GraphFixture fixture(Metric::kL2, 12, {});
  fixture.Build(GaussianVectors(2'000, 12, 4));
  const HnswGraph& graph = fixture.graph;
  // All pairs among a full list and the new node, and their distances to the list's owner.
  const uint64_t choice = (graph.MaxDegree(0) + 1) * (graph.MaxDegree(0) + 2) / 2;
  const TestVectors more = GaussianVectors(100, 12, 5);
  for (size_t i = 0; i < more.size(); ++i) {
    const NodeId node = fixture.Store(more[i]);
    ASSERT_TRUE(fixture.linker.Begin(&fixture.graph, fixture.Target(), node));
    bool linked = false;
    while (!linked) {
      const uint64_t before = fixture.linker.distances();
      linked = fixture.linker.Step(100);
      EXPECT_LE(fixture.linker.distances() - before, 100 + choice);
    }
  }
}

TEST(HnswLinkerTest, TheGraphIsSoundAndSearchableBetweenAnyTwoSlices) {
  GraphFixture fixture(Metric::kL2, 6, kSmallBuild);
  const TestVectors data = GaussianVectors(250, 6, 6);
  for (size_t i = 0; i < data.size(); ++i) {
    const NodeId node = fixture.Store(data[i]);
    ASSERT_TRUE(fixture.linker.Begin(&fixture.graph, fixture.Target(), node));
    while (!fixture.linker.Step(1)) {
      ASSERT_EQ(Violation(fixture.graph), "") << "node " << node;
      if (node == 0) continue;
      // Search uses its own scratch, so it must not disturb the linker.
      ASSERT_FALSE(fixture.Search(data[i], 3, 10).empty());
    }
    ASSERT_FALSE(fixture.linker.active());
    ASSERT_EQ(fixture.linker.node(), node);
  }
  EXPECT_EQ(Violation(fixture.graph), "");
  EXPECT_EQ(fixture.graph.linked_count(), data.size());
}

// Own links come before reverse links, on every level: whoever gets to a node can leave it.
TEST(HnswLinkerTest, ANodeThatIsLinkedToHasLinksOfItsOwn) {
  GraphFixture fixture(Metric::kL2, 6, kSmallBuild);
  const TestVectors data = GaussianVectors(200, 6, 8);
  for (size_t i = 0; i < data.size(); ++i) {
    const NodeId node = fixture.Store(data[i]);
    ASSERT_TRUE(fixture.linker.Begin(&fixture.graph, fixture.Target(), node));
    while (!fixture.linker.Step(1)) {
      for (NodeId other = 0; other < node; ++other) {
        for (uint32_t level = 0; level <= fixture.graph.Level(other); ++level) {
          if (!fixture.graph.HasLink(other, level, node)) continue;
          const uint32_t top = std::min(fixture.graph.Level(node), fixture.graph.top_level());
          for (uint32_t l = 0; l <= top; ++l) ASSERT_GT(fixture.graph.Degree(node, l), 0u);
        }
      }
    }
  }
}

TEST(HnswLinkerTest, EqualVectorsDoNotBreakReachability) {
  for (const Metric metric : {Metric::kL2, Metric::kCosine, Metric::kInnerProduct}) {
    GraphFixture fixture(metric, 12, {.ef_construction = 100});
    TestVectors data = GaussianVectors(1'500, 12, 10);
    for (size_t i = 0; i < 300; ++i) {  // 300 copies of one vector, spread over the others
      std::copy_n(data[0].begin(), 12, data.values.begin() + static_cast<ptrdiff_t>(i * 5 * 12));
    }
    fixture.Build(data);
    ASSERT_EQ(Violation(fixture.graph), "") << MetricName(metric);
    // One copy must not keep the others out of a list. (Beyond ef_construction copies, the search
    // for neighbours finds nothing but copies.)
    uint32_t leading_out = 0;
    for (NodeId copy = 0; copy < 1'500; copy += 5) {
      bool leads_out = false;
      fixture.graph.ForEachLink(copy, 0,
                                [&](NodeId link) { leads_out = leads_out || link % 5 != 0; });
      leading_out += static_cast<uint32_t>(leads_out);
    }
    EXPECT_GE(leading_out, 95u) << MetricName(metric);
    if (metric == Metric::kInnerProduct) continue;  // there the nearest is not the equal one
    const std::vector<Neighbour> found = fixture.Search(data[0], 300, 400);
    ASSERT_EQ(found.size(), 300u);
    const auto copies = std::count_if(found.begin(), found.end(),
                                      [](const Neighbour& n) { return n.node % 5 == 0; });
    EXPECT_GE(copies, 295) << MetricName(metric);
    for (NodeId node = 1; node < 200; ++node) {
      if (node % 5 == 0) continue;
      EXPECT_EQ(fixture.Search(data[node], 1, 64)[0].node, node);
    }
  }
}

TEST(HnswLinkerTest, NothingButEqualVectors) {
  GraphFixture fixture(Metric::kL2, 4, {});
  TestVectors data{4, std::vector<float>(1'000 * 4, 0.5F)};
  fixture.Build(data);
  EXPECT_EQ(Violation(fixture.graph), "");
  EXPECT_EQ(fixture.Search(data[0], 1'000, 1'000).size(), 1'000u);
}

// With M0 = 3 a node may have one child: parents must be looked for down the tree.
TEST(HnswLinkerTest, SmallestDegrees) {
  for (const uint32_t m0 : {3U, 4U}) {
    GraphFixture fixture(Metric::kL2, 3, {.M = 2, .M0 = m0, .ef_construction = 10});
    const TestVectors data = GaussianVectors(500, 3, 12);
    fixture.Build(data);
    EXPECT_EQ(Violation(fixture.graph), "") << "M0 " << m0;
    EXPECT_EQ(fixture.Search(data[0], 500, 500).size(), 500u);
  }
}

TEST(HnswLinkerTest, LargestDegrees) {
  GraphFixture fixture(Metric::kL2, 8, {.M = 64, .M0 = 128, .ef_construction = 150});
  const TestVectors data = GaussianVectors(1'000, 8, 14);
  fixture.Build(data);
  EXPECT_EQ(Violation(fixture.graph), "");
  EXPECT_GE(fixture.RecallAt(10, 40, GaussianVectors(50, 8, 15)), 0.99);
}

TEST(HnswLinkerTest, EachOptionOfSelectionBuildsASoundGraph) {
  const TestVectors data = ClusteredVectors(1'500, 12, 10, 16);
  const TestVectors queries = ClusteredVectors(50, 12, 10, 16);
  std::vector<std::vector<std::vector<NodeId>>> graphs;
  for (const HnswBuildParams& params :
       {HnswBuildParams{.M = 8, .M0 = 16, .ef_construction = 40},
        HnswBuildParams{.M = 8, .M0 = 16, .ef_construction = 40, .extend_candidates = true},
        HnswBuildParams{.M = 8, .M0 = 16, .ef_construction = 40, .keep_pruned = true},
        HnswBuildParams{.M = 8, .M0 = 16, .ef_construction = 40, .alpha = 1.2F}}) {
    GraphFixture fixture(Metric::kL2, 12, params);
    fixture.Build(data, 10);
    EXPECT_EQ(Violation(fixture.graph), "");
    EXPECT_GE(fixture.RecallAt(10, 64, queries), 0.95);
    graphs.push_back(LinksOf(fixture));
    for (size_t i = 0; i + 1 < graphs.size(); ++i) EXPECT_NE(graphs[i], graphs.back()) << i;
  }
}

// Given up after any number of slices, a node leaves no trace but the links that pruning dropped.
TEST(HnswLinkerTest, AbandonTakesANodeBackFromAnyPhase) {
  GraphFixture fixture(Metric::kL2, 6, kSmallBuild);
  fixture.Build(GaussianVectors(300, 6, 18));
  const TestVectors more = GaussianVectors(1, 6, 19);
  const NodeId node = fixture.Store(more[0]);
  ASSERT_TRUE(fixture.graph.Reserve(node + 1));
  const size_t live_bytes = fixture.heap.live_bytes();
  bool linked = false;
  uint32_t rounds = 0;
  for (uint32_t slices = 0; !linked; ++slices, ++rounds) {
    ASSERT_TRUE(fixture.linker.Begin(&fixture.graph, fixture.Target(), node));
    for (uint32_t i = 0; i < slices && !linked; ++i) linked = fixture.linker.Step(1);
    if (linked) break;
    fixture.linker.Abandon();
    ASSERT_FALSE(fixture.linker.active());
    ASSERT_FALSE(fixture.graph.IsLinked(node));
    ASSERT_EQ(Violation(fixture.graph), "") << "after " << slices << " slices";
    ASSERT_EQ(fixture.heap.live_bytes(), live_bytes);
    for (const Neighbour& found : fixture.Search(more[0], 300, 300)) ASSERT_NE(found.node, node);
  }
  EXPECT_GT(rounds, 20u);
  EXPECT_EQ(Violation(fixture.graph), "");
  EXPECT_EQ(fixture.graph.linked_count(), 301u);
  fixture.linker.Abandon();  // does nothing when free
}

TEST(HnswLinkerTest, AbandonTheFirstNode) {
  GraphFixture fixture(Metric::kL2, 2, kSmallBuild);
  const float value[2] = {1, 2};
  const NodeId node = fixture.Store(value);
  ASSERT_TRUE(fixture.linker.Begin(&fixture.graph, fixture.Target(), node));
  fixture.linker.Abandon();
  EXPECT_EQ(fixture.graph.entry_point(), kNoNode);
  EXPECT_EQ(Violation(fixture.graph), "");
  fixture.Link(node);
  EXPECT_EQ(fixture.graph.linked_count(), 1u);
}

// Nodes need not come in order, nor all of them.
TEST(HnswLinkerTest, AnyOrderWithGaps) {
  GraphFixture fixture(Metric::kL2, 6, kSmallBuild);
  const TestVectors data = GaussianVectors(900, 6, 20);
  for (size_t i = 0; i < data.size(); ++i) fixture.Store(data[i]);
  for (NodeId i = 0; i < 900; i += 3) fixture.Link(i * 7 % 900);
  EXPECT_EQ(Violation(fixture.graph), "");
  EXPECT_EQ(fixture.graph.linked_count(), 300u);
  for (const Neighbour& found : fixture.Search(data[0], 50, 100)) EXPECT_EQ(found.node % 3, 0u);
}

TEST(HnswLinkerTest, OneLinkerServesSeveralGraphs) {
  const TestVectors data = GaussianVectors(400, 6, 22);
  GraphFixture alone(Metric::kL2, 6, kSmallBuild);
  alone.Build(data);
  GraphFixture first(Metric::kL2, 6, kSmallBuild);
  GraphFixture second(Metric::kCosine, 6, kSmallBuild);
  for (size_t i = 0; i < data.size(); ++i) {
    first.Link(first.Store(data[i]));
    const NodeId node = second.Store(data[i]);
    ASSERT_TRUE(first.linker.Begin(&second.graph, second.Target(), node));
    while (!first.linker.Step(20)) {
    }
  }
  EXPECT_EQ(LinksOf(first), LinksOf(alone));
  EXPECT_EQ(Violation(second.graph), "");
}

TEST(HnswLinkerTest, LinkingAndSearchingTakeNoMallocOnceWarm) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer has its own operator new";
  GraphFixture fixture(Metric::kL2, 12, {.extend_candidates = true});
  const TestVectors data = GaussianVectors(3'000, 12, 24);
  for (size_t i = 0; i < data.size(); ++i) fixture.Store(data[i]);
  std::array<Neighbour, 10> out;
  const uint64_t before = AllocationCount();
  for (NodeId node = 0; node < data.size(); ++node) {
    fixture.Link(node, 100);
    SearchGraph(fixture.TargetOf(node), 10, 50, AllLive(), &fixture.scratch, out);
  }
  EXPECT_EQ(AllocationCount(), before);
  ::operator delete(::operator new(8));
  EXPECT_GT(AllocationCount(), before) << "the counter does not count";
}

}  // namespace
}  // namespace engram
