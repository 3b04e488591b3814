#include "index/log/replay_guard.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <utility>

#include "src/core/crc32c.h"
#include "src/core/log_files.h"

namespace engram {

namespace {

constexpr uint64_t kMagic = 0x315452514D524745;  // the bytes EGRMQRT1
constexpr uint32_t kVersion = 1;
constexpr std::string_view kSuffix = ".record";
constexpr size_t kFolderLength = 7;  // "log-003"
constexpr size_t kHexDigits = 8;
constexpr size_t kCrcEnd = 12;

// Written by one thread, read by its own signal handler.
thread_local std::atomic<LogAddress> t_record{kNoLogAddress};
static_assert(std::atomic<LogAddress>::is_always_lock_free, "a signal handler reads it");

template <typename T>
void Put(std::vector<std::byte>& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof(value));
}

template <typename T>
T Get(std::span<const std::byte> bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(value));
  return value;
}

uint32_t CrcOf(std::span<const std::byte> bytes) { return Crc32c(bytes.subspan(kCrcEnd)); }

}  // namespace

LogAddress RecordUnderReplay() { return t_record.load(std::memory_order_relaxed); }

ReplayScope::ReplayScope(LogAddress address) : before_(RecordUnderReplay()) {
  t_record.store(address, std::memory_order_relaxed);
}

ReplayScope::~ReplayScope() { t_record.store(before_, std::memory_order_relaxed); }

std::string QuarantineFileName(LogAddress address) {
  const LogPosition position = PositionOf(address);
  std::array<char, 32> digits;
  std::snprintf(digits.data(), digits.size(), "-%08x-%08x", SegmentOf(position),
                OffsetOf(position));
  return LogFolder(LogOf(address)) + digits.data() + std::string(kSuffix);
}

std::optional<LogAddress> QuarantinedAddress(std::string_view name) {
  if (name.size() != kFolderLength + 2 * (1 + kHexDigits) + kSuffix.size()) return std::nullopt;
  const auto log = LogOfFolder(name.substr(0, kFolderLength));
  uint32_t segment = 0;
  uint32_t offset = 0;
  const char* digits = name.data() + kFolderLength + 1;
  if (!log ||
      std::from_chars(digits, digits + kHexDigits, segment, 16).ptr != digits + kHexDigits) {
    return std::nullopt;
  }
  digits += kHexDigits + 1;
  if (std::from_chars(digits, digits + kHexDigits, offset, 16).ptr != digits + kHexDigits) {
    return std::nullopt;
  }
  if (segment > kMaxSegment || offset % 8 != 0) return std::nullopt;
  const LogAddress address = MakeLogAddress(*log, MakeLogPosition(segment, offset));
  if (QuarantineFileName(address) != name) return std::nullopt;
  return address;
}

std::vector<std::byte> WriteQuarantined(const QuarantinedRecord& record) {
  std::vector<std::byte> bytes(kQuarantineHeaderBytes + record.record.size());
  Put(bytes, 0, kMagic);
  Put(bytes, 12, kVersion);
  Put(bytes, 16, record.address);
  Put(bytes, 24, record.stamp);
  Put(bytes, 32, record.since_unix_ns);
  Put(bytes, 40, record.crashes);
  Put(bytes, 44, static_cast<uint32_t>(record.record.size()));
  std::ranges::copy(record.record, bytes.begin() + kQuarantineHeaderBytes);
  Put(bytes, 8, CrcOf(bytes));
  return bytes;
}

Result<QuarantinedRecord> ParseQuarantined(std::span<const std::byte> bytes) {
  const auto damaged = [](const char* why) { return Fail(ErrorCode::kCorrupt, why); };
  if (bytes.size() < kQuarantineHeaderBytes) return damaged("it is too short");
  if (Get<uint64_t>(bytes, 0) != kMagic) return damaged("it is no record of a quarantine");
  if (Get<uint32_t>(bytes, 8) != CrcOf(bytes)) return damaged("its checksum does not match");
  if (Get<uint32_t>(bytes, 12) != kVersion) return damaged("it is of another version");
  QuarantinedRecord record{.address = Get<LogAddress>(bytes, 16),
                           .stamp = Get<CommitStamp>(bytes, 24),
                           .since_unix_ns = Get<int64_t>(bytes, 32),
                           .crashes = Get<uint32_t>(bytes, 40),
                           .record = {}};
  const auto body = bytes.subspan(kQuarantineHeaderBytes);
  LogRecord parsed;
  size_t record_bytes = 0;
  if (body.size() != Get<uint32_t>(bytes, 44) ||
      ParseLogRecord(body, record.address, &parsed, &record_bytes) != LogRecordFault::kNone ||
      record_bytes != body.size() || parsed.stamp != record.stamp) {
    return damaged("its record is not sound");
  }
  record.record.assign(body.begin(), body.end());
  return record;
}

