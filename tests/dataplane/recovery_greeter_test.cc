// What connections meet while the daemon recovers, and how they go on.

#include "dataplane/recovery_greeter.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "dataplane/frame_format.h"
#include "src/core/clock.h"
#include "src/core/simulated_network.h"

namespace engram {
namespace {

std::vector<std::byte> FrameOf(FrameType type, uint16_t flags, uint64_t sequence,
                               std::string_view body = {}) {
  FrameHeader header{.type = type, .flags = flags, .sequence = sequence};
  const std::array<std::span<const std::byte>, 1> parts{BytesOf(body)};
  SealFrame(&header, parts);
  std::vector<std::byte> bytes(sizeof(header) + body.size());
  std::memcpy(bytes.data(), &header, sizeof(header));
  if (!body.empty()) std::memcpy(bytes.data() + sizeof(header), body.data(), body.size());
  return bytes;
}

// Counts what it is given.
class Next final : public NetworkHandler {
 public:
  void OnAccept(ConnectionId) override { ++accepted; }
  void OnReceive(ConnectionId, std::span<const std::byte> bytes) override {
    received += bytes.size();
  }
  void OnClosed(ConnectionId, CloseCause) override { ++closed; }
  int accepted = 0;
  int closed = 0;
  size_t received = 0;
};

class RecoveryGreeterTest : public testing::Test {
 protected:
  RecoveryGreeterTest() { EXPECT_TRUE(network_.Start().has_value()); }
  void Settle(NetworkHandler& handler) {
    for (int i = 0; i < 1'000; ++i) {
      clock_.AdvanceNs(10 * kNanosPerMicro);
      network_.Poll(handler, 64);
    }
  }
  void Say(SimulatedNetwork::ClientHandle client, std::span<const std::byte> bytes) {
    ASSERT_EQ(network_.ClientSend(client, bytes), bytes.size());
    Settle(greeter_);
  }

  SimulatedClock clock_;
  SimulatedNetwork network_{&clock_, 3};
  RecoveryGreeter greeter_{&network_, 10'000, [] { return std::string("7 of 9"); }};
  Next next_;
};

TEST_F(RecoveryGreeterTest, APingIsAnsweredHoweverItComes) {
  const auto client = network_.ClientConnect();
  Settle(greeter_);
  const auto ping = FrameOf(FrameType::kPing, 0, 5);
  for (const std::byte& each : ping) Say(client, {&each, 1});
  auto answers = network_.ClientReceive(client);
  ASSERT_EQ(answers.size(), kFrameHeaderBytes);
  const auto header = LoadAs<FrameHeader>(answers.data());
  EXPECT_EQ(header.type, FrameType::kPing);
  EXPECT_EQ(header.flags, kFrameFlagPingAnswer);
  EXPECT_EQ(header.sequence, 5u);
  // Two at once; an answer is not answered.
  std::vector<std::byte> more;
  for (const auto& each : {FrameOf(FrameType::kPing, 0, 6),
                           FrameOf(FrameType::kPing, kFrameFlagPingAnswer, 7), ping}) {
    for (const std::byte byte : each) more.push_back(byte);
  }
  Say(client, more);
  EXPECT_EQ(network_.ClientReceive(client).size(), 2 * kFrameHeaderBytes);
  EXPECT_EQ(greeter_.refused().Read(), 0u);
}

TEST_F(RecoveryGreeterTest, AnythingElseIsToldHowFarItIsAndWhenToComeAgain) {
  auto damaged = FrameOf(FrameType::kPing, 0, 5);
  damaged[30] ^= std::byte{1};
  for (const auto& bytes : {FrameOf(FrameType::kHello, 0, 0, "twelve bytes"), damaged,
                            std::vector<std::byte>(kFrameHeaderBytes)}) {
    const auto client = network_.ClientConnect();
    Settle(greeter_);
    Say(client, bytes);
    const auto answer = network_.ClientReceive(client);
    ASSERT_GE(answer.size(), kFrameHeaderBytes + sizeof(NakBody));
    EXPECT_EQ(LoadAs<FrameHeader>(answer.data()).type, FrameType::kNak);
    const auto body = LoadAs<NakBody>(answer.data() + kFrameHeaderBytes);
    EXPECT_EQ(body.reason, RefusalReason::kRecovering);
    EXPECT_EQ(body.flags, kNakFlagClosing);
    EXPECT_EQ(body.retry_after_ms, RecoveryGreeter::kRetryAfterMs);
    const std::string text(
        reinterpret_cast<const char*>(answer.data()) + kFrameHeaderBytes + sizeof(NakBody),
        body.text_bytes);
    EXPECT_EQ(text, "7 of 9");
    EXPECT_TRUE(network_.ClientClosedByServer(client));
  }
  EXPECT_EQ(greeter_.refused().Read(), 3u);
}

TEST_F(RecoveryGreeterTest, WhoHasSaidNothingOrOnlyPingedGoesOn) {
  const auto silent = network_.ClientConnect();
  const auto pinged = network_.ClientConnect();
  const auto refused = network_.ClientConnect();
  const auto begun = network_.ClientConnect();
  const auto gone = network_.ClientConnect();
  Settle(greeter_);
  const auto hello = FrameOf(FrameType::kHello, 0, 0, "twelve bytes");
  Say(pinged, FrameOf(FrameType::kPing, 0, 1));
  Say(refused, hello);
  Say(begun, std::span(hello).first(7));
  network_.ClientClose(gone);
  Settle(greeter_);

  greeter_.HandOver(&next_);
  Settle(next_);
  EXPECT_EQ(next_.accepted, 2);
  EXPECT_TRUE(network_.ClientClosedByServer(begun));
  EXPECT_FALSE(network_.ClientClosedByServer(silent));
  ASSERT_EQ(network_.ClientSend(silent, hello), hello.size());
  ASSERT_EQ(network_.ClientSend(pinged, hello), hello.size());
  Settle(next_);
  EXPECT_EQ(next_.received, 2 * hello.size());
}

}  // namespace
}  // namespace engram
