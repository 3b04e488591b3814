#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/core/check.h"
#include "src/core/disk.h"
#include "src/core/hash.h"

// What goes to a real disk and comes back, in its order, and what a crash at any moment of it may
// leave behind.

namespace engram {

// All that happened to the files of one folder, by whichever of its Disks. A submission is noted
// before it is handed over and an end after it was fetched, so what the trace shows to have ended
// before something else began did so.
struct DiskTrace {
  enum class Kind : uint8_t {
    kWrite,
    kFlush,
    kEnd,     // of the write or flush with this number
    kMake,    // `name` is a new file
    kRename,  // `name` to `to`
    kRemove,
    kSyncDirectory,
    kNote,  // the user's own
  };
  struct Event {
    Kind kind = Kind::kNote;
    uint64_t operation = 0;  // of kWrite, kFlush and their kEnd
    uint32_t file = 0;       // whatever it is called now; kWrite, kFlush, kMake
    uint64_t offset = 0;
    int error = 0;  // kEnd
    std::string name{};
    std::string to{};
    std::vector<std::byte> bytes{};  // kWrite
    std::pair<uint64_t, uint64_t> note{};
  };

  void Add(Event event) {
    // What the user saw before this must stand before it.
    if (before_event) before_event();
    events.push_back(std::move(event));
  }
  void Note(uint64_t first, uint64_t second) {
    events.push_back({.kind = Kind::kNote, .note = {first, second}});
  }

  std::vector<Event> events;
  // May call Note.
  std::function<void()> before_event;
  // Of the disks that note here.
  std::map<std::string, uint32_t> files;  // by name
  uint32_t files_made = 0;
  uint64_t operations = 0;
};

// A Disk that notes what it is asked for. Reads pass by. All disks over one folder share the trace.
class RecordingDisk final : public Disk {
 public:
  RecordingDisk(std::unique_ptr<Disk> disk, DiskTrace* trace)
      : disk_(std::move(disk)), trace_(trace) {}

  Result<void> LockDirectory() override { return disk_->LockDirectory(); }
  Result<std::vector<DirectoryEntry>> List() override { return disk_->List(); }
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) override {
    auto file = disk_->Open(name, mode, caching);
    if (!file) return file;
    if (!trace_->files.contains(name)) {
      trace_->files[name] = ++trace_->files_made;
      trace_->Add({.kind = DiskTrace::Kind::kMake, .file = trace_->files_made, .name = name});
    }
    open_[{file->id.index, file->id.generation}] = trace_->files[name];
    return file;
  }
  void Close(FileId file) override { disk_->Close(file); }
  Result<void> Rename(const std::string& from, const std::string& to) override {
    trace_->Add({.kind = DiskTrace::Kind::kRename, .name = from, .to = to});
    trace_->files[to] = trace_->files.at(from);
    trace_->files.erase(from);
    return disk_->Rename(from, to);
  }
  Result<void> Remove(const std::string& name) override {
    trace_->Add({.kind = DiskTrace::Kind::kRemove, .name = name});
    trace_->files.erase(name);
    return disk_->Remove(name);
  }
  Result<void> SyncDirectory() override {
    auto synced = disk_->SyncDirectory();
    if (synced) trace_->Add({.kind = DiskTrace::Kind::kSyncDirectory});
    return synced;
  }
  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    const uint64_t operation = ++trace_->operations;
    if (!disk_->Read(file, offset, to, operation)) return false;
    under_way_[operation] = {.tag = tag, .is_read = true};
    return true;
  }
  bool Write(FileId file, uint64_t offset, std::span<const std::byte> from, uint64_t tag) override {
    const uint64_t operation = ++trace_->operations;
    if (!disk_->Write(file, offset, from, operation)) return false;
    under_way_[operation] = {.tag = tag, .is_read = false};
    trace_->Add({.kind = DiskTrace::Kind::kWrite,
                 .operation = operation,
                 .file = FileOf(file),
                 .offset = offset,
                 .bytes = {from.begin(), from.end()}});
    return true;
  }
  bool Flush(FileId file, uint64_t tag) override {
    const uint64_t operation = ++trace_->operations;
    if (!disk_->Flush(file, operation)) return false;
    under_way_[operation] = {.tag = tag, .is_read = false};
    trace_->Add({.kind = DiskTrace::Kind::kFlush, .operation = operation, .file = FileOf(file)});
    return true;
  }
  size_t Poll(std::span<DiskCompletion> out) override {
    const size_t count = disk_->Poll(out);
    for (DiskCompletion& end : out.first(count)) {
      const auto at = under_way_.find(end.tag);
      CHECK(at != under_way_.end(), "the disk ends what was begun");
      if (!at->second.is_read) {
        trace_->Add({.kind = DiskTrace::Kind::kEnd, .operation = end.tag, .error = end.error});
      }
      end.tag = at->second.tag;
      under_way_.erase(at);
    }
    return count;
  }
  uint32_t in_flight() const override { return disk_->in_flight(); }
  void Wait(int64_t timeout_ns) override { disk_->Wait(timeout_ns); }
  const std::string& directory() const override { return disk_->directory(); }
  std::string_view backend() const override { return disk_->backend(); }

 private:
  struct Operation {
    uint64_t tag = 0;
    bool is_read = false;
  };
  uint32_t FileOf(FileId file) const { return open_.at({file.index, file.generation}); }

  std::unique_ptr<Disk> disk_;
  DiskTrace* const trace_;
  std::map<std::pair<uint32_t, uint32_t>, uint32_t> open_;
  std::map<uint64_t, Operation> under_way_;
};

