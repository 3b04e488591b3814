// Scrolls and checks of an ingress core: which partition is asked, what is said of the next page,
// and that nothing is left behind.

#include <gtest/gtest.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "tests/dataplane/fake_log_disk.h"
#include "tests/dataplane/fake_shard.h"
#include "tests/dataplane/ingest_harness.h"
#include "tests/dataplane/wire.h"

namespace engram {
namespace {

class IngestScrollTest : public testing::Test {
 protected:
  void Start(uint16_t shards, uint64_t hits = 3) {
    HarnessOptions options;
    options.shards = shards;
    options.partitions = shards;
    options.ingest.max_merges = 4;
    options.records = logs_.Access();
    harness_ = std::make_unique<IngestHarness>(options);
    for (uint16_t s = 0; s < shards; ++s) {
      FakeShard::Batch batch{.body = {}, .count = static_cast<uint16_t>(hits)};
      for (uint64_t i = 0; i < hits; ++i) {
        const auto hit =
            logs_.Put(s, 1, static_cast<uint32_t>(4'096 + i * 1'024),
                      std::to_string(s) + "." + std::to_string(i), "payload", 1'000 + i);
        batch.body.append(reinterpret_cast<const char*>(hit.data()), hit.size());
      }
      h().shard(s).hits = {batch};
    }
    client_ = std::make_unique<TestClient>(&h());
    client_->Send(HelloBytes({}));
    h().Run(20);
    ASSERT_EQ(client_->Of(kWireHelloAck).size(), 1u);
    client_->Forget();
  }
  IngestHarness& h() { return *harness_; }
  TestClient& client() { return *client_; }
  // Reads end as they come.
  void Settle() {
    for (int i = 0; i < 50; ++i) {
      h().Run(5);
      logs_.EndAll();
    }
  }
  WireFrame Scrolled() {
    const auto frames = client().Of(kWireScrolled);
    EXPECT_EQ(frames.size(), 1u);
    return frames.empty() ? WireFrame() : frames[0];
  }
  void ExpectNaked(uint16_t reason) {
    const auto naks = client().Of(kWireNak);
    ASSERT_EQ(naks.size(), 1u);
    EXPECT_EQ(WireNumber(naks[0].body, 0, 2), reason);
    EXPECT_EQ(WireNumber(naks[0].body, 2, 1), kWireScroll);
    client().Forget();
  }
  bool PinsAreLeft() { return logs_.pins.Passed(logs_.pins.Close()); }

  FakeLogs logs_;
  std::unique_ptr<IngestHarness> harness_;
  std::unique_ptr<TestClient> client_;
};

TEST_F(IngestScrollTest, APageHasItsRecordsAndSaysWhereTheNextBegins) {
  Start(2);
  h().shard(1).next_cursor = 77;
  client().Send(ScrollBytes(9, 5, 1, 512, 1));
  Settle();
  std::vector<WireHit> hits;
  for (const WireFrame& frame : client().Of(kWireResult)) {
    EXPECT_EQ(frame.sequence, 9u);
    EXPECT_EQ(frame.flags, 1u) << "more follows: scrolled";
    const auto some = ParseHits(std::span(frame.body).subspan(16));
    hits.insert(hits.end(), some.begin(), some.end());
  }
  ASSERT_EQ(hits.size(), 3u);
  EXPECT_EQ(hits[0].id, "1.0");
  EXPECT_EQ(hits[0].payload, "payload");
  const WireFrame scrolled = Scrolled();
  EXPECT_EQ(scrolled.sequence, 9u);
  EXPECT_EQ(WireNumber(scrolled.body, 0, 8), 77u);
  EXPECT_EQ(WireNumber(scrolled.body, 8, 2), 1u);
  EXPECT_EQ(WireNumber(scrolled.body, 10, 2), 2u);
  EXPECT_EQ(WireNumber(scrolled.body, 12, 1), 0u);
  ASSERT_EQ(h().shard(1).scrolls().size(), 1u);
  EXPECT_TRUE(h().shard(0).scrolls().empty());
  EXPECT_EQ(h().shard(1).scrolls()[0].cursor, 5u);
  EXPECT_EQ(h().shard(1).scrolls()[0].limit, 15) << "payloads that fit one answer";
  EXPECT_TRUE(PinsAreLeft());
  EXPECT_EQ(h().core().merges_in_flight(), 0u);
  EXPECT_TRUE(h().Finish());
}

TEST_F(IngestScrollTest, AfterAPartitionComesTheNextAndAfterTheLastTheEnd) {
  Start(2);
  client().Send(ScrollBytes(1, 0, 0, 512));
  Settle();
  WireFrame scrolled = Scrolled();
  EXPECT_EQ(WireNumber(scrolled.body, 0, 8), 0u);
  EXPECT_EQ(WireNumber(scrolled.body, 8, 2), 1u);
  EXPECT_EQ(WireNumber(scrolled.body, 12, 1), 0u);
  EXPECT_EQ(h().shard(0).scrolls()[0].limit, 512);
  client().Forget();
  client().Send(ScrollBytes(2, 0, 1, 512));
  Settle();
  EXPECT_EQ(WireNumber(Scrolled().body, 12, 1), 1u);
  EXPECT_TRUE(h().Finish());
}

TEST_F(IngestScrollTest, AShardThatDoesNotKnowTheSpaceYetIsAnEmptyPartition) {
  Start(2);
  h().shard(0).recall_refusal = RefusalReason::kUnknownSpace;
  client().Send(ScrollBytes(1, 0, 0, 10));
  Settle();
  EXPECT_TRUE(client().Of(kWireNak).empty());
  EXPECT_EQ(WireNumber(Scrolled().body, 8, 2), 1u);
  client().Forget();
  h().shard(0).recall_refusal = RefusalReason::kMemoryFull;
  client().Send(ScrollBytes(2, 0, 0, 10));
  Settle();
  ExpectNaked(static_cast<uint16_t>(RefusalReason::kMemoryFull));
  EXPECT_TRUE(h().Finish());
}

TEST_F(IngestScrollTest, APartitionThatIsNotThereAndNoRoomAreRefused) {
  Start(1);
  client().Send(ScrollBytes(1, 0, 1, 10));
  Settle();
  ExpectNaked(static_cast<uint16_t>(RefusalReason::kBadRecall));
  client().Send(ScrollBytes(1, 0, 0, 0));
  Settle();
  ExpectNaked(static_cast<uint16_t>(RefusalReason::kBadRecall));
  h().shard().SetHeld(RequestKind::kScroll, true);
  for (uint64_t i = 0; i < 5; ++i) client().Send(ScrollBytes(i, 0, 0, 10, 1));
  Settle();
  ExpectNaked(static_cast<uint16_t>(RefusalReason::kMergesFull));
  h().shard().SetHeld(RequestKind::kScroll, false);
  Settle();
  EXPECT_EQ(client().Of(kWireScrolled).size(), 4u);
  EXPECT_TRUE(PinsAreLeft());
  EXPECT_TRUE(h().Finish());
}

TEST_F(IngestScrollTest, ACheckIsHandedToItsShardAndBack) {
  Start(2);
  WireBytes body(136, std::byte{0xF0});
  SetWireNumber(body, 0, 2, 1);
  client().Send(MakeFrame(kWireCheck, {.sequence = 3}, body));
  Settle();
  const auto frames = client().Of(kWireChecked);
  ASSERT_EQ(frames.size(), 1u);
  EXPECT_EQ(frames[0].sequence, 3u);
  EXPECT_EQ(WireNumber(frames[0].body, 0, 1), 3u);
  EXPECT_EQ(frames[0].body[8 + 127], std::byte{0x0F});
  const std::string text(reinterpret_cast<const char*>(frames[0].body.data()) + 136,
                         frames[0].body.size() - 136);
  EXPECT_EQ(text, "of default");
  EXPECT_EQ(WireNumber(frames[0].body, 4, 2), text.size());
  EXPECT_EQ(h().shard(0).taken_of(RequestKind::kCheck), 0u);
  client().Forget();
  SetWireNumber(body, 0, 2, 2);
  client().Send(MakeFrame(kWireCheck, {.sequence = 4}, body));
  Settle();
  const auto naks = client().Of(kWireNak);
  ASSERT_EQ(naks.size(), 1u) << "a shard that is not there";
  EXPECT_EQ(ParseNak(naks[0]).reason, static_cast<uint16_t>(RefusalReason::kBadRecall));
  for (const char* what : {"a recall's k", "a scroll's limit", "partition", "a check's shard"}) {
    EXPECT_NE(ParseNak(naks[0]).text.find(what), std::string::npos) << what;
  }
  EXPECT_TRUE(h().Finish());
}

}  // namespace
}  // namespace engram
