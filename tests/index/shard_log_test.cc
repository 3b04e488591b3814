// Shards with logs: single cases of what tests/sim/durable_programs_test.cc draws by chance.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "tests/sim/durable_rig.h"

namespace engram {
namespace {

constexpr RefusalReason kNone = RefusalReason::kNone;
const std::string kSpace = "s";

DurableSetup SmallSetup(uint16_t shards = 1, uint16_t partitions = 1) {
  DurableSetup setup = DurableRig::SmallSetup();
  setup.shards = shards;
  setup.max_partitions = shards;
  setup.spaces = {{kSpace, {.metric = Metric::kL2, .partitions = partitions}}};
  return setup;
}

class ShardLogTest : public testing::Test {
 protected:
  void Start(const DurableSetup& setup) {
    DurableSetup seeded = setup;
    seeded.shard.seed = ++starts_;
    ASSERT_TRUE(rig_.Start(seeded).has_value());
    ASSERT_EQ(rig_.Recover(), "");
  }
  RigSession OpenAt(size_t home, SessionId id = {}) {
    return rig_.shards->Open(0, 100 + ++connections_, kSpace,
                             {.dimension = 2, .session = id, .shard = home});
  }
  static RigSession AloneAt(size_t home) {
    RigSession nobody;
    nobody.shard = home;
    nobody.space = kSpace;
    nobody.origin = 1;
    return nobody;
  }
  static Observation Upsert(const std::string& id, std::string payload) {
    return {.id = id, .vector = {1, 2}, .payload = std::move(payload)};
  }
  size_t OwnerOf(const std::string& id) {
    const SpaceEntry* entry = rig_.shards->entry(kSpace);
    return entry->ShardOf(PartitionOf(SpaceCatalogue::HashOfId(id), entry->partitions())).value();
  }
  // Live ones, of all shards.
  std::vector<std::string> PayloadsOf(const std::string& id) {
    std::vector<std::string> payloads;
    for (const auto& shard : rig_.shards->shards) {
      const Space* part = shard->FindSpace(kSpace);
      const NodeId node = part == nullptr ? kNoNode : part->FindLive(id);
      if (node == kNoNode) continue;
      payloads.push_back(rig_.PayloadOf(part->Get(node)).value_or("unreadable"));
    }
    return payloads;
  }
  using Payloads = std::vector<std::string>;

