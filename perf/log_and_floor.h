#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "index/log/log_writer.h"
#include "index/log/segment_keeper.h"
#include "index/shard.h"
#include "perf/bench_support.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/disk.h"
#include "src/core/hash.h"
#include "src/core/huge_page_arena.h"

// A log whose writes are noted, and a plain writer that repeats them.

namespace engram {

inline double SecondsSince(int64_t start_ns, Clock* clock) {
  return static_cast<double>(clock->MonotonicNs() - start_ns) / kNanosPerSecond;
}

// A write of so many bytes; 0: a flush.
using WriteTrace = std::vector<uint32_t>;

// Notes the sizes of the writes and where the flushes lie between them.
class TracedDisk final : public Disk {
 public:
  explicit TracedDisk(std::unique_ptr<Disk> disk) : disk_(std::move(disk)) {
    trace_.reserve(size_t{1} << 20);
  }
  WriteTrace TakeTrace() {
    WriteTrace trace = trace_;
    trace_.clear();
    return trace;
  }

  Result<void> LockDirectory() override { return disk_->LockDirectory(); }
  Result<std::vector<DirectoryEntry>> List() override { return disk_->List(); }
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) override {
    return disk_->Open(name, mode, caching);
  }
  void Close(FileId file) override { disk_->Close(file); }
  Result<void> Rename(const std::string& from, const std::string& to) override {
    return disk_->Rename(from, to);
  }
  Result<void> Remove(const std::string& name) override { return disk_->Remove(name); }
  Result<void> SyncDirectory() override { return disk_->SyncDirectory(); }
  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    return disk_->Read(file, offset, to, tag);
  }
  bool Write(FileId file, uint64_t offset, std::span<const std::byte> from, uint64_t tag) override {
    const bool taken = disk_->Write(file, offset, from, tag);
    if (taken) trace_.push_back(static_cast<uint32_t>(from.size()));
    return taken;
  }
  bool Flush(FileId file, uint64_t tag) override {
    const bool taken = disk_->Flush(file, tag);
    if (taken) trace_.push_back(0);
    return taken;
  }
  size_t Poll(std::span<DiskCompletion> out) override { return disk_->Poll(out); }
  uint32_t in_flight() const override { return disk_->in_flight(); }
  void Wait(int64_t timeout_ns) override { disk_->Wait(timeout_ns); }
  const std::string& directory() const override { return disk_->directory(); }
  std::string_view backend() const override { return disk_->backend(); }

 private:
  std::unique_ptr<Disk> disk_;
  WriteTrace trace_;
};

// What takes turns in one round needs of its disk.
struct Place {
  Clock* clock = nullptr;
  std::string folder;
  DiskBackend backend = DiskBackend::kAuto;
  LogWriterOptions writer{};

  std::unique_ptr<Disk> MakeDisk(const std::string& name, const DiskOptions& disk_options) const {
    return Must(CreateDisk(backend, folder + "/" + name, disk_options, nullptr));
  }
};

struct AlignedMemory {
  AlignedMemory(size_t bytes, HugePagePolicy policy)
      : arena(Must(HugePageArena::Create({.reserve_bytes = bytes, .huge_pages = policy}))),
        span(arena.Allocate(bytes, kLogPageBytes), bytes) {
    std::memset(span.data(), 1, span.size());
  }
  HugePageArena arena;
  std::span<std::byte> span;
};

// One log: what LogStore makes of it, and segments that are freed as soon as they are full.
class BenchLog {
 public:
  static constexpr uint32_t kSegmentBytes = 64u << 20;

  BenchLog(const Place& place, const std::string& name, uint64_t round_bytes)
      : writer_options_(place.writer),
        memory_(LogWriter::MemoryBytes(writer_options_), HugePagePolicy::kTransparent),
        ahead_(static_cast<uint32_t>(round_bytes / kSegmentBytes + 3)) {
    disk_ = std::make_unique<TracedDisk>(
        place.MakeDisk(name, {.max_in_flight = 64, .registered_buffers = {memory_.span}}));
    keeper_disk_ = place.MakeDisk(name, {.max_in_flight = 8, .registered_buffers = {}});
    writer_ = std::make_unique<LogWriter>(writer_options_, disk_.get(), &handoff_, memory_.span);
    keeper_ = std::make_unique<SegmentKeeper>(
        SegmentKeeperOptions{.segment_bytes = kSegmentBytes, .ahead = ahead_, .spare = 2 * ahead_},
        keeper_disk_.get(), place.clock, &handoff_);
  }

  LogWriter& writer() { return *writer_; }
  ShardStorage Storage() {
    ShardStorage storage;
    storage.log = writer_.get();
    storage.sources.push_back({.log = 0, .disk = disk_.get()});
    return storage;
  }
  // The writer has started, by itself or by its shard.
  void Prepare() {
    Must(keeper_->Start(handoff_.current.load()));
    Recycle();
  }
  // Enough is there for a round.
  void Recycle() {
    while (keeper_->segments().begin()->first < handoff_.current.load()) {
      keeper_->Free(keeper_->segments().begin()->first);
    }
    while (handoff_.prepared.load() < handoff_.current.load() + ahead_) {
      keeper_->Poll();
      keeper_disk_->Wait(kNanosPerMilli);
      CHECK(handoff_.trouble.load() == SegmentTrouble::kNone, "there is room on the disk");
    }
    (void)disk_->TakeTrace();
  }
  WriteTrace TakeTrace() { return disk_->TakeTrace(); }

