// What is recalled: Engram's cues to questions, and hits to memories (see memory_calls.h).

#include "src/control/memory_calls.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <unordered_map>
#include <utility>

#include "src/control/memory_codec.h"
#include "src/control/memory_filter.h"
#include "src/core/clock.h"

namespace engram {

namespace {

constexpr uint32_t kDefaultResults = 10;
constexpr uint32_t kDefaultPage = 100;
constexpr int kMaxIdsOfCall = 100;

Asked CheckResults(int64_t results, uint32_t most, const std::string& field) {
  if (results >= 0 && results <= most) return {};
  return Invalid(field + ": " + std::to_string(results) + "; expected 0 to " +
                 std::to_string(most));
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

// What a request asks for by a cue; `Request` is a RecallRequest or a StreamingRecallRequest.
template <typename Request>
Asked AskCue(const Request& request, uint32_t most_results,
             std::span<const std::string> filter_keys, CallText* text, RecallLimits* limits,
             GatewayQuestion* question) {
  const v1::Cue& cue = request.cue();
  if (!cue.has_embedding() && !cue.has_context()) return RefuseCue(cue);
  if (auto checked = CheckResults(request.max_results(), most_results, "max_results"); !checked) {
    return checked;
  }
  if (auto checked = CheckResults(cue.max_results(), most_results, "cue.max_results"); !checked) {
    return checked;
  }
  VectorRef vector;
  if (cue.has_context()) {
    if (request.all_spaces()) return Invalid("all_spaces: true; it needs cue.embedding");
  } else {
    const v1::EmbeddingCue& embedding = cue.embedding();
    const auto checked =
        CheckVector(embedding.vector(), embedding.has_packed_vector(), embedding.packed_vector(),
                    "cue.embedding.vector", "cue.embedding.packed_vector");
    if (!checked) return std::unexpected(checked.error());
    vector = *checked;
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
  question->vector = vector;
  question->with_payload = true;
  question->with_vector = request.include_embedding();
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
  RecallTold told;
  TellHits(answer.metric, answer.hits, limits, &told, response->mutable_memories());
  SetConfidence(told.told > 0 ? response->memories(0).confidence().value() : 0,
                response->mutable_recall_confidence());
  response->set_snapshot_sequence(answer.snapshot);
  if (limits.with_metadata) TellMetadata(told, took_ns, response->mutable_metadata());
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

}  // namespace

Asked AskStreamingRecall(const v1::StreamingRecallRequest& request, int64_t now_unix_ns,
                         std::span<const std::string> filter_keys, CallText* text,
                         RecallLimits* limits, GatewayQuestion* question) {
  if (auto asked = AskCue(request, kMaxRecallResults, filter_keys, text, limits, question);
      !asked) {
    return asked;
  }
  limits->with_metadata = true;
  if (request.has_snapshot_time()) {
    const auto at = CheckTime(true, request.snapshot_time(), 0, "snapshot_time");
    if (!at) return std::unexpected(at.error());
    if (*at > now_unix_ns || *at <= 0) {
      return Invalid("snapshot_time: " + std::to_string(*at) + " ns since 1970; it is " +
                     std::to_string(now_unix_ns) + " ns now; expected an earlier time");
    }
    question->snapshot_isolation = true;
    question->snapshot_unix_ns = *at;
  }
  if (!question->snapshot_isolation) limits->recent_from_unix_ns = now_unix_ns;
  return {};
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
  if (request.has_cue()) {
    return AskCue(request, kMaxPageResults, filter_keys, text, limits, question);
  }
  if (request.has_scroll()) return AskScroll(request.scroll(), question);
  return AskIds(request, question);
}

void TellHits(Metric metric, std::span<const std::byte> hits, const RecallLimits& limits,
              RecallTold* told, google::protobuf::RepeatedPtrField<v1::Memory>* memories) {
  HitReader reader(hits);
  while (const auto hit = reader.Next()) {
    ++told->found;
    const float similarity = limits.is_compared ? SimilarityOf(metric, hit->header.score) : 1;
    if (limits.has_least_similarity && !(similarity >= limits.least_similarity)) continue;
    // Of products too large for a float may nothing be left but NaN; that is no activation either.
    const float activation = similarity > 0 ? similarity : 0;
    const bool is_recent = UnixNsOf(hit->header.stamp) > limits.recent_from_unix_ns;
    const float confidence =
        activation * hit->header.confidence * (is_recent ? kRecentConfidence : 1);
    if (confidence < limits.least_confidence) continue;
    v1::Memory* memory = memories->Add();
    ToMemory(*hit, memory);
    memory->set_activation(activation);
    SetConfidence(confidence, memory->mutable_confidence());
    if (is_recent) (*memory->mutable_metadata())["recent"] = "true";
    told->activation_sum += activation;
    ++told->told;
  }
}

void TellMetadata(const RecallTold& told, int64_t took_ns, v1::RecallMetadata* metadata) {
  metadata->set_total_activated(told.found);
  metadata->set_above_threshold(told.told);
  if (told.told > 0) {
    metadata->set_avg_activation(static_cast<float>(told.activation_sum / told.told));
  }
  metadata->set_recall_time_ms(took_ns / kNanosPerMilli);
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

}  // namespace engram