  DurableRig rig_{5};
  uint64_t starts_ = 0;
  Origin connections_ = 0;
};

TEST_F(ShardLogTest, WhatWasAcknowledgedIsThereAfterAPowerCutAtOnce) {
  Start(SmallSetup());
  RigSession session = OpenAt(0);
  SessionId id = session.id;
  for (int i = 1; i <= 20; ++i) {
    const std::string text = std::to_string(i);
    // At a segment's end the log may be busy for a moment.
    RefusalReason reason = RefusalReason::kLogBusy;
    for (int n = 0; n < 1'000 && reason == RefusalReason::kLogBusy; ++n) {
      reason = rig_.shards->Observe(&session, Upsert("id" + text, text)).reason;
    }
    ASSERT_EQ(reason, kNone);
    rig_.CutPower();
    Start(SmallSetup());
    session = OpenAt(0, id);
    EXPECT_EQ(session.last_settled, static_cast<Sequence>(i));
    EXPECT_EQ(PayloadsOf("id" + text), Payloads{text});
  }
}

// Memory that is full of observations takes others again once some were deleted: their rows stay
// with the space.
TEST_F(ShardLogTest, AFullMemoryTakesAsManyAsWereDeleted) {
  Start(SmallSetup());
  RigSession session = OpenAt(0);
  const auto observe = [&](const Observation& observation) {
    RefusalReason reason = RefusalReason::kLogBusy;
    for (int n = 0; n < 1'000 && reason == RefusalReason::kLogBusy; ++n) {
      reason = rig_.shards->Observe(&session, observation).reason;
    }
    return reason;
  };
  const std::string name(200, 'n');
  int stored = 0;
  RefusalReason reason = kNone;
  while ((reason = observe(Upsert(name + std::to_string(stored), "p"))) == kNone) ++stored;
  ASSERT_EQ(reason, RefusalReason::kMemoryFull);
  ASSERT_GT(stored, 1'000);
  for (int i = 0; i < 500; ++i) {
    ASSERT_EQ(observe({.op = ObservationOp::kDelete, .id = name + std::to_string(i)}), kNone);
  }
  rig_.shards->Settle();
  for (int i = 0; i < 400; ++i) {
    ASSERT_EQ(observe(Upsert(name + "new" + std::to_string(i), "p")), kNone) << i;
  }
  ASSERT_TRUE(rig_.shards->shard->CheckInvariants().has_value());
}

// The clock is set back while the daemon is down: what comes next is later all the same, whichever
// shard takes it.
TEST_F(ShardLogTest, AClockThatWasSetBackDoesNotMakeUpdatesOld) {
  Start(SmallSetup(2, 2));
  RigSession session = OpenAt(0);
  for (const char* id : {"a", "b", "c", "d"}) {
    ASSERT_EQ(rig_.shards->Observe(&session, Upsert(id, "old")).reason, kNone);
  }
  rig_.CutPower();
  rig_.clock.StepWallNs(-3'600 * kNanosPerSecond);
  Start(SmallSetup(2, 2));
  // Of another home, whose log has nothing.
  RigSession other = OpenAt(1);
  for (const char* id : {"a", "b", "c", "d"}) {
    ASSERT_EQ(rig_.shards->Observe(&other, Upsert(id, "new")).reason, kNone);
    EXPECT_EQ(PayloadsOf(id), Payloads{"new"});
  }
}

// Half of them are forwarded to the shard that owns them; their records lie in the log of the home.
TEST_F(ShardLogTest, AttributesAreFilteredByWhateverTheNumberOfShards) {
  const auto ids_of = [this](const std::string& filter, size_t shards) {
    std::vector<std::string> ids;
    for (size_t shard = 0; shard < shards; ++shard) {
      const RigAnswer answer =
          rig_.shards->Recall(kSpace, {1, 2}, {.k = 50, .ef = 50, .filter = filter}, shard);
      EXPECT_EQ(answer.reason, kNone);
      for (const Hit& hit : answer.hits) ids.push_back(hit.id);
    }
    std::ranges::sort(ids);
    return ids;
  };
  const std::string_view odd = "odd";
  FilterWriter writer;
  ASSERT_TRUE(writer.Require(kTagKey, {&odd, 1}));
  FilterWriter others;
  ASSERT_TRUE(others.Exclude(kTagKey, {&odd, 1}));
  Start(SmallSetup(2, 2));
  RigSession session = OpenAt(1);
  std::vector<std::string> wanted;
  std::vector<std::string> unwanted;
  for (int i = 10; i < 20; ++i) {
    Observation observation = Upsert("id" + std::to_string(i), "x");
    if (i % 2 == 1) {
      ASSERT_TRUE(AppendAttribute(kTagKey, odd, &observation.attributes));
    }
    RefusalReason reason = RefusalReason::kLogBusy;
    for (int n = 0; n < 1'000 && reason == RefusalReason::kLogBusy; ++n) {
      reason = rig_.shards->Observe(&session, observation).reason;
    }
    ASSERT_EQ(reason, kNone);
    (i % 2 == 1 ? wanted : unwanted).push_back(observation.id);
  }
  EXPECT_EQ(ids_of(writer.Bytes(), 2), wanted);
  EXPECT_EQ(ids_of(others.Bytes(), 2), unwanted);
  for (const uint16_t shards : {2, 1}) {
    rig_.CutPower();
    Start(SmallSetup(shards, shards));
    EXPECT_EQ(ids_of(writer.Bytes(), shards), wanted) << shards;
    EXPECT_EQ(ids_of(others.Bytes(), shards), unwanted) << shards;
    for (const std::string& id : wanted) EXPECT_EQ(PayloadsOf(id), Payloads{"x"}) << id;
  }
}

// What a session took lies in several logs once the number of shards has changed.
TEST_F(ShardLogTest, ASessionIsResumedWhateverTheNumberOfShards) {
  Start(SmallSetup(2));
  RigSession session = OpenAt(1);
  const SessionId id = session.id;
  ASSERT_EQ(rig_.shards->Observe(&session, Upsert("a", "1")).reason, kNone);
  rig_.CutPower();
  Start(SmallSetup(1));
  session = OpenAt(0, id);
  EXPECT_EQ(session.last_settled, 1u);
  ASSERT_EQ(rig_.shards->Observe(&session, Upsert("a", "2")).reason, kNone);
  rig_.CutPower();
  Start(SmallSetup(2));
  session = OpenAt(1, id);
  EXPECT_EQ(session.last_settled, 2u) << "number 2 lies in the log of shard 0";
  EXPECT_EQ(PayloadsOf("a"), Payloads{"2"});
}

// The suppress lies in the owner's log, the observation in that of the session's home. Whichever is
// read first, what was hidden is hidden again.
TEST_F(ShardLogTest, WhatIsHiddenStaysHidden) {
  for (const size_t home : {0u, 1u}) {
    Start(SmallSetup(2, 2));
    RigSession session = OpenAt(home);
    std::vector<std::string> ids;
    for (int i = 0; i < 8; ++i) ids.push_back("id" + std::to_string(i) + std::to_string(home));
    for (const std::string& id : ids) {
      ASSERT_EQ(rig_.shards->Observe(&session, Upsert(id, "x")).reason, kNone);
    }
    for (const std::string& id : ids) {
      ASSERT_EQ(rig_.shards
                    ->ObserveAlone(AloneAt(OwnerOf(id)), {.op = ObservationOp::kSuppress, .id = id})
                    .first.reason,
                kNone);
    }
    rig_.CutPower();
    Start(SmallSetup(2, 2));
    for (const std::string& id : ids) {
      EXPECT_EQ(PayloadsOf(id), Payloads{}) << id;
      ASSERT_EQ(
          rig_.shards->ObserveAlone(AloneAt(OwnerOf(id)), {.op = ObservationOp::kRestore, .id = id})
              .first.reason,
          kNone);
      EXPECT_EQ(PayloadsOf(id), Payloads{"x"}) << id;
    }
    rig_.CutPower();
  }
}

// Its records lie in two logs, the delete in the one that is read by another shard.
TEST_F(ShardLogTest, WhatWasDeletedStaysDeletedWhateverTheNumberOfShards) {
  Start(SmallSetup(1));
  RigSession session = OpenAt(0);
  ASSERT_EQ(rig_.shards->Observe(&session, Upsert("a", "1")).reason, kNone);
  for (const uint16_t shards : {3, 2, 1, 3}) {
    rig_.CutPower();
    Start(SmallSetup(shards));
    const size_t owner = OwnerOf("a");
    RigSession later = OpenAt(owner);
    ASSERT_EQ(rig_.shards->Observe(&later, {.op = ObservationOp::kDelete, .id = "a"}).reason,
              kNone);
    for (const uint16_t again : {1, 2, 3}) {
      rig_.CutPower();
      Start(SmallSetup(again));
      EXPECT_EQ(PayloadsOf("a"), Payloads{}) << shards << ", then " << again;
    }
    later = OpenAt(OwnerOf("a"));
    ASSERT_EQ(rig_.shards->Observe(&later, Upsert("a", "2")).reason, kNone);
  }
}

// What its own log still holds in memory the shard reads from there, as it may not be on the disk.
TEST_F(ShardLogTest, WhatIsNotOnTheDiskYetIsRecalledWithItsPayload) {
  DurableSetup setup = SmallSetup();
  setup.spaces[0].second.durability = Durability::kMemory;
  Start(setup);
  RigSession session = OpenAt(0);
  rig_.medium.StallUntil(rig_.clock.MonotonicNs() + kNanosPerSecond);
  for (const auto& [id, payload] : {std::pair("a", "first"), {"b", "second"}, {"a", "third"}}) {
    ASSERT_EQ(rig_.shards->Observe(&session, Upsert(id, payload)).reason, kNone);
  }
  const auto recall = [&] {
    std::map<std::string, std::pair<std::string, std::vector<float>>> found;
    const RigAnswer answer =
        rig_.shards->Recall(kSpace, {1, 2}, {.k = 5, .with_payload = true, .with_vector = true});
    for (const Hit& hit : answer.hits) found[hit.id] = {hit.payload, hit.vector};
    return found;
  };
  const auto expected = recall();
  EXPECT_EQ(expected.size(), 2u);
  EXPECT_EQ(expected.at("a"), std::pair(std::string("third"), std::vector<float>{1, 2}));
  EXPECT_EQ(expected.at("b").first, "second");
  EXPECT_EQ(rig_.shards->records->counter(RecordReaderCounter::kRecordsRead).Read(), 0u);
  EXPECT_EQ(PayloadsOf("a"), Payloads{"third"});
  // Later they are read from the disk.
  rig_.clock.AdvanceNs(2 * kNanosPerSecond);
  rig_.shards->Settle();
  EXPECT_EQ(recall(), expected);
  EXPECT_EQ(rig_.shards->records->counter(RecordReaderCounter::kRecordsRead).Read(), 2u);
  EXPECT_EQ(PayloadsOf("a"), Payloads{"third"});
}

// A payload beyond an answer's bound is left out, but the vector is asked for all the same.
TEST_F(ShardLogTest, TheVectorOfWhatIsNotOnTheDiskYetIsThereWithoutItsPayload) {
  DurableSetup setup = SmallSetup();
  setup.spaces[0].second.durability = Durability::kMemory;
  setup.writer.blocks = 64;
  setup.keeper.segment_bytes = 8 << 20;
  Start(setup);
  RigSession session = OpenAt(0);
  rig_.medium.StallUntil(rig_.clock.MonotonicNs() + kNanosPerSecond);
  const std::string payload(kMaxPayloadBytes, 'p');
  for (int i = 0; i < 20; ++i) {
    ASSERT_EQ(rig_.shards->Observe(&session, Upsert(std::to_string(i), payload)).reason, kNone);
  }
  const RigAnswer answer =
      rig_.shards->Recall(kSpace, {1, 2}, {.k = 20, .with_payload = true, .with_vector = true});
  ASSERT_EQ(answer.hits.size(), 20u);
  int omitted = 0;
  for (const Hit& hit : answer.hits) {
    EXPECT_EQ(hit.vector, (std::vector<float>{1, 2}));
    omitted += hit.payload_omitted ? 1 : 0;
  }
  EXPECT_EQ(omitted, 4);
  EXPECT_EQ(rig_.shards->records->counter(RecordReaderCounter::kReadsRepeated).Read(), 0u);
}

// The record lies in the log of the shard that took it, which has not written it yet: it is
// awaited.
TEST_F(ShardLogTest, WhatAnotherShardHasNotWrittenYetIsAwaited) {
  DurableSetup setup = SmallSetup(2, 2);
  setup.spaces[0].second.durability = Durability::kMemory;
  Start(setup);
  RigSession session = OpenAt(0);
  rig_.medium.StallUntil(rig_.clock.MonotonicNs() + 20 * kNanosPerMilli);
  size_t elsewhere = 0;
  for (int i = 0; i < 8; ++i) {
    const std::string id = "id" + std::to_string(i);
    elsewhere += OwnerOf(id) == 1 ? 1 : 0;
    ASSERT_EQ(rig_.shards->Observe(&session, Upsert(id, "of " + id)).reason, kNone);
  }
  ASSERT_GT(elsewhere, 0u);
  const RigAnswer answer =
      rig_.shards->Recall(kSpace, {1, 2}, {.k = 8, .with_payload = true}, /*at_shard=*/1);
  EXPECT_EQ(answer.hits.size(), elsewhere);
  for (const Hit& hit : answer.hits) EXPECT_EQ(hit.payload, "of " + hit.id);
  EXPECT_GT(rig_.shards->records->counter(RecordReaderCounter::kReadsRepeated).Read() +
                rig_.shards->records->counter(RecordReaderCounter::kRecordsRead).Read(),
            0u);
}

}  // namespace
}  // namespace engram
