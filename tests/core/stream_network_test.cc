// Bytes to and fro, one connection or many, what one Poll does, and what clients are told.

#include "src/core/stream_network.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "tests/core/stream_rig.h"

namespace engram {
namespace {

TEST_F(StreamNetworkTest, NamesItselfAndDoesNotListen) {
  Begin();
  EXPECT_EQ(network_->backend(), "streams");
  const auto refused = network_->Listen({.host = "127.0.0.1", .port = 7654});
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(refused.error().message.find("127.0.0.1:7654"), std::string::npos);
}

TEST_F(StreamNetworkTest, EchoesOnTwoConnectionsApart) {
  Begin();
  EchoAll();
  TestClient& first = Accept();
  TestClient& second = Accept();
  EXPECT_NE(handler_.accepted[0], handler_.accepted[1]);
  for (size_t round = 0; round < 50; ++round) {
    const Bytes a = RandomBytes(1000 + round, 10 + 79 * round);
    const Bytes b = RandomBytes(2000 + round, 3 + 31 * round);
    first.received.clear();
    second.received.clear();
    ASSERT_TRUE(first.Write(a));
    ASSERT_TRUE(second.Write(b));
    Settle();
    first.Read();
    second.Read();
    ASSERT_EQ(first.received, a);
    ASSERT_EQ(second.received, b);
  }
  EXPECT_EQ(Count(NetworkCounter::kConnectionsAccepted), 2u);
  EXPECT_GT(Count(NetworkCounter::kBytesSent), 0u);
  EXPECT_EQ(Count(NetworkCounter::kBytesReceived), Count(NetworkCounter::kBytesSent));
}

TEST_F(StreamNetworkTest, ABytesWayNeedsOnePollEachWay) {
  Begin();
  EchoAll();
  TestClient& client = Accept();
  const Bytes bytes = RandomBytes(1, 100);
  ASSERT_TRUE(client.Write(bytes));
  EXPECT_EQ(Poll(), 1);
  EXPECT_EQ(client.ready, 1);
  client.Read();
  EXPECT_EQ(client.received, bytes);
}

TEST_F(StreamNetworkTest, AWriteIsTakenWholeOrNotAtAll) {
  Begin();
  TestClient& client = Accept();
  EXPECT_EQ(client.pipe->RoomAtMost(), 4096u);
  const Bytes a = RandomBytes(1, 3000);
  const Bytes b = RandomBytes(2, 1097);
  const std::array<std::span<const std::byte>, 3> both{a, {}, b};
  EXPECT_FALSE(client.pipe->Write(both)) << "more than the ring";
  Settle();
  EXPECT_TRUE(handler_.ReceivedFrom(Last()).empty());
  ASSERT_TRUE(client.Write(a));
  EXPECT_FALSE(client.Write(b));
  EXPECT_TRUE(client.Write({}));
  ASSERT_TRUE(client.Write(std::span(b).first(1096)));
  EXPECT_FALSE(client.Write(std::span(b).first(1)));
  Settle();
  Bytes expected = a;
  expected.insert(expected.end(), b.begin(), b.begin() + 1096);
  EXPECT_EQ(handler_.ReceivedFrom(Last()), expected);
  EXPECT_TRUE(client.Write(RandomBytes(3, 4096)));
}

// What does not fit into the ring waits in blocks of the pool: around their size, where parts
// straddle both.
TEST_F(StreamNetworkTest, ConcatenatesThePartsOfASend) {
  Begin();
  TestClient& client = Accept();
  Bytes expected;
  for (size_t size : {size_t{0}, size_t{1}, size_t{4'000}, size_t{4'096}, size_t{16'383},
                      size_t{16'384}, size_t{16'385}, size_t{70'000}}) {
    const Bytes a = RandomBytes(size, size);
    const Bytes b = RandomBytes(size + 1, 13);
    const std::array<std::span<const std::byte>, 3> parts{a, b, a};
    ASSERT_TRUE(network_->Send(Last(), std::span<const std::span<const std::byte>>(parts)));
    for (std::span<const std::byte> part : parts) {
      expected.insert(expected.end(), part.begin(), part.end());
    }
  }
  EXPECT_TRUE(network_->Send(Last(), std::span<const std::byte>()));
  EXPECT_EQ(network_->SendBacklog(Last()), expected.size() - 4096);
  for (int i = 0; i < 1000 && client.received.size() < expected.size(); ++i) {
    Settle();
    client.Read(1000);
  }
  EXPECT_TRUE(client.received == expected);
  EXPECT_EQ(network_->SendBacklog(Last()), 0u);
  EXPECT_EQ(Count(NetworkCounter::kBytesSent), expected.size());
}

TEST_F(StreamNetworkTest, StaleIdIsRefused) {
  StreamNetworkOptions options = SmallOptions();
  options.max_connections = 1;
  Begin(options);
  Accept().Close();
  const ConnectionId old = Last();
  Settle();
  ASSERT_TRUE(handler_.IsClosed(old));
  TestClient& client = Accept();
  ASSERT_EQ(Last().index, old.index);
  ASSERT_NE(Last().generation, old.generation);
  EXPECT_FALSE(network_->Send(old, RandomBytes(1, 10)));
  EXPECT_EQ(network_->SendBacklog(old), 0u);
  network_->SetReceivePaused(old, true);
  network_->Close(old, Network::CloseMode::kNow);
  EXPECT_FALSE(network_->Send({.index = 77, .generation = 1}, RandomBytes(1, 10)));
  EXPECT_FALSE(network_->Send({.index = UINT32_MAX, .generation = 1}, RandomBytes(1, 10)));
  // The new one in its place noticed nothing.
  EchoAll();
  const Bytes bytes = RandomBytes(2, 100);
  ASSERT_TRUE(client.Write(bytes));
  Settle();
  client.Read();
  EXPECT_EQ(client.received, bytes);
}

TEST_F(StreamNetworkTest, KeepsToItsBudget) {
  Begin();
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(Connect().Write(RandomBytes(1, 100)));
  EXPECT_EQ(Poll(0), 0);
  int sum = 0;
  for (int i = 0; i < 100 && sum < 60; ++i) {
    const int before = handler_.events;
    const int wakes = wakes_;
    const int returned = Poll(3);
    EXPECT_LE(returned, 3);
    EXPECT_EQ(handler_.events - before, returned);
    if (returned == 0) {
      EXPECT_GT(wakes_, wakes) << "more to do, and it may go to sleep";
    }
    sum += returned;
    if (sum >= 40 && clients_.front().pipe != nullptr) {
      for (TestClient& client : clients_) client.Close();  // 20 accepted, 20 received.
    }
  }
  EXPECT_EQ(sum, 60);
  EXPECT_EQ(Poll(3), 0);
}

// A connection that always has bytes waiting must not keep the others from being heard.
TEST_F(StreamNetworkTest, FastClientsDoNotStarveAQuietOne) {
  StreamNetworkOptions options = SmallOptions();
  options.ring_bytes = size_t{256} * 1024;
  Begin(options);
  for (int i = 0; i < 9; ++i) Accept();
  const ConnectionId quiet = handler_.accepted[0];
  handler_.on_receive = [](ConnectionId, std::span<const std::byte> bytes) {
    EXPECT_LE(bytes.size(), size_t{64} * 1024);
  };
  const Bytes flood = RandomBytes(1, 10'000);
  const auto pump = [&] {
    for (size_t i = 1; i < clients_.size(); ++i) {
      while (clients_[i].Write(flood)) {
      }
    }
  };
  for (int round = 0; round < 50; ++round) {
    pump();
    EXPECT_EQ(Poll(4), 4);
  }
  ASSERT_TRUE(clients_[0].Write(RandomBytes(2, 1)));
  int polls = 0;
  for (; handler_.ReceivedFrom(quiet).empty() && polls < 100; ++polls) {
    pump();
    Poll(4);
  }
  EXPECT_LE(polls, 4) << "its turn comes when the others have had theirs";
}

// Also where there are no events that would end a Poll.
TEST_F(StreamNetworkTest, OnePollServesABoundedNumberOfPipes) {
  StreamNetworkOptions options = SmallOptions();
  options.max_connections = 1000;
  Begin(options);
  for (int i = 0; i < 1000; ++i) Accept();
  for (ConnectionId id : handler_.accepted) network_->Close(id, Network::CloseMode::kAfterSending);
  const auto ended = [&] {
    return std::ranges::count_if(clients_, [](const TestClient& c) { return c.pipe->ended(); });
  };
  int polls = 0;
  for (auto before = ended(); before < 1000; ++polls) {
    const int wakes = wakes_;
    EXPECT_EQ(Poll(), 0);
    const auto now = ended();
    EXPECT_LE(now - before, 256);
    ASSERT_GT(now, before);
    if (now < 1000) {
      EXPECT_GT(wakes_, wakes) << "it may go to sleep";
    }
    before = now;
  }
  EXPECT_GE(polls, 4);
}

TEST_F(StreamNetworkTest, RefusesConnectionsBeyondTheMost) {
  StreamNetworkOptions options = SmallOptions();
  options.max_connections = 4;
  Begin(options);
  EchoAll();
  for (int i = 0; i < 4; ++i) Connect();
  TestClient late;
  EXPECT_EQ(network_->Connect(&late), nullptr) << "also before they are accepted";
  Settle();
  for (int i = 0; i < 2; ++i) EXPECT_EQ(network_->Connect(&late), nullptr);
  Poll();
  EXPECT_EQ(Count(NetworkCounter::kConnectionsRefused), 3u);
  EXPECT_EQ(handler_.accepted.size(), 4u);
  EXPECT_EQ(network_->open_pipes(), 4u);
  // The four go on, and a place that comes free is given out again.
  ASSERT_TRUE(clients_[0].Write(RandomBytes(1, 10)));
  Settle();
  EXPECT_EQ(clients_[0].Read(), 10u);
  clients_[1].Close();
  Settle();
  EXPECT_EQ(network_->open_pipes(), 3u);
  Accept();
  EXPECT_EQ(handler_.accepted.size(), 5u);
}

TEST_F(StreamNetworkTest, StopAcceptingRefusesNewAndKeepsOld) {
  Begin();
  EchoAll();
  TestClient& old = Accept();
  TestClient& under_way = Connect();
  network_->StopAccepting();
  network_->StopAccepting();
  TestClient late;
  EXPECT_EQ(network_->Connect(&late), nullptr);
  ASSERT_TRUE(old.Write(RandomBytes(1, 1000)));
  Settle();
  EXPECT_EQ(old.Read(), 1000u);
  // Nobody heard of the one that had not been accepted yet; its client does.
  EXPECT_EQ(handler_.accepted.size(), 1u);
  EXPECT_TRUE(under_way.pipe->ended());
  EXPECT_EQ(under_way.ready, 1);
  EXPECT_FALSE(under_way.Write(RandomBytes(1, 1)));
  under_way.Close();
  Settle();
  EXPECT_EQ(under_way.gone, 1);
  EXPECT_EQ(Count(NetworkCounter::kConnectionsRefused), 2u);
  EXPECT_EQ(Count(NetworkCounter::kConnectionsAccepted), 1u);
  EXPECT_EQ(network_->open_pipes(), 1u);
  EXPECT_TRUE(handler_.closed.empty());
}

TEST_F(StreamNetworkTest, WhatIsPausedStaysInTheRing) {
  Begin();
  TestClient& client = Accept();
  const ConnectionId id = Last();
  const Bytes bytes = RandomBytes(21, 20'000);
  ASSERT_TRUE(client.Write(std::span(bytes).first(1000)));
  Settle();
  network_->SetReceivePaused(id, true);
  ASSERT_TRUE(client.Write(std::span(bytes).subspan(1000, 4096)));
  EXPECT_FALSE(client.Write(std::span(bytes).first(1)));
  Settle();
  EXPECT_EQ(handler_.ReceivedFrom(id).size(), 1000u) << "read while paused";
  // Fast changes of mind, then on.
  for (int i = 0; i < 5; ++i) {
    network_->SetReceivePaused(id, false);
    network_->SetReceivePaused(id, true);
    Settle();
  }
  EXPECT_EQ(handler_.ReceivedFrom(id).size(), 1000u);
  const int wakes = wakes_;
  network_->SetReceivePaused(id, false);
  EXPECT_GT(wakes_, wakes) << "there is something to read now";
  for (size_t written = 5096; written < bytes.size();) {
    Settle();
    const size_t step = std::min<size_t>(4000, bytes.size() - written);
    ASSERT_TRUE(client.Write(std::span(bytes).subspan(written, step)));
    written += step;
  }
  Settle();
  EXPECT_TRUE(handler_.ReceivedFrom(id) == bytes);
}

TEST_F(StreamNetworkTest, PausedAtAcceptReceivesNothing) {
  Begin();
  handler_.on_accept = [&](ConnectionId id) { network_->SetReceivePaused(id, true); };
  TestClient& client = Connect();
  ASSERT_TRUE(client.Write(RandomBytes(1, 100)));
  Settle();
  EXPECT_TRUE(handler_.ReceivedFrom(Last()).empty());
  // Closing does not depend on being able to read.
  network_->Close(Last(), Network::CloseMode::kNow);
  Settle();
  EXPECT_TRUE(handler_.IsClosed(Last()));
}

TEST_F(StreamNetworkTest, TellsOfBytesOnceUntilTheyAreSeen) {
  Begin();
  TestClient& client = Accept();
  EXPECT_EQ(client.ready, 0) << "nothing came";
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(network_->Send(Last(), RandomBytes(1, 10)));
  EXPECT_EQ(client.ready, 0) << "only a Poll tells";
  Poll();
  EXPECT_EQ(client.ready, 1);
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(network_->Send(Last(), RandomBytes(1, 10)));
    Poll();
  }
  EXPECT_EQ(client.ready, 1) << "it knows, and has not looked yet";
  // To see all is enough: whoever waits for the rest of a frame need not consume its beginning.
  EXPECT_EQ(client.pipe->Peek().size(), 60u);
  Poll();
  EXPECT_EQ(client.ready, 1);
  ASSERT_TRUE(network_->Send(Last(), RandomBytes(1, 10)));
  Poll();
  EXPECT_EQ(client.ready, 2);
  EXPECT_EQ(client.Read(), 70u);
  // Seen before the Poll that would have told of it.
  ASSERT_TRUE(network_->Send(Last(), RandomBytes(1, 10)));
  EXPECT_EQ(client.Read(), 10u);
  Poll();
  EXPECT_EQ(client.ready, 2);
  ASSERT_TRUE(network_->Send(Last(), RandomBytes(1, 10)));
  Poll();
  EXPECT_EQ(client.ready, 3);
}

TEST_F(StreamNetworkTest, TellsOfRoomThatIsAwaited) {
  Begin();
  TestClient& client = Accept();
  network_->SetReceivePaused(Last(), true);
  EXPECT_FALSE(client.pipe->AwaitRoom(4096)) << "there is room already";
  ASSERT_TRUE(client.Write(RandomBytes(1, 4000)));
  EXPECT_FALSE(client.pipe->AwaitRoom(96));
  EXPECT_TRUE(client.pipe->AwaitRoom(97));
  Settle();
  EXPECT_EQ(client.ready, 0);
  network_->SetReceivePaused(Last(), false);
  Poll();
  EXPECT_EQ(client.ready, 1);
  ASSERT_TRUE(client.Write(RandomBytes(2, 97)));
  Settle();
  EXPECT_EQ(client.ready, 1) << "asked for once, told of once";
}

// Room for the whole frame, not for any byte.
TEST_F(StreamNetworkTest, TellsOfRoomWhenItIsEnough) {
  StreamNetworkOptions options = SmallOptions();
  options.ring_bytes = size_t{256} * 1024;
  Begin(options);
  TestClient& client = Accept();
  ASSERT_TRUE(client.Write(RandomBytes(1, 250'000)));
  EXPECT_TRUE(client.pipe->AwaitRoom(200'000));
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(Poll(), 1);
    EXPECT_EQ(client.ready, 0);
    EXPECT_FALSE(client.Write(RandomBytes(2, 200'000)));
  }
  EXPECT_EQ(Poll(), 1);
  EXPECT_EQ(client.ready, 1);
  EXPECT_TRUE(client.Write(RandomBytes(2, 200'000)));
}

TEST_F(StreamNetworkTest, WakesWhoeverSleepsElsewhere) {
  Begin();
  const auto woken_by = [&](auto&& call) {
    Settle();
    const int before = wakes_;
    call();
    return wakes_ > before;
  };
  TestClient* client = nullptr;
  EXPECT_TRUE(woken_by([&] { client = &Connect(); }));
  EXPECT_TRUE(woken_by([&] { EXPECT_TRUE(client->Write(RandomBytes(1, 10))); }));
  EXPECT_FALSE(woken_by([] {}));
  EXPECT_FALSE(woken_by([&] { EXPECT_FALSE(client->pipe->AwaitRoom(10)); }));
  // A client that reads what fits makes no work; one that makes room for more does.
  EXPECT_TRUE(woken_by([&] { EXPECT_TRUE(network_->Send(Last(), RandomBytes(1, 4096))); }));
  EXPECT_FALSE(woken_by([&] { EXPECT_EQ(client->Read(), 4096u); }));
  ASSERT_TRUE(network_->Send(Last(), RandomBytes(1, 5000)));
  EXPECT_FALSE(woken_by([&] { EXPECT_EQ(client->Read(1023), 1023u); })) << "not a quarter";
  EXPECT_TRUE(woken_by([&] { EXPECT_EQ(client->Read(1), 1u); }));
  EXPECT_EQ(network_->SendBacklog(Last()), 904u);
  Settle();
  EXPECT_EQ(network_->SendBacklog(Last()), 0u);
  EXPECT_TRUE(woken_by([&] { client->Close(); }));
}

// Between a Send outside Poll and the next Poll there may be a Wait.
TEST_F(StreamNetworkTest, DoesNotWaitWithWorkToDo) {
  Begin();
  const auto start = std::chrono::steady_clock::now();
  TestClient& client = Connect();
  network_->Wait(60 * kNanosPerSecond);
  Settle();
  ASSERT_TRUE(network_->Send(Last(), RandomBytes(1, 10)));
  network_->Wait(60 * kNanosPerSecond);
  Settle();
  network_->Close(Last(), Network::CloseMode::kAfterSending);
  network_->Wait(60 * kNanosPerSecond);
  Settle();
  client.Close();
  network_->Wait(60 * kNanosPerSecond);
  Settle();
  network_->Wake();
  network_->Wake();
  Poll();
  network_->Wait(60 * kNanosPerSecond);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
  network_->Wait(2 * kNanosPerMilli);  // May end early, but not never.
  network_->Wait(0);
}

// A client may do all of its work, and close, while it is told.
TEST_F(StreamNetworkTest, ClientsMayCallThePipeWhileTheyAreTold) {
  struct Answering final : StreamClient {
    void OnReady() override {
      std::span<const std::byte> bytes = pipe->Peek();
      for (; !bytes.empty(); bytes = pipe->Peek()) {
        EXPECT_TRUE(WriteBytes(pipe, bytes));
        pipe->Consume(bytes.size());
      }
      if (pipe->ended()) pipe->Close();
    }
    void OnGone() override { delete this; }
    StreamPipe* pipe = nullptr;
  };
  Begin();
  for (int i = 0; i < 10; ++i) {
    auto* client = new Answering;  // NOLINT: OnGone deletes it.
    client->pipe = network_->Connect(client);
    ASSERT_NE(client->pipe, nullptr);
  }
  Settle();
  for (ConnectionId id : handler_.accepted) {
    ASSERT_TRUE(network_->Send(id, RandomBytes(id.index, 1000)));
  }
  Settle();
  for (ConnectionId id : handler_.accepted) {
    EXPECT_TRUE(handler_.ReceivedFrom(id) == RandomBytes(id.index, 1000));
    network_->Close(id, Network::CloseMode::kAfterSending);
  }
  Settle();
  EXPECT_EQ(handler_.closed.size(), 10u);
  EXPECT_EQ(network_->open_pipes(), 0u);
}

using StreamNetworkDeathTest = StreamNetworkTest;

TEST_F(StreamNetworkDeathTest, RoomThatCannotBeIsNotWaitedFor) {
  Begin();
  TestClient& client = Connect();
  EXPECT_DEATH((void)client.pipe->AwaitRoom(4097), "waits for ever");
}

}  // namespace
}  // namespace engram
