#include "src/control/memory_codec.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>

#include "src/core/check.h"

namespace engram {

namespace {

constexpr int64_t kNanosPerSecond = 1'000'000'000;

struct CategoryFloor {
  v1::ConfidenceCategory category;
  float from;
};
constexpr std::array<CategoryFloor, 5> kCategories = {{{v1::CONFIDENCE_CATEGORY_CERTAIN, 1.0F},
                                                       {v1::CONFIDENCE_CATEGORY_HIGH, 0.9F},
                                                       {v1::CONFIDENCE_CATEGORY_MEDIUM, 0.5F},
                                                       {v1::CONFIDENCE_CATEGORY_LOW, 0.1F},
                                                       {v1::CONFIDENCE_CATEGORY_NONE, 0.0F}}};

bool IsUtf8(std::string_view text) { return Utf8Prefix(text) == text.size(); }

// As short as it can be read back.
std::string NumberText(float number) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), number).ptr;
  return {text.data(), end};
}

void AddEpisode(const v1::Episode& episode, v1::Memory* memory) {
  memory->set_content(episode.what());
  memory->set_memory_type(v1::MEMORY_TYPE_EPISODIC);
  memory->set_decay_rate(episode.decay_rate());
  auto& metadata = *memory->mutable_metadata();
  const auto add = [&metadata](const char* name, const std::string& value) {
    if (!value.empty()) metadata[name] = value;
  };
  add("where_location", episode.where_location());
  std::string who;
  for (const std::string& person : episode.who()) {
    if (!who.empty()) who += ", ";
    who += person;
  }
  add("who", who);
  add("why", episode.why());
  add("how", episode.how());
  if (episode.emotional_valence() != 0) {
    add("emotional_valence", NumberText(episode.emotional_valence()));
  }
  if (episode.importance() != 0) add("importance", NumberText(episode.importance()));
  if (episode.consolidation_state() != v1::CONSOLIDATION_STATE_UNSPECIFIED) {
    add("consolidation_state", v1::ConsolidationState_Name(episode.consolidation_state()));
  }
  if (episode.has_last_replay()) *memory->mutable_last_access() = episode.last_replay();
  const std::string& reasoning = episode.encoding_confidence().reasoning();
  if (!reasoning.empty()) memory->mutable_confidence()->set_reasoning(reasoning);
}

void AddOpaque(std::string_view payload, v1::Memory* memory) {
  if (IsUtf8(payload)) {
    memory->set_content(std::string(payload));
  } else {
    memory->set_payload(std::string(payload));
  }
}

// False where the payload is not what its kind says.
bool AddPayload(const HitView& hit, v1::Memory* memory) {
  switch (hit.header.payload_kind) {
    case PayloadKind::kEpisode: {
      v1::Episode episode;
      if (!episode.ParseFromArray(hit.payload.data(), static_cast<int>(hit.payload.size()))) {
        return false;
      }
      AddEpisode(episode, memory);
      return true;
    }
    case PayloadKind::kMemory:
      if (!memory->ParseFromArray(hit.payload.data(), static_cast<int>(hit.payload.size()))) {
        return false;
      }
      // Native clients may have written what answers alone say.
      memory->clear_embedding();
      memory->clear_id_bytes();
      memory->clear_content_omitted();
      return true;
    case PayloadKind::kOpaque:
      break;
  }
  AddOpaque(hit.payload, memory);
  return true;
}

}  // namespace

size_t Utf8Prefix(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const auto byte = static_cast<uint8_t>(text[i]);
    if (byte < 0x80) {
      ++i;
      continue;
    }
    size_t follow = 0;
    uint32_t least = 0;
    if (byte >> 5 == 0x6) {
      follow = 1;
      least = 0x80;
    } else if (byte >> 4 == 0xE) {
      follow = 2;
      least = 0x800;
    } else if (byte >> 3 == 0x1E) {
      follow = 3;
      least = 0x10000;
    } else {
      return i;
    }
    if (follow >= text.size() - i) return i;
    uint32_t point = byte & (0x3Fu >> follow);
    for (size_t f = 1; f <= follow; ++f) {
      const auto next = static_cast<uint8_t>(text[i + f]);
      if (next >> 6 != 0x2) return i;
      point = point << 6 | (next & 0x3Fu);
    }
    if (point < least || point > 0x10FFFF || (point >= 0xD800 && point <= 0xDFFF)) return i;
    i += follow + 1;
  }
  return i;
}

google::protobuf::Timestamp ToTimestamp(int64_t unix_ns) {
  int64_t seconds = unix_ns / kNanosPerSecond;
  int64_t nanos = unix_ns % kNanosPerSecond;
  if (nanos < 0) {
    --seconds;
    nanos += kNanosPerSecond;
  }
  google::protobuf::Timestamp time;
  time.set_seconds(seconds);
  time.set_nanos(static_cast<int32_t>(nanos));
  return time;
}

