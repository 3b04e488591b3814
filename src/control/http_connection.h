#pragma once

#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "src/control/http_origin.h"
#include "src/control/space_order.h"
#include "src/control/websocket_connection.h"

namespace engram {

// One connection of HTTP/1.1: one request after the other, each with its answer, until it ends or
// becomes a WebSocket.
//
// Invariants: a request is read, or waits for its answer, or its answer is written. A call that was
// submitted keeps the connection until it is answered.
class HttpConnection final : public BeastConnection, public HttpCaller {
 public:
  HttpConnection(HttpContext* context, TcpSocket socket)
      : BeastConnection(context),
        stream_(std::move(socket)),
        memory_(context),
        order_timer_(context->io) {}

  void Begin() { ReadHeader(context()->options.handshake_ms); }

  void GoAway() override {
    // Between two requests; one that is under way is answered.
    if (is_idle_) Cut();
  }
  void Cut() override {
    beast::close_socket(stream_);
    order_timer_.cancel();
    FinishOrder();
    if (call_) context()->door.Cancel(call_->get());
  }

  // From the gateway core's thread.
  void OnAnswered() override {
    asio::post(context()->io, [self = std::move(kept_by_call_)] { self->SeeAnswered(); });
  }

 protected:
  void Pump() override {
    if (order_ == nullptr) return;
    if (const auto outcome = order_->Look()) {
      answer_ = HttpCalls::TellOrder(*order_, *outcome);
      FinishOrder();
    }
  }
  void PipeGone() override {
    order_timer_.cancel();
    Respond(std::exchange(answer_, {}));
  }

 private:
  using Parser = http::request_parser<http::string_body>;
  static constexpr uint32_t kHeaderBytes = 16 << 10;
  static constexpr size_t kLeftoverBytes = size_t{64} << 10;
  static constexpr int kLingerMs = 2'000;

  std::shared_ptr<HttpConnection> Kept() { return Self<HttpConnection>(); }
  std::string_view Header(std::string_view name) {
    const auto value = parser_->get()[beast::string_view(name.data(), name.size())];
    return {value.data(), value.size()};
  }

  // ---- A request ----

  void ReadHeader(int within_ms) {
    parser_.emplace();
    parser_->header_limit(kHeaderBytes);
    parser_->body_limit(context()->options.max_request_bytes);
    is_idle_ = true;
    stream_.expires_after(std::chrono::milliseconds(within_ms));
    http::async_read_header(stream_, in_, *parser_, [self = Kept()](error_code error, size_t) {
      self->is_idle_ = false;
      self->SeeHeader(error);
    });
  }

  void SeeHeader(error_code error) {
    if (error) {
      RefuseUnread(error);
      return;
    }
    // An origin that is served is told so to the browser.
    origin_ = Header("Origin");
    if (!IsServedOrigin(origin_, Header("Host"), context()->options.origins)) {
      const std::string origin = std::exchange(origin_, {});
      RefuseUnread(HttpErrorAnswer(403, "bad_origin",
                                   "Origin: " + Quoted(origin) +
                                       "; expected a page of this host or of localhost. List it "
                                       "in listen.http_origins"));
      return;
    }
    if (websocket::is_upgrade(parser_->get())) {
      Upgrade();
      return;
    }
    ReadBody();
  }

  void ReadBody() {
    const auto length = parser_->content_length();
    const size_t most = context()->options.max_request_bytes;
    const bool has_body = !parser_->is_done();
    if (has_body && !memory_.Set(std::min<size_t>(length ? *length : most, most))) {
      RefuseUnread(HttpErrorAnswer(429, "requests_full", "requests take too much memory; try again",
                                   context()->door.RetryAfterMs()));
      return;
    }
    stream_.expires_after(std::chrono::milliseconds(context()->options.exchange_ms));
    if (has_body && beast::iequals(parser_->get()[http::field::expect], "100-continue")) {
      continue_.version(11);
      continue_.result(http::status::continue_);
      http::async_write(stream_, continue_, [self = Kept()](error_code error, size_t) {
        if (!error) self->ReadRest();
      });
      return;
    }
    ReadRest();
  }

  void ReadRest() {
    http::async_read(stream_, in_, *parser_, [self = Kept()](error_code error, size_t) {
      if (error) {
        self->RefuseUnread(error);
      } else {
        self->Serve();
      }
    });
  }

