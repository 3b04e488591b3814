// Flow at an ingress core: clients that hold their answers back, and what they are told.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "tests/dataplane/fake_log_disk.h"
#include "tests/dataplane/ingest_rig.h"

namespace engram {
namespace {

constexpr uint32_t kNeverGoesBack = 8;
constexpr uint32_t kFlow = 16;
constexpr uint8_t kActive = 1;
constexpr uint8_t kPausedState = 2;

class IngestFlowTest : public IngestCoreTest {
 protected:
  // Says it and takes the answer.
  WireFlowState Say(TestClient& client, const WireFlowRequest& flow) {
    const size_t before = client.Of(kWireFlow).size();
    client.Send(FlowBytes(flow, 4711));
    const auto answers = client.Await(kWireFlow);
    EXPECT_EQ(answers.size(), before + 1);
    return answers.size() == before + 1 ? ParseFlow(answers.back()) : WireFlowState{};
  }
  // Has no answer.
  void SayBuffer(TestClient& client, int32_t remaining) {
    const size_t before = client.Of(kWireFlow).size();
    client.Send(FlowBytes({.action = kWireBufferStatus, .buffer_remaining = remaining}));
    EXPECT_EQ(client.Await(kWireFlow).size(), before);
  }
  // So many hits in each answer from now on; a frame has 10 at most.
  void SetHits(size_t count) {
    constexpr size_t kBatchHits = 500;
    h().shard().hits.assign(1, {.body = {}, .count = 0});
    for (size_t i = 0; i < count; ++i) {
      FakeShard::Batch& batch = h().shard().hits.back();
      batch.body += WireText(HitBytesOf({.id = std::to_string(i), .stamp = i + 1}));
      if (++batch.count == kBatchHits) h().shard().hits.push_back({.body = {}, .count = 0});
    }
  }
  // Ids of the requests whose result frames have come, a number for each frame.
  static std::vector<uint64_t> Answered(TestClient& client) {
    std::vector<uint64_t> ids;
    for (const WireFrame& frame : client.Await(kWireResult)) ids.push_back(frame.sequence);
    return ids;
  }
  static void Recall(TestClient& client, uint64_t id, uint16_t flags = 0) {
    WireRecall recall = F32Recall(kVector);
    recall.k = 10'000;
    client.Send(RecallBytes(id, recall, flags));
  }
  using Ids = std::vector<uint64_t>;
};

TEST_F(IngestFlowTest, IsGrantedWhereItIsAskedFor) {
  TestClient& client = NewClient();
  client.Send(HelloBytes({.features = kFlow | kNeverGoesBack | 0x80000000u}));
  EXPECT_EQ(WireNumber(client.Await(kWireHelloAck).at(0).body, 0, 4), kFlow | kNeverGoesBack);
  TestClient& other = Greeted();
  other.Send(FlowBytes({.action = kWirePause}, 9));
  const WireNak nak = OnlyNak(other);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kBadFlow));
  EXPECT_EQ(nak.refused_type, kWireFlow);
  EXPECT_EQ(other.Of(kWireNak)[0].sequence, 9u);
  EXPECT_FALSE(nak.closing);
  Recall(other, 1);
  EXPECT_EQ(Answered(other), Ids{1});
  EXPECT_TRUE(other.Of(kWireFlow).empty());
}

TEST_F(IngestFlowTest, ComesAfterHelloAndHasOneLength) {
  TestClient& early = NewClient();
  early.Send(FlowBytes({}));
  ExpectRefusedAndClosed(early, RefusalReason::kHelloRequired);
  TestClient& client = Greeted({.features = kFlow});
  client.Send(MakeFrame(kWireFlow, {}, WireWriter().U8(1).Zeros(22).Take()));
  ExpectRefusedAndClosed(client, RefusalReason::kBadFrame);
}

