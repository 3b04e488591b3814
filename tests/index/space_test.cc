#include "index/space.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "index/hnsw_linker.h"
#include "index/hnsw_sweep.h"
#include "index/recall_job.h"
#include "src/core/hash.h"
#include "tests/index/space_testing.h"

namespace engram {
namespace {

// A light graph: these tests are about what is in it, not about how good it is.
constexpr HnswBuildParams kBuild{.M = 8, .M0 = 16, .ef_construction = 40};

// A space beside its model. Linker and recall take their memory from elsewhere, so that the heap's
// books are the space's.
class SpaceRig {
 public:
  SpaceRig(Metric metric, uint32_t dimension, size_t arena_bytes)
      : SpaceRig(TestSpaceOptions(metric, dimension, kBuild, 77), arena_bytes) {}
  SpaceRig(const SpaceOptions& options, size_t arena_bytes)
      : memory(arena_bytes),
        other_memory(size_t{64} << 20),
        space(std::make_unique<Space>("rig", options, &memory.heap, &epochs)),
        model(options.metric),
        linker(&other_memory.heap, kBuild),
        sweep(&other_memory.heap, kBuild),
        job(&other_memory.heap) {}

  RefusalReason Upsert(const std::string& id, VectorDtype dtype, const std::vector<float>& vector,
                       const std::string& payload = "", int64_t when_ns = 1,
                       float confidence = 0.5F) {
    const std::vector<std::byte> bytes = EncodeVector(dtype, vector);
    const bool was_there = model.entries().contains(id);
    const auto [reason, existed, later, node] =
        space->Upsert({.id = id,
                       .payload = BytesOf(payload),
                       .payload_kind = PayloadKind::kOpaque,
                       .dtype = dtype,
                       .dimension = static_cast<uint32_t>(vector.size()),
                       .scale = kQuarterScale,
                       .vector = bytes.data(),
                       .when_ns = when_ns,
                       .confidence = confidence},
                      ++stamp);
    space->SetHorizon(stamp - std::min(stamp, keep));
    if (reason == RefusalReason::kNone) {
      EXPECT_EQ(existed, was_there) << id;
      model.entries()[id] = {vector, payload, when_ns, confidence};
    }
    return reason;
  }
  bool Delete(const std::string& id) {
    const bool was_there = model.entries().erase(id) > 0;
    EXPECT_EQ(space->Delete(id, ++stamp, false).existed, was_there) << id;
    space->SetHorizon(stamp - std::min(stamp, keep));
    return was_there;
  }

  // One slice of upkeep, as the shard does it; begins the next node or sweep where none is under
  // way. False when there is nothing to do.
  bool Link(uint32_t distances) {
    if (!linker.active() && !sweep.active()) space->Reclaim(64);
    if (!linker.active() && !sweep.active() && space->WantsSweep()) space->BeginSweep(&sweep);
    if (sweep.active() && (sweep.repairing_tree() || !linker.active())) {
      if (sweep.Step(distances)) space->FinishSweep(sweep);
      return true;
    }
    if (!linker.active()) {
      const NodeId node = space->NextToLink();
      if (node == kNoNode || !space->BeginLinking(&linker, node)) return false;
    }
    if (linker.Step(distances)) space->FinishLinking(linker.node());
    return true;
  }
  void LinkAll() {
    while (Link(UINT32_MAX)) {
    }
  }
  // Id of the live node that is being linked; empty when there is none.
  std::string LinkingId() const {
    if (!linker.active()) return "";
    const std::string id(space->Get(linker.node()).id);
    return space->FindLive(id) == linker.node() ? id : "";
  }

