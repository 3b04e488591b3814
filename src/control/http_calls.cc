#include "src/control/http_calls.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <utility>

#include "src/control/json_answer.h"
#include "src/control/json_text.h"
#include "src/control/space_records.h"

namespace engram {

namespace {

constexpr std::string_view kMemoriesPath = "/api/v1/memories/";
constexpr std::string_view kSpacesPath = "/api/v1/spaces";
constexpr std::string_view kTextType = "text/plain; version=0.0.4; charset=utf-8";
constexpr uint32_t kRecoveryRetryMs = 1'000;
constexpr size_t kMaxIdsOfCall = 100;

HttpAnswer Refused(const CallError& error) {
  return HttpErrorAnswer(400, "invalid_argument", error.message);
}

HttpAnswer NotAllowed(std::string_view allow) {
  HttpAnswer answer = HttpErrorAnswer(405, "method_not_allowed",
                                      "method: not served here; expected " + std::string(allow));
  answer.allow = allow;
  return answer;
}

int DigitOf(char digit) {
  if (digit >= '0' && digit <= '9') return digit - '0';
  if (digit >= 'a' && digit <= 'f') return digit - 'a' + 10;
  if (digit >= 'A' && digit <= 'F') return digit - 'A' + 10;
  return -1;
}

// Numbers with commas between them.
Asked ReadNumbers(std::string_view list, google::protobuf::RepeatedField<float>* numbers) {
  while (!list.empty()) {
    const std::string_view each = list.substr(0, list.find(','));
    float number = 0;
    const auto [end, error] = std::from_chars(each.data(), each.data() + each.size(), number);
    if (error != std::errc() || end != each.data() + each.size() || !std::isfinite(number)) {
      return Invalid("vector[" + std::to_string(numbers->size()) + "]: " + Quoted(each) +
                     "; expected a finite number that float32 can hold");
    }
    numbers->Add(number);
    list.remove_prefix(std::min(each.size() + 1, list.size()));
  }
  return {};
}

// The name of a field in a body that is the episode itself.
Asked WithoutEpisode(Asked asked) {
  static constexpr std::string_view kEpisode = "episode.";
  if (asked || !asked.error().message.starts_with(kEpisode)) return asked;
  return Invalid(asked.error().message.substr(kEpisode.size()));
}

HttpCallPtr NewCall() {
  return {new HttpCall, [](HttpCall* call) { call->DropReference(); }};
}

}  // namespace

HttpAnswer HttpErrorAnswer(unsigned status, std::string_view code, std::string_view message,
                           uint32_t retry_after_ms) {
  HttpAnswer answer{.status = status, .retry_after_ms = retry_after_ms};
  JsonWriter json(&answer.body);
  json.OpenObject();
  json.OpenObject("error");
  json.Text("code", code);
  json.Text("message", message);
  if (retry_after_ms > 0) json.Integer("retry_after_ms", retry_after_ms);
  json.CloseObject();
  json.CloseObject();
  return answer;
}

unsigned HttpStatusOf(RefusalReason reason) {
  switch (reason) {
    case RefusalReason::kNone:
      return 200;
    case RefusalReason::kUnknownSpace:
    case RefusalReason::kSessionExpired:
      return 404;
    case RefusalReason::kMetricMismatch:
    case RefusalReason::kDimensionMismatch:
    case RefusalReason::kFenced:
      return 409;
    case RefusalReason::kPayloadTooLarge:
      return 413;
    case RefusalReason::kSpaceLimit:
    case RefusalReason::kSessionLimit:
    case RefusalReason::kConnectionLimit:
    case RefusalReason::kBusy:
      return 429;
    case RefusalReason::kShuttingDown:
    case RefusalReason::kRecovering:
    case RefusalReason::kCancelled:
      return 503;
    case RefusalReason::kDeadlinePassed:
      return 504;
    case RefusalReason::kBadRecall:
    case RefusalReason::kBadFilter:
    case RefusalReason::kUnknownFilterKey:
    case RefusalReason::kBadSpaceId:
    case RefusalReason::kSnapshotTooOld:
      return 400;
    default:
      break;
  }
  if (HasEffect(reason, RefusalEffect::kWaits)) return 429;
  return HasEffect(reason, RefusalEffect::kConsumes) ? 400 : 500;
}

std::optional<std::string> PercentDecoded(std::string_view text, bool plus_is_space) {
  std::string decoded;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '+' && plus_is_space) {
      decoded.push_back(' ');
    } else if (text[i] != '%') {
      decoded.push_back(text[i]);
    } else {
      const int high = i + 2 < text.size() ? DigitOf(text[i + 1]) : -1;
      const int low = i + 2 < text.size() ? DigitOf(text[i + 2]) : -1;
      if (high < 0 || low < 0) return std::nullopt;
      decoded.push_back(static_cast<char>(high * 16 + low));
      i += 2;
    }
  }
  return decoded;
}

