#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "index/log/log_format.h"
#include "src/checkpoint_manifest.h"
#include "src/checkpointer.h"
#include "src/core/log_files.h"
#include "src/core/log_record.h"
#include "src/core/simulated_disk.h"
#include "src/log_store.h"
#include "tests/index/shard_rig.h"

// Shards with their logs on a simulated disk, which start, crash and start
// again.

namespace engram {

// What became of each record that was written, by the letter of what Disk
// promises: durable is what a write carried that had ended when a flush of its
// file was asked for that then succeeded.
//
// A second opinion beside the crashes: it looks at what goes by, not at what
// survives.
class FlushAudit {
 public:
  // (session, sequence), or (0, stamp) of a record without a session.
  using Key = std::pair<uint64_t, uint64_t>;

  bool IsDurable(const Key& key) const { return durable_.contains(key); }

  uint64_t NoteWrite(const std::string& file, std::span<const std::byte> bytes) {
    Write write{.file = file, .keys = {}, .ended = false};
    // Block after block, as far as they are sound.
    for (size_t at = 0; at + kBlockHeaderBytes <= bytes.size();) {
      LogPosition position = 0;
      uint16_t log = 0;
      std::memcpy(&position, bytes.data() + at + 8, sizeof(position));
      std::memcpy(&log, bytes.data() + at + 48, sizeof(log));
      LogInstance instance;
      std::memcpy(instance.data(), bytes.data() + at + 56, sizeof(instance));
      BlockHeader header;
      const auto block = bytes.subspan(at);
      if (CheckBlock(block, log, position, instance, &header).fault != BlockFault::kNone) break;
      ForEachRecord(block, header, [&](const LogRecord& record, LogAddress, size_t) {
        if (!IsObservation(record.kind)) return;
        const uint64_t session = record.session.value();
        write.keys.emplace_back(session, session != 0 ? record.sequence : record.stamp);
      });
      at += header.block_bytes;
    }
    for (const Key& key : write.keys) {
      written_.insert(key);
      durable_.erase(key);  // Lost, so written anew.
    }
    writes_.emplace(++last_, std::move(write));
    return last_;
  }
  void NoteWritten(uint64_t number, int error) {
    if (error != 0) {
      writes_.erase(number);
    } else if (const auto at = writes_.find(number); at != writes_.end()) {
      at->second.ended = true;
    }
  }
  // What a flush of `file` covers if it is asked for now.
  std::vector<uint64_t> Covered(const std::string& file) const {
    std::vector<uint64_t> numbers;
    for (const auto& [number, write] : writes_) {
      if (write.ended && write.file == file) numbers.push_back(number);
    }
    return numbers;
  }
  void NoteFlushed(const std::vector<uint64_t>& covered, int error) {
    for (const uint64_t number : covered) {
      const auto at = writes_.find(number);
      if (at == writes_.end()) continue;
      if (error == 0) durable_.insert(at->second.keys.begin(), at->second.keys.end());
      writes_.erase(at);
    }
  }
  // The process is gone; what it had under way never ends.
  void NoteKilled() {
    std::erase_if(writes_, [](const auto& each) { return !each.second.ended; });
  }
  // Whatever is found after a crash of the machine is on its disk.
  void NotePowerCut() {
    writes_.clear();
    durable_.insert(written_.begin(), written_.end());
  }

 private:
  struct Write {
    std::string file;
    std::vector<Key> keys;
    bool ended = false;
  };
  std::map<uint64_t, Write> writes_;
  uint64_t last_ = 0;
  std::set<Key> written_;
  std::set<Key> durable_;
};

// How the disks of a rig treat their users.
struct RigDisks {
  enum class Lie : uint8_t { kNone, kFlushes, kWrites };
  SimulatedDisk* medium = nullptr;
  FlushAudit* audit = nullptr;
  Lie lie = Lie::kNone;
  // The process was killed: nothing reaches the disk any more, and nobody waits
  // for it.
  bool killed = false;
  // Operations until the power fails in the midst of one; 0: it does not.
  uint64_t power_cut_in = 0;
  bool power_failed = false;
  uint64_t bytes_written = 0;  // of all files
  // The directory whose names cannot be made to stay; empty: none.
  std::string fails_to_sync{};

  void CutPower() {
    medium->Crash();
    audit->NotePowerCut();
    power_failed = true;
    power_cut_in = 0;
  }
  void CountDown() {
    if (power_cut_in == 0) return;
    --power_cut_in;
    if (power_cut_in == 0) CutPower();
  }
};

// A Disk that watches, is killed, and may lie: flushes that do nothing, writes
// that end at once.
class RigDisk final : public Disk {
 public:
  RigDisk(std::unique_ptr<Disk> disk, RigDisks* all) : disk_(std::move(disk)), all_(all) {}

