// engramctl backup and restore.

#include <sys/stat.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "index/checkpoint/checkpoint_file.h"
#include "index/log/log_reader.h"
#include "index/log/log_verifier.h"
#include "index/log/replay_guard.h"
#include "index/log/vault_verifier.h"
#include "src/checkpoint_manifest.h"
#include "src/core/clock.h"
#include "src/core/crc32c.h"
#include "src/core/data_directory.h"
#include "src/core/log_files.h"
#include "tools/engramctl/backup_list.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/feed_loop.h"
#include "tools/engramctl/file_copy.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

namespace fs = std::filesystem;

// Well within kHoldNs, so that one answer that comes late does no harm.
constexpr int64_t kRenewNs = 2 * kNanosPerSecond;
constexpr int64_t kHoldPollNs = 5 * kNanosPerMilli;
constexpr int kEndTries = 20;
constexpr size_t kMaxListBytes = size_t{1} << 30;

Result<std::unique_ptr<Disk>> OpenFolder(const std::string& path) {
  return CreatePosixDisk(path,
                         {.max_in_flight = 64, .max_open_files = 4, .registered_buffers = {}});
}

// A directory that is not there, or has nothing in it.
Result<void> CheckIsFree(const std::string& path) {
  std::error_code error;
  if (!fs::exists(path, error)) return {};
  if (!fs::is_directory(path, error) || !fs::is_empty(path, error)) {
    return Fail(ErrorCode::kAlreadyExists,
                path + " is not an empty directory: name one that is, or that is not there yet");
  }
  return {};
}

Result<void> MakeFolder(const std::string& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) return FailErrno("make directory " + path, error.value());
  return {};
}

// Where a log ends that is read as a start reads it. `between` is called every now and then.
Result<LogPosition> EndOfLog(const std::string& folder, uint16_t log,
                             const CheckpointManifest::Log& from,
                             const std::function<Result<void>()>& between) {
  const auto disk = OpenFolder(folder);
  if (!disk) return std::unexpected(disk.error());
  const auto header = FindSegmentHeader(**disk);
  if (!header) return std::unexpected(header.error());
  if (!*header) return Fail(ErrorCode::kCorrupt, folder + " has no sound segment");
  LogReader reader(disk->get(), log, (*header)->instance);
  if (auto opened = reader.Open(from.from, from.epoch); !opened) {
    return std::unexpected(opened.error());
  }
  LogEntry entry;
  for (;;) {
    const auto step = reader.Next(&entry);
    if (!step) return std::unexpected(step.error());
    if (*step == LogStep::kEnd) return reader.end();
    if (!between) continue;
    if (auto go_on = between(); !go_on) return std::unexpected(go_on.error());
  }
}

// ---------------------------------------------------------------------------------------------
// Holding

// The daemon's files stay as they are while this lives and is renewed in time.
class Hold {
 public:
  explicit Hold(Connection* connection) : connection_(connection) {}
  ~Hold() { (void)HoldFiles(*connection_, false, kAnswerTimeoutNs); }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

  // Until the daemon says that it is so.
  Result<void> Begin() {
    for (;;) {
      if (auto held = Extend(); !held) return held;
      const auto in_force = ControlCounter(*connection_, "checkpoints_held");
      if (!in_force) return std::unexpected(in_force.error());
      if (*in_force == 1) return {};
      SleepUntil(clock_.MonotonicNs() + kHoldPollNs);
    }
  }
  // To be called often. Errors: it has lapsed meanwhile, or the daemon is gone.
  Result<void> Renew() {
    const int64_t now_ns = clock_.MonotonicNs();
    if (now_ns - asked_ns_ < kRenewNs) return {};
    if (now_ns - asked_ns_ >= kHoldNs) return Lapsed();
    const int64_t before_ns = asked_ns_;
    if (auto extended = Extend(); !extended) return extended;
    return clock_.MonotonicNs() - before_ns >= kHoldNs ? Lapsed() : Result<void>();
  }

