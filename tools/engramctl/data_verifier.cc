#include "tools/engramctl/data_verifier.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <utility>

#include "index/checkpoint/checkpoint_file.h"
#include "index/checkpoint/live_table.h"
#include "index/checkpoint/space_extent.h"
#include "index/log/replay_guard.h"
#include "src/core/log_files.h"
#include "src/missing_checkpoint.h"
#include "src/replay_crashes.h"

namespace engram {

namespace {

constexpr int kTries = 5;

// Records that live in one segment, of which something is not there.
struct Lost {
  uint64_t offset = 0;  // of the first one
  uint64_t records = 0;
  std::string named_by;
};

// The last write is of whole pages.
uint64_t WrittenBytes(uint64_t bytes) {
  return (bytes + kLogPageBytes - 1) / kLogPageBytes * kLogPageBytes;
}

class DataVerifier {
 public:
  explicit DataVerifier(const std::string& data) : data_(data) {}

  DataReport Run();

 private:
  void CheckInstance();
  void CheckCheckpoint();
  void CheckNeverHadOne();
  void CheckSavedLog(uint16_t log);
  void CheckSavedFile(Disk& folder, const std::string& file, uint64_t bytes);
  void CheckPadding(const std::string& file, uint64_t from, uint64_t to);
  Result<void> ReadExtents(CheckpointReader& reader, const std::string& file);
  void CheckOrigins(std::span<const std::byte> extent, const std::string& file, uint64_t offset);
  void CheckOrigin(const SavedNode& node, const std::string& named_by);
  void ReportLost();
  void CheckQuarantine();
  void CheckReplayCrashes();

  bool Has(const std::string& name) const { return files_.contains(name); }
  // Those of a folder of the directory; none where it cannot be read, which is noted.
  std::vector<DirectoryEntry> FilesOf(const std::string& folder);
  void AddDamage(const std::string& file, uint64_t offset, std::string text);
  void AddRest(const std::string& file, uint64_t offset, std::string text);
  void AddError(const std::string& file, uint64_t offset, const Error& error);

