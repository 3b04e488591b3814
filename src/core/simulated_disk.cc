#include "src/core/simulated_disk.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <set>
#include <utility>

#include "src/core/check.h"
#include "src/core/file_table.h"
#include "src/core/posix_directory.h"

namespace engram {

// One Disk over a SimulatedDisk.
//
// Invariants: an operation takes effect at the moment at which it ends, in the order of ends; until
// then nobody sees anything of it, unless a crash keeps parts of a write.
class SimulatedDiskHandle final : public Disk {
 public:
  SimulatedDiskHandle(SimulatedDisk* medium, std::string directory, const DiskOptions& options)
      : medium_(medium),
        directory_(std::move(directory)),
        max_in_flight_(options.max_in_flight),
        files_(options.max_open_files) {
    medium_->handles_.push_back(this);
  }
  SimulatedDiskHandle(const SimulatedDiskHandle&) = delete;
  SimulatedDiskHandle& operator=(const SimulatedDiskHandle&) = delete;
  ~SimulatedDiskHandle() override {
    if (dead_) return;
    if (Here().locked_by == this) Here().locked_by = nullptr;
    std::erase(medium_->handles_, this);
  }

  Result<void> LockDirectory() override;
  Result<std::vector<DirectoryEntry>> List() override;
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) override;
  void Close(FileId file) override;
  Result<void> Rename(const std::string& from, const std::string& to) override;
  Result<void> Remove(const std::string& name) override;
  Result<void> SyncDirectory() override;
  uint64_t FreeBytes() const override {
    const uint64_t used = medium_->used_bytes();
    return medium_->faults_.capacity_bytes - std::min(used, medium_->faults_.capacity_bytes);
  }

  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    return Begin({.kind = Kind::kRead, .file = file, .offset = offset, .tag = tag, .to = to});
  }
  bool Write(FileId file, uint64_t offset, std::span<const std::byte> from, uint64_t tag) override {
    return Begin({.kind = Kind::kWrite, .file = file, .offset = offset, .tag = tag, .from = from});
  }
  bool Flush(FileId file, uint64_t tag) override {
    return Begin({.kind = Kind::kFlush, .file = file, .tag = tag});
  }
  size_t Poll(std::span<DiskCompletion> out) override;
  uint32_t in_flight() const override { return static_cast<uint32_t>(under_way_.size()); }
  void Wait(int64_t timeout_ns) override;
  const std::string& directory() const override { return directory_; }
  std::string_view backend() const override { return "simulated"; }

 private:
  friend class SimulatedDisk;
  enum class Kind : uint8_t { kRead, kWrite, kFlush };
  struct Operation {
    Kind kind = Kind::kRead;
    FileId file;
    uint64_t offset = 0;
    uint64_t tag = 0;
    std::span<std::byte> to{};
    std::span<const std::byte> from{};
    uint64_t covers = 0;  // a flush: writes that ended up to this number
    int64_t ends_ns = 0;
  };
  struct OpenFile {
    std::shared_ptr<SimulatedDisk::File> file;
    uint32_t alignment = 1;
    bool writable = false;
    uint32_t in_flight = 0;
  };

  SimulatedDisk::Directory& Here() { return medium_->directories_[directory_]; }
  std::unexpected<Error> Crashed() const {
    return Fail(ErrorCode::kUnavailable, directory_ + ": the simulated machine has crashed");
  }
  std::unexpected<Error> Missing(const std::string& what, const std::string& name) const {
    return FailErrno(what + " " + directory_ + "/" + name, ENOENT);
  }
  bool Begin(Operation operation);
  DiskCompletion End(const Operation& operation);
  DiskCompletion EndRead(const Operation& operation, SimulatedDisk::File& file);
  DiskCompletion EndWrite(const Operation& operation, SimulatedDisk::File& file);
  DiskCompletion EndFlush(const Operation& operation, SimulatedDisk::File& file);

  SimulatedDisk* medium_;
  std::string directory_;
  uint32_t max_in_flight_;
  FileTable<OpenFile> files_;
  std::vector<Operation> under_way_;
  bool dead_ = false;  // and `medium_` must not be touched
};

