#include "src/control/memory_calls.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>

#include "src/control/memory_codec.h"
#include "src/core/check.h"
#include "src/health_watch.h"

namespace engram {

namespace {

constexpr int kMaxMetricsOfCall = 1'000;

struct SpaceSums {
  uint64_t observations = 0;
  uint64_t linked = 0;
  uint64_t unlinked = 0;
  uint64_t retired = 0;
  uint64_t resident_bytes = 0;
  uint16_t dimension = 0;
  uint16_t partitions = 0;

  void Add(const SpaceRecord& record) {
    observations += record.observations;
    linked += record.linked;
    unlinked += record.unlinked;
    retired += record.retired;
    resident_bytes += record.resident_bytes;
    dimension = std::max(dimension, record.dimension);
    ++partitions;
  }
};

template <typename Visit>
void ForEachRecord(std::span<const std::byte> records, Visit visit) {
  while (!records.empty()) {
    SpaceRecord record;
    CHECK(records.size() >= sizeof(record), "an answer is whole records");
    std::memcpy(&record, records.data(), sizeof(record));
    CHECK(record.record_bytes <= records.size() &&
              record.record_bytes >= sizeof(record) + record.name_bytes,
          "a record holds what its header says");
    visit(record, std::string_view(reinterpret_cast<const char*>(records.data()) + sizeof(record),
                                   record.name_bytes));
    records = records.subspan(record.record_bytes);
  }
}

void AddMetrics(const v1::IntrospectRequest& request, const SpaceSums& space,
                const CounterCatalogue& counters, v1::IntrospectResponse* response) {
  std::string* json = response->mutable_metrics_snapshot_json();
  *json = "{";
  const auto add = [&](const std::string& name, uint64_t value) {
    const auto& wanted = request.metrics();
    if (!wanted.empty() && std::ranges::find(wanted, name) == wanted.end()) return;
    (*response->mutable_metrics())[name] = static_cast<float>(value);
    if (json->size() > 1) *json += ",";
    *json += "\"" + name + "\":" + std::to_string(value);
  };
  add("space.observations", space.observations);
  add("space.linked", space.linked);
  add("space.unlinked", space.unlinked);
  add("space.retired", space.retired);
  add("space.resident_bytes", space.resident_bytes);
  add("space.partitions", space.partitions);
  add("space.dimension", space.dimension);
  for (const CounterView& counter : counters) {
    add(counter.core + "." + std::string(counter.name), counter.counter->Read());
  }
  *json += "}";
}

// What the daemon has found wrong, by component: the core whose counter says so.
using Faults = std::map<std::string, std::string>;

Faults FaultsOf(const CounterCatalogue& counters) {
  struct Fault {
    std::string_view counter;
    std::string_view text;
    bool is_counted = true;
  };
  static constexpr std::array kFaults = {
      Fault{kLogWithoutRoom, "no room on the disk for its log (writes: disk_full)", false},
      Fault{kLogFailing, "the disk of its log fails (writes: disk_failing)", false},
      Fault{"records_quarantined", " records are in quarantine"},
      Fault{kCheckpointsFailing, " checkpoints have failed since the last good one"},
      Fault{kDamagedPlaces, " damaged places in the logs: payloads are missing"}};
  Faults faults;
  for (const CounterView& counter : counters) {
    const auto fault = std::ranges::find(kFaults, counter.name, &Fault::counter);
    if (fault == kFaults.end()) continue;
    const uint64_t count = counter.counter->Read();
    if (count == 0) continue;
    std::string& text = faults[counter.core];
    if (!text.empty()) text += "; ";
    if (fault->is_counted) text += std::to_string(count);
    text += fault->text;
  }
  return faults;
}

// What is missing in `faults` is in order.
void TellFaults(const Faults& faults, v1::HealthStatus* health) {
  // Each shard answered, or this call would have no answer.
  std::string summary = "all shards answer";
  for (const auto& [name, text] : faults) {
    v1::ComponentHealth& component = (*health->mutable_components())[name];
    component.set_operational(false);
    component.set_status_message(text);
    summary += "; " + name + ": " + text;
  }
  health->set_healthy(faults.empty());
  health->set_summary(std::move(summary));
}

void AddHealth(const std::unordered_map<uint16_t, SpaceSums>& shards,
               const CounterCatalogue& counters, v1::IntrospectResponse* response) {
  v1::HealthStatus* health = response->mutable_health();
  auto& components = *health->mutable_components();
  const auto add = [&components](const std::string& name, float performance, std::string message) {
    v1::ComponentHealth& component = components[name];
    component.set_operational(true);
    component.set_performance(performance);
    component.set_status_message(std::move(message));
  };
  add("gateway", 1, "answers");
  for (const CounterView& counter : counters) {
    if (components.contains(counter.core)) continue;
    if (counter.core.starts_with("shard")) add(counter.core, 1, "no observations");
    if (counter.core == kControlCore) add(counter.core, 1, "in order");
  }
  for (const auto& [shard, sums] : shards) {
    if (sums.observations == 0) continue;
    const double in_order = static_cast<double>(sums.observations - sums.unlinked) /
                            static_cast<double>(sums.observations);
    // A space that is scanned exactly needs no links.
    const bool linking = sums.linked > 0 && sums.unlinked > 0;
    add("shard" + std::to_string(shard), linking ? static_cast<float>(in_order) : 1,
        std::to_string(sums.observations) + " observations, " + std::to_string(sums.linked) +
            " linked");
  }
  TellFaults(FaultsOf(counters), health);
}

// A number that is none, as it stands in a vector.
struct NotFinite {
  uint32_t index = 0;
  std::string_view text;  // "nan", "inf", "-inf"
};

// All bits of its exponent are set: infinite where those of its fraction are not.
std::optional<NotFinite> FirstNotFinite(const VectorRef& vector) {
  struct Layout {
    uint32_t sign = 0;
    uint32_t exponent = 0;
  };
  Layout layout;
  if (vector.dtype == VectorDtype::kF32) layout = {0x80000000, 0x7F800000};
  if (vector.dtype == VectorDtype::kF16) layout = {0x8000, 0x7C00};
  if (vector.dtype == VectorDtype::kBf16) layout = {0x8000, 0x7F80};
  if (layout.exponent == 0) return std::nullopt;
  const size_t bytes = ElementBytes(vector.dtype);
  for (uint32_t i = 0; i < vector.dimension; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, vector.bytes + i * bytes, bytes);
    if ((bits & layout.exponent) != layout.exponent) continue;
    if ((bits & ~(layout.sign | layout.exponent)) != 0) return NotFinite{i, "nan"};
    return NotFinite{i, (bits & layout.sign) != 0 ? "-inf" : "inf"};
  }
  return std::nullopt;
}

}  // namespace