Result<std::map<LogAddress, CommitStamp>> ReadQuarantine(Disk& folder, const NoteFn& note) {
  std::map<LogAddress, CommitStamp> quarantined;
  const auto entries = folder.List();
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    const auto address = QuarantinedAddress(entry.name);
    if (!address) continue;
    const auto content = ReadWholeFile(folder, entry.name, kMaxQuarantineFileBytes);
    auto record = content ? ParseQuarantined(*content) : std::unexpected(content.error());
    if (record && record->address != *address) {
      record = Fail(ErrorCode::kCorrupt, "it is the file of another record");
    }
    if (!record) {
      note({Severity::kError, "quarantine: " + folder.directory() + "/" + entry.name +
                                  " is damaged: " + record.error().message +
                                  "; the record that it is named after is left out all the same"});
    }
    quarantined[*address] = record ? record->stamp : kOpenStamp;
  }
  if (!quarantined.empty()) {
    note({Severity::kWarning, "quarantine: " + std::to_string(quarantined.size()) +
                                  " records are kept out, in " + folder.directory() +
                                  " (engramctl quarantine list)"});
  }
  return quarantined;
}

Result<bool> ReplayGuard::LeavesOut(const LogEntry& entry, int64_t unix_ns,
                                    const std::function<std::string()>& place,
                                    std::vector<Note>* notes) {
  if (const auto at = options_.quarantined.find(entry.address);
      at != options_.quarantined.end() &&
      (at->second == entry.record.stamp || at->second == kOpenStamp)) {
    left_out_.Add(1);
    return true;
  }
  const auto crashed = options_.crashes.find(entry.address);
  if (crashed != options_.crashes.end()) {
    const uint32_t crashes = crashed->second;
    options_.crashes.erase(crashed);  // It may come again where there was no memory for it.
    if (crashes >= kCrashesUntilQuarantine) {
      return LeaveOut(entry, crashes, unix_ns, place(), notes);
    }
    notes->push_back(
        {Severity::kWarning,
         "recovery: the record in " + place() +
             " crashed an earlier start; it is replayed once more, and left out if it does "
             "so again"});
  }
  if (options_.before_replay) options_.before_replay(entry.record);
  return false;
}

Result<bool> ReplayGuard::LeaveOut(const LogEntry& entry, uint32_t crashes, int64_t unix_ns,
                                   const std::string& place, std::vector<Note>* notes) {
  const LogRecord& record = entry.record;
  const std::string times = std::to_string(crashes) + " starts";
  if (!IsObservation(record.kind)) {
    return Fail(ErrorCode::kUnavailable,
                place + ": the definition of space " + std::string(record.space) + " has crashed " +
                    times +
                    ", and what is in the space cannot do without it: start another version of "
                    "this program, or restore a backup");
  }
  QuarantinedRecord kept{.address = entry.address,
                         .stamp = record.stamp,
                         .since_unix_ns = unix_ns,
                         .crashes = crashes,
                         .record = std::vector<std::byte>(LogRecordBytes(record))};
  WriteLogRecord(record, entry.address, kept.record.data());
  const auto folder = options_.open_folder();
  if (!folder) return std::unexpected(folder.error());
  const std::string name = QuarantineFileName(entry.address);
  if (auto written = ReplaceFile(**folder, name, WriteQuarantined(kept)); !written) {
    return std::unexpected(written.error());
  }
  options_.quarantined[entry.address] = record.stamp;
  left_out_.Add(1);
  notes->push_back(
      {Severity::kError,
       "QUARANTINE: the record in " + place + " (space " + std::string(record.space) +
           ") has crashed " + times + " and is left out; it is kept whole in " +
           (*folder)->directory() + "/" + name +
           ". Its sequence number counts as taken. To have it replayed again, by another "
           "version of this program, move that file away before the next checkpoint"});
  return true;
}

}  // namespace engram
