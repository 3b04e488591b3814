#include "src/control/json_answer.h"

#include <string>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

namespace engram {
namespace {

using nlohmann::json;

template <typename Tell>
json Told(const Tell& tell) {
  std::string text = "before";
  tell(&text);
  EXPECT_TRUE(text.starts_with("before{"));
  return json::parse(text.substr(6));
}

TEST(JsonAnswerTest, Opened) {
  const json told = Told([](std::string* text) {
    TellJsonOpened("00ff", {.kind = StreamEvent::Kind::kOpened, .sequence = 7}, 1ULL << 40, text);
  });
  EXPECT_EQ(told, json::parse(R"({"type":"init_ack","session_id":"00ff","initial_sequence":7,
      "capabilities":{"max_observations_per_second":0,"queue_capacity":4294967295,
      "supports_backpressure":true,"supports_snapshot_isolation":true,"protocol_version":1}})"));
}

TEST(JsonAnswerTest, AcksAndRefusals) {
  StreamEvent event{.kind = StreamEvent::Kind::kAcked, .sequence = 3};
  event.id = "x\"";
  EXPECT_EQ(Told([&](std::string* text) { TellJsonAck("s", event, 0, text); }),
            json::parse(R"({"type":"ack","session_id":"s","sequence_number":3,"status":"accepted",
                "memory_id":"x\"","committed_at":"1970-01-01T00:00:00Z"})"));
  event.kind = StreamEvent::Kind::kRefused;
  event.reason = RefusalReason::kWrongDimension;
  event.text = "episode.embedding: why";
  event.expected = 4;
  EXPECT_EQ(Told([&](std::string* text) { TellJsonAck("s", event, 0, text); }),
            json::parse(R"({"type":"ack","session_id":"s","sequence_number":3,"status":"rejected",
                "memory_id":"x\""})"));
  EXPECT_EQ(Told([&](std::string* text) { TellJsonRefusal("s", event, text); }),
            json::parse(R"({"type":"status","session_id":"s","state":"error",
                "message":"episode.embedding: why","queue_depth":0,"queue_capacity":0,"pressure":0,
                "code":"wrong_dimension","sequence_number":3,"expected_sequence":4})"));
  event.reason = RefusalReason::kMemoryFull;
  event.retry_after_ms = 20;
  const json busy = Told([&](std::string* text) { TellJsonRefusal("s", event, text); });
  EXPECT_EQ(busy["state"], "overloaded");
  EXPECT_EQ(busy["retry_after_ms"], 20);
  event.reason = RefusalReason::kPaused;
  EXPECT_EQ(Told([&](std::string* text) { TellJsonRefusal("s", event, text); })["state"], "paused");
}

TEST(JsonAnswerTest, Flow) {
  StreamEvent event{.kind = StreamEvent::Kind::kFlow};
  event.flow.state = static_cast<decltype(event.flow.state)>(3);
  event.flow.queue_depth = 1;
  event.flow.queue_capacity = 2;
  event.flow.pressure = 0.5F;
  event.flow.retry_after_ms = 9;
  EXPECT_EQ(Told([&](std::string* text) { TellJsonFlow("s", event, text); }),
            json::parse(R"({"type":"status","session_id":"s","state":"backpressure","message":"",
                "queue_depth":1,"queue_capacity":2,"pressure":0.5,"retry_after_ms":9})"));
}

TEST(JsonAnswerTest, ErrorsEndsAndHeartbeats) {
  EXPECT_EQ(Told([](std::string* text) { TellJsonError({.code = "c", .message = "m"}, text); }),
            json::parse(R"({"type":"error","message":"m","code":"c"})"));
  EXPECT_EQ(Told([](std::string* text) {
              TellJsonError({.code = "c",
                             .message = "m",
                             .session = "s",
                             .request_id = "\"r\"",
                             .retry_after_ms = 5},
                            text);
            }),
            json::parse(R"({"type":"error","message":"m","code":"c","session_id":"s",
                "request_id":"r","retry_after_ms":5})"));
  EXPECT_EQ(Told([](std::string* text) { TellJsonClosed("s", 8, text); }),
            json::parse(R"({"type":"closed","session_id":"s","final_sequence":8})"));
  EXPECT_EQ(Told([](std::string* text) { TellJsonHeartbeat("s", 1'500'000'000, text); }),
            json::parse(
                R"({"type":"heartbeat","session_id":"s","timestamp":"1970-01-01T00:00:01.500Z"})"));
}

TEST(JsonAnswerTest, Results) {
  google::protobuf::RepeatedPtrField<v1::Memory> memories;
  v1::Memory* memory = memories.Add();
  memory->set_id("a");
  memory->set_content("c");
  memory->set_activation(0.5F);
  memory->mutable_confidence()->set_value(0.25F);
  memory->mutable_created_at()->set_seconds(1);
  memory->mutable_last_access()->set_seconds(2);
  memory->set_memory_type(v1::MEMORY_TYPE_SEMANTIC);
  (*memory->mutable_metadata())["k"] = "v";
  memory->add_tags("t");
  memory->add_embedding(1.5F);
  memory->set_memory_space_id("space");
  v1::Memory* odd = memories.Add();
  odd->set_id_bytes("\xff");
  odd->set_payload("\xfe");
  odd->set_content_omitted(true);
  v1::RecallMetadata metadata;
  metadata.set_total_activated(3);
  metadata.set_above_threshold(2);
  metadata.set_avg_activation(0.5F);
  metadata.set_recall_time_ms(4);
  EXPECT_EQ(Told([&](std::string* text) {
              TellJsonResults(
                  {.request_id = "7", .more_results = true, .snapshot = 12, .metadata = &metadata},
                  memories, text);
            }),
            json::parse(R"({"type":"recall_result","request_id":7,"results":[
                {"id":"a","memory_space_id":"space","content":"c","activation":0.5,
                 "confidence":0.25,"created_at":"1970-01-01T00:00:01Z",
                 "last_access":"1970-01-01T00:00:02Z","memory_type":"semantic",
                 "metadata":{"k":"v"},"tags":["t"],"embedding":[1.5]},
                {"id_base64":"/w==","content":"","activation":0,"confidence":0,
                 "created_at":"1970-01-01T00:00:00Z","payload_base64":"/g==",
                 "content_omitted":true}],
                "more_results":true,"snapshot_sequence":12,
                "metadata":{"total_activated":3,"above_threshold":2,"avg_activation":0.5,
                            "recall_time_ms":4}})"));
  EXPECT_EQ(Told([](std::string* text) { TellJsonResults({.is_message = false}, {}, text); }),
            json::parse(R"({"results":[],"more_results":false,"snapshot_sequence":0})"));
}

}  // namespace
}  // namespace engram
