#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>

#include "src/control/core_map.h"
#include "src/core/topology.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/table.h"
#include "tools/engramctl/topology_tree.h"

namespace engram {

namespace {

constexpr size_t kDefaultColumns = 100;
constexpr size_t kColumnsMin = 40;
constexpr std::string_view kComment = "# ";

nlohmann::json CpuJson(const Cpu& cpu, bool ours) {
  nlohmann::json json = {{"cpu", cpu.os_index},
                         {"core", cpu.core_index},
                         {"numa_node", cpu.numa_node},
                         {"socket", cpu.socket_index},
                         {"allowed", ours}};
  if (cpu.l3_index >= 0) json["l3"] = cpu.l3_index;
  return json;
}

nlohmann::json PlanJson(const CorePlan& plan) {
  nlohmann::json json = {{"mode", CoreModeName(plan.mode)}, {"mode_reason", plan.mode_reason}};
  for (const CoreRole role : kCoreRoles) {
    json[std::string(CoreRoleName(role))] = plan.map.of(role);
  }
  json["reasons"] = nlohmann::json::array();
  for (const CoreReason& reason : plan.reasons) {
    json["reasons"].push_back({{"role", reason.role ? CoreRoleName(*reason.role) : "free"},
                               {"cpus", reason.cpus},
                               {"why", reason.why}});
  }
  return json;
}

nlohmann::json TopologyJson(const Topology& topology) {
  nlohmann::json json = {{"cpus", nlohmann::json::array()},
                         {"nodes", nlohmann::json::array()},
                         {"nics", nlohmann::json::array()},
                         {"l3_bytes", topology.l3_bytes}};
  for (const Cpu& cpu : topology.cpus) json["cpus"].push_back(CpuJson(cpu, true));
  for (const Cpu& cpu : topology.forbidden) json["cpus"].push_back(CpuJson(cpu, false));
  for (const NumaNode& node : topology.nodes) {
    json["nodes"].push_back({{"numa_node", node.os_index}, {"memory_bytes", node.memory_bytes}});
  }
  for (const Nic& nic : topology.nics) {
    nlohmann::json entry = {{"name", nic.name}, {"pci", nic.bus_id}};
    if (nic.numa_node >= 0) entry["numa_node"] = nic.numa_node;
    json["nics"].push_back(std::move(entry));
  }
  return json;
}

}  // namespace

Result<Topology> TopologyOf(const std::string& synthetic) {
  return synthetic.empty() ? DiscoverTopology() : SyntheticTopology(synthetic);
}

int RunTopology(const TopologyOptions& options) {
  const auto topology = TopologyOf(options.synthetic);
  if (!topology) return ReportError(topology.error());
  std::optional<CorePlan> plan;
  if (options.suggest) plan = PlanCoreMap(*topology, {});
  if (options.json) {
    nlohmann::json json = TopologyJson(*topology);
    if (plan) json["suggested"] = PlanJson(*plan);
    std::printf("%s\n", json.dump().c_str());
    return kExitOk;
  }
  const size_t terminal = TerminalColumns(stdout);
  const size_t columns =
      std::max(terminal > 0 ? terminal : kDefaultColumns, kColumnsMin) - kComment.size();
  const std::string tree = DrawTopology(*topology, plan ? &*plan : nullptr, columns);
  if (!plan) {
    std::printf("%s", tree.c_str());
    return kExitOk;
  }
  // The tree as comments, so that the whole answer is a configuration.
  std::string text;
  for (size_t at = 0; at < tree.size();) {
    const size_t end = tree.find('\n', at);
    text.append(kComment).append(tree, at, end - at + 1);
    at = end + 1;
  }
  std::printf("%s\n%s", text.c_str(), CoreMapToml(*plan, IdleStrategy::kHybrid).c_str());
  return kExitOk;
}

}  // namespace engram
