#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "src/core/memory_kinds.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/feed_loop.h"
#include "tools/engramctl/space_listing.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

// A line "core counter value" of the daemon's status; the value may be text.
struct StatusLine {
  std::string core;
  std::string name;
  std::string value;
};

std::vector<StatusLine> ParseStatus(std::string_view text) {
  std::vector<StatusLine> lines;
  while (!text.empty()) {
    const size_t end = text.find('\n');
    std::string_view line = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    StatusLine parsed;
    for (std::string* word : {&parsed.core, &parsed.name}) {
      const size_t space = line.find(' ');
      *word = Printable(line.substr(0, space));
      line.remove_prefix(space == std::string_view::npos ? line.size() : space + 1);
    }
    parsed.value = Printable(line);
    if (!parsed.name.empty()) lines.push_back(std::move(parsed));
  }
  return lines;
}

bool ParseNumber(const std::string& text, uint64_t& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size();
}

void PrintStatusTable(const std::vector<StatusLine>& lines) {
  Table table({{"core", Table::Align::kLeft},
               {"counter", Table::Align::kLeft},
               {"value", Table::Align::kRight}});
  size_t zeros = 0;
  std::string last_core;
  for (const StatusLine& line : lines) {
    uint64_t number = 0;
    const bool is_number = ParseNumber(line.value, number);
    if (is_number && number == 0) {
      ++zeros;
      continue;
    }
    table.AddRow({line.core == last_core ? "" : line.core, line.name,
                  is_number ? WithThousands(number) : line.value});
    last_core = line.core;
  }
  table.Print();
  if (zeros > 0) std::printf("%zu counters at 0 are left out; --json has all\n", zeros);
}

}  // namespace

