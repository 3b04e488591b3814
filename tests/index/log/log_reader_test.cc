#include "index/log/log_reader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "src/core/clock.h"
#include "src/core/crc32c.h"
#include "src/core/log_files.h"
#include "src/core/simulated_disk.h"
#include "tests/index/log/log_builder.h"

namespace engram {
namespace {

LogPosition At(uint32_t segment, uint32_t offset) { return MakeLogPosition(segment, offset); }

constexpr uint32_t kHeaderBytes = kBlockHeaderBytes;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

bool Says(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// The first `count` records of those that were written.
std::vector<std::string> First(LogBuilder& builder, size_t count) {
  return {builder.texts().begin(), builder.texts().begin() + static_cast<ptrdiff_t>(count)};
}

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
  EXPECT_EQ(read.end, At(7, kLogPageBytes));
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
  EXPECT_EQ(full.position(), At(1, kMinSegmentBytes));
  read = ReadLog(full.files(), full.position());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.end, At(1, kMinSegmentBytes));
  full.AddBlock(4);
  read = ReadLog(full.files(), At(1, kMinSegmentBytes));
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.records.size(), 4u);
}

TEST(LogReaderTest, ABadPlaceToBeginAtIsAnError) {
  LogBuilder builder;
  builder.AddSegment(2);
  builder.AddSegment(3);
  builder.AddBlock(1);
  for (const LogPosition from : {At(2, 0), At(2, 100), At(2, kMinSegmentBytes + kLogPageBytes)}) {
    const ReadResult read = ReadLog(builder.files(), from);
    EXPECT_EQ(read.code, ErrorCode::kCorrupt);
    EXPECT_TRUE(Says(read.error, "log-000/segment-00000002.log")) << read.error;
    EXPECT_TRUE(Says(read.error, "offset " + std::to_string(OffsetOf(from)))) << read.error;
  }
  for (const uint32_t number : {1u, 4u}) {
    const ReadResult read = ReadLog(builder.files(), At(number, kLogPageBytes));
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
      EXPECT_EQ(read.records, First(builder, whole ? 45 : 5));
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
  builder.GoTo(At(2, 5 * kLogPageBytes));
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
    builder.GoTo(missing_segment ? At(3, kLogPageBytes) : end + kLogPageBytes);
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
  EXPECT_EQ(read.end, At(2, kLogPageBytes));
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
  EXPECT_EQ(read.records, First(builder, 1));
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
// Damage

TEST(LogReaderTest, AnySingleBitOfTheLastBlockIsMended) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(2);
  builder.AddBlock(2);
  const LogPosition last = builder.blocks().back();
  for (LogPosition at = last; at < builder.position(); at += kSanitized ? 11 : 1) {
    for (unsigned bit = 0; bit < 8; ++bit) {
      builder.Flip(at, bit);
      const ReadResult read = ReadLog(builder.files());
      ASSERT_EQ(read.error, "") << at << " " << bit;
      ASSERT_EQ(read.records, builder.texts()) << at << " " << bit;
      ASSERT_EQ(read.mended,
                (std::vector<MendedBit>{{SegmentName(1), uint64_t{OffsetOf(at)} * 8 + bit}}));
      ASSERT_EQ(read.end, builder.position());
      builder.Flip(at, bit);
    }
  }
}

TEST(LogReaderTest, ASingleBitOfTheFirstBlockOfASegmentIsMended) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(2);
  builder.GoToNextSegment();
  const LogPosition last = builder.AddBlock(2);
  for (LogPosition at = last; at < builder.position(); at += 3) {
    const unsigned bit = static_cast<unsigned>(at % 8);
    builder.Flip(at, bit);
    const ReadResult read = ReadLog(builder.files());
    ASSERT_EQ(read.error, "");
    ASSERT_EQ(read.records, builder.texts());
    ASSERT_EQ(read.mended,
              (std::vector<MendedBit>{{SegmentName(2), uint64_t{OffsetOf(at)} * 8 + bit}}));
    builder.Flip(at, bit);
  }
}

