#include "src/control/grpc_gateway.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include <google/protobuf/stubs/logging.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include "engram/v1/service.grpc.pb.h"
#include "src/control/grpc_call.h"
#include "src/control/grpc_status.h"
#include "src/control/grpc_streams.h"
#include "src/control/memory_calls.h"

namespace engram {

namespace {

constexpr const char* kServiceName = "engram.v1.EngramService";
constexpr const char* kLivenessName = "liveness";
// At the end calls are refused with UNAVAILABLE, which clients take as a word to try again
// elsewhere, for this long before the server goes: what reaches gRPC later it breaks off as
// CANCELLED.
constexpr auto kRefusing = std::chrono::milliseconds(100);
// Then, for answers that are on their way out.
constexpr auto kLastWords = std::chrono::milliseconds(500);

std::string NotServed(std::string_view method) {
  return std::string(method) +
         " is not served: this appliance serves Engram's streaming API, of which this version has "
         "Remember, Recall, Forget, Introspect, ObserveStream, MemoryStream and RecallStream";
}

// One unary call from its arrival to its answer. gRPC's thread makes it, checks the request and
// submits it; the gateway core's thread writes the response; OnDone, from gRPC again, ends it.
template <typename Request, typename Response>
class UnaryCall : public grpc::ServerUnaryReactor, public GatewayCall {
 public:
  UnaryCall(CallContext* context, grpc::ByteBuffer* response_bytes)
      : context_(context), response_bytes_(response_bytes) {}

  void Begin(const grpc::CallbackServerContext& grpc_context,
             const grpc::ByteBuffer& request_bytes) {
    began_ns_ = context_->clock->MonotonicNs();
    counted_ = context_->calls.Enter();
    if (!counted_) {
      Finish({grpc::StatusCode::UNAVAILABLE,
              std::string(DescribeRefusal(RefusalReason::kShuttingDown).text)});
      return;
    }
    if (!context_->serves.load(std::memory_order_acquire)) {
      Finish(RecoveringStatus(*context_));
      return;
    }
    if (auto read = ReadMessage(request_bytes, &request_); !read.ok()) {
      Finish(std::move(read));
      return;
    }
    const Asked asked = AskAll(grpc_context);
    if (!asked) {
      Finish(StatusOf(asked.error()));
      return;
    }
    question.deadline_ns = DeadlineNs(grpc_context, began_ns_);
    // Answered may come before Submit returns, from the other thread.
    if (!context_->door.Submit(this)) {
      Finish(BusyStatus("inbox_full: too many calls wait at the gateway",
                        context_->door.RetryAfterMs()));
    }
  }

  void Answered() override {
    if (answer.reason != RefusalReason::kNone) {
      Finish(RefusalStatus(answer.reason, RefusalMessage(question, answer, vector_field()),
                           answer.retry_after_ms));
      return;
    }
    Finish(Respond());
  }

  void OnCancel() override { context_->door.Cancel(this); }
  void OnDone() override {
    context_->unread.Remove(unread_bytes_);
    if (counted_) context_->calls.Leave();
    DropReference();
  }

 protected:
  virtual Asked Ask() = 0;
  virtual void Tell(Response* response) = 0;
  virtual std::string_view vector_field() const { return "vector"; }
  const Request& request() const { return request_; }
  // Of the question's space.
  std::span<const std::string> filter_keys() const {
    return context_->spaces->FilterKeysOf(question.space.view());
  }

  CallContext* const context_;
  int64_t began_ns_ = 0;

 private:
  Asked AskAll(const grpc::CallbackServerContext& grpc_context) {
    const auto metadata = SpaceOfMetadata(grpc_context);
    if (!metadata) return std::unexpected(metadata.error());
    const auto space = SpaceOfCall(request_.memory_space_id(), *metadata);
    if (!space) return std::unexpected(space.error());
    question.space = *space;
    return Ask();
  }

  grpc::Status Respond() {
    Response response;
    Tell(&response);
    // The call lives until the client has read its answer; what it was made of does not.
    answer.hits = {};
    answer.records = {};
    // What was stored or removed is told in any case, and never large.
    const size_t bytes = question.kind == CallKind::kObserve ? 0 : response.ByteSizeLong();
    if (!context_->unread.Add(bytes)) {
      return BusyStatus("answers_full: answers wait that clients do not read",
                        context_->door.RetryAfterMs());
    }
    unread_bytes_ = bytes;
    bool own_buffer = false;
    return grpc::SerializationTraits<Response>::Serialize(response, response_bytes_, &own_buffer);
  }

  Request request_;
  grpc::ByteBuffer* const response_bytes_;
  size_t unread_bytes_ = 0;
  bool counted_ = false;
};

class RememberCall final : public UnaryCall<v1::RememberRequest, v1::RememberResponse> {
 public:
  using UnaryCall::UnaryCall;

