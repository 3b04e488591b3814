// A shard and its sessions: hellos, numbers of observations, takeovers, resumes.

#include <gtest/gtest.h>

#include <string>

#include "tests/index/shard_observations.h"
#include "tests/index/shard_rig.h"

namespace engram {
namespace {

TEST(ShardSessionsTest, HelloMakesTheSpaceAndSaysWhatItIs) {
  ShardRig rig;
  const auto [reason, answer] = rig.Hello(0, 5, "s", {.metric = Metric::kL2, .dimension = 3});
  EXPECT_EQ(reason, kNone);
  EXPECT_NE(answer.session.value(), 0u);
  EXPECT_EQ(answer.metric, Metric::kL2);
  EXPECT_EQ(answer.dimension, 3u);
  EXPECT_EQ(answer.last_sequence, 0u);
  EXPECT_GT(answer.credit, 0u);
  ASSERT_NE(rig.shard->FindSpace("s"), nullptr);
  EXPECT_EQ(rig.shard->FindSpace("S"), nullptr);
  const auto [again, known] = rig.Hello(0, 6, "s", {.wants_session = false});
  EXPECT_EQ(again, kNone);
  EXPECT_EQ(known.metric, Metric::kL2);
  EXPECT_EQ(known.dimension, 3u);
  EXPECT_EQ(rig.Hello(0, 7, "s", {.metric = Metric::kCosine}).first,
            RefusalReason::kMetricMismatch);
  EXPECT_EQ(rig.Hello(0, 7, "s", {.dimension = 4}).first, RefusalReason::kDimensionMismatch);
  EXPECT_EQ(rig.Hello(0, 7, "s", {.metric = Metric::kL2, .dimension = 3}).first, kNone);
  EXPECT_EQ(rig.Hello(0, 8, "default").second.metric, Metric::kCosine);
  EXPECT_EQ(rig.counter(ShardCounter::kSpaces), 2u);
  EXPECT_EQ(rig.counter(ShardCounter::kSessions), 3u);
}

TEST(ShardSessionsTest, AHelloThatIsRefusedOrOnlyRecallsMakesNoSpace) {
  ShardRig rig;
  EXPECT_EQ(rig.Hello(0, 1, "unknown", {.wants_session = false}).first, kNone);
  EXPECT_EQ(rig.shard->FindSpace("unknown"), nullptr);
  EXPECT_EQ(rig.Hello(0, 1, "unknown", {.session = SessionId(12'345)}).first,
            RefusalReason::kSessionExpired);
  EXPECT_EQ(rig.shard->FindSpace("unknown"), nullptr);
  RigSession session = rig.Open(0, 2, "mine");
  EXPECT_EQ(rig.Observe(&session, Upsert("a", {1, 2})).reason, kNone);
  EXPECT_EQ(rig.Hello(0, 3, "unknown", {.session = session.id}).first,
            RefusalReason::kSessionSpaceMismatch);
  EXPECT_EQ(rig.shard->FindSpace("unknown"), nullptr);
  EXPECT_EQ(rig.Observe(&session, Upsert("b", {1, 2})).reason, kNone) << "and fences nobody";
}

TEST(ShardSessionsTest, SequencesAreTakenInOrderOnce) {
  ShardRig rig;
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  EXPECT_EQ(rig.ObserveAs(&session, 2, Upsert("b", {2})).reason, RefusalReason::kSequenceGap);
  EXPECT_EQ(rig.ObserveAs(&session, 1, Upsert("a", {1})).reason, kNone);
  Completion repeat = rig.ObserveAs(&session, 1, Upsert("other", {7}));
  EXPECT_EQ(repeat.reason, kNone);
  EXPECT_TRUE(repeat.repeated);
  EXPECT_EQ(rig.shard->FindSpace("s")->live(), 1u) << "a repeat stores nothing";
  EXPECT_EQ(rig.ObserveAs(&session, 3, Upsert("c", {3})).reason, RefusalReason::kSequenceGap);
  const Completion second = rig.ObserveAs(&session, 2, Upsert("b", {2}));
  EXPECT_EQ(second.reason, kNone);
  EXPECT_FALSE(second.repeated);
  EXPECT_EQ(second.sequence, 2u);
  EXPECT_TRUE(rig.ObserveAs(&session, 0, Upsert("z", {2})).repeated);
  EXPECT_EQ(rig.shard->FindSpace("s")->live(), 2u);
}

// Numbers that were refused, on the way or here, leave gaps that the next one taken closes.
TEST(ShardSessionsTest, WhoNeverGoesBackHasGaps) {
  ShardRig rig;
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kCosine});
  session.may_skip = true;
  EXPECT_EQ(rig.ObserveAs(&session, 4, Upsert("d", {4, 1})).reason, kNone);
  EXPECT_TRUE(rig.ObserveAs(&session, 2, Upsert("b", {2, 1})).repeated) << "it is settled";
  EXPECT_EQ(rig.ObserveAs(&session, 5, Skip(RefusalReason::kMemoryFull)).reason,
            RefusalReason::kMemoryFull);
  EXPECT_EQ(rig.ObserveAs(&session, 6, Skip(RefusalReason::kMemoryFull)).reason,
            RefusalReason::kMemoryFull);
  rig.Detach(session);
  RigSession resumed = rig.Open(0, 2, "s", {.session = session.id});
  resumed.may_skip = true;
  EXPECT_EQ(resumed.last_settled, 4u) << "what waits is not remembered";
  EXPECT_GT(resumed.credit_sequence, 4u);
  EXPECT_FALSE(rig.ObserveAs(&resumed, 5, Upsert("e", {5, 1})).repeated);
  EXPECT_EQ(rig.ObserveAs(&resumed, 9, Upsert("zero", {0, 0})).reason, RefusalReason::kZeroVector);
  EXPECT_TRUE(rig.ObserveAs(&resumed, 8, Upsert("h", {8, 1})).repeated);
  EXPECT_EQ(rig.shard->FindSpace("s")->live(), 2u);
  // A client that goes back resumes it: no gaps for that one.
  rig.Detach(resumed);
  RigSession strict = rig.Open(0, 3, "s", {.session = session.id});
  EXPECT_EQ(strict.last_settled, 9u) << "what is refused for good is remembered";
  EXPECT_EQ(rig.ObserveAs(&strict, 11, Upsert("k", {1, 1})).reason, RefusalReason::kSequenceGap);
  EXPECT_EQ(rig.ObserveAs(&strict, 10, Upsert("k", {1, 1})).reason, kNone);
}

TEST(ShardSessionsTest, SkipsAndInvalidObservationsUseUpTheirNumber) {
  ShardRig rig;
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kCosine});
  EXPECT_EQ(rig.Observe(&session, Skip(RefusalReason::kBadId)).reason, RefusalReason::kBadId);
  EXPECT_EQ(rig.Observe(&session, Upsert("a", {1, 2})).reason, kNone);
  const Completion wrong = rig.Observe(&session, Upsert("b", {1, 2, 3}));
  EXPECT_EQ(wrong.reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(rig.last_space_dimension, 2u) << "the answer says what the space has";
  EXPECT_EQ(rig.Observe(&session, Upsert("b", {0, 0})).reason, RefusalReason::kZeroVector);
  EXPECT_EQ(session.next, 5u);
  EXPECT_EQ(rig.Observe(&session, Upsert("b", {2, 1})).reason, kNone);
  EXPECT_TRUE(rig.ObserveAs(&session, 1, Upsert("x", {1, 1})).repeated) << "a skip is settled";
  EXPECT_EQ(rig.ObserveAs(&session, 6, Skip(RefusalReason::kQueueFull)).reason,
            RefusalReason::kQueueFull);
  EXPECT_EQ(rig.ObserveAs(&session, 6, Upsert("c", {2, 1})).reason, kNone)
      << "a reason that waits does not use up the number";
  EXPECT_EQ(rig.shard->FindSpace("s")->live(), 3u);
  EXPECT_EQ(rig.counter(ShardCounter::kObservationsSkipped), 3u);
  EXPECT_EQ(rig.counter(ShardCounter::kObservationsRefused), 1u);
}

TEST(ShardSessionsTest, ASecondHelloFencesTheFirstConnection) {
  ShardRig rig(ShardRig::SmallOptions(), 2);
  RigSession first = rig.Open(0, 11, "s", {.metric = Metric::kL2});
  EXPECT_EQ(rig.Observe(&first, Upsert("a", {1})).reason, kNone);
  // What the first had in the lane when the second came is not taken.
  const SlotId late = rig.PushObserve(first, 2, Upsert("late", {2}));
  rig.completions.clear();
  RigSession second = rig.Open(1, 22, "s", {.session = first.id});
  EXPECT_EQ(second.id, first.id);
  EXPECT_EQ(second.next, 2u);
  bool fenced = false;
  bool refused = false;
  for (const auto& [producer, completion] : rig.completions) {
    if (completion.kind == CompletionKind::kFenced) {
      EXPECT_EQ(producer, 0u);
      EXPECT_EQ(completion.origin, 11u);
      fenced = true;
    }
    if (completion.kind == CompletionKind::kObserve && completion.slot == late) {
      EXPECT_EQ(completion.reason, RefusalReason::kFenced);
      refused = true;
    }
  }
  EXPECT_TRUE(fenced);
  EXPECT_TRUE(refused);
  EXPECT_EQ(rig.Observe(&first, Upsert("b", {2})).reason, RefusalReason::kFenced);
  rig.Detach(first);  // Says nothing about the session that it no longer holds.
  EXPECT_EQ(rig.Observe(&second, Upsert("b", {2})).reason, kNone);
  EXPECT_EQ(rig.counter(ShardCounter::kSessions), 1u);
  // Taken over on the same producer, too.
  const RigSession gone = second;
  second = rig.Open(1, 33, "s", {.session = first.id});
  rig.Detach(gone);
  EXPECT_EQ(rig.Observe(&second, Upsert("still", {2})).reason, kNone);
  // The same origin's number at another producer is another connection.
  RigSession other = second;
  other.producer = 0;
  EXPECT_EQ(rig.Observe(&other, Upsert("c", {2})).reason, RefusalReason::kFenced);
  rig.Detach(other);
  EXPECT_EQ(rig.Observe(&second, Upsert("c", {2})).reason, kNone);
}

TEST(ShardSessionsTest, ADetachedSessionIsResumedWhereItWas) {
  ShardRig rig;
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(rig.Observe(&session, Upsert(std::to_string(i), {1})).reason, kNone);
  }
  // Still in the lane when the connection ends: taken, as nobody else holds the session.
  rig.PushObserve(session, 6, Upsert("5", {1}));
  rig.Detach(session);
  RigSession resumed = rig.Open(0, 2, "s", {.session = session.id});
  EXPECT_EQ(resumed.next, 7u);
  EXPECT_EQ(rig.Observe(&resumed, Upsert("6", {1})).reason, kNone);
  EXPECT_EQ(rig.Observe(&session, Upsert("7", {1})).reason, RefusalReason::kFenced);
  EXPECT_EQ(rig.shard->FindSpace("s")->live(), 7u);
}

TEST(ShardSessionsTest, UnknownSessionsAreExpired) {
  ShardOptions options = ShardRig::SmallOptions();
  options.max_sessions = 2;
  options.session_idle_timeout_ns = 50 * kNanosPerSecond;
  ShardRig rig(options);
  RigSession first = rig.Open(0, 1, "s");
  RigSession second = rig.Open(0, 2, "s");
  EXPECT_EQ(rig.Observe(&first, Upsert("a", {1})).reason, kNone);
  EXPECT_EQ(rig.Observe(&second, Upsert("b", {1})).reason, kNone);
  EXPECT_EQ(rig.Hello(0, 3, "s").first, RefusalReason::kSessionLimit);
  rig.Detach(first);
  EXPECT_EQ(rig.Hello(0, 3, "s").first, RefusalReason::kSessionLimit) << "not idle long enough";
  rig.clock.AdvanceNs(options.session_idle_timeout_ns);
  RigSession third = rig.Open(0, 3, "s");
  EXPECT_EQ(rig.Hello(0, 4, "s", {.session = first.id}).first, RefusalReason::kSessionLimit)
      << "known, but there is no room to resume it";
  EXPECT_EQ(rig.Observe(&first, Upsert("c", {1})).reason, RefusalReason::kSessionExpired);
  EXPECT_EQ(rig.Observe(&second, Upsert("c", {1})).reason, kNone) << "attached ones stay";
  rig.Detach(third);
  EXPECT_EQ(rig.Hello(0, 4, "s", {.session = third.id}).first, RefusalReason::kSessionExpired)
      << "it took nothing, so there is nothing to resume";
  EXPECT_EQ(rig.counter(ShardCounter::kSessions), 1u);
  RigSession again = rig.Open(0, 4, "s", {.session = first.id});
  EXPECT_EQ(again.last_settled, 1u);
  EXPECT_EQ(rig.Observe(&again, Upsert("c", {1})).reason, kNone);
  rig.Detach(again);
  rig.clock.AdvanceNs(options.session_idle_timeout_ns);
  rig.shard->Poll();
  EXPECT_EQ(rig.counter(ShardCounter::kSessions), 1u) << "out of the way";
  rig.clock.AdvanceNs(options.session_keep_ns - options.session_idle_timeout_ns - kNanosPerSecond);
  EXPECT_EQ(rig.Hello(0, 5, "other", {.session = first.id}).first,
            RefusalReason::kSessionSpaceMismatch);
  rig.clock.AdvanceNs(2 * kNanosPerSecond);
  EXPECT_EQ(rig.Hello(0, 5, "s", {.session = first.id}).first, RefusalReason::kSessionExpired);
}

TEST(ShardSessionsTest, SpacesAreLimited) {
  ShardRig rig(ShardRig::SmallOptions(), 1, 256, 2);
  rig.Open(0, 1, "a");
  rig.Open(0, 2, "b");
  EXPECT_EQ(rig.Hello(0, 3, "c").first, RefusalReason::kSpaceLimit);
  EXPECT_EQ(rig.Hello(0, 3, "c", {.wants_session = false}).first, kNone);
  rig.Open(0, 4, "a");
  EXPECT_EQ(rig.counter(ShardCounter::kSpaces), 2u);
}

}  // namespace
}  // namespace engram
