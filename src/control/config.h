#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/control/core_map.h"
#include "src/core/disk.h"
#include "src/core/huge_page_arena.h"
#include "src/core/network.h"
#include "src/core/observation.h"
#include "src/core/space_catalogue.h"
#include "src/core/topology.h"
#include "src/core_runner.h"

// What an operator may set, read and checked once, then passed down. Meaning, default and unit of
// each field stand in config/engram.toml.

namespace engram {

// [index]: how graphs are built and searched. See HnswBuildParams for m to keep_pruned.
struct IndexConfig {
  uint32_t default_ef = 128;
  uint32_t m = 24;
  uint32_t ef_construction = 64;
  double alpha = 1.0;
  bool extend_candidates = false;
  bool keep_pruned = false;
  // Of spaces that do not say otherwise.
  Precision precision = Precision::kF32;
  Traversal traversal = Traversal::kRabitq;
  uint32_t partitions = 1;
  uint64_t grow_partition_at = 250'000;  // observations of a space on one shard; 0: never
  uint32_t max_partitions = 0;           // 0: as many as there are shards
  // Of spaces that do not say otherwise.
  std::vector<std::string> filter_keys = {kDefaultFilterKeys.begin(), kDefaultFilterKeys.end()};
};

// [limits].
struct LimitsConfig {
  uint32_t queue_capacity = 10'000;          // observations, of one shard
  uint32_t global_queue_capacity = 100'000;  // observations, of all shards together
  uint32_t min_batch_size = 10;              // observations
  uint32_t max_batch_size = 500;             // observations
  double high_priority_ratio = 0.1;          // of queue_capacity
  // Shares of a queue's capacity.
  double batch_growth_threshold = 0.5;
  double backpressure_threshold = 0.8;
  double overload_threshold = 0.9;
  uint32_t idle_timeout_s = 300;
  uint32_t cleanup_interval_s = 60;
  uint32_t max_sessions = 10'000;     // of one shard
  uint32_t recall_batch = 10;         // results of a frame; of many, those that come first
  uint32_t max_spaces = 10'000;       // of all shards
  uint32_t max_connections = 10'000;  // of one ingress core
};

// [[space]].
struct SpaceConfig {
  std::string name;
  uint32_t dimension = 0;                            // 0: that of its first observation
  Metric metric = Metric::kUnspecified;              // kUnspecified: cosine
  Precision precision = Precision::kF32;             // where the file is silent: index.precision
  uint32_t partitions = 1;                           // where the file is silent: index.partitions
  Durability durability = Durability::kUnspecified;  // kUnspecified: data.durability
  uint64_t ttl_s = 0;                                // 0: for ever; silent: data.ttl_s
  uint64_t quota_observations = 0;                   // 0: no bound of its own
  uint64_t quota_mib = 0;                            // 0: no bound of its own
  WhenFull quota_when_full = WhenFull::kRefuse;
  std::vector<std::string> filter_keys = {kDefaultFilterKeys.begin(),
                                          kDefaultFilterKeys.end()};  // silent: index.filter_keys
};

// Where the fields stood, for messages about how they fit together.
struct ConfigSource {
  std::string name;                  // of the file; empty: there was none
  std::map<std::string, int> lines;  // "cores.shard" to its line, also "cores"

  // The first of `fields` that was written, else the first.
  std::string_view FieldOf(const std::vector<std::string_view>& fields) const;
  // Its line, else that of its section; 0: neither was written.
  int LineOf(const std::vector<std::string_view>& fields) const;
};

struct Config {
  // [listen]
  std::vector<Endpoint> listen = {{.host = "127.0.0.1", .port = 7654}};
  std::optional<Endpoint> grpc = Endpoint{.host = "127.0.0.1", .port = 50051};
  std::optional<Endpoint> http = Endpoint{.host = "127.0.0.1", .port = 8080};
  std::vector<std::string> http_origins;
  NetworkBackend network_backend = NetworkBackend::kAuto;
  // [data]
  std::string data_directory = "./engram-data";
  DiskBackend disk_backend = DiskBackend::kAuto;
  Durability durability = Durability::kFsync;  // of spaces that do not say otherwise
  uint32_t segment_mib = 64;
  uint32_t flush_interval_ms = 20;
  uint32_t checkpoint_mib = 1'024;  // of all logs together; 0: only on request
  uint32_t session_keep_days = 7;
  uint64_t ttl_s = 0;  // of spaces that do not say otherwise; 0: for ever
  // [cores]: processors, as in /proc/cpuinfo. Empty ones are PlanCores' to fill.
  std::vector<int> control_cpus;
  std::vector<int> ingress_cpus;
  std::vector<int> shard_cpus;
  std::vector<int> recall_cpus;
  std::vector<int> sockets;
  IdleStrategy idle = IdleStrategy::kHybrid;
  CoreMode core_mode = CoreMode::kAuto;
  // [memory]
  HugePagePolicy huge_pages = HugePagePolicy::kAuto;
  size_t memory_limit_mib = 0;  // of all shards together; 0: three quarters of the machine's

  IndexConfig index;
  LimitsConfig limits;
  std::vector<SpaceConfig> spaces;

  ConfigSource source;
};

// One thing that is wrong with a configuration.
struct ConfigFault {
  int line = 0;         // 0: it stands nowhere
  std::string field;    // "cores.shard"
  std::string message;  // what is wrong, with the value; what to write instead

  // "FILE:LINE: field: message", without the parts that there are not.
  std::string ToString(const std::string& file) const;
};
// In the order of the file, a line each.
std::string JoinFaults(std::vector<ConfigFault> faults, const std::string& file);

CoreRequest CoreRequestOf(const Config& config);

// How the fields fit together; single fields are the loader's to check. With a topology, `config`
// is checked as it would run there, with the cores that PlanCores chooses.
std::vector<ConfigFault> CheckConfig(const Config& config, const Topology* topology);

// Fills in the processors that the configuration leaves open (see PlanCoreMap). Errors:
// kInvalidArgument with every fault of the core map, a line each.
Result<void> PlanCores(const Topology& topology, Config* config);

// The fields that were set to something other than the default and that this version does not
// honour yet, by name; config/engram.toml says what happens instead.
std::vector<std::string> FieldsNotHonoured(const Config& config);

}  // namespace engram