TEST_F(IngestFlowTest, WhatIsNoFlowChangesNothing) {
  TestClient& client = Greeted({.features = kFlow});
  EXPECT_EQ(Say(client, {.action = kWireSlowDown, .preferred_rate = 50}).preferred_rate, 50);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<WireFlowRequest> bad{{.action = 0},
                                         {.action = 6},
                                         {.action = 255},
                                         {.action = kWirePause, .preferred_rate = -1},
                                         {.action = kWireSpeedUp, .preferred_rate = nan}};
  for (const WireFlowRequest& flow : bad) {
    client.Forget();
    client.Send(FlowBytes(flow, 5));
    const WireNak nak = OnlyNak(client);
    EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kBadFlow));
    EXPECT_EQ(client.Of(kWireNak)[0].sequence, 5u);
    EXPECT_FALSE(nak.consumed);
    EXPECT_EQ(nak.retry_after_ms, 0u);
    EXPECT_NE(nak.text.find("action is 1 to 5"), std::string::npos);
    EXPECT_TRUE(client.Of(kWireFlow).empty());
  }
  const WireFlowState state = Say(client, {.action = kWireResume});
  EXPECT_EQ(state.state, kActive);
  EXPECT_EQ(state.preferred_rate, 50);
}

TEST_F(IngestFlowTest, PauseHoldsResultsAndRefusesObservationsUntilResume) {
  TestClient& client = Greeted({.features = kFlow});
  h().shard().SetHeld(RequestKind::kObserve, true);
  client.Send(Observations(client.session(), 1, 3));
  h().Settle();
  EXPECT_EQ(Say(client, {.action = kWirePause}).state, kPausedState);
  // What was under way is acked all the same.
  h().shard().SetHeld(RequestKind::kObserve, false);
  EXPECT_EQ(LastAcked(client), 3u);
  client.Forget();
  Recall(client, 77);
  client.Send(ScrollBytes(78, 0, 0, 10));
  client.Send(Observations(client.session(), 4, 3));
  client.Send(Observations(client.session(), 7));
  client.Send(Observations(client.session(), 2));
  client.Send(Ping(5));
  EXPECT_EQ(client.Await(kWirePing).size(), 1u);
  EXPECT_EQ(LastAcked(client), 3u) << "a repeat is acked";
  WireNak nak = OnlyNak(client);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kPaused));
  EXPECT_EQ(client.Of(kWireNak)[0].sequence, 4u);
  EXPECT_EQ(nak.expected, 4u);
  EXPECT_EQ(nak.retry_after_ms, 0u);
  EXPECT_FALSE(nak.consumed);
  EXPECT_FALSE(nak.closing);
  // Going back does not help before resume.
  client.Forget();
  client.Send(Observations(client.session(), 4));
  EXPECT_EQ(OnlyNak(client).expected, 4u);
  EXPECT_TRUE(Answered(client).empty());
  EXPECT_TRUE(client.Of(kWireScrolled).empty());
  EXPECT_EQ(h().shard().taken_of(RequestKind::kRecall), 1u) << "it is made ready meanwhile";

  client.Forget();
  EXPECT_EQ(Say(client, {.action = kWireResume}).state, kActive);
  client.Send(Observations(client.session(), 4, 4));
  EXPECT_EQ(LastAcked(client), 7u);
  EXPECT_EQ(Answered(client), (Ids{77, 78}));
  EXPECT_EQ(client.Of(kWireScrolled).size(), 1u);
  EXPECT_TRUE(client.Of(kWireNak).empty());
  const auto all = client.TakeAll();
  const auto place = [&](uint8_t type) {
    return std::ranges::find(all, type, &WireFrame::type) - all.begin();
  };
  EXPECT_LT(place(kWireFlow), place(kWireResult)) << "the word comes before what it lets go";
  EXPECT_EQ(SessionOf(client).settled.size(), 7u);
}

