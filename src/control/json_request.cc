#include "src/control/json_request.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include <simdjson.h>

#include "src/control/json_text.h"
#include "src/control/memory_codec.h"

namespace engram {

namespace {

using simdjson::error_code;
using simdjson::ondemand::json_type;
using simdjson::ondemand::value;

static_assert(JsonReader::kPaddingBytes >= simdjson::SIMDJSON_PADDING);

constexpr size_t kTokenBytesMax = 64;  // of a value that a fault repeats

// Leaves the function with what is wrong with the text, if anything.
#define ENGRAM_JSON_TRY(expression)                                          \
  do {                                                                       \
    if (const error_code tried = (expression); tried != simdjson::SUCCESS) { \
      return tried;                                                          \
    }                                                                        \
  } while (false)

// The text of a value, as far as a fault repeats it.
std::string TokenOf(value* item) {
  std::string_view token = item->raw_json_token();
  while (!token.empty() && token.find_last_of(" \t\r\n") == token.size() - 1) {
    token.remove_suffix(1);
  }
  if (token.starts_with('[')) return "a list";
  if (token.starts_with('{')) return "an object";
  return token.size() <= kTokenBytesMax ? std::string(token) : Quoted(token);
}

// Every value of a text is looked at, known or not: what passes is JSON.
error_code Skip(value item, int nesting) {
  if (nesting > kMaxJsonNesting) return simdjson::DEPTH_ERROR;
  json_type type{};
  ENGRAM_JSON_TRY(item.type().get(type));
  switch (type) {
    case json_type::array:
      for (auto element : item.get_array()) {
        value each;
        ENGRAM_JSON_TRY(element.get(each));
        ENGRAM_JSON_TRY(Skip(each, nesting + 1));
      }
      return simdjson::SUCCESS;
    case json_type::object:
      for (auto field : item.get_object()) {
        std::string_view key;
        ENGRAM_JSON_TRY(field.unescaped_key().get(key));
        value each;
        ENGRAM_JSON_TRY(field.value().get(each));
        ENGRAM_JSON_TRY(Skip(each, nesting + 1));
      }
      return simdjson::SUCCESS;
    case json_type::string:
      return item.get_string().error();
    case json_type::number:
      return item.get_double().error();
    case json_type::boolean:
      return item.get_bool().error();
    case json_type::null:
      break;
  }
  bool is_null = false;
  const error_code read = item.is_null().get(is_null);
  return read == simdjson::SUCCESS && is_null ? simdjson::SUCCESS : simdjson::N_ATOM_ERROR;
}

std::string ListOf(std::initializer_list<std::string_view> names) {
  std::string list;
  for (const std::string_view name : names) {
    list.append(list.empty() ? "" : ", ").append(Quoted(name));
  }
  return list;
}

std::string TextOf(error_code code) {
  switch (code) {
    case simdjson::UTF8_ERROR:
      return "a string is not UTF-8";
    case simdjson::EMPTY:
      return "empty; expected an object";
    case simdjson::INCORRECT_TYPE:
      return "expected an object";
    case simdjson::DEPTH_ERROR:
      return "nested deeper than " + std::to_string(kMaxJsonNesting);
    case simdjson::CAPACITY:
      return "longer than " + std::to_string(kMaxJsonBytes) + " bytes";
    case simdjson::TRAILING_CONTENT:
      return "more follows behind the object";
    default:
      return simdjson::error_message(code);
  }
}

// Reads the fields of one text into a request.
class Reading {
 public:
  // Where the numbers of a vector are gathered.
  using Gathered = std::array<float, kMaxDimension>;

  Reading(JsonRequest* request, Gathered* numbers) : request_(request), numbers_(numbers) {}

  error_code Message(simdjson::ondemand::object object) {
    for (auto field : object) {
      ENGRAM_JSON_TRY(Each(
          field, [this](std::string_view key, value item) { return MessageField(key, item); }));
    }
    return simdjson::SUCCESS;
  }

