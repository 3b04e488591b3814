// What is read of a log after a crash, over and over: what was flushed, and nothing that was not
// written.

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "src/core/clock.h"
#include "src/core/hash.h"
#include "src/core/log_files.h"
#include "src/core/simulated_disk.h"
#include "tests/index/log/log_builder.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

// Writes blocks with a disk that keeps of unflushed ones what it likes, sector by sector; reads,
// goes on with the next epoch. What the log holds is known at each time: `blocks_`, of which the
// first `durable_` were flushed.
//
// As every start does, it makes a marker of the new epoch durable before anything else: until then
// what an earlier start left behind may still come back, when its missing sectors happen to be
// those that are written.
class CrashingWriter {
 public:
  explicit CrashingWriter(uint64_t seed) : random_(seed), medium_(&clock_, seed) { Restart(); }

  // Some writes, some flushes, a crash, and what is read then.
  void Round() {
    const std::vector<Block> before = blocks_;
    const std::vector<Block> read = {blocks_.begin(),
                                     blocks_.begin() + static_cast<ptrdiff_t>(read_blocks_)};
    blocks_ = read;
    WriteBlock(0);
    const bool begun = random_.Below(4) != 0;
    if (begun) {
      Settle(true);
      const size_t writes = random_.Below(12);
      for (size_t i = 0; i < writes; ++i) {
        // Few sizes, so that blocks of different epochs often lie at the same places.
        WriteBlock(random_.Below(4) == 0 ? 0 : random_.Below(2) == 0 ? 1 : 40);
        if (random_.Below(3) == 0) Settle(random_.Below(2) == 0);
      }
    }
    const uint32_t epoch = epoch_;
    medium_.Crash();
    Restart();
    const ReadResult result = ReadLog(*disk_);
    if (!begun && result.last_epoch != epoch) blocks_ = before;
    Check(result);
  }

 private:
  struct Block {
    LogPosition end = 0;
    std::vector<std::string> texts;
  };

  void Restart() {
    disk_ = medium_.Open("log");
    files_.clear();
    writes_.clear();
  }

  void Check(const ReadResult& read) {
    ASSERT_EQ(read.error, "");
    ASSERT_TRUE(read.mended.empty());
    // A row of blocks from the first on, at least those that were flushed.
    read_blocks_ = 0;
    std::vector<std::string> expected;
    for (const Block& block : blocks_) {
      if (block.end > read.end) break;
      expected.insert(expected.end(), block.texts.begin(), block.texts.end());
      ++read_blocks_;
    }
    ASSERT_EQ(read.records.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) ASSERT_EQ(read.records[i], expected[i]) << i;
    ASSERT_GE(read_blocks_, durable_) << "what was flushed is not there";
    if (read_blocks_ > 0) {
      ASSERT_EQ(read.end, blocks_[read_blocks_ - 1].end);
    }
    position_ = read.end;
    epoch_ = read.highest_epoch + 1;
    for (uint32_t number = 1; number <= SegmentOf(position_) + 1; ++number) Prepare(number);
    // What was read is durable once this is done.
    Settle(true);
    durable_ = read_blocks_;
  }

  // The file of a segment, whole and flushed; one that is there stays as it is.
  void Prepare(uint32_t number) {
    const std::string name = SegmentName(number);
    if (medium_.ContentOf("log", name).has_value()) {
      if (files_.contains(number)) return;
      files_[number] = disk_->Open(name, OpenMode::kReadWrite, Caching::kBuffered)->id;
      return;
    }
    Bytes bytes(kMinSegmentBytes);
    const bool recycled = random_.Below(2) == 0;
    if (recycled && number > 1) bytes = *medium_.ContentOf("log", SegmentName(number - 1));
    WriteSegmentHeader({.log = 0,
                        .number = number,
                        .segment_bytes = kMinSegmentBytes,
                        .recycled = recycled,
                        .instance = kTestInstance},
                       bytes.data());
    const auto file = disk_->Open(name, OpenMode::kCreate, Caching::kBuffered);
    files_[number] = file->id;
    writes_.push_back({number, 0, bytes});
    Submit(writes_.back());
    Settle(true);
    ASSERT_TRUE(disk_->SyncDirectory().has_value());
  }

  void WriteBlock(size_t count) {
    if (position_ == 0) {
      Prepare(1);
      position_ = MakeLogPosition(1, kLogPageBytes);
    }
    std::vector<OwnedRecord> records;
    for (size_t i = 0; i < count; ++i) records.push_back(RandomRecord(random_, ++stamp_));
    const LogPosition previous = position_;
    BlockSpec spec{
        .position = position_, .previous = previous, .durable = durable_position_, .epoch = epoch_};
    if (OffsetOf(position_) + MakeBlock(spec, records).size() > kMinSegmentBytes) {
      Prepare(SegmentOf(position_) + 1);
      spec.position = position_ = MakeLogPosition(SegmentOf(position_) + 1, kLogPageBytes);
      spec.durable = durable_position_;
    }
    writes_.push_back({SegmentOf(position_), OffsetOf(position_), MakeBlock(spec, records)});
    Submit(writes_.back());
    position_ += writes_.back().bytes.size();
    Block block{.end = position_, .texts = {}};
    for (const OwnedRecord& record : records) block.texts.push_back(TextOf(record.get()));
    blocks_.push_back(block);
  }

  struct PendingWrite {
    uint32_t segment;
    uint32_t offset;
    Bytes bytes;
  };
  void Submit(const PendingWrite& write) {
    ASSERT_TRUE(disk_->Write(files_.at(write.segment), write.offset, write.bytes, 0));
  }
  // Waits for the writes; then flushes the files.
  void Settle(bool flush) {
    std::array<DiskCompletion, 16> ends;
    const auto drain = [&] {
      while (disk_->in_flight() > 0) {
        if (disk_->Poll(ends) == 0) disk_->Wait(kNanosPerSecond);
      }
    };
    drain();
    writes_.clear();
    if (!flush) return;
    for (const auto& [number, file] : files_) ASSERT_TRUE(disk_->Flush(file, 0));
    drain();
    durable_ = blocks_.size();
    durable_position_ = position_;
  }

  SplitMix64 random_;
  SimulatedClock clock_;
  SimulatedDisk medium_;
  std::unique_ptr<Disk> disk_;
  std::map<uint32_t, FileId> files_;
  std::list<PendingWrite> writes_;
  std::vector<Block> blocks_;
  size_t durable_ = 0;
  size_t read_blocks_ = 0;
  LogPosition durable_position_ = 0;
  LogPosition position_ = 0;
  uint32_t epoch_ = 1;
  uint64_t stamp_ = 0;
};

TEST(LogReaderCrashesTest, ReadsWhatWasFlushedAndNothingElseAfterAnyCrashes) {
  for (uint64_t seed = 0; seed < (kSanitized ? 15 : 100); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    CrashingWriter writer(seed);
    for (int round = 0; round < 15; ++round) {
      writer.Round();
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

}  // namespace
}  // namespace engram
