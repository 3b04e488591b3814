// Where a network listens, and how addresses are written.

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "tests/core/network_rig.h"

namespace engram {
namespace {

using NetworkAddressTest = NetworkTest;
INSTANTIATE_TEST_SUITE_P(Backends, NetworkAddressTest, kBothBackends, BackendName);

TEST_P(NetworkAddressTest, TakenPortIsAnErrorWithAddressAndRemedy) {
  Begin();
  auto other = CreateNetwork(GetParam(), SmallOptions(), nullptr);
  ASSERT_TRUE(other.has_value());
  const auto failed = (*other)->Listen(endpoint_);
  ASSERT_FALSE(failed.has_value());
  EXPECT_EQ(failed.error().code, ErrorCode::kAlreadyExists);
  EXPECT_NE(failed.error().message.find(endpoint_.ToString()), std::string::npos)
      << failed.error().message;
  EXPECT_NE(failed.error().message.find("set another port"), std::string::npos);
  const auto foreign = (*other)->Listen({.host = "192.0.2.1", .port = 0});
  ASSERT_FALSE(foreign.has_value());
  EXPECT_EQ(foreign.error().code, ErrorCode::kInvalidArgument);
  const auto nonsense = (*other)->Listen({.host = "no.such.host", .port = 0});
  ASSERT_FALSE(nonsense.has_value());
  EXPECT_EQ(nonsense.error().code, ErrorCode::kInvalidArgument);
}

TEST_P(NetworkAddressTest, PortIsFreeAgainAfterTheNetworkEnds) {
  Begin();
  std::vector<Peer> peers;
  const ConnectionId id = Accept(peers, 0, 4096);
  ASSERT_TRUE(network_->Send(id, RandomBytes(1, size_t{4} << 20)));  // A send stays under way.
  Spin(10);
  for (int round = 0; round < 10; ++round) {
    network_.reset();
    handler_ = Recorder();  // The next network counts its generations from 1 again.
    auto created = CreateNetwork(GetParam(), SmallOptions(), nullptr);
    ASSERT_TRUE(created.has_value());
    network_ = std::move(*created);
    const auto endpoint = network_->Listen(endpoint_);
    ASSERT_TRUE(endpoint.has_value()) << endpoint.error().message;
    ASSERT_TRUE(network_->Start().has_value());
    Accept(peers);
    Spin(2);
  }
}

TEST_P(NetworkAddressTest, ListensOnIpv6) {
  const int fd = socket(AF_INET6, SOCK_STREAM, 0);
  sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_addr = in6addr_loopback;
  const bool has_v6 =
      fd >= 0 && bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  if (fd >= 0) close(fd);
  if (!has_v6) GTEST_SKIP() << "this machine has no IPv6 loopback";
  Begin(SmallOptions(), "::1");
  EchoAll();
  EXPECT_EQ(endpoint_.ToString(), "[::1]:" + std::to_string(endpoint_.port));
  std::vector<Peer> peers;
  Accept(peers);
  const Bytes bytes = RandomBytes(1, 1000);
  peers[0].Write(bytes);
  EXPECT_TRUE(Until([&] { return peers[0].received == bytes; }, [&] { return peers[0].Read(); }));
}

TEST_P(NetworkAddressTest, ListensOnSeveralAddresses) {
  auto created = CreateNetwork(GetParam(), SmallOptions(), nullptr);
  ASSERT_TRUE(created.has_value());
  network_ = std::move(*created);
  const auto first = network_->Listen({.host = "127.0.0.1", .port = 0});
  const auto second = network_->Listen({.host = "localhost", .port = 0});
  ASSERT_TRUE(first.has_value() && second.has_value());
  ASSERT_TRUE(network_->Start().has_value());
  const Peer a(*first);
  const Peer b({.host = "127.0.0.1", .port = second->port});
  EXPECT_TRUE(Until([&] { return handler_.accepted.size() == 2; }));
}

TEST(EndpointTest, ParsesAndPrints) {
  struct Case {
    std::string text, host;
    uint16_t port;
  };
  for (const Case& c : std::vector<Case>{{"127.0.0.1:7654", "127.0.0.1", 7654},
                                         {"0.0.0.0:0", "0.0.0.0", 0},
                                         {"[::1]:65535", "::1", 65535},
                                         {"[::]:1", "::", 1},
                                         {"localhost:80", "127.0.0.1", 80}}) {
    const auto parsed = ParseEndpoint(c.text);
    ASSERT_TRUE(parsed.has_value()) << parsed.error().message;
    EXPECT_EQ(parsed->host, c.host);
    EXPECT_EQ(parsed->port, c.port);
    if (c.host != "127.0.0.1" || c.port == 7654) {
      EXPECT_EQ(parsed->ToString(), c.text);
    }
  }
}

TEST(EndpointTest, RefusesWhatIsNoAddress) {
  for (const char* text : {"",
                           ":",
                           "127.0.0.1",
                           "127.0.0.1:",
                           "127.0.0.1:65536",
                           "127.0.0.1:-1",
                           "127.0.0.1:+1",
                           "127.0.0.1: 1",
                           "127.0.0.1:1x",
                           "127.0.0.1:0x10",
                           "127.0.0.256:1",
                           "::1:80",
                           "[::1]",
                           "[::1]:",
                           "[::1:80",
                           "[127.0.0.1]:80",
                           "[localhost]:80",
                           "[]:80",
                           ":7654",
                           "example.org:80",
                           "127.0.0.1:99999999999999999999"}) {
    const auto parsed = ParseEndpoint(text);
    ASSERT_FALSE(parsed.has_value()) << text;
    EXPECT_EQ(parsed.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(parsed.error().message.find("\"" + std::string(text) + "\""), std::string::npos);
    EXPECT_NE(parsed.error().message.find("127.0.0.1:7654"), std::string::npos);
  }
}

}  // namespace
}  // namespace engram
