#include "dataplane/ingest_core.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>

#include "tests/dataplane/fake_shard.h"
#include "tests/dataplane/ingest_harness.h"
#include "tests/dataplane/wire.h"

namespace engram {
namespace {

constexpr std::array<float, 3> kVector{1, 2, 3};

uint16_t CodeOf(RefusalReason reason) { return static_cast<uint16_t>(reason); }

WireRecord RecordOf(uint64_t sequence) {
  return F32Record("id-" + std::to_string(sequence), kVector, "p" + std::to_string(sequence));
}
// An observe frame of `count` sound records from `sequence` on.
WireBytes Observations(uint64_t session, uint64_t sequence, size_t count = 1) {
  std::vector<WireRecord> records;
  for (size_t i = 0; i < count; ++i) records.push_back(RecordOf(sequence + i));
  return ObserveBytes(session, sequence, records);
}
WireBytes Ping(uint64_t sequence = 0) { return MakeFrame(kWirePing, {.sequence = sequence}); }
WireBytes CloseFrame() { return MakeFrame(kWireClose, {}); }

class IngestCoreTest : public testing::Test {
 protected:
  // Bytes move in large pieces and at once, so that a test says what is cut and when.
  static HarnessOptions Calm() {
    HarnessOptions options;
    options.network.network.max_connections = 64;
    options.network.min_delay_ns = 10 * kNanosPerMicro;
    options.network.max_delay_ns = 10 * kNanosPerMicro;
    options.network.max_chunk_bytes = 65'536;
    options.network.partial_send_probability = 0;
    return options;
  }
  void Start(const HarnessOptions& options = Calm()) {
    harness_ = std::make_unique<IngestHarness>(options);
  }
  IngestHarness& h() {
    if (!harness_) Start();
    return *harness_;
  }
  TestClient& NewClient() { return clients_.emplace_back(&h()); }
  // A client that has said hello.
  TestClient& Greeted(const WireHello& hello = {}) {
    TestClient& client = NewClient();
    EXPECT_NE(client.Hello(hello), 0u);
    client.Forget();
    return client;
  }
  const FakeShard::Session& SessionOf(const TestClient& client) {
    for (size_t s = 0; s < h().shards(); ++s) {
      const auto found = h().shard(s).sessions().find(client.session());
      if (found != h().shard(s).sessions().end()) return found->second;
    }
    static const FakeShard::Session kNone;
    ADD_FAILURE() << "the shard does not know the session";
    return kNone;
  }
  // The one nak that came since the last Forget.
  static WireNak OnlyNak(TestClient& client) {
    const auto naks = client.Await(kWireNak);
    EXPECT_EQ(naks.size(), 1u);
    return naks.size() == 1 ? ParseNak(naks[0]) : WireNak{};
  }
  // The connection was refused for `reason`, told so, and ended.
  void ExpectRefusedAndClosed(TestClient& client, RefusalReason reason) {
    const WireNak nak = OnlyNak(client);
    EXPECT_EQ(nak.reason, CodeOf(reason)) << nak.text;
    EXPECT_TRUE(nak.closing);
    EXPECT_FALSE(nak.consumed);
    EXPECT_NE(nak.text.find(DescribeRefusal(reason).text), std::string::npos);
    EXPECT_TRUE(client.closed());
    EXPECT_FALSE(client.reset());
    EXPECT_EQ(h().refused(reason), 1u);
  }
  // Somebody else is still served.
  void ExpectServes(TestClient& client) {
    client.Forget();
    client.Send(Ping(77));
    const auto pings = client.Await(kWirePing);
    ASSERT_EQ(pings.size(), 1u);
    EXPECT_EQ(pings[0].sequence, 77u);
    EXPECT_EQ(pings[0].flags, 1u);
  }
  static Sequence LastAcked(TestClient& client) {
    Sequence last = 0;
    for (const WireFrame& frame : client.Await(kWireAck)) last = std::max(last, frame.sequence);
    return last;
  }

  void TearDown() override {
    if (!harness_) return;
    for (TestClient& client : clients_) {
      client.Receive();
      EXPECT_TRUE(client.sound()) << "a frame of the server's with a wrong checksum";
    }
    EXPECT_TRUE(harness_->Finish());
    EXPECT_EQ(harness_->slab().free_slots(), harness_->slab().total_slots());
    EXPECT_EQ(harness_->core().open_connections(), 0u);
    EXPECT_EQ(harness_->counted(IngestCounter::kConnectionsOpened),
              harness_->counted(IngestCounter::kConnectionsClosed));
  }

  FileLease lease_;  // of those harnesses that have one
  std::unique_ptr<IngestHarness> harness_;
  std::deque<TestClient> clients_;
};

// ---------------------------------------------------------------------------------------------
// Hello

TEST_F(IngestCoreTest, HelloMakesASession) {
  TestClient& client = NewClient();
  client.Send(HelloBytes({.dimension = 3, .metric = 3, .space = "docs"}));
  const auto acks = client.Await(kWireHelloAck);
  ASSERT_EQ(acks.size(), 1u);
  const WireBytes& body = acks[0].body;
  ASSERT_EQ(body.size(), 24u);
  EXPECT_NE(acks[0].session, 0u);
  EXPECT_EQ(acks[0].sequence, 0u);
  EXPECT_EQ(WireNumber(body, 0, 4), 0u);  // features
  EXPECT_EQ(WireNumber(body, 4, 2), 3u);
  EXPECT_EQ(WireNumber(body, 6, 1), 3u);
  EXPECT_EQ(WireNumber(body, 7, 1), 0u);
  EXPECT_GE(WireNumber(body, 8, 8), 16u);
  EXPECT_EQ(WireNumber(body, 16, 4), 1'048'576u);
  EXPECT_EQ(WireNumber(body, 20, 4), 16u);
  EXPECT_TRUE(h().shard().sessions().contains(acks[0].session));
  EXPECT_EQ(h().shard().sessions().begin()->second.space, "docs");
}

TEST_F(IngestCoreTest, HelloWithoutASessionOnlyAsks) {
  TestClient& client = NewClient();
  client.Send(HelloBytes({.features = 0xFFFFFFFF, .priority = 1}));
  const auto acks = client.Await(kWireHelloAck);
  ASSERT_EQ(acks.size(), 1u);
  EXPECT_EQ(acks[0].session, 0u);
  EXPECT_EQ(WireNumber(acks[0].body, 0, 4), 1u);  // unknown features are not granted
  EXPECT_EQ(WireNumber(acks[0].body, 7, 1), 1u);
  EXPECT_TRUE(h().shard().sessions().empty());
  client.Send(Observations(0, 1));
  const WireNak nak = OnlyNak(client);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kNoSession));
  EXPECT_FALSE(nak.closing);
  ExpectServes(client);
}

TEST_F(IngestCoreTest, ASessionIsResumed) {
  TestClient& first = Greeted({.space = "docs"});
  first.Send(Observations(first.session(), 1, 5));
  EXPECT_EQ(LastAcked(first), 5u);
  first.Close();
  h().Settle();
  TestClient& second = NewClient();
  second.Send(HelloBytes({.space = "docs", .session = first.session()}));
  const auto acks = second.Await(kWireHelloAck);
  ASSERT_EQ(acks.size(), 1u);
  EXPECT_EQ(acks[0].session, first.session());
  EXPECT_EQ(acks[0].sequence, 5u);
  EXPECT_GT(WireNumber(acks[0].body, 8, 8), 5u);
  second.Send(Observations(first.session(), 6));
  EXPECT_EQ(LastAcked(second), 6u);
}

TEST_F(IngestCoreTest, AnUnknownSessionIsExpired) {
  TestClient& client = NewClient();
  client.Send(HelloBytes({.session = 12345}));
  ExpectRefusedAndClosed(client, RefusalReason::kSessionExpired);
}

TEST_F(IngestCoreTest, HelloTwice) {
  TestClient& other = Greeted();
  TestClient& client = Greeted();
  client.Send(HelloBytes({}));
  ExpectRefusedAndClosed(client, RefusalReason::kHelloRepeated);
  ExpectServes(other);
  // Also while the first is under way.
  h().shard().SetHeld(RequestKind::kHello, true);
  TestClient& hasty = NewClient();
  hasty.Send(HelloBytes({}));
  hasty.Send(HelloBytes({}));
  const WireNak nak = OnlyNak(hasty);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kHelloRepeated));
}

TEST_F(IngestCoreTest, ObserveBeforeHello) {
  TestClient& client = NewClient();
  client.Send(Observations(1, 1));
  ExpectRefusedAndClosed(client, RefusalReason::kHelloRequired);
  EXPECT_EQ(h().shard().taken_of(RequestKind::kObserve), 0u);
}