  RecallAnswer Recall(const std::vector<float>& query, const RecallParams& params) {
    return RunRecall(*space, &job, query, params);
  }
  void ExpectExactRecall(const std::vector<float>& query, uint32_t k, VectorDtype dtype) {
    const RecallAnswer answer = Recall(query, {.k = k, .with_payload = true, .dtype = dtype});
    ASSERT_EQ(answer.reason, RefusalReason::kNone);
    ASSERT_NO_FATAL_FAILURE(model.ExpectExact(answer.hits, query, k, true));
  }
  void ExpectSound() const {
    const Result<void> sound = space->CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
    ASSERT_EQ(space->live(), model.entries().size());
    ASSERT_EQ(space->linked() + space->unlinked_count(), space->live());
    ASSERT_LE(space->resident_bytes(), 2 * memory.heap.live_bytes() + 4'096);
  }
  std::string AnyId(SplitMix64* random) const {
    return std::next(model.entries().begin(),
                     static_cast<ptrdiff_t>(random->Below(model.entries().size())))
        ->first;
  }

  TestHeap memory;
  TestHeap other_memory;
  ReaderEpochs epochs{1};
  std::unique_ptr<Space> space;
  SpaceModel model;
  HnswLinker linker;
  HnswSweep sweep;
  RecallJob job;
  CommitStamp stamp = 1'000;
  CommitStamp keep = 0;  // of the past, for snapshots
};

std::string RandomId(SplitMix64* random, uint64_t ids) {
  const uint64_t number = random->Below(ids);
  std::string id = "id" + std::to_string(number);
  if (number % 17 == 0) id.resize(kMaxIdBytes, 'x');
  if (number % 19 == 0) id[0] = '\0';
  return id;
}

VectorDtype RandomDtype(SplitMix64* random) {
  return static_cast<VectorDtype>(1 + random->Below(4));
}

std::string RandomPayload(SplitMix64* random) {
  const uint64_t kind = random->Below(10);
  return std::string(kind < 3   ? 0
                     : kind < 9 ? random->Below(60)
                                : random->Below(3'000),
                     static_cast<char>('a' + random->Below(26)));
}

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

// Memory runs out at a different place in each run: rows, nodes, lists, ids, text.
TEST(SpaceTest, ARefusalForMemoryLeavesEverythingAsItWas) {
  for (size_t left = 0; left < 24'000; left += left < 4'000 ? 64 : 900) {
    SpaceRig rig(Metric::kL2, 0, size_t{2} << 20);
    rig.memory.LeaveOnly(left);
    SplitMix64 random(left);
    int refused = 0;
    for (int step = 0; step < 250; ++step) {
      const std::string id = RandomId(&random, 60);
      const std::vector<float> vector = QuarterVector(&random, 5);
      if (random.Below(4) == 0) {
        rig.Delete(id);
        continue;
      }
      const RefusalReason reason =
          rig.Upsert(id, VectorDtype::kF32, vector, RandomPayload(&random), step, 1);
      if (reason == RefusalReason::kNone) continue;
      ASSERT_EQ(reason, RefusalReason::kMemoryFull);
      ++refused;
      ASSERT_NO_FATAL_FAILURE(rig.ExpectSound()) << left << " bytes, step " << step;
      if (rig.space->dimension() != 0) {
        ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall(vector, 100, VectorDtype::kF32))
            << left << " bytes, step " << step;
      }
    }
    ASSERT_GT(refused, 0) << left << " bytes";
    ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
    rig.space.reset();
    ASSERT_EQ(rig.memory.heap.live_bytes(), 0u);
  }
}

TEST(SpaceTest, LinkingWithoutMemoryChangesNothingAndGoesOnLater) {
  SpaceRig rig(Metric::kL2, 4, size_t{8} << 20);
  SplitMix64 random(3);
  for (uint32_t i = 0; i <= Space::kGraphFrom; ++i) {
    ASSERT_EQ(rig.Upsert(std::to_string(i), VectorDtype::kF32, QuarterVector(&random, 4)),
              RefusalReason::kNone);
  }
  // Everything is taken, then a little given back at a time.
  std::vector<std::byte*> hoard;
  for (;;) {
    std::byte* block = rig.memory.heap.Allocate(size_t{512} << 10);
    if (block == nullptr) break;
    hoard.push_back(block);
  }
  rig.memory.LeaveOnly(0);
  ASSERT_FALSE(rig.Link(UINT32_MAX));
  ASSERT_FALSE(rig.linker.active());
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall(QuarterVector(&random, 4), 10, VectorDtype::kF32));
  for (std::byte* block : hoard) rig.memory.heap.Free(block, size_t{512} << 10);
  // Blocks of that size alone are not what a graph's first chunks need, so it may still be short;
  // what matters is that nothing is lost.
  for (int i = 0; i < 100; ++i) rig.Link(UINT32_MAX);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  EXPECT_EQ(rig.space->live(), Space::kGraphFrom + 1);
  rig.space.reset();
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

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
    ObservationRef observation;
    observation.id = "same";
    observation.dtype = VectorDtype::kF32;
    observation.dimension = 1;
    observation.vector = reinterpret_cast<const std::byte*>(&value);
    return space->Upsert(observation, ++stamp).reason;
  };
  const SpaceOptions options = TestSpaceOptions(Metric::kL2, 0, kBuild);
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
  SpaceOptions options = TestSpaceOptions(Metric::kL2, 17, kBuild);
  options.traversal = Traversal::kExact;
  EXPECT_EQ(Space("a", options, &memory.heap, &epochs).NodesInBytes(640), 5u);
  options.traversal = Traversal::kInt8;
  EXPECT_EQ(Space("a", options, &memory.heap, &epochs).NodesInBytes(640), 5u);
  options.dimension = 768;
  EXPECT_EQ(Space("a", options, &memory.heap, &epochs).NodesInBytes(8'320), 10u);
}

// Of two versions the later stamp stands, whichever comes first.
TEST(SpaceTest, TheLaterStampWins) {
  SpaceRig rig(Metric::kL2, 1, size_t{8} << 20);
  const auto upsert = [&](float value, CommitStamp stamp) {
    ObservationRef observation;
    observation.id = "a";
    observation.dtype = VectorDtype::kF32;
    observation.dimension = 1;
    observation.vector = reinterpret_cast<const std::byte*>(&value);
    const StoreOutcome outcome = rig.space->Upsert(observation, stamp);
    EXPECT_EQ(outcome.reason, RefusalReason::kNone);
    return outcome.existed;
  };
  const auto value = [&] {
    const RecallAnswer answer = rig.Recall({0}, {.k = 5, .with_vector = true});
    return answer.hits.size() == 1 ? answer.hits[0].vector[0] : -1.0F;
  };
  EXPECT_FALSE(upsert(1, 500));
  EXPECT_TRUE(upsert(2, 400));
  EXPECT_EQ(value(), 1.0F);
  EXPECT_TRUE(upsert(3, 600));
  EXPECT_EQ(value(), 3.0F);
  // A delete of an earlier stamp changes nothing; one of a later stamp keeps out what was stamped
  // before it, until it is certain that nothing of that kind is under way.
  rig.space->Delete("a", 550, true);
  EXPECT_EQ(value(), 3.0F);
  EXPECT_TRUE(rig.space->Delete("a", 700, true).existed);
  EXPECT_FALSE(upsert(4, 650));
  EXPECT_EQ(value(), -1.0F);
  EXPECT_TRUE(rig.space->has_tombstones());
  EXPECT_FALSE(upsert(5, 800));
  EXPECT_EQ(value(), 5.0F);
  EXPECT_FALSE(rig.space->Delete("b", 900, true).existed) << "also of an id that is not there yet";
  ASSERT_TRUE(rig.space->CheckInvariants().has_value());
  rig.space->ForgetTombstones(899);
  EXPECT_TRUE(rig.space->has_tombstones());
  rig.space->ForgetTombstones(900);
  EXPECT_FALSE(rig.space->has_tombstones());
  EXPECT_EQ(rig.space->live(), 1u);
  ASSERT_TRUE(rig.space->CheckInvariants().has_value());
}

// A recall at a snapshot sees what lived then, back to the horizon.
TEST(SpaceTest, ASnapshotSeesWhatLivedThen) {
  SpaceRig rig(Metric::kL2, 2, size_t{64} << 20);
  rig.keep = 100;
  SplitMix64 random(5);
  std::vector<std::pair<CommitStamp, SpaceModel>> history;
  for (int step = 0; step < 400; ++step) {
    const std::string id = "id" + std::to_string(random.Below(40));
    if (random.Below(4) == 0) {
      rig.Delete(id);
    } else {
      rig.Upsert(id, VectorDtype::kF32, QuarterVector(&random, 2));
    }
    history.emplace_back(rig.stamp, rig.model);
    const size_t back = random.Below(std::min<size_t>(history.size(), rig.keep));
    const auto& [snapshot, model] = history[history.size() - 1 - back];
    const std::vector<float> query = QuarterVector(&random, 2);
    const RecallAnswer answer = rig.Recall(query, {.k = 50, .snapshot = snapshot});
    ASSERT_NO_FATAL_FAILURE(model.ExpectExact(answer.hits, query, 50, false)) << step;
    rig.space->Reclaim(100);
    if (step > 200) {
      EXPECT_EQ(rig.Recall(query, {.snapshot = rig.stamp - 150}).reason,
                RefusalReason::kSnapshotTooOld);
    }
  }
  EXPECT_LT(rig.space->node_count(), 300u) << "what is past the horizon gives its place";
}

// On another core: a recall of a snapshot that was allowed when it began finds what lived then, to
// its end, whatever the horizon does meanwhile and however late the reader came.
TEST(SpaceTest, ASweepWaitsForWhoBeganBeforeTheHorizonRose) {
  SpaceOptions options = TestSpaceOptions(Metric::kL2, 1, kBuild);
  options.graph_from = 0;
  SpaceRig rig(options, size_t{8} << 20);
  rig.keep = 1'000;
  for (int i = 0; i < 200; ++i) {
    ASSERT_EQ(rig.Upsert("id" + std::to_string(i), VectorDtype::kF32, {static_cast<float>(i)}),
              RefusalReason::kNone);
  }
  rig.LinkAll();
  const CommitStamp before_delete = rig.stamp;
  ASSERT_TRUE(rig.Delete("id7"));
  // The writer finds that the sweep would be too early. Only then comes the reader.
  ASSERT_TRUE(rig.space->WantsSweep());
  ASSERT_FALSE(rig.space->BeginSweep(&rig.sweep));
  const float seven = 7;
  RecallRequest request;
  request.dtype = VectorDtype::kF32;
  request.dimension = 1;
  request.k = 1;
  request.snapshot = before_delete;
  RecallJob reader(&rig.other_memory.heap);
  {
    const ReaderGuard guard(&rig.epochs, 0);
    ASSERT_EQ(reader.Begin(*rig.space, request, reinterpret_cast<const std::byte*>(&seven), 64),
              RefusalReason::kNone);
    rig.space->SetHorizon(rig.stamp);
    EXPECT_FALSE(rig.space->BeginSweep(&rig.sweep)) << "the reader is inside";
    for (int i = 0; i < 50; ++i) rig.Link(UINT32_MAX);
    while (!reader.Search(1)) {
    }
    std::vector<std::byte> slot(4'096);
    ASSERT_TRUE(reader.EmitBatch(slot));
    std::vector<Hit> hits;
    ReadBatch(slot.data(), &hits);
    ASSERT_EQ(hits.size(), 1u);
    EXPECT_EQ(hits[0].id, "id7");
    EXPECT_EQ(reader.Begin(*rig.space, request, reinterpret_cast<const std::byte*>(&seven), 64),
              RefusalReason::kSnapshotTooOld);
  }
  rig.LinkAll();
  rig.space->Reclaim(100);
  EXPECT_EQ(rig.space->retired(), 0u);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
}

// While nothing but ended nodes waits for the horizon the list is not turned over and over.
TEST(SpaceTest, NothingIsDoneWhileEndedNodesWaitForTheHorizon) {
  SpaceOptions options = TestSpaceOptions(Metric::kL2, 1, kBuild);
  options.graph_from = 0;
  SpaceRig rig(options, size_t{8} << 20);
  rig.keep = 1'000;
  for (int i = 0; i < 10; ++i) {
    ASSERT_EQ(rig.Upsert("id" + std::to_string(i), VectorDtype::kF32, {static_cast<float>(i)}),
              RefusalReason::kNone);
  }
  for (int i = 0; i < 10; ++i) ASSERT_TRUE(rig.Delete("id" + std::to_string(i)));
  const size_t before = rig.memory.heap.live_bytes();
  const std::byte* const unused = rig.memory.arena.Allocate(kCacheLineBytes, kCacheLineBytes);
  for (int i = 0; i < 1'000; ++i) ASSERT_EQ(rig.space->NextToLink(), kNoNode);
  EXPECT_EQ(rig.memory.heap.live_bytes(), before);
  EXPECT_EQ(rig.memory.arena.Allocate(kCacheLineBytes, kCacheLineBytes), unused + kCacheLineBytes)
      << "no run of the list was made";
  rig.space->SetHorizon(rig.stamp);
  EXPECT_EQ(rig.space->NextToLink(), kNoNode);
  rig.space->Reclaim(100);
  EXPECT_EQ(rig.space->retired(), 0u);
}

// Ended nodes between live ones give their places back also where nothing new is stored.
TEST(SpaceTest, ScatteredDeletesOfASmallSpaceGiveTheirMemoryBack) {
  SpaceRig rig(Metric::kL2, 1, size_t{8} << 20);
  for (int i = 0; i < 1'000; ++i) {
    ASSERT_EQ(rig.Upsert(std::to_string(i), VectorDtype::kF32, {static_cast<float>(i)}),
              RefusalReason::kNone);
  }
  rig.keep = 150;
  for (int i = 5; i < 1'000; i += 5) ASSERT_TRUE(rig.Delete(std::to_string(i)));
  EXPECT_EQ(rig.space->NextToLink(), kNoNode);
  rig.space->Reclaim(1'000);
  EXPECT_EQ(rig.space->retired(), 199u) << "some of them may still be asked for";
  rig.space->SetHorizon(rig.stamp);
  EXPECT_EQ(rig.space->NextToLink(), kNoNode);
  rig.space->Reclaim(1'000);
  EXPECT_EQ(rig.space->retired(), 0u);
  // A few are not worth it.
  for (int i = 1; i < 50; i += 5) ASSERT_TRUE(rig.Delete(std::to_string(i)));
  EXPECT_EQ(rig.space->NextToLink(), kNoNode);
  rig.space->Reclaim(1'000);
  EXPECT_EQ(rig.space->retired(), 10u);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
  ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall({77}, 30, VectorDtype::kF32));
}

TEST(SpaceTest, AFullMemoryTakesAsManyAsAreDeletedWhereverTheyLie) {
  for (const int every : {1, 7, 100}) {
    SpaceRig rig(Metric::kL2, 1, size_t{2} << 20);
    int stored = 0;
    while (rig.Upsert(std::to_string(stored), VectorDtype::kF32, {static_cast<float>(stored)},
                      std::string(300, 'p')) == RefusalReason::kNone) {
      ++stored;
    }
    ASSERT_FALSE(rig.space->has_graph());
    int deleted = 0;
    for (int i = stored - 1; i > 100 && deleted < 30; i -= every) {
      ASSERT_TRUE(rig.Delete(std::to_string(i)));
      ++deleted;
    }
    EXPECT_EQ(rig.space->NextToLink(), kNoNode);
    rig.space->Reclaim(1'000);
    EXPECT_EQ(rig.space->retired(), 0u);
    for (int i = 0; i < deleted; ++i) {
      ASSERT_EQ(rig.Upsert("new" + std::to_string(i), VectorDtype::kF32, {-1.0F - i},
                           std::string(300, 'p')),
                RefusalReason::kNone)
          << i << " of " << deleted;
    }
    ASSERT_NO_FATAL_FAILURE(rig.ExpectSound());
    ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall({0}, 60, VectorDtype::kF32));
  }
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
  EXPECT_EQ(Space("none", TestSpaceOptions(Metric::kL2, 0, kBuild), &rig.memory.heap, &rig.epochs)
                .NodesInBytes(640),
            10u)
      << "before there is a dimension";
}

// With several homes each refusal may come where the tombstone, too, wants memory.
TEST(SpaceTest, MemoryMayRunOutWithSeveralHomes) {
  uint64_t refused_deletes = 0;
  for (size_t left = 0; left < 24'000; left += left < 6'000 ? 96 : 1'100) {
    SpaceRig rig(Metric::kL2, 0, size_t{2} << 20);
    rig.memory.LeaveOnly(left);
    SplitMix64 random(left);
    for (int step = 0; step < 300; ++step) {
      const std::string id = "id" + std::to_string(random.Below(40));
      // Some come late.
      const CommitStamp stamp = random.Below(4) == 0 ? rig.stamp - random.Below(50) : ++rig.stamp;
      StoreOutcome outcome;
      if (random.Below(2) == 0) {
        outcome = rig.space->Delete(id, stamp, true);
        refused_deletes += static_cast<uint64_t>(outcome.reason == RefusalReason::kMemoryFull);
      } else {
        const float value = static_cast<float>(step);
        ObservationRef observation;
        observation.id = id;
        observation.dtype = VectorDtype::kF32;
        observation.dimension = 1;
        observation.vector = reinterpret_cast<const std::byte*>(&value);
        outcome = rig.space->Upsert(observation, stamp, true);
      }
      const Result<void> sound = rig.space->CheckInvariants();
      ASSERT_TRUE(sound.has_value()) << sound.error().message << ", " << left << " bytes";
      if (step % 60 == 59) {
        rig.space->SetHorizon(rig.stamp - 60);
        rig.space->ForgetTombstones(rig.stamp - 60);
        rig.space->NextToLink();
        rig.space->Reclaim(100);
      }
    }
    rig.space.reset();
    ASSERT_EQ(rig.memory.heap.live_bytes(), 0u);
  }
  EXPECT_GT(refused_deletes, 0u);
}

TEST(SpaceTest, WhatComesLateAndAgainChangesNothing) {
  SpaceRig rig(Metric::kL2, 1, size_t{8} << 20);
  const auto upsert = [&](float value, CommitStamp stamp) {
    ObservationRef observation;
    observation.id = "a";
    observation.dtype = VectorDtype::kF32;
    observation.dimension = 1;
    observation.vector = reinterpret_cast<const std::byte*>(&value);
    return rig.space->Upsert(observation, stamp, true).later;
  };
  const auto at = [&](CommitStamp snapshot) {
    const RecallAnswer answer =
        rig.Recall({0}, {.k = 5, .with_vector = true, .snapshot = snapshot});
    EXPECT_LE(answer.hits.size(), 1u);
    return answer.hits.empty() ? -1.0F : answer.hits[0].vector[0];
  };
  EXPECT_EQ(upsert(1, 100), kNoStamp);
  EXPECT_EQ(upsert(2, 200), kNoStamp);
  for (int times = 0; times < 2; ++times) {
    EXPECT_EQ(upsert(3, 150), 200u);
    EXPECT_EQ(upsert(2, 200), 200u);
    EXPECT_EQ(rig.space->Delete("a", 180, true).later, 200u);
    EXPECT_EQ(upsert(4, 170), 200u) << "before the late delete, and after it in time";
    EXPECT_EQ(rig.space->live(), 1u);
    EXPECT_EQ(rig.space->retired(), 4u);
    for (const auto& [snapshot, value] : std::map<CommitStamp, float>{{99, -1},
                                                                      {100, 1},
                                                                      {149, 1},
                                                                      {150, 3},
                                                                      {169, 3},
                                                                      {170, 4},
                                                                      {179, 4},
                                                                      {180, -1},
                                                                      {199, -1},
                                                                      {200, 2}}) {
      EXPECT_EQ(at(snapshot), value) << snapshot;
    }
  }
  ASSERT_TRUE(rig.space->CheckInvariants().has_value());
}

// A hundred tombstones and a hundred ended nodes in front of a live one: taken in several calls.
TEST(SpaceTest, UpkeepIsBoundedAndGoesOn) {
  SpaceOptions options = TestSpaceOptions(Metric::kL2, 1, kBuild);
  options.graph_from = 50;
  SpaceRig rig(options, size_t{8} << 20);
  rig.keep = 1'000;
  for (int i = 0; i < 100; ++i) {
    rig.Upsert("gone" + std::to_string(i), VectorDtype::kF32, {static_cast<float>(i)});
  }
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(rig.space->Delete("gone" + std::to_string(i), ++rig.stamp, true).existed);
  }
  rig.model.entries().clear();
  rig.Upsert("stays", VectorDtype::kF32, {1});
  EXPECT_EQ(rig.space->NextToLink(), kNoNode) << "64 were passed over";
  EXPECT_EQ(rig.space->NextToLink(), rig.space->FindLive("stays"))
      << "which the others wait behind";
  ASSERT_NO_FATAL_FAILURE(rig.ExpectExactRecall({0}, 5, VectorDtype::kF32));
  rig.space->ForgetTombstones(rig.stamp);
  EXPECT_TRUE(rig.space->has_tombstones());
  rig.space->ForgetTombstones(rig.stamp);
  EXPECT_FALSE(rig.space->has_tombstones());
  rig.LinkAll();
  EXPECT_EQ(rig.space->retired(), 100u);
  rig.space->SetHorizon(rig.stamp);
  rig.space->NextToLink();
  rig.space->NextToLink();
  rig.space->Reclaim(1'000);
  EXPECT_EQ(rig.space->retired(), 0u);
  ASSERT_TRUE(rig.space->CheckInvariants().has_value());
}

// Every id once, whatever comes and goes between the pages.
TEST(SpaceTest, AScrollVisitsWhatStaysExactlyOnce) {
  SpaceRig rig(Metric::kL2, 1, size_t{64} << 20);
  SplitMix64 random(7);
  for (int i = 0; i < 3'000; ++i) {
    rig.Upsert("stays" + std::to_string(i), VectorDtype::kF32, {static_cast<float>(i)});
  }
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

// ---------------------------------------------------------------------------------------------
// Suppressing and restoring

// A space beside its model, with what is hidden.
class HidingRig : public SpaceRig {
 public:
  using SpaceRig::SpaceRig;
  void Suppress(const std::string& id) {
    auto entry = model.entries().extract(id);
    const StoreOutcome outcome = space->Suppress(id, ++stamp, false);
    EXPECT_EQ(outcome.reason, RefusalReason::kNone);
    EXPECT_EQ(outcome.existed, !entry.empty()) << id;
    if (!entry.empty()) hidden.insert(std::move(entry));
    space->SetHorizon(stamp - std::min(stamp, keep));
  }
  void Restore(const std::string& id) {
    auto entry = hidden.extract(id);
    const StoreOutcome outcome = space->Restore(id, ++stamp);
    EXPECT_EQ(outcome.reason, RefusalReason::kNone);
    EXPECT_EQ(outcome.existed, !entry.empty()) << id;
    if (!entry.empty()) model.entries().insert(std::move(entry));
    space->SetHorizon(stamp - std::min(stamp, keep));
  }
  // As SpaceRig's, which know nothing of what is hidden.
  void Store(const std::string& id, const std::vector<float>& vector, const std::string& payload) {
    const std::vector<std::byte> bytes = EncodeVector(VectorDtype::kF32, vector);
    ObservationRef observation;
    observation.id = id;
    observation.payload = BytesOf(payload);
    observation.payload_kind = PayloadKind::kEpisode;
    observation.dtype = VectorDtype::kF32;
    observation.dimension = static_cast<uint32_t>(vector.size());
    observation.vector = bytes.data();
    observation.when_ns = static_cast<int64_t>(++stamp);
    observation.confidence = 0.25F;
    const StoreOutcome outcome = space->Upsert(observation, stamp);
    EXPECT_EQ(outcome.reason, RefusalReason::kNone);
    EXPECT_EQ(outcome.existed, model.entries().contains(id) || hidden.contains(id)) << id;
    hidden.erase(id);
    model.entries()[id] = {vector, payload, observation.when_ns, observation.confidence};
  }
  void Remove(const std::string& id) {
    const bool existed = model.entries().erase(id) + hidden.erase(id) > 0;
    EXPECT_EQ(space->Delete(id, ++stamp, false).existed, existed) << id;
    space->SetHorizon(stamp - std::min(stamp, keep));
  }
  // Recalled, got and scrolled is what the model has.
  void ExpectIsModel(const std::vector<float>& query) {
    ASSERT_NO_FATAL_FAILURE(ExpectSound());
    ASSERT_EQ(space->hidden(), hidden.size());
    const RecallAnswer answer = Recall(query, {.k = 100, .ef = 400, .with_payload = true});
    ASSERT_NO_FATAL_FAILURE(model.ExpectExact(answer.hits, query, 100, true));
    for (const auto& [id, entry] : hidden) ASSERT_EQ(space->FindLive(id), kNoNode) << id;
    for (const auto& [id, entry] : model.entries()) ASSERT_NE(space->FindLive(id), kNoNode) << id;
    uint64_t cursor = 0;
    std::vector<NodeId> nodes;
    space->Scroll(&cursor, 1'000, &nodes);
    ASSERT_EQ(nodes.size(), model.entries().size());
  }

  std::map<std::string, SpaceModel::Entry> hidden;
};

HidingRig MakeHidingRig(bool with_graph) {
  SpaceOptions options = TestSpaceOptions(Metric::kL2, 2, kBuild, 77);
  if (with_graph) options.graph_from = 0;
  return {options, size_t{64} << 20};
}

class SuppressTest : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(WithGraph, SuppressTest, testing::Bool());

TEST_P(SuppressTest, WhatIsSuppressedIsNotThereUntilItIsRestored) {
  HidingRig rig = MakeHidingRig(GetParam());
  SplitMix64 random(1);
  for (int i = 0; i < 40; ++i) {
    rig.Store("id" + std::to_string(i), QuarterVector(&random, 2), "about " + std::to_string(i));
  }
  if (GetParam()) rig.LinkAll();
  const std::vector<float> query = rig.model.entries()["id7"].vector;
  rig.Suppress("id7");
  rig.Suppress("id9");
  EXPECT_EQ(rig.space->live(), 38u);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query)) << "at once";
  // The version that was live is gone for good, and still it comes back.
  rig.LinkAll();
  rig.space->Reclaim(1'000);
  if (GetParam()) {
    EXPECT_EQ(rig.space->retired(), 0u) << "it was swept";
  }
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query)) << "after upkeep";
  rig.Restore("id7");
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query)) << "at once, with content and vector";
  const StoredObservation stored = rig.space->Get(rig.space->FindLive("id7"));
  EXPECT_EQ(stored.payload_kind, PayloadKind::kEpisode);
  EXPECT_EQ(stored.stamp, rig.stamp) << "it is there since";
  rig.LinkAll();
  EXPECT_EQ(rig.space->unlinked_count(), GetParam() ? 0u : 39u);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query)) << "linked";
  for (int times = 0; times < 3; ++times) {
    rig.Suppress("id7");
    ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query));
    rig.Restore("id7");
    ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(query));
  }
  rig.space.reset();
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

TEST_P(SuppressTest, WhereThereIsNothingToDoNothingIsDone) {
  HidingRig rig = MakeHidingRig(GetParam());
  rig.Suppress("a");
  rig.Restore("a");
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
  rig.Store("a", {1, 1}, "a");
  rig.Store("b", {2, 1}, "b");
  EXPECT_TRUE(rig.space->Delete("dead", ++rig.stamp, true).reason == RefusalReason::kNone);
  const size_t before = rig.memory.heap.live_bytes();
  const CommitStamp latest = rig.space->latest_stamp();
  rig.Restore("a");
  rig.Suppress("c");
  rig.Restore("c");
  rig.Suppress("dead");
  rig.Restore("dead");
  EXPECT_EQ(rig.memory.heap.live_bytes(), before);
  EXPECT_EQ(rig.space->latest_stamp(), latest);
  rig.Suppress("a");
  const size_t hidden = rig.memory.heap.live_bytes();
  rig.Suppress("a");
  EXPECT_EQ(rig.memory.heap.live_bytes(), hidden);
  rig.Restore("a");
  rig.Restore("a");
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({1, 1}));
}

