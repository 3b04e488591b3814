#include "src/core/simulated_network.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "src/core/clock.h"

namespace engram {
namespace {

using Bytes = std::vector<std::byte>;
using Handle = SimulatedNetwork::ClientHandle;

Bytes RandomBytes(uint64_t seed, size_t count) {
  std::mt19937_64 random(seed);
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

// Keeps what happened, also as a text that two runs can be compared by.
class Recorder : public NetworkHandler {
 public:
  explicit Recorder(SimulatedClock* clock) : clock_(clock) {}

  void OnAccept(ConnectionId connection) override {
    Note("accept", connection, 0);
    accepted.push_back(connection);
    if (on_accept) on_accept(connection);
  }
  void OnReceive(ConnectionId connection, std::span<const std::byte> bytes) override {
    Note("receive", connection, bytes.size());
    EXPECT_FALSE(bytes.empty());
    EXPECT_FALSE(IsClosed(connection)) << "OnClosed is the last event";
    for (std::byte byte : bytes) digest = digest * 31 + static_cast<uint64_t>(byte);
    Bytes& all = received[{connection.index, connection.generation}];
    all.insert(all.end(), bytes.begin(), bytes.end());
    if (on_receive) on_receive(connection, bytes);
  }
  void OnClosed(ConnectionId connection, CloseCause cause) override {
    Note("closed", connection, static_cast<size_t>(cause));
    EXPECT_FALSE(IsClosed(connection)) << "a connection closes once";
    closed[{connection.index, connection.generation}] = cause;
  }
  bool IsClosed(ConnectionId id) const { return closed.contains({id.index, id.generation}); }
  CloseCause CauseOf(ConnectionId id) const { return closed.at({id.index, id.generation}); }
  const Bytes& ReceivedFrom(ConnectionId id) { return received[{id.index, id.generation}]; }

  std::string trace;
  uint64_t digest = 0;
  std::vector<ConnectionId> accepted;
  std::map<std::pair<uint32_t, uint32_t>, Bytes> received;
  std::map<std::pair<uint32_t, uint32_t>, CloseCause> closed;
  std::function<void(ConnectionId)> on_accept;
  std::function<void(ConnectionId, std::span<const std::byte>)> on_receive;

 private:
  void Note(const char* what, ConnectionId id, size_t value) {
    trace += std::to_string(clock_->MonotonicNs()) + " " + what + " " + std::to_string(id.index) +
             "." + std::to_string(id.generation) + " " + std::to_string(value) + "\n";
  }
  SimulatedClock* clock_;
};

class SimulatedNetworkTest : public testing::Test {
 protected:
  void Begin(uint64_t seed = 1, const SimulatedNetworkOptions& options = {}) {
    network_ = std::make_unique<SimulatedNetwork>(&clock_, seed, options);
    ASSERT_TRUE(network_->Start().has_value());
  }
  // Steps the clock and polls until `done`; false when it takes too long.
  bool Until(const std::function<bool()>& done) {
    for (int i = 0; i < 200'000; ++i) {
      if (done()) return true;
      if (network_->Poll(handler_, 16) == 0) clock_.AdvanceNs(5 * kNanosPerMicro);
    }
    return false;
  }
  Handle Connect(ConnectionId* id) {
    const size_t before = handler_.accepted.size();
    const Handle client = network_->ClientConnect();
    EXPECT_TRUE(Until([&] { return handler_.accepted.size() > before; }));
    *id = handler_.accepted.back();
    return client;
  }
  void EchoAll() {
    handler_.on_receive = [this](ConnectionId id, std::span<const std::byte> bytes) {
      network_->Send(id, bytes);
    };
  }

  SimulatedClock clock_;
  Recorder handler_{&clock_};
  std::unique_ptr<SimulatedNetwork> network_;
};

TEST_F(SimulatedNetworkTest, NothingArrivesBeforeItsTime) {
  SimulatedNetworkOptions options;
  options.min_delay_ns = 1000;
  options.max_delay_ns = 2000;
  Begin(1, options);
  EXPECT_EQ(network_->backend(), "simulated");
  EXPECT_FALSE(network_->NextArrivalNs().has_value());
  network_->ClientConnect();
  clock_.AdvanceNs(999);
  EXPECT_EQ(network_->Poll(handler_, 16), 0);
  const auto next = network_->NextArrivalNs();
  ASSERT_TRUE(next.has_value());
  clock_.AdvanceNs(*next - clock_.MonotonicNs());
  EXPECT_EQ(network_->Poll(handler_, 16), 1);
  EXPECT_EQ(handler_.accepted.size(), 1u);
  const Bytes bytes = RandomBytes(1, 1);
  EXPECT_EQ(network_->ClientSend(0, bytes), 1u);
  EXPECT_EQ(network_->Poll(handler_, 16), 0);
  clock_.AdvanceNs(2000);
  EXPECT_EQ(network_->Poll(handler_, 16), 1);
  EXPECT_EQ(handler_.ReceivedFrom(handler_.accepted[0]), bytes);
}

struct NamedOptions {
  std::string name;
  SimulatedNetworkOptions options;
};
std::vector<NamedOptions> AllOptions() {
  std::vector<NamedOptions> all(7);
  all[0].name = "Default";
  all[1].name = "OneByteAtATime";
  all[1].options.max_chunk_bytes = 1;
  all[2].name = "NoDelay";
  all[2].options.min_delay_ns = all[2].options.max_delay_ns = 0;
  all[3].name = "AlwaysPartialSends";
  all[3].options.partial_send_probability = 1.0;
  all[4].name = "SmallWindows";
  all[4].options.client_window_bytes = 7;
  all[4].options.server_window_bytes = 11;
  all[5].name = "LargeChunks";
  all[5].options.max_chunk_bytes = size_t{1} << 20;
  all[6].name = "LongDelays";
  all[6].options.max_delay_ns = 20 * kNanosPerMilli;
  return all;
}

// Runs echoes on several connections and returns all that can be seen of it.
std::string RunEcho(uint64_t seed, const SimulatedNetworkOptions& options) {
  SimulatedClock clock;
  SimulatedNetwork network(&clock, seed, options);
  EXPECT_TRUE(network.Start().has_value());
  Recorder handler(&clock);
  handler.on_receive = [&](ConnectionId id, std::span<const std::byte> bytes) {
    network.Send(id, bytes);
  };
  constexpr size_t kClients = 3;
  std::vector<Bytes> sent, back(kClients);
  std::vector<size_t> taken(kClients, 0);
  for (size_t i = 0; i < kClients; ++i) {
    EXPECT_EQ(network.ClientConnect(), i);
    sent.push_back(RandomBytes(seed + i, 3000 + i));
  }
  std::string trace;
  for (int step = 0; step < 1'000'000; ++step) {
    bool done = true;
    for (Handle i = 0; i < kClients; ++i) {
      taken[i] += network.ClientSend(i, std::span(sent[i]).subspan(taken[i]));
      const Bytes got = network.ClientReceive(i);
      trace += std::to_string(got.size()) + " ";
      back[i].insert(back[i].end(), got.begin(), got.end());
      done = done && (back[i].size() >= sent[i].size() || network.ClientWasReset(i));
    }
    if (done) break;
    if (network.Poll(handler, 8) == 0) clock.AdvanceNs(kNanosPerMicro * 10);
  }
  for (size_t i = 0; i < kClients; ++i) {
    if (options.reset_probability == 0) {
      EXPECT_EQ(back[i], sent[i]) << "client " << i;
    } else {
      // What did come is a beginning of what was sent.
      EXPECT_LE(back[i].size(), sent[i].size());
      EXPECT_TRUE(std::equal(back[i].begin(), back[i].end(), sent[i].begin()));
    }
  }
  return handler.trace + trace + std::to_string(handler.digest);
}

TEST(SimulatedNetworkDeterminismTest, SameSeedSameTraceAndEveryByteInOrder) {
  for (const NamedOptions& named : AllOptions()) {
    SCOPED_TRACE(named.name);
    const std::string first = RunEcho(42, named.options);
    EXPECT_EQ(first, RunEcho(42, named.options));
    EXPECT_NE(first, RunEcho(43, named.options));
  }
}

TEST(SimulatedNetworkDeterminismTest, ResetsHappenAndRepeat) {
  SimulatedNetworkOptions options;
  options.reset_probability = 0.05;
  options.max_chunk_bytes = 100;
  size_t with_resets = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const std::string trace = RunEcho(seed, options);
    EXPECT_EQ(trace, RunEcho(seed, options));
    with_resets += trace.find("closed") != std::string::npos ? 1 : 0;
  }
  EXPECT_GT(with_resets, 10u);
}

TEST_F(SimulatedNetworkTest, CutsAtManyPlacesAndJoinsSends) {
  Begin();
  ConnectionId id;
  const Handle client = Connect(&id);
  std::set<size_t> sizes;
  handler_.on_receive = [&](ConnectionId, std::span<const std::byte> bytes) {
    sizes.insert(bytes.size());
  };
  for (int i = 0; i < 200; ++i) {
    const Bytes bytes = RandomBytes(1, 10);
    network_->ClientSend(client, bytes);
  }
  ASSERT_TRUE(Until([&] { return handler_.ReceivedFrom(id).size() == 2000; }));
  EXPECT_GT(sizes.size(), 5u);
  EXPECT_GT(*sizes.rbegin(), 10u) << "several sends arrive as one";
}

TEST_F(SimulatedNetworkTest, GracefulCloseComesAfterTheBytes) {
  Begin();
  ConnectionId id;
  const Handle client = Connect(&id);
  const Bytes bytes = RandomBytes(2, 20'000);
  ASSERT_EQ(network_->ClientSend(client, bytes), bytes.size());
  network_->ClientClose(client);
  EXPECT_EQ(network_->ClientSend(client, bytes), 0u);
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kPeerClosed);
  EXPECT_EQ(handler_.ReceivedFrom(id), bytes);
  EXPECT_FALSE(network_->Send(id, bytes));
}

TEST_F(SimulatedNetworkTest, HalfCloseStillGetsTheAnswer) {
  Begin();
  const Bytes reply = RandomBytes(3, 300'000);
  handler_.on_receive = [&](ConnectionId id, std::span<const std::byte>) {
    EXPECT_TRUE(network_->Send(id, reply));
  };
  ConnectionId id;
  const Handle client = Connect(&id);
  network_->ClientSend(client, RandomBytes(1, 1));
  network_->ClientShutdown(client);
  Bytes got;
  ASSERT_TRUE(Until([&] {
    const Bytes more = network_->ClientReceive(client);
    got.insert(got.end(), more.begin(), more.end());
    return network_->ClientClosedByServer(client);
  }));
  EXPECT_EQ(got, reply);
  EXPECT_FALSE(network_->ClientWasReset(client));
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kPeerClosed);
}

TEST_F(SimulatedNetworkTest, AbortIsAnErrorAndMayOvertake) {
  size_t overtaken = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    handler_ = Recorder(&clock_);
    Begin(seed);
    ConnectionId id;
    const Handle client = Connect(&id);
    const Bytes bytes = RandomBytes(seed, 50'000);
    network_->ClientSend(client, bytes);
    network_->ClientClose(client, true);
    ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
    EXPECT_EQ(handler_.CauseOf(id), CloseCause::kError);
    const Bytes& got = handler_.ReceivedFrom(id);
    EXPECT_TRUE(std::equal(got.begin(), got.end(), bytes.begin()));
    overtaken += got.size() < bytes.size() ? 1 : 0;
  }
  EXPECT_GT(overtaken, 0u);
}

TEST_F(SimulatedNetworkTest, AClientThatIsGoneTakesTheBacklogWithIt) {
  SimulatedNetworkOptions options;
  options.client_window_bytes = 1000;
  Begin(1, options);
  ConnectionId id;
  const Handle client = Connect(&id);
  ASSERT_TRUE(network_->Send(id, RandomBytes(1, 50'000)));
  network_->ClientClose(client);
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kPeerClosed);
  EXPECT_TRUE(network_->ClientReceive(client).empty());
}

TEST_F(SimulatedNetworkTest, CloseAfterSendingDeliversEverything) {
  Begin();
  ConnectionId id;
  const Handle client = Connect(&id);
  const Bytes bytes = RandomBytes(4, 500'000);
  ASSERT_TRUE(network_->Send(id, bytes));
  network_->Close(id, Network::CloseMode::kAfterSending);
  EXPECT_FALSE(network_->Send(id, bytes));
  Bytes got;
  ASSERT_TRUE(Until([&] {
    network_->ClientSend(client, RandomBytes(1, 10));
    const Bytes more = network_->ClientReceive(client);
    got.insert(got.end(), more.begin(), more.end());
    return network_->ClientClosedByServer(client);
  }));
  EXPECT_EQ(got, bytes);
  EXPECT_FALSE(handler_.IsClosed(id)) << "waits for the peer's end";
  network_->ClientClose(client);
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kLocal);
  EXPECT_TRUE(handler_.ReceivedFrom(id).empty());
}

TEST_F(SimulatedNetworkTest, CloseNowCutsTheBacklog) {
  Begin();
  ConnectionId id;
  const Handle client = Connect(&id);
  ASSERT_TRUE(network_->Send(id, RandomBytes(1, 500'000)));
  ASSERT_TRUE(Until([&] { return network_->SendBacklog(id) < 500'000; }));
  network_->Close(id, Network::CloseMode::kNow);
  network_->Close(id, Network::CloseMode::kNow);
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kLocal);
  ASSERT_TRUE(Until([&] { return network_->ClientClosedByServer(client); }));
  EXPECT_TRUE(network_->ClientWasReset(client));
  EXPECT_EQ(network_->ClientSend(client, RandomBytes(1, 1)), 0u);
}

TEST_F(SimulatedNetworkTest, AClientThatDoesNotReadFillsItsWindowThenTheLimit) {
  SimulatedNetworkOptions options;
  options.client_window_bytes = 10'000;
  options.network.send_limit_bytes = 50'000;
  Begin(1, options);
  ConnectionId slow;
  ConnectionId fast;
  const Handle slow_client = Connect(&slow);
  const Handle fast_client = Connect(&fast);
  const Bytes chunk = RandomBytes(1, 5000);
  size_t sent = 0;
  size_t got = 0;
  for (int i = 0; i < 100 && !handler_.IsClosed(slow); ++i) {
    network_->Send(slow, chunk);
    ASSERT_TRUE(network_->Send(fast, chunk));
    sent += chunk.size();
    ASSERT_LE(network_->SendBacklog(slow), 50'000u);
    ASSERT_TRUE(Until([&] {
      got += network_->ClientReceive(fast_client).size();
      return got == sent;
    }));
  }
  ASSERT_TRUE(handler_.IsClosed(slow));
  EXPECT_EQ(handler_.CauseOf(slow), CloseCause::kSendBacklog);
  EXPECT_FALSE(handler_.IsClosed(fast));
  EXPECT_EQ(network_->counters()[NetworkCounter::kSendBacklogCloses].Read(), 1u);
  EXPECT_LE(network_->ClientReceive(slow_client).size(), 10'000u);
  ASSERT_TRUE(Until([&] { return network_->ClientWasReset(slow_client); }));
}

TEST_F(SimulatedNetworkTest, SpentPoolClosesTheLargestBacklog) {
  SimulatedNetworkOptions options;
  options.client_window_bytes = 100;
  options.network.send_pool_bytes = 100'000;
  Begin(1, options);
  ConnectionId small;
  ConnectionId large;
  ConnectionId third;
  Connect(&small);
  Connect(&large);
  Connect(&third);
  ASSERT_TRUE(network_->Send(small, RandomBytes(1, 20'000)));
  ASSERT_TRUE(network_->Send(large, RandomBytes(1, 70'000)));
  ASSERT_TRUE(network_->Send(third, RandomBytes(1, 15'000)));
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(large); }));
  EXPECT_EQ(handler_.CauseOf(large), CloseCause::kSendBacklog);
  EXPECT_FALSE(handler_.IsClosed(small) || handler_.IsClosed(third));
  EXPECT_FALSE(network_->Send(third, RandomBytes(1, 100'001)));
  EXPECT_TRUE(Until([&] { return handler_.IsClosed(third); }));
  EXPECT_FALSE(handler_.IsClosed(small));
}

TEST_F(SimulatedNetworkTest, PauseStopsDeliveryAndFillsTheWindow) {
  SimulatedNetworkOptions options;
  options.server_window_bytes = 1000;
  Begin(1, options);
  ConnectionId id;
  const Handle client = Connect(&id);
  network_->SetReceivePaused(id, true);
  const Bytes bytes = RandomBytes(5, 3000);
  EXPECT_EQ(network_->ClientSend(client, bytes), 1000u);
  clock_.AdvanceNs(kNanosPerSecond);
  EXPECT_EQ(network_->Poll(handler_, 16), 0);
  EXPECT_EQ(network_->ClientSend(client, bytes), 0u);
  network_->SetReceivePaused(id, false);
  size_t taken = 1000;
  ASSERT_TRUE(Until([&] {
    taken += network_->ClientSend(client, std::span(bytes).subspan(taken));
    return handler_.ReceivedFrom(id).size() == bytes.size();
  }));
  EXPECT_EQ(handler_.ReceivedFrom(id), bytes);
}

TEST_F(SimulatedNetworkTest, RefusesConnectionsBeyondTheMostAndAfterStop) {
  SimulatedNetworkOptions options;
  options.network.max_connections = 1;
  Begin(1, options);
  ConnectionId id;
  const Handle first = Connect(&id);
  const Handle second = network_->ClientConnect();
  ASSERT_TRUE(Until([&] { return network_->ClientClosedByServer(second); }));
  EXPECT_TRUE(network_->ClientWasReset(second));
  EXPECT_EQ(network_->counters()[NetworkCounter::kConnectionsRefused].Read(), 1u);
  network_->ClientClose(first);
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(id); }));
  ConnectionId next;
  Connect(&next);
  EXPECT_EQ(next.index, id.index);
  EXPECT_NE(next.generation, id.generation);
  EXPECT_FALSE(network_->Send(id, RandomBytes(1, 1))) << "a stale id";
  network_->Close(next, Network::CloseMode::kNow);
  ASSERT_TRUE(Until([&] { return handler_.IsClosed(next); }));
  network_->StopAccepting();
  const Handle late = network_->ClientConnect();
  ASSERT_TRUE(Until([&] { return network_->ClientClosedByServer(late); }));
  EXPECT_EQ(handler_.accepted.size(), 2u);
}

TEST_F(SimulatedNetworkTest, KeepsToItsBudgetAndTakesTurns) {
  Begin();
  EchoAll();
  std::vector<ConnectionId> ids(5);
  for (ConnectionId& id : ids) Connect(&id);
  for (Handle client = 0; client < 5; ++client) {
    network_->ClientSend(client, RandomBytes(client, client == 0 ? 100'000 : 1));
  }
  clock_.AdvanceNs(kNanosPerSecond);
  for (int polls = 0; polls < 10; ++polls) EXPECT_EQ(network_->Poll(handler_, 1), 1);
  for (size_t i = 1; i < 5; ++i) EXPECT_EQ(handler_.ReceivedFrom(ids[i]).size(), 1u) << i;
}

TEST_F(SimulatedNetworkTest, ListenGivesOutPortsAndRefusesTakenOnes) {
  SimulatedNetwork network(&clock_, 1);
  const auto first = network.Listen({.host = "127.0.0.1", .port = 0});
  ASSERT_TRUE(first.has_value());
  EXPECT_NE(first->port, 0);
  const auto second = network.Listen({.host = "127.0.0.1", .port = 0});
  ASSERT_TRUE(second.has_value());
  EXPECT_NE(second->port, first->port);
  const auto taken = network.Listen(*first);
  ASSERT_FALSE(taken.has_value());
  EXPECT_EQ(taken.error().code, ErrorCode::kAlreadyExists);
  EXPECT_NE(taken.error().message.find(first->ToString()), std::string::npos);
}

TEST_F(SimulatedNetworkTest, WaitReturnsAndWakeIsSeen) {
  Begin();
  const int64_t before = clock_.MonotonicNs();
  network_->Wait(kNanosPerSecond);
  EXPECT_EQ(clock_.MonotonicNs(), before);
  EXPECT_FALSE(network_->woken());
  network_->Wake();
  EXPECT_TRUE(network_->woken());
  network_->Wait(kNanosPerSecond);
  EXPECT_FALSE(network_->woken());
}

}  // namespace
}  // namespace engram
