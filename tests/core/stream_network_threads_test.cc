// Clients of a StreamNetwork on threads of their own, and a core that sleeps whenever it has
// nothing to do: everything arrives once and in order, and no wake-up is lost in either direction.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/doorbell.h"
#include "src/core/stream_network.h"
#include "tests/support/random_bytes.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

// A sleep as long as this was not ended by what should have ended it.
constexpr int64_t kLostNs = 30 * kNanosPerSecond;

// A client's end that its thread sleeps on.
class SleepingClient final : public StreamClient {
 public:
  void OnReady() override {
    const std::lock_guard lock(mutex_);
    ready_ = true;
    changed_.notify_one();
  }
  void OnGone() override {
    // Under the lock to the end: whoever waits may delete this.
    const std::lock_guard lock(mutex_);
    gone_ = true;
    changed_.notify_one();
  }
  // False when a wake-up was lost.
  [[nodiscard]] bool WaitReady() {
    std::unique_lock lock(mutex_);
    const bool came =
        changed_.wait_for(lock, std::chrono::nanoseconds(kLostNs), [&] { return ready_; });
    ready_ = false;
    return came;
  }
  [[nodiscard]] bool WaitGone() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::nanoseconds(kLostNs), [&] { return gone_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ready_ = false;
  bool gone_ = false;
};

// The thread of a core: rounds until Stop and until all pipes were given back, and sleep when a
// round found nothing.
class CoreThread {
 public:
  // `sleeps_elsewhere`: as a CoreRunner whose sleeper is not this network; else in Wait.
  CoreThread(StreamNetwork* network, bool sleeps_elsewhere)
      : network_(network), elsewhere_(sleeps_elsewhere), bell_(*Doorbell::Create()) {
    if (!elsewhere_) return;
    network_->SetWake([this] {
      if (sleeping_.load(std::memory_order_relaxed)) bell_.Wake();
    });
  }
  void Run(const std::function<int()>& round) {
    // Clients are let go before what they wrote is handed over.
    while (!stop_.load(std::memory_order_relaxed) ||
           (network_->open_pipes() > 0 && !lost_a_wake())) {
      if (round() > 0) continue;
      const int64_t began_ns = clock_.MonotonicNs();
      if (elsewhere_) {
        Sleep(round);
      } else {
        network_->Wait(kLostNs);
      }
      longest_sleep_ns_ = std::max(longest_sleep_ns_, clock_.MonotonicNs() - began_ns);
    }
  }
  void Stop() {
    stop_.store(true, std::memory_order_relaxed);
    network_->Wake();
    bell_.Wake();
  }
  // After Run.
  bool lost_a_wake() const { return longest_sleep_ns_ >= kLostNs; }

 private:
  // As CoreRunner::Sleep.
  void Sleep(const std::function<int()>& round) {
    sleeping_.store(true, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (round() == 0 && !stop_.load(std::memory_order_relaxed)) bell_.Wait(kLostNs);
    sleeping_.store(false, std::memory_order_relaxed);
  }

  StreamNetwork* const network_;
  const bool elsewhere_;
  Doorbell bell_;
  SystemClock clock_;
  int64_t longest_sleep_ns_ = 0;
  std::atomic<bool> sleeping_{false};
  std::atomic<bool> stop_{false};
};

// What is to happen on one connection; both sides make it from the seed, which is what the client
// writes first.
struct Script {
  enum class End : uint8_t { kClient, kClientUnread, kAfterSending, kNow };

  explicit Script(uint64_t its_seed) : seed(its_seed) {
    std::mt19937_64 random(seed);
    const auto size = [&] { return random() % 4 == 0 ? random() % 200'000 : random() % 3'000; };
    to_network = sizeof(seed) + size();
    to_client = size();
    end = static_cast<End>(random() % 4);
    ends_after = 1 + random() % to_network;
  }
  // Byte of either direction.
  std::byte At(bool is_to_network, uint64_t position) const {
    if (is_to_network && position < sizeof(seed)) {
      return static_cast<std::byte>(seed >> (8 * position));
    }
    const uint64_t mixed = (seed + (is_to_network ? 1 : 2) + position) * 0x9E3779B97F4A7C15;
    return static_cast<std::byte>(mixed >> 56);
  }
  Bytes Make(bool is_to_network, uint64_t position, size_t size) const {
    Bytes bytes(size);
    for (size_t i = 0; i < size; ++i) bytes[i] = At(is_to_network, position + i);
    return bytes;
  }
  bool Agrees(bool is_to_network, uint64_t position, std::span<const std::byte> bytes) const {
    for (size_t i = 0; i < bytes.size(); ++i) {
      if (bytes[i] != At(is_to_network, position + i)) return false;
    }
    return true;
  }

