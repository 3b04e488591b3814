// Who is not read from, and who does not read: pauses, the limit of a connection's backlog, the
// pool that all of them share.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <random>
#include <span>
#include <vector>

#include "tests/core/network_rig.h"

namespace engram {
namespace {

using NetworkBackpressureTest = NetworkTest;
INSTANTIATE_TEST_SUITE_P(Backends, NetworkBackpressureTest, kBothBackends, BackendName);

TEST_P(NetworkBackpressureTest, PauseStopsReadingUntilThePeerBlocks) {
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

TEST_P(NetworkBackpressureTest, PausingAtRandomLosesNothing) {
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

TEST_P(NetworkBackpressureTest, PausedAtAcceptReceivesNothing) {
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

TEST_P(NetworkBackpressureTest, SendLimitClosesOnlyTheSlowReader) {
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

TEST_P(NetworkBackpressureTest, ASendBeyondTheLimitIsRefusedWhole) {
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

TEST_P(NetworkBackpressureTest, SpentPoolClosesTheLargestBacklog) {
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

TEST_P(NetworkBackpressureTest, ASendLargerThanThePoolHarmsOnlyItself) {
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

TEST_P(NetworkBackpressureTest, ManySmallSendsShareASmallPool) {
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

}  // namespace
}  // namespace engram
