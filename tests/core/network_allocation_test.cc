// In a program of its own, since the counter stands in for the allocator.

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <memory>
#include <string>
#include <vector>

#include "src/core/clock.h"
#include "src/core/network.h"
#include "src/core/stream_network.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

// Echoes, and closes every seventh connection when it has received something.
class EchoHandler : public NetworkHandler {
 public:
  explicit EchoHandler(Network* network) : network_(network) {}
  void OnAccept(ConnectionId) override { ++accepted; }
  void OnReceive(ConnectionId connection, std::span<const std::byte> bytes) override {
    network_->Send(connection, bytes);
    network_->SetReceivePaused(connection, true);
    network_->SetReceivePaused(connection, false);
    if (connection.index % 7 == 0) network_->Close(connection, Network::CloseMode::kAfterSending);
  }
  void OnClosed(ConnectionId, CloseCause) override { ++closed; }

  int accepted = 0;
  int closed = 0;

 private:
  Network* network_;
};

class NetworkAllocationTest : public testing::TestWithParam<NetworkBackend> {};

INSTANTIATE_TEST_SUITE_P(Backends, NetworkAllocationTest,
                         testing::Values(NetworkBackend::kUring, NetworkBackend::kPosix),
                         [](const testing::TestParamInfo<NetworkBackend>& param) {
                           return param.param == NetworkBackend::kUring ? "IoUring" : "Epoll";
                         });

TEST_P(NetworkAllocationTest, NothingAllocatesAfterStart) {
  constexpr int kConnections = 64;
  NetworkOptions options;
  options.max_connections = kConnections;
  options.receive_buffer_bytes = 4096;
  options.receive_buffers = 8;
  options.send_pool_bytes = size_t{1} << 20;
  auto created = CreateNetwork(GetParam(), options, nullptr);
  if (!created) GTEST_SKIP() << created.error().message;
  Network& network = **created;
  const auto endpoint = network.Listen({});
  ASSERT_TRUE(endpoint.has_value() && network.Start().has_value());
  EchoHandler handler(&network);

  // Nothing of the test allocates either, so all of it may be counted.
  std::array<int, kConnections> peers;
  std::array<std::byte, 20'000> bytes{};
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(endpoint->port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int wanted = 3 * kConnections;
  const uint64_t before = AllocationCount();
  for (int round = 0; round < 3; ++round) {
    for (int& peer : peers) {
      peer = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
      connect(peer, reinterpret_cast<sockaddr*>(&address), sizeof(address));
    }
    for (int poll = 0; poll < 20'000 && handler.accepted < (round + 1) * kConnections; ++poll) {
      if (network.Poll(handler, 16) == 0) network.Wait(kNanosPerMilli);
    }
    for (int step = 0; step < 50; ++step) {
      for (int peer : peers) {
        send(peer, bytes.data(), bytes.size(), MSG_NOSIGNAL);
        recv(peer, bytes.data(), bytes.size(), 0);
      }
      network.Poll(handler, 16);
    }
    for (int peer : peers) close(peer);
    for (int poll = 0; poll < 20'000 && handler.closed < (round + 1) * kConnections; ++poll) {
      if (network.Poll(handler, 16) == 0) network.Wait(kNanosPerMilli);
    }
  }
  EXPECT_EQ(AllocationCount(), before);
  EXPECT_EQ(handler.accepted, wanted);
  EXPECT_EQ(handler.closed, wanted);
}

// A client's end that throws away what it reads.
struct ReadingClient final : StreamClient {
  void OnReady() override { Read(); }
  void OnGone() override { pipe = nullptr; }
  void Read() const {
    for (auto bytes = pipe->Peek(); !bytes.empty(); bytes = pipe->Peek()) {
      pipe->Consume(bytes.size());
    }
  }
  StreamPipe* pipe = nullptr;
};

TEST(StreamNetworkAllocationTest, NothingButConnectAllocatesAfterStart) {
  constexpr int kConnections = 32;
  StreamNetworkOptions options;
  options.max_connections = kConnections;
  options.ring_bytes = 4096;
  options.send_pool_bytes = size_t{1} << 20;
  auto created = StreamNetwork::Create(options);
  ASSERT_TRUE(created.has_value() && (*created)->Start().has_value());
  StreamNetwork& network = **created;
  EchoHandler handler(&network);
  std::array<ReadingClient, kConnections> clients;
  const std::array<std::byte, 3'000> bytes{};
  const std::array<std::span<const std::byte>, 1> parts{bytes};
  std::array<std::byte, 10'000> large{};
  for (int round = 0; round < 3; ++round) {
    const uint64_t before_connect = AllocationCount();
    for (ReadingClient& client : clients) {
      client.pipe = network.Connect(&client);
      ASSERT_NE(client.pipe, nullptr);
    }
    const uint64_t before = AllocationCount();
    if (round > 0) {
      EXPECT_EQ(before, before_connect) << "pipes are used again";
    }
    for (int step = 0; step < 50; ++step) {
      for (ReadingClient& client : clients) {
        if (!client.pipe->Write(parts)) (void)client.pipe->AwaitRoom(bytes.size());
      }
      network.Poll(handler, 16);
      // More than a ring holds, so that there is a backlog.
      network.Send({.index = 1, .generation = static_cast<uint32_t>(round) + 1}, large);
      network.Wait(1);
    }
    for (ReadingClient& client : clients) client.pipe->Close();
    while (network.open_pipes() > 0) network.Poll(handler, 16);
    EXPECT_EQ(AllocationCount(), before);
  }
  EXPECT_EQ(handler.accepted, 3 * kConnections);
  EXPECT_EQ(handler.closed, 3 * kConnections);
}

// The counter counts: else the test above would prove nothing.
TEST(AllocationCounterTest, Counts) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer has its own allocator";
  const uint64_t before = AllocationCount();
  const auto one = std::make_unique<std::array<int, 100>>();
  EXPECT_EQ(AllocationCount(), before + 1) << one.get();
}

}  // namespace
}  // namespace engram