  uint64_t seed;
  uint64_t to_network = 0;  // bytes
  uint64_t to_client = 0;
  uint64_t ends_after = 0;  // received, where the network's side ends it
  End end = End::kClient;
};

// The network's side: reads, checks, pauses, sends and ends as the scripts say.
class ScriptedHandler final : public NetworkHandler {
 public:
  explicit ScriptedHandler(StreamNetwork* network) : network_(network) {}

  void OnAccept(ConnectionId id) override { peers_.try_emplace(id.index, id); }
  void OnReceive(ConnectionId id, std::span<const std::byte> bytes) override {
    Peer& peer = peers_.at(id.index);
    if (!peer.script) {
      ASSERT_GE(bytes.size(), sizeof(uint64_t)) << "written at once";
      uint64_t seed = 0;
      std::memcpy(&seed, bytes.data(), sizeof(seed));
      peer.script = std::make_unique<Script>(seed);
    }
    wrong += peer.script->Agrees(true, peer.received, bytes) ? 0 : 1;
    wrong += peer.ended ? 1 : 0;
    peer.received += bytes.size();
    peer.paused = random_() % 8 == 0;
    network_->SetReceivePaused(id, peer.paused);
  }
  void OnClosed(ConnectionId id, CloseCause cause) override {
    const Peer& peer = peers_.at(id.index);
    if (cause == CloseCause::kPeerClosed) {
      wrong += !peer.script || peer.received != peer.script->to_network ? 1 : 0;
    } else {
      wrong += cause != CloseCause::kLocal || !peer.ended ? 1 : 0;
    }
    peers_.erase(id.index);
    ++closed;
  }

  // What the core does beside Poll; returns whether there is more of it whatever clients do.
  int Step() {
    int more = 0;
    for (auto& [index, peer] : peers_) more += StepPeer(peer);
    return more;
  }

  uint64_t wrong = 0;
  uint64_t closed = 0;

 private:
  struct Peer {
    explicit Peer(ConnectionId its_id) : id(its_id) {}
    ConnectionId id;
    std::unique_ptr<Script> script{};
    uint64_t received = 0;
    uint64_t sent = 0;
    bool paused = false;
    bool ended = false;
  };

