#include "src/control/config.h"

#include <algorithm>
#include <set>
#include <utility>

#include "src/control/config_schema.h"
#include "src/core/attributes.h"

namespace engram {

namespace {

bool IsWildcard(const Endpoint& endpoint) {
  return endpoint.host == "0.0.0.0" || endpoint.host == "::";
}

bool IsIpv6(const Endpoint& endpoint) { return endpoint.host.find(':') != std::string::npos; }

// Whether the second could not be bound beside the first. The "::" of gRPC and HTTP takes IPv4 as
// well.
bool Clash(const Endpoint& a, const Endpoint& b, bool dual_stack) {
  if (a.port == 0 || a.port != b.port) return false;
  if (a.host == b.host) return true;
  if (dual_stack && (a.host == "::" || b.host == "::")) return true;
  return IsIpv6(a) == IsIpv6(b) && (IsWildcard(a) || IsWildcard(b));
}

// What is wrong with a list of filter keys, a fault each.
std::vector<std::string> FilterKeyFaults(const std::vector<std::string>& keys) {
  std::vector<std::string> faults;
  std::set<std::string> seen;
  for (const std::string& key : keys) {
    if (!IsValidFilterKey(key)) {
      faults.push_back(TomlQuoted(key) + " is no key; write 1 to " +
                       std::to_string(kMaxAttributeKeyBytes) +
                       " printable ASCII characters without spaces and '='");
    } else if (IsBuiltInFilterKey(key)) {
      faults.push_back(TomlQuoted(key) + " is a key of every space; take it out");
    } else if (!seen.insert(key).second) {
      faults.push_back(TomlQuoted(key) + " is listed twice; list it once");
    }
  }
  if (keys.size() > kMaxFilterKeys) {
    faults.push_back(std::to_string(keys.size()) + " keys are more than " +
                     std::to_string(kMaxFilterKeys) + "; each is kept in memory: list fewer");
  }
  return faults;
}

// How fields fit together; each Check… is one subject.
class ConfigChecker {
 public:
  ConfigChecker(const Config& config, const Topology* topology)
      : config_(config), topology_(topology) {}

  std::vector<ConfigFault> Check() {
    CheckListeners();
    CheckCores();
    CheckLimits();
    CheckIndex();
    CheckSpaces();
    return std::move(faults_);
  }

 private:
  // At the first of `fields` that was written.
  void Add(const std::vector<std::string_view>& fields, std::string message) {
    faults_.push_back({config_.source.LineOf(fields), std::string(config_.source.FieldOf(fields)),
                       std::move(message)});
  }

  void CheckListeners() {
    const auto& tcp = config_.listen;
    for (size_t i = 0; i < tcp.size(); ++i) {
      for (size_t j = i + 1; j < tcp.size(); ++j) {
        if (!Clash(tcp[i], tcp[j], false)) continue;
        Add({"listen.tcp"}, TomlQuoted(tcp[i].ToString()) + " and " +
                                TomlQuoted(tcp[j].ToString()) +
                                " cannot both be listened on; take one out or change its port");
      }
      CheckGateway("listen.grpc", config_.grpc, "listen.tcp", tcp[i]);
      CheckGateway("listen.http", config_.http, "listen.tcp", tcp[i]);
    }
    if (config_.grpc.has_value()) {
      CheckGateway("listen.http", config_.http, "listen.grpc", *config_.grpc);
    }
    for (const std::string& origin : config_.http_origins) {
      const size_t scheme = origin.find("://");
      const bool is_origin = scheme != std::string::npos && scheme > 0 &&
                             scheme + 3 < origin.size() &&
                             origin.find('/', scheme + 3) == std::string::npos;
      if (is_origin) continue;
      Add({"listen.http_origins"}, TomlQuoted(origin) +
                                       " is no origin; write scheme, host and port as browsers do, "
                                       "like \"https://example.com\"");
    }
  }

  void CheckGateway(std::string_view field, const std::optional<Endpoint>& endpoint,
                    std::string_view other_field, const Endpoint& other) {
    if (!endpoint || !Clash(other, *endpoint, true)) return;
    Add({field, other_field}, TomlQuoted(endpoint->ToString()) + " of " + std::string(field) +
                                  " clashes with " + TomlQuoted(other.ToString()) + " of " +
                                  std::string(other_field) + "; give one of them another port");
  }

  void CheckCores() {
    const CoreRequest request = CoreRequestOf(config_);
    CoreMap map = request.given;
    if (topology_ != nullptr) map = PlanCoreMap(*topology_, request).map;
    for (CoreFault& fault : CheckCoreMap(topology_, request, map)) {
      Add(fault.fields, std::move(fault.message));
      cores_are_sound_ = false;
    }
    shards_ = map.shard.size();
  }