std::optional<HttpTarget> HttpTarget::Read(std::string_view target) {
  if (!target.starts_with('/')) return std::nullopt;
  HttpTarget read;
  const size_t mark = target.find('?');
  read.path = target.substr(0, mark);
  std::string_view left = mark == std::string_view::npos ? "" : target.substr(mark + 1);
  while (!left.empty()) {
    const std::string_view pair = left.substr(0, left.find('&'));
    left.remove_prefix(std::min(pair.size() + 1, left.size()));
    const size_t equals = pair.find('=');
    auto name = PercentDecoded(pair.substr(0, equals), true);
    auto value =
        PercentDecoded(equals == std::string_view::npos ? "" : pair.substr(equals + 1), true);
    if (!name || !value) return std::nullopt;
    read.query.emplace_back(*std::move(name), *std::move(value));
  }
  return read;
}

std::string_view HttpTarget::Value(std::string_view name) const {
  std::string_view value;
  for (const auto& [key, each] : query) {
    if (key == name) value = each;
  }
  return value;
}

// ---- Which call it is ----

HttpPlan HttpCalls::Route(const HttpRequest& request, bool serves) {
  const auto target = HttpTarget::Read(request.target);
  if (!target) {
    return HttpErrorAnswer(400, "bad_target",
                           "target: " + Quoted(request.target) +
                               "; expected a path, and % only "
                               "before two hexadecimal digits");
  }
  const std::string_view path = target->path;
  const bool gets = request.method == HttpMethod::kGet;
  const bool posts = request.method == HttpMethod::kPost;
  const bool deletes = request.method == HttpMethod::kDelete;
  if (path == "/health/live" || path == "/health/ready") {
    return gets ? Health(path, serves) : NotAllowed("GET");
  }
  if (path == "/metrics" && around_.metrics) {
    if (!gets) return NotAllowed("GET");
    return HttpAnswer{.body = around_.metrics(), .content_type = kTextType};
  }
  if (!path.starts_with(kMemoriesPath) && !path.starts_with(kSpacesPath)) {
    return HttpErrorAnswer(404, "not_found", "path: " + Quoted(path) + " is not served");
  }
  if (!serves) return Recovering();
  if (path == kSpacesPath) {
    if (gets) return Spaces();
    return posts ? CreateSpace(request) : NotAllowed("GET, POST");
  }
  const bool is_space = path.starts_with(kSpacesPath);
  const size_t prefix = is_space ? kSpacesPath.size() + 1 : kMemoriesPath.size();
  const auto name = PercentDecoded(path.substr(std::min(prefix, path.size())), false);
  if (!name || name->empty() || path[prefix - 1] != '/') {
    return HttpErrorAnswer(404, "not_found", "path: " + Quoted(path) + " is not served");
  }
  if (is_space) return deletes ? DropSpace(*name) : NotAllowed("DELETE");
  if (path == "/api/v1/memories/remember" && !deletes) {
    return posts ? Remember(request, *target) : NotAllowed("POST");
  }
  if (path == "/api/v1/memories/recall" && !deletes) {
    return gets || posts ? Recall(request, *target) : NotAllowed("GET, POST");
  }
  return deletes ? Forget(request, *target, *name) : NotAllowed("DELETE");
}

