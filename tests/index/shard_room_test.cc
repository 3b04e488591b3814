// What a shard has room for: memory, what waits to be linked or swept, and the credit by which
// sessions share it.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "index/vector_format.h"
#include "src/core/hash.h"
#include "tests/index/shard_observations.h"
#include "tests/index/shard_rig.h"

namespace engram {
namespace {

// Of a code, in spaces of few dimensions.
const size_t kRowBytes = VectorFormat(Precision::kInt8, Metric::kL2, 4).row_bytes();

TEST(ShardRoomTest, AFullMemoryRefusesClearlyAndRecallsAndDeletesGoOn) {
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
  // Each leaves a tombstone, which takes of the room that it makes.
  for (int i = 0; i < 40; ++i) {
    EXPECT_EQ(rig.Observe(&session, Remove(std::to_string(i))).reason, kNone);
  }
  rig.Settle();
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(rig.Observe(&session, Upsert("new" + std::to_string(i), {0, 0}, payload)).reason,
              kNone);
  }
  EXPECT_EQ(rig.Recall("s", {0, 0}, {.k = 1}).hits[0].id.substr(0, 3), "new");
  EXPECT_EQ(rig.shard->FindSpace("s")->live(), static_cast<uint64_t>(stored - 20));
  EXPECT_LE(rig.counter(ShardCounter::kMemoryUsedBytes),
            rig.counter(ShardCounter::kMemoryLimitBytes));
  ASSERT_TRUE(rig.shard->CheckInvariants().has_value());
}

// A client without regard for credit: refused at the bound with a time to come back, and taken when
// it does.
TEST(ShardRoomTest, ABacklogIsRefusedWithATimeAndTakenLater) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{5'000} * kRowBytes;
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
TEST(ShardRoomTest, UpdatesAheadOfTheSweepsAreHeldBack) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{1'000} * kRowBytes;
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
TEST(ShardRoomTest, SpacesThatWaitDoNotKeepOthersFromLinking) {
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

TEST(ShardRoomTest, CreditIsAnnouncedWhenLinkingFreesRoom) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{4'200} * kRowBytes;
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
TEST(ShardRoomTest, CreditIsAnnouncedAlsoWhenDeletesFreeTheRoom) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{4'200} * kRowBytes;
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
  // Thousands that have ended and are still wanted are not moved behind the others.
  rig.clock.AdvanceNs(options.snapshot_keep_ns);
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
TEST(ShardRoomTest, CreditThatCouldNotBeAnnouncedIsAnnouncedLater) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{4'200} * kRowBytes;
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
TEST(ShardRoomTest, AResumedSessionIsGivenItsShareAnew) {
  ShardOptions options = ShardRig::SmallOptions();
  options.unlinked_limit_bytes = size_t{5'000} * kRowBytes;
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

}  // namespace
}  // namespace engram
