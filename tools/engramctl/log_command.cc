#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
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
#include "src/core/clock.h"
#include "src/core/commit_stamp.h"
#include "src/core/crc32c.h"
#include "src/core/data_directory.h"
#include "src/core/disk.h"
#include "src/core/log_files.h"
#include "src/core/refusal_reason.h"
#include "src/core/vector_dtype.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

constexpr size_t kMaxInstanceBytes = 4'096;
constexpr size_t kPayloadShown = 48;  // bytes

// One log, and whose it is.
struct FoundLog {
  std::string path;
  uint16_t log = 0;
  LogInstance instance{};
  LogPosition replay_from = 0;  // by the latest checkpoint: before that segments may be missing
  bool is_needed = false;       // the segment there is not
};

// ---------------------------------------------------------------------------------------------
// Finding logs

// Makes nothing: CreatePosixDisk would make a missing directory.
Result<std::unique_ptr<Disk>> OpenFolder(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_directory(path, error)) {
    return Fail(ErrorCode::kNotFound, path + " is no directory: name a data directory, or the " +
                                          "folder of one of its logs");
  }
  return CreatePosixDisk(path,
                         {.max_in_flight = 64, .max_open_files = 4, .registered_buffers = {}});
}

// The first half of the id that INSTANCE names; its grammar is in src/core/data_directory.h.
Result<LogInstance> InstanceOf(Disk& disk) {
  constexpr std::string_view kIdKey = "\ninstance_id ";
  constexpr std::string_view kCrcKey = "\ncrc32c ";
  const auto content = ReadWholeFile(disk, kInstanceFileName, kMaxInstanceBytes);
  if (!content) return std::unexpected(content.error());
  const std::string_view text(reinterpret_cast<const char*>(content->data()), content->size());
  const size_t id_at = text.find(kIdKey);
  const size_t crc_at = text.rfind(kCrcKey);
  LogInstance instance{};
  uint32_t crc = 0;
  bool sound = id_at != std::string_view::npos && crc_at != std::string_view::npos &&
               id_at + kIdKey.size() + 2 * instance.size() <= text.size();
  const auto parse = [&](size_t at, size_t digits, auto* number) {
    const char* from = text.data() + at;
    const auto [end, error] =
        std::from_chars(from, std::min(from + digits, text.data() + text.size()), *number, 16);
    return error == std::errc() && end == from + digits;
  };
  for (size_t i = 0; sound && i < instance.size(); ++i) {
    sound = parse(id_at + kIdKey.size() + 2 * i, 2, &instance[i]);
  }
  if (!sound || !parse(crc_at + kCrcKey.size(), 8, &crc) ||
      crc != Crc32c(std::span(*content).first(crc_at + 1))) {
    return Fail(ErrorCode::kCorrupt, disk.directory() + "/" + kInstanceFileName +
                                         " is damaged: restore it from a backup");
  }
  return instance;
}

// From where the logs of a data directory are replayed.
Result<void> NoteReplay(Disk& root, std::vector<FoundLog>* logs) {
  const auto manifest = ReadManifest(root);
  if (!manifest) return std::unexpected(manifest.error());
  if (!*manifest) return {};
  for (FoundLog& folder : *logs) {
    if (folder.log < (*manifest)->logs.size()) {
      folder.replay_from = (*manifest)->logs[folder.log].from;
      folder.is_needed = true;
    }
    for (const CheckpointManifest::Kept& kept : (*manifest)->kept) {
      if (kept.log == folder.log) folder.replay_from = kept.from;
    }
  }
  return {};
}

