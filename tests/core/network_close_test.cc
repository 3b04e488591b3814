// How connections end: by the peer, by an error, by us; and what is left of them.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <iterator>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "tests/core/network_rig.h"

namespace engram {
namespace {

using NetworkCloseTest = NetworkTest;
INSTANTIATE_TEST_SUITE_P(Backends, NetworkCloseTest, kBothBackends, BackendName);

TEST_P(NetworkCloseTest, AnswersAPeerThatEndsItsSide) {
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

TEST_P(NetworkCloseTest, HandsOverWhatCameBeforeThePeersEnd) {
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

TEST_P(NetworkCloseTest, ReportsAReset) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers);
  Spin(3);
  peers[0].Reset();
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kError);
  EXPECT_FALSE(network_->Send(id, RandomBytes(1, 1)));
}

TEST_P(NetworkCloseTest, ReportsAResetWhileSending) {
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

TEST_P(NetworkCloseTest, TheFirstCauseStays) {
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
TEST_P(NetworkCloseTest, AClosedConnectionNeverSeesAnothersBytes) {
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

TEST_P(NetworkCloseTest, CloseAfterSendingDeliversEverything) {
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

TEST_P(NetworkCloseTest, CloseAfterSendingWorksWhilePaused) {
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

TEST_P(NetworkCloseTest, CloseNowEndsAStuckCloseAfterSending) {
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

TEST_P(NetworkCloseTest, CloseNowIsReportedOnceAndFreesThePlace) {
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

TEST_P(NetworkCloseTest, HandlerMayCloseInsideItsCalls) {
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

// Connections that come and go in every way, with bytes under way, must leave no place, block or
// descriptor behind.
TEST_P(NetworkCloseTest, ChurnLeavesNothingBehind) {
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
      [&] { return ReadAll(peers); }));
}

}  // namespace
}  // namespace engram
