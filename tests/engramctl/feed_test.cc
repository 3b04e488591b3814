#include "tools/clients/cpp/feed.h"

#include <gtest/gtest.h>

#include <array>

#include "tests/engramctl/scripted_peer.h"

namespace engram {
namespace {

constexpr int64_t kTimeoutNs = 10 * kNanosPerSecond;
constexpr int64_t kStallNs = 60 * kNanosPerSecond;

class FeedTest : public testing::Test {
 protected:
  void Start(uint64_t last_sequence, uint64_t credit, uint32_t batch = 4,
             uint32_t max_frame_bytes = kMaxFrameBodyBytes) {
    peer_.SendHelloAck(last_sequence, credit, max_frame_bytes);
    Connection connection = peer_.Client();
    ASSERT_TRUE(connection.Hello({}, kTimeoutNs).has_value());
    ASSERT_TRUE(peer_.NextFrame().has_value());
    feed_.emplace(
        std::move(connection),
        [this](uint64_t index, Observation* observation) {
          id_ = "row" + std::to_string(index);
          vector_ = {static_cast<float>(index), 1};
          observation->id = id_;
          observation->dimension = 2;
          observation->vector = std::as_bytes(std::span<const float>(vector_));
          observation->attributes = attributes_;
          observation->payload = payload_;
        },
        FeedOptions{.batch = batch, .stall_timeout_ns = kStallNs});
  }

  // Ends the connection; another one says that the session is at `last_sequence`.
  void Resume(uint64_t last_sequence, uint64_t credit) {
    peer_ = ScriptedPeer();
    peer_.SendHelloAck(last_sequence, credit);
    Connection connection = peer_.Client();
    ASSERT_TRUE(connection.Hello({}, kTimeoutNs).has_value());
    ASSERT_TRUE(peer_.NextFrame().has_value());
    const auto resumed = feed_->Resume(std::move(connection), clock_.MonotonicNs());
    ASSERT_TRUE(resumed.has_value()) << resumed.error().message;
  }

  void Step() {
    const auto polled = feed_->Poll(clock_.MonotonicNs());
    ASSERT_TRUE(polled.has_value()) << polled.error().message;
  }
  std::string StepError() {
    const auto polled = feed_->Poll(clock_.MonotonicNs());
    return polled ? std::string("no error") : polled.error().message;
  }
  // What a step brought to the server, as sequences.
  std::vector<uint64_t> Arrived() {
    std::vector<uint64_t> sequences;
    for (const PeerRecord& record : peer_.TakeRecords()) sequences.push_back(record.sequence);
    return sequences;
  }
  void NakOverload(uint64_t expected, uint32_t retry_after_ms,
                   RefusalReason reason = RefusalReason::kQueueFull) {
    peer_.SendNak({.reason = reason, .retry_after_ms = retry_after_ms, .expected = expected},
                  expected);
  }
  void NakConsumed(uint64_t sequence, RefusalReason reason) {
    peer_.SendNak({.reason = reason, .flags = kNakFlagConsumed, .expected = sequence + 1},
                  sequence);
  }

  using Sequences = std::vector<uint64_t>;