std::expected<SpaceName, CallError> SpaceOfCall(std::string_view request,
                                                std::string_view metadata) {
  if (!request.empty() && !metadata.empty() && request != metadata) {
    return Invalid("x-memory-space: " + Quoted(metadata) + "; the request's memory_space_id is " +
                   Quoted(request));
  }
  const std::string field = request.empty() ? "x-memory-space" : "memory_space_id";
  std::string_view name = request.empty() ? metadata : request;
  if (name.empty()) name = "default";
  if (IsValidSpaceName(name)) return SpaceName(name);
  return Invalid(field + ": " + Quoted(name) + "; expected 1 to 64 of [a-z0-9_-]");
}

Asked AskForget(const v1::ForgetRequest& request, GatewayQuestion* question) {
  switch (request.target_case()) {
    case v1::ForgetRequest::kMemoryId:
      break;
    case v1::ForgetRequest::kPattern:
      return Invalid("pattern: set; this appliance forgets by memory_id");
    case v1::ForgetRequest::TARGET_NOT_SET:
      return Invalid("target: not set; expected memory_id");
  }
  if (auto checked = CheckId(request.memory_id(), "memory_id"); !checked) return checked;
  switch (request.mode()) {
    case v1::FORGET_MODE_UNSPECIFIED:
    case v1::FORGET_MODE_DELETE:
    case v1::FORGET_MODE_OVERWRITE:
      if (request.restore()) {
        return Invalid("restore: true with mode " + v1::ForgetMode_Name(request.mode()) +
                       "; expected mode FORGET_MODE_SUPPRESS with it");
      }
      question->op = ObservationOp::kDelete;
      break;
    case v1::FORGET_MODE_SUPPRESS:
      question->op = request.restore() ? ObservationOp::kRestore : ObservationOp::kSuppress;
      break;
    default:
      return Invalid("mode: " + std::to_string(request.mode()) +
                     "; expected FORGET_MODE_SUPPRESS, FORGET_MODE_DELETE or "
                     "FORGET_MODE_OVERWRITE");
  }
  question->kind = CallKind::kObserve;
  question->id = request.memory_id();
  return {};
}