  Result<void> LockDirectory() override { return disk_->LockDirectory(); }
  Result<std::vector<DirectoryEntry>> List() override {
    if (all_->killed) return Gone();
    return disk_->List();
  }
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) override {
    if (all_->killed) return Gone();
    all_->CountDown();
    auto file = disk_->Open(name, mode, caching);
    if (file) names_[{file->id.index, file->id.generation}] = directory() + "/" + name;
    return file;
  }
  void Close(FileId file) override {
    if (!all_->killed && !HasHidden()) disk_->Close(file);
  }
  Result<void> Rename(const std::string& from, const std::string& to) override {
    if (all_->killed) return Gone();
    all_->CountDown();
    return disk_->Rename(from, to);
  }
  Result<void> Remove(const std::string& name) override {
    if (all_->killed) return Gone();
    all_->CountDown();
    return disk_->Remove(name);
  }
  Result<void> SyncDirectory() override {
    if (all_->killed) return Gone();
    all_->CountDown();
    if (directory() == all_->fails_to_sync) return FailErrno("sync " + directory(), EIO);
    return disk_->SyncDirectory();
  }
  uint64_t FreeBytes() const override { return disk_->FreeBytes(); }
  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    all_->CountDown();
    if (IsGone()) return EndWithError(tag);
    const uint64_t inner = ++last_;
    if (!disk_->Read(file, offset, to, inner)) return false;
    under_way_[inner] = {.tag = tag};
    return true;
  }
  bool Write(FileId file, uint64_t offset, std::span<const std::byte> from, uint64_t tag) override {
    all_->CountDown();
    if (IsGone()) return EndWithError(tag);
    const uint64_t inner = ++last_;
    if (!disk_->Write(file, offset, from, inner)) return false;
    all_->bytes_written += from.size();
    Operation& operation = under_way_[inner];
    operation = {.tag = tag, .kind = Kind::kWrite};
    operation.write = all_->audit->NoteWrite(NameOf(file), from);
    if (all_->lie == RigDisks::Lie::kWrites) {
      operation.hidden = true;
      untrue_.push_back({.tag = tag, .error = 0, .bytes = from.size()});
    }
    return true;
  }
  bool Flush(FileId file, uint64_t tag) override {
    all_->CountDown();
    if (IsGone()) return EndWithError(tag);
    if (all_->lie == RigDisks::Lie::kFlushes) {
      untrue_.push_back({.tag = tag, .error = 0, .bytes = 0});
      return true;
    }
    const uint64_t inner = ++last_;
    if (!disk_->Flush(file, inner)) return false;
    under_way_[inner] = {
        .tag = tag, .kind = Kind::kFlush, .covered = all_->audit->Covered(NameOf(file))};
    return true;
  }
  size_t Poll(std::span<DiskCompletion> out) override {
    // What was under way when the machine or the process ended.
    if (IsGone()) {
      for (const auto& [inner, operation] : under_way_) {
        if (!operation.hidden) EndWithError(operation.tag);
      }
      under_way_.clear();
    }
    size_t count = 0;
    for (; count < out.size() && !untrue_.empty(); ++count) {
      out[count] = untrue_.front();
      untrue_.erase(untrue_.begin());
    }
    DiskCompletion end;
    while (!IsGone() && count < out.size() && disk_->Poll({&end, 1}) > 0) {
      const auto at = under_way_.find(end.tag);
      CHECK(at != under_way_.end(), "the disk ends what was begun");
      const Operation operation = std::move(at->second);
      under_way_.erase(at);
      if (operation.kind == Kind::kWrite) all_->audit->NoteWritten(operation.write, end.error);
      if (operation.kind == Kind::kFlush) all_->audit->NoteFlushed(operation.covered, end.error);
      if (operation.hidden) continue;
      end.tag = operation.tag;
      out[count++] = end;
    }
    return count;
  }
  uint32_t in_flight() const override {
    const auto untrue = static_cast<uint32_t>(untrue_.size());
    return static_cast<uint32_t>(under_way_.size()) + untrue;
  }
  void Wait(int64_t timeout_ns) override {
    if (!all_->killed && untrue_.empty()) disk_->Wait(timeout_ns);
  }
  const std::string& directory() const override { return disk_->directory(); }
  std::string_view backend() const override { return disk_->backend(); }

 private:
  enum class Kind : uint8_t { kRead, kWrite, kFlush };
  struct Operation {
    uint64_t tag = 0;
    Kind kind = Kind::kRead;
    bool hidden = false;  // its end was told before
    uint64_t write = 0;
    std::vector<uint64_t> covered{};
  };

  static std::unexpected<Error> Gone() {
    return Fail(ErrorCode::kUnavailable, "the process was killed");
  }
  bool IsGone() const { return all_->killed || all_->power_failed; }
  // So that nobody waits for it. Whoever asked does not know that the machine
  // is gone.
  bool EndWithError(uint64_t tag) {
    untrue_.push_back({.tag = tag, .error = EIO, .bytes = 0});
    return true;
  }
  const std::string& NameOf(FileId file) const { return names_.at({file.index, file.generation}); }
  bool HasHidden() const {
    return std::ranges::any_of(under_way_, [](const auto& each) { return each.second.hidden; });
  }

  std::unique_ptr<Disk> disk_;
  RigDisks* const all_;
  std::map<std::pair<uint32_t, uint32_t>, std::string> names_;
  std::map<uint64_t, Operation> under_way_;
  std::vector<DiskCompletion> untrue_;
  uint64_t last_ = 0;
};