  SimulatedClock clock_;
  ScriptedPeer peer_;
  std::string id_;
  std::string attributes_;
  std::string payload_;
  std::array<float, 2> vector_ = {};
  std::optional<Feed> feed_;
};

TEST_F(FeedTest, RecordsArriveWholeAndNumberedAfterTheSessionsLast) {
  Start(/*last_sequence=*/100, /*credit=*/1'000);
  payload_ = "words";
  feed_->Offer(6);
  Step();
  const auto records = peer_.TakeRecords();
  ASSERT_EQ(records.size(), 6u);
  for (size_t i = 0; i < records.size(); ++i) {
    EXPECT_EQ(records[i].sequence, 101 + i);
    EXPECT_EQ(records[i].id, "row" + std::to_string(i));
    EXPECT_EQ(records[i].payload, "words");
    EXPECT_EQ(records[i].header.op, ObservationOp::kUpsert);
    EXPECT_EQ(records[i].header.dtype, VectorDtype::kF32);
    float first = 0;
    std::memcpy(&first, records[i].vector.data(), sizeof(first));
    EXPECT_EQ(first, static_cast<float>(i));
  }
}

TEST_F(FeedTest, AttributesTravelWhereTheServerTakesThem) {
  for (const uint32_t features : {uint32_t{0}, kFeatureAttributes}) {
    peer_ = ScriptedPeer();
    peer_.features = features;
    Start(0, 1'000);
    attributes_ = "attributes";
    payload_ = "words";
    feed_->Offer(5);
    Step();
    const auto records = peer_.TakeRecords();
    ASSERT_EQ(records.size(), 5u);
    for (const PeerRecord& record : records) {
      EXPECT_EQ(record.attributes, features == 0 ? "" : "attributes");
      EXPECT_EQ(record.payload, "words");
    }
  }
}

TEST_F(FeedTest, FramesHoldABatchEach) {
  Start(0, 1'000, /*batch=*/4);
  feed_->Offer(10);
  Step();
  std::vector<uint64_t> starts;
  while (const auto frame = peer_.NextFrame()) starts.push_back(frame->header.sequence);
  EXPECT_EQ(starts, (std::vector<uint64_t>{1, 5, 9}));
}

TEST_F(FeedTest, FramesStayWithinTheServersBound) {
  // A record of this kind takes 48 bytes, so a body of 150 holds three of the four of a batch.
  Start(0, 1'000, /*batch=*/4, /*max_frame_bytes=*/150);
  feed_->Offer(8);
  Step();
  std::vector<uint64_t> starts;
  while (const auto frame = peer_.NextFrame()) {
    EXPECT_LE(frame->body.size(), 150u);
    starts.push_back(frame->header.sequence);
  }
  EXPECT_EQ(starts, (std::vector<uint64_t>{1, 4, 7}));
}

TEST_F(FeedTest, AttributesCountForTheBound) {
  // 48 bytes, and 48 of attributes.
  peer_.features = kFeatureAttributes;
  attributes_.assign(48, 'a');
  Start(0, 1'000, /*batch=*/4, /*max_frame_bytes=*/200);
  feed_->Offer(4);
  Step();
  std::vector<uint64_t> starts;
  while (const auto frame = peer_.NextFrame()) {
    EXPECT_LE(frame->body.size(), 200u);
    starts.push_back(frame->header.sequence);
  }
  EXPECT_EQ(starts, (std::vector<uint64_t>{1, 3}));
}

TEST_F(FeedTest, AnObservationThatFitsInNoFrameIsAnError) {
  Start(0, 1'000, /*batch=*/4, /*max_frame_bytes=*/40);
  feed_->Offer(1);
  EXPECT_NE(StepError().find("observation 0 needs 48 bytes; the server takes frames of 40"),
            std::string::npos);
}

TEST_F(FeedTest, SendsUpToItsCreditAndNotBeyond) {
  Start(0, /*credit=*/8, /*batch=*/4);
  feed_->Offer(20);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{1, 2, 3, 4, 5, 6, 7, 8}));
  Step();
  EXPECT_EQ(Arrived(), Sequences{});
  peer_.SendAck(4, 12);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{9, 10, 11, 12}));
}

TEST_F(FeedTest, CreditInDropsWaitsForAFullFrameUnlessNothingIsUnderWay) {
  Start(0, /*credit=*/6, /*batch=*/4);
  feed_->Offer(20);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{1, 2, 3, 4}));
  peer_.SendAck(2, 6);
  Step();
  EXPECT_EQ(Arrived(), Sequences{});
  // The server has answered all and gives no more: what is allowed goes, else nothing ever would.
  peer_.SendAck(4, 6);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{5, 6}));
}

