#include "index/hnsw_sweep.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "tests/index/graph_fixture.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

std::vector<NodeId> LinkedNodes(const GraphFixture& fixture) {
  std::vector<NodeId> nodes;
  for (NodeId node = 0; node < fixture.stored; ++node) {
    if (fixture.graph.IsLinked(node)) nodes.push_back(node);
  }
  return nodes;
}

// Nothing leads to a node of the batch, so each may be forgotten.
void ForgetBatch(GraphFixture* fixture) {
  const std::span<const NodeId> batch = fixture->sweep.batch();
  for (const NodeId node : LinkedNodes(*fixture)) {
    for (uint32_t level = 0; level <= fixture->graph.Level(node); ++level) {
      fixture->graph.ForEachLink(node, level,
                                 [&](NodeId link) { ASSERT_FALSE(fixture->graph.IsDoomed(link)); });
    }
  }
  for (const NodeId node : batch) fixture->graph.Forget(node);
  ASSERT_EQ(Violation(fixture->graph), "");
}

TEST(HnswSweepTest, TakesABatchOutAndStaysSoundBetweenAnyTwoSlices) {
  for (const HnswBuildParams& params :
       {kSmallBuild, HnswBuildParams{.M = 2, .M0 = 3, .ef_construction = 10}, HnswBuildParams{}}) {
    GraphFixture fixture(Metric::kL2, 6, params);
    fixture.Build(GaussianVectors(300, 6, 1));
    std::mt19937 random(2);
    while (fixture.graph.linked_count() > 0) {
      std::vector<NodeId> batch = LinkedNodes(fixture);
      std::shuffle(batch.begin(), batch.end(), random);
      batch.resize(std::min<size_t>(batch.size(), 40));
      fixture.Sweep(batch, 1, [&] { ASSERT_EQ(Violation(fixture.graph), ""); });
      if (testing::Test::HasFatalFailure()) return;
      ForgetBatch(&fixture);
      if (testing::Test::HasFatalFailure()) return;
    }
    EXPECT_EQ(fixture.graph.entry_point(), kNoNode);
    EXPECT_EQ(fixture.graph.root(), kNoNode);
    for (NodeId node = 0; node < fixture.stored; ++node) fixture.Link(node);
    EXPECT_EQ(Violation(fixture.graph), "") << "an emptied graph grows again";
  }
}

// The entry point, the tree's root and all neighbours of one node at once.
TEST(HnswSweepTest, TheEntryPointAndTheRootMayGo) {
  GraphFixture fixture(Metric::kL2, 6, kSmallBuild);
  const TestVectors data = GaussianVectors(500, 6, 3);
  fixture.Build(data);
  for (int round = 0; round < 20; ++round) {
    std::vector<NodeId> batch{fixture.graph.entry_point()};
    if (fixture.graph.root() != batch[0]) batch.push_back(fixture.graph.root());
    const NodeId middle = LinkedNodes(fixture)[7];
    fixture.graph.ForEachLink(middle, 0, [&](NodeId link) {
      if (std::find(batch.begin(), batch.end(), link) == batch.end()) batch.push_back(link);
    });
    fixture.Sweep(batch, 20);
    ForgetBatch(&fixture);
    if (HasFatalFailure()) return;
    ASSERT_EQ(fixture.graph.Level(fixture.graph.entry_point()), fixture.graph.top_level());
  }
  for (const NodeId node : LinkedNodes(fixture)) {
    EXPECT_EQ(fixture.Search(data[node], 1, 50)[0].node, node);
  }
}

// A search walks through doomed nodes, so a batch that surrounds others does not hide them.
TEST(HnswSweepTest, WhatStaysIsFoundAtEachMoment) {
  GraphFixture fixture(Metric::kL2, 8, {.M = 8, .M0 = 16, .ef_construction = 60});
  const TestVectors data = ClusteredVectors(600, 8, 6, 5);
  fixture.Build(data);
  std::vector<NodeId> batch;
  for (NodeId node = 0; node < 600; ++node) {
    if (node % 6 == 0 || node % 7 == 1) batch.push_back(node);
  }
  NodeId next = 0;
  fixture.Sweep(batch, 200, [&] {
    for (int i = 0; i < 5; ++i, next = (next + 1) % 600) {
      if (!fixture.graph.IsLinked(next)) continue;
      const auto live = [&](NodeId node) { return fixture.graph.IsLinked(node); };
      ASSERT_EQ(fixture.Search(data[next], 1, 100, live)[0].node, next);
    }
  });
}

