// engramctl quarantine: records that crashed the daemon when they were replayed.

#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "index/log/replay_guard.h"
#include "src/core/attributes.h"
#include "src/core/disk.h"
#include "src/core/log_files.h"
#include "src/core/vector_dtype.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/export_row.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

std::string Line(const nlohmann::json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// Under `name` where the bytes are plain text, else as base64 under another name.
void SetText(const char* name, std::string_view bytes, nlohmann::json* json) {
  if (IsPlainText(bytes)) {
    (*json)[name] = bytes;
  } else {
    (*json)[std::string(name) + "_base64"] = Base64(bytes);
  }
}

nlohmann::json AttributesJson(const LogRecord& record) {
  nlohmann::json list = nlohmann::json::array();
  Attribute attribute;
  for (AttributeReader reader(record.attributes); reader.Next(&attribute);) {
    nlohmann::json entry;
    SetText("key", attribute.key, &entry);
    SetText("value", attribute.value, &entry);
    list.push_back(std::move(entry));
  }
  return list;
}

// Where it lies in the log, whose it is, and, with `whole`, all that it holds.
nlohmann::json Describe(const std::string& file, const QuarantinedRecord& kept, bool whole) {
  LogRecord record;
  ReadLogRecord(kept.record, &record);
  const LogPosition position = PositionOf(kept.address);
  nlohmann::json json = {
      {"file", file},
      {"sound", true},
      {"log", LogOf(kept.address)},
      {"segment", LogFolder(LogOf(kept.address)) + "/" + SegmentName(SegmentOf(position))},
      {"offset", OffsetOf(position)},
      {"crashes", kept.crashes},
      {"since_ns", kept.since_unix_ns},
      {"space", record.space},
      {"session", record.session.value()},
      {"sequence", record.sequence},
      {"stamp", record.stamp},
      {"kind", static_cast<int>(record.kind)},
      {"payload_bytes", record.payload.size()}};
  SetText("id", record.id, &json);
  if (!whole) return json;
  json["when_ns"] = record.when_ns;
  json["confidence"] = record.confidence;
  if (!record.attributes.empty()) json["attributes"] = AttributesJson(record);
  SetText("payload", {reinterpret_cast<const char*>(record.payload.data()), record.payload.size()},
          &json);
  if (record.payload_kind != PayloadKind::kOpaque) {
    json["payload_kind"] = static_cast<int>(record.payload_kind);
  }
  if (record.dtype != VectorDtype::kNone) {
    std::vector<float> numbers(record.dimension);
    DecodeVector(record.dtype, record.dimension, record.scale, record.vector.data(),
                 numbers.data());
    json["dtype"] = DtypeName(record.dtype);
    json["vector"] = numbers;
  }
  return json;
}

void PrintText(const nlohmann::json& json) {
  const auto id_of = [](const nlohmann::json& record) {
    const bool is_plain = record.contains("id");
    const auto id = record[is_plain ? "id" : "id_base64"].get<std::string>();
    return is_plain ? "\"" + Printable(id) + "\"" : "base64 " + id;
  };
  if (!json["sound"].get<bool>()) {
    std::printf("%s: DAMAGED: %s\n", json["file"].get<std::string>().c_str(),
                json["error"].get<std::string>().c_str());
    return;
  }
  std::printf(
      "%s: space %s, id %s, session %016llx, sequence %llu, %llu bytes of payload; "
      "crashed %u starts; lies in %s at offset %u\n",
      json["file"].get<std::string>().c_str(), json["space"].get<std::string>().c_str(),
      id_of(json).c_str(), static_cast<unsigned long long>(json["session"].get<uint64_t>()),
      static_cast<unsigned long long>(json["sequence"].get<uint64_t>()),
      static_cast<unsigned long long>(json["payload_bytes"].get<uint64_t>()),
      json["crashes"].get<uint32_t>(), json["segment"].get<std::string>().c_str(),
      json["offset"].get<uint32_t>());
}

}  // namespace

int RunQuarantine(const QuarantineOptions& options) {
  const std::string path = options.directory + "/" + kQuarantineFolder;
  std::error_code error;
  if (!std::filesystem::is_directory(options.directory, error)) {
    return ReportError({ErrorCode::kNotFound, options.directory + " is no directory"});
  }
  if (!std::filesystem::is_directory(path, error)) {
    // On standard output a dump has lines of JSON alone.
    if (!options.json) std::fprintf(options.whole ? stderr : stdout, "nothing is in quarantine\n");
    return kExitOk;
  }
  const auto disk =
      CreatePosixDisk(path, {.max_in_flight = 1, .max_open_files = 1, .registered_buffers = {}});
  if (!disk) return ReportError(disk.error());
  const auto entries = (*disk)->List();
  if (!entries) return ReportError(entries.error());
  int exit_code = kExitOk;
  for (const DirectoryEntry& entry : *entries) {
    if (!QuarantinedAddress(entry.name)) continue;
    if (!options.file.empty() && options.file != entry.name) continue;
    const auto content = ReadWholeFile(**disk, entry.name, kMaxQuarantineFileBytes);
    const auto kept = content ? ParseQuarantined(*content) : std::unexpected(content.error());
    nlohmann::json json;
    if (kept) {
      json = Describe(entry.name, *kept, options.whole);
    } else {
      json = {{"file", entry.name}, {"sound", false}, {"error", kept.error().message}};
      exit_code = kExitFailed;
    }
    if (options.json || (options.whole && kept)) {
      std::printf("%s\n", Line(json).c_str());
    } else {
      PrintText(json);
    }
  }
  return exit_code;
}

}  // namespace engram
