// A record that crashes replay is found again, kept whole, and left out; nothing else is.

#include "index/log/replay_guard.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "src/core/clock.h"
#include "src/core/simulated_disk.h"

namespace engram {
namespace {

constexpr LogAddress kAddress = MakeLogAddress(3, MakeLogPosition(0x2a, 0x1f40));

LogRecord SomeRecord(const std::vector<float>& vector, const std::string& payload) {
  LogRecord record;
  record.dtype = VectorDtype::kF32;
  record.dimension = static_cast<uint16_t>(vector.size());
  record.stamp = 77;
  record.session = SessionId(5);
  record.sequence = 9;
  record.when_ns = 1;
  record.space = "s";
  record.vector = std::as_bytes(std::span(vector));
  record.id = "poison";
  record.payload = std::as_bytes(std::span(payload));
  return record;
}

QuarantinedRecord SomeQuarantined() {
  const std::vector<float> vector = {1, 2, 3};
  const std::string payload = "payload";
  const LogRecord record = SomeRecord(vector, payload);
  QuarantinedRecord kept{.address = kAddress,
                         .stamp = record.stamp,
                         .since_unix_ns = 123,
                         .crashes = 2,
                         .record = std::vector<std::byte>(LogRecordBytes(record))};
  WriteLogRecord(record, kAddress, kept.record.data());
  return kept;
}

TEST(QuarantineFile, NamesSayWhereTheRecordLies) {
  EXPECT_EQ(QuarantineFileName(kAddress), "log-003-0000002a-00001f40.record");
  EXPECT_EQ(QuarantinedAddress("log-003-0000002a-00001f40.record"), kAddress);
  for (const char* name :
       {"", "log-003-0000002a-00001f40.recor", "log-003-0000002a-00001f41.record",
        "log-255-0000002a-00001f40.record", "log-003-0000002A-00001f40.record",
        "log-003-ffffffff-00001f40.record", "log-003-0000002a-00001f40.record.new",
        "log-003_0000002a-00001f40.record", "log-003-+000002a-00001f40.record"}) {
    EXPECT_EQ(QuarantinedAddress(name), std::nullopt) << name;
  }
}

TEST(QuarantineFile, ComesBackWhole) {
  const QuarantinedRecord kept = SomeQuarantined();
  const auto read = ParseQuarantined(WriteQuarantined(kept));
  ASSERT_TRUE(read.has_value()) << read.error().message;
  EXPECT_EQ(read->address, kept.address);
  EXPECT_EQ(read->stamp, kept.stamp);
  EXPECT_EQ(read->since_unix_ns, kept.since_unix_ns);
  EXPECT_EQ(read->crashes, kept.crashes);
  EXPECT_EQ(read->record, kept.record);
}

TEST(QuarantineFile, EveryTurnedBitAndEveryOtherLengthIsNoticed) {
  const std::vector<std::byte> bytes = WriteQuarantined(SomeQuarantined());
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    auto turned = bytes;
    turned[bit / 8] ^= std::byte(1 << bit % 8);
    EXPECT_FALSE(ParseQuarantined(turned).has_value()) << bit;
  }
  for (size_t length = 0; length < bytes.size(); ++length) {
    EXPECT_FALSE(ParseQuarantined(std::span(bytes).first(length)).has_value()) << length;
  }
  auto longer = bytes;
  longer.push_back(std::byte{0});
  EXPECT_FALSE(ParseQuarantined(longer).has_value());
}

class ReplayGuardTest : public testing::Test {
 protected:
  ReplayGuard Make(std::map<LogAddress, uint32_t> crashes,
                   std::map<LogAddress, CommitStamp> quarantined = {}) {
    return ReplayGuard({.crashes = std::move(crashes),
                        .quarantined = std::move(quarantined),
                        .open_folder = [this]() -> Result<std::unique_ptr<Disk>> {
                          ++opened_;
                          return medium_.Open(kQuarantineFolder);
                        },
                        .before_replay = {}});
  }
  // False: it is replayed.
  bool LeavesOut(ReplayGuard& guard, const LogRecord& record, LogAddress address = kAddress) {
    LogEntry entry;
    entry.record = record;
    entry.address = address;
    const auto left_out = guard.LeavesOut(entry, 1'000, [] { return "HERE"; }, &notes_);
    EXPECT_TRUE(left_out.has_value()) << left_out.error().message;
    return left_out.value_or(false);
  }
  std::map<LogAddress, CommitStamp> Quarantined() {
    const auto disk = medium_.Open(kQuarantineFolder);
    const auto found = ReadQuarantine(*disk, [this](const Note& note) { notes_.push_back(note); });
    EXPECT_TRUE(found.has_value());
    return found.value_or(std::map<LogAddress, CommitStamp>{});
  }

  SimulatedClock clock_;
  SimulatedDisk medium_{&clock_, 1};
  int opened_ = 0;
  std::vector<Note> notes_;
  const std::vector<float> vector_{1, 2, 3};
  const std::string payload_ = "payload";
  const LogRecord record_ = SomeRecord(vector_, payload_);
};

TEST_F(ReplayGuardTest, WhatHasNeverCrashedIsReplayedAndNothingIsWritten) {
  ReplayGuard guard = Make({});
  EXPECT_FALSE(LeavesOut(guard, record_));
  EXPECT_EQ(guard.left_out().Read(), 0u);
  EXPECT_EQ(opened_, 0);
  EXPECT_TRUE(notes_.empty());
}

TEST_F(ReplayGuardTest, OneCrashIsNotedOnlyTheSecondPutsItInQuarantineForGood) {
  ReplayGuard once = Make({{kAddress, 1}});
  EXPECT_FALSE(LeavesOut(once, record_));
  EXPECT_EQ(notes_.size(), 1u);
  EXPECT_EQ(opened_, 0);

  ReplayGuard twice = Make({{kAddress, 2}});
  EXPECT_FALSE(LeavesOut(twice, record_, kAddress + 1)) << "another record";
  EXPECT_TRUE(LeavesOut(twice, record_));
  EXPECT_EQ(twice.left_out().Read(), 1u);
  ASSERT_EQ(notes_.size(), 2u);
  EXPECT_NE(notes_.back().text.find("HERE"), std::string::npos);

  medium_.Crash();  // It is on stable storage.
  EXPECT_EQ(Quarantined(), (std::map<LogAddress, CommitStamp>{{kAddress, record_.stamp}}));
  const auto disk = medium_.Open(kQuarantineFolder);
  const auto file = ReadWholeFile(*disk, QuarantineFileName(kAddress), kMaxQuarantineFileBytes);
  ASSERT_TRUE(file.has_value());
  const auto kept = ParseQuarantined(*file);
  ASSERT_TRUE(kept.has_value());
  LogRecord whole;
  ASSERT_EQ(ParseLogRecord(kept->record, kAddress, &whole, nullptr), LogRecordFault::kNone);
  EXPECT_EQ(whole.id, record_.id);
  EXPECT_EQ(whole.sequence, record_.sequence);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(whole.payload.data()), whole.payload.size()),
            payload_);

