#include "src/control/grpc_streams.h"

#include <charconv>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "engram/v1/service.pb.h"
#include "src/control/grpc_status.h"
#include "src/control/grpc_stream.h"
#include "src/control/memory_calls.h"
#include "src/control/memory_codec.h"
#include "src/core/clock.h"

namespace engram {

namespace {

// The version of the streams' own rules, beyond Engram's.
constexpr uint32_t kProtocolVersion = 1;

// A session's id as text: 16 hexadecimal digits.
std::string SessionText(SessionId session) {
  std::array<char, 16> digits;
  digits.fill('0');
  std::array<char, 16> text;
  const auto end = std::to_chars(text.data(), text.data() + text.size(), session.value(), 16).ptr;
  const auto size = static_cast<size_t>(end - text.data());
  std::copy(text.data(), end, digits.data() + digits.size() - size);
  return {digits.data(), digits.size()};
}

// Nothing where it is no id that a server gave.
std::optional<SessionId> ReadSession(std::string_view text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  const bool whole = error == std::errc() && end == text.data() + text.size() && value != 0;
  return whole ? std::optional(SessionId(value)) : std::nullopt;
}

v1::StreamStatus::State StateOf(RefusalReason reason) {
  if (reason == RefusalReason::kPaused) return v1::StreamStatus::STATE_PAUSED;
  return HasEffect(reason, RefusalEffect::kWaits) ? v1::StreamStatus::STATE_OVERLOADED
                                                  : v1::StreamStatus::STATE_ERROR;
}

// One recall of a stream that is under way.
struct StreamedRecall {
  uint64_t request_id = 0;  // the client's
  RecallLimits limits{};
  RecallTold told{};
  int64_t began_ns = 0;
};

// What `event`, which is kHits, has for the recall. True: that was all.
bool TellRecallHits(const StreamEvent& event, StreamedRecall* recall, int64_t now_ns,
                    v1::StreamingRecallResponse* response) {
  response->set_request_id(recall->request_id);
  TellHits(event.metric, event.hits, recall->limits, &recall->told, response->mutable_results());
  response->set_more_results(!event.is_last);
  response->set_snapshot_sequence(event.snapshot);
  if (event.is_last) {
    TellMetadata(recall->told, now_ns - recall->began_ns, response->mutable_metadata());
  }
  return event.is_last;
}

// ObserveStream, or MemoryStream, which recalls as well.
class ObserveStream final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                            public GrpcStream {
 public:
  ObserveStream(CallContext* context, StreamKind kind) : GrpcStream(context), kind_(kind) {}

  void Begin(const grpc::CallbackServerContext& grpc_context) {
    if (const auto metadata = SpaceOfMetadata(grpc_context)) {
      metadata_space_ = *metadata;
    } else {
      End(StatusOf(metadata.error()));
    }
    StartRead(&request_bytes_);
    GrpcStream::Begin();
  }

  void OnReadDone(bool ok) override {
    (ok ? has_request_ : has_read_all_).store(true, std::memory_order_release);
    Pump();
  }
  void OnWriteDone(bool ok) override { WriteDone(ok); }
  void OnCancel() override { Cancel(); }
  void OnDone() override { Done(); }

 private:
  using Taken = SessionStream::Taken;

  void BeginWrite(const grpc::ByteBuffer* response, grpc::WriteOptions options) override {
    StartWrite(response, options);
  }
  void BeginFinish(grpc::Status status) override {
    grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>::Finish(std::move(status));
  }

  // ---- What the client asks ----

  bool Take() override {
    if (has_request_.load(std::memory_order_acquire)) {
      if (!is_read_ && !Read()) return false;
      if (TakeRequest() == Taken::kNoRoom) return false;
      if (is_ending()) return false;
      is_read_ = false;
      next_of_batch_ = 0;
      has_request_.store(false, std::memory_order_relaxed);
      StartRead(&request_bytes_);
      return true;
    }
    if (!has_read_all_.load(std::memory_order_acquire) || is_closing_) return false;
    // It says no more, and hears what is settled.
    if (!has_begun_) {
      End(grpc::Status::OK);
      return false;
    }
    is_closing_ = stream().Close() == Taken::kTaken;
    return is_closing_;
  }