TEST_F(IngestCoreTest, BadHelloIsNamed) {
  TestClient& client = NewClient();
  client.Send(HelloBytes({.space = "Capital"}));
  ExpectRefusedAndClosed(client, RefusalReason::kBadSpaceId);
}

TEST_F(IngestCoreTest, ASecondConnectionFencesTheFirst) {
  TestClient& first = Greeted();
  h().shard().SetHeld(RequestKind::kObserve, true);
  first.Send(Observations(first.session(), 1, 3));
  h().Settle();
  TestClient& second = NewClient();
  EXPECT_EQ(second.Hello({.session = first.session()}), first.session());
  ExpectRefusedAndClosed(first, RefusalReason::kFenced);
  first.Close();
  h().shard().SetHeld(RequestKind::kObserve, false);
  h().Settle();
  // What the first had under way is not taken, and its end does not detach the second.
  EXPECT_EQ(SessionOf(second).last_sequence, 0u);
  EXPECT_NE(SessionOf(second).origin, 0u);
  second.Forget();
  second.Send(Observations(second.session(), 1, 2));
  EXPECT_EQ(LastAcked(second), 2u);
}

// ---------------------------------------------------------------------------------------------
// Observations

TEST_F(IngestCoreTest, ObservationsArriveInOrderWithTheirContents) {
  TestClient& client = Greeted();
  client.Send(Observations(client.session(), 1, 10));
  client.Send(Observations(client.session(), 11));
  EXPECT_EQ(LastAcked(client), 11u);
  const auto& settled = SessionOf(client).settled;
  ASSERT_EQ(settled.size(), 11u);
  for (size_t i = 0; i < settled.size(); ++i) {
    EXPECT_EQ(settled[i].sequence, i + 1);
    EXPECT_EQ(settled[i].id, "id-" + std::to_string(i + 1));
    EXPECT_EQ(settled[i].payload, "p" + std::to_string(i + 1));
    EXPECT_EQ(settled[i].reason, RefusalReason::kNone);
  }
  EXPECT_EQ(h().counted(IngestCounter::kObservationsAccepted), 11u);
  EXPECT_EQ(h().core().receive_to_ring().Count(), 11u);
}

TEST_F(IngestCoreTest, AcksAreCumulativeAndCoalesced) {
  TestClient& client = Greeted();
  // One shard round answers all of a frame, and one ack says so.
  h().shard().SetHeld(RequestKind::kObserve, true);
  client.Send(Observations(client.session(), 1, 20));
  h().Settle();
  EXPECT_TRUE(client.Of(kWireAck).empty());
  h().shard().SetHeld(RequestKind::kObserve, false);
  const auto acks = client.Await(kWireAck);
  ASSERT_EQ(acks.size(), 1u);
  EXPECT_EQ(acks[0].sequence, 20u);
  EXPECT_EQ(acks[0].session, client.session());
}

TEST_F(IngestCoreTest, TheFirstSequenceIsOne) {
  TestClient& client = Greeted();
  client.Send(Observations(client.session(), 2));
  WireNak nak = OnlyNak(client);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kSequenceGap));
  EXPECT_EQ(nak.expected, 1u);
  EXPECT_FALSE(nak.closing);
  EXPECT_FALSE(nak.consumed);
  client.Send(Observations(client.session(), 0));
  h().Settle();
  EXPECT_TRUE(client.closed());
}

TEST_F(IngestCoreTest, AGapIsNamedOnceAndMended) {
  TestClient& client = Greeted();
  client.Send(Observations(client.session(), 1, 2));
  client.Send(Observations(client.session(), 5, 2));
  client.Send(Observations(client.session(), 7, 2));
  WireNak nak = OnlyNak(client);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kSequenceGap));
  EXPECT_EQ(nak.expected, 3u);
  EXPECT_EQ(client.Of(kWireNak)[0].sequence, 5u);
  client.Send(Observations(client.session(), 3, 2));
  client.Send(Observations(client.session(), 5, 2));
  EXPECT_EQ(LastAcked(client), 6u);
  EXPECT_EQ(client.Of(kWireNak).size(), 1u);
  // A second gap is named again.
  client.Send(Observations(client.session(), 9));
  h().Settle();
  ASSERT_EQ(client.Of(kWireNak).size(), 2u);
  EXPECT_EQ(ParseNak(client.Of(kWireNak)[1]).expected, 7u);
  EXPECT_EQ(SessionOf(client).settled.size(), 6u);
}

TEST_F(IngestCoreTest, ARepeatIsAckedAgainAndStoresNothing) {
  TestClient& client = Greeted();
  client.Send(Observations(client.session(), 1, 4));
  EXPECT_EQ(LastAcked(client), 4u);
  client.Forget();
  client.Send(Observations(client.session(), 2, 2));
  EXPECT_EQ(LastAcked(client), 4u);
  EXPECT_EQ(h().shard().taken_of(RequestKind::kObserve), 4u);
  EXPECT_EQ(h().counted(IngestCounter::kObservationsRepeated), 2u);
  // Half repeated, half new.
  client.Forget();
  client.Send(Observations(client.session(), 3, 4));
  EXPECT_EQ(LastAcked(client), 6u);
  EXPECT_EQ(SessionOf(client).settled.size(), 6u);
  EXPECT_EQ(SessionOf(client).settled[4].id, "id-5");
}

TEST_F(IngestCoreTest, WhatTheShardCallsARepeatIsSettledButNotCountedAsAccepted) {
  TestClient& client = Greeted();
  h().shard().taken_before = 2;
  const std::array<float, 5> longer{1, 2, 3, 4, 5};
  client.Send(ObserveBytes(client.session(), 1,
                           std::vector<WireRecord>{F32Record("longer", longer), RecordOf(2)}));
  EXPECT_EQ(LastAcked(client), 2u);
  EXPECT_EQ(h().counted(IngestCounter::kObservationsAccepted), 0u);
  EXPECT_EQ(h().counted(IngestCounter::kObservationsRepeated), 2u);
  // It stored nothing, so it says nothing about the space's dimension.
  client.Send(Observations(client.session(), 3));
  EXPECT_EQ(LastAcked(client), 3u);
  EXPECT_TRUE(client.Of(kWireNak).empty());
  EXPECT_EQ(h().counted(IngestCounter::kObservationsAccepted), 1u);
}

TEST_F(IngestCoreTest, InvalidObservationsConsumeTheirNumbersInOrder) {
  TestClient& client = Greeted({.dimension = 3});
  const std::array<float, 3> nan{1, std::numeric_limits<float>::quiet_NaN(), 0};
  const std::array<float, 3> zero{0, 0, 0};
  const std::array<float, 2> short_vector{1, 2};
  WireRecord bad_confidence = RecordOf(5);
  bad_confidence.confidence = 2;
  WireRecord bad_op = RecordOf(6);
  bad_op.op = 9;
  const std::vector<WireRecord> records{RecordOf(1),
                                        F32Record("nan", nan),
                                        F32Record("zero", zero),
                                        F32Record("short", short_vector),
                                        bad_confidence,
                                        bad_op,
                                        RecordOf(7)};
  client.Send(ObserveBytes(client.session(), 1, records));
  EXPECT_EQ(LastAcked(client), 7u);
  const auto naks = client.Of(kWireNak);
  const std::vector<RefusalReason> reasons{
      RefusalReason::kNotFinite, RefusalReason::kZeroVector, RefusalReason::kWrongDimension,
      RefusalReason::kBadConfidence, RefusalReason::kBadOperation};
  ASSERT_EQ(naks.size(), reasons.size());
  for (size_t i = 0; i < reasons.size(); ++i) {
    const WireNak nak = ParseNak(naks[i]);
    EXPECT_EQ(nak.reason, CodeOf(reasons[i]));
    EXPECT_EQ(naks[i].sequence, i + 2);
    EXPECT_EQ(nak.refused_type, kWireObserve);
    EXPECT_TRUE(nak.consumed);
    EXPECT_FALSE(nak.closing);
    EXPECT_EQ(nak.expected, i + 3);
  }
  const std::string text = ParseNak(naks[2]).text;
  EXPECT_NE(text.find("got 2, expected 3"), std::string::npos) << text;
  EXPECT_EQ(SessionOf(client).last_sequence, 7u);
  EXPECT_EQ(SessionOf(client).settled.size(), 7u);
  EXPECT_EQ(SessionOf(client).settled[6].id, "id-7");
}

TEST_F(IngestCoreTest, TheFirstObservationFixesTheDimension) {
  TestClient& client = Greeted();
  client.Send(Observations(client.session(), 1));
  EXPECT_EQ(LastAcked(client), 1u);
  const std::array<float, 5> longer{1, 2, 3, 4, 5};
  client.Send(
      ObserveBytes(client.session(), 2, std::vector<WireRecord>{F32Record("longer", longer)}));
  const WireNak nak = OnlyNak(client);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kWrongDimension));
  EXPECT_NE(nak.text.find("got 5, expected 3"), std::string::npos) << nak.text;
  // A delete has none, and does not unfix it.
  client.Send(ObserveBytes(client.session(), 3,
                           std::vector<WireRecord>{DeleteRecord("id-1"), RecordOf(4)}));
  EXPECT_EQ(LastAcked(client), 4u);
}