  ReplayGuard later = Make({}, Quarantined());
  EXPECT_TRUE(LeavesOut(later, record_)) << "also when nothing crashed since";
  LogRecord other = record_;
  other.stamp = 78;
  EXPECT_FALSE(LeavesOut(later, other)) << "what came to lie there since";
}

TEST_F(ReplayGuardTest, ADamagedFileIsReportedAndStillLeavesItsRecordOut) {
  ReplayGuard twice = Make({{kAddress, 2}});
  EXPECT_TRUE(LeavesOut(twice, record_));
  medium_.FlipBit(kQuarantineFolder, QuarantineFileName(kAddress), 500);
  notes_.clear();
  ReplayGuard later = Make({}, Quarantined());
  ASSERT_FALSE(notes_.empty());
  EXPECT_NE(notes_.front().text.find("damaged"), std::string::npos);
  EXPECT_TRUE(LeavesOut(later, record_));
}

TEST_F(ReplayGuardTest, WithoutItsDefinitionASpaceIsNothing) {
  ReplayGuard guard = Make({{kAddress, 2}});
  LogEntry entry;
  entry.record = record_;
  entry.record.kind = LogRecordKind::kSpace;
  entry.address = kAddress;
  const auto left_out = guard.LeavesOut(entry, 0, [] { return "HERE"; }, &notes_);
  ASSERT_FALSE(left_out.has_value());
  EXPECT_NE(left_out.error().message.find("HERE"), std::string::npos);
}

TEST(ReplayScope, NamesTheRecordOfThisThread) {
  EXPECT_EQ(RecordUnderReplay(), kNoLogAddress);
  {
    const ReplayScope scope(kAddress);
    EXPECT_EQ(RecordUnderReplay(), kAddress);
    {
      // What waited for it is stored in the midst of another one's.
      const ReplayScope inner(kAddress + 8);
      EXPECT_EQ(RecordUnderReplay(), kAddress + 8);
    }
    EXPECT_EQ(RecordUnderReplay(), kAddress);
  }
  EXPECT_EQ(RecordUnderReplay(), kNoLogAddress);
}

}  // namespace
}  // namespace engram