// Goes through a trace. At each moment it knows what a crash must leave and what it may leave, by
// the letter of what Disk promises:
// 1. A write is safe once a flush of its file that was asked for after the write's end has ended
//    without error.
// 2. Any other write that was asked for may be there, or not, or any of its sectors.
// 3. Changes of names are safe once the directory was synced; of others those up to some moment
//    are there.
class CrashStates {
 public:
  using Files = std::map<std::string, std::vector<std::byte>>;
  static constexpr size_t kSectorBytes = 512;
  // Sectors of one write whose subsets are all taken.
  static constexpr size_t kFewSectors = 8;

  void Step(const DiskTrace::Event& event) {
    using enum DiskTrace::Kind;
    switch (event.kind) {
      case kWrite:
        writes_[event.operation] = {.file = event.file, .event = &event, .ended = false};
        break;
      case kFlush:
        for (const auto& [number, write] : writes_) {
          if (write.ended && write.file == event.file) covered_[event.operation].insert(number);
        }
        break;
      case kEnd:
        StepEnd(event);
        break;
      case kMake:
      case kRename:
      case kRemove:
        renames_.push_back(&event);
        break;
      case kSyncDirectory:
        for (const DiskTrace::Event* each : renames_) Apply(*each, names_);
        renames_.clear();
        break;
      case kNote:
        break;
    }
  }
  // Whether `event` changes what a crash may leave, so that the moment before it is the last one of
  // the states so far.
  static bool Changes(const DiskTrace::Event& event) {
    using enum DiskTrace::Kind;
    return event.kind != kNote && event.kind != kFlush;
  }

  // Calls visit(files) for states that a crash now may leave: all of them where they are at most
  // `most`, else the two extremes and others by chance, `most` together. Returns how many.
  template <typename Visit>
  size_t ForEach(size_t most, SplitMix64* random, Visit&& visit) const {
    // By write: the number of its subsets that are taken.
    uint64_t all = renames_.size() + 1;
    for (const auto& [number, write] : writes_) {
      const size_t sectors = SectorsOf(write);
      all = sectors > kFewSectors ? UINT64_MAX / 1'024 : all << sectors;
      if (all > most) break;
    }
    if (all <= most) {
      for (uint64_t state = 0; state < all; ++state) {
        visit(Image(state / (all / (renames_.size() + 1)), [&, rest = state](size_t) mutable {
          const bool keep = (rest & 1) != 0;
          rest >>= 1;
          return keep;
        }));
      }
      return all;
    }
    visit(Image(0, [](size_t) { return false; }));
    visit(Image(renames_.size(), [](size_t) { return true; }));
    for (size_t i = 2; i < most; ++i) visit(RandomImage(random));
    return most;
  }

