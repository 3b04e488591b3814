#include "index/batch_linker.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/batch_rig.h"
#include "tests/index/real_vectors.h"
#include "tests/support/allocation_counter.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};
constexpr HnswBuildParams kBuild{.M = 12, .M0 = 24, .ef_construction = 80};

double MeanDegree(const GraphFixture& fixture, uint32_t level) {
  double sum = 0;
  double count = 0;
  for (NodeId node = 0; node < fixture.stored; ++node) {
    if (!fixture.graph.IsLinked(node) || fixture.graph.Level(node) < level) continue;
    sum += fixture.graph.Degree(node, level);
    ++count;
  }
  return sum / count;
}

std::vector<uint32_t> LevelsOf(const GraphFixture& fixture) {
  std::vector<uint32_t> levels;
  for (NodeId node = 0; node < fixture.stored; ++node) levels.push_back(fixture.graph.Level(node));
  return levels;
}

// Nodes of `level` that no walk on that level from the entry point gets to.
size_t Unreached(const HnswGraph& graph, size_t nodes, uint32_t level) {
  std::set<NodeId> seen{graph.entry_point()};
  std::vector<NodeId> open{graph.entry_point()};
  while (!open.empty()) {
    const NodeId node = open.back();
    open.pop_back();
    graph.ForEachLink(node, level, [&](NodeId link) {
      if (seen.insert(link).second) open.push_back(link);
    });
  }
  size_t on_level = 0;
  for (NodeId node = 0; node < nodes; ++node) {
    on_level += static_cast<size_t>(graph.IsLinked(node) && graph.Level(node) >= level);
  }
  return on_level - std::min(on_level, seen.size());
}