 private:
  Result<void> Extend() {
    asked_ns_ = clock_.MonotonicNs();
    return HoldFiles(*connection_, true, kAnswerTimeoutNs);
  }
  static std::unexpected<Error> Lapsed() {
    return Fail(ErrorCode::kUnavailable,
                "copying stood still for so long that the daemon did not wait: try again");
  }

  Connection* const connection_;
  SystemClock clock_;
  int64_t asked_ns_ = 0;
};

// ---------------------------------------------------------------------------------------------
// Copying

// One data directory on its way into a backup.
class Copier {
 public:
  Copier(std::string from, std::string to, Hold* hold)
      : from_(std::move(from)), to_(std::move(to)), hold_(hold) {}

  // All of it, as it is while it is held.
  Result<void> CopyAll() {
    const auto root = OpenFolder(from_);
    if (!root) return std::unexpected(root.error());
    const auto manifest = ReadManifest(**root);
    if (!manifest) return std::unexpected(manifest.error());
    if (!*manifest) return Fail(ErrorCode::kNotFound, from_ + " has no checkpoint");
    for (const char* name : {kInstanceFileName, kCheckpointManifestName}) {
      if (auto copied = Copy(name, {}); !copied) return copied;
    }
    const auto entries = (*root)->List();
    if (!entries) return std::unexpected(entries.error());
    for (const DirectoryEntry& entry : *entries) {
      Result<void> copied;
      if (const auto log = LogOfFolder(entry.name)) {
        copied = CopyLog(*log, **manifest);
      } else if (entry.name == kQuarantineFolder) {
        copied = CopyQuarantine();
      }
      if (!copied) return copied;
    }
    return DropRecycled();
  }
  std::vector<BackupList::File>& files() { return files_; }
  // Of the logs that shards write.
  const std::map<uint16_t, LogPosition>& ends() const { return ends_; }

 private:
  Result<void> Copy(const std::string& name, const CopyRange& range) {
    const auto copied =
        CopyFile(from_ + "/" + name, to_ + "/" + name, range, [this] { return hold_->Renew(); });
    if (!copied) return std::unexpected(copied.error());
    files_.push_back({.crc = copied->crc, .bytes = copied->bytes, .name = name});
    inodes_.push_back(copied->inode);
    return {};
  }

  // Of a log that a shard writes what lies before its end: behind it, and in the segments that are
  // prepared, nothing was acknowledged when copying began.
  Result<void> CopyLog(uint16_t log, const CheckpointManifest& manifest) {
    const std::string folder = LogFolder(log);
    if (auto made = MakeFolder(to_ + "/" + folder); !made) return made;
    std::optional<LogPosition> end;
    if (log < manifest.logs.size()) {
      const auto found = EndOf(log, manifest.logs[log]);
      if (!found) return std::unexpected(found.error());
      end = ends_[log] = *found;
      if (auto copied = Copy(folder + "/" + CheckpointName(manifest.round), {}); !copied) {
        return copied;
      }
    }
    const auto disk = OpenFolder(from_ + "/" + folder);
    if (!disk) return std::unexpected(disk.error());
    const auto entries = (*disk)->List();
    if (!entries) return std::unexpected(entries.error());
    for (const DirectoryEntry& entry : *entries) {
      const auto number = SegmentNumber(entry.name);
      if (!number) continue;
      CopyRange range;
      if (end) {
        if (*number > SegmentOf(*end)) continue;
        if (*number == SegmentOf(*end)) range.kept_bytes = OffsetOf(*end);
      }
      if (auto copied = Copy(folder + "/" + entry.name, range); !copied) {
        // One that nothing lived in any more, made into the next segment since it was listed.
        std::error_code error;
        if (fs::exists(from_ + "/" + folder + "/" + entry.name, error)) return copied;
      }
    }
    return {};
  }

