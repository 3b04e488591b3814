#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "index/log/log_format.h"
#include "index/log/log_reader.h"
#include "index/log/log_verifier.h"
#include "index/log/vault_verifier.h"
#include "src/checkpoint_manifest.h"
#include "src/core/attributes.h"
#include "src/core/clock.h"
#include "src/core/commit_stamp.h"
#include "src/core/crc32c.h"
#include "src/core/data_directory.h"
#include "src/core/disk.h"
#include "src/core/log_files.h"
#include "src/core/refusal_reason.h"
#include "src/core/vector_dtype.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/data_verifier.h"
#include "tools/engramctl/feed_loop.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

constexpr size_t kPayloadShown = 48;  // bytes
constexpr int kVerifyTries = 5;
constexpr int64_t kVerifyAgainNs = 20 * kNanosPerMilli;
// Something could not be looked at; nothing that could is damaged.
constexpr int kExitUnread = 2;

// One log, and whose it is.
struct FoundLog {
  std::string path;
  std::string data;  // the directory that it belongs to; empty: not known
  uint16_t log = 0;
  LogInstance instance{};
  LogPosition replay_from = 0;  // by the latest checkpoint: before that segments may be missing
  bool is_needed = false;       // the segment there is not
};

// ---------------------------------------------------------------------------------------------
// Finding logs

// Where no sound checkpoint says from where a log is replayed: the first of the segments at its end
// that follow each other.
Result<LogPosition> LikelyReplay(const std::string& folder) {
  const auto disk = OpenFolder(folder);
  if (!disk) return std::unexpected(disk.error());
  const auto entries = (*disk)->List();
  if (!entries) return std::unexpected(entries.error());
  uint32_t first = 0;
  uint32_t last = 0;
  for (const DirectoryEntry& entry : *entries) {  // by name, which is by number
    const auto number = SegmentNumber(entry.name);
    if (!number) continue;
    if (*number != last + 1) first = *number;
    last = *number;
  }
  return MakeLogPosition(first, 0);
}

// From where a log of the data directory is replayed.
Result<void> NoteReplay(const std::string& data, FoundLog* folder) {
  const auto root = OpenFolder(data);
  if (!root) return std::unexpected(root.error());
  const auto manifest = ReadManifest(**root);
  if (!manifest && manifest.error().code == ErrorCode::kCorrupt) {
    const auto from = LikelyReplay(folder->path);
    if (!from) return std::unexpected(from.error());
    folder->replay_from = *from;
    return {};
  }
  if (!manifest) return std::unexpected(manifest.error());
  if (!*manifest) return {};
  if (folder->log < (*manifest)->logs.size()) {
    folder->replay_from = (*manifest)->logs[folder->log].from;
    folder->is_needed = true;
  }
  for (const CheckpointManifest::Kept& kept : (*manifest)->kept) {
    if (kept.log == folder->log) folder->replay_from = kept.from;
  }
  return {};
}

bool IsDataDirectory(const std::vector<DirectoryEntry>& entries) {
  return std::ranges::any_of(entries, [](const DirectoryEntry& entry) {
    return entry.name == kInstanceFileName || entry.name == kCheckpointManifestName ||
           LogOfFolder(entry.name);
  });
}

// Where INSTANCE cannot tell, a segment does.
Result<LogInstance> FindInstance(Disk& root, const std::string& folder) {
  const auto instance = ReadInstance(root);
  if (instance) return LogInstanceOf(instance->id);
  if (IsUnread(instance.error())) return std::unexpected(instance.error());
  const auto disk = OpenFolder(folder);
  if (!disk) return std::unexpected(disk.error());
  const auto header = FindSegmentHeader(**disk);
  if (!header) return std::unexpected(header.error());
  return *header ? (*header)->instance : LogInstance{};
}

