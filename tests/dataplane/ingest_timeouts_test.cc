// Clients that are too slow: to say hello, to send, to read.

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "tests/dataplane/ingest_rig.h"

namespace engram {
namespace {

using IngestTimeoutsTest = IngestCoreTest;

FakeShard::Batch LargeBatch() {
  return HitBatch({{.id = "h", .payload = std::string(60'000, 'h')}});
}

TEST_F(IngestTimeoutsTest, HandshakeTimeout) {
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

TEST_F(IngestTimeoutsTest, IdleTimeout) {
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

TEST_F(IngestTimeoutsTest, FrameTimeout) {
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

TEST_F(IngestTimeoutsTest, EachFrameHasItsOwnTime) {
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

TEST_F(IngestTimeoutsTest, ASlowReaderIsNotReadFromAndThenRefused) {
  Start(SlowReaders(CalmOptions()));
  TestClient& slow = Greeted();
  TestClient& other = Greeted();
  h().shard().hits = {LargeBatch()};
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

TEST_F(IngestTimeoutsTest, AReaderThatCatchesUpIsReadFromAgain) {
  Start(SlowReaders(CalmOptions()));
  TestClient& client = Greeted();
  h().shard().hits = {LargeBatch()};
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
TEST_F(IngestTimeoutsTest, AReaderThatStopsBelowTheLimitIsRefusedToo) {
  Start(SlowReaders(CalmOptions()));
  TestClient& client = Greeted();
  h().shard().hits = {LargeBatch()};
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

TEST_F(IngestTimeoutsTest, ASendBacklogCloseIsASlowReader) {
  HarnessOptions options = SlowReaders(CalmOptions());
  options.network.network.send_limit_bytes = 100'000;
  options.ingest.send_pause_bytes = size_t{1} << 20;
  Start(options);
  TestClient& client = Greeted();
  h().shard().hits = {LargeBatch(), LargeBatch()};
  client.Send(RecallBytes(1, F32Recall(kVector)));
  h().Settle();
  EXPECT_EQ(h().refused(RefusalReason::kSlowReader), 1u);
  EXPECT_EQ(h().core().open_connections(), 0u);
}

}  // namespace
}  // namespace engram