TEST_P(SuppressTest, UpsertAndDeleteTakeThePlaceOfWhatIsHidden) {
  for (const bool several_homes : {false, true}) {
    HidingRig rig = MakeHidingRig(GetParam());
    rig.Store("stays", {5, 5}, "stays");
    uint32_t places = 0;
    for (int times = 0; times < 20; ++times) {
      rig.Store("a", {1, 1}, "old");
      rig.Suppress("a");
      rig.Store("a", {2, 1}, "new");
      ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({1, 1}));
      rig.Restore("a");
      ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({1, 1})) << "nothing is hidden any more";
      rig.Suppress("a");
      EXPECT_EQ(rig.space->Delete("a", ++rig.stamp, several_homes).existed, true);
      EXPECT_EQ(rig.space->Delete("a", ++rig.stamp, several_homes).existed, false);
      rig.hidden.clear();
      rig.Restore("a");
      ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({1, 1}));
      rig.space->SetHorizon(rig.stamp);
      rig.space->ForgetTombstones(rig.stamp);
      rig.LinkAll();
      rig.space->Reclaim(1'000);
      if (times == 9) places = rig.space->node_count();
    }
    EXPECT_LE(rig.space->node_count(), places + 8) << "their places are used again";
    rig.space.reset();
    EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
  }
}

