#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include <boost/beast/http.hpp>
#include <boost/beast/websocket.hpp>

#include "src/control/beast_connection.h"
#include "src/control/json_session.h"

namespace engram {

namespace http = beast::http;
namespace websocket = beast::websocket;

// One WebSocket (RFC 6455). Its first frame says what it is: with text each message is a
// JsonSession's, with binary what comes goes into a pipe, and what comes out of it goes back, as it
// is.
//
// One read and one write are under way at most. Nothing is read while a request waits for room,
// nothing taken out of the pipe while a message is written; so what a client does not read stays
// with the ingress core, which bounds it.
class WebSocketConnection final : public BeastConnection {
 public:
  using Request = http::request<http::empty_body>;

  // `space`: what the upgrade says of it; empty: nothing.
  WebSocketConnection(HttpContext* context, TcpStream stream, Request request,
                      std::string_view space)
      : BeastConnection(context),
        ws_(std::move(stream)),
        request_(std::move(request)),
        session_({.clock = context->clock,
                  .spaces = context->spaces,
                  .reader = &context->reader,
                  .connect = [this] { return ConnectPipe(); }},
                 space),
        memory_(context),
        heartbeat_(context->io) {}

  void Begin() {
    const HttpOptions& options = context()->options;
    beast::get_lowest_layer(ws_).expires_never();
    ws_.set_option(websocket::stream_base::timeout{
        .handshake_timeout = std::chrono::milliseconds(options.handshake_ms),
        .idle_timeout = std::chrono::milliseconds(options.keepalive_ms),
        .keep_alive_pings = true});
    ws_.read_message_max(options.max_request_bytes);
    ws_.auto_fragment(false);
    ws_.async_accept(request_, [self = Self<WebSocketConnection>()](error_code error) {
      if (error) {
        self->Finish();
        return;
      }
      self->request_ = {};
      if (self->context()->goes_away) self->GoAway();
      self->Read();
    });
  }

  void GoAway() override {
    if (kind_ == Kind::kJson) {
      session_.GoAway();
      Pump();
    } else if (kind_ == Kind::kUnknown) {
      BeginClose(JsonSession::Ending::kGoingAway);
    }
    // A binary one is told by the ingress core, which ends the pipe.
  }
  void Cut() override { Finish(); }

 protected:
  void Pump() override {
    if (is_finished_) return;
    if (kind_ == Kind::kBinary) {
      FromPipe();
      ToPipe();
      return;
    }
    // What came may make room without a word to the client.
    Write();
    session_.TakeAgain();
    Shrink();
    Write();
    if (session_.takes() && !is_reading_) Read();
  }

 private:
  enum class Kind : uint8_t { kUnknown, kJson, kBinary };
  static constexpr size_t kReadBytes = size_t{64} << 10;
  // What an idle connection keeps of each of its buffers.
  static constexpr size_t kKeptBytes = size_t{16} << 10;
  // Of a message, that one call hands to the pipe.
  static constexpr size_t kPipeBytes = size_t{32} << 10;

  void Read() {
    if (is_reading_ || is_finished_ || is_closing_) return;
    is_reading_ = true;
    // Room for what is there, not for what is announced.
    ws_.async_read_some(in_, std::min(ws_.read_size_hint(in_), kReadBytes),
                        [self = Self<WebSocketConnection>()](error_code error, size_t) {
                          self->is_reading_ = false;
                          self->SeeRead(error);
                        });
  }

  void SeeRead(error_code error) {
    if (error) {
      // While it closes, that is how the peer's word comes.
      if (!is_closing_) Finish();
      return;
    }
    if (is_closing_ || is_finished_) return;
    if (!memory_.Set(in_.capacity())) {
      BeginClose(JsonSession::Ending::kTryLater);
      return;
    }
    if (kind_ == Kind::kUnknown && !BeginKind()) return;
    if (ws_.got_text() != (kind_ == Kind::kJson)) {
      BeginClose(JsonSession::Ending::kMixed);
    } else if (kind_ == Kind::kBinary) {
      ToPipe();
    } else if (!ws_.is_message_done()) {
      Read();
    } else {
      TakeText();
    }
  }

  bool BeginKind() {
    if (ws_.got_text()) {
      kind_ = Kind::kJson;
      SetHeartbeat();
      return true;
    }
    kind_ = Kind::kBinary;
    pipe_ = ConnectPipe();
    if (pipe_ == nullptr) BeginClose(JsonSession::Ending::kTryLater);
    return pipe_ != nullptr;
  }

