#include "index/space.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/space_rig.h"

namespace engram {
namespace {

class SpacePropertyTest : public testing::TestWithParam<std::tuple<Metric, uint32_t>> {};

std::string NameOf(const testing::TestParamInfo<std::tuple<Metric, uint32_t>>& param) {
  return std::string(MetricName(std::get<0>(param.param))) + "_" +
         std::to_string(std::get<1>(param.param));
}

// Without a graph a recall is exact, after every step.
TEST_P(SpacePropertyTest, ASmallSpaceIsItsModelAfterEveryStep) {
  const auto [metric, dimension] = GetParam();
  SplitMix64 random(dimension * 10 + static_cast<uint64_t>(metric));
  SpaceRig rig(metric, random.Below(2) == 0 ? 0 : dimension, size_t{64} << 20);
  for (int step = 0; step < 1'200; ++step) {
    const bool filling = step / 300 % 2 == 0;
    const std::string id = RandomId(&random, 150);
    if (random.Below(10) < (filling ? 8 : 3)) {
      ASSERT_EQ(rig.Upsert(id, RandomDtype(&random), QuarterVector(&random, dimension),
                           RandomPayload(&random), static_cast<int64_t>(random.Next()),
                           static_cast<float>(random.Below(5)) / 4),
                RefusalReason::kNone);
    } else {
      rig.Delete(id);
    }
    ASSERT_FALSE(rig.space->has_graph());
    ASSERT_EQ(rig.space->NextToLink(), kNoNode);
    rig.space->Reclaim(1'000);
    ASSERT_LE(rig.space->retired(), 128 + 3 * rig.space->live()) << "what is gone gives its place";
    if (rig.space->dimension() != 0) {
      const auto k = static_cast<uint32_t>(1 + random.Below(20));
      ASSERT_NO_FATAL_FAILURE(
          rig.ExpectExactRecall(QuarterVector(&random, dimension), k, RandomDtype(&random)))
          << "step " << step;
    }
    if (step % 50 == 0) {
      ASSERT_NO_FATAL_FAILURE(rig.ExpectSound()) << "step " << step;
    }
  }
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  EXPECT_LE(rig.space->node_count(), 64u + 3 * 151) << "places of unlinked nodes are used again";
  rig.space.reset();
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

INSTANTIATE_TEST_SUITE_P(MetricsAndDimensions, SpacePropertyTest,
                         testing::Combine(testing::Values(Metric::kCosine, Metric::kInnerProduct,
                                                          Metric::kL2),
                                          testing::Values(1U, 3U, 16U, 17U, 100U)),
                         NameOf);

class GraphSpaceTest : public testing::TestWithParam<Metric> {};

// Upserts, replacements, deletes and recalls between slices of linking.
TEST_P(GraphSpaceTest, ALinkedSpaceNeverShowsWhatIsGoneAndFindsTheRest) {
  constexpr uint32_t kDimension = 17;
  constexpr uint64_t kIds = 5'000;
  SplitMix64 random(static_cast<uint64_t>(GetParam()));
  SpaceRig rig(GetParam(), 0, size_t{256} << 20);
  const auto upsert = [&](const std::string& id) {
    return rig.Upsert(id, RandomDtype(&random), QuarterVector(&random, kDimension),
                      RandomPayload(&random), static_cast<int64_t>(random.Next()), 1);
  };
  for (uint64_t i = 0; !rig.space->has_graph(); ++i) {
    ASSERT_LE(i, uint64_t{Space::kGraphFrom} + 1) << "the graph begins";
    ASSERT_EQ(upsert("id" + std::to_string(i)), RefusalReason::kNone);
    ASSERT_EQ(rig.space->NextToLink() != kNoNode, rig.space->has_graph());
  }
  size_t found = 0;
  size_t wanted = 0;
  int changed_while_linking = 0;
  for (int step = 0; step < 16'000; ++step) {
    const uint64_t what = random.Below(100);
    if (const std::string linking = rig.LinkingId(); what < 6 && !linking.empty()) {
      // The node that the linker is busy with goes, or is replaced.
      if (what < 3) {
        rig.Delete(linking);
      } else {
        ASSERT_EQ(upsert(linking), RefusalReason::kNone);
      }
      ++changed_while_linking;
    } else if (what < 20) {
      ASSERT_EQ(upsert(RandomId(&random, kIds)), RefusalReason::kNone);
    } else if (what < 30) {
      rig.Delete(what < 25 ? rig.AnyId(&random) : RandomId(&random, kIds));
    } else if (what < 98) {
      rig.Link(static_cast<uint32_t>(1 + random.Below(400)));
    } else if (step % 3 == 0) {
      const std::vector<float> query = QuarterVector(&random, kDimension);
      const RecallAnswer answer = rig.Recall(
          query, {.k = 10, .ef = 400, .with_payload = true, .dtype = RandomDtype(&random)});
      ASSERT_EQ(answer.reason, RefusalReason::kNone);
      ASSERT_EQ(answer.hits.size(), 10u);
      ASSERT_NO_FATAL_FAILURE(rig.model.ExpectSound(answer.hits, query, true)) << step;
      found += rig.model.CountTrue(answer.hits, query, 10);
      wanted += 10;
    }
    if (step % 4'000 == 0) {
      ASSERT_NO_FATAL_FAILURE(rig.ExpectSound()) << "step " << step;
    }
  }
  EXPECT_GT(changed_while_linking, 100);
  EXPECT_GT(rig.space->linked(), 1'000u);
  EXPECT_LT(rig.space->node_count(), 12'000u) << "places of swept nodes are used again";
  rig.LinkAll();
  EXPECT_EQ(rig.space->unlinked_count(), 0u);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  for (int i = 0; i < 20; ++i) {
    const std::vector<float> query = QuarterVector(&random, kDimension);
    const RecallAnswer answer = rig.Recall(query, {.k = 10, .ef = 1'000});
    ASSERT_EQ(answer.hits.size(), 10u);
    ASSERT_NO_FATAL_FAILURE(rig.model.ExpectSound(answer.hits, query, false));
    found += rig.model.CountTrue(answer.hits, query, 10);
    wanted += 10;
  }
  EXPECT_GE(static_cast<double>(found), 0.99 * static_cast<double>(wanted));
  // All of it goes; retired nodes answer nothing.
  while (!rig.model.entries().empty()) rig.Delete(rig.AnyId(&random));
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  EXPECT_TRUE(rig.Recall(QuarterVector(&random, kDimension), {.k = 10, .ef = 400}).hits.empty());
  rig.LinkAll();
  rig.space->Reclaim(100'000);
  EXPECT_EQ(rig.space->retired(), 0u) << "all of it was swept";
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  ASSERT_EQ(upsert("again"), RefusalReason::kNone);
  EXPECT_EQ(rig.Recall(QuarterVector(&random, kDimension), {.k = 10, .ef = 400}).hits.size(), 1u);
  rig.space.reset();
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Metrics, GraphSpaceTest,
                         testing::Values(Metric::kCosine, Metric::kInnerProduct, Metric::kL2),
                         [](const auto& param) { return std::string(MetricName(param.param)); });

TEST(SpaceTest, AnotherDimensionIsRefusedAndChangesNothing) {
  SpaceRig rig(Metric::kL2, 0, size_t{8} << 20);
  EXPECT_EQ(rig.space->dimension(), 0u);
  ASSERT_EQ(rig.Upsert("a", VectorDtype::kF32, {1, 2, 3}, "payload"), RefusalReason::kNone);
  EXPECT_EQ(rig.space->dimension(), 3u);
  EXPECT_EQ(rig.Upsert("a", VectorDtype::kF32, {1, 2}), RefusalReason::kWrongDimension);
  EXPECT_EQ(rig.Upsert("b", VectorDtype::kF32, {1, 2, 3, 4}), RefusalReason::kWrongDimension);
  EXPECT_EQ(rig.Recall({1, 2}, {}).reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(rig.Recall({1, 2, 3, 4}, {}).reason, RefusalReason::kWrongDimension);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall({1, 2, 3}, 10, VectorDtype::kF32));
}

TEST(SpaceTest, AZeroVectorIsRefusedUnderCosineOnly) {
  SpaceRig cosine(Metric::kCosine, 0, size_t{8} << 20);
  ASSERT_EQ(cosine.Upsert("a", VectorDtype::kF32, {1, 1}, "old"), RefusalReason::kNone);
  const size_t before = cosine.memory.heap.live_bytes();
  for (const VectorDtype dtype :
       {VectorDtype::kF32, VectorDtype::kF16, VectorDtype::kBf16, VectorDtype::kInt8}) {
    EXPECT_EQ(cosine.Upsert("a", dtype, {0, 0}, "new"), RefusalReason::kZeroVector);
    EXPECT_EQ(cosine.Upsert("b", dtype, {0, 0}), RefusalReason::kZeroVector);
    EXPECT_EQ(cosine.Recall({0, 0}, {.dtype = dtype}).reason, RefusalReason::kZeroVector);
  }
  EXPECT_EQ(cosine.memory.heap.live_bytes(), before);
  ASSERT_NO_FATAL_FAILURE(cosine.ExpectSound());
  ASSERT_NO_FATAL_FAILURE(cosine.ExpectExactRecall({1, 0}, 10, VectorDtype::kF32));
  for (const Metric metric : {Metric::kInnerProduct, Metric::kL2}) {
    SpaceRig rig(metric, 0, size_t{8} << 20);
    ASSERT_EQ(rig.Upsert("zero", VectorDtype::kF32, {0, 0}), RefusalReason::kNone);
    ASSERT_EQ(rig.Upsert("one", VectorDtype::kF32, {1, 1}), RefusalReason::kNone);
    ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall({0, 0}, 10, VectorDtype::kF32));
    ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall({1, 2}, 10, VectorDtype::kF32));
  }
}

// A refusal leaves the space as it was: also without a dimension, so that one bad first observation
// does not lock the space to its dimension.
TEST(SpaceTest, ARefusedFirstObservationDoesNotFixTheDimension) {
  SpaceRig rig(Metric::kCosine, 0, size_t{8} << 20);
  EXPECT_EQ(rig.Upsert("a", VectorDtype::kF32, {0, 0, 0, 0, 0}), RefusalReason::kZeroVector);
  EXPECT_EQ(rig.space->dimension(), 0u);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  EXPECT_EQ(rig.Upsert("a", VectorDtype::kF32, {0, 0}), RefusalReason::kZeroVector);
  ASSERT_EQ(rig.Upsert("a", VectorDtype::kF32, {1, 0, 0}), RefusalReason::kNone);
  EXPECT_EQ(rig.space->dimension(), 3u);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall({1, 1, 1}, 10, VectorDtype::kF32));
  // One that was said when the space was made stays.
  SpaceRig said(Metric::kCosine, 2, size_t{8} << 20);
  EXPECT_EQ(said.Upsert("a", VectorDtype::kF32, {0, 0}), RefusalReason::kZeroVector);
  EXPECT_EQ(said.space->dimension(), 2u);
  rig.space.reset();
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

TEST(SpaceTest, AnInt8VectorWhoseProductOverflowsIsRefused) {
  for (const Metric metric : {Metric::kCosine, Metric::kInnerProduct, Metric::kL2}) {
    SpaceRig rig(metric, 2, size_t{8} << 20);
    ASSERT_EQ(rig.Upsert("a", VectorDtype::kF32, {1, 1}), RefusalReason::kNone);
    for (const int8_t number : {int8_t{127}, int8_t{-128}}) {
      const int8_t numbers[2] = {0, number};
      const auto* vector = reinterpret_cast<const std::byte*>(numbers);
      ObservationRef observation;
      observation.id = "b";
      observation.dtype = VectorDtype::kInt8;
      observation.dimension = 2;
      observation.scale = 1e37F;
      observation.vector = vector;
      EXPECT_EQ(rig.space->Upsert(observation, ++rig.stamp).reason, RefusalReason::kNotFinite);
      RecallRequest request;
      request.dtype = VectorDtype::kInt8;
      request.dimension = 2;
      request.k = 1;
      request.scale = 1e37F;
      EXPECT_EQ(rig.job.Begin(*rig.space, request, vector, 64), RefusalReason::kNotFinite);
      observation.scale = 1e36F;
      EXPECT_EQ(rig.space->Upsert(observation, ++rig.stamp).reason, RefusalReason::kNone);
      EXPECT_TRUE(rig.space->Delete("b", ++rig.stamp, false).existed);
      observation.scale = std::numeric_limits<float>::denorm_min();
      EXPECT_EQ(rig.space->Upsert(observation, ++rig.stamp).reason, RefusalReason::kNone)
          << "tiny is not zero";
      EXPECT_TRUE(rig.space->Delete("b", ++rig.stamp, false).existed);
    }
    ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  }
}

TEST(SpaceTest, TinyAndHugeVectorsKeepTheirDirectionUnderCosine) {
  SpaceRig rig(Metric::kCosine, 0, size_t{8} << 20);
  const float tiny = std::numeric_limits<float>::denorm_min();
  const float huge = std::numeric_limits<float>::max();
  ASSERT_EQ(rig.Upsert("tiny", VectorDtype::kF32, {tiny, 0, 0}), RefusalReason::kNone);
  ASSERT_EQ(rig.Upsert("huge", VectorDtype::kF32, {huge, huge, huge}), RefusalReason::kNone);
  ASSERT_EQ(rig.Upsert("both", VectorDtype::kF32, {tiny, huge, 1}), RefusalReason::kNone);
  for (const float size : {tiny, 1e-30F, 1.0F, huge}) {
    for (const std::vector<float>& query :
         std::vector<std::vector<float>>{{size, 0, 0}, {0, size, 0}, {size, size, size}}) {
      const RecallAnswer answer = rig.Recall(query, {.k = 3});
      ASSERT_EQ(answer.reason, RefusalReason::kNone);
      ASSERT_NO_FATAL_FAILURE(rig.model.ExpectExact(answer.hits, query, 3, false));
    }
  }
}

// Beyond float's range distances are infinite: such a neighbour may come, but behind the others.
TEST(SpaceTest, SquaresThatOverflowComeLastUnderL2) {
  SpaceRig rig(Metric::kL2, 0, size_t{8} << 20);
  ASSERT_EQ(rig.Upsert("huge", VectorDtype::kF32, {3e38F, -3e38F}), RefusalReason::kNone);
  ASSERT_EQ(rig.Upsert("near", VectorDtype::kF32, {1, 1}), RefusalReason::kNone);
  ASSERT_EQ(rig.Upsert("far", VectorDtype::kF32, {1e18F, 1}), RefusalReason::kNone);
  const RecallAnswer answer = rig.Recall({0, 0}, {.k = 3});
  ASSERT_EQ(answer.hits.size(), 3u);
  EXPECT_EQ(answer.hits[0].id, "near");
  EXPECT_EQ(answer.hits[1].id, "far");
  EXPECT_EQ(answer.hits[2].id, "huge");
  EXPECT_TRUE(std::isinf(answer.hits[2].score));
}

TEST(SpaceTest, DeletesOfUnknownIdsDoNothingAlsoInAnEmptySpace) {
  SpaceRig rig(Metric::kL2, 0, size_t{8} << 20);
  EXPECT_FALSE(rig.space->Delete("a", ++rig.stamp, false).existed);
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u) << "a space takes nothing before it holds something";
  ASSERT_EQ(rig.Upsert("a", VectorDtype::kF32, {1}), RefusalReason::kNone);
  EXPECT_FALSE(rig.space->Delete("b", ++rig.stamp, false).existed);
  EXPECT_FALSE(rig.space->Delete("A", ++rig.stamp, false).existed);
  EXPECT_FALSE(rig.space->Delete(std::string_view("a\0", 2), ++rig.stamp, false).existed);
  EXPECT_TRUE(rig.Delete("a"));
  EXPECT_FALSE(rig.space->Delete("a", ++rig.stamp, false).existed);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
}

// Ids of one space say nothing about those of another, also where they share a heap.
TEST(SpaceTest, TwoSpacesOfOneHeapDoNotMeet) {
  TestHeap memory(size_t{8} << 20);
  ReaderEpochs epochs(1);
  CommitStamp stamp = 1;
  const auto upsert = [&](Space* space, float value) {
    return UpsertNumber(space, "same", value, ++stamp).reason;
  };
  const SpaceOptions options = TestSpaceOptions(Metric::kL2, 0, kLightBuild);
  {
    Space first("first", options, &memory.heap, &epochs);
    {
      Space second("second", options, &memory.heap, &epochs);
      ASSERT_EQ(upsert(&first, 1), RefusalReason::kNone);
      const size_t before = memory.heap.live_bytes();
      ASSERT_EQ(upsert(&second, 2), RefusalReason::kNone);
      EXPECT_TRUE(first.Delete("same", ++stamp, false).existed);
      EXPECT_EQ(second.live(), 1u);
      EXPECT_FALSE(first.Delete("same", ++stamp, false).existed);
      ASSERT_EQ(upsert(&first, 1), RefusalReason::kNone);
      EXPECT_GT(memory.heap.live_bytes(), before);
    }
    EXPECT_EQ(first.live(), 1u);
    ASSERT_TRUE(first.CheckInvariants().has_value());
  }
  EXPECT_EQ(memory.heap.live_bytes(), 0u);
}

TEST(SpaceTest, NodesInBytesCountsRowsThatAreScanned) {
  TestHeap memory(size_t{8} << 20);
  ReaderEpochs epochs(1);
  SpaceOptions options = TestSpaceOptions(Metric::kL2, 17, kLightBuild);
  options.traversal = Traversal::kExact;
  EXPECT_EQ(Space("a", options, &memory.heap, &epochs).NodesInBytes(640), 5u);
  options.traversal = Traversal::kInt8;
  EXPECT_EQ(Space("a", options, &memory.heap, &epochs).NodesInBytes(640), 8u);
  options.dimension = 768;
  EXPECT_EQ(Space("a", options, &memory.heap, &epochs).NodesInBytes(8'320), 10u);
}

TEST(SpaceTest, AVectorIsJudgedAsUpsertWould) {
  SpaceRig rig(Metric::kCosine, 0, size_t{8} << 20);
  const float numbers[3] = {0, 0, 1};
  ObservationRef observation;
  observation.id = "a";
  observation.dtype = VectorDtype::kF32;
  observation.vector = reinterpret_cast<const std::byte*>(numbers);
  for (const uint32_t dimension : {2U, 3U, 2U}) {
    observation.dimension = dimension;
    EXPECT_EQ(rig.space->Judge(observation), dimension == 2 && rig.space->dimension() == 0
                                                 ? RefusalReason::kZeroVector
                                             : dimension == 2 ? RefusalReason::kWrongDimension
                                                              : RefusalReason::kNone);
    if (dimension == 3) {
      ASSERT_EQ(rig.space->Upsert(observation, ++rig.stamp).reason, RefusalReason::kNone);
    }
  }
  EXPECT_EQ(
      Space("none", TestSpaceOptions(Metric::kL2, 0, kLightBuild), &rig.memory.heap, &rig.epochs)
          .NodesInBytes(640),
      10u)
      << "before there is a dimension";
}

// Every id once, whatever comes and goes between the pages.
TEST(SpaceTest, AScrollVisitsWhatStaysExactlyOnce) {
  SpaceRig rig(Metric::kL2, 1, size_t{64} << 20);
  SplitMix64 random(7);
  ASSERT_NO_FATAL_FAILURE(rig.StoreNumbers("stays", 3'000));
  std::map<std::string, int> seen;
  uint64_t cursor = 0;
  int pages = 0;
  do {
    std::vector<NodeId> nodes;
    rig.space->Scroll(&cursor, 100, &nodes);
    EXPECT_GE(nodes.size(), cursor == 0 ? 0u : 100u);
    EXPECT_LE(nodes.size(), 110u);
    for (const NodeId node : nodes) ++seen[std::string(rig.space->Get(node).id)];
    for (int i = 0; i < 100; ++i) {
      const std::string number = std::to_string(random.Below(3'000));
      rig.Upsert("stays" + number, VectorDtype::kF32, {1});
      rig.Upsert("comes" + number, VectorDtype::kF32, {2});
      rig.Delete("comes" + std::to_string(random.Below(3'000)));
    }
    ++pages;
  } while (cursor != 0);
  EXPECT_GT(pages, 25);
  int stayed = 0;
  for (const auto& [id, times] : seen) {
    EXPECT_LE(times, 2) << id;
    if (!id.starts_with("stays")) continue;
    EXPECT_EQ(times, 1) << id;
    ++stayed;
  }
  EXPECT_EQ(stayed, 3'000);
}

}  // namespace
}  // namespace engram
