#include "src/control/config.h"

#include <algorithm>
#include <string>

namespace engram {

namespace {

Result<void> CheckCpus(const Topology& topology, const std::vector<int>& cpus,
                       const std::string& field) {
  for (const int cpu : cpus) {
    const bool known =
        std::ranges::any_of(topology.cpus, [&](const Cpu& c) { return c.os_index == cpu; });
    if (known) continue;
    std::string have;
    for (const Cpu& c : topology.cpus) {
      if (!have.empty()) have += ", ";
      have += std::to_string(c.os_index);
    }
    return Fail(ErrorCode::kInvalidArgument, field + ": processor " + std::to_string(cpu) +
                                                 " is not one that this process may use; choose "
                                                 "from " +
                                                 have);
  }
  return {};
}

}  // namespace

Result<void> PlanCores(const Topology& topology, Config* config) {
  const std::pair<const std::vector<int>*, const char*> fields[] = {
      {&config->ingress_cpus, "cores.ingress"},
      {&config->shard_cpus, "cores.shard"},
      {&config->control_cpus, "cores.control"}};
  for (const auto& [cpus, field] : fields) {
    if (auto checked = CheckCpus(topology, *cpus, field); !checked) return checked;
  }
  const auto& cpus = topology.cpus;
  const bool many = cpus.size() >= 4;
  if (config->control_cpus.empty()) {
    config->control_cpus = {many ? cpus.front().os_index : cpus.back().os_index};
  }
  if (config->ingress_cpus.empty()) {
    config->ingress_cpus = {many ? cpus[1].os_index : cpus.front().os_index};
  }
  if (config->shard_cpus.empty()) {
    if (many) {
      for (size_t i = 2; i < cpus.size(); ++i) config->shard_cpus.push_back(cpus[i].os_index);
    } else {
      config->shard_cpus = {cpus.front().os_index};
    }
  }
  return {};
}

}  // namespace engram