TEST_F(IngestCoreTest, LackOfRoomGoesBackToTheRefusedNumber) {
  TestClient& client = Greeted();
  bool full = true;
  h().shard().judge = [&](const ObserveRequest& request, std::string_view) {
    return full && request.sequence == 3 ? RefusalReason::kBacklogFull : RefusalReason::kNone;
  };
  client.Send(Observations(client.session(), 1, 5));
  const WireNak nak = OnlyNak(client);  // 4 and 5 came back as gaps: in silence
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kBacklogFull));
  EXPECT_EQ(client.Of(kWireNak)[0].sequence, 3u);
  EXPECT_EQ(nak.expected, 3u);
  EXPECT_GE(nak.retry_after_ms, 1u);
  EXPECT_FALSE(nak.consumed);
  EXPECT_FALSE(nak.closing);
  EXPECT_EQ(LastAcked(client), 2u);
  // What was under way behind it is passed over in silence.
  client.Send(Observations(client.session(), 6, 2));
  h().Settle();
  EXPECT_EQ(client.Of(kWireNak).size(), 1u);
  full = false;
  client.Send(Observations(client.session(), 3, 5));
  EXPECT_EQ(LastAcked(client), 7u);
  EXPECT_EQ(client.Of(kWireNak).size(), 1u);
  const auto& settled = SessionOf(client).settled;
  ASSERT_EQ(settled.size(), 7u);
  for (size_t i = 0; i < 7; ++i) EXPECT_EQ(settled[i].sequence, i + 1);
}

TEST_F(IngestCoreTest, CreditRisesAndIsBoundedByTheSlots) {
  TestClient& client = NewClient();
  client.Send(HelloBytes({.dimension = kVector.size()}));
  const auto hello_ack = client.Await(kWireHelloAck);
  ASSERT_EQ(hello_ack.size(), 1u);
  const uint64_t share = std::max<uint64_t>(
      16, h().slab().SlotsFor(kRequestBodyOffset + kVector.size() * 4 + 512) / 6);
  uint64_t credit = WireNumber(hello_ack[0].body, 8, 8);
  EXPECT_EQ(credit, share);  // the shard would grant more
  // Who keeps to it is never refused, and comes forward.
  uint64_t settled = 0;
  for (int round = 0; round < 20; ++round) {
    client.Forget();
    ASSERT_GT(credit, settled);
    client.Send(Observations(hello_ack[0].session, settled + 1, credit - settled));
    for (const WireFrame& ack : client.Await(kWireAck)) {
      EXPECT_GE(ack.sequence, settled);
      settled = ack.sequence;
      EXPECT_GE(WireNumber(ack.body, 0, 8), credit);
      credit = WireNumber(ack.body, 0, 8);
      EXPECT_LE(credit, settled + share);
    }
    EXPECT_TRUE(client.Of(kWireNak).empty());
  }
  EXPECT_GE(settled, 20 * (share - 1));
  // More sessions have smaller shares; what was granted stands.
  TestClient& second = NewClient();
  second.Send(HelloBytes({}));
  EXPECT_EQ(WireNumber(second.Await(kWireHelloAck).at(0).body, 8, 8),
            std::max<uint64_t>(16, share / 2));
}

TEST_F(IngestCoreTest, TheShardsCreditIsPassedOn) {
  h().shard().credit = 5;
  TestClient& client = NewClient();
  client.Send(HelloBytes({}));
  const auto hello_ack = client.Await(kWireHelloAck);
  ASSERT_EQ(hello_ack.size(), 1u);
  EXPECT_EQ(WireNumber(hello_ack[0].body, 8, 8), 5u);
  client.Send(Observations(hello_ack[0].session, 1, 2));
  EXPECT_EQ(WireNumber(client.Await(kWireAck).back().body, 0, 8), 7u);
  const Origin origin = h().shard().sessions().begin()->second.origin;
  client.Forget();
  h().shard().Notify(0, CompletionKind::kCredit, origin, 9);
  auto acks = client.Await(kWireAck);
  ASSERT_EQ(acks.size(), 1u);
  EXPECT_EQ(acks[0].sequence, 2u);
  EXPECT_EQ(WireNumber(acks[0].body, 0, 8), 9u);
  // It never falls.
  h().shard().Notify(0, CompletionKind::kCredit, origin, 3);
  for (const WireFrame& ack : client.Await(kWireAck)) {
    EXPECT_EQ(WireNumber(ack.body, 0, 8), 9u);
  }
}

TEST_F(IngestCoreTest, AFullRingIsRefusedWithRetryAfter) {
  HarnessOptions options = Calm();
  options.lane_capacity = 16;
  Start(options);
  TestClient& client = Greeted();
  h().shard().SetStalled(true);
  client.Send(Observations(client.session(), 1, 20));
  const WireNak nak = OnlyNak(client);
  // A fifth of the slots is kept, so these run out before the ring of as many entries does.
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kSlotsExhausted));
  EXPECT_GE(nak.retry_after_ms, 1u);
  EXPECT_LE(nak.retry_after_ms, 1000u);
  EXPECT_FALSE(nak.closing);
  EXPECT_FALSE(nak.consumed);
  const Sequence refused = client.Of(kWireNak)[0].sequence;
  EXPECT_EQ(nak.expected, refused);
  EXPECT_LE(refused, 17u);
  // Large ones have slots of their own but the same ring.
  client.Forget();
  std::vector<WireRecord> large;
  for (uint64_t i = refused; i < 20; ++i) {
    large.push_back(F32Record("id-" + std::to_string(i), kVector, std::string(2000, 'x')));
  }
  client.Send(ObserveBytes(client.session(), refused, large));
  const WireNak full = OnlyNak(client);
  EXPECT_EQ(full.reason, CodeOf(RefusalReason::kQueueFull));
  EXPECT_GE(full.retry_after_ms, 1u);
  EXPECT_EQ(full.expected, 17u);
  h().shard().SetStalled(false);
  EXPECT_EQ(LastAcked(client), 16u);
  client.Send(Observations(client.session(), 17, 4));
  EXPECT_EQ(LastAcked(client), 20u);
}

TEST_F(IngestCoreTest, HighPriorityAndRecallsPassWhenNormalSlotsAreSpent) {
  HarnessOptions options = Calm();
  options.lane_capacity = 128;
  options.network.network.send_limit_bytes = size_t{64} << 20;
  Start(options);
  TestClient& normal = Greeted();
  TestClient& high = Greeted({.priority = 1, .space = "urgent"});
  h().shard().stalled[static_cast<size_t>(Lane::kNormal)] = true;
  h().shard().stalled[static_cast<size_t>(Lane::kHigh)] = true;
  const std::vector<float> vector(4096, 1.0F);
  const auto send = [&](TestClient& client, uint64_t first, size_t count) {
    for (uint64_t i = first; i < first + count; ++i) {
      client.Send(
          ObserveBytes(client.session(), i, std::vector<WireRecord>{F32Record("x", vector)}));
    }
  };
  send(normal, 1, 128);
  const WireNak nak = OnlyNak(normal);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kSlotsExhausted));
  send(high, 1, 5);
  h().Settle();
  EXPECT_TRUE(high.Of(kWireNak).empty());
  send(high, 6, 60);
  EXPECT_EQ(OnlyNak(high).reason, CodeOf(RefusalReason::kSlotsExhausted));
  normal.Forget();
  normal.Send(RecallBytes(9, F32Recall(vector)));
  const auto results = normal.Await(kWireResult);
  ASSERT_EQ(results.size(), 1u);
  EXPECT_EQ(results[0].sequence, 9u);
  EXPECT_TRUE(normal.Of(kWireNak).empty());
}

TEST_F(IngestCoreTest, PrioritiesTravelOnTheirLanes) {
  TestClient& high = Greeted({.priority = 1});
  TestClient& normal = Greeted();
  h().shard().stalled[static_cast<size_t>(Lane::kNormal)] = true;
  high.Send(Observations(high.session(), 1));
  normal.Send(Observations(normal.session(), 1));
  EXPECT_EQ(LastAcked(high), 1u);
  EXPECT_EQ(LastAcked(normal), 0u);
}

TEST_F(IngestCoreTest, ABadObserveFrameIsNotTakenAtAll) {
  TestClient& client = Greeted();
  WireBytes body = ObserveBodyOf(std::vector<WireRecord>{RecordOf(1), RecordOf(2)});
  body.pop_back();
  client.Send(MakeFrame(kWireObserve, {.session = client.session(), .sequence = 1}, body));
  ExpectRefusedAndClosed(client, RefusalReason::kBadFrame);
  EXPECT_EQ(h().shard().taken_of(RequestKind::kObserve), 0u);
}