struct DurableSetup {
  uint16_t shards = 1;
  uint16_t max_partitions = 1;
  uint16_t producers = 1;
  ShardOptions shard = {};
  LogWriterOptions writer = {};
  SegmentKeeperOptions keeper = {};
  std::vector<std::pair<std::string, SpaceSettings>> spaces = {};
  CheckpointerOptions checkpointer = {};
};

// All that live in a space.
inline std::vector<NodeId> LiveNodes(const Space& space) {
  std::vector<NodeId> nodes;
  uint64_t cursor = 0;
  do {
    space.Scroll(&cursor, 1'000, &nodes);
  } while (cursor != 0);
  return nodes;
}

// The machine: a clock, a disk, and at times a process with its shards.
class DurableRig {
 public:
  explicit DurableRig(uint64_t seed) : medium(&clock, seed) {
    disks.medium = &medium;
    disks.audit = &audit;
  }
  ~DurableRig() { Kill(); }

  // Requests of a producer: there are slots for more.
  static constexpr size_t kMostOutstanding = 48;

  static LogWriterOptions SmallWriter() {
    LogWriterOptions options;
    options.block_bytes = LogWriter::kLeastBlockBytes;
    options.blocks = 4;
    options.flush_interval_ns = kNanosPerMilli;
    options.marker_delay_ns = kNanosPerMilli / 2;
    options.retry_ns = 2 * kNanosPerMilli;
    return options;
  }
  static SegmentKeeperOptions SmallKeeper() {
    SegmentKeeperOptions options;
    options.segment_bytes = 128 * 1024;
    options.ahead = 1;
    options.retry_ns = 5 * kNanosPerMilli;
    return options;
  }
  static ShardOptions SmallShard() {
    ShardOptions options = ShardRig::SmallOptions();
    options.memory_limit_bytes = size_t{16} << 20;
    options.max_sessions = 64;
    options.dormant_sessions = 1'000;
    options.max_forwards = 64;
    options.grow_partition_at = 0;
    return options;
  }

  static DurableSetup SmallSetup() {
    DurableSetup setup;
    setup.shard = SmallShard();
    setup.writer = SmallWriter();
    setup.keeper = SmallKeeper();
    return setup;
  }

  // A new process. It recovers as its shards are polled.
  Result<void> Start(const DurableSetup& setup) {
    CHECK(store == nullptr, "one process at a time");
    disks.killed = false;
    disks.power_failed = false;
    root = std::make_unique<RigDisk>(medium.Open(kRootFolder), &disks);
    const auto manifest = ReadManifest(*root);
    if (!manifest) return std::unexpected(manifest.error());
    LogStoreOptions options;
    if (*manifest) options.checkpoint = **manifest;
    options.shards = setup.shards;
    options.instance.fill(7);
    options.existing.assign(logs.begin(), logs.end());
    options.writer = setup.writer;
    options.keeper = setup.keeper;
    options.huge_pages = HugePagePolicy::kOff;
    auto made = LogStore::Open(
        options, &clock,
        [this](const std::string& folder, const DiskOptions& disk_options,
               std::string*) -> Result<std::unique_ptr<Disk>> {
          return std::make_unique<RigDisk>(medium.Open(folder, disk_options), &disks);
        },
        nullptr);
    if (!made) return std::unexpected(made.error());
    store = *std::move(made);
    pins = std::make_unique<ReadPins>(2);
    checkpointer = std::make_unique<Checkpointer>(setup.checkpointer, root.get(), store.get(),
                                                  &clock, options.checkpoint, pins.get());
    if (auto synced = root->SyncDirectory(); !synced) return synced;
    RigWorld world{
        .clock = &clock, .spaces = setup.spaces, .records = {store->disks(), pins.get(), 0}};
    for (uint16_t s = 0; s < setup.shards; ++s) {
      logs.insert(s);
      world.storage.push_back(store->ForShard(s));
    }
    shards = std::make_unique<ShardRig>(setup.shard, setup.producers, /*lane_capacity=*/64,
                                        /*max_spaces=*/16,
                                        RigShards{.shards = setup.shards,
                                                  .partitions = 1,
                                                  .max_partitions = setup.max_partitions,
                                                  .peer_capacity = 4},
                                        world);
    return {};
  }
  bool running() const { return shards != nullptr; }
  bool IsRecovering() const {
    return std::ranges::any_of(shards->shards,
                               [](const auto& each) { return each->is_recovering(); });
  }
  // Why it cannot start; empty: nothing is known to be wrong.
  std::string RecoveryError() const {
    for (const auto& each : shards->shards) {
      const RecoveryProgress& progress = each->recovery();
      if (progress.failed.load()) return progress.error.message + " ";
    }
    return "";
  }
  // Polls until it has recovered and what is written next has its place. Why it cannot; empty: it
  // can.
  std::string Recover() {
    for (int i = 0; i < 100'000 && IsRecovering(); ++i) {
      shards->Poll();
      if (const std::string error = RecoveryError(); !error.empty()) return error;
    }
    if (IsRecovering()) return "recovery does not end";
    if (auto prepared = store->PrepareFirst(); !prepared) return prepared.error().message;
    return "";
  }
  uint64_t MendedBits() const {
    uint64_t bits = 0;
    for (const auto& each : shards->shards) bits += each->recovery().mended_bits.load();
    return bits;
  }

  // The payload of what a shard keeps, from where it lies: a second opinion beside the reader's.
  // Nothing where there is no sound record.
  std::optional<std::string> PayloadOf(const StoredObservation& stored) const {
    std::vector<std::byte> bytes(stored.payload.begin(), stored.payload.end());
    LogRecord record;
    record.payload = bytes;
    if (stored.record_bytes != 0) {
      const uint16_t log = LogOf(stored.origin);
      const LogPosition position = PositionOf(stored.origin);
      std::span<const std::byte> in_memory;
      if (log < store->shards()) in_memory = store->ForShard(log).log->NotDurable(stored.origin);
      if (in_memory.size() >= stored.record_bytes) {
        bytes.assign(in_memory.begin(), in_memory.begin() + stored.record_bytes);
      } else {
        auto content = medium.BytesOf(LogFolder(log), SegmentName(SegmentOf(position)),
                                      OffsetOf(position), stored.record_bytes);
        if (!content) return std::nullopt;
        bytes = *std::move(content);
        // A program may turn one bit of what is on the disk.
        if (const auto bit = FindFlippedBit(bytes, stored.origin)) {
          bytes[*bit / 8] ^= std::byte{1} << (*bit % 8);
        }
      }
      if (ParseLogRecord(bytes, stored.origin, &record, nullptr) != LogRecordFault::kNone ||
          record.id != stored.id || record.payload.size() != stored.payload_bytes) {
        return std::nullopt;
      }
    }
    return std::string(reinterpret_cast<const char*>(record.payload.data()), record.payload.size());
  }

  // kill -9: what has ended stays, what is under way is lost.
  void Kill() {
    disks.killed = true;
    if (!disks.power_failed) audit.NoteKilled();
    shards.reset();
    checkpointer.reset();
    store.reset();
    root.reset();
  }
  void CutPower() {
    if (!disks.power_failed) disks.CutPower();
    Kill();
  }

  SimulatedClock clock;
  SimulatedDisk medium;
  FlushAudit audit;
  RigDisks disks;
  static constexpr const char* kRootFolder = "root";
  std::set<uint16_t> logs;  // whose folders are there
  std::unique_ptr<Disk> root;
  std::unique_ptr<LogStore> store;
  // Of the rig, as the one that answers, and of a test that reads by itself.
  std::unique_ptr<ReadPins> pins;
  std::unique_ptr<Checkpointer> checkpointer;
  std::unique_ptr<ShardRig> shards;
};

}  // namespace engram
