// An ingress core and recalls whose payload lies in logs: what is read, when, and what becomes of
// it where clients are slow or go away.

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "src/core/hash.h"
#include "tests/dataplane/fake_log_disk.h"
#include "tests/dataplane/fake_shard.h"
#include "tests/dataplane/ingest_harness.h"
#include "tests/dataplane/wire.h"

namespace engram {
namespace {

constexpr std::array<float, 2> kVector{1, 2};
constexpr uint16_t kWithPayload = 1;
constexpr uint16_t kWithVector = 2;

std::string PayloadAt(uint64_t place) { return "payload " + std::to_string(place); }

class IngestRecordsTest : public testing::Test {
 protected:
  // Each shard has `hits` of its own, whose scores alternate with those of the others.
  void Start(uint16_t shards = 1, uint64_t hits = 10, size_t filler = 0) {
    HarnessOptions options = CalmOptions();
    options.shards = shards;
    options.partitions = shards;
    options.ingest.send_pause_bytes = 64 * 1024;
    options.ingest.max_merges = 8;
    options.ingest.answer_timeout_ns = answer_timeout_ns_;
    options.records = logs_.Access();
    harness_ = std::make_unique<IngestHarness>(options);
    // Stamps are small numbers: all was taken just now.
    h().clock().StepWallNs(-h().clock().WallNs());
    filler_ = std::string(filler, '.');
    for (uint16_t s = 0; s < shards; ++s) {
      std::vector<FakeShard::Batch> batches;
      for (uint64_t i = 0; i < hits; ++i) {
        const uint64_t place = i * shards + s;
        if (i % 100 == 0) batches.push_back({.body = {}, .count = 0});
        const auto hit =
            logs_.Put(s, 1, static_cast<uint32_t>(4'096 + i * (1'024 + filler)),
                      std::to_string(place), PayloadAt(place) + filler_, 1'000 + place);
        batches.back().body.append(reinterpret_cast<const char*>(hit.data()), hit.size());
        ++batches.back().count;
      }
      h().shard(s).hits = batches;
    }
  }
  IngestHarness& h() { return *harness_; }
  TestClient& Greeted() {
    TestClient& client = clients_.emplace_back(&h());
    // Reads that are under way do not come to rest.
    client.Send(HelloBytes({}));
    h().Run(20);
    EXPECT_EQ(client.Of(kWireHelloAck).size(), 1u);
    client.Forget();
    return client;
  }
  static void Recall(TestClient& client, uint64_t id, uint32_t k = 10,
                     uint16_t flags = kWithPayload) {
    WireRecall recall = F32Recall(kVector);
    recall.k = k;
    client.Send(RecallBytes(id, recall, flags));
  }
  // As far as it has come: hits in order.
  static std::vector<WireHit> HitsOf(TestClient& client, uint64_t id, bool* done = nullptr) {
    std::vector<WireHit> hits;
    for (const WireFrame& frame : client.Of(kWireResult)) {
      if (frame.sequence != id) continue;
      const auto some = ParseHits(std::span(frame.body).subspan(16));
      hits.insert(hits.end(), some.begin(), some.end());
      if (done != nullptr) *done = (frame.flags & 1) == 0;
    }
    return hits;
  }
  void ExpectWhole(const std::vector<WireHit>& hits, size_t count) {
    ASSERT_EQ(hits.size(), count);
    for (size_t i = 0; i < count; ++i) {
      EXPECT_EQ(hits[i].id, std::to_string(i));
      EXPECT_EQ(hits[i].payload, PayloadAt(i) + filler_);
      EXPECT_EQ(hits[i].flags, 0);
    }
  }
  // Nobody is inside.
  bool PinsAreLeft() { return logs_.pins.Passed(logs_.pins.Close()); }
  uint64_t UnderWay() { return h().core().records()->under_way(); }

