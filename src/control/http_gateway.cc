// Boost's assertions come to assertion_failed, below.
#define BOOST_ENABLE_ASSERT_HANDLER

#include "src/control/http_gateway.h"

#include <pthread.h>

#include <chrono>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "src/control/http_connection.h"
#include "src/control/threads_on.h"

namespace boost {

// One is not ours to hold: a read of Beast 1.74 that waits for a close to end asserts that it was
// aborted, and where the client does not answer the close it has timed out
// (websocket/impl/read.hpp, 114). What follows treats both alike.
void assertion_failed(const char* expression, const char*, const char* file, long line) {
  if (std::string_view(expression) == "ec == net::error::operation_aborted") return;
  engram::CheckFailed(file, static_cast<int>(line), expression, "an assertion of Boost holds");
}
void assertion_failed_msg(const char* expression, const char* message, const char*,
                          const char* file, long line) {
  engram::CheckFailed(file, static_cast<int>(line), expression, message);
}

}  // namespace boost

namespace engram {

namespace {

// Before the next one is accepted, where there was no descriptor for the last.
constexpr auto kAcceptPause = std::chrono::milliseconds(100);

class HttpServer final : public HttpGateway {
 public:
  HttpServer(const HttpOptions& options, GatewayDoor door, Clock* clock,
             const SpaceCatalogue* spaces, StreamNetwork* streams)
      : endpoint_(options.endpoint),
        context_(options, std::move(door), clock, spaces, streams),
        acceptor_(context_.io),
        accept_pause_(context_.io),
        work_(asio::make_work_guard(context_.io)) {}
  ~HttpServer() override { Shutdown(0); }

  Result<void> Listen() {
    if (const error_code error = Bind()) {
      return Fail(ErrorCode::kAlreadyExists,
                  "listen.http: cannot listen on " + endpoint_.ToString() + ": " + error.message() +
                      ". Choose another address or port, or \"\" to switch HTTP off");
    }
    const ThreadsOn threads(context_.options.cpus);
    if (!threads.pinned()) {
      return Fail(ErrorCode::kInvalidArgument,
                  "cores.control: HTTP's thread could not be pinned there; choose processors that "
                  "this process may use");
    }
    thread_ = std::thread([this] {
      pthread_setname_np(pthread_self(), "http");
      context_.io.run();
    });
    asio::post(context_.io, [this] { Accept(); });
    return {};
  }

  void SetServing() override { context_.serves.store(true, std::memory_order_release); }
  const Endpoint& endpoint() const override { return endpoint_; }

  void Shutdown(int64_t timeout_ns) override {
    if (!thread_.joinable()) return;
    context_.open.Close();
    asio::post(context_.io, [this] {
      error_code ignored;
      acceptor_.close(ignored);
      accept_pause_.cancel();
      context_.goes_away = true;
      ForEachConnection([](BeastConnection* each) { each->GoAway(); });
    });
    const auto none_left = [this](std::chrono::nanoseconds timeout) {
      return context_.open.WaitForNone(timeout);
    };
    if (!none_left(std::chrono::nanoseconds(timeout_ns))) {
      asio::post(context_.io,
                 [this] { ForEachConnection([](BeastConnection* each) { each->Cut(); }); });
    }
    // Calls and pipes let go of what is cut soon, as their cores still poll.
    while (!none_left(std::chrono::seconds(1))) {
    }
    work_.reset();
    thread_.join();
  }

 private:
  error_code Bind() {
    error_code error;
    const auto address = asio::ip::make_address(endpoint_.host, error);
    if (error) return error;
    const tcp::endpoint wanted(address, endpoint_.port);
    acceptor_.open(wanted.protocol(), error);
    if (!error) acceptor_.set_option(tcp::acceptor::reuse_address(true), error);
    if (!error) acceptor_.bind(wanted, error);
    if (!error) acceptor_.listen(asio::socket_base::max_listen_connections, error);
    if (!error) endpoint_.port = acceptor_.local_endpoint(error).port();
    return error;
  }

  void Accept() {
    acceptor_.async_accept([this](error_code error, TcpSocket socket) {
      if (error == asio::error::operation_aborted || !acceptor_.is_open()) return;
      if (error) {
        accept_pause_.expires_after(kAcceptPause);
        accept_pause_.async_wait([this](error_code cancelled) {
          if (!cancelled) Accept();
        });
        return;
      }
      Welcome(std::move(socket));
      Accept();
    });
  }

  void Welcome(TcpSocket socket) {
    error_code ignored;
    const bool has_room = context_.connections.size() < context_.options.max_connections;
    if (!has_room || !context_.open.Enter()) {
      static constexpr std::string_view kFull =
          "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n"
          "Connection: close\r\n\r\n";
      socket.non_blocking(true, ignored);
      socket.write_some(asio::buffer(kFull.data(), kFull.size()), ignored);
      return;
    }
    socket.set_option(tcp::no_delay(true), ignored);
    std::make_shared<HttpConnection>(&context_, std::move(socket))->Begin();
  }

  // One may end another.
  template <typename Do>
  void ForEachConnection(const Do& what) {
    std::vector<std::shared_ptr<BeastConnection>> connections;
    for (BeastConnection* each : context_.connections) {
      connections.push_back(each->shared_from_this());
    }
    for (const auto& each : connections) what(each.get());
  }

  Endpoint endpoint_;
  HttpContext context_;
  asio::basic_socket_acceptor<tcp, asio::io_context::executor_type> acceptor_;
  Timer accept_pause_;
  asio::executor_work_guard<asio::io_context::executor_type> work_;
  std::thread thread_;
};

}  // namespace

bool HttpGateway::IsBuilt() { return true; }

Result<std::unique_ptr<HttpGateway>> HttpGateway::Start(const HttpOptions& options,
                                                        GatewayDoor door, Clock* clock,
                                                        const SpaceCatalogue* spaces,
                                                        StreamNetwork* streams) {
  auto server = std::make_unique<HttpServer>(options, std::move(door), clock, spaces, streams);
  if (auto listening = server->Listen(); !listening) return std::unexpected(listening.error());
  return server;
}

}  // namespace engram
