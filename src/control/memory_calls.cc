#include "src/control/memory_calls.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <span>
#include <unordered_map>
#include <utility>

#include "src/control/memory_codec.h"
#include "src/control/memory_filter.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/vector_dtype.h"
#include "src/health_watch.h"

namespace engram {

namespace {

constexpr uint32_t kDefaultResults = 10;
constexpr uint32_t kDefaultPage = 100;
constexpr int kMaxIdsOfCall = 100;
constexpr int kMaxMetricsOfCall = 1'000;

std::string NumberText(double number) {
  if (std::isnan(number)) return "nan";
  std::array<char, 32> text{};
  const auto end =
      std::to_chars(text.data(), text.data() + text.size(), static_cast<float>(number)).ptr;
  return {text.data(), end};
}

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

Asked CheckId(std::string_view id, const std::string& field) {
  if (!id.empty() && id.size() <= kMaxIdBytes) return {};
  if (id.empty()) return Invalid(field + ": empty; expected 1 to 256 bytes");
  return Invalid(field + ": " + std::to_string(id.size()) + " bytes; expected 1 to 256");
}

Asked CheckVectorSize(size_t size, const std::string& field) {
  if (size >= 1 && size <= kMaxDimension) return {};
  return Invalid(field + ": " + std::to_string(size) + " values; expected 1 to 4096");
}

// The value of `confidence`, `missing` where it is not there.
std::expected<float, CallError> CheckConfidence(bool has, const v1::Confidence& confidence,
                                                float missing, const std::string& field) {
  if (has && !v1::ConfidenceCategory_IsValid(confidence.category())) {
    return Invalid(field + ".category: " + std::to_string(confidence.category()) +
                   "; expected a ConfidenceCategory, 0 to 5");
  }
  const float value = has ? ValueOf(confidence) : missing;
  // Written so that NaN fails.
  if (value >= 0 && value <= 1) return value;
  return Invalid(field + ".value: " + NumberText(value) + "; expected 0 to 1");
}

Asked CheckFinite(float value, const std::string& field) {
  if (std::isfinite(value)) return {};
  return Invalid(field + ": " + NumberText(value) + "; expected a finite number");
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

// What episodes and memories have in common; `field` is "episode" or "memory".
template <typename Item>
Asked AskStore(const Item& item, const std::string& field, CallText* text,
               GatewayQuestion* question) {
  text->id = item.id().empty() ? DrawId() : item.id();
  if (auto checked = CheckId(text->id, field + ".id"); !checked) return checked;
  if (auto checked =
          CheckVectorSize(static_cast<size_t>(item.embedding_size()), field + ".embedding");
      !checked) {
    return checked;
  }
  if (auto checked = CheckKept(item); !checked) return checked;
  text->payload = PayloadOf(item);
  if (text->payload.size() > kMaxPayloadBytes) {
    return Invalid(field + ": " + std::to_string(text->payload.size()) +
                   " bytes besides id and embedding; expected up to 65536");
  }
  question->attributes = text->attributes;
  question->kind = CallKind::kObserve;
  question->op = ObservationOp::kUpsert;
  question->vector = {item.embedding().data(), static_cast<size_t>(item.embedding_size())};
  question->id = text->id;
  question->payload = text->payload;
  return {};
}

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
  return AskStore(episode, "episode", text, question);
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
  return AskStore(memory, "memory", text, question);
}

// ---- Recall ----

Asked CheckResults(int32_t results, const std::string& field) {
  if (results >= 0 && static_cast<uint32_t>(results) <= kMaxPageResults) return {};
  return Invalid(field + ": " + std::to_string(results) + "; expected 0 to 1000");
}

std::string_view CueName(const v1::Cue& cue) {
  switch (cue.cue_type_case()) {
    case v1::Cue::kEmbedding:
      return "embedding";
    case v1::Cue::kContext:
      return "context";
    case v1::Cue::kTemporal:
      return "temporal";
    case v1::Cue::kSemantic:
      return "semantic";
    case v1::Cue::kPattern:
      return "pattern";
    case v1::Cue::CUE_TYPE_NOT_SET:
      break;
  }
  return "not set";
}

// What can be recalled by, where that is not what was asked.
Asked RefuseCue(const v1::Cue& cue) {
  return Invalid("cue.cue_type: " + std::string(CueName(cue)) +
                 "; this appliance recalls by cue.embedding or cue.context (or by ids or scroll)");
}

Asked AskCue(const v1::RecallRequest& request, std::span<const std::string> filter_keys,
             CallText* text, RecallLimits* limits, GatewayQuestion* question) {
  const v1::Cue& cue = request.cue();
  if (!cue.has_embedding() && !cue.has_context()) return RefuseCue(cue);
  if (auto checked = CheckResults(request.max_results(), "max_results"); !checked) return checked;
  if (auto checked = CheckResults(cue.max_results(), "cue.max_results"); !checked) return checked;
  const auto& vector = cue.embedding().vector();
  if (cue.has_context()) {
    if (request.all_spaces()) return Invalid("all_spaces: true; it needs cue.embedding");
  } else if (auto checked =
                 CheckVectorSize(static_cast<size_t>(vector.size()), "cue.embedding.vector");
             !checked) {
    return checked;
  }
  const float least = cue.embedding().similarity_threshold();
  if (!std::isfinite(least)) {
    return Invalid("cue.embedding.similarity_threshold: " + NumberText(least) +
                   "; expected a finite number");
  }
  const auto confidence = CheckConfidence(cue.has_threshold(), cue.threshold(), 0, "cue.threshold");
  if (!confidence) return std::unexpected(confidence.error());
  if (request.ef_search() > kMaxEf) {
    return Invalid("ef_search: " + std::to_string(request.ef_search()) + "; expected 0 to 10000");
  }
  if (auto filter = FilterOf(request, filter_keys, &text->filter); !filter) return filter;
  question->filter = text->filter;
  limits->least_similarity = least;
  limits->has_least_similarity = least != 0;
  limits->is_compared = cue.has_embedding();
  limits->least_confidence = *confidence;
  question->kind = CallKind::kRecall;
  question->vector = {vector.data(), static_cast<size_t>(vector.size())};
  const auto asked = static_cast<uint32_t>(request.max_results());
  const auto cue_asked = static_cast<uint32_t>(cue.max_results());
  question->k = asked > 0 && cue_asked > 0 ? std::min(asked, cue_asked) : asked + cue_asked;
  if (question->k == 0) question->k = kDefaultResults;
  question->ef = request.ef_search();
  question->snapshot_isolation = request.snapshot_isolation();
  question->across = request.all_spaces();
  return {};
}

Asked AskIds(const v1::RecallRequest& request, GatewayQuestion* question) {
  if (request.ids_size() > kMaxIdsOfCall) {
    return Invalid("ids: " + std::to_string(request.ids_size()) + " ids; expected up to 100");
  }
  for (int i = 0; i < request.ids_size(); ++i) {
    if (auto checked = CheckId(request.ids(i), "ids[" + std::to_string(i) + "]"); !checked) {
      return checked;
    }
    question->ids.push_back(request.ids(i));
  }
  question->kind = CallKind::kGet;
  return {};
}

// A scroll's cursor: partition and the shard's own cursor there, in hexadecimal.
std::string CursorText(uint16_t partition, uint64_t cursor) {
  std::array<char, 24> text{};
  char* end = std::to_chars(text.data(), text.data() + text.size(), partition, 16).ptr;
  *end++ = '.';
  end = std::to_chars(end, text.data() + text.size(), cursor, 16).ptr;
  return {text.data(), end};
}

bool ReadCursor(std::string_view text, uint16_t* partition, uint64_t* cursor) {
  const char* const end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, *partition, 16);
  if (first.ec != std::errc() || first.ptr == end || *first.ptr != '.') return false;
  const auto second = std::from_chars(first.ptr + 1, end, *cursor, 16);
  return second.ec == std::errc() && second.ptr == end;
}

Asked AskScroll(const v1::ScrollRequest& scroll, GatewayQuestion* question) {
  if (scroll.limit() > kMaxPageResults) {
    return Invalid("scroll.limit: " + std::to_string(scroll.limit()) + "; expected 0 to 1000");
  }
  if (!scroll.cursor().empty() &&
      !ReadCursor(scroll.cursor(), &question->partition, &question->cursor)) {
    return Invalid("scroll.cursor: " + Quoted(scroll.cursor()) +
                   "; expected next_cursor of the page before, or nothing");
  }
  question->kind = CallKind::kScroll;
  question->limit = static_cast<uint16_t>(scroll.limit() == 0 ? kDefaultPage : scroll.limit());
  return {};
}

void TellCue(const GatewayAnswer& answer, const RecallLimits& limits, int64_t took_ns,
             v1::RecallResponse* response) {
  double activation_sum = 0;
  HitReader reader(answer.hits);
  while (const auto hit = reader.Next()) {
    const float similarity =
        limits.is_compared ? SimilarityOf(answer.metric, hit->header.score) : 1;
    if (limits.has_least_similarity && !(similarity >= limits.least_similarity)) continue;
    // Of products too large for a float may nothing be left but NaN; that is no activation either.
    const float activation = similarity > 0 ? similarity : 0;
    const float confidence = activation * hit->header.confidence;
    if (confidence < limits.least_confidence) continue;
    v1::Memory* memory = response->add_memories();
    ToMemory(*hit, memory);
    memory->set_activation(activation);
    SetConfidence(confidence, memory->mutable_confidence());
    activation_sum += activation;
  }
  const int count = response->memories_size();
  SetConfidence(count > 0 ? response->memories(0).confidence().value() : 0,
                response->mutable_recall_confidence());
  response->set_snapshot_sequence(answer.snapshot);
  if (!limits.with_metadata) return;
  v1::RecallMetadata* metadata = response->mutable_metadata();
  metadata->set_total_activated(static_cast<int32_t>(answer.hit_count));
  metadata->set_above_threshold(count);
  if (count > 0) metadata->set_avg_activation(static_cast<float>(activation_sum / count));
  metadata->set_recall_time_ms(took_ns / kNanosPerMilli);
}

// In the order of the ids; an id that moved to another partition may be in both for a moment.
void TellIds(const GatewayQuestion& question, const GatewayAnswer& answer,
             v1::RecallResponse* response) {
  std::unordered_map<std::string_view, HitView> found;
  HitReader reader(answer.hits);
  while (const auto hit = reader.Next()) {
    const auto [place, added] = found.try_emplace(hit->id, *hit);
    if (!added && hit->header.stamp > place->second.header.stamp) place->second = *hit;
  }
  for (const std::string_view id : question.ids) {
    const auto place = found.find(id);
    if (place != found.end()) ToMemory(place->second, response->add_memories());
  }
}

// ---- Introspect ----

struct SpaceSums {
  uint64_t observations = 0;
  uint64_t linked = 0;
  uint64_t unlinked = 0;
  uint64_t retired = 0;
  uint64_t resident_bytes = 0;
  uint16_t dimension = 0;
  uint16_t partitions = 0;

