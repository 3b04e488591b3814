// What an operator asks of an ingress core: introspection, status, holds on the files, checkpoints,
// commands to a space.

#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "tests/dataplane/ingest_rig.h"

namespace engram {
namespace {

using IngestOperatorTest = IngestCoreTest;

TEST_F(IngestOperatorTest, IntrospectionGathersAllShards) {
  HarnessOptions options = CalmOptions();
  options.shards = 3;
  Start(options);
  TestClient& client = Greeted();
  for (size_t s = 0; s < 3; ++s) {
    h().shard(s).records = {{"a" + std::to_string(s), 1}, {"b" + std::to_string(s), 1}};
  }
  h().shard(1).SetStalled(true);
  client.Send(IntrospectBytes(5, 1));
  h().Settle();
  client.Send(IntrospectBytes(6, 1));
  EXPECT_EQ(OnlyNak(client).reason, CodeOf(RefusalReason::kBusy));
  EXPECT_EQ(client.Of(kWireNak)[0].sequence, 6u);
  h().shard(1).SetStalled(false);
  const auto answers = client.Await(kWireIntrospection);
  ASSERT_EQ(answers.size(), 6u);
  std::set<std::string> bodies;
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(answers[i].sequence, 5u);
    EXPECT_EQ(answers[i].flags, i < 5 ? 1u : 0u) << i;
    EXPECT_EQ(WireNumber(answers[i].body, 0, 2), 1u);
    EXPECT_EQ(WireNumber(answers[i].body, 2, 1), 1u);
    bodies.insert(WireText(std::span(answers[i].body).subspan(8)).data());
  }
  client.Forget();
  client.Send(IntrospectBytes(8, 1));
  EXPECT_EQ(client.Await(kWireIntrospection).size(), 6u);
}

TEST_F(IngestOperatorTest, IntrospectionAsksEveryShardOrNone) {
  HarnessOptions options = CalmOptions();
  options.shards = 3;
  options.lane_capacity = 4;  // as many of the smallest slots
  Start(options);
  TestClient& client = Greeted();
  for (size_t s = 0; s < 3; ++s) h().shard(s).SetHeld(RequestKind::kRecall, true);
  client.Send(RecallBytes(1, F32Recall(kVector)));
  client.Send(RecallBytes(2, F32Recall(kVector)));
  h().Settle();
  // Two slots are left for three shards.
  client.Send(IntrospectBytes(3, 1));
  const WireNak nak = OnlyNak(client);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kSlotsExhausted));
  EXPECT_GE(nak.retry_after_ms, 1u);
  EXPECT_TRUE(client.Of(kWireIntrospection).empty());
  for (size_t s = 0; s < 3; ++s) h().shard(s).SetHeld(RequestKind::kRecall, false);
  h().Settle();
  client.Send(IntrospectBytes(4, 1));
  EXPECT_EQ(client.Await(kWireIntrospection).size(), 3u);
}

TEST_F(IngestOperatorTest, StatusIsLinesOfText) {
  TestClient& client = Greeted();
  // More than one frame's worth.
  std::vector<Counter> counters(3000);
  for (size_t i = 0; i < counters.size(); ++i) {
    counters[i].Add(i);
    h().catalogue().push_back({"core" + std::to_string(i), "made_up_counter_name", &counters[i]});
  }
  client.Send(IntrospectBytes(11, 2));
  const auto answers = client.Await(kWireIntrospection);
  ASSERT_GE(answers.size(), 2u);
  std::string text;
  for (size_t i = 0; i < answers.size(); ++i) {
    EXPECT_EQ(answers[i].sequence, 11u);
    EXPECT_EQ(answers[i].flags, i + 1 < answers.size() ? 1u : 0u);
    EXPECT_EQ(WireNumber(answers[i].body, 2, 1), 2u);
    text += WireText(std::span(answers[i].body).subspan(8));
  }
  EXPECT_NE(text.find("ingress0 connections_opened 1\n"), std::string::npos);
  for (size_t i = 0; i < counters.size(); ++i) {
    const std::string line =
        "core" + std::to_string(i) + " made_up_counter_name " + std::to_string(i) + "\n";
    ASSERT_NE(text.find(line), std::string::npos) << line;
  }
  client.Send(IntrospectBytes(12, 6));
  ExpectRefusedAndClosed(client, RefusalReason::kBadFrame);
}

TEST_F(IngestOperatorTest, FilesAreHeldForAWhileOrUntilTheyNeedNotBe) {
  HarnessOptions options = CalmOptions();
  options.ingest.lease = &lease_;
  Start(options);
  const auto left_ns = [&] {
    return lease_.Extend(FileLease::kNobody, h().clock().MonotonicNs(), 0);
  };
  TestClient& client = Greeted();
  client.Send(IntrospectBytes(11, 4));
  EXPECT_EQ(client.Await(kWireIntrospection).size(), 1u);
  EXPECT_GT(left_ns(), 9 * kNanosPerSecond);
  h().clock().AdvanceNs(5 * kNanosPerSecond);
  EXPECT_LT(left_ns(), 6 * kNanosPerSecond);
  client.Send(IntrospectBytes(12, 4));
  EXPECT_EQ(client.Await(kWireIntrospection).size(), 2u);
  EXPECT_GT(left_ns(), 9 * kNanosPerSecond);
  client.Send(IntrospectBytes(13, 5));
  EXPECT_EQ(client.Await(kWireIntrospection).size(), 3u);
  EXPECT_FALSE(lease_.Runs(h().clock().MonotonicNs()));
}