TEST(LogReaderTest, ManyBlocksWithASingleBitEachAreMended) {
  LogBuilder builder;
  builder.AddSegment(1);
  for (int i = 0; i < 30; ++i) builder.AddBlock(30);
  std::vector<MendedBit> expected;
  for (const LogPosition block : builder.blocks()) {
    const auto bit = static_cast<uint32_t>(builder.random().Below(kLogPageBytes * 8));
    builder.Flip(block + bit / 8, bit % 8);
    expected.push_back({SegmentName(SegmentOf(block)), uint64_t{OffsetOf(block)} * 8 + bit});
  }
  const ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.records, builder.texts());
  EXPECT_EQ(read.mended, expected);
}

TEST(LogReaderTest, ASingleBitOfAHeaderPageIsMended) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddSegment(2);
  builder.AddBlock(2);
  builder.GoToNextSegment();
  builder.AddBlock(2);
  for (uint32_t bit = 0; bit < kLogPageBytes * 8; bit += bit < 400 ? 1 : 37) {
    for (const uint32_t number : {1u, 2u}) {
      builder.Flip(At(number, bit / 8), bit % 8);
      const ReadResult read = ReadLog(builder.files());
      ASSERT_EQ(read.error, "");
      ASSERT_EQ(read.records, builder.texts());
      ASSERT_EQ(read.mended, (std::vector<MendedBit>{{SegmentName(number), bit}}));
      builder.Flip(At(number, bit / 8), bit % 8);
    }
  }
}

// A flipped bit in what an earlier epoch left behind must not bring it back.
TEST(LogReaderTest, AMendedBlockMustBeLiveToo) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.set_epoch(5);
  builder.AddBlock(1);
  const LogPosition end = builder.position();
  builder.set_epoch(4);
  builder.AddBlock(1, end);
  builder.Flip(end + 70, 3);
  const ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.end, end);
  EXPECT_TRUE(read.mended.empty());
}

// Bytes of a whole record, or of a header: more than can be mended.
TEST(LogReaderTest, DamagedAcknowledgedRecordsAreAnError) {
  for (const uint32_t offset : {0u, kHeaderBytes + 30}) {
    for (const bool marker_in_next_segment : {false, true}) {
      LogBuilder builder;
      builder.AddSegment(1);
      builder.AddSegment(2);
      builder.AddBlock(3);
      const LogPosition bad = builder.AddBlock(3);
      builder.AddBlock(3, bad);  // begun before the second was durable
      if (marker_in_next_segment) builder.GoToNextSegment();
      const LogPosition marker = builder.AddBlock(0);
      for (int i = 0; i < 8; ++i) builder.Flip(bad + offset + 3 * static_cast<unsigned>(i), 2);
      const ReadResult read = ReadLog(builder.files());
      EXPECT_EQ(read.code, ErrorCode::kCorrupt);
      EXPECT_EQ(read.records, First(builder, 3));
      // A record is named by where it begins.
      const uint32_t named = OffsetOf(bad) + (offset == 0 ? 0 : kHeaderBytes);
      EXPECT_TRUE(Says(read.error, "log-000/segment-00000001.log, offset " + std::to_string(named) +
                                       ": acknowledged records are damaged"))
          << read.error;
      EXPECT_TRUE(Says(read.error, SegmentName(SegmentOf(marker)) + ", offset " +
                                       std::to_string(OffsetOf(marker))))
          << read.error;
      EXPECT_TRUE(Says(read.error, "restore a backup")) << read.error;
      ASSERT_TRUE(read.damage.has_value());
      EXPECT_EQ(read.damage->file, SegmentName(1));
      EXPECT_EQ(read.damage->offset, named);
      EXPECT_EQ(read.damage->resume, bad + kLogPageBytes) << "the third block is sound";
    }
  }
}

