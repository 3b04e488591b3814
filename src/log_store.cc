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
  CHECK(options.shards <= kVaultLog, "the vault's number is no log's");
  store->instance_ = InstanceOf(options.instance);
  store->segment_bytes_ = options.keeper.segment_bytes;
  if (auto opened = store->OpenKept(options); !opened) return std::unexpected(opened.error());
  if (auto opened = store->OpenVault(); !opened) return std::unexpected(opened.error());
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
      if (other < options.shards || other % options.shards != s) continue;
      auto source = store->SourceOf(options, other);
      if (!source) continue;
      auto other_disk = make_disk(LogFolder(other), OptionsFor(kLogOperations), nullptr);
      if (!other_disk) return std::unexpected(other_disk.error());
      source->disk = other_disk->get();
      log->storage.sources.push_back(*source);
      log->other_disks.push_back(*std::move(other_disk));
    }
    auto own = store->OwnSource(options, clock, s);
    if (!own) return std::unexpected(own.error());
    own->disk = log->disk.get();
    log->storage.sources.push_back(*own);
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

// ---------------------------------------------------------------------------------------------
// Logs that nobody writes, and the vault

const CheckpointManifest::Kept* LogStore::FindKept(const LogStoreOptions& options, uint16_t log) {
  const auto at = std::ranges::find(options.checkpoint.kept, log, &CheckpointManifest::Kept::log);
  return at == options.checkpoint.kept.end() ? nullptr : &*at;
}

Result<LogStore::Kept> LogStore::ListKept(uint16_t log) {
  Kept kept{.log = log, .disk = nullptr, .segments = {}};
  auto disk = make_disk_(LogFolder(log), OptionsFor(kKeeperOperations), nullptr);
  if (!disk) return std::unexpected(disk.error());
  kept.disk = *std::move(disk);
  const auto entries = kept.disk->List();
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    if (const auto number = SegmentNumber(entry.name)) {
      kept.segments.emplace(*number, entry.size_bytes);
    }
  }
  return kept;
}

// What is there now is loaded or replayed: none of it is replayed after the next checkpoint.
Result<void> LogStore::OpenKept(const LogStoreOptions& options) {
  for (const uint16_t log : options.existing) {
    if (log < options.shards) continue;
    auto kept = ListKept(log);
    if (!kept) return std::unexpected(kept.error());
    // One number is left out, so that nobody takes what is written next for what follows the last.
    uint32_t next = kept->segments.empty() ? 1 : kept->segments.rbegin()->first + 2;
    if (const auto* before = FindKept(options, log)) {
      next = std::max(next, SegmentOf(before->from));
    }
    kept->from = MakeLogPosition(next, kLogPageBytes);
    kept_.push_back(*std::move(kept));
  }
  std::ranges::sort(kept_, {}, &Kept::log);
  return {};
}

Result<void> LogStore::OpenVault() {
  auto vault = ListKept(kVaultLog);
  if (!vault) return std::unexpected(vault.error());
  vault_ = *std::move(vault);
  const auto entries = vault_.disk->List();
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    if (!entry.name.ends_with(kTemporarySuffix)) continue;
    if (auto removed = vault_.disk->Remove(entry.name); !removed) return removed;
  }
  if (!vault_.segments.empty()) next_vault_number_ = vault_.segments.rbegin()->first + 1;
  return {};
}

// From where the log of a shard that is gone is replayed; nothing where it is not.
std::optional<LogSource> LogStore::SourceOf(const LogStoreOptions& options, uint16_t log) const {
  LogSource source{.log = log};
  if (log < options.checkpoint.logs.size()) {
    source.from = options.checkpoint.logs[log].from;
    source.epoch = options.checkpoint.logs[log].epoch;
  } else if (const auto* before = FindKept(options, log)) {
    // Its shard may have been back since that checkpoint.
    const auto kept = std::ranges::find(kept_, log, &Kept::log);
    if (kept->segments.lower_bound(SegmentOf(before->from)) == kept->segments.end()) {
      return std::nullopt;
    }
    source.from = before->from;
  }
  return source;
}

