#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "src/core/huge_page_arena.h"
#include "src/core/network.h"
#include "src/core/topology.h"
#include "src/core_runner.h"

namespace engram {

// What an operator may set, read and checked once, then passed down. Each field stands with its
// meaning and default in config/engram.toml.
struct Config {
  std::vector<Endpoint> listen = {{.host = "127.0.0.1", .port = 7654}};
  std::string data_directory = "./engram-data";

  // Processors, as in /proc/cpuinfo. Empty: chosen from the machine.
  std::vector<int> ingress_cpus;
  std::vector<int> shard_cpus;
  std::vector<int> control_cpus;
  IdleStrategy idle = IdleStrategy::kHybrid;

  NetworkBackend network_backend = NetworkBackend::kAuto;
  uint32_t max_connections = 10'000;  // of one ingress core

  HugePagePolicy huge_pages = HugePagePolicy::kAuto;
  size_t memory_limit_mib = 0;  // of all shards together; 0: three quarters of the machine's

  uint32_t default_ef = 128;
  uint32_t hnsw_m = 16;
  uint32_t hnsw_ef_construction = 100;
};

// Fills in the processors that the configuration leaves open. Up to three of them: ingress and
// shard run to completion on the first, control on the last. From four on: one for control, one for
// ingress, the others are shards. Errors: kInvalidArgument naming a processor that is not there.
Result<void> PlanCores(const Topology& topology, Config* config);

}  // namespace engram
