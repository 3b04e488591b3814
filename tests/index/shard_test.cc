#include "index/shard.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/shard_rig.h"

namespace engram {
namespace {

constexpr RefusalReason kNone = RefusalReason::kNone;

Observation Upsert(const std::string& id, std::vector<float> vector, std::string payload = "") {
  return {.id = id, .vector = std::move(vector), .payload = std::move(payload)};
}
Observation Remove(const std::string& id) { return {.op = ObservationOp::kDelete, .id = id}; }
Observation Skip(RefusalReason reason) {
  return {.op = ObservationOp::kSkip, .skip_reason = reason};
}

// ---------------------------------------------------------------------------------------------
// Hello and sessions

TEST(ShardTest, HelloMakesTheSpaceAndSaysWhatItIs) {
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

TEST(ShardTest, AHelloThatIsRefusedOrOnlyRecallsMakesNoSpace) {
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

TEST(ShardTest, SequencesAreTakenInOrderOnce) {
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

TEST(ShardTest, SkipsAndInvalidObservationsUseUpTheirNumber) {
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

TEST(ShardTest, ASecondHelloFencesTheFirstConnection) {
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

TEST(ShardTest, ADetachedSessionIsResumedWhereItWas) {
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

TEST(ShardTest, UnknownSessionsAreExpired) {
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

TEST(ShardTest, SpacesAreLimited) {
  ShardRig rig(ShardRig::SmallOptions(), 1, 256, 2);
  rig.Open(0, 1, "a");
  rig.Open(0, 2, "b");
  EXPECT_EQ(rig.Hello(0, 3, "c").first, RefusalReason::kSpaceLimit);
  EXPECT_EQ(rig.Hello(0, 3, "c", {.wants_session = false}).first, kNone);
  rig.Open(0, 4, "a");
  EXPECT_EQ(rig.counter(ShardCounter::kSpaces), 2u);
}

// ---------------------------------------------------------------------------------------------
// Recall

TEST(ShardTest, RecallOfASpaceThatHoldsNothing) {
  ShardRig rig;
  EXPECT_EQ(rig.Recall("unknown", {1}).reason, RefusalReason::kUnknownSpace);
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  EXPECT_EQ(rig.Recall("s", {1}).reason, RefusalReason::kUnknownSpace);
  rig.Open(0, 2, "said", {.dimension = 2});
  const RigAnswer empty = rig.Recall("said", {1, 2});
  EXPECT_EQ(empty.reason, kNone);
  EXPECT_TRUE(empty.hits.empty());
  EXPECT_EQ(rig.Recall("said", {1}).reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(rig.Recall("said", {0, 0}).reason, RefusalReason::kZeroVector);
  EXPECT_EQ(rig.Observe(&session, Upsert("a", {1})).reason, kNone);
  EXPECT_EQ(rig.Recall("s", {1}).hits.size(), 1u);
  EXPECT_EQ(rig.Observe(&session, Remove("a")).reason, kNone);
  EXPECT_EQ(rig.Recall("s", {1}).reason, kNone);
  EXPECT_TRUE(rig.Recall("s", {1}).hits.empty());
}

TEST(ShardTest, TheSameIdInTwoSpacesIsTwoObservations) {
  ShardRig rig(ShardRig::SmallOptions(), 2);
  RigSession a = rig.Open(0, 1, "a", {.metric = Metric::kL2});
  RigSession b = rig.Open(1, 1, "b", {.metric = Metric::kInnerProduct});
  EXPECT_NE(a.id, b.id);
  EXPECT_EQ(rig.Observe(&a, Upsert("same", {1, 0}, "of a")).reason, kNone);
  EXPECT_EQ(rig.Observe(&b, Upsert("same", {0, 2, 0}, "of b")).reason, kNone);
  const auto payload = [&](const std::string& space, const std::vector<float>& query) {
    const RigAnswer answer = rig.Recall(space, query, {.k = 10, .with_payload = true});
    return answer.hits.size() == 1 ? answer.hits[0].payload : "hits are not one";
  };
  EXPECT_EQ(payload("a", {1, 1}), "of a");
  EXPECT_EQ(payload("b", {1, 1, 1}), "of b");
  EXPECT_EQ(rig.Observe(&a, Upsert("same", {1, 1}, "new of a")).reason, kNone);
  EXPECT_EQ(payload("a", {1, 1}), "new of a");
  EXPECT_EQ(payload("b", {1, 1, 1}), "of b");
  EXPECT_EQ(rig.Observe(&a, Remove("same")).reason, kNone);
  EXPECT_TRUE(rig.Recall("a", {1, 1}).hits.empty());
  EXPECT_EQ(payload("b", {1, 1, 1}), "of b");
  EXPECT_EQ(rig.counter(ShardCounter::kObservationsDeleted), 1u);
}

TEST(ShardTest, RecallGoesFirstThenHighThenNormal) {
  ShardRig rig;
  RigSession normal = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  RigSession high = rig.Open(0, 2, "s");
  high.lane = Lane::kHigh;
  EXPECT_EQ(rig.Observe(&normal, Upsert("a", {1})).reason, kNone);
  EXPECT_EQ(rig.Observe(&high, Upsert("b", {1})).reason, kNone);
  rig.completions.clear();
  for (Sequence i = 0; i < 3; ++i) rig.PushObserve(normal, normal.next + i, Upsert("n", {2}));
  for (Sequence i = 0; i < 3; ++i) rig.PushObserve(high, high.next + i, Upsert("h", {2}));
  for (int i = 0; i < 3; ++i) rig.PushRecall(0, "s", {2});
  rig.Settle();
  std::string order;
  for (const auto& [producer, completion] : rig.completions) {
    if (completion.kind == CompletionKind::kRecallDone) order += 'r';
    if (completion.kind == CompletionKind::kObserve) order += completion.origin == 2 ? 'h' : 'n';
  }
  EXPECT_EQ(order, "rrrhhhnnn");
}

// What was acknowledged before a recall was pushed is in its answer; what was deleted is not. All
// of it in any order of pushes and polls, over the graph's beginning.
TEST(ShardTest, ARecallSeesAllThatWasAcknowledgedBeforeIt) {
  struct Expected {
    std::string id;
    bool live;
  };
  for (uint64_t seed = 1; seed <= 2; ++seed) {
    ShardRig rig(ShardRig::SmallOptions(), 2);
    SplitMix64 random(seed);
    std::vector<RigSession> sessions;
    for (Origin i = 0; i < 4; ++i) {
      sessions.push_back(rig.Open(i % 2, i + 1, "s", {.metric = Metric::kL2, .dimension = 2}));
    }
    // Each number is one place in the plane; an id is used by one session only.
    const auto vector_of = [](uint64_t number) {
      return std::vector<float>{static_cast<float>(number % 100), static_cast<float>(number / 100)};
    };
    std::map<uint64_t, Expected> asked;
    std::map<SlotId, uint64_t> pending[2];  // slot -> number
    std::map<uint64_t, bool> acknowledged;  // number -> live
    std::set<uint64_t> in_flight;
    uint64_t next_number = 0;
    size_t read = rig.completions.size();
    size_t checked = 0;
    for (int step = 0; step < 24'000; ++step) {
      const uint64_t what = random.Below(100);
      RigSession& session = sessions[random.Below(sessions.size())];
      if (what < 80) {
        if (!rig.LaneFull(session) && rig.outstanding(session.producer) < 150) {
          uint64_t number = next_number;
          const bool removes = random.Below(8) == 0 && !acknowledged.empty();
          if (removes) {
            const auto it = acknowledged.lower_bound(random.Below(next_number));
            if (it == acknowledged.end() || !it->second || in_flight.contains(it->first)) continue;
            number = it->first;
          } else {
            ++next_number;
          }
          const std::string id = std::to_string(number);
          const Observation observation = removes ? Remove(id) : Upsert(id, vector_of(number));
          const SlotId slot = rig.PushObserve(session, session.next++, observation);
          pending[session.producer][slot] = number;
          in_flight.insert(number);
        }
      } else if (what < 84 && !acknowledged.empty()) {
        const auto it = acknowledged.lower_bound(random.Below(next_number));
        if (it == acknowledged.end() || in_flight.contains(it->first)) continue;
        const bool live = it->second;
        const uint64_t id = rig.PushRecall(random.Below(2), "s", vector_of(it->first),
                                           {.k = live ? 1U : 20U, .ef = 200});
        asked[id] = {std::to_string(it->first), live};
      } else {
        rig.Poll();
      }
      for (; read < rig.completions.size(); ++read) {
        const auto& [producer, completion] = rig.completions[read];
        if (completion.kind == CompletionKind::kObserve) {
          ASSERT_EQ(completion.reason, kNone) << DescribeRefusal(completion.reason).name;
          const uint64_t number = pending[producer].at(completion.slot);
          pending[producer].erase(completion.slot);
          in_flight.erase(number);
          const bool was = acknowledged.contains(number);
          acknowledged[number] = !was;
        } else if (completion.kind == CompletionKind::kRecallDone) {
          const Expected& expected = asked.at(completion.sequence);
          const std::vector<Hit>& hits = rig.answers[completion.sequence].hits;
          if (expected.live) {
            // It may have been removed after the recall was pushed, never before.
            const bool removed = !acknowledged.at(std::stoull(expected.id)) ||
                                 in_flight.contains(std::stoull(expected.id));
            ASSERT_EQ(hits.size(), 1u);
            if (!removed) {
              ASSERT_EQ(hits[0].id, expected.id) << "step " << step;
            }
          } else {
            for (const Hit& hit : hits) ASSERT_NE(hit.id, expected.id) << "step " << step;
          }
          ++checked;
        }
      }
    }
    EXPECT_GT(checked, 200u);
    EXPECT_TRUE(rig.shard->FindSpace("s")->has_graph());
    const auto sound = rig.shard->CheckInvariants();
    ASSERT_TRUE(sound.has_value()) << sound.error().message;
  }
}

TEST(ShardTest, WithoutResultSlotsAnAnswerWaitsAndGoesOnWhenTheyComeBack) {
  ShardRig rig;
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(rig.Observe(&session, Upsert(std::to_string(i), {static_cast<float>(i)},
                                           std::string(kMaxPayloadBytes - 100, 'p')))
                  .reason,
              kNone);
  }
  rig.hold_results = true;
  std::vector<uint64_t> recalls;
  for (int i = 0; i < 8; ++i) {
    recalls.push_back(rig.PushRecall(0, "s", {0}, {.k = 20, .with_payload = true}));
  }
  const uint64_t spaces = rig.PushIntrospect(0);
  rig.PushObserve(session, session.next, Upsert("later", {1}));
  for (int i = 0; i < 100; ++i) rig.Poll();
  EXPECT_FALSE(rig.answers[recalls.back()].done);
  EXPECT_FALSE(rig.shard->Idle());
  EXPECT_EQ(rig.shard->FindSpace("s")->live(), 20u) << "no change under a recall";
  for (int i = 0; i < 100 && !rig.answers[spaces].done; ++i) {
    rig.ReturnHeldResults();
    for (int poll = 0; poll < 10; ++poll) rig.Poll();
  }
  rig.ReturnHeldResults();
  rig.hold_results = false;
  rig.Settle();
  for (const uint64_t id : recalls) {
    const RigAnswer& answer = rig.answers[id];
    ASSERT_TRUE(answer.done);
    ASSERT_EQ(answer.reason, kNone);
    ASSERT_EQ(answer.hits.size(), 20u);
    for (size_t i = 0; i < 20; ++i) {
      ASSERT_EQ(answer.hits[i].id, std::to_string(i));
      ASSERT_EQ(answer.hits[i].payload_omitted, i >= 16);
    }
    EXPECT_EQ(std::ranges::count(answer.lasts, true), 1);
    EXPECT_TRUE(answer.lasts.back());
  }
  EXPECT_TRUE(rig.answers[spaces].done);
  EXPECT_EQ(rig.shard->FindSpace("s")->live(), 21u);
  EXPECT_EQ(rig.outstanding(0), 0u);
}

TEST(ShardTest, IntrospectionNamesEverySpaceInSeveralBatches) {
  ShardRig rig(ShardRig::SmallOptions(), 2);
  std::map<std::string, uint16_t> wanted;
  for (int i = 0; i < 1'500; ++i) {
    std::string name = "space-" + std::to_string(i);
    name.resize(i % 2 == 0 ? kMaxSpaceNameBytes : name.size(), '_');
    const auto dimension = static_cast<uint16_t>(i % 3 == 0 ? 0 : 1 + i % 100);
    rig.Open(0, static_cast<Origin>(i + 1), name, {.metric = Metric::kL2, .dimension = dimension});
    wanted[name] = dimension;
  }
  RigSession session = rig.Open(1, 1, "space-1");
  for (int i = 0; i < 3; ++i) {
    rig.Observe(&session, Upsert(std::to_string(i), {1, 2}));
  }
  for (const size_t producer : {size_t{1}, size_t{0}}) {
    const uint64_t id = rig.PushIntrospect(producer);
    ASSERT_TRUE(rig.PollUntil([&] { return rig.answers[id].done; }));
    const RigAnswer& answer = rig.answers[id];
    EXPECT_GE(answer.lasts.size(), 2u);
    EXPECT_EQ(std::ranges::count(answer.lasts, true), 1);
    EXPECT_TRUE(answer.lasts.back());
    std::map<std::string, uint16_t> found;
    for (const RigRecord& read : answer.records) {
      EXPECT_TRUE(found.insert({read.name, read.record.dimension}).second) << read.name;
      EXPECT_EQ(read.record.metric, Metric::kL2);
      EXPECT_EQ(read.record.observations, read.name == "space-1" ? 3u : 0u);
      EXPECT_EQ(read.record.unlinked, read.record.observations);
      EXPECT_EQ(read.record.linked, 0u);
      EXPECT_EQ(read.record.resident_bytes > 0, read.name == "space-1");
    }
    EXPECT_EQ(found, wanted);
  }
  ShardRig empty;
  const uint64_t id = empty.PushIntrospect(0);
  ASSERT_TRUE(empty.PollUntil([&] { return empty.answers[id].done; }));
  EXPECT_EQ(empty.answers[id].lasts, std::vector<bool>{true});
}

// ---------------------------------------------------------------------------------------------
// Room and credit

TEST(ShardTest, AFullMemoryRefusesClearlyAndRecallsAndDeletesGoOn) {
  ShardOptions options = ShardRig::SmallOptions();
  options.memory_limit_bytes = size_t{4} << 20;
  ShardRig rig(options);
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  const std::string payload(1'000, 'p');
  int stored = 0;
  Completion last;
  for (; stored < 10'000; ++stored) {
    last = rig.Observe(&session,
                       Upsert(std::to_string(stored), {static_cast<float>(stored), 1}, payload));
    if (last.reason != kNone) break;
  }
  ASSERT_EQ(last.reason, RefusalReason::kMemoryFull);
  EXPECT_GT(stored, 1'000);
  EXPECT_GT(last.retry_after_ms, 0u);
  EXPECT_EQ(session.next, static_cast<Sequence>(stored + 1)) << "its number is not used up";
  // No recall was made before: what it needs was not left to what the observations take.
  const RigAnswer answer = rig.Recall("s", {7, 1}, {.k = 3, .with_payload = true});
  ASSERT_EQ(answer.reason, kNone) << DescribeRefusal(answer.reason).name;
  ASSERT_EQ(answer.hits.size(), 3u);
  EXPECT_EQ(answer.hits[0].id, "7");
  EXPECT_EQ(rig.Hello(0, 2, "s").first, kNone);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(rig.Observe(&session, Remove(std::to_string(i))).reason, kNone);
  }
  rig.Settle();
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(rig.Observe(&session, Upsert("new" + std::to_string(i), {0, 0}, payload)).reason,
              kNone);
  }
  EXPECT_EQ(rig.Recall("s", {0, 0}, {.k = 1}).hits[0].id.substr(0, 3), "new");
  EXPECT_EQ(rig.shard->FindSpace("s")->live(), static_cast<uint64_t>(stored));
  EXPECT_LE(rig.counter(ShardCounter::kMemoryUsedBytes),
            rig.counter(ShardCounter::kMemoryLimitBytes));
  ASSERT_TRUE(rig.shard->CheckInvariants().has_value());
}

// A client without regard for credit: refused at the bound with a time to come back, and taken when
// it does.
TEST(ShardTest, ABacklogIsRefusedWithATimeAndTakenLater) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{5'000} * 128;
  options.max_credit = 100;
  ShardRig rig(options);
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  SplitMix64 random(1);
  std::optional<Completion> refusal;
  std::deque<std::vector<float>> sent;
  size_t read = rig.completions.size();
  for (int i = 0; i < 40'000 && !refusal; ++i) {
    for (int n = 0; n < 64; ++n) {
      rig.PushObserve(session, session.next,
                      Upsert(std::to_string(session.next), QuarterVector(&random, 4)));
      ++session.next;
    }
    rig.Poll();
    for (; read < rig.completions.size() && !refusal; ++read) {
      const Completion& completion = rig.completions[read].second;
      if (completion.kind == CompletionKind::kObserve && completion.reason != kNone) {
        refusal = completion;
      }
    }
  }
  ASSERT_TRUE(refusal.has_value());
  EXPECT_EQ(refusal->reason, RefusalReason::kBacklogFull);
  EXPECT_GE(refusal->retry_after_ms, 1u);
  EXPECT_LE(refusal->retry_after_ms, 1'000u);
  EXPECT_GE(rig.shard->FindSpace("s")->unlinked_count(), 9'900u) << "at twice the limit";
  EXPECT_LE(rig.shard->FindSpace("s")->unlinked_count(), 10'000u);
  session.next = refusal->sequence;
  // Deletes need no room, and the recall is served all the time.
  EXPECT_EQ(rig.Recall("s", QuarterVector(&random, 4)).hits.size(), 10u);
  const int64_t back_ns = rig.clock.MonotonicNs() + refusal->retry_after_ms * kNanosPerMilli;
  while (rig.clock.MonotonicNs() < back_ns) rig.Poll();
  EXPECT_EQ(rig.Observe(&session, Upsert("back", QuarterVector(&random, 4))).reason, kNone);
}

// Would catch memory that fills with what was updated, where linking keeps up and sweeps do not:
// here they must wait, as recalls of earlier snapshots may come.
TEST(ShardTest, UpdatesAheadOfTheSweepsAreHeldBack) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{1'000} * 128;
  options.snapshot_keep_ns = 10 * kNanosPerSecond;
  options.max_credit = 1;
  ShardRig rig(options);
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  SplitMix64 random(1);
  constexpr uint64_t kIds = 5'000;
  const auto update = [&](uint64_t i) {
    return rig.Observe(&session, Upsert(std::to_string(i % kIds), QuarterVector(&random, 4)));
  };
  for (uint64_t i = 0; i < kIds; ++i) {
    while (update(i).reason != kNone) rig.Settle();
  }
  const Space& space = *rig.shard->FindSpace("s");
  bool held_back = false;
  uint64_t updates = 0;
  for (; updates < 20'000 && !held_back; ++updates) {
    rig.Settle();
    ASSERT_EQ(space.unlinked_count(), 0u);
    held_back = update(updates).reason == RefusalReason::kBacklogFull;
  }
  EXPECT_TRUE(held_back);
  EXPECT_LT(space.node_count(), kIds + (kIds + updates) / 4 + 2'100);
  rig.clock.AdvanceNs(options.snapshot_keep_ns);
  rig.Settle();
  EXPECT_EQ(update(0).reason, kNone) << "swept, so there is room";
}

// Would catch a core that goes to sleep, or turns round in spaces that have to wait, while another
// has something to link.
TEST(ShardTest, SpacesThatWaitDoNotKeepOthersFromLinking) {
  ShardOptions options = ShardRig::SmallOptions();
  options.snapshot_keep_ns = 3'600 * kNanosPerSecond;
  ShardRig rig(options);
  SplitMix64 random(1);
  for (int i = 0; i < 60; ++i) {
    const std::string name = "waits-" + std::to_string(i);
    RigSession session = rig.Open(0, static_cast<Origin>(100 + i), name, {.metric = Metric::kL2});
    for (int n = 0; n < 20; ++n) {
      ASSERT_EQ(rig.Observe(&session, Upsert(std::to_string(n), QuarterVector(&random, 4))).reason,
                kNone);
    }
    // The first of the list, which is given back later, or one that is not worth it.
    const std::string updated = std::to_string(i % 2 == 0 ? 0 : 10);
    ASSERT_EQ(rig.Observe(&session, Upsert(updated, QuarterVector(&random, 4))).reason, kNone);
  }
  RigSession session = rig.Open(0, 1, "links", {.metric = Metric::kL2});
  for (int i = 0; i < 6'000; ++i) {
    rig.PushObserve(session, session.next,
                    Upsert(std::to_string(session.next), QuarterVector(&random, 4)));
    ++session.next;
    if (i % 60 == 59) rig.Poll();
  }
  while (rig.outstanding(0) > 0) rig.Poll();
  const Space& space = *rig.shard->FindSpace("links");
  ASSERT_GT(space.unlinked_count(), 1'000u);
  while (space.unlinked_count() > 0) ASSERT_GT(rig.Poll(), 0) << space.unlinked_count() << " wait";
  EXPECT_TRUE(rig.PollUntil([&] { return rig.Poll() == 0; }, 1'000)) << "and then it sleeps";
}

// The promise of FORMAT.md: who keeps to its credit waits, and is never refused for lack of room;
// and nobody waits for ever.
struct CreditCase {
  const char* name;
  int sessions;
  uint16_t producers;
  size_t limit_nodes;
  uint32_t dimension;
  bool all_open_first;
  uint32_t max_credit = 4'096;
};

class ShardCreditTest : public testing::TestWithParam<CreditCase> {};

TEST_P(ShardCreditTest, WhoKeepsToItsCreditIsNeverRefusedAndAlwaysGoesOn) {
  const CreditCase& param = GetParam();
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes =
      param.limit_nodes * VectorFormat(Precision::kInt8, Metric::kL2, param.dimension).row_bytes();
  options.max_credit = param.max_credit;
  ShardRig rig(options, param.producers);
  SplitMix64 random(static_cast<uint64_t>(param.sessions));
  const auto total = static_cast<Sequence>(13'000 / param.sessions);
  struct Client {
    RigSession session;
    Sequence settled = 0;
    bool open = false;
  };
  std::vector<Client> clients(static_cast<size_t>(param.sessions));
  std::map<Origin, size_t> client_of;
  Origin last_origin = 0;
  size_t read = 0;
  const auto take = [&] {
    for (; read < rig.completions.size(); ++read) {
      const Completion& completion = rig.completions[read].second;
      const auto found = client_of.find(completion.origin);
      if (found == client_of.end()) continue;
      Client& client = clients[found->second];
      if (completion.kind == CompletionKind::kObserve) {
        ASSERT_EQ(completion.reason, kNone)
            << DescribeRefusal(completion.reason).name << " for " << completion.sequence;
        client.settled = std::max(client.settled, completion.sequence);
      } else if (completion.kind != CompletionKind::kCredit) {
        continue;
      }
      client.session.credit_sequence =
          std::max(client.session.credit_sequence, completion.credit_sequence);
    }
  };
  const auto open = [&](size_t index) {
    Client& client = clients[index];
    HelloParams params{.metric = Metric::kL2};
    if (client.settled > 0) params.session = client.session.id;
    client.session = rig.Open(index % param.producers, ++last_origin, "s", params);
    ASSERT_EQ(client.session.next, client.settled + 1);
    client_of[last_origin] = index;
    client.open = true;
  };
  if (param.all_open_first) {
    for (size_t i = 0; i < clients.size(); ++i) open(i);
  }
  int idle = 0;
  Sequence done = 0;
  while (done < total * clients.size()) {
    // Bursts of all the credit that there is, then a few rounds.
    for (size_t n = 0; n < clients.size(); ++n) {
      const size_t index = random.Below(clients.size());
      Client& client = clients[index];
      if (!client.open) {
        ASSERT_NO_FATAL_FAILURE(open(index));
        continue;
      }
      const bool at_rest = client.session.next == client.settled + 1;
      if (at_rest && random.Below(200) == 0) {
        rig.Detach(client.session);
        client_of.erase(client.session.origin);
        client.open = false;
        if (random.Below(2) == 0) {
          ASSERT_NO_FATAL_FAILURE(open(index));
        }
        continue;
      }
      while (client.session.next <= std::min<uint64_t>(client.session.credit_sequence, total) &&
             !rig.LaneFull(client.session) && rig.outstanding(client.session.producer) < 250) {
        rig.PushObserve(client.session, client.session.next,
                        Upsert(std::to_string(index) + "." + std::to_string(client.session.next),
                               QuarterVector(&random, param.dimension)));
        ++client.session.next;
      }
    }
    const uint64_t rounds = 1 + random.Below(8);
    for (uint64_t i = 0; i < rounds; ++i) rig.Poll();
    ASSERT_NO_FATAL_FAILURE(take());
    Sequence now = 0;
    for (const Client& client : clients) now += client.settled;
    idle = now == done ? idle + 1 : 0;
    ASSERT_LT(idle, 3'000) << "stalled at " << done << " of " << total * clients.size() << ", "
                           << rig.shard->FindSpace("s")->unlinked_count() << " unlinked";
    done = now;
  }
  EXPECT_EQ(rig.counter(ShardCounter::kObservationsRefused), 0u);
  EXPECT_TRUE(rig.shard->FindSpace("s")->has_graph());
}

INSTANTIATE_TEST_SUITE_P(
    Cases, ShardCreditTest,
    testing::Values(
        CreditCase{"One", 1, 1, 5'000, 2, false}, CreditCase{"Five", 5, 2, 5'000, 2, false},
        CreditCase{"FortyAtOnce", 40, 3, 5'000, 2, true},
        CreditCase{"FortyAtOnceLargeCredit", 40, 3, 5'000, 2, true, 100'000},
        CreditCase{"FortyInTurn", 40, 3, 4'200, 2, false},
        // Fewer than a space holds before it begins a graph: the default with 4,096 dimensions.
        CreditCase{"LimitAtTheGraphsBeginning", 3, 1, 4'096, 2, false},
        CreditCase{"TinyLimit", 4, 1, 100, 2, false},
        // More sessions than vectors that may wait.
        CreditCase{"MoreSessionsThanRoom", 130, 2, 100, 2, true}),
    [](const auto& param) { return std::string(param.param.name); });

TEST(ShardTest, CreditIsAnnouncedWhenLinkingFreesRoom) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{4'200} * 128;
  options.max_credit = 64;
  ShardRig rig(options);
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  SplitMix64 random(1);
  size_t read = 0;
  bool starved = false;
  for (int i = 0; i < 2'000 && !starved; ++i) {
    while (session.next <= session.credit_sequence) {
      rig.PushObserve(session, session.next,
                      Upsert(std::to_string(session.next), QuarterVector(&random, 2)));
      ++session.next;
    }
    rig.Poll();
    rig.Poll();
    for (; read < rig.completions.size(); ++read) {
      session.credit_sequence =
          std::max(session.credit_sequence, rig.completions[read].second.credit_sequence);
    }
    starved = rig.outstanding(0) == 0 && session.next > session.credit_sequence;
  }
  ASSERT_TRUE(starved);
  EXPECT_GE(rig.shard->FindSpace("s")->unlinked_count(), 4'096u);
  const auto credit = [&] { return rig.completions.back().second.kind == CompletionKind::kCredit; };
  ASSERT_TRUE(rig.PollUntil(credit));
  EXPECT_EQ(rig.completions.back().second.origin, 1u);
  EXPECT_GE(rig.completions.back().second.credit_sequence, session.next);
  EXPECT_LE(rig.completions.back().second.credit_sequence, session.next + 63);
}

// A session without credit, room made by another's deletes alone: nothing is left to link, and the
// first must still hear of it.
TEST(ShardTest, CreditIsAnnouncedAlsoWhenDeletesFreeTheRoom) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{4'200} * 128;
  options.max_credit = 6'000;
  options.snapshot_keep_ns = 3'600 * kNanosPerSecond;  // No sweep frees room.
  ShardRig rig(options, 1, 8'192);
  RigSession eager = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  RigSession cleaner = rig.Open(0, 2, "s");
  cleaner.lane = Lane::kHigh;
  SplitMix64 random(1);
  // Ten at a time, so that little is linked before all is deleted again.
  size_t read = 0;
  const auto take = [&] {
    for (; read < rig.completions.size(); ++read) {
      const Completion& completion = rig.completions[read].second;
      RigSession& session = completion.origin == 1 ? eager : cleaner;
      session.credit_sequence = std::max(session.credit_sequence, completion.credit_sequence);
    }
  };
  for (int round = 0; round < 10'000; ++round) {
    while (eager.next <= eager.credit_sequence && !rig.LaneFull(eager)) {
      rig.PushObserve(eager, eager.next,
                      Upsert(std::to_string(eager.next), QuarterVector(&random, 2)));
      ++eager.next;
    }
    while (rig.outstanding(0) > 0) rig.Poll();
    take();
    if (eager.next > eager.credit_sequence) break;
  }
  ASSERT_GT(eager.next, eager.credit_sequence) << "the first session has used up its credit";
  // All but the last few; then, when the linker has just finished a node, these at once.
  const Space& space = *rig.shard->FindSpace("s");
  Sequence removed = 0;
  while (space.live() > 40) {
    for (int i = 0; i < 20; ++i) {
      rig.PushObserve(cleaner, cleaner.next++, Remove(std::to_string(++removed)));
    }
    rig.Poll();
  }
  ASSERT_GT(space.unlinked_count(), 2u);
  const uint64_t linked = rig.counter(ShardCounter::kObservationsLinked);
  ASSERT_TRUE(
      rig.PollUntil([&] { return rig.counter(ShardCounter::kObservationsLinked) > linked; }));
  take();
  ASSERT_GT(eager.next, eager.credit_sequence) << "still without credit";
  while (removed + 1 < eager.next) {
    rig.PushObserve(cleaner, cleaner.next++, Remove(std::to_string(++removed)));
  }
  rig.Settle();
  take();
  EXPECT_EQ(space.live(), 0u);
  EXPECT_GE(eager.credit_sequence, eager.next);
}

// A producer that is slow to take its completions has room for some notices only. What was left out
// must be said later.
TEST(ShardTest, CreditThatCouldNotBeAnnouncedIsAnnouncedLater) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{4'200} * 128;
  options.max_credit = 64;
  ShardRig rig(options, 1, 8'192);
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  RigSession noisy = rig.Open(0, 2, "s");
  SplitMix64 random(1);
  size_t read = 0;
  const auto take = [&] {
    for (; read < rig.completions.size(); ++read) {
      const Completion& completion = rig.completions[read].second;
      if (completion.origin != 1) continue;
      session.credit_sequence = std::max(session.credit_sequence, completion.credit_sequence);
    }
  };
  for (bool starved = false; !starved;) {
    while (session.next <= session.credit_sequence) {
      rig.PushObserve(session, session.next,
                      Upsert(std::to_string(session.next), QuarterVector(&random, 2)));
      ++session.next;
    }
    rig.Poll();
    take();
    starved = rig.outstanding(0) == 0 && session.next > session.credit_sequence;
    ASSERT_LT(session.next, 100'000u);
  }
  // Gaps are refused and do not change anything; their completions fill the ring.
  rig.hold_completions = true;
  for (uint32_t i = 0; i < kNoticeRoom + 200; ++i) {
    rig.PushObserve(noisy, 1'000, Upsert("gap", {1, 1}));
  }
  for (int i = 0; i < 100; ++i) rig.Poll();
  for (int i = 0; i < 300'000 && rig.shard->FindSpace("s")->unlinked_count() > 0; ++i) rig.Poll();
  ASSERT_EQ(rig.shard->FindSpace("s")->unlinked_count(), 0u);
  rig.Poll();
  rig.Poll();
  rig.hold_completions = false;
  rig.Settle();
  take();
  EXPECT_GE(session.credit_sequence, session.next);
}

// Credit that was granted to a connection that is gone does not count for the next one: else many
// sessions could gather all of the room each, one after the other.
TEST(ShardTest, AResumedSessionIsGivenItsShareAnew) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{5'000} * 128;
  options.max_credit = 5'000;
  ShardRig rig(options);
  std::vector<RigSession> sessions;
  for (Origin i = 1; i <= 10; ++i) {
    sessions.push_back(rig.Open(0, i, "s", {.dimension = 2}));
    EXPECT_GE(sessions.back().credit_sequence, 4'990u);
    EXPECT_EQ(rig.Observe(&sessions.back(), Upsert(std::to_string(i), {1, 1})).reason, kNone);
    rig.Detach(sessions.back());
  }
  uint64_t promised = 0;
  for (RigSession& session : sessions) {
    session = rig.Open(0, 100 + session.origin, "s", {.session = session.id});
    promised += session.credit_sequence - session.last_settled;
  }
  EXPECT_LE(promised, 15'000u) << "5,000 x (1 + 1/2 + ... + 1/10)";
}

// ---------------------------------------------------------------------------------------------
// The whole

// A program of everything, and what came of it.
struct Outcome {
  uint64_t trace = 0;  // of all completions and hits
  std::map<std::string, uint64_t> counted;
};

Outcome RunProgram(uint64_t seed, uint64_t shard_seed, ShardRig* rig) {
  Outcome outcome;
  SplitMix64 random(seed);
  std::vector<RigSession> sessions;
  Origin last_origin = 0;
  size_t read = 0;
  const auto mix = [&](uint64_t value) { outcome.trace = MixBits(outcome.trace ^ value); };
  mix(shard_seed);
  for (int step = 0; step < 4'000; ++step) {
    const uint64_t what = random.Below(100);
    const std::string space = "space" + std::to_string(random.Below(3));
    if (sessions.empty() || (what < 2 && sessions.size() < 12)) {
      sessions.push_back(rig->Open(random.Below(2), ++last_origin, space,
                                   {.metric = static_cast<Metric>(1 + space.back() % 3)}));
      sessions.back().lane = random.Below(2) == 0 ? Lane::kHigh : Lane::kNormal;
      continue;
    }
    RigSession& session = sessions[random.Below(sessions.size())];
    const bool room = rig->outstanding(session.producer) < 120 && !rig->LaneFull(session);
    if (what < 3 && session.next > 1) {
      rig->Settle();
      const RigSession old = session;
      if (random.Below(2) == 0) rig->Detach(old);
      session = rig->Open(random.Below(2), ++last_origin, old.space, {.session = old.id});
      session.lane = old.lane;
    } else if (what < 60 && room) {
      const std::string id = std::to_string(random.Below(300));
      const uint64_t kind = random.Below(20);
      Observation observation = Upsert(id, QuarterVector(&random, 3), std::string(kind, 'p'));
      if (kind < 3) observation = Remove(id);
      if (kind == 3) observation = Skip(RefusalReason::kBadConfidence);
      if (kind == 4) observation.vector.push_back(1);
      const uint64_t fault = random.Below(40);
      if (fault == 0) {
        rig->PushObserve(session, session.next + 5, observation);
      } else if (fault == 1 && session.next > 1) {
        rig->PushObserve(session, session.next - 1, observation);
      } else {
        rig->PushObserve(session, session.next++, observation);
      }
    } else if (what < 70 && rig->outstanding(0) < 120) {
      rig->PushRecall(
          0, random.Below(10) == 0 ? "nowhere" : space, QuarterVector(&random, 3),
          {.k = static_cast<uint32_t>(1 + random.Below(30)), .with_payload = random.Below(2) == 0});
    } else if (what < 71 && rig->outstanding(1) < 120) {
      rig->PushIntrospect(1);
    } else {
      rig->Poll();
    }
  }
  rig->Settle();
  for (; read < rig->completions.size(); ++read) {
    const auto& [producer, completion] = rig->completions[read];
    for (const uint64_t value :
         {uint64_t{producer}, static_cast<uint64_t>(completion.kind),
          static_cast<uint64_t>(completion.reason), uint64_t{completion.repeated},
          uint64_t{completion.slot}, uint64_t{completion.result_slot}, completion.origin,
          completion.sequence, completion.credit_sequence, uint64_t{completion.retry_after_ms}}) {
      mix(value);
    }
    if (completion.kind == CompletionKind::kRecallDone) ++outcome.counted["recalls"];
    if (completion.kind != CompletionKind::kObserve) continue;
    if (completion.reason == kNone) {
      ++outcome.counted[completion.repeated ? "repeated" : "accepted"];
    } else if (DescribeRefusal(completion.reason).effect == RefusalEffect::kConsumes) {
      ++outcome.counted["skipped"];
    } else {
      ++outcome.counted["refused"];
    }
  }
  for (const auto& [id, answer] : rig->answers) {
    for (const Hit& hit : answer.hits) {
      mix(HashString(hit.id, 1) ^ std::bit_cast<uint32_t>(hit.score));
    }
  }
  for (const RigSession& session : sessions) mix(session.id.value());
  return outcome;
}

TEST(ShardTest, TheSameSeedAndProgramGiveTheSameCompletions) {
  const auto trace = [](uint64_t seed, uint64_t shard_seed) {
    ShardOptions options = ShardRig::SmallOptions();
    options.seed = shard_seed;
    ShardRig rig(options, 2);
    return RunProgram(seed, 0, &rig).trace;
  };
  const uint64_t first = trace(3, 4);
  EXPECT_EQ(trace(3, 4), first);
  EXPECT_NE(trace(3, 5), first) << "session ids depend on the seed";
  EXPECT_NE(trace(4, 4), first);
}

TEST(ShardTest, CountersReconcileWithWhatCameBack) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    ShardRig rig(ShardRig::SmallOptions(), 2);
    Outcome outcome = RunProgram(seed, 0, &rig);
    EXPECT_GT(outcome.counted["accepted"], 500u);
    EXPECT_GT(outcome.counted["repeated"], 10u);
    EXPECT_GT(outcome.counted["refused"], 10u);
    EXPECT_EQ(rig.counter(ShardCounter::kObservationsSkipped), outcome.counted["skipped"]);
    EXPECT_EQ(rig.counter(ShardCounter::kObservationsRefused), outcome.counted["refused"]);
    EXPECT_EQ(rig.counter(ShardCounter::kRecalls), outcome.counted["recalls"]);
    EXPECT_EQ(rig.shard->receive_to_visible().Count(), outcome.counted["accepted"]);
    // Accepted are what was stored, and deletes of known and of unknown ids.
    EXPECT_LE(rig.counter(ShardCounter::kObservationsStored) +
                  rig.counter(ShardCounter::kObservationsDeleted),
              outcome.counted["accepted"]);
    EXPECT_GT(rig.counter(ShardCounter::kObservationsDeleted), 10u);
    EXPECT_EQ(rig.counter(ShardCounter::kSpaces), 3u);
    EXPECT_GT(rig.counter(ShardCounter::kMemoryUsedBytes), 0u);
    EXPECT_EQ(rig.counter(ShardCounter::kMemoryLimitBytes), size_t{256} << 20);
    for (size_t producer = 0; producer < 2; ++producer) {
      EXPECT_EQ(rig.outstanding(producer), 0u) << "every slot came back";
    }
    ASSERT_TRUE(rig.shard->CheckInvariants().has_value());
    CounterCatalogue catalogue;
    rig.shard->AddCounters("shard0", &catalogue);
    std::set<std::string_view> names;
    for (const CounterView& view : catalogue) {
      EXPECT_FALSE(view.name.empty());
      EXPECT_TRUE(names.insert(view.name).second);
    }
    EXPECT_EQ(names.size(), static_cast<size_t>(ShardCounter::kCount));
  }
}

TEST(ShardTest, NothingIsAllocatedAfterWarmUp) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer has its own operator new";
  ShardRig rig(ShardRig::SmallOptions(), 2);
  SplitMix64 random(1);
  std::vector<RigSession> sessions;
  for (Origin i = 0; i < 4; ++i) {
    sessions.push_back(rig.Open(i % 2, i + 1, i < 3 ? "large" : "small", {.metric = Metric::kL2}));
  }
  const auto run = [&](int rounds) {
    for (int round = 0; round < rounds; ++round) {
      for (RigSession& session : sessions) {
        for (int i = 0; i < 30; ++i) {
          const std::string id = std::to_string(random.Below(20'000));
          rig.PushObserve(session, session.next++,
                          random.Below(10) == 0
                              ? Remove(id)
                              : Upsert(id, QuarterVector(&random, 4), std::string(20, 'p')));
        }
      }
      rig.PushRecall(0, round % 2 == 0 ? "large" : "small", QuarterVector(&random, 4),
                     {.k = 100, .with_payload = true});
      while (rig.outstanding(0) + rig.outstanding(1) > 0) rig.Poll();
      for (int i = 0; i < 20; ++i) rig.Poll();
    }
  };
  run(20);
  rig.poll_allocations = 0;
  run(100);
  const uint64_t before_sessions = rig.poll_allocations;
  EXPECT_EQ(before_sessions, 0u);
  EXPECT_GT(rig.counter(ShardCounter::kObservationsLinked), 100u);
  // Sessions of known spaces come and go without any, too.
  RigSession session = sessions[0];
  for (int i = 0; i < 50; ++i) {
    rig.Detach(session);
    session = rig.Open(0, static_cast<Origin>(100 + i), "large", {.session = session.id});
  }
  EXPECT_EQ(rig.poll_allocations, 0u);
}

}  // namespace
}  // namespace engram
