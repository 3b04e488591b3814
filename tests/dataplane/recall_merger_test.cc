#include "dataplane/recall_merger.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "src/core/hash.h"
#include "tests/dataplane/wire.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

using MergeId = RecallMerger::MergeId;

std::unique_ptr<RecallMerger> MakeMerger(uint32_t merges, uint16_t partitions) {
  auto merger =
      RecallMerger::Create(merges, partitions, kMaxAnswerPayloadBytes, HugePagePolicy::kOff);
  EXPECT_TRUE(merger.has_value());
  return *std::move(merger);
}

// A result slot's bytes: what a shard writes, and what lay there before behind it.
WireBytes BatchOf(const std::vector<WireHit>& hits, Metric metric = Metric::kL2,
                  BatchEnd end = BatchEnd::kLast) {
  WireWriter body;
  for (const WireHit& hit : hits) body.Raw(HitBytesOf(hit));
  const WireBytes bytes = body.Take();
  const ResultBatch head{.body_bytes = static_cast<uint32_t>(bytes.size()),
                         .count = static_cast<uint16_t>(hits.size()),
                         .metric = metric,
                         .end = end};
  WireWriter slot;
  slot.Raw(std::as_bytes(std::span(&head, 1))).Raw(bytes).Text("what was there before");
  return slot.Take();
}

struct Answer {
  std::vector<WireHit> hits = {};
  Metric metric = Metric::kUnspecified;
  int batches = 0;
};
// Everything that is emitted into slots of `slot_bytes`, checked as a shard's batches are made.
Answer EmitAll(RecallMerger* merger, MergeId id, size_t slot_bytes = kResultSlotBytes) {
  Answer answer;
  WireBytes slot(slot_bytes);
  bool last = false;
  while (true) {
    std::ranges::fill(slot, std::byte{0xEE});
    const size_t bytes = merger->Emit(id, slot);
    if (bytes == 0) break;
    EXPECT_FALSE(last) << "something follows the last batch";
    EXPECT_LE(bytes, slot.size());
    ResultBatch head;
    std::memcpy(&head, slot.data(), sizeof(head));
    EXPECT_EQ(head.body_bytes, bytes - sizeof(head));
    const auto hits = ParseHits(std::span(slot).subspan(sizeof(head), head.body_bytes));
    EXPECT_EQ(hits.size(), head.count);
    for (size_t i = 0, at = sizeof(head); i < hits.size(); ++i) {
      const WireBytes again = HitBytesOf(hits[i]);
      EXPECT_TRUE(std::equal(again.begin(), again.end(), slot.begin() + static_cast<long>(at)))
          << "padding is not zero, or a length is wrong";
      at += again.size();
    }
    answer.hits.insert(answer.hits.end(), hits.begin(), hits.end());
    answer.metric = head.metric;
    ++answer.batches;
    last = head.is_last();
  }
  EXPECT_TRUE(last);
  return answer;
}
std::vector<std::string> IdsOf(const Answer& answer) {
  std::vector<std::string> ids;
  for (const WireHit& hit : answer.hits) ids.push_back(hit.id);
  return ids;
}
using Ids = std::vector<std::string>;

TEST(RecallMergerTest, TheNearestOfAllPartitionsComeFirst) {
  auto merger = MakeMerger(1, 3);
  const MergeId id = merger->Begin(3, 4);
  ASSERT_NE(id, RecallMerger::kNone);
  merger->Add(id, BatchOf({{"a", 1, 10}, {"d", 4, 13}}));
  merger->Add(id, BatchOf({{"b", 2, 11}, {"e", 5, 14}}));
  EXPECT_FALSE(merger->FinishPartition(id, RefusalReason::kNone));
  EXPECT_FALSE(merger->FinishPartition(id, RefusalReason::kNone));
  merger->Add(id, BatchOf({{"c", 3, 12}}));
  EXPECT_TRUE(merger->FinishPartition(id, RefusalReason::kNone));
  EXPECT_EQ(merger->reason(id), RefusalReason::kNone);
  const Answer answer = EmitAll(merger.get(), id);
  EXPECT_EQ(IdsOf(answer), (Ids{"a", "b", "c", "d"}));
  EXPECT_EQ(answer.metric, Metric::kL2);
  EXPECT_EQ(answer.batches, 1);
  EXPECT_EQ(merger->Emit(id, {}), 0u) << "nothing follows";
  merger->Release(id);
}