 private:
  Asked Ask() override {
    return AskRemember(request(), context_->clock->WallNs(), filter_keys(), &text_, &question);
  }
  void Tell(v1::RememberResponse* response) override { TellRemember(question, answer, response); }
  std::string_view vector_field() const override {
    return request().has_memory() ? "memory.embedding" : "episode.embedding";
  }

  CallText text_;
};

class RecallCall final : public UnaryCall<v1::RecallRequest, v1::RecallResponse> {
 public:
  using UnaryCall::UnaryCall;

 private:
  Asked Ask() override { return AskRecall(request(), filter_keys(), &text_, &limits_, &question); }
  void Tell(v1::RecallResponse* response) override {
    TellRecall(question, answer, limits_, context_->clock->MonotonicNs() - began_ns_, response);
  }
  std::string_view vector_field() const override { return "cue.embedding.vector"; }

  CallText text_;
  RecallLimits limits_;
};

class ForgetCall final : public UnaryCall<v1::ForgetRequest, v1::ForgetResponse> {
 public:
  using UnaryCall::UnaryCall;

 private:
  Asked Ask() override { return AskForget(request(), &question); }
  void Tell(v1::ForgetResponse* response) override { TellForget(question, answer, response); }
};

class IntrospectCall final : public UnaryCall<v1::IntrospectRequest, v1::IntrospectResponse> {
 public:
  using UnaryCall::UnaryCall;

