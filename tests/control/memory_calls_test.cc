#include "src/control/memory_calls.h"

#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "src/control/memory_codec.h"
#include "src/health_watch.h"

// Every message of a wrong request is also in tests/integration/grpc_test.py, over the wire. Here:
// what questions look like, and what answers become.

namespace engram {
namespace {

void AddHit(std::string_view id, float score, float confidence, uint64_t stamp,
            GatewayAnswer* answer) {
  HitHeader header{};
  header.score = score;
  header.confidence = confidence;
  header.stamp = stamp;
  header.id_bytes = static_cast<uint16_t>(id.size());
  header.hit_bytes = static_cast<uint32_t>(PadTo8(sizeof(header) + id.size()));
  const size_t at = answer->hits.size();
  answer->hits.resize(at + header.hit_bytes);
  std::memcpy(&answer->hits[at], &header, sizeof(header));
  std::memcpy(&answer->hits[at + sizeof(header)], id.data(), id.size());
  ++answer->hit_count;
}

std::vector<std::string> IdsOf(const v1::RecallResponse& response) {
  std::vector<std::string> ids;
  for (const v1::Memory& memory : response.memories()) ids.push_back(memory.id());
  return ids;
}

// In a space without filter keys.
Asked AskRemember(const v1::RememberRequest& request, int64_t now_unix_ns, CallText* text,
                  GatewayQuestion* question) {
  return AskRemember(request, now_unix_ns, {}, text, question);
}
Asked AskRecall(const v1::RecallRequest& request, RecallLimits* limits, GatewayQuestion* question) {
  static CallText text;
  return AskRecall(request, {}, &text, limits, question);
}

TEST(MemoryCallsTest, TheSpaceOfACall) {
  EXPECT_EQ(SpaceOfCall("", "")->view(), "default");
  EXPECT_EQ(SpaceOfCall("a", "")->view(), "a");
  EXPECT_EQ(SpaceOfCall("", "b")->view(), "b");
  EXPECT_EQ(SpaceOfCall("c", "c")->view(), "c");
  EXPECT_EQ(SpaceOfCall("c", "d").error().message,
            "x-memory-space: \"d\"; the request's memory_space_id is \"c\"");
  EXPECT_FALSE(SpaceOfCall("A", ""));
  EXPECT_TRUE(SpaceOfCall(std::string(64, 'x'), ""));
  EXPECT_EQ(SpaceOfCall(std::string(65, 'x'), "").error().message,
            "memory_space_id: \"" + std::string(64, 'x') + "...\"; expected 1 to 64 of [a-z0-9_-]");
}

// A header's value is any bytes, a status message is text.
TEST(MemoryCallsTest, AnErrorRepeatsOnlyText) {
  EXPECT_EQ(SpaceOfCall("", "a\xff\xc3").error().message,
            "x-memory-space: \"a\\xff\\xc3\"; expected 1 to 64 of [a-z0-9_-]");
  // 63 bytes and then half of a character.
  EXPECT_EQ(SpaceOfCall(std::string(63, 'x') + "ü", "").error().message,
            "memory_space_id: \"" + std::string(63, 'x') + "...\"; expected 1 to 64 of [a-z0-9_-]");
  EXPECT_EQ(SpaceOfCall(std::string(200, '\x80'), "").error().message.size(),
            std::string("memory_space_id: \"...\"; expected 1 to 64 of [a-z0-9_-]").size());
}

TEST(MemoryCallsTest, AnEpisodesQuestion) {
  v1::RememberRequest request;
  request.mutable_episode()->add_embedding(1);
  request.mutable_episode()->add_embedding(2);
  request.mutable_episode()->set_what("text");
  CallText text;
  GatewayQuestion question;
  ASSERT_TRUE(AskRemember(request, 77, &text, &question));
  EXPECT_EQ(question.kind, CallKind::kObserve);
  EXPECT_EQ(question.op, ObservationOp::kUpsert);
  EXPECT_EQ(question.id.size(), 32u);
  EXPECT_EQ(question.when_ns, 77);
  EXPECT_EQ(question.confidence, 0.7F);
  EXPECT_EQ(question.vector.dimension, 2u);
  EXPECT_EQ(question.payload_kind, PayloadKind::kEpisode);
  EXPECT_EQ(question.payload, PayloadOf(request.episode()));
  const std::string first(question.id);
  ASSERT_TRUE(AskRemember(request, 77, &text, &question));
  EXPECT_NE(question.id, first);
}

TEST(MemoryCallsTest, ThePayloadMayBe64KiBAndNoMore) {
  v1::RememberRequest request;
  request.mutable_memory()->add_embedding(1);
  CallText text;
  GatewayQuestion question;
  // Tag and length of the content take 4 bytes.
  request.mutable_memory()->set_content(std::string(kMaxPayloadBytes - 4, 'x'));
  EXPECT_TRUE(AskRemember(request, 0, &text, &question));
  EXPECT_EQ(question.payload.size(), kMaxPayloadBytes);
  request.mutable_memory()->mutable_content()->push_back('x');
  EXPECT_FALSE(AskRemember(request, 0, &text, &question));
}

TEST(MemoryCallsTest, ARecallsThresholdsAreAppliedToWhatWasFound) {
  v1::RecallRequest request;
  request.mutable_cue()->mutable_embedding()->add_vector(1);
  request.mutable_cue()->mutable_embedding()->set_similarity_threshold(0.5F);
  request.mutable_cue()->mutable_threshold()->set_value(0.3F);
  request.set_include_metadata(true);
  RecallLimits limits;
  GatewayQuestion question;
  ASSERT_TRUE(AskRecall(request, &limits, &question));
  EXPECT_EQ(question.k, 10u);
  GatewayAnswer answer;
  answer.metric = Metric::kCosine;
  answer.snapshot = 5;
  AddHit("good", 0.8F, 0.5F, 1, &answer);
  AddHit("unsure", 0.7F, 0.4F, 1, &answer);  // 0.28
  AddHit("just", 0.5F, 0.6F, 1, &answer);    // 0.3, in float a little more
  AddHit("far", 0.4F, 1, 1, &answer);
  v1::RecallResponse response;
  TellRecall(question, answer, limits, 3'500'000, &response);
  EXPECT_EQ(IdsOf(response), (std::vector<std::string>{"good", "just"}));
  EXPECT_FLOAT_EQ(response.memories(0).confidence().value(), 0.4F);
  EXPECT_FLOAT_EQ(response.memories(0).activation(), 0.8F);
  EXPECT_FLOAT_EQ(response.recall_confidence().value(), 0.4F);
  EXPECT_EQ(response.metadata().total_activated(), 4);
  EXPECT_EQ(response.metadata().above_threshold(), 2);
  EXPECT_FLOAT_EQ(response.metadata().avg_activation(), 0.65F);
  EXPECT_EQ(response.metadata().recall_time_ms(), 3);
  EXPECT_EQ(response.snapshot_sequence(), 5u);
}

TEST(MemoryCallsTest, NegativeSimilarityIsNoActivation) {
  v1::RecallRequest request;
  request.mutable_cue()->mutable_embedding()->add_vector(1);
  RecallLimits limits;
  GatewayQuestion question;
  ASSERT_TRUE(AskRecall(request, &limits, &question));
  GatewayAnswer answer;
  answer.metric = Metric::kCosine;
  AddHit("opposite", -0.5F, 0.5F, 1, &answer);
  v1::RecallResponse response;
  TellRecall(question, answer, limits, 0, &response);
  ASSERT_EQ(response.memories_size(), 1) << "no threshold, nothing is left out";
  EXPECT_EQ(response.memories(0).activation(), 0);
  EXPECT_EQ(response.memories(0).confidence().value(), 0);
  EXPECT_FALSE(response.has_metadata());
}

// Vectors of huge numbers: their inner product may be infinity minus infinity.
TEST(MemoryCallsTest, AScoreThatIsNoNumberIsNoActivation) {
  v1::RecallRequest request;
  request.mutable_cue()->mutable_embedding()->add_vector(1);
  request.set_include_metadata(true);
  RecallLimits limits;
  GatewayQuestion question;
  ASSERT_TRUE(AskRecall(request, &limits, &question));
  GatewayAnswer answer;
  answer.metric = Metric::kInnerProduct;
  AddHit("infinite", std::numeric_limits<float>::infinity(), 0.5F, 1, &answer);
  AddHit("nan", std::numeric_limits<float>::quiet_NaN(), 0.5F, 1, &answer);
  AddHit("least", -std::numeric_limits<float>::infinity(), 0.5F, 1, &answer);
  v1::RecallResponse response;
  TellRecall(question, answer, limits, 0, &response);
  ASSERT_EQ(response.memories_size(), 3);
  EXPECT_EQ(response.memories(0).activation(), 1);
  EXPECT_EQ(response.memories(1).activation(), 0);
  EXPECT_EQ(response.memories(1).confidence().value(), 0);
  EXPECT_EQ(response.memories(2).activation(), 0);
  EXPECT_FLOAT_EQ(response.metadata().avg_activation(), 1.0F / 3);
  request.mutable_cue()->mutable_embedding()->set_similarity_threshold(-100);
  ASSERT_TRUE(AskRecall(request, &limits, &question));
  response.Clear();
  TellRecall(question, answer, limits, 0, &response);
  EXPECT_EQ(IdsOf(response), std::vector<std::string>{"infinite"});
}

// What is only kept must be something that a client can read again.
TEST(MemoryCallsTest, ForgetRemovesHidesAndRestores) {
  v1::ForgetRequest request;
  request.set_memory_id("m");
  const auto error = [&] {
    GatewayQuestion question;
    const Asked asked = AskForget(request, &question);
    return asked ? "" : asked.error().message;
  };
  const auto op = [&] {
    GatewayQuestion question;
    EXPECT_TRUE(AskForget(request, &question));
    EXPECT_EQ(question.kind, CallKind::kObserve);
    EXPECT_EQ(question.id, "m");
    return question.op;
  };
  for (const v1::ForgetMode mode :
       {v1::FORGET_MODE_UNSPECIFIED, v1::FORGET_MODE_DELETE, v1::FORGET_MODE_OVERWRITE}) {
    request.set_mode(mode);
    request.set_restore(false);
    EXPECT_EQ(op(), ObservationOp::kDelete);
    request.set_restore(true);
    EXPECT_EQ(error(), "restore: true with mode " + v1::ForgetMode_Name(mode) +
                           "; expected mode FORGET_MODE_SUPPRESS with it");
  }
  request.set_mode(v1::FORGET_MODE_SUPPRESS);
  EXPECT_EQ(op(), ObservationOp::kRestore);
  request.set_restore(false);
  EXPECT_EQ(op(), ObservationOp::kSuppress);
  request.set_mode(static_cast<v1::ForgetMode>(9));
  EXPECT_EQ(error(),
            "mode: 9; expected FORGET_MODE_SUPPRESS, FORGET_MODE_DELETE or "
            "FORGET_MODE_OVERWRITE");
}

TEST(MemoryCallsTest, OnlyWhatWasHiddenIsReversible) {
  for (const ObservationOp op :
       {ObservationOp::kDelete, ObservationOp::kSuppress, ObservationOp::kRestore}) {
    for (const bool existed : {false, true}) {
      GatewayQuestion question;
      question.op = op;
      GatewayAnswer answer;
      answer.existed = existed;
      v1::ForgetResponse response;
      TellForget(question, answer, &response);
      EXPECT_EQ(response.memories_affected(), existed ? 1 : 0);
      EXPECT_EQ(response.forget_confidence().value(), 1);
      EXPECT_EQ(response.reversible(), existed && op == ObservationOp::kSuppress);
    }
  }
}

TEST(MemoryCallsTest, WhatIsKeptIsCheckedToo) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  const auto refusal = [](auto change) {
    v1::RememberRequest request;
    change(&request);
    (request.has_memory() ? request.mutable_memory()->mutable_embedding()
                          : request.mutable_episode()->mutable_embedding())
        ->Add(1);
    CallText text;
    GatewayQuestion question;
    const Asked asked = AskRemember(request, 0, &text, &question);
    return asked ? std::string("taken") : asked.error().message;
  };
  using Request = v1::RememberRequest*;
  EXPECT_EQ(refusal([](Request r) { r->mutable_episode(); }), "taken");
  EXPECT_EQ(refusal([](Request r) { r->mutable_memory(); }), "taken");
  EXPECT_EQ(refusal([&](Request r) { r->mutable_episode()->set_decay_rate(nan); }),
            "episode.decay_rate: nan; expected a finite number");
  EXPECT_EQ(refusal([&](Request r) { r->mutable_episode()->set_emotional_valence(-infinity); }),
            "episode.emotional_valence: -inf; expected a finite number");
  EXPECT_EQ(refusal([&](Request r) { r->mutable_episode()->set_importance(infinity); }),
            "episode.importance: inf; expected a finite number");
  EXPECT_EQ(refusal([&](Request r) { r->mutable_memory()->set_decay_rate(nan); }),
            "memory.decay_rate: nan; expected a finite number");
  EXPECT_EQ(refusal([&](Request r) { r->mutable_memory()->set_activation(nan); }),
            "memory.activation: nan; expected a finite number");
  EXPECT_EQ(refusal([](Request r) {
              r->mutable_episode()->set_consolidation_state(static_cast<v1::ConsolidationState>(5));
            }),
            "episode.consolidation_state: 5; expected a ConsolidationState, 0 to 4");
  EXPECT_EQ(refusal([](Request r) {
              r->mutable_memory()->set_memory_type(static_cast<v1::MemoryType>(-1));
            }),
            "memory.memory_type: -1; expected a MemoryType, 0 to 4");
  EXPECT_EQ(refusal([](Request r) {
              r->mutable_memory()->mutable_confidence()->set_category(
                  static_cast<v1::ConfidenceCategory>(6));
            }),
            "memory.confidence.category: 6; expected a ConfidenceCategory, 0 to 5");
  EXPECT_EQ(
      refusal([](Request r) { r->mutable_episode()->mutable_last_replay()->set_nanos(-1); }),
      "episode.last_replay: 0 s and -1 ns; expected a time of the years 1678 to 2261, with 0 to "
      "999999999 ns");
  EXPECT_EQ(
      refusal(
          [](Request r) { r->mutable_memory()->mutable_last_access()->set_seconds(INT64_MIN); }),
      "memory.last_access: -9223372036854775808 s and 0 ns; expected a time of the years 1678 to "
      "2261, with 0 to 999999999 ns");
}

// Each name is looked for among all counters, on the gateway's core.
TEST(MemoryCallsTest, MetricsAreAskedForByAThousandNamesAtMost) {
  v1::IntrospectRequest request;
  for (int i = 0; i < 1'000; ++i) request.add_metrics("x");
  GatewayQuestion question;
  EXPECT_TRUE(AskIntrospect(request, &question));
  request.add_metrics("x");
  EXPECT_EQ(AskIntrospect(request, &question).error().message,
            "metrics: 1001 names; expected up to 1000");
}

// While a space grows an id may be in two partitions.
TEST(MemoryCallsTest, OfTwoHitsWithOneIdTheLaterStampCounts) {
  v1::RecallRequest request;
  for (const char* id : {"b", "nobody", "a"}) request.add_ids(id);
  RecallLimits limits;
  GatewayQuestion question;
  ASSERT_TRUE(AskRecall(request, &limits, &question));
  EXPECT_EQ(question.kind, CallKind::kGet);
  GatewayAnswer answer;
  AddHit("a", 0, 0.25F, 7, &answer);
  AddHit("b", 0, 0.5F, 7, &answer);
  AddHit("a", 0, 0.75F, 9, &answer);
  AddHit("a", 0, 1, 8, &answer);
  v1::RecallResponse response;
  TellRecall(question, answer, limits, 0, &response);
  EXPECT_EQ(IdsOf(response), (std::vector<std::string>{"b", "a"}));
  EXPECT_EQ(response.memories(1).confidence().value(), 0.75F);
}

TEST(MemoryCallsTest, AScrollsCursorLeadsToTheNextPage) {
  v1::RecallRequest request;
  request.mutable_scroll();
  RecallLimits limits;
  for (const uint64_t cursor : {uint64_t{0}, uint64_t{1}, UINT64_MAX}) {
    GatewayQuestion question;
    request.mutable_scroll()->clear_cursor();
    ASSERT_TRUE(AskRecall(request, &limits, &question));
    EXPECT_EQ(question.limit, 100);
    GatewayAnswer answer;
    answer.scroll_ended = false;
    answer.next_partition = 255;
    answer.next_cursor = cursor;
    v1::RecallResponse response;
    TellRecall(question, answer, limits, 0, &response);
    request.mutable_scroll()->set_cursor(response.next_cursor());
    ASSERT_TRUE(AskRecall(request, &limits, &question));
    EXPECT_EQ(question.partition, 255);
    EXPECT_EQ(question.cursor, cursor);
  }
  for (const char* bad :
       {".", "1", "1.", ".1", "1.1 ", "-1.1", "10000.1", "1.1g", "1.10000000000000000", "1.1.1"}) {
    GatewayQuestion question;
    request.mutable_scroll()->set_cursor(bad);
    EXPECT_FALSE(AskRecall(request, &limits, &question)) << bad;
  }
}

TEST(MemoryCallsTest, IntrospectAddsUpTheSpacesPartitions) {
  v1::IntrospectRequest request;
  GatewayQuestion question;
  ASSERT_TRUE(AskIntrospect(request, &question));
  question.space = SpaceName("mine");
  GatewayAnswer answer;
  const auto add = [&answer](uint16_t shard, std::string_view name, uint64_t linked,
                             uint64_t unlinked) {
    SpaceRecord record{};
    record.shard = shard;
    record.dimension = 3;
    record.name_bytes = static_cast<uint8_t>(name.size());
    record.observations = linked + unlinked;
    record.linked = linked;
    record.unlinked = unlinked;
    record.record_bytes = static_cast<uint32_t>(PadTo8(sizeof(record) + name.size()));
    const size_t at = answer.records.size();
    answer.records.resize(at + record.record_bytes);
    std::memcpy(&answer.records[at], &record, sizeof(record));
    std::memcpy(&answer.records[at + sizeof(record)], name.data(), name.size());
  };
  add(0, "mine", 75, 25);
  add(0, "other", 0, 300);
  add(1, "mine", 0, 7);
  Counter counter;
  counter.Add(11);
  const CounterCatalogue counters = {{"shard0", "recalls", &counter},
                                     {"shard1", "recalls", &counter},
                                     {"shard2", "recalls", &counter}};
  request.set_include_health(true);
  request.set_include_statistics(true);
  v1::IntrospectResponse response;
  TellIntrospect(request, question, answer, counters, &response);
  EXPECT_EQ(response.statistics().total_memories(), 107);
  EXPECT_EQ(response.metrics().at("space.observations"), 107);
  EXPECT_EQ(response.metrics().at("space.partitions"), 2);
  EXPECT_EQ(response.metrics().at("shard1.recalls"), 11);
  EXPECT_EQ(response.health().components().size(), 4u);
  EXPECT_FLOAT_EQ(response.health().components().at("shard0").performance(), 75.0F / 400);
  EXPECT_EQ(response.health().components().at("shard1").performance(), 1) << "scanned, no graph";
  EXPECT_EQ(response.health().components().at("shard2").performance(), 1);
  EXPECT_EQ(response.active_processes_size(), 1);

  response.Clear();
  request.add_metrics("shard1.recalls");
  TellIntrospect(request, question, answer, counters, &response);
  EXPECT_EQ(response.metrics().size(), 1u);
  EXPECT_EQ(response.metrics_snapshot_json(), "{\"shard1.recalls\":11}");
}

v1::HealthStatus HealthOf(const CounterCatalogue& counters) {
  v1::IntrospectRequest request;
  request.set_include_health(true);
  v1::IntrospectResponse response;
  TellIntrospect(request, GatewayQuestion(), GatewayAnswer(), counters, &response);
  return response.health();
}

TEST(MemoryCallsTest, HealthTellsWhatTheDaemonHasFoundWrong) {
  Counter without_room;
  Counter quarantined;
  Counter failing;
  const CounterCatalogue counters = {{"shard0", kLogWithoutRoom, &without_room},
                                     {"shard1", kLogWithoutRoom, &quarantined},
                                     {"shard1", "records_quarantined", &quarantined},
                                     {"control", kCheckpointsFailing, &failing}};
  v1::HealthStatus health = HealthOf(counters);
  EXPECT_TRUE(health.healthy());
  EXPECT_EQ(health.summary(), "all shards answer");
  EXPECT_TRUE(health.components().at("control").operational());

  without_room.Set(1);
  failing.Set(3);
  health = HealthOf(counters);
  EXPECT_FALSE(health.healthy());
  const v1::ComponentHealth& shard = health.components().at("shard0");
  EXPECT_FALSE(shard.operational());
  EXPECT_NE(shard.status_message().find("disk_full"), std::string::npos);
  EXPECT_TRUE(health.components().at("shard1").operational());
  EXPECT_NE(health.summary().find("control: 3 checkpoints have failed"), std::string::npos)
      << health.summary();

  without_room.Set(0);
  failing.Set(0);
  quarantined.Set(2);
  health = HealthOf(counters);
  EXPECT_TRUE(health.components().at("shard0").operational());
  EXPECT_NE(health.components().at("shard1").status_message().find("; 2 records are in quarantine"),
            std::string::npos)
      << "both are told";
}

TEST(MemoryCallsTest, ARefusalSaysWhatIsWrongWithTheVector) {
  const std::vector<float> vector = {1, std::numeric_limits<float>::quiet_NaN(), 3};
  GatewayQuestion question;
  question.space = SpaceName("x");
  question.vector = VectorRef(vector);
  GatewayAnswer answer;
  answer.reason = RefusalReason::kWrongDimension;
  answer.space_dimension = 768;
  EXPECT_EQ(RefusalMessage(question, answer, "episode.embedding"),
            "episode.embedding: 3 values; the space \"x\" has dimension 768");
  answer.reason = RefusalReason::kNotFinite;
  EXPECT_EQ(RefusalMessage(question, answer, "v"), "v[1]: nan; expected finite numbers");
  answer.reason = RefusalReason::kBacklogFull;
  EXPECT_EQ(RefusalMessage(question, answer, "v"),
            "backlog_full: the space has too many unlinked observations");
}

}  // namespace
}  // namespace engram
