#include "src/control/grpc_gateway.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>

#include "engram/v1/error_details.pb.h"
#include "engram/v1/service.grpc.pb.h"
#include "src/control/gateway_core.h"
#include "tests/control/gateway_fake_shard.h"

// The server with a client in one process, over a shard that stands still when it is told to. What
// every call answers is in tests/integration/grpc_test.py; here is what only happens when the other
// side is late or gone.

namespace engram {
namespace {

// A gateway core and its shard on a thread of their own, and a server before them.
class Served {
 public:
  explicit Served(GrpcOptions grpc = {}, GatewayOptions gateway = {})
      : catalogue_(100, 1, 1, {.metric = Metric::kL2, .precision = Precision::kF32}) {
    MeshOptions mesh;
    mesh.shards = 1;
    mesh.huge_pages = HugePagePolicy::kOff;
    mesh.catalogue = &catalogue_;
    mesh_ = std::make_unique<RingMesh>(RingMesh::Create(mesh).value());
    ProducerPort port = mesh_->TakeProducer(ProducerId(0));
    shard_ = std::make_unique<GatewayFakeShard>(mesh_->TakeShard(ShardId(0)), &clock_);
    gateway.huge_pages = HugePagePolicy::kOff;
    core_ = GatewayCore::Create(gateway, &clock_, std::move(port)).value();
    grpc.endpoint = {.host = "127.0.0.1", .port = 0};
    server_ =
        GrpcGateway::Start(grpc, core_->OpenDoor([] {}), &clock_, &counters_, &catalogue_, nullptr)
            .value();
    thread_ = std::jthread([this](const std::stop_token& stop) {
      while (!stop.stop_requested()) {
        {
          const std::lock_guard lock(mutex_);
          core_->Poll();
          shard_->Poll();
        }
        std::this_thread::yield();
      }
    });
    channel_ =
        grpc::CreateChannel(server_->endpoint().ToString(), grpc::InsecureChannelCredentials());
    stub_ = v1::EngramService::NewStub(channel_);
  }
  ~Served() {
    server_.reset();  // While the core polls.
  }

  // With the core and the shard standing still.
  template <typename Do>
  auto Still(const Do& what) {
    const std::lock_guard lock(mutex_);
    return what(*core_, *shard_);
  }
  // Waits for it; the test's own time limit ends a wait without end.
  void Until(const std::function<bool(GatewayCore&, GatewayFakeShard&)>& what) {
    while (!Still(what)) std::this_thread::yield();
  }
  void SetAnswers(bool answers) {
    Still([answers](GatewayCore&, GatewayFakeShard& shard) { shard.answers = answers; });
  }
  std::unique_lock<std::mutex> Pause() { return std::unique_lock(mutex_); }

  grpc::Status Remember(const std::string& id, const std::string& content = "") {
    grpc::ClientContext context;
    v1::RememberRequest request;
    request.mutable_memory()->set_id(id);
    request.mutable_memory()->set_content(content);
    request.mutable_memory()->add_embedding(1);
    v1::RememberResponse response;
    return stub_->Remember(&context, request, &response);
  }
  grpc::Status Forget(const std::string& id) {
    grpc::ClientContext context;
    v1::ForgetRequest request;
    request.set_memory_id(id);
    v1::ForgetResponse response;
    return stub_->Forget(&context, request, &response);
  }
  grpc::Status Scroll(v1::RecallResponse* response) {
    grpc::ClientContext context;
    v1::RecallRequest request;
    request.mutable_scroll()->set_limit(1'000);
    return stub_->Recall(&context, request, response);
  }

  SystemClock& clock() { return clock_; }
  GrpcGateway& server() { return *server_; }
  v1::EngramService::Stub& stub() { return *stub_; }

 private:
  SystemClock clock_;
  SpaceCatalogue catalogue_;
  std::unique_ptr<RingMesh> mesh_;
  std::unique_ptr<GatewayFakeShard> shard_;
  std::unique_ptr<GatewayCore> core_;
  CounterCatalogue counters_;
  std::mutex mutex_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::EngramService::Stub> stub_;
  std::jthread thread_;  // Ends before what it polls.
  std::unique_ptr<GrpcGateway> server_;
};

// A recall that another thread waits for.
class Waiting {
 public:
  explicit Waiting(v1::EngramService::Stub* stub, std::chrono::seconds timeout) {
    context_.set_deadline(std::chrono::system_clock::now() + timeout);
    thread_ = std::jthread([this, stub] {
      v1::RecallRequest request;
      request.mutable_cue()->mutable_embedding()->add_vector(1);
      v1::RecallResponse response;
      status_ = stub->Recall(&context_, request, &response);
      ended_.store(true);
    });
  }
  void Cancel() { context_.TryCancel(); }
  bool ended() const { return ended_.load(); }
  const grpc::Status& Wait() {
    if (thread_.joinable()) thread_.join();
    return status_;
  }

