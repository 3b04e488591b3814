// Linking in batches through a whole space: it gives the graph that linking one by one gives, on
// made and on real vectors, and what has ended between the nodes that wait does not stop it.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "index/space_linker.h"
#include "src/core/hash.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/index/real_vectors.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr uint32_t kDimension = 96;

// Learns, and links batches of `most` nodes, until nothing is left.
void LinkAll(CodedSpaceRig* rig, const HnswBuildParams& build, uint32_t most) {
  SpaceLinker linker(&rig->memory.heap, build, most);
  rig->space.SetHorizon(rig->stamp);
  for (;;) {
    rig->space.Reclaim(1'000);
    if (linker.Begin(&rig->space) != SpaceLinker::Begun::kStarted) break;
    while (!linker.Step(10'000)) {
    }
  }
  ASSERT_EQ(rig->space.unlinked_count(), 0u);
}

struct Shape {
  std::vector<uint32_t> levels;  // nodes on each, by number
  std::array<double, 2> degrees;
};
Shape ShapeOf(const Space& space) {
  const HnswGraph& graph = SpaceTestPeer::Graph(space);
  Shape shape{};
  std::array<double, 2> nodes{};
  for (NodeId node = 0; node < space.node_count(); ++node) {
    if (!graph.IsLinked(node)) continue;
    shape.levels.push_back(graph.Level(node));
    for (uint32_t level = 0; level < 2 && level <= graph.Level(node); ++level) {
      shape.degrees[level] += graph.Degree(node, level);
      ++nodes[level];
    }
  }
  for (size_t level = 0; level < 2; ++level) shape.degrees[level] /= std::max(nodes[level], 1.0);
  return shape;
}

// Some wide clouds that overlap.
std::vector<float> Clustered(uint64_t number) {
  std::vector<float> vector = LatentVector(1'000'000'000 + MixBits(number) % 50, kDimension);
  const std::vector<float> own = LatentVector(number, kDimension);
  for (uint32_t i = 0; i < kDimension; ++i) vector[i] += 0.5F * own[i];
  return vector;
}

TEST(SpaceBatchesTest, BatchesAreAsGoodAsOneByOne) {
  const uint64_t count = kSanitized ? 1'200 : 10'000;
  for (const Metric metric : {Metric::kL2, Metric::kCosine}) {
    SCOPED_TRACE(MetricName(metric));
    const CodedSpaceRig::Setup setup{.metric = metric, .dimension = kDimension};
    CodedSpaceRig one(setup);
    CodedSpaceRig batches(setup);
    for (CodedSpaceRig* rig : {&one, &batches}) {
      for (uint64_t id = 0; id < count; ++id) {
        ASSERT_NO_FATAL_FAILURE(rig->Store(id, Clustered(id)));
      }
      ASSERT_NO_FATAL_FAILURE(LinkAll(rig, setup.build, rig == &one ? 1 : BatchLinker::kMaxBatch));
      ASSERT_NO_FATAL_FAILURE(rig->ExpectSound());
      ASSERT_TRUE(rig->HasCodes());
    }
    const Shape shape_one = ShapeOf(one.space);
    const Shape shape = ShapeOf(batches.space);
    EXPECT_EQ(shape.levels, shape_one.levels);
    for (size_t level = 0; level < 2; ++level) {
      EXPECT_NEAR(shape.degrees[level], shape_one.degrees[level], 0.1 * shape_one.degrees[level])
          << "level " << level;
    }
    std::vector<std::vector<float>> queries;
    for (uint64_t i = 0; i < 150; ++i) queries.push_back(Clustered(10'000'000 + i));
    const TrueNearest truth = one.NearestOf(std::move(queries));
    for (const uint32_t ef : {64U, 128U}) {
      const double wanted = one.Recall(truth, ef);
      const double recall = batches.Recall(truth, ef);
      RecordProperty("recall_" + std::to_string(ef), std::to_string(recall));
      RecordProperty("recall_one_" + std::to_string(ef), std::to_string(wanted));
      EXPECT_NEAR(recall, wanted, 0.005) << "ef " << ef;
    }
  }
}

TEST(SpaceBatchesTest, RealVectorsAreRecalled) {
  if (kSanitized) GTEST_SKIP() << "long";
  TestVectors data;
  TestVectors queries;
  const std::string why = LoadFashionMnist(20'000, 200, &data, &queries);
  if (!why.empty()) GTEST_SKIP() << why;
  CodedSpaceRig rig({.dimension = data.dimension,
                     .graph_from = SpaceOptions::kGraphFrom,
                     .build = {},
                     .arena_bytes = size_t{1} << 30});
  for (size_t i = 0; i < data.size(); ++i) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(i, {data[i].begin(), data[i].end()}));
  }
  ASSERT_NO_FATAL_FAILURE(LinkAll(&rig, {}, BatchLinker::kMaxBatch));
  ASSERT_TRUE(rig.HasCodes());
  std::vector<std::vector<float>> asked;
  for (size_t i = 0; i < queries.size(); ++i) {
    asked.emplace_back(queries[i].begin(), queries[i].end());
  }
  const double recall = rig.Recall(rig.NearestOf(std::move(asked)), 128);
  RecordProperty("recall", std::to_string(recall));
  EXPECT_GE(recall, 0.97);
}

// What waits for a batch: live nodes alone, in their order, once each; those that have ended and
// may still be asked for stay behind them, whatever was between.
TEST(SpaceBatchesTest, WhatHasEndedIsPassedOver) {
  constexpr uint64_t kWaiting = 900;
  SplitMix64 random(3);
  for (const uint64_t one_in : {2U, 3U, 50U, 1U}) {
    SCOPED_TRACE(one_in);
    CodedSpaceRig rig({.dimension = kDimension});
    for (uint64_t id = 0; id < 400; ++id) {
      ASSERT_NO_FATAL_FAILURE(rig.Store(id, LatentVector(id, kDimension)));
    }
    ASSERT_NO_FATAL_FAILURE(rig.Settle());
    ASSERT_TRUE(rig.space.LinksInBatches());
    const CommitStamp before = rig.stamp;
    std::vector<uint64_t> waiting;
    for (uint64_t id = 1'000; id < 1'000 + kWaiting; ++id) {
      ASSERT_NO_FATAL_FAILURE(rig.Store(id, LatentVector(id, kDimension)));
      waiting.push_back(id);
    }
    std::erase_if(waiting, [&](uint64_t id) {
      const bool ends = random.Below(one_in) == 0;
      if (ends) rig.Remove(id);
      return ends;
    });
    rig.space.SetHorizon(before);  // they may still be asked for
    std::array<NodeId, BatchLinker::kMaxBatch> nodes;
    for (const size_t most : {1U, 10U, 1'024U}) {
      size_t count = 0;
      // Some of those that have ended are passed over at a time.
      for (int turn = 0; turn < 100 && count == 0; ++turn) {
        count = rig.space.NextToLink(std::span(nodes).first(most));
      }
      ASSERT_LE(count, std::min<size_t>(most, waiting.size()));
      if (waiting.empty()) continue;
      ASSERT_GT(count, 0u);
      EXPECT_GE(2 * count, std::min<size_t>(most, waiting.size())) << "too few at a time";
      for (size_t i = 0; i < count; ++i) {
        ASSERT_EQ(rig.space.Get(nodes[i]).id, std::to_string(waiting[i]));
      }
      std::array<NodeId, BatchLinker::kMaxBatch> again;
      ASSERT_EQ(rig.space.NextToLink(std::span(again).first(most)), count);
      EXPECT_TRUE(std::equal(nodes.begin(), nodes.begin() + count, again.begin()));
    }
    ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
    // A recall of that time, when nothing of these was there, and one of now.
    const std::vector<float> query = LatentVector(1'001, kDimension);
    EXPECT_EQ(RunRecall(rig.space, &rig.job, query, {.k = 700, .ef = 2'000, .snapshot = before})
                  .hits.size(),
              400u);
    EXPECT_EQ(RunRecall(rig.space, &rig.job, query, {.k = 1'000, .ef = 2'000}).hits.size(),
              std::min<size_t>(rig.vectors.size(), 1'000));
    rig.upkeep.Run();
    EXPECT_EQ(rig.space.unlinked_count(), 0u);
    EXPECT_EQ(rig.space.ended_listed(), kWaiting - waiting.size());
    ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
    ASSERT_NO_FATAL_FAILURE(rig.Settle());
    EXPECT_EQ(rig.space.ended_listed(), 0u);
  }
}

// With too little memory to put the list in order the run that there is has to do.
TEST(SpaceBatchesTest, WithoutMemoryForTheListItIsTakenAsItIs) {
  CodedSpaceRig rig({.dimension = kDimension, .arena_bytes = size_t{96} << 20});
  for (uint64_t id = 0; id < 400; ++id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(id, LatentVector(id, kDimension)));
  }
  ASSERT_NO_FATAL_FAILURE(rig.Settle());
  const CommitStamp before = rig.stamp;
  for (uint64_t id = 1'000; id < 1'600; ++id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(id, LatentVector(id, kDimension)));
  }
  for (uint64_t id = 1'000; id < 1'600; ++id) {
    if (id % 3 != 0) rig.Remove(id);
  }
  rig.space.SetHorizon(before);
  while (rig.memory.heap.Allocate(size_t{4} << 10) != nullptr) {
  }
  for (size_t bytes = size_t{4} << 10; bytes >= 32; bytes /= 2) {
    while (rig.memory.heap.Allocate(bytes) != nullptr) {
    }
  }
  rig.memory.LeaveOnly(0);
  std::array<NodeId, BatchLinker::kMaxBatch> nodes;
  for (int turn = 0; turn < 50; ++turn) {
    const size_t count = rig.space.NextToLink(nodes);
    ASSERT_LE(count, 200u);
    for (size_t i = 0; i < count; ++i) {
      ASSERT_EQ(std::stoull(std::string(rig.space.Get(nodes[i]).id)) % 3, 0u);
    }
    rig.upkeep.Step(UINT32_MAX);
    ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  }
  ASSERT_NO_FATAL_FAILURE(rig.ExpectAllThere());
  EXPECT_EQ(RunRecall(rig.space, &rig.job, LatentVector(7, kDimension), {.k = 1'000, .ef = 2'000})
                .hits.size(),
            600u);
}

}  // namespace
}  // namespace engram
