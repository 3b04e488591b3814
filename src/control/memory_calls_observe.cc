// What is stored: Engram's episodes and memories to questions (see memory_calls.h).

#include "src/control/memory_calls.h"

#include <unistd.h>

#include <array>
#include <cstdint>
#include <utility>

#include "src/control/memory_codec.h"
#include "src/control/memory_filter.h"
#include "src/core/check.h"

namespace engram {

namespace {

// 128 random bits: ids that were drawn do not meet.
std::string DrawId() {
  std::array<uint8_t, 16> bytes{};
  CHECK(getentropy(bytes.data(), bytes.size()) == 0, "the kernel gives random numbers");
  static constexpr std::string_view kDigits = "0123456789abcdef";
  std::string id;
  for (const uint8_t byte : bytes) {
    id += kDigits[byte >> 4];
    id += kDigits[byte & 15];
  }
  return id;
}

// What is kept as it came and handed out again.
Asked CheckKept(const v1::Episode& episode) {
  if (auto checked =
          CheckTime(episode.has_last_replay(), episode.last_replay(), 0, "episode.last_replay");
      !checked) {
    return std::unexpected(checked.error());
  }
  for (const auto& [value, field] :
       {std::pair(episode.decay_rate(), "episode.decay_rate"),
        std::pair(episode.emotional_valence(), "episode.emotional_valence"),
        std::pair(episode.importance(), "episode.importance")}) {
    if (auto checked = CheckFinite(value, field); !checked) return checked;
  }
  if (v1::ConsolidationState_IsValid(episode.consolidation_state())) return {};
  return Invalid("episode.consolidation_state: " + std::to_string(episode.consolidation_state()) +
                 "; expected a ConsolidationState, 0 to 4");
}

Asked CheckKept(const v1::Memory& memory) {
  if (auto checked =
          CheckTime(memory.has_last_access(), memory.last_access(), 0, "memory.last_access");
      !checked) {
    return std::unexpected(checked.error());
  }
  for (const auto& [value, field] : {std::pair(memory.decay_rate(), "memory.decay_rate"),
                                     std::pair(memory.activation(), "memory.activation")}) {
    if (auto checked = CheckFinite(value, field); !checked) return checked;
  }
  if (v1::MemoryType_IsValid(memory.memory_type())) return {};
  return Invalid("memory.memory_type: " + std::to_string(memory.memory_type()) +
                 "; expected a MemoryType, 0 to 4");
}

// What the fields of an item are called where a fault is told.
struct ItemFields {
  std::string_view item;
  std::string_view id;
  std::string_view embedding;
  std::string_view packed;
};
constexpr ItemFields kEpisodeFields{"episode", "episode.id", "episode.embedding",
                                    "episode.packed_embedding"};
constexpr ItemFields kMemoryFields{"memory", "memory.id", "memory.embedding",
                                   "memory.packed_embedding"};

// What episodes and memories have in common.
template <typename Item>
Asked AskStore(const Item& item, const ItemFields& fields, CallText* text,
               GatewayQuestion* question) {
  if (item.id().empty()) {
    text->id = DrawId();
  } else {
    text->id = item.id();
  }
  if (auto checked = CheckId(text->id, fields.id); !checked) return checked;
  const auto vector = CheckVector(item.embedding(), item.has_packed_embedding(),
                                  item.packed_embedding(), fields.embedding, fields.packed);
  if (!vector) return std::unexpected(vector.error());
  if (auto checked = CheckKept(item); !checked) return checked;
  text->payload = PayloadOf(item);
  if (text->payload.size() > kMaxPayloadBytes) {
    return Invalid(std::string(fields.item) + ": " + std::to_string(text->payload.size()) +
                   " bytes besides id and embedding; expected up to 65536");
  }
  question->attributes = text->attributes;
  question->kind = CallKind::kObserve;
  question->op = ObservationOp::kUpsert;
  question->vector = *vector;
  question->id = text->id;
  question->payload = text->payload;
  return {};
}

Asked AskMemory(const v1::Memory& memory, int64_t now_unix_ns,
                std::span<const std::string> filter_keys, CallText* text,
                GatewayQuestion* question) {
  const auto when =
      CheckTime(memory.has_created_at(), memory.created_at(), now_unix_ns, "memory.created_at");
  if (!when) return std::unexpected(when.error());
  const auto confidence = CheckConfidence(memory.has_confidence(), memory.confidence(),
                                          kDefaultConfidence, "memory.confidence");
  if (!confidence) return std::unexpected(confidence.error());
  question->when_ns = *when;
  question->confidence = *confidence;
  question->payload_kind = PayloadKind::kMemory;
  if (auto attributes = AttributesOf(memory, filter_keys, &text->attributes); !attributes) {
    return attributes;
  }
  return AskStore(memory, kMemoryFields, text, question);
}

}  // namespace

Asked AskEpisode(const v1::Episode& episode, int64_t now_unix_ns, CallText* text,
                 GatewayQuestion* question) {
  const auto when = CheckTime(episode.has_when(), episode.when(), now_unix_ns, "episode.when");
  if (!when) return std::unexpected(when.error());
  const auto confidence =
      CheckConfidence(episode.has_encoding_confidence(), episode.encoding_confidence(),
                      kDefaultConfidence, "episode.encoding_confidence");
  if (!confidence) return std::unexpected(confidence.error());
  question->when_ns = *when;
  question->confidence = *confidence;
  question->payload_kind = PayloadKind::kEpisode;
  if (auto attributes = AttributesOf(episode, &text->attributes); !attributes) return attributes;
  return AskStore(episode, kEpisodeFields, text, question);
}

Asked AskRemember(const v1::RememberRequest& request, int64_t now_unix_ns,
                  std::span<const std::string> filter_keys, CallText* text,
                  GatewayQuestion* question) {
  switch (request.memory_type_case()) {
    case v1::RememberRequest::kEpisode:
      return AskEpisode(request.episode(), now_unix_ns, text, question);
    case v1::RememberRequest::kMemory:
      return AskMemory(request.memory(), now_unix_ns, filter_keys, text, question);
    case v1::RememberRequest::MEMORY_TYPE_NOT_SET:
      break;
  }
  return Invalid("memory_type: not set; expected memory or episode");
}

void TellRemember(const GatewayQuestion& question, const GatewayAnswer& answer,
                  v1::RememberResponse* response) {
  response->set_memory_id(std::string(question.id));
  SetConfidence(1, response->mutable_storage_confidence());
  response->mutable_storage_confidence()->set_reasoning("stored, and found by recalls");
  response->set_initial_state(v1::CONSOLIDATION_STATE_RECENT);
  response->set_existed(answer.existed);
  *response->mutable_committed_at() = ToTimestamp(UnixNsOf(answer.stamp));
}

}  // namespace engram