  error_code Episode(simdjson::ondemand::object object) {
    for (auto field : object) {
      ENGRAM_JSON_TRY(Each(field, [this](std::string_view key, value item) {
        if (key == "memory_space_id") return Text(key, item, &request_->space);
        return EpisodeField(key, item);
      }));
    }
    return simdjson::SUCCESS;
  }

 private:
  // A field that is null is as one that is not there.
  template <typename Take>
  static error_code Each(auto& field, const Take& take) {
    std::string_view key;
    ENGRAM_JSON_TRY(field.unescaped_key().get(key));
    value item;
    ENGRAM_JSON_TRY(field.value().get(item));
    json_type type{};
    // A word that JSON does not have, such as NaN, is for the field to tell.
    if (item.type().get(type) == simdjson::SUCCESS && type == json_type::null) {
      return Skip(item, 1);
    }
    return take(key, item);
  }

  // The fields of an object that is a field itself.
  template <typename Take>
  error_code Within(std::string_view key, value item, const Take& take) {
    if (!Is(json_type::object, item)) return Wrong(key, item, "an object");
    const std::string outer = std::exchange(prefix_, prefix_ + std::string(key) + ".");
    for (auto field : item.get_object()) ENGRAM_JSON_TRY(Each(field, take));
    prefix_ = outer;
    return simdjson::SUCCESS;
  }

  error_code MessageField(std::string_view key, value item) {
    if (key == "type") return Type(item);
    if (key == "episode") {
      return Within(key, item,
                    [this](std::string_view name, value each) { return EpisodeField(name, each); });
    }
    if (key == "sequence_number") {
      return Unsigned(key, item, UINT64_MAX, [this](uint64_t v) { request_->sequence = v; });
    }
    if (key == "session_id" || key == "resume_session_id") {
      return Text(key, item, &request_->session);
    }
    if (key == "memory_space_id") return Text(key, item, &request_->space);
    if (key == "id") return Text(key, item, &request_->id);
    if (key == "metric") {
      return Choice(key, item, {"cosine", "ip", "l2"},
                    [this](size_t place) { request_->metric = static_cast<Metric>(place + 1); });
    }
    if (key == "dimension") {
      return Unsigned(key, item, kMaxDimension,
                      [this](uint64_t v) { request_->dimension = static_cast<uint16_t>(v); });
    }
    if (key == "action" || key == "buffer_remaining" || key == "preferred_rate") {
      return FlowField(key, item);
    }
    if (key == "request_id" || key == "vector" || key == "filter") return CueField(key, item);
    return InitField(key, item);
  }

  error_code Type(value item) {
    static constexpr std::array<std::string_view, 5> kTypes = {"init", "observation",
                                                               "flow_control", "recall", "close"};
    if (!Is(json_type::string, item)) return Wrong("type", item, "a text");
    std::string_view text;
    ENGRAM_JSON_TRY(item.get_string().get(text));
    request_->type_text.assign(text.substr(0, 2 * kTokenBytesMax));
    const auto type = std::ranges::find(kTypes, text);
    request_->type = type == kTypes.end()
                         ? JsonType::kUnknown
                         : static_cast<JsonType>(static_cast<size_t>(type - kTypes.begin()) + 1);
    return simdjson::SUCCESS;
  }

  error_code InitField(std::string_view key, value item) {
    v1::StreamInit* init = &request_->init;
    if (key == "client_buffer_size") {
      return Unsigned32(key, item, [init](uint32_t v) { init->set_client_buffer_size(v); });
    }
    if (key == "protocol_version") {
      return Unsigned32(key, item, [init](uint32_t v) { init->set_protocol_version(v); });
    }
    bool flag = false;
    if (key == "enable_backpressure") {
      ENGRAM_JSON_TRY(Flag(key, item, &flag));
      init->set_enable_backpressure(flag);
      return simdjson::SUCCESS;
    }
    if (key == "cumulative_acks") {
      ENGRAM_JSON_TRY(Flag(key, item, &flag));
      init->set_cumulative_acks(flag);
      return simdjson::SUCCESS;
    }
    if (key == "priority") {
      return Choice(key, item, {"normal", "high"}, [init](size_t place) {
        init->set_priority(static_cast<v1::SessionPriority>(place));
      });
    }
    return RecallField(key, item);
  }

