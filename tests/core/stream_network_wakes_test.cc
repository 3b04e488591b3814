// Two threads that meet in the few instructions between what one side publishes and its look at
// whether the other waits: where a missing fence, or a second look left out, loses a wake-up. Both
// spin, with pauses of random length, so that they meet often; whoever was to be told gives up
// after a while.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <thread>
#include <utility>

#include "src/core/clock.h"
#include "src/core/stream_network.h"
#include "tests/support/random_bytes.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr int64_t kLostNs = 20 * kNanosPerSecond;
constexpr uint64_t kRounds = kSanitized ? 20'000 : 200'000;
// On a machine that is busy otherwise the two seldom run at the same time: no more rounds then.
constexpr int64_t kLongEnoughNs = 4 * kNanosPerSecond;

// False where it did not come about for long.
template <typename Done>
bool SpinUntil(Done&& done) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::nanoseconds(kLostNs);
  for (uint64_t i = 1; !done(); ++i) {
    if (i % 256 != 0) continue;
    if (std::chrono::steady_clock::now() > deadline) return done();
    std::this_thread::yield();  // The other may need this processor.
  }
  return true;
}

// Some instructions, up to some hundred nanoseconds.
class RandomPause {
 public:
  explicit RandomPause(uint64_t seed) : random_(seed) {}
  void operator()() {
    for (uint64_t i = random_() % 128; i > 0; --i) std::atomic_signal_fence(kOrder);
  }

 private:
  static constexpr std::memory_order kOrder = std::memory_order_seq_cst;
  std::mt19937_64 random_;
};

class Rounds {
 public:
  bool GoOn(uint64_t round) const {
    return round <= kRounds && (round % 64 != 0 || std::chrono::steady_clock::now() - began_ <
                                                       std::chrono::nanoseconds(kLongEnoughNs));
  }

 private:
  const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
};

class SpinningClient final : public StreamClient {
 public:
  void OnReady() override { ready_.store(true, std::memory_order_release); }
  void OnGone() override { gone_.store(true, std::memory_order_release); }
  bool WaitReady() {
    return SpinUntil([this] { return ready_.exchange(false, std::memory_order_acquire); });
  }
  bool is_gone() const { return gone_.load(std::memory_order_acquire); }

 private:
  std::atomic<bool> ready_{false};
  std::atomic<bool> gone_{false};
};

class LastConnection final : public NetworkHandler {
 public:
  void OnAccept(ConnectionId its_id) override { id = its_id; }
  void OnReceive(ConnectionId, std::span<const std::byte> bytes) override {
    received += bytes.size();
  }
  void OnClosed(ConnectionId, CloseCause) override {}

  ConnectionId id;
  uint64_t received = 0;
};

// One connection, accepted; this thread is the core's.
class StreamNetworkWakesTest : public testing::Test {
 protected:
  void SetUp() override {
    StreamNetworkOptions options;
    options.max_connections = 1;
    options.ring_bytes = 64;
    options.send_pool_bytes = kSendBlockBytes;
    auto network = StreamNetwork::Create(options);
    ASSERT_TRUE(network.has_value() && (*network)->Start().has_value());
    network_ = std::move(*network);
    pipe_ = network_->Connect(&client_);
    ASSERT_NE(pipe_, nullptr);
    while (Poll() > 0) {
    }
  }
  // After the client's thread.
  void TearDown() override {
    pipe_->Close();
    EXPECT_TRUE(SpinUntil([this] {
      Poll();
      return client_.is_gone();
    }));
  }
  int Poll() { return network_->Poll(handler_, 8); }
  bool Send(size_t bytes) {
    return network_->Send(handler_.id, std::span<const std::byte>(bytes_).first(bytes));
  }
  bool Write(size_t bytes) {
    const std::array<std::span<const std::byte>, 1> parts{std::span(bytes_).first(bytes)};
    return pipe_->Write(parts);
  }

  const std::array<std::byte, 128> bytes_{};
  SpinningClient client_;
  LastConnection handler_;
  std::unique_ptr<StreamNetwork> network_;
  StreamPipe* pipe_ = nullptr;
  // How far each side is, for the other to begin its next round.
  std::atomic<uint64_t> core_rounds_{0};
  std::atomic<uint64_t> client_rounds_{0};
};