 private:
  Asked Ask() override { return AskIntrospect(request(), &question); }
  void Tell(v1::IntrospectResponse* response) override {
    TellIntrospect(request(), question, answer, *context_->counters, response);
  }
};

// A stream that ends as it begins.
template <typename Reactor>
class RefusedStream final : public Reactor {
 public:
  explicit RefusedStream(std::string_view method) {
    this->Finish({grpc::StatusCode::UNIMPLEMENTED, NotServed(method)});
  }
  void OnDone() override { delete this; }
};

// Requests come as bytes: see ReadMessage.
template <typename Service>
using UnaryAsBytes = v1::EngramService::WithRawCallbackMethod_Remember<
    v1::EngramService::WithRawCallbackMethod_Recall<v1::EngramService::WithRawCallbackMethod_Forget<
        v1::EngramService::WithRawCallbackMethod_Introspect<Service>>>>;
template <typename Service>
using StreamsAsBytes = v1::EngramService::WithRawCallbackMethod_ObserveStream<
    v1::EngramService::WithRawCallbackMethod_MemoryStream<
        v1::EngramService::WithRawCallbackMethod_RecallStream<Service>>>;

class EngramService final
    : public StreamsAsBytes<
          UnaryAsBytes<v1::EngramService::WithCallbackMethod_Stream<v1::EngramService::Service>>> {
 public:
  explicit EngramService(CallContext* context) : context_(context) {}

  grpc::ServerUnaryReactor* Remember(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override {
    return Begin<RememberCall>(*context, *request, response);
  }
  grpc::ServerUnaryReactor* Recall(grpc::CallbackServerContext* context,
                                   const grpc::ByteBuffer* request,
                                   grpc::ByteBuffer* response) override {
    return Begin<RecallCall>(*context, *request, response);
  }
  grpc::ServerUnaryReactor* Forget(grpc::CallbackServerContext* context,
                                   const grpc::ByteBuffer* request,
                                   grpc::ByteBuffer* response) override {
    return Begin<ForgetCall>(*context, *request, response);
  }
  grpc::ServerUnaryReactor* Introspect(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override {
    return Begin<IntrospectCall>(*context, *request, response);
  }

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* ObserveStream(
      grpc::CallbackServerContext* context) override {
    return BeginObserveStream(context_, *context, StreamKind::kObserve);
  }
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* MemoryStream(
      grpc::CallbackServerContext* context) override {
    return BeginObserveStream(context_, *context, StreamKind::kMemory);
  }
  grpc::ServerWriteReactor<grpc::ByteBuffer>* RecallStream(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) override {
    return BeginRecallStream(context_, *context, *request);
  }
  grpc::ServerWriteReactor<v1::StreamResponse>* Stream(grpc::CallbackServerContext*,
                                                       const v1::StreamRequest*) override {
    return new RefusedStream<grpc::ServerWriteReactor<v1::StreamResponse>>("Stream");
  }

 private:
  template <typename Call>
  grpc::ServerUnaryReactor* Begin(const grpc::CallbackServerContext& context,
                                  const grpc::ByteBuffer& request, grpc::ByteBuffer* response) {
    auto* call = new Call(context_, response);
    call->Begin(context, request);
    return call;
  }

  CallContext* const context_;
};

// Engram's other calls, and any that nobody knows.
class OtherCalls final : public grpc::CallbackGenericService {
  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override {
    return new RefusedStream<grpc::ServerGenericBidiReactor>(context->method());
  }
};

// While it lives, threads that this thread starts run on `cpus`.
class ThreadsOn {
 public:
  explicit ThreadsOn(const std::vector<int>& cpus) {
    restore_ = sched_getaffinity(0, sizeof(before_), &before_) == 0;
    cpu_set_t wanted;
    CPU_ZERO(&wanted);
    for (const int cpu : cpus) CPU_SET(static_cast<size_t>(cpu), &wanted);
    if (!cpus.empty()) pinned_ = sched_setaffinity(0, sizeof(wanted), &wanted) == 0;
  }
  ~ThreadsOn() {
    if (restore_) sched_setaffinity(0, sizeof(before_), &before_);
  }
  ThreadsOn(const ThreadsOn&) = delete;
  ThreadsOn& operator=(const ThreadsOn&) = delete;
  bool pinned() const { return pinned_; }

 private:
  cpu_set_t before_{};
  bool restore_ = false;
  bool pinned_ = true;
};

class GrpcServer final : public GrpcGateway {
 public:
  GrpcServer(const GrpcOptions& options, GatewayDoor door, Clock* clock,
             const CounterCatalogue* counters, const SpaceCatalogue* spaces, StreamNetwork* streams)
      : endpoint_(options.endpoint),
        context_{.door = std::move(door),
                 .clock = clock,
                 .counters = counters,
                 .spaces = spaces,
                 .streams = streams,
                 .unread = UnreadAnswers(options.unread_bytes, options.unread_small_bytes),
                 .calls = {},
                 .recovering = options.recovering,
                 .serves = !options.recovering},
        service_(&context_) {}
  ~GrpcServer() override { Shutdown(0); }

  Result<void> Listen(const GrpcOptions& options) {
    const ThreadsOn threads(options.cpus);
    if (!threads.pinned()) {
      return Fail(ErrorCode::kInvalidArgument,
                  "cores.control: gRPC's threads could not be pinned there; choose processors that "
                  "this process may use");
    }
    // What it would write about a request that it cannot read, the caller is told.
    google::protobuf::SetLogHandler(nullptr);
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort(endpoint_.ToString(), grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    builder.RegisterCallbackGenericService(&other_calls_);
    builder.SetMaxReceiveMessageSize(options.max_request_bytes);
    // A scroll with embeddings is as large as it is.
    builder.SetMaxSendMessageSize(-1);
    builder.SetResourceQuota(grpc::ResourceQuota("gateway").Resize(options.request_memory_bytes));
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_calls_of_connection);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, options.keepalive_ms);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, options.keepalive_timeout_ms);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    // Else a second daemon would share the port and get some of the calls.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    // Only reflection is served by threads that wait; one is enough.
    builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, 1);
    builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, 1);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port == 0) {
      return Fail(ErrorCode::kAlreadyExists,
                  "listen.grpc: cannot listen on " + endpoint_.ToString() +
                      ": another program has it, or this machine has no such address. Choose "
                      "another, or \"\" to switch gRPC off");
    }
    endpoint_.port = static_cast<uint16_t>(port);
    server_->GetHealthCheckService()->SetServingStatus(kLivenessName, true);
    SetHealth(!context_.recovering);
    return {};
  }

  void SetServing() override {
    context_.serves.store(true, std::memory_order_release);
    SetHealth(true);
  }

  const Endpoint& endpoint() const override { return endpoint_; }

  void Shutdown(int64_t timeout_ns) override {
    if (server_ == nullptr) return;
    server_->GetHealthCheckService()->Shutdown();
    context_.calls.Close();
    context_.calls.WaitForNone(std::chrono::nanoseconds(timeout_ns));
    std::this_thread::sleep_for(kRefusing);
    // What is left are calls that are being told so, streams without end such as health's Watch,
    // and calls that took too long. Returns at once where there are none.
    server_->Shutdown(std::chrono::system_clock::now() + kLastWords);
    server_.reset();
  }

 private:
  // "" is what a probe asks for that names no service.
  void SetHealth(bool serves) {
    server_->GetHealthCheckService()->SetServingStatus("", serves);
    server_->GetHealthCheckService()->SetServingStatus(kServiceName, serves);
  }

  Endpoint endpoint_;
  CallContext context_;
  EngramService service_;
  OtherCalls other_calls_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace

bool GrpcGateway::IsBuilt() { return true; }

Result<std::unique_ptr<GrpcGateway>> GrpcGateway::Start(const GrpcOptions& options,
                                                        GatewayDoor door, Clock* clock,
                                                        const CounterCatalogue* counters,
                                                        const SpaceCatalogue* spaces,
                                                        StreamNetwork* streams) {
  auto server =
      std::make_unique<GrpcServer>(options, std::move(door), clock, counters, spaces, streams);
  if (auto listening = server->Listen(options); !listening) {
    return std::unexpected(listening.error());
  }
  return server;
}

}  // namespace engram