TEST_F(IngestCoreTest, AnotherSessionsNumberIsRefused) {
  TestClient& other = Greeted();
  TestClient& client = Greeted();
  client.Send(Observations(other.session(), 1));
  ExpectRefusedAndClosed(client, RefusalReason::kBadFrame);
  EXPECT_EQ(h().shard().taken_of(RequestKind::kObserve), 0u);
  ExpectServes(other);
}

TEST_F(IngestCoreTest, ASessionThatTheShardForgotEndsTheConnection) {
  TestClient& client = Greeted();
  h().shard().ForgetSession(client.session());
  client.Send(Observations(client.session(), 1, 3));
  ExpectRefusedAndClosed(client, RefusalReason::kSessionExpired);
}

// ---------------------------------------------------------------------------------------------
// Recall, introspection, ping

TEST_F(IngestCoreTest, ResultsAreForwardedBatchByBatch) {
  TestClient& client = Greeted();
  h().shard().hits = {{"first-batch", 2}, {"second", 1}, {"", 0}};
  client.Send(RecallBytes(42, F32Recall(kVector), true));
  const auto results = client.Await(kWireResult);
  ASSERT_EQ(results.size(), 3u);
  const std::vector<std::string> bodies{"first-batch", "second", ""};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(results[i].sequence, 42u);
    EXPECT_EQ(results[i].flags, i < 2 ? 1u : 0u);
    EXPECT_EQ(results[i].session, client.session());
    EXPECT_EQ(WireNumber(results[i].body, 0, 2), h().shard().hits[i].count);
    EXPECT_EQ(WireNumber(results[i].body, 2, 1), 3u);  // the fake shard's metric
    EXPECT_EQ(WireNumber(results[i].body, 8, 8), 0u);  // no snapshot was asked for
    EXPECT_EQ(WireText(std::span(results[i].body).subspan(16)), bodies[i]);
  }
  ASSERT_EQ(h().shard().recalls().size(), 1u);
  const RecallRequest& request = h().shard().recalls()[0];
  EXPECT_TRUE(request.with_payload);
  EXPECT_EQ(request.k, 10u);
  EXPECT_FALSE(request.with_vector);
  EXPECT_EQ(request.snapshot, kNoStamp);
  EXPECT_EQ(request.space.view(), "default");
  EXPECT_EQ(h().counted(IngestCounter::kRecallsAnswered), 1u);
}

TEST_F(IngestCoreTest, ARefusedRecallIsAnsweredWithItsId) {
  TestClient& client = Greeted({.dimension = 3});
  struct Case {
    WireRecall recall;
    RefusalReason reason;
  };
  std::vector<Case> cases;
  const std::array<float, 2> short_vector{1, 2};
  cases.push_back({F32Recall(short_vector), RefusalReason::kWrongDimension});
  const std::array<float, 3> nan{1, std::numeric_limits<float>::quiet_NaN(), 0};
  cases.push_back({F32Recall(nan), RefusalReason::kNotFinite});
  const std::array<float, 3> zero{};
  cases.push_back({F32Recall(zero), RefusalReason::kZeroVector});
  WireRecall no_k = F32Recall(kVector);
  no_k.k = 0;
  cases.push_back({no_k, RefusalReason::kBadRecall});
  uint64_t id = 100;
  for (const Case& c : cases) {
    client.Forget();
    client.Send(RecallBytes(++id, c.recall));
    const WireNak nak = OnlyNak(client);
    EXPECT_EQ(nak.reason, CodeOf(c.reason));
    EXPECT_EQ(nak.refused_type, kWireRecall);
    EXPECT_EQ(client.Of(kWireNak).at(0).sequence, id);
    EXPECT_EQ(client.Of(kWireNak).at(0).session, client.session());
    EXPECT_FALSE(nak.consumed);
    EXPECT_FALSE(nak.closing);
  }
  // The shard's refusal likewise.
  client.Forget();
  h().shard().recall_refusal = RefusalReason::kUnknownSpace;
  client.Send(RecallBytes(7, F32Recall(kVector)));
  EXPECT_EQ(OnlyNak(client).reason, CodeOf(RefusalReason::kUnknownSpace));
  EXPECT_EQ(client.Of(kWireNak)[0].sequence, 7u);
}

TEST_F(IngestCoreTest, TooManyRecallsPauseReading) {
  HarnessOptions options = Calm();
  options.ingest.max_recalls = 4;
  options.network.max_chunk_bytes = 60;  // about one recall at a time
  Start(options);
  TestClient& client = Greeted();
  TestClient& other = Greeted();
  h().shard().SetHeld(RequestKind::kRecall, true);
  for (uint64_t id = 1; id <= 20; ++id) client.Send(RecallBytes(id, F32Recall(kVector)));
  h().Run(200);
  EXPECT_EQ(h().shard().taken_of(RequestKind::kRecall), 4u);
  ExpectServes(other);
  // Being made to wait is no idleness.
  for (int i = 0; i < 10; ++i) {
    h().Step(40 * kNanosPerSecond);
    other.Send(Ping());
  }
  h().Run(50);
  EXPECT_FALSE(client.closed());
  h().shard().SetHeld(RequestKind::kRecall, false);
  EXPECT_EQ(client.Await(kWireResult).size(), 20u);
}

// Reading pauses too late for what came in one piece. Where the stream is cut is up to the seed.
TEST_F(IngestCoreTest, WhatComesInOnePieceIsBoundedToo) {
  size_t refused = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    HarnessOptions options = Calm();
    options.ingest.max_recalls = 4;
    options.seed = seed;
    Start(options);
    TestClient& client = Greeted();
    for (const RequestKind kind :
         {RequestKind::kRecall, RequestKind::kScroll, RequestKind::kCheck}) {
      h().shard().SetHeld(kind, true);
    }
    WireBytes piece;
    const auto add = [&piece](const WireBytes& frame) {
      piece.insert(piece.end(), frame.begin(), frame.end());
    };
    for (uint64_t id = 1; id <= 12; id += 3) {
      add(RecallBytes(id, F32Recall(kVector)));
      add(ScrollBytes(id + 1, 0, 0, 10));
      add(CheckBytes(id + 2, 0));
    }
    client.Send(piece);
    h().Settle();
    EXPECT_EQ(h().shard().unanswered(), 4u);
    const auto naks = client.Of(kWireNak);
    for (size_t i = 0; i < naks.size(); ++i) {
      const WireNak nak = ParseNak(naks[i]);
      EXPECT_EQ(naks[i].sequence, 5 + i);
      EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kMergesFull));
      EXPECT_GE(nak.retry_after_ms, 1u);
      EXPECT_FALSE(nak.closing);
    }
    refused += naks.size();
    for (const RequestKind kind :
         {RequestKind::kRecall, RequestKind::kScroll, RequestKind::kCheck}) {
      h().shard().SetHeld(kind, false);
    }
    // What has been answered makes room.
    EXPECT_GE(client.Await(kWireResult).size(), 2u);
    client.Forget();
    client.Send(RecallBytes(20, F32Recall(kVector)));
    EXPECT_EQ(client.Await(kWireResult).size(), 1u);
    EXPECT_TRUE(client.Of(kWireNak).empty());
    clients_.clear();
  }
  EXPECT_GT(refused, 20u) << "hardly anything came in one piece";
}

// What a drop or a compaction leaves in the logs is to go the same way, whether or not somebody
// still waits to be told.
TEST_F(IngestCoreTest, ACommandWhoseClientHasGoneIsFollowedUp) {
  std::atomic<uint64_t> checkpoints{0};
  std::atomic<uint64_t> compactions{0};
  HarnessOptions options = Calm();
  options.shards = 3;
  options.ingest.checkpoint_requests = &checkpoints;
  options.ingest.compaction_requests = &compactions;
  Start(options);
  Greeted();
  for (const SpaceCommand what : {SpaceCommand::kCompact, SpaceCommand::kDrop}) {
    TestClient& client = Greeted();
    for (size_t s = 0; s < 3; ++s) h().shard(s).SetHeld(RequestKind::kCommand, true);
    client.Send(CommandBytes(1, static_cast<uint8_t>(what), "default"));
    h().Settle();
    // One answers before it goes, where it can.
    h().shard(0).SetHeld(RequestKind::kCommand, false);
    h().Settle();
    client.Abort();
    h().Settle();
    EXPECT_EQ(checkpoints.load(), 0u);
    h().shard(1).SetHeld(RequestKind::kCommand, false);
    h().Settle();
    EXPECT_EQ(compactions.load(), what == SpaceCommand::kDrop ? 1u : 0u) << "once all are done";
    h().shard(2).SetHeld(RequestKind::kCommand, false);
    h().Settle();
    EXPECT_EQ(compactions.load(), 1u);
    EXPECT_EQ(checkpoints.load(), what == SpaceCommand::kDrop ? 1u : 0u);
  }
}

