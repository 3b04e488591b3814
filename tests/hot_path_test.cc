// The way of an observation and of a recall, also of one whose payload is read from the log, from a
// real socket to the shard, its log on a real disk and back, takes no memory from the allocator
// once the daemon is warm.

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "dataplane/frame_format.h"
#include "src/appliance.h"
#include "src/core/hash.h"
#include "src/log_store.h"
#include "tests/support/allocation_counter.h"
#include "tests/support/scratch_directory.h"

namespace engram {
namespace {

constexpr uint16_t kDimension = 64;
constexpr size_t kFrameObservations = 32;
constexpr size_t kPayloadBytes = 100;

// A client on a blocking-free socket, driven by the same thread as the appliance. Its own buffers
// are made before anything is counted.
class LoopbackClient {
 public:
  explicit LoopbackClient(uint16_t port) {
    fd_ = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address));
    outgoing_.reserve(1 << 20);
    incoming_.resize(1 << 20);
  }
  ~LoopbackClient() { close(fd_); }

  void Queue(FrameHeader header, std::span<const std::byte> body) {
    const std::span<const std::byte> parts[] = {body};
    SealFrame(&header, parts);
    Append(BytesOf(header));
    Append(body);
  }

  // Sends and receives what goes without waiting.
  void Step() {
    if (sent_ < outgoing_.size()) {
      const ssize_t n = send(fd_, outgoing_.data() + sent_, outgoing_.size() - sent_, MSG_NOSIGNAL);
      if (n > 0) sent_ += static_cast<size_t>(n);
      if (sent_ == outgoing_.size()) {
        outgoing_.clear();
        sent_ = 0;
      }
    }
    const ssize_t n = recv(fd_, incoming_.data() + filled_, incoming_.size() - filled_, 0);
    if (n > 0) filled_ += static_cast<size_t>(n);
    size_t at = 0;
    while (filled_ - at >= kFrameHeaderBytes) {
      const auto header = LoadAs<FrameHeader>(incoming_.data() + at);
      const size_t bytes = kFrameHeaderBytes + header.length;
      if (filled_ - at < bytes) break;
      if (header.type == FrameType::kHelloAck) session = header.session;
      if (header.type == FrameType::kAck) acked = header.sequence;
      if (header.type == FrameType::kResult && (header.flags & kFrameFlagMore) == 0) ++results;
      if (header.type == FrameType::kNak) ++naks;
      at += bytes;
    }
    std::memmove(incoming_.data(), incoming_.data() + at, filled_ - at);
    filled_ -= at;
  }

  uint64_t session = 0;
  uint64_t acked = 0;
  uint64_t results = 0;
  uint64_t naks = 0;

 private:
  void Append(std::span<const std::byte> bytes) {
    outgoing_.insert(outgoing_.end(), bytes.begin(), bytes.end());
  }

  int fd_ = -1;
  std::vector<std::byte> outgoing_;
  size_t sent_ = 0;
  std::vector<std::byte> incoming_;
  size_t filled_ = 0;
};

class HotPath : public testing::TestWithParam<NetworkBackend> {
 protected:
  void SetUp() override {
    if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer brings its own allocator";
    std::string note;
    NetworkOptions network_options;
    network_options.max_connections = 64;
    auto network = CreateNetwork(GetParam(), network_options, &note);
    if (!network) GTEST_SKIP() << network.error().message;
    network_ = *std::move(network);
    const auto endpoint = network_->Listen({.host = "127.0.0.1", .port = 0});
    ASSERT_TRUE(endpoint.has_value());
    ASSERT_TRUE(network_->Start().has_value());
    LogStoreOptions log_options;
    const DiskBackend disk =
        GetParam() == NetworkBackend::kUring ? DiskBackend::kUring : DiskBackend::kPosix;
    auto logs = LogStore::Open(
        log_options, &clock_,
        [this, disk](const std::string& folder, const DiskOptions& disk_options, std::string* why) {
          return CreateDisk(disk, directory_.path() + "/" + folder, disk_options, why);
        },
        nullptr);
    if (!logs && disk == DiskBackend::kUring) GTEST_SKIP() << logs.error().message;
    ASSERT_TRUE(logs.has_value()) << logs.error().message;
    logs_ = *std::move(logs);
    ApplianceOptions options;
    options.storage.push_back(logs_->ForShard(0));
    options.log_disks = logs_->disks();
    options.ingest.max_connections = 64;
    options.shard.memory_limit_bytes = size_t{256} << 20;
    options.shard.max_sessions = 64;
    auto appliance = Appliance::Create(options, &clock_, {network_.get()});
    ASSERT_TRUE(appliance.has_value());
    appliance_ = *std::move(appliance);
    while (appliance_->shard(0).is_recovering()) appliance_->shard(0).Poll();
    ASSERT_FALSE(appliance_->shard(0).recovery().failed.load());
    ASSERT_TRUE(logs_->PrepareFirst().has_value());
    client_ = std::make_unique<LoopbackClient>(endpoint->port);
    HelloBody hello;
    hello.metric = Metric::kL2;
    client_->Queue({.type = FrameType::kHello}, BytesOf(hello));
    ASSERT_TRUE(RunUntil([&] { return client_->session != 0; }));
    // Recalls go ahead of observations, and a recall of an empty space is refused.
    QueueObservations(512);
    ASSERT_TRUE(RunUntil([&] { return client_->acked == next_ - 1; }));
  }