Result<void> SimulatedDiskHandle::LockDirectory() {
  if (dead_) return Crashed();
  if (Here().locked_by != nullptr && Here().locked_by != this) {
    return Fail(ErrorCode::kAlreadyExists, "directory " + directory_ +
                                               " is in use by another process: stop that process, "
                                               "or choose another directory");
  }
  Here().locked_by = this;
  return {};
}

Result<std::vector<DirectoryEntry>> SimulatedDiskHandle::List() {
  if (dead_) return Crashed();
  std::vector<DirectoryEntry> entries;
  for (const auto& [name, file] : Here().names) entries.push_back({name, file->content.size()});
  return entries;
}

Result<DiskFile> SimulatedDiskHandle::Open(const std::string& name, OpenMode mode,
                                           Caching caching) {
  if (dead_) return Crashed();
  if (const auto valid = CheckFileName(name); !valid) return std::unexpected(valid.error());
  if (files_.full()) {
    return Fail(ErrorCode::kResourceExhausted, "open " + name + ": max_open_files are open");
  }
  SimulatedDisk::Directory& here = Here();
  auto at = here.names.find(name);
  if (at == here.names.end()) {
    if (mode != OpenMode::kCreate) return Missing("open", name);
    SimulatedDisk::NameChange change{.from = "", .to = name, .file = {}};
    change.file = std::make_shared<SimulatedDisk::File>();
    SimulatedDisk::Apply(change, here.names);
    here.unsynced.push_back(std::move(change));
    at = here.names.find(name);
  }
  DiskFile opened;
  opened.size_bytes = at->second->content.size();
  opened.direct = caching == Caching::kDirect;
  opened.alignment = opened.direct ? uint32_t{SimulatedDisk::kSectorBytes} : 1;
  opened.id = files_.Add({at->second, opened.alignment, mode != OpenMode::kRead, 0});
  return opened;
}

void SimulatedDiskHandle::Close(FileId file) {
  if (dead_) return;
  CHECK(files_.Get(file).in_flight == 0, "a file is closed when nothing of it is under way");
  files_.Take(file);
}

Result<void> SimulatedDiskHandle::Rename(const std::string& from, const std::string& to) {
  if (dead_) return Crashed();
  for (const std::string& name : {from, to}) {
    if (const auto valid = CheckFileName(name); !valid) return valid;
  }
  SimulatedDisk::Directory& here = Here();
  const auto at = here.names.find(from);
  if (at == here.names.end()) return Missing("rename", from);
  if (from == to) return {};
  SimulatedDisk::NameChange change{.from = from, .to = to, .file = at->second};
  SimulatedDisk::Apply(change, here.names);
  here.unsynced.push_back(std::move(change));
  return {};
}

Result<void> SimulatedDiskHandle::Remove(const std::string& name) {
  if (dead_) return Crashed();
  SimulatedDisk::Directory& here = Here();
  if (!here.names.contains(name)) return Missing("remove", name);
  SimulatedDisk::NameChange change{.from = "", .to = name, .file = nullptr};
  SimulatedDisk::Apply(change, here.names);
  here.unsynced.push_back(std::move(change));
  return {};
}

Result<void> SimulatedDiskHandle::SyncDirectory() {
  if (dead_) return Crashed();
  SimulatedDisk::Directory& here = Here();
  for (const auto& change : here.unsynced) SimulatedDisk::Apply(change, here.durable);
  here.unsynced.clear();
  return {};
}