  // The reader may meet a block that is being written, and later ones that are there.
  Result<LogPosition> EndOf(uint16_t log, const CheckpointManifest::Log& from) {
    for (int tries = 1;; ++tries) {
      const auto end =
          EndOfLog(from_ + "/" + LogFolder(log), log, from, [this] { return hold_->Renew(); });
      if (end || tries == kEndTries) return end;
      if (auto held = hold_->Renew(); !held) return std::unexpected(held.error());
      SleepUntil(SystemClock().MonotonicNs() + kHoldPollNs);
    }
  }
  Result<void> CopyQuarantine() {
    const std::string folder = kQuarantineFolder;
    if (auto made = MakeFolder(to_ + "/" + folder); !made) return made;
    const auto disk = OpenFolder(from_ + "/" + folder);
    if (!disk) return std::unexpected(disk.error());
    const auto entries = (*disk)->List();
    if (!entries) return std::unexpected(entries.error());
    for (const DirectoryEntry& entry : *entries) {
      if (!QuarantinedAddress(entry.name)) continue;
      if (auto copied = Copy(folder + "/" + entry.name, {}); !copied) return copied;
    }
    return {};
  }

  // Segments in which nothing lived when the hold began may have been made into others meanwhile:
  // their copies may be of both.
  Result<void> DropRecycled() {
    size_t kept = 0;
    for (size_t i = 0; i < files_.size(); ++i) {
      struct stat status{};
      const bool is_same =
          stat((from_ + "/" + files_[i].name).c_str(), &status) == 0 && status.st_ino == inodes_[i];
      if (is_same) {
        files_[kept++] = files_[i];
        continue;
      }
      std::error_code error;
      fs::remove(to_ + "/" + files_[i].name, error);
      if (error) return FailErrno("remove " + to_ + "/" + files_[i].name, error.value());
    }
    files_.resize(kept);
    return {};
  }

  const std::string from_;
  const std::string to_;
  Hold* const hold_;
  std::vector<BackupList::File> files_;
  std::vector<uint64_t> inodes_;  // of what files_ were copied from
  std::map<uint16_t, LogPosition> ends_;
};

// ---------------------------------------------------------------------------------------------
// Verifying

// Every extent of a checkpoint file against its checksum, and that the last one is the last.
Result<void> VerifyCheckpoint(const std::string& folder, uint32_t round, uint64_t bytes) {
  constexpr size_t kCrcAt = 12;
  const auto disk = OpenFolder(folder);
  if (!disk) return std::unexpected(disk.error());
  CheckpointReader reader(disk->get());
  if (auto opened = reader.Open(CheckpointName(round), bytes); !opened) return opened;
  ExtentKind last{};
  for (;;) {
    std::span<const std::byte> extent;
    const auto step = reader.Next(&extent);
    if (!step) return std::unexpected(step.error());
    if (*step == CheckpointReader::Step::kPending) continue;
    if (*step == CheckpointReader::Step::kEnd) break;
    ExtentHeader header;
    std::memcpy(&header, extent.data(), sizeof(header));
    const uint32_t crc =
        Crc32c(extent.subspan(kCrcAt + sizeof(uint32_t)), Crc32c(extent.first(kCrcAt)));
    if (crc != header.crc) {
      return Fail(ErrorCode::kCorrupt, reader.Place() + ": the checksum does not match");
    }
    last = header.kind;
  }
  if (last != kShardEndExtent) return Fail(ErrorCode::kCorrupt, reader.Place() + ": no end");
  return {};
}