  // Only what the appliance does is counted.
  template <typename Done>
  bool RunUntil(Done&& done) {
    for (int i = 0; i < 20'000'000 && !done(); ++i) {
      client_->Step();
      const uint64_t before = AllocationCount();
      appliance_->ingest(0).Poll();
      appliance_->shard(0).Poll();
      allocations_ += AllocationCount() - before;
    }
    return done();
  }

  void QueueObservations(size_t count) {
    for (size_t done = 0; done < count; done += kFrameObservations) {
      std::vector<std::byte> body;
      const auto append = [&](std::span<const std::byte> bytes) {
        body.insert(body.end(), bytes.begin(), bytes.end());
      };
      append(BytesOf(ObserveBody{.count = kFrameObservations}));
      for (size_t i = 0; i < kFrameObservations; ++i) {
        const std::string id = "id" + std::to_string(next_ + i);
        const std::vector<float> vector = RandomVector();
        RecordHeader record;
        record.dtype = VectorDtype::kF32;
        record.dimension = kDimension;
        record.id_bytes = static_cast<uint16_t>(id.size());
        record.payload_bytes = kPayloadBytes;
        record.record_bytes =
            static_cast<uint32_t>(RecordBytes(kDimension * 4, id.size(), kPayloadBytes));
        const size_t begin = body.size();
        append(BytesOf(record));
        append(std::as_bytes(std::span(vector)));
        append(BytesOf(std::string_view(id)));
        append(BytesOf(std::string_view(std::string(kPayloadBytes, 'p'))));
        body.resize(begin + record.record_bytes);
      }
      client_->Queue({.type = FrameType::kObserve, .session = client_->session, .sequence = next_},
                     body);
      next_ += kFrameObservations;
    }
  }

  void QueueRecall() {
    const std::vector<float> vector = RandomVector();
    RecallBody recall;
    recall.k = 10;
    recall.dimension = kDimension;
    recall.dtype = VectorDtype::kF32;
    std::vector<std::byte> body(sizeof(recall) + kDimension * 4);
    std::memcpy(body.data(), &recall, sizeof(recall));
    std::memcpy(body.data() + sizeof(recall), vector.data(), kDimension * 4);
    // With payload every second time.
    const uint16_t flags = recalls_ % 2 == 0 ? kFrameFlagWithPayload : uint16_t{0};
    client_->Queue({.type = FrameType::kRecall, .flags = flags, .sequence = ++recalls_}, body);
  }

  std::vector<float> RandomVector() {
    std::vector<float> vector;
    for (uint16_t d = 0; d < kDimension; ++d) {
      vector.push_back(static_cast<float>(random_.Below(1000)) / 1000);
    }
    return vector;
  }

  // 512 observations and 8 recalls at a time, until `total` observations were acked.
  void Feed(uint64_t total) {
    while (next_ <= total) {
      QueueObservations(512);
      for (int i = 0; i < 8; ++i) QueueRecall();
      ASSERT_TRUE(
          RunUntil([&] { return client_->acked == next_ - 1 && client_->results == recalls_; }));
    }
  }

  SystemClock clock_;
  ScratchDirectory directory_;
  std::unique_ptr<Network> network_;
  std::unique_ptr<LogStore> logs_;
  std::unique_ptr<Appliance> appliance_;
  std::unique_ptr<LoopbackClient> client_;
  SplitMix64 random_{1};
  uint64_t next_ = 1;
  uint64_t recalls_ = 0;
  uint64_t allocations_ = 0;
  std::string sink_;
};

TEST_P(HotPath, AllocatesNothingOnceWarm) {
  // Warm: the graph has begun, so exact scan, linking and graph search have all run.
  Feed(6'144);
  ASSERT_TRUE(RunUntil([&] {
    return appliance_->shard(0).counter(ShardCounter::kObservationsLinked).Read() > 500;
  }));
  allocations_ = 0;
  const uint64_t linked = appliance_->shard(0).counter(ShardCounter::kObservationsLinked).Read();
  const RecordReader& records = *appliance_->ingest(0).records();
  const uint64_t read = records.counter(RecordReaderCounter::kRecordsRead).Read();
  const uint64_t commits = appliance_->shard(0).counter(ShardCounter::kLogCommits).Read();
  Feed(12'288);
  EXPECT_EQ(allocations_, 0u);
  EXPECT_EQ(client_->naks, 0u);
  EXPECT_GT(appliance_->shard(0).counter(ShardCounter::kLogCommits).Read(), commits)
      << "the log was not part of what was measured";
  EXPECT_GT(appliance_->shard(0).counter(ShardCounter::kObservationsLinked).Read(), linked)
      << "linking was not part of what was measured";
  EXPECT_GT(records.counter(RecordReaderCounter::kRecordsRead).Read(), read + 400)
      << "payloads were not part of what was measured";
  EXPECT_EQ(records.counter(RecordReaderCounter::kRecordsUnreadable).Read(), 0u);
  // The counter counts.
  const uint64_t before = AllocationCount();
  std::string(1000, 'x').swap(sink_);
  EXPECT_GT(AllocationCount(), before);
}

INSTANTIATE_TEST_SUITE_P(Backends, HotPath,
                         testing::Values(NetworkBackend::kUring, NetworkBackend::kPosix),
                         [](const auto& backend) {
                           return backend.param == NetworkBackend::kUring ? "io_uring" : "posix";
                         });

}  // namespace
}  // namespace engram