TEST(RecallMergerTest, TheFirstOnesOfALongRecallComeOnceAllHaveSaidTheirs) {
  auto merger = MakeMerger(1, 3);
  const MergeId id = merger->Begin(3, 5, {.first = 2});
  WireBytes slot(kResultSlotBytes);
  merger->Add(id, BatchOf({{"b", 2, 11}, {"c", 3, 12}}, Metric::kL2, BatchEnd::kFirst));
  // The rest of one partition is there before the first of another.
  merger->Add(id, BatchOf({{"f", 6, 13}}, Metric::kL2));
  merger->FinishPartition(id, RefusalReason::kNone);
  EXPECT_FALSE(merger->can_emit(id));
  merger->FinishPartition(id, RefusalReason::kUnknownSpace);
  EXPECT_FALSE(merger->can_emit(id));
  merger->Add(id, BatchOf({{"a", 1, 20}, {"e", 5, 21}}, Metric::kL2, BatchEnd::kFirst));
  ASSERT_TRUE(merger->can_emit(id));
  EXPECT_FALSE(merger->is_whole(id));
  const size_t bytes = merger->Emit(id, slot);
  ResultBatch head;
  std::memcpy(&head, slot.data(), sizeof(head));
  EXPECT_EQ(head.end, BatchEnd::kNothing);
  const auto first = ParseHits(std::span(slot).subspan(sizeof(head), bytes - sizeof(head)));
  ASSERT_EQ(first.size(), 2u);
  EXPECT_EQ(first[0].id, "a");
  EXPECT_EQ(first[1].id, "b");
  EXPECT_EQ(merger->Emit(id, slot), 0u) << "the others are not there yet";
  // What is nearer after all comes with the others; an id that was handed out does not come again.
  merger->Add(id, BatchOf({{"d", 1.5F, 22}, {"b", 0.5F, 99}}, Metric::kL2));
  EXPECT_TRUE(merger->FinishPartition(id, RefusalReason::kNone));
  EXPECT_EQ(IdsOf(EmitAll(merger.get(), id)), (Ids{"d", "c", "e"}));
  merger->Release(id);
  EXPECT_EQ(merger->used_blocks(), 0u);
}

TEST(RecallMergerTest, ALongRecallThatFailsAfterItsFirstOnesHandsOutNothingMore) {
  auto merger = MakeMerger(1, 2);
  const MergeId id = merger->Begin(2, 5, {.first = 1});
  merger->Add(id, BatchOf({{"a", 1, 1}}, Metric::kL2, BatchEnd::kFirst));
  merger->Add(id, BatchOf({{"b", 2, 2}}, Metric::kL2, BatchEnd::kFirst));
  WireBytes slot(kResultSlotBytes);
  EXPECT_GT(merger->Emit(id, slot), 0u);
  merger->FinishPartition(id, RefusalReason::kDeadlinePassed);
  EXPECT_EQ(merger->Emit(id, slot), 0u);
  EXPECT_TRUE(merger->FinishPartition(id, RefusalReason::kNone));
  EXPECT_EQ(merger->reason(id), RefusalReason::kDeadlinePassed);
  merger->Release(id);
}

