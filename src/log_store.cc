#include "src/log_store.h"

#include <algorithm>
#include <utility>

#include "src/core/log_files.h"

namespace engram {

namespace {

DiskOptions OptionsFor(uint32_t operations) {
  DiskOptions options;
  options.max_in_flight = operations;
  options.max_open_files = 8;
  return options;
}
constexpr uint32_t kLogOperations = 64;
constexpr uint32_t kKeeperOperations = 8;

LogInstance InstanceOf(const InstanceId& id) {
  LogInstance instance{};
  std::copy_n(id.begin(), instance.size(), instance.begin());
  return instance;
}

}  // namespace

std::vector<uint16_t> LogsAmong(const std::vector<DirectoryEntry>& entries) {
  std::vector<uint16_t> logs;
  for (const DirectoryEntry& entry : entries) {
    const auto log = LogOfFolder(entry.name);
    if (log && *log != kVaultLog) logs.push_back(*log);
  }
  std::ranges::sort(logs);
  return logs;
}

Result<std::unique_ptr<LogStore>> LogStore::Open(const LogStoreOptions& options, Clock* clock,
                                                 const DiskFactory& make_disk, std::string* note) {
  std::unique_ptr<LogStore> store(new LogStore(make_disk));
  for (const uint16_t gone : options.checkpoint.gone) {
    auto disk = make_disk(LogFolder(gone), OptionsFor(1), nullptr);
    if (!disk) return std::unexpected(disk.error());
    if (auto emptied = EmptyFolder(**disk); !emptied) return std::unexpected(emptied.error());
  }
  for (uint16_t s = 0; s < options.shards; ++s) {
    auto log = std::make_unique<Log>();
    LogWriterOptions writer = options.writer;
    writer.log = s;
    writer.instance = InstanceOf(options.instance);
    const int node = s < options.shard_numa_node.size() ? options.shard_numa_node[s] : -1;
    auto arena = HugePageArena::Create({.reserve_bytes = LogWriter::MemoryBytes(writer),
                                        .huge_pages = options.huge_pages,
                                        .numa_node = node});
    if (!arena) return std::unexpected(arena.error());
    log->memory = std::make_unique<HugePageArena>(*std::move(arena));
    const std::span<std::byte> memory(
        log->memory->Allocate(LogWriter::MemoryBytes(writer), kLogPageBytes),
        LogWriter::MemoryBytes(writer));
    DiskOptions disk_options = OptionsFor(kLogOperations);
    disk_options.registered_buffers = {memory};
    auto disk = make_disk(LogFolder(s), disk_options, s == 0 ? note : nullptr);
    if (!disk) return std::unexpected(disk.error());
    log->disk = *std::move(disk);
    log->storage.instance = writer.instance;
    for (const uint16_t other : options.existing) {
      if (other == s || other % options.shards != s) continue;
      auto other_disk = make_disk(LogFolder(other), OptionsFor(kLogOperations), nullptr);
      if (!other_disk) return std::unexpected(other_disk.error());
      LogSource source{.log = other, .disk = other_disk->get()};
      if (other < options.checkpoint.logs.size()) {
        source.from = options.checkpoint.logs[other].from;
        source.epoch = options.checkpoint.logs[other].epoch;
      }
      log->storage.sources.push_back(source);
      store->others_.push_back(other);
      log->other_disks.push_back(*std::move(other_disk));
    }
    LogSource own{.log = s, .disk = log->disk.get()};
    if (s < options.checkpoint.logs.size()) {
      own.from = options.checkpoint.logs[s].from;
      own.epoch = options.checkpoint.logs[s].epoch;
      log->free_before = SegmentOf(own.from);
    }
    log->storage.sources.push_back(own);
    if (auto added = store->AddCheckpoints(options, s, log.get()); !added) {
      return std::unexpected(added.error());
    }
    log->writer = std::make_unique<LogWriter>(writer, log->disk.get(), &log->handoff, memory);
    log->storage.log = log->writer.get();
    auto keeper_disk = make_disk(LogFolder(s), OptionsFor(kKeeperOperations), nullptr);
    if (!keeper_disk) return std::unexpected(keeper_disk.error());
    log->keeper_disk = *std::move(keeper_disk);
    SegmentKeeperOptions keeper = options.keeper;
    keeper.log = s;
    keeper.instance = writer.instance;
    log->keeper =
        std::make_unique<SegmentKeeper>(keeper, log->keeper_disk.get(), clock, &log->handoff);
    store->logs_.push_back(std::move(log));
  }
  return store;
}

// The files that this shard loads, and what it saves itself with.
Result<void> LogStore::AddCheckpoints(const LogStoreOptions& options, uint16_t shard, Log* log) {
  const auto saved_shards = static_cast<uint16_t>(options.checkpoint.logs.size());
  for (uint16_t saved = shard; saved < saved_shards;
       saved = static_cast<uint16_t>(saved + options.shards)) {
    auto disk = make_disk_(LogFolder(saved), OptionsFor(kLogOperations), nullptr);
    if (!disk) return std::unexpected(disk.error());
    log->storage.checkpoints.push_back({.disk = disk->get(),
                                        .round = options.checkpoint.round,
                                        .bytes = options.checkpoint.logs[saved].file_bytes,
                                        .shard = saved,
                                        .shards = saved_shards});
    log->other_disks.push_back(*std::move(disk));
  }
  auto disk = make_disk_(LogFolder(shard), OptionsFor(kKeeperOperations), nullptr);
  if (!disk) return std::unexpected(disk.error());
  log->checkpoint_disk = *std::move(disk);
  log->storage.checkpoint = &log->checkpoint;
  log->storage.checkpoint_disk = log->checkpoint_disk.get();
  return {};
}

Result<void> LogStore::StartKeeper(Log* log) {
  if (log->keeper_started) return {};
  if (auto started = log->keeper->Start(log->handoff.current.load()); !started) return started;
  log->keeper_started = true;
  log->keeper->FreeBefore(log->free_before);
  return {};
}

Result<void> LogStore::PrepareFirst() {
  for (const auto& log : logs_) {
    if (auto started = StartKeeper(log.get()); !started) return started;
    if (auto prepared = log->keeper->PrepareFirst(); !prepared) return prepared;
  }
  return {};
}

// A keeper begins when its shard knows where the log ends.
int LogStore::Poll() {
  int work = 0;
  for (const auto& log : logs_) {
    if (!log->handoff.started.load(std::memory_order_acquire)) continue;
    if (StartKeeper(log.get())) work += log->keeper->Poll();
  }
  return work;
}

uint64_t LogStore::bytes_written() const {
  uint64_t bytes = 0;
  for (const auto& log : logs_) bytes += log->handoff.bytes_taken.load(std::memory_order_relaxed);
  return bytes;
}

Result<void> LogStore::SyncFolders() {
  for (const auto& log : logs_) {
    if (auto synced = log->keeper_disk->SyncDirectory(); !synced) return synced;
  }
  return {};
}

void LogStore::FreeBefore(uint16_t shard, LogPosition position) {
  Log& log = *logs_[shard];
  log.free_before = SegmentOf(position);
  if (log.keeper_started) log.keeper->FreeBefore(log.free_before);
}

Result<void> LogStore::RemoveCheckpointsBut(uint32_t round) {
  for (const auto& log : logs_) {
    const auto entries = log->keeper_disk->List();
    if (!entries) return std::unexpected(entries.error());
    for (const DirectoryEntry& entry : *entries) {
      const auto found = CheckpointRound(entry.name);
      if (!found || *found == round) continue;
      if (auto removed = log->keeper_disk->Remove(entry.name); !removed) return removed;
    }
  }
  return {};
}

Result<void> LogStore::RemoveOthers() {
  for (const uint16_t other : others_) {
    auto disk = make_disk_(LogFolder(other), OptionsFor(1), nullptr);
    if (!disk) return std::unexpected(disk.error());
    if (auto emptied = EmptyFolder(**disk); !emptied) return emptied;
  }
  others_.clear();
  return {};
}

Result<void> EmptyFolder(Disk& disk) {
  const auto entries = disk.List();
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    if (auto removed = disk.Remove(entry.name); !removed) return removed;
  }
  return disk.SyncDirectory();
}

}  // namespace engram
