#include "src/control/gateway_core.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/attributes.h"
#include "src/core/hash.h"
#include "tests/control/gateway_rig.h"

namespace engram {
namespace {

TEST(GatewayCoreTest, AnObservationGoesToThePartitionThatOwnsItsId) {
  GatewayRig rig;
  for (int i = 0; i < 40; ++i) {
    const TestCall* call = rig.DoWell(rig.Remember(IdOf(i), {static_cast<float>(i), 1}));
    EXPECT_FALSE(call->answer.existed);
    EXPECT_GT(call->answer.stamp, kNoStamp);
  }
  for (int i = 0; i < 40; ++i) {
    const auto& kept = rig.OwnerOf(IdOf(i)).spaces["s"];
    ASSERT_TRUE(kept.contains(IdOf(i)));
    EXPECT_EQ(kept.at(IdOf(i)).payload, "about " + IdOf(i));
    EXPECT_EQ(kept.at(IdOf(i)).vector, (std::vector<float>{static_cast<float>(i), 1}));
    EXPECT_EQ(kept.at(IdOf(i)).confidence, 0.5F);
    EXPECT_EQ(kept.at(IdOf(i)).when_ns, 12);
  }
  for (const auto& shard : rig.shards) EXPECT_FALSE(shard->spaces["s"].empty());
  EXPECT_TRUE(rig.DoWell(rig.Remember(IdOf(3), {0, 0}))->answer.existed);
  EXPECT_TRUE(rig.DoWell(rig.Forget(IdOf(3)))->answer.existed);
  EXPECT_FALSE(rig.DoWell(rig.Forget(IdOf(3)))->answer.existed);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, ARecallMergesThePartitions) {
  for (const uint16_t partitions : {1, 2, 4}) {
    GatewayRig rig({.partitions = partitions});
    for (int i = 0; i < 60; ++i) rig.DoWell(rig.Remember(IdOf(i), {static_cast<float>(i)}));
    const TestCall* call = rig.DoWell(rig.Recall({20.1F}, 5));
    EXPECT_EQ(IdsIn(call->answer),
              (std::vector<std::string>{"id20", "id21", "id19", "id22", "id18"}));
    EXPECT_EQ(FoundIn(call->answer).front().payload, "about id20");
    EXPECT_EQ(call->answer.metric, Metric::kL2);
    EXPECT_EQ(rig.DoWell(rig.Recall({20.1F}, 1000))->answer.hit_count, 60u);
    rig.ExpectIdle();
  }
}

TEST(GatewayCoreTest, AttributesArriveWithTheirObservation) {
  GatewayRig rig;
  std::string attributes;
  ASSERT_TRUE(AppendAttribute("source", "docs", &attributes));
  ASSERT_TRUE(AppendAttribute(kTagKey, std::string(255, 't'), &attributes));
  TestCall* call = rig.Remember("a", {1, 2});
  call->question.attributes = attributes;
  rig.DoWell(call);
  rig.DoWell(rig.Remember("b", {1, 2}));
  const auto& a = rig.OwnerOf("a").spaces["s"].at("a");
  EXPECT_EQ(a.attributes, attributes);
  EXPECT_EQ(a.payload, "about a");
  EXPECT_EQ(rig.OwnerOf("b").spaces["s"].at("b").attributes, "");
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, AFilterGoesToEveryPartition) {
  GatewayRig rig;
  for (int i = 0; i < 40; ++i) rig.DoWell(rig.Remember(IdOf(i), {1}));
  FilterWriter writer;
  const std::array<std::string_view, 1> values{"docs"};
  ASSERT_TRUE(writer.Require("source", values));
  const std::string filter = writer.Bytes();
  TestCall* call = rig.Recall({1}, 1);
  call->question.filter = filter;
  rig.DoWell(call);
  for (const auto& shard : rig.shards) EXPECT_EQ(shard->last_filter, filter);
  rig.DoWell(rig.Recall({1}, 1));
  for (const auto& shard : rig.shards) EXPECT_EQ(shard->last_filter, "");
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, ASnapshotIsTheLeastOfThePartitions) {
  GatewayRig rig;
  rig.DoWell(rig.Remember("a", {1}));
  // Those that sleep are complete up to now.
  rig.shards[1]->Publish(7'000);
  rig.shards[3]->Publish(5'000);
  TestCall* call = rig.Recall({1}, 1);
  call->question.snapshot_isolation = true;
  rig.DoWell(call);
  EXPECT_EQ(call->answer.snapshot, 5'000u);
  for (const auto& shard : rig.shards) EXPECT_EQ(shard->last_snapshot, 5'000u);
  rig.shards[1]->Publish(kOpenStamp);
  rig.shards[3]->Publish(kOpenStamp);
  call = rig.Recall({1}, 1);
  call->question.snapshot_isolation = true;
  rig.DoWell(call);
  EXPECT_GT(call->answer.snapshot, 7'000u);
  EXPECT_LE(UnixNsOf(call->answer.snapshot), rig.clock.WallNs());
  rig.DoWell(rig.Recall({1}, 1));
  for (const auto& shard : rig.shards) EXPECT_EQ(shard->last_snapshot, kNoStamp);
}

TEST(GatewayCoreTest, AGetFindsIdsAlsoWhereTheyWereBeforeTheSpaceGrew) {
  GatewayRig rig({.partitions = 1});
  for (int i = 0; i < 20; ++i) rig.DoWell(rig.Remember(IdOf(i), {1}));
  ASSERT_TRUE(rig.space()->Grow(1));
  for (int i = 20; i < 40; ++i) rig.DoWell(rig.Remember(IdOf(i), {1}));
  ASSERT_TRUE(rig.space()->Grow(2));
  for (int i = 40; i < 60; ++i) rig.DoWell(rig.Remember(IdOf(i), {1}));
  std::vector<std::string> ids;
  for (int i = 0; i < 60; ++i) ids.push_back(IdOf(i));
  ids.push_back("not there");
  // More than the requests that one call may have under way.
  TestCall* call = rig.DoWell(rig.Get(ids));
  std::vector<std::string> found = IdsIn(call->answer);
  std::ranges::sort(found);
  ids.pop_back();
  std::ranges::sort(ids);
  EXPECT_EQ(found, ids);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, AScrollHandsOutEveryObservationOnce) {
  for (const uint16_t limit : {1, 7, 60, 1000}) {
    GatewayRig rig;
    std::set<std::string> wanted;
    for (int i = 0; i < 60; ++i) {
      rig.DoWell(rig.Remember(IdOf(i), {1}));
      wanted.insert(IdOf(i));
    }
    std::multiset<std::string> seen;
    TestCall* page = rig.DoWell(rig.Scroll(limit));
    for (;;) {
      EXPECT_LE(page->answer.hit_count, limit);
      for (const std::string& id : IdsIn(page->answer)) seen.insert(id);
      if (page->answer.scroll_ended) break;
      EXPECT_GT(page->answer.hit_count, 0u);
      page = rig.DoWell(rig.Scroll(limit, page->answer.next_partition, page->answer.next_cursor));
    }
    EXPECT_EQ(seen.size(), 60u);
    EXPECT_EQ(std::set(seen.begin(), seen.end()), wanted);
    rig.ExpectIdle();
  }
}

TEST(GatewayCoreTest, AScrollsPageEndsBeforeItIsTooLargeForAnAnswer) {
  GatewayRig rig;
  constexpr int kCount = 150;
  rig.RememberLarge(kCount, 30'000);
  std::set<std::string> seen;
  int pages = 0;
  TestCall* page = rig.DoWell(rig.Scroll(1000));
  for (;; ++pages) {
    EXPECT_LT(page->answer.hits.size(), size_t{4} << 20);
    for (const Found& found : FoundIn(page->answer)) {
      EXPECT_EQ(found.payload.size(), 30'000u);
      seen.insert(found.id);
    }
    if (page->answer.scroll_ended) break;
    page = rig.DoWell(rig.Scroll(1000, page->answer.next_partition, page->answer.next_cursor));
  }
  EXPECT_EQ(seen.size(), size_t{kCount});
  EXPECT_EQ(pages, 2) << "4.5 MB, and 2 MiB a page";
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, AScrollPassesPartitionsThatDoNotKnowTheSpace) {
  GatewayRig rig;
  rig.DoWell(rig.Remember("only", {1}));
  EXPECT_EQ(IdsIn(rig.DoWell(rig.Scroll(10))->answer), std::vector<std::string>{"only"});
  const TestCall* beyond = rig.DoWell(rig.Scroll(10, 4, 0));
  EXPECT_EQ(beyond->answer.hit_count, 0u) << "a partition that there is not";
  EXPECT_TRUE(beyond->answer.scroll_ended);
}

TEST(GatewayCoreTest, ASpaceThatNobodyWroteToIsEmptyAndStaysUnknown) {
  GatewayRig rig;
  EXPECT_EQ(rig.DoWell(rig.Recall({1}, 10))->answer.hit_count, 0u);
  EXPECT_EQ(rig.DoWell(rig.Get({"a"}))->answer.hit_count, 0u);
  EXPECT_TRUE(rig.DoWell(rig.Scroll(10))->answer.scroll_ended);
  EXPECT_FALSE(rig.DoWell(rig.Forget("a"))->answer.existed);
  EXPECT_EQ(rig.sent(), 0u);
  EXPECT_EQ(rig.space(), nullptr);
}

TEST(GatewayCoreTest, ARefusedVectorTakesNoSlotAndNamesTheDimension) {
  GatewayRig rig;
  rig.DoWell(rig.Remember("a", {1, 2, 3}));
  const uint64_t sent = rig.sent();
  const TestCall* wrong = rig.Do(rig.Remember("b", {1, 2}));
  EXPECT_EQ(wrong->answer.reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(wrong->answer.space_dimension, 3);
  const TestCall* recall = rig.Do(rig.Recall({1, 2, 3, 4}, 5));
  EXPECT_EQ(recall->answer.reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(recall->answer.space_dimension, 3);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(rig.Do(rig.Remember("b", {1, nan, 3}))->answer.reason, RefusalReason::kNotFinite);
  EXPECT_EQ(rig.Do(rig.Recall({1, nan, 3}, 5))->answer.reason, RefusalReason::kNotFinite);
  EXPECT_EQ(rig.sent(), sent) << "no shard was bothered";
  rig.ExpectIdle();
}

// Two observations of different dimensions race for a new space: the shard decides.
TEST(GatewayCoreTest, TheShardsOwnRefusalComesBackWithTheDimension) {
  GatewayRig rig({.shards = 1, .partitions = 1});
  rig.SetAnswers(false);
  TestCall* first = rig.Do(rig.Remember("a", {1, 2, 3}));
  TestCall* second = rig.Do(rig.Remember("b", {1, 2}));
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_EQ(first->answer.reason, RefusalReason::kNone);
  EXPECT_EQ(second->answer.reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(second->answer.space_dimension, 3);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, ADeadlineAnswersAtOnceAndTheSlotsComeBackLater) {
  GatewayRig rig;
  rig.DoWell(rig.Remember("a", {1}));
  rig.SetAnswers(false);
  const uint32_t free = rig.free_slots();
  TestCall* call = rig.Recall({1}, 5);
  call->question.deadline_ns = rig.clock.MonotonicNs() + 50 * kNanosPerMilli;
  rig.Do(call);
  for (const auto& shard : rig.shards) {
    ASSERT_EQ(shard->held(), 1u);
    EXPECT_EQ(shard->held_header(0).deadline_ns, call->question.deadline_ns);
  }
  rig.clock.AdvanceNs(49 * kNanosPerMilli);
  rig.Settle();
  EXPECT_EQ(call->answered, 0);
  rig.clock.AdvanceNs(10 * kNanosPerMilli);
  rig.Settle();
  EXPECT_EQ(call->answered, 1);
  EXPECT_EQ(call->answer.reason, RefusalReason::kDeadlinePassed);
  EXPECT_EQ(rig.free_slots(), free - 4) << "the shards have them still";
  EXPECT_EQ(rig.core->calls_under_way(), 1u);
  rig.SetAnswers(true);
  rig.Settle();
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, ADeadlineThatPassedAlreadyAsksNobody) {
  GatewayRig rig;
  rig.DoWell(rig.Remember("a", {1}));
  const uint64_t sent = rig.sent();
  TestCall* call = rig.Recall({1}, 5);
  call->question.deadline_ns = rig.clock.MonotonicNs();
  rig.Do(call);
  EXPECT_EQ(call->answer.reason, RefusalReason::kDeadlinePassed);
  EXPECT_EQ(rig.sent(), sent);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, ACancelledCallIsMarkedInItsSlotsAndNotDone) {
  GatewayRig rig;
  rig.DoWell(rig.Remember("a", {1}));
  rig.SetAnswers(false);
  TestCall* recall = rig.Do(rig.Recall({1}, 5));
  TestCall* remember = rig.Do(rig.Remember("b", {2}));
  rig.door->Cancel(recall);
  rig.door->Cancel(remember);
  rig.Settle();
  EXPECT_EQ(recall->answer.reason, RefusalReason::kCancelled);
  EXPECT_EQ(remember->answer.reason, RefusalReason::kCancelled);
  for (const auto& shard : rig.shards) {
    for (size_t i = 0; i < shard->held(); ++i) EXPECT_TRUE(IsCancelled(shard->held_header(i)));
  }
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_FALSE(rig.OwnerOf("b").spaces["s"].contains("b"));
  EXPECT_EQ(rig.core->counter(GatewayCounter::kCallsAbandoned).Read(), 2u);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, ACancelThatComesTooLateDoesNothing) {
  GatewayRig rig;
  TestCall* call = rig.DoWell(rig.Remember("a", {1}));
  rig.door->Cancel(call);
  rig.SetAnswers(false);
  TestCall* next = rig.Do(rig.Remember("b", {1}));
  EXPECT_EQ(next->answered, 0) << "whoever got the place of the first call goes on";
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_EQ(next->answer.reason, RefusalReason::kNone);
  rig.ExpectIdle();
}

// The results of a recall whose asker has gone are on their way already.
TEST(GatewayCoreTest, ResultsOfAnAbandonedCallAreGivenBack) {
  for (const uint16_t partitions : {1, 4}) {
    GatewayRig rig({.partitions = partitions});
    for (int i = 0; i < 20; ++i) rig.DoWell(rig.Remember(IdOf(i), {1}));
    TestCall* call = rig.Recall({1}, 10);
    EXPECT_TRUE(rig.door->Submit(call));
    rig.core->Poll();
    for (auto& shard : rig.shards) shard->Poll();
    call->question.deadline_ns = 0;
    rig.door->Cancel(call);
    // The cancel is taken in the same round as some of the answers.
    rig.Settle();
    rig.ExpectIdle();
  }
}

TEST(GatewayCoreTest, AShardsRefusalEndsTheCallWithItsRetryTime) {
  GatewayRig rig;
  rig.DoWell(rig.Remember("a", {1}));
  rig.shards[1]->refuses = RefusalReason::kBacklogFull;
  rig.shards[1]->retry_after_ms = 321;
  const TestCall* recall = rig.Do(rig.Recall({1}, 5));
  EXPECT_EQ(recall->answer.reason, RefusalReason::kBacklogFull);
  EXPECT_EQ(recall->answer.retry_after_ms, 321u);
  int refused = 0;
  for (int i = 0; i < 20; ++i) {
    const TestCall* call = rig.Do(rig.Remember(IdOf(i), {1}));
    const bool owner = &rig.OwnerOf(IdOf(i)) == rig.shards[1].get();
    EXPECT_EQ(call->answer.reason, owner ? RefusalReason::kBacklogFull : RefusalReason::kNone);
    EXPECT_TRUE(!owner || call->answer.retry_after_ms == 321u);
    refused += owner ? 1 : 0;
  }
  EXPECT_GT(refused, 0);
  rig.ExpectIdle();
}

TEST(GatewayCoreTest, IntrospectAsksEveryShard) {
  GatewayRig rig;
  for (int i = 0; i < 30; ++i) rig.DoWell(rig.Remember(IdOf(i), {1}));
  rig.DoWell(rig.Remember("x", {1}, "other"));
  const TestCall* call = rig.DoWell(rig.NewCall(CallKind::kIntrospect));
  uint64_t observations = 0;
  for (size_t at = 0; at < call->answer.records.size();) {
    SpaceRecord record;
    std::memcpy(&record, call->answer.records.data() + at, sizeof(record));
    observations += record.observations;
    at += record.record_bytes;
  }
  EXPECT_EQ(observations, 31u);
  rig.ExpectIdle();
}

// Calls of all kinds, shards that stop and go on, cancels and deadlines, in an order drawn from a
// seed: every call is answered once, and nothing is lost.
TEST(GatewayCoreTest, RandomProgramsAnswerEveryCallOnce) {
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    SCOPED_TRACE(seed);
    SplitMix64 random(seed);
    GatewayRig rig({.partitions = static_cast<uint16_t>(1 << random.Below(3)),
                    .lane_capacity = 32,
                    .recall_lane_capacity = 8,
                    .gateway = {.max_calls = 12, .inbox_capacity = 16, .max_merges = 3}});
    std::vector<TestCall*> open;
    for (int step = 0; step < 1'500; ++step) {
      switch (random.Below(12)) {
        case 0: {
          GatewayFakeShard& shard = *rig.shards[random.Below(4)];
          (random.Below(2) == 0 ? shard.takes : shard.answers) = random.Below(3) > 0;
          break;
        }
        case 1:
          if (!open.empty()) rig.door->Cancel(open[random.Below(open.size())]);
          break;
        case 2:
          rig.clock.AdvanceNs(static_cast<int64_t>(random.Below(10)) * kNanosPerMilli);
          break;
        case 3:
          rig.shards[random.Below(4)]->refuses =
              random.Below(4) == 0 ? RefusalReason::kMemoryFull : RefusalReason::kNone;
          break;
        case 4:
          if (rig.space() != nullptr && step % 16 == 0)
            rig.space()->Grow(rig.space()->partitions());
          break;
        case 5:
        case 6:
        case 7: {
          TestCall* call = nullptr;
          const std::string id = IdOf(static_cast<int>(random.Below(50)));
          switch (random.Below(6)) {
            case 0:
              call = rig.Forget(id);
              break;
            case 1:
              call = rig.Recall({1}, 5);
              break;
            case 2:
              call = rig.Get({id, "id1", "id2", "id3", "id4", "id5", "id6", "id7"});
              break;
            case 3:
              call = rig.Scroll(3);
              break;
            case 4:
              call = rig.NewCall(CallKind::kIntrospect);
              break;
            default:
              call = rig.Remember(id, {1});
          }
          if (random.Below(3) == 0) {
            call->question.deadline_ns =
                rig.clock.MonotonicNs() + static_cast<int64_t>(random.Below(30)) * kNanosPerMilli;
          }
          if (rig.door->Submit(call)) {
            open.push_back(call);
          } else {
            ++call->answered;  // As a transport does.
          }
          break;
        }
        case 8:
          rig.core->Poll();
          break;
        default:
          rig.shards[random.Below(4)]->Poll();
      }
    }
    for (auto& shard : rig.shards) shard->takes = shard->answers = true;
    rig.Settle();
    rig.ExpectIdle();
    for (const TestCall* call : open) ASSERT_EQ(call->answered, 1);
  }
}

}  // namespace
}  // namespace engram
