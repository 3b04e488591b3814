#include "src/control/json_session.h"

#include <utility>

#include "src/control/json_answer.h"
#include "src/control/session_text.h"
#include "src/core/check.h"

namespace engram {

void JsonSession::Take(std::string_view text) {
  CHECK(takes(), "one request at a time");
  received_unix_ns_ = around_.clock->WallNs();
  if (const auto fault = around_.reader->Read(text, JsonReader::Form::kMessage, &request_)) {
    SayError("bad_json", *fault);
    if (text.size() > kKeptBytes) request_ = {};
    return;
  }
  is_waiting_ = true;
  is_large_ = text.size() > kKeptBytes;
  TakeAgain();
}

void JsonSession::TakeAgain() {
  if (!is_waiting_ || texts_.size() >= kTextsAhead) return;
  is_waiting_ = !ending_ && TakeRequest() == Taken::kNoRoom;
  if (is_waiting_ || !std::exchange(is_large_, false)) return;
  request_ = {};
  text_ = {};
}

JsonSession::Taken JsonSession::TakeRequest() {
  if (request_.type == JsonType::kUnknown) {
    SayError("bad_type", "type: " +
                             (request_.type_text.empty() ? std::string("missing")
                                                         : Quoted(request_.type_text)) +
                             "; expected init, observation, flow_control, recall or close");
    return Taken::kTaken;
  }
  if (request_.type == JsonType::kInit) return TakeInit();
  if (!stream_) {
    SayError("init_required", "init: not sent; expected as the first message of a stream", true);
    return Taken::kTaken;
  }
  // What init asked is not answered yet.
  if (!stream_->is_open()) return Taken::kNoRoom;
  if (is_closing_) return Taken::kTaken;
  switch (request_.type) {
    case JsonType::kObservation:
      return TakeObservation();
    case JsonType::kFlowControl:
      return TakeFlow();
    case JsonType::kRecall:
      return TakeRecall();
    default:
      return TakeClose();
  }
}

// What is wrong with an init; nothing: it may be sent.
std::string JsonSession::InitFault(StreamOpening* opening) const {
  if (!request_.fault.empty()) return request_.fault;
  if (stream_) return "init: sent twice; a stream is one session, open another stream";
  const auto space = SpaceOfCall(request_.space, call_space_);
  if (!space) return space.error().message;
  opening->space = *space;
  const v1::StreamInit& init = request_.init;
  opening->goes_back = init.protocol_version() >= 1;
  opening->cumulative = opening->goes_back && init.cumulative_acks();
  opening->hears_flow = init.enable_backpressure();
  opening->priority =
      init.priority() == v1::SESSION_PRIORITY_HIGH ? Priority::kHigh : Priority::kNormal;
  opening->client_buffer = init.client_buffer_size();
  return {};
}

JsonSession::Taken JsonSession::TakeInit() {
  StreamOpening opening;
  if (const std::string fault = InitFault(&opening); !fault.empty()) {
    SayError("invalid_argument", fault);
    return Taken::kTaken;
  }
  if (!request_.session.empty()) {
    const auto session = ReadSession(request_.session);
    if (!session) {
      SayError(DescribeRefusal(RefusalReason::kSessionExpired).name,
               "resume_session_id: " + Quoted(request_.session) +
                   " is not known; begin a new session without it");
      return Taken::kTaken;
    }
    opening.session = *session;
  }
  StreamPipe* pipe = around_.connect();
  if (pipe == nullptr) {
    const RefusalInfo info = DescribeRefusal(RefusalReason::kConnectionLimit);
    SayError(info.name, info.text);
    ending_ = Ending::kTryLater;
    return Taken::kTaken;
  }
  stream_.emplace(pipe);
  stream_->Open(opening);
  return Taken::kTaken;
}

// What later messages say of space and session has to be the stream's.
std::string JsonSession::StrayFault() const {
  const std::string_view space = stream_->space().view();
  if (!request_.space.empty() && request_.space != space) {
    return "memory_space_id: " + Quoted(request_.space) +
           "; this stream's session is of the space " + Quoted(space);
  }
  if (!request_.session.empty() && request_.session != session_text_) {
    return "session_id: " + Quoted(request_.session) + "; this stream's is " +
           Quoted(session_text_);
  }
  return {};
}

JsonSession::Taken JsonSession::TakeObservation() {
  std::string fault = request_.fault.empty() ? StrayFault() : request_.fault;
  if (!request_.sequence) {
    if (fault.empty()) fault = "sequence_number: missing; expected the last one's and 1";
    SayError("invalid_argument", fault);
    return Taken::kTaken;
  }
  Taken taken = Taken::kTaken;
  GatewayQuestion question;
  if (fault.empty()) {
    const Asked asked = AskEpisode(request_.episode, received_unix_ns_, &text_, &question);
    if (!asked) fault = asked.error().message;
  }
  if (fault.empty()) {
    taken = stream_->Observe(*request_.sequence, question);
  } else {
    taken = stream_->RefuseObservation(*request_.sequence, std::move(fault));
  }
  return taken == Taken::kTaken ? stream_->Flush() : taken;
}

JsonSession::Taken JsonSession::TakeFlow() {
  std::string fault = request_.fault.empty() ? StrayFault() : request_.fault;
  if (fault.empty() && !request_.action) {
    fault = "action: missing; expected pause, resume, slow_down, speed_up or buffer_status";
  }
  if (!fault.empty()) {
    SayError("invalid_argument", fault);
    return Taken::kTaken;
  }
  request_.flow.action = *request_.action;
  return stream_->Flow(request_.flow);
}

JsonSession::Taken JsonSession::TakeRecall() {
  Recalled recalled{.request_id = request_.request_id};
  GatewayQuestion question;
  std::string fault = request_.fault.empty() ? StrayFault() : request_.fault;
  if (fault.empty()) {
    const Asked asked = AskJsonRecall(&request_, around_.clock->WallNs(),
                                      around_.spaces->FilterKeysOf(stream_->space().view()), &text_,
                                      &recalled.limits, &question);
    if (!asked) fault = asked.error().message;
  }
  if (!fault.empty()) {
    SayError("invalid_argument", fault, true);
    return Taken::kTaken;
  }
  const uint64_t number = recalls_asked_ + 1;
  if (stream_->Recall(number, question) == Taken::kNoRoom) return Taken::kNoRoom;
  recalls_asked_ = number;
  recalled.began_ns = around_.clock->MonotonicNs();
  recalls_.emplace(number, std::move(recalled));
  return Taken::kTaken;
}

JsonSession::Taken JsonSession::TakeClose() {
  is_closing_ = stream_->Close() == Taken::kTaken;
  return is_closing_ ? Taken::kTaken : Taken::kNoRoom;
}

// ---- What the client is told ----

bool JsonSession::Next(std::string* text) {
  while (texts_.empty() && stream_ && !ending_) {
    const auto event = stream_->Next();
    if (!event) break;
    Tell(*event);
  }
  if (texts_.empty()) return false;
  text->append(texts_.front());
  texts_.pop_front();
  return true;
}

void JsonSession::Tell(const StreamEvent& event) {
  switch (event.kind) {
    case StreamEvent::Kind::kOpened:
      session_text_ = SessionText(stream_->session());
      last_ = event.sequence;
      TellJsonOpened(session_text_, event, stream_->room(), Say());
      break;
    case StreamEvent::Kind::kAcked:
      last_ = std::max(last_, event.sequence);
      TellJsonAck(session_text_, event, around_.clock->WallNs(), Say());
      break;
    case StreamEvent::Kind::kRefused:
      if (event.is_consumed) last_ = std::max(last_, event.sequence);
      TellJsonAck(session_text_, event, 0, Say());
      TellJsonRefusal(session_text_, event, Say());
      break;
    case StreamEvent::Kind::kFlow:
      TellJsonFlow(session_text_, event, Say());
      break;
    case StreamEvent::Kind::kHits:
      TellHitsOf(event);
      break;
    case StreamEvent::Kind::kRecallRefused: {
      const auto recall = recalls_.extract(event.request);
      CHECK(!recall.empty(), "a refusal is of a recall that was asked");
      TellJsonError({.code = DescribeRefusal(event.reason).name,
                     .message = event.text,
                     .session = session_text_,
                     .request_id = recall.mapped().request_id,
                     .retry_after_ms = event.retry_after_ms},
                    Say());
      break;
    }
    case StreamEvent::Kind::kClosed:
      TellJsonClosed(session_text_, event.sequence, Say());
      ending_ = Ending::kNormal;
      break;
    case StreamEvent::Kind::kEnded:
      TellEnd(event);
      break;
  }
}

void JsonSession::TellHitsOf(const StreamEvent& event) {
  const auto recall = recalls_.find(event.request);
  CHECK(recall != recalls_.end(), "hits are of a recall that was asked");
  Recalled& recalled = recall->second;
  google::protobuf::RepeatedPtrField<v1::Memory> memories;
  TellHits(event.metric, event.hits, recalled.limits, &recalled.told, &memories);
  JsonResults results{.request_id = recalled.request_id,
                      .more_results = !event.is_last,
                      .snapshot = event.snapshot};
  v1::RecallMetadata metadata;
  if (event.is_last) {
    TellMetadata(recalled.told, around_.clock->MonotonicNs() - recalled.began_ns, &metadata);
    results.metadata = &metadata;
  }
  TellJsonResults(results, memories, Say());
  if (event.is_last) recalls_.erase(recall);
}

void JsonSession::TellEnd(const StreamEvent& event) {
  const bool goes_away = event.reason == RefusalReason::kShuttingDown;
  if (goes_away && !session_text_.empty()) {
    TellJsonClosed(session_text_, std::max(last_, event.sequence), Say());
    ending_ = Ending::kGoingAway;
    return;
  }
  TellJsonError({.code = DescribeRefusal(event.reason).name,
                 .message = event.text,
                 .session = session_text_,
                 .retry_after_ms = event.retry_after_ms},
                Say());
  const bool is_busy = HasEffect(event.reason, RefusalEffect::kWaits);
  ending_ = goes_away ? Ending::kGoingAway : is_busy ? Ending::kTryLater : Ending::kRefused;
}

void JsonSession::SayError(std::string_view code, std::string_view message, bool of_request) {
  TellJsonError({.code = code,
                 .message = message,
                 .session = session_text_,
                 .request_id = of_request ? std::string_view(request_.request_id) : ""},
                Say());
}

void JsonSession::SayHeartbeat() {
  if (texts_.size() >= kTextsAhead || ending_) return;
  TellJsonHeartbeat(session_text_, around_.clock->WallNs(), Say());
}

void JsonSession::GoAway() {
  if (!stream_) ending_ = Ending::kGoingAway;
}

}  // namespace engram