 private:
  struct PendingWrite {
    uint32_t file = 0;
    const DiskTrace::Event* event = nullptr;
    bool ended = false;
  };

  static size_t SectorsOf(const PendingWrite& write) {
    return (write.event->bytes.size() + kSectorBytes - 1) / kSectorBytes;
  }
  static void Put(const DiskTrace::Event& write, size_t sector, std::vector<std::byte>& file) {
    const size_t begin = sector * kSectorBytes;
    const size_t end = std::min(begin + kSectorBytes, write.bytes.size());
    if (file.size() < write.offset + end) file.resize(write.offset + end);
    std::copy(write.bytes.begin() + static_cast<ptrdiff_t>(begin),
              write.bytes.begin() + static_cast<ptrdiff_t>(end),
              file.begin() + static_cast<ptrdiff_t>(write.offset + begin));
  }
  void StepEnd(const DiskTrace::Event& event) {
    if (const auto write = writes_.find(event.operation); write != writes_.end()) {
      write->second.ended = event.error == 0;
      return;
    }
    const auto flush = covered_.find(event.operation);
    if (flush == covered_.end()) return;
    for (const uint64_t number : flush->second) {
      // An earlier flush that ended later may have made it safe.
      const auto write = writes_.find(number);
      if (write == writes_.end()) continue;
      write->second.ended = false;  // Lost, if this one failed.
      if (event.error != 0) continue;
      for (size_t s = 0; s < SectorsOf(write->second); ++s) {
        Put(*write->second.event, s, contents_[write->second.file]);
      }
      writes_.erase(write);
    }
    covered_.erase(flush);
  }
  static void Apply(const DiskTrace::Event& event, std::map<std::string, uint32_t>& names) {
    if (event.kind == DiskTrace::Kind::kMake) names[event.name] = event.file;
    if (event.kind == DiskTrace::Kind::kRename) names[event.to] = names.at(event.name);
    if (event.kind != DiskTrace::Kind::kMake) names.erase(event.name);
  }

  // The first `renames` changes of names, and those sectors, in the order of the writes, of which
  // keeps(sector of its write) says so.
  template <typename Keeps>
  Files Image(size_t renames, Keeps&& keeps) const {
    std::map<uint32_t, std::vector<std::byte>> contents = contents_;
    for (const auto& [number, write] : writes_) {
      for (size_t s = 0; s < SectorsOf(write); ++s) {
        if (keeps(s)) Put(*write.event, s, contents[write.file]);
      }
    }
    std::map<std::string, uint32_t> names = names_;
    for (size_t i = 0; i < renames; ++i) Apply(*renames_[i], names);
    Files files;
    for (const auto& [name, file] : names) files[name] = contents[file];
    return files;
  }
  // Each write is dropped, kept, or torn: into any sectors, or at one place.
  Files RandomImage(SplitMix64* random) const {
    enum class Fate : uint8_t { kDropped, kKept, kSectors, kBegin, kEnd };
    Fate fate = Fate::kDropped;
    size_t cut = 0;
    auto next = writes_.begin();
    return Image(random->Below(renames_.size() + 1), [&](size_t sector) {
      if (sector == 0) {
        fate = static_cast<Fate>(random->Below(5));
        cut = random->Below(SectorsOf(next->second) + 1);
        ++next;
      }
      if (fate == Fate::kSectors) return random->Below(2) == 0;
      return fate == Fate::kKept || (fate == Fate::kBegin && sector < cut) ||
             (fate == Fate::kEnd && sector >= cut);
    });
  }

  std::map<uint32_t, std::vector<std::byte>> contents_;  // by file, what is safe
  std::map<std::string, uint32_t> names_;                // that are safe
  std::vector<const DiskTrace::Event*> renames_;
  std::map<uint64_t, PendingWrite> writes_;         // that are not safe, by operation
  std::map<uint64_t, std::set<uint64_t>> covered_;  // by flush under way
};

}  // namespace engram