// Random programs of all four, with linking and sweeping between; exact where there is no graph.
TEST_P(SuppressTest, ASpaceIsItsModelAfterEveryStep) {
  HidingRig rig = MakeHidingRig(GetParam());
  SplitMix64 random(3);
  int hidden_while_linking = 0;
  for (int step = 0; step < 6'000; ++step) {
    const std::string linking = rig.LinkingId();
    const bool take_linking = !linking.empty() && random.Below(4) == 0;
    const std::string id = take_linking ? linking : "id" + std::to_string(random.Below(60));
    switch (random.Below(8)) {
      case 0:
      case 1:
        rig.Store(id, QuarterVector(&random, 2), std::string(random.Below(40), 'p'));
        break;
      case 2:
        rig.Remove(id);
        break;
      case 3:
        rig.Suppress(id);
        hidden_while_linking += static_cast<int>(take_linking);
        break;
      case 4:
        rig.Restore(id);
        break;
      default:
        rig.Link(static_cast<uint32_t>(1 + random.Below(30)));
        break;
    }
    if (step % 5 == 0) {
      ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel(QuarterVector(&random, 2))) << "step " << step;
    }
  }
  EXPECT_GT(hidden_while_linking, GetParam() ? 20 : -1);
  rig.LinkAll();
  rig.space->Reclaim(10'000);
  EXPECT_LT(rig.space->retired(), 60u);
  rig.space.reset();
  EXPECT_EQ(rig.memory.heap.live_bytes(), 0u);
}

