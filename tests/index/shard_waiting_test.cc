// What waits in lists to be linked: how much of it a shard takes, what recalls of it cost, and what
// becomes of it.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "index/vector_format.h"
#include "src/core/hash.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/index/shard_observations.h"
#include "tests/index/shard_rig.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr uint32_t kDimension = 96;
constexpr uint64_t kLinkedFirst = 400;
constexpr uint64_t kScanned = 300;  // the limit of what is scanned
constexpr uint32_t kListFrom = 64;

using Draw = std::function<std::vector<float>(uint64_t)>;

std::vector<float> Spread(uint64_t number) { return LatentVector(number, kDimension); }
// So near each other that codes are of no use.
std::vector<float> InACloud(uint64_t number) {
  std::vector<float> vector = LatentVector(5, kDimension);
  const std::vector<float> other = LatentVector(number, kDimension);
  for (uint32_t i = 0; i < kDimension; ++i) vector[i] += 0.05F * other[i];
  return vector;
}

ShardOptions WaitingOptions(uint64_t waiting_limit) {
  ShardOptions options = ShardRig::SmallOptions();
  options.build = {.M = 12, .M0 = 24, .ef_construction = 80};
  options.graph_from = 200;
  options.list_from = kListFrom;
  options.unlinked_limit_bytes =
      kScanned * VectorFormat(Precision::kInt8, Metric::kL2, kDimension).row_bytes();
  options.waiting_limit = waiting_limit;
  return options;
}

// One shard, and clients that send numbered vectors.
class WaitingRig : public ShardRig {
 public:
  explicit WaitingRig(const ShardOptions& options, uint16_t producers = 1)
      : ShardRig(options, producers),
        session(Open(0, 1, "s", {.metric = Metric::kL2, .dimension = kDimension})) {}

  const Space& space() const { return *shard->FindSpace("s"); }
  // One more, whether there is credit or not.
  void Send(RigSession* by, const Draw& draw) {
    PushObserve(*by, by->next++, Upsert(std::to_string(sent), draw(sent)));
    ++sent;
  }
  // All that the lane takes.
  void SendMany(const Draw& draw, uint64_t up_to) {
    while (sent < up_to && outstanding(0) < 200) Send(&session, draw);
  }
  // In a graph, with codes.
  void BeginLinked(uint64_t count = kLinkedFirst) {
    while (sent < count || outstanding(0) > 0) {
      if (outstanding(0) == 0) SendMany(Spread, std::min(count, sent + kScanned / 2));
      Settle();
      TakeCompletions();
    }
    ASSERT_EQ(space().unlinked_count(), 0u);
    ASSERT_TRUE(space().HasWaitingLists());
  }
  // Until so many were sent and taken. Nothing may be refused.
  void Flood(const Draw& draw, uint64_t up_to) {
    while (sent < up_to || outstanding(0) > 0) {
      SendMany(draw, up_to);
      Poll();
      TakeCompletions();
      ASSERT_FALSE(refusal.has_value()) << DescribeRefusal(refusal->reason).name;
    }
  }
  void TakeCompletions() {
    for (const auto& [producer, completion] : completions) {
      if (completion.origin == session.origin) {
        session.credit_sequence = std::max(session.credit_sequence, completion.credit_sequence);
      }
      if (completion.kind != CompletionKind::kObserve) continue;
      if (completion.reason != kNone && !refusal) refusal = completion;
    }
    completions.clear();
  }
  bool Finds(uint64_t number, const Draw& draw, uint32_t ef) {
    const RigAnswer answer = Recall("s", draw(number), {.k = 1, .ef = ef});
    return answer.hits.size() == 1 && answer.hits[0].id == std::to_string(number);
  }
  // Of `queries` of all that were sent, spread over them.
  uint64_t CountMissed(uint64_t queries, const Draw& draw, uint32_t ef, uint64_t from = 0) {
    uint64_t missed = 0;
    for (uint64_t i = 0; i < queries; ++i) {
      const uint64_t number = from + i * (sent - from) / queries;
      missed += static_cast<uint64_t>(!Finds(number, draw, ef));
    }
    return missed;
  }

  RigSession session;
  uint64_t sent = 0;
  std::optional<Completion> refusal;  // the first
};