Result<std::vector<FoundLog>> FindLogsIn(Disk& root, const std::vector<DirectoryEntry>& entries) {
  std::vector<FoundLog> logs;
  for (const DirectoryEntry& entry : entries) {
    const auto log = LogOfFolder(entry.name);
    if (!log) continue;
    FoundLog folder = {
        .path = root.directory() + "/" + entry.name, .data = root.directory(), .log = *log};
    const auto instance = FindInstance(root, folder.path);
    if (!instance) return std::unexpected(instance.error());
    folder.instance = *instance;
    if (auto noted = NoteReplay(folder.data, &folder); !noted) {
      return std::unexpected(noted.error());
    }
    logs.push_back(std::move(folder));
  }
  std::ranges::sort(logs, {}, &FoundLog::log);
  return logs;
}

// Without a sound segment its name and the directory that it lies in tell whose it is.
Result<FoundLog> FindLogAt(Disk& disk) {
  FoundLog folder{.path = disk.directory(), .data = "", .log = 0};
  std::error_code error;
  const auto whole = std::filesystem::canonical(folder.path, error);
  const std::string parent = folder.path + "/..";
  if (std::filesystem::exists(parent + "/" + kInstanceFileName, error)) folder.data = parent;
  const auto header = FindSegmentHeader(disk);
  if (!header) return std::unexpected(header.error());
  const auto log = *header ? (*header)->log : LogOfFolder(whole.filename().string());
  if (!log || (!*header && folder.data.empty())) {
    return Fail(ErrorCode::kNotFound, folder.path + " is neither a data directory (it has no " +
                                          kInstanceFileName +
                                          ") nor the folder of a log (it has no sound segment)");
  }
  folder.log = *log;
  if (*header) folder.instance = (*header)->instance;
  if (folder.data.empty()) return folder;
  if (auto noted = NoteReplay(folder.data, &folder); !noted) return std::unexpected(noted.error());
  return folder;
}

// `directory` is a data directory, which `is_data` then says, or the folder of one log.
Result<std::vector<FoundLog>> FindLogs(const std::string& directory, bool* is_data) {
  const auto disk = OpenFolder(directory);
  if (!disk) {
    Error error = disk.error();
    if (error.code == ErrorCode::kNotFound) {
      error.message += ": name a data directory, or the folder of one of its logs";
    }
    return std::unexpected(std::move(error));
  }
  const auto entries = (*disk)->List();
  if (!entries) return std::unexpected(entries.error());
  *is_data = IsDataDirectory(*entries);
  if (*is_data) return FindLogsIn(**disk, *entries);
  auto folder = FindLogAt(**disk);
  if (!folder) return std::unexpected(folder.error());
  return std::vector<FoundLog>{*std::move(folder)};
}

// ---------------------------------------------------------------------------------------------
// Words

std::string PositionText(LogPosition position) {
  return std::to_string(SegmentOf(position)) + ":" + std::to_string(OffsetOf(position));
}

std::string HexText(uint64_t number) {
  std::array<char, 17> digits{};
  std::snprintf(digits.data(), digits.size(), "%016llx", static_cast<unsigned long long>(number));
  return digits.data();
}

// RFC 3339 in UTC, with nanoseconds.
std::string TimeText(int64_t unix_ns) {
  int64_t seconds = unix_ns / kNanosPerSecond;
  int64_t nanos = unix_ns % kNanosPerSecond;
  if (nanos < 0) {
    nanos += kNanosPerSecond;
    --seconds;
  }
  const std::time_t time = seconds;
  std::tm calendar{};
  if (gmtime_r(&time, &calendar) == nullptr) return std::to_string(unix_ns);
  std::array<char, 64> text{};
  const size_t length = std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%S", &calendar);
  std::snprintf(text.data() + length, text.size() - length, ".%09dZ", static_cast<int>(nanos));
  return text.data();
}

// What is no printable ASCII as \xNN, and quotes and backslashes escaped.
std::string Escaped(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes) {
    const auto code = static_cast<unsigned char>(byte);
    if (byte == '"' || byte == '\\') {
      text += {'\\', byte};
    } else if (code >= 0x20 && code < 0x7f) {
      text += byte;
    } else {
      text += {'\\', 'x', "0123456789abcdef"[code >> 4], "0123456789abcdef"[code & 15]};
    }
  }
  return text;
}

