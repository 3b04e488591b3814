#include "src/control/http_gateway.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "src/core/check.h"

// The server with clients of bare sockets, and nobody behind it but the test, which answers calls
// or does not. What every call and stream answers is in tests/integration/http_test.py and
// websocket_test.py; here is what only happens when the other side is late or gone.

namespace engram {
namespace {

constexpr int kWaitS = 60;

// One connection that waits for what it reads.
class Client {
 public:
  explicit Client(const HttpGateway& server) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(server.endpoint().port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const timeval wait{.tv_sec = kWaitS, .tv_usec = 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait));
    CHECK(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0,
          "the server listens");
  }
  ~Client() { Close(); }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  void Close() {
    if (fd_ >= 0) close(std::exchange(fd_, -1));
  }

  void Send(std::string_view bytes) const {
    (void)!send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  void Get(std::string_view target) const {
    Send("GET " + std::string(target) + " HTTP/1.1\r\nHost: x\r\n\r\n");
  }
  // Until it has `end`, or the server closes.
  std::string ReadUntil(std::string_view end) {
    for (;;) {
      const size_t at = come_.find(end);
      if (at != std::string::npos) {
        std::string read = come_.substr(0, at + end.size());
        come_.erase(0, at + end.size());
        return read;
      }
      char bytes[4096];
      const ssize_t size = recv(fd_, bytes, sizeof(bytes), 0);
      if (size <= 0) return std::exchange(come_, {});
      come_.append(bytes, static_cast<size_t>(size));
    }
  }
  bool Ended() {
    char byte = 0;
    return come_.empty() && recv(fd_, &byte, 1, 0) <= 0;
  }
  // The payload of the next frame, which is short; its opcode in front. Empty: the server closed.
  std::string ReadFrame() {
    const std::string head = ReadBytes(2);
    if (head.size() < 2) return "";
    size_t size = static_cast<unsigned char>(head[1]);
    if (size == 126) {
      const std::string more = ReadBytes(2);
      size = static_cast<size_t>(static_cast<unsigned char>(more[0])) << 8 |
             static_cast<unsigned char>(more[1]);
    }
    return std::string(1, static_cast<char>('0' + (head[0] & 15))) + ReadBytes(size);
  }
  void Upgrade() {
    Send(
        "GET /v1/stream HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n");
    const std::string head = ReadUntil("\r\n\r\n");
    ASSERT_TRUE(head.starts_with("HTTP/1.1 101")) << head;
    // RFC 6455, 1.3.
    ASSERT_NE(head.find("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), std::string::npos) << head;
  }
  // Masked with zeros.
  void SendText(std::string_view text) const {
    CHECK(text.size() < 126, "a short text");
    Send(std::string("\x81") + static_cast<char>(0x80 | text.size()) + std::string(4, '\0') +
         std::string(text));
  }

 private:
  std::string ReadBytes(size_t size) {
    while (come_.size() < size) {
      char bytes[4096];
      const ssize_t got = recv(fd_, bytes, sizeof(bytes), 0);
      if (got <= 0) return "";
      come_.append(bytes, static_cast<size_t>(got));
    }
    std::string read = come_.substr(0, size);
    come_.erase(0, size);
    return read;
  }

  int fd_;
  std::string come_;
};

class HttpGatewayTest : public testing::Test {
 protected:
  void Start(HttpOptions options = {}) {
    options.endpoint = {.host = "127.0.0.1", .port = 0};
    streams_ = StreamNetwork::Create({}).value();
    server_ = HttpGateway::Start(options, GatewayDoor(&inbox_, &retry_after_ms_, [] {}), &clock_,
                                 &spaces_, streams_.get())
                  .value();
  }
  void TearDown() override {
    // What was asked is answered, or the server would wait for it.
    std::jthread answers([this](const std::stop_token& stop) {
      while (!stop.stop_requested()) {
        if (GatewayCall* call = TryTake()) call->Answered();
        std::this_thread::yield();
      }
    });
    server_.reset();
  }

  // The next call that was submitted; nullptr: none is there. What was cancelled is counted.
  GatewayCall* TryTake() {
    const auto command = inbox_.TryPop();
    if (!command) return nullptr;
    if (command->kind == GatewayCommand::Kind::kStart) return command->call;
    ++cancelled_;
    command->call->DropReference();
    return nullptr;
  }
  GatewayCall* Take() {
    for (;;) {
      if (GatewayCall* call = TryTake()) return call;
      std::this_thread::yield();
    }
  }

  SystemClock clock_;
  SpaceCatalogue spaces_{10, 1, 1, {}};
  GatewayInbox inbox_{4};
  std::atomic<uint32_t> retry_after_ms_{1'500};
  int cancelled_ = 0;
  std::unique_ptr<StreamNetwork> streams_;
  std::unique_ptr<HttpGateway> server_;
};

TEST_F(HttpGatewayTest, HeartbeatsUntilItEnds) {
  Start({.heartbeat_ms = 10});
  Client client(*server_);
  client.Upgrade();
  client.SendText("{}");
  EXPECT_NE(client.ReadFrame().find("bad_type"), std::string::npos);
  for (int i = 0; i < 5; ++i) {
    EXPECT_TRUE(
        client.ReadFrame().starts_with(R"(1{"type":"heartbeat","session_id":"","timestamp":"20)"));
  }
}

TEST_F(HttpGatewayTest, NoHeartbeatsBeforeTheFirstText) {
  Start({.keepalive_ms = 40, .heartbeat_ms = 1});
  Client client(*server_);
  client.Upgrade();
  // A ping, as nothing comes.
  EXPECT_EQ(client.ReadFrame(), "9");
}

TEST_F(HttpGatewayTest, WhoDoesNotAnswerPingsIsCut) {
  Start({.keepalive_ms = 40});
  Client client(*server_);
  client.Upgrade();
  client.SendText("{}");
  while (!client.ReadFrame().empty()) {
  }
}

TEST_F(HttpGatewayTest, ConnectionsWithoutRequestsEnd) {
  Start({.handshake_ms = 20, .keepalive_ms = 20});
  Client silent(*server_);
  EXPECT_TRUE(silent.Ended());
  Client slow(*server_);
  slow.Send("GET /health/li");
  EXPECT_TRUE(slow.Ended());
  Client idle(*server_);
  idle.Get("/health/live");
  EXPECT_TRUE(idle.ReadUntil(R"({"status":"live"})").starts_with("HTTP/1.1 200"));
  EXPECT_TRUE(idle.Ended());
}

TEST_F(HttpGatewayTest, AFullInboxIsTold) {
  Start();
  std::vector<std::unique_ptr<Client>> waiting;
  for (size_t i = 0; i < inbox_.capacity(); ++i) {
    waiting.push_back(std::make_unique<Client>(*server_));
    waiting.back()->Get("/api/v1/spaces");
  }
  // One of them all is one too many; which, is for the threads to say.
  Client last(*server_);
  last.Get("/api/v1/spaces");
  std::string told = last.ReadUntil("\r\n\r\n");
  EXPECT_TRUE(told.starts_with("HTTP/1.1 429")) << told;
  EXPECT_NE(told.find("Retry-After: 2\r\n"), std::string::npos) << told;
  for (size_t i = 0; i < inbox_.capacity(); ++i) Take()->Answered();
  for (auto& client : waiting) {
    EXPECT_TRUE(client->ReadUntil(R"({"spaces":[]})").starts_with("HTTP/1.1 200"));
  }
}

TEST_F(HttpGatewayTest, BodiesThatWouldTakeTooMuchMemory) {
  Start({.request_memory_bytes = size_t{5} << 20});
  const std::string head =
      "POST /api/v1/memories/recall HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n";
  auto first = std::make_unique<Client>(*server_);
  first->Send(head);
  first->Send(std::string(100'000, ' '));
  // Not before the first one's head was read.
  Client probe(*server_);
  for (;;) {
    Client second(*server_);
    second.Send(head);
    second.Send("{");
    const std::string told = second.ReadUntil("\r\n\r\n");
    if (told.starts_with("HTTP/1.1 429")) break;
  }
  // What is small has room, and what went has left it.
  probe.Get("/health/live");
  EXPECT_TRUE(probe.ReadUntil("live\"}").starts_with("HTTP/1.1 200"));
  first.reset();
  for (;;) {
    Client again(*server_);
    again.Send(head);
    again.Send(std::string(4'000'000, ' '));
    const std::string told = again.ReadUntil("\r\n\r\n");
    if (told.starts_with("HTTP/1.1 400")) break;
    ASSERT_TRUE(told.starts_with("HTTP/1.1 429")) << told;
  }
}

TEST_F(HttpGatewayTest, AnswersThatNobodyReads) {
  Start({.unread_bytes = 0, .unread_small_bytes = 0});
  Client client(*server_);
  client.Get("/api/v1/spaces");
  Take()->Answered();
  EXPECT_TRUE(client.ReadUntil("answers_full").starts_with("HTTP/1.1 429"));
}

TEST_F(HttpGatewayTest, ShutdownWaitsForCallsAndRefusesNewOnes) {
  Start();
  Client asking(*server_);
  asking.Get("/api/v1/spaces");
  GatewayCall* call = Take();
  Client idle(*server_);
  idle.Get("/health/live");
  idle.ReadUntil("live\"}");
  Client stream(*server_);
  stream.Upgrade();
  std::thread stopping([this] { server_->Shutdown(kWaitS * kNanosPerSecond); });
  EXPECT_TRUE(idle.Ended());
  EXPECT_EQ(stream.ReadFrame(), std::string("8\x03\xe9"));
  stream.Close();
  call->Answered();
  EXPECT_TRUE(asking.ReadUntil(R"({"spaces":[]})").starts_with("HTTP/1.1 200"));
  EXPECT_TRUE(asking.Ended());
  asking.Close();
  stopping.join();
}

TEST_F(HttpGatewayTest, ShutdownCutsWhatTakesTooLong) {
  Start();
  Client asking(*server_);
  asking.Get("/api/v1/spaces");
  GatewayCall* call = Take();
  std::thread stopping([this] { server_->Shutdown(1); });
  EXPECT_TRUE(asking.Ended());
  while (cancelled_ == 0) {
    EXPECT_EQ(TryTake(), nullptr);
    std::this_thread::yield();
  }
  call->answer.reason = RefusalReason::kCancelled;
  call->Answered();
  stopping.join();
}

TEST_F(HttpGatewayTest, RecoveryIsTold) {
  Start({.recovering = [] { return "half of it"; }});
  Client client(*server_);
  client.Get("/health/ready");
  EXPECT_TRUE(client.ReadUntil("half of it\"").starts_with("HTTP/1.1 503"));
  client.ReadUntil("}}");
  Client stream(*server_);
  stream.Send(
      "GET /v1/stream HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
      "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n");
  EXPECT_TRUE(stream.ReadUntil("half of it").starts_with("HTTP/1.1 503"));
  server_->SetServing();
  client.Get("/health/ready");
  EXPECT_TRUE(client.ReadUntil("ready\"}").starts_with("HTTP/1.1 200"));
  Client(*server_).Upgrade();
}

TEST_F(HttpGatewayTest, MetricsAreThoseOfTheOptions) {
  Start({.metrics = [] { return "engram_up 1\n"; }});
  Client client(*server_);
  client.Get("/metrics");
  const std::string told = client.ReadUntil("engram_up 1\n");
  EXPECT_TRUE(told.starts_with("HTTP/1.1 200")) << told;
  EXPECT_NE(told.find("Content-Type: text/plain; version=0.0.4"), std::string::npos) << told;
}

TEST_F(HttpGatewayTest, APortThatIsTaken) {
  Start();
  const HttpOptions options{.endpoint = server_->endpoint()};
  const auto second = HttpGateway::Start(options, GatewayDoor(&inbox_, &retry_after_ms_, [] {}),
                                         &clock_, &spaces_, streams_.get());
  ASSERT_FALSE(second.has_value());
  EXPECT_TRUE(second.error().message.starts_with("listen.http: cannot listen on 127.0.0.1:"));
}

}  // namespace
}  // namespace engram
