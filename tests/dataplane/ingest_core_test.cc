// Connections and sessions of an ingress core: hello, ping, who is let in.

#include "dataplane/ingest_core.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "tests/dataplane/ingest_rig.h"

namespace engram {
namespace {

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

TEST_F(IngestCoreTest, AttributesAreGrantedToWhoAsksForThem) {
  for (const uint32_t features : {0u, 1u, 2u, 3u}) {
    TestClient& client = NewClient();
    client.Send(HelloBytes({.features = features}));
    const auto acks = client.Await(kWireHelloAck);
    ASSERT_EQ(acks.size(), 1u);
    EXPECT_EQ(WireNumber(acks[0].body, 0, 4), features);
  }
}

TEST_F(IngestCoreTest, HelloWithoutASessionOnlyAsks) {
  TestClient& client = NewClient();
  client.Send(HelloBytes({.features = 0xFFFFFFFF, .priority = 1}));
  const auto acks = client.Await(kWireHelloAck);
  ASSERT_EQ(acks.size(), 1u);
  EXPECT_EQ(acks[0].session, 0u);
  EXPECT_EQ(WireNumber(acks[0].body, 0, 4), 63u);  // unknown features are not granted
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

TEST_F(IngestCoreTest, TenConnectionsToTenSpacesKeepTheirOrder) {
  HarnessOptions options = CalmOptions();
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
