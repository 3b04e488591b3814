#include "index/log/log_reader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/log_files.h"
#include "src/core/simulated_disk.h"
#include "tests/index/log/log_builder.h"

namespace engram {
namespace {

TEST(LogReaderTest, AnEmptyFolderIsAnEmptyLog) {
  const ReadResult read = ReadLog(LogFiles{{"README", Bytes(10)}});
  EXPECT_EQ(read.error, "");
  EXPECT_TRUE(read.records.empty());
  EXPECT_EQ(read.end, 0u);
  EXPECT_EQ(read.highest_epoch, 0u);
}

TEST(LogReaderTest, ASegmentWithoutBlocksEndsBehindItsHeader) {
  LogBuilder builder;
  builder.AddSegment(7);
  builder.AddSegment(8, true);
  const ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.end, MakeLogPosition(7, kLogPageBytes));
}

TEST(LogReaderTest, ReadsRecordsOfAllBlocksAndSegments) {
  for (const bool recycled : {false, true}) {
    LogBuilder builder;
    for (uint32_t number = 3; number < 7; ++number) builder.AddSegment(number, recycled);
    // Block i has i % 60 records, so also none; those of up to 60 take two pages.
    for (size_t i = 0; i < 40; ++i) {
      builder.set_epoch(1 + static_cast<uint32_t>(i / 10));
      builder.AddBlock(i * 7 % 60);
    }
    ASSERT_GE(SegmentOf(builder.position()), 5u);
    const ReadResult read = ReadLog(builder.files());
    EXPECT_EQ(read.error, "");
    EXPECT_EQ(read.records, builder.texts());
    EXPECT_EQ(read.end, builder.position());
    EXPECT_EQ(read.last_epoch, 4u);
    EXPECT_EQ(read.highest_epoch, 4u);
    EXPECT_EQ(read.durable, builder.blocks().back());
    EXPECT_TRUE(read.mended.empty());
    EXPECT_TRUE(std::ranges::is_sorted(read.addresses));
  }
}

TEST(LogReaderTest, ReadsFromAnyBlockOn) {
  LogBuilder builder;
  builder.AddSegment(1);
  std::vector<size_t> before;
  for (size_t i = 0; i < 30; ++i) {
    before.push_back(builder.texts().size());
    builder.AddBlock(1 + i % 50);
  }
  ASSERT_GE(SegmentOf(builder.position()), 2u);
  for (size_t i = 0; i < 30; ++i) {
    const ReadResult read = ReadLog(builder.files(), builder.blocks()[i]);
    EXPECT_EQ(read.error, "");
    EXPECT_EQ(read.records,
              std::vector<std::string>(builder.texts().begin() + static_cast<ptrdiff_t>(before[i]),
                                       builder.texts().end()));
  }
  const ReadResult read = ReadLog(builder.files(), builder.position());
  EXPECT_EQ(read.error, "");
  EXPECT_TRUE(read.records.empty());
  EXPECT_EQ(read.end, builder.position());
}

TEST(LogReaderTest, ReadsFromTheEndOfASegmentOn) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(3);
  const LogPosition end = builder.position();
  builder.GoToNextSegment();
  builder.AddBlock(2);
  ReadResult read = ReadLog(builder.files(), end);
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.records.size(), 2u);
  EXPECT_EQ(read.end, builder.position());
  // The very end of a full segment.
  LogBuilder full;
  full.AddSegment(1);
  while (SegmentOf(full.position()) == 1 && OffsetOf(full.position()) < kMinSegmentBytes) {
    full.AddBlock(1);
  }
  EXPECT_EQ(full.position(), MakeLogPosition(1, kMinSegmentBytes));
  read = ReadLog(full.files(), full.position());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.end, MakeLogPosition(1, kMinSegmentBytes));
  full.AddBlock(4);
  read = ReadLog(full.files(), MakeLogPosition(1, kMinSegmentBytes));
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.records.size(), 4u);
}