// A client writes just as the core goes to sleep.
TEST_F(StreamNetworkWakesTest, ACoreThatFallsAsleepIsWoken) {
  std::atomic<bool> stop{false};
  uint64_t sent = 0;
  std::thread client([&] {
    RandomPause pause(1);
    const Rounds rounds;
    for (uint64_t round = 1; rounds.GoOn(round); ++round) {
      pause();
      EXPECT_TRUE(Write(1));
      sent = round;
      if (!SpinUntil([&] { return core_rounds_.load(std::memory_order_acquire) == round; })) break;
    }
    stop.store(true);
    network_->Wake();
  });
  SystemClock clock;
  while (!stop.load()) {
    while (Poll() > 0) core_rounds_.store(handler_.received, std::memory_order_release);
    const int64_t began_ns = clock.MonotonicNs();
    network_->Wait(kLostNs / 2);
    EXPECT_LT(clock.MonotonicNs() - began_ns, kLostNs / 2);
  }
  client.join();
  EXPECT_EQ(handler_.received, sent);
}

// The second half of a frame comes just as the client sees the first, which it leaves in the ring.
TEST_F(StreamNetworkWakesTest, AClientThatWaitsForTheRestOfAFrameIsTold) {
  std::atomic<bool> lost{false};
  std::thread client([&] {
    RandomPause pause(2);
    // Frames divide the ring, so none is cut at its end.
    for (uint64_t round = 1; !lost.load(); ++round) {
      while (!pipe_->ended() && pipe_->Peek().size() < 16) {
        lost = lost || !client_.WaitReady();
        if (lost) return;
        pause();
      }
      if (pipe_->ended()) return;
      pipe_->Consume(16);
      client_rounds_.store(round, std::memory_order_release);
    }
  });
  RandomPause pause(3);
  const Rounds rounds;
  for (uint64_t round = 1; rounds.GoOn(round) && !lost; ++round) {
    EXPECT_TRUE(Send(8));
    Poll();
    pause();
    EXPECT_TRUE(Send(8));
    Poll();
    SpinUntil([&] { return lost || client_rounds_.load(std::memory_order_acquire) == round; });
  }
  network_->Close(handler_.id, Network::CloseMode::kNow);
  Poll();
  client.join();
  EXPECT_FALSE(lost);
}

// The client takes all that is in the ring just as the network finds it full.
TEST_F(StreamNetworkWakesTest, ANetworkThatWaitsForRoomIsRoused) {
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> read{0};
  std::thread client([&] {
    RandomPause pause(4);
    for (;;) {
      size_t bytes = 0;
      SpinUntil([&] { return (bytes = pipe_->Peek().size()) > 0 || stop.load(); });
      if (bytes == 0) return;
      pause();
      pipe_->Consume(bytes);
      read.store(read.load(std::memory_order_relaxed) + bytes, std::memory_order_release);
    }
  });
  RandomPause pause(5);
  const Rounds rounds;
  for (uint64_t round = 1; rounds.GoOn(round); ++round) {
    EXPECT_TRUE(Send(64));
    pause();
    EXPECT_TRUE(Send(8));
    const bool all = SpinUntil([&] {
      Poll();
      return read.load(std::memory_order_acquire) == round * 72;
    });
    EXPECT_TRUE(all) << "in round " << round;
    if (!all) break;
  }
  stop.store(true);
  client.join();
}

// The network takes all that is in the ring just as the client finds it full.
TEST_F(StreamNetworkWakesTest, AClientThatWaitsForRoomIsTold) {
  std::atomic<bool> stop{false};
  uint64_t written = 0;
  std::thread client([&] {
    RandomPause pause(6);
    const Rounds rounds;
    for (uint64_t round = 1; rounds.GoOn(round); ++round) {
      // What is written first is on its way while the room for the rest is asked for.
      bool sound = Write(40);
      pause();
      while (sound && !Write(40)) {
        if (pipe_->AwaitRoom(40)) sound = client_.WaitReady();
      }
      while (sound && !Write(64)) {
        if (pipe_->AwaitRoom(64)) sound = client_.WaitReady();
      }
      while (sound && pipe_->AwaitRoom(64)) sound = client_.WaitReady();
      EXPECT_TRUE(sound) << "in round " << round;
      if (!sound) break;
      written = round * 144;
    }
    stop.store(true);
  });
  RandomPause pause(7);
  while (!stop.load(std::memory_order_relaxed)) {
    SpinUntil([&] { return Poll() > 0 || stop.load(std::memory_order_relaxed); });
    pause();
  }
  client.join();
  EXPECT_EQ(handler_.received, written);
}

}  // namespace
}  // namespace engram