// One id with one number, in stamps of the test's choice.
class OneId {
 public:
  explicit OneId(bool several_homes = true)
      : rig_(Metric::kL2, 1, size_t{8} << 20), several_homes_(several_homes) {}
  StoreOutcome Upsert(float value, CommitStamp stamp) {
    ObservationRef observation;
    observation.id = "a";
    observation.dtype = VectorDtype::kF32;
    observation.dimension = 1;
    observation.vector = reinterpret_cast<const std::byte*>(&value);
    return Checked(rig_.space->Upsert(observation, stamp, several_homes_));
  }
  StoreOutcome Delete(CommitStamp stamp) {
    return Checked(rig_.space->Delete("a", stamp, several_homes_));
  }
  StoreOutcome Yield(CommitStamp stamp) { return Checked(rig_.space->Yield("a", stamp)); }
  StoreOutcome Suppress(CommitStamp stamp) {
    return Checked(rig_.space->Suppress("a", stamp, several_homes_));
  }
  StoreOutcome Restore(CommitStamp stamp) { return Checked(rig_.space->Restore("a", stamp)); }
  // The values from each of these stamps on, -1 for none; and now the last one.
  void ExpectLives(const std::map<CommitStamp, float>& lives) {
    for (auto from = lives.begin(); from != lives.end(); ++from) {
      EXPECT_EQ(At(from->first), from->second) << from->first;
      const auto next = std::next(from);
      if (next != lives.end()) {
        EXPECT_EQ(At(next->first - 1), from->second) << next->first - 1;
      }
    }
    EXPECT_EQ(At(kNoStamp), lives.rbegin()->second) << "now";
    EXPECT_EQ(rig_.space->FindLive("a") != kNoNode, lives.rbegin()->second != -1);
  }

