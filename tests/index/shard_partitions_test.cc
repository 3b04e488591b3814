// Spaces of several partitions: eight shards stepped in one thread, in any order.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/partition_rig.h"

namespace engram::partitions {
namespace {

// ---------------------------------------------------------------------------------------------
// Owners

TEST(ShardPartitionsTest, EveryObservationIsStoredByTheOwnerOfItsId) {
  PartitionRig rig(4);
  RigSession session = rig.OpenAt(rig.ShardOfPartition(1));
  std::map<size_t, int> held;
  for (uint64_t i = 0; i < 100; ++i) {
    EXPECT_EQ(rig.Observe(&session, Upsert(IdAt(i), static_cast<float>(i))).reason, kNone);
    EXPECT_EQ(rig.HolderOf(IdAt(i)), rig.OwnerOf(IdAt(i))) << "visible once it is answered";
    ++held[rig.OwnerOf(IdAt(i))];
  }
  EXPECT_EQ(held.size(), 4u);
  EXPECT_EQ(rig.counter(ShardCounter::kObservationsForwarded, session.shard),
            100u - static_cast<uint64_t>(held[session.shard]));
  for (uint64_t i = 0; i < 100; i += 2) {
    EXPECT_EQ(rig.Observe(&session, Remove(IdAt(i))).reason, kNone);
    EXPECT_TRUE(rig.LiveOf(IdAt(i)).empty());
  }
  for (uint64_t i = 1; i < 100; i += 2) {
    const std::vector<float> query{static_cast<float>(i), 1};
    const RigAnswer answer = rig.Recall(kSpace, query, {.k = 1}, rig.OwnerOf(IdAt(i)));
    ASSERT_EQ(answer.hits.size(), 1u);
    EXPECT_EQ(answer.hits[0].id, IdAt(i));
  }
  rig.ExpectNothingLeft();
}

TEST(ShardPartitionsTest, RefusalsThatUseUpANumberComeFromTheHome) {
  PartitionRig rig(4);
  RigSession session = rig.OpenAt(rig.ShardOfPartition(0));
  const size_t other = rig.ShardOfPartition(2);
  const std::string id = rig.IdOwnedBy(other);
  Observation wrong = Upsert(id);
  EXPECT_EQ(rig.Observe(&session, Upsert(rig.IdOwnedBy(rig.ShardOfPartition(3)))).reason, kNone);
  wrong.vector = {1, 2, 3};
  EXPECT_EQ(rig.Observe(&session, wrong).reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(rig.last_space_dimension, 2u);
  EXPECT_EQ(rig.Observe(&session, Upsert(id)).reason, kNone);
  EXPECT_EQ(session.next, 4u);
  // Where nobody has fixed the dimension a refused vector does not.
  rig.MakeSpace("cosine", Metric::kCosine);
  RigSession cosine = rig.Open(0, 7, "cosine", {.shard = rig.ShardOfPartition(0)});
  Observation zero = Upsert("z");
  zero.vector = {0, 0, 0};
  for (int i = 0; i < 8; ++i) {
    zero.id = IdAt(static_cast<uint64_t>(i));
    EXPECT_EQ(rig.Observe(&cosine, zero).reason, RefusalReason::kZeroVector);
  }
  EXPECT_EQ(rig.entry("cosine")->dimension(), 0u);
  EXPECT_EQ(rig.Observe(&cosine, Upsert("a")).reason, kNone);
  EXPECT_EQ(rig.entry("cosine")->dimension(), 2u);
  rig.ExpectNothingLeft();
}

// Would catch two shards that each take the first observation, of different dimensions.
TEST(ShardPartitionsTest, OneDimensionForAllShards) {
  for (int order = 0; order < 2; ++order) {
    PartitionRig rig(2, Options(), 2, 2);
    const size_t a = rig.ShardOfPartition(0);
    const size_t b = rig.ShardOfPartition(1);
    RigSession first = rig.OpenAt(a, 0);
    RigSession second = rig.OpenAt(b, 1);
    Observation two = Upsert(rig.IdOwnedBy(a));
    Observation three = Upsert(rig.IdOwnedBy(b));
    three.vector = {1, 2, 3};
    rig.PushObserve(first, 1, two);
    rig.PushObserve(second, 1, three);
    rig.completions.clear();
    rig.PollShard(order == 0 ? a : b);
    rig.PollShard(order == 0 ? b : a);
    rig.Settle();
    ASSERT_EQ(rig.completions.size(), 2u);
    EXPECT_EQ(rig.completions[0].second.reason, kNone);
    EXPECT_EQ(rig.completions[1].second.reason, RefusalReason::kWrongDimension);
    EXPECT_EQ(rig.space().dimension(), order == 0 ? 2u : 3u);
  }
}

// ---------------------------------------------------------------------------------------------
// The order of a session

TEST(ShardPartitionsTest, AnswersComeInTheOrderOfTheSession) {
  PartitionRig rig(4);
  const size_t home = rig.ShardOfPartition(0);
  const size_t slow = rig.ShardOfPartition(1);
  const size_t quick = rig.ShardOfPartition(2);
  RigSession session = rig.OpenAt(home);
  rig.completions.clear();
  rig.PushObserve(session, 1, Upsert(rig.IdOwnedBy(home)));
  rig.PushObserve(session, 2, Upsert(rig.IdOwnedBy(slow)));
  rig.PushObserve(session, 3, Upsert(rig.IdOwnedBy(quick)));
  rig.PushObserve(session, 4, Upsert(rig.IdOwnedBy(home, 1)));
  rig.PushObserve(session, 5, {.op = ObservationOp::kSkip, .skip_reason = RefusalReason::kBadId});
  rig.PushObserve(session, 3, Upsert(rig.IdOwnedBy(quick)));  // a repeat
  rig.PushObserve(session, 6, Upsert(rig.IdOwnedBy(slow, 1)));
  rig.PushObserve(session, 9, Upsert("gap"));
  rig.PollAllBut(slow);
  EXPECT_EQ(rig.AnsweredSequences(), (std::vector<uint64_t>{1, 9})) << "2 is not visible yet";
  EXPECT_EQ(rig.HolderOf(rig.IdOwnedBy(quick)), quick);
  const CommitStamp before = rig.stamps->CompleteUpTo(ShardId(static_cast<uint16_t>(home)), 0);
  EXPECT_LT(before, rig.LiveOf(rig.IdOwnedBy(quick)).begin()->second.stamp);
  rig.Settle();
  EXPECT_EQ(rig.AnsweredSequences(), (std::vector<uint64_t>{1, 9, 2, 3, 4, 5, 3, 6}));
  std::map<uint64_t, RefusalReason> reasons;
  int repeats = 0;
  for (const auto& [producer, completion] : rig.completions) {
    repeats += static_cast<int>(completion.repeated);
    reasons.emplace(completion.sequence, completion.reason);
  }
  EXPECT_EQ(repeats, 1);
  EXPECT_EQ(reasons[5], RefusalReason::kBadId);
  EXPECT_EQ(reasons[9], RefusalReason::kSequenceGap);
  rig.ExpectNothingLeft();
}

TEST(ShardPartitionsTest, AResumedSessionIsToldOnlyWhatIsVisible) {
  PartitionRig rig(4, Options(), kShards, 2);
  const size_t home = rig.ShardOfPartition(0);
  const size_t slow = rig.ShardOfPartition(1);
  RigSession session = rig.OpenAt(home);
  rig.PushObserve(session, 1, Upsert(rig.IdOwnedBy(home)));
  rig.PushObserve(session, 2, Upsert(rig.IdOwnedBy(slow)));
  rig.PushObserve(session, 3, Upsert(rig.IdOwnedBy(home, 1)));
  rig.PollAllBut(slow);
  rig.completions.clear();
  const SlotId hello = rig.PushHello(1, 5, kSpace, {.session = session.id, .shard = home});
  rig.PollAllBut(slow);
  bool answered = false;
  for (const auto& [producer, completion] : rig.completions) {
    answered = answered || (producer == 1 && completion.slot == hello);
  }
  EXPECT_TRUE(answered);
  EXPECT_EQ(rig.last_hello().last_sequence, 1u);
  EXPECT_GT(rig.last_hello().credit, 2u);
  RigSession again = session;
  again.producer = 1;
  again.origin = 5;
  rig.PushObserve(again, 2, Upsert(rig.IdOwnedBy(slow)));
  rig.PushObserve(again, 3, Upsert(rig.IdOwnedBy(home, 1)));
  rig.PushObserve(again, 4, Upsert("four"));
  rig.completions.clear();
  rig.Settle();
  std::vector<std::pair<size_t, uint64_t>> answers;
  for (const auto& [producer, completion] : rig.completions) {
    if (completion.kind != CompletionKind::kObserve) continue;
    EXPECT_EQ(completion.reason, kNone);
    EXPECT_EQ(completion.repeated, producer == 1 && completion.sequence < 4);
    answers.emplace_back(producer, completion.sequence);
  }
  EXPECT_EQ(answers,
            (std::vector<std::pair<size_t, uint64_t>>{{0, 2}, {0, 3}, {1, 2}, {1, 3}, {1, 4}}));
  rig.ExpectNothingLeft();
}

TEST(ShardPartitionsTest, ASessionWithForwardsUnderWayIsNotEvicted) {
  ShardOptions options = Options();
  options.max_sessions = 1;
  options.session_idle_timeout_ns = 0;
  PartitionRig rig(4, options);
  const size_t home = rig.ShardOfPartition(0);
  const size_t slow = rig.ShardOfPartition(1);
  RigSession session = rig.OpenAt(home);
  rig.PushObserve(session, 1, Upsert(rig.IdOwnedBy(slow)));
  rig.PollAllBut(slow);
  rig.PushDetach(session);
  rig.PollAllBut(slow);
  rig.PushHello(0, 7, kSpace, {.shard = home});
  rig.completions.clear();
  rig.PollAllBut(slow);
  ASSERT_EQ(rig.completions.size(), 1u);
  EXPECT_EQ(rig.completions[0].second.reason, RefusalReason::kSessionLimit);
  rig.Settle();
  EXPECT_EQ(rig.Hello(0, 7, kSpace, {.shard = home}).first, kNone) << "once all is answered";
}

TEST(ShardPartitionsTest, AnOwnerWithoutRoomHoldsTheHomeBackAndLosesNothing) {
  PartitionRig rig(4, Options(0, 8));
  const size_t home = rig.ShardOfPartition(0);
  const size_t slow = rig.ShardOfPartition(1);
  RigSession session = rig.OpenAt(home);
  rig.completions.clear();
  for (int i = 0; i < 12; ++i) {
    rig.PushObserve(session, static_cast<uint64_t>(i) + 1, Upsert(rig.IdOwnedBy(slow, i)));
  }
  rig.PollAllBut(slow);
  EXPECT_EQ(rig.counter(ShardCounter::kForwardsUnderWay, home), 8u)
      << "4 in the ring, 4 in the line";
  ASSERT_EQ(rig.completions.size(), 4u);
  EXPECT_EQ(rig.completions[0].second.reason, RefusalReason::kQueueFull);
  EXPECT_EQ(rig.completions[0].second.sequence, 9u);
  EXPECT_EQ(rig.completions[1].second.reason, RefusalReason::kSequenceGap);
  // Others are served meanwhile, by shards that have room.
  EXPECT_EQ(rig.Observe(&session, Upsert("x")).sequence, 1u);
  rig.Settle();
  for (int i = 8; i < 12; ++i) {
    EXPECT_EQ(rig.ObserveAs(&session, static_cast<uint64_t>(i) + 1, Upsert(rig.IdOwnedBy(slow, i)))
                  .reason,
              kNone);
  }
  for (int i = 0; i < 12; ++i) EXPECT_EQ(rig.HolderOf(rig.IdOwnedBy(slow, i)), slow);
  rig.ExpectNothingLeft();
}

// Would catch credit that ends with the last place in the ledger: no answer of a forward announces
// any.
TEST(ShardPartitionsTest, WhoKeepsToItsCreditGoesOnAfterTheLedgerWasFull) {
  PartitionRig rig(2, Options(0, 16), 2);
  const size_t owner = rig.ShardOfPartition(1);
  RigSession session = rig.OpenAt(rig.ShardOfPartition(0));
  size_t read = rig.completions.size();
  while (session.next <= 200) {
    const Sequence before = session.next;
    while (session.next <= session.credit_sequence && session.next < before + 100) {
      rig.PushObserve(session, session.next++, Upsert(rig.IdOwnedBy(owner, 3)));
    }
    rig.PollAllBut(owner, 2);
    rig.Settle();
    Sequence refused = 0;
    for (; read < rig.completions.size(); ++read) {
      const Completion& completion = rig.completions[read].second;
      session.credit_sequence = std::max(session.credit_sequence, completion.credit_sequence);
      if (completion.reason != kNone && refused == 0) refused = completion.sequence;
    }
    if (refused != 0) session.next = refused;
    ASSERT_GT(session.credit_sequence, before) << "nothing may be sent any more";
  }
}

// Would catch a core that turns round at full speed, and wakes all others, while a tombstone has to
// wait for another shard's forward.
TEST(ShardPartitionsTest, ATombstoneThatHasToWaitIsNoWork) {
  PartitionRig rig(4, Options(), kShards, 2);
  const size_t home = rig.ShardOfPartition(0);
  const size_t slow = rig.ShardOfPartition(1);
  RigSession session = rig.OpenAt(home);
  RigSession other = rig.OpenAt(rig.ShardOfPartition(2), 1);
  rig.PushObserve(session, 1, Upsert(rig.IdOwnedBy(slow)));
  rig.PollAllBut(slow);
  rig.PushObserve(other, 1, Remove(rig.IdOwnedBy(other.shard)));
  rig.PollAllBut(slow);
  ASSERT_TRUE(rig.shards[other.shard]->FindSpace(kSpace)->has_tombstones());
  for (int i = 0; i < 20; ++i) EXPECT_EQ(rig.PollShard(other.shard), 0);
  rig.ExpectNothingLeft();
}

TEST(ShardPartitionsTest, WithoutASessionTheAnswerSaysWhatWasThere) {
  PartitionRig rig(4);
  const size_t home = rig.ShardOfPartition(0);
  const size_t owner = rig.ShardOfPartition(3);
  const std::string id = rig.IdOwnedBy(owner);
  for (const size_t at : {home, owner}) {
    const auto [first, made] = rig.ObserveAlone(rig.AloneAt(at), Upsert(id));
    EXPECT_EQ(first.reason, kNone);
    EXPECT_FALSE(made.existed);
    EXPECT_EQ(made.stamp, rig.LiveOf(id)[owner].stamp);
    const auto [second, replaced] = rig.ObserveAlone(rig.AloneAt(at), Upsert(id, 2));
    EXPECT_TRUE(replaced.existed);
    EXPECT_GT(replaced.stamp, made.stamp);
    EXPECT_TRUE(rig.ObserveAlone(rig.AloneAt(at), Remove(id)).second.existed);
    EXPECT_FALSE(rig.ObserveAlone(rig.AloneAt(at), Remove(id)).second.existed);
  }
  rig.ExpectNothingLeft();
}

// ---------------------------------------------------------------------------------------------
// Growth

TEST(ShardPartitionsTest, ASpaceGrowsFromOneToFourWhileItIsFilled) {
  PartitionRig rig(1, Options(50), 4);
  RigSession session = rig.OpenAt(rig.ShardOfPartition(0));
  std::map<std::string, size_t> held;
  uint16_t most = 1;
  for (uint64_t i = 0; i < 500; ++i) {
    ASSERT_EQ(rig.Observe(&session, Upsert(IdAt(i))).reason, kNone);
    held[IdAt(i)] = rig.HolderOf(IdAt(i));
    ASSERT_NE(held[IdAt(i)], kNoShard);
    EXPECT_GE(rig.space().partitions(), most);
    most = rig.space().partitions();
  }
  EXPECT_EQ(most, 4u);
  uint64_t grown = 0;
  for (size_t s = 0; s < kShards; ++s) grown += rig.counter(ShardCounter::kSpacesGrown, s);
  EXPECT_EQ(grown, 2u);
  uint64_t not_at_owner = 0;
  for (const auto& [id, holder] : held) {
    EXPECT_EQ(rig.HolderOf(id), holder) << "what is older stays";
    not_at_owner += static_cast<uint64_t>(holder != rig.OwnerOf(id));
  }
  EXPECT_GT(not_at_owner, 20u);
  // An update goes to the owner and retires the old one; a delete finds it wherever it is.
  for (uint64_t i = 0; i < 500; ++i) {
    if (i % 3 == 0) {
      ASSERT_EQ(rig.Observe(&session, Remove(IdAt(i))).reason, kNone);
      EXPECT_TRUE(rig.LiveOf(IdAt(i)).empty()) << IdAt(i);
    } else {
      ASSERT_EQ(rig.Observe(&session, Upsert(IdAt(i), 2, "new")).reason, kNone);
      EXPECT_EQ(rig.HolderOf(IdAt(i)), rig.OwnerOf(IdAt(i)));
      EXPECT_EQ(rig.PayloadOf(IdAt(i)), "new");
    }
  }
  rig.ExpectNothingLeft();
}

TEST(ShardPartitionsTest, ASpaceGrowsWhereLinkingDoesNotKeepUp) {
  for (const bool may_grow : {false, true}) {
    ShardOptions options = Options(may_grow ? 1'000'000 : 0);
    options.unlinked_limit_bytes = 128 * 5'000;
    PartitionRig rig(1, options, 2);
    RigSession session = rig.OpenAt(rig.ShardOfPartition(0));
    for (uint64_t i = 0; i < 8'000; ++i) {
      rig.PushObserve(session, session.next++, Upsert(IdAt(i), static_cast<float>(i)));
      if (i % 50 == 0) rig.Poll();
      while (rig.outstanding(0) > 200) rig.Poll();
    }
    rig.Settle();
    EXPECT_EQ(rig.space().partitions(), may_grow ? 2u : 1u);
    rig.ExpectNothingLeft();
  }
}

TEST(ShardPartitionsTest, ASpaceGrowsNoFurtherThanItMay) {
  for (const uint64_t grow_at : {uint64_t{0}, uint64_t{10}}) {
    PartitionRig rig(1, Options(grow_at), 2);
    RigSession session = rig.OpenAt(rig.ShardOfPartition(0));
    for (uint64_t i = 0; i < 100; ++i) (void)rig.Observe(&session, Upsert(IdAt(i)));
    EXPECT_EQ(rig.space().partitions(), grow_at == 0 ? 1u : 2u);
  }
}

// The home read the number of partitions before the space grew; another one, after it, has an
// earlier or a later stamp; and the two meet at the old owner in either order.
class GrowthRaceTest : public testing::TestWithParam<std::tuple<bool, bool, int>> {};

TEST_P(GrowthRaceTest, TheLaterStampStands) {
  const auto [late_home_is_later, other_ring_first, order] = GetParam();
  PartitionRig rig(1, Options(), 2, 2);
  const size_t old_owner = rig.ShardOfPartition(0);
  const size_t new_owner = rig.ShardOfPartition(1);
  const std::string id = PartitionRig::IdOfPartition(1, 2);  // It moves.
  size_t homes[2];
  for (size_t s = 0, n = 0; n < 2; ++s) {
    if (s != old_owner && s != new_owner) homes[n++] = s;
  }
  // A shard reads the rings of the others in their order.
  if (other_ring_first) std::swap(homes[0], homes[1]);
  RigSession before = rig.OpenAt(homes[0], 0);
  RigSession after = rig.OpenAt(homes[1], 1);
  // The clock is set back between the two, where the first is to have the later stamp.
  if (!late_home_is_later) rig.clock.StepWallNs(1'000'000);
  rig.PushObserve(before, 1, Upsert(id, 1, "before"));
  rig.PollShard(homes[0]);
  if (order == 4) rig.Settle();
  rig.clock.StepWallNs(late_home_is_later ? 10'000 : -1'000'000);
  ASSERT_TRUE(rig.space().Grow(1));
  rig.PushObserve(after, 1, Upsert(id, 2, "after"));
  rig.PollShard(homes[1]);
  const std::vector<std::vector<size_t>> orders = {
      {old_owner, homes[0], homes[0]},             // the first one is through
      {new_owner, homes[1], old_owner, homes[1]},  // both at the old owner
      {new_owner, homes[1], homes[1]},
      {old_owner, new_owner, homes[1], old_owner, homes[0]},
      {}};  // the first one was through before
  for (const size_t s : orders[static_cast<size_t>(order)]) rig.PollShard(s);
  rig.Settle();
  EXPECT_EQ(rig.PayloadOf(id), late_home_is_later ? "after" : "before")
      << "order " << order << ", later " << late_home_is_later;
  rig.ExpectNothingLeft();
}

INSTANTIATE_TEST_SUITE_P(Orders, GrowthRaceTest,
                         testing::Combine(testing::Bool(), testing::Bool(), testing::Range(0, 5)));

// ---------------------------------------------------------------------------------------------
// Suppress and restore

TEST(ShardPartitionsTest, ASuppressGoesWhereTheIdLies) {
  PartitionRig rig(1, Options(50), 4);
  RigSession session = rig.OpenAt(rig.ShardOfPartition(0));
  for (uint64_t i = 0; i < 400; ++i) {
    ASSERT_EQ(rig.Observe(&session, Upsert(IdAt(i), 1, "of " + IdAt(i))).reason, kNone);
  }
  ASSERT_EQ(rig.space().partitions(), 4u);
  int not_at_owner = 0;
  for (uint64_t i = 0; i < 400; ++i) {
    const std::string id = IdAt(i);
    const size_t home = i % kShards;
    const size_t holder = rig.HolderOf(id);
    not_at_owner += static_cast<int>(holder != rig.OwnerOf(id));
    EXPECT_FALSE(rig.Existed(home, Restore(id)));
    ASSERT_TRUE(rig.Existed(home, Suppress(id))) << id;
    EXPECT_TRUE(rig.LiveOf(id).empty());
    EXPECT_FALSE(rig.Existed((home + 1) % kShards, Suppress(id))) << "it is hidden already";
    EXPECT_EQ(rig.CountHidden(), 1u);
    if (i % 4 == 0) {  // Replaced.
      ASSERT_EQ(rig.Observe(&session, Upsert(id, 2, "new")).reason, kNone);
      EXPECT_EQ(rig.HolderOf(id), rig.OwnerOf(id));
      EXPECT_FALSE(rig.Existed(home, Restore(id)));
      EXPECT_EQ(rig.PayloadOf(id), "new");
    } else if (i % 4 == 1) {  // Removed.
      EXPECT_TRUE(rig.Existed(home, Remove(id)));
      EXPECT_FALSE(rig.Existed(home, Restore(id)));
      EXPECT_TRUE(rig.LiveOf(id).empty());
    } else {
      ASSERT_TRUE(rig.Existed((home + 2) % kShards, Restore(id))) << id;
      EXPECT_EQ(rig.HolderOf(id), holder) << "it stayed where it was";
      EXPECT_EQ(rig.PayloadOf(id), "of " + id);
    }
    EXPECT_EQ(rig.CountHidden(), 0u);
  }
  EXPECT_GT(not_at_owner, 50);
  EXPECT_FALSE(rig.Existed(0, Suppress("unknown")));
  rig.ExpectNothingLeft();
}

// An update is stored by the owner and has not reached the earlier owner yet: what is suppressed
// and restored meanwhile, in both, is one memory in the end, and it is the update.
TEST(ShardPartitionsTest, AnUpdateSupersedesWhatWasHiddenOrRestoredMeanwhile) {
  for (const bool restores : {false, true}) {
    PartitionRig rig(1, Options(), 2, 2);
    const size_t old_owner = rig.ShardOfPartition(0);
    const size_t new_owner = rig.ShardOfPartition(1);
    const std::string id = PartitionRig::IdOfPartition(1, 2);
    std::vector<size_t> homes;
    for (size_t s = 0; s < kShards; ++s) {
      if (s != old_owner && s != new_owner) homes.push_back(s);
    }
    EXPECT_FALSE(rig.Existed(old_owner, Upsert(id, 1, "old")));
    ASSERT_TRUE(rig.space().Grow(1));
    RigSession writer = rig.OpenAt(homes[0], 0);
    rig.PushObserve(writer, 1, Upsert(id, 2, "new"));
    rig.clock.AdvanceNs(10'000);
    rig.PollShard(homes[0]);
    rig.PollShard(new_owner);
    EXPECT_EQ(rig.LiveOf(id).size(), 2u);
    for (int step = 0; step < 1 + static_cast<int>(restores); ++step) {
      RigSession other = rig.AloneAt(homes[1]);
      other.producer = 1;
      const size_t answered = rig.completions.size();
      rig.PushObserve(other, 1, step == 0 ? Suppress(id) : Restore(id));
      rig.PollAllBut(homes[0]);
      ASSERT_EQ(rig.completions.size(), answered + 1);
      EXPECT_EQ(rig.CountHidden(), step == 0 ? 2u : 0u);
    }
    rig.Settle();
    EXPECT_EQ(rig.CountHidden() + rig.LiveOf(id).size(), 1u);
    EXPECT_EQ(rig.Existed(homes[1], Restore(id)), !restores);
    EXPECT_EQ(rig.PayloadOf(id), "new");
    EXPECT_EQ(rig.HolderOf(id), new_owner);
    rig.ExpectNothingLeft();
  }
}

// Would catch a space that changes between two slices of a recall, under its list of fresh nodes.
TEST(ShardPartitionsTest, ARetireWaitsForTheRecallUnderWay) {
  PartitionRig rig(1, Options(), 2);
  const size_t old_owner = rig.ShardOfPartition(0);
  const size_t new_owner = rig.ShardOfPartition(1);
  RigSession session = rig.OpenAt(old_owner);
  for (uint64_t i = 0; i < 3'500; ++i) {
    ASSERT_EQ(rig.Observe(&session, Upsert(IdAt(i), static_cast<float>(i))).reason, kNone);
  }
  ASSERT_TRUE(rig.space().Grow(1));
  const std::string id = rig.IdOwnedBy(new_owner);
  ASSERT_EQ(rig.HolderOf(id), old_owner);
  rig.PushObserve(session, session.next++, Upsert(id, 1, "new"));
  rig.PollShard(old_owner);  // It is on its way.
  const uint64_t recall = rig.PushRecall(0, kSpace, {1, 1}, {.k = 5}, old_owner);
  rig.PollShard(old_owner);
  rig.PollShard(new_owner);
  rig.PollShard(old_owner);
  ASSERT_FALSE(rig.answers[recall].done) << "a recall of several slices";
  EXPECT_EQ(rig.LiveOf(id).size(), 2u) << "the new owner has answered, and the recall goes on";
  rig.Settle();
  EXPECT_TRUE(rig.answers[recall].done);
  EXPECT_EQ(rig.PayloadOf(id), "new");
  rig.ExpectNothingLeft();
}

// A retire may meet a store that is earlier and comes later.
TEST(ShardPartitionsTest, ATombstoneMeetsWhatComesLate) {
  PartitionRig rig(2, Options(), 2, 2);
  const size_t owner = rig.ShardOfPartition(0);
  const std::string id = rig.IdOwnedBy(owner);
  size_t homes[2];
  for (size_t s = 0, n = 0; n < 2; ++s) {
    if (s != owner) homes[n++] = s;
  }
  RigSession writer = rig.OpenAt(homes[0], 0);
  RigSession remover = rig.OpenAt(homes[1], 1);
  rig.PushObserve(writer, 1, Upsert(id));
  rig.PollShard(homes[0]);  // It has its stamp, and is on its way.
  rig.clock.AdvanceNs(1'000);
  rig.clock.StepWallNs(1'000);
  // The remover's reaches the owner first: its ring is read first, or the other's is read later.
  rig.PushObserve(remover, 1, Remove(id));
  rig.PollShard(homes[1]);
  rig.Settle();
  EXPECT_TRUE(rig.LiveOf(id).empty());
  rig.ExpectNothingLeft();
}

// ---------------------------------------------------------------------------------------------
// Threads

// Each shard on its own thread, for ThreadSanitizer: what travels between them is published before
// it is read.
TEST(ShardPartitionsTest, ShardsOnTheirOwnThreads) {
  constexpr size_t kThreads = 4;
  constexpr uint64_t kBatch = 50;
  PartitionRig rig(2, Options(20), kShards, 2);
  RigSession sessions[] = {rig.OpenAt(rig.ShardOfPartition(0), 0),
                           rig.OpenAt(rig.ShardOfPartition(1), 1)};
  rig.polled_elsewhere = true;
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&rig, &stop, t] {
      while (!stop.load()) {
        int work = 0;
        for (size_t s = t; s < kShards; s += kThreads) work += rig.shards[s]->Poll();
        if (work == 0) std::this_thread::yield();
      }
    });
  }
  // Many at once, as the threads may share few processors. Each session has its own ids.
  std::map<std::string, std::string> expected;
  for (int round = 0; round < 12; ++round) {
    for (RigSession& session : sessions) {
      for (uint64_t i = 0; i < kBatch; ++i) {
        const std::string id = std::to_string(session.shard) + IdAt((i * 7) % 40);
        const bool removes = (i + static_cast<uint64_t>(round)) % 5 == 0;
        const std::string payload = std::to_string(session.next);
        rig.PushObserve(session, session.next++, removes ? Remove(id) : Upsert(id, 1, payload));
        expected[id] = removes ? "held 0 times" : payload;
      }
    }
    ASSERT_TRUE(rig.PollUntil([&] { return rig.outstanding(0) + rig.outstanding(1) == 0; }));
  }
  stop.store(true);
  for (std::thread& thread : threads) thread.join();
  rig.polled_elsewhere = false;
  for (const auto& [producer, completion] : rig.completions) EXPECT_EQ(completion.reason, kNone);
  EXPECT_EQ(rig.space().partitions(), 4u);
  for (const auto& [id, payload] : expected) EXPECT_EQ(rig.PayloadOf(id), payload) << id;
  rig.ExpectNothingLeft();
}

// ---------------------------------------------------------------------------------------------
// The hot path

TEST(ShardPartitionsTest, ForwardingTakesNoMemory) {
  PartitionRig rig(4);
  RigSession session = rig.OpenAt(rig.ShardOfPartition(0));
  for (uint64_t i = 0; i < 200; ++i) (void)rig.Observe(&session, Upsert(IdAt(i)));
  rig.poll_allocations = 0;
  for (uint64_t i = 0; i < 400; ++i) (void)rig.Observe(&session, Upsert(IdAt(i % 200), 2));
  EXPECT_EQ(rig.poll_allocations, 0u);
}

TEST(ShardPartitionsTest, SuppressingTakesNoMemory) {
  PartitionRig rig(4);
  RigSession session = rig.OpenAt(rig.ShardOfPartition(0));
  for (uint64_t i = 0; i < 200; ++i) (void)rig.Observe(&session, Upsert(IdAt(i)));
  // Each home has met the space.
  for (size_t s = 0; s < kShards; ++s) EXPECT_FALSE(rig.Existed(s, Suppress("unknown")));
  rig.poll_allocations = 0;
  for (uint64_t i = 0; i < 200; ++i) EXPECT_TRUE(rig.Existed(i % kShards, Suppress(IdAt(i))));
  for (uint64_t i = 0; i < 200; ++i) EXPECT_TRUE(rig.Existed(i % kShards, Restore(IdAt(i))));
  EXPECT_EQ(rig.poll_allocations, 0u);
}

}  // namespace
}  // namespace engram::partitions