TEST_F(IngestOperatorTest, AHoldIsItsConnectionsAlone) {
  HarnessOptions options = CalmOptions();
  options.ingest.lease = &lease_;
  Start(options);
  TestClient& first = Greeted();
  TestClient& second = Greeted();
  first.Send(IntrospectBytes(11, 4));
  EXPECT_EQ(first.Await(kWireIntrospection).size(), 1u);
  second.Send(IntrospectBytes(21, 4));
  const WireNak nak = OnlyNak(second);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kBusy));
  EXPECT_GT(nak.retry_after_ms, 9'000u);
  EXPECT_LE(nak.retry_after_ms, 10'001u);
  EXPECT_NE(nak.text.find("holds the files"), std::string::npos) << nak.text;
  second.Send(IntrospectBytes(22, 5));
  EXPECT_EQ(second.Await(kWireIntrospection).size(), 1u);
  EXPECT_TRUE(lease_.Runs(h().clock().MonotonicNs())) << "another has released it";
  // It ends with its connection.
  first.Close();
  h().Settle();
  EXPECT_FALSE(lease_.Runs(h().clock().MonotonicNs()));
  second.Send(IntrospectBytes(23, 4));
  EXPECT_EQ(second.Await(kWireIntrospection).size(), 2u);
  EXPECT_TRUE(lease_.Runs(h().clock().MonotonicNs()));
}

TEST_F(IngestOperatorTest, ACheckpointIsAskedForAndAnsweredAtOnce) {
  std::atomic<uint64_t> requests{0};
  HarnessOptions options = CalmOptions();
  options.ingest.checkpoint_requests = &requests;
  Start(options);
  TestClient& client = Greeted();
  client.Send(IntrospectBytes(13, 3));
  const auto answers = client.Await(kWireIntrospection);
  ASSERT_EQ(answers.size(), 1u);
  EXPECT_EQ(answers[0].sequence, 13u);
  EXPECT_EQ(WireNumber(answers[0].body, 2, 1), 3u);
  EXPECT_EQ(requests.load(), 1u);
}

// What a drop or a compaction leaves in the logs is to go the same way, whether or not somebody
// still waits to be told.
TEST_F(IngestOperatorTest, ACommandWhoseClientHasGoneIsFollowedUp) {
  std::atomic<uint64_t> checkpoints{0};
  std::atomic<uint64_t> compactions{0};
  HarnessOptions options = CalmOptions();
  options.shards = 3;
  options.ingest.checkpoint_requests = &checkpoints;
  options.ingest.compaction_requests = &compactions;
  Start(options);
  Greeted();
  for (const SpaceCommand what : {SpaceCommand::kCompact, SpaceCommand::kDrop}) {
    TestClient& client = Greeted();
    for (size_t s = 0; s < 3; ++s) h().shard(s).SetHeld(RequestKind::kCommand, true);
    client.Send(CommandBytes(1, static_cast<uint8_t>(what), "default"));
    h().Settle();
    // One answers before it goes, where it can.
    h().shard(0).SetHeld(RequestKind::kCommand, false);
    h().Settle();
    client.Abort();
    h().Settle();
    EXPECT_EQ(checkpoints.load(), 0u);
    h().shard(1).SetHeld(RequestKind::kCommand, false);
    h().Settle();
    EXPECT_EQ(compactions.load(), what == SpaceCommand::kDrop ? 1u : 0u) << "once all are done";
    h().shard(2).SetHeld(RequestKind::kCommand, false);
    h().Settle();
    EXPECT_EQ(compactions.load(), 1u);
    EXPECT_EQ(checkpoints.load(), what == SpaceCommand::kDrop ? 1u : 0u);
  }
}

// A space has one at a time, whoever asks. A drain need not wait for it.
TEST_F(IngestOperatorTest, ARebuildIsAnsweredOrEndsWithTheConnection) {
  constexpr auto kRebuild = static_cast<uint8_t>(SpaceCommand::kRebuild);
  HarnessOptions options = CalmOptions();
  options.shards = 2;
  Start(options);
  const std::string space = "docs";
  TestClient& first = Greeted({.space = space});
  TestClient& second = Greeted();
  for (size_t s = 0; s < 2; ++s) h().shard(s).SetHeld(RequestKind::kCommand, true);
  first.Send(CommandBytes(7, kRebuild, space));
  h().Settle();
  second.Send(CommandBytes(8, kRebuild, space));
  h().Settle();
  EXPECT_EQ(OnlyNak(second).reason, CodeOf(RefusalReason::kBusy));
  second.Send(CommandBytes(9, kRebuild, "nowhere"));
  h().Settle();
  EXPECT_EQ(second.Of(kWireNak).back().sequence, 9u);
  for (size_t s = 0; s < 2; ++s) h().shard(s).held.fill(false);
  h().Settle();
  EXPECT_EQ(first.Of(kWireCommandDone).size(), 1u);
  // One shard says that the space is being dropped.
  h().shard(1).command_refusal = RefusalReason::kSpaceDropping;
  second.Send(CommandBytes(10, kRebuild, space));
  h().Settle();
  EXPECT_TRUE(second.Of(kWireCommandDone).empty());
  EXPECT_EQ(second.Of(kWireNak).back().sequence, 10u);
  h().shard(1).command_refusal = RefusalReason::kNone;
  for (size_t s = 0; s < 2; ++s) h().shard(s).SetHeld(RequestKind::kCommand, true);
  second.Send(CommandBytes(11, kRebuild, space));
  h().Settle();
  h().core().BeginDrain();
  h().Settle();
  EXPECT_EQ(second.Of(kWireClose).size(), 1u);
  EXPECT_TRUE(second.Of(kWireCommandDone).empty());
  for (TestClient& client : clients_) client.Close();
  h().Settle();
  EXPECT_TRUE(h().core().drained());
  for (size_t s = 0; s < 2; ++s) h().shard(s).held.fill(false);
  EXPECT_TRUE(h().Finish());
}

}  // namespace
}  // namespace engram