  const std::string data_;
  std::unique_ptr<Disk> root_;
  std::map<std::string, uint64_t> files_;  // of the directory, with their bytes
  std::map<LogSegment, uint64_t> segments_;
  std::map<LogSegment, Lost> lost_;
  DataReport report_;
};

DataReport DataVerifier::Run() {
  auto root = OpenFolder(data_);
  if (!root) {
    AddError("", 0, root.error());
    return std::move(report_);
  }
  root_ = *std::move(root);
  const auto manifest = ReadManifest(*root_);
  for (const DirectoryEntry& entry : FilesOf("")) files_[entry.name] = entry.size_bytes;
  CheckInstance();
  if (manifest) {
    report_.manifest = *manifest;
    CheckCheckpoint();
  } else {
    AddError(kCheckpointManifestName, 0, manifest.error());
  }
  CheckQuarantine();
  CheckReplayCrashes();
  return std::move(report_);
}

void DataVerifier::CheckInstance() {
  const auto instance = ReadInstance(*root_);
  if (instance) return;
  if (instance.error().code == ErrorCode::kNotFound) {
    AddDamage(kInstanceFileName, 0, "is missing: restore it from a backup");
  } else {
    AddError(kInstanceFileName, 0, instance.error());
  }
}

void DataVerifier::CheckCheckpoint() {
  if (!report_.manifest) return CheckNeverHadOne();
  for (const auto& [name, bytes] : files_) {
    const auto log = LogOfFolder(name);
    if (!log) continue;
    for (const DirectoryEntry& file : FilesOf(name)) {
      if (const auto number = SegmentNumber(file.name))
        segments_[{*log, *number}] = file.size_bytes;
    }
  }
  const auto logs = static_cast<uint16_t>(report_.manifest->logs.size());
  for (uint16_t log = 0; log < logs; ++log) CheckSavedLog(log);
  ReportLost();
}

// Files of a checkpoint alone are no damage: a first round that was cut off leaves them, too.
void DataVerifier::CheckNeverHadOne() {
  const auto open = [this](const std::string& folder, const DiskOptions&, std::string*) {
    return OpenFolder(data_ + "/" + folder);
  };
  if (auto whole = CheckLogsAreWhole(*root_, open); !whole) {
    return AddError(kCheckpointManifestName, 0, whole.error());
  }
  for (const auto& [name, bytes] : files_) {
    if (!LogOfFolder(name)) continue;
    for (const DirectoryEntry& file : FilesOf(name)) {
      if (!CheckpointRound(file.name)) continue;
      return AddRest(kCheckpointManifestName, 0,
                     "is missing, but " + name + "/" + file.name +
                         " is there; a start reads the logs, which have all");
    }
  }
}

void DataVerifier::CheckSavedLog(uint16_t log) {
  const std::string folder = LogFolder(log);
  const std::string file = folder + "/" + CheckpointName(report_.manifest->round);
  if (!Has(folder)) {
    return AddDamage(folder, 0, "is missing, and CHECKPOINT names it: restore a backup");
  }
  const auto disk = OpenFolder(data_ + "/" + folder);
  if (!disk) return AddError(folder, 0, disk.error());
  CheckSavedFile(**disk, file, report_.manifest->logs[log].file_bytes);
}

void DataVerifier::CheckSavedFile(Disk& folder, const std::string& file, uint64_t bytes) {
  const auto found = folder.List();
  if (!found) return AddError(file, 0, found.error());
  const std::string name = CheckpointName(report_.manifest->round);
  const auto entry = std::ranges::find(*found, name, &DirectoryEntry::name);
  if (entry == found->end()) {
    return AddDamage(file, 0, "is missing, and CHECKPOINT names it: restore a backup");
  }
  if (entry->size_bytes < bytes || entry->size_bytes > WrittenBytes(bytes)) {
    AddDamage(file, std::min(entry->size_bytes, WrittenBytes(bytes)),
              "has " + std::to_string(entry->size_bytes) + " bytes, not the " +
                  std::to_string(bytes) + " that CHECKPOINT says");
    if (entry->size_bytes < bytes) return;
  }
  CheckPadding(file, bytes, std::min(entry->size_bytes, WrittenBytes(bytes)));
  CheckpointReader reader(&folder);
  if (auto opened = reader.Open(name, bytes); !opened) return AddError(file, 0, opened.error());
  if (auto read = ReadExtents(reader, file); !read) AddError(file, reader.offset(), read.error());
}

void DataVerifier::CheckPadding(const std::string& file, uint64_t from, uint64_t to) {
  std::ifstream stream(data_ + "/" + file, std::ios::binary);
  stream.seekg(static_cast<std::streamoff>(from));
  for (uint64_t at = from; at < to; ++at) {
    const int byte = stream.get();
    if (!stream) return;  // It may not be read, which its reader says.
    if (byte != 0) return AddDamage(file, at, "is not zero behind the end");
  }
}

// Behind an extent that has a length all others are read too.
Result<void> DataVerifier::ReadExtents(CheckpointReader& reader, const std::string& file) {
  ExtentKind last{};
  for (;;) {
    std::span<const std::byte> extent;
    const auto step = reader.Next(&extent);
    if (!step) return std::unexpected(step.error());
    if (*step == CheckpointReader::Step::kPending) continue;
    if (*step == CheckpointReader::Step::kEnd) break;
    ExtentHeader header;
    if (!OpenShardExtent(extent, &header)) {
      AddDamage(file, reader.offset(), "the checksum of what lies here does not match");
    } else if (header.kind == ExtentKind::kNodes) {
      CheckOrigins(extent, file, reader.offset());
    }
    last = header.kind;
  }
  if (last != kShardEndExtent) AddDamage(file, reader.offset(), "nothing says that it ends here");
  return {};
}

void DataVerifier::CheckOrigins(std::span<const std::byte> extent, const std::string& file,
                                uint64_t offset) {
  ExtentHeader header;
  std::memcpy(&header, extent.data(), sizeof(header));
  size_t at = sizeof(header);
  for (uint32_t i = 0; i < header.count; ++i) {
    SavedNode node{};
    const bool has_room = extent.size() - at >= sizeof(node);
    if (has_room) std::memcpy(&node, extent.data() + at, sizeof(node));
    if (node.saved_bytes < sizeof(node) || node.saved_bytes > extent.size() - at) {
      return AddDamage(file, offset + at, "an observation here has no sound length");
    }
    if (node.record_words != 0) {
      CheckOrigin(node, file + " at offset " + std::to_string(offset + at));
    }
    at += node.saved_bytes;
  }
}

void DataVerifier::CheckOrigin(const SavedNode& node, const std::string& named_by) {
  const LogSegment segment = SegmentAt(node.origin);
  const uint64_t offset = OffsetOf(PositionOf(node.origin));
  const auto found = segments_.find(segment);
  if (found != segments_.end() && offset + uint64_t{node.record_words} * 8 <= found->second) return;
  Lost& lost = lost_[segment];
  if (lost.records == 0 || offset < lost.offset) {
    lost.offset = offset;
    lost.named_by = named_by;
  }
  ++lost.records;
}

void DataVerifier::ReportLost() {
  for (const auto& [segment, lost] : lost_) {
    const auto found = segments_.find(segment);
    const bool is_there = found != segments_.end();
    AddDamage(LogFolder(segment.log) + "/" + SegmentName(segment.number),
              is_there ? found->second : 0,
              std::string(is_there ? "ends here" : "is missing") + ", and " +
                  std::to_string(lost.records) + " records that live lie in it, the first one at " +
                  "its offset " + std::to_string(lost.offset) + ", as " + lost.named_by +
                  " says: restore a backup");
  }
}

void DataVerifier::CheckQuarantine() {
  if (!Has(kQuarantineFolder)) return;
  const auto disk = OpenFolder(data_ + "/" + kQuarantineFolder);
  if (!disk) return AddError(kQuarantineFolder, 0, disk.error());
  for (const DirectoryEntry& entry : FilesOf(kQuarantineFolder)) {
    const auto address = QuarantinedAddress(entry.name);
    if (!address) continue;
    const std::string file = std::string(kQuarantineFolder) + "/" + entry.name;
    const auto content = ReadWholeFile(**disk, entry.name, kMaxQuarantineFileBytes);
    if (!content) {
      AddError(file, 0, content.error());
      continue;
    }
    const auto kept = ParseQuarantined(*content);
    if (!kept) {
      AddError(file, 0, kept.error());
    } else if (kept->address != *address) {
      AddDamage(file, 0, "it holds the record of another place than its name says");
    }
  }
}

void DataVerifier::CheckReplayCrashes() {
  const auto check = CheckReplayCrashLines(*root_);
  if (!check) return AddError(kReplayCrashesName, 0, check.error());
  for (const uint64_t offset : check->damaged) {
    AddDamage(kReplayCrashesName, offset, "the line that begins here is not what was written");
  }
  for (const uint64_t offset : check->cut_off) {
    AddRest(kReplayCrashesName, offset, "of a line that was cut off");
  }
}

std::vector<DirectoryEntry> DataVerifier::FilesOf(const std::string& folder) {
  const auto disk = OpenFolder(folder.empty() ? data_ : data_ + "/" + folder);
  auto files = disk ? (*disk)->List() : std::unexpected(disk.error());
  if (files) return *std::move(files);
  AddError(folder, 0, files.error());
  return {};
}

void DataVerifier::AddDamage(const std::string& file, uint64_t offset, std::string text) {
  report_.damages.push_back({.file = file, .offset = offset, .bytes = 0, .text = std::move(text)});
}

void DataVerifier::AddRest(const std::string& file, uint64_t offset, std::string text) {
  report_.rests.push_back({.file = file, .offset = offset, .bytes = 0, .text = std::move(text)});
}

// Twice the same is said once.
void DataVerifier::AddError(const std::string& file, uint64_t offset, const Error& error) {
  if (!IsUnread(error)) {
    return AddDamage(file, offset, WithoutPlace(error.message, data_ + "/" + file, offset));
  }
  if (std::ranges::find(report_.unread, error.message, &Error::message) == report_.unread.end()) {
    report_.unread.push_back(error);
  }
}

}  // namespace

Result<std::unique_ptr<Disk>> OpenFolder(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (error == std::errc::permission_denied) return FailErrno("look at " + path, error.value());
  if (status.type() != std::filesystem::file_type::directory) {
    return Fail(ErrorCode::kNotFound, path + " is no directory");
  }
  return CreatePosixDisk(path,
                         {.max_in_flight = 64, .max_open_files = 4, .registered_buffers = {}});
}

bool IsInUse(const std::string& directory) {
  std::vector<std::string> inodes;
  for (const char* name : {"/LOCK", "/../LOCK"}) {
    struct stat status{};
    if (stat((directory + name).c_str(), &status) == 0) {
      inodes.push_back(":" + std::to_string(status.st_ino) + " ");
    }
  }
  std::ifstream locks("/proc/locks");
  for (std::string line; std::getline(locks, line);) {
    if (line.find("FLOCK") == std::string::npos) continue;
    const auto names = [&](const std::string& inode) {
      return line.find(inode) != std::string::npos;
    };
    if (std::ranges::any_of(inodes, names)) return true;
  }
  return false;
}

LogInstance LogInstanceOf(const InstanceId& id) {
  LogInstance instance{};
  std::copy_n(id.begin(), instance.size(), instance.begin());
  return instance;
}

bool IsUnread(const Error& error) {
  return error.code == ErrorCode::kPermissionDenied || error.code == ErrorCode::kUnavailable ||
         error.code == ErrorCode::kResourceExhausted;
}

std::string WithoutPlace(const std::string& message, const std::string& path, uint64_t offset) {
  const std::string number = "offset " + std::to_string(offset) + ": ";
  for (const std::string& place : {path + ", " + number, path + " at " + number, path + " "}) {
    if (message.starts_with(place)) return message.substr(place.size());
  }
  return message;
}

DataReport VerifyDataFiles(const std::string& data) {
  for (int tries = 1;; ++tries) {
    DataReport report = DataVerifier(data).Run();
    if (report.damages.empty()) return report;
    const auto disk = OpenFolder(data);
    if (!disk) return report;
    const auto now = ReadManifest(**disk);
    if (!now || *now == report.manifest) return report;
    if (tries < kTries) continue;
    report.damages.clear();
    report.unread.push_back({ErrorCode::kUnavailable,
                             "the daemon on " + data +
                                 " has replaced its checkpoint each time that it was read: try "
                                 "again when it takes less"});
    return report;
  }
}

}  // namespace engram
