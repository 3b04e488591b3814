#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "src/core/file_lease.h"
#include "src/core/refusal_reason.h"
#include "tests/dataplane/fake_shard.h"
#include "tests/dataplane/ingest_harness.h"
#include "tests/dataplane/wire.h"

// What the tests of an ingress core share: clients that have said hello, and what they are to see.

namespace engram {

inline constexpr std::array<float, 3> kVector{1, 2, 3};

inline uint16_t CodeOf(RefusalReason reason) { return static_cast<uint16_t>(reason); }
inline WireRecord RecordOf(uint64_t sequence) {
  return F32Record("id-" + std::to_string(sequence), kVector, "p" + std::to_string(sequence));
}
// An observe frame of `count` sound records from `sequence` on.
inline WireBytes Observations(uint64_t session, uint64_t sequence, size_t count = 1) {
  std::vector<WireRecord> records;
  for (size_t i = 0; i < count; ++i) records.push_back(RecordOf(sequence + i));
  return ObserveBytes(session, sequence, records);
}
inline WireBytes Ping(uint64_t sequence = 0) {
  return MakeFrame(kWirePing, {.sequence = sequence});
}
inline WireBytes CloseFrame() { return MakeFrame(kWireClose, {}); }
inline WireBytes LargeObservation(uint64_t session, size_t payload_bytes) {
  return ObserveBytes(
      session, 1,
      std::vector<WireRecord>{F32Record("large", kVector, std::string(payload_bytes, 'x'))});
}

class IngestCoreTest : public testing::Test {
 protected:
  void Start(const HarnessOptions& options = CalmOptions()) {
    harness_ = std::make_unique<IngestHarness>(options);
    Started();
  }
  // What a suite's shards are to answer.
  virtual void Started() {}
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
    EXPECT_TRUE(harness_->Finish()) << "a slot, a merge or a connection is left";
    EXPECT_EQ(harness_->slab().free_slots(), harness_->slab().total_slots());
    EXPECT_EQ(harness_->core().open_connections(), 0u);
    EXPECT_EQ(harness_->counted(IngestCounter::kConnectionsOpened),
              harness_->counted(IngestCounter::kConnectionsClosed));
  }

  FileLease lease_;  // of those harnesses that have one
  std::unique_ptr<IngestHarness> harness_;
  std::deque<TestClient> clients_;
};

}  // namespace engram