  bool Read() {
    request_.Clear();
    if (auto read = ReadMessage(request_bytes_, &request_); !read.ok()) {
      End(std::move(read));
      return false;
    }
    is_read_ = true;
    received_unix_ns_ = context()->clock->WallNs();
    return true;
  }

  Taken TakeRequest() {
    if (request_.has_init()) return TakeInit();
    if (!has_begun_) {
      End({grpc::StatusCode::FAILED_PRECONDITION,
           "init: not sent; expected as the first message of a stream"});
      return Taken::kTaken;
    }
    // What init asked is not answered yet.
    if (!stream().is_open()) return Taken::kNoRoom;
    if (is_closing_) return Taken::kTaken;
    switch (request_.operation_case()) {
      case v1::ObservationRequest::kObservation:
        return TakeObservation(request_.sequence_number(), request_.observation());
      case v1::ObservationRequest::kBatch:
        return TakeBatch();
      case v1::ObservationRequest::kFlow:
        return TakeFlow();
      case v1::ObservationRequest::kRecall:
        return TakeRecall();
      case v1::ObservationRequest::kClose:
        says_closed_ = true;
        is_closing_ = stream().Close() == Taken::kTaken;
        return is_closing_ ? Taken::kTaken : Taken::kNoRoom;
      default:
        SayFault("bad_request",
                 "operation: not set; expected observation, batch, flow, recall or close");
        return Taken::kTaken;
    }
  }

  Taken TakeInit() {
    if (has_begun_) {
      End({grpc::StatusCode::FAILED_PRECONDITION,
           "init: sent twice; a stream is one session, open another stream"});
      return Taken::kTaken;
    }
    const v1::StreamInit& init = request_.init();
    const auto space = SpaceOfCall(request_.memory_space_id(), metadata_space_);
    if (!space) {
      End(StatusOf(space.error()));
      return Taken::kTaken;
    }
    StreamOpening opening{.space = *space,
                          .goes_back = init.protocol_version() >= 1,
                          .cumulative = init.protocol_version() >= 1 && init.cumulative_acks(),
                          .hears_flow = init.enable_backpressure(),
                          .priority = init.priority() == v1::SESSION_PRIORITY_HIGH
                                          ? Priority::kHigh
                                          : Priority::kNormal,
                          .client_buffer = init.client_buffer_size()};
    if (!v1::SessionPriority_IsValid(init.priority())) {
      End(StatusOf({"init.priority: " + std::to_string(init.priority()) +
                    "; expected a SessionPriority, 0 or 1"}));
      return Taken::kTaken;
    }
    if (!request_.session_id().empty()) {
      const auto session = ReadSession(request_.session_id());
      if (!session) {
        End(RefusalStatus(RefusalReason::kSessionExpired,
                          "session_expired: session_id " + Quoted(request_.session_id()) +
                              " is not known; begin a new one with an empty session_id",
                          0));
        return Taken::kTaken;
      }
      opening.session = *session;
    }
    has_begun_ = true;
    stream().Open(opening);
    return Taken::kTaken;
  }

  // What later messages say of space and session has to be the stream's.
  std::string StrayFault() const {
    if (!request_.memory_space_id().empty() && request_.memory_space_id() != space_text_) {
      return "memory_space_id: " + Quoted(request_.memory_space_id()) +
             "; this stream's session is of the space " + Quoted(space_text_);
    }
    if (!request_.session_id().empty() && request_.session_id() != session_text_) {
      return "session_id: " + Quoted(request_.session_id()) + "; this stream's is " +
             Quoted(session_text_);
    }
    return {};
  }
  Taken TakeObservation(Sequence sequence, const v1::Episode& episode) {
    std::string fault = StrayFault();
    if (fault.empty()) {
      const Asked asked = AskEpisode(episode, received_unix_ns_, &text_, &question_);
      if (asked) {
        const Taken taken = stream().Observe(sequence, question_);
        return taken == Taken::kTaken && request_.has_observation() ? stream().Flush() : taken;
      }
      fault = asked.error().message;
    }
    const Taken taken = stream().RefuseObservation(sequence, std::move(fault));
    return taken == Taken::kTaken && request_.has_observation() ? stream().Flush() : taken;
  }

