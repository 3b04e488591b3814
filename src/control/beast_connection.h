#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core.hpp>

#include "src/control/call_count.h"
#include "src/control/gateway_inbox.h"
#include "src/control/http_calls.h"
#include "src/control/http_gateway.h"
#include "src/control/json_request.h"
#include "src/core/check.h"
#include "src/core/stream_network.h"

// What the connections of the HTTP gateway have in common. Included by http_gateway.cc alone, as
// parsing Beast takes many seconds.

namespace engram {

namespace asio = boost::asio;
namespace beast = boost::beast;
using beast::error_code;
using tcp = asio::ip::tcp;
using TcpSocket = asio::basic_stream_socket<tcp, asio::io_context::executor_type>;
using TcpStream = beast::basic_stream<tcp, asio::io_context::executor_type>;
using Timer = asio::basic_waitable_timer<std::chrono::steady_clock,
                                         asio::wait_traits<std::chrono::steady_clock>,
                                         asio::io_context::executor_type>;

class BeastConnection;

// What every connection needs of its surroundings; lives as long as the server.
struct HttpContext {
  HttpContext(const HttpOptions& with_options, GatewayDoor with_door, Clock* with_clock,
              const SpaceCatalogue* with_spaces, StreamNetwork* with_streams)
      : options(with_options),
        door(std::move(with_door)),
        clock(with_clock),
        spaces(with_spaces),
        streams(with_streams),
        http_calls({.clock = clock,
                    .spaces = spaces,
                    .reader = &reader,
                    .metrics = options.metrics,
                    .recovering = options.recovering}),
        unread(options.unread_bytes, options.unread_small_bytes),
        serves(!options.recovering) {}

  const HttpOptions options;
  GatewayDoor door;
  Clock* const clock;
  const SpaceCatalogue* const spaces;
  StreamNetwork* const streams;
  JsonReader reader;
  HttpCalls http_calls;
  UnreadAnswers unread;
  CallCount open;  // connections
  std::atomic<bool> serves;

  // The thread's alone.
  std::unordered_set<BeastConnection*> connections;
  size_t request_bytes = 0;  // that requests take
  bool goes_away = false;

  asio::io_context io{1};
};

// Memory that a request takes, counted for all connections together. The thread's alone.
class RequestMemory {
 public:
  explicit RequestMemory(HttpContext* context) : context_(context) {}
  ~RequestMemory() { (void)Set(0); }
  RequestMemory(const RequestMemory&) = delete;
  RequestMemory& operator=(const RequestMemory&) = delete;

  // False where all requests together would take too much; it stays as it was then.
  [[nodiscard]] bool Set(size_t bytes) {
    const size_t all = context_->request_bytes - bytes_ + bytes;
    if (bytes > bytes_ && all > context_->options.request_memory_bytes) return false;
    context_->request_bytes = all;
    bytes_ = bytes;
    return true;
  }

 private:
  HttpContext* const context_;
  size_t bytes_ = 0;
};

// A connection of a client, from its first byte on. It is kept by the handlers of what it has under
// way, and by its pipe until OnGone.
//
// Thread safety: OnReady and OnGone are called by the network's thread, all else by the gateway's.
class BeastConnection : public std::enable_shared_from_this<BeastConnection>, public StreamClient {
 public:
  // The connection was counted as open.
  explicit BeastConnection(HttpContext* context) : context_(context) {
    context_->connections.insert(this);
  }
  ~BeastConnection() override {
    context_->connections.erase(this);
    context_->open.Leave();
  }
  BeastConnection(const BeastConnection&) = delete;
  BeastConnection& operator=(const BeastConnection&) = delete;

  void OnReady() override {
    // One is on its way, and sees what this one would.
    if (is_roused_.exchange(true, std::memory_order_acq_rel)) return;
    asio::post(context_->io, [self = shared_from_this()] {
      // Not a store: what came before it was set is seen by Pump.
      self->is_roused_.exchange(false, std::memory_order_acq_rel);
      self->Pump();
    });
  }
  void OnGone() override {
    asio::post(context_->io, [self = std::move(kept_by_pipe_)] { self->PipeGone(); });
  }

  // The server ends: nothing new is begun, and the connection ends when it may.
  virtual void GoAway() = 0;
  // At once.
  virtual void Cut() = 0;

 protected:
  // There may be something to do with the pipe.
  virtual void Pump() = 0;
  virtual void PipeGone() {}
  // One at a time: not between this and PipeGone. nullptr: too many are open.
  StreamPipe* ConnectPipe() {
    CHECK(kept_by_pipe_ == nullptr, "one pipe at a time");
    kept_by_pipe_ = shared_from_this();
    StreamPipe* pipe = context_->streams->Connect(this);
    if (pipe == nullptr) kept_by_pipe_.reset();
    return pipe;
  }
  HttpContext* context() const { return context_; }
  template <typename Derived>
  std::shared_ptr<Derived> Self() {
    return std::static_pointer_cast<Derived>(shared_from_this());
  }

 private:
  HttpContext* const context_;
  std::atomic<bool> is_roused_{false};
  // Set before the network knows of the client, taken by OnGone.
  std::shared_ptr<BeastConnection> kept_by_pipe_;
};

}  // namespace engram