 private:
  StoreOutcome Checked(StoreOutcome outcome) {
    EXPECT_EQ(outcome.reason, RefusalReason::kNone);
    const Result<void> sound = rig_.space->CheckInvariants();
    EXPECT_TRUE(sound.has_value()) << sound.error().message;
    return outcome;
  }
  float At(CommitStamp snapshot) {
    const RecallAnswer answer =
        rig_.Recall({0}, {.k = 5, .with_vector = true, .snapshot = snapshot});
    EXPECT_LE(answer.hits.size(), 1u);
    return answer.hits.empty() ? -1.0F : answer.hits[0].vector[0];
  }

  SpaceRig rig_;
  const bool several_homes_;
};

void ExpectDid(const StoreOutcome& outcome, bool existed, CommitStamp later = kNoStamp) {
  EXPECT_EQ(outcome.existed, existed);
  EXPECT_EQ(outcome.later, later);
}

// What left it may come to where it lies: after a restart with other partitions.
TEST(SpaceTest, AnObservationStandsBeforeATombstoneWithItsStamp) {
  OneId one;
  ExpectDid(one.Upsert(1, 100), false);
  ExpectDid(one.Delete(200), true);
  ExpectDid(one.Upsert(2, 199), false, 200);
  ExpectDid(one.Upsert(3, 200), false);
  one.ExpectLives({{100, 1}, {199, 2}, {200, 3}});
  // In the other order, and again.
  ExpectDid(one.Delete(200), true, 200);
  ExpectDid(one.Upsert(4, 200), true, 200);
  ExpectDid(one.Upsert(5, 150), true, 200);
  ExpectDid(one.Delete(201), true);
  one.ExpectLives({{100, 1}, {150, 5}, {199, 2}, {200, 3}, {201, -1}});
}