  // Goes on where there was no room.
  Taken TakeBatch() {
    const auto& episodes = request_.batch().observations();
    for (; next_of_batch_ < episodes.size(); ++next_of_batch_) {
      const Sequence sequence = request_.sequence_number() + static_cast<Sequence>(next_of_batch_);
      if (TakeObservation(sequence, episodes[next_of_batch_]) == Taken::kNoRoom) {
        // What has room is not kept back with what has none.
        (void)stream().Flush();
        return Taken::kNoRoom;
      }
    }
    return stream().Flush();
  }

  Taken TakeFlow() {
    const v1::FlowControl& flow = request_.flow();
    if (!v1::FlowControl::Action_IsValid(flow.action()) ||
        flow.action() == v1::FlowControl::ACTION_UNSPECIFIED) {
      SayFault("bad_flow",
               "flow.action: " + std::to_string(flow.action()) + "; expected an Action, 1 to 5");
      return Taken::kTaken;
    }
    // The frame's actions are Engram's.
    static_assert(static_cast<int>(FlowAction::kPause) == v1::FlowControl::ACTION_PAUSE &&
                  static_cast<int>(FlowAction::kBufferStatus) ==
                      v1::FlowControl::ACTION_BUFFER_STATUS);
    FlowRequestBody action;
    action.action = static_cast<FlowAction>(flow.action());
    action.buffer_remaining = flow.buffer_remaining();
    action.preferred_rate = flow.preferred_rate();
    return stream().Flow(action);
  }

  Taken TakeRecall() {
    const v1::StreamingRecallRequest& recall = request_.recall();
    std::string fault = StrayFault();
    if (kind_ != StreamKind::kMemory) fault = "recall: ObserveStream takes none; use MemoryStream";
    if (fault.empty() && !recall.memory_space_id().empty() &&
        recall.memory_space_id() != space_text_) {
      fault = "recall.memory_space_id: " + Quoted(recall.memory_space_id()) +
              "; this stream's session is of the space " + Quoted(space_text_);
    }
    StreamedRecall asking{.request_id = recall.request_id()};
    GatewayQuestion question;
    if (fault.empty()) {
      const auto keys = context()->spaces->FilterKeysOf(space_text_);
      const Asked asked = AskStreamingRecall(recall, context()->clock->WallNs(), keys, &text_,
                                             &asking.limits, &question);
      if (!asked) fault = asked.error().message;
    }
    if (!fault.empty()) {
      v1::StreamingRecallResponse* answer = response_.mutable_recall_result();
      answer->set_request_id(recall.request_id());
      answer->mutable_error()->set_code("invalid_argument");
      answer->mutable_error()->set_message(std::move(fault));
      SayResponse(0);
      return Taken::kTaken;
    }
    const uint64_t number = recalls_asked_ + 1;
    if (stream().Recall(number, question) == Taken::kNoRoom) return Taken::kNoRoom;
    recalls_asked_ = number;
    asking.began_ns = context()->clock->MonotonicNs();
    recalls_.emplace(number, asking);
    return Taken::kTaken;
  }

  // ---- What the client is told ----

  void Tell(const StreamEvent& event) override {
    switch (event.kind) {
      case StreamEvent::Kind::kOpened:
        TellOpened(event);
        break;
      case StreamEvent::Kind::kAcked:
        TellAck(event, v1::ObservationAck::STATUS_ACCEPTED);
        break;
      case StreamEvent::Kind::kRefused:
        TellAck(event, v1::ObservationAck::STATUS_REJECTED);
        TellRefusal(event);
        break;
      case StreamEvent::Kind::kFlow:
        TellFlow(event);
        break;
      case StreamEvent::Kind::kFlowRefused:
        SayFault(std::string(DescribeRefusal(event.reason).name),
                 "flow: " + std::string(event.text));
        break;
      case StreamEvent::Kind::kHits:
        TellHitsOf(event);
        break;
      case StreamEvent::Kind::kRecallRefused:
        TellRecallRefusal(event);
        break;
      case StreamEvent::Kind::kClosed:
        if (says_closed_) {
          response_.mutable_status()->set_state(v1::StreamStatus::STATE_CLOSED);
          SayResponse(event.sequence);
        }
        End(grpc::Status::OK);
        break;
      case StreamEvent::Kind::kEnded:
        End(RefusalStatus(
            event.reason,
            std::string(DescribeRefusal(event.reason).name) + ": " + std::string(event.text),
            event.retry_after_ms));
        break;
    }
  }