HttpAnswer HttpCalls::Recovering() const {
  return HttpErrorAnswer(503, "recovering", "recovering: " + around_.recovering(),
                         kRecoveryRetryMs);
}

HttpAnswer HttpCalls::Health(std::string_view path, bool serves) const {
  if (path == "/health/ready" && !serves) return Recovering();
  return {.body = path == "/health/ready" ? R"({"status":"ready"})" : R"({"status":"live"})"};
}

std::optional<HttpAnswer> HttpCalls::ReadBody(const HttpRequest& request, JsonReader::Form form,
                                              JsonRequest* read) {
  if (const auto fault = around_.reader->Read(request.body, form, read)) {
    return HttpErrorAnswer(400, "bad_json", "body: " + *fault);
  }
  if (!read->fault.empty()) return Refused({read->fault});
  return std::nullopt;
}

// Header, query and body must agree, as far as they say something.
Asked HttpCalls::AskSpace(const HttpRequest& request, const HttpTarget& target,
                          HttpCall* call) const {
  struct Said {
    std::string_view field;
    std::string_view name;
  };
  Said first{.field = "memory_space_id", .name = "default"};
  bool is_said = false;
  for (const Said& said :
       {Said{"x-memory-space", request.space}, Said{"space", target.Value("space")},
        Said{"memory_space_id", call->request_.space}}) {
    if (said.name.empty()) continue;
    if (is_said && said.name != first.name) {
      return Invalid(std::string(said.field) + ": " + Quoted(said.name) + "; " +
                     std::string(first.field) + " says " + Quoted(first.name));
    }
    if (!std::exchange(is_said, true)) first = said;
  }
  if (!IsValidSpaceName(first.name)) {
    return Invalid(std::string(first.field) + ": " + Quoted(first.name) +
                   "; expected 1 to 64 of [a-z0-9_-]");
  }
  call->question.space = SpaceName(first.name);
  return {};
}

// ---- Memories ----

HttpPlan HttpCalls::Remember(const HttpRequest& request, const HttpTarget& target) {
  HttpCallPtr call = NewCall();
  call->kind_ = HttpCall::Kind::kRemember;
  if (auto fault = ReadBody(request, JsonReader::Form::kEpisode, &call->request_)) return *fault;
  Asked asked = AskSpace(request, target, call.get());
  if (asked) {
    asked = WithoutEpisode(
        AskEpisode(call->request_.episode, around_.clock->WallNs(), &call->text_, &call->question));
  }
  if (!asked) return Refused(asked.error());
  return call;
}

HttpPlan HttpCalls::Recall(const HttpRequest& request, const HttpTarget& target) {
  HttpCallPtr call = NewCall();
  call->kind_ = HttpCall::Kind::kRecall;
  call->began_ns_ = around_.clock->MonotonicNs();
  if (request.method == HttpMethod::kPost) {
    if (auto fault = ReadBody(request, JsonReader::Form::kMessage, &call->request_)) return *fault;
  }
  Asked asked = AskSpace(request, target, call.get());
  if (asked && request.method == HttpMethod::kGet) asked = AskQuery(target, call.get());
  if (asked && call->ids_.empty()) {
    const uint32_t results = call->request_.recall.max_results();
    if (results > kMaxPageResults) {
      asked = Invalid("max_results: " + std::to_string(results) + "; expected 0 to 1000");
    }
  }
  if (asked && call->ids_.empty()) {
    asked = AskJsonRecall(&call->request_, around_.clock->WallNs(),
                          around_.spaces->FilterKeysOf(call->question.space.view()), &call->text_,
                          &call->limits_, &call->question);
  }
  if (!asked) return Refused(asked.error());
  return call;
}

