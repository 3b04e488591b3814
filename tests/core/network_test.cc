#include "src/core/network.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "src/core/clock.h"

namespace engram {
namespace {

using Bytes = std::vector<std::byte>;

Bytes RandomBytes(uint64_t seed, size_t count) {
  std::mt19937_64 random(seed);
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

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

std::string BackendName(const testing::TestParamInfo<NetworkBackend>& info) {
  return info.param == NetworkBackend::kUring ? "IoUring" : "Epoll";
}
INSTANTIATE_TEST_SUITE_P(Backends, NetworkTest,
                         testing::Values(NetworkBackend::kUring, NetworkBackend::kPosix),
                         BackendName);

TEST_P(NetworkTest, NamesItself) {
  Begin();
  EXPECT_EQ(network_->backend(), GetParam() == NetworkBackend::kUring ? "io_uring" : "epoll");
}

TEST_P(NetworkTest, EchoesOnTwoConnectionsApart) {
  Begin();
  EchoAll();
  std::vector<Peer> peers;
  const ConnectionId first = Accept(peers);
  const ConnectionId second = Accept(peers);
  EXPECT_NE(first, second);
  for (int round = 0; round < 20; ++round) {
    const Bytes a = RandomBytes(1000 + round, 10 + 97 * round);
    const Bytes b = RandomBytes(2000 + round, 3 + 31 * round);
    peers[0].received.clear();
    peers[1].received.clear();
    ASSERT_EQ(peers[0].Write(a), a.size());
    ASSERT_EQ(peers[1].Write(b), b.size());
    ASSERT_TRUE(Until([&] { return peers[0].received == a && peers[1].received == b; },
                      [&] { return peers[0].Read() | peers[1].Read(); }));
  }
  EXPECT_TRUE(Until([&] { return network_->SendBacklog(first) == 0; }));
  EXPECT_TRUE(Until([&] { return network_->SendBacklog(second) == 0; }));
  EXPECT_EQ(Count(NetworkCounter::kConnectionsAccepted), 2u);
  EXPECT_EQ(Count(NetworkCounter::kBytesReceived), Count(NetworkCounter::kBytesSent));
}

TEST_P(NetworkTest, LargeTransfersBothWaysKeepEveryByte) {
  NetworkOptions options = SmallOptions();
  options.receive_buffer_bytes = 5000;  // Cuts unevenly.
  options.receive_buffers = 4;          // Runs out of buffers again and again.
  Begin(options);
  EchoAll();
  std::vector<Peer> peers;
  constexpr size_t kPeers = 3;
  std::vector<Bytes> sent;
  std::vector<size_t> written(kPeers, 0);
  for (size_t i = 0; i < kPeers; ++i) {
    Accept(peers);
    sent.push_back(RandomBytes(i, (size_t{4} << 20) + 12'345 * i));
  }
  std::mt19937_64 random(7);
  ASSERT_TRUE(Until(
      [&] {
        for (size_t i = 0; i < kPeers; ++i) {
          if (peers[i].received.size() < sent[i].size()) return false;
        }
        return true;
      },
      [&] {
        bool progress = false;
        for (size_t i = 0; i < kPeers; ++i) {
          const size_t left = sent[i].size() - written[i];
          const size_t chunk = std::min(left, 1 + random() % 100'000);
          const size_t took =
              chunk == 0 ? 0 : peers[i].Write(std::span(sent[i]).subspan(written[i], chunk));
          written[i] += took;
          progress = peers[i].Read() || took > 0 || progress;
        }
        return progress;
      }));
  for (size_t i = 0; i < kPeers; ++i) {
    EXPECT_TRUE(peers[i].received == sent[i]) << "peer " << i;
    EXPECT_TRUE(handler_.ReceivedFrom(handler_.accepted[i]) == sent[i]) << "peer " << i;
  }
}

TEST_P(NetworkTest, ConcatenatesThePartsOfASend) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers);
  // Around the size of a block of the send queue, where parts straddle.
  Bytes expected;
  for (size_t size :
       {size_t{0}, size_t{1}, size_t{16'383}, size_t{16'384}, size_t{16'385}, size_t{70'000}}) {
    const Bytes a = RandomBytes(size, size);
    const Bytes b = RandomBytes(size + 1, 13);
    const std::array<std::span<const std::byte>, 3> parts{a, b, a};
    ASSERT_TRUE(network_->Send(id, std::span<const std::span<const std::byte>>(parts)));
    for (std::span<const std::byte> part : parts) {
      expected.insert(expected.end(), part.begin(), part.end());
    }
  }
  EXPECT_EQ(network_->SendBacklog(id), expected.size());
  ASSERT_TRUE(Until([&] { return peers[0].received.size() >= expected.size(); },
                    [&] { return peers[0].Read(); }));
  EXPECT_TRUE(peers[0].received == expected);
  EXPECT_TRUE(Until([&] { return network_->SendBacklog(id) == 0; }));
  EXPECT_TRUE(network_->Send(id, std::span<const std::byte>()));
}

TEST_P(NetworkTest, AnswersAPeerThatEndsItsSide) {
  Begin();
  const Bytes reply = RandomBytes(5, size_t{3} << 20);
  handler_.on_receive = [&](ConnectionId id, std::span<const std::byte>) {
    EXPECT_TRUE(network_->Send(id, reply));
  };
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers, 0, 16 * 1024);
  ASSERT_EQ(peers[0].Write(RandomBytes(6, 1)), 1u);
  peers[0].ShutdownWrite();
  ASSERT_TRUE(Until([&] { return peers[0].ended; }, [&] { return peers[0].Read(10'000); }));
  EXPECT_TRUE(peers[0].received == reply);
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kPeerClosed);
}

TEST_P(NetworkTest, HandsOverWhatCameBeforeThePeersEnd) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers);
  const Bytes bytes = RandomBytes(9, 50'000);
  ASSERT_EQ(peers[0].Write(bytes), bytes.size());
  peers[0].Close();
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kPeerClosed);
  EXPECT_TRUE(handler_.ReceivedFrom(id) == bytes);
}

TEST_P(NetworkTest, ReportsAReset) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers);
  Spin(3);
  peers[0].Reset();
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kError);
  EXPECT_FALSE(network_->Send(id, RandomBytes(1, 1)));
}

TEST_P(NetworkTest, ReportsAResetWhileSending) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers, 0, 4096);
  const Bytes bytes = RandomBytes(1, size_t{8} << 20);
  ASSERT_TRUE(network_->Send(id, bytes));
  Spin(20);
  EXPECT_GT(network_->SendBacklog(id), 0u);
  peers[0].Reset();
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kError);
  EXPECT_EQ(network_->SendBacklog(id), 0u);
}