bool SimulatedDiskHandle::Begin(Operation operation) {
  if (dead_) return false;
  OpenFile& open = files_.Get(operation.file);
  const std::byte* memory =
      operation.kind == Kind::kRead ? operation.to.data() : operation.from.data();
  const size_t bytes = operation.to.size() + operation.from.size();
  CHECK(operation.offset % open.alignment == 0 && bytes % open.alignment == 0 &&
            std::bit_cast<uintptr_t>(memory) % open.alignment == 0,
        "direct reads and writes are aligned");
  CHECK(operation.kind != Kind::kWrite || open.writable, "the file was opened for reading");
  if (under_way_.size() == max_in_flight_) return false;
  ++open.in_flight;
  operation.covers = medium_->ended_writes_;
  operation.ends_ns = medium_->EndsNs();
  under_way_.push_back(operation);
  return true;
}

DiskCompletion SimulatedDiskHandle::EndRead(const Operation& operation, SimulatedDisk::File& file) {
  DiskCompletion end{.tag = operation.tag, .error = 0, .bytes = 0};
  if (medium_->Chance(medium_->faults_.read_error_probability)) {
    end.error = EIO;
    return end;
  }
  if (operation.offset >= file.content.size()) return end;
  end.bytes = std::min(operation.to.size(), file.content.size() - operation.offset);
  std::copy_n(file.content.begin() + static_cast<std::ptrdiff_t>(operation.offset), end.bytes,
              operation.to.begin());
  return end;
}

DiskCompletion SimulatedDiskHandle::EndWrite(const Operation& operation,
                                             SimulatedDisk::File& file) {
  DiskCompletion end{.tag = operation.tag, .error = 0, .bytes = operation.from.size()};
  if (end.bytes == 0) return end;
  const uint64_t size = std::max<uint64_t>(file.content.size(), operation.offset + end.bytes);
  const uint64_t growth = size - file.content.size();
  const SimulatedDiskFaults& faults = medium_->faults_;
  const uint64_t used = medium_->used_bytes();
  if (growth > 0 && (used > faults.capacity_bytes || growth > faults.capacity_bytes - used)) {
    end.error = ENOSPC;
  } else if (medium_->Chance(faults.write_error_probability)) {
    end.error = EIO;
  }
  if (end.error != 0) {
    end.bytes = 0;
    // A part may be there all the same, where it takes no new room.
    const uint64_t room =
        operation.offset < file.content.size()
            ? std::min<uint64_t>(operation.from.size(), file.content.size() - operation.offset)
            : 0;
    const uint64_t part = medium_->random_.Below(room + 1);
    if (part > 0) medium_->Write(file, operation.offset, operation.from.first(part));
    return end;
  }
  medium_->Write(file, operation.offset, operation.from);
  return end;
}

DiskCompletion SimulatedDiskHandle::EndFlush(const Operation& operation,
                                             SimulatedDisk::File& file) {
  DiskCompletion end{.tag = operation.tag, .error = 0, .bytes = 0};
  const auto covered = [&](const SimulatedDisk::UnflushedWrite& write) {
    return write.number <= operation.covers;
  };
  if (medium_->Chance(medium_->faults_.flush_error_probability)) {
    end.error = EIO;
    for (auto& write : file.unflushed) {
      if (covered(write) && medium_->Chance(0.5)) write.dropped = true;
    }
    return end;
  }
  for (const auto& write : file.unflushed) {
    if (!covered(write)) continue;
    // A dropped one may have reached the medium all the same, but never over a later one.
    if (write.dropped && medium_->Chance(0.5)) continue;
    SimulatedDisk::ApplyBytes(write.offset, write.bytes, file.durable);
  }
  std::erase_if(file.unflushed, covered);
  return end;
}

DiskCompletion SimulatedDiskHandle::End(const Operation& operation) {
  OpenFile& open = files_.Get(operation.file);
  --open.in_flight;
  switch (operation.kind) {
    case Kind::kRead:
      return EndRead(operation, *open.file);
    case Kind::kWrite:
      return EndWrite(operation, *open.file);
    case Kind::kFlush:
      break;
  }
  return EndFlush(operation, *open.file);
}