  error_code FlowField(std::string_view key, value item) {
    if (key == "preferred_rate") return Number(key, item, &request_->flow.preferred_rate);
    if (key == "buffer_remaining") {
      return Unsigned(key, item, INT32_MAX, [this](uint64_t v) {
        request_->flow.buffer_remaining = static_cast<int32_t>(v);
      });
    }
    return Choice(key, item, {"pause", "resume", "slow_down", "speed_up", "buffer_status"},
                  [this](size_t place) { request_->action = static_cast<FlowAction>(place + 1); });
  }

  error_code CueField(std::string_view key, value item) {
    if (key == "request_id") return RequestId(item);
    if (key == "vector") {
      request_->has_vector = true;
      return Numbers(key, item,
                     request_->recall.mutable_cue()->mutable_embedding()->mutable_vector());
    }
    return Within(key, item, [this](std::string_view name, value each) {
      return FilterField(name, each, request_->recall.mutable_filter());
    });
  }

  error_code RecallField(std::string_view key, value item) {
    v1::StreamingRecallRequest* recall = &request_->recall;
    if (key == "max_results") {
      return Unsigned32(key, item, [recall](uint32_t v) { recall->set_max_results(v); });
    }
    if (key == "ef_search") {
      return Unsigned32(key, item, [recall](uint32_t v) { recall->set_ef_search(v); });
    }
    if (key == "similarity_threshold") {
      float least = 0;
      ENGRAM_JSON_TRY(Number(key, item, &least));
      request_->similarity_threshold = least;
      return simdjson::SUCCESS;
    }
    if (key == "snapshot_time") return Time(key, item, recall->mutable_snapshot_time());
    bool flag = false;
    if (key == "snapshot_isolation") {
      ENGRAM_JSON_TRY(Flag(key, item, &flag));
      recall->set_snapshot_isolation(flag);
      return simdjson::SUCCESS;
    }
    if (key == "include_embedding") {
      ENGRAM_JSON_TRY(Flag(key, item, &flag));
      recall->set_include_embedding(flag);
      return simdjson::SUCCESS;
    }
    if (key == "all_spaces") {
      ENGRAM_JSON_TRY(Flag(key, item, &flag));
      recall->set_all_spaces(flag);
      return simdjson::SUCCESS;
    }
    return Skip(item, 1);
  }

  error_code FilterField(std::string_view key, value item, v1::Filter* filter) {
    if (key == "time_start") return Time(key, item, filter->mutable_time_start());
    if (key == "time_end") return Time(key, item, filter->mutable_time_end());
    if (key == "required_tags") return Texts(key, item, filter->mutable_required_tags());
    if (key == "excluded_tags") return Texts(key, item, filter->mutable_excluded_tags());
    if (key != "metadata") {
      ENGRAM_JSON_TRY(Skip(item, 2));
      NoteFault(key,
                "there is no such filter; expected time_start, time_end, required_tags, "
                "excluded_tags or metadata");
      return simdjson::SUCCESS;
    }
    return Within(key, item, [this, filter](std::string_view name, value each) {
      v1::MetadataCondition* condition = filter->add_metadata();
      condition->set_key(std::string(name));
      if (!Is(json_type::string, each)) return Texts(name, each, condition->mutable_values());
      return Text(name, each, condition->add_values());
    });
  }

