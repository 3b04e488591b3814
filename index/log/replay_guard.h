#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "index/log/log_reader.h"
#include "src/core/commit_stamp.h"
#include "src/core/counters.h"
#include "src/core/disk.h"
#include "src/core/log_address.h"
#include "src/core/log_record.h"
#include "src/core/note.h"
#include "src/core/result.h"

namespace engram {

// The record that this thread stores again; kNoLogAddress: none. May be asked by a signal handler,
// which is what it is for: who dies of a record can say of which (src/replay_crashes.h).
LogAddress RecordUnderReplay();

// While it lives, this thread stores the record at `address` again.
class ReplayScope {
 public:
  explicit ReplayScope(LogAddress address);
  ~ReplayScope();
  ReplayScope(const ReplayScope&) = delete;
  ReplayScope& operator=(const ReplayScope&) = delete;

 private:
  const LogAddress before_;
};

// A record that is kept out of the replay: FORMAT.md, "Quarantine".
struct QuarantinedRecord {
  LogAddress address = kNoLogAddress;
  CommitStamp stamp = kNoStamp;
  int64_t since_unix_ns = 0;
  uint32_t crashes = 0;
  std::vector<std::byte> record;  // as it lies in the log
};

inline constexpr const char* kQuarantineFolder = "quarantine";
inline constexpr size_t kQuarantineHeaderBytes = 48;
inline constexpr size_t kMaxQuarantineFileBytes = kQuarantineHeaderBytes + kMaxLogRecordBytes;
// By file of the folder: the record's address, and its stamp, kOpenStamp where the file is damaged,
// of which `note` gets a line. The files stay as they are. Errors: those of the disk.
Result<std::map<LogAddress, CommitStamp>> ReadQuarantine(Disk& folder, const NoteFn& note);

// A record is replayed until it has crashed so many starts.
inline constexpr uint32_t kCrashesUntilQuarantine = 2;

// "log-003-0000002a-00001f40.record": log, segment and offset.
std::string QuarantineFileName(LogAddress address);
// Nothing for other names.
std::optional<LogAddress> QuarantinedAddress(std::string_view name);
std::vector<std::byte> WriteQuarantined(const QuarantinedRecord& record);
// Checks everything, also the record itself. Errors: kCorrupt, with the reason alone.
Result<QuarantinedRecord> ParseQuarantined(std::span<const std::byte> bytes);

struct ReplayGuardOptions {
  // By record: how many starts have died of it.
  std::map<LogAddress, uint32_t> crashes;
  // What is in quarantine already, with its stamp: another record may have come to lie there since,
  // where the end of the log was lost. kOpenStamp: any.
  std::map<LogAddress, CommitStamp> quarantined;
  // The folder of the quarantine, made where it is missing. Asked for only when it is needed.
  std::function<Result<std::unique_ptr<Disk>>()> open_folder;
  // For tests of crashes: called before each record that is replayed, inside of its ReplayScope.
  std::function<void(const LogRecord&)> before_replay;
};

// Keeps a record that crashes each start from doing so for ever: a shard asks it before it replays
// a record.
// 1. One that has crashed fewer than kCrashesUntilQuarantine starts is replayed.
// 2. Else the whole record is copied to a file of the quarantine, is on stable storage there, and
//    is left out; and so at all later starts, for as long as the file is there.
// Only observations are left out. All records of a space build on its definition, so a definition
// that crashes is an error that names its place.
//
// Thread safety: the shard's alone; the counter may be read by anyone.
class ReplayGuard {
 public:
  explicit ReplayGuard(ReplayGuardOptions options) : options_(std::move(options)) {}

  // Whether the record is left out. `place` names its file and offset. `notes` gets a line where
  // something is to be said. May wait for the disk. Errors: those of the disk; kUnavailable for a
  // definition.
  Result<bool> LeavesOut(const LogEntry& entry, int64_t unix_ns,
                         const std::function<std::string()>& place, std::vector<Note>* notes);
  // Records that this start has left out.
  const Counter& left_out() const { return left_out_; }

 private:
  Result<bool> LeaveOut(const LogEntry& entry, uint32_t crashes, int64_t unix_ns,
                        const std::string& place, std::vector<Note>* notes);

  ReplayGuardOptions options_;
  Counter left_out_;
};

}  // namespace engram
