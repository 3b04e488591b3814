#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "index/log/log_reader.h"
#include "index/log/log_writer.h"
#include "src/core/commit_stamp.h"
#include "src/core/disk.h"
#include "src/core/result.h"

namespace engram {

// A log that a shard reads when it starts.
struct LogSource {
  uint16_t log = 0;
  Disk* disk = nullptr;  // over the log's folder, for the shard's core
  LogPosition from = 0;  // 0: from its beginning
};

// What a shard needs to keep its observations on disk; without a log they live in memory only. All
// outlive the shard.
struct ShardStorage {
  LogWriter* log = nullptr;  // not started
  LogInstance instance{};
  // Those of shards that are no longer there, then its own.
  std::vector<LogSource> sources;
};

// How far a shard's recovery is. Written by the shard, read by anyone.
struct RecoveryProgress {
  std::atomic<uint64_t> bytes_read{0};
  std::atomic<uint64_t> total_bytes{0};
  std::atomic<uint64_t> observations{0};
  std::atomic<uint64_t> mended_bits{0};
  // Set last: the shard cannot start; `error` says why.
  std::atomic<bool> failed{false};
  Error error;
  // Lines for the start-up log, complete once the shard is no longer recovering.
  std::vector<std::string> notes;
};

// Reads a shard's logs one after the other, for its recovery.
//
// Thread safety: the shard's alone. Allocates: it is gone before the shard serves.
class ShardRecovery {
 public:
  ShardRecovery(const ShardStorage& storage, RecoveryProgress* progress);

  // As LogReader::Next, over all logs.
  Result<LogStep> Next(LogEntry* entry);
  // What was read is through: nothing with this stamp or an earlier one is still to come.
  CommitStamp complete() const { return complete_; }
  void Note(CommitStamp stamp);
  CommitStamp latest() const { return latest_; }
  // Where the shard's own log goes on, and with which epoch.
  LogPosition end() const { return end_; }
  uint32_t next_epoch() const { return epoch_ + 1; }
  // Names the file and offset of an entry, for messages.
  std::string PlaceOf(const LogEntry& entry) const;

  // An entry that there was no memory for yet.
  std::optional<LogEntry> held;
  int64_t held_since_ns = 0;

 private:
  void EndSource();

  const ShardStorage& storage_;
  RecoveryProgress* const progress_;
  size_t source_ = 0;
  std::optional<LogReader> reader_;
  uint64_t bytes_before_ = 0;  // of the sources that were read
  CommitStamp complete_ = kNoStamp;
  CommitStamp latest_ = kNoStamp;
  LogPosition end_ = 0;
  uint32_t epoch_ = 0;
};

}  // namespace engram
