#include "index/recall_job.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "index/hnsw_linker.h"
#include "index/space.h"
#include "src/core/hash.h"
#include "tests/index/space_testing.h"

namespace engram {
namespace {

constexpr HnswBuildParams kBuild{.M = 6, .M0 = 12, .ef_construction = 24};

// A space, its model, and a recall job; filled once, then only asked.
class RecallRig {
 public:
  explicit RecallRig(Metric metric)
      : memory_(size_t{256} << 20),
        space("rig", TestSpaceOptions(metric, 0, kBuild, 5), &memory_.heap, &epochs_),
        model(metric),
        job(&memory_.heap),
        linker_(&memory_.heap, kBuild) {}

  void Add(const std::string& id, const std::vector<float>& vector,
           const std::string& payload = "") {
    const auto when_ns = static_cast<int64_t>(model.entries().size());
    const RefusalReason reason =
        space
            .Upsert({.id = id,
                     .payload = BytesOf(payload),
                     .payload_kind = PayloadKind::kOpaque,
                     .dtype = VectorDtype::kF32,
                     .dimension = static_cast<uint32_t>(vector.size()),
                     .scale = 1,
                     .vector = reinterpret_cast<const std::byte*>(vector.data()),
                     .when_ns = when_ns,
                     .confidence = 0.25F},
                    static_cast<CommitStamp>(when_ns + 1))
            .reason;
    ASSERT_EQ(reason, RefusalReason::kNone);
    model.entries()[id] = {vector, payload, when_ns, 0.25F};
  }
  void AddMany(size_t count, uint32_t dimension, uint64_t seed) {
    SplitMix64 random(seed);
    for (size_t i = 0; i < count; ++i) {
      ASSERT_NO_FATAL_FAILURE(Add("id" + std::to_string(i), QuarterVector(&random, dimension),
                                  std::string(i % 7, 'p')));
    }
  }
  // Links nodes until `unlinked` are left.
  void Link(size_t unlinked) {
    while (space.unlinked_count() > unlinked) {
      const NodeId node = space.NextToLink();
      ASSERT_NE(node, kNoNode);
      ASSERT_TRUE(space.BeginLinking(&linker_, node));
      while (!linker_.Step(UINT32_MAX)) {
      }
      space.FinishLinking(node);
    }
  }
  RecallAnswer Recall(const std::vector<float>& query, const RecallParams& params) {
    return RunRecall(space, &job, query, params);
  }

 private:
  TestHeap memory_;
  ReaderEpochs epochs_{1};

 public:
  Space space;
  SpaceModel model;
  RecallJob job;

 private:
  HnswLinker linker_;
};

TEST(RecallJobTest, ScoresAreThoseOfTheMetricNearestFirst) {
  const std::vector<float> query = {1, 0};
  const auto recall = [&](Metric metric) {
    RecallRig rig(metric);
    rig.Add("same", {2, 0});
    rig.Add("half", {3, 4});
    rig.Add("across", {0, 1});
    rig.Add("opposite", {-1, 0});
    return rig.Recall(query, {.k = 4}).hits;
  };
  const std::vector<Hit> cosine = recall(Metric::kCosine);
  ASSERT_EQ(cosine.size(), 4u);
  const char* const kOrder[] = {"same", "half", "across", "opposite"};
  const float kCosines[] = {1, 0.6F, 0, -1};
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(cosine[i].id, kOrder[i]);
    EXPECT_NEAR(cosine[i].score, kCosines[i], 1e-6F);
  }
  const std::vector<Hit> ip = recall(Metric::kInnerProduct);
  ASSERT_EQ(ip.size(), 4u);
  const char* const kIpOrder[] = {"half", "same", "across", "opposite"};
  const float kProducts[] = {3, 2, 0, -1};
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(ip[i].id, kIpOrder[i]);
    EXPECT_EQ(ip[i].score, kProducts[i]);
  }
  const std::vector<Hit> l2 = recall(Metric::kL2);
  ASSERT_EQ(l2.size(), 4u);
  const char* const kL2Order[] = {"same", "across", "opposite", "half"};
  const float kSquares[] = {1, 2, 4, 20};
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(l2[i].id, kL2Order[i]);
    EXPECT_EQ(l2[i].score, kSquares[i]);
  }
}

