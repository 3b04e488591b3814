#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <utility>

#include "src/core/stream_network.h"
#include "tests/core/network_rig.h"
#include "tests/support/random_bytes.h"

// What the tests of StreamNetwork that need one thread only share.

namespace engram {

inline bool WriteBytes(StreamPipe* pipe, std::span<const std::byte> bytes) {
  const std::array<std::span<const std::byte>, 1> parts{bytes};
  return pipe->Write(parts);
}

// A client's end that keeps what it reads and counts what it was told.
struct TestClient final : StreamClient {
  void OnReady() override {
    EXPECT_EQ(gone, 0) << "OnGone is the last call";
    ++ready;
  }
  void OnGone() override {
    EXPECT_TRUE(closed) << "only whoever closes is let go";
    ++gone;
  }
  bool Write(std::span<const std::byte> bytes) const { return WriteBytes(pipe, bytes); }
  // Reads what is there, at most `most`. Returns how much that was.
  size_t Read(size_t most = SIZE_MAX) {
    size_t read = 0;
    while (read < most) {
      std::span<const std::byte> bytes = pipe->Peek();
      bytes = bytes.first(std::min(bytes.size(), most - read));
      if (bytes.empty()) break;
      received.insert(received.end(), bytes.begin(), bytes.end());
      pipe->Consume(bytes.size());
      read += bytes.size();
    }
    return read;
  }
  void Close() {
    closed = true;
    std::exchange(pipe, nullptr)->Close();
  }

  StreamPipe* pipe = nullptr;
  Bytes received;
  int ready = 0;
  int gone = 0;
  bool closed = false;
};

class StreamNetworkTest : public testing::Test {
 protected:
  static StreamNetworkOptions SmallOptions() {
    StreamNetworkOptions options;
    options.max_connections = 64;
    options.ring_bytes = 4096;
    options.send_limit_bytes = size_t{1} << 20;
    options.send_pool_bytes = size_t{4} << 20;
    return options;
  }

  void Begin(const StreamNetworkOptions& options = SmallOptions()) {
    auto created = StreamNetwork::Create(options);
    ASSERT_TRUE(created.has_value()) << created.error().message;
    network_ = std::move(*created);
    network_->SetWake([this] { ++wakes_; });
    ASSERT_TRUE(network_->Start().has_value());
  }

  TestClient& Connect() {
    TestClient& client = clients_.emplace_back();
    client.pipe = network_->Connect(&client);
    EXPECT_NE(client.pipe, nullptr);
    return client;
  }
  // Connects, and has it accepted; the server's name for it is accepted_.back().
  TestClient& Accept() {
    TestClient& client = Connect();
    const size_t before = handler_.accepted.size();
    Settle();
    EXPECT_EQ(handler_.accepted.size(), before + 1);
    return client;
  }
  ConnectionId Last() const { return handler_.accepted.back(); }

  int Poll(int budget = kBudget) { return network_->Poll(handler_, budget); }
  // Until there is nothing more to do: no events, and no wish to be polled again.
  void Settle() {
    for (int quiet = 0; quiet < 2;) {
      const int wakes = wakes_;
      quiet = Poll() == 0 && wakes_ == wakes ? quiet + 1 : 0;
    }
  }
  void EchoAll() {
    handler_.on_receive = [this](ConnectionId id, std::span<const std::byte> bytes) {
      EXPECT_TRUE(network_->Send(id, bytes));
    };
  }
  uint64_t Count(NetworkCounter counter) const { return network_->counters()[counter].Read(); }

  static constexpr int kBudget = 64;
  // Clients and handler outlive the network, which may still have something to tell them.
  std::deque<TestClient> clients_;  // never move
  Recorder handler_;
  int wakes_ = 0;
  std::unique_ptr<StreamNetwork> network_;
};

}  // namespace engram
