// engramctl backup and restore.

#include <fcntl.h>
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
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "index/checkpoint/checkpoint_file.h"
#include "index/checkpoint/live_table.h"
#include "index/checkpoint/space_extent.h"
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

// Whole, without "." or a slash at its end, so that it has a parent and a name.
Result<std::string> PlainPath(const std::string& path) {
  std::error_code error;
  const fs::path whole = fs::absolute(path + "/.", error);
  if (error) return FailErrno("find " + path, error.value());
  return whole.lexically_normal().parent_path().string();
}

std::string ParentOf(const std::string& plain) { return fs::path(plain).parent_path().string(); }

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

// The daemon's files stay as they are while this lives and is renewed in time. Once that has failed
// it has for good: nobody who passes over one error takes what was copied since for sound.
class Hold {
 public:
  explicit Hold(Connection* connection) : connection_(connection) {}
  ~Hold() { (void)HoldFiles(*connection_, false, kAnswerTimeoutNs); }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

  // Whether another holds them: an error that says so.
  static Result<void> Try(Connection* connection) { return Hold(connection).Extend(); }
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
    if (!failed_ && clock_.MonotonicNs() - asked_ns_ < kRenewNs) return {};
    return Confirm();
  }
  // That it has not ended since it began, by the daemon's word of now. Errors: likewise.
  Result<void> Confirm() {
    if (!failed_) {
      if (auto held = Prolong(); !held) failed_ = held.error();
    }
    return failed_ ? Result<void>(std::unexpected(*failed_)) : Result<void>();
  }

 private:
  Result<void> Prolong() {
    const int64_t before_ns = asked_ns_;
    if (clock_.MonotonicNs() - before_ns >= kHoldNs) return Lapsed();
    if (auto extended = Extend(); !extended) return extended;
    return clock_.MonotonicNs() - before_ns >= kHoldNs ? Lapsed() : Result<void>();
  }
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
  std::optional<Error> failed_;
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
    if (auto dropped = DropRecycled(); !dropped) return dropped;
    return hold_->Confirm();
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
      auto copied = Copy(folder + "/" + entry.name, range);
      // One that nothing lived in any more may have been made into the next segment since it was
      // listed.
      if (!copied && copied.error().code != ErrorCode::kNotFound) return copied;
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

// Bytes of all segments in a data directory.
using SegmentSizes = std::map<LogSegment, uint64_t>;

Result<SegmentSizes> SegmentsIn(const std::string& data) {
  const auto root = OpenFolder(data);
  if (!root) return std::unexpected(root.error());
  const auto folders = (*root)->List();
  if (!folders) return std::unexpected(folders.error());
  SegmentSizes sizes;
  for (const DirectoryEntry& folder : *folders) {
    const auto log = LogOfFolder(folder.name);
    if (!log) continue;
    const auto disk = OpenFolder(data + "/" + folder.name);
    if (!disk) return std::unexpected(disk.error());
    const auto files = (*disk)->List();
    if (!files) return std::unexpected(files.error());
    for (const DirectoryEntry& file : *files) {
      if (const auto number = SegmentNumber(file.name)) sizes[{*log, *number}] = file.size_bytes;
    }
  }
  return sizes;
}

// That the records which an extent of nodes names lie in segments that are there.
Result<void> VerifyOrigins(std::span<const std::byte> extent, uint32_t count,
                           const SegmentSizes& segments, const std::string& place) {
  size_t at = sizeof(ExtentHeader);
  for (uint32_t i = 0; i < count; ++i) {
    SavedNode node;
    if (extent.size() - at < sizeof(node)) {
      return Fail(ErrorCode::kCorrupt, place + ": an observation is cut short");
    }
    std::memcpy(&node, extent.data() + at, sizeof(node));
    if (node.saved_bytes < sizeof(node) || node.saved_bytes > extent.size() - at) {
      return Fail(ErrorCode::kCorrupt, place + ": an observation has no sound length");
    }
    at += node.saved_bytes;
    if (node.record_words == 0) continue;
    const LogPosition position = PositionOf(node.origin);
    const auto segment = segments.find(SegmentAt(node.origin));
    if (segment != segments.end() &&
        OffsetOf(position) + uint64_t{node.record_words} * 8 <= segment->second) {
      continue;
    }
    return Fail(ErrorCode::kCorrupt,
                place + " names a record at offset " + std::to_string(OffsetOf(position)) + " of " +
                    LogFolder(LogOf(node.origin)) + "/" + SegmentName(SegmentOf(position)) +
                    ", which was not copied: try again, and see whether the data directory has it");
  }
  return {};
}

