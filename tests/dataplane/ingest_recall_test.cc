// Recalls at an ingress core, of spaces of one partition.

#include <gtest/gtest.h>

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

using IngestRecallTest = IngestCoreTest;

TEST_F(IngestRecallTest, ResultsAreForwardedBatchByBatch) {
  TestClient& client = Greeted();
  const auto hit = [](const char* id) { return WireHit{.id = id}; };
  h().shard().hits = {HitBatch({hit("a"), hit("b")}), HitBatch({hit("c")}), {"", 0}};
  client.Send(RecallBytes(42, F32Recall(kVector), true));
  const auto results = client.Await(kWireResult);
  ASSERT_EQ(results.size(), 3u);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(results[i].sequence, 42u);
    EXPECT_EQ(results[i].flags, i < 2 ? 1u : 0u);
    EXPECT_EQ(results[i].session, client.session());
    EXPECT_EQ(WireNumber(results[i].body, 0, 2), h().shard().hits[i].count);
    EXPECT_EQ(WireNumber(results[i].body, 2, 1), 3u);  // the fake shard's metric
    EXPECT_EQ(WireNumber(results[i].body, 8, 8), 0u);  // no snapshot was asked for
    EXPECT_EQ(WireText(std::span(results[i].body).subspan(16)), h().shard().hits[i].body);
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

TEST_F(IngestRecallTest, AFrameHasNoMoreHitsThanRecallBatch) {
  TestClient& client = Greeted();
  std::vector<WireHit> hits;
  for (int i = 0; i < 25; ++i) hits.push_back({.id = std::to_string(i), .score = 1.0F * i});
  h().shard().hits = {HitBatch(hits)};
  client.Send(RecallBytes(1, F32Recall(kVector)));
  const auto frames = client.Await(kWireResult);
  ASSERT_EQ(frames.size(), 3u);
  std::vector<WireHit> got;
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(WireNumber(frames[i].body, 0, 2), i < 2 ? 10u : 5u);
    EXPECT_EQ(frames[i].flags, i < 2 ? 1u : 0u);
    for (const WireHit& hit : ParseHits(std::span(frames[i].body).subspan(16))) got.push_back(hit);
  }
  EXPECT_EQ(got, hits);
}

TEST_F(IngestRecallTest, ALongRecallAsksForItsFirstOnesAndSendsThemAtOnce) {
  TestClient& client = Greeted();
  h().shard().hits = {HitBatch({{.id = "first"}}), HitBatch({{.id = "other"}})};
  h().shard().hits[0].end = BatchEnd::kFirst;
  h().shard().batches_let_go = 1;
  WireRecall recall = F32Recall(kVector);
  recall.k = 5'000;
  client.Send(RecallBytes(1, recall));
  const auto first = client.Await(kWireResult);
  ASSERT_EQ(first.size(), 1u);
  EXPECT_EQ(first[0].flags, 1u);
  h().shard().batches_let_go = SIZE_MAX;
  const auto all = client.Await(kWireResult);
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[1].flags, 0u);
  EXPECT_EQ(h().shard().recalls().at(0).first, 10u);
  EXPECT_TRUE(h().shard().recalls()[0].IsLong());
}

TEST_F(IngestRecallTest, ABoundGoesToTheShard) {
  TestClient& client = Greeted({.features = 4});
  WireRecall recall = F32Recall(kVector);
  recall.bound = 0.5F;
  client.Send(RecallBytes(1, recall, 16));
  client.Send(RecallBytes(2, recall));
  EXPECT_EQ(client.Await(kWireResult).size(), 2u);
  ASSERT_EQ(h().shard().recalls().size(), 2u);
  EXPECT_TRUE(h().shard().recalls()[0].has_bound);
  EXPECT_EQ(h().shard().recalls()[0].bound, 0.5F);
  EXPECT_FALSE(h().shard().recalls()[1].has_bound);
}

TEST_F(IngestRecallTest, ARefusedRecallIsAnsweredWithItsId) {
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

TEST_F(IngestRecallTest, AFilterArrivesBehindTheVector) {
  TestClient& client = Greeted({.features = 2});
  WireRecall recall = F32Recall(kVector);
  FilterWriter writer;
  const std::array<std::string_view, 2> sources{"docs", "mail"};
  ASSERT_TRUE(writer.Require("source", sources));
  recall.filter = writer.Bytes();
  client.Send(RecallBytes(1, recall, 8));
  client.Send(RecallBytes(2, recall, 0));
  recall.filter.clear();
  client.Send(RecallBytes(3, recall, 8));
  EXPECT_EQ(client.Await(kWireResult).size(), 3u);
  EXPECT_EQ(h().shard().filters(), (std::vector<std::string>{writer.Bytes(), "", ""}));
}

TEST_F(IngestRecallTest, ABadFilterIsRefusedAndNothingElse) {
  TestClient& client = Greeted({.features = 2});
  WireRecall recall = F32Recall(kVector);
  recall.filter = "too short";
  client.Send(RecallBytes(9, recall, 8));
  const WireNak nak = OnlyNak(client);
  EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kBadFilter));
  EXPECT_EQ(nak.refused_type, kWireRecall);
  EXPECT_FALSE(nak.closing);
  EXPECT_EQ(h().shard().taken_of(RequestKind::kRecall), 0u);
  // A key that the space does not keep is the shard's to refuse.
  client.Forget();
  h().shard().recall_refusal = RefusalReason::kUnknownFilterKey;
  FilterWriter writer;
  const std::array<std::string_view, 1> any{"x"};
  ASSERT_TRUE(writer.Require("nobody-keeps-this", any));
  recall.filter = writer.Bytes();
  client.Send(RecallBytes(10, recall, 8));
  EXPECT_EQ(OnlyNak(client).reason, CodeOf(RefusalReason::kUnknownFilterKey));
  EXPECT_NE(OnlyNak(client).text.find("filter_keys"), std::string::npos);
  ExpectServes(client);
}

TEST_F(IngestRecallTest, TooManyRecallsPauseReading) {
  HarnessOptions options = CalmOptions();
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
TEST_F(IngestRecallTest, WhatComesInOnePieceIsBoundedToo) {
  size_t refused = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    HarnessOptions options = CalmOptions();
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

}  // namespace
}  // namespace engram