TEST(RecallMergerTest, ABatchHasNoMoreHitsThanAreAskedFor) {
  auto merger = MakeMerger(1, 1);
  const MergeId id = merger->Begin(1, 5);
  merger->Add(id, BatchOf({{"a", 1, 1}, {"b", 2, 2}, {"c", 3, 3}, {"d", 4, 4}, {"e", 5, 5}}));
  merger->FinishPartition(id, RefusalReason::kNone);
  WireBytes slot(kResultSlotBytes);
  for (const uint16_t count : {2, 2, 1}) {
    merger->Emit(id, slot, 2);
    ResultBatch head;
    std::memcpy(&head, slot.data(), sizeof(head));
    EXPECT_EQ(head.count, count);
    EXPECT_EQ(head.is_last(), count == 1);
  }
  merger->Release(id);
}

TEST(RecallMergerTest, TheMetricSaysWhatIsNearer) {
  auto merger = MakeMerger(1, 2);
  for (const Metric metric : {Metric::kCosine, Metric::kInnerProduct, Metric::kL2}) {
    const MergeId id = merger->Begin(2, 10);
    merger->Add(id, BatchOf({{"low", -0.5F, 1}}, metric));
    merger->Add(id, BatchOf({{"high", 0.5F, 2}}, metric));
    merger->FinishPartition(id, RefusalReason::kNone);
    ASSERT_TRUE(merger->FinishPartition(id, RefusalReason::kNone));
    EXPECT_EQ(IdsOf(EmitAll(merger.get(), id)),
              metric == Metric::kL2 ? (Ids{"low", "high"}) : (Ids{"high", "low"}));
    merger->Release(id);
  }
}

TEST(RecallMergerTest, EqualScoresComeByStampWhicheverPartitionWasFirst) {
  auto merger = MakeMerger(1, 2);
  for (const bool swapped : {false, true}) {
    const MergeId id = merger->Begin(2, 3);
    const auto one = BatchOf({{"x", 1, 30}, {"y", 1, 50}});
    const auto two = BatchOf({{"z", 1, 20}, {"w", 1, 40}});
    merger->Add(id, swapped ? two : one);
    merger->Add(id, swapped ? one : two);
    merger->FinishPartition(id, RefusalReason::kNone);
    merger->FinishPartition(id, RefusalReason::kNone);
    EXPECT_EQ(IdsOf(EmitAll(merger.get(), id)), (Ids{"z", "x", "w"}));
    merger->Release(id);
  }
}

// An update that moved to another partition: the old one may still be there for a moment.
TEST(RecallMergerTest, OfOneIdTheLaterStampStandsEvenWhereItIsFarther) {
  auto merger = MakeMerger(1, 3);
  const MergeId id = merger->Begin(3, 2);
  merger->Add(id, BatchOf({{"a", 1, 10, "old"}, {"b", 2, 11}}));
  merger->Add(id, BatchOf({{"a", 9, 20, "new"}, {"c", 3, 12}}));
  merger->Add(id, BatchOf({{"a", 0, 5, "older"}}));
  for (int p = 0; p < 3; ++p) merger->FinishPartition(id, RefusalReason::kNone);
  EXPECT_EQ(IdsOf(EmitAll(merger.get(), id)), (Ids{"b", "c"}));
  merger->Release(id);

  const MergeId all = merger->Begin(2, 3);
  merger->Add(all, BatchOf({{"a", 9, 20, "new"}, {"c", 3, 12}}));
  merger->Add(all, BatchOf({{"a", 1, 10, "old"}}));
  merger->FinishPartition(all, RefusalReason::kNone);
  merger->FinishPartition(all, RefusalReason::kNone);
  const Answer answer = EmitAll(merger.get(), all);
  EXPECT_EQ(IdsOf(answer), (Ids{"c", "a"}));
  EXPECT_EQ(answer.hits[1].payload, "new");
  merger->Release(all);
}

