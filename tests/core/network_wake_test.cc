// Wait, and what ends it.

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "tests/core/network_rig.h"

namespace engram {
namespace {

using NetworkWakeTest = NetworkTest;
INSTANTIATE_TEST_SUITE_P(Backends, NetworkWakeTest, kBothBackends, BackendName);

TEST_P(NetworkWakeTest, WakeEndsTheNextWait) {
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

TEST_P(NetworkWakeTest, WaitEndsAfterItsTime) {
  Begin();
  Spin(3);
  // May end early, but not never, and a Wait without time does not block at all.
  network_->Wait(2 * kNanosPerMilli);
  network_->Wait(0);
}

TEST_P(NetworkWakeTest, WaitEndsWhenBytesCome) {
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
TEST_P(NetworkWakeTest, WakeFromAnotherThreadIsNeverLost) {
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

}  // namespace
}  // namespace engram