  void Add(const SpaceRecord& record) {
    observations += record.observations;
    linked += record.linked;
    unlinked += record.unlinked;
    retired += record.retired;
    resident_bytes += record.resident_bytes;
    dimension = std::max(dimension, record.dimension);
    ++partitions;
  }
};

template <typename Visit>
void ForEachRecord(std::span<const std::byte> records, Visit visit) {
  while (!records.empty()) {
    SpaceRecord record;
    CHECK(records.size() >= sizeof(record), "an answer is whole records");
    std::memcpy(&record, records.data(), sizeof(record));
    CHECK(record.record_bytes <= records.size() &&
              record.record_bytes >= sizeof(record) + record.name_bytes,
          "a record holds what its header says");
    visit(record, std::string_view(reinterpret_cast<const char*>(records.data()) + sizeof(record),
                                   record.name_bytes));
    records = records.subspan(record.record_bytes);
  }
}

void AddMetrics(const v1::IntrospectRequest& request, const SpaceSums& space,
                const CounterCatalogue& counters, v1::IntrospectResponse* response) {
  std::string* json = response->mutable_metrics_snapshot_json();
  *json = "{";
  const auto add = [&](const std::string& name, uint64_t value) {
    const auto& wanted = request.metrics();
    if (!wanted.empty() && std::ranges::find(wanted, name) == wanted.end()) return;
    (*response->mutable_metrics())[name] = static_cast<float>(value);
    if (json->size() > 1) *json += ",";
    *json += "\"" + name + "\":" + std::to_string(value);
  };
  add("space.observations", space.observations);
  add("space.linked", space.linked);
  add("space.unlinked", space.unlinked);
  add("space.retired", space.retired);
  add("space.resident_bytes", space.resident_bytes);
  add("space.partitions", space.partitions);
  add("space.dimension", space.dimension);
  for (const CounterView& counter : counters) {
    add(counter.core + "." + std::string(counter.name), counter.counter->Read());
  }
  *json += "}";
}

// What the daemon has found wrong, by component: the core whose counter says so.
using Faults = std::map<std::string, std::string>;

Faults FaultsOf(const CounterCatalogue& counters) {
  struct Fault {
    std::string_view counter;
    std::string_view text;
    bool is_counted = true;
  };
  static constexpr std::array kFaults = {
      Fault{kLogWithoutRoom, "no room on the disk for its log (writes: disk_full)", false},
      Fault{kLogFailing, "the disk of its log fails (writes: disk_failing)", false},
      Fault{"records_quarantined", " records are in quarantine"},
      Fault{kCheckpointsFailing, " checkpoints have failed since the last good one"},
      Fault{kDamagedPlaces, " damaged places in the logs: payloads are missing"}};
  Faults faults;
  for (const CounterView& counter : counters) {
    const auto fault = std::ranges::find(kFaults, counter.name, &Fault::counter);
    if (fault == kFaults.end()) continue;
    const uint64_t count = counter.counter->Read();
    if (count == 0) continue;
    std::string& text = faults[counter.core];
    if (!text.empty()) text += "; ";
    if (fault->is_counted) text += std::to_string(count);
    text += fault->text;
  }
  return faults;
}

// What is missing in `faults` is in order.
void TellFaults(const Faults& faults, v1::HealthStatus* health) {
  // Each shard answered, or this call would have no answer.
  std::string summary = "all shards answer";
  for (const auto& [name, text] : faults) {
    v1::ComponentHealth& component = (*health->mutable_components())[name];
    component.set_operational(false);
    component.set_status_message(text);
    summary += "; " + name + ": " + text;
  }
  health->set_healthy(faults.empty());
  health->set_summary(std::move(summary));
}

void AddHealth(const std::unordered_map<uint16_t, SpaceSums>& shards,
               const CounterCatalogue& counters, v1::IntrospectResponse* response) {
  v1::HealthStatus* health = response->mutable_health();
  auto& components = *health->mutable_components();
  const auto add = [&components](const std::string& name, float performance, std::string message) {
    v1::ComponentHealth& component = components[name];
    component.set_operational(true);
    component.set_performance(performance);
    component.set_status_message(std::move(message));
  };
  add("gateway", 1, "answers");
  for (const CounterView& counter : counters) {
    if (components.contains(counter.core)) continue;
    if (counter.core.starts_with("shard")) add(counter.core, 1, "no observations");
    if (counter.core == kControlCore) add(counter.core, 1, "in order");
  }
  for (const auto& [shard, sums] : shards) {
    if (sums.observations == 0) continue;
    const double in_order = static_cast<double>(sums.observations - sums.unlinked) /
                            static_cast<double>(sums.observations);
    // A space that is scanned exactly needs no links.
    const bool linking = sums.linked > 0 && sums.unlinked > 0;
    add("shard" + std::to_string(shard), linking ? static_cast<float>(in_order) : 1,
        std::to_string(sums.observations) + " observations, " + std::to_string(sums.linked) +
            " linked");
  }
  TellFaults(FaultsOf(counters), health);
}

}  // namespace

