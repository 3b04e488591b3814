#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/network.h"
#include "tests/support/random_bytes.h"

// What the tests of the socket networks share: a client, a handler that keeps what happened, and
// the network of one backend between them. A suite runs for both backends:
//   using NetworkCloseTest = NetworkTest;
//   INSTANTIATE_TEST_SUITE_P(Backends, NetworkCloseTest, kBothBackends, BackendName);

namespace engram {

// A plain non-blocking client socket.
class Peer {
 public:
  explicit Peer(const Endpoint& endpoint, int send_buffer_bytes = 0, int receive_buffer_bytes = 0) {
    const bool is_v6 = endpoint.host.find(':') != std::string::npos;
    fd_ = socket(is_v6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    EXPECT_GE(fd_, 0) << std::strerror(errno);
    if (send_buffer_bytes > 0) {
      setsockopt(fd_, SOL_SOCKET, SO_SNDBUF, &send_buffer_bytes, sizeof(int));
    }
    if (receive_buffer_bytes > 0) {
      setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer_bytes, sizeof(int));
    }
    int result = 0;
    if (is_v6) {
      sockaddr_in6 address{};
      address.sin6_family = AF_INET6;
      address.sin6_port = htons(endpoint.port);
      inet_pton(AF_INET6, endpoint.host.c_str(), &address.sin6_addr);
      result = connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address));
    } else {
      sockaddr_in address{};
      address.sin_family = AF_INET;
      address.sin_port = htons(endpoint.port);
      inet_pton(AF_INET, endpoint.host.c_str(), &address.sin_addr);
      result = connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address));
    }
    refused_ = result != 0 && errno != EINPROGRESS;
  }
  Peer(Peer&& other) noexcept { *this = std::move(other); }
  Peer& operator=(Peer&& other) noexcept {
    std::swap(fd_, other.fd_);
    std::swap(received, other.received);
    std::swap(ended, other.ended);
    std::swap(was_reset, other.was_reset);
    std::swap(refused_, other.refused_);
    return *this;
  }
  ~Peer() { Close(); }

  // Returns how many bytes the kernel took.
  size_t Write(std::span<const std::byte> bytes) {
    const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent < 0 && (errno == ECONNRESET || errno == EPIPE)) was_reset = true;
    return sent < 0 ? 0 : static_cast<size_t>(sent);
  }
  // Reads what is there, at most `most`; true when anything happened.
  bool Read(size_t most = SIZE_MAX) {
    bool progress = false;
    std::byte buffer[65536];
    while (fd_ >= 0 && !ended && !was_reset && most > 0) {
      const ssize_t count = recv(fd_, buffer, std::min(sizeof(buffer), most), 0);
      if (count < 0) {
        if (errno == ECONNRESET || errno == EPIPE) was_reset = progress = true;
        break;
      }
      progress = true;
      if (count == 0) ended = true;
      received.insert(received.end(), buffer, buffer + count);
      most -= static_cast<size_t>(count);
    }
    return progress;
  }
  void ShutdownWrite() { shutdown(fd_, SHUT_WR); }
  void Close() {
    if (fd_ >= 0) close(std::exchange(fd_, -1));
  }
  void Reset() {
    const linger now{.l_onoff = 1, .l_linger = 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
    Close();
  }
  bool refused() const { return refused_; }
  bool over() const { return ended || was_reset || refused_; }

  Bytes received;
  bool ended = false;
  bool was_reset = false;

 private:
  int fd_ = -1;
  bool refused_ = false;
};

// Reads from all of them what is there; true when anything happened.
inline bool ReadAll(std::vector<Peer>& peers) {
  bool progress = false;
  for (Peer& peer : peers) progress = peer.Read() || progress;
  return progress;
}

// Keeps what happened and answers by function.
class Recorder : public NetworkHandler {
 public:
  using Key = std::pair<uint32_t, uint32_t>;
  static Key KeyOf(ConnectionId id) { return {id.index, id.generation}; }