  void CheckNotAbove(std::string_view low, auto low_value, std::string_view high, auto high_value) {
    if (low_value <= high_value) return;
    Add({low, high}, std::string(low) + " = " + std::to_string(low_value) + " is more than " +
                         std::string(high) + " = " + std::to_string(high_value) +
                         "; lower the first or raise the second");
  }

  void CheckLimits() {
    const LimitsConfig& limits = config_.limits;
    CheckNotAbove("limits.min_batch_size", limits.min_batch_size, "limits.max_batch_size",
                  limits.max_batch_size);
    CheckNotAbove("limits.queue_capacity", limits.queue_capacity, "limits.global_queue_capacity",
                  limits.global_queue_capacity);
    CheckNotAbove("limits.max_batch_size", limits.max_batch_size, "limits.queue_capacity",
                  limits.queue_capacity);
    Config copy = config_;
    std::string thresholds;
    for (const SchemaField& field : FieldsOf(&copy)) {
      if (!field.key.ends_with("_threshold")) continue;
      thresholds += (thresholds.empty() ? "" : ", ") + std::string(field.key) + " = " +
                    TomlValue(field).value_or("");
    }
    if (limits.batch_growth_threshold >= limits.backpressure_threshold ||
        limits.backpressure_threshold >= limits.overload_threshold) {
      Add({"limits.batch_growth_threshold", "limits.backpressure_threshold",
           "limits.overload_threshold"},
          thresholds + " do not rise; write each above the one before, like 0.5, 0.8, 0.9");
    }
  }

  // `shards_` is known only when all processors are there.
  void CheckPartitions(std::string_view field, uint32_t partitions, int line) {
    const uint32_t max = config_.index.max_partitions;
    const auto add = [&](std::string message) {
      faults_.push_back({line, std::string(field), std::move(message)});
    };
    if (max > 0 && partitions > max && field != "index.max_partitions") {
      add(std::to_string(partitions) + " is more than index.max_partitions = " +
          std::to_string(max) + "; write at most that, or raise index.max_partitions");
    } else if (cores_are_sound_ && shards_ > 0 && partitions > shards_) {
      add(std::to_string(partitions) + " partitions need as many shards, and there " +
          (shards_ == 1 ? "is 1" : "are " + std::to_string(shards_)) + "; write at most " +
          std::to_string(shards_) + ", or give cores.shard more processors");
    }
  }

  void CheckIndex() {
    const IndexConfig& index = config_.index;
    CheckPartitions("index.partitions", index.partitions,
                    config_.source.LineOf({"index.partitions"}));
    if (index.max_partitions > 0) {
      CheckPartitions("index.max_partitions", index.max_partitions,
                      config_.source.LineOf({"index.max_partitions"}));
    }
    for (std::string& fault : FilterKeyFaults(index.filter_keys)) {
      Add({"index.filter_keys"}, std::move(fault));
    }
  }

  std::string SpaceField(size_t space, std::string_view key, int* line) const {
    const std::string at = "space[" + std::to_string(space) + "]";
    *line = config_.source.LineOf({at + "." + std::string(key), at});
    return "space." + std::string(key);
  }

  void AddSpaceFault(size_t space, std::string_view key, std::string message) {
    int line = 0;
    std::string field = SpaceField(space, key, &line);
    faults_.push_back({line, std::move(field), std::move(message)});
  }

  void CheckSpaces() {
    std::map<std::string, size_t> names;
    for (size_t i = 0; i < config_.spaces.size(); ++i) {
      const SpaceConfig& space = config_.spaces[i];
      const auto [first, is_new] = names.emplace(space.name, i);
      if (!is_new && !space.name.empty()) {
        int line = 0;
        SpaceField(first->second, "name", &line);
        AddSpaceFault(i, "name",
                      TomlQuoted(space.name) + " is the space of line " + std::to_string(line) +
                          " already; choose another name");
      }
      int line = 0;
      const std::string field = SpaceField(i, "partitions", &line);
      // What a space takes over from [index] was said there.
      if (space.partitions != config_.index.partitions) {
        CheckPartitions(field, space.partitions, line);
      }
      CheckQuota(i);
      // What a space takes over from [index] was said there.
      if (space.filter_keys == config_.index.filter_keys) continue;
      for (std::string& fault : FilterKeyFaults(space.filter_keys)) {
        AddSpaceFault(i, "filter_keys", std::move(fault));
      }
    }
    if (config_.spaces.size() > config_.limits.max_spaces) {
      Add({"limits.max_spaces"}, std::to_string(config_.limits.max_spaces) + " is fewer than the " +
                                     std::to_string(config_.spaces.size()) +
                                     " [[space]] entries; raise it");
    }
  }