TEST(SpaceTest, WhatYieldsEndsUpToItsStampAndLeavesNothingLater) {
  OneId one;
  ExpectDid(one.Upsert(1, 100), false);
  ExpectDid(one.Yield(99), true, 100);
  ExpectDid(one.Yield(100), true);
  ExpectDid(one.Yield(100), false, 100);
  one.ExpectLives({{100, -1}});
  ExpectDid(one.Upsert(2, 100), false);
  one.ExpectLives({{100, 2}});
  ExpectDid(one.Suppress(110), true);
  ExpectDid(one.Yield(100), true);
  ExpectDid(one.Restore(120), false);
  ExpectDid(one.Upsert(3, 121), false);
  one.ExpectLives({{120, -1}, {121, 3}});
}

TEST(SpaceSuppressTest, SnapshotsSeeWhatWasThereThen) {
  for (const bool several_homes : {false, true}) {
    OneId one(several_homes);
    ExpectDid(one.Upsert(1, 100), false);
    ExpectDid(one.Suppress(200), true);
    ExpectDid(one.Restore(300), true);
    ExpectDid(one.Suppress(400), true);
    ExpectDid(one.Upsert(2, 500), true);
    ExpectDid(one.Suppress(600), true);
    one.ExpectLives({{99, -1}, {100, 1}, {200, -1}, {300, 1}, {400, -1}, {500, 2}, {600, -1}});
    ExpectDid(one.Delete(700), true);
    ExpectDid(one.Restore(800), false, kNoStamp);
    one.ExpectLives({{500, 2}, {600, -1}, {900, -1}});
  }
}

// Content goes by the stamps of contents: what was hidden or restored since is superseded with it.
TEST(SpaceSuppressTest, ALateUpsertSupersedesTheContentThatWasHidden) {
  OneId one;
  one.Upsert(1, 100);
  one.Suppress(300);
  ExpectDid(one.Upsert(2, 200), true);
  one.ExpectLives({{99, -1}, {100, 1}, {200, 2}, {500, 2}});
  ExpectDid(one.Restore(400), false);
  ExpectDid(one.Upsert(3, 150), true, 200);  // That one is earlier still.
  one.ExpectLives({{99, -1}, {100, 1}, {150, 3}, {200, 2}});
}

TEST(SpaceSuppressTest, ALateUpsertSupersedesTheContentThatWasRestored) {
  for (const CommitStamp late : {150, 250, 350, 450}) {
    OneId one;
    one.Upsert(1, 100);
    one.Suppress(200);
    one.Restore(300);
    one.Suppress(400);
    if (late < 450) one.Restore(500);
    ExpectDid(one.Upsert(2, late), true);
    std::map<CommitStamp, float> lives = {{99, -1}, {100, 1}, {200, -1}, {300, 1}, {400, -1}};
    lives.erase(lives.upper_bound(late), lives.end());
    lives[late] = 2;
    one.ExpectLives(lives);
    ExpectDid(one.Suppress(600), true);
    ExpectDid(one.Restore(700), true);
    lives[600] = -1;
    lives[700] = 2;
    one.ExpectLives(lives);
  }
}