TEST(LogReaderTest, ABadPlaceToBeginAtIsAnError) {
  LogBuilder builder;
  builder.AddSegment(2);
  builder.AddSegment(3);
  builder.AddBlock(1);
  for (const LogPosition from : {MakeLogPosition(2, 0), MakeLogPosition(2, 100),
                                 MakeLogPosition(2, kMinSegmentBytes + kLogPageBytes)}) {
    const ReadResult read = ReadLog(builder.files(), from);
    EXPECT_EQ(read.code, ErrorCode::kCorrupt);
    EXPECT_TRUE(Says(read.error, "log-000/segment-00000002.log")) << read.error;
    EXPECT_TRUE(Says(read.error, "offset " + std::to_string(OffsetOf(from)))) << read.error;
  }
  for (const uint32_t number : {1u, 4u}) {
    const ReadResult read = ReadLog(builder.files(), MakeLogPosition(number, kLogPageBytes));
    EXPECT_EQ(read.code, ErrorCode::kCorrupt);
    EXPECT_TRUE(Says(read.error, SegmentName(number) + " is missing")) << read.error;
    EXPECT_TRUE(Says(read.error, "restore a backup")) << read.error;
  }
}

// ---------------------------------------------------------------------------------------------
// What is not live

TEST(LogReaderTest, WhatWasCutOffEndsTheLog) {
  // Any sectors of the last block are missing, over zeros and over older bytes.
  for (const bool recycled : {false, true}) {
    for (uint32_t seed = 0; seed < 200; ++seed) {
      LogBuilder builder(kMinSegmentBytes, 0, seed);
      builder.AddSegment(1, recycled);
      builder.AddBlock(5);
      const LogPosition last = builder.position();
      const Bytes before = builder.file(1);
      builder.AddBlock(40);
      bool whole = true;
      for (size_t at = OffsetOf(last); at < OffsetOf(builder.position()); at += 512) {
        if (builder.random().Below(3) != 0) continue;
        const auto from = before.begin() + static_cast<ptrdiff_t>(at);
        const auto to = builder.file(1).begin() + static_cast<ptrdiff_t>(at);
        whole = whole && std::equal(from, from + 512, to);
        std::copy_n(from, 512, to);
      }
      const ReadResult read = ReadLog(builder.files());
      EXPECT_EQ(read.error, "");
      EXPECT_TRUE(read.mended.empty());
      EXPECT_EQ(read.end, whole ? builder.position() : last) << seed;
      EXPECT_EQ(read.records, builder.FirstTexts(whole ? 45 : 5));
    }
  }
}

TEST(LogReaderTest, ABlockOfAnEarlierEpochIsNotLive) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.set_epoch(4);
  builder.AddBlock(2);
  const LogPosition at = builder.position();
  // What the fourth start wrote and did not see flushed: two blocks, of which the second stayed.
  builder.GoTo(at + kLogPageBytes);
  builder.AddBlock(1, at);
  // The fifth start's block of the same size lies where the first of them was.
  builder.GoTo(at);
  builder.set_epoch(5);
  builder.AddBlock(1, at);
  const ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.end, at + kLogPageBytes);
  EXPECT_EQ(read.records,
            (std::vector<std::string>{builder.texts()[0], builder.texts()[1], builder.texts()[3]}));
  EXPECT_EQ(read.last_epoch, 5u);
  // Whoever begins behind the fifth one's block must say so, or would take it for live.
  EXPECT_TRUE(ReadLog(builder.files(), at + kLogPageBytes, 5).records.empty());
  EXPECT_EQ(ReadLog(builder.files(), at + kLogPageBytes, 4).records.size(), 1u);
}

TEST(LogReaderTest, EpochsLeftBehindAreKnown) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddSegment(2);
  builder.set_epoch(4);
  builder.AddBlock(2);
  const LogPosition end = builder.position();
  builder.GoTo(end + 3 * kLogPageBytes);
  builder.set_epoch(6);
  builder.AddBlock(1, end);
  builder.GoTo(MakeLogPosition(2, 5 * kLogPageBytes));
  builder.set_epoch(9);
  builder.AddBlock(1, end);
  const ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.end, end);
  EXPECT_EQ(read.last_epoch, 4u);
  EXPECT_EQ(read.highest_epoch, 9u) << "or the next start writes blocks that these seem to follow";
}

// After an operator gave up what an earlier epoch wrote, its blocks say nothing of what came later.
TEST(LogReaderTest, BlocksOfAnEarlierEpochProveNoDamage) {
  for (const bool missing_segment : {false, true}) {
    LogBuilder builder;
    builder.AddSegment(1);
    builder.set_epoch(5);
    builder.AddBlock(1);
    const LogPosition end = builder.position();
    builder.set_epoch(4);
    if (missing_segment) builder.AddSegment(3);
    builder.GoTo(missing_segment ? MakeLogPosition(3, kLogPageBytes) : end + kLogPageBytes);
    builder.AddBlock(1, end + kLogPageBytes);
    const ReadResult read = ReadLog(builder.files());
    EXPECT_EQ(read.error, "");
    EXPECT_EQ(read.end, end);
  }
}

