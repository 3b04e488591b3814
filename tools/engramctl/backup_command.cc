// engramctl backup and restore.

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
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
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/data_directory.h"
#include "src/core/log_files.h"
#include "tools/engramctl/backup_list.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/data_verifier.h"
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

// Whole backups are not made below a name that was mistyped.
Result<void> CheckParent(const std::string& plain) {
  const std::string parent = ParentOf(plain);
  std::error_code error;
  if (fs::is_directory(parent, error)) return {};
  return Fail(ErrorCode::kNotFound, parent + ", in which " + plain +
                                        " is to be made, is no directory: make it first, or name "
                                        "another place");
}

// Whether `path`, which need not be there, is `directory` or lies in it. Links are followed.
Result<bool> IsWithin(const std::string& path, const std::string& directory) {
  std::error_code error;
  const fs::path inner = fs::weakly_canonical(fs::absolute(path, error), error);
  if (error) return FailErrno("find " + path, error.value());
  const fs::path outer = fs::canonical(directory, error);
  if (error) return FailErrno("find " + directory, error.value());
  return std::ranges::mismatch(outer, inner).in1 == outer.end();
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

std::unexpected<Error> IsDamaged(const std::string& file, uint64_t offset,
                                 const std::string& text) {
  return Fail(ErrorCode::kCorrupt,
              "in the copy, " + file + ", offset " + std::to_string(offset) + ": " + text);
}

// From where the log is replayed.
LogPosition ReplayedFrom(const CheckpointManifest& manifest, uint16_t log) {
  if (log < manifest.logs.size()) return manifest.logs[log].from;
  const auto kept = std::ranges::find(manifest.kept, log, &CheckpointManifest::Kept::log);
  return kept != manifest.kept.end() ? kept->from : 0;
}

// That it is sound and, where a shard writes it, as long as it was.
Result<void> VerifyCopiedLog(const std::string& copy, uint16_t log,
                             const CheckpointManifest& manifest,
                             const std::map<uint16_t, LogPosition>& ends) {
  const std::string name = LogFolder(log);
  const std::string folder = copy + "/" + name;
  const bool is_written = log < manifest.logs.size();
  if (is_written) {
    const auto end = EndOfLog(folder, log, manifest.logs[log], {});
    if (!end) return std::unexpected(end.error());
    if (*end != ends.at(log)) {
      return IsDamaged(name + "/" + SegmentName(SegmentOf(*end)), OffsetOf(*end),
                       "the log ends here and not where it ended that was copied: try again, and "
                       "check this disk");
    }
  }
  const auto disk = OpenFolder(folder);
  if (!disk) return std::unexpected(disk.error());
  const auto header = FindSegmentHeader(**disk);
  if (!header) return std::unexpected(header.error());
  if (!*header) return {};
  const auto report = log == kVaultLog ? VerifyVault(**disk, (*header)->instance)
                                       : VerifyLog(**disk, log, (*header)->instance,
                                                   ReplayedFrom(manifest, log), is_written);
  if (!report) return std::unexpected(report.error());
  if (!report->damages.empty()) {
    const LogFinding& damage = report->damages[0];
    return IsDamaged(name + "/" + damage.file, damage.offset,
                     WithoutPlace(damage.text, folder + "/" + damage.file, damage.offset));
  }
  if (!report->mended.empty()) {
    const MendedBit& bit = report->mended[0];
    return IsDamaged(name + "/" + bit.file, bit.bit / 8, "a bit is turned");
  }
  return {};
}

// That a start would find all of it sound, and the logs as long as they were.
Result<void> VerifyCopy(const std::string& copy, const std::map<uint16_t, LogPosition>& ends) {
  const DataReport report = VerifyDataFiles(copy);
  if (!report.unread.empty()) return std::unexpected(report.unread[0]);
  if (!report.damages.empty()) {
    const LogFinding& damage = report.damages[0];
    return IsDamaged(damage.file, damage.offset, damage.text);
  }
  CHECK(report.manifest.has_value(), "it was copied first");
  const auto root = OpenFolder(copy);
  if (!root) return std::unexpected(root.error());
  const auto entries = (*root)->List();
  if (!entries) return std::unexpected(entries.error());
  for (const DirectoryEntry& entry : *entries) {
    const auto log = LogOfFolder(entry.name);
    if (!log) continue;
    auto verified = VerifyCopiedLog(copy, *log, *report.manifest, ends);
    if (!verified) return verified;
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

// Before anything is made.
Result<void> CheckTarget(const std::string& target, const std::string& data) {
  if (auto is_free = CheckIsFree(target); !is_free) return is_free;
  const auto plain = PlainPath(target);
  if (!plain) return std::unexpected(plain.error());
  if (auto checked = CheckParent(*plain); !checked) return checked;
  const auto is_within = IsWithin(target, data);
  if (!is_within) return std::unexpected(is_within.error());
  if (!*is_within) return {};
  return Fail(ErrorCode::kInvalidArgument,
              target + " lies in the data directory " + data +
                  " that is to be backed up: name a place outside of it, best on another disk");
}

// 1. The daemon holds its files while they are copied. 2. The copy is flushed and verified. 3. Its
// list is written, which makes it a backup.
Result<BackupList> CopyHeld(const std::string& data, const std::string& target,
                            Connection& connection) {
  BackupList list;
  std::map<uint16_t, LogPosition> ends;
  const std::string copy = target + "/" + kBackupDataFolder;
  {
    Hold hold(&connection);
    if (auto begun = hold.Begin(); !begun) return std::unexpected(begun.error());
    if (auto made = MakeFolder(copy); !made) return std::unexpected(made.error());
    list.made_unix_ns = SystemClock().WallNs();
    Copier copier(data, copy, &hold);
    if (auto copied = copier.CopyAll(); !copied) return std::unexpected(copied.error());
    list.files = std::move(copier.files());
    ends = copier.ends();
  }
  if (auto synced = SyncAll(target); !synced) return std::unexpected(synced.error());
  if (auto sound = VerifyCopy(copy, ends); !sound) return std::unexpected(sound.error());
  if (auto written = WriteTextFile(target + "/" + kBackupListName, PrintBackupList(list));
      !written) {
    return std::unexpected(written.error());
  }
  if (auto synced = SyncFolder(target); !synced) return std::unexpected(synced.error());
  return list;
}

// What was made of a backup goes, and the message says what is to be done.
Error GiveUp(Error error, const std::string& data, const std::string& target, bool made_target) {
  std::error_code failed;
  if (made_target) {
    fs::remove_all(target, failed);
  } else {
    for (const fs::path& entry : fs::directory_iterator(target, failed)) {
      if (!failed) fs::remove_all(entry, failed);  // It was empty.
    }
  }
  error.message += failed ? ". What stays in " + target + " is no backup: remove it"
                          : ". No backup was made, and nothing of it stays in " + target;
  if (error.code == ErrorCode::kCorrupt) {
    error.message += ". What can be done: `engramctl log verify " + data +
                     "` names all that is damaged there; `engramctl export SPACE` writes what can "
                     "be read of a space while the daemon serves, and names what cannot. Then "
                     "restore an earlier backup, or start engramd on a new directory and store "
                     "there what was exported";
  }
  return error;
}

// 1. The directory is the daemon's, the target is free, and nobody holds the files. 2. A
// checkpoint, so that little has to be replayed. 3. The copy.
Result<BackupList> Backup(const ServerOptions& server, const BackupOptions& options,
                          Connection& connection) {
  const auto data = FindData(server, options, connection);
  if (!data) return std::unexpected(data.error());
  if (auto checked = CheckTarget(options.directory, *data); !checked) {
    return std::unexpected(checked.error());
  }
  if (auto is_free = Hold::Try(&connection); !is_free) return std::unexpected(is_free.error());
  const auto saved = AwaitCheckpoint(connection);
  if (!saved) return std::unexpected(saved.error());
  if (!*saved) {
    return Fail(ErrorCode::kUnavailable, "the checkpoint failed; the daemon's log says why");
  }
  std::error_code error;
  const bool made_target = !fs::exists(options.directory, error);
  auto list = CopyHeld(*data, options.directory, connection);
  if (list) return list;
  return std::unexpected(GiveUp(list.error(), *data, options.directory, made_target));
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
    return Fail(ErrorCode::kCorrupt, directory + "/" + kBackupListName +
                                         ", offset 0: the checksum in it is not that of its lines. "
                                         "Use another backup");
  }
  return *std::move(list);
}

// That what was read is what the list says.
Result<void> CheckIsSame(const std::string& path, const CopiedFile& found,
                         const BackupList::File& file) {
  if (found.bytes == file.bytes && found.crc == file.crc) return {};
  const std::string why = found.bytes == file.bytes
                              ? ", offset 0: its checksum is not that of what was backed up"
                              : ", offset " + std::to_string(std::min(found.bytes, file.bytes)) +
                                    ": it has " + std::to_string(found.bytes) +
                                    " bytes, and what was backed up " + std::to_string(file.bytes);
  return Fail(ErrorCode::kCorrupt, path + why + ". Use another backup");
}

Result<void> CheckIsOutside(const std::string& target, const std::string& backup) {
  if (auto checked = CheckParent(target); !checked) return checked;
  const auto is_within = IsWithin(target, backup);
  if (!is_within) return std::unexpected(is_within.error());
  if (!*is_within) return {};
  return Fail(ErrorCode::kInvalidArgument,
              target + " lies in the backup " + backup + ": name a place outside of it");
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
    if (auto same = CheckIsSame(from + file.name, *copied, file); !same) return same;
  }
  return SyncAll(to);
}

// 1. Every file of the backup is read and compared with the list, before anything is written.
// 2. All is copied into a folder beside the target and compared again. 3. That folder becomes the
// target in one step.
Result<BackupList> Restore(const RestoreOptions& options) {
  std::error_code error;
  auto list = ReadList(options.backup);
  if (!list) return list;
  const auto target = PlainPath(options.directory);
  if (!target) return std::unexpected(target.error());
  if (auto checked = CheckIsOutside(*target, options.backup); !checked) {
    return std::unexpected(checked.error());
  }
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
    if (auto same = CheckIsSame(from + file.name, *found, file); !same) {
      return std::unexpected(same.error());
    }
  }
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