std::string_view KindText(LogRecordKind kind) {
  switch (kind) {
    case LogRecordKind::kUpsert:
      return "upsert";
    case LogRecordKind::kDelete:
      return "delete";
    case LogRecordKind::kSkip:
      return "skip";
    case LogRecordKind::kSuppress:
      return "suppress";
    case LogRecordKind::kRestore:
      return "restore";
    case LogRecordKind::kSpace:
      return "space";
    case LogRecordKind::kDropSpace:
      return "drop-space";
  }
  return "";
}

std::string PayloadText(const LogRecord& record) {
  const auto shown = record.payload.first(std::min(record.payload.size(), kPayloadShown));
  return Escaped({reinterpret_cast<const char*>(shown.data()), shown.size()});
}

// KEY=VALUE each, as `recall --filter` takes them.
std::vector<std::string> AttributeTexts(const LogRecord& record) {
  std::vector<std::string> texts;
  Attribute attribute;
  for (AttributeReader reader(record.attributes); reader.Next(&attribute);) {
    texts.push_back((attribute.key == kTagKey ? "tag" : Escaped(attribute.key)) + "=" +
                    Escaped(attribute.value));
  }
  return texts;
}

std::vector<float> Numbers(const LogRecord& record) {
  std::vector<float> numbers(record.dimension);
  DecodeVector(record.dtype, record.dimension, record.scale, record.vector.data(), numbers.data());
  return numbers;
}

