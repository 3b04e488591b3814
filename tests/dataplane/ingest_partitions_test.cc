// An ingress core and spaces of several partitions: where sessions live, where recalls go, and what
// comes back.

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "src/core/session_id.h"
#include "tests/dataplane/ingest_rig.h"

namespace engram {
namespace {

constexpr uint16_t kShards = 4;

WireBytes Recall(uint64_t id, uint16_t flags = 0, uint32_t k = 10) {
  WireRecall recall = F32Recall(kVector);
  recall.k = k;
  return RecallBytes(id, recall, flags);
}

class IngestPartitionsTest : public IngestCoreTest {
 protected:
  static HarnessOptions Options(uint16_t partitions = kShards) {
    HarnessOptions options = CalmOptions();
    options.shards = kShards;
    options.partitions = partitions;
    return options;
  }
  void SetUp() override { Start(Options()); }
  // Partition p of any space answers with 0, 10, 20 and so on, plus its shard's number.
  void Started() override {
    for (uint16_t s = 0; s < kShards; ++s) {
      std::vector<WireHit> near;
      std::vector<WireHit> far;
      for (uint64_t i = 0; i < 3; ++i) near.push_back(HitAt(s + 10 * i));
      for (uint64_t i = 3; i < 6; ++i) far.push_back(HitAt(s + 10 * i));
      h().shard(s).hits = {HitBatch(near), HitBatch(far)};
    }
  }
  static WireHit HitAt(uint64_t place) {
    return {.id = std::to_string(place),
            .score = static_cast<float>(place),
            .stamp = 1000 + place,
            .payload = "p" + std::to_string(place)};
  }
  SpaceEntry& Default() {
    SpaceEntry* entry = h().spaces().FindOrAdd("default", Metric::kL2);
    CHECK(entry != nullptr, "there is room");
    return *entry;
  }
  FakeShard& ShardOf(uint16_t partition) { return h().shard(Default().ShardOf(partition).value()); }
  void HoldRecalls(bool held) {
    for (uint16_t s = 0; s < kShards; ++s) h().shard(s).SetHeld(RequestKind::kRecall, held);
  }
  // The ids of the hits of request `id`, over all of its frames; the last frame says so.
  static std::vector<std::string> AnswerTo(TestClient& client, uint64_t id) {
    std::vector<std::string> ids;
    int last = 0;
    for (const WireFrame& frame : client.Await(kWireResult)) {
      if (frame.sequence != id) continue;
      EXPECT_EQ(last, 0) << "a frame follows the last";
      if ((frame.flags & 1) == 0) ++last;
      const auto hits = ParseHits(std::span(frame.body).subspan(16));
      EXPECT_EQ(hits.size(), WireNumber(frame.body, 0, 2));
      for (const WireHit& hit : hits) ids.push_back(hit.id);
    }
    EXPECT_EQ(last, 1) << "the answer has no last frame";
    return ids;
  }
  // A client that has asked for 960 KB, 24 hits of 40 KB from four partitions, through windows of
  // 16 KiB: some of it is on its way.
  TestClient& AskForMuch() {
    HarnessOptions options = Options();
    options.ingest.send_pause_bytes = 128 * 1024;
    options.network.network.send_limit_bytes = 300'000;
    options.network.client_window_bytes = 16'384;
    options.network.max_chunk_bytes = 8'000;
    Start(options);
    TestClient& client = Greeted();
    for (uint16_t s = 0; s < kShards; ++s) {
      h().shard(s).hits.clear();
      for (uint64_t i = 0; i < 6; ++i) {
        h().shard(s).hits.push_back(HitBatch({{.id = std::to_string(4 * i + s),
                                               .score = static_cast<float>(4 * i + s),
                                               .stamp = 4 * i + s,
                                               .payload = std::string(40'000, 'p')}}));
      }
    }
    WireRecall recall = F32Recall(kVector);
    recall.k = 24;
    client.Send(RecallBytes(1, recall, 1));
    h().Settle();
    EXPECT_EQ(h().core().merges_in_flight(), 1u);
    return client;
  }
};

// ---------------------------------------------------------------------------------------------
// Sessions

TEST_F(IngestPartitionsTest, SessionsOfASpaceAreDealtOverItsPartitions) {
  // The first one makes the space, in its first partition.
  std::map<uint16_t, int> homes;
  for (int i = 0; i < 1 + 2 * kShards; ++i) {
    const TestClient& client = Greeted();
    const ShardId home = HomeOfSession(SessionId(client.session()));
    EXPECT_TRUE(h().shard(home.value()).sessions().contains(client.session()));
    if (i == 0) {
      EXPECT_EQ(home, h().spaces().FirstShard("default"));
    } else {
      ++homes[home.value()];
    }
  }
  EXPECT_EQ(homes.size(), size_t{kShards});
  for (const auto& [home, count] : homes) EXPECT_EQ(count, 2);
}

TEST_F(IngestPartitionsTest, ObservationsGoToTheSessionsHomeWhateverTheirId) {
  for (int i = 0; i < 3; ++i) Greeted();
  for (TestClient& client : clients_) {
    std::vector<WireRecord> records;
    for (int n = 0; n < 20; ++n) records.push_back(F32Record(std::to_string(n), kVector));
    client.Send(ObserveBytes(client.session(), 1, records));
    EXPECT_EQ(client.Await(kWireAck).back().sequence, 20u);
    const ShardId home = HomeOfSession(SessionId(client.session()));
    const FakeShard::Session& session = h().shard(home.value()).sessions().at(client.session());
    ASSERT_EQ(session.settled.size(), 20u);
    for (size_t n = 0; n < 20; ++n) EXPECT_EQ(session.settled[n].id, std::to_string(n));
  }
}

TEST_F(IngestPartitionsTest, AResumedSessionGoesHome) {
  Greeted();
  std::vector<uint64_t> sessions;
  for (int i = 0; i < kShards; ++i) {
    TestClient& client = Greeted();
    client.Send(ObserveBytes(client.session(), 1, {{F32Record("a", kVector)}}));
    h().Settle();
    sessions.push_back(client.session());
    client.Close();
  }
  h().Settle();
  for (const uint64_t session : sessions) {
    TestClient& again = NewClient();
    again.Send(HelloBytes({.session = session}));
    const auto acks = again.Await(kWireHelloAck);
    ASSERT_EQ(acks.size(), 1u);
    EXPECT_EQ(acks[0].session, session);
    EXPECT_EQ(acks[0].sequence, 1u);
  }
}

// Its log is read by the shard of its number modulo theirs, which then knows the session, or not.
TEST_F(IngestPartitionsTest, ASessionOfAShardThatIsNotThereGoesToTheOneThatReadsItsLog) {
  std::vector<uint64_t> asked(kShards);
  for (const uint16_t home : {kShards, uint16_t{200}, uint16_t{255}}) {
    TestClient& client = NewClient();
    client.Send(HelloBytes({.session = MakeSessionId(~uint64_t{0}, ShardId(home), 1).value()}));
    const WireNak nak = OnlyNak(client);
    EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kSessionExpired));
    EXPECT_TRUE(nak.closing);
    EXPECT_TRUE(client.closed());
    ++asked[home % kShards];
  }
  for (uint16_t s = 0; s < kShards; ++s) {
    EXPECT_EQ(h().shard(s).taken_of(RequestKind::kHello), asked[s]);
  }
}

// An id of a shard that is there, but of no session: that shard says so.
TEST_F(IngestPartitionsTest, AForgedSessionIsExpiredByItsShard) {
  for (uint16_t s = 0; s < kShards; ++s) {
    TestClient& client = NewClient();
    client.Send(HelloBytes({.session = MakeSessionId(77, ShardId(s), 5).value()}));
    EXPECT_EQ(OnlyNak(client).reason, CodeOf(RefusalReason::kSessionExpired));
    EXPECT_EQ(h().shard(s).taken_of(RequestKind::kHello), 1u);
  }
}

TEST_F(IngestPartitionsTest, WhoOnlyRecallsAsksTheFirstPartition) {
  Greeted();
  for (int i = 0; i < 3; ++i) {
    TestClient& client = NewClient();
    client.Send(HelloBytes({.features = 1, .session = 12345}));
    const auto acks = client.Await(kWireHelloAck);
    ASSERT_EQ(acks.size(), 1u);
    EXPECT_EQ(acks[0].session, 0u);
    client.Send(Recall(1));
    EXPECT_EQ(AnswerTo(client, 1).size(), 10u);
  }
  EXPECT_EQ(ShardOf(0).taken_of(RequestKind::kHello), 4u);
}

// ---------------------------------------------------------------------------------------------
// Recalls

TEST_F(IngestPartitionsTest, ARecallAsksEveryPartitionAndMergesTheAnswers) {
  TestClient& client = Greeted();
  client.Send(Recall(7, 3));
  EXPECT_EQ(AnswerTo(client, 7),
            (std::vector<std::string>{"0", "1", "2", "3", "10", "11", "12", "13", "20", "21"}));
  const WireFrame frame = client.Of(kWireResult).at(0);
  EXPECT_EQ(frame.session, client.session());
  EXPECT_EQ(WireNumber(frame.body, 2, 1), 3u);  // the fake shards' metric
  EXPECT_EQ(WireNumber(frame.body, 8, 8), 0u);  // no snapshot was asked for
  EXPECT_EQ(ParseHits(std::span(frame.body).subspan(16)).at(4), HitAt(10));
  for (uint16_t s = 0; s < kShards; ++s) {
    ASSERT_EQ(h().shard(s).recalls().size(), 1u);
    const RecallRequest& request = h().shard(s).recalls()[0];
    EXPECT_TRUE(request.with_payload);
    EXPECT_TRUE(request.with_vector);
    EXPECT_EQ(request.k, 10u);
    EXPECT_EQ(request.dimension, 3);
    EXPECT_EQ(request.snapshot, kNoStamp);
    EXPECT_EQ(request.space.view(), "default");
  }
  EXPECT_EQ(h().counted(IngestCounter::kRecallsReceived), 1u);
  EXPECT_EQ(h().counted(IngestCounter::kRecallsAnswered), 1u);
}

TEST_F(IngestPartitionsTest, TheFirstOnesOfALongRecallAreSentBeforeTheOthersAreThere) {
  TestClient& client = Greeted();
  for (uint16_t s = 0; s < kShards; ++s) {
    h().shard(s).hits[0].end = BatchEnd::kFirst;
    h().shard(s).batches_let_go = s == 2 ? 0 : 1;
  }
  client.Send(Recall(7, 1, 300));
  h().Settle();
  EXPECT_TRUE(client.Of(kWireResult).empty()) << "one has not said what it has";
  h().shard(2).batches_let_go = 1;
  h().Settle();
  ASSERT_EQ(client.Of(kWireResult).size(), 1u);
  const auto first = ParseHits(std::span(client.Of(kWireResult)[0].body).subspan(16));
  ASSERT_EQ(first.size(), 10u);
  for (size_t i = 0; i < 10; ++i) EXPECT_EQ(first[i].id, std::to_string(i / 4 * 10 + i % 4));
  EXPECT_EQ(h().core().merges_in_flight(), 1u);
  for (uint16_t s = 0; s < kShards; ++s) h().shard(s).batches_let_go = SIZE_MAX;
  EXPECT_EQ(AnswerTo(client, 7).size(), 24u);
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
}

TEST_F(IngestPartitionsTest,
       AConnectionThatGoesAfterTheFirstOnesLeavesItsMergeUntilAllHaveAnswered) {
  TestClient& client = Greeted();
  for (uint16_t s = 0; s < kShards; ++s) {
    h().shard(s).hits[0].end = BatchEnd::kFirst;
    h().shard(s).batches_let_go = 1;
  }
  client.Send(Recall(7, 1, 300));
  h().Settle();
  ASSERT_EQ(client.Of(kWireResult).size(), 1u);
  client.Abort();
  h().Settle();
  EXPECT_EQ(h().core().merges_in_flight(), 1u);
  for (uint16_t s = 0; s < kShards; ++s) h().shard(s).batches_let_go = SIZE_MAX;
  h().Settle();
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
}

TEST_F(IngestPartitionsTest, ARecallOfAllSpacesAsksEveryShardForThem) {
  Start(Options(1));
  TestClient& client = Greeted();
  Default();
  client.Send(Recall(3, 1 + 32));
  EXPECT_EQ(AnswerTo(client, 3).size(), 10u);
  for (uint16_t s = 0; s < kShards; ++s) {
    ASSERT_EQ(h().shard(s).recalls().size(), 1u) << "whatever partitions the space has";
    EXPECT_TRUE(h().shard(s).recalls()[0].across);
    EXPECT_EQ(h().shard(s).recalls()[0].metric, Default().metric());
  }
}

TEST_F(IngestPartitionsTest, RecallsOfTheSameNumberAndOfManyConnectionsKeepApart) {
  for (int i = 0; i < 5; ++i) Greeted();
  for (uint16_t s = 0; s < kShards; ++s) h().shard(s).max_delay_ns = 5 * kNanosPerMilli;
  for (TestClient& client : clients_) {
    for (int i = 0; i < 3; ++i) client.Send(Recall(1));
  }
  h().Run(400);
  for (TestClient& client : clients_) {
    EXPECT_EQ(client.Await(kWireResult).size(), 3u);
    for (const WireFrame& frame : client.Of(kWireResult)) {
      EXPECT_EQ(ParseHits(std::span(frame.body).subspan(16)).size(), 10u);
    }
  }
}

TEST_F(IngestPartitionsTest, OnlyTheSpacesOwnPartitionsAreAsked) {
  Start(Options(2));
  TestClient& client = Greeted();
  client.Send(Recall(1));
  EXPECT_EQ(AnswerTo(client, 1).size(), 10u);
  for (uint16_t p = 0; p < kShards; ++p) EXPECT_EQ(ShardOf(p).recalls().size(), p < 2 ? 1u : 0u);
}

TEST_F(IngestPartitionsTest, AGrownSpaceIsAskedInAllItsPartitionsFromThenOn) {
  Start(Options(1));
  TestClient& client = Greeted();
  client.Send(Recall(1));
  // One partition: its two batches are forwarded as they are.
  EXPECT_EQ(AnswerTo(client, 1).size(), 6u);
  EXPECT_EQ(client.Of(kWireResult).size(), 2u);
  client.Forget();
  ASSERT_TRUE(Default().Grow(1));
  client.Send(Recall(2));
  EXPECT_EQ(AnswerTo(client, 2).size(), 10u);
  ASSERT_TRUE(Default().Grow(2));
  client.Send(Recall(3));
  EXPECT_EQ(AnswerTo(client, 3).size(), 10u);
  EXPECT_EQ(ShardOf(0).recalls().size(), 3u);
  EXPECT_EQ(ShardOf(1).recalls().size(), 2u);
  EXPECT_EQ(ShardOf(3).recalls().size(), 1u);
}

TEST_F(IngestPartitionsTest, OnePartitionThatRefusesRefusesTheRecall) {
  TestClient& client = Greeted();
  ShardOf(2).recall_refusal = RefusalReason::kMemoryFull;
  client.Send(Recall(5));
  const WireNak nak = OnlyNak(client);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kMemoryFull));
  EXPECT_EQ(nak.refused_type, kWireRecall);
  EXPECT_GT(nak.retry_after_ms, 0u);
  EXPECT_FALSE(nak.closing);
  EXPECT_EQ(client.Of(kWireNak).at(0).sequence, 5u);
  EXPECT_TRUE(client.Of(kWireResult).empty());
  EXPECT_EQ(h().counted(IngestCounter::kRecallsAnswered), 1u);
  ShardOf(2).recall_refusal = RefusalReason::kNone;
  client.Send(Recall(6));
  EXPECT_EQ(AnswerTo(client, 6).size(), 10u);
}

TEST_F(IngestPartitionsTest, PartitionsThatHoldNothingYetAddNothing) {
  TestClient& client = Greeted();
  for (uint16_t p = 1; p < kShards; ++p) ShardOf(p).recall_refusal = RefusalReason::kUnknownSpace;
  client.Send(Recall(1));
  EXPECT_EQ(AnswerTo(client, 1).size(), 6u);
  EXPECT_TRUE(client.Of(kWireNak).empty());
  ShardOf(0).recall_refusal = RefusalReason::kUnknownSpace;
  client.Send(Recall(2));
  EXPECT_EQ(OnlyNak(client).reason, CodeOf(RefusalReason::kUnknownSpace));
}

TEST_F(IngestPartitionsTest, ARecallOverPartitionsCountsOnceAgainstTheLimit) {
  HarnessOptions options = Options();
  options.ingest.max_recalls = 2;
  Start(options);
  TestClient& client = Greeted();
  HoldRecalls(true);
  for (uint64_t id = 1; id <= 4; ++id) {
    client.Send(Recall(id));
    h().Settle();
  }
  EXPECT_EQ(h().counted(IngestCounter::kRecallsReceived), 2u);
  HoldRecalls(false);
  for (uint64_t id = 1; id <= 4; ++id) EXPECT_EQ(AnswerTo(client, id).size(), 10u);
}

// A result slot that waited for another shard's answer would be missing at its own.
TEST_F(IngestPartitionsTest, ResultSlotsGoBackWhileOtherPartitionsAreAwaited) {
  TestClient& client = Greeted();
  ShardOf(3).SetHeld(RequestKind::kRecall, true);
  for (uint64_t id = 1; id <= 10; ++id) client.Send(Recall(id));
  h().Settle();
  EXPECT_EQ(h().core().merges_in_flight(), 10u);
  EXPECT_EQ(ShardOf(0).recalls().size(), 10u);
  for (uint16_t p = 0; p < kShards; ++p) {
    EXPECT_EQ(ShardOf(p).free_result_slots(), ShardOf(p).total_result_slots());
  }
  EXPECT_TRUE(client.Of(kWireResult).empty());
  ShardOf(3).SetHeld(RequestKind::kRecall, false);
  for (uint64_t id = 1; id <= 10; ++id) EXPECT_EQ(AnswerTo(client, id).size(), 10u);
}

TEST_F(IngestPartitionsTest, AConnectionThatGoesLeavesItsMergeUntilAllHaveAnswered) {
  TestClient& client = Greeted();
  TestClient& other = Greeted();
  for (uint16_t p = 1; p < kShards; ++p) ShardOf(p).SetHeld(RequestKind::kRecall, true);
  for (uint64_t id = 1; id <= 3; ++id) client.Send(Recall(id));
  h().Settle();
  client.Abort();
  h().Settle();
  EXPECT_EQ(h().core().open_connections(), 1u);
  EXPECT_EQ(h().core().merges_in_flight(), 3u) << "three partitions still know of it";
  // Whoever comes next has its place, but not its answers.
  TestClient& next = Greeted();
  next.Send(Recall(9));
  h().Settle();
  ShardOf(1).SetHeld(RequestKind::kRecall, false);
  h().Settle();
  EXPECT_EQ(h().core().merges_in_flight(), 4u);
  ShardOf(2).recall_refusal = RefusalReason::kMemoryFull;
  ShardOf(2).SetHeld(RequestKind::kRecall, false);
  h().Settle();
  ShardOf(3).SetHeld(RequestKind::kRecall, false);
  h().Settle();
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
  const auto naks = next.Await(kWireNak);
  ASSERT_EQ(naks.size(), 1u);
  EXPECT_EQ(naks[0].sequence, 9u);
  EXPECT_TRUE(next.Of(kWireResult).empty());
  ShardOf(2).recall_refusal = RefusalReason::kNone;
  other.Send(Recall(4));
  EXPECT_EQ(AnswerTo(other, 4).size(), 10u);
}

TEST_F(IngestPartitionsTest, CloseWaitsForAllPartitions) {
  TestClient& client = Greeted();
  ShardOf(1).SetHeld(RequestKind::kRecall, true);
  client.Send(Recall(1));
  client.Send(MakeFrame(kWireClose, {}));
  EXPECT_TRUE(client.Await(kWireClose).empty());
  ShardOf(1).SetHeld(RequestKind::kRecall, false);
  EXPECT_EQ(AnswerTo(client, 1).size(), 10u);
  EXPECT_EQ(client.Of(kWireClose).size(), 1u);
  EXPECT_TRUE(client.closed());
}

TEST_F(IngestPartitionsTest, MoreRecallsThanMergesAreRefused) {
  HarnessOptions options = Options();
  options.ingest.max_merges = 2;
  Start(options);
  TestClient& client = Greeted();
  HoldRecalls(true);
  for (uint64_t id = 1; id <= 3; ++id) client.Send(Recall(id));
  const WireNak nak = OnlyNak(client);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kMergesFull));
  EXPECT_GE(nak.retry_after_ms, 1u) << "it may be asked again";
  EXPECT_FALSE(nak.closing);
  EXPECT_EQ(client.Of(kWireNak).at(0).sequence, 3u);
  for (uint16_t p = 0; p < kShards; ++p) EXPECT_EQ(ShardOf(p).unanswered(), 2u);
  HoldRecalls(false);
  EXPECT_EQ(AnswerTo(client, 1).size(), 10u);
  client.Send(Recall(4));
  EXPECT_EQ(AnswerTo(client, 4).size(), 10u);
}

// All partitions or none: half a recall would never be answered.
TEST_F(IngestPartitionsTest, OneFullLaneRefusesTheWholeRecall) {
  HarnessOptions options = Options();
  options.recall_lane_capacity = 4;
  Start(options);
  TestClient& client = Greeted();
  ShardOf(3).SetStalled(true);
  for (uint64_t id = 1; id <= 6; ++id) client.Send(Recall(id));
  EXPECT_EQ(client.Await(kWireNak).size(), 2u);
  EXPECT_EQ(ParseNak(client.Of(kWireNak)[0]).reason, CodeOf(RefusalReason::kQueueFull));
  EXPECT_EQ(ShardOf(0).recalls().size(), 4u);
  ShardOf(3).SetStalled(false);
  for (uint64_t id = 1; id <= 4; ++id) EXPECT_EQ(AnswerTo(client, id).size(), 10u);
}

// Admission comes before the fan-out.
TEST_F(IngestPartitionsTest, ABadRecallReachesNoPartition) {
  TestClient& client = Greeted();
  const std::array<float, 3> zero{};
  client.Send(RecallBytes(1, F32Recall(zero)));
  EXPECT_EQ(OnlyNak(client).reason, CodeOf(RefusalReason::kZeroVector));
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
  for (uint16_t p = 0; p < kShards; ++p) EXPECT_EQ(ShardOf(p).taken_of(RequestKind::kRecall), 0u);
}

// ---------------------------------------------------------------------------------------------
// Large answers

// The answer is larger than the backlog at which a connection is given up.
TEST_F(IngestPartitionsTest, AnAnswerIsSentAsFastAsTheClientReads) {
  TestClient& client = AskForMuch();
  const auto ids = AnswerTo(client, 1);
  ASSERT_EQ(ids.size(), 24u);
  for (size_t i = 0; i < 24; ++i) EXPECT_EQ(ids[i], std::to_string(i));
  EXPECT_EQ(h().refused(RefusalReason::kSlowReader), 0u);
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
  EXPECT_FALSE(client.closed());
}

// There is always more to be sent, so its backlog is always there.
TEST_F(IngestPartitionsTest, AClientThatReadsAllTheTimeIsNotASlowReader) {
  TestClient& client = AskForMuch();
  // 16 KiB each 4 s.
  int rounds = 0;
  for (; rounds < 1'000 && h().core().merges_in_flight() > 0; ++rounds) {
    h().Step(4 * kNanosPerSecond);
    h().Settle();
    client.Receive();
  }
  EXPECT_GT(rounds, 30) << "not slow enough to tell";
  EXPECT_EQ(AnswerTo(client, 1).size(), 24u);
  EXPECT_EQ(h().refused(RefusalReason::kSlowReader), 0u);
  EXPECT_FALSE(client.closed());
}

// 16 KiB each 10 s, while half of 128 KiB in 30 s are the least.
TEST_F(IngestPartitionsTest, AClientThatTricklesIsRefused) {
  TestClient& client = AskForMuch();
  for (int i = 0; i < 5; ++i) {
    h().Step(10 * kNanosPerSecond);
    h().Settle();
    client.Receive();
  }
  EXPECT_EQ(h().refused(RefusalReason::kSlowReader), 1u);
}

TEST_F(IngestPartitionsTest, AClientThatDoesNotReadItsMergedAnswerIsRefused) {
  AskForMuch();
  for (int i = 0; i < 12; ++i) {
    h().Step(10 * kNanosPerSecond);
    h().Settle();
  }
  EXPECT_EQ(h().refused(RefusalReason::kSlowReader), 1u);
  EXPECT_EQ(h().core().open_connections(), 0u);
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
}

TEST_F(IngestPartitionsTest, AConnectionThatGoesWhileItsAnswerIsSentLeavesNothing) {
  TestClient& client = AskForMuch();
  client.Abort();
  h().Settle();
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
}

// ---------------------------------------------------------------------------------------------
// Snapshots

TEST_F(IngestPartitionsTest, ASnapshotIsTheLeastOfAllShardsStamps) {
  Start(Options(2));
  TestClient& client = Greeted();
  ShardOf(0).PublishStamp(5000);
  ShardOf(1).PublishStamp(4000);
  // Has no part of the space, and may be the home of one of its sessions.
  ShardOf(2).PublishStamp(3000);
  client.Send(Recall(1, 4));
  EXPECT_EQ(AnswerTo(client, 1).size(), 10u);
  for (uint16_t p = 0; p < 2; ++p) EXPECT_EQ(ShardOf(p).recalls().at(0).snapshot, 3000u);
  EXPECT_EQ(WireNumber(client.Of(kWireResult).at(0).body, 8, 8), 3000u);
}

TEST_F(IngestPartitionsTest, AShardThatSleepsIsCompleteUpToNow) {
  Start(Options(2));
  TestClient& client = Greeted();
  ShardOf(0).PublishStamp(kOpenStamp);
  ShardOf(1).PublishStamp(kOpenStamp);
  const auto before = static_cast<CommitStamp>(h().clock().WallNs());
  client.Send(Recall(1, 4));
  EXPECT_EQ(AnswerTo(client, 1).size(), 10u);
  const CommitStamp snapshot = WireNumber(client.Of(kWireResult).at(0).body, 8, 8);
  EXPECT_GE(snapshot, before - (1u << kStampShardBits));
  EXPECT_LT(snapshot, static_cast<CommitStamp>(h().clock().WallNs()));
}

TEST_F(IngestPartitionsTest, ASnapshotOfAMomentIsNotLaterThanWhatIsComplete) {
  Start(Options(2));
  TestClient& client = Greeted();
  for (uint16_t s = 0; s < 3; ++s) ShardOf(s).PublishStamp(100'000);
  WireRecall recall = F32Recall(kVector);
  uint64_t request = 0;
  for (const auto& [at, snapshot] : {std::pair(int64_t{51'200}, uint64_t{51'200 + 255}),
                                     std::pair(int64_t{51'199}, uint64_t{51'199}),
                                     std::pair(int64_t{200'000}, uint64_t{100'000})}) {
    recall.at_unix_ns = at;
    client.Forget();
    client.Send(RecallBytes(++request, recall, 4 + 64));
    EXPECT_EQ(AnswerTo(client, request).size(), 10u);
    EXPECT_EQ(ShardOf(0).recalls().back().snapshot, snapshot);
    EXPECT_EQ(WireNumber(client.Of(kWireResult).at(0).body, 8, 8), snapshot);
  }
}

TEST_F(IngestPartitionsTest, OnePartitionGivesSnapshotsToo) {
  Start(Options(1));
  TestClient& client = Greeted();
  ShardOf(0).PublishStamp(777);
  client.Send(Recall(1, 4));
  EXPECT_EQ(AnswerTo(client, 1).size(), 6u);
  EXPECT_EQ(ShardOf(0).recalls().at(0).snapshot, 777u);
  EXPECT_EQ(WireNumber(client.Of(kWireResult).at(0).body, 8, 8), 777u);
}

}  // namespace
}  // namespace engram
