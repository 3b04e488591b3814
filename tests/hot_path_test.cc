// The way of an observation and of a recall, also of one whose payload is read from the log, from a
// real socket to the shard, its log on a real disk and back, takes no memory from the allocator
// once the daemon is warm.

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "dataplane/frame_format.h"
#include "src/appliance.h"
#include "src/log_store.h"
#include "tests/support/allocation_counter.h"
#include "tests/support/loopback_client.h"
#include "tests/support/scratch_directory.h"

namespace engram {
namespace {

constexpr uint16_t kDimension = 64;
constexpr size_t kFrameObservations = 32;
constexpr size_t kPayloadBytes = 100;

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
    client_ = std::make_unique<LoopbackClient>(endpoint->port, kDimension, kPayloadBytes);
    ASSERT_TRUE(RunUntil([&] { return client_->session != 0; }));
    // Recalls go ahead of observations, and a recall of an empty space is refused.
    QueueObservations(512);
    ASSERT_TRUE(RunUntil([&] { return client_->acked == next_ - 1; }));
  }

  // Only what the appliance does is counted.
  template <typename Done>
  bool RunUntil(Done&& done) {
    for (int i = 0; i < 20'000'000 && !done(); ++i) {
      client_->Step([](const FrameHeader&, std::span<const std::byte>) {});
      const uint64_t before = AllocationCount();
      appliance_->ingest(0).Poll();
      appliance_->shard(0).Poll();
      allocations_ += AllocationCount() - before;
    }
    return done();
  }

  void QueueObservations(size_t count) {
    for (size_t done = 0; done < count; done += kFrameObservations) {
      client_->QueueObserve(next_, kFrameObservations);
      next_ += kFrameObservations;
    }
  }

  // 512 observations and 8 recalls at a time, until `total` observations were acked.
  void Feed(uint64_t total) {
    while (next_ <= total) {
      QueueObservations(512);
      // With payload every second time.
      for (int i = 0; i < 8; ++i) {
        client_->QueueRecall(10, i % 2 == 0 ? kFrameFlagWithPayload : uint16_t{0});
      }
      ASSERT_TRUE(RunUntil(
          [&] { return client_->acked == next_ - 1 && client_->results == client_->recalls; }));
    }
  }

  SystemClock clock_;
  ScratchDirectory directory_;
  std::unique_ptr<Network> network_;
  std::unique_ptr<LogStore> logs_;
  std::unique_ptr<Appliance> appliance_;
  std::unique_ptr<LoopbackClient> client_;
  uint64_t next_ = 1;
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
