// What a shard answers: recalls and introspection, and in which order it serves.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/shard_observations.h"
#include "tests/index/shard_rig.h"

namespace engram {
namespace {

TEST(ShardRecallTest, RecallOfASpaceThatHoldsNothing) {
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

TEST(ShardRecallTest, TheSameIdInTwoSpacesIsTwoObservations) {
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

// As one space of all of them would answer, each hit with the space that it is of.
TEST(ShardRecallTest, AllSpacesOfAKindAreRecalledTogether) {
  ShardRig rig;
  SplitMix64 random(3);
  struct Stored {
    double distance;
    std::string id;
    std::string space;
    bool operator<(const Stored& other) const {
      return std::tie(distance, space) < std::tie(other.distance, other.space);
    }
  };
  const std::vector<float> query = {0, 0};
  std::vector<Stored> stored;
  // More than are looked at in a slice; ids are the same in each.
  for (int s = 0; s < 150; ++s) {
    const std::string space = "s" + std::to_string(s);
    RigSession session = rig.Open(0, 100 + s, space, {.metric = Metric::kL2});
    for (int i = 0; i < s % 5; ++i) {
      const std::vector<float> vector = {static_cast<float>(random.Below(1'000'000)), 1};
      const std::string id = "id" + std::to_string(i);
      ASSERT_EQ(rig.Observe(&session, Upsert(id, vector, "in " + space)).reason, kNone);
      stored.push_back({ExactScore(Metric::kL2, vector, query), id, space});
    }
  }
  std::sort(stored.begin(), stored.end());
  // Of another metric, and of another dimension.
  RigSession other = rig.Open(0, 1, "other", {.metric = Metric::kInnerProduct});
  ASSERT_EQ(rig.Observe(&other, Upsert("x", {0, 0})).reason, kNone);
  RigSession wide = rig.Open(0, 2, "wide", {.metric = Metric::kL2});
  ASSERT_EQ(rig.Observe(&wide, Upsert("x", {0, 0, 0})).reason, kNone);

  for (const uint32_t k : {1U, 7U, 100U, 10'000U}) {
    const RigAnswer answer =
        rig.Recall("", query, {.k = k, .with_payload = true, .first = 10, .across = Metric::kL2});
    ASSERT_EQ(answer.reason, kNone);
    ASSERT_EQ(answer.hits.size(), std::min<size_t>(k, stored.size()));
    for (size_t i = 0; i < answer.hits.size(); ++i) {
      EXPECT_EQ(answer.hits[i].id, stored[i].id);
      EXPECT_EQ(answer.hits[i].space, stored[i].space);
      EXPECT_EQ(answer.hits[i].payload, "in " + stored[i].space);
    }
  }
  // A bound holds over all of them, and one space goes on naming none.
  const auto bound = static_cast<float>((stored[4].distance + stored[5].distance) / 2);
  EXPECT_EQ(rig.Recall("", query, {.k = 100, .bound = bound, .across = Metric::kL2}).hits.size(),
            5u);
  EXPECT_EQ(rig.Recall("s1", query, {.k = 1}).hits.at(0).space, "");
  // Nothing is of that kind.
  const RigAnswer none = rig.Recall("", {1, 2, 3, 4}, {.k = 5, .across = Metric::kL2});
  EXPECT_EQ(none.reason, kNone);
  EXPECT_TRUE(none.hits.empty());
}

TEST(ShardRecallTest, ALongRecallGoesOnOnceItsFirstOnesWentOut) {
  ShardRig rig;
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  for (int i = 0; i < 1'000; ++i) {
    const std::string id = std::to_string(i);
    ASSERT_EQ(rig.Observe(&session, Upsert(id, {static_cast<float>(i)})).reason, kNone);
  }
  const RigAnswer answer = rig.Recall("s", {0}, {.k = 600, .first = 10});
  ASSERT_EQ(answer.hits.size(), 600u);
  for (size_t i = 0; i < 600; ++i) ASSERT_EQ(answer.hits[i].id, std::to_string(i));
  EXPECT_GE(answer.lasts.size(), 2u);
  EXPECT_EQ(rig.Recall("s", {0}, {.k = 600, .first = 10, .bound = 100.5F}).hits.size(), 11u);
}

// Recalls that wait together are searched in turns: each has its own answer, whoever asked and
// whatever space, and one that is cancelled meanwhile takes no other's.
TEST(ShardRecallTest, SeveralAtOnceHaveEachItsAnswer) {
  constexpr uint32_t kObservations = 3'000;
  ShardRig rig(ShardRig::SmallOptions(), 2);
  RigSession a = rig.Open(0, 1, "a", {.metric = Metric::kL2});
  RigSession b = rig.Open(1, 1, "b", {.metric = Metric::kL2});
  for (uint32_t i = 0; i < kObservations; ++i) {
    const auto x = static_cast<float>(i);
    ASSERT_EQ(rig.Observe(&a, Upsert("a" + std::to_string(i), {x})).reason, kNone);
    ASSERT_EQ(rig.Observe(&b, Upsert("b" + std::to_string(i), {x, 0})).reason, kNone);
  }
  std::map<uint64_t, std::string> nearest;
  for (uint32_t i = 0; i < 40; ++i) {
    const uint32_t wanted = i * 70 + 5;
    const auto x = static_cast<float>(wanted) + 0.1F;
    const bool of_a = i % 3 != 0;
    const std::string space = of_a ? "a" : "b";
    const uint64_t id = rig.PushRecall(i % 2, space, of_a ? std::vector{x} : std::vector{x, 0.0F},
                                       {.k = 1 + i % 7});
    nearest[id] = space + std::to_string(wanted);
  }
  // What is no recall waits until none is under way, and is not forgotten.
  const uint64_t unknown = rig.PushRecall(0, "none", {1}, {});
  rig.Settle();
  for (const auto& [id, wanted] : nearest) {
    const RigAnswer& answer = rig.answers[id];
    ASSERT_TRUE(answer.done) << id;
    ASSERT_EQ(answer.reason, kNone);
    ASSERT_FALSE(answer.hits.empty());
    EXPECT_EQ(answer.hits[0].id, wanted);
  }
  EXPECT_EQ(rig.answers[unknown].reason, RefusalReason::kUnknownSpace);
}

// However many recalls wait, observations and commands have their turn between them.
TEST(ShardRecallTest, RecallsWithoutEndHoldUpNothingElse) {
  constexpr uint32_t kObservations = 5'000;
  ShardRig rig(ShardRig::SmallOptions(), 2);
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  for (uint32_t i = 0; i < kObservations; ++i) {
    ASSERT_EQ(rig.Observe(&session, Upsert(std::to_string(i), {static_cast<float>(i)})).reason,
              kNone);
  }
  std::deque<uint64_t> waiting;
  uint64_t introspection = 0;
  const uint64_t stored = rig.counter(ShardCounter::kObservationsStored);
  const auto is_served = [&] {
    return rig.counter(ShardCounter::kObservationsStored) > stored &&
           rig.answers[introspection].done;
  };
  for (int round = 0; round < 20 || !is_served(); ++round) {
    ASSERT_LT(round, 200) << "something waits";
    if (round == 20) {
      rig.PushObserve(session, session.next, Upsert("more", {-5}));
      introspection = rig.PushIntrospect(0);
    }
    while (!waiting.empty() && rig.answers[waiting.front()].done) waiting.pop_front();
    while (waiting.size() < 8) {
      waiting.push_back(rig.PushRecall(1, "s", {static_cast<float>(round)}, {.k = 3}));
    }
    rig.Poll();
  }
  rig.Settle();
}

// A round hands out a batch or little more, so that ten thousand hits hold up nothing else.
TEST(ShardRecallTest, ALongAnswerIsHandedOutInSlices) {
  constexpr uint32_t kObservations = 6'000;
  constexpr size_t kMostOfARound = kResultSlotBytes / sizeof(HitHeader);
  ShardRig rig;
  RigSession session = rig.Open(0, 1, "s", {.metric = Metric::kL2});
  for (uint32_t i = 0; i < kObservations; ++i) {
    ASSERT_EQ(rig.Observe(&session, Upsert(std::to_string(i), {static_cast<float>(i)})).reason,
              kNone);
  }
  const uint64_t id = rig.PushRecall(0, "s", {-1}, {.k = kMaxRecallResults});
  const RigAnswer& answer = rig.answers[id];
  while (!answer.done) {
    const size_t before = answer.hits.size();
    rig.Poll();
    ASSERT_LE(answer.hits.size() - before, kMostOfARound);
  }
  ASSERT_EQ(answer.hits.size(), kObservations);
  for (uint32_t i = 0; i < kObservations; ++i) ASSERT_EQ(answer.hits[i].id, std::to_string(i));
}

TEST(ShardRecallTest, RecallGoesFirstThenHighThenNormal) {
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
TEST(ShardRecallTest, ARecallSeesAllThatWasAcknowledgedBeforeIt) {
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

TEST(ShardRecallTest, WithoutResultSlotsAnAnswerWaitsAndGoesOnWhenTheyComeBack) {
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

TEST(ShardRecallTest, IntrospectionNamesEverySpaceInSeveralBatches) {
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

}  // namespace
}  // namespace engram