TEST(LogReaderTest, BytesOfAnEarlierUseAreNotLive) {
  LogBuilder old;
  old.AddSegment(1);
  old.AddBlock(2);
  old.AddBlock(2);
  LogBuilder builder;
  builder.AddSegment(2, true);
  std::copy(old.file(1).begin() + kLogPageBytes, old.file(1).end(),
            builder.file(2).begin() + kLogPageBytes);
  ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.end, MakeLogPosition(2, kLogPageBytes));
  builder.AddBlock(1);
  read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.records, builder.texts());
}

TEST(LogReaderTest, BlocksOfAnotherDirectoryOrLogAreNotLive) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(1);
  const LogPosition end = builder.position();
  LogInstance other = kTestInstance;
  ++other[7];
  SplitMix64 random(1);
  const std::vector<OwnedRecord> records{RandomRecord(random, 1)};
  for (const Bytes& block :
       {MakeBlock({.instance = other, .position = end, .previous = end}, records),
        MakeBlock({.log = 1, .position = end, .previous = end}, records),
        MakeBlock({.position = end, .previous = end - kLogPageBytes}, records)}) {
    std::ranges::copy(block, builder.file(1).begin() + OffsetOf(end));
    const ReadResult read = ReadLog(builder.files());
    EXPECT_EQ(read.error, "");
    EXPECT_EQ(read.end, end);
  }
}

// The first block of the next segment survived a crash, and what was before it did not.
TEST(LogReaderTest, TheNextSegmentIsEnteredOnlyWhereThisOneEnded) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(1);
  const LogPosition end = builder.position();
  builder.AddBlock(1, end);
  std::fill_n(builder.file(1).begin() + OffsetOf(end), kLogPageBytes, std::byte{0});
  builder.GoToNextSegment();
  builder.AddBlock(1, end);
  const ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.end, end);
  EXPECT_EQ(read.records, builder.FirstTexts(1));
}

TEST(LogReaderTest, APreparedSegmentThatWasNotFinishedIsNotThere) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(3);
  const LogPosition end = builder.position();
  std::vector<Bytes> unfinished{{}, Bytes(100), Bytes(kMinSegmentBytes)};
  LogBuilder other;
  other.AddSegment(2);
  unfinished.push_back(other.file(2));
  unfinished.back().resize(kMinSegmentBytes / 2);
  other.AddSegment(9);
  unfinished.push_back(other.file(9));
  for (const Bytes& content : unfinished) {
    builder.files()[SegmentName(2)] = content;
    ReadResult read = ReadLog(builder.files());
    EXPECT_EQ(read.error, "");
    EXPECT_EQ(read.end, end);
    // Also where it is all that there is.
    read = ReadLog(LogFiles{{SegmentName(1), content}});
    EXPECT_EQ(read.error, "");
    EXPECT_EQ(read.end, 0u);
  }
}

// A freed segment, whose header has its next number already and whose name has not.
TEST(LogReaderTest, ASegmentThatIsBeingRecycledIsNotThere) {
  LogBuilder builder;
  for (uint32_t number = 1; number <= 3; ++number) builder.AddSegment(number);
  while (SegmentOf(builder.position()) < 3) builder.AddBlock(20);
  const ReadResult before = ReadLog(builder.files());
  LogBuilder other;
  other.AddSegment(4);
  std::copy_n(other.file(4).begin(), kLogPageBytes, builder.file(1).begin());
  const ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_LT(read.records.size(), before.records.size());
  EXPECT_EQ(read.records.back(), before.records.back());
  EXPECT_EQ(read.end, before.end);
}

// ---------------------------------------------------------------------------------------------
// Disks

// Blocks of all sizes up to the greatest, in segments of many chunks.
LogBuilder LargeLog(uint32_t segment_bytes, uint32_t segments, size_t payload_bytes) {
  LogBuilder builder(segment_bytes);
  builder.AddSegment(1);
  for (uint64_t stamp = 1; SegmentOf(builder.position()) <= segments;) {
    std::vector<OwnedRecord> records;
    const uint64_t bytes = builder.random().Below(3) == 0
                               ? kMaxBlockBytes - kLogPageBytes
                               : 1 + builder.random().Below(kMaxBlockBytes / 16);
    for (size_t taken = 0;;) {
      OwnedRecord record = RandomRecord(builder.random(), stamp, payload_bytes);
      taken += LogRecordBytes(record.get());
      if (taken > bytes) break;
      records.push_back(record);
      ++stamp;
    }
    builder.AddBlock(records);
  }
  return builder;
}

