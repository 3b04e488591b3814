#include "index/log/log_writer.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "index/log/segment_keeper.h"
#include "src/core/simulated_disk.h"
#include "tests/index/log/log_builder.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

// A writer and its keeper over a simulated disk, stepped together or apart.
class LogWriterTest : public testing::Test {
 protected:
  static constexpr uint32_t kSegmentBytes = 128 * 1024;

  ~LogWriterTest() override { Stop(); }

  static LogWriterOptions Options() {
    LogWriterOptions options;
    options.instance = kTestInstance;
    options.block_bytes = LogWriter::kLeastBlockBytes;
    options.blocks = 4;
    options.retry_ns = kNanosPerMilli;
    return options;
  }
  // On what is there.
  void Start(const LogWriterOptions& options = Options()) {
    Stop();
    handoff_ = std::make_unique<SegmentHandoff>();
    disk_ = medium_.Open("log");
    keeper_disk_ = medium_.Open("log");
    const ReadResult read = ReadLog(*disk_);
    ASSERT_EQ(read.error, "");
    memory_.reset(static_cast<std::byte*>(
        std::aligned_alloc(kLogPageBytes, LogWriter::MemoryBytes(options))));
    writer_ =
        std::make_unique<LogWriter>(options, disk_.get(), handoff_.get(),
                                    std::span(memory_.get(), LogWriter::MemoryBytes(options)));
    keeper_ = std::make_unique<SegmentKeeper>(SegmentKeeperOptions{.instance = kTestInstance,
                                                                   .segment_bytes = kSegmentBytes,
                                                                   .ahead = 1,
                                                                   .retry_ns = kNanosPerMilli},
                                              keeper_disk_.get(), &clock_, handoff_.get());
    ASSERT_TRUE(writer_->Start(read.end, read.highest_epoch + 1).has_value());
    ASSERT_TRUE(keeper_->Start(SegmentOf(read.end)).has_value());
    ASSERT_TRUE(keeper_->PrepareFirst().has_value());
    writer_->Poll(clock_.MonotonicNs());
  }
  void Stop() {
    writer_.reset();
    keeper_.reset();
    disk_.reset();
    keeper_disk_.reset();
  }
  void Step(int64_t ns = 10'000) {
    clock_.AdvanceNs(ns);
    writer_->Poll(clock_.MonotonicNs());
  }
  template <typename Done>
  bool StepUntil(Done&& done, int steps = 100'000) {
    for (int i = 0; i < steps; ++i) {
      if (done()) return true;
      Step();
      keeper_->Poll();
    }
    return done();
  }
  bool Settle() {
    return StepUntil([&] { return writer_->settled(); });
  }
  // Record number `stamp`, if there is room.
  RefusalReason Append(size_t payload_bytes = 30, bool urgent = true,
                       LogRecordKind kind = LogRecordKind::kUpsert) {
    const std::string payload(payload_bytes, static_cast<char>('a' + stamps_ % 26));
    LogRecord record;
    record.kind = kind;
    record.stamp = stamps_ + 1;
    record.space = "space";
    record.id = "id";
    record.payload = std::as_bytes(std::span(payload));
    const RefusalReason reason =
        writer_->JudgeRoom(LogRecordBytes(record), kind == LogRecordKind::kDelete);
    if (reason != RefusalReason::kNone) return reason;
    address_ = writer_->Append(record, urgent);
    ++stamps_;
    texts_.push_back(TextOf(record));
    ends_.push_back(writer_->end());
    return reason;
  }
  // Those that the log has, after a crash if there was one.
  ReadResult Read() {
    const auto disk = medium_.Open("log");
    return ReadLog(*disk);
  }
  // How many of the records are before what is said to be durable.
  size_t DurableRecords() const {
    size_t count = 0;
    while (count < ends_.size() && ends_[count] <= writer_->durable()) ++count;
    return count;
  }
  // Power fails: what was said to be durable is there, what is there is a part from the beginning.
  void ExpectDurableAfterPowerCut() {
    const size_t durable = DurableRecords();
    medium_.Crash();
    Stop();
    medium_.SetFaults({});
    const ReadResult read = Read();
    ASSERT_EQ(read.error, "");
    ASSERT_GE(read.records.size(), durable);
    ASSERT_LE(read.records.size(), texts_.size());
    texts_.resize(read.records.size());
    ends_.resize(read.records.size());
    EXPECT_EQ(read.records, texts_);
  }

