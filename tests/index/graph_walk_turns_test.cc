// Walks in slices and in turns, one after another with the same scratch, and while the graph
// changes between two slices.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "index/graph_walk.h"
#include "src/core/hash.h"
#include "tests/index/walk_fixture.h"

namespace engram {
namespace {

using IsLiveFn = std::function<bool(NodeId)>;

TEST(GraphWalkTurnsTest, SlicesGiveTheSameAnswerAndAreShort) {
  WalkFixture fixture(Metric::kCosine, 64, {});
  const TestVectors data = GaussianVectors(2'000, 64, 23);
  fixture.Build(data);
  fixture.EncodeCodes(data);
  const auto is_live = [](NodeId node) { return node % 3 != 0; };
  for (NodeId q = 0; q < 20; ++q) {
    for (const SearchTarget& target : {fixture.TargetOf(q), fixture.CodeTarget(data[q])}) {
      for (const uint32_t ef : {50U, 700U}) {
        const std::vector<Neighbour> whole =
            WalkGraph(target, 10, ef, is_live, &fixture.walk_scratch);
        GraphWalk<IsLiveFn> walk(is_live);
        walk.Begin(target, 10, ef, &fixture.walk_scratch);
        size_t slices = 1;
        for (;; ++slices) {
          const uint64_t before = fixture.walk_scratch.distances();
          const bool complete = walk.Step(1);
          EXPECT_LE(fixture.walk_scratch.distances() - before,
                    uint64_t{fixture.graph.MaxDegree(0)});
          if (complete) break;
        }
        EXPECT_GT(slices, 20u);
        std::vector<Neighbour> sliced(10);
        sliced.resize(walk.TakeResults(sliced));
        EXPECT_EQ(PairsOf(sliced), PairsOf(whole));
      }
    }
  }
}

// Walks of different length take turns, now and then a slice in between: the answers are those of
// one by one.
TEST(GraphWalkTurnsTest, TurnsGiveTheAnswersOfOneByOne) {
  constexpr size_t kQueries = 200;
  WalkFixture fixture(Metric::kL2, 96, {});
  const TestVectors data = GaussianVectors(3'000, 96, 43);
  fixture.Build(data);
  fixture.EncodeCodes(data);
  const IsLiveFn is_live = [](NodeId node) { return node % 4 != 1; };
  const size_t query_bytes = fixture.codes->format().query_bytes();
  std::byte* const queries = fixture.heap.Allocate(kQueries * query_bytes);
  const auto target_of = [&](size_t q) {
    // Of both kinds: rows one by one, and several at once.
    if (q % 5 == 0) return fixture.TargetOf(static_cast<NodeId>(q));
    return fixture.codes->TargetFor(&fixture.graph, queries + q * query_bytes);
  };
  const auto ef_of = [](size_t q) { return q % 17 == 0 ? 600U : static_cast<uint32_t>(q % 90); };
  std::vector<std::vector<std::pair<float, NodeId>>> expected;
  for (size_t q = 0; q < kQueries; ++q) {
    fixture.codes->format().EncodeQuery(data[q].data(), queries + q * query_bytes);
    expected.push_back(
        PairsOf(WalkGraph(target_of(q), 10, ef_of(q), is_live, &fixture.walk_scratch)));
  }
  for (const size_t width : {1, 4}) {
    std::vector<GraphWalk<IsLiveFn>> walks(width, GraphWalk<IsLiveFn>(is_live));
    std::vector<std::unique_ptr<WalkScratch>> scratches;
    std::vector<size_t> query_of(width);
    size_t next = 0;
    const auto begin = [&](size_t i) {
      query_of[i] = next++;
      walks[i].Begin(target_of(query_of[i]), 10, ef_of(query_of[i]), scratches[i].get());
    };
    for (size_t i = 0; i < width; ++i) {
      scratches.push_back(std::make_unique<WalkScratch>(&fixture.heap, 1'000));
      ASSERT_TRUE(scratches[i]->Reserve(fixture.stored));
      begin(i);
    }
    size_t answered = 0;
    SplitMix64 random(9);
    for (size_t i = 0; answered < kQueries; i = (i + 1) % width) {
      if (query_of[i] == kQueries) continue;
      const bool complete =
          random.Below(50) == 0 ? walks[i].Step(random.Below(500)) : walks[i].Turn();
      ASSERT_EQ(complete, walks[i].complete());
      if (!complete) continue;
      std::vector<Neighbour> found(10);
      found.resize(walks[i].TakeResults(found));
      ASSERT_EQ(PairsOf(found), expected[query_of[i]]) << width << " query " << query_of[i];
      ++answered;
      query_of[i] = kQueries;
      if (next < kQueries) begin(i);
    }
  }
}

// A turn is short: no other walk waits for long.
TEST(GraphWalkTurnsTest, TurnsAreShort) {
  WalkFixture fixture(Metric::kL2, 16, {});
  fixture.Build(GaussianVectors(2'000, 16, 47));
  for (const uint32_t ef : {200U, 600U}) {
    GraphWalk<AllLive> walk;
    walk.Begin(fixture.TargetOf(1), 10, ef, &fixture.walk_scratch);
    size_t turns = 0;
    for (bool complete = false; !complete; ++turns) {
      const uint64_t before = fixture.walk_scratch.distances();
      complete = walk.Turn();
      ASSERT_LE(fixture.walk_scratch.distances() - before, fixture.graph.MaxDegree(0));
    }
    EXPECT_GT(turns, 200u);
  }
}

// Walks that were given up leave nothing behind, and the marks of all are cleared, one by one or
// all at once.
TEST(GraphWalkTurnsTest, AScratchIsCleanForTheNextWalk) {
  WalkFixture fixture(Metric::kL2, 8, {});
  const TestVectors data = GaussianVectors(3'000, 8, 51);
  fixture.Build(data);
  const auto expected = PairsOf(fixture.Walk(data[0], 20, 60));
  // Of few marks, where all are cleared, and of so many that they are cleared one by one.
  WalkScratch large(&fixture.heap);
  ASSERT_TRUE(large.Reserve(4'000'000));
  for (WalkScratch* scratch : {&fixture.walk_scratch, &large}) {
    for (uint32_t q = 0; q < 50; ++q) {
      GraphWalk<AllLive> walk;
      walk.Begin(fixture.TargetOf(q), 20, q % 3 == 0 ? 2'000 : 60, scratch);
      walk.Step(q * 40);
      ASSERT_EQ(PairsOf(WalkGraph(fixture.TargetOf(0), 20, 60, AllLive(), scratch)), expected);
    }
  }
}

// The graph grows between two slices of a walk: no node is found twice.
TEST(GraphWalkTurnsTest, TheScratchMayGrowWhileAWalkIsUnderWay) {
  WalkFixture fixture(Metric::kL2, 4, {});
  fixture.Build(GaussianVectors(400, 4, 33));
  for (const uint32_t ef : {300U, 600U}) {
    WalkScratch scratch(&fixture.heap);
    ASSERT_TRUE(scratch.Reserve(400));
    size_t room = scratch.capacity();
    GraphWalk<AllLive> walk;
    walk.Begin(fixture.TargetOf(0), 300, ef, &scratch);
    for (int slice = 0; !walk.Step(1); ++slice) {
      if (slice % 10 != 0 || slice > 50) continue;
      ASSERT_TRUE(scratch.Reserve(room *= 2));
    }
    std::vector<Neighbour> found(300);
    ASSERT_EQ(walk.TakeResults(found), 300u);
    for (size_t i = 1; i < found.size(); ++i) {
      EXPECT_LT(KeyOf(found[i - 1].distance, found[i - 1].node),
                KeyOf(found[i].distance, found[i].node));
    }
  }
}

// The graph grows beyond the scratch's room, and the entry point is a node that the room does not
// reach: the others are found all the same, and those beyond the room are not.
TEST(GraphWalkTurnsTest, AWalkMayBeginAtANodeBeyondItsRoom) {
  WalkFixture fixture(Metric::kL2, 2, {.M = 4, .M0 = 8, .ef_construction = 16});
  const TestVectors data = GaussianVectors(4'096, 2, 41);
  for (NodeId node = 0; node < 60; ++node) fixture.Link(fixture.Store(data[node]));
  WalkScratch scratch(&fixture.heap);
  ASSERT_TRUE(scratch.Reserve(fixture.stored));
  while (fixture.stored < scratch.capacity()) fixture.Store(data[60]);
  NodeId entry = 0;
  while (entry < scratch.capacity()) {
    fixture.Link(fixture.Store(data[5]));
    entry = fixture.graph.entry_point();
    ASSERT_LT(fixture.stored, 10'000u);
  }
  for (const uint32_t ef : {500U, 1'000U}) {
    for (int again = 0; again < 2; ++again) {
      const std::vector<Neighbour> found =
          WalkGraph(fixture.TargetOf(5), 100, ef, AllLive(), &scratch, 7);
      ASSERT_FALSE(found.empty());
      EXPECT_EQ(found[0].distance, 0.0F);
      EXPECT_EQ(found[0].node, 5u) << "of equal distances the lower node";
      EXPECT_EQ(std::count_if(found.begin(), found.end(),
                              [&](const Neighbour& n) { return n.node >= scratch.capacity(); }),
                1)
          << "the entry point";
    }
  }
}

// Links are taken out between the slices of a walk: holes are stepped over.
TEST(GraphWalkTurnsTest, NodesMayLeaveTheGraphBetweenSlices) {
  WalkFixture fixture(Metric::kL2, 8, {.M = 8, .M0 = 16, .ef_construction = 40});
  const TestVectors data = GaussianVectors(2'000, 8, 53);
  fixture.Build(data);
  SplitMix64 random(3);
  std::vector<NodeId> batch;
  for (NodeId node = 1'000; node < 2'000; ++node) {
    if (random.Below(3) == 0) batch.push_back(node);
  }
  GraphWalk<AllLive> walk;
  WalkScratch scratch(&fixture.heap);
  ASSERT_TRUE(scratch.Reserve(fixture.stored));
  std::vector<Neighbour> found(10);
  NodeId wanted = 0;
  size_t answers = 0;
  walk.Begin(fixture.TargetOf(wanted), 10, 100, &scratch);
  fixture.Sweep(batch, 50, [&] {
    if (!walk.Step(30)) return;
    ASSERT_EQ(walk.TakeResults(found), 10u);
    EXPECT_EQ(found[0].node, wanted);
    ++answers;
    wanted = static_cast<NodeId>(random.Below(1'000));
    walk.Begin(fixture.TargetOf(wanted), 10, 100, &scratch);
  });
  EXPECT_GT(answers, 10u);
  // Holes for certain: a list whose first places were taken out.
  for (NodeId node = 0; node < 1'000; node += 7) {
    const NodeId* links = fixture.graph.Links(node, 0);
    const NodeId first = HnswGraph::LoadLink(links);
    if (first < HnswGraph::kHole && !fixture.graph.IsTreeEdge(node, first)) {
      fixture.graph.RemoveLink(node, 0, first);
    }
  }
  for (NodeId node = 0; node < 1'000; node += 13) {
    const std::vector<Neighbour> nearest = fixture.Walk(data[node], 1, 60);
    ASSERT_EQ(nearest.size(), 1u);
    EXPECT_EQ(nearest[0].node, node);
  }
}

}  // namespace
}  // namespace engram