// What a GET asks for: ids, or a vector.
Asked HttpCalls::AskQuery(const HttpTarget& target, HttpCall* call) {
  for (const auto& [name, value] : target.query) {
    if (name == "id") call->ids_.push_back(value);
  }
  GatewayQuestion* question = &call->question;
  question->with_payload = true;
  question->with_vector = target.Value("include_embedding") == "true";
  if (!call->ids_.empty()) {
    if (call->ids_.size() > kMaxIdsOfCall) {
      return Invalid("id: " + std::to_string(call->ids_.size()) + " of them; expected up to 100");
    }
    for (const std::string& id : call->ids_) {
      if (auto checked = CheckId(id, "id"); !checked) return checked;
      question->ids.push_back(id);
    }
    question->kind = CallKind::kGet;
    return {};
  }
  v1::StreamingRecallRequest* recall = &call->request_.recall;
  recall->set_include_embedding(question->with_vector);
  if (const std::string_view text = target.Value("max_results"); !text.empty()) {
    uint32_t results = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), results);
    if (error != std::errc() || end != text.data() + text.size()) {
      return Invalid("max_results: " + Quoted(text) + "; expected 0 to 1000");
    }
    recall->set_max_results(results);
  }
  const std::string_view vector = target.Value("vector");
  if (vector.empty()) {
    return Invalid("vector: missing; expected numbers with commas between them, or id");
  }
  call->request_.has_vector = true;
  return ReadNumbers(vector, recall->mutable_cue()->mutable_embedding()->mutable_vector());
}

HttpPlan HttpCalls::Forget(const HttpRequest& request, const HttpTarget& target,
                           std::string_view id) {
  HttpCallPtr call = NewCall();
  call->kind_ = HttpCall::Kind::kForget;
  call->ids_.emplace_back(id);
  Asked asked = AskSpace(request, target, call.get());
  if (asked) asked = CheckId(id, "id");
  const std::string_view mode = target.Value("mode");
  GatewayQuestion* question = &call->question;
  question->kind = CallKind::kObserve;
  question->id = call->ids_.front();
  if (mode.empty() || mode == "delete") {
    question->op = ObservationOp::kDelete;
  } else if (mode == "suppress") {
    question->op = ObservationOp::kSuppress;
  } else if (mode == "restore") {
    question->op = ObservationOp::kRestore;
  } else if (asked) {
    asked = Invalid("mode: " + Quoted(mode) + "; expected delete, suppress or restore");
  }
  if (!asked) return Refused(asked.error());
  return call;
}

// ---- Spaces ----

HttpPlan HttpCalls::Spaces() {
  HttpCallPtr call = NewCall();
  call->kind_ = HttpCall::Kind::kSpaces;
  call->question.kind = CallKind::kIntrospect;
  return call;
}

HttpPlan HttpCalls::CreateSpace(const HttpRequest& request) {
  JsonRequest read;
  if (auto fault = ReadBody(request, JsonReader::Form::kMessage, &read)) return *fault;
  if (!IsValidSpaceName(read.id)) {
    return Refused({"id: " + Quoted(read.id) + "; expected 1 to 64 of [a-z0-9_-]"});
  }
  if (const SpaceEntry* entry = around_.spaces->Find(read.id); entry != nullptr) {
    return HttpErrorAnswer(409, "already_exists",
                           "id: " + Quoted(read.id) + " is a space already, of metric " +
                               std::string(MetricName(entry->metric())) + " and dimension " +
                               std::to_string(entry->dimension()));
  }
  return std::make_unique<SpaceOrder>(SpaceOrder::What::kCreate, SpaceName(read.id), read.metric,
                                      read.dimension);
}

HttpPlan HttpCalls::DropSpace(std::string_view id) {
  if (!IsValidSpaceName(id)) {
    return Refused({"id: " + Quoted(id) + "; expected 1 to 64 of [a-z0-9_-]"});
  }
  return std::make_unique<SpaceOrder>(SpaceOrder::What::kDrop, SpaceName(id));
}