TEST_F(IngestCoreTest, IntrospectionGathersAllShards) {
  HarnessOptions options = Calm();
  options.shards = 3;
  Start(options);
  TestClient& client = Greeted();
  for (size_t s = 0; s < 3; ++s) {
    h().shard(s).records = {{"a" + std::to_string(s), 1}, {"b" + std::to_string(s), 1}};
  }
  h().shard(1).SetStalled(true);
  client.Send(IntrospectBytes(5, 1));
  h().Settle();
  client.Send(IntrospectBytes(6, 1));
  EXPECT_EQ(OnlyNak(client).reason, CodeOf(RefusalReason::kBusy));
  EXPECT_EQ(client.Of(kWireNak)[0].sequence, 6u);
  h().shard(1).SetStalled(false);
  const auto answers = client.Await(kWireIntrospection);
  ASSERT_EQ(answers.size(), 6u);
  std::set<std::string> bodies;
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(answers[i].sequence, 5u);
    EXPECT_EQ(answers[i].flags, i < 5 ? 1u : 0u) << i;
    EXPECT_EQ(WireNumber(answers[i].body, 0, 2), 1u);
    EXPECT_EQ(WireNumber(answers[i].body, 2, 1), 1u);
    bodies.insert(WireText(std::span(answers[i].body).subspan(8)).data());
  }
  client.Forget();
  client.Send(IntrospectBytes(8, 1));
  EXPECT_EQ(client.Await(kWireIntrospection).size(), 6u);
}

TEST_F(IngestCoreTest, IntrospectionAsksEveryShardOrNone) {
  HarnessOptions options = Calm();
  options.shards = 3;
  options.lane_capacity = 4;  // as many of the smallest slots
  Start(options);
  TestClient& client = Greeted();
  for (size_t s = 0; s < 3; ++s) h().shard(s).SetHeld(RequestKind::kRecall, true);
  client.Send(RecallBytes(1, F32Recall(kVector)));
  client.Send(RecallBytes(2, F32Recall(kVector)));
  h().Settle();
  // Two slots are left for three shards.
  client.Send(IntrospectBytes(3, 1));
  const WireNak nak = OnlyNak(client);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kSlotsExhausted));
  EXPECT_GE(nak.retry_after_ms, 1u);
  EXPECT_TRUE(client.Of(kWireIntrospection).empty());
  for (size_t s = 0; s < 3; ++s) h().shard(s).SetHeld(RequestKind::kRecall, false);
  h().Settle();
  client.Send(IntrospectBytes(4, 1));
  EXPECT_EQ(client.Await(kWireIntrospection).size(), 3u);
}

TEST_F(IngestCoreTest, StatusIsLinesOfText) {
  TestClient& client = Greeted();
  // More than one frame's worth.
  std::vector<Counter> counters(3000);
  for (size_t i = 0; i < counters.size(); ++i) {
    counters[i].Add(i);
    h().catalogue().push_back({"core" + std::to_string(i), "made_up_counter_name", &counters[i]});
  }
  client.Send(IntrospectBytes(11, 2));
  const auto answers = client.Await(kWireIntrospection);
  ASSERT_GE(answers.size(), 2u);
  std::string text;
  for (size_t i = 0; i < answers.size(); ++i) {
    EXPECT_EQ(answers[i].sequence, 11u);
    EXPECT_EQ(answers[i].flags, i + 1 < answers.size() ? 1u : 0u);
    EXPECT_EQ(WireNumber(answers[i].body, 2, 1), 2u);
    text += WireText(std::span(answers[i].body).subspan(8));
  }
  EXPECT_NE(text.find("ingress0 connections_opened 1\n"), std::string::npos);
  for (size_t i = 0; i < counters.size(); ++i) {
    const std::string line =
        "core" + std::to_string(i) + " made_up_counter_name " + std::to_string(i) + "\n";
    ASSERT_NE(text.find(line), std::string::npos) << line;
  }
  client.Send(IntrospectBytes(12, 6));
  ExpectRefusedAndClosed(client, RefusalReason::kBadFrame);
}

TEST_F(IngestCoreTest, FilesAreHeldForAWhileOrUntilTheyNeedNotBe) {
  HarnessOptions options = Calm();
  options.ingest.lease = &lease_;
  Start(options);
  const auto left_ns = [&] {
    return lease_.Extend(FileLease::kNobody, h().clock().MonotonicNs(), 0);
  };
  TestClient& client = Greeted();
  client.Send(IntrospectBytes(11, 4));
  EXPECT_EQ(client.Await(kWireIntrospection).size(), 1u);
  EXPECT_GT(left_ns(), 9 * kNanosPerSecond);
  h().clock().AdvanceNs(5 * kNanosPerSecond);
  EXPECT_LT(left_ns(), 6 * kNanosPerSecond);
  client.Send(IntrospectBytes(12, 4));
  EXPECT_EQ(client.Await(kWireIntrospection).size(), 2u);
  EXPECT_GT(left_ns(), 9 * kNanosPerSecond);
  client.Send(IntrospectBytes(13, 5));
  EXPECT_EQ(client.Await(kWireIntrospection).size(), 3u);
  EXPECT_FALSE(lease_.Runs(h().clock().MonotonicNs()));
}

TEST_F(IngestCoreTest, AHoldIsItsConnectionsAlone) {
  HarnessOptions options = Calm();
  options.ingest.lease = &lease_;
  Start(options);
  TestClient& first = Greeted();
  TestClient& second = Greeted();
  first.Send(IntrospectBytes(11, 4));
  EXPECT_EQ(first.Await(kWireIntrospection).size(), 1u);
  second.Send(IntrospectBytes(21, 4));
  const WireNak nak = OnlyNak(second);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kBusy));
  EXPECT_GT(nak.retry_after_ms, 9'000u);
  EXPECT_LE(nak.retry_after_ms, 10'001u);
  EXPECT_NE(nak.text.find("holds the files"), std::string::npos) << nak.text;
  second.Send(IntrospectBytes(22, 5));
  EXPECT_EQ(second.Await(kWireIntrospection).size(), 1u);
  EXPECT_TRUE(lease_.Runs(h().clock().MonotonicNs())) << "another has released it";
  // It ends with its connection.
  first.Close();
  h().Settle();
  EXPECT_FALSE(lease_.Runs(h().clock().MonotonicNs()));
  second.Send(IntrospectBytes(23, 4));
  EXPECT_EQ(second.Await(kWireIntrospection).size(), 2u);
  EXPECT_TRUE(lease_.Runs(h().clock().MonotonicNs()));
}

TEST_F(IngestCoreTest, ACheckpointIsAskedForAndAnsweredAtOnce) {
  std::atomic<uint64_t> requests{0};
  HarnessOptions options = Calm();
  options.ingest.checkpoint_requests = &requests;
  Start(options);
  TestClient& client = Greeted();
  client.Send(IntrospectBytes(13, 3));
  const auto answers = client.Await(kWireIntrospection);
  ASSERT_EQ(answers.size(), 1u);
  EXPECT_EQ(answers[0].sequence, 13u);
  EXPECT_EQ(WireNumber(answers[0].body, 2, 1), 3u);
  EXPECT_EQ(requests.load(), 1u);
}

TEST_F(IngestCoreTest, PingIsAnsweredAlsoBeforeHello) {
  TestClient& client = NewClient();
  client.Send(Ping(123));
  const auto pings = client.Await(kWirePing);
  ASSERT_EQ(pings.size(), 1u);
  EXPECT_EQ(pings[0].sequence, 123u);
  EXPECT_EQ(pings[0].flags, 1u);
  // An answer is not answered.
  client.Send(MakeFrame(kWirePing, {.flags = 1, .sequence = 124}));
  EXPECT_EQ(client.Await(kWirePing).size(), 1u);
}

TEST_F(IngestCoreTest, PingAndCloseHaveNoBody) {
  for (const uint8_t type : {kWirePing, kWireClose}) {
    Start();
    TestClient& client = NewClient();
    client.Hello();
    client.Send(MakeFrame(type, {}, WireWriter().U8(1).Take()));
    ExpectRefusedAndClosed(client, RefusalReason::kBadFrame);
    EXPECT_TRUE(h().Finish());
    clients_.clear();
  }
}

// ---------------------------------------------------------------------------------------------
// Streams that cannot be trusted

TEST_F(IngestCoreTest, BrokenFramesAreRefusedByName) {
  struct Case {
    size_t offset;
    size_t bytes;
    uint64_t value;
    RefusalReason reason;
  };
  for (const Case& c :
       {Case{0, 4, 0x12345678, RefusalReason::kBadMagic}, Case{4, 1, 2, RefusalReason::kBadVersion},
        Case{8, 4, 0xFFFFFFFF, RefusalReason::kFrameTooLong},
        Case{8, 4, 1'048'577, RefusalReason::kFrameTooLong},
        Case{12, 4, 0xDEADBEEF, RefusalReason::kBadCrc},
        Case{40, 1, 0x55, RefusalReason::kBadCrc}}) {
    clients_.clear();
    Start();
    TestClient& other = Greeted();
    TestClient& client = Greeted();
    client.Send(Observations(client.session(), 1));
    WireBytes frame = Observations(client.session(), 2);
    SetWireNumber(frame, c.offset, c.bytes, c.value);
    client.Send(frame);
    client.Send(Observations(client.session(), 3));
    ExpectRefusedAndClosed(client, c.reason);
    // What came before stands; nothing of it and behind it is taken.
    EXPECT_EQ(SessionOf(client).last_sequence, 1u);
    EXPECT_EQ(h().shard().taken_of(RequestKind::kObserve), 1u);
    ExpectServes(other);
    EXPECT_TRUE(h().Finish());
  }
}

TEST_F(IngestCoreTest, OnlyAClientsTypesAreTaken) {
  for (int type = 0; type < 256; ++type) {
    const std::set<int> known{kWireHello,      kWireObserve, kWireRecall, kWirePing, kWireClose,
                              kWireIntrospect, kWireCommand, kWireScroll, kWireCheck};
    if (known.contains(type) || (type > 20 && type % 50 != 0)) continue;
    TestClient& client = Greeted();
    client.Send(MakeFrame(static_cast<uint8_t>(type), {}));
    const WireNak nak = OnlyNak(client);
    EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kBadType)) << type;
    EXPECT_EQ(nak.refused_type, type);
    EXPECT_TRUE(nak.closing);
    EXPECT_TRUE(client.closed());
    client.Close();
  }
}