TEST_P(NetworkTest, TheFirstCauseStays) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers, 0, 4096);
  ASSERT_TRUE(network_->Send(id, RandomBytes(1, size_t{8} << 20)));
  peers[0].ShutdownWrite();
  ASSERT_TRUE(Until([&] { return !network_->Send(id, RandomBytes(1, 1)); })) << "the end is seen";
  peers[0].Reset();
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kPeerClosed);
}

// A send that the kernel has begun reads its blocks until it ends, so a connection that closes
// meanwhile must not let go of them.
TEST_P(NetworkTest, AClosedConnectionNeverSeesAnothersBytes) {
  NetworkOptions options = SmallOptions();
  options.send_pool_bytes = size_t{1} << 20;
  Begin(options);
  for (int round = 0; round < 10; ++round) {
    std::vector<Peer> peers;
    const ConnectionId stuck = Accept(peers);
    const ConnectionId other = Accept(peers, 0, 4096);
    const Bytes own(50'000, std::byte{'a'});
    for (int i = 0; i < 1000 && network_->SendBacklog(stuck) < 300'000; ++i) {
      ASSERT_TRUE(network_->Send(stuck, own));
      Spin(1);
    }
    network_->Close(stuck, Network::CloseMode::kNow);
    // Takes the blocks that came free.
    const Bytes foreign(600'000, std::byte{'b'});
    ASSERT_TRUE(network_->Send(other, foreign));
    // Now that the peer reads, the send that is under way can go on.
    for (int i = 0; i < 50; ++i) {
      peers[0].Read();
      Spin(1);
    }
    ASSERT_TRUE(handler_.IsClosed(stuck));
    EXPECT_EQ(std::ranges::count(peers[0].received, std::byte{'b'}), 0);
    network_->Close(other, Network::CloseMode::kNow);
    ASSERT_TRUE(Until([&] { return handler_.IsClosed(other); }));
  }
}

TEST_P(NetworkTest, CloseAfterSendingDeliversEverything) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers, 0, 16 * 1024);
  const Bytes bytes = RandomBytes(11, size_t{5} << 20);
  ASSERT_TRUE(network_->Send(id, bytes));
  network_->Close(id, Network::CloseMode::kAfterSending);
  EXPECT_FALSE(network_->Send(id, bytes)) << "after Close nothing more is taken";
  // The peer goes on sending: closing with its bytes unread would reset the connection and take
  // from it what it has not read yet.
  const Bytes noise = RandomBytes(12, 1000);
  ASSERT_TRUE(Until([&] { return peers[0].over(); },
                    [&] {
                      peers[0].Write(noise);
                      return peers[0].Read(20'000);
                    }));
  EXPECT_TRUE(peers[0].ended);
  EXPECT_FALSE(peers[0].was_reset);
  EXPECT_TRUE(peers[0].received == bytes);
  EXPECT_FALSE(handler_.IsClosed(id)) << "waits for the peer's end";
  peers[0].Close();
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kLocal);
  EXPECT_TRUE(handler_.ReceivedFrom(id).empty()) << "what comes after Close is not handed over";
}

TEST_P(NetworkTest, CloseAfterSendingWorksWhilePaused) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers);
  network_->SetReceivePaused(id, true);
  Spin(3);
  network_->Close(id, Network::CloseMode::kAfterSending);
  ASSERT_TRUE(Until([&] { return peers[0].ended; }, [&] { return peers[0].Read(); }));
  peers[0].Close();
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
}

TEST_P(NetworkTest, CloseNowEndsAStuckCloseAfterSending) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers, 0, 4096);
  ASSERT_TRUE(network_->Send(id, RandomBytes(1, size_t{8} << 20)));
  network_->Close(id, Network::CloseMode::kAfterSending);
  Spin(50);
  EXPECT_FALSE(handler_.IsClosed(id));
  network_->Close(id, Network::CloseMode::kNow);
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kLocal);
  // Bytes are missing, so the peer sees a reset, not an end of stream.
  ASSERT_TRUE(Until([&] { return peers[0].over(); }, [&] { return peers[0].Read(); }));
  EXPECT_TRUE(peers[0].was_reset);
}

TEST_P(NetworkTest, CloseNowIsReportedOnceAndFreesThePlace) {
  NetworkOptions options = SmallOptions();
  options.max_connections = 1;
  Begin(options);
  for (int round = 0; round < 20; ++round) {
    std::vector<Peer> peers;
    const ConnectionId id = Accept(peers);
    network_->Close(id, Network::CloseMode::kNow);
    network_->Close(id, Network::CloseMode::kNow);
    EXPECT_FALSE(network_->Send(id, RandomBytes(1, 5)));
    ASSERT_TRUE(Until([&] { return peers[0].over() && handler_.IsClosed(id); },
                      [&] { return peers[0].Read(); }));
    EXPECT_EQ(handler_.CauseOf(id), CloseCause::kLocal);
  }
  EXPECT_EQ(handler_.closed.size(), 20u);
}