TEST(SpaceSuppressTest, ALateDeleteRemovesTheContentThatWasHiddenOrRestored) {
  for (const bool restored : {false, true}) {
    OneId one;
    one.Upsert(1, 100);
    one.Suppress(300);
    if (restored) one.Restore(400);
    ExpectDid(one.Delete(200), true);
    one.ExpectLives({{99, -1}, {100, 1}, {200, -1}, {500, -1}});
    ExpectDid(one.Restore(600), false);
    ExpectDid(one.Upsert(2, 150), false, 200);
    ExpectDid(one.Delete(50), false, 200);
    one.ExpectLives({{99, -1}, {100, 1}, {150, 2}, {200, -1}, {500, -1}});
  }
}

TEST(SpaceSuppressTest, WhatIsEarlierThanTheContentLosesAgainstAHiddenOne) {
  OneId one;
  one.Upsert(1, 100);
  one.Suppress(200);
  ExpectDid(one.Upsert(2, 50), true, 100);
  ExpectDid(one.Delete(80), true, 100);
  one.ExpectLives({{49, -1}, {50, 2}, {80, -1}, {100, 1}, {200, -1}});
  ExpectDid(one.Restore(300), true);
  ExpectDid(one.Upsert(3, 60), true, 100);
  one.ExpectLives({{49, -1}, {50, 2}, {60, 3}, {80, -1}, {100, 1}, {200, -1}, {300, 1}});
}

TEST(SpaceSuppressTest, ALateSuppressOrRestoreDoesNothing) {
  OneId one;
  one.Upsert(1, 100);
  one.Upsert(2, 300);
  ExpectDid(one.Suppress(200), true, 300);  // What it hides was replaced.
  one.ExpectLives({{99, -1}, {100, 1}, {200, -1}, {300, 2}});
  one.Suppress(500);
  ExpectDid(one.Suppress(400), false, 500);
  ExpectDid(one.Restore(400), false, 500);
  one.ExpectLives({{300, 2}, {500, -1}});
  one.Restore(700);
  ExpectDid(one.Suppress(600), false, 700);
  ExpectDid(one.Restore(600), false, 700);
  one.ExpectLives({{300, 2}, {500, -1}, {700, 2}});
  one.Delete(900);
  ExpectDid(one.Suppress(800), false, 900);
  ExpectDid(one.Restore(800), false, 900);
  one.ExpectLives({{300, 2}, {500, -1}, {700, 2}, {900, -1}});
}

// Memory runs out at a different place in each run.
TEST(SpaceSuppressTest, ARefusalForMemoryLeavesEverythingAsItWas) {
  int refused_suppresses = 0;
  for (size_t left = 0; left < 24'000; left += left < 6'000 ? 96 : 1'100) {
    HidingRig rig(Metric::kL2, 2, size_t{2} << 20);
    rig.memory.LeaveOnly(left);
    SplitMix64 random(left);
    for (int step = 0; step < 400; ++step) {
      const std::string id = "id" + std::to_string(random.Below(60));
      const uint64_t what = random.Below(8);
      if (what < 3) {
        const std::vector<float> vector = QuarterVector(&random, 2);
        ObservationRef observation;
        observation.id = id;
        observation.dtype = VectorDtype::kF32;
        observation.dimension = 2;
        observation.vector = reinterpret_cast<const std::byte*>(vector.data());
        if (rig.space->Upsert(observation, ++rig.stamp).reason != RefusalReason::kNone) continue;
        rig.hidden.erase(id);
        rig.model.entries()[id] = {vector, "", 0, 1};
      } else if (what < 5) {
        const StoreOutcome outcome = rig.space->Suppress(id, ++rig.stamp, false);
        refused_suppresses += static_cast<int>(outcome.reason == RefusalReason::kMemoryFull);
        if (outcome.existed) rig.hidden.insert(rig.model.entries().extract(id));
      } else if (what < 7) {
        const StoreOutcome outcome = rig.space->Restore(id, ++rig.stamp);
        if (outcome.existed) rig.model.entries().insert(rig.hidden.extract(id));
      } else {
        rig.Remove(id);
      }
      ASSERT_NO_FATAL_FAILURE(rig.ExpectSound()) << left << " bytes, step " << step;
      ASSERT_EQ(rig.space->hidden(), rig.hidden.size());
    }
    for (const auto& [id, entry] : rig.model.entries()) {
      ASSERT_NE(rig.space->FindLive(id), kNoNode) << id;
    }
    rig.space.reset();
    ASSERT_EQ(rig.memory.heap.live_bytes(), 0u);
  }
  EXPECT_GT(refused_suppresses, 0);
}

// The list has no place for it, as long as what was suppressed may still be asked for.
TEST(SpaceSuppressTest, ARestoreWithoutMemoryIsRefusedAndGoesOnLater) {
  HidingRig rig(Metric::kL2, 2, size_t{2} << 20);
  rig.keep = 1'000;
  for (int i = 0; i < 64; ++i) rig.Store("id" + std::to_string(i), {static_cast<float>(i), 0}, "");
  rig.Suppress("id7");
  std::vector<std::pair<std::byte*, size_t>> hoard;
  // Of every size that the heap has.
  for (size_t bytes = size_t{1} << 20; bytes >= 8; bytes -= bytes / 8) {
    while (std::byte* block = rig.memory.heap.Allocate(bytes)) hoard.emplace_back(block, bytes);
  }
  EXPECT_EQ(rig.space->Restore("id7", ++rig.stamp).reason, RefusalReason::kMemoryFull);
  EXPECT_EQ(rig.space->Suppress("id8", ++rig.stamp, false).reason, RefusalReason::kMemoryFull);
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({7, 0}));
  for (const auto& [block, bytes] : hoard) rig.memory.heap.Free(block, bytes);
  rig.space->SetHorizon(rig.stamp);
  rig.space->NextToLink();
  rig.Restore("id7");
  ASSERT_NO_FATAL_FAILURE(rig.ExpectIsModel({7, 0}));
}

}  // namespace
}  // namespace engram