TEST(RecallJobTest, FewerThanKAreAllThatThereAre) {
  RecallRig rig(Metric::kL2);
  rig.AddMany(7, 3, 1);
  SplitMix64 random(2);
  for (const uint32_t k : {1U, 6U, 7U, 8U, kMaxRecallResults}) {
    const std::vector<float> query = QuarterVector(&random, 3);
    const RecallAnswer answer = rig.Recall(query, {.k = k});
    ASSERT_EQ(answer.hits.size(), std::min(k, 7U));
    ASSERT_NO_FATAL_FAILURE(rig.model.ExpectExact(answer.hits, query, k, false));
  }
}

TEST(RecallJobTest, AnEmptySpaceGivesOneEmptyLastBatch) {
  TestHeap memory(size_t{8} << 20);
  ReaderEpochs epochs(1);
  const Space space("empty", TestSpaceOptions(Metric::kCosine, 2, kBuild), &memory.heap, &epochs);
  RecallJob job(&memory.heap);
  const RecallAnswer answer = RunRecall(space, &job, std::vector<float>{1, 2}, {.k = 10});
  EXPECT_EQ(answer.reason, RefusalReason::kNone);
  EXPECT_TRUE(answer.hits.empty());
  EXPECT_EQ(answer.batches, 1);
}

TEST(RecallJobTest, TheLargestKComesWholeAndInOrder) {
  RecallRig rig(Metric::kCosine);
  rig.AddMany(kMaxRecallResults + 500, 5, 3);
  SplitMix64 random(4);
  const std::vector<float> query = QuarterVector(&random, 5);
  const RecallAnswer answer = rig.Recall(query, {.k = kMaxRecallResults, .with_payload = true});
  ASSERT_EQ(answer.hits.size(), kMaxRecallResults);
  ASSERT_NO_FATAL_FAILURE(rig.model.ExpectExact(answer.hits, query, kMaxRecallResults, true));
}

// Half from the graph and half from the scan, with an ef that is raised to k.
TEST(RecallJobTest, TheLargestKComesFromTheGraphToo) {
  RecallRig rig(Metric::kL2);
  rig.AddMany(kMaxRecallResults + 500, 5, 7);
  rig.Link(kMaxRecallResults / 2);
  SplitMix64 random(8);
  const std::vector<float> query = QuarterVector(&random, 5);
  const RecallAnswer answer = rig.Recall(query, {.k = kMaxRecallResults, .ef = 10});
  ASSERT_EQ(answer.hits.size(), kMaxRecallResults);
  std::set<std::string> ids;
  for (size_t i = 0; i < answer.hits.size(); ++i) {
    ids.insert(answer.hits[i].id);
    if (i > 0) {
      ASSERT_GE(answer.hits[i].score, answer.hits[i - 1].score);
    }
  }
  EXPECT_EQ(ids.size(), answer.hits.size());
}

// What a recall may send of payloads is the request's to say.
TEST(RecallJobTest, ThePayloadBoundIsTheRequests) {
  RecallRig rig(Metric::kL2);
  for (int i = 0; i < 20; ++i) {
    rig.Add("id" + std::to_string(i), {static_cast<float>(i)}, std::string(kMaxPayloadBytes, 'p'));
  }
  for (const size_t fitting : {size_t{0}, size_t{1}, size_t{19}, size_t{20}}) {
    const RecallAnswer answer =
        rig.Recall({0}, {.k = 20,
                         .with_payload = true,
                         .max_payload_bytes = static_cast<uint32_t>(fitting * kMaxPayloadBytes)});
    ASSERT_EQ(answer.hits.size(), 20u);
    for (size_t i = 0; i < 20; ++i) EXPECT_EQ(answer.hits[i].payload_omitted, i >= fitting) << i;
  }
}