  void Finish() {
    if (std::exchange(is_finished_, true)) return;
    heartbeat_.cancel();
    session_.Abandon();
    if (pipe_ != nullptr && !is_writing_) std::exchange(pipe_, nullptr)->Close();
    beast::close_socket(beast::get_lowest_layer(ws_));
  }

  void BeginClose(JsonSession::Ending ending) {
    if (is_finished_ || std::exchange(is_closing_, true)) return;
    ws_.async_close(static_cast<uint16_t>(ending),
                    [self = Self<WebSocketConnection>()](error_code) { self->Finish(); });
  }

  void SeeWritten(error_code error) {
    is_writing_ = false;
    if (out_.capacity() > kKeptBytes) out_ = {};
    if (error) Finish();
    // It waited for what it wrote.
    if (is_finished_ && pipe_ != nullptr) std::exchange(pipe_, nullptr)->Close();
    Pump();
  }

  // ---- JSON ----

  void TakeText() {
    const size_t bytes = in_.size();
    in_.prepare(JsonReader::kPaddingBytes);
    session_.Take({static_cast<const char*>(in_.data().data()), bytes});
    in_.consume(bytes);
    Pump();
  }

  // While a request waits the buffer stays, and stands for the memory that the request takes.
  void Shrink() {
    if (session_.is_waiting() || is_reading_ || in_.size() > 0 || in_.capacity() <= kKeptBytes) {
      return;
    }
    in_.shrink_to_fit();
    CHECK(memory_.Set(in_.capacity()), "less is taken");
  }

  void Write() {
    if (is_writing_ || is_closing_) return;
    out_.clear();
    if (!session_.Next(&out_)) {
      if (const auto ending = session_.ending()) BeginClose(*ending);
      return;
    }
    is_writing_ = true;
    ws_.text(true);
    ws_.async_write(asio::buffer(out_), [self = Self<WebSocketConnection>()](
                                            error_code error, size_t) { self->SeeWritten(error); });
  }

  void SetHeartbeat() {
    heartbeat_.expires_after(std::chrono::milliseconds(context()->options.heartbeat_ms));
    heartbeat_.async_wait([self = Self<WebSocketConnection>()](error_code error) {
      if (error || self->is_finished_) return;
      self->session_.SayHeartbeat();
      self->Pump();
      self->SetHeartbeat();
    });
  }

  // ---- Binary ----

  // What was read; then the next is.
  void ToPipe() {
    if (pipe_ == nullptr || is_finished_) return;
    while (in_.size() > 0) {
      const auto* bytes = static_cast<const std::byte*>(in_.data().data());
      const std::array<std::span<const std::byte>, 1> part{
          std::span(bytes, std::min(in_.size(), kPipeBytes))};
      if (pipe_->Write(part)) {
        in_.consume(part[0].size());
      } else if (pipe_->ended()) {
        // Nobody takes it any more; what is to be read still is written.
        in_.consume(in_.size());
      } else if (pipe_->AwaitRoom(part[0].size())) {
        return;
      }
    }
    Read();
  }

  void FromPipe() {
    if (pipe_ == nullptr || is_writing_ || is_closing_ || is_finished_) return;
    const std::span<const std::byte> bytes = pipe_->Peek();
    if (bytes.empty()) {
      if (!pipe_->ended()) return;
      BeginClose(context()->goes_away ? JsonSession::Ending::kGoingAway
                                      : JsonSession::Ending::kNormal);
      return;
    }
    is_writing_ = true;
    ws_.binary(true);
    ws_.async_write(
        asio::buffer(bytes.data(), bytes.size()),
        [self = Self<WebSocketConnection>(), size = bytes.size()](error_code error, size_t) {
          self->pipe_->Consume(size);
          self->SeeWritten(error);
        });
  }

  websocket::stream<TcpStream, false> ws_;
  Request request_;  // until it is accepted
  JsonSession session_;
  RequestMemory memory_;
  Timer heartbeat_;
  Kind kind_ = Kind::kUnknown;
  bool is_reading_ = false;
  bool is_writing_ = false;
  bool is_closing_ = false;
  bool is_finished_ = false;
  StreamPipe* pipe_ = nullptr;  // of a binary one
  // One message, or of a binary one what is on its way to the pipe.
  beast::flat_buffer in_{kMaxJsonBytes + JsonReader::kPaddingBytes};
  std::string out_;  // the message that is written
};

}  // namespace engram