  error_code EpisodeField(std::string_view key, value item) {
    v1::Episode* episode = &request_->episode;
    if (key == "embedding") return Numbers(key, item, episode->mutable_embedding());
    if (key == "id") return Text(key, item, episode->mutable_id());
    if (key == "what") return Text(key, item, episode->mutable_what());
    if (key == "when") return Time(key, item, episode->mutable_when());
    if (key == "encoding_confidence") return Confidence(key, item);
    if (key == "where_location") return Text(key, item, episode->mutable_where_location());
    if (key == "who") return Texts(key, item, episode->mutable_who());
    if (key == "why") return Text(key, item, episode->mutable_why());
    if (key == "how") return Text(key, item, episode->mutable_how());
    if (key == "last_replay") return Time(key, item, episode->mutable_last_replay());
    if (key == "consolidation_state") {
      return Choice(key, item,
                    {"unspecified", "recent", "consolidating", "consolidated", "reconsolidating"},
                    [episode](size_t place) {
                      episode->set_consolidation_state(static_cast<v1::ConsolidationState>(place));
                    });
    }
    float number = 0;
    if (key == "decay_rate") {
      ENGRAM_JSON_TRY(Number(key, item, &number));
      episode->set_decay_rate(number);
      return simdjson::SUCCESS;
    }
    if (key == "emotional_valence") {
      ENGRAM_JSON_TRY(Number(key, item, &number));
      episode->set_emotional_valence(number);
      return simdjson::SUCCESS;
    }
    if (key == "importance") {
      ENGRAM_JSON_TRY(Number(key, item, &number));
      episode->set_importance(number);
      return simdjson::SUCCESS;
    }
    return Skip(item, 2);
  }

  error_code Confidence(std::string_view key, value item) {
    float confidence = 0;
    ENGRAM_JSON_TRY(Number(key, item, &confidence));
    if (!(confidence >= 0 && confidence <= 1)) {
      NoteFault(key, NumberText(confidence) + "; expected 0 to 1");
    }
    request_->episode.mutable_encoding_confidence()->set_value(confidence);
    return simdjson::SUCCESS;
  }

  // ---- Values ----

  static bool Is(json_type wanted, value& item) {
    json_type type{};
    return item.type().get(type) == simdjson::SUCCESS && type == wanted;
  }

  void NoteFault(std::string_view key, std::string_view what) {
    if (!request_->fault.empty()) return;
    request_->fault.append(prefix_).append(key).append(": ").append(what);
  }

  // The value is of another kind. A word that JSON does not have makes the text none.
  error_code Wrong(std::string_view key, value item, std::string_view expected) {
    const std::string token = TokenOf(&item);
    ENGRAM_JSON_TRY(Skip(item, 2));
    NoteFault(key, token + "; expected " + std::string(expected));
    return simdjson::SUCCESS;
  }

  error_code Text(std::string_view key, value item, std::string* text) {
    if (!Is(json_type::string, item)) return Wrong(key, item, "a text");
    std::string_view read;
    ENGRAM_JSON_TRY(item.get_string().get(read));
    text->assign(read);
    return simdjson::SUCCESS;
  }

  error_code Texts(std::string_view key, value item,
                   google::protobuf::RepeatedPtrField<std::string>* texts) {
    if (!Is(json_type::array, item)) return Wrong(key, item, "a list of texts");
    texts->Clear();
    for (auto element : item.get_array()) {
      value each;
      ENGRAM_JSON_TRY(element.get(each));
      ENGRAM_JSON_TRY(Text(key, each, texts->Add()));
    }
    return simdjson::SUCCESS;
  }

  error_code Time(std::string_view key, value item, google::protobuf::Timestamp* time) {
    if (!Is(json_type::string, item)) return Wrong(key, item, kTimeExpected);
    std::string_view text;
    ENGRAM_JSON_TRY(item.get_string().get(text));
    if (const auto read = ReadTime(text)) {
      *time = *read;
    } else {
      NoteFault(key, Quoted(text) + "; expected " + std::string(kTimeExpected));
    }
    return simdjson::SUCCESS;
  }

  error_code Flag(std::string_view key, value item, bool* flag) {
    if (!Is(json_type::boolean, item)) return Wrong(key, item, "true or false");
    return item.get_bool().get(*flag);
  }

  // Up to `most`.
  template <typename Set>
  error_code Unsigned(std::string_view key, value item, uint64_t most, const Set& set) {
    uint64_t read = 0;
    // Whatever else it is.
    if (item.get_uint64().get(read) != simdjson::SUCCESS) {
      return Wrong(key, item, "a whole number from 0 to " + std::to_string(most));
    }
    if (read > most) {
      NoteFault(key, std::to_string(read) + "; expected 0 to " + std::to_string(most));
      return simdjson::SUCCESS;
    }
    set(read);
    return simdjson::SUCCESS;
  }

