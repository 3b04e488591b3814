// In a program of its own, since it replaces operator new for the whole program.

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "src/core/clock.h"
#include "src/core/network.h"

namespace {
std::atomic<bool> counting{false};
std::atomic<uint64_t> allocations{0};

void* Allocate(std::size_t bytes, std::size_t alignment) {
  if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1);
  void* memory =
      alignment <= alignof(std::max_align_t)
          ? std::malloc(bytes)
          : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) std::abort();
  return memory;
}
}  // namespace

// GCC sees through operator delete to free() but not through operator new to malloc().
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
void* operator new(std::size_t bytes) { return Allocate(bytes, 1); }
void* operator new[](std::size_t bytes) { return Allocate(bytes, 1); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return Allocate(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return Allocate(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

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
  allocations = 0;
  counting = true;
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
  counting = false;
  EXPECT_EQ(allocations.load(), 0u);
  EXPECT_EQ(handler.accepted, wanted);
  EXPECT_EQ(handler.closed, wanted);
}

// The counter counts: else the test above would prove nothing.
TEST(AllocationCounterTest, Counts) {
  allocations = 0;
  counting = true;
  const auto one = std::make_unique<std::array<int, 100>>();
  counting = false;
  EXPECT_EQ(allocations.load(), 1u) << one.get();
}

}  // namespace
}  // namespace engram