  // Each partition evicts its own oldest, and keeps what it has stored last. `shards_` as above.
  void CheckQuota(size_t i) {
    const SpaceConfig& space = config_.spaces[i];
    if (space.quota_observations == 0 || space.quota_when_full != WhenFull::kEvictOldest) return;
    uint64_t most = config_.index.max_partitions;
    if (most == 0 && cores_are_sound_) most = shards_;
    if (space.quota_observations >= most) return;
    AddSpaceFault(
        i, "quota_observations",
        std::to_string(space.quota_observations) + " is less than the " + std::to_string(most) +
            " partitions that the space may grow to, and with quota_when_full = " +
            "\"evict_oldest\" each keeps one at least; write at least " + std::to_string(most) +
            ", or set index.max_partitions to at most " + std::to_string(space.quota_observations));
  }

  const Config& config_;
  const Topology* const topology_;
  size_t shards_ = 0;
  bool cores_are_sound_ = true;
  std::vector<ConfigFault> faults_;
};

}  // namespace

std::string_view ConfigSource::FieldOf(const std::vector<std::string_view>& fields) const {
  for (const std::string_view field : fields) {
    if (lines.contains(std::string(field))) return field;
  }
  return fields.front();
}

int ConfigSource::LineOf(const std::vector<std::string_view>& fields) const {
  for (const std::string_view field : fields) {
    if (const auto line = lines.find(std::string(field)); line != lines.end()) return line->second;
  }
  for (const std::string_view field : fields) {
    const auto section = lines.find(std::string(field.substr(0, field.find('.'))));
    if (section != lines.end()) return section->second;
  }
  return 0;
}

std::string ConfigFault::ToString(const std::string& file) const {
  std::string text;
  if (!file.empty()) text = file + ":" + (line > 0 ? std::to_string(line) + ":" : "") + " ";
  if (!field.empty()) text += field + ": ";
  return text + message;
}

std::string JoinFaults(std::vector<ConfigFault> faults, const std::string& file) {
  std::ranges::stable_sort(faults, {}, &ConfigFault::line);
  std::string text;
  for (const ConfigFault& fault : faults) {
    if (!text.empty()) text += "\n";
    text += fault.ToString(file);
  }
  return text;
}

CoreRequest CoreRequestOf(const Config& config) {
  return {.given = {.control = config.control_cpus,
                    .ingress = config.ingress_cpus,
                    .shard = config.shard_cpus,
                    .recall = config.recall_cpus},
          .sockets = config.sockets,
          .mode = config.core_mode,
          .idle = config.idle};
}

std::vector<ConfigFault> CheckConfig(const Config& config, const Topology* topology) {
  return ConfigChecker(config, topology).Check();
}

Result<void> PlanCores(const Topology& topology, Config* config) {
  const CoreRequest request = CoreRequestOf(*config);
  CorePlan plan = PlanCoreMap(topology, request);
  std::vector<ConfigFault> faults;
  for (const CoreFault& fault : CheckCoreMap(&topology, request, plan.map)) {
    faults.push_back(
        {config->source.LineOf(fault.fields), std::string(fault.fields.front()), fault.message});
  }
  if (!faults.empty()) {
    return Fail(ErrorCode::kInvalidArgument, JoinFaults(std::move(faults), config->source.name));
  }
  config->control_cpus = std::move(plan.map.control);
  config->ingress_cpus = std::move(plan.map.ingress);
  config->shard_cpus = std::move(plan.map.shard);
  config->recall_cpus = std::move(plan.map.recall);
  return {};
}

std::vector<std::string> FieldsNotHonoured(const Config& config) {
  std::vector<std::string> names;
  const auto compare = [&names](const auto& set, const auto& defaults) {
    for (size_t i = 0; i < set.size(); ++i) {
      if (set[i].instead.empty() || TomlValue(set[i]) == TomlValue(defaults[i])) continue;
      if (std::ranges::find(names, set[i].name()) == names.end()) names.push_back(set[i].name());
    }
  };
  Config as_set = config;
  Config by_default;
  compare(FieldsOf(&as_set), FieldsOf(&by_default));
  SpaceConfig space_by_default;
  for (SpaceConfig& space : as_set.spaces) {
    compare(FieldsOf(&space), FieldsOf(&space_by_default));
  }
  return names;
}

}  // namespace engram