Asked AskIntrospect(const v1::IntrospectRequest& request, GatewayQuestion* question) {
  if (request.metrics_size() > kMaxMetricsOfCall) {
    return Invalid("metrics: " + std::to_string(request.metrics_size()) +
                   " names; expected up to 1000");
  }
  question->kind = CallKind::kIntrospect;
  return {};
}

void TellForget(const GatewayQuestion& question, const GatewayAnswer& answer,
                v1::ForgetResponse* response) {
  response->set_memories_affected(answer.existed ? 1 : 0);
  SetConfidence(1, response->mutable_forget_confidence());
  response->set_reversible(answer.existed && question.op == ObservationOp::kSuppress);
}

void TellIntrospect(const v1::IntrospectRequest& request, const GatewayQuestion& question,
                    const GatewayAnswer& answer, const CounterCatalogue& counters,
                    v1::IntrospectResponse* response) {
  SpaceSums space;
  SpaceSums all;
  std::unordered_map<uint16_t, SpaceSums> shards;
  ForEachRecord(answer.records, [&](const SpaceRecord& record, std::string_view name) {
    all.Add(record);
    shards[record.shard].Add(record);
    if (name == question.space.view()) space.Add(record);
  });
  AddMetrics(request, space, counters, response);
  if (request.include_health()) AddHealth(shards, counters, response);
  if (request.include_statistics()) {
    response->mutable_statistics()->set_total_memories(static_cast<int64_t>(space.observations));
  }
  if (all.linked > 0 && all.unlinked > 0) {
    response->add_active_processes("linking: " + std::to_string(all.unlinked) +
                                   " observations are not in a graph yet");
  }
}

std::string RefusalMessage(const GatewayQuestion& question, const GatewayAnswer& answer,
                           std::string_view vector_field) {
  const std::string field(vector_field);
  const std::string space = "the space " + Quoted(question.space.view());
  switch (answer.reason) {
    case RefusalReason::kWrongDimension:
      return field + ": " + std::to_string(question.vector.dimension) + " values; " + space +
             " has dimension " + std::to_string(answer.space_dimension);
    case RefusalReason::kNotFinite: {
      const auto bad = FirstNotFinite(question.vector);
      if (!bad) break;
      return field + "[" + std::to_string(bad->index) + "]: " + std::string(bad->text) +
             "; expected finite numbers";
    }
    case RefusalReason::kZeroVector:
      return field + ": all " + std::to_string(question.vector.dimension) + " values are 0; " +
             space + " compares directions (cosine) and needs one that is not";
    case RefusalReason::kUnknownSpace:
      return space + " holds nothing yet";
    case RefusalReason::kUnknownFilterKey:
      return "filter.metadata: " + space +
             " keeps no such key; list it in filter_keys of the configuration";
    default:
      break;
  }
  const RefusalInfo info = DescribeRefusal(answer.reason);
  return std::string(info.name) + ": " + std::string(info.text);
}

}  // namespace engram