// `directory` is a data directory or the folder of one log.
Result<std::vector<FoundLog>> FindLogs(const std::string& directory) {
  const auto disk = OpenFolder(directory);
  if (!disk) return std::unexpected(disk.error());
  const auto entries = (*disk)->List();
  if (!entries) return std::unexpected(entries.error());
  std::vector<FoundLog> logs;
  if (std::ranges::find(*entries, kInstanceFileName, &DirectoryEntry::name) == entries->end()) {
    const auto header = FindSegmentHeader(**disk);
    if (!header) return std::unexpected(header.error());
    if (!*header) {
      return Fail(ErrorCode::kNotFound, directory + " is neither a data directory (it has no " +
                                            kInstanceFileName +
                                            ") nor the folder of a log (it has no sound segment)");
    }
    logs.push_back({.path = directory, .log = (*header)->log, .instance = (*header)->instance});
    std::error_code error;
    if (std::filesystem::exists(directory + "/../" + kInstanceFileName, error)) {
      const auto root = OpenFolder(directory + "/..");
      if (!root) return std::unexpected(root.error());
      if (auto noted = NoteReplay(**root, &logs); !noted) return std::unexpected(noted.error());
    }
    return logs;
  }
  const auto instance = InstanceOf(**disk);
  if (!instance) return std::unexpected(instance.error());
  for (const DirectoryEntry& entry : *entries) {
    if (const auto log = LogOfFolder(entry.name)) {
      logs.push_back({.path = directory + "/" + entry.name, .log = *log, .instance = *instance});
    }
  }
  std::ranges::sort(logs, {}, &FoundLog::log);
  if (auto noted = NoteReplay(**disk, &logs); !noted) return std::unexpected(noted.error());
  return logs;
}

// Whether a daemon holds the directory, or the one above a log's folder. Looks at the kernel's list
// of locks, so as not to be in the way of a daemon that starts.
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

nlohmann::json FindingsJson(const std::vector<LogFinding>& findings) {
  nlohmann::json list = nlohmann::json::array();
  for (const LogFinding& finding : findings) {
    nlohmann::json json = {
        {"file", finding.file}, {"offset", finding.offset}, {"text", finding.text}};
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
                         {"damages", FindingsJson(report.damages)},
                         {"mended", mended},
                         {"rests", FindingsJson(report.rests)},
                         {"unfinished", FindingsJson(report.unfinished)}};
  if (report.records > 0) {
    json["first_time"] = TimeText(UnixNsOf(report.first_stamp));
    json["last_time"] = TimeText(UnixNsOf(report.last_stamp));
  }
  return json;
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
  const auto print = [](const char* what, const LogFinding& finding) {
    std::printf("  %s: %s, offset %llu: %s\n", what, finding.file.c_str(),
                static_cast<unsigned long long>(finding.offset), finding.text.c_str());
  };
  for (const LogFinding& finding : report.damages) print("DAMAGED", finding);
  for (const MendedBit& bit : report.mended) {
    std::printf("  DAMAGED: %s, offset %llu: bit %u is turned; a start mends it in what it reads\n",
                bit.file.c_str(), static_cast<unsigned long long>(bit.bit / 8),
                static_cast<unsigned>(bit.bit % 8));
  }
  for (const LogFinding& finding : report.rests) print("left over", finding);
  for (const LogFinding& finding : report.unfinished) print("never finished", finding);
}

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
  const auto logs = FindLogs(options.directory);
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

int RunLogVerify(const LogOptions& options) {
  const auto logs = FindLogs(options.directory);
  if (!logs) return ReportError(logs.error());
  const bool in_use = IsInUse(options.directory);
  nlohmann::json list = nlohmann::json::array();
  bool sound = true;
  for (const FoundLog& folder : *logs) {
    const auto disk = OpenFolder(folder.path);
    if (!disk) return ReportError(disk.error());
    const auto report = folder.log == kVaultLog ? VerifyVault(**disk, folder.instance)
                                                : VerifyLog(**disk, folder.log, folder.instance,
                                                            folder.replay_from, folder.is_needed);
    if (!report) {
      sound = false;
      if (options.json) {
        list.push_back({{"log", folder.log},
                        {"folder", folder.path},
                        {"sound", false},
                        {"error", report.error().message}});
      } else {
        ReportError(report.error());
      }
      continue;
    }
    sound = sound && report->sound();
    if (options.json) {
      list.push_back(ReportJson(folder, *report));
    } else {
      PrintReport(folder, *report);
    }
  }
  if (options.json) {
    std::printf("%s\n",
                JsonLine({{"sound", sound}, {"daemon_runs", in_use}, {"logs", list}}).c_str());
  } else {
    if (in_use) {
      std::printf(
          "a daemon runs on this directory: what it wrote meanwhile may look like a rest, "
          "and the ends may have moved\n");
    }
    std::printf("%s\n", sound ? "sound"
                              : "DAMAGED: restore a backup, or keep a copy before you "
                                "start the daemon on it");
  }
  return sound ? kExitOk : kExitFailed;
}

}  // namespace engram