  template <typename Set>
  error_code Unsigned32(std::string_view key, value item, const Set& set) {
    return Unsigned(key, item, UINT32_MAX,
                    [&set](uint64_t read) { set(static_cast<uint32_t>(read)); });
  }

  error_code Number(std::string_view key, value item, float* number) {
    double read = 0;
    if (item.get_double().get(read) == simdjson::SUCCESS) {
      *number = static_cast<float>(read);
      if (std::isfinite(*number)) return simdjson::SUCCESS;
    }
    return NotFinite(key, item);
  }

  // NaN, Infinity and what is too large are told as what they are, though JSON has no such words.
  error_code NotFinite(std::string_view key, value item) {
    const std::string token = TokenOf(&item);
    if (IsNumberLike(token)) {
      NoteFault(key, token + "; expected " + std::string(kNumberExpected));
      return simdjson::SUCCESS;
    }
    return Is(json_type::number, item) ? simdjson::NUMBER_ERROR : Wrong(key, item, kNumberExpected);
  }

  // A number, if maybe no good one, or a word that some programs write for one.
  static bool IsNumberLike(std::string_view token) {
    if (token.starts_with('-')) token.remove_prefix(1);
    for (const std::string_view word : {"NaN", "nan", "Infinity", "infinity", "Inf", "inf"}) {
      if (token == word) return true;
    }
    return token.find_first_not_of("0123456789.eE+-") == std::string_view::npos;
  }

  error_code Numbers(std::string_view key, value item,
                     google::protobuf::RepeatedField<float>* numbers) {
    if (!Is(json_type::array, item)) return Wrong(key, item, "a list of numbers");
    size_t count = 0;
    for (auto element : item.get_array()) {
      value each;
      ENGRAM_JSON_TRY(element.get(each));
      double read = 0;
      const bool is_number = each.get_double().get(read) == simdjson::SUCCESS;
      const auto number = static_cast<float>(read);
      if (!is_number || !(std::fabs(number) <= std::numeric_limits<float>::max())) [[unlikely]] {
        const std::string place = std::string(key) + "[" + std::to_string(count) + "]";
        ENGRAM_JSON_TRY(NotFinite(place, each));
      }
      if (count < kMaxDimension) (*numbers_)[count] = number;
      ++count;
    }
    numbers->Clear();
    numbers->Add(numbers_->begin(), numbers_->begin() + std::min<size_t>(count, kMaxDimension));
    if (count > kMaxDimension) {
      NoteFault(key, std::to_string(count) + " values; expected 1 to 4096");
    }
    return simdjson::SUCCESS;
  }

  template <typename Set>
  error_code Choice(std::string_view key, value item, std::initializer_list<std::string_view> names,
                    const Set& set) {
    if (!Is(json_type::string, item)) return Wrong(key, item, ListOf(names));
    std::string_view text;
    ENGRAM_JSON_TRY(item.get_string().get(text));
    const auto* found = std::ranges::find(names, text);
    if (found == names.end()) {
      NoteFault(key, Quoted(text) + "; expected " + ListOf(names));
    } else {
      set(static_cast<size_t>(found - names.begin()));
    }
    return simdjson::SUCCESS;
  }

  // A text or a number, handed back as it came.
  error_code RequestId(value item) {
    std::string* id = &request_->request_id;
    if (Is(json_type::number, item)) {
      const std::string token = TokenOf(&item);
      ENGRAM_JSON_TRY(item.get_double().error());
      if (token.size() <= kTokenBytesMax) *id = token;
      return simdjson::SUCCESS;
    }
    std::string text;
    ENGRAM_JSON_TRY(Text("request_id", item, &text));
    if (text.size() > kMaxRequestIdBytes) {
      NoteFault("request_id", std::to_string(text.size()) + " bytes; expected up to 256");
      return simdjson::SUCCESS;
    }
    id->clear();
    JsonWriter(id).Text(text);
    return simdjson::SUCCESS;
  }