HttpAnswer HttpCalls::TellOrder(const SpaceOrder& order, const SpaceOutcome& outcome) {
  if (outcome.reason != RefusalReason::kNone) {
    const std::string_view name = DescribeRefusal(outcome.reason).name;
    return HttpErrorAnswer(HttpStatusOf(outcome.reason), name,
                           std::string(name) + ": " + outcome.text, outcome.retry_after_ms);
  }
  HttpAnswer answer{.status = order.what() == SpaceOrder::What::kCreate ? 201U : 200U};
  JsonWriter json(&answer.body);
  json.OpenObject();
  json.Text("id", order.space().view());
  if (order.what() == SpaceOrder::What::kCreate) {
    json.Text("metric", MetricName(outcome.metric));
    json.Integer("dimension", outcome.dimension);
  } else {
    json.Integer("observations_dropped", outcome.observations);
  }
  json.CloseObject();
  return answer;
}

// ---- Answers ----

HttpAnswer HttpCall::TellRefusal() const {
  const std::string_view field = kind_ == Kind::kRemember ? "embedding" : "vector";
  return HttpErrorAnswer(HttpStatusOf(answer.reason), DescribeRefusal(answer.reason).name,
                         RefusalMessage(question, answer, field),
                         HttpStatusOf(answer.reason) == 429 ? answer.retry_after_ms : 0);
}

HttpAnswer HttpCall::Tell(int64_t now_ns) {
  if (answer.reason != RefusalReason::kNone) return TellRefusal();
  HttpAnswer told;
  switch (kind_) {
    case Kind::kRemember:
      TellRemembered(&told.body);
      break;
    case Kind::kRecall:
      TellRecalled(now_ns, &told.body);
      break;
    case Kind::kForget: {
      if (!answer.existed) {
        return HttpErrorAnswer(
            404, "not_found",
            "id: " + Quoted(question.id) + " is not in the space " + Quoted(question.space.view()));
      }
      JsonWriter json(&told.body);
      json.OpenObject();
      json.Text("id", question.id);
      json.Integer("memories_affected", 1);
      json.Flag("reversible", question.op == ObservationOp::kSuppress);
      json.CloseObject();
      break;
    }
    case Kind::kSpaces:
      TellSpaces(&told.body);
      break;
  }
  return told;
}

void HttpCall::TellRemembered(std::string* text) const {
  JsonWriter json(text);
  json.OpenObject();
  json.Text("memory_id", question.id);
  json.Number("storage_confidence", 1);
  json.Flag("existed", answer.existed);
  json.Time("committed_at", UnixNsOf(answer.stamp));
  json.CloseObject();
}

void HttpCall::TellRecalled(int64_t now_ns, std::string* text) const {
  v1::RecallResponse response;
  TellRecall(question, answer, limits_, now_ns - began_ns_, &response);
  TellJsonResults({.is_message = false,
                   .snapshot = response.snapshot_sequence(),
                   .metadata = response.has_metadata() ? &response.metadata() : nullptr},
                  response.memories(), text);
}

void HttpCall::TellSpaces(std::string* text) const {
  std::map<std::string, SpaceSums, std::less<>> spaces;
  ForEachSpaceRecord(answer.records, [&](const SpaceRecord& record, std::string_view name) {
    spaces[std::string(name)].Add(record);
  });
  JsonWriter json(text);
  json.OpenObject();
  json.OpenList("spaces");
  for (const auto& [name, space] : spaces) {
    json.OpenObject();
    json.Text("id", name);
    json.Text("metric", MetricName(space.metric));
    json.Integer("dimension", space.dimension);
    json.Integer("partitions", space.partitions);
    json.Integer("observations", space.observations);
    json.Integer("linked", space.linked);
    json.Integer("unlinked", space.unlinked);
    json.Integer("resident_bytes", space.resident_bytes);
    json.CloseObject();
  }
  json.CloseList();
  json.CloseObject();
}

}  // namespace engram