std::string JsonLine(const nlohmann::json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// ---------------------------------------------------------------------------------------------
// log dump

void PrintText(const FoundLog& folder, const LogEntry& entry, bool vectors) {
  const LogRecord& record = entry.record;
  std::string line = std::to_string(folder.log) + "/" + PositionText(PositionOf(entry.address)) +
                     " " + TimeText(UnixNsOf(record.stamp)) + " ";
  line += record.session.value() == 0
              ? "- -"
              : HexText(record.session.value()) + " " + std::to_string(record.sequence);
  line += " " + std::string(KindText(record.kind)) + " " + Escaped(record.space);
  if (IsObservation(record.kind)) line += " \"" + Escaped(record.id) + "\"";
  if (record.kind == LogRecordKind::kSkip) {
    line += " " + std::string(DescribeRefusal(record.skip_reason).name);
  }
  if (record.dtype != VectorDtype::kNone) {
    line += " " + std::string(DtypeName(record.dtype)) + "x" + std::to_string(record.dimension);
  }
  for (const std::string& attribute : AttributeTexts(record)) line += " " + attribute;
  if (!record.payload.empty()) {
    line += " " + std::to_string(record.payload.size()) + " bytes \"" + PayloadText(record) + "\"";
  }
  if (vectors && record.dtype != VectorDtype::kNone) {
    line += " [";
    std::array<char, 32> text;
    for (const float number : Numbers(record)) {
      const auto [end, error] = std::to_chars(text.data(), text.data() + text.size(), number);
      if (line.back() != '[') line += ' ';
      line.append(text.data(), end);
    }
    line += "]";
  }
  std::printf("%s\n", line.c_str());
}

void PrintJson(const FoundLog& folder, const LogEntry& entry, bool vectors) {
  const LogRecord& record = entry.record;
  nlohmann::json json = {
      {"log", folder.log},           {"position", PositionText(PositionOf(entry.address))},
      {"bytes", entry.record_bytes}, {"epoch", entry.epoch},
      {"stamp", record.stamp},       {"time", TimeText(UnixNsOf(record.stamp))},
      {"when_ns", record.when_ns},   {"kind", KindText(record.kind)},
      {"space", record.space}};
  if (record.session.value() != 0) {
    json["session"] = HexText(record.session.value());
    json["sequence"] = record.sequence;
  }
  if (IsObservation(record.kind)) json["id"] = record.id;
  if (record.kind == LogRecordKind::kSkip) {
    json["skip_reason"] = DescribeRefusal(record.skip_reason).name;
  }
  if (record.dtype != VectorDtype::kNone) {
    json["dtype"] = DtypeName(record.dtype);
    json["dimension"] = record.dimension;
    json["confidence"] = Rounded(record.confidence, 6);
    if (vectors) json["vector"] = Numbers(record);
  }
  if (!record.attributes.empty()) json["attributes"] = AttributeTexts(record);
  json["payload_bytes"] = record.payload.size();
  if (!record.payload.empty()) json["payload_begins"] = PayloadText(record);
  std::printf("%s\n", JsonLine(json).c_str());
}

void PrintEntry(const FoundLog& folder, const LogOptions& options, LogPosition from,
                const LogEntry& entry) {
  if (PositionOf(entry.address) < from) return;
  if (!options.space.empty() && entry.record.space != options.space) return;
  if (options.json) {
    PrintJson(folder, entry, options.vectors);
  } else {
    PrintText(folder, entry, options.vectors);
  }
}

int DumpVault(const FoundLog& folder, const LogOptions& options, LogPosition from) {
  const auto disk = OpenFolder(folder.path);
  if (!disk) return ReportError(disk.error());
  const auto report =
      VerifyVault(**disk, folder.instance,
                  [&](const LogRecord& record, LogAddress address, uint32_t record_bytes) {
                    LogEntry entry;
                    entry.record = record;
                    entry.address = address;
                    entry.record_bytes = record_bytes;
                    PrintEntry(folder, options, from, entry);
                  });
  if (!report) return ReportError(report.error());
  for (const LogFinding& damage : report->damages) {
    std::fprintf(stderr, "engramctl: %s/%s, offset %llu: %s\n", folder.path.c_str(),
                 damage.file.c_str(), static_cast<unsigned long long>(damage.offset),
                 damage.text.c_str());
  }
  return report->damages.empty() ? kExitOk : kExitFailed;
}

// Segments without gaps, from the one in which `from` lies.
int DumpRun(const FoundLog& folder, const LogOptions& options, LogPosition from,
            const LogReader::Range& run) {
  const auto disk = OpenFolder(folder.path);
  if (!disk) return ReportError(disk.error());
  LogReader reader(disk->get(), folder.log, folder.instance);
  if (const auto opened = reader.Open(0, 0, run); !opened) return ReportError(opened.error());
  LogEntry entry;
  for (;;) {
    const auto step = reader.Next(&entry);
    if (!step) return ReportError(step.error());
    if (*step == LogStep::kEnd) break;
    if (*step == LogStep::kRecord) PrintEntry(folder, options, from, entry);
  }
  for (const MendedBit& bit : reader.mended()) {
    std::fprintf(stderr, "engramctl: %s/%s, offset %llu: a turned bit, mended in what was read\n",
                 folder.path.c_str(), bit.file.c_str(),
                 static_cast<unsigned long long>(bit.bit / 8));
  }
  return kExitOk;
}

// Blocks are found from the beginning of a segment only.
int Dump(const FoundLog& folder, const LogOptions& options, LogPosition from) {
  if (folder.log == kVaultLog) return DumpVault(folder, options, from);
  const auto disk = OpenFolder(folder.path);
  if (!disk) return ReportError(disk.error());
  const auto entries = (*disk)->List();
  if (!entries) return ReportError(entries.error());
  std::vector<LogReader::Range> runs;
  for (const DirectoryEntry& entry : *entries) {
    const auto number = SegmentNumber(entry.name);
    if (!number || *number < SegmentOf(from)) continue;
    // The names are in order. What is replayed has no gaps.
    const bool may_begin = runs.empty() || *number <= SegmentOf(folder.replay_from);
    if (may_begin && (runs.empty() || *number != runs.back().last + 1)) {
      runs.push_back({.first = *number, .last = *number});
    } else {
      runs.back().last = *number;
    }
  }
  int exit_code = kExitOk;
  for (const LogReader::Range& run : runs) {
    exit_code = std::max(exit_code, DumpRun(folder, options, from, run));
  }
  return exit_code;
}

// "SEGMENT:OFFSET", as dump prints it.
std::optional<LogPosition> ParsePosition(std::string_view text) {
  uint32_t segment = 0;
  uint32_t offset = 0;
  const char* end = text.data() + text.size();
  const auto [colon, first_error] = std::from_chars(text.data(), end, segment);
  if (first_error != std::errc() || colon == end || *colon != ':') return std::nullopt;
  const auto [last, second_error] = std::from_chars(colon + 1, end, offset);
  if (second_error != std::errc() || last != end || segment == 0) return std::nullopt;
  return MakeLogPosition(segment, offset);
}

// ---------------------------------------------------------------------------------------------
// log verify

std::string TextOf(const std::string& folder, const LogFinding& finding) {
  return WithoutPlace(finding.text, folder + "/" + finding.file, finding.offset);
}

nlohmann::json FindingsJson(const std::string& folder, const std::vector<LogFinding>& findings) {
  nlohmann::json list = nlohmann::json::array();
  for (const LogFinding& finding : findings) {
    nlohmann::json json = {
        {"file", finding.file}, {"offset", finding.offset}, {"text", TextOf(folder, finding)}};
    if (finding.bytes != 0) json["bytes"] = finding.bytes;
    list.push_back(std::move(json));
  }
  return list;
}

nlohmann::json ReportJson(const FoundLog& folder, const LogReport& report) {
  nlohmann::json mended = nlohmann::json::array();
  for (const MendedBit& bit : report.mended) {
    mended.push_back({{"file", bit.file}, {"offset", bit.bit / 8}, {"bit", bit.bit % 8}});
  }
  nlohmann::json kinds = nlohmann::json::object();
  for (size_t kind = 0; kind < report.records_of_kind.size(); ++kind) {
    if (report.records_of_kind[kind] == 0) continue;
    kinds[std::string(KindText(static_cast<LogRecordKind>(kind)))] = report.records_of_kind[kind];
  }
  nlohmann::json json = {{"log", folder.log},
                         {"folder", folder.path},
                         {"sound", report.sound()},
                         {"segments", report.segments},
                         {"blocks", report.blocks},
                         {"records", report.records},
                         {"record_bytes", report.record_bytes},
                         {"records_of_kind", kinds},
                         {"records_of_space", report.records_of_space},
                         {"sessions", report.sessions},
                         {"epoch", report.last_epoch},
                         {"end", PositionText(report.end)},
                         {"damages", FindingsJson(folder.path, report.damages)},
                         {"mended", mended},
                         {"rests", FindingsJson(folder.path, report.rests)},
                         {"unfinished", FindingsJson(folder.path, report.unfinished)}};
  if (report.records > 0) {
    json["first_time"] = TimeText(UnixNsOf(report.first_stamp));
    json["last_time"] = TimeText(UnixNsOf(report.last_stamp));
  }
  return json;
}

void PrintFindings(const char* what, const std::string& folder,
                   const std::vector<LogFinding>& findings) {
  for (const LogFinding& finding : findings) {
    std::printf("  %s: %s, offset %llu: %s\n", what, finding.file.c_str(),
                static_cast<unsigned long long>(finding.offset), TextOf(folder, finding).c_str());
  }
}

void PrintReport(const FoundLog& folder, const LogReport& report) {
  std::printf("%s: %s records in %s blocks, %s segments, %zu spaces, %s sessions; ends at %s\n",
              folder.path.c_str(), WithThousands(report.records).c_str(),
              WithThousands(report.blocks).c_str(), WithThousands(report.segments).c_str(),
              report.records_of_space.size(), WithThousands(report.sessions).c_str(),
              PositionText(report.end).c_str());
  if (report.records > 0) {
    std::string kinds;
    for (size_t kind = 0; kind < report.records_of_kind.size(); ++kind) {
      if (report.records_of_kind[kind] == 0) continue;
      kinds += (kinds.empty() ? "" : ", ") + WithThousands(report.records_of_kind[kind]) + " " +
               std::string(KindText(static_cast<LogRecordKind>(kind)));
    }
    std::printf("  from %s to %s: %s\n", TimeText(UnixNsOf(report.first_stamp)).c_str(),
                TimeText(UnixNsOf(report.last_stamp)).c_str(), kinds.c_str());
  }
  PrintFindings("DAMAGED", folder.path, report.damages);
  for (const MendedBit& bit : report.mended) {
    std::printf("  DAMAGED: %s, offset %llu: bit %u is turned; a start mends it in what it reads\n",
                bit.file.c_str(), static_cast<unsigned long long>(bit.bit / 8),
                static_cast<unsigned>(bit.bit % 8));
  }
  PrintFindings("left over", folder.path, report.rests);
  PrintFindings("never finished", folder.path, report.unfinished);
}

Result<LogReport> Verify(const FoundLog& found) {
  FoundLog folder = found;
  if (!folder.data.empty()) {
    if (auto noted = NoteReplay(folder.data, &folder); !noted) {
      return std::unexpected(noted.error());
    }
  }
  const auto disk = OpenFolder(folder.path);
  if (!disk) return std::unexpected(disk.error());
  if (folder.log == kVaultLog) return VerifyVault(**disk, folder.instance);
  return VerifyLog(**disk, folder.log, folder.instance, folder.replay_from, folder.is_needed);
}

// Empty: it is sound. Otherwise the same for the same damage.
std::string WhatIsWrong(const Result<LogReport>& report) {
  if (!report) return report.error().message;
  std::string text;
  for (const LogFinding& finding : report->damages) {
    text += finding.file + ":" + std::to_string(finding.offset) + "\n";
  }
  for (const MendedBit& bit : report->mended) {
    text += bit.file + ":" + std::to_string(bit.bit / 8) + "\n";
  }
  return text;
}

// Beside a daemon the reader may meet a block that is being written, and a segment may be freed
// between its listing and its reading. What is found twice in a row is damage.
Result<LogReport> VerifySettled(const FoundLog& folder, bool in_use) {
  auto report = Verify(folder);
  for (int tries = 1; in_use && tries < kVerifyTries; ++tries) {
    const std::string before = WhatIsWrong(report);
    if (before.empty()) break;
    SleepUntil(SystemClock().MonotonicNs() + kVerifyAgainNs);
    report = Verify(folder);
    if (WhatIsWrong(report) == before) break;
  }
  return report;
}

// Everything that `log verify` looks at, told as it goes.
class Verification {
 public:
  explicit Verification(const LogOptions& options)
      : directory_(options.directory), is_json_(options.json), in_use_(IsInUse(directory_)) {}

  int Run() {
    bool is_data = false;
    auto logs = FindLogs(directory_, &is_data);
    if (!logs && !IsUnread(logs.error())) return ReportError(logs.error());
    if (!logs) {
      AddUnread(logs.error());
      logs.emplace();
    }
    if (is_data) TakeFiles(VerifyDataFiles(directory_));
    for (const FoundLog& folder : *logs) TakeLog(folder, VerifySettled(folder, in_use_));
    return Conclude();
  }

 private:
  void TakeFiles(const DataReport& report) {
    sound_ = sound_ && report.damages.empty();
    for (const Error& error : report.unread) AddUnread(error);
    damages_ = FindingsJson(directory_, report.damages);
    rests_ = FindingsJson(directory_, report.rests);
    if (is_json_) return;
    if (!report.damages.empty() || !report.rests.empty()) std::printf("%s:\n", directory_.c_str());
    PrintFindings("DAMAGED", directory_, report.damages);
    PrintFindings("left over", directory_, report.rests);
  }

  void TakeLog(const FoundLog& folder, const Result<LogReport>& report) {
    if (report) {
      sound_ = sound_ && report->sound();
      if (is_json_) {
        logs_.push_back(ReportJson(folder, *report));
      } else {
        PrintReport(folder, *report);
      }
      return;
    }
    logs_.push_back({{"log", folder.log},
                     {"folder", folder.path},
                     {"sound", false},
                     {"error", report.error().message}});
    if (IsUnread(report.error())) return AddUnread(report.error());
    sound_ = false;
    if (!is_json_) ReportError(report.error());
  }

  void AddUnread(const Error& error) {
    if (std::ranges::find(unread_, error.message) != unread_.end()) return;
    unread_.push_back(error.message);
    is_forbidden_ = is_forbidden_ || error.code == ErrorCode::kPermissionDenied;
    if (!is_json_) ReportError(error);
  }

  // By whom what is not readable can be read.
  std::string Remedy() const {
    if (!is_forbidden_) return "see above";
    struct stat status{};
    const bool is_known = stat(directory_.c_str(), &status) == 0;
    return "run this as " +
           (is_known && status.st_uid != geteuid()
                ? UserName(status.st_uid) + ", who owns " + directory_
                : std::string("root")) +
           "; now it runs as " + UserName(geteuid());
  }

  static std::string UserName(uid_t id) {
    const passwd* user = getpwuid(id);
    return user != nullptr ? user->pw_name : "user " + std::to_string(id);
  }

  int Conclude() const {
    const int exit_code = !sound_ ? kExitFailed : unread_.empty() ? kExitOk : kExitUnread;
    if (is_json_) {
      std::printf("%s\n", JsonLine({{"sound", exit_code == kExitOk},
                                    {"daemon_runs", in_use_},
                                    {"damages", damages_},
                                    {"rests", rests_},
                                    {"unread", unread_},
                                    {"logs", logs_}})
                              .c_str());
      return exit_code;
    }
    if (in_use_) {
      std::printf(
          "a daemon runs on this directory: what it wrote meanwhile may look like a rest, "
          "and the ends may have moved\n");
    }
    if (!unread_.empty()) {
      std::printf("NOT VERIFIED, as not everything could be read: %s\n", Remedy().c_str());
    }
    if (!sound_) {
      std::printf("DAMAGED: restore a backup, or keep a copy before you start the daemon on it\n");
    }
    if (exit_code == kExitOk) std::printf("sound\n");
    return exit_code;
  }

  const std::string directory_;
  const bool is_json_;
  const bool in_use_;
  bool sound_ = true;
  bool is_forbidden_ = false;
  std::vector<std::string> unread_;
  nlohmann::json damages_ = nlohmann::json::array();
  nlohmann::json rests_ = nlohmann::json::array();
  nlohmann::json logs_ = nlohmann::json::array();
};

}  // namespace

int RunLogDump(const LogOptions& options) {
  LogPosition from = 0;
  if (!options.from.empty()) {
    const auto position = ParsePosition(options.from);
    if (!position) {
      ReportError({ErrorCode::kInvalidArgument,
                   "--from " + options.from + " is no position: give SEGMENT:OFFSET"});
      return kExitUsage;
    }
    from = *position;
  }
  bool is_data = false;
  const auto logs = FindLogs(options.directory, &is_data);
  if (!logs) return ReportError(logs.error());
  if (from != 0 && logs->size() != 1) {
    ReportError({ErrorCode::kInvalidArgument, "--from needs one log: name its folder, such as " +
                                                  options.directory + "/log-000"});
    return kExitUsage;
  }
  int exit_code = kExitOk;
  for (const FoundLog& folder : *logs) {
    exit_code = std::max(exit_code, Dump(folder, options, from));
  }
  return exit_code;
}

int RunLogVerify(const LogOptions& options) { return Verification(options).Run(); }

}  // namespace engram