  // What came cannot be read: it is said why, where somebody listens.
  void RefuseUnread(error_code error) {
    if (error == http::error::header_limit || error == http::error::buffer_overflow) {
      RefuseUnread(HttpErrorAnswer(431, "header_too_large",
                                   "header: over " + std::to_string(kHeaderBytes) + " bytes"));
    } else if (error == http::error::body_limit) {
      RefuseUnread(HttpErrorAnswer(413, "body_too_large",
                                   "body: expected up to " +
                                       std::to_string(context()->options.max_request_bytes) +
                                       " bytes"));
    } else if (error.category() == http::make_error_code(http::error::bad_method).category() &&
               error != http::error::end_of_stream && error != http::error::partial_message) {
      RefuseUnread(HttpErrorAnswer(400, "bad_request", "not HTTP/1.1: " + error.message()));
    } else {
      Cut();
    }
  }
  void RefuseUnread(HttpAnswer answer) {
    closes_ = true;
    Respond(std::move(answer));
  }

  // ---- The answer ----

  void Serve() {
    auto& request = parser_->get();
    closes_ = !request.keep_alive();
    space_.clear();
    for (const auto& field : request) {
      if (!beast::iequals(field.name_string(), "x-memory-space")) continue;
      const std::string value(field.value());
      if (!space_.empty() && value != space_) {
        Respond(HttpErrorAnswer(400, "invalid_argument",
                                "x-memory-space: given twice with different values; expected one "
                                "space"));
        return;
      }
      space_ = value;
    }
    const std::string_view target(request.target().data(), request.target().size());
    HttpRequest asked{.method = MethodOf(request.method()), .target = target, .space = space_};
    if (asked.method == HttpMethod::kOptions) {
      Respond({.status = 204, .content_type = {}});
      return;
    }
    if (target.substr(0, target.find('?')) == kStreamPath) {
      Respond(HttpErrorAnswer(426, "upgrade_required",
                              "this is a WebSocket: ask for an upgrade (RFC 6455)"));
      return;
    }
    const size_t bytes = request.body().size();
    request.body().append(JsonReader::kPaddingBytes, '\0');
    asked.body = std::string_view(request.body()).substr(0, bytes);
    HttpPlan plan = context()->http_calls.Route(asked, context()->serves.load());
    std::visit([this](auto& each) { Do(std::move(each)); }, plan);
  }

  static HttpMethod MethodOf(http::verb verb) {
    switch (verb) {
      case http::verb::get:
        return HttpMethod::kGet;
      case http::verb::post:
        return HttpMethod::kPost;
      case http::verb::delete_:
        return HttpMethod::kDelete;
      case http::verb::options:
        return HttpMethod::kOptions;
      default:
        return HttpMethod::kOther;
    }
  }

  void Do(HttpAnswer answer) { Respond(std::move(answer)); }

  void Do(HttpCallPtr call) {
    if (context()->goes_away) {
      RespondGoingAway();
      return;
    }
    call_.emplace(std::move(call));
    HttpCall* const asked = call_->get();
    asked->caller = this;
    asked->question.deadline_ns =
        context()->clock->MonotonicNs() + context()->options.call_ms * kNanosPerMilli;
    kept_by_call_ = Kept();
    stream_.expires_never();
    // OnAnswered may come before Submit returns, from the other thread.
    if (context()->door.Submit(asked)) return;
    kept_by_call_.reset();
    call_.reset();
    Respond(HttpErrorAnswer(429, "inbox_full", "too many calls wait at the gateway",
                            context()->door.RetryAfterMs()));
  }

  void SeeAnswered() {
    HttpAnswer answer = (*call_)->Tell(context()->clock->MonotonicNs());
    call_.reset();
    Respond(std::move(answer));
  }

  void Do(std::unique_ptr<SpaceOrder> order) {
    StreamPipe* pipe = ConnectPipe();
    if (pipe == nullptr) {
      Respond(HttpErrorAnswer(429, "connection_limit", "too many streams are open",
                              context()->door.RetryAfterMs()));
      return;
    }
    stream_.expires_never();
    order_ = std::move(order);
    order_timer_.expires_after(std::chrono::milliseconds(context()->options.call_ms));
    order_timer_.async_wait([self = Kept()](error_code error) {
      if (!error) self->FinishOrder();
    });
    answer_ = HttpErrorAnswer(504, "deadline_passed",
                              "it is not done yet, and may be done later all the same");
    order_->Begin(pipe);
    Pump();
  }
  // The answer goes out once the pipe is given back.
  void FinishOrder() { order_.reset(); }

  void RespondGoingAway() {
    closes_ = true;
    const RefusalInfo info = DescribeRefusal(RefusalReason::kShuttingDown);
    Respond(HttpErrorAnswer(503, info.name, info.text));
  }