int RunStatus(const ServerOptions& server) {
  auto connection = OpenReader(server, "");
  if (!connection) return connection.error();
  const Result<std::string> text = IntrospectStatus(*connection, kAnswerTimeoutNs);
  if (!text) return ReportError(text.error());
  const Result<std::vector<SpaceInfo>> records = IntrospectSpaces(*connection, kAnswerTimeoutNs);
  if (!records) return ReportError(records.error());
  const std::vector<StatusLine> lines = ParseStatus(*text);
  const size_t spaces = MergeSpaces(*records).size();
  if (!server.json) {
    std::printf("engramd at %s, %zu spaces\n", server.address.c_str(), spaces);
    PrintStatusTable(lines);
    return kExitOk;
  }
  nlohmann::json report = {
      {"address", server.address}, {"spaces", spaces}, {"cores", nlohmann::json::object()}};
  for (const StatusLine& line : lines) {
    nlohmann::json& value = report["cores"][line.core][line.name];
    uint64_t number = 0;
    if (ParseNumber(line.value, number)) {
      value = number;
    } else {
      value = line.value;
    }
  }
  std::printf("%s\n",
              report.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  return kExitOk;
}

namespace {

nlohmann::json MemoryOf(const SpaceSummary& space) {
  nlohmann::json memory = nlohmann::json::object();
  for (size_t kind = 0; kind < kMemoryKinds; ++kind) {
    memory[std::string(kMemoryKindNames[kind])] = space.memory[kind];
  }
  return memory;
}

// What each kind takes for one observation.
void PrintMemory(const std::vector<SpaceSummary>& spaces) {
  std::vector<Table::Column> columns = {{"space", Table::Align::kLeft}};
  for (const std::string_view kind : kMemoryKindNames) {
    columns.push_back({std::string(kind), Table::Align::kRight});
  }
  columns.push_back({"all", Table::Align::kRight});
  Table table(columns);
  for (const SpaceSummary& space : spaces) {
    const uint64_t observations = std::max<uint64_t>(space.observations, 1);
    const auto each = [observations](uint64_t bytes) {
      return WithThousands((bytes + observations / 2) / observations);
    };
    std::vector<std::string> row = {Printable(space.name)};
    for (const uint64_t bytes : space.memory) row.push_back(each(bytes));
    row.push_back(each(space.resident_bytes));
    table.AddRow(row);
  }
  table.Print();
}

}  // namespace

int RunSpaces(const ServerOptions& server) {
  auto connection = OpenReader(server, "");
  if (!connection) return connection.error();
  const Result<std::vector<SpaceInfo>> records = IntrospectSpaces(*connection, kAnswerTimeoutNs);
  if (!records) return ReportError(records.error());
  const std::vector<SpaceSummary> spaces = MergeSpaces(*records);
  if (server.json) {
    nlohmann::json list = nlohmann::json::array();
    for (const SpaceSummary& space : spaces) {
      list.push_back({{"name", space.name},
                      {"observations", space.observations},
                      {"dimension", space.dimension},
                      {"metric", MetricName(space.metric)},
                      {"linked", space.linked},
                      {"unlinked", space.unlinked},
                      {"retired", space.retired},
                      {"resident_bytes", space.resident_bytes},
                      {"memory", MemoryOf(space)},
                      {"shards", space.shards}});
    }
    const nlohmann::json report = {{"spaces", list}};
    std::printf("%s\n",
                report.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
    return kExitOk;
  }
  if (spaces.empty()) {
    std::printf("no spaces yet\n");
    return kExitOk;
  }
  Table table({{"space", Table::Align::kLeft},
               {"observations", Table::Align::kRight},
               {"dimension", Table::Align::kRight},
               {"metric", Table::Align::kLeft},
               {"linked", Table::Align::kRight},
               {"unlinked", Table::Align::kRight},
               {"retired", Table::Align::kRight},
               {"resident bytes", Table::Align::kRight},
               {"shards", Table::Align::kRight}});
  for (const SpaceSummary& space : spaces) {
    table.AddRow({Printable(space.name), WithThousands(space.observations),
                  std::to_string(space.dimension), std::string(MetricName(space.metric)),
                  WithThousands(space.linked), WithThousands(space.unlinked),
                  WithThousands(space.retired), WithThousands(space.resident_bytes),
                  std::to_string(space.shards)});
  }
  table.Print();
  std::printf("\nbytes per observation\n");
  PrintMemory(spaces);
  return kExitOk;
}

int RunPing(const ServerOptions& server) {
  auto connection = OpenReader(server, "");
  if (!connection) return connection.error();
  const Result<int64_t> round_trip_ns = connection->Ping(kAnswerTimeoutNs);
  if (!round_trip_ns) return ReportError(round_trip_ns.error());
  const double micros = Rounded(static_cast<double>(*round_trip_ns) / kNanosPerMicro, 1);
  if (server.json) {
    std::printf("%s\n", nlohmann::json({{"round_trip_us", micros}}).dump().c_str());
  } else {
    std::printf("%s answers in %.1f us\n", server.address.c_str(), micros);
  }
  return kExitOk;
}

namespace {

constexpr int64_t kCheckpointPollNs = 20 * kNanosPerMilli;
constexpr int64_t kLongestCheckpointNs = 600 * kNanosPerSecond;

}  // namespace

Result<std::string> ControlText(Connection& connection, std::string_view name) {
  const Result<std::string> text = IntrospectStatus(connection, kAnswerTimeoutNs);
  if (!text) return std::unexpected(text.error());
  for (const StatusLine& line : ParseStatus(*text)) {
    if (line.core == "control" && line.name == name) return line.value;
  }
  return Fail(ErrorCode::kUnavailable,
              "this engramd does not tell " + std::string(name) + "; is it of another version?");
}

Result<uint64_t> ControlCounter(Connection& connection, std::string_view name) {
  const auto text = ControlText(connection, name);
  if (!text) return std::unexpected(text.error());
  uint64_t value = 0;
  if (!ParseNumber(*text, value)) {
    return Fail(ErrorCode::kCorrupt, std::string(name) + " is no number: " + *text);
  }
  return value;
}

// One that was under way when it was asked for counts neither way, so two ends are awaited where
// the first may be its.
Result<bool> AwaitCheckpoint(Connection& connection) {
  const auto ended = [&connection]() -> Result<std::pair<uint64_t, uint64_t>> {
    const auto completed = ControlCounter(connection, "checkpoints_completed");
    if (!completed) return std::unexpected(completed.error());
    const auto failed = ControlCounter(connection, "checkpoints_failed");
    if (!failed) return std::unexpected(failed.error());
    return std::pair(*completed, *failed);
  };
  const auto before = ended();
  if (!before) return std::unexpected(before.error());
  const auto under_way = ControlCounter(connection, "checkpoints_under_way");
  if (!under_way) return std::unexpected(under_way.error());
  if (auto asked = RequestCheckpoint(connection, kAnswerTimeoutNs); !asked) {
    return std::unexpected(asked.error());
  }
  const uint64_t awaited = before->first + before->second + 1 + *under_way;
  SystemClock clock;
  const int64_t deadline_ns = clock.MonotonicNs() + kLongestCheckpointNs;
  while (clock.MonotonicNs() < deadline_ns) {
    const auto now = ended();
    if (!now) return std::unexpected(now.error());
    if (now->first + now->second >= awaited) return now->second == before->second;
    SleepUntil(clock.MonotonicNs() + kCheckpointPollNs);
  }
  return Fail(ErrorCode::kUnavailable, "the checkpoint has not ended in 10 minutes");
}

int RunCheckpoint(const ServerOptions& server) {
  auto connection = OpenReader(server, "");
  if (!connection) return connection.error();
  const auto done = AwaitCheckpoint(*connection);
  if (!done) return ReportError(done.error());
  const auto bytes = ControlCounter(*connection, "checkpoint_bytes");
  const auto ms = ControlCounter(*connection, "checkpoint_ms");
  if (!bytes || !ms) return ReportError((bytes ? ms : bytes).error());
  if (server.json) {
    std::printf(
        "%s\n",
        nlohmann::json({{"completed", *done}, {"bytes", *bytes}, {"ms", *ms}}).dump().c_str());
  } else if (*done) {
    std::printf("saved %s bytes in %s ms\n", WithThousands(*bytes).c_str(),
                WithThousands(*ms).c_str());
  } else {
    std::fprintf(stderr, "engramctl: the checkpoint failed; the daemon's log says why\n");
  }
  return *done ? kExitOk : kExitFailed;
}

}  // namespace engram