  struct Freer {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  SimulatedClock clock_;
  SimulatedDisk medium_{&clock_, 1};
  std::unique_ptr<SegmentHandoff> handoff_;
  std::unique_ptr<Disk> disk_;
  std::unique_ptr<Disk> keeper_disk_;
  std::unique_ptr<std::byte, Freer> memory_;
  std::unique_ptr<LogWriter> writer_;
  std::unique_ptr<SegmentKeeper> keeper_;
  uint64_t stamps_ = 0;
  LogAddress address_ = kNoLogAddress;
  std::vector<std::string> texts_;
  std::vector<LogPosition> ends_;
};

TEST_F(LogWriterTest, WhatIsAppendedIsReadBack) {
  Start();
  for (int i = 0; i < 100; ++i) {
    ASSERT_EQ(Append(static_cast<size_t>(i * 7)), RefusalReason::kNone);
    Step();
  }
  ASSERT_TRUE(Settle());
  EXPECT_EQ(writer_->durable() >= ends_.back(), true);
  Stop();
  const ReadResult read = Read();
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.records, texts_);
}

TEST_F(LogWriterTest, WhatArrivesDuringAWriteGoesWithTheNextOne) {
  Start();
  ASSERT_TRUE(Settle());
  const uint64_t before = writer_->commits();
  ASSERT_EQ(Append(), RefusalReason::kNone);
  Step(0);  // It is on its way.
  for (int i = 0; i < 40; ++i) ASSERT_EQ(Append(), RefusalReason::kNone);
  ASSERT_TRUE(StepUntil([&] { return writer_->durable() >= ends_.back(); }));
  EXPECT_LE(writer_->commits() - before, 3u) << "one flush for each batch, not for each record";
}

TEST_F(LogWriterTest, NothingIsDurableBeforeTheFlush) {
  medium_.SetFaults({.min_delay_ns = kNanosPerMilli, .max_delay_ns = kNanosPerMilli});
  Start();
  ASSERT_TRUE(Settle());
  ASSERT_EQ(Append(), RefusalReason::kNone);
  Step(0);
  EXPECT_FALSE(writer_->NotDurable(address_).empty());
  Step(kNanosPerMilli);  // The write has ended.
  EXPECT_GE(writer_->written(), ends_.back());
  EXPECT_LT(writer_->durable(), ends_.back());
  EXPECT_FALSE(writer_->NotDurable(address_).empty());
  Step(kNanosPerMilli);
  EXPECT_GE(writer_->durable(), ends_.back());
  EXPECT_TRUE(writer_->NotDurable(address_).empty());
}