void Save(const LogFiles& files, Disk& disk) {
  for (const auto& [name, bytes] : files) {
    const auto file = disk.Open(name, OpenMode::kCreate, Caching::kBuffered);
    ASSERT_TRUE(file.has_value());
    if (!bytes.empty()) {
      ASSERT_TRUE(disk.Write(file->id, 0, bytes, 0));
    }
    DiskCompletion end;
    while (disk.in_flight() > 0 && disk.Poll({&end, 1}) == 0) disk.Wait(kNanosPerSecond);
    ASSERT_EQ(end.error, 0);
    disk.Close(file->id);
  }
}

TEST(LogReaderTest, ReadsLargeLogsFromEveryDisk) {
  LogBuilder builder = LargeLog(20u << 20, 2, 30'000);
  std::string directory = testing::TempDir() + "engram_log_reader_XXXXXX";
  ASSERT_NE(mkdtemp(directory.data()), nullptr);
  SimulatedClock clock;
  SimulatedDisk medium(&clock, 1);
  std::vector<std::unique_ptr<Disk>> disks;
  disks.push_back(
      medium.Open("log", {.max_in_flight = 5, .max_open_files = 2, .registered_buffers = {}}));
  disks.push_back(std::move(*CreatePosixDisk(directory, {})));
  if (auto uring = CreateUringDisk(directory, {}, nullptr)) disks.push_back(std::move(*uring));
  Save(builder.files(), *disks[0]);
  Save(builder.files(), *disks[1]);
  for (const auto& disk : disks) {
    ReadResult read = ReadLog(*disk);
    EXPECT_EQ(read.error, "") << disk->backend();
    EXPECT_EQ(read.end, builder.position());
    EXPECT_TRUE(read.records == builder.texts()) << disk->backend();
    // From the middle of a chunk.
    const LogPosition from = builder.blocks()[builder.blocks().size() / 3];
    read = ReadLog(*disk, from);
    EXPECT_EQ(read.error, "");
    EXPECT_EQ(read.records.back(), builder.texts().back());
  }
  disks.clear();
  std::filesystem::remove_all(directory);
}

TEST(LogReaderTest, AReadThatFailsIsAnErrorThatNamesTheFile) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(2);
  SimulatedClock clock;
  SimulatedDisk medium(&clock, 1);
  const auto disk = medium.Open("log");
  Save(builder.files(), *disk);
  LogReader reader(disk.get(), 0, kTestInstance);
  ASSERT_TRUE(reader.Open(0).has_value());
  medium.SetFaults({.read_error_probability = 1});
  LogEntry entry;
  auto step = reader.Next(&entry);
  while (step && *step == LogStep::kPending) {
    disk->Wait(kNanosPerSecond);
    step = reader.Next(&entry);
  }
  ASSERT_FALSE(step.has_value());
  EXPECT_TRUE(Says(step.error().message, "log/segment-00000001.log, offset 4096"))
      << step.error().message;
  EXPECT_EQ(reader.Next(&entry).error().message, step.error().message) << "it stays so";
}

// It can be given up at any moment: the disk has nothing of it then.
TEST(LogReaderTest, EndsWithReadsUnderWay) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(2);
  SimulatedClock clock;
  SimulatedDisk medium(&clock, 1);
  const auto disk =
      medium.Open("log", {.max_in_flight = 64, .max_open_files = 1, .registered_buffers = {}});
  Save(builder.files(), *disk);
  for (int calls = 0; calls < 5; ++calls) {
    LogReader reader(disk.get(), 0, kTestInstance);
    ASSERT_TRUE(reader.Open(0).has_value());
    LogEntry entry;
    for (int i = 0; i < calls; ++i) (void)reader.Next(&entry);
  }
  EXPECT_EQ(disk->in_flight(), 0u);
  EXPECT_TRUE(disk->Open("other", OpenMode::kCreate, Caching::kBuffered).has_value());
}

}  // namespace
}  // namespace engram