TEST_F(IngestFlowTest, AnswersNameTheSettledSequenceAndWhatIsUnderWay) {
  h().shard().credit = 10;
  TestClient& client = Greeted({.features = kFlow});
  client.Send(Observations(client.session(), 1, 4));
  EXPECT_EQ(LastAcked(client), 4u);
  h().shard().SetHeld(RequestKind::kObserve, true);
  client.Send(Observations(client.session(), 5, 5));
  const WireFlowState state = Say(client, {.action = kWireResume});
  EXPECT_EQ(client.Of(kWireFlow).back().sequence, 4u);
  EXPECT_EQ(client.Of(kWireFlow).back().session, client.session());
  EXPECT_EQ(state.queue_depth, 5u);
  EXPECT_EQ(state.queue_capacity, 10u);
  EXPECT_EQ(state.pressure, 0.5F);
  EXPECT_EQ(state.retry_after_ms, 0u);
  EXPECT_EQ(state.preferred_rate, 0);
  // Beyond its credit, and without a session.
  client.Send(Observations(client.session(), 10, 30));
  const WireFlowState full = Say(client, {.action = kWireResume});
  EXPECT_EQ(full.queue_depth, 35u);
  EXPECT_EQ(full.pressure, 1);
  h().shard().SetHeld(RequestKind::kObserve, false);
  TestClient& asking = NewClient();
  asking.Hello({.features = kFlow | 1});
  const WireFlowState none = Say(asking, {.action = kWirePause});
  EXPECT_EQ(none.state, kPausedState);
  EXPECT_EQ(none.queue_depth, 0u);
  EXPECT_EQ(none.queue_capacity, 0u);
  EXPECT_EQ(none.pressure, 0);
}

TEST_F(IngestFlowTest, APauseUsesUpTheNumbersOfWhoNeverGoesBack) {
  TestClient& client = Greeted({.features = kFlow | kNeverGoesBack});
  client.Send(Observations(client.session(), 1, 2));
  Say(client, {.action = kWirePause});
  client.Send(Observations(client.session(), 3, 4));
  EXPECT_EQ(LastAcked(client), 6u);
  const auto naks = client.Of(kWireNak);
  ASSERT_EQ(naks.size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    const WireNak nak = ParseNak(naks[i]);
    EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kPaused));
    EXPECT_EQ(naks[i].sequence, 3 + i);
    EXPECT_TRUE(nak.consumed);
    EXPECT_EQ(nak.retry_after_ms, 0u);
    EXPECT_EQ(nak.expected, 4 + i);
  }
  Say(client, {.action = kWireResume});
  client.Send(Observations(client.session(), 7));
  EXPECT_EQ(LastAcked(client), 7u);
  EXPECT_EQ(SessionOf(client).settled.size(), 3u);
}

// Only a word of the client lets its answers go, so it is heard whatever it has asked for.
TEST_F(IngestFlowTest, WhoHoldsAllItsRecallsBackIsStillReadFrom) {
  HarnessOptions options = CalmOptions();
  options.ingest.max_recalls = 3;
  Start(options);
  TestClient& client = Greeted({.features = kFlow});
  client.Send(Observations(client.session(), 1));
  EXPECT_EQ(LastAcked(client), 1u);
  for (const bool by_pause : {true, false}) {
    client.Forget();
    if (by_pause) {
      Say(client, {.action = kWirePause});
    } else {
      SayBuffer(client, 0);
    }
    for (uint64_t id = 1; id <= 3; ++id) Recall(client, id);
    h().Settle();
    Recall(client, 4);
    client.Send(ScrollBytes(5, 0, 0, 10));
    client.Send(CheckBytes(6, 0));
    auto naks = client.Await(kWireNak);
    ASSERT_EQ(naks.size(), 3u);
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(ParseNak(naks[i]).reason, CodeOf(RefusalReason::kMergesFull));
      EXPECT_EQ(naks[i].sequence, 4 + i);
    }
    EXPECT_TRUE(Answered(client).empty());
    Say(client, {.action = kWireResume});
    EXPECT_EQ(Answered(client), (Ids{1, 2, 3}));
    // A check is no result.
    client.Forget();
    Say(client, {.action = kWirePause});
    client.Send(CheckBytes(7, 0));
    EXPECT_EQ(client.Await(kWireChecked).size(), 1u);
    Say(client, {.action = kWireResume});
  }
}

