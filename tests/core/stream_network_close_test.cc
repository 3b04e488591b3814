// How the connections of a StreamNetwork end, by the client or by us, what is left of them, and
// who does not read.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "src/core/stream_network.h"
#include "tests/core/stream_rig.h"

namespace engram {
namespace {

using StreamNetworkCloseTest = StreamNetworkTest;

TEST_F(StreamNetworkCloseTest, HandsOverWhatCameBeforeTheClientsClose) {
  Begin();
  TestClient& client = Connect();
  const Bytes bytes = RandomBytes(9, 4096);
  ASSERT_TRUE(client.Write(bytes));
  client.Close();  // All of it before the first Poll.
  Settle();
  ASSERT_EQ(handler_.accepted.size(), 1u);
  ASSERT_TRUE(handler_.IsClosed(Last()));
  EXPECT_EQ(handler_.CauseOf(Last()), CloseCause::kPeerClosed);
  EXPECT_TRUE(handler_.ReceivedFrom(Last()) == bytes);
  EXPECT_EQ(client.gone, 1);
  EXPECT_EQ(client.ready, 0);
  EXPECT_EQ(network_->open_pipes(), 0u);
}

TEST_F(StreamNetworkCloseTest, AClientThatClosedNeedsNothingSent) {
  Begin();
  TestClient& client = Accept();
  const ConnectionId id = Last();
  network_->SetReceivePaused(id, true);
  ASSERT_TRUE(network_->Send(id, RandomBytes(1, 100'000)));
  ASSERT_TRUE(client.Write(RandomBytes(2, 100)));
  client.Close();
  Settle();
  // That it closed is seen behind what it wrote, which is paused; what it will not read is not.
  EXPECT_FALSE(handler_.IsClosed(id));
  EXPECT_EQ(network_->SendBacklog(id), 0u);
  EXPECT_EQ(client.gone, 1);
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(network_->Send(id, RandomBytes(3, 100'000)));
  EXPECT_EQ(network_->SendBacklog(id), 0u);
  network_->SetReceivePaused(id, false);
  Settle();
  ASSERT_TRUE(handler_.IsClosed(id));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kPeerClosed);
  EXPECT_TRUE(handler_.ReceivedFrom(id) == RandomBytes(2, 100));
  EXPECT_EQ(client.gone, 1);
}

TEST_F(StreamNetworkCloseTest, CloseAfterSendingDeliversEverything) {
  Begin();
  TestClient& client = Accept();
  const ConnectionId id = Last();
  const Bytes bytes = RandomBytes(11, 200'000);
  ASSERT_TRUE(network_->Send(id, bytes));
  network_->Close(id, Network::CloseMode::kAfterSending);
  EXPECT_FALSE(network_->Send(id, bytes)) << "after Close nothing more is taken";
  EXPECT_GT(network_->SendBacklog(id), 0u);
  // The client goes on writing.
  for (int i = 0; i < 10'000 && !client.pipe->ended(); ++i) {
    ASSERT_EQ(client.received.size() == bytes.size(), false) << "read all, and is not ended";
    (void)client.Write(RandomBytes(12, 1000));
    Settle();
    client.Read(3000);
  }
  EXPECT_TRUE(client.pipe->ended());
  EXPECT_TRUE(client.received == bytes);
  EXPECT_FALSE(client.Write(RandomBytes(12, 1)));
  Settle();
  EXPECT_FALSE(handler_.IsClosed(id)) << "waits for the client's end";
  client.Close();
  Settle();
  ASSERT_TRUE(handler_.IsClosed(id));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kLocal);
  EXPECT_TRUE(handler_.ReceivedFrom(id).empty()) << "what comes after Close is not handed over";
}

TEST_F(StreamNetworkCloseTest, TheEndIsToldAlsoWithNothingToRead) {
  Begin();
  TestClient& client = Accept();
  network_->SetReceivePaused(Last(), true);
  EXPECT_FALSE(client.pipe->ended());
  network_->Close(Last(), Network::CloseMode::kAfterSending);
  Settle();
  EXPECT_EQ(client.ready, 1);
  EXPECT_TRUE(client.pipe->ended());
  client.Close();
  Settle();
  EXPECT_TRUE(handler_.IsClosed(Last()));
}

// A client that waits for room would wait for ever, as it writes to nobody.
TEST_F(StreamNetworkCloseTest, TheEndIsToldToWhoeverAwaitsRoom) {
  Begin();
  for (const auto mode : {Network::CloseMode::kAfterSending, Network::CloseMode::kNow}) {
    TestClient& client = Accept();
    network_->SetReceivePaused(Last(), true);
    ASSERT_TRUE(client.Write(RandomBytes(1, 4096)));
    EXPECT_TRUE(client.pipe->AwaitRoom(1));
    network_->Close(Last(), mode);
    Poll();
    EXPECT_EQ(client.ready, 1);
    EXPECT_FALSE(client.Write(RandomBytes(1, 1)));
    // It was told of the end, but it may have been about to ask.
    for (int again = 2; again < 4; ++again) {
      EXPECT_TRUE(client.pipe->AwaitRoom(1));
      Settle();
      EXPECT_EQ(client.ready, again);
    }
  }
}

TEST_F(StreamNetworkCloseTest, CloseNowEndsAtOnce) {
  Begin();
  TestClient& client = Accept();
  const ConnectionId id = Last();
  ASSERT_TRUE(client.Write(RandomBytes(1, 100)));
  const Bytes sent = RandomBytes(2, 10'000);
  ASSERT_TRUE(network_->Send(id, sent));
  const std::span<const std::byte> peeked = client.pipe->Peek().first(1000);
  network_->Close(id, Network::CloseMode::kNow);
  EXPECT_FALSE(handler_.IsClosed(id)) << "a later Poll tells";
  EXPECT_TRUE(client.pipe->ended());
  EXPECT_TRUE(client.pipe->Peek().empty()) << "what was not read is lost";
  EXPECT_FALSE(client.Write(RandomBytes(1, 1)));
  EXPECT_TRUE(std::ranges::equal(peeked, std::span(sent).first(1000)));
  client.pipe->Consume(1000);
  EXPECT_EQ(network_->SendBacklog(id), 0u);
  Poll();
  EXPECT_EQ(client.ready, 1);
  ASSERT_TRUE(handler_.IsClosed(id)) << "without the client";
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kLocal);
  EXPECT_TRUE(handler_.ReceivedFrom(id).empty());
  Settle();
  EXPECT_EQ(network_->open_pipes(), 1u) << "the client still holds it";
  EXPECT_EQ(client.gone, 0);
  client.Close();
  Settle();
  EXPECT_EQ(client.gone, 1);
  EXPECT_EQ(client.ready, 1);
  EXPECT_EQ(network_->open_pipes(), 0u);
  EXPECT_EQ(handler_.closed.size(), 1u);
}

TEST_F(StreamNetworkCloseTest, CloseNowEndsAStuckCloseAfterSending) {
  Begin();
  TestClient& client = Accept();
  const ConnectionId id = Last();
  ASSERT_TRUE(network_->Send(id, RandomBytes(1, 100'000)));
  network_->Close(id, Network::CloseMode::kAfterSending);
  Settle();
  EXPECT_FALSE(handler_.IsClosed(id));
  EXPECT_FALSE(client.pipe->ended());
  network_->Close(id, Network::CloseMode::kNow);
  network_->Close(id, Network::CloseMode::kNow);
  network_->Close(id, Network::CloseMode::kAfterSending);
  Settle();
  ASSERT_TRUE(handler_.IsClosed(id));
  EXPECT_EQ(handler_.CauseOf(id), CloseCause::kLocal);
  EXPECT_TRUE(client.pipe->ended());
}

TEST_F(StreamNetworkCloseTest, APlaceIsTakenUntilTheClientCloses) {
  StreamNetworkOptions options = SmallOptions();
  options.max_connections = 1;
  Begin(options);
  for (int round = 0; round < 20; ++round) {
    TestClient& client = Accept();
    network_->Close(Last(), Network::CloseMode::kNow);
    Settle();
    TestClient late;
    EXPECT_EQ(network_->Connect(&late), nullptr);
    client.Close();
    EXPECT_EQ(network_->Connect(&late), nullptr) << "the network does not know it yet";
    Settle();
  }
  EXPECT_EQ(handler_.closed.size(), 20u);
}

// More than keep their buffers while nobody has them.
TEST_F(StreamNetworkCloseTest, ManyPlacesAreUsedAgain) {
  StreamNetworkOptions options = SmallOptions();
  options.max_connections = 300;
  Begin(options);
  EchoAll();
  for (uint64_t round = 0; round < 3; ++round) {
    const size_t first = clients_.size();
    for (int i = 0; i < 300; ++i) Connect();
    for (size_t i = first; i < clients_.size(); ++i) {
      ASSERT_TRUE(clients_[i].Write(RandomBytes(i, 3000)));
    }
    Settle();
    for (size_t i = first; i < clients_.size(); ++i) {
      clients_[i].Read();
      ASSERT_TRUE(clients_[i].received == RandomBytes(i, 3000));
      clients_[i].Close();
    }
    Settle();
    EXPECT_EQ(network_->open_pipes(), 0u);
  }
  EXPECT_EQ(handler_.closed.size(), 900u);
}

TEST_F(StreamNetworkCloseTest, HandlerMayCloseInsideItsCalls) {
  Begin();
  handler_.on_accept = [&](ConnectionId id) {
    if (handler_.accepted.size() == 1) network_->Close(id, Network::CloseMode::kNow);
  };
  handler_.on_receive = [&](ConnectionId id, std::span<const std::byte>) {
    network_->Close(id, Network::CloseMode::kNow);
  };
  TestClient& first = Connect();
  ASSERT_TRUE(first.Write(RandomBytes(1, 100)));
  Settle();
  EXPECT_TRUE(handler_.ReceivedFrom(Last()).empty());
  TestClient& second = Accept();
  ASSERT_TRUE(second.Write(RandomBytes(1, 100)));
  Poll();
  (void)second.Write(RandomBytes(1, 100));
  Settle();
  EXPECT_EQ(handler_.closed.size(), 2u);
  EXPECT_EQ(handler_.ReceivedFrom(Last()).size(), 100u);
}

TEST_F(StreamNetworkCloseTest, SendLimitClosesOnlyTheSlowReader) {
  StreamNetworkOptions options = SmallOptions();
  options.send_limit_bytes = 100'000;
  Begin(options);
  TestClient& fast = Accept();
  const ConnectionId fast_id = Last();
  TestClient& slow = Accept();
  const ConnectionId slow_id = Last();
  const Bytes chunk = RandomBytes(31, 3000);
  Bytes expected;
  while (network_->Send(slow_id, chunk)) {
    ASSERT_LE(network_->SendBacklog(slow_id), options.send_limit_bytes);
    ASSERT_TRUE(network_->Send(fast_id, chunk));
    expected.insert(expected.end(), chunk.begin(), chunk.end());
    Settle();
    fast.Read();
  }
  EXPECT_GT(expected.size(), options.send_limit_bytes);
  EXPECT_FALSE(network_->Send(slow_id, chunk));
  EXPECT_TRUE(slow.pipe->ended()) << "cut off";
  Settle();
  ASSERT_TRUE(handler_.IsClosed(slow_id));
  EXPECT_EQ(handler_.CauseOf(slow_id), CloseCause::kSendBacklog);
  EXPECT_EQ(Count(NetworkCounter::kSendBacklogCloses), 1u);
  EXPECT_EQ(slow.ready, 2) << "of the first bytes, and of the end";
  EXPECT_FALSE(handler_.IsClosed(fast_id));
  EXPECT_TRUE(fast.received == expected);
}

// What is in the ring is the client's; the limit is for what is behind it.
TEST_F(StreamNetworkCloseTest, ASendBeyondTheLimitIsRefusedWhole) {
  StreamNetworkOptions options = SmallOptions();
  options.send_limit_bytes = 1000;
  Begin(options);
  Accept();
  EXPECT_TRUE(network_->Send(Last(), RandomBytes(1, 5096)));
  EXPECT_EQ(network_->SendBacklog(Last()), 1000u);
  EXPECT_FALSE(network_->Send(Last(), RandomBytes(1, 1)));
  Settle();
  EXPECT_EQ(handler_.CauseOf(Last()), CloseCause::kSendBacklog);
  Accept();
  EXPECT_FALSE(network_->Send(Last(), RandomBytes(1, 5097)));
  EXPECT_EQ(Count(NetworkCounter::kBytesSent), 4096u);
}

TEST_F(StreamNetworkCloseTest, SpentPoolClosesTheLargestBacklog) {
  StreamNetworkOptions options = SmallOptions();
  options.send_limit_bytes = SIZE_MAX;
  options.send_pool_bytes = size_t{1} << 20;
  Begin(options);
  // The largest is neither the first nor the last in the table.
  Accept();
  const ConnectionId small = Last();
  TestClient& large_client = Accept();
  const ConnectionId large = Last();
  Accept();
  const ConnectionId other = Last();
  ASSERT_TRUE(network_->Send(small, RandomBytes(1, 100'000)));
  ASSERT_TRUE(network_->Send(large, RandomBytes(1, 600'000)));
  ASSERT_TRUE(network_->Send(other, RandomBytes(1, 200'000)));
  EXPECT_TRUE(network_->Send(other, RandomBytes(2, 200'000))) << "at the cost of the largest";
  Settle();
  ASSERT_TRUE(handler_.IsClosed(large));
  EXPECT_EQ(handler_.CauseOf(large), CloseCause::kSendBacklog);
  EXPECT_TRUE(large_client.pipe->ended());
  EXPECT_FALSE(handler_.IsClosed(small));
  EXPECT_FALSE(handler_.IsClosed(other));
  EXPECT_EQ(network_->SendBacklog(other), 400'000u - 4096);
}

// A backlog that its client has made room for is sent before anybody is closed.
TEST_F(StreamNetworkCloseTest, SpentPoolSparesWhoeverHasRead) {
  StreamNetworkOptions options = SmallOptions();
  options.ring_bytes = size_t{64} * 1024;
  options.send_pool_bytes = size_t{16} * kSendBlockBytes;
  Begin(options);
  TestClient& client = Accept();
  const ConnectionId reads = Last();
  Accept();
  ASSERT_TRUE(network_->Send(reads, RandomBytes(1, options.ring_bytes + 10 * kSendBlockBytes)));
  EXPECT_EQ(client.Read(), options.ring_bytes);
  ASSERT_TRUE(network_->Send(Last(), RandomBytes(2, options.ring_bytes + 10 * kSendBlockBytes)));
  EXPECT_EQ(network_->SendBacklog(reads), 6 * kSendBlockBytes);
  EXPECT_EQ(Count(NetworkCounter::kSendBacklogCloses), 0u);
  while (client.Read() > 0) Settle();
  EXPECT_TRUE(client.received == RandomBytes(1, options.ring_bytes + 10 * kSendBlockBytes));
}

TEST_F(StreamNetworkCloseTest, ASendLargerThanThePoolHarmsOnlyItself) {
  StreamNetworkOptions options = SmallOptions();
  options.send_limit_bytes = SIZE_MAX;
  options.send_pool_bytes = size_t{1} << 20;
  Begin(options);
  TestClient& bystander = Accept();
  ASSERT_TRUE(network_->Send(Last(), RandomBytes(1, 100'000)));
  Accept();
  EXPECT_FALSE(network_->Send(Last(), RandomBytes(1, size_t{2} << 20)));
  Settle();
  EXPECT_EQ(handler_.CauseOf(Last()), CloseCause::kSendBacklog);
  while (bystander.Read() > 0) Settle();
  EXPECT_EQ(bystander.received.size(), 100'000u);
}

// Whoever closed and was not told yet may have something to free.
TEST_F(StreamNetworkCloseTest, TheDestructorLetsGoOfWhoeverClosed) {
  Begin();
  TestClient& told = Accept();
  TestClient& untold = Accept();
  TestClient& unknown = Connect();
  TestClient& holding = Connect();
  told.Close();
  Settle();
  untold.Close();
  unknown.Close();
  network_.reset();
  EXPECT_EQ(told.gone, 1);
  EXPECT_EQ(untold.gone, 1);
  EXPECT_EQ(unknown.gone, 1);
  EXPECT_EQ(holding.gone, 0);
}

// A program of connections that come and go in every way, one step at a time in any order, against
// a model of what each has said and heard.
class StreamChurnTest : public StreamNetworkTest {
 protected:
  struct Model {
    TestClient* client = nullptr;
    ConnectionId id{};
    bool accepted = false;
    bool ended = false;             // by us
    bool cut = false;               // by us at once, or for its backlog
    size_t handed_over_at_end = 0;  // of `written`
    Bytes written{};                // by the client
    Bytes sent{};                   // by us
  };

  void StepConnect() {
    TestClient& client = clients_.emplace_back();
    const bool full = network_->open_pipes() == options_.max_connections;
    client.pipe = network_->Connect(&client);
    ASSERT_EQ(client.pipe == nullptr, full);
    if (full) {
      clients_.pop_back();
    } else {
      models_.push_back({.client = &client});
    }
  }

  void StepClient(Model& model) {
    TestClient& client = *model.client;
    if (client.closed) return;
    const uint64_t choice = random_() % 16;
    if (choice < 6) {
      const Bytes bytes = RandomBytes(random_(), random_() % 1'100);
      if (!client.Write(bytes)) return;
      model.written.insert(model.written.end(), bytes.begin(), bytes.end());
    } else if (choice < 14) {
      client.Read(random_() % 3'000);
      if (client.pipe->ended() && !model.cut) {
        ASSERT_EQ(client.received, model.sent);
      }
    } else if (choice == 14 || client.pipe->ended()) {
      client.Close();
    }
  }

  void StepServer(Model& model) {
    if (!model.accepted || model.ended || handler_.IsClosed(model.id)) return;
    const uint64_t choice = random_() % 64;
    if (choice < 30) {
      const Bytes bytes = RandomBytes(random_(), random_() % (choice == 0 ? 100'000 : 1'500));
      if (network_->Send(model.id, bytes)) {
        model.sent.insert(model.sent.end(), bytes.begin(), bytes.end());
      } else {
        model.cut = true;
      }
    } else if (choice < 60) {
      network_->SetReceivePaused(model.id, choice % 2 == 0);
    } else {
      model.ended = true;
      model.cut = choice == 60;
      model.handed_over_at_end = handler_.ReceivedFrom(model.id).size();
      network_->Close(model.id,
                      model.cut ? Network::CloseMode::kNow : Network::CloseMode::kAfterSending);
    }
  }

  // They are accepted in the order in which they connected.
  void NoteAccepted() {
    for (Model& model : models_) {
      if (model.accepted || accepted_ == handler_.accepted.size()) continue;
      model.id = handler_.accepted[accepted_++];
      model.accepted = true;
    }
  }

  void ForgetClosed() {
    for (Model& model : models_) {
      if (!model.accepted || !handler_.IsClosed(model.id)) continue;
      // The pool may have been spent at its cost.
      if (handler_.CauseOf(model.id) == CloseCause::kSendBacklog) model.cut = true;
      if (!model.client->closed) model.client->Close();
      if (model.client->gone == 1) Check(model);
    }
    std::erase_if(models_, [&](Model& model) {
      return model.accepted && handler_.IsClosed(model.id) && model.client->gone == 1;
    });
  }

  // Of a connection that is over.
  void Check(const Model& model) {
    const TestClient& client = *model.client;
    ASSERT_LE(client.received.size(), model.sent.size());
    ASSERT_TRUE(std::equal(client.received.begin(), client.received.end(), model.sent.begin()));
    const Bytes& heard = handler_.ReceivedFrom(model.id);
    ASSERT_LE(heard.size(), model.written.size());
    ASSERT_TRUE(std::equal(heard.begin(), heard.end(), model.written.begin()));
    if (model.ended) {
      ASSERT_EQ(heard.size(), model.handed_over_at_end);
    } else if (!model.cut) {
      ASSERT_EQ(handler_.CauseOf(model.id), CloseCause::kPeerClosed);
      ASSERT_EQ(heard.size(), model.written.size());
      ++ended_by_client_;
    }
  }

  void CloseAll() {
    for (Model& model : models_) {
      network_->SetReceivePaused(model.id, false);
      if (!model.client->closed) model.client->Close();
    }
    Settle();
  }

  std::mt19937_64 random_{99};
  StreamNetworkOptions options_ = SmallOptions();
  std::vector<Model> models_;
  size_t accepted_ = 0;
  uint64_t ended_by_client_ = 0;
};

TEST_F(StreamChurnTest, KeepsEveryByteAndLeavesNothingBehind) {
  options_.max_connections = 16;
  options_.ring_bytes = 1024;
  options_.send_limit_bytes = 200'000;
  options_.send_pool_bytes = size_t{32} * kSendBlockBytes;
  Begin(options_);
  for (int round = 0; round < 100'000; ++round) {
    if (models_.size() < 20 && random_() % 8 == 0) StepConnect();
    if (!models_.empty()) StepClient(models_[random_() % models_.size()]);
    if (!models_.empty()) StepServer(models_[random_() % models_.size()]);
    if (random_() % 2 == 0) Poll(static_cast<int>(random_() % 8));
    NoteAccepted();
    ForgetClosed();
    if (HasFatalFailure()) FAIL() << "round " << round;
  }
  EXPECT_GT(handler_.accepted.size(), 1'000u);
  EXPECT_GT(ended_by_client_, 100u);
  CloseAll();
  EXPECT_EQ(handler_.closed.size(), handler_.accepted.size());
  EXPECT_EQ(network_->open_pipes(), 0u);
  EXPECT_TRUE(std::ranges::all_of(clients_, [](const TestClient& c) { return c.gone == 1; }));
  // All places and the whole pool are there again.
  const Bytes bytes = RandomBytes(1, options_.ring_bytes + 2 * kSendBlockBytes);
  const uint64_t backlog_closes = Count(NetworkCounter::kSendBacklogCloses);
  for (uint32_t i = 0; i < options_.max_connections; ++i) {
    Accept();
    ASSERT_TRUE(network_->Send(Last(), bytes));
  }
  EXPECT_EQ(Count(NetworkCounter::kSendBacklogCloses), backlog_closes);
  for (auto client = clients_.rbegin(); client != clients_.rbegin() + 16; ++client) {
    while (client->Read() > 0) Settle();
    EXPECT_TRUE(client->received == bytes);
  }
}

}  // namespace
}  // namespace engram