TEST_P(NetworkTest, HandlerMayCloseInsideItsCalls) {
  Begin();
  std::vector<Peer> peers;
  handler_.on_accept = [&](ConnectionId id) {
    if (handler_.accepted.size() == 1) network_->Close(id, Network::CloseMode::kNow);
  };
  handler_.on_receive = [&](ConnectionId id, std::span<const std::byte>) {
    network_->Close(id, Network::CloseMode::kNow);
  };
  Accept(peers);
  const ConnectionId second = Accept(peers);
  peers[0].Write(RandomBytes(1, 100'000));
  peers[1].Write(RandomBytes(1, 100'000));
  ASSERT_TRUE(Until([&] { return handler_.closed.size() == 2; }));
  EXPECT_GT(handler_.ReceivedFrom(second).size(), 0u);
  EXPECT_LE(handler_.ReceivedFrom(second).size(), SmallOptions().receive_buffer_bytes);
}

TEST_P(NetworkTest, StaleIdIsRefused) {
  NetworkOptions options = SmallOptions();
  options.max_connections = 1;
  Begin(options);
  std::vector<Peer> peers;
  const ConnectionId old = Accept(peers);
  peers[0].Close();
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(old); }));
  const ConnectionId now = Accept(peers);
  ASSERT_EQ(now.index, old.index);
  ASSERT_NE(now.generation, old.generation);
  EXPECT_FALSE(network_->Send(old, RandomBytes(1, 10)));
  EXPECT_EQ(network_->SendBacklog(old), 0u);
  network_->SetReceivePaused(old, true);
  network_->Close(old, Network::CloseMode::kNow);
  EXPECT_FALSE(network_->Send({.index = 77, .generation = 1}, RandomBytes(1, 10)));
  EXPECT_FALSE(network_->Send({.index = UINT32_MAX, .generation = 1}, RandomBytes(1, 10)));
  // The new one in its place noticed nothing.
  EchoAll();
  const Bytes bytes = RandomBytes(2, 100);
  peers[1].Write(bytes);
  EXPECT_TRUE(Until([&] { return peers[1].received == bytes; }, [&] { return peers[1].Read(); }));
}

TEST_P(NetworkTest, PauseStopsReadingUntilThePeerBlocks) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers, 64 * 1024);
  const Bytes bytes = RandomBytes(21, size_t{32} << 20);
  size_t written = peers[0].Write(std::span(bytes).first(10'000));
  ASSERT_TRUE(Until([&] { return handler_.ReceivedFrom(id).size() == written; }));

  network_->SetReceivePaused(id, true);
  Spin(10);
  int blocked = 0;
  while (blocked < 100 && written < bytes.size()) {
    const size_t took = peers[0].Write(
        std::span(bytes).subspan(written, std::min<size_t>(bytes.size() - written, 65'536)));
    written += took;
    blocked = took > 0 ? 0 : blocked + 1;
    Spin(1);
  }
  ASSERT_LT(written, bytes.size()) << "the peer was never blocked";
  EXPECT_EQ(handler_.ReceivedFrom(id).size(), 10'000u) << "read while paused";

  // Fast changes of mind, then on.
  for (int i = 0; i < 5; ++i) {
    network_->SetReceivePaused(id, false);
    network_->SetReceivePaused(id, true);
    Spin(1);
  }
  network_->SetReceivePaused(id, false);
  ASSERT_TRUE(Until([&] { return handler_.ReceivedFrom(id).size() == bytes.size(); },
                    [&] {
                      if (written == bytes.size()) return false;
                      const size_t took = peers[0].Write(std::span(bytes).subspan(written));
                      written += took;
                      return took > 0;
                    }));
  EXPECT_TRUE(handler_.ReceivedFrom(id) == bytes);
}

TEST_P(NetworkTest, PausingAtRandomLosesNothing) {
  NetworkOptions options = SmallOptions();
  options.receive_buffers = 3;
  Begin(options);
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers);
  const Bytes bytes = RandomBytes(22, size_t{4} << 20);
  size_t written = 0;
  std::mt19937_64 random(3);
  handler_.on_receive = [&](ConnectionId which, std::span<const std::byte>) {
    network_->SetReceivePaused(which, random() % 2 == 0);
  };
  ASSERT_TRUE(Until([&] { return handler_.ReceivedFrom(id).size() == bytes.size(); },
                    [&] {
                      network_->SetReceivePaused(id, random() % 3 == 0);
                      if (written < bytes.size()) {
                        written += peers[0].Write(std::span(bytes).subspan(written));
                      }
                      return true;
                    }));
  EXPECT_TRUE(handler_.ReceivedFrom(id) == bytes);
}

TEST_P(NetworkTest, PausedAtAcceptReceivesNothing) {
  Begin();
  handler_.on_accept = [&](ConnectionId id) { network_->SetReceivePaused(id, true); };
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers);
  peers[0].Write(RandomBytes(1, 100));
  Spin(20);
  EXPECT_TRUE(handler_.ReceivedFrom(id).empty());
  // Closing does not depend on being able to read.
  network_->Close(id, Network::CloseMode::kNow);
  EXPECT_TRUE(Until([&] { return handler_.IsClosed(id); }));
}

TEST_P(NetworkTest, SendLimitClosesOnlyTheSlowReader) {
  NetworkOptions options = SmallOptions();
  options.send_limit_bytes = size_t{1} << 20;
  Begin(options);
  std::vector<Peer> peers;
  const ConnectionId fast = Accept(peers);
  const ConnectionId slow = Accept(peers, 0, 4096);
  const Bytes chunk = RandomBytes(31, 50'000);
  Bytes expected;
  for (int round = 0; round < 20'000 && !handler_.IsClosed(slow); ++round) {
    network_->Send(slow, chunk);
    if (network_->SendBacklog(fast) == 0) {
      ASSERT_TRUE(network_->Send(fast, chunk));
      expected.insert(expected.end(), chunk.begin(), chunk.end());
    }
    ASSERT_LE(network_->SendBacklog(slow), options.send_limit_bytes);
    Spin(1);
    peers[0].Read();
  }
  ASSERT_TRUE(handler_.IsClosed(slow));
  EXPECT_EQ(handler_.CauseOf(slow), CloseCause::kSendBacklog);
  EXPECT_EQ(Count(NetworkCounter::kSendBacklogCloses), 1u);
  ASSERT_TRUE(Until([&] { return peers[0].received.size() == expected.size(); },
                    [&] { return peers[0].Read(); }));
  EXPECT_TRUE(peers[0].received == expected);
  EXPECT_FALSE(handler_.IsClosed(fast));
  ASSERT_TRUE(Until([&] { return peers[1].over(); }, [&] { return peers[1].Read(); }));
  EXPECT_TRUE(peers[1].was_reset);
}

TEST_P(NetworkTest, ASendBeyondTheLimitIsRefusedWhole) {
  NetworkOptions options = SmallOptions();
  options.send_limit_bytes = 1000;
  Begin(options);
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers);
  EXPECT_TRUE(network_->Send(id, RandomBytes(1, 1000)));
  EXPECT_FALSE(network_->Send(id, RandomBytes(1, 1)));
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kSendBacklog);
}

TEST_P(NetworkTest, SpentPoolClosesTheLargestBacklog) {
  NetworkOptions options = SmallOptions();
  options.send_pool_bytes = size_t{2} << 20;
  Begin(options);
  std::vector<Peer> peers;
  const ConnectionId reader = Accept(peers);
  // The largest is neither the first nor the last in the table.
  const ConnectionId large = Accept(peers, 0, 4096);
  const ConnectionId small = Accept(peers, 0, 4096);
  const Bytes chunk = RandomBytes(41, 40'000);
  // Fills the kernel's buffers of both who do not read, then leaves one a little and the other
  // much.
  const auto fill = [&](ConnectionId id, size_t backlog) {
    for (int i = 0; i < 10'000 && network_->SendBacklog(id) < backlog; ++i) {
      ASSERT_TRUE(network_->Send(id, chunk));
      Spin(1);
    }
  };
  fill(small, 200'000);
  fill(large, 1'000'000);
  Bytes expected;
  for (int round = 0; round < 1000 && !handler_.IsClosed(large); ++round) {
    ASSERT_TRUE(network_->Send(reader, chunk)) << "a reader suffers from others";
    expected.insert(expected.end(), chunk.begin(), chunk.end());
    // Without Poll in between the pool must run out.
    if (network_->SendBacklog(large) == 0) Spin(1);
    if (round % 10 == 9) Spin(1), peers[0].Read();
  }
  ASSERT_TRUE(Until([&] { return peers[0].received.size() == expected.size(); },
                    [&] { return peers[0].Read(); }));
  EXPECT_TRUE(peers[0].received == expected);
  EXPECT_FALSE(handler_.IsClosed(reader));
  for (int i = 0; i < 100'000 && !handler_.IsClosed(large); ++i) {
    network_->Send(large, chunk);
    Spin(1);
  }
  ASSERT_TRUE(handler_.IsClosed(large));
  EXPECT_EQ(handler_.CauseOf(large), CloseCause::kSendBacklog);
  EXPECT_FALSE(handler_.IsClosed(small));
}

TEST_P(NetworkTest, ASendLargerThanThePoolHarmsOnlyItself) {
  NetworkOptions options = SmallOptions();
  options.send_pool_bytes = size_t{1} << 20;
  Begin(options);
  std::vector<Peer> peers;
  const ConnectionId bystander = Accept(peers);
  const ConnectionId greedy = Accept(peers);
  ASSERT_TRUE(network_->Send(bystander, RandomBytes(1, 100'000)));
  EXPECT_FALSE(network_->Send(greedy, RandomBytes(1, size_t{2} << 20)));
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(greedy); }));
  EXPECT_EQ(handler_.CauseOf(greedy), CloseCause::kSendBacklog);
  EXPECT_TRUE(
      Until([&] { return peers[0].received.size() == 100'000; }, [&] { return peers[0].Read(); }));
  EXPECT_FALSE(handler_.IsClosed(bystander));
}

TEST_P(NetworkTest, ManySmallSendsShareASmallPool) {
  NetworkOptions options = SmallOptions();
  options.send_pool_bytes = 16 * 16 * 1024;  // 16 blocks for 60 connections.
  Begin(options);
  std::vector<Peer> peers;
  for (int i = 0; i < 60; ++i) Accept(peers);
  for (int round = 0; round < 5; ++round) {
    for (size_t i = 0; i < peers.size(); ++i) {
      ASSERT_TRUE(network_->Send(handler_.accepted[i], RandomBytes(i, 100)));
    }
  }
  ASSERT_TRUE(Until(
      [&] {
        return std::ranges::all_of(peers, [](const Peer& p) { return p.received.size() == 500; });
      },
      [&] {
        for (Peer& peer : peers) peer.Read();
        return false;
      }));
  EXPECT_TRUE(handler_.closed.empty());
}

TEST_P(NetworkTest, RefusesConnectionsBeyondTheMost) {
  NetworkOptions options = SmallOptions();
  options.max_connections = 4;
  Begin(options);
  EchoAll();
  std::vector<Peer> peers;
  for (int i = 0; i < 4; ++i) Accept(peers);
  for (int i = 0; i < 3; ++i) peers.emplace_back(endpoint_);
  const auto read_all = [&] {
    bool progress = false;
    for (Peer& peer : peers) progress = peer.Read() || progress;
    return progress;
  };
  ASSERT_TRUE(Until(
      [&] { return std::all_of(peers.begin() + 4, peers.end(), [](Peer& p) { return p.over(); }); },
      read_all));
  EXPECT_EQ(Count(NetworkCounter::kConnectionsRefused), 3u);
  EXPECT_EQ(handler_.accepted.size(), 4u);
  // The four go on, and a place that comes free is given out again.
  peers[0].Write(RandomBytes(1, 10));
  ASSERT_TRUE(Until([&] { return peers[0].received.size() == 10; }, read_all));
  peers[1].Close();
  ASSERT_TRUE(Until([&] { return handler_.closed.size() == 1; }));
  Accept(peers);
  EXPECT_EQ(handler_.accepted.size(), 5u);
}

TEST_P(NetworkTest, ServesAThousandConnectionsAtOnce) {
  constexpr size_t kConnections = 1000;
  rlimit limit;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  if (limit.rlim_max < 2 * kConnections + 100) {
    GTEST_SKIP() << "needs 2,100 descriptors; the hard limit (ulimit -Hn) is " << limit.rlim_max;
  }
  limit.rlim_cur = std::max<rlim_t>(limit.rlim_cur, 2 * kConnections + 100);
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  NetworkOptions options = SmallOptions();
  options.max_connections = kConnections;
  Begin(options);
  EchoAll();
  std::vector<Peer> peers;
  for (size_t i = 0; i < kConnections; ++i) {
    peers.emplace_back(endpoint_);
    ASSERT_FALSE(peers.back().refused());
  }
  ASSERT_TRUE(Until([&] { return handler_.accepted.size() == kConnections; }));
  // More for each than the 16 buffers hold for all.
  for (size_t i = 0; i < kConnections; ++i) {
    const Bytes bytes = RandomBytes(i, 3000);
    ASSERT_EQ(peers[i].Write(bytes), bytes.size());
  }
  size_t complete = 0;
  ASSERT_TRUE(Until([&] { return complete == kConnections; },
                    [&] {
                      bool progress = false;
                      complete = 0;
                      for (Peer& peer : peers) {
                        progress = peer.Read() || progress;
                        complete += peer.received.size() == 3000 ? 1 : 0;
                      }
                      return progress;
                    }));
  for (size_t i = 0; i < kConnections; ++i) {
    ASSERT_TRUE(peers[i].received == RandomBytes(i, 3000)) << "connection " << i;
  }
  peers.clear();
  EXPECT_TRUE(Until([&] { return handler_.closed.size() == kConnections; }));
}

// A connection that always has bytes waiting must not keep the others from being heard.
TEST_P(NetworkTest, FastPeersDoNotStarveAQuietOne) {
  NetworkOptions options = SmallOptions();
  options.receive_buffer_bytes = 4096;
  options.receive_buffers = 4;
  Begin(options);
  std::vector<Peer> peers;
  for (int i = 0; i < 9; ++i) Accept(peers);
  const ConnectionId quiet = handler_.accepted[0];
  const Bytes flood = RandomBytes(1, 1 << 20);
  const auto pump = [&] {
    for (size_t i = 1; i < peers.size(); ++i) peers[i].Write(flood);
  };
  for (int round = 0; round < 50; ++round) {
    pump();
    network_->Poll(handler_, 4);
  }
  peers[0].Write(RandomBytes(2, 1));
  int polls = 0;
  while (handler_.ReceivedFrom(quiet).empty() && polls < 1000) {
    pump();
    network_->Poll(handler_, 4);
    ++polls;
  }
  EXPECT_LT(polls, 200) << "its turn comes when the others have had theirs";
}

// With io_uring: more completions than the ring holds, so that multishot operations end early.
TEST_P(NetworkTest, ASlowOwnerLosesNothing) {
  NetworkOptions options = SmallOptions();
  options.receive_buffer_bytes = 64;
  options.receive_buffers = 16'384;
  Begin(options);
  EchoAll();
  std::vector<Peer> peers;
  std::vector<Bytes> sent;
  for (size_t i = 0; i < 60; ++i) Accept(peers);
  for (size_t i = 0; i < peers.size(); ++i) {
    sent.push_back(RandomBytes(i, 60'000));
    ASSERT_EQ(peers[i].Write(sent[i]), sent[i].size());
  }
  for (int i = 0; i < 500; ++i) network_->Poll(handler_, 2);
  ASSERT_TRUE(Until(
      [&] {
        for (size_t i = 0; i < peers.size(); ++i) {
          if (peers[i].received.size() < sent[i].size()) return false;
        }
        return true;
      },
      [&] {
        bool progress = false;
        for (Peer& peer : peers) progress = peer.Read() || progress;
        return progress;
      }));
  for (size_t i = 0; i < peers.size(); ++i) EXPECT_TRUE(peers[i].received == sent[i]) << i;
}

TEST_P(NetworkTest, KeepsToItsBudget) {
  Begin();
  std::vector<Peer> peers;
  for (int i = 0; i < 20; ++i) peers.emplace_back(endpoint_);
  for (Peer& peer : peers) peer.Write(RandomBytes(1, 100));
  int sum = 0;
  for (int i = 0; i < 10'000 && sum < 60; ++i) {
    const int before = handler_.events;
    const int returned = network_->Poll(handler_, 3);
    EXPECT_LE(returned, 3);
    EXPECT_EQ(handler_.events - before, returned);
    sum += returned;
    if (sum >= 40) peers.clear();  // 20 accepted, 20 received, then 20 closed.
    if (returned == 0) network_->Wait(kNanosPerMilli);
  }
  EXPECT_EQ(sum, 60);
  EXPECT_EQ(network_->Poll(handler_, 3), 0);
}

TEST_P(NetworkTest, AcceptGoesOnAfterDescriptorsRanOut) {
  // io_uring keeps the limit from when the accept was armed, so it is lowered before.
  rlimit limit;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  rlimit lowered = limit;
  lowered.rlim_cur = 200;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &lowered), 0);
  Begin();
  std::vector<Peer> peers;
  peers.emplace_back(endpoint_);
  std::vector<int> fillers;
  for (int fd = dup(0); fd >= 0; fd = dup(0)) fillers.push_back(fd);

  for (int i = 0; i < 5000; ++i) network_->Poll(handler_, kBudget);
  const uint64_t errors = Count(NetworkCounter::kAcceptErrors);
  EXPECT_TRUE(handler_.accepted.empty());
  EXPECT_GE(errors, 1u);
  EXPECT_LE(errors, 20u) << "a failing accept spins";

  for (int fd : fillers) close(fd);
  EXPECT_TRUE(Until([&] { return handler_.accepted.size() == 1; }));
  Accept(peers);
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

TEST_P(NetworkTest, StopAcceptingRefusesNewAndKeepsOld) {
  Begin();
  EchoAll();
  std::vector<Peer> peers;
  Accept(peers);
  network_->StopAccepting();
  network_->StopAccepting();
  Spin(5);
  Peer late(endpoint_);
  const Bytes bytes = RandomBytes(1, 1000);
  peers[0].Write(bytes);
  EXPECT_TRUE(Until([&] { return peers[0].received == bytes; }, [&] { return peers[0].Read(); }));
  EXPECT_TRUE(Until([&] {
                late.Read();
                late.Write(bytes);
                return late.over() || late.refused();
              }) ||
              !late.over());
  EXPECT_EQ(handler_.accepted.size(), 1u);
  // The address is free for someone else.
  auto other = CreateNetwork(GetParam(), SmallOptions(), nullptr);
  ASSERT_TRUE(other.has_value());
  const auto again = (*other)->Listen(endpoint_);
  EXPECT_TRUE(again.has_value()) << again.error().message;
}

TEST_P(NetworkTest, WakeEndsTheNextWait) {
  Begin();
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 100; ++i) {
    network_->Wake();
    network_->Wake();
    // A Poll in between must not swallow it: its caller may have looked at its work before.
    for (int j = 0; j < i % 3; ++j) network_->Poll(handler_, kBudget);
    network_->Wait(60 * kNanosPerSecond);
    network_->Poll(handler_, kBudget);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

TEST_P(NetworkTest, WaitEndsAfterItsTime) {
  Begin();
  Spin(3);
  // May end early, but not never, and a Wait without time does not block at all.
  network_->Wait(2 * kNanosPerMilli);
  network_->Wait(0);
}

TEST_P(NetworkTest, WaitEndsWhenBytesCome) {
  Begin();
  EchoAll();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers);
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 100; ++i) {
    const size_t before = handler_.ReceivedFrom(id).size();
    ASSERT_EQ(peers[0].Write(RandomBytes(1, 10)), 10u);
    while (handler_.ReceivedFrom(id).size() == before) {
      if (network_->Poll(handler_, kBudget) == 0) network_->Wait(60 * kNanosPerSecond);
    }
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

// Each round hands over one number, tells the owner by Wake, and is answered. One lost Wake leaves
// the owner in Wait for a minute.
TEST_P(NetworkTest, WakeFromAnotherThreadIsNeverLost) {
  Begin();
  constexpr int kRounds = 3000;
  std::atomic<int> handed{0};
  std::atomic<int> answered{0};
  std::thread other([&] {
    for (int round = 1; round <= kRounds; ++round) {
      handed.store(round, std::memory_order_release);
      network_->Wake();
      while (answered.load(std::memory_order_acquire) < round) std::this_thread::yield();
    }
  });
  const auto start = std::chrono::steady_clock::now();
  for (int seen = 0; seen < kRounds;) {
    // Looks first, polls and waits after: the order in which a Wake is most easily lost.
    const int now = handed.load(std::memory_order_acquire);
    if (now > seen) {
      seen = now;
      answered.store(seen, std::memory_order_release);
      continue;
    }
    network_->Poll(handler_, kBudget);
    network_->Wait(60 * kNanosPerSecond);
  }
  other.join();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

TEST_P(NetworkTest, TakenPortIsAnErrorWithAddressAndRemedy) {
  Begin();
  auto other = CreateNetwork(GetParam(), SmallOptions(), nullptr);
  ASSERT_TRUE(other.has_value());
  const auto failed = (*other)->Listen(endpoint_);
  ASSERT_FALSE(failed.has_value());
  EXPECT_EQ(failed.error().code, ErrorCode::kAlreadyExists);
  EXPECT_NE(failed.error().message.find(endpoint_.ToString()), std::string::npos)
      << failed.error().message;
  EXPECT_NE(failed.error().message.find("set another port"), std::string::npos);
  const auto foreign = (*other)->Listen({.host = "192.0.2.1", .port = 0});
  ASSERT_FALSE(foreign.has_value());
  EXPECT_EQ(foreign.error().code, ErrorCode::kInvalidArgument);
  const auto nonsense = (*other)->Listen({.host = "no.such.host", .port = 0});
  ASSERT_FALSE(nonsense.has_value());
  EXPECT_EQ(nonsense.error().code, ErrorCode::kInvalidArgument);
}

TEST_P(NetworkTest, PortIsFreeAgainAfterTheNetworkEnds) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers, 0, 4096);
  ASSERT_TRUE(network_->Send(id, RandomBytes(1, size_t{4} << 20)));  // A send stays under way.
  Spin(10);
  for (int round = 0; round < 10; ++round) {
    network_.reset();
    handler_ = Recorder();  // The next network counts its generations from 1 again.
    auto created = CreateNetwork(GetParam(), SmallOptions(), nullptr);
    ASSERT_TRUE(created.has_value());
    network_ = std::move(*created);
    const auto endpoint = network_->Listen(endpoint_);
    ASSERT_TRUE(endpoint.has_value()) << endpoint.error().message;
    ASSERT_TRUE(network_->Start().has_value());
    Accept(peers);
    Spin(2);
  }
}

TEST_P(NetworkTest, ListensOnIpv6) {
  const int fd = socket(AF_INET6, SOCK_STREAM, 0);
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_addr = in6addr_loopback;
  const bool has_v6 =
      fd >= 0 && bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  if (fd >= 0) close(fd);
  if (!has_v6) GTEST_SKIP() << "this machine has no IPv6 loopback";
  Begin(SmallOptions(), "::1");
  EchoAll();
  EXPECT_EQ(endpoint_.ToString(), "[::1]:" + std::to_string(endpoint_.port));
  std::vector<Peer> peers;
  Accept(peers);
  const Bytes bytes = RandomBytes(1, 1000);
  peers[0].Write(bytes);
  EXPECT_TRUE(Until([&] { return peers[0].received == bytes; }, [&] { return peers[0].Read(); }));
}

TEST_P(NetworkTest, ListensOnSeveralAddresses) {
  auto created = CreateNetwork(GetParam(), SmallOptions(), nullptr);
  ASSERT_TRUE(created.has_value());
  network_ = std::move(*created);
  const auto first = network_->Listen({.host = "127.0.0.1", .port = 0});
  const auto second = network_->Listen({.host = "localhost", .port = 0});
  ASSERT_TRUE(first.has_value() && second.has_value());
  ASSERT_TRUE(network_->Start().has_value());
  const Peer a(*first);
  const Peer b({.host = "127.0.0.1", .port = second->port});
  EXPECT_TRUE(Until([&] { return handler_.accepted.size() == 2; }));
}

// Connections that come and go in every way, with bytes under way, must leave no place, block or
// descriptor behind.
TEST_P(NetworkTest, ChurnLeavesNothingBehind) {
  NetworkOptions options = SmallOptions();
  options.max_connections = 16;
  options.send_pool_bytes = size_t{4} << 20;
  options.send_limit_bytes = size_t{1} << 20;
  Begin(options);
  const auto descriptors = [] {
    const std::filesystem::directory_iterator fds("/proc/self/fd");
    return std::distance(begin(fds), end(fds));
  };
  const auto before = descriptors();
  std::mt19937_64 random(99);
  handler_.on_receive = [&](ConnectionId id, std::span<const std::byte> bytes) {
    network_->Send(id, bytes);
    const uint64_t choice = random() % 40;
    if (choice == 0) network_->Close(id, Network::CloseMode::kNow);
    if (choice == 1) network_->Close(id, Network::CloseMode::kAfterSending);
    if (choice < 6) network_->SetReceivePaused(id, choice % 2 == 0);
  };
  const Bytes bytes = RandomBytes(1, 300'000);
  std::vector<Peer> peers;
  for (int round = 0; round < 20'000; ++round) {
    if (peers.size() < 20 && random() % 4 == 0) {
      peers.emplace_back(endpoint_, 0, random() % 2 == 0 ? 4096 : 0);
    }
    if (!peers.empty()) {
      const size_t i = random() % peers.size();
      const uint64_t choice = random() % 12;
      if (choice < 5) peers[i].Write(std::span(bytes).first(1 + random() % bytes.size()));
      if (choice < 8) peers[i].Read(random() % 200'000);
      if (choice == 8) peers[i].ShutdownWrite();
      if (choice == 9) peers[i].Reset();
      if (choice >= 9 || peers[i].over()) {
        std::swap(peers[i], peers.back());
        peers.pop_back();
      }
    }
    // A paused connection does not notice its peer's end, so none stays paused for ever.
    if (!handler_.accepted.empty()) {
      const size_t from_end = random() % std::min<size_t>(handler_.accepted.size(), 100);
      network_->SetReceivePaused(handler_.accepted[handler_.accepted.size() - 1 - from_end], false);
    }
    network_->Poll(handler_, 1 + static_cast<int>(random() % 8));
  }
  peers.clear();
  for (ConnectionId id : handler_.accepted) {
    network_->Close(id, Network::CloseMode::kNow);
  }
  ASSERT_TRUE(Until([&] {
    return handler_.closed.size() == handler_.accepted.size() && descriptors() == before;
  }));
  EXPECT_GT(handler_.accepted.size(), 500u);
  // All places and the whole pool are there again.
  handler_.on_receive = {};
  for (uint32_t i = 0; i < options.max_connections; ++i) {
    const ConnectionId id = Accept(peers, 0, 4096);
    ASSERT_TRUE(network_->Send(id, std::span(bytes).first(200'000)));
  }
  EXPECT_TRUE(Until(
      [&] {
        return std::ranges::all_of(peers,
                                   [](const Peer& p) { return p.received.size() == 200'000; });
      },
      [&] {
        bool progress = false;
        for (Peer& peer : peers) progress = peer.Read() || progress;
        return progress;
      }));
}

// Makes the system call `number` end the process, or fail with EPERM.
bool ForbidSystemCall(int number, bool kill) {
  std::array<sock_filter, 4> filter{{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(number), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, kill ? SECCOMP_RET_KILL_PROCESS : SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  const sock_fprog program{.len = filter.size(), .filter = filter.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) == 0;
}

// Runs `body` in a child process; its exit code, or -1 when a signal ended it.
int InChild(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

constexpr int kCannotFilter = 77;

TEST(CreateNetworkTest, FallsBackWhereIoUringIsForbidden) {
  const int result = InChild([] {
    if (!ForbidSystemCall(SYS_io_uring_setup, false)) return kCannotFilter;
    std::string note;
    const auto chosen = CreateNetwork(NetworkBackend::kAuto, NetworkOptions{}, &note);
    if (!chosen || (*chosen)->backend() != "epoll") return 1;
    if (note !=
        "io_uring is forbidden here (io_uring_queue_init: Operation not permitted); using epoll") {
      return 2;
    }
    const auto forced = CreateNetwork(NetworkBackend::kUring, NetworkOptions{}, nullptr);
    if (forced || forced.error().code != ErrorCode::kPermissionDenied) return 3;
    return 0;
  });
  if (result == kCannotFilter) GTEST_SKIP() << "seccomp filters cannot be set here";
  EXPECT_EQ(result, 0);
}

TEST(CreateNetworkTest, FallsBackWhereBufferRingsAreMissing) {
  const int result = InChild([] {
    if (!ForbidSystemCall(SYS_io_uring_register, false)) return kCannotFilter;
    std::string note;
    const auto chosen = CreateNetwork(NetworkBackend::kAuto, NetworkOptions{}, &note);
    if (!chosen || (*chosen)->backend() != "epoll") return 1;
    return note.find("using epoll") == std::string::npos ? 2 : 0;
  });
  if (result == kCannotFilter) GTEST_SKIP() << "seccomp filters cannot be set here";
  EXPECT_EQ(result, 0);
}

TEST(CreateNetworkTest, SaysNothingWhereIoUringWorks) {
  std::string note = "left from before";
  const auto chosen = CreateNetwork(NetworkBackend::kAuto, NetworkOptions{}, &note);
  ASSERT_TRUE(chosen.has_value());
  EXPECT_EQ(note.empty(), (*chosen)->backend() == "io_uring");
}

TEST(UringNetworkTest, AnIdlePollMakesNoSystemCall) {
  const int result = InChild([] {
    auto created = CreateUringNetwork(NetworkOptions{});
    if (!created) return kCannotFilter;
    Network& network = **created;
    const auto endpoint = network.Listen({});
    if (!endpoint || !network.Start()) return 1;
    const Peer peer(*endpoint);
    Recorder handler;
    while (handler.accepted.empty()) network.Poll(handler, 16);
    for (int i = 0; i < 100; ++i) network.Poll(handler, 16);
    if (!ForbidSystemCall(SYS_io_uring_enter, true)) return kCannotFilter;
    for (int i = 0; i < 1000; ++i) network.Poll(handler, 16);
    return 0;
  });
  if (result == kCannotFilter) GTEST_SKIP() << "io_uring or seccomp filters cannot be had here";
  EXPECT_EQ(result, 0) << "-1: ended by the filter";
}

TEST(EndpointTest, ParsesAndPrints) {
  struct Case {
    std::string text, host;
    uint16_t port;
  };
  for (const Case& c : std::vector<Case>{{"127.0.0.1:7654", "127.0.0.1", 7654},
                                         {"0.0.0.0:0", "0.0.0.0", 0},
                                         {"[::1]:65535", "::1", 65535},
                                         {"[::]:1", "::", 1},
                                         {"localhost:80", "127.0.0.1", 80}}) {
    const auto parsed = ParseEndpoint(c.text);
    ASSERT_TRUE(parsed.has_value()) << parsed.error().message;
    EXPECT_EQ(parsed->host, c.host);
    EXPECT_EQ(parsed->port, c.port);
    if (c.host != "127.0.0.1" || c.port == 7654) {
      EXPECT_EQ(parsed->ToString(), c.text);
    }
  }
}

TEST(EndpointTest, RefusesWhatIsNoAddress) {
  for (const char* text : {"",
                           ":",
                           "127.0.0.1",
                           "127.0.0.1:",
                           "127.0.0.1:65536",
                           "127.0.0.1:-1",
                           "127.0.0.1:+1",
                           "127.0.0.1: 1",
                           "127.0.0.1:1x",
                           "127.0.0.1:0x10",
                           "127.0.0.256:1",
                           "::1:80",
                           "[::1]",
                           "[::1]:",
                           "[::1:80",
                           "[127.0.0.1]:80",
                           "[localhost]:80",
                           "[]:80",
                           ":7654",
                           "example.org:80",
                           "127.0.0.1:99999999999999999999"}) {
    const auto parsed = ParseEndpoint(text);
    ASSERT_FALSE(parsed.has_value()) << text;
    EXPECT_EQ(parsed.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(parsed.error().message.find("\"" + std::string(text) + "\""), std::string::npos);
    EXPECT_NE(parsed.error().message.find("127.0.0.1:7654"), std::string::npos);
  }
}

}  // namespace
}  // namespace engram