// That a start would find all of it sound, and the logs as long as they were.
Result<void> VerifyData(const std::string& data, const std::map<uint16_t, LogPosition>& ends) {
  const auto root = OpenFolder(data);
  if (!root) return std::unexpected(root.error());
  const auto manifest = ReadManifest(**root);
  if (!manifest) return std::unexpected(manifest.error());
  if (!*manifest) return Fail(ErrorCode::kCorrupt, data + " has no checkpoint");
  const auto entries = (*root)->List();
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    const auto log = LogOfFolder(entry.name);
    if (!log) continue;
    const std::string folder = data + "/" + entry.name;
    LogPosition from = 0;
    if (*log < (*manifest)->logs.size()) {
      from = (*manifest)->logs[*log].from;
      auto checked =
          VerifyCheckpoint(folder, (*manifest)->round, (*manifest)->logs[*log].file_bytes);
      if (!checked) return checked;
      const auto end = EndOfLog(folder, *log, (*manifest)->logs[*log], {});
      if (!end) return std::unexpected(end.error());
      if (*end != ends.at(*log)) {
        return Fail(ErrorCode::kCorrupt, folder +
                                             " does not end where the log ended that it is a "
                                             "copy of: try again, and check this disk");
      }
    }
    for (const CheckpointManifest::Kept& kept : (*manifest)->kept) {
      if (kept.log == *log) from = kept.from;
    }
    const auto disk = OpenFolder(folder);
    if (!disk) return std::unexpected(disk.error());
    const auto header = FindSegmentHeader(**disk);
    if (!header) return std::unexpected(header.error());
    if (!*header) continue;
    const auto report = *log == kVaultLog ? VerifyVault(**disk, (*header)->instance)
                                          : VerifyLog(**disk, *log, (*header)->instance, from);
    if (!report) return std::unexpected(report.error());
    if (report->sound()) continue;
    const std::string file =
        report->damages.empty() ? report->mended[0].file : report->damages[0].file;
    return Fail(ErrorCode::kCorrupt,
                folder + "/" + file + " is damaged: engramctl log verify " + data + " says where");
  }
  return {};
}

Result<void> SyncAll(const std::string& directory) {
  std::error_code error;
  for (const auto& entry : fs::recursive_directory_iterator(directory, error)) {
    if (!entry.is_directory()) continue;
    if (auto synced = SyncFolder(entry.path().string()); !synced) return synced;
  }
  if (error) return FailErrno("list " + directory, error.value());
  if (auto synced = SyncFolder(directory); !synced) return synced;
  return SyncFolder(fs::absolute(directory).lexically_normal().parent_path().string());
}

// 1. The target is free. 2. A checkpoint, so that little has to be replayed. 3. The daemon holds
// its files while they are copied. 4. The copy is flushed and verified. 5. Its list is written,
// which makes it a backup.
Result<BackupList> Backup(const ServerOptions& server, const BackupOptions& options,
                          Connection& connection) {
  std::string data = options.data;
  if (data.empty()) {
    const auto said = ControlText(connection, "data_directory");
    if (!said) return std::unexpected(said.error());
    data = *said;
  }
  std::error_code error;
  if (!fs::exists(data + "/" + kInstanceFileName, error)) {
    return Fail(ErrorCode::kNotFound,
                data + " is no data directory on this machine: run this where engramd at " +
                    server.address + " runs, or name the directory with --data");
  }
  if (auto is_free = CheckIsFree(options.directory); !is_free) {
    return std::unexpected(is_free.error());
  }
  const auto saved = AwaitCheckpoint(connection);
  if (!saved) return std::unexpected(saved.error());
  if (!*saved) {
    return Fail(ErrorCode::kUnavailable, "the checkpoint failed; the daemon's log says why");
  }
  BackupList list;
  std::map<uint16_t, LogPosition> ends;
  const std::string copy = options.directory + "/" + kBackupDataFolder;
  if (auto made = MakeFolder(copy); !made) return std::unexpected(made.error());
  {
    Hold hold(&connection);
    if (auto begun = hold.Begin(); !begun) return std::unexpected(begun.error());
    list.made_unix_ns = SystemClock().WallNs();
    Copier copier(data, copy, &hold);
    if (auto copied = copier.CopyAll(); !copied) return std::unexpected(copied.error());
    list.files = std::move(copier.files());
    ends = copier.ends();
  }
  if (auto synced = SyncAll(options.directory); !synced) return std::unexpected(synced.error());
  if (auto sound = VerifyData(copy, ends); !sound) return std::unexpected(sound.error());
  const std::string path = options.directory + "/" + kBackupListName;
  if (auto written = WriteTextFile(path, PrintBackupList(list)); !written) {
    return std::unexpected(written.error());
  }
  if (auto synced = SyncFolder(options.directory); !synced) return std::unexpected(synced.error());
  return list;
}