size_t SimulatedDiskHandle::Poll(std::span<DiskCompletion> out) {
  if (dead_) return 0;
  const int64_t now_ns = medium_->clock_->MonotonicNs();
  if (now_ns < medium_->stalled_until_ns_) return 0;
  size_t count = 0;
  for (; count < out.size() && !under_way_.empty(); ++count) {
    const auto next = std::ranges::min_element(under_way_, {}, &Operation::ends_ns);
    if (next->ends_ns > now_ns) break;
    const Operation operation = *next;
    under_way_.erase(next);
    out[count] = End(operation);
  }
  return count;
}

void SimulatedDiskHandle::Wait(int64_t timeout_ns) {
  if (dead_ || under_way_.empty()) return;
  const int64_t now_ns = medium_->clock_->MonotonicNs();
  int64_t until_ns = std::ranges::min_element(under_way_, {}, &Operation::ends_ns)->ends_ns;
  until_ns = std::max(until_ns, medium_->stalled_until_ns_);
  medium_->clock_->AdvanceNs(std::clamp<int64_t>(until_ns - now_ns, 0, timeout_ns));
}

SimulatedDisk::SimulatedDisk(SimulatedClock* clock, uint64_t seed,
                             const SimulatedDiskFaults& faults)
    : clock_(clock), random_(seed), faults_(faults) {}

SimulatedDisk::~SimulatedDisk() { CHECK(handles_.empty(), "a Disk outlives its medium"); }

std::unique_ptr<Disk> SimulatedDisk::Open(const std::string& directory,
                                          const DiskOptions& options) {
  directories_.try_emplace(directory);
  return std::make_unique<SimulatedDiskHandle>(this, directory, options);
}

bool SimulatedDisk::Chance(double probability) {
  // Drawn also where it cannot matter, so that setting one fault leaves the others' order alone.
  const double drawn = static_cast<double>(random_.Next() >> 11) * 0x1p-53;
  return drawn < probability;
}

int64_t SimulatedDisk::EndsNs() {
  const auto spread = static_cast<uint64_t>(faults_.max_delay_ns - faults_.min_delay_ns);
  return clock_->MonotonicNs() + faults_.min_delay_ns +
         static_cast<int64_t>(random_.Below(spread + 1));
}

void SimulatedDisk::Apply(const NameChange& change, Names& names) {
  if (!change.from.empty()) names.erase(change.from);
  if (change.file != nullptr) {
    names[change.to] = change.file;
  } else {
    names.erase(change.to);
  }
}

void SimulatedDisk::ApplyBytes(uint64_t offset, std::span<const std::byte> bytes,
                               std::vector<std::byte>& content) {
  if (bytes.empty()) return;  // Not even the size changes.
  content.resize(std::max<size_t>(content.size(), offset + bytes.size()));
  std::ranges::copy(bytes, content.begin() + static_cast<std::ptrdiff_t>(offset));
}

void SimulatedDisk::Write(File& file, uint64_t offset, std::span<const std::byte> bytes) {
  ApplyBytes(offset, bytes, file.content);
  file.unflushed.push_back({.number = ++ended_writes_,
                            .offset = offset,
                            .bytes = {bytes.begin(), bytes.end()},
                            .dropped = false});
}

void SimulatedDisk::CrashWrite(File& file, uint64_t offset, std::span<const std::byte> bytes) {
  const double drawn = static_cast<double>(random_.Next() >> 11) * 0x1p-53;
  if (drawn < faults_.crash_loses_write_probability) return;
  if (drawn < faults_.crash_loses_write_probability + faults_.crash_keeps_write_probability) {
    ApplyBytes(offset, bytes, file.durable);
    return;
  }
  // Sectors of the disk, not of the write: the first and last may be parts.
  for (size_t at = 0; at < bytes.size();) {
    const size_t in_sector = kSectorBytes - (offset + at) % kSectorBytes;
    const size_t step = std::min(in_sector, bytes.size() - at);
    if (Chance(0.5)) ApplyBytes(offset + at, bytes.subspan(at, step), file.durable);
    at += step;
  }
}