TEST_F(FeedTest, AcksAreCumulativeAndCarryLatencySinceTheFirstSending) {
  Start(0, 1'000, /*batch=*/4);
  feed_->Offer(8);
  Step();
  clock_.AdvanceNs(kNanosPerMilli);
  peer_.SendAck(5, 1'000);
  Step();
  EXPECT_EQ(feed_->counts().settled, 5u);
  EXPECT_EQ(feed_->counts().acked, 5u);
  EXPECT_FALSE(feed_->AllSettled());
  peer_.SendAck(3, 1'000);  // an old one, late, takes nothing back
  peer_.SendAck(8, 1'000);
  Step();
  EXPECT_TRUE(feed_->AllSettled());
  EXPECT_EQ(feed_->counts().acked, 8u);
  EXPECT_EQ(feed_->ack_latency().Count(), 8u);
  EXPECT_NEAR(static_cast<double>(feed_->ack_latency().QuantileNs(0.5)), 1e6, 7e4);
}

TEST_F(FeedTest, OfferedByTheClockLatencyIncludesTheWaitForCredit) {
  Start(0, /*credit=*/4, /*batch=*/4);
  const int64_t start_ns = clock_.MonotonicNs();
  feed_->Offer(4, start_ns);
  feed_->Offer(4, start_ns);
  Step();
  EXPECT_EQ(Arrived().size(), 4u);
  clock_.AdvanceNs(10 * kNanosPerMilli);
  peer_.SendAck(4, 8);
  Step();
  EXPECT_EQ(Arrived().size(), 4u);
  peer_.SendAck(8, 8);
  Step();
  // The second four were sent and acked at the same moment, but meant to go 10 ms before.
  EXPECT_GE(feed_->ack_latency().QuantileNs(0.01), 10 * kNanosPerMilli);
  EXPECT_EQ(feed_->ack_latency().Count(), 8u);
}

TEST_F(FeedTest, AnOverloadNakWaitsAndGoesBackToExactlyTheExpectedNumber) {
  Start(0, 1'000, /*batch=*/4);
  feed_->Offer(8);
  Step();
  EXPECT_EQ(Arrived().size(), 8u);
  peer_.SendAck(2, 1'000);
  NakOverload(/*expected=*/4, /*retry_after_ms=*/20);
  Step();
  EXPECT_EQ(Arrived(), Sequences{});
  EXPECT_EQ(feed_->NextWakeNs(clock_.MonotonicNs()), clock_.MonotonicNs() + 20 * kNanosPerMilli);
  clock_.AdvanceNs(19 * kNanosPerMilli);
  Step();
  EXPECT_EQ(Arrived(), Sequences{});
  clock_.AdvanceNs(kNanosPerMilli);
  Step();
  const auto again = peer_.TakeRecords();
  ASSERT_EQ(again.size(), 4u);
  EXPECT_EQ(again.front().sequence, 4u);
  EXPECT_EQ(again.front().id, "row3");
  EXPECT_EQ(again.back().sequence, 7u);
  // One frame asks whether there is room; the rest follows when there is.
  peer_.SendAck(3, 1'000);
  Step();
  EXPECT_EQ(Arrived(), Sequences{});
  peer_.SendAck(4, 1'000);
  Step();
  EXPECT_EQ(Arrived(), Sequences{8});
  peer_.SendAck(8, 1'000);
  Step();
  EXPECT_TRUE(feed_->AllSettled());
  EXPECT_EQ(feed_->counts().sent, 8u);
  EXPECT_EQ(feed_->counts().acked, 8u);
  EXPECT_EQ(feed_->counts().retried, 5u);
  EXPECT_EQ(feed_->counts().waited_for.at("queue_full"), 1u);
  EXPECT_TRUE(feed_->counts().refused.empty());
}

TEST_F(FeedTest, GoingBackCountsAsSentAgainOnlyWhatHadBeenSent) {
  Start(0, /*credit=*/4, /*batch=*/4);
  feed_->Offer(8);
  Step();
  NakOverload(/*expected=*/3, /*retry_after_ms=*/1);
  Step();
  clock_.AdvanceNs(kNanosPerMilli);
  peer_.SendAck(2, 8);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{1, 2, 3, 4, 3, 4, 5, 6}));
  EXPECT_EQ(feed_->counts().retried, 2u);
  EXPECT_EQ(feed_->counts().sent, 6u);
}

TEST_F(FeedTest, AnOverloadNakThatNamesNoTimeIsNotAnsweredAtOnce) {
  Start(0, 1'000);
  feed_->Offer(4);
  Step();
  EXPECT_EQ(Arrived().size(), 4u);
  NakOverload(1, /*retry_after_ms=*/0, RefusalReason::kMemoryFull);
  Step();
  EXPECT_EQ(Arrived(), Sequences{});
  clock_.AdvanceNs(kNanosPerMilli);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{1, 2, 3, 4}));
}

TEST_F(FeedTest, AGapIsMendedAtOnce) {
  Start(0, 1'000);
  feed_->Offer(8);
  Step();
  EXPECT_EQ(Arrived().size(), 8u);
  NakOverload(/*expected=*/5, /*retry_after_ms=*/0, RefusalReason::kSequenceGap);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{5, 6, 7, 8}));
}

TEST_F(FeedTest, WhatWasSettledMeanwhileIsNotSentAgain) {
  Start(0, 1'000);
  feed_->Offer(8);
  Step();
  EXPECT_EQ(Arrived().size(), 8u);
  NakOverload(/*expected=*/3, /*retry_after_ms=*/5);
  peer_.SendAck(6, 1'000);
  Step();
  clock_.AdvanceNs(5 * kNanosPerMilli);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{7, 8}));
}

TEST_F(FeedTest, ANakThatCrossedAnAckDoesNotGoBackBehindIt) {
  Start(0, 1'000);
  feed_->Offer(8);
  Step();
  EXPECT_EQ(Arrived().size(), 8u);
  peer_.SendAck(6, 1'000);
  NakOverload(/*expected=*/3, /*retry_after_ms=*/5);
  Step();
  clock_.AdvanceNs(5 * kNanosPerMilli);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{7, 8}));
}

TEST_F(FeedTest, RefusalsForGoodAreCountedByReasonAndTheRestGoesOn) {
  Start(0, 1'000);
  feed_->Offer(8);
  Step();
  EXPECT_EQ(Arrived().size(), 8u);
  NakConsumed(2, RefusalReason::kNotFinite);
  NakConsumed(3, RefusalReason::kNotFinite);
  NakConsumed(7, RefusalReason::kBadId);
  peer_.SendAck(4, 1'000);
  Step();
  EXPECT_EQ(feed_->counts().acked, 2u);
  EXPECT_EQ(Arrived(), Sequences{});
  peer_.SendAck(8, 1'000);
  Step();
  EXPECT_TRUE(feed_->AllSettled());
  EXPECT_EQ(feed_->counts().acked, 5u);
  EXPECT_EQ(feed_->counts().refused.at("not_finite"), 2u);
  EXPECT_EQ(feed_->counts().refused.at("bad_id"), 1u);
}

TEST_F(FeedTest, ARefusalThatComesAfterItsAckIsTakenOffTheAcked) {
  Start(0, 1'000);
  feed_->Offer(4);
  Step();
  peer_.SendAck(4, 1'000);
  NakConsumed(1, RefusalReason::kZeroVector);
  Step();
  EXPECT_EQ(feed_->counts().acked, 3u);
  EXPECT_EQ(feed_->counts().refused.at("zero_vector"), 1u);
}

TEST_F(FeedTest, OneThatIsRefusedAgainAfterAGoBackCountsOnce) {
  Start(0, 1'000);
  feed_->Offer(4);
  Step();
  NakConsumed(3, RefusalReason::kNotFinite);
  NakOverload(2, 1);
  Step();
  clock_.AdvanceNs(kNanosPerMilli);
  Step();
  NakConsumed(3, RefusalReason::kNotFinite);
  peer_.SendAck(4, 1'000);
  Step();
  EXPECT_EQ(feed_->counts().refused.at("not_finite"), 1u);
  EXPECT_EQ(feed_->counts().acked, 3u);
}

TEST_F(FeedTest, AClosingNakEndsTheFeedWithItsText) {
  Start(0, 1'000);
  feed_->Offer(4);
  Step();
  peer_.SendNak({.reason = RefusalReason::kFenced, .flags = kNakFlagClosing}, 0, "from 10.0.0.9");
  EXPECT_EQ(StepError(),
            "the server ended the connection: fenced: another connection took over this session "
            "(from 10.0.0.9)");
}

TEST_F(FeedTest, AClosingNakIsReadAlthoughWritingFailsAlready) {
  Start(0, 1'000'000, /*batch=*/1'000);
  feed_->Offer(100'000);
  Step();
  peer_.SendNak({.reason = RefusalReason::kShuttingDown, .flags = kNakFlagClosing}, 0);
  peer_.Close();
  EXPECT_NE(StepError().find("shutting_down"), std::string::npos);
}

TEST_F(FeedTest, AfterAnEndInTheMiddleTheCountsAddUp) {
  Start(0, /*credit=*/8);
  feed_->Offer(20);
  Step();
  NakConsumed(2, RefusalReason::kBadId);
  peer_.SendAck(3, 8);
  peer_.Close();
  Step();
  EXPECT_EQ(StepError(), "the server closed the connection");
  EXPECT_EQ(feed_->counts().Describe(30),
            "2 acked, 1 refused for good, 5 sent and not settled, 22 not sent");
}

TEST_F(FeedTest, WhatTheServerRefusesForNowIsToldUntilSomethingIsSettled) {
  Start(0, 1'000);
  feed_->Offer(8);
  Step();
  EXPECT_EQ(feed_->last_wait(), "");
  NakOverload(1, 1'000, RefusalReason::kQuotaObservations);
  Step();
  EXPECT_TRUE(feed_->last_wait().starts_with("quota_observations: the space has as many"));
  peer_.SendAck(1, 1'000);
  Step();
  EXPECT_EQ(feed_->last_wait(), "");
}

TEST_F(FeedTest, ACloseFromTheServerEndsTheFeed) {
  Start(0, 1'000);
  feed_->Offer(8);
  Step();
  peer_.Send(FrameType::kClose, 0, 3, {});
  EXPECT_NE(StepError().find("it is stopping"), std::string::npos);
}

TEST_F(FeedTest, AnAckOfWhatWasNotSentIsNotBelieved) {
  Start(0, /*credit=*/4);
  feed_->Offer(8);
  Step();
  peer_.SendAck(5, 1'000);
  EXPECT_NE(StepError().find("acks sequence 5, but the last one sent is 4"), std::string::npos);
}

TEST_F(FeedTest, ANakOfWhatWasNotSentIsNotBelieved) {
  Start(0, /*credit=*/4);
  feed_->Offer(8);
  Step();
  NakOverload(/*expected=*/6, 1);
  EXPECT_NE(StepError().find("expects sequence 6 next"), std::string::npos);
}

TEST_F(FeedTest, ARefusalForGoodOfWhatWasNotSentIsNotBelieved) {
  Start(/*last_sequence=*/10, /*credit=*/14);
  feed_->Offer(8);
  Step();
  NakConsumed(10, RefusalReason::kBadId);
  EXPECT_NE(StepError().find("refuses sequence 10"), std::string::npos);
}

TEST_F(FeedTest, AShortAckIsCaught) {
  Start(0, 1'000);
  feed_->Offer(4);
  Step();
  peer_.Send(FrameType::kAck, 0, 4, Bytes(7));
  EXPECT_NE(StepError().find("too short"), std::string::npos);
}

TEST_F(FeedTest, GarbageEndsTheFeed) {
  Start(0, 1'000);
  feed_->Offer(4);
  Step();
  peer_.SendRaw(BytesOf(std::string_view("0123456789012345678901234567890123456789")));
  EXPECT_NE(StepError().find("not native frames"), std::string::npos);
}

TEST_F(FeedTest, AServerThatRefusesForEverIsGivenUpWithItsReason) {
  Start(0, 1'000);
  feed_->Offer(4);
  Step();
  for (int second = 0; second < 59; ++second) {
    NakOverload(1, 1'000, RefusalReason::kMemoryFull);
    clock_.AdvanceNs(kNanosPerSecond);
    Step();
  }
  clock_.AdvanceNs(kNanosPerSecond);
  EXPECT_EQ(StepError(),
            "nothing was settled for 60 s; the server's last refusal was "
            "memory_full: the shard's memory limit is reached");
}

TEST_F(FeedTest, TimeWithoutAnythingToSendIsNoStall) {
  Start(0, 1'000);
  Step();
  clock_.AdvanceNs(2 * kStallNs);
  feed_->Offer(4);
  Step();
  peer_.SendAck(4, 1'000);
  Step();
  clock_.AdvanceNs(2 * kStallNs);
  Step();
  feed_->Offer(4);
  Step();
  EXPECT_EQ(feed_->counts().sent, 8u);
}

// Resume; how it goes on over many connections is in resuming_feed_test.cc -----------------------

TEST_F(FeedTest, AResumeSendsFromTheServersLastAndWithinTheNewCredit) {
  Start(/*last_sequence=*/100, /*credit=*/1'000);
  feed_->Offer(12);
  Step();
  peer_.SendAck(103, 1'000);
  Step();
  Resume(/*last_sequence=*/105, /*credit=*/109);
  EXPECT_EQ(feed_->counts().settled, 5u);
  EXPECT_EQ(feed_->counts().resumed_ahead, 2u);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{106, 107, 108, 109}));
  EXPECT_EQ(feed_->counts().retried, 4u);
  peer_.SendAck(109, 1'000);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{110, 111, 112}));
}

TEST_F(FeedTest, AResumeForgetsThatTheOldConnectionHadToWait) {
  Start(0, 1'000, /*batch=*/4);
  feed_->Offer(8);
  Step();
  NakOverload(/*expected=*/1, /*retry_after_ms=*/5'000);
  Step();
  Resume(0, 1'000);
  Step();
  EXPECT_EQ(Arrived(), (Sequences{1, 2, 3, 4, 5, 6, 7, 8}));
}

TEST_F(FeedTest, ARefusalThatTheServerHasForgottenIsForgotten) {
  Start(0, 1'000);
  feed_->Offer(4);
  Step();
  NakConsumed(3, RefusalReason::kWrongDimension);
  Step();
  EXPECT_EQ(feed_->counts().refused.at("wrong_dimension"), 1u);
  Resume(2, 1'000);
  EXPECT_TRUE(feed_->counts().refused.empty());
  Step();
  EXPECT_EQ(Arrived(), (Sequences{3, 4}));
  peer_.SendAck(4, 1'000);  // this time it was taken
  Step();
  EXPECT_EQ(feed_->counts().acked, 4u);
}

TEST_F(FeedTest, ARefusalThatTheServerRemembersStays) {
  Start(0, 1'000);
  feed_->Offer(4);
  Step();
  NakConsumed(2, RefusalReason::kWrongDimension);
  Step();
  Resume(3, 1'000);
  EXPECT_EQ(feed_->counts().refused.at("wrong_dimension"), 1u);
  EXPECT_EQ(feed_->counts().acked, 2u);
  // Back over it, and once more.
  Resume(0, 1'000);
  EXPECT_EQ(feed_->counts().acked, 0u);
  EXPECT_EQ(feed_->counts().rolled_back, 3u);
  Step();
  NakConsumed(2, RefusalReason::kWrongDimension);
  NakConsumed(2, RefusalReason::kWrongDimension);
  peer_.SendAck(4, 1'000);
  Step();
  EXPECT_EQ(feed_->counts().refused.at("wrong_dimension"), 1u);
  EXPECT_EQ(feed_->counts().acked, 3u);
  EXPECT_EQ(feed_->ack_latency().Count(), 4u);
}

}  // namespace
}  // namespace engram