  void TellOpened(const StreamEvent& event) {
    session_text_ = SessionText(stream().session());
    space_text_ = stream().space().view();
    v1::StreamInitAck* ack = response_.mutable_init_ack();
    ack->set_session_id(session_text_);
    ack->set_initial_sequence(event.sequence);
    v1::StreamCapabilities* capabilities = ack->mutable_capabilities();
    capabilities->set_queue_capacity(
        static_cast<uint32_t>(std::min<uint64_t>(stream().room(), UINT32_MAX)));
    capabilities->set_supports_backpressure(true);
    capabilities->set_supports_snapshot_isolation(true);
    capabilities->set_protocol_version(kProtocolVersion);
    SayResponse(event.sequence);
  }

  void TellAck(const StreamEvent& event, v1::ObservationAck::Status status) {
    v1::ObservationAck* ack = response_.mutable_ack();
    ack->set_status(status);
    ack->set_memory_id(std::string(event.id));
    if (status != v1::ObservationAck::STATUS_REJECTED) {
      *ack->mutable_committed_at() = ToTimestamp(context()->clock->WallNs());
    }
    SayResponse(event.sequence);
  }

  void TellRefusal(const StreamEvent& event) {
    v1::StreamStatus* status = response_.mutable_status();
    status->set_state(StateOf(event.reason));
    status->set_message(std::string(event.text));
    status->set_code(std::string(DescribeRefusal(event.reason).name));
    status->set_retry_after_ms(event.retry_after_ms);
    status->set_expected_sequence(event.expected);
    SayResponse(event.sequence);
  }

  void TellFlow(const StreamEvent& event) {
    v1::StreamStatus* status = response_.mutable_status();
    status->set_state(static_cast<v1::StreamStatus::State>(event.flow.state));
    status->set_queue_depth(event.flow.queue_depth);
    status->set_queue_capacity(event.flow.queue_capacity);
    status->set_pressure(event.flow.pressure);
    status->set_preferred_rate(event.flow.preferred_rate);
    status->set_retry_after_ms(event.flow.retry_after_ms);
    SayResponse(event.sequence);
  }

  void TellHitsOf(const StreamEvent& event) {
    const auto recall = recalls_.find(event.request);
    CHECK(recall != recalls_.end(), "hits are of a recall that was asked");
    if (TellRecallHits(event, &recall->second, context()->clock->MonotonicNs(),
                       response_.mutable_recall_result())) {
      recalls_.erase(recall);
    }
    SayResponse(0);
  }

  void TellRecallRefusal(const StreamEvent& event) {
    const auto recall = recalls_.find(event.request);
    CHECK(recall != recalls_.end(), "a refusal is of a recall that was asked");
    v1::StreamingRecallResponse* answer = response_.mutable_recall_result();
    answer->set_request_id(recall->second.request_id);
    answer->mutable_error()->set_code(std::string(DescribeRefusal(event.reason).name));
    answer->mutable_error()->set_message(std::string(event.text));
    answer->mutable_error()->set_retry_after_ms(event.retry_after_ms);
    recalls_.erase(recall);
    SayResponse(0);
  }

  // Of a message that is not about an observation.
  void SayFault(std::string code, std::string message) {
    v1::StreamStatus* status = response_.mutable_status();
    status->set_state(v1::StreamStatus::STATE_ERROR);
    status->set_code(std::move(code));
    status->set_message(std::move(message));
    SayResponse(0);
  }

  void SayResponse(Sequence sequence) {
    response_.set_session_id(session_text_);
    response_.set_sequence_number(sequence);
    *response_.mutable_server_timestamp() = ToTimestamp(context()->clock->WallNs());
    Say(response_);
    response_.clear_result();
  }

  const StreamKind kind_;
  std::string metadata_space_;
  grpc::ByteBuffer request_bytes_;
  std::atomic<bool> has_request_{false};   // in request_bytes_
  std::atomic<bool> has_read_all_{false};  // the client says no more