  void OnAccept(ConnectionId connection) override {
    ++events;
    EXPECT_GE(connection.generation, 1u);
    EXPECT_FALSE(seen.contains(KeyOf(connection))) << "an id is used for one connection only";
    seen[KeyOf(connection)];
    accepted.push_back(connection);
    if (on_accept) on_accept(connection);
  }
  void OnReceive(ConnectionId connection, std::span<const std::byte> bytes) override {
    ++events;
    EXPECT_TRUE(seen.contains(KeyOf(connection)));
    EXPECT_FALSE(closed.contains(KeyOf(connection))) << "OnClosed is the last event";
    EXPECT_FALSE(bytes.empty());
    Bytes& all = seen[KeyOf(connection)];
    all.insert(all.end(), bytes.begin(), bytes.end());
    if (on_receive) on_receive(connection, bytes);
  }
  void OnClosed(ConnectionId connection, CloseCause cause) override {
    ++events;
    EXPECT_TRUE(seen.contains(KeyOf(connection)));
    EXPECT_FALSE(closed.contains(KeyOf(connection))) << "a connection closes once";
    closed[KeyOf(connection)] = cause;
    if (on_closed) on_closed(connection);
  }
  bool IsClosed(ConnectionId id) const { return closed.contains(KeyOf(id)); }
  CloseCause CauseOf(ConnectionId id) const { return closed.at(KeyOf(id)); }
  const Bytes& ReceivedFrom(ConnectionId id) const { return seen.at(KeyOf(id)); }

  int events = 0;
  std::vector<ConnectionId> accepted;
  std::map<Key, Bytes> seen;
  std::map<Key, CloseCause> closed;
  std::function<void(ConnectionId)> on_accept;
  std::function<void(ConnectionId, std::span<const std::byte>)> on_receive;
  std::function<void(ConnectionId)> on_closed;
};

class NetworkTest : public testing::TestWithParam<NetworkBackend> {
 protected:
  static NetworkOptions SmallOptions() {
    NetworkOptions options;
    options.max_connections = 64;
    options.receive_buffer_bytes = 16 * 1024;
    options.receive_buffers = 16;
    return options;
  }

  void SetUp() override {
    if (GetParam() != NetworkBackend::kUring) return;
    const auto probe = CreateUringNetwork(SmallOptions());
    if (!probe) GTEST_SKIP() << "io_uring cannot be used here: " << probe.error().message;
  }

  // A network that listens on a free port of the loopback.
  void Begin(const NetworkOptions& options = SmallOptions(),
             const std::string& host = "127.0.0.1") {
    auto created = CreateNetwork(GetParam(), options, nullptr);
    ASSERT_TRUE(created.has_value()) << created.error().message;
    network_ = std::move(*created);
    auto endpoint = network_->Listen({.host = host, .port = 0});
    ASSERT_TRUE(endpoint.has_value()) << endpoint.error().message;
    ASSERT_NE(endpoint->port, 0);
    endpoint_ = *endpoint;
    ASSERT_TRUE(network_->Start().has_value());
  }

  // Polls both sides until `done`; false when nothing has happened for long.
  bool Until(const std::function<bool()>& done, const std::function<bool()>& pump = {}) {
    for (int idle = 0; idle < 20'000;) {
      if (done()) return true;
      const int events = network_->Poll(handler_, kBudget);
      const bool pumped = pump && pump();
      if (events > 0 || pumped) {
        idle = 0;
      } else {
        network_->Wait(kNanosPerMilli);
        ++idle;
      }
    }
    return done();
  }
  // Polls `times` times, idle or not.
  void Spin(int times) {
    for (int i = 0; i < times; ++i) {
      if (network_->Poll(handler_, kBudget) == 0) network_->Wait(kNanosPerMilli / 10);
    }
  }

  // Connects one client and returns the server's name for it.
  ConnectionId Accept(std::vector<Peer>& peers, int send_buffer_bytes = 0,
                      int receive_buffer_bytes = 0) {
    const size_t before = handler_.accepted.size();
    peers.emplace_back(endpoint_, send_buffer_bytes, receive_buffer_bytes);
    EXPECT_TRUE(Until([&] { return handler_.accepted.size() > before; }));
    return handler_.accepted.back();
  }
  void EchoAll() {
    handler_.on_receive = [this](ConnectionId id, std::span<const std::byte> bytes) {
      EXPECT_TRUE(network_->Send(id, bytes));
    };
  }
  uint64_t Count(NetworkCounter counter) const { return network_->counters()[counter].Read(); }

  static constexpr int kBudget = 64;
  // The handler outlives the network, which may still have events for it.
  Recorder handler_;
  std::unique_ptr<Network> network_;
  Endpoint endpoint_;
};

inline std::string BackendName(const testing::TestParamInfo<NetworkBackend>& info) {
  return info.param == NetworkBackend::kUring ? "IoUring" : "Epoll";
}
inline const auto kBothBackends = testing::Values(NetworkBackend::kUring, NetworkBackend::kPosix);

}  // namespace engram
