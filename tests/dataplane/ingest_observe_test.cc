// Observations at an ingress core: order, repeats, gaps, acks, credit, and what is refused.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/attributes.h"
#include "tests/dataplane/ingest_rig.h"

namespace engram {
namespace {

using IngestObserveTest = IngestCoreTest;

TEST_F(IngestObserveTest, ObservationsArriveInOrderWithTheirContents) {
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

TEST_F(IngestObserveTest, AttributesArriveWithTheirObservation) {
  TestClient& client = Greeted({.features = 2});
  std::vector<WireRecord> records{RecordOf(1), RecordOf(2), RecordOf(3)};
  ASSERT_TRUE(AppendAttribute("source", "docs", &records[0].attributes));
  ASSERT_TRUE(AppendAttribute(kTagKey, "red", &records[0].attributes));
  while (AppendAttribute("k", std::string(255, 'v'), &records[2].attributes)) {
  }
  client.Send(ObserveBytes(client.session(), 1, records));
  EXPECT_EQ(LastAcked(client), 3u);
  const auto& settled = SessionOf(client).settled;
  ASSERT_EQ(settled.size(), 3u);
  for (size_t i = 0; i < settled.size(); ++i) {
    EXPECT_EQ(settled[i].reason, RefusalReason::kNone);
    EXPECT_EQ(settled[i].id, records[i].id);
    EXPECT_EQ(settled[i].attributes, records[i].attributes);
    EXPECT_EQ(settled[i].payload, records[i].payload);
  }
}

TEST_F(IngestObserveTest, AFramesPayloadKindIsThatOfItsObservations) {
  TestClient& client = Greeted();
  client.Send(
      ObserveBytes(client.session(), 1, std::vector<WireRecord>{RecordOf(1), RecordOf(2)}, 2));
  client.Send(Observations(client.session(), 3));
  EXPECT_EQ(LastAcked(client), 3u);
  const auto& settled = SessionOf(client).settled;
  ASSERT_EQ(settled.size(), 3u);
  EXPECT_EQ(settled[0].payload_kind, PayloadKind::kMemory);
  EXPECT_EQ(settled[1].payload_kind, PayloadKind::kMemory);
  EXPECT_EQ(settled[2].payload_kind, PayloadKind::kOpaque);
  client.Send(ObserveBytes(client.session(), 4, std::vector<WireRecord>{RecordOf(4)}, 3));
  ExpectRefusedAndClosed(client, RefusalReason::kBadFrame);
  EXPECT_EQ(SessionOf(client).settled.size(), 3u);
}

TEST_F(IngestObserveTest, BadAttributesConsumeTheirNumber) {
  TestClient& client = Greeted({.features = 2});
  std::vector<WireRecord> records{RecordOf(1), RecordOf(2), RecordOf(3), RecordOf(4)};
  records[1].attributes = "\x01";
  for (int i = 0; i < 65; ++i) records[2].attributes += std::string("\x01\x01kv");
  client.Send(ObserveBytes(client.session(), 1, records));
  const auto naks = client.Await(kWireNak);
  ASSERT_EQ(naks.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    const WireNak nak = ParseNak(naks[i]);
    EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kBadAttributes));
    EXPECT_EQ(naks[i].sequence, i + 2);
    EXPECT_TRUE(nak.consumed);
    EXPECT_FALSE(nak.closing);
    EXPECT_EQ(nak.expected, i + 3);
  }
  EXPECT_EQ(LastAcked(client), 4u);
  const auto& settled = SessionOf(client).settled;
  ASSERT_EQ(settled.size(), 4u);
  EXPECT_EQ(settled[3].payload, "p4");
}

TEST_F(IngestObserveTest, AcksAreCumulativeAndCoalesced) {
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

TEST_F(IngestObserveTest, TheFirstSequenceIsOne) {
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

TEST_F(IngestObserveTest, AGapIsNamedOnceAndMended) {
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

TEST_F(IngestObserveTest, ARepeatIsAckedAgainAndStoresNothing) {
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

TEST_F(IngestObserveTest, WhatTheShardCallsARepeatIsSettledButNotCountedAsAccepted) {
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

TEST_F(IngestObserveTest, InvalidObservationsConsumeTheirNumbersInOrder) {
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

TEST_F(IngestObserveTest, TheFirstObservationFixesTheDimension) {
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

TEST_F(IngestObserveTest, LackOfRoomGoesBackToTheRefusedNumber) {
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

TEST_F(IngestObserveTest, CreditRisesAndIsBoundedByTheSlots) {
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

TEST_F(IngestObserveTest, TheShardsCreditIsPassedOn) {
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

TEST_F(IngestObserveTest, AFullRingIsRefusedWithRetryAfter) {
  HarnessOptions options = CalmOptions();
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

TEST_F(IngestObserveTest, HighPriorityAndRecallsPassWhenNormalSlotsAreSpent) {
  HarnessOptions options = CalmOptions();
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

TEST_F(IngestObserveTest, PrioritiesTravelOnTheirLanes) {
  TestClient& high = Greeted({.priority = 1});
  TestClient& normal = Greeted();
  h().shard().stalled[static_cast<size_t>(Lane::kNormal)] = true;
  high.Send(Observations(high.session(), 1));
  normal.Send(Observations(normal.session(), 1));
  EXPECT_EQ(LastAcked(high), 1u);
  EXPECT_EQ(LastAcked(normal), 0u);
}

TEST_F(IngestObserveTest, ABadObserveFrameIsNotTakenAtAll) {
  TestClient& client = Greeted();
  WireBytes body = ObserveBodyOf(std::vector<WireRecord>{RecordOf(1), RecordOf(2)});
  body.pop_back();
  client.Send(MakeFrame(kWireObserve, {.session = client.session(), .sequence = 1}, body));
  ExpectRefusedAndClosed(client, RefusalReason::kBadFrame);
  EXPECT_EQ(h().shard().taken_of(RequestKind::kObserve), 0u);
}

TEST_F(IngestObserveTest, AnotherSessionsNumberIsRefused) {
  TestClient& other = Greeted();
  TestClient& client = Greeted();
  client.Send(Observations(other.session(), 1));
  ExpectRefusedAndClosed(client, RefusalReason::kBadFrame);
  EXPECT_EQ(h().shard().taken_of(RequestKind::kObserve), 0u);
  ExpectServes(other);
}

TEST_F(IngestObserveTest, ASessionThatTheShardForgotEndsTheConnection) {
  TestClient& client = Greeted();
  h().shard().ForgetSession(client.session());
  client.Send(Observations(client.session(), 1, 3));
  ExpectRefusedAndClosed(client, RefusalReason::kSessionExpired);
}

}  // namespace
}  // namespace engram