  // Of whoever pumps. One message each way, used again and again.
  v1::ObservationRequest request_;
  v1::ObservationResponse response_;
  bool is_read_ = false;  // request_ is what request_bytes_ says
  int next_of_batch_ = 0;
  int64_t received_unix_ns_ = 0;
  CallText text_;
  GatewayQuestion question_;
  bool has_begun_ = false;    // init was sent on
  bool is_closing_ = false;   // close was sent on
  bool says_closed_ = false;  // the client asked for it
  std::string session_text_;
  std::string space_text_;
  uint64_t recalls_asked_ = 0;
  std::unordered_map<uint64_t, StreamedRecall> recalls_;  // by our own number
};

// One recall, told as it is found.
class RecallStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer>, public GrpcStream {
 public:
  explicit RecallStream(CallContext* context) : GrpcStream(context) {}

  void Begin(const grpc::CallbackServerContext& grpc_context,
             const grpc::ByteBuffer& request_bytes) {
    recall_.began_ns = context()->clock->MonotonicNs();
    if (auto read = ReadMessage(request_bytes, &request_); !read.ok()) {
      End(std::move(read));
    } else if (const Asked asked = Ask(grpc_context); !asked) {
      End(StatusOf(asked.error()));
    }
    GrpcStream::Begin();
  }

  void OnWriteDone(bool ok) override { WriteDone(ok); }
  void OnCancel() override { Cancel(); }
  void OnDone() override { Done(); }

 private:
  void BeginWrite(const grpc::ByteBuffer* response, grpc::WriteOptions options) override {
    StartWrite(response, options);
  }
  void BeginFinish(grpc::Status status) override {
    grpc::ServerWriteReactor<grpc::ByteBuffer>::Finish(std::move(status));
  }

  Asked Ask(const grpc::CallbackServerContext& grpc_context) {
    const auto metadata = SpaceOfMetadata(grpc_context);
    if (!metadata) return std::unexpected(metadata.error());
    const auto space = SpaceOfCall(request_.memory_space_id(), *metadata);
    if (!space) return std::unexpected(space.error());
    space_ = *space;
    return AskStreamingRecall(request_, context()->clock->WallNs(),
                              context()->spaces->FilterKeysOf(space_.view()), &text_,
                              &recall_.limits, &question_);
  }

  bool Take() override {
    if (!std::exchange(has_begun_, true)) {
      stream().Open({.space = space_, .has_session = false, .hears_flow = false});
      return true;
    }
    if (!stream().is_open() || was_asked_) return false;
    was_asked_ = stream().Recall(1, question_) == SessionStream::Taken::kTaken;
    return was_asked_;
  }

  void Tell(const StreamEvent& event) override {
    switch (event.kind) {
      case StreamEvent::Kind::kHits:
        response_.Clear();
        if (TellRecallHits(event, &recall_, context()->clock->MonotonicNs(), &response_)) {
          End(grpc::Status::OK);
        }
        Say(response_);
        break;
      case StreamEvent::Kind::kRecallRefused:
      case StreamEvent::Kind::kEnded:
        End(RefusalStatus(
            event.reason,
            std::string(DescribeRefusal(event.reason).name) + ": " + std::string(event.text),
            event.retry_after_ms));
        break;
      default:
        break;
    }
  }

  v1::StreamingRecallRequest request_;
  v1::StreamingRecallResponse response_;
  SpaceName space_;
  CallText text_;
  GatewayQuestion question_;
  StreamedRecall recall_;
  bool has_begun_ = false;
  bool was_asked_ = false;
};

}  // namespace

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* BeginObserveStream(
    CallContext* context, const grpc::CallbackServerContext& grpc_context, StreamKind kind) {
  auto* stream = new ObserveStream(context, kind);
  stream->Begin(grpc_context);
  // NOLINTNEXTLINE(clang-analyzer-cplusplus.NewDelete): gRPC lets go of it later.
  return stream;
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* BeginRecallStream(
    CallContext* context, const grpc::CallbackServerContext& grpc_context,
    const grpc::ByteBuffer& request) {
  auto* stream = new RecallStream(context);
  stream->Begin(grpc_context, request);
  // NOLINTNEXTLINE(clang-analyzer-cplusplus.NewDelete): likewise.
  return stream;
}

}  // namespace engram
