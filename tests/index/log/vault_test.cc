#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "index/log/vault_verifier.h"
#include "index/log/vault_writer.h"
#include "src/core/clock.h"
#include "src/core/log_files.h"
#include "src/core/log_record.h"
#include "src/core/simulated_disk.h"
#include "tests/index/log/log_builder.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr uint32_t kSegmentBytes = 128 * 1024;

// Logs with records at known places, and a vault.
class VaultTest : public testing::Test {
 protected:
  VaultTest() : medium_(&clock_, 7) {}

  // Writes records back to back into a segment of a log; returns what names them.
  std::vector<VaultMove> MakeSegment(uint16_t log, uint32_t number, size_t count,
                                     size_t payload_max) {
    Bytes bytes(kLogPageBytes);
    std::vector<VaultMove> moves;
    for (size_t i = 0; i < count; ++i) {
      const std::string id = "id" + std::to_string(++stamp_);
      const Bytes payload(random_.Below(payload_max), std::byte{static_cast<uint8_t>(stamp_)});
      const std::array<float, 4> vector{1, 2, 3, static_cast<float>(stamp_)};
      LogRecord record;
      record.stamp = stamp_;
      record.session = SessionId(stamp_ % 3);
      record.sequence = stamp_;
      record.space = "space";
      record.id = id;
      record.dtype = VectorDtype::kF32;
      record.dimension = 4;
      record.vector = std::as_bytes(std::span(vector));
      record.payload = payload;
      const auto at = static_cast<uint32_t>(bytes.size());
      const LogAddress address = MakeLogAddress(log, MakeLogPosition(number, at));
      bytes.resize(at + LogRecordBytes(record));
      WriteLogRecord(record, address, bytes.data() + at);
      texts_[address] = TextOf(record);
      moves.push_back(
          {.from = address, .record_bytes = static_cast<uint32_t>(LogRecordBytes(record))});
    }
    const auto disk = medium_.Open(LogFolder(log));
    EXPECT_TRUE(ReplaceFile(*disk, SegmentName(number), bytes).has_value());
    return moves;
  }
  // Until it has come to its end.
  std::vector<VaultMove> TakeOver(std::vector<VaultMove> moves, uint32_t number) {
    if (vault_ == nullptr) vault_ = medium_.Open(LogFolder(kVaultLog));
    VaultWriter writer(
        {.instance = kTestInstance,
         .segment_bytes = kSegmentBytes,
         .bytes_per_second = uint64_t{1} << 30},
        vault_.get(), [this](uint16_t log) { return medium_.Open(LogFolder(log)); }, &clock_);
    writer.Begin(std::move(moves), number);
    for (int i = 0; i < 100'000 && writer.active(); ++i) {
      clock_.AdvanceNs(50'000);
      writer.Poll([this](const Note& note) { notes_.push_back(note.text); });
    }
    EXPECT_FALSE(writer.active());
    written_ = writer.written();
    unsound_ = writer.unsound();
    return writer.moves();
  }
  LogFiles VaultFiles() {
    LogFiles files;
    const auto disk = medium_.Open(LogFolder(kVaultLog));
    const auto entries = disk->List();
    for (const DirectoryEntry& entry : *entries) {
      files[entry.name] = *medium_.ContentOf(LogFolder(kVaultLog), entry.name);
    }
    return files;
  }
  static LogReport Verify(const LogFiles& files) {
    MemoryDisk disk(&files);
    auto report = VerifyVault(disk, kTestInstance);
    EXPECT_TRUE(report.has_value()) << report.error().message;
    CHECK(disk.open_files() == 0 && disk.in_flight() == 0, "everything is closed again");
    return report.has_value() ? *std::move(report) : LogReport{};
  }
  // What lies at the new places is what lay at the old ones.
  void ExpectThere(const std::vector<VaultMove>& moves) {
    const LogFiles files = VaultFiles();
    for (const VaultMove& move : moves) {
      ASSERT_NE(move.to, kNoLogAddress);
      const LogPosition position = PositionOf(move.to);
      const Bytes& bytes = files.at(SegmentName(SegmentOf(position)));
      LogRecord record;
      size_t record_bytes = 0;
      ASSERT_EQ(ParseLogRecord(std::span(bytes).subspan(OffsetOf(position)), move.to, &record,
                               &record_bytes),
                LogRecordFault::kNone);
      EXPECT_EQ(record_bytes, move.record_bytes);
      EXPECT_EQ(TextOf(record), texts_.at(move.from));
    }
  }

  SimulatedClock clock_;
  SimulatedDisk medium_;
  std::unique_ptr<Disk> vault_;
  SplitMix64 random_{3};
  uint64_t stamp_ = 0;
  std::map<LogAddress, std::string> texts_;
  std::vector<std::string> notes_;
  std::vector<VaultWriter::Written> written_;
  std::vector<LogSegment> unsound_;
};

TEST_F(VaultTest, TakesOverWhatIsListedAndNothingElse) {
  std::vector<VaultMove> moves;
  uint64_t bytes = 0;
  for (uint16_t log = 0; log < 2; ++log) {
    for (uint32_t number = 3; number < 6; ++number) {
      for (const VaultMove& move : MakeSegment(log, number, 40, 3'000)) {
        if (random_.Below(3) != 0) continue;
        moves.push_back(move);
        bytes += move.record_bytes;
      }
    }
  }
  const auto taken = TakeOver(moves, 9);
  EXPECT_TRUE(notes_.empty());
  ExpectThere(taken);
  const LogReport report = Verify(VaultFiles());
  EXPECT_TRUE(report.sound());
  EXPECT_EQ(report.records, moves.size());
  EXPECT_EQ(report.record_bytes, bytes);
  EXPECT_EQ(report.records_of_space.at("space"), moves.size());
  // The vault's own are taken over the same way.
  std::vector<VaultMove> again;
  for (size_t i = 0; i < taken.size(); i += 2) {
    again.push_back({.from = taken[i].to, .record_bytes = taken[i].record_bytes});
    texts_[taken[i].to] = texts_.at(taken[i].from);
  }
  ExpectThere(TakeOver(again, written_.back().number + 1));
}

// More than a file holds, with records of any size: none is cut.
TEST_F(VaultTest, FillsSeveralFiles) {
  std::vector<VaultMove> moves;
  for (uint32_t number = 1; number <= 4; ++number) {
    for (const VaultMove& move : MakeSegment(0, number, 12, 60'000)) moves.push_back(move);
  }
  const auto taken = TakeOver(moves, 1);
  EXPECT_GT(written_.size(), 8u);
  ExpectThere(taken);
  EXPECT_TRUE(Verify(VaultFiles()).sound());
  for (const VaultWriter::Written& file : written_) {
    EXPECT_LE(file.bytes, kSegmentBytes);
    EXPECT_EQ(VaultFiles().at(SegmentName(file.number)).size(), file.bytes);
  }
}

// Each bit of each file: seen, and named with file and offset; and no record is lost for it.
TEST_F(VaultTest, EveryFlippedBitIsSeen) {
  (void)TakeOver(MakeSegment(0, 1, 6, 500), 1);
  (void)TakeOver(MakeSegment(0, 2, 2, 100), 2);
  LogFiles files = VaultFiles();
  ASSERT_EQ(files.size(), 2u);
  const uint64_t records = Verify(files).records;
  EXPECT_EQ(records, 8u);
  for (auto& [name, bytes] : files) {
    for (uint64_t bit = 0; bit < 8 * bytes.size(); bit += kSanitized ? 47 : 1) {
      const std::byte mask = std::byte{1} << (bit % 8);
      bytes[bit / 8] ^= mask;
      const LogReport report = Verify(files);
      ASSERT_EQ(report.damages.size(), 1u) << name << " bit " << bit;
      ASSERT_EQ(report.damages[0].file, name) << "bit " << bit;
      ASSERT_EQ(report.damages[0].offset, bit / 8) << name << " bit " << bit;
      ASSERT_EQ(report.records, records) << name << " bit " << bit;
      bytes[bit / 8] ^= mask;
    }
  }
}

TEST_F(VaultTest, LargerDamageIsNamedAndWhatFollowsIsRead) {
  (void)TakeOver(MakeSegment(0, 1, 30, 900), 1);
  LogFiles files = VaultFiles();
  Bytes& bytes = files.begin()->second;
  const Bytes whole = bytes;
  std::fill(bytes.begin() + 9'000, bytes.begin() + 9'600, std::byte{0});
  const LogReport report = Verify(files);
  ASSERT_EQ(report.damages.size(), 1u);
  EXPECT_LE(report.damages[0].offset, 9'000u);
  EXPECT_GT(report.damages[0].offset, 7'000u);
  EXPECT_GE(report.records, 26u);
  bytes = whole;
  bytes.resize(bytes.size() - kLogPageBytes);
  EXPECT_FALSE(Verify(files).sound());
  bytes = whole;
  bytes.resize(bytes.size() + 1);
  EXPECT_FALSE(Verify(files).sound());
  bytes.clear();
  EXPECT_FALSE(Verify(files).sound());
  files.clear();
  files[SegmentName(2)] = whole;
  EXPECT_FALSE(Verify(files).sound()) << "under another number";
  files.clear();
  files[SegmentName(1) + ".new"] = whole;
  EXPECT_TRUE(Verify(files).sound());
  EXPECT_EQ(Verify(files).unfinished.size(), 1u);
}

// One that is not sound stays, with all that come after it in its segment; the others are taken.
TEST_F(VaultTest, WhatIsDamagedIsLeftWhereItIs) {
  auto moves = MakeSegment(0, 1, 10, 500);
  const auto second = MakeSegment(0, 2, 10, 500);
  const auto missing = MakeSegment(0, 3, 2, 500);
  moves.insert(moves.end(), second.begin(), second.end());
  moves.insert(moves.end(), missing.begin(), missing.end());
  const uint32_t offset = OffsetOf(PositionOf(moves[4].from));
  medium_.FlipBit("log-000", SegmentName(1), (uint64_t{offset} + 70) * 8);
  ASSERT_TRUE(medium_.Open("log-000")->Remove(SegmentName(3)).has_value());
  const auto taken = TakeOver(moves, 1);
  ExpectThere({taken.begin(), taken.begin() + 4});
  for (size_t i = 4; i < 10; ++i) EXPECT_EQ(taken[i].to, kNoLogAddress);
  ExpectThere({taken.begin() + 10, taken.begin() + 20});
  for (size_t i = 20; i < 22; ++i) EXPECT_EQ(taken[i].to, kNoLogAddress);
  EXPECT_EQ(unsound_, (std::vector<LogSegment>{{0, 1}, {0, 3}}));
  ASSERT_EQ(notes_.size(), 2u);
  EXPECT_NE(notes_[0].find("log-000/segment-00000001.log: the record at offset " +
                           std::to_string(offset)),
            std::string::npos)
      << notes_[0];
}

// Files that were complete stay taken; the one that was begun is gone.
TEST_F(VaultTest, AFullDiskEndsItCleanly) {
  std::vector<VaultMove> moves;
  for (uint32_t number = 1; number <= 4; ++number) {
    for (const VaultMove& move : MakeSegment(0, number, 10, 20'000)) moves.push_back(move);
  }
  SimulatedDiskFaults full;
  full.capacity_bytes = medium_.used_bytes() + kSegmentBytes + kSegmentBytes / 2;
  medium_.SetFaults(full);
  const auto taken = TakeOver(moves, 1);
  ASSERT_EQ(notes_.size(), 1u);
  EXPECT_NE(notes_[0].find("No space left"), std::string::npos) << notes_[0];
  ASSERT_EQ(written_.size(), 1u);
  EXPECT_EQ(VaultFiles().size(), 1u);
  const auto first_left = std::ranges::find(taken, kNoLogAddress, &VaultMove::to);
  ASSERT_NE(first_left, taken.begin());
  ExpectThere({taken.begin(), first_left});
  EXPECT_TRUE(std::all_of(first_left, taken.end(),
                          [](const VaultMove& move) { return move.to == kNoLogAddress; }));
}

}  // namespace
}  // namespace engram
