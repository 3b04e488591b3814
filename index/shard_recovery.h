#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "index/checkpoint/checkpoint_file.h"
#include "index/checkpoint/checkpoint_handoff.h"
#include "index/checkpoint/space_loader.h"
#include "index/log/log_reader.h"
#include "index/log/log_writer.h"
#include "index/log/replay_guard.h"
#include "src/core/commit_stamp.h"
#include "src/core/disk.h"
#include "src/core/note.h"
#include "src/core/result.h"

namespace engram {

// A log that a shard reads when it starts.
struct LogSource {
  uint16_t log = 0;
  Disk* disk = nullptr;  // over the log's folder, for the shard's core
  LogPosition from = 0;  // 0: from its beginning
  uint32_t epoch = 0;    // of the log there
};

// A checkpoint file that a shard loads when it starts.
struct CheckpointSource {
  Disk* disk = nullptr;  // over the folder that it is in, for the shard's core
  uint32_t round = 0;
  uint64_t bytes = 0;
  uint16_t shard = 0;   // that wrote it
  uint16_t shards = 0;  // that there were
};

// What a shard needs to keep its observations on disk; without a log they live in memory only. All
// outlive the shard.
struct ShardStorage {
  LogWriter* log = nullptr;  // not started
  LogInstance instance{};
  // Those of shards that are no longer there, then its own.
  std::vector<LogSource> sources;
  std::vector<CheckpointSource> checkpoints;
  // For checkpoints that it makes; both or neither.
  CheckpointHandoff* checkpoint = nullptr;
  Disk* checkpoint_disk = nullptr;  // over the shard's folder, for its core
  ReplayGuard* guard = nullptr;     // nullptr: every record is replayed
};

// How far a shard's recovery is. Written by the shard, read by anyone.
struct RecoveryProgress {
  // Of the checkpoint files, then of the logs.
  std::atomic<uint64_t> checkpoint_bytes_read{0};
  std::atomic<uint64_t> checkpoint_bytes{0};
  std::atomic<uint64_t> bytes_read{0};
  std::atomic<uint64_t> total_bytes{0};
  std::atomic<uint64_t> observations{0};
  std::atomic<uint64_t> replayed{0};  // of these, from the log
  std::atomic<uint64_t> mended_bits{0};
  // Set last: the shard cannot start; `error` says why.
  std::atomic<bool> failed{false};
  Error error;
  // Lines for the start-up log, complete once the shard is no longer recovering.
  std::vector<Note> notes;
};

// The loading of a shard's checkpoint files.
struct CheckpointLoading {
  size_t next = 0;  // of the files
  std::unique_ptr<CheckpointReader> reader;
  std::vector<uint32_t> listed;  // by place in the file's list: the space in the shard
  std::map<std::string, SpaceDefinition> definitions;  // by name
  std::map<std::string, CommitStamp> births;           // likewise
  std::set<std::string> begun;                         // of these
  bool passes_over = false;  // the saved space that is being read: it was dropped since
  uint64_t sessions = 0;
  // Of these, those that are not with their homes yet; `space` is the shard's.
  std::vector<SavedSession> away;
  uint32_t spaces = 0;
  // The space that is being loaded: into its place, or, where what it holds belongs to other
  // shards, into one of its own, from which that is handed on.
  std::unique_ptr<SpaceLoader> loader;
  uint32_t space = 0;
  std::unique_ptr<Space> apart;
  bool hands_on = false;
  NodeId next_node = 0;
  std::vector<NodeId> by_age;  // the nodes of a space that ends by age, in that order; else empty
  std::string place;           // for messages
};

// Reads a shard's logs side by side, for its recovery: of the records that come next the one with
// the earliest stamp, so that what several logs say of an id comes in its order.
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
  // Everything before `stamp` is through, and what has it is held.
  void NoteBefore(CommitStamp stamp) { complete_ = std::max(complete_, stamp - 1); }
  // Of what was loaded.
  void NoteLoaded(CommitStamp stamp) { latest_ = std::max(latest_, stamp); }
  CommitStamp latest() const { return latest_; }
  // Whether the last record was of the shard's own log.
  bool is_own() const { return from_ + 1 == sources_.size(); }
  // Where the shard's own log goes on, and with which epoch.
  LogPosition end() const { return end_; }
  uint32_t next_epoch() const { return epoch_ + 1; }
  // Names the file and offset of an entry, for messages.
  std::string PlaceOf(const LogEntry& entry) const;

  CheckpointLoading loading;
  // All is read, and stored wherever it belongs.
  bool is_through = false;
  // An entry that there was no memory for yet.
  std::optional<LogEntry> held;
  int64_t held_since_ns = 0;

 private:
  struct Source {
    std::unique_ptr<LogReader> reader;  // nullptr: not begun, or read to its end
    bool ended = false;
    uint64_t bytes_read = 0;
    uint64_t total_bytes = 0;
    std::optional<LogEntry> next;
  };
  Result<LogStep> Fill(size_t index);
  Result<void> EndSource(size_t index);

  const ShardStorage& storage_;
  RecoveryProgress* const progress_;
  std::vector<Source> sources_;
  size_t from_ = 0;  // the source of the last record
  CommitStamp complete_ = kNoStamp;
  CommitStamp latest_ = kNoStamp;
  LogPosition end_ = 0;
  uint32_t epoch_ = 0;
};

}  // namespace engram