 private:
  grpc::ClientContext context_;
  grpc::Status status_;
  std::atomic<bool> ended_{false};
  std::jthread thread_;
};

bool IsIdle(GatewayCore& core, GatewayFakeShard&) { return core.calls_under_way() == 0; }
bool HasOne(GatewayCore&, GatewayFakeShard& shard) { return shard.held() == 1; }
bool HasOneCancelled(GatewayCore&, GatewayFakeShard& shard) {
  return shard.held() == 1 && IsCancelled(shard.held_header(0));
}

// A recall that the shard has, and does not answer until it is told to.
std::unique_ptr<Waiting> HeldRecall(Served& served) {
  EXPECT_TRUE(served.Remember("a").ok());
  served.SetAnswers(false);
  auto call = std::make_unique<Waiting>(&served.stub(), std::chrono::seconds(100));
  served.Until(HasOne);
  return call;
}

uint32_t RetryAfterMs(const grpc::Status& status) {
  v1::RpcStatus details;
  v1::RetryInfo retry;
  if (!details.ParseFromString(status.error_details()) || details.details_size() != 1 ||
      !retry.ParseFromString(details.details(0).value())) {
    return 0;
  }
  return static_cast<uint32_t>(retry.retry_delay().seconds() * 1'000 +
                               retry.retry_delay().nanos() / 1'000'000);
}

TEST(GrpcGatewayTest, ACallsDeadlineReachesTheShard) {
  Served served;
  const int64_t before_ns = served.clock().MonotonicNs();
  const auto call = HeldRecall(served);
  const int64_t deadline_ns = served.Still(
      [](GatewayCore&, GatewayFakeShard& shard) { return shard.held_header(0).deadline_ns; });
  EXPECT_GT(deadline_ns, before_ns + 90 * kNanosPerSecond);
  // A client's library rounds so long a time up.
  EXPECT_LE(deadline_ns, served.clock().MonotonicNs() + 110 * kNanosPerSecond);
  served.SetAnswers(true);
  EXPECT_TRUE(call->Wait().ok());
  served.Until(IsIdle);
}

TEST(GrpcGatewayTest, ADeadlineThatPassesIsCarriedToTheShardAsACancel) {
  Served served;
  ASSERT_TRUE(served.Remember("a").ok());
  served.SetAnswers(false);
  Waiting call(&served.stub(), std::chrono::seconds(1));
  EXPECT_EQ(call.Wait().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  served.Until(HasOneCancelled);
  served.SetAnswers(true);
  served.Until(IsIdle);
}

TEST(GrpcGatewayTest, WhenTheAskerGoesTheShardIsTold) {
  Served served;
  const auto call = HeldRecall(served);
  EXPECT_FALSE(served.Still(
      [](GatewayCore&, GatewayFakeShard& shard) { return IsCancelled(shard.held_header(0)); }));
  call->Cancel();
  EXPECT_EQ(call->Wait().error_code(), grpc::StatusCode::CANCELLED);
  served.Until(HasOneCancelled);
  served.SetAnswers(true);
  served.Until(IsIdle);
  EXPECT_TRUE(served.Remember("b").ok());
}

TEST(GrpcGatewayTest, AFullInboxRefusesAndSaysWhenToCallAgain) {
  Served served({}, {.inbox_capacity = 2});
  ASSERT_TRUE(served.Remember("a").ok());
  std::vector<std::unique_ptr<Waiting>> calls;
  {
    const auto paused = served.Pause();
    for (int i = 0; i < 3; ++i) {
      calls.push_back(std::make_unique<Waiting>(&served.stub(), std::chrono::seconds(100)));
    }
    // Two wait in the inbox; the third is refused by gRPC's own thread.
    while (!calls[0]->ended() && !calls[1]->ended() && !calls[2]->ended()) {
      std::this_thread::yield();
    }
  }
  int refused = 0;
  for (const auto& call : calls) {
    const grpc::Status& status = call->Wait();
    if (status.ok()) continue;
    ++refused;
    EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_TRUE(status.error_message().starts_with("inbox_full: too many calls wait"))
        << status.error_message();
    EXPECT_GE(RetryAfterMs(status), 1u);
  }
  EXPECT_EQ(refused, 1);
  served.Until(IsIdle);
}

TEST(GrpcGatewayTest, LargeAnswersThatNobodyReadsAreBounded) {
  Served served({.endpoint = {}, .cpus = {}, .unread_bytes = 200'000});
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(served.Remember(std::to_string(i), std::string(30'000, 'x')).ok());
  }
  v1::RecallResponse page;
  const grpc::Status refused = served.Scroll(&page);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << "300 KB";
  EXPECT_TRUE(refused.error_message().starts_with("answers_full: ")) << refused.error_message();
  EXPECT_GE(RetryAfterMs(refused), 1u);
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(served.Forget(std::to_string(i)).ok());
  }
  // 150 KB: one at a time, and what is read is given back, a moment after the client has it.
  for (int i = 0; i < 5; ++i) {
    while (!served.Scroll(&page).ok()) std::this_thread::yield();
    EXPECT_EQ(page.memories_size(), 5);
  }
}

// Else one client that does not read would stop all others.
TEST(GrpcGatewayTest, SmallAnswersPassWhereLargeOnesDoNot) {
  Served served({.endpoint = {}, .cpus = {}, .unread_bytes = 0});
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(served.Remember(std::to_string(i), std::string(8'000, 'x')).ok());
  }
  v1::RecallResponse page;
  EXPECT_EQ(served.Scroll(&page).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << "80 KB";
  for (int i = 0; i < 5; ++i) {
    ASSERT_TRUE(served.Forget(std::to_string(i)).ok());
  }
  EXPECT_TRUE(served.Scroll(&page).ok()) << "40 KB";
}

// A refusal says that nothing was stored.
TEST(GrpcGatewayTest, WhatWasStoredIsToldHoweverMuchIsUnread) {
  Served served({.endpoint = {}, .cpus = {}, .unread_bytes = 0, .unread_small_bytes = 0});
  EXPECT_TRUE(served.Remember("a").ok());
  v1::RecallResponse page;
  EXPECT_EQ(served.Scroll(&page).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

TEST(GrpcGatewayTest, TheEndRefusesNewCallsAndWaitsForThoseUnderWay) {
  Served served;
  const auto call = HeldRecall(served);
  std::jthread end([&served] { served.server().Shutdown(100 * kNanosPerSecond); });
  // Until it takes effect calls are still taken, and wait as the first does.
  grpc::Status status;
  do {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
    v1::RecallRequest request;
    request.add_ids("a");
    v1::RecallResponse response;
    status = served.stub().Recall(&context, request, &response);
  } while (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(status.error_message(), "the daemon is stopping; connect again later");
  // Longer than what the end takes by itself: however long, it waits for the call.
  const int64_t until_ns = served.clock().MonotonicNs() + kNanosPerSecond;
  while (served.clock().MonotonicNs() < until_ns && !call->ended()) std::this_thread::yield();
  EXPECT_FALSE(call->ended());
  served.SetAnswers(true);
  EXPECT_TRUE(call->Wait().ok());
  end.join();
  served.Until(IsIdle);
}

TEST(GrpcGatewayTest, TheEndCutsWhatTakesTooLong) {
  Served served;
  const auto call = HeldRecall(served);
  served.server().Shutdown(kNanosPerMilli);
  EXPECT_FALSE(call->Wait().ok());
  served.Until(HasOneCancelled);
  served.SetAnswers(true);
  served.Until(IsIdle);
}

// A peer that vanished without a word would else keep its calls, and what it did not read.
TEST(GrpcGatewayTest, ASilentPeerIsCutOff) {
  Served served({.endpoint = {}, .cpus = {}, .keepalive_ms = 100, .keepalive_timeout_ms = 100});
  const int peer = socket(AF_INET, SOCK_STREAM, 0);
  ASSERT_GE(peer, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(served.server().endpoint().port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(connect(peer, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  // HTTP/2's preface, empty settings, and then nothing, not even the answer to a ping.
  const std::string_view hello("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 33);
  ASSERT_EQ(send(peer, hello.data(), hello.size(), 0), static_cast<ssize_t>(hello.size()));
  char bytes[4096];
  while (recv(peer, bytes, sizeof(bytes), 0) > 0) {
  }
  close(peer);
  EXPECT_TRUE(served.Remember("a").ok()) << "others go on";
}

}  // namespace
}  // namespace engram