TEST_F(IngestFlowTest, ABufferTakesSoManyFramesOfWhateverAnswers) {
  TestClient& client = Greeted({.features = kFlow});
  SetHits(35);
  SayBuffer(client, 6);
  Recall(client, 1);
  Recall(client, 2);
  Recall(client, 3);
  EXPECT_EQ(Answered(client), (Ids{1, 1, 1, 1, 2, 2}));
  SayBuffer(client, -1);
  SayBuffer(client, 0);
  EXPECT_EQ(Answered(client).size(), 6u);
  SayBuffer(client, 3);
  EXPECT_EQ(Answered(client), (Ids{1, 1, 1, 1, 2, 2, 2, 2, 3}));
  Say(client, {.action = kWireSpeedUp});
  EXPECT_EQ(Answered(client).size(), 12u);
  // Nothing was lost or came twice where it was cut.
  for (const uint64_t id : {1, 2, 3}) {
    size_t hits = 0;
    for (const WireFrame& frame : client.Of(kWireResult)) {
      if (frame.sequence != id) continue;
      for (const WireHit& hit : ParseHits(std::span(frame.body).subspan(16))) {
        EXPECT_EQ(hit.id, std::to_string(hits++));
      }
      EXPECT_EQ(frame.flags, hits < 35 ? 1 : 0);
    }
    EXPECT_EQ(hits, 35u);
  }
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
}

TEST_F(IngestFlowTest, ARateIsKeptAndTold) {
  TestClient& client = Greeted({.features = kFlow});
  TestClient& other = Greeted({.features = kFlow});
  SetHits(3'000);
  EXPECT_EQ(Say(client, {.action = kWireSlowDown}).preferred_rate, 500);
  EXPECT_EQ(Say(client, {.action = kWireSlowDown, .preferred_rate = 40}).preferred_rate, 40);
  Recall(client, 1);
  Recall(other, 1);
  EXPECT_EQ(Answered(other).size(), 300u) << "others have nothing to do with it";
  EXPECT_EQ(client.Of(kWireResult).size(), 4u) << "a tenth of a second's worth";
  for (int second = 1; second <= 5; ++second) {
    h().Run(100, kNanosPerSecond / 100);
    EXPECT_NEAR(static_cast<double>(client.Of(kWireResult).size()), 4 + 40 * second, 2);
  }
  Say(client, {.action = kWireSpeedUp});
  const auto before = static_cast<double>(client.Of(kWireResult).size());
  h().Run(50, kNanosPerSecond / 100);
  EXPECT_NEAR(static_cast<double>(client.Of(kWireResult).size()), before + 40 + 8, 10);
  for (int i = 0; i < 20; ++i) Say(client, {.action = kWireSpeedUp});
  EXPECT_EQ(ParseFlow(client.Of(kWireFlow).back()).preferred_rate, 0);
  EXPECT_EQ(Answered(client).size(), 300u);
}

TEST_F(IngestFlowTest, AnAnswerThatIsHeldForTooLongIsRefusedByItself) {
  HarnessOptions options = CalmOptions();
  options.ingest.answer_timeout_ns = 100 * kNanosPerSecond;
  Start(options);
  TestClient& client = Greeted({.features = kFlow});
  client.Send(Observations(client.session(), 1));
  EXPECT_EQ(LastAcked(client), 1u);
  SetHits(25);
  SayBuffer(client, 2);
  Recall(client, 8);
  client.Send(ScrollBytes(9, 0, 0, 10));
  EXPECT_EQ(Answered(client), (Ids{8, 8}));
  h().Step(50 * kNanosPerSecond);
  Say(client, {.action = kWirePause});
  Recall(client, 10);
  h().Settle();
  h().Step(49 * kNanosPerSecond);
  h().Settle();
  EXPECT_TRUE(client.Of(kWireNak).empty());
  h().Step(2 * kNanosPerSecond);
  const auto naks = client.Await(kWireNak);
  ASSERT_EQ(naks.size(), 2u) << "the third has its own time";
  for (size_t i = 0; i < 2; ++i) {
    const WireNak nak = ParseNak(naks[i]);
    EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kDeadlinePassed));
    EXPECT_EQ(naks[i].sequence, 8 + i);
    EXPECT_EQ(nak.refused_type, i == 0 ? kWireRecall : kWireScroll);
    EXPECT_FALSE(nak.closing);
    EXPECT_EQ(nak.retry_after_ms, 0u);
  }
  EXPECT_EQ(h().core().merges_in_flight(), 1u);
  EXPECT_TRUE(client.Of(kWireScrolled).empty());
  Say(client, {.action = kWireResume});
  EXPECT_EQ(Answered(client), (Ids{8, 8, 10, 10, 10}));
  // What was refused counts no more.
  for (uint64_t id = 20; id < 36; ++id) Recall(client, id);
  EXPECT_EQ(Answered(client).size(), 5 + 16 * 3u);
  EXPECT_EQ(client.Of(kWireNak).size(), 2u);
}

