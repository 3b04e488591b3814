// What a gateway core refuses for want of room, and that it loses nothing over it.

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tests/control/gateway_rig.h"

namespace engram {
namespace {

TEST(GatewayLimitsTest, AFullTableRefusesAndSaysWhenToRetry) {
  GatewayRig rig({.gateway = {.max_calls = 2, .inbox_capacity = 16, .max_merges = 4}});
  rig.SetAnswers(false);
  TestCall* first = rig.Do(rig.Remember("a", {1}));
  rig.Do(rig.Remember("b", {1}));
  TestCall* third = rig.Do(rig.Remember("c", {1}));
  EXPECT_EQ(third->answered, 1);
  EXPECT_EQ(third->answer.reason, RefusalReason::kQueueFull);
  EXPECT_GE(third->answer.retry_after_ms, 1u);
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_EQ(first->answer.reason, RefusalReason::kNone);
  EXPECT_EQ(rig.DoWell(rig.Remember("c", {1}))->answered, 1);
  rig.ExpectIdle();
}

TEST(GatewayLimitsTest, AFullInboxIsARefusal) {
  GatewayRig rig({.gateway = {.max_calls = 2, .inbox_capacity = 4, .max_merges = 4}});
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(rig.door->Submit(rig.Forget("a")));
  TestCall* refused = rig.Forget("a");
  EXPECT_FALSE(rig.door->Submit(refused));
  rig.Settle();
  EXPECT_EQ(refused->answered, 0) << "the transport answers what was not taken";
  EXPECT_GE(rig.door->RetryAfterMs(), 1u);
  EXPECT_TRUE(rig.door->Submit(refused));
  rig.Settle();
  rig.ExpectIdle();
}

TEST(GatewayLimitsTest, AFullRingRefusesWithoutLosingASlot) {
  GatewayRig rig({.recall_lane_capacity = 2, .gateway = {.max_calls = 64, .inbox_capacity = 64}});
  rig.DoWell(rig.Remember("a", {1}));
  rig.shards[2]->takes = false;
  int refused = 0;
  for (int i = 0; i < 5; ++i) {
    const TestCall* call = rig.Do(rig.Recall({1}, 1));
    if (call->answered == 0) continue;
    ++refused;
    EXPECT_EQ(call->answer.reason, RefusalReason::kQueueFull);
    EXPECT_GE(call->answer.retry_after_ms, 1u);
  }
  EXPECT_EQ(refused, 3) << "two wait in the ring of the shard that stands still";
  const TestCall* introspect = rig.Do(rig.NewCall(CallKind::kIntrospect));
  EXPECT_EQ(introspect->answer.reason, RefusalReason::kQueueFull);
  rig.shards[2]->takes = true;
  rig.Settle();
  rig.ExpectIdle();
}

TEST(GatewayLimitsTest, SpentSlotsRefuseWithoutLosingAny) {
  // 8 slots of 1 KiB; one in ten of a size is kept for high priority.
  GatewayRig rig({.lane_capacity = 8});
  rig.DoWell(rig.Remember("a", {1}));
  rig.SetAnswers(false);
  TestCall* first = rig.Do(rig.Recall({1}, 1));
  TestCall* second = rig.Do(rig.Recall({1}, 1));
  TestCall* third = rig.Do(rig.Recall({1}, 1));
  EXPECT_EQ(first->answered + second->answered, 0);
  EXPECT_EQ(third->answer.reason, RefusalReason::kSlotsExhausted);
  EXPECT_EQ(rig.Do(rig.Remember("b", {1}))->answer.reason, RefusalReason::kSlotsExhausted);
  EXPECT_EQ(rig.Do(rig.Get({"a"}))->answer.reason, RefusalReason::kSlotsExhausted);
  EXPECT_EQ(rig.Do(rig.NewCall(CallKind::kIntrospect))->answer.reason,
            RefusalReason::kSlotsExhausted);
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_EQ(first->answer.reason, RefusalReason::kNone);
  rig.ExpectIdle();
}

// Room is kept for observations of high priority; recalls may use it.
TEST(GatewayLimitsTest, ObservationsLeaveATenthOfTheSlots) {
  GatewayRig rig({.shards = 1, .partitions = 1, .lane_capacity = 20});
  rig.SetAnswers(false);
  int stored = 0;
  while (rig.Do(rig.Remember(IdOf(stored), {1}))->answered == 0) ++stored;
  EXPECT_EQ(stored, 18);
  EXPECT_EQ(rig.Do(rig.Recall({1}, 1))->answered, 0);
  rig.SetAnswers(true);
  rig.Settle();
  rig.ExpectIdle();
}

TEST(GatewayLimitsTest, TooManyMergesAreARefusal) {
  GatewayRig rig({.gateway = {.max_calls = 64, .inbox_capacity = 64, .max_merges = 1}});
  rig.DoWell(rig.Remember("a", {1}));
  rig.SetAnswers(false);
  TestCall* first = rig.Do(rig.Recall({1}, 1));
  TestCall* second = rig.Do(rig.Recall({1}, 1));
  EXPECT_EQ(second->answer.reason, RefusalReason::kMergesFull);
  rig.SetAnswers(true);
  rig.Settle();
  EXPECT_EQ(IdsIn(first->answer), std::vector<std::string>{"a"});
  rig.DoWell(rig.Recall({1}, 1));
  rig.ExpectIdle();
}

// Pages that grow at the same time, each within its bound, together beyond theirs.
TEST(GatewayLimitsTest, AnswersTakeNoMoreMemoryThanTheyMay) {
  GatewayRig rig({.gateway = {.max_calls = 64,
                              .inbox_capacity = 64,
                              .max_merges = 4,
                              .answer_memory_bytes = 500'000}});
  rig.RememberLarge(40, 10'000);
  std::vector<TestCall*> pages;
  for (int i = 0; i < 3; ++i) {
    pages.push_back(rig.Scroll(1000));
    ASSERT_TRUE(rig.door->Submit(pages.back()));
  }
  rig.Settle();
  int whole = 0;
  for (const TestCall* page : pages) {
    ASSERT_EQ(page->answered, 1);
    if (page->answer.reason == RefusalReason::kNone) {
      EXPECT_EQ(page->answer.hit_count, 40u);
      ++whole;
    } else {
      EXPECT_EQ(page->answer.reason, RefusalReason::kSlotsExhausted);
      EXPECT_GE(page->answer.retry_after_ms, 1u);
    }
  }
  EXPECT_LT(whole, 3) << "1.2 MB of answers at the same time";
  // What they took is given back, also by those that were refused or cancelled.
  for (int round = 0; round < 5; ++round) {
    TestCall* left = rig.Scroll(1000);
    ASSERT_TRUE(rig.door->Submit(left));
    rig.core->Poll();
    for (auto& shard : rig.shards) shard->Poll();
    rig.core->Poll();
    rig.door->Cancel(left);
    rig.Settle();
    EXPECT_EQ(rig.DoWell(rig.Scroll(1000))->answer.hit_count, 40u);
  }
  rig.ExpectIdle();
}

TEST(GatewayLimitsTest, AMergedAnswerCountsToo) {
  GatewayRig rig({.gateway = {.max_calls = 64,
                              .inbox_capacity = 64,
                              .max_merges = 4,
                              .answer_memory_bytes = 200'000}});
  rig.RememberLarge(40, 10'000);
  for (int round = 0; round < 3; ++round) {
    TestCall* large = rig.Recall({1}, 40);
    large->question.with_payload = true;
    rig.Do(large);
    EXPECT_EQ(large->answered, 1);
    EXPECT_EQ(large->answer.reason, RefusalReason::kSlotsExhausted);
    EXPECT_GE(large->answer.retry_after_ms, 1u);
    TestCall* small = rig.Recall({1}, 10);
    small->question.with_payload = true;
    EXPECT_EQ(rig.DoWell(small)->answer.hit_count, 10u) << "what was taken is given back";
  }
  rig.ExpectIdle();
}

}  // namespace
}  // namespace engram