  int StepPeer(Peer& peer) {
    if (!peer.script || peer.ended) return 0;
    const Script& script = *peer.script;
    if (peer.paused && random_() % 4 == 0) {
      peer.paused = false;
      network_->SetReceivePaused(peer.id, false);
    }
    const size_t left = script.to_client - peer.sent;
    if (left > 0 && network_->SendBacklog(peer.id) < 50'000) {
      const size_t size = std::min<size_t>(left, 1 + random_() % 20'000);
      EXPECT_TRUE(network_->Send(peer.id, script.Make(false, peer.sent, size)));
      peer.sent += size;
    }
    const bool all_sent = peer.sent == script.to_client;
    if (script.end >= Script::End::kAfterSending && peer.received >= script.ends_after) {
      if (script.end == Script::End::kNow || all_sent) {
        peer.ended = true;
        network_->Close(peer.id, script.end == Script::End::kNow
                                     ? Network::CloseMode::kNow
                                     : Network::CloseMode::kAfterSending);
        return 0;
      }
    }
    return peer.paused || (!all_sent && network_->SendBacklog(peer.id) < 50'000) ? 1 : 0;
  }

  StreamNetwork* const network_;
  std::mt19937_64 random_{5};
  std::map<uint32_t, Peer> peers_;
};

// The client's side of one connection.
class ScriptedClient {
 public:
  ScriptedClient(StreamNetwork* network, uint64_t seed)
      : script_(seed), random_(seed + 1), network_(network) {}

  // True when it went as the script says.
  bool Run() {
    // Places come back only once what was written before Close is handed over.
    while ((pipe_ = network_->Connect(&client_)) == nullptr) std::this_thread::yield();
    while (sound_ && !IsOver()) {
      for (uint64_t i = random_() % 8; i > 4; --i) std::this_thread::yield();
      const bool read = Read();
      const bool wrote = Write();
      if (!read && !wrote && !IsOver()) Expect(client_.WaitReady(), "a wake-up was lost");
    }
    if (pipe_->ended()) {
      Expect(script_.end >= Script::End::kAfterSending, "ended, though it is the client's to end");
      Expect(script_.end == Script::End::kNow || read_ == script_.to_client, "ended too early");
    }
    pipe_->Close();
    Expect(client_.WaitGone(), "not let go");
    return sound_;
  }

 private:
  bool IsOver() {
    if (pipe_->ended()) return true;
    if (script_.end >= Script::End::kAfterSending || written_ < script_.to_network) return false;
    return script_.end == Script::End::kClientUnread || read_ == script_.to_client;
  }

  void Expect(bool holds, const char* what) {
    EXPECT_TRUE(holds) << what << ", seed " << script_.seed;
    sound_ = sound_ && holds;
  }

  bool Read() {
    const auto bytes = pipe_->Peek();
    if (bytes.empty()) return false;
    const size_t size = random_() % 2 == 0 ? bytes.size() : 1 + random_() % bytes.size();
    Expect(script_.Agrees(false, read_, bytes.first(size)), "bytes that were not sent");
    pipe_->Consume(size);
    read_ += size;
    return true;
  }

  // False when there is nothing to write, or it waits for room.
  bool Write() {
    const size_t left = script_.to_network - written_;
    if (left == 0) return false;
    if (next_.empty()) {
      const size_t least = written_ == 0 ? sizeof(uint64_t) : 1;
      const size_t size = std::min(left, least + random_() % (pipe_->RoomAtMost() - least));
      next_ = script_.Make(true, written_, size);
    }
    const auto all = std::span<const std::byte>(next_);
    const std::array<std::span<const std::byte>, 2> parts{all.first(all.size() / 3),
                                                          all.subspan(all.size() / 3)};
    if (!pipe_->Write(parts)) return !pipe_->AwaitRoom(next_.size());
    written_ += next_.size();
    next_.clear();
    return true;
  }

  const Script script_;
  std::mt19937_64 random_;
  StreamNetwork* const network_;
  SleepingClient client_;
  StreamPipe* pipe_ = nullptr;
  uint64_t written_ = 0;
  uint64_t read_ = 0;
  Bytes next_;  // what it writes next
  bool sound_ = true;
};

struct ThreadsCase {
  const char* name;
  bool sleeps_elsewhere;
  size_t ring_bytes;
};

class StreamNetworkThreadsTest : public testing::TestWithParam<ThreadsCase> {
 protected:
  static std::unique_ptr<StreamNetwork> Create(uint32_t max_connections) {
    StreamNetworkOptions options;
    options.max_connections = max_connections;
    options.ring_bytes = GetParam().ring_bytes;
    options.send_pool_bytes = size_t{8} << 20;
    auto network = StreamNetwork::Create(options);
    EXPECT_TRUE(network.has_value() && (*network)->Start().has_value());
    return std::move(*network);
  }
};

INSTANTIATE_TEST_SUITE_P(Cases, StreamNetworkThreadsTest,
                         testing::Values(ThreadsCase{"WaitTinyRing", false, 64},
                                         ThreadsCase{"WaitRing", false, 16'384},
                                         ThreadsCase{"ElsewhereTinyRing", true, 64},
                                         ThreadsCase{"ElsewhereRing", true, 16'384}),
                         [](const auto& param) { return std::string(param.param.name); });

TEST_P(StreamNetworkThreadsTest, ScriptsOfManyConnectionsArePlayedToTheirEnds) {
  constexpr uint64_t kThreads = 4;
  constexpr uint64_t kConnections = kSanitized ? 20 : 100;  // of a thread, in a tiny ring
  const uint64_t connections = kConnections * (GetParam().ring_bytes > 64 ? 10 : 1);
  auto network = Create(2 * kThreads);
  CoreThread core(network.get(), GetParam().sleeps_elsewhere);
  ScriptedHandler handler(network.get());
  std::thread polling([&] {
    core.Run([&] {
      const int events = network->Poll(handler, 8);
      return events + handler.Step();
    });
  });
  std::atomic<uint64_t> unsound{0};
  std::vector<std::thread> clients;
  for (uint64_t thread = 0; thread < kThreads; ++thread) {
    clients.emplace_back([&, thread] {
      for (uint64_t i = 0; i < connections; ++i) {
        const uint64_t seed = (thread + 1) * 1'000'003 + i;
        ScriptedClient client(network.get(), seed);
        if (client.Run()) continue;
        ++unsound;
        return;  // Rather than wait again and again for what was lost.
      }
    });
  }
  for (std::thread& client : clients) client.join();
  core.Stop();
  polling.join();
  EXPECT_EQ(unsound.load(), 0u);
  EXPECT_EQ(handler.wrong, 0u);
  EXPECT_EQ(handler.closed, kThreads * connections);
  EXPECT_FALSE(core.lost_a_wake());
  EXPECT_EQ(network->open_pipes(), 0u);
}

class EchoHandler final : public NetworkHandler {
 public:
  explicit EchoHandler(StreamNetwork* network) : network_(network) {}
  void OnAccept(ConnectionId) override {}
  void OnReceive(ConnectionId id, std::span<const std::byte> bytes) override {
    network_->Send(id, bytes);
  }
  void OnClosed(ConnectionId, CloseCause) override { ++closed; }
  uint64_t closed = 0;

 private:
  StreamNetwork* const network_;
};

// Each side waits for the other with every message: where wake-ups are most easily lost.
TEST_P(StreamNetworkThreadsTest, EveryMessageOfAConversationWakesTheOther) {
  constexpr uint64_t kMessages = kSanitized ? 5'000 : 20'000;
  auto network = Create(4);
  CoreThread core(network.get(), GetParam().sleeps_elsewhere);
  EchoHandler handler(network.get());
  std::thread polling([&] { core.Run([&] { return network->Poll(handler, 8); }); });
  std::atomic<uint64_t> unsound{0};
  const auto talk = [&](uint64_t seed) {
    SleepingClient client;
    StreamPipe* const pipe = network->Connect(&client);
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < kMessages && wrong == 0; ++i) {
      const uint64_t message = seed + i;
      const std::array<std::span<const std::byte>, 1> parts{std::as_bytes(std::span(&message, 1))};
      wrong += pipe->Write(parts) ? 0 : 1;
      uint64_t answer = 0;
      size_t got = 0;
      while (got < sizeof(answer) && wrong == 0) {
        const auto bytes = pipe->Peek();
        const size_t step = std::min(bytes.size(), sizeof(answer) - got);
        if (step == 0) {
          wrong += client.WaitReady() ? 0 : 1;
          continue;
        }
        std::memcpy(reinterpret_cast<std::byte*>(&answer) + got, bytes.data(), step);
        pipe->Consume(step);
        got += step;
      }
      wrong += answer != message ? 1 : 0;
    }
    pipe->Close();
    unsound += wrong + (client.WaitGone() ? 0 : 1);
  };
  std::thread other([&] { talk(1'000'000'000); });
  talk(1);
  other.join();
  core.Stop();
  polling.join();
  EXPECT_EQ(unsound.load(), 0u);
  EXPECT_EQ(handler.closed, 2u);
  EXPECT_FALSE(core.lost_a_wake());
}

// Places are given out and back in the middle of each other's calls.
TEST_P(StreamNetworkThreadsTest, ConnectAndCloseAreNeverLost) {
  constexpr uint64_t kThreads = 4;
  constexpr uint64_t kAttempts = kSanitized ? 1'000 : 10'000;  // of a thread
  auto network = Create(3);
  CoreThread core(network.get(), GetParam().sleeps_elsewhere);
  EchoHandler handler(network.get());
  std::thread polling([&] { core.Run([&] { return network->Poll(handler, 8); }); });
  std::atomic<uint64_t> connected{0};
  std::atomic<uint64_t> refused{0};
  std::atomic<uint64_t> unsound{0};
  std::vector<std::thread> clients;
  for (uint64_t thread = 0; thread < kThreads; ++thread) {
    clients.emplace_back([&] {
      const std::array<std::byte, 3> bytes{};
      const std::array<std::span<const std::byte>, 1> parts{bytes};
      for (uint64_t i = 0; i < kAttempts; ++i) {
        SleepingClient client;
        StreamPipe* const pipe = network->Connect(&client);
        if (pipe == nullptr) {
          ++refused;
          std::this_thread::yield();
          continue;
        }
        ++connected;
        if (i % 2 == 0) unsound += pipe->Write(parts) ? 0 : 1;
        pipe->Close();
        if (client.WaitGone()) continue;
        ++unsound;
        return;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  core.Stop();
  polling.join();
  EXPECT_EQ(unsound.load(), 0u);
  EXPECT_EQ(connected.load() + refused.load(), kThreads * kAttempts);
  EXPECT_EQ(handler.closed, connected.load());
  EXPECT_GT(connected.load(), kAttempts);
  EXPECT_EQ(network->open_pipes(), 0u);
  EXPECT_FALSE(core.lost_a_wake());
}

}  // namespace
}  // namespace engram