  static constexpr std::string_view kTimeExpected =
      "a time as RFC 3339 has it, like \"2026-03-01T12:00:00Z\"";
  static constexpr std::string_view kNumberExpected = "a finite number that float32 can hold";

  JsonRequest* const request_;
  Gathered* const numbers_;
  std::string prefix_;
};

}  // namespace

void JsonRequest::Clear() {
  type = JsonType::kUnknown;
  type_text.clear();
  fault.clear();
  space.clear();
  session.clear();
  sequence.reset();
  episode.Clear();
  init.Clear();
  // Unless the client says otherwise.
  init.set_enable_backpressure(true);
  action.reset();
  flow = {};
  request_id.clear();
  recall.Clear();
  similarity_threshold = 0;
  has_vector = false;
  id.clear();
  metric = Metric::kUnspecified;
  dimension = 0;
}

class JsonReader::Parser {
 public:
  Parser() : parser_(kMaxJsonBytes) {}

  error_code Read(std::string_view text, Form form, JsonRequest* request,
                  std::optional<size_t>* offset) {
    simdjson::ondemand::document document;
    ENGRAM_JSON_TRY(parser_.iterate(text, text.size() + kPaddingBytes).get(document));
    const error_code read = ReadDocument(&document, form, request);
    const char* at = nullptr;
    if (read != simdjson::SUCCESS && document.current_location().get(at) == simdjson::SUCCESS) {
      *offset = static_cast<size_t>(at - text.data());
    }
    return read;
  }

 private:
  error_code ReadDocument(simdjson::ondemand::document* document, Form form, JsonRequest* request) {
    json_type type{};
    ENGRAM_JSON_TRY(document->type().get(type));
    if (type != json_type::object) return simdjson::INCORRECT_TYPE;
    simdjson::ondemand::object object;
    ENGRAM_JSON_TRY(document->get_object().get(object));
    Reading reading(request, &numbers_);
    ENGRAM_JSON_TRY(form == Form::kMessage ? reading.Message(object) : reading.Episode(object));
    // Where nothing follows there is no place.
    const bool is_whole = document->current_location().error() == simdjson::OUT_OF_BOUNDS;
    return is_whole ? simdjson::SUCCESS : simdjson::TRAILING_CONTENT;
  }

  simdjson::ondemand::parser parser_;
  Reading::Gathered numbers_;
};

JsonReader::JsonReader() : parser_(std::make_unique<Parser>()) {}
JsonReader::~JsonReader() = default;

std::optional<std::string> JsonReader::Read(std::string_view text, Form form,
                                            JsonRequest* request) {
  request->Clear();
  std::optional<size_t> offset;
  error_code read = simdjson::EMPTY;
  if (text.size() > kMaxJsonBytes) {
    read = simdjson::CAPACITY;
  } else if (!text.empty()) {
    read = parser_->Read(text, form, request, &offset);
  }
  if (read == simdjson::SUCCESS) return std::nullopt;
  const std::string at = offset ? "at byte " + std::to_string(*offset) + ": " : "";
  return "not JSON, " + at + TextOf(read);
}

Asked AskJsonRecall(JsonRequest* request, int64_t now_unix_ns,
                    std::span<const std::string> filter_keys, CallText* text, RecallLimits* limits,
                    GatewayQuestion* question) {
  if (!request->fault.empty()) return Invalid(request->fault);
  v1::StreamingRecallRequest* recall = &request->recall;
  if (request->has_vector) {
    recall->mutable_cue()->mutable_embedding()->set_similarity_threshold(
        request->similarity_threshold);
  } else if (recall->has_filter()) {
    recall->mutable_cue()->mutable_context();
  } else {
    return Invalid("vector: missing; expected 1 to 4096 numbers, or a filter");
  }
  const Asked asked = AskStreamingRecall(*recall, now_unix_ns, filter_keys, text, limits, question);
  static constexpr std::string_view kCue = "cue.embedding.";
  if (asked || !asked.error().message.starts_with(kCue)) return asked;
  return Invalid(asked.error().message.substr(kCue.size()));
}

}  // namespace engram