// So many come between two slices that the lists lead beyond what there was when it began.
TEST(HnswSweepTest, TheGraphMayGrowFarDuringASweep) {
  GraphFixture fixture(Metric::kL2, 4, kSmallBuild);
  constexpr NodeId kBefore = 200;
  constexpr NodeId kAfter = 6'000;
  const TestVectors data = GaussianVectors(kAfter, 4, 9);
  for (NodeId node = 0; node < kBefore; ++node) fixture.Link(fixture.Store(data[node]));
  std::vector<NodeId> batch(20);
  std::iota(batch.begin(), batch.end(), NodeId{0});
  NodeId next = kBefore;
  fixture.Sweep(batch, 1, [&] {
    if (fixture.sweep.repairing_tree()) return;
    for (; next < kAfter; ++next) fixture.Link(fixture.Store(data[next]));
  });
  EXPECT_EQ(next, kAfter);
  ForgetBatch(&fixture);
}

// New nodes come between a sweep's slices: none is linked to a doomed one.
TEST(HnswSweepTest, LinkingGoesOnDuringASweep) {
  GraphFixture fixture(Metric::kL2, 6, kSmallBuild);
  const TestVectors data = GaussianVectors(800, 6, 7);
  for (NodeId node = 0; node < 400; ++node) fixture.Link(fixture.Store(data[node]));
  std::vector<NodeId> batch(399);
  std::iota(batch.begin(), batch.end(), 1);
  fixture.Sweep(batch, 5, [&] {
    if (fixture.sweep.repairing_tree() || fixture.stored == 800) return;
    const NodeId node = fixture.Store(data[fixture.stored]);
    fixture.Link(node, 10);
    ASSERT_EQ(Violation(fixture.graph), "");
  });
  ForgetBatch(&fixture);
  EXPECT_GT(fixture.stored, 450u);
}

// Replacing everything, bit by bit, in random order and in the order of arrival: the graph that is
// left is as good as one that was built of the new vectors alone.
TEST(HnswSweepTest, AfterReplacingAllRecallIsThatOfAFreshGraph) {
  const HnswBuildParams params{.M = 8, .M0 = 16, .ef_construction = 60};
  constexpr uint32_t kCount = 2'000;
  const TestVectors before = GaussianVectors(kCount, 16, 9);
  const TestVectors after = GaussianVectors(kCount, 16, 10);
  const TestVectors queries = GaussianVectors(200, 16, 11);
  GraphFixture fresh(Metric::kL2, 16, params);
  fresh.Build(after);
  const double fresh_recall = fresh.RecallAt(10, 40, queries);
  for (const bool shuffled : {false, true}) {
    GraphFixture fixture(Metric::kL2, 16, params);
    fixture.Build(before);
    std::vector<NodeId> order(kCount);
    std::iota(order.begin(), order.end(), 0);
    if (shuffled) std::shuffle(order.begin(), order.end(), std::mt19937(12));
    constexpr size_t kBatch = 100;
    for (size_t done = 0; done < kCount; done += kBatch) {
      for (size_t i = done; i < done + kBatch; ++i) fixture.Link(fixture.Store(after[i]));
      fixture.Sweep(std::span(order).subspan(done, kBatch), 500);
      ForgetBatch(&fixture);
      if (HasFatalFailure()) return;
    }
    EXPECT_GE(fixture.RecallAt(10, 40, queries), fresh_recall - 0.01) << shuffled;
    size_t lost = 0;
    for (uint32_t i = 0; i < kCount; ++i) {
      lost += static_cast<size_t>(fixture.Search(after[i], 1, 40)[0].node != kCount + i);
    }
    EXPECT_LE(lost, kCount / 500) << shuffled;
  }
}