// Pool of 4 blocks for the tests below.
HarnessOptions WithBlocks(HarnessOptions options, size_t blocks) {
  options.ingest.partial_frame_bytes = blocks * 4096;
  options.network.max_chunk_bytes = 512;
  return options;
}
WireBytes LargeObservation(uint64_t session, size_t payload_bytes) {
  return ObserveBytes(
      session, 1,
      std::vector<WireRecord>{F32Record("large", kVector, std::string(payload_bytes, 'x'))});
}

TEST_F(IngestCoreTest, AClientKilledInMidFrameGivesItsBlocksBack) {
  for (const bool abort : {false, true}) {
    clients_.clear();
    Start(WithBlocks(Calm(), 4));
    const uint32_t free_before = h().slab().free_slots();
    TestClient& victim = Greeted();
    const WireBytes frame = LargeObservation(victim.session(), 16'000);
    victim.Send(std::span(frame).first(15'000));
    h().Settle();
    if (abort) {
      victim.Abort();
    } else {
      victim.Close();
    }
    h().Settle();
    EXPECT_EQ(h().core().open_connections(), 0u);
    EXPECT_EQ(h().slab().free_slots(), free_before);
    // All four blocks are there for the next one.
    TestClient& next = Greeted();
    const WireBytes again = LargeObservation(next.session(), 16'000);
    next.Send(std::span(again).first(16'050));
    h().Settle();
    next.Send(std::span(again).subspan(16'050));
    EXPECT_EQ(LastAcked(next), 1u);
    EXPECT_EQ(h().counted(IngestCounter::kEvictedPartialFrames), 0u);
    EXPECT_GE(h().counted(IngestCounter::kFramesGathered), 1u);
    EXPECT_TRUE(h().Finish());
  }
}

TEST_F(IngestCoreTest, ABrokenStreamGivesItsBlocksBack) {
  Start(WithBlocks(Calm(), 4));
  for (int round = 0; round < 10; ++round) {
    TestClient& client = Greeted();
    WireBytes frame = LargeObservation(client.session(), 15'000);
    frame[5000] ^= std::byte{1};
    client.Send(frame);
    h().Settle();
    EXPECT_TRUE(client.closed());
    // Behind a good frame, so that it is begun in the middle of a piece, and with a bad header.
    TestClient& second = Greeted();
    WireBytes header = Ping();
    header[0] = std::byte{0};
    second.Send(std::span(header).first(20));
    h().Settle();
    second.Send(std::span(header).subspan(20));
    h().Settle();
    EXPECT_TRUE(second.closed());
    client.Close();
    second.Close();
  }
  TestClient& last = Greeted();
  last.Send(LargeObservation(last.session(), 16'000));
  EXPECT_EQ(LastAcked(last), 1u);
  EXPECT_EQ(h().counted(IngestCounter::kEvictedPartialFrames), 0u);
}

TEST_F(IngestCoreTest, ASpentPoolEvictsTheOldestDribbler) {
  Start(WithBlocks(Calm(), 8));
  TestClient& oldest = Greeted();
  TestClient& younger = Greeted();
  TestClient& fast = Greeted();
  const WireBytes dribble = LargeObservation(oldest.session(), 30'000);
  oldest.Send(std::span(dribble).first(5 * 4096));
  h().Settle();
  const WireBytes second = LargeObservation(younger.session(), 30'000);
  younger.Send(std::span(second).first(2 * 4096));
  h().Settle();
  fast.Send(LargeObservation(fast.session(), 12'000));
  EXPECT_EQ(LastAcked(fast), 1u);
  ExpectRefusedAndClosed(oldest, RefusalReason::kPartialFrameLimit);
  EXPECT_FALSE(younger.closed());
  EXPECT_EQ(h().counted(IngestCounter::kEvictedPartialFrames), 1u);
  younger.Send(std::span(second).subspan(2 * 4096));
  EXPECT_EQ(LastAcked(younger), 1u);
}

// The one that dribbles must not push out a faster one either when it is its own turn to need room.
TEST_F(IngestCoreTest, ADribblerThatGrowsIsItselfTheOldest) {
  Start(WithBlocks(Calm(), 8));
  TestClient& dribbler = Greeted();
  TestClient& younger = Greeted();
  const WireBytes first = LargeObservation(dribbler.session(), 30'000);
  const WireBytes second = LargeObservation(younger.session(), 30'000);
  dribbler.Send(std::span(first).first(4 * 4096));
  h().Settle();
  younger.Send(std::span(second).first(4 * 4096));
  h().Settle();
  dribbler.Send(std::span(first).subspan(4 * 4096, 100));
  ExpectRefusedAndClosed(dribbler, RefusalReason::kPartialFrameLimit);
  EXPECT_FALSE(younger.closed());
  younger.Send(std::span(second).subspan(4 * 4096));
  EXPECT_EQ(LastAcked(younger), 1u);
}

TEST_F(IngestCoreTest, AFrameLargerThanThePoolHarmsOnlyItsSender) {
  Start(WithBlocks(Calm(), 4));
  TestClient& other = Greeted();
  TestClient& client = Greeted();
  client.Send(LargeObservation(client.session(), 40'000));
  ExpectRefusedAndClosed(client, RefusalReason::kPartialFrameLimit);
  ExpectServes(other);
}

// ---------------------------------------------------------------------------------------------
// Endings

TEST_F(IngestCoreTest, CloseSettlesThenAnswers) {
  TestClient& client = Greeted();
  h().shard().SetHeld(RequestKind::kObserve, true);
  h().shard().SetHeld(RequestKind::kRecall, true);
  h().shard().SetHeld(RequestKind::kIntrospect, true);
  client.Send(Observations(client.session(), 1, 3));
  client.Send(RecallBytes(9, F32Recall(kVector)));
  client.Send(IntrospectBytes(10, 1));
  client.Send(CloseFrame());
  client.Send(Observations(client.session(), 4));  // too late: not read any more
  h().Settle();
  EXPECT_TRUE(client.Of(kWireClose).empty());
  h().shard().SetHeld(RequestKind::kObserve, false);
  h().Settle();
  EXPECT_TRUE(client.Of(kWireClose).empty());
  h().shard().SetHeld(RequestKind::kRecall, false);
  h().Settle();
  EXPECT_TRUE(client.Of(kWireClose).empty());
  h().shard().SetHeld(RequestKind::kIntrospect, false);
  h().Settle();
  const auto frames = client.TakeAll();
  ASSERT_GE(frames.size(), 4u);
  EXPECT_EQ(frames.back().type, kWireClose);
  EXPECT_EQ(frames.back().sequence, 3u);
  EXPECT_EQ(frames[frames.size() - 2].type, kWireAck);
  EXPECT_EQ(frames[frames.size() - 2].sequence, 3u);
  EXPECT_TRUE(client.closed());
  EXPECT_FALSE(client.reset());
  EXPECT_EQ(SessionOf(client).last_sequence, 3u);
}

TEST_F(IngestCoreTest, CloseBeforeHelloIsAnswered) {
  TestClient& client = NewClient();
  client.Send(CloseFrame());
  EXPECT_EQ(client.Await(kWireClose).size(), 1u);
  EXPECT_TRUE(client.closed());
}

TEST_F(IngestCoreTest, ACloseThatIsNeverSettledIsForced) {
  TestClient& client = Greeted();
  h().shard().SetStalled(true);
  client.Send(Observations(client.session(), 1));
  client.Send(CloseFrame());
  h().Settle();
  for (int i = 0; i < 10; ++i) h().Step(kNanosPerSecond);
  h().Settle();
  EXPECT_EQ(h().core().open_connections(), 0u);
}

// A space has one at a time, whoever asks. A drain need not wait for it.
TEST_F(IngestCoreTest, ARebuildIsAnsweredOrEndsWithTheConnection) {
  constexpr auto kRebuild = static_cast<uint8_t>(SpaceCommand::kRebuild);
  HarnessOptions options = Calm();
  options.shards = 2;
  Start(options);
  const std::string space = "docs";
  TestClient& first = Greeted({.space = space});
  TestClient& second = Greeted();
  for (size_t s = 0; s < 2; ++s) h().shard(s).SetHeld(RequestKind::kCommand, true);
  first.Send(CommandBytes(7, kRebuild, space));
  h().Settle();
  second.Send(CommandBytes(8, kRebuild, space));
  h().Settle();
  EXPECT_EQ(OnlyNak(second).reason, CodeOf(RefusalReason::kBusy));
  second.Send(CommandBytes(9, kRebuild, "nowhere"));
  h().Settle();
  EXPECT_EQ(second.Of(kWireNak).back().sequence, 9u);
  for (size_t s = 0; s < 2; ++s) h().shard(s).held.fill(false);
  h().Settle();
  EXPECT_EQ(first.Of(kWireCommandDone).size(), 1u);
  // One shard says that the space is being dropped.
  h().shard(1).command_refusal = RefusalReason::kSpaceDropping;
  second.Send(CommandBytes(10, kRebuild, space));
  h().Settle();
  EXPECT_TRUE(second.Of(kWireCommandDone).empty());
  EXPECT_EQ(second.Of(kWireNak).back().sequence, 10u);
  h().shard(1).command_refusal = RefusalReason::kNone;
  for (size_t s = 0; s < 2; ++s) h().shard(s).SetHeld(RequestKind::kCommand, true);
  second.Send(CommandBytes(11, kRebuild, space));
  h().Settle();
  h().core().BeginDrain();
  h().Settle();
  EXPECT_EQ(second.Of(kWireClose).size(), 1u);
  EXPECT_TRUE(second.Of(kWireCommandDone).empty());
  for (TestClient& client : clients_) client.Close();
  h().Settle();
  EXPECT_TRUE(h().core().drained());
  for (size_t s = 0; s < 2; ++s) h().shard(s).held.fill(false);
  EXPECT_TRUE(h().Finish());
}

TEST_F(IngestCoreTest, DrainSettlesAndSaysGoodBye) {
  TestClient& busy = Greeted();
  TestClient& idle = Greeted();
  TestClient& silent = NewClient();  // never said hello
  TestClient& asking = NewClient();
  h().Settle();
  h().shard().SetHeld(RequestKind::kObserve, true);
  h().shard().SetHeld(RequestKind::kHello, true);
  busy.Send(Observations(busy.session(), 1, 4));
  const WireBytes cut = LargeObservation(idle.session(), 5000);
  idle.Send(std::span(cut).first(1000));
  asking.Send(HelloBytes({}));
  h().Settle();
  h().core().BeginDrain();
  h().core().BeginDrain();
  TestClient& late = NewClient();
  h().Settle();
  EXPECT_TRUE(late.closed());
  EXPECT_EQ(idle.Of(kWireClose).size(), 1u);
  EXPECT_EQ(silent.Of(kWireClose).size(), 1u);
  EXPECT_TRUE(busy.Of(kWireClose).empty());
  EXPECT_TRUE(asking.Of(kWireClose).empty());
  EXPECT_FALSE(h().core().drained());
  // What comes now is not taken.
  busy.Send(Observations(busy.session(), 5));
  h().Settle();
  h().shard().held.fill(false);
  h().Settle();
  EXPECT_EQ(asking.Of(kWireHelloAck).size(), 1u);
  EXPECT_EQ(asking.Of(kWireClose).size(), 1u);
  const auto closes = busy.Of(kWireClose);
  ASSERT_EQ(closes.size(), 1u);
  EXPECT_EQ(closes[0].sequence, 4u);
  EXPECT_EQ(LastAcked(busy), 4u);
  EXPECT_EQ(SessionOf(busy).last_sequence, 4u);
  for (TestClient& client : clients_) client.Close();
  h().Settle();
  EXPECT_TRUE(h().core().drained());
}

TEST_F(IngestCoreTest, DrainEndsWithoutTheClientsHelp) {
  TestClient& client = Greeted();
  h().shard().SetStalled(true);
  client.Send(Observations(client.session(), 1));
  h().Settle();
  h().core().BeginDrain();
  for (int i = 0; i < 30 && !h().core().drained(); ++i) h().Step(kNanosPerSecond / 2);
  EXPECT_TRUE(h().core().drained());
}

TEST_F(IngestCoreTest, AConnectionGoneWhileItsRequestsAreUnderWayLeavesNothing) {
  for (const RequestKind kind : {RequestKind::kHello, RequestKind::kObserve, RequestKind::kRecall,
                                 RequestKind::kIntrospect}) {
    for (const bool reuse : {false, true}) {
      clients_.clear();
      Start();
      TestClient& client = NewClient();
      if (kind != RequestKind::kHello) client.Hello();
      for (int k = 1; k <= 5; ++k) h().shard().SetHeld(static_cast<RequestKind>(k), true);
      h().shard().SetHeld(RequestKind::kDetach, false);
      h().shard().hits = {{std::string(5000, 'h'), 1}, {"more", 1}};
      switch (kind) {
        case RequestKind::kHello:
          client.Send(HelloBytes({}));
          break;
        case RequestKind::kObserve:
          client.Send(Observations(client.session(), 1, 10));
          break;
        case RequestKind::kRecall:
          for (uint64_t id = 0; id < 5; ++id) client.Send(RecallBytes(id, F32Recall(kVector)));
          break;
        default:
          client.Send(IntrospectBytes(1, 1));
      }
      h().Settle();
      EXPECT_GT(h().shard().unanswered(), 0u);
      client.Abort();
      h().Settle();
      EXPECT_EQ(h().core().open_connections(), 0u);
      // The next connection takes the same place and must not get the first one's answers.
      TestClient* next = reuse ? &NewClient() : nullptr;
      h().Settle();
      h().shard().held.fill(false);
      h().Settle();
      if (reuse) {
        EXPECT_TRUE(next->TakeAll().empty());
        ExpectServes(*next);
      }
      EXPECT_EQ(h().slab().total_slots(), h().slab().free_slots());
      EXPECT_EQ(h().shard().free_result_slots(), h().shard().total_result_slots());
      // The session is there for a resume, and nobody holds it.
      ASSERT_EQ(h().shard().detached().size(), 1u);
      ASSERT_EQ(h().shard().sessions().size(), 1u);
      EXPECT_EQ(h().shard().detached()[0].session.value(), h().shard().sessions().begin()->first);
      EXPECT_EQ(h().shard().sessions().begin()->second.origin, 0u);
      EXPECT_EQ(h().shard().sessions().begin()->second.last_sequence,
                kind == RequestKind::kObserve ? 10u : 0u);
      EXPECT_TRUE(h().Finish());
    }
  }
}

TEST_F(IngestCoreTest, AHelloAnsweredAfterTheRefusalDetachesItsSession) {
  h().shard().SetHeld(RequestKind::kHello, true);
  TestClient& client = NewClient();
  client.Send(HelloBytes({}));
  client.Send(HelloBytes({}));  // ends the connection, which waits for the client's end
  h().Settle();
  h().shard().SetHeld(RequestKind::kHello, false);
  h().Settle();
  EXPECT_TRUE(client.Of(kWireHelloAck).empty());
  client.Close();
  h().Settle();
  ASSERT_EQ(h().shard().sessions().size(), 1u);
  EXPECT_EQ(h().shard().sessions().begin()->second.origin, 0u);
}

TEST_F(IngestCoreTest, ALostDetachIsCountedAndNothingLeaks) {
  HarnessOptions options = Calm();
  options.recall_lane_capacity = 2;
  Start(options);
  TestClient& client = Greeted();
  TestClient& asking = Greeted();
  h().shard().SetStalled(true);
  asking.Send(RecallBytes(1, F32Recall(kVector)));
  asking.Send(RecallBytes(2, F32Recall(kVector)));
  asking.Send(RecallBytes(3, F32Recall(kVector)));
  EXPECT_EQ(OnlyNak(asking).reason, CodeOf(RefusalReason::kQueueFull));
  TestClient& late = NewClient();
  late.Send(HelloBytes({}));
  const WireNak nak = OnlyNak(late);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kQueueFull));
  EXPECT_TRUE(nak.closing);
  EXPECT_GE(nak.retry_after_ms, 1u);
  client.Close();
  h().Settle();
  EXPECT_EQ(h().counted(IngestCounter::kDetachesLost), 1u);
  h().shard().SetStalled(false);
  EXPECT_EQ(asking.Await(kWireResult).size(), 2u);
}

// ---------------------------------------------------------------------------------------------
// Timeouts

TEST_F(IngestCoreTest, HandshakeTimeout) {
  TestClient& client = NewClient();
  h().Settle();
  h().Step(9 * kNanosPerSecond);
  client.Send(Ping());  // no excuse
  h().Settle();
  EXPECT_FALSE(client.closed());
  client.Forget();
  h().Step(2 * kNanosPerSecond);
  ExpectRefusedAndClosed(client, RefusalReason::kHandshakeTimeout);
}

TEST_F(IngestCoreTest, IdleTimeout) {
  TestClient& idle = Greeted();
  TestClient& pinging = Greeted();
  for (int i = 0; i < 4; ++i) {
    h().Step(74 * kNanosPerSecond);
    pinging.Send(Ping());
    h().Settle();
  }
  EXPECT_FALSE(idle.closed());
  h().Step(10 * kNanosPerSecond);
  ExpectRefusedAndClosed(idle, RefusalReason::kIdleTimeout);
  EXPECT_FALSE(pinging.closed());
}

TEST_F(IngestCoreTest, FrameTimeout) {
  TestClient& client = Greeted();
  const WireBytes frame = Observations(client.session(), 1, 100);
  client.Send(std::span(frame).first(10));
  h().Settle();
  // Dribbling on does not help: the time runs from the first byte.
  for (size_t i = 0; i < 4; ++i) {
    h().Step(7 * kNanosPerSecond);
    client.Send(std::span(frame).subspan(10 + i, 1));
    h().Settle();
  }
  EXPECT_FALSE(client.closed());
  h().Step(3 * kNanosPerSecond);
  ExpectRefusedAndClosed(client, RefusalReason::kFrameTimeout);
}

TEST_F(IngestCoreTest, EachFrameHasItsOwnTime) {
  TestClient& client = Greeted();
  // Always in mid-frame, but each one is finished in 20 s.
  WireBytes stream;
  for (uint64_t i = 1; i <= 6; ++i) {
    const WireBytes frame = Observations(client.session(), i);
    stream.insert(stream.end(), frame.begin(), frame.end());
  }
  const size_t frame_bytes = stream.size() / 6;
  client.Send(std::span(stream).first(frame_bytes / 2));
  for (size_t i = 0; i < 5; ++i) {
    h().Step(20 * kNanosPerSecond);
    client.Send(std::span(stream).subspan(frame_bytes / 2 + i * frame_bytes, frame_bytes));
    h().Settle();
  }
  EXPECT_FALSE(client.closed());
  EXPECT_EQ(LastAcked(client), 5u);
}

HarnessOptions SlowReaders(HarnessOptions options) {
  options.ingest.send_pause_bytes = 64 * 1024;
  options.ingest.max_recalls = 1000;
  options.network.client_window_bytes = 4096;
  options.network.max_chunk_bytes = 1000;
  return options;
}

TEST_F(IngestCoreTest, ASlowReaderIsNotReadFromAndThenRefused) {
  Start(SlowReaders(Calm()));
  TestClient& slow = Greeted();
  TestClient& other = Greeted();
  h().shard().hits = {{std::string(60'000, 'h'), 1}};
  for (uint64_t id = 1; id <= 3; ++id) slow.Send(RecallBytes(id, F32Recall(kVector)));
  h().Settle();
  for (uint64_t id = 4; id <= 10; ++id) slow.Send(RecallBytes(id, F32Recall(kVector)));
  h().Settle();
  EXPECT_EQ(h().counted(IngestCounter::kRecallsReceived), 3u);
  h().Step(29 * kNanosPerSecond);
  h().Settle();
  EXPECT_EQ(h().refused(RefusalReason::kSlowReader), 0u);
  ExpectServes(other);
  h().Step(2 * kNanosPerSecond);
  h().Settle();
  EXPECT_EQ(h().refused(RefusalReason::kSlowReader), 1u);
  // The nak cannot get through; the connection ends all the same.
  for (int i = 0; i < 8; ++i) h().Step(kNanosPerSecond);
  h().Settle();
  EXPECT_EQ(h().core().open_connections(), 1u);
  ExpectServes(other);
}

TEST_F(IngestCoreTest, AReaderThatCatchesUpIsReadFromAgain) {
  Start(SlowReaders(Calm()));
  TestClient& client = Greeted();
  h().shard().hits = {{std::string(60'000, 'h'), 1}};
  for (uint64_t id = 1; id <= 10; ++id) {
    client.Send(RecallBytes(id, F32Recall(kVector)));
    h().Settle();
  }
  EXPECT_LT(h().counted(IngestCounter::kRecallsReceived), 10u);
  for (int i = 0; i < 2000; ++i) {
    h().Step();
    client.Receive();
  }
  EXPECT_EQ(client.Of(kWireResult).size(), 10u);
  // A pause is no idleness, and leaves no mark.
  h().Step(290 * kNanosPerSecond);
  EXPECT_FALSE(client.closed());
}

// Between half the limit, where reading goes on, and the limit, where it stops.
TEST_F(IngestCoreTest, AReaderThatStopsBelowTheLimitIsRefusedToo) {
  Start(SlowReaders(Calm()));
  TestClient& client = Greeted();
  h().shard().hits = {{std::string(60'000, 'h'), 1}};
  for (uint64_t id = 1; id <= 2; ++id) client.Send(RecallBytes(id, F32Recall(kVector)));
  h().Settle();
  // Reads some 60 of 116 KiB, then never again.
  for (size_t taken = 0; taken < 66'000;) {
    h().Step();
    client.Receive();
    taken = client.leftover() + client.Of(kWireResult).size() * 60'048;
  }
  h().Settle();
  for (int i = 0; i < 12; ++i) {
    h().Step(10 * kNanosPerSecond);
    h().Settle();
  }
  EXPECT_EQ(h().refused(RefusalReason::kSlowReader), 1u);
  EXPECT_EQ(h().core().open_connections(), 0u);
}

TEST_F(IngestCoreTest, ASendBacklogCloseIsASlowReader) {
  HarnessOptions options = SlowReaders(Calm());
  options.network.network.send_limit_bytes = 100'000;
  options.ingest.send_pause_bytes = size_t{1} << 20;
  Start(options);
  TestClient& client = Greeted();
  h().shard().hits = {{std::string(60'000, 'h'), 1}, {std::string(60'000, 'h'), 1}};
  client.Send(RecallBytes(1, F32Recall(kVector)));
  h().Settle();
  EXPECT_EQ(h().refused(RefusalReason::kSlowReader), 1u);
  EXPECT_EQ(h().core().open_connections(), 0u);
}

// ---------------------------------------------------------------------------------------------
// Many spaces, any order

TEST_F(IngestCoreTest, TenConnectionsToTenSpacesKeepTheirOrder) {
  HarnessOptions options = Calm();
  options.shards = 3;
  options.lane_capacity = 512;
  options.network.max_chunk_bytes = 300;
  Start(options);
  for (int i = 0; i < 10; ++i) Greeted({.space = "space-" + std::to_string(i)});
  for (uint64_t sequence = 1; sequence <= 20; sequence += 2) {
    for (TestClient& client : clients_) {
      client.Send(Observations(client.session(), sequence, 2));
    }
  }
  for (size_t i = 0; i < 10; ++i) {
    EXPECT_EQ(LastAcked(clients_[i]), 20u);
    const FakeShard::Session& session = SessionOf(clients_[i]);
    EXPECT_EQ(session.space, "space-" + std::to_string(i));
    ASSERT_EQ(session.settled.size(), 20u);
    for (size_t n = 0; n < 20; ++n) EXPECT_EQ(session.settled[n].id, "id-" + std::to_string(n + 1));
    // Each lives where the router says.
    const ShardId home = SpaceCatalogue::RankShards(session.space, 3, 1)[0];
    EXPECT_TRUE(h().shard(home.value()).sessions().contains(clients_[i].session()));
  }
}

}  // namespace
}  // namespace engram