std::optional<int64_t> ToUnixNs(const google::protobuf::Timestamp& time) {
  if (time.nanos() < 0 || time.nanos() >= kNanosPerSecond) return std::nullopt;
  // One second beyond either end would not fit with any nanos.
  constexpr int64_t kMost = INT64_MAX / kNanosPerSecond;
  if (time.seconds() >= kMost || time.seconds() <= -kMost) return std::nullopt;
  return time.seconds() * kNanosPerSecond + time.nanos();
}

v1::ConfidenceCategory CategoryOf(float confidence) {
  for (const CategoryFloor& floor : kCategories) {
    if (confidence >= floor.from) return floor.category;
  }
  return v1::CONFIDENCE_CATEGORY_NONE;
}

void SetConfidence(float value, v1::Confidence* confidence) {
  confidence->set_value(value);
  confidence->set_category(CategoryOf(value));
}

float ValueOf(const v1::Confidence& confidence) {
  if (confidence.value() != 0) return confidence.value();
  for (const CategoryFloor& floor : kCategories) {
    if (floor.category == confidence.category()) return floor.from;
  }
  return 0;
}

float SimilarityOf(Metric metric, float score) {
  return metric == Metric::kL2 ? 1 / (1 + score) : std::min(score, 1.0F);
}

std::string PayloadOf(const v1::Episode& episode) {
  v1::Episode kept;
  kept.set_what(episode.what());
  if (episode.has_encoding_confidence()) {
    *kept.mutable_encoding_confidence() = episode.encoding_confidence();
  }
  kept.set_where_location(episode.where_location());
  *kept.mutable_who() = episode.who();
  kept.set_why(episode.why());
  kept.set_how(episode.how());
  kept.set_decay_rate(episode.decay_rate());
  kept.set_emotional_valence(episode.emotional_valence());
  kept.set_importance(episode.importance());
  kept.set_consolidation_state(episode.consolidation_state());
  if (episode.has_last_replay()) *kept.mutable_last_replay() = episode.last_replay();
  return kept.SerializeAsString();
}

std::string PayloadOf(const v1::Memory& memory) {
  v1::Memory kept;
  kept.set_activation(memory.activation());
  if (memory.has_confidence()) *kept.mutable_confidence() = memory.confidence();
  if (memory.has_last_access()) *kept.mutable_last_access() = memory.last_access();
  if (memory.has_created_at()) *kept.mutable_created_at() = memory.created_at();
  kept.set_decay_rate(memory.decay_rate());
  kept.set_content(memory.content());
  *kept.mutable_metadata() = memory.metadata();
  *kept.mutable_tags() = memory.tags();
  kept.set_memory_type(memory.memory_type());
  kept.set_payload(memory.payload());
  return kept.SerializeAsString();
}

std::optional<HitView> HitReader::Next() {
  if (left_.empty()) return std::nullopt;
  HitView hit;
  CHECK(left_.size() >= sizeof(hit.header), "an answer is whole hits");
  std::memcpy(&hit.header, left_.data(), sizeof(hit.header));
  const size_t vector_bytes = size_t{hit.header.vector_dimension} * sizeof(float);
  CHECK(hit.header.hit_bytes <= left_.size() && hit.header.hit_bytes >= UsedHitBytes(hit.header),
        "a hit holds what its header says");
  hit.vector = left_.data() + sizeof(hit.header);
  const char* text = reinterpret_cast<const char*>(hit.vector + vector_bytes);
  hit.id = {text, hit.header.id_bytes};
  text += hit.header.id_bytes;
  hit.space = {text, hit.header.space_bytes};
  hit.payload = {text + hit.header.space_bytes, hit.header.payload_bytes};
  left_ = left_.subspan(hit.header.hit_bytes);
  return hit;
}

void ToMemory(const HitView& hit, v1::Memory* memory) {
  memory->Clear();
  if (!AddPayload(hit, memory)) {
    memory->Clear();
    memory->set_payload(std::string(hit.payload));
  }
  if (IsUtf8(hit.id)) {
    memory->set_id(std::string(hit.id));
  } else {
    memory->set_id_bytes(std::string(hit.id));
  }
  memory->set_memory_space_id(std::string(hit.space));
  memory->set_activation(0);
  SetConfidence(hit.header.confidence, memory->mutable_confidence());
  *memory->mutable_created_at() = ToTimestamp(hit.header.when_ns);
  if ((hit.header.flags & kHitPayloadOmitted) != 0) memory->set_content_omitted(true);
  if (hit.header.vector_dimension > 0) {
    memory->mutable_embedding()->Resize(hit.header.vector_dimension, 0);
    std::memcpy(memory->mutable_embedding()->mutable_data(), hit.vector,
                size_t{hit.header.vector_dimension} * sizeof(float));
  }
}

}  // namespace engram
