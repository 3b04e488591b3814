#include "index/shard.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/shard_observations.h"
#include "tests/index/shard_rig.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

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
