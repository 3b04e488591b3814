#include "tools/clients/cpp/resuming_feed.h"

#include <gtest/gtest.h>

#include <array>
#include <deque>
#include <map>
#include <memory>

#include "tests/engramctl/resuming_feed_rig.h"

namespace engram {
namespace {

constexpr uint64_t kRows = 13;

enum class After { kKeeps, kLosesUnacked, kLosesAcked };

// One load with a cut after `first_cut` bytes of answers on the first connection, and after
// `second_cut` bytes on the second. Gives the bytes answered in all.
size_t RunWithCuts(size_t first_cut, size_t second_cut, After after) {
  SimulatedClock clock;
  Link link(&clock);
  link.server_.refused_id_ = "row5";
  link.Start();
  const size_t hello_bytes = link.server_.answer_bytes();
  link.server_.BreakAfter(first_cut);
  link.feed_->Offer(kRows);
  bool second = false;
  for (int turn = 0; turn < 1'000 && !link.feed_->AllSettled(); ++turn) {
    EXPECT_EQ(link.Step(), "");
    if (link.server_.broken() && !second) {
      // What is still on its way to the client is read before the server's memory is cut.
      EXPECT_EQ(link.Step(), "");
      const uint64_t acked = link.counts().settled;
      if (after == After::kLosesUnacked) link.server_.RollBackTo(acked);
      if (after == After::kLosesAcked) link.server_.RollBackTo(acked / 2);
      link.server_.BreakAfter(second_cut);
      second = true;
    }
    link.Wait();
  }
  EXPECT_TRUE(link.feed_->AllSettled());
  EXPECT_EQ(link.server_.StoredIds(), Rows(kRows, "row5"));
  EXPECT_EQ(link.server_.last(), kRows) << "each has one sequence";
  const FeedCounts& counts = link.counts();
  EXPECT_EQ(counts.sent, kRows);
  EXPECT_EQ(counts.settled, kRows);
  // A refusal that was lost with the connection cannot be told from a store.
  const uint64_t refused = counts.refused.contains("bad_id") ? counts.refused.at("bad_id") : 0;
  EXPECT_LE(refused, 1u);
  if (after == After::kLosesUnacked) {
    EXPECT_EQ(refused, 1u);
  }
  EXPECT_EQ(counts.acked, kRows - refused);
  EXPECT_EQ(link.feed_->feed().ack_latency().Count(), kRows) << "one latency each";
  for (const uint64_t session : link.server_.sessions_asked()) {
    EXPECT_TRUE(session == 0 || session == ScriptedPeer::kSession);
  }
  return link.server_.answer_bytes() - hello_bytes;
}

TEST(ResumingFeedCutsTest, ABreakAtAnyByteOfTheAnswersLosesAndRepeatsNothing) {
  const size_t total = RunWithCuts(SIZE_MAX, SIZE_MAX, After::kKeeps);
  ASSERT_GT(total, 100u);
  for (const After after : {After::kKeeps, After::kLosesUnacked, After::kLosesAcked}) {
    // After the last byte there is nothing that a break could change for the feed.
    for (size_t cut = 0; cut < total; ++cut) {
      SCOPED_TRACE(std::to_string(cut) + " of " + std::to_string(total));
      RunWithCuts(cut, SIZE_MAX, after);
      if (testing::Test::HasFailure()) return;
    }
  }
}

TEST(ResumingFeedCutsTest, ABreakWithinTheHandshakeOrRightAfterItIsTriedAgain) {
  for (const size_t first : {size_t{0}, size_t{40}, size_t{100}}) {
    for (size_t second = 0; second < 150; ++second) {
      SCOPED_TRACE(std::to_string(first) + ", " + std::to_string(second));
      RunWithCuts(first, second, After::kKeeps);
      RunWithCuts(first, second, After::kLosesAcked);
      if (testing::Test::HasFailure()) return;
    }
  }
}

// What hello_ack says ---------------------------------------------------------------------------

TEST_F(ResumingFeedTest, HelloAckAheadSettlesWhatWasTaken) {
  Start();
  link_.feed_->Offer(4);
  ASSERT_EQ(link_.Step(), "");  // the server has all 4 and has acked them
  link_.BreakAndNotice();
  // The acks arrived before the end: nothing is ahead.
  EXPECT_EQ(link_.counts().acked, 4u);
  // Now with the ack lost.
  link_.feed_->Offer(2);
  ASSERT_EQ(link_.WaitAndStep(), "");  // hello and its answer
  link_.server_.BreakAfter(0);
  ASSERT_EQ(link_.Step(), "");  // resumed, sent, taken, not acked
  EXPECT_EQ(link_.server_.last(), 6u);
  EXPECT_EQ(link_.counts().acked, 4u);
  EXPECT_EQ(link_.Drive(), "");
  EXPECT_EQ(link_.counts().acked, 6u);
  EXPECT_EQ(link_.counts().resumed_ahead, 2u);
  EXPECT_EQ(link_.counts().rolled_back, 0u);
  EXPECT_EQ(link_.counts().resumes, 2u);
  EXPECT_EQ(link_.counts().retried, 0u);
}

TEST_F(ResumingFeedTest, HelloAckAtTheLastAckSendsTheRestAgainAndTimesItFromBefore) {
  Start();
  link_.feed_->Offer(4);
  ASSERT_EQ(link_.Step(), "");
  ASSERT_EQ(link_.Step(), "");
  ASSERT_EQ(link_.counts().acked, 4u);
  link_.feed_->Offer(2);
  ASSERT_TRUE(link_.feed_->Poll(clock_.MonotonicNs()).has_value());  // sent, and never read
  link_.BreakAndNotice();
  clock_.AdvanceNs(3 * kNanosPerSecond);
  ASSERT_EQ(link_.Drive(), "");
  EXPECT_EQ(link_.counts().resumed_ahead, 0u);
  EXPECT_EQ(link_.counts().rolled_back, 0u);
  EXPECT_EQ(link_.counts().retried, 2u);
  EXPECT_EQ(link_.counts().acked, 6u);
  const LatencyHistogram& latency = link_.feed_->feed().ack_latency();
  EXPECT_EQ(latency.Count(), 6u);
  EXPECT_LT(latency.QuantileNs(0.6), kNanosPerSecond);
  EXPECT_GE(latency.QuantileNs(0.7), 3 * kNanosPerSecond) << "the outage counts";
  EXPECT_EQ(link_.server_.StoredIds(), Rows(6));
}

TEST_F(ResumingFeedTest, HelloAckBehindTheLastAckGoesBackAndSaysSo) {
  link_.server_.refused_id_ = "row3";
  Start();
  link_.feed_->Offer(6);
  ASSERT_EQ(link_.Drive(), "");
  ASSERT_EQ(link_.counts().acked, 5u);
  link_.BreakAndNotice();
  link_.server_.RollBackTo(2);
  ASSERT_EQ(link_.WaitAndStep(), "");
  ASSERT_EQ(link_.Step(), "");
  EXPECT_FALSE(link_.feed_->AllSettled());
  EXPECT_EQ(link_.counts().rolled_back, 4u);
  EXPECT_EQ(link_.counts().acked, 2u);
  EXPECT_TRUE(link_.counts().refused.empty());
  ASSERT_EQ(link_.Drive(), "");
  EXPECT_EQ(link_.counts().acked, 5u);
  EXPECT_EQ(link_.counts().refused.at("bad_id"), 1u);
  EXPECT_EQ(link_.counts().retried, 4u);
  EXPECT_EQ(link_.server_.StoredIds(), Rows(6, "row3"));
}

TEST_F(ResumingFeedTest, HelloAckBeyondWhatWasSentIsNotBelieved) {
  Start();
  link_.feed_->Offer(2);
  ASSERT_EQ(link_.Drive(), "");
  link_.BreakAndNotice();
  link_.Wait();
  ASSERT_TRUE(link_.feed_->Poll(clock_.MonotonicNs()).has_value());
  link_.server_.peer().SendHelloAck(3, 10);
  EXPECT_NE(link_.Step().find("resumes at sequence 3, but the last one sent is 2"),
            std::string::npos);
}

TEST_F(ResumingFeedTest, AnotherSessionIsNotTaken) {
  Start();
  link_.feed_->Offer(2);
  ASSERT_EQ(link_.Drive(), "");
  link_.BreakAndNotice();
  link_.Wait();
  ASSERT_TRUE(link_.feed_->Poll(clock_.MonotonicNs()).has_value());
  FrameHeader header;
  header.type = FrameType::kHelloAck;
  header.session = ScriptedPeer::kSession + 1;
  const Bytes body = ScriptedPeer::ToBytes(BytesOf(HelloAckBody{}));
  SealFrame(&header, {{std::span<const std::byte>(body)}});
  link_.server_.peer().SendRaw(BytesOf(header));
  link_.server_.peer().SendRaw(body);
  EXPECT_NE(link_.Step().find("another session"), std::string::npos);
}

// Sessions that are gone ------------------------------------------------------------------------

class EndingTest : public ResumingFeedTest {
 protected:
  // The server ends the handshake of the next attempt with this reason.
  std::string RefuseHello(RefusalReason reason) {
    link_.Wait();
    EXPECT_TRUE(link_.feed_->Poll(clock_.MonotonicNs()).has_value());
    const auto hello = link_.server_.peer().NextFrame();
    EXPECT_TRUE(hello && hello->header.session == ScriptedPeer::kSession);
    link_.server_.peer().SendNak(
        {.reason = reason, .refused_type = FrameType::kHello, .flags = kNakFlagClosing}, 0);
    return link_.Step();
  }
};

TEST_F(EndingTest, SessionExpiredIsFinalAndSaysWhatMayHaveHappened) {
  Start();
  link_.feed_->Offer(20);
  ASSERT_EQ(link_.Step(), "");
  ASSERT_EQ(link_.Step(), "");
  link_.BreakAndNotice();
  ASSERT_EQ(link_.counts().acked, 12u);
  const std::string error = RefuseHello(RefusalReason::kSessionExpired);
  EXPECT_NE(error.find("session_expired"), std::string::npos) << error;
  for (const char* const cause :
       {"space s may have been dropped", "session_keep_days", "another data directory"}) {
    EXPECT_NE(error.find(cause), std::string::npos) << error;
  }
  EXPECT_EQ(link_.counts().Describe(20),
            "12 acked, 0 refused for good, 6 sent and not settled, 2 not sent");
  EXPECT_EQ(link_.feed_->sessions_begun_anew(), 0u);
}

TEST_F(EndingTest, ASessionOfWhichNothingWasTakenIsBegunAnew) {
  Start();
  link_.feed_->Offer(4);
  ASSERT_TRUE(link_.feed_->Poll(clock_.MonotonicNs()).has_value());  // sent, and never read
  link_.BreakAndNotice();
  ASSERT_EQ(RefuseHello(RefusalReason::kSessionExpired), "");
  EXPECT_EQ(link_.Drive(), "");
  EXPECT_EQ(link_.feed_->sessions_begun_anew(), 1u);
  EXPECT_EQ(link_.server_.sessions_asked().back(), 0u);
  EXPECT_EQ(link_.counts().acked, 4u);
  EXPECT_EQ(link_.server_.StoredIds(), Rows(4));
  // From now on it is a session like any other.
  link_.BreakAndNotice();
  EXPECT_NE(RefuseHello(RefusalReason::kSessionExpired).find("session_expired"), std::string::npos);
}

TEST_F(EndingTest, RefusalsOfHelloThatCanPassAreTriedAgain) {
  for (const RefusalReason reason :
       {RefusalReason::kShuttingDown, RefusalReason::kConnectionLimit, RefusalReason::kSessionLimit,
        RefusalReason::kHandshakeTimeout, static_cast<RefusalReason>(999)}) {
    Start();
    link_.feed_->Offer(2);
    link_.BreakAndNotice();
    EXPECT_EQ(RefuseHello(reason), "") << DescribeRefusal(reason).name;
    EXPECT_EQ(link_.Drive(), "");
    link_.server_.RollBackTo(0);
  }
}

TEST_F(EndingTest, RefusalsOfHelloThatStayEndIt) {
  for (const RefusalReason reason : {RefusalReason::kFenced, RefusalReason::kSessionSpaceMismatch,
                                     RefusalReason::kBadVersion, RefusalReason::kMetricMismatch}) {
    Start();
    link_.feed_->Offer(2);
    link_.BreakAndNotice();
    EXPECT_NE(RefuseHello(reason).find(DescribeRefusal(reason).name), std::string::npos);
    link_.server_.RollBackTo(0);
  }
}

TEST_F(EndingTest, AFenceEndsARunningFeedAndAStopDoesNot) {
  Start();
  link_.feed_->Offer(2);
  link_.server_.peer().SendNak({.reason = RefusalReason::kShuttingDown, .flags = kNakFlagClosing},
                               0);
  ASSERT_EQ(link_.Step(), "");
  EXPECT_FALSE(link_.feed_->Streaming());
  ASSERT_EQ(link_.Drive(), "");
  link_.server_.peer().Send(FrameType::kClose, 0, 2, {});
  ASSERT_EQ(link_.Step(), "");
  EXPECT_FALSE(link_.feed_->Streaming());
  ASSERT_EQ(link_.WaitAndStep(), "");
  ASSERT_EQ(link_.Step(), "");
  ASSERT_TRUE(link_.feed_->Streaming());
  link_.server_.peer().SendNak({.reason = RefusalReason::kFenced, .flags = kNakFlagClosing}, 0);
  EXPECT_NE(link_.Step().find("fenced"), std::string::npos);
}

TEST_F(EndingTest, WithoutRetryTheFirstErrorIsTheFeedsOwn) {
  Link link(&clock_, {});
  link.Start();
  link.feed_->Offer(8);
  ASSERT_TRUE(link.feed_->Poll(clock_.MonotonicNs()).has_value());
  link.server_.Break();
  EXPECT_EQ(link.Step(), "the server closed the connection");
  EXPECT_TRUE(link.attempts_.empty());
}

// Time ------------------------------------------------------------------------------------------

TEST_F(ResumingFeedTest, AttemptsComeByBackOffFrom10MsDoublingTo1S) {
  Start();
  link_.feed_->Offer(2);
  ASSERT_TRUE(link_.feed_->Poll(clock_.MonotonicNs()).has_value());
  link_.listening_ = false;
  link_.BreakAndNotice();
  EXPECT_EQ(link_.feed_->fd(), -1);
  EXPECT_EQ(link_.feed_->feed().connection().fd(), -1) << "the server sees the end at once";
  EXPECT_FALSE(link_.feed_->WantsToWrite());
  int64_t step_ns = 10 * kNanosPerMilli;
  for (int i = 0; i < 12; ++i) {
    const int64_t now_ns = clock_.MonotonicNs();
    const int64_t wait_ns = link_.feed_->NextWakeNs(now_ns) - now_ns;
    EXPECT_GE(wait_ns, step_ns / 2);
    EXPECT_LE(wait_ns, step_ns);
    clock_.AdvanceNs(wait_ns - 1);
    ASSERT_EQ(link_.Step(), "");
    ASSERT_EQ(link_.attempts_.size(), static_cast<size_t>(i)) << "too early";
    clock_.AdvanceNs(1);
    ASSERT_EQ(link_.Step(), "");
    ASSERT_EQ(link_.attempts_.size(), static_cast<size_t>(i) + 1);
    EXPECT_EQ(link_.attempts_.back(), static_cast<uint64_t>(i));
    step_ns = std::min(step_ns * 2, kNanosPerSecond);
  }
  link_.listening_ = true;
  EXPECT_EQ(link_.Drive(), "");
  EXPECT_EQ(link_.counts().acked, 2u);
  EXPECT_EQ(link_.counts().resumes, 1u);
  // What was settled brings the back-off down again.
  link_.BreakAndNotice();
  EXPECT_LE(link_.feed_->NextWakeNs(clock_.MonotonicNs()) - clock_.MonotonicNs(),
            10 * kNanosPerMilli);
}

TEST(BackoffTest, JitterDependsOnTheSeedAndNothingElse) {
  Backoff one(kNanosPerMilli, kNanosPerSecond, 1);
  Backoff same(kNanosPerMilli, kNanosPerSecond, 1);
  Backoff other(kNanosPerMilli, kNanosPerSecond, 2);
  int differing = 0;
  for (int i = 0; i < 20; ++i) {
    const int64_t wait_ns = one.NextNs();
    EXPECT_EQ(wait_ns, same.NextNs());
    differing += wait_ns != other.NextNs();
  }
  EXPECT_GT(differing, 15);
}

TEST_F(ResumingFeedTest, WithoutProgressItGivesUpAfterTheGivenTimeAndNotBefore) {
  Start();
  link_.feed_->Offer(8);
  ASSERT_EQ(link_.Step(), "");
  link_.listening_ = false;
  link_.server_.Break();
  ASSERT_EQ(link_.Step(), "");
  const int64_t broken_ns = clock_.MonotonicNs();
  const std::string error = link_.Drive();
  EXPECT_EQ(error, "gave up after 10 s in which nothing was settled; at last: refused");
  EXPECT_EQ(link_.counts().acked, 6u);
  EXPECT_EQ(clock_.MonotonicNs() - broken_ns, kRetryForNs);
}

TEST_F(ResumingFeedTest, AServerThatRefusesAllForNowIsGivenUpAfterTheGivenTime) {
  link_.server_.taken_max_ = 4;
  Start();
  link_.feed_->Offer(8);
  while (link_.counts().settled < 4) {
    ASSERT_EQ(link_.WaitAndStep(), "");
  }
  const int64_t settled_ns = clock_.MonotonicNs();
  std::string error;
  for (int turn = 0; turn < 1'000 && error.empty(); ++turn) {
    const int64_t now_ns = clock_.MonotonicNs();
    clock_.AdvanceNs(std::max<int64_t>(1, link_.feed_->NextWakeNs(now_ns) - now_ns));
    error = link_.Step();
  }
  EXPECT_EQ(error.find("gave up after 10 s in which nothing was settled; at last: "
                       "quota_observations: the space has as many"),
            0u)
      << error;
  EXPECT_EQ(clock_.MonotonicNs() - settled_ns, kRetryForNs);
  EXPECT_TRUE(link_.attempts_.empty()) << "the connection was sound";
}

TEST_F(ResumingFeedTest, ARefusalThatPassesInTimeIsWaitedFor) {
  link_.server_.taken_max_ = 4;
  Start();
  link_.feed_->Offer(8);
  while (link_.counts().settled < 4) {
    ASSERT_EQ(link_.WaitAndStep(), "");
  }
  // One more of them each seven of the ten seconds.
  for (int half_second = 1; !link_.feed_->AllSettled(); ++half_second) {
    ASSERT_LT(half_second, 100);
    clock_.AdvanceNs(kNanosPerSecond / 2);
    ASSERT_EQ(link_.Step(), "");
    if (half_second % 14 == 0) ++link_.server_.taken_max_;
  }
  EXPECT_EQ(link_.counts().acked, 8u);
}

TEST_F(ResumingFeedTest, HandshakesWithoutProgressDoNotResetTheTime) {
  link_.server_.credit_ = 0;
  Start();
  link_.feed_->Offer(4);
  const int64_t start_ns = clock_.MonotonicNs();
  std::string error;
  for (int i = 0; i < 1'000 && error.empty(); ++i) {
    link_.server_.Break();
    error = link_.Step();
    if (error.empty()) error = link_.WaitAndStep();
    if (error.empty()) error = link_.Step();
  }
  EXPECT_NE(error.find("gave up after 10 s"), std::string::npos) << error;
  EXPECT_GE(clock_.MonotonicNs() - start_ns, kRetryForNs);
  EXPECT_GT(link_.counts().resumes, 10u);
}

TEST_F(ResumingFeedTest, WhateverIsSettledResetsTheTime) {
  link_.server_.credit_ = 2;
  Start();
  link_.feed_->Offer(40);
  // Also what was settled before and is settled again.
  for (int i = 0; i < 40 && link_.counts().settled < 30; ++i) {
    ASSERT_EQ(link_.WaitAndStep(), "");
  }
  link_.BreakAndNotice();
  link_.server_.RollBackTo(0);
  while (link_.counts().rolled_back == 0) {
    ASSERT_EQ(link_.WaitAndStep(), "");
  }
  int64_t outages = 0;
  for (; !link_.feed_->AllSettled(); ++outages) {
    link_.listening_ = false;
    link_.BreakAndNotice();
    const uint64_t before = link_.counts().settled;
    // Seven of the ten seconds.
    const int64_t until_ns = clock_.MonotonicNs() + kRetryForNs * 7 / 10;
    while (clock_.MonotonicNs() < until_ns) {
      ASSERT_EQ(link_.WaitAndStep(), "");
    }
    link_.listening_ = true;
    while (link_.counts().settled == before && !link_.feed_->AllSettled()) {
      ASSERT_EQ(link_.WaitAndStep(), "");
    }
  }
  EXPECT_GT(outages, 5);
  EXPECT_EQ(link_.counts().acked, 40u);
}

TEST_F(ResumingFeedTest, AnIdleConnectionThatCameBackDoesNotUseTheTimeUp) {
  Start();
  link_.BreakAndNotice();
  ASSERT_EQ(link_.WaitAndStep(), "");
  ASSERT_EQ(link_.Step(), "");
  ASSERT_TRUE(link_.feed_->Streaming());
  clock_.AdvanceNs(2 * kRetryForNs);
  ASSERT_EQ(link_.Step(), "");
  link_.BreakAndNotice();
}

TEST_F(ResumingFeedTest, AServerThatSaysNothingIsLeftForTheNextAttempt) {
  Link link(&clock_, {.retry_for_ns = kRetryForNs, .greet_timeout_ns = 2 * kNanosPerSecond});
  link.Start();
  link.feed_->Offer(2);
  link.BreakAndNotice();
  link.Wait();
  const int64_t asked_ns = clock_.MonotonicNs();
  ASSERT_TRUE(link.feed_->Poll(asked_ns).has_value());
  EXPECT_GE(link.feed_->fd(), 0);
  EXPECT_EQ(link.feed_->NextWakeNs(asked_ns), asked_ns + 2 * kNanosPerSecond);
  clock_.AdvanceNs(2 * kNanosPerSecond);
  ASSERT_TRUE(link.feed_->Poll(clock_.MonotonicNs()).has_value());
  EXPECT_EQ(link.feed_->fd(), -1);
  EXPECT_EQ(link.Drive(), "");
  EXPECT_EQ(link.attempts_.size(), 2u);
}

TEST_F(ResumingFeedTest, AnOutageIsNoStall) {
  Link link(&clock_, {.retry_for_ns = kRetryForNs},
            {.batch = 2, .stall_timeout_ns = kNanosPerSecond});
  link.Start();
  link.feed_->Offer(2);
  ASSERT_TRUE(link.feed_->Poll(clock_.MonotonicNs()).has_value());
  link.listening_ = false;
  link.BreakAndNotice();
  const int64_t until_ns = clock_.MonotonicNs() + 5 * kNanosPerSecond;
  while (clock_.MonotonicNs() < until_ns) {
    ASSERT_EQ(link.WaitAndStep(), "");
  }
  link.listening_ = true;
  EXPECT_EQ(link.Drive(), "");
  EXPECT_EQ(link.counts().resumes, 1u);
  // Nor is the time in which there was nothing to settle, until the server lost something.
  clock_.AdvanceNs(5 * kNanosPerSecond);
  link.BreakAndNotice();
  link.server_.RollBackTo(0);
  while (link.counts().resumes < 2) {
    ASSERT_EQ(link.WaitAndStep(), "");
  }
  EXPECT_EQ(link.Drive(), "");
  EXPECT_EQ(link.counts().resumes, 2u);
  EXPECT_EQ(link.server_.StoredIds(), Rows(2));
}

TEST_F(ResumingFeedTest, AConnectionOnWhichNothingMovesIsReplaced) {
  Link link(&clock_, {.retry_for_ns = kRetryForNs},
            {.batch = 2, .stall_timeout_ns = kNanosPerSecond});
  link.Start();
  link.feed_->Offer(2);
  ASSERT_TRUE(link.feed_->Poll(clock_.MonotonicNs()).has_value());  // and no answer
  clock_.AdvanceNs(kNanosPerSecond);
  ASSERT_TRUE(link.feed_->Poll(clock_.MonotonicNs()).has_value());
  EXPECT_FALSE(link.feed_->Streaming());
  EXPECT_EQ(link.Drive(), "");
  EXPECT_EQ(link.server_.StoredIds(), Rows(2));
}

// Several ---------------------------------------------------------------------------------------

TEST_F(ResumingFeedTest, OneBrokenConnectionDoesNotHoldUpTheOthers) {
  std::deque<Link> links;
  for (int i = 0; i < 3; ++i) {
    links.emplace_back(&clock_).Start();
    links.back().feed_->Offer(20);
  }
  links[1].listening_ = false;
  links[1].server_.Break();
  for (int turn = 0; turn < 100; ++turn) {
    for (Link& link : links) {
      ASSERT_EQ(link.Step(), "");
    }
    clock_.AdvanceNs(kNanosPerMilli);
  }
  EXPECT_TRUE(links[0].feed_->AllSettled());
  EXPECT_TRUE(links[2].feed_->AllSettled());
  EXPECT_EQ(links[1].counts().settled, 0u);
  links[1].listening_ = true;
  EXPECT_EQ(links[1].Drive(), "");
  for (const Link& link : links) EXPECT_EQ(link.server_.StoredIds(), Rows(20));
  EXPECT_EQ(links[0].counts().resumes + links[2].counts().resumes, 0u);
}

// Another run -----------------------------------------------------------------------------------

TEST_F(ResumingFeedTest, AFeedMayGoOnWithWhatItsSessionTookBefore) {
  Start();
  link_.feed_->Offer(4);
  ASSERT_EQ(link_.Drive(), "");
  Link later(&clock_, {.retry_for_ns = kRetryForNs}, {.batch = 2, .base = 0});
  later.server_.RollBackTo(4);
  later.Start();
  EXPECT_EQ(later.counts().settled, 4u);
  EXPECT_EQ(later.counts().resumed_ahead, 4u);
  EXPECT_TRUE(later.feed_->AllSettled());
  later.feed_->Offer(3);
  ASSERT_EQ(later.Drive(), "");
  EXPECT_EQ(later.server_.StoredIds(), (std::vector<std::string>{"row4", "row5", "row6"}));
  EXPECT_EQ(later.counts().acked, 7u);
  EXPECT_EQ(later.feed_->feed().ack_latency().Count(), 3u);
  // What an earlier run had acked is this one's to send again.
  later.BreakAndNotice();
  later.server_.RollBackTo(2);
  ASSERT_EQ(later.WaitAndStep(), "");
  ASSERT_EQ(later.Step(), "");
  ASSERT_EQ(later.Drive(), "");
  EXPECT_EQ(later.counts().rolled_back, 5u);
  EXPECT_EQ(later.server_.last(), 7u);
}

TEST_F(ResumingFeedTest, ALossBeforeItsFirstObservationIsAnError) {
  link_.server_.RollBackTo(10);
  Start();
  link_.feed_->Offer(2);
  ASSERT_EQ(link_.Drive(), "");
  link_.BreakAndNotice();
  link_.server_.RollBackTo(8);
  ASSERT_EQ(link_.WaitAndStep(), "");
  EXPECT_NE(link_.Step().find("has lost sequences 9 to 10"), std::string::npos);
}

}  // namespace
}  // namespace engram