std::expected<SpaceName, CallError> SpaceOfCall(std::string_view request,
                                                std::string_view metadata) {
  if (!request.empty() && !metadata.empty() && request != metadata) {
    return Invalid("x-memory-space: " + Quoted(metadata) + "; the request's memory_space_id is " +
                   Quoted(request));
  }
  const std::string field = request.empty() ? "x-memory-space" : "memory_space_id";
  std::string_view name = request.empty() ? metadata : request;
  if (name.empty()) name = "default";
  if (IsValidSpaceName(name)) return SpaceName(name);
  return Invalid(field + ": " + Quoted(name) + "; expected 1 to 64 of [a-z0-9_-]");
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

Asked AskRecall(const v1::RecallRequest& request, std::span<const std::string> filter_keys,
                CallText* text, RecallLimits* limits, GatewayQuestion* question) {
  const int ways = int{request.has_cue()} + int{request.ids_size() > 0} + int{request.has_scroll()};
  const bool filters = request.has_filter() || request.has_context();
  if (filters && !request.has_cue()) {
    const std::string field = request.has_filter() ? "filter" : "context";
    return Invalid(field + ": set without a cue; this appliance filters what cue.embedding finds");
  }
  if (ways == 0) return Invalid("cue: not set; expected cue, ids or scroll");
  if (ways > 1) return Invalid("cue, ids, scroll: more than one is set; expected one of them");
  limits->with_metadata = request.include_metadata();
  question->with_payload = true;
  question->with_vector = request.include_embedding();
  if (request.has_cue()) return AskCue(request, filter_keys, text, limits, question);
  if (request.has_scroll()) return AskScroll(request.scroll(), question);
  return AskIds(request, question);
}

Asked AskForget(const v1::ForgetRequest& request, GatewayQuestion* question) {
  switch (request.target_case()) {
    case v1::ForgetRequest::kMemoryId:
      break;
    case v1::ForgetRequest::kPattern:
      return Invalid("pattern: set; this appliance forgets by memory_id");
    case v1::ForgetRequest::TARGET_NOT_SET:
      return Invalid("target: not set; expected memory_id");
  }
  if (auto checked = CheckId(request.memory_id(), "memory_id"); !checked) return checked;
  switch (request.mode()) {
    case v1::FORGET_MODE_UNSPECIFIED:
    case v1::FORGET_MODE_DELETE:
    case v1::FORGET_MODE_OVERWRITE:
      if (request.restore()) {
        return Invalid("restore: true with mode " + v1::ForgetMode_Name(request.mode()) +
                       "; expected mode FORGET_MODE_SUPPRESS with it");
      }
      question->op = ObservationOp::kDelete;
      break;
    case v1::FORGET_MODE_SUPPRESS:
      question->op = request.restore() ? ObservationOp::kRestore : ObservationOp::kSuppress;
      break;
    default:
      return Invalid("mode: " + std::to_string(request.mode()) +
                     "; expected FORGET_MODE_SUPPRESS, FORGET_MODE_DELETE or "
                     "FORGET_MODE_OVERWRITE");
  }
  question->kind = CallKind::kObserve;
  question->id = request.memory_id();
  return {};
}

Asked AskIntrospect(const v1::IntrospectRequest& request, GatewayQuestion* question) {
  if (request.metrics_size() > kMaxMetricsOfCall) {
    return Invalid("metrics: " + std::to_string(request.metrics_size()) +
                   " names; expected up to 1000");
  }
  question->kind = CallKind::kIntrospect;
  return {};
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

void TellRecall(const GatewayQuestion& question, const GatewayAnswer& answer,
                const RecallLimits& limits, int64_t took_ns, v1::RecallResponse* response) {
  if (question.kind == CallKind::kRecall) {
    TellCue(answer, limits, took_ns, response);
    return;
  }
  if (question.kind == CallKind::kGet) {
    TellIds(question, answer, response);
  } else {
    HitReader reader(answer.hits);
    while (const auto hit = reader.Next()) ToMemory(*hit, response->add_memories());
    if (!answer.scroll_ended) {
      response->set_next_cursor(CursorText(answer.next_partition, answer.next_cursor));
    }
  }
  // Nothing was compared: what is there is there.
  SetConfidence(response->memories_size() > 0 ? 1 : 0, response->mutable_recall_confidence());
  if (!limits.with_metadata) return;
  v1::RecallMetadata* metadata = response->mutable_metadata();
  metadata->set_total_activated(response->memories_size());
  metadata->set_above_threshold(response->memories_size());
  metadata->set_recall_time_ms(took_ns / kNanosPerMilli);
}

void TellForget(const GatewayQuestion& question, const GatewayAnswer& answer,
                v1::ForgetResponse* response) {
  response->set_memories_affected(answer.existed ? 1 : 0);
  SetConfidence(1, response->mutable_forget_confidence());
  response->set_reversible(answer.existed && question.op == ObservationOp::kSuppress);
}

void TellIntrospect(const v1::IntrospectRequest& request, const GatewayQuestion& question,
                    const GatewayAnswer& answer, const CounterCatalogue& counters,
                    v1::IntrospectResponse* response) {
  SpaceSums space;
  SpaceSums all;
  std::unordered_map<uint16_t, SpaceSums> shards;
  ForEachRecord(answer.records, [&](const SpaceRecord& record, std::string_view name) {
    all.Add(record);
    shards[record.shard].Add(record);
    if (name == question.space.view()) space.Add(record);
  });
  AddMetrics(request, space, counters, response);
  if (request.include_health()) AddHealth(shards, counters, response);
  if (request.include_statistics()) {
    response->mutable_statistics()->set_total_memories(static_cast<int64_t>(space.observations));
  }
  if (all.linked > 0 && all.unlinked > 0) {
    response->add_active_processes("linking: " + std::to_string(all.unlinked) +
                                   " observations are not in a graph yet");
  }
}

std::string RefusalMessage(const GatewayQuestion& question, const GatewayAnswer& answer,
                           std::string_view vector_field) {
  const std::string field(vector_field);
  const std::string space = "the space " + Quoted(question.space.view());
  switch (answer.reason) {
    case RefusalReason::kWrongDimension:
      return field + ": " + std::to_string(question.vector.size()) + " values; " + space +
             " has dimension " + std::to_string(answer.space_dimension);
    case RefusalReason::kNotFinite: {
      const auto bad =
          std::ranges::find_if(question.vector, [](float value) { return !std::isfinite(value); });
      if (bad == question.vector.end()) break;
      return field + "[" + std::to_string(bad - question.vector.begin()) +
             "]: " + NumberText(*bad) + "; expected finite numbers";
    }
    case RefusalReason::kZeroVector:
      return field + ": all " + std::to_string(question.vector.size()) + " values are 0; " + space +
             " compares directions (cosine) and needs one that is not";
    case RefusalReason::kUnknownSpace:
      return space + " holds nothing yet";
    case RefusalReason::kUnknownFilterKey:
      return "filter.metadata: " + space +
             " keeps no such key; list it in filter_keys of the configuration";
    default:
      break;
  }
  const RefusalInfo info = DescribeRefusal(answer.reason);
  return std::string(info.name) + ": " + std::string(info.text);
}

}  // namespace engram
