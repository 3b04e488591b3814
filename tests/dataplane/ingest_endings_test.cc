// How connections to an ingress core end: by a close, by a drain, by clients that go.

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "tests/dataplane/ingest_rig.h"

namespace engram {
namespace {

using IngestEndingsTest = IngestCoreTest;

TEST_F(IngestEndingsTest, CloseSettlesThenAnswers) {
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

TEST_F(IngestEndingsTest, CloseBeforeHelloIsAnswered) {
  TestClient& client = NewClient();
  client.Send(CloseFrame());
  EXPECT_EQ(client.Await(kWireClose).size(), 1u);
  EXPECT_TRUE(client.closed());
}

TEST_F(IngestEndingsTest, ACloseThatIsNeverSettledIsForced) {
  TestClient& client = Greeted();
  h().shard().SetStalled(true);
  client.Send(Observations(client.session(), 1));
  client.Send(CloseFrame());
  h().Settle();
  for (int i = 0; i < 10; ++i) h().Step(kNanosPerSecond);
  h().Settle();
  EXPECT_EQ(h().core().open_connections(), 0u);
}

TEST_F(IngestEndingsTest, DrainSettlesAndSaysGoodBye) {
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

TEST_F(IngestEndingsTest, DrainEndsWithoutTheClientsHelp) {
  TestClient& client = Greeted();
  h().shard().SetStalled(true);
  client.Send(Observations(client.session(), 1));
  h().Settle();
  h().core().BeginDrain();
  for (int i = 0; i < 30 && !h().core().drained(); ++i) h().Step(kNanosPerSecond / 2);
  EXPECT_TRUE(h().core().drained());
}

TEST_F(IngestEndingsTest, AConnectionGoneWhileItsRequestsAreUnderWayLeavesNothing) {
  for (const RequestKind kind : {RequestKind::kHello, RequestKind::kObserve, RequestKind::kRecall,
                                 RequestKind::kIntrospect}) {
    for (const bool reuse : {false, true}) {
      clients_.clear();
      Start();
      TestClient& client = NewClient();
      if (kind != RequestKind::kHello) client.Hello();
      for (int k = 1; k <= 5; ++k) h().shard().SetHeld(static_cast<RequestKind>(k), true);
      h().shard().SetHeld(RequestKind::kDetach, false);
      h().shard().hits = {HitBatch({{.id = "h", .payload = std::string(5000, 'h')}}),
                          HitBatch({{.id = "more"}})};
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

TEST_F(IngestEndingsTest, AHelloAnsweredAfterTheRefusalDetachesItsSession) {
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

TEST_F(IngestEndingsTest, ALostDetachIsCountedAndNothingLeaks) {
  HarnessOptions options = CalmOptions();
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

}  // namespace
}  // namespace engram