// While observations are listed as they come a round takes few, also behind rounds that a recall
// has had to itself: each costs several times as much as where it is only scanned.
TEST(ShardWaitingTest, RoundsThatListTakeFewAlsoBehindARecall) {
  constexpr uint64_t kMostInRound = 16;
  WaitingRig rig(WaitingOptions(1'000'000));
  ASSERT_NO_FATAL_FAILURE(rig.BeginLinked());
  ASSERT_NO_FATAL_FAILURE(rig.Flood(Spread, 5'000));
  rig.SendMany(Spread, 5'100);
  (void)rig.Poll();
  ASSERT_GT(rig.space().waiting(), 1'000u);
  uint64_t recalls = 0;
  uint64_t full_rounds = 0;
  while (rig.sent < 9'000) {
    rig.SendMany(Spread, 9'000);
    // Long enough to take several rounds.
    if (!rig.shard->Idle() && recalls % 2 == 0) {
      rig.PushRecall(0, "s", Spread(recalls), {.k = 10, .ef = 400});
    }
    ++recalls;
    const uint64_t before = rig.counter(ShardCounter::kObservationsStored);
    (void)rig.Poll();
    const uint64_t taken = rig.counter(ShardCounter::kObservationsStored) - before;
    ASSERT_LE(taken, kMostInRound);
    full_rounds += static_cast<uint64_t>(taken == kMostInRound);
    rig.TakeCompletions();
  }
  EXPECT_GT(full_rounds, 50u);
}

// Would catch a shard that holds back what lists could bear, and a probe that looks at all.
TEST(ShardWaitingTest, ABacklogFarBeyondAScanIsTakenAndFoundWithLittleWork) {
  constexpr uint64_t kAll = 20'000;
  constexpr uint32_t kEf = 16;
  WaitingRig rig(WaitingOptions(1'000'000));
  ASSERT_NO_FATAL_FAILURE(rig.BeginLinked());
  ASSERT_NO_FATAL_FAILURE(rig.Flood(Spread, kAll));
  ASSERT_GT(rig.space().waiting(), 10 * kScanned);
  EXPECT_LE(rig.space().unlinked_count() - rig.space().waiting(), kListFrom + 1);
  uint64_t missed = 0;
  uint64_t work = 0;
  uint64_t scan = 0;
  constexpr uint64_t kQueries = 100;
  for (uint64_t i = 0; i < kQueries; ++i) {
    const uint64_t before = rig.counter(ShardCounter::kRecallVectors);
    scan += rig.space().unlinked_count();
    missed += static_cast<uint64_t>(!rig.Finds(i * kAll / kQueries, Spread, kEf));
    work += rig.counter(ShardCounter::kRecallVectors) - before;
  }
  EXPECT_LE(missed, kQueries / 20);
  EXPECT_LT(work, scan / 5);
  EXPECT_EQ(rig.CountMissed(kSanitized ? 100 : 400, Spread, 200), 0u);
}

// Would catch a bound that is not there, or that holds too early.
TEST(ShardWaitingTest, CreditEndsAtTheLimitAndWhoGoesOnIsRefusedAtTwiceAsMuch) {
  constexpr uint64_t kLimit = 2'000;
  WaitingRig rig(WaitingOptions(kLimit));
  ASSERT_NO_FATAL_FAILURE(rig.BeginLinked());
  // By credit, until there is none for a while.
  uint64_t most = 0;
  const auto has_credit = [&] { return rig.session.next <= rig.session.credit_sequence; };
  while (has_credit() || rig.outstanding(0) > 0) {
    while (has_credit() && rig.outstanding(0) < 200) rig.Send(&rig.session, Spread);
    rig.Poll();
    rig.TakeCompletions();
    most = std::max(most, rig.space().backlog());
  }
  ASSERT_FALSE(rig.refusal.has_value());
  EXPECT_GE(most, kLimit - 100);
  EXPECT_LE(most, kLimit + 1);
  // Without regard for credit.
  while (!rig.refusal) {
    rig.SendMany(Spread, UINT64_MAX);
    rig.Poll();
    most = std::max(most, rig.space().backlog());
    rig.TakeCompletions();
    ASSERT_LT(rig.sent, 20 * kLimit);
  }
  EXPECT_EQ(rig.refusal->reason, RefusalReason::kBacklogFull);
  EXPECT_GE(rig.refusal->retry_after_ms, 1u);
  EXPECT_LE(rig.refusal->retry_after_ms, 1'000u);
  EXPECT_GE(most, 2 * kLimit - 100);
  EXPECT_LE(most, 2 * kLimit);
  // It comes back when it was told to, and all that was taken is there.
  const Sequence refused = rig.refusal->sequence;
  const int64_t back_ns = rig.clock.MonotonicNs() + rig.refusal->retry_after_ms * kNanosPerMilli;
  while (rig.outstanding(0) > 0 || rig.clock.MonotonicNs() < back_ns) rig.Poll();
  rig.TakeCompletions();
  rig.refusal.reset();
  rig.session.next = refused;
  rig.sent = refused - 1;
  rig.Send(&rig.session, Spread);
  while (rig.outstanding(0) > 0) rig.Poll();
  rig.TakeCompletions();
  EXPECT_FALSE(rig.refusal.has_value());
  EXPECT_EQ(rig.CountMissed(100, Spread, 200), 0u);
  rig.Settle();
  rig.TakeCompletions();
  EXPECT_TRUE(has_credit()) << "it is told that there is room";
}

// Would catch nodes that stay in lists, and upkeep that needs observations or recalls to go on.
TEST(ShardWaitingTest, ABacklogDrainsByItself) {
  constexpr uint64_t kAll = 4'000;
  WaitingRig rig(WaitingOptions(1'000'000));
  ASSERT_NO_FATAL_FAILURE(rig.BeginLinked());
  ASSERT_NO_FATAL_FAILURE(rig.Flood(Spread, kAll));
  uint64_t left = rig.space().waiting();
  ASSERT_GT(left, 5 * kScanned);
  for (int polls = 0; rig.space().unlinked_count() > 0; ++polls) {
    ASSERT_LT(polls, 1'000'000);
    rig.Poll();
    ASSERT_LE(rig.space().waiting(), left) << "nothing is listed again";
    left = rig.space().waiting();
    if (polls % 512 != 0) continue;
    ASSERT_TRUE(rig.Finds(kAll - 1 - left / 2, Spread, 200)) << left << " wait";
    ASSERT_EQ(SpaceTestPeer::CodesViolation(rig.space()), "");
  }
  EXPECT_EQ(left, 0u);
  EXPECT_EQ(rig.space().backlog(), 0u);
  rig.Settle();
  ASSERT_TRUE(rig.shard->CheckInvariants().has_value());
  EXPECT_EQ(rig.CountMissed(200, Spread, 200), 0u);
}

// Would catch a limit that counts on lists before there are any: recalls would scan all of it.
TEST(ShardWaitingTest, BeforeThereAreCodesTheScanLimits) {
  WaitingRig rig(WaitingOptions(1'000'000));
  while (!rig.refusal) {
    rig.SendMany(Spread, UINT64_MAX);
    rig.Poll();
    rig.TakeCompletions();
    ASSERT_LT(rig.sent, 10'000u);
    ASSERT_LE(rig.space().backlog(), 2 * kScanned);
  }
  EXPECT_EQ(rig.refusal->reason, RefusalReason::kBacklogFull);
  EXPECT_FALSE(rig.space().HasWaitingLists());
  EXPECT_GE(rig.refusal->retry_after_ms, 1u);
  EXPECT_GE(rig.space().backlog(), 2 * kScanned - 64);
  const Sequence refused = rig.refusal->sequence;
  while (!rig.space().HasWaitingLists()) ASSERT_GT(rig.Poll(), 0);
  while (rig.outstanding(0) > 0) rig.Poll();
  rig.TakeCompletions();
  rig.refusal.reset();
  rig.session.next = refused;
  rig.sent = refused - 1;
  ASSERT_NO_FATAL_FAILURE(rig.Flood(Spread, 3'000));
  EXPECT_GT(rig.space().backlog(), 2 * kScanned);
  EXPECT_EQ(rig.CountMissed(100, Spread, 200), 0u);
}

// Would catch rounds that grow longer with each producer, so that recalls wait for them.
TEST(ShardWaitingTest, ARoundThatListsTakesFewHoweverManySend) {
  constexpr uint64_t kAll = 4'000;
  constexpr uint16_t kProducers = 4;
  WaitingRig rig(WaitingOptions(1'000'000), kProducers);
  ASSERT_NO_FATAL_FAILURE(rig.BeginLinked());
  std::vector<RigSession> sessions;
  for (uint16_t p = 0; p < kProducers; ++p) sessions.push_back(rig.Open(p, 10 + p, "s"));
  uint64_t recall = 0;
  uint64_t recalls = 0;
  uint64_t polls = 0;
  bool lists = false;
  while (rig.sent < kAll) {
    for (RigSession& session : sessions) {
      while (rig.outstanding(session.producer) < 200) rig.Send(&session, Spread);
    }
    if (recall == 0 && lists) {
      recall = rig.PushRecall(0, "s", Spread(rig.sent / 2), {.k = 1, .ef = 128});
      polls = 0;
    }
    const uint64_t before = rig.counter(ShardCounter::kObservationsStored);
    rig.Poll();
    ++polls;
    const uint64_t stored = rig.counter(ShardCounter::kObservationsStored) - before;
    if (lists) {
      ASSERT_LE(stored, 16u);
    }
    lists = rig.space().waiting() > 0;
    ASSERT_LE(polls, 6u) << "rounds of 1,024 distances";
    if (recall == 0 || !rig.answers[recall].done) continue;
    recall = 0;
    ++recalls;
  }
  ASSERT_GT(rig.space().waiting(), kAll / 2);
  EXPECT_GT(recalls, 50u);
  // None was forgotten behind the others.
  for (const RigSession& session : sessions) {
    while (rig.outstanding(session.producer) > 0) rig.Poll();
  }
  EXPECT_EQ(rig.counter(ShardCounter::kObservationsStored), rig.sent);
}

constexpr uint64_t kGathered = 2'000;
ShardOptions GatheringOptions() {
  ShardOptions options = WaitingOptions(1'000'000);
  options.unlinked_limit_bytes *= 10;
  return options;
}
// Many wait, and there are codes since a moment ago.
void Gather(WaitingRig* rig) {
  while (rig->sent < kGathered) {
    rig->SendMany(Spread, kGathered);
    rig->Poll();
  }
  while (!rig->space().HasWaitingLists()) ASSERT_GT(rig->Poll(), 0);
  ASSERT_EQ(rig->space().waiting(), 0u);
  ASSERT_GT(rig->space().unlinked_count(), 10 * kListFrom);
}

// Recalls one after the other, with always another one behind, until `is_done`. How many it took;
// none may take more than kMostPolls.
uint64_t RecallsUntil(WaitingRig* rig, uint64_t most, const std::function<bool()>& is_done) {
  constexpr int kMostPolls = 32;
  std::deque<uint64_t> asked;
  uint64_t recalls = 0;
  for (int polls = 1; !is_done() && recalls < most; ++polls) {
    while (asked.size() < 2) {
      asked.push_back(rig->PushRecall(0, "s", Spread(recalls++ % rig->sent), {.k = 10, .ef = 64}));
    }
    rig->Poll();
    EXPECT_LE(polls, kMostPolls);
    if (!rig->answers[asked.front()].done) continue;
    asked.pop_front();
    polls = 0;
  }
  return recalls;
}

// Would catch upkeep that gets a slice behind each recall, whatever that took: recalls that follow
// each other would keep it for ever from what makes them slow.
TEST(ShardWaitingTest, ABacklogIsLinkedBesideRecallsThatNeverPause) {
  constexpr uint64_t kAll = 6'000;
  WaitingRig rig(WaitingOptions(1'000'000));
  ASSERT_NO_FATAL_FAILURE(rig.BeginLinked());
  ASSERT_NO_FATAL_FAILURE(rig.Flood(Spread, kAll));
  const uint64_t waited = rig.space().unlinked_count();
  const uint64_t recalls =
      RecallsUntil(&rig, 5'000, [&] { return rig.space().unlinked_count() <= waited / 4; });
  EXPECT_LE(recalls, 3'200u);
}

// Likewise of what is scanned, as there are no codes yet: recalls wait then for what upkeep is owed
// beyond a round's.
TEST(ShardWaitingTest, CodesAreLearnedBesideRecallsThatNeverPause) {
  WaitingRig rig(GatheringOptions());
  while (rig.sent < kGathered) {
    rig.SendMany(Spread, kGathered);
    rig.Poll();
  }
  ASSERT_FALSE(rig.space().HasWaitingLists());
  const uint64_t recalls = RecallsUntil(&rig, 5'000, [&] { return rig.space().HasWaitingLists(); });
  EXPECT_LE(recalls, 45u);
}

// Recalls would scan it until it is linked.
TEST(ShardWaitingTest, WhatHasGatheredIsListedAlsoWhereNothingComes) {
  WaitingRig rig(GatheringOptions());
  ASSERT_NO_FATAL_FAILURE(Gather(&rig));
  const uint64_t before = rig.space().linked();
  while (rig.space().unlinked_count() - rig.space().waiting() > kListFrom) {
    ASSERT_GT(rig.Poll(), 0);
  }
  EXPECT_GT(rig.space().waiting(), kGathered / 4);
  EXPECT_LT(rig.space().linked(), before + kGathered / 2) << "listing keeps ahead of linking";
  EXPECT_EQ(rig.CountMissed(100, Spread, 200), 0u);
}

// What has gathered before there were codes is listed while more comes, a little in each round.
TEST(ShardWaitingTest, WhatHasGatheredIsListedInShortRounds) {
  WaitingRig rig(GatheringOptions());
  ASSERT_NO_FATAL_FAILURE(Gather(&rig));
  const auto unlisted = [&] { return rig.space().unlinked_count() - rig.space().waiting(); };
  rig.TakeCompletions();
  int polls = 0;
  for (; unlisted() > kListFrom + 1; ++polls) {
    ASSERT_LT(polls, 1'000);
    rig.SendMany(Spread, UINT64_MAX);
    const uint64_t stored = rig.counter(ShardCounter::kObservationsStored);
    const uint64_t waiting = rig.space().waiting();
    rig.Poll();
    const uint64_t came = rig.counter(ShardCounter::kObservationsStored) - stored;
    ASSERT_LE(rig.space().waiting(), waiting + came + 16);
  }
  EXPECT_GT(polls, 50) << "a little at a time";
  rig.TakeCompletions();
  EXPECT_FALSE(rig.refusal.has_value());
  while (rig.outstanding(0) > 0) rig.Poll();
  EXPECT_EQ(rig.CountMissed(100, Spread, 200), 0u);
}

// No more than from clients comes from other shards.
TEST(ShardWaitingTest, ARoundThatListsTakesFewFromOtherShards) {
  constexpr uint16_t kShards = 4;
  constexpr uint64_t kAll = 4'000;
  ShardRig rig(WaitingOptions(1'000'000), kShards, 256, 16,
               {.shards = kShards, .partitions = 2, .max_partitions = 2, .peer_capacity = 128});
  SpaceEntry* const entry = rig.MakeSpace("s", Metric::kL2);
  const size_t owner = entry->ShardOf(0).value();
  std::vector<RigSession> sessions;
  for (uint16_t s = 0; s < kShards; ++s) {
    sessions.push_back(rig.Open(s, 10 + s, "s", {.dimension = kDimension, .shard = s}));
  }
  uint64_t sent = 0;
  const auto send = [&](RigSession* session) {
    const std::string id = std::to_string(sent);
    const uint64_t hash = SpaceCatalogue::HashOfId(id);
    const std::vector<float> vector = Spread(sent++);
    if (entry->ShardOf(PartitionOf(hash, 2)).value() != owner) return;
    rig.PushObserve(*session, session->next++, Upsert(id, vector));
  };
  const auto space = [&] { return rig.shards[owner]->FindSpace("s"); };
  while (space() == nullptr || !space()->HasWaitingLists()) {
    if (sent < 600) send(&sessions[owner]);
    rig.Poll();
  }
  bool lists = false;
  uint64_t most = 0;
  while (sent < kAll) {
    for (RigSession& session : sessions) {
      for (int i = 0; i < 50 && session.shard != owner && rig.outstanding(session.producer) < 200;
           ++i) {
        send(&session);
      }
    }
    for (size_t s = 0; s < kShards; ++s) {
      if (s != owner) rig.PollShard(s);
    }
    const uint64_t before = rig.counter(ShardCounter::kObservationsStored, owner);
    rig.clock.AdvanceNs(10'000);
    rig.PollShard(owner);
    if (lists) {
      most = std::max(most, rig.counter(ShardCounter::kObservationsStored, owner) - before);
    }
    lists = space()->waiting() > 0;
  }
  EXPECT_EQ(most, 16u);
  for (const RigSession& session : sessions) {
    while (rig.outstanding(session.producer) > 0) rig.Poll();
  }
}

// Replaces observations 0 to `ids` - 1, in no order, by what is drawn for `first_drawn` and on.
void Replace(WaitingRig* rig, uint64_t ids, uint64_t first_drawn) {
  constexpr uint64_t kStep = 7'919;
  for (uint64_t i = 0; i < ids || rig->outstanding(0) > 0;) {
    for (; i < ids && rig->outstanding(0) < 200; ++i) {
      const uint64_t id = i * kStep % ids;
      rig->PushObserve(rig->session, rig->session.next++,
                       Upsert(std::to_string(id), Spread(first_drawn + id)));
    }
    rig->Poll();
    rig->TakeCompletions();
    ASSERT_FALSE(rig->refusal.has_value()) << DescribeRefusal(rig->refusal->reason).name;
  }
}

// Would catch a walk through the whole of a graph that has all but ended.
TEST(ShardWaitingTest, WhatReplacesAGraphIsFoundWithoutAWalkThroughIt) {
  // A graph of a few thousand may be walked through for those that live.
  constexpr uint64_t kAll = 6'000;
  constexpr uint64_t kLeft = 3;
  WaitingRig rig(WaitingOptions(1'000'000));
  ASSERT_NO_FATAL_FAILURE(rig.BeginLinked());
  ASSERT_NO_FATAL_FAILURE(rig.Flood(Spread, kAll));
  ASSERT_TRUE(rig.PollUntil([&] { return rig.space().unlinked_count() == 0; }, 1'000'000));
  ASSERT_NO_FATAL_FAILURE(Replace(&rig, kAll - kLeft, kAll));
  ASSERT_GT(rig.space().waiting(), kAll * 9 / 10);
  uint64_t missed = 0;
  uint64_t work = 0;
  constexpr uint64_t kQueries = 50;
  for (uint64_t i = 0; i < kQueries; ++i) {
    const uint64_t id = i * (kAll - kLeft) / kQueries;
    const uint64_t before = rig.counter(ShardCounter::kRecallVectors);
    const RigAnswer answer = rig.Recall("s", Spread(kAll + id), {.k = 1, .ef = 64});
    missed += static_cast<uint64_t>(answer.hits.empty() || answer.hits[0].id != std::to_string(id));
    work += rig.counter(ShardCounter::kRecallVectors) - before;
  }
  EXPECT_EQ(missed, 0u);
  EXPECT_LT(work, kQueries * (rig.space().unlinked_count() + kAll * 2 / 3)) << work / kQueries;
}

// Would catch what has ended being kept for ever, what is not linked for now never being linked,
// and one that is lost when it is passed over.
TEST(ShardWaitingTest, WhatIsReplacedAgainAndAgainIsLinkedOnceItRests) {
  constexpr uint64_t kAll = 10'000;
  WaitingRig rig(WaitingOptions(1'000'000));
  ASSERT_NO_FATAL_FAILURE(rig.BeginLinked());
  ASSERT_NO_FATAL_FAILURE(rig.Flood(Spread, kAll));
  ASSERT_NO_FATAL_FAILURE(Replace(&rig, kAll, kAll));
  ASSERT_GT(rig.space().ended_listed(), kAll / 2);
  ASSERT_NO_FATAL_FAILURE(Replace(&rig, kAll, 2 * kAll));
  const Space& space = rig.space();
  EXPECT_LE(space.unlinked_count() + space.ended_listed() - space.waiting(), 2 * kListFrom);
  rig.clock.AdvanceNs(ShardOptions().snapshot_keep_ns);
  EXPECT_TRUE(rig.PollUntil(
      [&] {
        return space.unlinked_count() == 0 && space.ended_listed() == 0 && space.retired() == 0;
      },
      1'000'000));
  for (uint64_t id = 0; id < kAll; id += 100) {
    const RigAnswer answer = rig.Recall("s", Spread(2 * kAll + id), {.k = 1, .ef = 128});
    ASSERT_EQ(answer.hits.size(), 1u);
    EXPECT_EQ(answer.hits[0].id, std::to_string(id));
  }
}

TEST(ShardWaitingTest, NothingIsAllocatedByMalloc) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer has an allocator of its own";
  constexpr uint64_t kAll = 3'000;
  WaitingRig rig(WaitingOptions(1'000'000));
  ASSERT_NO_FATAL_FAILURE(rig.BeginLinked());
  ASSERT_TRUE(rig.Finds(7, Spread, 128));
  rig.poll_allocations = 0;
  ASSERT_NO_FATAL_FAILURE(rig.Flood(Spread, kAll));
  ASSERT_GT(rig.space().waiting(), 2'000u);
  EXPECT_EQ(rig.poll_allocations, 0u) << "while it is listed";
  for (uint64_t number = 0; number < kAll; number += 100) {
    EXPECT_TRUE(rig.Finds(number, Spread, 128));
  }
  EXPECT_EQ(rig.poll_allocations, 0u) << "while lists are probed";
  rig.Settle();
  ASSERT_EQ(rig.space().unlinked_count(), 0u);
  EXPECT_EQ(rig.poll_allocations, 0u) << "while it is linked";
}

// Codes turn out to be of no use while much waits. The lists go at once, so all of it is scanned
// until it is linked, and nobody is given credit before it is. What is promised stays: what was
// acknowledged is found, what keeps to its credit is taken.
TEST(ShardWaitingTest, WhatWaitsWhenCodesAreWithdrawnIsScanned) {
  constexpr uint64_t kSpread = 2'000;
  constexpr uint64_t kAll = kSpread + 2'500;
  WaitingRig rig(WaitingOptions(1'000'000));
  ASSERT_NO_FATAL_FAILURE(rig.BeginLinked(kSpread));
  const auto draw = [](uint64_t number) {
    return number < kSpread ? Spread(number) : InACloud(number);
  };
  ASSERT_NO_FATAL_FAILURE(rig.Flood(draw, kAll));
  uint64_t waited = rig.space().waiting();
  for (int polls = 0; rig.space().walk_codes() != nullptr; ++polls) {
    ASSERT_LT(polls, 1'000'000);
    waited = rig.space().waiting();
    rig.Poll();
  }
  rig.TakeCompletions();
  ASSERT_GT(waited, 3 * kScanned) << "many waited when they were withdrawn";
  EXPECT_EQ(rig.space().waiting(), 0u);
  EXPECT_FALSE(rig.space().HasWaitingLists());
  ASSERT_TRUE(rig.shard->CheckInvariants().has_value());
  const uint64_t backlog = rig.space().backlog();
  ASSERT_GE(backlog, waited);
  // Recalls, also while the lists are given back.
  const uint64_t before = rig.counter(ShardCounter::kRecallVectors);
  EXPECT_TRUE(rig.Finds(kAll - 1, draw, 16));
  const uint64_t work = rig.counter(ShardCounter::kRecallVectors) - before;
  EXPECT_GE(work, rig.space().unlinked_count());
  EXPECT_EQ(rig.CountMissed(kSanitized ? 50 : 200, draw, 200), 0u);
  // Within credit one is taken; beyond it none is.
  const uint64_t next = rig.session.next;
  while (rig.session.next <= rig.session.credit_sequence && rig.session.next < next + 50) {
    rig.Send(&rig.session, draw);
  }
  while (rig.outstanding(0) > 0) rig.Poll();
  rig.TakeCompletions();
  EXPECT_FALSE(rig.refusal.has_value()) << "it had credit";
  RigSession late = rig.Open(0, 2, "s");
  EXPECT_LE(late.credit_sequence, 1u);
  late.next += late.credit_sequence;
  // All is linked in the end, and there is room.
  while (rig.space().unlinked_count() > 0) ASSERT_GT(rig.Poll(), 0);
  rig.Settle();
  EXPECT_EQ(rig.space().live(), rig.sent);
  ASSERT_TRUE(rig.shard->CheckInvariants().has_value());
  // A walk may end in the wrong place of so tight a cloud; but all can be reached.
  EXPECT_LE(rig.CountMissed(100, draw, 200), 4u);
  EXPECT_EQ(rig.CountMissed(100, draw, 5'000), 0u);
  const uint64_t then = rig.counter(ShardCounter::kRecallVectors);
  EXPECT_TRUE(rig.Finds(kAll - 1, draw, 16));
  EXPECT_LT(rig.counter(ShardCounter::kRecallVectors) - then, work / 4);
}

}  // namespace
}  // namespace engram
