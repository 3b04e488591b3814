// Bytes to and fro, one connection or many, and what one Poll does.

#include "src/core/network.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <random>
#include <span>
#include <vector>

#include "tests/core/network_rig.h"

namespace engram {
namespace {

INSTANTIATE_TEST_SUITE_P(Backends, NetworkTest, kBothBackends, BackendName);

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
      [&] { return ReadAll(peers); }));
  for (size_t i = 0; i < peers.size(); ++i) EXPECT_TRUE(peers[i].received == sent[i]) << i;
}

TEST_P(NetworkTest, RefusesConnectionsBeyondTheMost) {
  NetworkOptions options = SmallOptions();
  options.max_connections = 4;
  Begin(options);
  EchoAll();
  std::vector<Peer> peers;
  for (int i = 0; i < 4; ++i) Accept(peers);
  for (int i = 0; i < 3; ++i) peers.emplace_back(endpoint_);
  const auto read_all = [&] { return ReadAll(peers); };
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

}  // namespace
}  // namespace engram