TEST_F(LogWriterTest, BlocksEndInAnyOrderAndBecomeDurableInTheirOwn) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    SCOPED_TRACE(seed);
    LogWriterOptions options = Options();
    options.max_writes = 3;
    medium_.SetFaults({.min_delay_ns = 1'000, .max_delay_ns = 2 * kNanosPerMilli});
    Start(options);
    SplitMix64 random(seed);
    LogPosition durable = 0;
    for (int i = 0; i < 120; ++i) {
      (void)Append(random.Below(12'000));
      Step(static_cast<int64_t>(random.Below(kNanosPerMilli)));
      keeper_->Poll();
      ASSERT_GE(writer_->durable(), durable);
      ASSERT_LE(writer_->durable(), writer_->written());
      durable = writer_->durable();
    }
    ExpectDurableAfterPowerCut();
  }
}

TEST_F(LogWriterTest, FailedWritesAndFlushesAreMadeGoodAndNothingIsSaidEarly) {
  for (uint64_t seed = 1; seed <= 15; ++seed) {
    SCOPED_TRACE(seed);
    SplitMix64 random(seed);
    Start();
    medium_.SetFaults({.write_error_probability = 0.3,
                       .flush_error_probability = random.Below(2) == 0 ? 0.3 : 0});
    for (int i = 0; i < 150; ++i) {
      (void)Append(random.Below(3'000));
      Step(static_cast<int64_t>(random.Below(300'000)));
      keeper_->Poll();
      if (random.Below(100) == 0) {
        medium_.StallUntil(clock_.MonotonicNs() + 5 * kNanosPerMilli);
      }
    }
    EXPECT_GT(writer_->errors(), 0u);
    if (random.Below(2) == 0) {
      // It recovers by itself.
      medium_.SetFaults({});
      ASSERT_TRUE(Settle());
      EXPECT_FALSE(writer_->failing());
      EXPECT_EQ(DurableRecords(), texts_.size());
    }
    ExpectDurableAfterPowerCut();
    // Each round goes on where the one before ended.
  }
}

TEST_F(LogWriterTest, WhileTheDiskStallsItTakesWhatMemoryHoldsThenSaysBusy) {
  Start();
  medium_.StallUntil(clock_.MonotonicNs() + 50 * kNanosPerMilli);
  RefusalReason reason = RefusalReason::kNone;
  int taken = 0;
  for (; taken < 1'000 && reason == RefusalReason::kNone; ++taken) {
    reason = Append(8'000);
    Step(1'000);
  }
  EXPECT_EQ(reason, RefusalReason::kLogBusy);
  EXPECT_GT(taken, 8);
  EXPECT_EQ(DurableRecords(), 0u);
  ASSERT_TRUE(StepUntil([&] { return Append(8'000) == RefusalReason::kNone; }));
  ASSERT_TRUE(Settle());
  EXPECT_EQ(DurableRecords(), texts_.size());
}

TEST_F(LogWriterTest, AFullDiskIsSaidAndDeletesGoOn) {
  Start();
  ASSERT_TRUE(StepUntil([&] { return handoff_->prepared.load() == handoff_->current.load() + 1; }));
  SimulatedDiskFaults full;
  full.capacity_bytes = medium_.used_bytes();
  medium_.SetFaults(full);
  RefusalReason reason = RefusalReason::kNone;
  ASSERT_TRUE(StepUntil([&] {
    reason = Append(2'000);
    return reason == RefusalReason::kDiskFull;
  })) << DescribeRefusal(reason).name;
  // Also once all is written.
  ASSERT_TRUE(StepUntil([&] { return writer_->idle(); }));
  EXPECT_EQ(Append(2'000), RefusalReason::kDiskFull);
  EXPECT_EQ(Append(0, true, LogRecordKind::kDelete), RefusalReason::kNone);
  ASSERT_TRUE(StepUntil([&] { return writer_->durable() >= ends_.back(); }));
  medium_.SetFaults({});
  ASSERT_TRUE(StepUntil([&] { return Append(2'000) == RefusalReason::kNone; }));
  ASSERT_TRUE(Settle());
  ExpectDurableAfterPowerCut();
  EXPECT_EQ(texts_.size(), stamps_);
}

TEST_F(LogWriterTest, SegmentsFollowEachOther) {
  Start();
  ASSERT_TRUE(StepUntil([&] {
    (void)Append(20'000);
    return SegmentOf(writer_->end()) == 8;
  }));
  ASSERT_TRUE(Settle());
  Stop();
  EXPECT_EQ(Read().records, texts_);
}

TEST_F(LogWriterTest, AMarkerFollowsAndNoMore) {
  Start();
  ASSERT_EQ(Append(), RefusalReason::kNone);
  EXPECT_FALSE(writer_->settled());
  ASSERT_TRUE(Settle());
  const uint64_t written = writer_->bytes_written();
  for (int i = 0; i < 1'000; ++i) Step(kNanosPerMilli);
  EXPECT_EQ(writer_->bytes_written(), written) << "markers say nothing of each other";
  Stop();
  const ReadResult read = Read();
  EXPECT_GE(read.durable, ends_.back()) << "the log itself says so";
}

TEST_F(LogWriterTest, WhatNobodyWaitsForIsWrittenInTime) {
  Start();
  ASSERT_EQ(Append(30, /*urgent=*/false), RefusalReason::kNone);
  Step(0);
  EXPECT_LT(writer_->written(), ends_.back());
  for (int i = 0; i < 40; ++i) Step(kNanosPerMilli);
  EXPECT_GE(writer_->durable(), ends_.back());
  ASSERT_EQ(Append(30, /*urgent=*/false), RefusalReason::kNone);
  writer_->Hurry();
  for (int i = 0; i < 100; ++i) Step(10'000);
  EXPECT_GE(writer_->durable(), ends_.back()) << "before a shutdown at once";
}

// Each start has a higher epoch, so what an earlier one left behind its end is not taken for live.
TEST_F(LogWriterTest, ManyStartsAndPowerCuts) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(seed);
    SplitMix64 random(seed);
    Start();
    const uint64_t records = random.Below(30);
    for (uint64_t i = 0; i < records; ++i) {
      (void)Append(random.Below(random.Below(4) == 0 ? 20'000 : 200));
      Step(static_cast<int64_t>(random.Below(200'000)));
      if (random.Below(3) == 0) keeper_->Poll();
    }
    ExpectDurableAfterPowerCut();
    if (HasFatalFailure()) return;
  }
}

// What was read counts as durable from then on: also after a flush that failed, whose writes the
// system may have dropped though it still shows them.
TEST_F(LogWriterTest, WhatWasReadIsMadeDurable) {
  int mattered = 0;
  for (int round = 0; round < 40; ++round) {
    Start();
    ASSERT_TRUE(Settle());
    medium_.SetFaults({.min_delay_ns = 1'000, .max_delay_ns = 1'000, .flush_error_probability = 1});
    ASSERT_EQ(Append(5'000), RefusalReason::kNone);
    ASSERT_TRUE(StepUntil([&] { return writer_->errors() > 0; }));
    Stop();  // The process ends; the machine goes on.
    medium_.SetFaults({});
    const ReadResult read = Read();
    if (read.records.size() == texts_.size()) {
      ++mattered;
      const auto disk = medium_.Open("log");
      ASSERT_TRUE(MakeLogDurable(disk.get(), read.durable, read.end).has_value());
    }
    const size_t there = read.records.size();
    medium_.Crash();
    EXPECT_GE(Read().records.size(), there);
    texts_.resize(Read().records.size());
    ends_.resize(texts_.size());
  }
  EXPECT_GT(mattered, 20);
}

// A space's definition and its first observation: where there is room for both, both are taken,
// also at the end of a segment and of the memory.
TEST_F(LogWriterTest, WhatIsJudgedTogetherIsTakenTogether) {
  SplitMix64 random(7);
  LogWriterOptions options = Options();
  options.blocks = 2;
  Start(options);
  uint64_t taken = 0;
  uint64_t refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    const std::string payload(random.Below(random.Below(3) == 0 ? 60'000 : 300), 'x');
    LogRecord first;
    first.kind = LogRecordKind::kDelete;
    first.stamp = ++stamps_;
    first.space = "space";
    first.id = "id";
    LogRecord second = first;
    second.kind = LogRecordKind::kUpsert;
    second.payload = std::as_bytes(std::span(payload));
    const size_t bytes = LogRecordBytes(second);
    if (writer_->JudgeRoom(LogRecordBytes(first) + bytes, false) == RefusalReason::kNone) {
      const LogAddress at = writer_->Append(first, false, bytes);
      EXPECT_EQ(PositionOf(writer_->Append(second, true)), PositionOf(at) + LogRecordBytes(first));
      ++taken;
    } else {
      ++refused;
    }
    if (random.Below(3) == 0) Step(static_cast<int64_t>(random.Below(100'000)));
    if (random.Below(3) == 0) keeper_->Poll();
  }
  EXPECT_GT(taken, 1'000u);
  EXPECT_GT(refused, 1'000u);
}

TEST_F(LogWriterTest, TakesNoMemoryBetweenSegments) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer has its own allocator";
  Start();
  ASSERT_TRUE(Settle());
  std::vector<std::byte> payload(1'000);
  LogRecord record;
  record.space = "space";
  record.id = "id";
  record.payload = payload;
  // Beside the simulated disk, which takes memory as it likes: no operation is begun here.
  uint64_t taken = 0;
  for (int i = 0; i < 40; ++i) {
    record.stamp = static_cast<uint64_t>(i) + 1;
    const uint64_t before = AllocationCount();
    ASSERT_EQ(writer_->JudgeRoom(LogRecordBytes(record), false), RefusalReason::kNone);
    (void)writer_->Append(record, false);
    taken += AllocationCount() - before;
  }
  EXPECT_EQ(taken, 0u);
}

}  // namespace
}  // namespace engram
