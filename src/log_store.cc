#include "src/log_store.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <string_view>
#include <utility>

namespace engram {

namespace {

constexpr std::string_view kFolderPrefix = "log-";
constexpr size_t kFolderDigits = 3;

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

std::string LogFolder(uint16_t log) {
  std::array<char, 8> digits;
  std::snprintf(digits.data(), digits.size(), "%03u", log);
  return std::string(kFolderPrefix) + digits.data();
}

std::vector<uint16_t> LogsAmong(const std::vector<DirectoryEntry>& entries) {
  std::vector<uint16_t> logs;
  for (const DirectoryEntry& entry : entries) {
    const std::string_view name = entry.name;
    if (name.size() != kFolderPrefix.size() + kFolderDigits || !name.starts_with(kFolderPrefix)) {
      continue;
    }
    const std::string_view digits = name.substr(kFolderPrefix.size());
    uint16_t log = 0;
    const auto [end, error] = std::from_chars(digits.begin(), digits.end(), log);
    if (error == std::errc() && end == digits.end() && log < kMaxShards) logs.push_back(log);
  }
  std::ranges::sort(logs);
  return logs;
}

Result<std::unique_ptr<LogStore>> LogStore::Open(const LogStoreOptions& options, Clock* clock,
                                                 const DiskFactory& make_disk, std::string* note) {
  std::unique_ptr<LogStore> store(new LogStore());
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
      log->storage.sources.push_back({.log = other, .disk = other_disk->get()});
      log->other_disks.push_back(*std::move(other_disk));
    }
    log->storage.sources.push_back({.log = s, .disk = log->disk.get()});
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

}  // namespace engram
