#include "src/control/json_answer.h"

#include <array>

#include "src/control/json_text.h"
#include "src/control/memory_codec.h"

namespace engram {

namespace {

// How a stream stands after a refusal for this reason.
std::string_view StateOf(RefusalReason reason) {
  if (reason == RefusalReason::kPaused) return "paused";
  return HasEffect(reason, RefusalEffect::kWaits) ? "overloaded" : "error";
}

// As v1::StreamStatus::State numbers them.
constexpr std::array<std::string_view, 7> kStates = {
    "unspecified", "active", "paused", "backpressure", "overloaded", "error", "closed"};

// As v1::MemoryType numbers them.
constexpr std::array<std::string_view, 5> kTypes = {"", "episodic", "semantic", "procedural",
                                                    "working"};

void TellMemory(const v1::Memory& memory, JsonWriter* json) {
  json->OpenObject();
  if (memory.id_bytes().empty()) {
    json->Text("id", memory.id());
  } else {
    json->Base64("id_base64", memory.id_bytes());
  }
  json->TextIfSet("memory_space_id", memory.memory_space_id());
  json->Text("content", memory.content());
  json->Number("activation", memory.activation());
  json->Number("confidence", memory.confidence().value());
  if (const auto created = ToUnixNs(memory.created_at())) json->Time("created_at", *created);
  if (memory.has_last_access()) {
    if (const auto access = ToUnixNs(memory.last_access())) json->Time("last_access", *access);
  }
  if (memory.decay_rate() != 0) json->Number("decay_rate", memory.decay_rate());
  if (memory.memory_type() > 0 && static_cast<size_t>(memory.memory_type()) < kTypes.size()) {
    json->Text("memory_type", kTypes[memory.memory_type()]);
  }
  if (!memory.metadata().empty()) {
    json->OpenObject("metadata");
    for (const auto& [key, value] : memory.metadata()) json->Text(key, value);
    json->CloseObject();
  }
  if (memory.tags_size() > 0) {
    json->OpenList("tags");
    for (const std::string& tag : memory.tags()) json->Text(tag);
    json->CloseList();
  }
  if (!memory.payload().empty()) json->Base64("payload_base64", memory.payload());
  if (memory.content_omitted()) json->Flag("content_omitted", true);
  if (memory.embedding_size() > 0) {
    json->Numbers("embedding",
                  {memory.embedding().data(), static_cast<size_t>(memory.embedding_size())});
  }
  json->CloseObject();
}

}  // namespace

void TellJsonError(const JsonError& error, std::string* text) {
  JsonWriter json(text);
  json.OpenObject();
  json.Text("type", "error");
  json.Text("message", error.message);
  json.Text("code", error.code);
  json.TextIfSet("session_id", error.session);
  if (!error.request_id.empty()) json.Raw("request_id", error.request_id);
  if (error.retry_after_ms > 0) json.Integer("retry_after_ms", error.retry_after_ms);
  json.CloseObject();
}

void TellJsonOpened(std::string_view session, const StreamEvent& event, uint64_t room,
                    std::string* text) {
  JsonWriter json(text);
  json.OpenObject();
  json.Text("type", "init_ack");
  json.Text("session_id", session);
  json.Integer("initial_sequence", event.sequence);
  json.OpenObject("capabilities");
  // Not measured yet.
  json.Integer("max_observations_per_second", 0);
  json.Integer("queue_capacity", std::min<uint64_t>(room, UINT32_MAX));
  json.Flag("supports_backpressure", true);
  json.Flag("supports_snapshot_isolation", true);
  json.Integer("protocol_version", kStreamProtocolVersion);
  json.CloseObject();
  json.CloseObject();
}

void TellJsonAck(std::string_view session, const StreamEvent& event, int64_t now_unix_ns,
                 std::string* text) {
  const bool is_refused = event.kind == StreamEvent::Kind::kRefused;
  JsonWriter json(text);
  json.OpenObject();
  json.Text("type", "ack");
  json.Text("session_id", session);
  json.Integer("sequence_number", event.sequence);
  json.Text("status", is_refused ? "rejected" : "accepted");
  json.Text("memory_id", event.id);
  if (!is_refused) json.Time("committed_at", now_unix_ns);
  json.CloseObject();
}

void TellJsonRefusal(std::string_view session, const StreamEvent& event, std::string* text) {
  JsonWriter json(text);
  json.OpenObject();
  json.Text("type", "status");
  json.Text("session_id", session);
  json.Text("state", StateOf(event.reason));
  json.Text("message", event.text);
  json.Integer("queue_depth", 0);
  json.Integer("queue_capacity", 0);
  json.Number("pressure", 0);
  if (event.retry_after_ms > 0) json.Integer("retry_after_ms", event.retry_after_ms);
  json.Text("code", DescribeRefusal(event.reason).name);
  json.Integer("sequence_number", event.sequence);
  json.Integer("expected_sequence", event.expected);
  json.CloseObject();
}

void TellJsonFlow(std::string_view session, const StreamEvent& event, std::string* text) {
  const FlowStateBody& flow = event.flow;
  JsonWriter json(text);
  json.OpenObject();
  json.Text("type", "status");
  json.Text("session_id", session);
  const auto state = static_cast<size_t>(flow.state);
  json.Text("state", kStates[state < kStates.size() ? state : 0]);
  json.Text("message", "");
  json.Integer("queue_depth", flow.queue_depth);
  json.Integer("queue_capacity", flow.queue_capacity);
  json.Number("pressure", flow.pressure);
  if (flow.retry_after_ms > 0) json.Integer("retry_after_ms", flow.retry_after_ms);
  if (flow.preferred_rate != 0) json.Number("preferred_rate", flow.preferred_rate);
  json.CloseObject();
}

void TellJsonClosed(std::string_view session, Sequence last, std::string* text) {
  JsonWriter json(text);
  json.OpenObject();
  json.Text("type", "closed");
  json.Text("session_id", session);
  json.Integer("final_sequence", last);
  json.CloseObject();
}

void TellJsonHeartbeat(std::string_view session, int64_t now_unix_ns, std::string* text) {
  JsonWriter json(text);
  json.OpenObject();
  json.Text("type", "heartbeat");
  json.Text("session_id", session);
  json.Time("timestamp", now_unix_ns);
  json.CloseObject();
}

void TellJsonResults(const JsonResults& results,
                     const google::protobuf::RepeatedPtrField<v1::Memory>& memories,
                     std::string* text) {
  JsonWriter json(text);
  json.OpenObject();
  if (results.is_message) json.Text("type", "recall_result");
  if (!results.request_id.empty()) json.Raw("request_id", results.request_id);
  json.OpenList("results");
  for (const v1::Memory& memory : memories) TellMemory(memory, &json);
  json.CloseList();
  json.Flag("more_results", results.more_results);
  json.Integer("snapshot_sequence", results.snapshot);
  if (results.metadata != nullptr) {
    json.OpenObject("metadata");
    json.Integer("total_activated", static_cast<uint64_t>(results.metadata->total_activated()));
    json.Integer("above_threshold", static_cast<uint64_t>(results.metadata->above_threshold()));
    json.Number("avg_activation", results.metadata->avg_activation());
    json.Integer("recall_time_ms", static_cast<uint64_t>(results.metadata->recall_time_ms()));
    json.CloseObject();
  }
  json.CloseObject();
}

}  // namespace engram