  int64_t answer_timeout_ns_ = 300 * kNanosPerSecond;
  FakeLogs logs_;
  std::unique_ptr<IngestHarness> harness_;
  std::deque<TestClient> clients_;
  std::string filler_;
};

TEST_F(IngestRecordsTest, ARecallReadsItsRecordsSideBySideAndAnswersInOneFrame) {
  Start();
  TestClient& client = Greeted();
  Recall(client, 7);
  h().Run(20);
  EXPECT_EQ(logs_.reads.size(), 10u) << "one read waits for another";
  EXPECT_TRUE(client.Of(kWireResult).empty());
  // The first one comes last.
  while (logs_.reads.size() > 1) logs_.End(logs_.reads.size() - 1);
  h().Run(20);
  EXPECT_TRUE(client.Of(kWireResult).empty()) << "out of order";
  EXPECT_FALSE(PinsAreLeft());
  logs_.EndAll();
  h().Run(20);
  ExpectWhole(HitsOf(client, 7), 10);
  EXPECT_EQ(client.Of(kWireResult).size(), 1u);
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
  EXPECT_EQ(UnderWay(), 0u);
  EXPECT_TRUE(PinsAreLeft());
  EXPECT_TRUE(h().Finish());
}

TEST_F(IngestRecordsTest, ManyHitsAreReadInWindowsAndGoOutInOrder) {
  Start(1, 1'000);
  TestClient& client = Greeted();
  Recall(client, 1, 1'000);
  SplitMix64 random(1);
  size_t most = 0;
  bool done = false;
  for (int i = 0; i < 100'000 && !done; ++i) {
    h().Step();
    most = std::max(most, logs_.reads.size());
    if (!logs_.reads.empty()) logs_.End(random.Below(logs_.reads.size()));
    HitsOf(client, 1, &done);
  }
  ExpectWhole(HitsOf(client, 1), 1'000);
  EXPECT_EQ(most, HitWindow::kHits);
  EXPECT_TRUE(PinsAreLeft());
  EXPECT_TRUE(h().Finish());
}

TEST_F(IngestRecordsTest, OnlyTheBestOfAllPartitionsAreRead) {
  Start(4);
  TestClient& client = Greeted();
  Recall(client, 1);
  h().Run(20);
  EXPECT_EQ(logs_.reads.size(), 10u);
  logs_.EndAll();
  h().Run(20);
  ExpectWhole(HitsOf(client, 1), 10);
  EXPECT_TRUE(PinsAreLeft());
  EXPECT_TRUE(h().Finish());
}

// Who asks for ids alone waits for nobody and pins nothing.
TEST_F(IngestRecordsTest, IdsAloneAreNotRead) {
  Start();
  const WireHit whole{.id = "whole"};
  h().shard().hits = {HitBatch({whole})};
  h().shard().SetHeld(RequestKind::kRecall, true);
  TestClient& client = Greeted();
  Recall(client, 1, 10, 0);
  h().Run(10);
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
  EXPECT_TRUE(PinsAreLeft());
  h().shard().SetHeld(RequestKind::kRecall, false);
  h().Run(10);
  EXPECT_EQ(HitsOf(client, 1).size(), 1u);
  EXPECT_TRUE(logs_.reads.empty());
}

// What the shard is about to name must stay until it was read.
TEST_F(IngestRecordsTest, ThePinsAreHeldFromBeforeTheShardIsAskedToTheLastRead) {
  for (const uint16_t flags : {kWithPayload, kWithVector}) {
    Start();
    TestClient& client = Greeted();
    h().shard().SetStalled(true);
    Recall(client, 1, 10, flags);
    h().Run(5);
    const ReadPins::Epoch closed = logs_.pins.Close();
    EXPECT_FALSE(logs_.pins.Passed(closed)) << "the shard was asked";
    h().shard().SetStalled(false);
    h().Run(5);
    EXPECT_FALSE(logs_.pins.Passed(closed)) << "records are read";
    EXPECT_EQ(logs_.reads.size(), 10u);
    logs_.EndAll();
    h().Run(5);
    EXPECT_TRUE(logs_.pins.Passed(closed));
    clients_.clear();
  }
}

TEST_F(IngestRecordsTest, ARefusedRecallLeavesThePins) {
  Start();
  TestClient& client = Greeted();
  h().shard().recall_refusal = RefusalReason::kMemoryFull;
  Recall(client, 1);
  h().Run(20);
  EXPECT_EQ(client.Of(kWireNak).size(), 1u);
  EXPECT_TRUE(PinsAreLeft());
  // And one that no merge is left for.
  h().shard().recall_refusal = RefusalReason::kNone;
  for (uint64_t id = 2; id < 12; ++id) Recall(client, id);
  h().Run(20);
  EXPECT_EQ(client.Of(kWireNak).size(), 3u);
  logs_.EndAll();
  h().Run(20);
  EXPECT_TRUE(PinsAreLeft());
  EXPECT_TRUE(h().Finish());
}

TEST_F(IngestRecordsTest, AConnectionThatGoesAwayLeavesNothingBehind) {
  Start(2);
  for (int when = 0; when < 12; ++when) {
    TestClient& client = Greeted();
    Recall(client, 1);
    h().Run(when);
    client.Abort();
    h().Run(20);
    EXPECT_EQ(h().core().merges_in_flight(), 0u);
    EXPECT_TRUE(PinsAreLeft());
    logs_.EndAll();
    h().Run(2);
    EXPECT_EQ(UnderWay(), 0u);
  }
  EXPECT_TRUE(h().Finish());
}

TEST_F(IngestRecordsTest, ADrainWaitsForWhatIsRead) {
  Start();
  TestClient& client = Greeted();
  Recall(client, 1);
  h().Run(20);
  h().core().BeginDrain();
  h().Run(20);
  EXPECT_FALSE(h().core().drained());
  EXPECT_TRUE(client.Of(kWireClose).empty());
  logs_.EndAll();
  h().Run(20);
  ExpectWhole(HitsOf(client, 1), 10);
  EXPECT_EQ(client.Of(kWireClose).size(), 1u);
  EXPECT_TRUE(h().Finish());
  EXPECT_TRUE(h().core().drained());
  EXPECT_TRUE(PinsAreLeft());
}

// A client that does not take what it asked for does not keep others from the memory for records.
TEST_F(IngestRecordsTest, ASlowReaderDoesNotHoldUpOthers) {
  Start(1, 400, 5'000);
  logs_.ends_at_once = true;
  TestClient& slow = Greeted();
  for (uint64_t id = 1; id <= 6; ++id) Recall(slow, id, 400);
  h().Run(200);
  EXPECT_EQ(UnderWay(), 0u) << "what nobody takes is given up";
  EXPECT_GT(h().core().merges_in_flight(), 0u);
  TestClient& other = Greeted();
  Recall(other, 1, 400);
  bool done = false;
  for (int i = 0; i < 1'000 && !done; ++i) {
    h().Step();
    HitsOf(other, 1, &done);
  }
  ExpectWhole(HitsOf(other, 1), 400);
  // And the slow one gets all that it asked for.
  for (uint64_t id = 1; id <= 6; ++id) {
    done = false;
    for (int i = 0; i < 2'000 && !done; ++i) {
      h().Step();
      HitsOf(slow, id, &done);
    }
    EXPECT_EQ(HitsOf(slow, id).size(), 400u);
  }
  EXPECT_TRUE(PinsAreLeft());
  EXPECT_TRUE(h().Finish());
}

// However steadily it reads: files cannot be removed as long as it does.
TEST_F(IngestRecordsTest, AnAnswerThatHoldsPinsHasItsTime) {
  answer_timeout_ns_ = 60 * kNanosPerSecond;
  for (const bool fast : {true, false}) {
    Start(1, 400, 2'500);
    logs_.ends_at_once = true;
    TestClient& client = Greeted();
    for (uint64_t id = 1; id <= 4; ++id) Recall(client, id, 400);
    h().Run(200);
    // 64 KiB a second or each 5 s, of some 4 MB.
    int64_t waited_ns = 0;
    const int64_t step_ns = fast ? kNanosPerSecond / 2 : 5 * kNanosPerSecond;
    while (h().core().merges_in_flight() > 0 && waited_ns < 600 * kNanosPerSecond) {
      h().Step(step_ns);
      h().Run(200);
      client.Receive();
      waited_ns += step_ns;
    }
    EXPECT_EQ(h().refused(RefusalReason::kSlowReader), fast ? 0u : 1u);
    EXPECT_LE(waited_ns, 70 * kNanosPerSecond);
    EXPECT_TRUE(PinsAreLeft());
    clients_.clear();
  }
}

TEST_F(IngestRecordsTest, DamageIsToldToTheClient) {
  Start();
  logs_.ends_at_once = true;
  auto& file = logs_.files["log-000/" + SegmentName(1)];
  file[4'096 + 3 * 1'024 + 66] ^= std::byte{0x11};
  TestClient& client = Greeted();
  Recall(client, 1);
  bool done = false;
  for (int i = 0; i < 10'000 && !done; ++i) {
    h().Step(kNanosPerMilli);
    HitsOf(client, 1, &done);
  }
  const auto hits = HitsOf(client, 1);
  ASSERT_EQ(hits.size(), 10u);
  for (size_t i = 0; i < 10; ++i) {
    EXPECT_EQ(hits[i].payload, i == 3 ? "" : PayloadAt(i));
    EXPECT_EQ(hits[i].flags, i == 3 ? kHitPayloadOmitted : 0);
  }
  EXPECT_EQ(h().core().records()->counter(RecordReaderCounter::kRecordsUnreadable).Read(), 1u);
  EXPECT_TRUE(PinsAreLeft());
}

// Recalls over a segment that was damaged long ago, as many as there is memory for.
TEST_F(IngestRecordsTest, OldDamageHoldsUpNobody) {
  Start(1, 1'000);
  logs_.ends_at_once = true;
  h().clock().StepWallNs(3'600 * kNanosPerSecond);
  const std::vector<FakeShard::Batch> sound = h().shard().hits;
  std::vector<FakeShard::Batch> damaged;
  for (uint32_t i = 0; i < 1'000; ++i) {
    const auto hit = logs_.Put(0, 2, 4'096 + i * 1'024, "d" + std::to_string(i), "payload", i);
    logs_.files["log-000/" + SegmentName(2)][4'096 + i * 1'024 + 66] ^= std::byte{0x11};
    if (i % 100 == 0) damaged.push_back({.body = {}, .count = 0});
    damaged.back().body.append(reinterpret_cast<const char*>(hit.data()), hit.size());
    ++damaged.back().count;
  }
  h().shard().hits = damaged;
  TestClient& over_damage = Greeted();
  TestClient& other = Greeted();
  for (uint64_t id = 1; id <= 7; ++id) Recall(over_damage, id, 1'000);
  h().Run(10);
  h().shard().hits = sound;
  const int64_t began_ns = h().clock().MonotonicNs();
  Recall(other, 1);
  bool done = false;
  for (int i = 0; i < 10'000 && !done; ++i) {
    h().Step(kNanosPerMilli);
    HitsOf(other, 1, &done);
  }
  ExpectWhole(HitsOf(other, 1), 10);
  EXPECT_LT(h().clock().MonotonicNs() - began_ns, 100 * kNanosPerMilli);
  for (uint64_t id = 1; id <= 7; ++id) {
    done = false;
    for (int i = 0; i < 10'000 && !done; ++i) {
      h().Step(kNanosPerMilli);
      HitsOf(over_damage, id, &done);
    }
    EXPECT_EQ(HitsOf(over_damage, id).size(), 1'000u);
  }
  EXPECT_LT(h().clock().MonotonicNs() - began_ns, 5 * kNanosPerSecond);
  EXPECT_TRUE(PinsAreLeft());
}

// Whatever happens in whatever order: nothing is left, and what is answered is right.
TEST_F(IngestRecordsTest, AnyProgramEndsWithNothingHeld) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    clients_.clear();
    Start(static_cast<uint16_t>(1 + seed % 3), 120, seed % 2 == 0 ? 3'000 : 0);
    SplitMix64 random(seed);
    std::vector<uint64_t> next;
    for (int step = 0; step < 600; ++step) {
      const uint64_t what = random.Below(20);
      if (what == 0 && clients_.size() < 8) {
        Greeted();
        next.push_back(1);
      } else if (what <= 3 && !clients_.empty()) {
        const size_t which = random.Below(clients_.size());
        const auto k = static_cast<uint32_t>(1 + random.Below(120));
        Recall(clients_[which], next[which]++, k);
      } else if (what == 4 && !clients_.empty() && random.Below(4) == 0) {
        clients_[random.Below(clients_.size())].Abort();
      } else if (what <= 10 && !logs_.reads.empty()) {
        const size_t which = random.Below(logs_.reads.size());
        logs_.End(which, random.Below(10) == 0 ? EIO : 0,
                  random.Below(10) == 0 ? random.Below(200) : SIZE_MAX);
      } else if (what == 11) {
        logs_.pins.Close();
      } else if (what == 12 && !clients_.empty()) {
        clients_[random.Below(clients_.size())].Receive();
      }
      h().Step();
    }
    for (int i = 0; i < 3'000; ++i) {
      logs_.EndAll();
      h().Step();
      for (TestClient& client : clients_) client.Receive();
    }
    for (TestClient& client : clients_) {
      EXPECT_TRUE(client.sound());
      for (const WireFrame& frame : client.Of(kWireResult)) {
        for (const WireHit& hit : ParseHits(std::span(frame.body).subspan(16))) {
          ASSERT_EQ(hit.payload, PayloadAt(std::stoull(hit.id)) + filler_) << "seed " << seed;
        }
      }
    }
    logs_.ends_at_once = true;
    EXPECT_TRUE(h().Finish()) << "seed " << seed;
    logs_.ends_at_once = false;
    EXPECT_EQ(UnderWay(), 0u) << "seed " << seed;
    EXPECT_TRUE(PinsAreLeft()) << "seed " << seed;
    harness_.reset();
  }
}

}  // namespace
}  // namespace engram