// 1. Unflushed writes, those that had ended and those under way, survive by chance, each alone and
//    in an order by chance: a later one may lie under an earlier one.
// 2. Unsynced changes of names survive up to one of them, by chance.
// 3. What is durable is all there is; nobody holds it.
void SimulatedDisk::Crash() {
  struct Loose {
    std::shared_ptr<File> file;
    uint64_t offset;
    std::vector<std::byte> bytes;
  };
  std::vector<Loose> loose;
  std::set<const File*> seen;
  const auto collect = [&](const std::shared_ptr<File>& file) {
    if (!seen.insert(file.get()).second) return;
    for (auto& write : file->unflushed) {
      loose.push_back({file, write.offset, std::move(write.bytes)});
    }
    file->unflushed.clear();
  };
  for (auto& [path, directory] : directories_) {
    for (const auto& [name, file] : directory.durable) collect(file);
    for (const NameChange& change : directory.unsynced) {
      if (change.file != nullptr) collect(change.file);
    }
  }
  for (SimulatedDiskHandle* handle : handles_) {
    for (const auto& operation : handle->under_way_) {
      if (operation.kind != SimulatedDiskHandle::Kind::kWrite) continue;
      loose.push_back({handle->files_.Get(operation.file).file,
                       operation.offset,
                       {operation.from.begin(), operation.from.end()}});
    }
    handle->dead_ = true;
    handle->under_way_.clear();
  }
  handles_.clear();
  for (size_t i = loose.size(); i > 1; --i) std::swap(loose[i - 1], loose[random_.Below(i)]);
  for (const Loose& write : loose) CrashWrite(*write.file, write.offset, write.bytes);

  for (auto& [path, directory] : directories_) {
    const size_t kept = random_.Below(directory.unsynced.size() + 1);
    for (size_t i = 0; i < kept; ++i) Apply(directory.unsynced[i], directory.durable);
    directory.unsynced.clear();
    directory.names = directory.durable;
    directory.locked_by = nullptr;
    for (const auto& [name, file] : directory.names) file->content = file->durable;
  }
  stalled_until_ns_ = 0;
}

void SimulatedDisk::FlipBit(const std::string& directory, const std::string& name, uint64_t bit) {
  File& file = *directories_.at(directory).names.at(name);
  const std::byte mask{static_cast<uint8_t>(1u << (bit % 8))};
  file.content.at(bit / 8) ^= mask;
  if (bit / 8 < file.durable.size()) file.durable[bit / 8] ^= mask;
}

std::optional<std::vector<std::byte>> SimulatedDisk::ContentOf(const std::string& directory,
                                                               const std::string& name) const {
  const auto at = directories_.find(directory);
  if (at == directories_.end()) return std::nullopt;
  const auto file = at->second.names.find(name);
  if (file == at->second.names.end()) return std::nullopt;
  return file->second->content;
}

std::optional<std::vector<std::byte>> SimulatedDisk::BytesOf(const std::string& directory,
                                                             const std::string& name,
                                                             uint64_t offset, size_t bytes) const {
  const auto at = directories_.find(directory);
  if (at == directories_.end()) return std::nullopt;
  const auto file = at->second.names.find(name);
  if (file == at->second.names.end()) return std::nullopt;
  const std::span<const std::byte> content = file->second->content;
  if (offset > content.size() || bytes > content.size() - offset) return std::nullopt;
  const auto part = content.subspan(offset, bytes);
  return std::vector<std::byte>(part.begin(), part.end());
}

uint64_t SimulatedDisk::used_bytes() const {
  uint64_t used = 0;
  for (const auto& [path, directory] : directories_) {
    for (const auto& [name, file] : directory.names) used += file->content.size();
  }
  return used;
}

}  // namespace engram