// The last block of the log, with nothing behind it that says that it was durable: it looks like a
// write that was cut off, and nothing but a single turned bit tells it from one.
TEST(LogReaderTest, DamageThatNoLaterBlockProvesIsTheEnd) {
  LogBuilder builder;
  builder.AddSegment(1);
  builder.AddBlock(3);
  const LogPosition bad = builder.AddBlock(3);
  builder.AddBlock(3, bad);
  builder.Flip(bad + 100, 1);
  builder.Flip(bad + 101, 1);
  const ReadResult read = ReadLog(builder.files());
  EXPECT_EQ(read.error, "");
  EXPECT_EQ(read.end, bad);
}

TEST(LogReaderTest, DamageOfASegmentsFirstBlockIsNamedThere) {
  for (const uint32_t offset : {kHeaderBytes, 0u, 70u}) {
    LogBuilder builder;
    builder.AddSegment(1);
    builder.AddBlock(3);
    builder.GoToNextSegment();
    const LogPosition bad = builder.AddBlock(3);
    builder.AddBlock(0);
    builder.Flip(bad + offset, 1);
    builder.Flip(bad + offset + 1, 1);
    const ReadResult read = ReadLog(builder.files());
    EXPECT_TRUE(Says(read.error, "segment-00000002.log, offset " +
                                     std::to_string(kLogPageBytes + (offset == 0 ? 0 : 64))))
        << read.error;
  }
}

