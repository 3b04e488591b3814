// Walks whose list or slots are too small, and walks among retired nodes, which take places of
// both.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "index/graph_walk.h"
#include "src/core/hash.h"
#include "tests/index/walk_fixture.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr size_t kVectors = kSanitized ? 2'000 : 5'000;

TEST(GraphWalkLimitsTest, RetiredNodesAreWalkedThroughAndNeverReturned) {
  WalkFixture fixture(Metric::kL2, 8, {});
  const TestVectors data = GaussianVectors(3'000, 8, 13);
  fixture.Build(data);
  for (const uint32_t one_in : {2U, 10U, 40U}) {
    const auto is_live = [one_in](NodeId node) { return node % one_in == one_in - 1; };
    size_t hits = 0;
    for (NodeId q = 0; q < 100; ++q) {
      std::vector<Neighbour> exact = fixture.ExactSearch(data[q], 3'000);
      std::erase_if(exact, [&](const Neighbour& n) { return !is_live(n.node); });
      const std::vector<Neighbour> found =
          WalkGraph(fixture.Target(data[q]), 32, 32, is_live, &fixture.walk_scratch);
      ASSERT_EQ(found.size(), 32u) << one_in;
      for (const Neighbour& neighbour : found) ASSERT_TRUE(is_live(neighbour.node));
      for (size_t i = 0; i < 10; ++i) {
        hits += static_cast<size_t>(found[i].distance <= exact[9].distance);
      }
    }
    EXPECT_GE(hits, 990u) << one_in;
  }
  EXPECT_TRUE(
      WalkGraph(
          fixture.Target(data[0]), 10, 32, [](NodeId) { return false; }, &fixture.walk_scratch)
          .empty());
}

// Retired nodes that lie nearer than every live one do not end the walk, whether the list holds
// them or becomes too small.
TEST(GraphWalkLimitsTest, ACrowdOfRetiredNodesIsWalkedThrough) {
  WalkFixture fixture(Metric::kL2, 4, {});
  const TestVectors data = GaussianVectors(kVectors, 4, 29);
  fixture.Build(data);
  for (const size_t crowd : {100, 900, 1'500}) {
    const std::vector<Neighbour> nearest = fixture.ExactSearch(data[0], 1'600);
    std::vector<bool> retired(kVectors);
    for (size_t i = 0; i < crowd; ++i) retired[nearest[i].node] = true;
    const auto is_live = [&retired](NodeId node) { return !retired[node]; };
    const std::vector<Neighbour> found =
        WalkGraph(fixture.Target(data[0]), 64, 64, is_live, &fixture.walk_scratch);
    ASSERT_EQ(found.size(), 64u) << crowd;
    size_t hits = 0;
    for (const Neighbour& neighbour : found) {
      ASSERT_TRUE(is_live(neighbour.node));
      hits += static_cast<size_t>(neighbour.distance <= nearest[crowd + 63].distance);
    }
    EXPECT_GE(hits, 60u) << crowd;
  }
}

// A graph that has all but ended, and as many beside it as are looked for. Would catch a walk that
// goes through all of it for the few that live, one that stops before it has come near, and one
// that returns what it was told.
TEST(GraphWalkLimitsTest, WhatIsKnownEndsAWalkThroughWhatHasEnded) {
  WalkFixture fixture(Metric::kL2, 8, {});
  const TestVectors data = GaussianVectors(kVectors, 8, 41);
  fixture.Build(data);
  constexpr NodeId kOneIn = 250;
  const auto is_live = [](NodeId node) { return node % kOneIn == 0; };
  // By the list, and by the heaps alone.
  for (const uint32_t ef : {64U, GraphWalk<AllLive>::kMaxListEf + 88}) {
    uint64_t work = 0;
    uint64_t work_of_all = 0;
    for (NodeId q = 0; q < kVectors; q += kOneIn) {
      std::vector<float> known;
      for (const Neighbour& near : fixture.ExactSearch(data[q], ef)) {
        known.push_back(near.distance * 1.01F + 1e-3F);
      }
      const uint64_t before = fixture.walk_scratch.distances();
      GraphWalk<decltype(is_live)> walk(is_live);
      walk.Begin(fixture.Target(data[q]), ef, ef, &fixture.walk_scratch, known);
      while (!walk.Step(100)) {
      }
      work += fixture.walk_scratch.distances() - before;
      std::vector<Neighbour> found(ef);
      found.resize(walk.TakeResults(found));
      ASSERT_FALSE(found.empty()) << q;
      EXPECT_EQ(found[0].node, q);
      for (const Neighbour& neighbour : found) ASSERT_TRUE(is_live(neighbour.node));
      const uint64_t between = fixture.walk_scratch.distances();
      fixture.Walk(data[q], ef, ef);
      work_of_all += fixture.walk_scratch.distances() - between;
    }
    EXPECT_LE(work, work_of_all + work_of_all / 4) << ef;
  }
}

// The only way to the only live node leads through more retired ones than the list has places,
// through the last of each one's links.
TEST(GraphWalkLimitsTest, NoRetiredNodeIsLostWhereTheListIsFull) {
  constexpr NodeId kLinks = 16;
  constexpr NodeId kNodes = kLinks * 150 + 1;
  WalkFixture fixture(Metric::kL2, 1, {.M = 8, .M0 = kLinks});
  for (NodeId node = 0; node < kNodes; ++node) {
    const auto place = static_cast<float>(node);
    fixture.Store({&place, 1});
  }
  ASSERT_TRUE(fixture.graph.Reserve(kNodes) && fixture.walk_scratch.Reserve(kNodes));
  for (NodeId node = 0; node < kNodes; ++node) {
    ASSERT_TRUE(fixture.graph.AddNode(node, 0));
    std::vector<NodeId> links;
    for (NodeId i = 1; node % kLinks == 0 && node + i < kNodes && i <= kLinks; ++i) {
      links.push_back(node + i);
    }
    fixture.graph.SetLinks(node, 0, links);
    fixture.graph.FinishNode(node);
  }
  ASSERT_EQ(fixture.graph.entry_point(), 0u);
  // One is retired fewer or more before the list is full.
  for (uint32_t ef = 1; ef <= kLinks; ++ef) {
    const std::vector<Neighbour> found = WalkGraph(
        fixture.TargetOf(0), 1, ef, [](NodeId node) { return node == kNodes - 1; },
        &fixture.walk_scratch);
    ASSERT_EQ(found.size(), 1u) << ef;
    EXPECT_EQ(found[0].node, kNodes - 1);
  }
}

// The predicate, which costs a cache miss, is asked for the few nodes that the list may take.
TEST(GraphWalkLimitsTest, FewNodesAreAskedWhetherTheyLive) {
  WalkFixture fixture(Metric::kL2, 16, {});
  const TestVectors data = GaussianVectors(kVectors, 16, 37);
  fixture.Build(data);
  const uint64_t before = fixture.walk_scratch.distances();
  uint64_t asked = 0;
  const auto is_live = [&asked](NodeId) {
    ++asked;
    return true;
  };
  for (NodeId q = 0; q < 50; ++q) {
    WalkGraph(fixture.TargetOf(q), 10, 20, is_live, &fixture.walk_scratch);
  }
  EXPECT_LT(asked, (fixture.walk_scratch.distances() - before) / 2);
}

// More evaluations than slots, and ef from one end to the other: what was found is not lost.
TEST(GraphWalkLimitsTest, GoesOnWhereTheListIsTooSmall) {
  constexpr size_t kNodes = kSanitized ? 10'000 : 20'000;
  WalkFixture fixture(Metric::kL2, 12, {.M = 8, .M0 = 16, .ef_construction = 40});
  const TestVectors data = GaussianVectors(kNodes, 12, 17);
  fixture.Build(data);
  struct Tried {
    uint32_t ef;
    uint32_t one_in_live;
  };
  for (const Tried tried : {Tried{1, 1}, Tried{512, 1}, Tried{513, 1}, Tried{512, 2},
                            Tried{256, 40}, Tried{10'000, 1}, Tried{10'000, 2}}) {
    const auto is_live = [&tried](NodeId node) { return node % tried.one_in_live == 0; };
    uint64_t most = 0;
    double by_walk = 0;
    double by_search = 0;
    for (NodeId q = 0; q < 3; ++q) {
      std::vector<Neighbour> exact = fixture.ExactSearch(data[q], kNodes);
      std::erase_if(exact, [&](const Neighbour& n) { return !is_live(n.node); });
      const size_t k = std::min<size_t>(tried.ef, exact.size());
      const float bound = exact[k - 1].distance;
      const uint64_t before = fixture.walk_scratch.distances();
      const std::vector<Neighbour> found = WalkGraph(fixture.Target(data[q]), tried.ef, tried.ef,
                                                     is_live, &fixture.walk_scratch, 100);
      most = std::max(most, fixture.walk_scratch.distances() - before);
      ASSERT_EQ(found.size(), k) << tried.ef;
      for (size_t i = 0; i < k; ++i) {
        ASSERT_TRUE(is_live(found[i].node));
        if (i != 0) {
          ASSERT_LT(KeyOf(found[i - 1].distance, found[i - 1].node),
                    KeyOf(found[i].distance, found[i].node));
        }
      }
      by_walk += HitsAmong(found, bound) / static_cast<double>(k);
      by_search += HitsAmong(fixture.Search(data[q], tried.ef, tried.ef, is_live), bound) /
                   static_cast<double>(k);
    }
    if (tried.ef == 256) {
      EXPECT_GT(most, kMaxWalkSlots);
    }
    EXPECT_GE(by_walk, by_search - 0.015) << tried.ef << " " << tried.one_in_live;
  }
}

// Nodes with random links, so that each expansion finds many new ones: there are more of them than
// a list has slots for, long before it has no candidates left.
TEST(GraphWalkLimitsTest, GoesOnWhereSlotsRunOut) {
  constexpr NodeId kNodes = 20'000;
  WalkFixture fixture(Metric::kL2, 4, {.M = 32, .M0 = 64});
  const TestVectors data = GaussianVectors(kNodes, 4, 61);
  for (NodeId node = 0; node < kNodes; ++node) fixture.Store(data[node]);
  ASSERT_TRUE(fixture.graph.Reserve(kNodes) && fixture.walk_scratch.Reserve(kNodes));
  for (NodeId node = 0; node < kNodes; ++node) ASSERT_TRUE(fixture.graph.AddNode(node, 0));
  SplitMix64 random(7);
  for (NodeId node = 0; node < kNodes; ++node) {
    std::vector<NodeId> links;
    for (NodeId i = 0; i < 64; ++i)
      links.push_back((node + 1 + i * 300 + random.Below(300)) % kNodes);
    fixture.graph.SetLinks(node, 0, links);
    fixture.graph.FinishNode(node);
  }
  for (const uint32_t ef : {300U, 512U}) {
    double by_walk = 0;
    double by_search = 0;
    for (NodeId q = 0; q < 10; ++q) {
      const float bound = fixture.ExactSearch(data[q], ef).back().distance;
      const uint64_t before = fixture.walk_scratch.distances();
      const std::vector<Neighbour> found = fixture.Walk(data[q], ef, ef);
      EXPECT_GT(fixture.walk_scratch.distances() - before, kMaxWalkSlots);
      ASSERT_EQ(found.size(), ef);
      for (size_t i = 1; i < found.size(); ++i) {
        ASSERT_LT(KeyOf(found[i - 1].distance, found[i - 1].node),
                  KeyOf(found[i].distance, found[i].node));
      }
      by_walk += HitsAmong(found, bound) / ef;
      by_search += HitsAmong(fixture.Search(data[q], ef, ef), bound) / ef;
    }
    EXPECT_GE(by_walk, by_search - 0.05) << ef;
  }
}

// The times that each row was compared.
DistanceFn counted_distance = nullptr;
std::unordered_map<const std::byte*, int> times_compared;
float CountingDistance(const std::byte* query, const std::byte* row, size_t padded_dimension) {
  ++times_compared[row];
  return counted_distance(query, row, padded_dimension);
}

// What takes over from the list compares no node again. The graph has one level, as a descent may
// compare some that the walk meets.
TEST(GraphWalkLimitsTest, NoNodeIsComparedTwice) {
  constexpr NodeId kNodes = 4'000;
  WalkFixture fixture(Metric::kL2, 8, {.M = 16, .M0 = 32});
  const TestVectors data = GaussianVectors(kNodes, 8, 67);
  for (NodeId node = 0; node < kNodes; ++node) fixture.Store(data[node]);
  ASSERT_TRUE(fixture.graph.Reserve(kNodes) && fixture.walk_scratch.Reserve(kNodes));
  for (NodeId node = 0; node < kNodes; ++node) {
    ASSERT_TRUE(fixture.graph.AddNode(node, 0));
    std::vector<NodeId> links;
    for (NodeId i = 1; i <= 32; ++i) links.push_back((node + i * i * 3) % kNodes);
    fixture.graph.SetLinks(node, 0, links);
    fixture.graph.FinishNode(node);
  }
  SearchTarget target = fixture.TargetOf(1);
  counted_distance = target.distance;
  target.distance = &CountingDistance;
  struct Tried {
    uint32_t ef;
    uint32_t one_in_live;
  };
  for (const Tried tried : {Tried{20, 1}, Tried{600, 1}, Tried{60, 100}}) {
    times_compared.clear();
    const uint64_t before = fixture.walk_scratch.distances();
    const auto is_live = [&tried](NodeId node) { return node % tried.one_in_live == 0; };
    WalkGraph(target, 10, tried.ef, is_live, &fixture.walk_scratch);
    EXPECT_EQ(fixture.walk_scratch.distances() - before, times_compared.size()) << tried.ef;
    for (const auto& [row, times] : times_compared) ASSERT_EQ(times, 1) << tried.ef;
  }
}

}  // namespace
}  // namespace engram