// Everything is doomed, and the first node that is not comes before the sweep has ended: no doomed
// one leads to it, yet it is found at once.
TEST(HnswSweepTest, ANodeThatComesWhileAllOthersLeaveIsTheEntryPoint) {
  int came_between = 0;
  for (uint32_t seed = 0; seed < 20; ++seed) {
    HnswBuildParams params = kSmallBuild;
    params.seed = seed;
    GraphFixture fixture(Metric::kL2, 4, params);
    const TestVectors data = GaussianVectors(60, 4, seed);
    for (NodeId node = 0; node < 40; ++node) fixture.Link(fixture.Store(data[node]));
    std::vector<NodeId> batch(40);
    std::iota(batch.begin(), batch.end(), 0);
    fixture.Sweep(batch, 1, [&] {
      if (fixture.sweep.repairing_tree() || !fixture.sweep.active() || fixture.stored == 60) return;
      const NodeId node = fixture.Store(data[fixture.stored]);
      fixture.Link(node);
      ++came_between;
      ASSERT_EQ(Violation(fixture.graph), "");
      for (NodeId other = 40; other <= node; ++other) {
        const auto live = [&](NodeId found) { return fixture.graph.IsLinked(found); };
        ASSERT_EQ(fixture.Search(data[other], 1, 100, live)[0].node, other);
      }
    });
    ForgetBatch(&fixture);
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(came_between, 100);
}

TEST(HnswSweepTest, ASpentHeapRefusesASweepAndNothingChanges) {
  GraphFixture fixture(Metric::kL2, 4, kSmallBuild, size_t{4} << 20);
  fixture.Build(GaussianVectors(200, 4, 21));
  std::vector<std::byte*> hoard;
  while (std::byte* block = fixture.heap.Allocate(HnswSweep::kMaxBatch * sizeof(NodeId))) {
    hoard.push_back(block);
  }
  const std::vector<NodeId> batch{1, 2, 3};
  EXPECT_FALSE(fixture.sweep.Begin(&fixture.graph, fixture.Target(), batch));
  EXPECT_FALSE(fixture.sweep.active());
  EXPECT_EQ(fixture.graph.doomed_count(), 0u);
  ASSERT_EQ(Violation(fixture.graph), "");
  ASSERT_FALSE(hoard.empty());
  fixture.heap.Free(hoard.back(), HnswSweep::kMaxBatch * sizeof(NodeId));
  fixture.Sweep(batch);
  ForgetBatch(&fixture);
}

TEST(HnswSweepTest, SlicesAreShort) {
  GraphFixture fixture(Metric::kL2, 12, {});
  fixture.Build(GaussianVectors(2'000, 12, 13));
  std::vector<NodeId> batch(250);
  std::iota(batch.begin(), batch.end(), 500);
  ASSERT_TRUE(fixture.sweep.Begin(&fixture.graph, fixture.Target(), batch));
  // One node's lists: the candidates of eight lost links, each compared with all that are kept.
  const uint64_t one_node = 8 * 32 * 33;
  for (bool complete = false; !complete;) {
    const uint64_t before = fixture.sweep.distances();
    complete = fixture.sweep.Step(100);
    EXPECT_LE(fixture.sweep.distances() - before, 100 + one_node);
  }
}

TEST(HnswSweepTest, TakesNoMallocOnceWarm) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer has its own operator new";
  GraphFixture fixture(Metric::kL2, 12, {});
  fixture.Build(GaussianVectors(1'000, 12, 15));
  const std::vector<NodeId> batch{1, 2, 3, 500};
  const uint64_t before = AllocationCount();
  ASSERT_TRUE(fixture.sweep.Begin(&fixture.graph, fixture.Target(), batch));
  while (!fixture.sweep.Step(100)) {
  }
  for (const NodeId node : batch) fixture.graph.Forget(node);
  EXPECT_EQ(AllocationCount(), before);
}

}  // namespace
}  // namespace engram