TEST(RecallMergerTest, AnEmptyAnswerIsOneBatchWithoutHits) {
  auto merger = MakeMerger(1, 2);
  const MergeId id = merger->Begin(2, 10);
  merger->Add(id, BatchOf({}, Metric::kCosine));
  merger->FinishPartition(id, RefusalReason::kNone);
  merger->FinishPartition(id, RefusalReason::kUnknownSpace);
  EXPECT_EQ(merger->reason(id), RefusalReason::kNone);
  const Answer answer = EmitAll(merger.get(), id);
  EXPECT_TRUE(answer.hits.empty());
  EXPECT_EQ(answer.batches, 1);
  EXPECT_EQ(answer.metric, Metric::kCosine);
  merger->Release(id);
}

TEST(RecallMergerTest, TheWorstReasonStandsInAnyOrder) {
  using R = RefusalReason;
  struct Case {
    std::vector<R> said;
    R reason;
  };
  const std::vector<Case> cases{
      {{R::kNone, R::kNone, R::kNone}, R::kNone},
      {{R::kUnknownSpace, R::kNone, R::kUnknownSpace}, R::kNone},
      {{R::kUnknownSpace, R::kUnknownSpace, R::kUnknownSpace}, R::kUnknownSpace},
      {{R::kUnknownSpace, R::kMemoryFull, R::kUnknownSpace}, R::kMemoryFull},
      {{R::kNone, R::kMemoryFull, R::kWrongDimension}, R::kWrongDimension},
      {{R::kDeadlinePassed, R::kNone, R::kQueueFull}, R::kDeadlinePassed},
      {{R::kShuttingDown, R::kCancelled, R::kQueueFull}, R::kShuttingDown},
      {{R::kCancelled, R::kDeadlinePassed, R::kNone}, R::kDeadlinePassed},
  };
  auto merger = MakeMerger(1, 3);
  for (const Case& c : cases) {
    std::vector<R> said = c.said;
    std::ranges::sort(said);
    do {
      const MergeId id = merger->Begin(3, 10);
      merger->Add(id, BatchOf({{"a", 1, 1}}));
      for (const R reason : said) merger->FinishPartition(id, reason);
      EXPECT_EQ(merger->reason(id), c.reason);
      if (c.reason != R::kNone) {
        WireBytes slot(kResultSlotBytes);
        EXPECT_EQ(merger->Emit(id, slot), 0u) << "a refused recall has no hits";
      }
      merger->Release(id);
    } while (std::ranges::next_permutation(said).found);
  }
  EXPECT_EQ(merger->used_blocks(), 0u);
}

