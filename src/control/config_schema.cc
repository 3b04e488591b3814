#include "src/control/config_schema.h"

#include <charconv>
#include <limits>

#include "src/core/vector_dtype.h"

namespace engram {

namespace {

constexpr uint32_t kMaxQueue = 100'000'000;
constexpr uint32_t kMaxSeconds = 365 * 86'400;
constexpr int64_t kMaxTtlS = int64_t{100} * 365 * 86'400;
constexpr int64_t kMaxMib = int64_t{1} << 30;
constexpr int64_t kMaxObservations = int64_t{1} << 40;

constexpr std::string_view kNoQueueLimit =
    "each ingress core may have 8,192 observations under way to each shard, and credit keeps them "
    "fewer";
constexpr std::string_view kNoBatchLimit = "a shard takes what one round has room for";
constexpr std::string_view kNoPressure = "credit alone slows a sender down";
constexpr std::string_view kChosen = "chosen from the machine";

template <typename T>
IntegerField Integer(T* to, int64_t min, int64_t max) {
  return {.get = [to] { return static_cast<int64_t>(*to); },
          .set = [to](int64_t value) { *to = static_cast<T>(value); },
          .min = min,
          .max = max};
}

// `first`: the enumerator that the first name stands for; the others follow it.
template <typename T>
ChoiceField Choice(T* to, T first, std::initializer_list<std::string_view> names) {
  const size_t count = names.size();
  return {.names = names,
          .get =
              [to, first, count] {
                return *to < first ? count : static_cast<size_t>(*to) - static_cast<size_t>(first);
              },
          .set = [to, first](
                     size_t place) { *to = static_cast<T>(static_cast<size_t>(first) + place); }};
}

ChoiceField PrecisionChoice(Precision* to) {
  return Choice(to, Precision::kF32, {"f32", "bf16", "int8"});
}

ChoiceField DurabilityChoice(Durability* to) {
  return Choice(to, Durability::kFsync, {"fsync", "interval", "memory"});
}

std::string PathFault(const std::string& path) {
  return path.empty() ? "\"\" is no path; write one like \"./engram-data\"" : std::string();
}

std::string SpaceNameFault(const std::string& name) {
  if (IsValidSpaceName(name)) return {};
  return TomlQuoted(name) + " is no name of a space; write 1 to 64 of a-z, 0-9, _ and -";
}

void AddIndexFields(IndexConfig* index, std::vector<SchemaField>* fields) {
  const auto add = [fields](SchemaField field) { fields->push_back(std::move(field)); };
  add({"index", "default_ef", Integer(&index->default_ef, 1, kMaxEf)});
  add({"index", "m", Integer(&index->m, 2, 64)});
  add({"index", "ef_construction", Integer(&index->ef_construction, 1, kMaxEf)});
  add({"index", "alpha", RealField{&index->alpha, 1.0, 2.0}});
  add({"index", "extend_candidates", SwitchField{&index->extend_candidates}});
  add({"index", "keep_pruned", SwitchField{&index->keep_pruned}});
  add({"index", "precision", PrecisionChoice(&index->precision)});
  add({"index", "traversal",
       Choice(&index->traversal, Traversal::kInt8, {"int8", "exact", "rabitq"})});
  add({"index", "partitions", Integer(&index->partitions, 1, kMaxCoresOfRole)});
  add({"index", "grow_partition_at", Integer(&index->grow_partition_at, 0, kMaxObservations)});
  add({"index",
       "max_partitions",
       Integer(&index->max_partitions, 1, kMaxCoresOfRole),
       {},
       "as many as there are shards"});
  add({"index", "filter_keys", NameListField{&index->filter_keys}});
}

void AddLimitFields(LimitsConfig* limits, std::vector<SchemaField>* fields) {
  const auto add = [fields](SchemaField field) { fields->push_back(std::move(field)); };
  add({"limits", "queue_capacity", Integer(&limits->queue_capacity, 1, kMaxQueue), kNoQueueLimit});
  add({"limits", "global_queue_capacity", Integer(&limits->global_queue_capacity, 1, kMaxQueue),
       kNoQueueLimit});
  add({"limits", "min_batch_size", Integer(&limits->min_batch_size, 1, 65'535), kNoBatchLimit});
  add({"limits", "max_batch_size", Integer(&limits->max_batch_size, 1, 65'535), kNoBatchLimit});
  add({"limits", "high_priority_ratio", RealField{&limits->high_priority_ratio, 0.0, 0.9},
       "high priority is served first, and has rings of its own"});
  add({"limits", "batch_growth_threshold", RealField{&limits->batch_growth_threshold, 0.01, 1.0},
       kNoPressure});
  add({"limits", "backpressure_threshold", RealField{&limits->backpressure_threshold, 0.01, 1.0},
       kNoPressure});
  add({"limits", "overload_threshold", RealField{&limits->overload_threshold, 0.01, 1.0},
       kNoPressure});
  add({"limits", "idle_timeout_s", Integer(&limits->idle_timeout_s, 1, kMaxSeconds)});
  add({"limits", "cleanup_interval_s", Integer(&limits->cleanup_interval_s, 1, kMaxSeconds)});
  add({"limits", "max_sessions", Integer(&limits->max_sessions, 1, 10'000'000)});
  add({"limits", "recall_batch", Integer(&limits->recall_batch, 1, kMaxRecallResults)});
  add({"limits", "max_spaces", Integer(&limits->max_spaces, 1, 1'000'000)});
  add({"limits", "max_connections", Integer(&limits->max_connections, 1, 1'000'000)});
}

std::string RealText(double value) {
  char text[32];
  const auto [end, error] = std::to_chars(text, text + sizeof(text), value);
  std::string written(text, error == std::errc() ? end : text);
  if (written.find_first_of(".e") == std::string::npos) written += ".0";
  return written;
}

template <typename T, typename Write>
std::string ListText(const std::vector<T>& items, Write write) {
  std::string text = "[";
  for (const T& item : items) text += (text.size() > 1 ? ", " : "") + write(item);
  return text + "]";
}

}  // namespace

std::vector<SchemaField> FieldsOf(Config* config) {
  std::vector<SchemaField> fields;
  const auto add = [&fields](SchemaField field) { fields.push_back(std::move(field)); };
  add({"listen", "tcp", EndpointListField{&config->listen}});
  add({"listen", "grpc", EndpointField{&config->grpc}});
  add({"listen", "http", EndpointField{&config->http}});
  add({"listen", "http_origins", NameListField{&config->http_origins}});
  add({"listen", "backend",
       Choice(&config->network_backend, NetworkBackend::kAuto, {"auto", "io_uring", "posix"})});
  add({"data", "directory", TextField{&config->data_directory, PathFault}});
  add({"data", "backend",
       Choice(&config->disk_backend, DiskBackend::kAuto, {"auto", "io_uring", "posix"})});
  add({"data", "durability", DurabilityChoice(&config->durability)});
  add({"data", "segment_mib", Integer(&config->segment_mib, 1, 1'024)});
  add({"data", "flush_interval_ms", Integer(&config->flush_interval_ms, 1, 10'000)});
  add({"data", "checkpoint_mib", Integer(&config->checkpoint_mib, 0, kMaxMib)});
  add({"data", "session_keep_days", Integer(&config->session_keep_days, 1, 365)});
  add({"data", "ttl_s", Integer(&config->ttl_s, 0, kMaxTtlS)});
  add({"cores", "mode",
       Choice(&config->core_mode, CoreMode::kAuto, {"auto", "run_to_completion", "pipelined"})});
  add({"cores", "idle", Choice(&config->idle, IdleStrategy::kSpin, {"spin", "hybrid", "sleep"})});
  add({"cores", "sockets", NumberListField{&config->sockets}, {}, "all"});
  add({"cores", "control", NumberListField{&config->control_cpus}, {}, kChosen});
  add({"cores", "ingress", NumberListField{&config->ingress_cpus}, {}, kChosen});
  add({"cores", "shard", NumberListField{&config->shard_cpus}, {}, kChosen});
  add({"cores", "recall", NumberListField{&config->recall_cpus}, "recalls run on the shards' cores",
       "none"});
  add({"memory", "huge_pages",
       Choice(&config->huge_pages, HugePagePolicy::kAuto, {"auto", "off"})});
  add({"memory",
       "limit_mib",
       Integer(&config->memory_limit_mib, 64, kMaxMib),
       {},
       "three quarters of the machine's memory"});
  AddIndexFields(&config->index, &fields);
  AddLimitFields(&config->limits, &fields);
  return fields;
}

std::vector<SchemaField> FieldsOf(SpaceConfig* space) {
  std::vector<SchemaField> fields;
  const auto add = [&fields](SchemaField field) { fields.push_back(std::move(field)); };
  add({"space", "name", TextField{&space->name, SpaceNameFault}});
  add({"space",
       "dimension",
       Integer(&space->dimension, 1, kMaxDimension),
       {},
       "that of the first observation"});
  add({"space",
       "metric",
       Choice(&space->metric, Metric::kCosine, {"cosine", "ip", "l2"}),
       {},
       "cosine"});
  add({"space", "precision", PrecisionChoice(&space->precision)});
  add({"space", "partitions", Integer(&space->partitions, 1, kMaxCoresOfRole)});
  add({"space", "durability", DurabilityChoice(&space->durability), {}, "data.durability"});
  add({"space", "ttl_s", Integer(&space->ttl_s, 0, kMaxTtlS)});
  add({"space", "quota_observations", Integer(&space->quota_observations, 0, kMaxObservations)});
  add({"space", "quota_mib", Integer(&space->quota_mib, 0, kMaxMib)});
  add({"space", "quota_when_full",
       Choice(&space->quota_when_full, WhenFull::kRefuse, {"refuse", "evict_oldest"})});
  add({"space", "filter_keys", NameListField{&space->filter_keys}});
  return fields;
}

std::string TomlQuoted(std::string_view text) {
  std::string quoted = "\"";
  for (const char byte : text) {
    const auto code = static_cast<unsigned char>(byte);
    if (byte == '"' || byte == '\\') {
      quoted += '\\';
      quoted += byte;
    } else if (code < 0x20 || code == 0x7F) {
      constexpr char kHex[] = "0123456789abcdef";
      quoted.append("\\u00") += kHex[code >> 4];
      quoted += kHex[code & 15];
    } else {
      quoted += byte;
    }
  }
  return quoted + "\"";
}

std::optional<std::string> TomlValue(const SchemaField& field) {
  struct Writer {
    bool optional;
    using Text = std::optional<std::string>;
    Text operator()(const IntegerField& f) const {
      const int64_t value = f.get();
      if (optional && value < f.min) return std::nullopt;
      return std::to_string(value);
    }
    Text operator()(const RealField& f) const { return RealText(*f.value); }
    Text operator()(const SwitchField& f) const { return *f.value ? "true" : "false"; }
    Text operator()(const ChoiceField& f) const {
      const size_t place = f.get();
      if (place >= f.names.size()) return std::nullopt;
      return TomlQuoted(f.names[place]);
    }
    Text operator()(const TextField& f) const { return TomlQuoted(*f.value); }
    Text operator()(const EndpointField& f) const {
      return TomlQuoted(f.value->has_value() ? (*f.value)->ToString() : "");
    }
    Text operator()(const EndpointListField& f) const {
      return ListText(*f.value, [](const Endpoint& e) { return TomlQuoted(e.ToString()); });
    }
    Text operator()(const NumberListField& f) const {
      if (optional && f.value->empty()) return std::nullopt;
      return ListText(*f.value, [](int number) { return std::to_string(number); });
    }
    Text operator()(const NameListField& f) const {
      return ListText(*f.value, [](const std::string& name) { return TomlQuoted(name); });
    }
  };
  return std::visit(Writer{!field.unset.empty()}, field.value);
}

}  // namespace engram