Result<BackupList> ReadList(const std::string& directory) {
  const auto disk = OpenFolder(directory);
  if (!disk) return std::unexpected(disk.error());
  const auto content = ReadWholeFile(**disk, kBackupListName, kMaxListBytes);
  if (!content) {
    if (content.error().code != ErrorCode::kNotFound) return std::unexpected(content.error());
    return Fail(ErrorCode::kNotFound, directory + " has no file " + kBackupListName +
                                          ": it is no backup, or one that was cut off");
  }
  auto list = ParseBackupList({reinterpret_cast<const char*>(content->data()), content->size()});
  if (!list) {
    return Fail(ErrorCode::kCorrupt, directory + "/" + kBackupListName + " is damaged");
  }
  return *std::move(list);
}

std::unexpected<Error> Differs(const std::string& path) {
  return Fail(ErrorCode::kCorrupt, path +
                                       " is not what was backed up: its length or checksum "
                                       "differs. Use another backup");
}

// 1. Every file of the backup is read and compared with the list, before anything is written.
// 2. All is copied into a folder beside the target and compared again. 3. That folder becomes the
// target in one step.
Result<BackupList> Restore(const RestoreOptions& options) {
  std::error_code error;
  if (!fs::is_directory(options.backup, error)) {
    return Fail(ErrorCode::kNotFound, options.backup + " is no directory");
  }
  auto list = ReadList(options.backup);
  if (!list) return list;
  const std::string target =
      fs::absolute(options.directory + "/.").lexically_normal().parent_path().string();
  if (auto is_free = CheckIsFree(target); !is_free) return std::unexpected(is_free.error());
  const std::string from = options.backup + "/" + kBackupDataFolder + "/";
  for (const BackupList::File& file : list->files) {
    const auto found = ChecksumFile(from + file.name);
    if (!found) return std::unexpected(found.error());
    if (found->bytes != file.bytes || found->crc != file.crc) return Differs(from + file.name);
  }
  const std::string beside = target + ".restoring";
  fs::remove_all(beside, error);
  if (auto made = MakeFolder(beside); !made) return std::unexpected(made.error());
  fs::permissions(beside, fs::perms::owner_all, error);
  for (const BackupList::File& file : list->files) {
    const std::string to = beside + "/" + file.name;
    if (auto made = MakeFolder(fs::path(to).parent_path().string()); !made) {
      return std::unexpected(made.error());
    }
    const auto copied = CopyFile(from + file.name, to, {}, {});
    if (!copied) return std::unexpected(copied.error());
    if (copied->bytes != file.bytes || copied->crc != file.crc) return Differs(from + file.name);
  }
  if (auto synced = SyncAll(beside); !synced) return std::unexpected(synced.error());
  // Takes the place of an empty directory too.
  if (std::rename(beside.c_str(), target.c_str()) != 0) {
    return FailErrno("rename " + beside + " to " + target, errno);
  }
  auto synced = SyncFolder(fs::path(target).parent_path().string());
  if (!synced) return std::unexpected(synced.error());
  return list;
}

void PrintDone(const ServerOptions& server, const char* what, const std::string& directory,
               const BackupList& list) {
  uint64_t bytes = 0;
  for (const BackupList::File& file : list.files) bytes += file.bytes;
  if (server.json) {
    const nlohmann::json json = {{"directory", directory},
                                 {"files", list.files.size()},
                                 {"bytes", bytes},
                                 {"made_ns", list.made_unix_ns}};
    std::printf("%s\n", json.dump().c_str());
  } else {
    std::printf("%s %s files, %s bytes, in %s\n", what, WithThousands(list.files.size()).c_str(),
                WithThousands(bytes).c_str(), directory.c_str());
  }
}

}  // namespace

int RunBackup(const ServerOptions& server, const BackupOptions& options) {
  auto connection = OpenReader(server, "");
  if (!connection) return connection.error();
  const auto list = Backup(server, options, *connection);
  if (!list) return ReportError(list.error());
  PrintDone(server, "backed up and verified", options.directory, *list);
  return kExitOk;
}

int RunRestore(const ServerOptions& server, const RestoreOptions& options) {
  const auto list = Restore(options);
  if (!list) return ReportError(list.error());
  PrintDone(server, "restored", options.directory, *list);
  return kExitOk;
}

}  // namespace engram