TEST(LogReaderTest, PaddingThatIsNotZeroIsDamage) {
  LogBuilder builder;
  builder.AddSegment(1);
  const LogPosition bad = builder.AddBlock(1);
  builder.AddBlock(0);
  builder.At(bad + 4'000) = std::byte{0x42};
  const ReadResult read = ReadLog(builder.files());
  EXPECT_TRUE(Says(read.error, "offset " + std::to_string(kLogPageBytes + 4'000))) << read.error;
  EXPECT_TRUE(Says(read.error, "padding")) << read.error;
}

TEST(LogReaderTest, AMissingSegmentIsAnError) {
  LogBuilder builder;
  builder.AddSegment(1);
  while (SegmentOf(builder.position()) < 4) builder.AddBlock(40);
  ASSERT_EQ(ReadLog(builder.files()).error, "");
  for (const uint32_t number : {2u, 3u}) {
    LogFiles files = builder.files();
    files.erase(SegmentName(number));
    const ReadResult read = ReadLog(files);
    EXPECT_EQ(read.code, ErrorCode::kCorrupt);
    EXPECT_TRUE(Says(read.error, SegmentName(number))) << read.error;
    EXPECT_TRUE(Says(read.error, "is missing")) << read.error;
    EXPECT_TRUE(Says(read.error, SegmentName(number + 1))) << read.error;
    ASSERT_TRUE(read.damage);
    EXPECT_EQ(read.damage->resume, At(number + 1, kLogPageBytes));
  }
  // The first one can have been freed, the last one cannot be missed.
  for (const uint32_t number : {1u, 4u}) {
    LogFiles files = builder.files();
    files.erase(SegmentName(number));
    EXPECT_EQ(ReadLog(files).error, "");
  }
}

// More than a bit of the header: also that of the first segment, and where nothing says so but the
// blocks of the segment itself.
TEST(LogReaderTest, ADamagedHeaderIsAnErrorWhereItsSegmentHoldsBlocks) {
  for (const uint32_t number : {1u, 2u, 3u, 4u}) {
    LogBuilder builder;
    builder.AddSegment(1);
    while (SegmentOf(builder.position()) < 4) builder.AddBlock(40);
    builder.AddSegment(5);
    builder.Flip(At(number, 9), 1);
    builder.Flip(At(number, 30), 1);
    ReadResult read = ReadLog(builder.files());
    EXPECT_EQ(read.code, ErrorCode::kCorrupt);
    EXPECT_TRUE(Says(read.error, "log-000/" + SegmentName(number) + ", offset 0")) << read.error;
    EXPECT_TRUE(Says(read.error, "has a header that does not match its CRC32C")) << read.error;
    read = ReadLog(builder.files(), At(number, kLogPageBytes));
    EXPECT_TRUE(Says(read.error, SegmentName(number))) << read.error;
    EXPECT_TRUE(Says(read.error, "has a header that does not match its CRC32C")) << read.error;
  }
}

TEST(LogReaderTest, ATruncatedSegmentIsAnErrorWhereItHoldsBlocks) {
  LogBuilder builder;
  builder.AddSegment(1);
  while (SegmentOf(builder.position()) < 2) builder.AddBlock(40);
  for (const size_t bytes : {kMinSegmentBytes - 1, kMinSegmentBytes - kLogPageBytes}) {
    for (const uint32_t number : {1u, 2u}) {
      LogFiles files = builder.files();
      files[SegmentName(number)].resize(bytes);
      const ReadResult read = ReadLog(files);
      EXPECT_EQ(read.code, ErrorCode::kCorrupt);
      EXPECT_TRUE(Says(read.error, SegmentName(number))) << read.error;
      EXPECT_TRUE(Says(read.error, "less than the 65536 bytes")) << read.error;
    }
  }
}

TEST(LogReaderTest, SegmentsOfOthersAreErrors) {
  SegmentHeader header{.log = 0,
                       .number = 2,
                       .segment_bytes = kMinSegmentBytes,
                       .recycled = false,
                       .instance = kTestInstance};
  const auto error_with = [](const SegmentHeader& second, uint32_t version) {
    LogBuilder builder;
    builder.AddSegment(1);
    builder.AddSegment(2);
    builder.AddBlock(1);
    Bytes& page = builder.file(2);
    WriteSegmentHeader(second, page.data());
    if (version != kLogFormatVersion) {
      std::memcpy(page.data() + 12, &version, sizeof(version));
      const uint32_t crc =
          Crc32c(std::span(page).subspan(12, kLogPageBytes - 12), Crc32c(std::span(page).first(8)));
      std::memcpy(page.data() + 8, &crc, sizeof(crc));
    }
    const ReadResult read = ReadLog(builder.files());
    EXPECT_TRUE(Says(read.error, "log-000/segment-00000002.log")) << read.error;
    return read;
  };
  header.instance[0] = 9;
  EXPECT_TRUE(
      Says(error_with(header, kLogFormatVersion).error, "belongs to another data directory"));
  header.instance = kTestInstance;
  header.log = 3;
  EXPECT_TRUE(Says(error_with(header, kLogFormatVersion).error, "belongs to log 3, not 0"));
  header.log = 0;
  const ReadResult newer = error_with(header, kLogFormatVersion + 1);
  EXPECT_EQ(newer.code, ErrorCode::kUnavailable);
  EXPECT_TRUE(Says(newer.error, "log format version 3")) << newer.error;
  header.segment_bytes = kLogPageBytes;
  EXPECT_TRUE(Says(error_with(header, kLogFormatVersion).error, "field out of range"));
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

// ---------------------------------------------------------------------------------------------
// Crashes

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
      position_ = At(1, kLogPageBytes);
    }
    std::vector<OwnedRecord> records;
    for (size_t i = 0; i < count; ++i) records.push_back(RandomRecord(random_, ++stamp_));
    const LogPosition previous = position_;
    BlockSpec spec{
        .position = position_, .previous = previous, .durable = durable_position_, .epoch = epoch_};
    if (OffsetOf(position_) + MakeBlock(spec, records).size() > kMinSegmentBytes) {
      Prepare(SegmentOf(position_) + 1);
      spec.position = position_ = At(SegmentOf(position_) + 1, kLogPageBytes);
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

TEST(LogReaderTest, ReadsWhatWasFlushedAndNothingElseAfterAnyCrashes) {
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
