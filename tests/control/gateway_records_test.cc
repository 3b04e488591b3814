// A gateway core whose payloads lie in logs.

#include <gtest/gtest.h>

#include <cstddef>
#include <set>
#include <string>
#include <vector>

#include "tests/control/gateway_rig.h"
#include "tests/dataplane/fake_log_disk.h"

namespace engram {
namespace {

class GatewayRecordsTest : public testing::Test {
 public:
  GatewayRecordsTest() : rig_({.logs = &logs_}) {
    logs_.ends_at_once = true;
    for (int i = 0; i < kIds; ++i) {
      TestCall* call = rig_.Remember(IdOf(i), {static_cast<float>(i), 1});
      rig_.DoWell(call);
    }
    logs_.ends_at_once = false;
  }
  ~GatewayRecordsTest() override {
    EXPECT_TRUE(PinsAreLeft());
    EXPECT_EQ(rig_.core->records()->under_way(), 0u);
    rig_.ExpectIdle();
  }

 protected:
  bool PinsAreLeft() { return logs_.pins.Passed(logs_.pins.Close()); }
  // The shards answer; the disk does not.
  void Run(int steps = 20) {
    for (int i = 0; i < steps; ++i) {
      rig_.core->Poll();
      for (auto& shard : rig_.shards) shard->Poll();
    }
  }
  std::vector<Found> Finish(TestCall* call) {
    for (int i = 0; i < 1'000 && call->answered == 0; ++i) {
      if (!logs_.reads.empty()) logs_.End(logs_.reads.size() - 1);
      Run(1);
    }
    EXPECT_EQ(call->answered, 1);
    EXPECT_EQ(call->answer.reason, RefusalReason::kNone);
    return FoundIn(call->answer);
  }

  static constexpr int kIds = 60;
  FakeLogs logs_;
  GatewayRig rig_;
};

TEST_F(GatewayRecordsTest, ARecallHasThePayloadsOfTheBestAlone) {
  for (const bool with_vector : {false, true}) {
    TestCall* call = rig_.Recall({0, 1}, 10);
    call->question.with_vector = with_vector;
    ASSERT_TRUE(rig_.door->Submit(call));
    Run();
    EXPECT_EQ(call->answered, 0);
    EXPECT_EQ(logs_.reads.size(), 10u);
    EXPECT_FALSE(PinsAreLeft());
    const auto found = Finish(call);
    ASSERT_EQ(found.size(), 10u);
    for (int i = 0; i < 10; ++i) {
      EXPECT_EQ(found[static_cast<size_t>(i)].id, IdOf(i));
      EXPECT_EQ(found[static_cast<size_t>(i)].payload, "about " + IdOf(i));
      EXPECT_EQ(found[static_cast<size_t>(i)].header.flags, 0);
      EXPECT_EQ(found[static_cast<size_t>(i)].header.confidence, 0.5F);
      EXPECT_EQ(found[static_cast<size_t>(i)].header.vector_dimension, with_vector ? 2 : 0);
    }
  }
}

TEST_F(GatewayRecordsTest, GetsAndScrollsAreReadInWindows) {
  std::vector<std::string> ids;
  for (int i = 0; i < kIds; ++i) ids.push_back(IdOf(i));
  TestCall* get = rig_.Get(ids);
  ASSERT_TRUE(rig_.door->Submit(get));
  Run(100);
  EXPECT_EQ(logs_.reads.size(), HitWindow::kHits);
  std::set<std::string> seen;
  for (const Found& found : Finish(get)) {
    EXPECT_EQ(found.payload, "about " + found.id);
    seen.insert(found.id);
  }
  EXPECT_EQ(seen.size(), size_t{kIds});
  TestCall* scroll = rig_.Scroll(1'000);
  ASSERT_TRUE(rig_.door->Submit(scroll));
  Run(100);
  seen.clear();
  for (const Found& found : Finish(scroll)) {
    EXPECT_EQ(found.payload, "about " + found.id);
    seen.insert(found.id);
  }
  EXPECT_EQ(seen.size(), size_t{kIds});
}

TEST_F(GatewayRecordsTest, IdsAloneAreNotRead) {
  TestCall* call = rig_.Recall({0, 1}, 10);
  call->question.with_payload = false;
  rig_.DoWell(call);
  EXPECT_TRUE(logs_.reads.empty());
  EXPECT_TRUE(PinsAreLeft());
}

// Whoever asked has gone, or waits no longer, while records are read.
TEST_F(GatewayRecordsTest, AnAbandonedCallLeavesNothingBehind) {
  TestCall* recall = rig_.Recall({0, 1}, 10);
  recall->question.deadline_ns = rig_.clock.MonotonicNs() + kNanosPerSecond;
  TestCall* get = rig_.Get({IdOf(1), IdOf(2)});
  ASSERT_TRUE(rig_.door->Submit(recall));
  ASSERT_TRUE(rig_.door->Submit(get));
  Run();
  EXPECT_EQ(logs_.reads.size(), 12u);
  rig_.door->Cancel(get);
  rig_.clock.AdvanceNs(2 * kNanosPerSecond);
  Run();
  EXPECT_EQ(recall->answered, 1);
  EXPECT_EQ(recall->answer.reason, RefusalReason::kDeadlinePassed);
  EXPECT_EQ(get->answered, 1);
  EXPECT_EQ(get->answer.reason, RefusalReason::kCancelled);
  EXPECT_TRUE(PinsAreLeft());
  EXPECT_EQ(rig_.core->calls_under_way(), 0u);
  EXPECT_EQ(rig_.core->records()->under_way(), 12u) << "the disk still has the memory";
  logs_.EndAll();
  Run();
}

// A page ends by what it will hold, not by what the shards sent.
TEST_F(GatewayRecordsTest, AScrollsPageIsBoundedWithItsPayloads) {
  logs_.ends_at_once = true;
  for (auto& shard : rig_.shards) {
    for (auto& [id, kept] : shard->spaces["s"]) kept.payload = std::string(60'000, 'x');
  }
  TestCall* scroll = rig_.Scroll(1'000);
  rig_.DoWell(scroll);
  EXPECT_FALSE(scroll->answer.scroll_ended);
  EXPECT_GT(scroll->answer.hits.size(), size_t{2} << 20);
  EXPECT_LT(scroll->answer.hits.size(), size_t{4} << 20);
}

}  // namespace
}  // namespace engram
