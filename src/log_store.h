#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "index/checkpoint/checkpoint_handoff.h"
#include "index/log/log_writer.h"
#include "index/log/segment_handoff.h"
#include "index/log/segment_keeper.h"
#include "index/shard_recovery.h"
#include "src/checkpoint_manifest.h"
#include "src/core/clock.h"
#include "src/core/data_directory.h"
#include "src/core/disk.h"
#include "src/core/huge_page_arena.h"
#include "src/core/result.h"

namespace engram {

struct LogStoreOptions {
  uint16_t shards = 1;
  InstanceId instance{};
  // Logs that are there, without the vault; those of shards that there are no longer are read, too.
  std::vector<uint16_t> existing;
  // The latest checkpoint; no logs: there is none.
  CheckpointManifest checkpoint;
  LogWriterOptions writer;      // log and instance are filled in
  SegmentKeeperOptions keeper;  // likewise
  HugePagePolicy huge_pages = HugePagePolicy::kAuto;
  std::vector<int> shard_numa_node;  // by shard; -1 or missing: any
};

// The logs among the names of a data directory.
std::vector<uint16_t> LogsAmong(const std::vector<DirectoryEntry>& entries);

// All logs of an appliance: for each shard the disk, memory and writer of its log, and on the
// control plane's core a keeper of its segments.
//
// Thread safety: made and polled by the control plane; what ForShard names is the shard core's.
// Outlives the appliance. `make_disk` is called later too.
class LogStore {
 public:
  // A Disk over a folder of the data directory, made where it is missing. `note` may be nullptr.
  using DiskFactory = std::function<Result<std::unique_ptr<Disk>>(
      const std::string& folder, const DiskOptions& options, std::string* note)>;

  // `clock` outlives the store. Errors: those of memory and disk. `note`: how the disk is used, for
  // the start-up log.
  static Result<std::unique_ptr<LogStore>> Open(const LogStoreOptions& options, Clock* clock,
                                                const DiskFactory& make_disk, std::string* note);

  const ShardStorage& ForShard(uint16_t shard) const { return logs_[shard]->storage; }
  // Once all shards have recovered: each log has a segment to go on with when this returns. Errors:
  // those of the disk, naming the file and the remedy.
  Result<void> PrepareFirst();
  // One bounded round of the keepers, which may wait for the disk; returns how much was done.
  int Poll();
  // Why a shard's log has no further segment.
  SegmentTrouble trouble(uint16_t shard) const { return logs_[shard]->handoff.trouble.load(); }
  // The disk has no room for some log's next segment.
  bool is_full() const;
  // New segments leave so much of the disk free: what the next checkpoint takes.
  void KeepFree(uint64_t bytes);

  // For others who read the logs.
  const DiskFactory& disks() const { return make_disk_; }

  // ---- For checkpoints, by the control plane ----

  uint16_t shards() const { return static_cast<uint16_t>(logs_.size()); }
  CheckpointHandoff& checkpoint(uint16_t shard) { return logs_[shard]->checkpoint; }
  // Of all logs, by how far their positions have come.
  uint64_t bytes_written() const;
  // The names in the folders stay. Waits.
  Result<void> SyncFolders();
  // Removes the checkpoint files of other rounds.
  Result<void> RemoveCheckpointsBut(uint32_t round);
  // The logs of shards that are gone and in which something may live still: what a checkpoint says
  // that is made now. Waits.
  Result<void> DescribeKept(CheckpointManifest* manifest);
  // That checkpoint is there: what such logs have beside their segments goes.
  Result<void> CleanKept();

  // ---- For retention, by the control plane ----

  struct SegmentFile {
    LogSegment segment;
    uint64_t bytes = 0;
  };
  // All that are there and were not freed, rising: of the shards' logs, of those of shards that are
  // gone, of the vault.
  std::vector<SegmentFile> Segments() const;
  // Nothing names it any more: it is used again or removed.
  void Free(LogSegment segment);
  // A Disk over a log's folder, or the vault's.
  Result<std::unique_ptr<Disk>> OpenLog(uint16_t log);
  Disk* vault() { return vault_.disk.get(); }
  // Above all that there were since the start.
  uint32_t next_vault_number() const { return next_vault_number_; }
  void AddToVault(uint32_t number, uint64_t bytes);
  const LogInstance& instance() const { return instance_; }
  uint32_t segment_bytes() const { return segment_bytes_; }

 private:
  struct Log {
    // In this order: what comes later uses what comes before.
    SegmentHandoff handoff;
    std::unique_ptr<HugePageArena> memory;
    std::unique_ptr<Disk> disk;
    std::vector<std::unique_ptr<Disk>> other_disks;
    std::unique_ptr<LogWriter> writer;
    std::unique_ptr<Disk> keeper_disk;
    std::unique_ptr<SegmentKeeper> keeper;
    bool keeper_started = false;
    CheckpointHandoff checkpoint;
    std::unique_ptr<Disk> checkpoint_disk;
    ShardStorage storage;
  };

  // A log that nobody writes, or the vault.
  struct Kept {
    uint16_t log = 0;
    std::unique_ptr<Disk> disk;
    std::map<uint32_t, uint64_t> segments;  // bytes by number
    LogPosition from = 0;  // what lies before is not replayed after the next checkpoint
    bool is_clean = false;
  };

  explicit LogStore(const DiskFactory& make_disk) : make_disk_(make_disk) {}
  Result<void> OpenKept(const LogStoreOptions& options);
  Result<Kept> ListKept(uint16_t log);
  Result<void> OpenVault();
  static const CheckpointManifest::Kept* FindKept(const LogStoreOptions& options, uint16_t log);
  std::optional<LogSource> SourceOf(const LogStoreOptions& options, uint16_t log) const;
  Result<LogSource> OwnSource(const LogStoreOptions& options, Clock* clock, uint16_t log);
  Result<void> AddCheckpoints(const LogStoreOptions& options, uint16_t shard, Log* log);
  static Result<void> StartKeeper(Log* log);

  const DiskFactory make_disk_;
  std::vector<std::unique_ptr<Log>> logs_;  // by shard
  std::vector<Kept> kept_;                  // by number
  Kept vault_;
  uint32_t next_vault_number_ = 1;
  LogInstance instance_{};
  uint32_t segment_bytes_ = 0;
};

}  // namespace engram