// A shard that is back goes on behind what its log has kept, in a segment that is made first.
Result<LogSource> LogStore::OwnSource(const LogStoreOptions& options, Clock* clock, uint16_t log) {
  LogSource source{.log = log};
  if (log < options.checkpoint.logs.size()) {
    source.from = options.checkpoint.logs[log].from;
    source.epoch = options.checkpoint.logs[log].epoch;
    return source;
  }
  const auto* before = FindKept(options, log);
  if (before == nullptr) return source;
  source.from = before->from;
  const auto kept = ListKept(log);
  if (!kept) return std::unexpected(kept.error());
  const uint32_t first = SegmentOf(before->from);
  if (kept->segments.lower_bound(first) != kept->segments.end()) return source;
  SegmentKeeperOptions keeper_options = options.keeper;
  keeper_options.log = log;
  keeper_options.instance = instance_;
  keeper_options.ahead = 1;
  SegmentHandoff handoff;
  SegmentKeeper keeper(keeper_options, kept->disk.get(), clock, &handoff);
  if (auto started = keeper.Start(first - 1); !started) return std::unexpected(started.error());
  if (auto made = keeper.PrepareFirst(); !made) return std::unexpected(made.error());
  return source;
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

bool LogStore::is_full() const {
  return std::ranges::any_of(logs_, [](const auto& log) {
    return log->handoff.trouble.load() == SegmentTrouble::kDiskFull;
  });
}

void LogStore::KeepFree(uint64_t bytes) {
  for (const auto& log : logs_) log->keeper->KeepFree(bytes);
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

// One in which nothing is left is as if it had never been: its folder is empty for good first.
Result<void> LogStore::DescribeKept(CheckpointManifest* manifest) {
  for (Kept& kept : kept_) {
    if (!kept.segments.empty() || !kept.is_clean) {
      manifest->kept.push_back({.log = kept.log, .from = kept.from});
    } else if (auto synced = kept.disk->SyncDirectory(); !synced) {
      return synced;
    }
  }
  std::erase_if(kept_, [](const Kept& kept) { return kept.segments.empty() && kept.is_clean; });
  return {};
}

Result<void> LogStore::CleanKept() {
  for (Kept& kept : kept_) {
    if (kept.is_clean) continue;
    const auto entries = kept.disk->List();
    if (!entries) return std::unexpected(entries.error());
    for (const DirectoryEntry& entry : *entries) {
      if (SegmentNumber(entry.name)) continue;
      if (auto removed = kept.disk->Remove(entry.name); !removed) return removed;
    }
    kept.is_clean = true;
  }
  return {};
}

// ---------------------------------------------------------------------------------------------
// Retention

std::vector<LogStore::SegmentFile> LogStore::Segments() const {
  std::vector<SegmentFile> files;
  const auto add = [&files](uint16_t log, const std::map<uint32_t, uint64_t>& segments) {
    for (const auto& [number, bytes] : segments) files.push_back({{log, number}, bytes});
  };
  for (uint16_t s = 0; s < shards(); ++s) add(s, logs_[s]->keeper->segments());
  for (const Kept& kept : kept_) add(kept.log, kept.segments);
  add(kVaultLog, vault_.segments);
  return files;
}

// What cannot be removed is found dead again.
void LogStore::Free(LogSegment segment) {
  if (segment.log < shards()) {
    logs_[segment.log]->keeper->Free(segment.number);
    return;
  }
  Kept* kept = &vault_;
  if (segment.log != kVaultLog) {
    const auto at = std::ranges::find(kept_, segment.log, &Kept::log);
    if (at == kept_.end()) return;
    kept = &*at;
  }
  if (kept->disk->Remove(SegmentName(segment.number))) kept->segments.erase(segment.number);
}

Result<std::unique_ptr<Disk>> LogStore::OpenLog(uint16_t log) {
  return make_disk_(LogFolder(log), OptionsFor(kKeeperOperations), nullptr);
}

void LogStore::AddToVault(uint32_t number, uint64_t bytes) {
  vault_.segments.emplace(number, bytes);
  next_vault_number_ = std::max(next_vault_number_, number + 1);
}

}  // namespace engram