// The same recall on the scan, on the graph, and on both; one job for all of them.
TEST(RecallJobTest, SlicesOfOneDistanceGiveTheSameAsOneGo) {
  RecallRig rig(Metric::kL2);
  rig.AddMany(Space::kGraphFrom + 100, 6, 5);
  SplitMix64 random(6);
  for (const size_t unlinked : {size_t{Space::kGraphFrom}, size_t{700}, size_t{0}}) {
    ASSERT_NO_FATAL_FAILURE(rig.Link(unlinked));
    for (int i = 0; i < 3; ++i) {
      const std::vector<float> query = QuarterVector(&random, 6);
      const RecallAnswer whole = rig.Recall(query, {.k = 20, .ef = 50});
      for (const uint32_t slice : {1U, 7U, 1'000U}) {
        const RecallAnswer sliced = rig.Recall(query, {.k = 20, .ef = 50, .slice = slice});
        ASSERT_EQ(sliced.hits, whole.hits) << unlinked << " unlinked, slices of " << slice;
        if (slice == 1) {
          // A turn more at most, which is 64 distances of a scan.
          EXPECT_GE(sliced.slices, static_cast<int>(unlinked / 64))
              << "a slice is as long as asked";
        }
      }
      ASSERT_NO_FATAL_FAILURE(rig.model.ExpectSound(whole.hits, query, false));
    }
  }
}

// Half of the answer waits for the graph, half is in it: neither may hide the other.
TEST(RecallJobTest, TheNearestOfScanAndGraphAreMerged) {
  RecallRig rig(Metric::kL2);
  rig.AddMany(Space::kGraphFrom + 1, 4, 7);
  ASSERT_NO_FATAL_FAILURE(rig.Link(Space::kGraphFrom / 2));
  SplitMix64 random(8);
  size_t found = 0;
  for (int i = 0; i < 50; ++i) {
    const std::vector<float> query = QuarterVector(&random, 4);
    const RecallAnswer answer = rig.Recall(query, {.k = 10, .ef = 200});
    ASSERT_EQ(answer.hits.size(), 10u);
    ASSERT_NO_FATAL_FAILURE(rig.model.ExpectSound(answer.hits, query, false));
    found += rig.model.CountTrue(answer.hits, query, 10);
  }
  EXPECT_GE(found, 495u);
}

TEST(RecallJobTest, RecallRisesWithEfAndEfZeroIsTheDefault) {
  RecallRig rig(Metric::kCosine);
  rig.AddMany(Space::kGraphFrom + 1, 24, 9);
  ASSERT_NO_FATAL_FAILURE(rig.Link(0));
  const auto recall_at_10 = [&](uint32_t ef) {
    SplitMix64 random(10);
    size_t found = 0;
    for (int i = 0; i < 40; ++i) {
      const std::vector<float> query = QuarterVector(&random, 24);
      const RecallAnswer answer = rig.Recall(query, {.k = 10, .ef = ef});
      EXPECT_EQ(answer.hits.size(), 10u);
      found += rig.model.CountTrue(answer.hits, query, 10);
    }
    return static_cast<double>(found) / 400;
  };
  const double at_10 = recall_at_10(10);
  const double at_64 = recall_at_10(64);
  const double at_2000 = recall_at_10(2'000);
  EXPECT_LT(at_10, at_64);
  EXPECT_LT(at_64, at_2000);
  EXPECT_GE(at_2000, 0.99);
  EXPECT_EQ(recall_at_10(1), at_10) << "ef is raised to k";
  EXPECT_EQ(recall_at_10(0), at_64) << "the default that Begin was given";
}

TEST(RecallJobTest, AQueryOfTheWrongKindIsRefusedAndTheJobStaysUsable) {
  RecallRig rig(Metric::kCosine);
  rig.AddMany(20, 3, 11);
  EXPECT_EQ(rig.Recall({1, 2}, {}).reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(rig.Recall({0, 0, 0}, {}).reason, RefusalReason::kZeroVector);
  const RecallAnswer answer = rig.Recall({1, 2, 3}, {.k = 5});
  ASSERT_NO_FATAL_FAILURE(
      rig.model.ExpectExact(answer.hits, std::vector<float>{1, 2, 3}, 5, false));
}

// A shorter query after a longer one: nothing of the longer one may be left in the padding.
TEST(RecallJobTest, OneJobServesSpacesOfAllDimensions) {
  RecallRig wide(Metric::kL2);
  wide.AddMany(5, 47, 12);
  RecallRig narrow(Metric::kL2);
  narrow.AddMany(5, 33, 13);
  SplitMix64 random(14);
  for (int i = 0; i < 4; ++i) {
    const std::vector<float> wide_query = QuarterVector(&random, 47);
    ASSERT_NO_FATAL_FAILURE(wide.model.ExpectExact(
        RunRecall(wide.space, &wide.job, wide_query, {.k = 5}).hits, wide_query, 5, false));
    const std::vector<float> query = QuarterVector(&random, 33);
    ASSERT_NO_FATAL_FAILURE(narrow.model.ExpectExact(
        RunRecall(narrow.space, &wide.job, query, {.k = 5}).hits, query, 5, false));
  }
}

// Hits of every size in slots of every size: RunRecall checks that each slot is filled exactly.
TEST(RecallJobTest, BatchesHoldHitsOfEverySize) {
  RecallRig rig(Metric::kL2);
  SplitMix64 random(15);
  size_t largest = 0;
  for (int i = 0; i < 300; ++i) {
    std::string id = std::to_string(i);
    id.resize(std::max<size_t>(id.size(), 1 + random.Below(kMaxIdBytes)), 'i');
    const size_t bytes = i % 3 == 0 ? 0 : i % 3 == 1 ? random.Below(30) : random.Below(2'000);
    largest = std::max(largest, PadTo8(sizeof(HitHeader) + id.size() + bytes));
    ASSERT_NO_FATAL_FAILURE(rig.Add(id, QuarterVector(&random, 2), std::string(bytes, 'p')));
  }
  int batches_before = 1'000'000;
  for (const size_t slot_bytes : {sizeof(ResultBatch) + largest, size_t{4'096}, size_t{8'192},
                                  kResultSlotBytes, size_t{1} << 20}) {
    const std::vector<float> query = QuarterVector(&random, 2);
    const RecallAnswer answer =
        rig.Recall(query, {.k = 300, .with_payload = true, .slot_bytes = slot_bytes});
    ASSERT_NO_FATAL_FAILURE(rig.model.ExpectExact(answer.hits, query, 300, true));
    for (const Hit& hit : answer.hits) ASSERT_FALSE(hit.payload_omitted);
    EXPECT_LE(answer.batches, batches_before);
    batches_before = answer.batches;
  }
  EXPECT_EQ(batches_before, 1);
  const RecallAnswer bare = rig.Recall({1, 1}, {.k = 300});
  for (const Hit& hit : bare.hits) {
    EXPECT_EQ(hit.payload, "");
    EXPECT_FALSE(hit.payload_omitted) << "it was not asked for";
  }
}

TEST(RecallJobTest, TheLargestHitFitsAResultSlot) {
  RecallRig rig(Metric::kL2);
  for (int i = 0; i < 3; ++i) {
    ASSERT_NO_FATAL_FAILURE(rig.Add(std::string(kMaxIdBytes, static_cast<char>('a' + i)),
                                    {static_cast<float>(i)}, std::string(kMaxPayloadBytes, 'p')));
  }
  const RecallAnswer answer = rig.Recall({0}, {.k = 3, .with_payload = true});
  EXPECT_EQ(answer.batches, 3);
  ASSERT_NO_FATAL_FAILURE(rig.model.ExpectExact(answer.hits, std::vector<float>{0}, 3, true));
}

// 16 payloads of 64 KiB are the bound; what no longer fits is left out and says so, and a smaller
// one behind it may still come.
TEST(RecallJobTest, PayloadsBeyondTheBoundAreOmittedAndMarked) {
  RecallRig rig(Metric::kL2);
  static_assert(kMaxAnswerPayloadBytes == 16 * kMaxPayloadBytes);
  for (int i = 0; i < 15; ++i) {
    rig.Add("full" + std::to_string(i), {static_cast<float>(i)},
            std::string(kMaxPayloadBytes, 'f'));
  }
  rig.Add("almost", {15}, std::string(kMaxPayloadBytes - 10, 'a'));
  rig.Add("too_large", {16}, std::string(11, 'l'));
  rig.Add("fits", {17}, std::string(10, 's'));
  rig.Add("one_more", {18}, "x");
  rig.Add("none", {19}, "");
  const RecallAnswer answer = rig.Recall({0}, {.k = 100, .with_payload = true});
  ASSERT_EQ(answer.hits.size(), 20u);
  ASSERT_NO_FATAL_FAILURE(rig.model.ExpectExact(answer.hits, std::vector<float>{0}, 100, true));
  size_t sent = 0;
  for (const Hit& hit : answer.hits) {
    sent += hit.payload.size();
    EXPECT_EQ(hit.payload_omitted, hit.id == "too_large" || hit.id == "one_more") << hit.id;
  }
  EXPECT_EQ(sent, kMaxAnswerPayloadBytes);
  // The next recall has the whole bound again.
  EXPECT_FALSE(rig.Recall({16}, {.k = 1, .with_payload = true}).hits[0].payload_omitted);
}

// Whoever answers reads them, and settles which payloads fit.
TEST(RecallJobTest, HitsNameTheRecordsOfWhatLiesInALog) {
  RecallRig rig(Metric::kL2);
  rig.Add("memory", {0}, "here");
  const std::string payload(kMaxPayloadBytes, 'p');
  for (uint32_t i = 1; i <= 20; ++i) {
    const std::string id = "id" + std::to_string(i);
    const float number = static_cast<float>(i);
    const ObservationRef observation{.id = id,
                                     .payload = BytesOf(i < 20 ? payload : ""),
                                     .dtype = VectorDtype::kF32,
                                     .dimension = 1,
                                     .vector = reinterpret_cast<const std::byte*>(&number),
                                     .origin = 1'000 + i,
                                     .record_bytes = 70'000};
    ASSERT_EQ(rig.space.Upsert(observation, 100 + i).reason, RefusalReason::kNone);
  }
  rig.space.Suppress("id2", 200, false);
  rig.space.Restore("id2", 201);
  for (const bool with_vector : {false, true}) {
    const RecallAnswer answer =
        rig.Recall({0}, {.k = 21, .with_payload = true, .with_vector = with_vector});
    ASSERT_EQ(answer.hits.size(), 21u);
    EXPECT_EQ(answer.hits[0].payload, "here");
    EXPECT_EQ(answer.hits[0].vector.size(), with_vector ? 1u : 0u);
    for (size_t i = 1; i < 21; ++i) {
      const Hit& hit = answer.hits[i];
      EXPECT_EQ(hit.id, "id" + std::to_string(i));
      EXPECT_FALSE(hit.payload_omitted) << "they are not sent, so they have no bound";
      if (i == 20 && !with_vector) {
        EXPECT_TRUE(hit.at_address.empty()) << "there is nothing to read";
        continue;
      }
      ASSERT_GE(hit.at_address.size(), sizeof(HitHeader) + sizeof(HitReference));
      HitHeader header;
      std::memcpy(&header, hit.at_address.data(), sizeof(header));
      EXPECT_EQ(header.payload_bytes, i < 20 ? payload.size() : 0);
      EXPECT_EQ(header.vector_dimension, with_vector ? 1 : 0);
      HitReference reference;
      std::memcpy(&reference, hit.at_address.data() + sizeof(header), sizeof(reference));
      EXPECT_EQ(reference.address, 1'000 + i);
      EXPECT_EQ(reference.record_bytes, 70'000u);
      EXPECT_EQ(reference.has_older_stamp, i == 2 ? 1u : 0u);
    }
  }
  for (const Hit& hit : rig.Recall({0}, {.k = 21}).hits) {
    EXPECT_TRUE(hit.at_address.empty()) << "ids alone need no record";
    EXPECT_EQ(hit.payload, "");
  }
}

}  // namespace
}  // namespace engram