 private:
  const LogWriterOptions writer_options_;
  AlignedMemory memory_;
  const uint32_t ahead_;
  SegmentHandoff handoff_;
  std::unique_ptr<TracedDisk> disk_;
  std::unique_ptr<Disk> keeper_disk_;
  std::unique_ptr<LogWriter> writer_;
  std::unique_ptr<SegmentKeeper> keeper_;
};

// The plain writer.
class Floor {
 public:
  Floor(const Place& place, uint64_t file_bytes)
      : clock_(place.clock),
        block_bytes_(place.writer.block_bytes),
        max_writes_(place.writer.max_writes),
        memory_(size_t{kBuffers} * block_bytes_, HugePagePolicy::kTransparent),
        disk_(place.MakeDisk("floor", {.max_in_flight = 64, .registered_buffers = {memory_.span}})),
        file_bytes_((file_bytes + block_bytes_ - 1) / block_bytes_ * block_bytes_) {
    SplitMix64 random(3);
    for (size_t at = 0; at < memory_.span.size(); at += 8) {
      const uint64_t bits = random.Next();
      std::memcpy(memory_.span.data() + at, &bits, 8);
    }
    file_ = Must(disk_->Open("floor.log", OpenMode::kCreate, Caching::kDirect)).id;
    for (uint64_t at = 0; at < file_bytes_; at += block_bytes_) {
      CHECK(disk_->Write(file_, at, memory_.span.first(block_bytes_), 0), "one at a time");
      WaitFor(0);
    }
    CHECK(disk_->Flush(file_, 0), "nothing is under way");
    WaitFor(0);
  }

  // All writes between two flushes together, then a flush. Seconds.
  double Replay(const WriteTrace& trace) {
    const int64_t start_ns = clock_->MonotonicNs();
    for (const uint32_t bytes : trace) {
      if (bytes == 0) {
        WaitFor(0);
        CHECK(disk_->Flush(file_, kFlush), "nothing is under way");
        WaitFor(0);
      } else {
        WaitFor(max_writes_ - 1);
        Write(bytes);
      }
    }
    WaitFor(0);
    return SecondsSince(start_ns, clock_);
  }

  // The same writes; a flush whenever there is something to flush and none is under way.
  double ReplayDeep(const WriteTrace& trace) {
    const int64_t start_ns = clock_->MonotonicNs();
    size_t next = 0;
    uint32_t writing = 0;
    bool flushing = false;
    bool dirty = false;
    uint32_t unflushed = 0;  // buffers that are not to be used again yet
    uint32_t flushed = 0;
    while (true) {
      while (next < trace.size() && trace[next] == 0) ++next;
      if (next == trace.size() && writing == 0 && !flushing && !dirty) break;
      if (next < trace.size() && writing < max_writes_ && unflushed < kBuffers) {
        Write(trace[next++]);
        ++writing;
        ++unflushed;
      }
      if (dirty && !flushing) {
        CHECK(disk_->Flush(file_, kFlush), "there is room");
        flushing = true;
        dirty = false;
        flushed = unflushed - writing;
      }
      std::array<DiskCompletion, 8> ends;
      const size_t count = disk_->Poll(ends);
      for (size_t i = 0; i < count; ++i) {
        CHECK(ends[i].error == 0, "the disk works");
        if (ends[i].tag == kFlush) {
          flushing = false;
          unflushed -= flushed;
        } else {
          --writing;
          dirty = true;
        }
      }
    }
    return SecondsSince(start_ns, clock_);
  }

 private:
  static constexpr uint32_t kBuffers = 8;
  static constexpr uint64_t kFlush = 1;

  void Write(uint32_t bytes) {
    if (at_ + bytes > file_bytes_) at_ = 0;
    CHECK(disk_->Write(file_, at_, memory_.span.subspan(turn_ * block_bytes_, bytes), 0),
          "there is room");
    at_ += bytes;
    turn_ = (turn_ + 1) % kBuffers;
  }
  void WaitFor(uint32_t most) {
    std::array<DiskCompletion, 8> ends;
    while (disk_->in_flight() > most) {
      const size_t count = disk_->Poll(ends);
      for (size_t i = 0; i < count; ++i) CHECK(ends[i].error == 0, "the disk works");
    }
  }

  Clock* const clock_;
  const uint32_t block_bytes_;
  const uint32_t max_writes_;
  AlignedMemory memory_;
  std::unique_ptr<Disk> disk_;
  const uint64_t file_bytes_;
  FileId file_;
  uint64_t at_ = 0;
  size_t turn_ = 0;
};

}  // namespace engram