// The payloads of one answer have one bound, however many partitions they come from.
TEST(RecallMergerTest, PayloadsBeyondTheBoundAreLeftOutAndSaidToBe) {
  auto merger = MakeMerger(1, 3);
  const MergeId id = merger->Begin(3, 100);
  const std::string payload(60'000, 'p');
  for (uint64_t p = 0; p < 3; ++p) {
    for (uint64_t i = 0; i < 10; ++i) {
      const uint64_t n = 3 * i + p;
      // The last one is small enough to fit all the same.
      merger->Add(id, BatchOf({{"id-" + std::to_string(n),
                                static_cast<float>(n),
                                n,
                                n == 29 ? "small" : payload,
                                0,
                                {1, 2, 3}}}));
    }
  }
  for (int p = 0; p < 3; ++p) merger->FinishPartition(id, RefusalReason::kNone);
  const Answer answer = EmitAll(merger.get(), id);
  ASSERT_EQ(answer.hits.size(), 30u);
  size_t sum = 0;
  for (size_t n = 0; n < 30; ++n) {
    const WireHit& hit = answer.hits[n];
    EXPECT_EQ(hit.id, "id-" + std::to_string(n));
    EXPECT_EQ(hit.vector, (std::vector<float>{1, 2, 3}));
    const bool fits = n < kMaxAnswerPayloadBytes / 60'000 || n == 29;
    EXPECT_EQ(hit.payload, n == 29 ? "small" : fits ? payload : "");
    EXPECT_EQ(hit.flags, fits ? 0 : kHitPayloadOmitted);
    sum += hit.payload.size();
  }
  EXPECT_LE(sum, kMaxAnswerPayloadBytes);
  merger->Release(id);
}

TEST(RecallMergerTest, MergesAreBoundedAndUsedAgain) {
  auto merger = MakeMerger(2, 2);
  const MergeId one = merger->Begin(2, 1);
  const MergeId two = merger->Begin(1, 1);
  EXPECT_NE(one, two);
  EXPECT_EQ(merger->free_merges(), 0u);
  EXPECT_EQ(merger->Begin(1, 1), RecallMerger::kNone);
  merger->Add(two, BatchOf({{"a", 1, 1}}));
  merger->FinishPartition(two, RefusalReason::kNone);
  merger->Release(two);
  EXPECT_EQ(merger->Begin(1, 1), two);
  // Nothing of its last use is left.
  merger->FinishPartition(two, RefusalReason::kNone);
  EXPECT_TRUE(EmitAll(merger.get(), two).hits.empty());
  merger->Release(two);
  merger->FinishPartition(one, RefusalReason::kNone);
  merger->FinishPartition(one, RefusalReason::kMemoryFull);
  merger->Release(one);
  EXPECT_EQ(merger->free_merges(), 2u);
  EXPECT_EQ(merger->used_blocks(), 0u);
}

// The largest answer that two partitions can give: it always finds room.
TEST(RecallMergerTest, TheLargestAnswerFitsAlone) {
  auto merger = MakeMerger(1, 2);
  for (const uint32_t dimension : {kMaxRecallNumbers / kMaxRecallResults, kMaxDimension}) {
    const uint32_t k = kMaxRecallNumbers / dimension;
    const MergeId id = merger->Begin(2, k);
    const std::vector<float> vector(dimension, 0.5F);
    size_t payload_left[2] = {kMaxAnswerPayloadBytes, kMaxAnswerPayloadBytes};
    for (uint64_t n = 0; n < 2 * k; ++n) {
      const size_t payload = std::min(payload_left[n % 2], kMaxPayloadBytes);
      payload_left[n % 2] -= payload;
      std::string name = std::to_string(n);
      name.resize(kMaxIdBytes, 'i');
      merger->Add(
          id, BatchOf({{name, static_cast<float>(n), n, std::string(payload, 'p'), 0, vector}}));
    }
    merger->FinishPartition(id, RefusalReason::kNone);
    ASSERT_TRUE(merger->FinishPartition(id, RefusalReason::kNone));
    ASSERT_EQ(merger->reason(id), RefusalReason::kNone);
    const Answer answer = EmitAll(merger.get(), id);
    ASSERT_EQ(answer.hits.size(), k);
    for (size_t i = 0; i < answer.hits.size(); ++i) {
      EXPECT_EQ(answer.hits[i].stamp, i);
      EXPECT_EQ(answer.hits[i].vector, vector);
    }
    merger->Release(id);
    EXPECT_EQ(merger->used_blocks(), 0u);
  }
}

TEST(RecallMergerTest, WithoutMemoryARecallIsRefusedAndTheOthersGoOn) {
  auto merger = MakeMerger(40, 1);
  const std::vector<float> vector(kMaxDimension, 0.5F);
  std::vector<WireHit> hits;
  for (uint64_t i = 0; i < 4; ++i) hits.push_back({std::to_string(i), 1, i, "", 0, vector});
  const WireBytes batch = BatchOf(hits);
  std::vector<MergeId> ids;
  for (int m = 0; m < 30; ++m) {
    ids.push_back(merger->Begin(1, 4));
    // The same ids again and again: few hits remain, but all have to be kept until the end.
    for (int i = 0; i < 200; ++i) merger->Add(ids.back(), batch);
  }
  int refused = 0;
  for (const MergeId id : ids) {
    ASSERT_TRUE(merger->FinishPartition(id, RefusalReason::kNone));
    if (merger->reason(id) == RefusalReason::kMergesFull) {
      ++refused;
    } else {
      EXPECT_EQ(IdsOf(EmitAll(merger.get(), id)), (Ids{"0", "1", "2", "3"}));
    }
    merger->Release(id);
  }
  EXPECT_GT(refused, 0);
  EXPECT_LT(refused, 30);
  EXPECT_EQ(merger->used_blocks(), 0u);
  const MergeId id = merger->Begin(1, 4);
  merger->Add(id, batch);
  merger->FinishPartition(id, RefusalReason::kNone);
  EXPECT_EQ(merger->reason(id), RefusalReason::kNone);
  merger->Release(id);
}

TEST(RecallMergerDeathTest, MistakesOfOurOwnAreCaught) {
  auto merger = MakeMerger(1, 2);
  EXPECT_DEATH((void)merger->Begin(3, 1), "partitions out of range");
  EXPECT_DEATH((void)merger->Begin(1, 0), "k out of range");
  const MergeId id = merger->Begin(1, 1);
  EXPECT_DEATH(merger->Release(id), "every partition");
  EXPECT_DEATH((void)merger->Emit(id, {}), "in its order");
  WireBytes cut = BatchOf({{"a", 1, 1}});
  cut.resize(20);
  EXPECT_DEATH(merger->Add(id, cut), "within its slot");
  (void)merger->FinishPartition(id, RefusalReason::kNone);
  EXPECT_DEATH((void)merger->FinishPartition(id, RefusalReason::kNone), "once");
  EXPECT_DEATH(merger->Add(id, BatchOf({})), "before its partition is done");
  merger->Release(id);
  EXPECT_DEATH(merger->Release(id), "every partition");
}

// ---------------------------------------------------------------------------------------------
// Against a model

// What a merger does, in the plainest way.
struct Model {
  uint32_t k = 0;
  uint16_t waiting = 0;
  Metric metric = Metric::kL2;
  std::vector<WireHit> hits = {};

  std::vector<WireHit> Answer() const {
    std::map<std::string, WireHit> by_id;
    for (const WireHit& hit : hits) {
      const auto [place, made] = by_id.try_emplace(hit.id, hit);
      if (!made && hit.stamp > place->second.stamp) place->second = hit;
    }
    std::vector<WireHit> sorted;
    for (const auto& [id, hit] : by_id) sorted.push_back(hit);
    std::ranges::sort(sorted, [this](const WireHit& a, const WireHit& b) {
      if (a.score != b.score) return metric == Metric::kL2 ? a.score < b.score : a.score > b.score;
      return a.stamp < b.stamp;
    });
    sorted.resize(std::min<size_t>(sorted.size(), k));
    size_t sent = 0;
    for (WireHit& hit : sorted) {
      if (sent + hit.payload.size() > kMaxAnswerPayloadBytes) {
        hit.payload.clear();
        hit.flags = 1;
      }
      sent += hit.payload.size();
    }
    return sorted;
  }
};

WireHit DrawHit(SplitMix64* random, uint64_t stamp) {
  WireHit hit{.id = std::to_string(random->Below(60)),
              .score = static_cast<float>(random->Below(8)),
              .stamp = stamp,
              .payload = std::string(random->Below(10) == 0 ? random->Below(65'536) : 0, 'p'),
              .when_ns = static_cast<int64_t>(random->Next() >> 1),
              .confidence = 0.5F,
              .payload_kind = static_cast<uint8_t>(random->Below(3))};
  if (random->Below(3) == 0) hit.id.resize(1 + random->Below(256), 'x');
  if (random->Below(3) == 0) hit.vector.resize(random->Below(50), 1.5F);
  return hit;
}

class RecallMergerProgramTest : public testing::TestWithParam<uint64_t> {};

// Several merges at once, batches of any partition in any order.
TEST_P(RecallMergerProgramTest, AnswersLikeTheModel) {
  SplitMix64 random(GetParam());
  auto merger = MakeMerger(4, 5);
  std::map<MergeId, Model> models;
  uint64_t stamp = 0;
  int answered = 0;
  while (answered < 150 || !models.empty()) {
    if (answered < 150 && models.size() < 4 && random.Below(4) == 0) {
      Model model;
      model.k = static_cast<uint32_t>(1 + random.Below(random.Below(3) == 0 ? 1000 : 20));
      model.waiting = static_cast<uint16_t>(1 + random.Below(5));
      model.metric = static_cast<Metric>(1 + random.Below(3));
      const MergeId id = merger->Begin(model.waiting, model.k);
      ASSERT_NE(id, RecallMerger::kNone);
      ASSERT_TRUE(models.emplace(id, model).second);
    }
    if (models.empty()) continue;
    auto place = models.begin();
    std::advance(place, static_cast<long>(random.Below(models.size())));
    auto& [id, model] = *place;
    if (random.Below(4) != 0) {
      std::vector<WireHit> hits;
      size_t bytes = sizeof(ResultBatch);
      for (uint64_t i = random.Below(12); i > 0; --i) {
        const WireHit hit = DrawHit(&random, ++stamp);
        bytes += HitBytesOf(hit).size();
        if (bytes > kResultSlotBytes) break;
        hits.push_back(hit);
      }
      // As often as not the later stamp comes first.
      if (random.Below(2) == 0) std::ranges::reverse(hits);
      merger->Add(id, BatchOf(hits, model.metric,
                              random.Below(2) == 0 ? BatchEnd::kLast : BatchEnd::kNothing));
      model.hits.insert(model.hits.end(), hits.begin(), hits.end());
      continue;
    }
    --model.waiting;
    const RefusalReason reason =
        random.Below(4) == 0 ? RefusalReason::kUnknownSpace : RefusalReason::kNone;
    ASSERT_EQ(merger->FinishPartition(id, reason), model.waiting == 0);
    if (model.waiting > 0) continue;
    if (merger->reason(id) == RefusalReason::kNone) {
      const size_t slot_bytes = kResultSlotBytes + random.Below(100'000);
      ASSERT_EQ(EmitAll(merger.get(), id, slot_bytes).hits, model.Answer());
    } else {
      ASSERT_EQ(merger->reason(id), RefusalReason::kUnknownSpace);
    }
    merger->Release(id);
    models.erase(place);
    ++answered;
  }
  EXPECT_EQ(merger->free_merges(), 4u);
  EXPECT_EQ(merger->used_blocks(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Seeds, RecallMergerProgramTest, testing::Range(uint64_t{1}, uint64_t{9}));

TEST(RecallMergerMemoryTest, NothingIsAllocatedAfterCreate) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer has an allocator of its own";
  auto merger = MakeMerger(2, 4);
  std::vector<WireBytes> batches;
  SplitMix64 random(3);
  uint64_t stamp = 0;
  for (int b = 0; b < 100; ++b) {
    std::vector<WireHit> hits;
    for (int i = 0; i < 20; ++i) {
      hits.push_back(DrawHit(&random, ++stamp));
      hits.back().payload.resize(std::min<size_t>(hits.back().payload.size(), 2000));
    }
    batches.push_back(BatchOf(hits));
  }
  WireBytes slot(kResultSlotBytes);
  size_t emitted = 0;
  const uint64_t before = AllocationCount();
  for (int round = 0; round < 20; ++round) {
    const MergeId id = merger->Begin(4, 1000);
    for (const WireBytes& batch : batches) merger->Add(id, batch);
    for (int p = 0; p < 4; ++p) merger->FinishPartition(id, RefusalReason::kNone);
    while (const size_t bytes = merger->Emit(id, slot)) emitted += bytes;
    merger->Release(id);
  }
  EXPECT_EQ(AllocationCount(), before);
  EXPECT_GT(emitted, 0u);
}

}  // namespace
}  // namespace engram