// What has been sent lies unread, and more is held back: the client has said that it takes its
// time.
TEST_F(IngestFlowTest, WhoHoldsAnswersBackIsNoSlowReaderForAsLong) {
  HarnessOptions options = CalmOptions();
  options.ingest.send_pause_bytes = 64 * 1024;
  options.network.client_window_bytes = 4096;
  for (const bool holds : {true, false}) {
    clients_.clear();
    Start(options);
    TestClient& client = Greeted({.features = kFlow});
    if (holds) SayBuffer(client, 2);
    h().shard().hits = {HitBatch({{.id = "h", .payload = std::string(60'000, 'h')}})};
    for (uint64_t id = 1; id <= 3; ++id) Recall(client, id);
    h().Settle();
    for (int i = 0; i < 4; ++i) {
      h().Step(60 * kNanosPerSecond);
      h().Settle();
    }
    EXPECT_EQ(h().refused(RefusalReason::kSlowReader), holds ? 0u : 1u);
    if (!holds) continue;
    for (int i = 0; i < 4; ++i) {
      h().Step(60 * kNanosPerSecond);
      h().Settle();
    }
    EXPECT_EQ(h().refused(RefusalReason::kSlowReader), 1u) << "but not for ever";
  }
}

// Reading was paused for what is unread, and all recalls are under way: what was read makes it go
// on.
TEST_F(IngestFlowTest, WhoReadsWhatWasSentIsHeardAgain) {
  HarnessOptions options = CalmOptions();
  options.ingest.send_pause_bytes = 64 * 1024;
  options.ingest.max_recalls = 2;
  options.network.client_window_bytes = 4096;
  Start(options);
  TestClient& client = Greeted({.features = kFlow});
  h().shard().hits.clear();
  for (const char* id : {"a", "b", "c"}) {
    h().shard().hits.push_back(HitBatch({{.id = id, .payload = std::string(60'000, 'h')}}));
  }
  client.Send(FlowBytes({.action = kWireBufferStatus, .buffer_remaining = 2}));
  Recall(client, 1);
  Recall(client, 2);
  h().Settle();
  client.Send(FlowBytes({.action = kWireResume}));
  h().Settle();
  EXPECT_TRUE(client.Of(kWireFlow).empty()) << "it is not read from";
  EXPECT_EQ(Answered(client), (Ids{1, 1, 1, 2, 2, 2}));
  EXPECT_EQ(client.Of(kWireFlow).size(), 1u);
}

// What a shard has not said yet is awaited, however late it is.
TEST_F(IngestFlowTest, ALongRecallIsRefusedOnceItIsWhole) {
  TestClient& client = Greeted({.features = kFlow});
  h().shard().hits = {HitBatch({{.id = "first"}}), HitBatch({{.id = "other"}})};
  h().shard().hits[0].end = BatchEnd::kFirst;
  h().shard().batches_let_go = 1;
  Say(client, {.action = kWirePause});
  Recall(client, 1);
  h().Settle();
  for (int i = 0; i < 4; ++i) {
    h().Step(100 * kNanosPerSecond);
    client.Send(Ping());
    h().Settle();
  }
  EXPECT_TRUE(client.Of(kWireNak).empty());
  h().shard().batches_let_go = SIZE_MAX;
  EXPECT_EQ(OnlyNak(client).reason, CodeOf(RefusalReason::kDeadlinePassed));
  EXPECT_TRUE(Answered(client).empty());
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
}

TEST_F(IngestFlowTest, CloseComesAfterAllThatWasHeld) {
  for (const bool by_client : {true, false}) {
    clients_.clear();
    Start();
    TestClient& client = Greeted({.features = kFlow});
    client.Send(Observations(client.session(), 1, 2));
    EXPECT_EQ(LastAcked(client), 2u);
    SetHits(25);
    Say(client, {.action = kWireSlowDown, .preferred_rate = 0.5F});
    SayBuffer(client, 1);
    Recall(client, 1);
    EXPECT_EQ(Answered(client), Ids{1});
    Say(client, {.action = kWirePause});
    Recall(client, 2);
    client.Send(ScrollBytes(3, 0, 0, 10));
    EXPECT_EQ(Answered(client), Ids{1});
    if (by_client) {
      client.Send(CloseFrame());
    } else {
      h().core().BeginDrain();
    }
    EXPECT_EQ(Answered(client), (Ids{1, 1, 1, 2, 2, 2, 3}));
    EXPECT_EQ(client.Of(kWireScrolled).size(), 1u);
    const auto frames = client.TakeAll();
    EXPECT_EQ(frames.back().type, kWireClose);
    EXPECT_EQ(frames.back().sequence, 2u);
    EXPECT_TRUE(client.closed());
    EXPECT_FALSE(client.reset());
    client.Close();
    h().Settle();
    EXPECT_EQ(h().core().open_connections(), 0u);
    EXPECT_EQ(h().core().merges_in_flight(), 0u);
  }
}

TEST_F(IngestFlowTest, WhoGoesAwayWhilePausedLeavesNothing) {
  TestClient& client = Greeted({.features = kFlow});
  Say(client, {.action = kWirePause});
  for (uint64_t id = 1; id <= 5; ++id) Recall(client, id);
  h().Settle();
  EXPECT_EQ(h().core().merges_in_flight(), 5u);
  client.Abort();
  h().Settle();
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
  // The place's next connection is not paused.
  TestClient& next = Greeted({.features = kFlow});
  Recall(next, 9);
  EXPECT_EQ(Answered(next), Ids{9});
}

// Many that hold answers back do not keep others from recalling.
TEST_F(IngestFlowTest, HeldAnswersGiveWayWhereAllMergesAreInUse) {
  HarnessOptions options = CalmOptions();
  options.ingest.max_merges = 4;
  Start(options);
  TestClient& first = Greeted({.features = kFlow});
  TestClient& second = Greeted({.features = kFlow});
  TestClient& taking = Greeted({.features = kFlow});
  for (TestClient* client : {&first, &second}) {
    Say(*client, {.action = kWirePause});
    Recall(*client, 1);
    h().Settle();
    Recall(*client, 2);
    h().Settle();
  }
  // One that would be held back, too, has to wait.
  Recall(second, 3);
  EXPECT_EQ(OnlyNak(second).reason, CodeOf(RefusalReason::kMergesFull));
  EXPECT_EQ(second.Of(kWireNak)[0].sequence, 3u);
  Recall(taking, 7);
  EXPECT_EQ(Answered(taking), Ids{7});
  const WireNak nak = OnlyNak(first);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kMergesFull));
  EXPECT_EQ(nak.refused_type, kWireRecall);
  EXPECT_EQ(first.Of(kWireNak)[0].sequence, 1u);
  EXPECT_GE(nak.retry_after_ms, 1u);
  taking.Forget();
  Recall(second, 4);  // all are in use again
  h().Settle();
  taking.Send(Observations(taking.session(), 1));
  taking.Send(ScrollBytes(8, 0, 0, 10));
  EXPECT_EQ(Answered(taking), Ids{8});
  EXPECT_EQ(taking.Of(kWireScrolled).size(), 1u);
  EXPECT_EQ(ParseNak(first.Await(kWireNak).at(1)).reason, CodeOf(RefusalReason::kMergesFull));
  Say(first, {.action = kWireResume});
  Say(second, {.action = kWireResume});
  EXPECT_TRUE(Answered(first).empty());
  EXPECT_EQ(Answered(second), (Ids{1, 2, 4}));
  EXPECT_EQ(first.Of(kWireNak).size(), 2u);
}

TEST_F(IngestFlowTest, AnswersThatAreBeingReadDoNotGiveWay) {
  HarnessOptions options = CalmOptions();
  options.ingest.max_merges = 2;
  options.ingest.send_pause_bytes = 64 * 1024;
  options.network.client_window_bytes = 4096;
  Start(options);
  TestClient& reading = Greeted({.features = kFlow});
  TestClient& other = Greeted({.features = kFlow});
  h().shard().hits.assign(4, HitBatch({{.id = "h", .payload = std::string(60'000, 'h')}}));
  for (size_t i = 0; i < 4; ++i) {
    h().shard().hits[i] =
        HitBatch({{.id = std::to_string(i), .payload = std::string(60'000, 'h')}});
  }
  Recall(reading, 1);
  Recall(reading, 2);
  h().Settle();
  EXPECT_EQ(h().core().merges_in_flight(), 2u);
  Recall(other, 1);
  EXPECT_EQ(OnlyNak(other).reason, CodeOf(RefusalReason::kMergesFull));
  EXPECT_EQ(Answered(reading), (Ids{1, 1, 1, 1, 2, 2, 2, 2}));
  EXPECT_TRUE(reading.Of(kWireNak).empty());
}

// A simple model of one client: what it may get, it has got; in the order in which it asked.
class FlowModel {
 public:
  void Ask(uint64_t id, size_t frames) {
    for (size_t i = 0; i < frames; ++i) waiting_.push_back(id);
    last_of_.push_back(id);
    Send();
  }
  void Say(const WireFlowRequest& flow) {
    if (flow.action == kWirePause) is_paused_ = true;
    if (flow.action == kWireResume) is_paused_ = false;
    if (flow.action == kWireResume || flow.action == kWireSpeedUp) bound_ = SIZE_MAX;
    if (flow.action == kWireBufferStatus) {
      bound_ = static_cast<size_t>(std::max(flow.buffer_remaining, 0));
    }
    Send();
  }
  size_t under_way() const {
    return static_cast<size_t>(std::ranges::count_if(last_of_, [this](uint64_t id) {
      return std::ranges::find(waiting_, id) != waiting_.end();
    }));
  }
  bool is_paused() const { return is_paused_; }
  const std::vector<uint64_t>& sent() const { return sent_; }

 private:
  void Send() {
    while (!is_paused_ && bound_ > 0 && !waiting_.empty()) {
      if (bound_ != SIZE_MAX) --bound_;
      sent_.push_back(waiting_.front());
      waiting_.pop_front();
    }
  }
  bool is_paused_ = false;
  size_t bound_ = SIZE_MAX;
  std::deque<uint64_t> waiting_;   // a number for each frame
  std::vector<uint64_t> last_of_;  // all that were asked
  std::vector<uint64_t> sent_;
};

TEST_F(IngestFlowTest, AnyProgramGetsWhatAModelGets) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(seed);
    SplitMix64 random(seed);
    clients_.clear();
    HarnessOptions options = CalmOptions();
    options.seed = seed;
    options.ingest.max_recalls = 5;
    Start(options);
    TestClient& client = Greeted({.features = kFlow});
    FlowModel model;
    Sequence next = 1;
    client.Send(Observations(client.session(), next++));
    for (uint64_t id = 1; id <= 120; ++id) {
      h().Settle();
      const uint64_t what = random.Below(10);
      if (what < 4) {
        const size_t hits = random.Below(45);
        const bool refused = model.under_way() == 5;
        SetHits(hits);
        const size_t naks = client.Await(kWireNak).size();
        if (random.Below(3) == 0) {
          client.Send(ScrollBytes(id, 0, 0, 10));
          if (!refused) model.Ask(id, 1);
        } else {
          Recall(client, id);
          if (!refused) model.Ask(id, std::max<size_t>((hits + 9) / 10, 1));
        }
        ASSERT_EQ(client.Await(kWireNak).size(), naks + (refused ? 1 : 0));
      } else if (what < 9) {
        const WireFlowRequest flow{.action = static_cast<uint8_t>(std::array{
                                       kWirePause, kWireResume, kWireSpeedUp, kWireBufferStatus,
                                       kWireBufferStatus}[random.Below(5)]),
                                   .buffer_remaining = static_cast<int32_t>(random.Below(9)) - 2};
        client.Send(FlowBytes(flow));
        model.Say(flow);
      } else {
        client.Send(Observations(client.session(), next));
        if (!model.is_paused()) ++next;
      }
      ASSERT_EQ(Answered(client), model.sent()) << "at " << id;
    }
    client.Send(FlowBytes({.action = kWireResume}));
    model.Say({.action = kWireResume});
    EXPECT_EQ(Answered(client), model.sent());
    EXPECT_EQ(LastAcked(client), next - 1);
    EXPECT_EQ(h().core().merges_in_flight(), 0u);
  }
}

// Answers whose records lie in logs.
class IngestFlowRecordsTest : public IngestFlowTest {
 protected:
  void StartWithRecords(uint32_t hits, size_t payload_bytes = 7) {
    HarnessOptions options = CalmOptions();
    options.records = logs_.Access();
    options.ingest.send_pause_bytes = 64 * 1024;
    options.ingest.answer_timeout_ns = 60 * kNanosPerSecond;
    Start(options);
    // Stamps are small numbers: all was taken just now.
    h().clock().StepWallNs(-h().clock().WallNs());
    FakeShard::Batch batch{.body = {}, .count = static_cast<uint16_t>(hits)};
    for (uint32_t i = 0; i < hits; ++i) {
      const auto hit =
          logs_.Put(0, 1, static_cast<uint32_t>(4'096 + i * PadTo8(1'024 + payload_bytes)),
                    std::to_string(i), std::string(payload_bytes, 'p'), 1'000 + i);
      batch.body.append(reinterpret_cast<const char*>(hit.data()), hit.size());
    }
    h().shard().hits = {batch};
    logs_.ends_at_once = true;
  }
  bool PinsAreLeft() { return logs_.pins.Passed(logs_.pins.Close()); }

  FakeLogs logs_;
};

TEST_F(IngestFlowRecordsTest, WhatIsHeldKeepsItsPinsForSoLongAndNoMemoryForRecords) {
  StartWithRecords(80);
  TestClient& client = Greeted({.features = kFlow});
  for (const bool by_pause : {true, false}) {
    client.Forget();
    SayBuffer(client, 2);
    Recall(client, 1, 1);
    EXPECT_EQ(Answered(client), (Ids{1, 1}));
    EXPECT_EQ(h().core().records()->under_way(), 0u) << "others have use for it";
    if (by_pause) {
      Say(client, {.action = kWirePause});
      Say(client, {.action = kWireResume});
      Say(client, {.action = kWirePause});
    }
    const size_t got = Answered(client).size();
    EXPECT_EQ(h().core().records()->under_way(), 0u);
    if (!by_pause) {
      h().Step(59 * kNanosPerSecond);
      EXPECT_FALSE(PinsAreLeft());
      h().Step(2 * kNanosPerSecond);
      EXPECT_EQ(OnlyNak(client).reason, CodeOf(RefusalReason::kDeadlinePassed));
      EXPECT_EQ(Answered(client).size(), got);
    }
    Say(client, {.action = kWireResume});
    EXPECT_EQ(h().core().merges_in_flight(), 0u);
    EXPECT_TRUE(PinsAreLeft());
  }
  EXPECT_FALSE(client.closed());
  // Slowly, and read ahead anew for each frame.
  client.Forget();
  Say(client, {.action = kWireSlowDown, .preferred_rate = 1});
  Recall(client, 3, 1);
  for (int i = 0; i < 12; ++i) {
    h().Step(kNanosPerSecond);
    h().Run(10);
    EXPECT_EQ(h().core().records()->under_way(), 0u);
  }
  EXPECT_EQ(Answered(client).size(), 8u);
  EXPECT_TRUE(PinsAreLeft());
}

// It reads, too slowly for the files that its answers keep: these go, it stays.
TEST_F(IngestFlowRecordsTest, WhoReadsSlowlyLosesTheAnswerAndNotTheConnection) {
  StartWithRecords(400, 2'500);
  TestClient& client = Greeted({.features = kFlow});
  for (uint64_t id = 1; id <= 4; ++id) Recall(client, id, 1);
  h().Run(200);
  // 64 KiB each 5 s, of some 4 MB.
  for (int i = 0; i < 14; ++i) {
    h().Step(5 * kNanosPerSecond);
    h().Run(200);
    client.Receive();
  }
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
  EXPECT_TRUE(PinsAreLeft());
  EXPECT_EQ(h().refused(RefusalReason::kSlowReader), 0u);
  EXPECT_EQ(h().refused(RefusalReason::kDeadlinePassed), 4u);
  EXPECT_EQ(client.Await(kWireNak).size(), 4u);
  EXPECT_FALSE(client.closed());
  ExpectServes(client);
}

}  // namespace
}  // namespace engram