// Every extent of a checkpoint file against its checksum, that the last one is the last, and that
// what they name is there.
Result<void> VerifyCheckpoint(const std::string& folder, uint32_t round, uint64_t bytes,
                              const SegmentSizes& segments) {
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
    const uint32_t crc = Crc32c(extent.subspan(kExtentCrcOffset + sizeof(uint32_t)),
                                Crc32c(extent.first(kExtentCrcOffset)));
    if (crc != header.crc) {
      return Fail(ErrorCode::kCorrupt, reader.Place() + ": the checksum does not match");
    }
    if (header.kind == ExtentKind::kNodes) {
      auto verified = VerifyOrigins(extent, header.count, segments, reader.Place());
      if (!verified) return verified;
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
  const auto segments = SegmentsIn(data);
  if (!segments) return std::unexpected(segments.error());
  const auto entries = (*root)->List();
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    const auto log = LogOfFolder(entry.name);
    if (!log) continue;
    const std::string folder = data + "/" + entry.name;
    LogPosition from = 0;
    if (*log < (*manifest)->logs.size()) {
      from = (*manifest)->logs[*log].from;
      auto checked = VerifyCheckpoint(folder, (*manifest)->round,
                                      (*manifest)->logs[*log].file_bytes, *segments);
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
                                          : VerifyLog(**disk, *log, (*header)->instance, from,
                                                      *log < (*manifest)->logs.size());
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
  const fs::recursive_directory_iterator end;
  for (fs::recursive_directory_iterator at(directory, error); !error && at != end;
       at.increment(error)) {
    const bool is_folder = at->is_directory(error);
    if (error) break;
    if (!is_folder) continue;
    if (auto synced = SyncFolder(at->path().string()); !synced) return synced;
  }
  if (error) return FailErrno("list " + directory, error.value());
  if (auto synced = SyncFolder(directory); !synced) return synced;
  const auto plain = PlainPath(directory);
  if (!plain) return std::unexpected(plain.error());
  return SyncFolder(ParentOf(*plain));
}

// The directory of the daemon that the connection leads to, on this machine.
Result<std::string> FindData(const ServerOptions& server, const BackupOptions& options,
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
  const auto disk = OpenFolder(data);
  if (!disk) return std::unexpected(disk.error());
  const auto found = ReadInstance(**disk);
  if (!found) return std::unexpected(found.error());
  const auto wanted = ControlText(connection, "instance_id");
  if (!wanted) return std::unexpected(wanted.error());
  if (ToString(found->id) != *wanted) {
    return Fail(ErrorCode::kInvalidArgument,
                data + " is the data directory of another engramd: it has the instance " +
                    ToString(found->id) + ", and the one at " + server.address + " is " + *wanted +
                    ". Name its directory with --data, or the other one with --address");
  }
  return data;
}

// 1. The directory is the daemon's, the target is free, and nobody holds the files. 2. A
// checkpoint, so that little has to be replayed. 3. The daemon holds its files while they are
// copied. 4. The copy is flushed and verified. 5. Its list is written, which makes it a backup.
Result<BackupList> Backup(const ServerOptions& server, const BackupOptions& options,
                          Connection& connection) {
  const auto data = FindData(server, options, connection);
  if (!data) return std::unexpected(data.error());
  if (auto is_free = CheckIsFree(options.directory); !is_free) {
    return std::unexpected(is_free.error());
  }
  if (auto is_free = Hold::Try(&connection); !is_free) return std::unexpected(is_free.error());
  const auto saved = AwaitCheckpoint(connection);
  if (!saved) return std::unexpected(saved.error());
  if (!*saved) {
    return Fail(ErrorCode::kUnavailable, "the checkpoint failed; the daemon's log says why");
  }
  BackupList list;
  std::map<uint16_t, LogPosition> ends;
  const std::string copy = options.directory + "/" + kBackupDataFolder;
  {
    Hold hold(&connection);
    if (auto begun = hold.Begin(); !begun) return std::unexpected(begun.error());
    if (auto made = MakeFolder(copy); !made) return std::unexpected(made.error());
    list.made_unix_ns = SystemClock().WallNs();
    Copier copier(*data, copy, &hold);
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

// That in the end a directory beside it can take its place, in one step.
Result<void> CheckCanBeReplaced(const std::string& target) {
  struct statx found{};
  if (statx(AT_FDCWD, target.c_str(), AT_SYMLINK_NOFOLLOW, STATX_TYPE, &found) != 0) {
    if (errno == ENOENT) return {};
    return FailErrno("look at " + target, errno);
  }
  if (S_ISLNK(found.stx_mode)) {
    return Fail(ErrorCode::kInvalidArgument, target + " is a link: name what it leads to");
  }
  if (auto is_free = CheckIsFree(target); !is_free) return is_free;
  struct statx parent{};
  if (statx(AT_FDCWD, ParentOf(target).c_str(), 0, STATX_TYPE, &parent) != 0) {
    return FailErrno("look at " + ParentOf(target), errno);
  }
  const bool is_elsewhere =
      found.stx_dev_major != parent.stx_dev_major || found.stx_dev_minor != parent.stx_dev_minor;
  // A directory of the same file system may be mounted, too; not every kernel tells.
  if (is_elsewhere || (found.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0) {
    return Fail(ErrorCode::kInvalidArgument,
                target +
                    " is a mount point, which no directory can take the place of: name one "
                    "below it, like " +
                    target + "/data");
  }
  return {};
}

std::unexpected<Error> IsInTheWay(const std::string& beside) {
  return Fail(
      ErrorCode::kAlreadyExists,
      beside + " is in the way, maybe from a restore that was cut off: remove or rename it");
}

Result<void> CopyBack(const std::string& from, const BackupList& list, const std::string& to) {
  for (const BackupList::File& file : list.files) {
    const std::string path = to + "/" + file.name;
    if (auto made = MakeFolder(ParentOf(path)); !made) return made;
    const auto copied = CopyFile(from + file.name, path, {}, {});
    if (!copied) return std::unexpected(copied.error());
    if (copied->bytes != file.bytes || copied->crc != file.crc) return Differs(from + file.name);
  }
  return SyncAll(to);
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
  const auto target = PlainPath(options.directory);
  if (!target) return std::unexpected(target.error());
  if (auto checked = CheckCanBeReplaced(*target); !checked) {
    return std::unexpected(checked.error());
  }
  const std::string beside = *target + ".restoring";
  struct stat status{};
  if (lstat(beside.c_str(), &status) == 0) return IsInTheWay(beside);
  const std::string from = options.backup + "/" + kBackupDataFolder + "/";
  for (const BackupList::File& file : list->files) {
    const auto found = ChecksumFile(from + file.name);
    if (!found) return std::unexpected(found.error());
    if (found->bytes != file.bytes || found->crc != file.crc) return Differs(from + file.name);
  }
  if (auto made = MakeFolder(ParentOf(*target)); !made) return std::unexpected(made.error());
  if (mkdir(beside.c_str(), 0700) != 0) {
    if (errno == EEXIST) return IsInTheWay(beside);
    return FailErrno("make directory " + beside, errno);
  }
  auto copied = CopyBack(from, *list, beside);
  // Takes the place of an empty directory too.
  if (copied && std::rename(beside.c_str(), target->c_str()) != 0) {
    copied = FailErrno("rename " + beside + " to " + *target, errno);
  }
  if (!copied) {
    fs::remove_all(beside, error);  // It is this restore's own.
    return std::unexpected(copied.error());
  }
  if (auto synced = SyncFolder(ParentOf(*target)); !synced) return std::unexpected(synced.error());
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