TEST(BatchLinkerTest, SlicesGiveTheSameGraph) {
  const TestVectors data = GaussianVectors(1'500, 24, 3);
  for (const size_t most : {7U, 100U, 1'000U}) {
    BatchRig whole(Metric::kL2, 24, kSmallBuild);
    whole.BuildInBatches(data, most);
    EXPECT_EQ(Violation(whole.graph), "");
    EXPECT_EQ(whole.ListsViolation(), "");
    EXPECT_EQ(whole.graph.linked_count(), data.size());
    for (const uint32_t budget : {1U, 300U}) {
      BatchRig sliced(Metric::kL2, 24, kSmallBuild);
      sliced.BuildInBatches(data, most, budget);
      EXPECT_EQ(LinksOf(sliced), LinksOf(whole)) << "batches of " << most << ", budget " << budget;
      EXPECT_EQ(sliced.batch.distances(), whole.batch.distances());
      EXPECT_EQ(sliced.graph.entry_point(), whole.graph.entry_point());
    }
  }
}

TEST(BatchLinkerTest, TheGraphIsSoundAndSearchableBetweenAnyTwoSlices) {
  for (const Metric metric : kMetrics) {
    for (const uint32_t budget : {1U, 400U}) {
      BatchRig rig(metric, 6, kSmallBuild);
      const TestVectors data = GaussianVectors(600, 6, 6);
      rig.StoreAll(data);
      NodeId first = 0;
      for (const size_t size : {1U, 1U, 3U, 100U, 7U, 488U}) {
        const std::vector<NodeId> nodes = BatchRig::Range(first, size);
        size_t slices = 0;
        size_t linked = 0;
        rig.LinkBatch(nodes, budget, [&] {
          ++slices;
          if (size < 100 || slices % 7 == 0 || slices < 50) {
            ASSERT_EQ(Violation(rig.graph), "") << "slice " << slices << " of " << size;
            ASSERT_EQ(rig.ListsViolation(), "");
          }
          ASSERT_GE(rig.graph.linked_count(), linked);
          linked = rig.graph.linked_count();
          if (linked == 0) return;
          // Search has its own scratch, so it must not disturb the linker.
          const auto found = rig.Search(data[slices % data.size()], 5, 20);
          ASSERT_GE(found.size(), std::min<size_t>(linked, 5));
          for (const Neighbour& neighbour : found) ASSERT_LT(neighbour.node, first + size);
        });
        ASSERT_FALSE(testing::Test::HasFatalFailure());
        EXPECT_EQ(rig.batch.nodes().size(), size);
        EXPECT_FALSE(rig.batch.active());
        EXPECT_EQ(rig.graph.linked_count(), first + size);
        EXPECT_EQ(rig.lists.members(), first + size) << "each is listed";
        first += static_cast<NodeId>(size);
      }
    }
  }
}

// Sweeps take members out of lists all over; the next batch leaves none that few are left in.
TEST(BatchLinkerTest, ListsThatFewAreLeftInAreMerged) {
  BatchRig rig(Metric::kL2, 16, kSmallBuild);
  const TestVectors data = GaussianVectors(4'010, 16, 8);
  rig.StoreAll(data);
  for (NodeId first = 0; first < 4'000; first += 500) {
    rig.LinkBatch(BatchRig::Range(first, 500), 400, [] {});
  }
  const uint32_t before = rig.lists.count();
  ASSERT_GT(before, 10u);
  for (NodeId node = 0; node < 4'000; ++node) {
    if (node % 10 != 0) rig.lists.Remove(node);
  }
  rig.LinkBatch(BatchRig::Range(4'000, 10), 400, [] {});
  EXPECT_LT(rig.lists.count(), before / 2);
  for (uint32_t list = 0; list < rig.lists.count(); ++list) {
    EXPECT_GE(rig.lists.size(list), rig.lists.least_members());
  }
  EXPECT_EQ(rig.lists.members(), 410u);
  EXPECT_EQ(rig.ListsViolation(), "");
}

// Beyond its budget a slice does one unit of work: counted in distances, as nothing else tells what
// a slice has done on every machine.
TEST(BatchLinkerTest, SlicesAreShort) {
  BatchRig rig(Metric::kL2, 64, kBuild);
  const TestVectors data = GaussianVectors(6'000, 64, 4);
  rig.BuildInBatches(data, 1'000);
  const TestVectors more = GaussianVectors(1'000, 64, 5);
  const NodeId first = rig.StoreAll(more);
  ASSERT_TRUE(rig.batch.Begin(rig.TargetOfBatch(), BatchRig::Range(first, 1'000)));
  // Estimates of a list with a block of nodes are the most that a unit evaluates: some of an int8
  // distance each.
  constexpr uint64_t kUnit = InvertedLists::kMostMembers * BlockProducts::kMaxQueries;
  for (bool linked = false; !linked;) {
    const uint64_t before = rig.batch.distances();
    linked = rig.batch.Step(100);
    EXPECT_LE(rig.batch.distances() - before, 100 * 32 + 3 * kUnit);
  }
}

TEST(BatchLinkerTest, ABatchOfAnySizeFindsWhatOneByOneFinds) {
  const size_t count = kSanitized ? 1'200 : 3'000;
  for (const Metric metric : {Metric::kCosine, Metric::kL2}) {
    const TestVectors data = ClusteredVectors(count, 64, 30, 7);
    const TestVectors queries = ClusteredVectors(100, 64, 30, 7);
    BatchRig one(metric, 64, kBuild);
    one.Build(data);
    const double wanted = one.RecallAt(10, 48, queries);
    for (const size_t most : {1U, 7U, 100U, 1'024U}) {
      BatchRig rig(metric, 64, kBuild);
      rig.BuildInBatches(data, most);
      EXPECT_EQ(Violation(rig.graph), "");
      EXPECT_GE(rig.RecallAt(10, 48, queries), wanted - 0.01)
          << MetricName(metric) << ", batches of " << most;
      EXPECT_EQ(LevelsOf(rig), LevelsOf(one));
    }
  }
}

// Nodes of one batch see each other, on every level: the first batch of a graph has no others.
TEST(BatchLinkerTest, TheFirstBatchInAnEmptyGraph) {
  for (const size_t size : {1U, 2U, 3U, 30U, 1'024U}) {
    SCOPED_TRACE(size);
    const TestVectors data = GaussianVectors(size, 32, 9);
    BatchRig rig(Metric::kL2, 32, kSmallBuild);
    rig.BuildInBatches(data, size);
    ASSERT_EQ(Violation(rig.graph), "");
    EXPECT_EQ(rig.graph.linked_count(), size);
    const uint32_t top = std::ranges::max(LevelsOf(rig));
    EXPECT_EQ(rig.graph.top_level(), top) << "a highest one is the entry point";
    BatchRig one(Metric::kL2, 32, kSmallBuild);
    one.Build(data);
    for (uint32_t level = 1; level <= top; ++level) {
      EXPECT_LE(Unreached(rig.graph, size, level), Unreached(one.graph, size, level) + size / 200)
          << "level " << level;
    }
    const TestVectors queries = GaussianVectors(50, 32, 10);
    EXPECT_GE(rig.RecallAt(1, 64, queries), one.RecallAt(1, 64, queries) - 0.01);
  }
}

// New top levels come with batches, too, and several nodes of one batch may have one.
TEST(BatchLinkerTest, UpperLevelsAreConnectedAsOneByOne) {
  const size_t count = 4'000;
  const TestVectors data = GaussianVectors(count, 16, 12);
  BatchRig one(Metric::kL2, 16, kSmallBuild);
  one.Build(data);
  for (const size_t most : {10U, 1'000U}) {
    BatchRig rig(Metric::kL2, 16, kSmallBuild);
    rig.BuildInBatches(data, most);
    EXPECT_EQ(LevelsOf(rig), LevelsOf(one));
    EXPECT_EQ(rig.graph.top_level(), one.graph.top_level());
    for (uint32_t level = 1; level <= one.graph.top_level(); ++level) {
      EXPECT_LE(Unreached(rig.graph, count, level), Unreached(one.graph, count, level) + 5)
          << "batches of " << most << ", level " << level;
      if (level <= 2) {
        EXPECT_NEAR(MeanDegree(rig, level), MeanDegree(one, level), 0.04 * MeanDegree(one, level))
            << "batches of " << most << ", level " << level;
      }
    }
  }
}

TEST(BatchLinkerTest, EqualVectorsDoNotBreakReachability) {
  for (const Metric metric : kMetrics) {
    for (const size_t most : {1U, 100U, 1'000U}) {
      SCOPED_TRACE(std::string(MetricName(metric)) + ", batches of " + std::to_string(most));
      BatchRig rig(metric, 12, {});
      TestVectors data = GaussianVectors(1'500, 12, 10);
      for (size_t i = 0; i < 300; ++i) {  // 300 copies of one vector, spread over the others
        std::copy_n(data[0].begin(), 12, data.values.begin() + static_cast<ptrdiff_t>(i * 5 * 12));
      }
      rig.BuildInBatches(data, most);
      ASSERT_EQ(Violation(rig.graph), "");
      if (metric == Metric::kInnerProduct) continue;  // there the nearest is not the equal one
      const std::vector<Neighbour> found = rig.Search(data[0], 300, 400);
      ASSERT_EQ(found.size(), 300u);
      const auto copies = std::ranges::count_if(
          found, [](const Neighbour& neighbour) { return neighbour.node % 5 == 0; });
      EXPECT_GE(copies, 295);
      for (NodeId node = 1; node < 200; ++node) {
        if (node % 5 == 0) continue;
        EXPECT_EQ(rig.Search(data[node], 1, 64)[0].node, node);
      }
    }
  }
}

TEST(BatchLinkerTest, NothingButEqualVectors) {
  for (const float value : {0.5F, 0.0F}) {
    for (const size_t most : {1U, 50U, 1'024U}) {
      SCOPED_TRACE(most);
      BatchRig rig(Metric::kL2, 4, {});
      const TestVectors data{4, std::vector<float>(1'100 * 4, value)};
      rig.BuildInBatches(data, most, 5'000);
      EXPECT_EQ(Violation(rig.graph), "");
      EXPECT_EQ(rig.ListsViolation(), "");
      EXPECT_EQ(rig.Search(data[0], 1'100, 1'100).size(), 1'100u);
    }
  }
}

// With M0 = 3 a node may have one child: parents must be looked for down the tree.
TEST(BatchLinkerTest, SmallestDegrees) {
  for (const uint32_t m0 : {3U, 4U}) {
    for (const size_t most : {1U, 500U}) {
      BatchRig rig(Metric::kL2, 3, {.M = 2, .M0 = m0, .ef_construction = 10});
      const TestVectors data = GaussianVectors(500, 3, 12);
      rig.BuildInBatches(data, most, 10);
      EXPECT_EQ(Violation(rig.graph), "") << "M0 " << m0;
      EXPECT_EQ(rig.Search(data[0], 500, 500).size(), 500u);
    }
  }
}

TEST(BatchLinkerTest, LargestDegrees) {
  BatchRig rig(Metric::kL2, 8, {.M = 64, .M0 = 128, .ef_construction = 150});
  rig.BuildInBatches(GaussianVectors(1'500, 8, 14), 500);
  EXPECT_EQ(Violation(rig.graph), "");
  EXPECT_GE(rig.RecallAt(10, 40, GaussianVectors(50, 8, 15)), 0.99);
}

TEST(BatchLinkerTest, EachOptionOfSelectionBuildsASoundGraph) {
  const TestVectors data = ClusteredVectors(1'500, 24, 10, 16);
  const TestVectors queries = ClusteredVectors(50, 24, 10, 16);
  HnswBuildParams params{.M = 8, .M0 = 16, .ef_construction = 40};
  std::vector<HnswBuildParams> all(6, params);
  all[1].extend_candidates = true;
  all[2].keep_pruned = false;
  all[3].alpha = 1.2F;
  all[4].ef_construction = 10'000;  // more than there is room for
  all[5].scanned = 500;
  for (const HnswBuildParams& one : all) {
    BatchRig rig(Metric::kL2, 24, one);
    rig.BuildInBatches(data, 300, 10);
    EXPECT_EQ(Violation(rig.graph), "");
    EXPECT_GE(rig.RecallAt(10, 64, queries), 0.95);
  }
  // Next to no candidates: bad, and sound.
  params.scanned = 0;
  params.ef_construction = 1;
  BatchRig rig(Metric::kL2, 24, params);
  rig.BuildInBatches(data, 300, 10);
  EXPECT_EQ(Violation(rig.graph), "");
}

TEST(BatchLinkerTest, AnyOrderWithGaps) {
  BatchRig rig(Metric::kL2, 6, kSmallBuild);
  const TestVectors data = GaussianVectors(900, 6, 20);
  rig.StoreAll(data);
  std::vector<NodeId> nodes;
  for (NodeId i = 0; i < 900; i += 3) nodes.push_back(i * 7 % 900);
  rig.LinkBatch(std::span(nodes).first(130));
  rig.Link(nodes[130]);  // one by one between batches: it is in no list
  rig.LinkBatch(std::span(nodes).subspan(131));
  EXPECT_EQ(Violation(rig.graph), "");
  EXPECT_EQ(rig.graph.linked_count(), 300u);
  EXPECT_EQ(rig.lists.members(), 299u);
  for (const Neighbour& found : rig.Search(data[0], 50, 100)) EXPECT_EQ(found.node % 3, 0u);
}

// For searches that are to select links among as many candidates as a batch does.
HnswBuildParams AsManyCandidates(HnswBuildParams params) {
  params.ef_construction = BatchLinker::CandidatesFor(params.ef_construction).count();
  return params;
}

// A sweep goes on while batches are linked, but for its step 2; and what it took out is forgotten
// while no batch is under way. Node numbers are used again.
TEST(BatchLinkerTest, SweepsBetweenSlices) {
  // Enough candidates for a good graph of clusters, too.
  constexpr HnswBuildParams kWide{.M = 4, .M0 = 8, .ef_construction = 160};
  for (const Metric metric : {Metric::kCosine, Metric::kL2}) {
    for (uint64_t seed = 0; seed < (kSanitized ? 2 : 6); ++seed) {
      SCOPED_TRACE(seed);
      SplitMix64 random(seed);
      constexpr NodeId kNodes = 900;
      constexpr uint32_t kDimension = 20;
      BatchRig rig(metric, kDimension, kWide);
      const TestVectors data =
          seed % 2 == 0 ? GaussianVectors(kNodes, kDimension, static_cast<uint32_t>(seed))
                        : ClusteredVectors(kNodes, kDimension, 6, static_cast<uint32_t>(seed));
      rig.BuildInBatches(data, 300);
      std::vector<NodeId> absent;
      for (int round = 0; round < 12; ++round) {
        std::vector<NodeId> leaving;
        // Now and then nearly all of them, the last time all.
        const uint64_t stays = round == 11 ? 0 : 1 + random.Below(round % 4 == 3 ? 20 : 4);
        for (NodeId node = 0; node < kNodes; ++node) {
          if (!rig.graph.IsLinked(node)) continue;
          const bool most_leave = round % 4 == 3;
          const bool leaves = stays == 0 || (random.Below(stays + 1) == 0) != most_leave;
          if (leaves) leaving.push_back(node);
        }
        ASSERT_TRUE(rig.sweep.Begin(&rig.graph, rig.Target(), leaving));
        bool swept = false;
        while (!swept || rig.batch.active()) {
          if (!rig.batch.active() && !rig.sweep.repairing_tree() && !absent.empty() && !swept) {
            std::vector<NodeId> nodes = absent;
            nodes.resize(1 + random.Below(nodes.size()));
            absent.erase(absent.begin(), absent.begin() + static_cast<ptrdiff_t>(nodes.size()));
            ASSERT_TRUE(rig.batch.Begin(rig.TargetOfBatch(), nodes));
          }
          const bool may_link = rig.batch.active() && !rig.sweep.repairing_tree();
          if (!swept && (!may_link || random.Below(2) == 0)) {
            swept = rig.sweep.Step(static_cast<uint32_t>(1 + random.Below(200)));
          } else if (may_link) {
            rig.batch.Step(static_cast<uint32_t>(1 + random.Below(20'000)));
          }
          if (random.Below(8) == 0) {
            ASSERT_EQ(Violation(rig.graph), "") << "round " << round;
          }
        }
        for (const NodeId node : BatchRig::Range(0, kNodes)) {
          rig.graph.ForEachLink(node, 0, [&](NodeId link) {
            ASSERT_FALSE(rig.graph.IsLinked(node) && rig.graph.IsDoomed(link))
                << "a new link to a node that leaves";
          });
        }
        rig.Forget(leaving);
        absent.insert(absent.end(), leaving.begin(), leaving.end());
        ASSERT_EQ(Violation(rig.graph), "") << "round " << round;
        ASSERT_EQ(rig.ListsViolation(), "");
        ASSERT_EQ(rig.lists.members(), rig.graph.linked_count());
        ASSERT_EQ(rig.graph.linked_count() + absent.size(), kNodes);
      }
      rig.LinkBatch(absent);
      EXPECT_EQ(Violation(rig.graph), "");
      EXPECT_EQ(rig.graph.linked_count(), kNodes);
      BatchRig one(metric, kDimension, AsManyCandidates(kWide));
      one.Build(data);
      const double wanted = one.RecallAt(10, 100, data);
      EXPECT_GE(wanted, 0.98);
      EXPECT_GE(rig.RecallAt(10, 100, data), wanted - 0.01);
    }
  }
}

// The heap is spent at any of Begin's allocations: nothing has changed then, and it may be tried
// again. Where there is just enough to begin, lists may be short of it: the nodes are linked then,
// if not well.
TEST(BatchLinkerTest, WithoutMemoryAtBeginNothingChanges) {
  const TestVectors data = GaussianVectors(700, 16, 30);
  size_t refused = 0;
  size_t unlisted = 0;
  size_t listed = 0;
  // What a batch needs is some megabytes: in small steps up to where the lists have what they need.
  for (size_t left = 0; left < (size_t{8} << 20) && (left < 8'192 || listed == 0);
       left += left < 8'192   ? 512
               : refused > 60 ? 8'192
                              : std::max<size_t>(left / 32, 8'192)) {
    SCOPED_TRACE(left);
    BatchRig rig(Metric::kL2, 16, kSmallBuild, size_t{16} << 20);
    rig.StoreAll(data);
    for (const NodeId node : BatchRig::Range(0, 200)) rig.Link(node);
    const BatchTarget target = rig.TargetOfBatch();
    const auto before = LinksOf(rig);
    while (rig.arena.reserve_bytes() - rig.arena.used_bytes() >= left + 128) {
      (void)rig.arena.Allocate(64, 64);
    }
    const std::vector<NodeId> nodes = BatchRig::Range(200, 500);
    if (!rig.batch.Begin(target, nodes)) {
      ++refused;
      const size_t live = rig.heap.live_bytes();
      ASSERT_FALSE(rig.batch.Begin(target, nodes));
      ASSERT_EQ(rig.heap.live_bytes(), live);
      ASSERT_FALSE(rig.batch.active());
      ASSERT_FALSE(rig.linker.active());
      ASSERT_EQ(Violation(rig.graph), "");
      ASSERT_EQ(rig.graph.linked_count(), 200u);
      ASSERT_EQ(rig.lists.members(), 0u);
      for (const NodeId node : nodes) ASSERT_TRUE(rig.graph.IsAbsent(node));
      ASSERT_EQ(LinksOf(rig), before);
      continue;
    }
    while (!rig.batch.Step(30'000)) {
      ASSERT_EQ(Violation(rig.graph), "");
    }
    ASSERT_EQ(Violation(rig.graph), "");
    ASSERT_EQ(rig.ListsViolation(), "");
    ASSERT_EQ(rig.graph.linked_count(), data.size());
    unlisted += static_cast<size_t>(rig.lists.members() < nodes.size());
    listed += static_cast<size_t>(rig.lists.members() == nodes.size());
  }
  EXPECT_GT(refused, 20u);
  EXPECT_GT(unlisted, 0u);
}

TEST(BatchLinkerTest, AllIsGivenBack) {
  HugePageArena arena = [] {
    auto made = HugePageArena::Create({.reserve_bytes = size_t{128} << 20});
    CHECK(made.has_value(), "the test's arena");
    return *std::move(made);
  }();
  ArenaHeap heap(&arena);
  BatchRig rig(Metric::kL2, 16, kSmallBuild);
  rig.StoreAll(GaussianVectors(500, 16, 31));
  {
    HnswLinker upper(&heap, kSmallBuild);
    BatchLinker linker(&heap, kSmallBuild, &upper);
    EXPECT_EQ(heap.live_bytes(), 0u) << "memory is taken in Begin";
    ASSERT_TRUE(linker.Begin(rig.TargetOfBatch(), BatchRig::Range(0, 500)));
    while (!linker.Step(1'000)) {
    }
    EXPECT_GT(heap.live_bytes(), 0u);
  }
  EXPECT_EQ(heap.live_bytes(), 0u);
}

TEST(BatchLinkerTest, LinkingTakesNoMalloc) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer has its own operator new";
  BatchRig rig(Metric::kCosine, 100, {});
  const TestVectors data = GaussianVectors(3'000, 100, 24);
  rig.StoreAll(data);
  const std::vector<NodeId> nodes = BatchRig::Range(0, 3'000);
  const BatchTarget target = rig.TargetOfBatch();
  const uint64_t before = AllocationCount();
  for (size_t done = 0; done < nodes.size(); done += 500) {
    ASSERT_TRUE(rig.batch.Begin(target, std::span(nodes).subspan(done, 500)));
    while (!rig.batch.Step(500)) {
    }
  }
  EXPECT_EQ(AllocationCount(), before);
  ::operator delete(::operator new(8));
  EXPECT_GT(AllocationCount(), before) << "the counter does not count";
}

// On real vectors: a graph that was linked in batches is as good as one that was linked one by one,
// by searches that walk by int8 rows and by codes, and has the same levels and like degrees.
void ExpectAsGoodAsOneByOne(Metric metric, const TestVectors& data, const TestVectors& queries) {
  const HnswBuildParams params;
  BatchRig one(metric, data.dimension, AsManyCandidates(params));
  one.Build(data);
  BatchRig by_codes(metric, data.dimension, AsManyCandidates(params));
  for (size_t i = 0; i < data.size(); ++i) by_codes.LinkByCodes(by_codes.Store(data[i]));
  BatchRig ones(metric, data.dimension, params);
  ones.BuildInBatches(data, 1, 5'000);
  for (const size_t most : {100U, 1'000U}) {
    SCOPED_TRACE(most);
    BatchRig rig(metric, data.dimension, params);
    rig.BuildInBatches(data, most, 5'000);
    ASSERT_EQ(Violation(rig.graph), "");
    EXPECT_EQ(LevelsOf(rig), LevelsOf(one));
    const double degree = MeanDegree(rig, 0);
    testing::Test::RecordProperty("degree_one", std::to_string(MeanDegree(one, 0)));
    testing::Test::RecordProperty("degree_batch", std::to_string(degree));
    EXPECT_NEAR(degree, MeanDegree(ones, 0), 0.01 * MeanDegree(ones, 0));
    EXPECT_NEAR(degree, MeanDegree(one, 0), 0.07 * MeanDegree(one, 0));
    // Candidates that codes alone choose give fewer links; with few bits most of all, where a batch
    // compares twice as many by int8.
    EXPECT_NEAR(degree, MeanDegree(by_codes, 0), 0.16 * MeanDegree(by_codes, 0));
    // Here a batch searches with all of ef_construction.
    EXPECT_NEAR(MeanDegree(rig, 1), MeanDegree(one, 1), 0.1 * MeanDegree(one, 1));
    for (const uint32_t ef : {16U, 32U, 64U}) {
      const double recall = rig.RecallAt(10, ef, queries);
      const double wanted = one.RecallAt(10, ef, queries);
      testing::Test::RecordProperty("recall_one_" + std::to_string(ef), std::to_string(wanted));
      testing::Test::RecordProperty("recall_" + std::to_string(ef), std::to_string(recall));
      EXPECT_GE(recall, ones.RecallAt(10, ef, queries) - 0.005) << "ef " << ef;
      EXPECT_GE(recall, wanted - (ef == 16 ? 0.015 : 0.004)) << "ef " << ef;
      EXPECT_GE(recall, by_codes.RecallAt(10, ef, queries) - (ef == 16 ? 0.005 : 0.0025))
          << "ef " << ef;
    }
  }
}

TEST(BatchLinkerTest, AsGoodAsOneByOneOnClouds) {
  // Wide clouds that overlap.
  const size_t count = kSanitized ? 2'000 : 10'000;
  const auto widened = [](TestVectors vectors, uint32_t seed) {
    const TestVectors noise = GaussianVectors(vectors.size(), vectors.dimension, seed);
    for (size_t i = 0; i < noise.values.size(); ++i) vectors.values[i] += 5 * noise.values[i];
    return vectors;
  };
  const TestVectors data = widened(ClusteredVectors(count, 96, 50, 40), 41);
  const TestVectors queries = widened(ClusteredVectors(300, 96, 50, 40), 42);
  ExpectAsGoodAsOneByOne(Metric::kCosine, data, queries);
}

TEST(BatchLinkerTest, AsGoodAsOneByOneOnRealVectors) {
  if (kSanitized) GTEST_SKIP() << "long";
  TestVectors data;
  TestVectors queries;
  const std::string why = LoadFashionMnist(10'000, 500, &data, &queries);
  if (!why.empty()) GTEST_SKIP() << why;
  ExpectAsGoodAsOneByOne(Metric::kL2, data, queries);
}

}  // namespace
}  // namespace engram