  void Respond(HttpAnswer answer) {
    if (!stream_.socket().is_open()) return;
    if (!context()->unread.Add(answer.body.size())) {
      answer = HttpErrorAnswer(429, "answers_full", "answers wait that clients do not read",
                               context()->door.RetryAfterMs());
    } else {
      unread_bytes_ = answer.body.size();
    }
    closes_ = closes_ || context()->goes_away;
    response_ = {};
    response_.version(11);
    response_.result(answer.status);
    response_.keep_alive(!closes_);
    if (!answer.content_type.empty()) Set(http::field::content_type, answer.content_type);
    if (!answer.allow.empty()) Set(http::field::allow, answer.allow);
    if (answer.retry_after_ms > 0) {
      Set(http::field::retry_after, std::to_string((answer.retry_after_ms + 999) / 1'000));
    }
    if (!origin_.empty()) {
      Set(http::field::access_control_allow_origin, origin_);
      Set(http::field::vary, "Origin");
      Set(http::field::access_control_allow_methods, "GET, POST, DELETE");
      Set(http::field::access_control_allow_headers, "content-type, x-memory-space");
    }
    response_.body() = std::move(answer.body);
    response_.prepare_payload();
    stream_.expires_after(std::chrono::milliseconds(context()->options.exchange_ms));
    http::async_write(stream_, response_,
                      [self = Kept()](error_code error, size_t) { self->SeeWritten(error); });
  }
  void Set(http::field field, std::string_view value) {
    response_.set(field, beast::string_view(value.data(), value.size()));
  }

  void SeeWritten(error_code error) {
    context()->unread.Remove(std::exchange(unread_bytes_, 0));
    response_ = {};
    parser_.reset();
    CHECK(memory_.Set(0), "less is taken");
    if (error) {
      Cut();
    } else if (closes_ || context()->goes_away) {
      Linger();
    } else {
      ReadHeader(context()->options.keepalive_ms);
    }
  }

  // What the client still sends is read: a socket that is closed over it would reset the
  // connection, and the answer might be lost.
  void Linger() {
    error_code ignored;
    stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
    stream_.expires_after(std::chrono::milliseconds(kLingerMs));
    ReadOver(kMaxJsonBytes);
  }
  void ReadOver(size_t most) {
    in_.clear();
    stream_.async_read_some(in_.prepare(kLeftoverBytes),
                            [self = Kept(), most](error_code error, size_t bytes) {
                              if (error || bytes > most) {
                                self->Cut();
                              } else {
                                self->ReadOver(most - bytes);
                              }
                            });
  }

  // ---- WebSocket ----

  void Upgrade() {
    const auto& request = parser_->get();
    const std::string_view text(request.target().data(), request.target().size());
    const auto target = HttpTarget::Read(text);
    if (!target || target->path != kStreamPath) {
      RefuseUnread(HttpErrorAnswer(404, "not_found", "path: " + Quoted(text) + " is no WebSocket"));
      return;
    }
    if (!context()->serves.load()) {
      RefuseUnread(HttpErrorAnswer(503, "recovering",
                                   "recovering: " + context()->options.recovering(), 1'000));
      return;
    }
    const std::string_view header = Header("x-memory-space");
    const std::string_view query = target->Value("space");
    if (!header.empty() && !query.empty() && header != query) {
      RefuseUnread(
          HttpErrorAnswer(400, "invalid_argument",
                          "space: " + Quoted(query) + "; x-memory-space says " + Quoted(header)));
      return;
    }
    if (!context()->open.Enter()) {
      RespondGoingAway();
      return;
    }
    const std::string space(header.empty() ? query : header);
    const auto connection = std::make_shared<WebSocketConnection>(
        context(), std::move(stream_),
        WebSocketConnection::Request(http::request_header<>(request.base())), space);
    connection->Begin();
  }

  static constexpr std::string_view kStreamPath = "/v1/stream";

  TcpStream stream_;
  beast::flat_buffer in_{kLeftoverBytes};
  std::optional<Parser> parser_;
  RequestMemory memory_;
  std::string origin_;
  std::string space_;
  bool is_idle_ = false;  // no request is under way
  bool closes_ = false;   // after the answer
  http::response<http::empty_body> continue_;
  http::response<http::string_body> response_;
  size_t unread_bytes_ = 0;

  std::optional<HttpCallPtr> call_;
  // Set before the call is submitted, taken by OnAnswered.
  std::shared_ptr<HttpConnection> kept_by_call_;
  std::unique_ptr<SpaceOrder> order_;
  Timer order_timer_;
  HttpAnswer answer_;  // of the order, while its pipe is given back
};

}  // namespace engram
