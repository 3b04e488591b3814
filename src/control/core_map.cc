#include "src/control/core_map.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "src/core/commit_stamp.h"

namespace engram {

namespace {

static_assert(kMaxCoresOfRole <= kMaxShards, "each shard has a number of its own");

// About so many shards to one ingress core: an ingress core decodes and copies about three times
// as many observations as a shard logs and links.
constexpr size_t kShardsPerIngress = 3;
// From so many free cores on, control has one for itself.
constexpr size_t kCoresForOwnControl = 4;
// Up to so many worker cores each does everything.
constexpr size_t kRunToCompletionCores = 2;

constexpr size_t CeilDivide(size_t a, size_t b) { return (a + b - 1) / b; }

struct PhysicalCore {
  int node = 0;
  std::vector<int> cpus;  // that we may use, by rising number
};

std::string Number(size_t count, std::string_view one, std::string_view many) {
  return std::to_string(count) + " " + std::string(count == 1 ? one : many);
}

// Makes one plan; see PlanCoreMap for the steps.
class Planner {
 public:
  Planner(const Topology& topology, const CoreRequest& request)
      : topology_(topology), request_(request) {
    std::map<std::pair<int, int>, PhysicalCore> cores;
    for (const Cpu& cpu : topology.cpus) {
      if (!InSockets(cpu)) continue;
      PhysicalCore& core = cores[{cpu.numa_node, cpu.core_index}];
      core.node = cpu.numa_node;
      core.cpus.push_back(cpu.os_index);
    }
    for (auto& [key, core] : cores) cores_.push_back(std::move(core));
    std::ranges::stable_sort(cores_, [](const PhysicalCore& a, const PhysicalCore& b) {
      return std::pair(a.node, a.cpus.front()) < std::pair(b.node, b.cpus.front());
    });
    plan_.map = request.given;
    for (const CoreRole role : kCoreRoles) {
      taken_.insert(request.given.of(role).begin(), request.given.of(role).end());
    }
  }

  CorePlan Plan() {
    if (cores_.empty()) return plan_;
    for (const CoreRole role : kCoreRoles) {
      if (!request_.given.of(role).empty()) Explain(role, request_.given.of(role), "as given");
    }
    const bool plan_ingress = plan_.map.ingress.empty();
    const bool plan_shards = plan_.map.shard.empty();
    if (plan_.map.control.empty()) PickControl(plan_ingress && plan_shards);
    if (plan_ingress && plan_shards) {
      PickWorkers();
    } else if (plan_ingress) {
      PickIngress();
    } else if (plan_shards) {
      PickShards();
    }
    NameMode();
    ExplainFree();
    // Role by role, as the lists are written.
    std::ranges::stable_sort(plan_.reasons, {}, [](const CoreReason& reason) {
      return reason.role ? static_cast<int>(*reason.role) : 99;
    });
    return std::move(plan_);
  }

 private:
  bool InSockets(const Cpu& cpu) const {
    return request_.sockets.empty() ||
           std::ranges::find(request_.sockets, cpu.socket_index) != request_.sockets.end();
  }

  std::vector<const PhysicalCore*> FreeCores() const {
    std::vector<const PhysicalCore*> free;
    for (const PhysicalCore& core : cores_) {
      const bool used =
          std::ranges::any_of(core.cpus, [&](int cpu) { return taken_.contains(cpu); });
      if (!used) free.push_back(&core);
    }
    return free;
  }

  void Explain(CoreRole role, std::vector<int> cpus, std::string why) {
    if (!cpus.empty()) plan_.reasons.push_back({role, std::move(cpus), std::move(why)});
  }

  void TakeControl(int cpu, bool reserve, std::string why) {
    plan_.map.control = {cpu};
    if (reserve) {
      taken_.insert(cpu);
      control_cpu_ = cpu;
    }
    Explain(CoreRole::kControl, {cpu}, std::move(why));
  }

  // Step 2. `both`: ingress and shards are still to be placed.
  void PickControl(bool both) {
    const auto free = FreeCores();
    if (free.size() >= kCoresForOwnControl) {
      const PhysicalCore& first = *free.front();
      TakeControl(first.cpus.front(), true,
                  "first core of node " + std::to_string(first.node) +
                      ", where interrupts and the rest of the system are mostly at home; never "
                      "beside a worker");
      return;
    }
    if (free.empty()) {
      const int cpu = SpareCpu();
      TakeControl(cpu, true, "the last processor that is left");
      return;
    }
    const PhysicalCore& last = *free.back();
    const size_t cpus = CountCpus(free);
    if (both && request_.mode == CoreMode::kPipelined && cpus <= 2) {
      TakeControl(free.front()->cpus.front(), false,
                  "shared with ingress: pipelined takes both processors");
    } else if (both && cpus == 1) {
      TakeControl(last.cpus.front(), false, "the only processor");
    } else if (last.cpus.size() > 1) {
      TakeControl(last.cpus.back(), true,
                  "a hyperthread beside a worker: a core of its own would cost a worker");
    } else {
      TakeControl(last.cpus.back(), true, "the last core; the others are workers");
    }
  }

  static size_t CountCpus(const std::vector<const PhysicalCore*>& cores) {
    size_t count = 0;
    for (const PhysicalCore* core : cores) count += core->cpus.size();
    return count;
  }

  // A processor that no list names, the last one if possible; else simply the last.
  int SpareCpu() const {
    for (auto core = cores_.rbegin(); core != cores_.rend(); ++core) {
      for (auto cpu = core->cpus.rbegin(); cpu != core->cpus.rend(); ++cpu) {
        if (!taken_.contains(*cpu)) return *cpu;
      }
    }
    return cores_.back().cpus.back();
  }

  // Step 1: one processor of each free core, by node. A core whose last hyperthread went to control
  // counts as free on machines that small.
  std::map<int, std::vector<int>> Workers() const {
    std::map<int, std::vector<int>> workers;
    size_t count = 0;
    for (const PhysicalCore& core : cores_) {
      const bool used = std::ranges::any_of(
          core.cpus, [&](int cpu) { return taken_.contains(cpu) && cpu != control_cpu_; });
      if (used || core.cpus.front() == control_cpu_) continue;
      workers[core.node].push_back(core.cpus.front());
      ++count;
    }
    if (request_.mode != CoreMode::kPipelined || count >= 2) return workers;
    // Two roles that must not share, and one core: its hyperthreads.
    workers.clear();
    for (const PhysicalCore& core : cores_) {
      for (const int cpu : core.cpus) {
        if (!taken_.contains(cpu)) workers[core.node].push_back(cpu);
      }
    }
    return workers;
  }

  std::string NearNics(int node) const {
    std::string names;
    for (const Nic& nic : topology_.nics) {
      if (nic.numa_node != node) continue;
      names += (names.empty() ? "" : ", ") + nic.name;
    }
    return names;
  }

  // Nodes in the order in which ingress cores are listed: those with a NIC first.
  std::vector<int> NodeOrder(const std::map<int, std::vector<int>>& workers) const {
    std::vector<int> order;
    for (const auto& [node, cpus] : workers) order.push_back(node);
    std::ranges::stable_partition(order, [&](int node) { return !NearNics(node).empty(); });
    return order;
  }

  // Steps 3 and 4.
  void PickWorkers() {
    const auto workers = Workers();
    size_t count = 0;
    size_t most = 0;
    for (const auto& [node, cpus] : workers) {
      count += cpus.size();
      most = std::max(most, cpus.size());
    }
    const bool small = count <= kRunToCompletionCores || most < 2;
    if (request_.mode == CoreMode::kRunToCompletion ||
        (request_.mode == CoreMode::kAuto && small)) {
      RunToCompletionOn(workers);
    } else {
      for (const int node : NodeOrder(workers)) SplitNode(node, workers.at(node));
      if (plan_.map.shard.empty()) SplitAcrossNodes(workers);
    }
  }

  void RunToCompletionOn(const std::map<int, std::vector<int>>& workers) {
    for (const auto& [node, cpus] : workers) {
      std::vector<int> taken = cpus;
      taken.resize(std::min(taken.size(), kMaxCoresOfRole - plan_.map.shard.size()));
      for (const CoreRole role : {CoreRole::kIngress, CoreRole::kShard}) {
        Append(role, taken,
               "node " + std::to_string(node) + ": runs to completion, " +
                   (role == CoreRole::kIngress ? "the shard is on the same core"
                                               : "fed by the ingress on the same core"));
      }
    }
    if (plan_.map.shard.empty()) {
      const int cpu = plan_.map.control.empty() ? SpareCpu() : plan_.map.control.front();
      for (const CoreRole role : {CoreRole::kIngress, CoreRole::kShard}) {
        Append(role, {cpu}, "the only processor: everything runs on it");
      }
    }
  }

  void SplitNode(int node, const std::vector<int>& cpus) {
    if (cpus.size() < 2) return;
    const size_t ingress = CeilDivide(cpus.size() - 1, kShardsPerIngress + 1);
    const size_t room = kMaxCoresOfRole - plan_.map.shard.size();
    const auto split = cpus.begin() + static_cast<ptrdiff_t>(ingress);
    std::vector<int> shards(split, cpus.end());
    shards.resize(std::min(shards.size(), room));
    if (shards.empty()) return;
    const std::string on = "node " + std::to_string(node);
    const std::string nics = NearNics(node);
    std::string why = on;
    if (!nics.empty()) {
      why += ", next to " + nics;
    } else if (!topology_.nics.empty() && topology_.nodes.size() > 1) {
      why += ", no NIC of its own, but its shards need an ingress near";
    }
    why += ": " + std::to_string(ingress) + " for " + Number(shards.size(), "shard", "shards");
    if (shards.size() >= kShardsPerIngress) why += ", about one to three";
    Append(CoreRole::kIngress, {cpus.begin(), split}, why);
    Append(CoreRole::kShard, std::move(shards),
           on + ", as their ingress: rings and slots stay in near memory");
  }

  // Only where "pipelined" was asked for and no node has two cores.
  void SplitAcrossNodes(const std::map<int, std::vector<int>>& workers) {
    std::vector<int> all;
    for (const auto& [node, cpus] : workers) all.insert(all.end(), cpus.begin(), cpus.end());
    if (all.empty()) all.push_back(plan_.map.control.front());
    Append(CoreRole::kIngress, {all.front()}, "the first worker");
    Append(CoreRole::kShard, {all.back()}, "the last worker");
  }

  void Append(CoreRole role, std::vector<int> cpus, std::string why) {
    std::vector<int>& list = plan_.map.of(role);
    list.insert(list.end(), cpus.begin(), cpus.end());
    taken_.insert(cpus.begin(), cpus.end());
    Explain(role, std::move(cpus), std::move(why));
  }

  // Shards are given.
  void PickIngress() {
    const std::vector<int>& shards = plan_.map.shard;
    if (request_.mode == CoreMode::kRunToCompletion) {
      Append(CoreRole::kIngress, shards, "runs to completion with the shards given");
      return;
    }
    const auto workers = Workers();
    std::map<int, std::vector<int>> by_node;
    for (const int cpu : shards) by_node[topology_.NodeOf(cpu)].push_back(cpu);
    for (const auto& [node, near] : by_node) {
      const size_t wanted = CeilDivide(near.size(), kShardsPerIngress);
      const auto free = workers.find(node);
      std::vector<int> cpus = free == workers.end() ? near : free->second;
      cpus.resize(std::min(cpus.size(), wanted));
      const std::string on = "node " + std::to_string(node);
      Append(CoreRole::kIngress, std::move(cpus),
             free == workers.end() ? on + ": no core is free there, so beside a shard"
                                   : on + ", near the shards given");
    }
  }

  // Ingress cores are given.
  void PickShards() {
    std::set<int> nodes;
    for (const int cpu : plan_.map.ingress) nodes.insert(topology_.NodeOf(cpu));
    if (request_.mode != CoreMode::kRunToCompletion) {
      for (const auto& [node, cpus] : Workers()) {
        if (!nodes.contains(node)) continue;
        std::vector<int> taken = cpus;
        taken.resize(std::min(taken.size(), kMaxCoresOfRole - plan_.map.shard.size()));
        Append(CoreRole::kShard, std::move(taken),
               "node " + std::to_string(node) + ", near the ingress given");
      }
    }
    if (plan_.map.shard.empty()) {
      Append(CoreRole::kShard, plan_.map.ingress, "runs to completion with the ingress given");
    }
  }

  void NameMode() {
    const std::set<int> ingress(plan_.map.ingress.begin(), plan_.map.ingress.end());
    const bool shared =
        std::ranges::any_of(plan_.map.shard, [&](int cpu) { return ingress.contains(cpu); });
    if (plan_.map.ingress == plan_.map.shard) {
      plan_.mode = CoreMode::kRunToCompletion;
      plan_.mode_reason =
          "each worker core both receives and stores: there are too few to keep them apart";
    } else {
      plan_.mode = shared ? CoreMode::kAuto : CoreMode::kPipelined;
      plan_.mode_reason = shared ? "some cores both receive and store"
                                 : "enough cores to keep receiving and storing apart: neither "
                                   "waits for the other";
    }
    if (request_.mode != CoreMode::kAuto) plan_.mode_reason = "as asked for";
  }

  void ExplainFree() {
    std::vector<int> siblings;
    std::vector<int> rest;
    const std::set<int> control(plan_.map.control.begin(), plan_.map.control.end());
    for (const PhysicalCore& core : cores_) {
      const bool used = std::ranges::any_of(
          core.cpus, [&](int cpu) { return taken_.contains(cpu) || control.contains(cpu); });
      for (const int cpu : core.cpus) {
        if (taken_.contains(cpu) || control.contains(cpu)) continue;
        (used ? siblings : rest).push_back(cpu);
      }
    }
    if (!siblings.empty()) {
      plan_.reasons.push_back({std::nullopt, siblings,
                               "hyperthreads beside the cores above stay free: two pollers on one "
                               "core take each other's execution units and cache"});
    }
    if (!rest.empty()) {
      plan_.reasons.push_back({std::nullopt, rest,
                               "free for the system: no ingress or shard would find its partner "
                               "on the same node"});
    }
  }

  const Topology& topology_;
  const CoreRequest& request_;
  std::vector<PhysicalCore> cores_;  // by node, then number
  std::set<int> taken_;
  int control_cpu_ = -1;  // planned, not given
  CorePlan plan_;
};

// Gathers the faults of one map.
class Checker {
 public:
  Checker(const Topology* topology, const CoreRequest& request, const CoreMap& map)
      : topology_(topology), request_(request), map_(map) {}

  std::vector<CoreFault> Check() {
    for (const CoreRole role : kCoreRoles) CheckList(role);
    CheckSockets();
    // Of processors that are not there nothing more can be said.
    if (topology_ != nullptr && faults_.empty()) {
      CheckNodes();
    }
    CheckMode();
    CheckSharing();
    return std::move(faults_);
  }

 private:
  void Add(std::vector<std::string_view> fields, std::string message) {
    faults_.push_back({std::move(fields), std::move(message)});
  }

  std::string Choices() const {
    std::vector<int> cpus;
    for (const Cpu& cpu : topology_->cpus) cpus.push_back(cpu.os_index);
    return CpuRanges(std::move(cpus));
  }

  void CheckList(CoreRole role) {
    std::set<int> seen;
    std::set<int> twice;
    // What was planned from these lists would only repeat their faults.
    for (const int cpu : request_.given.of(role)) {
      if (!seen.insert(cpu).second) twice.insert(cpu);
    }
    for (const int cpu : twice) {
      Add({CoreRoleField(role)},
          "processor " + std::to_string(cpu) + " is listed twice; list it once");
    }
    if (topology_ != nullptr) {
      for (const int cpu : seen) CheckExists(role, cpu);
    }
    if ((role == CoreRole::kIngress || role == CoreRole::kShard) &&
        map_.of(role).size() > kMaxCoresOfRole) {
      Add({CoreRoleField(role)}, std::to_string(map_.of(role).size()) +
                                     " processors are more than " +
                                     std::to_string(kMaxCoresOfRole) + "; list fewer");
    }
  }

  void CheckExists(CoreRole role, int cpu) {
    const std::string name = "processor " + std::to_string(cpu);
    if (const Cpu* found = topology_->Find(cpu); found != nullptr) {
      if (request_.sockets.empty() ||
          std::ranges::find(request_.sockets, found->socket_index) != request_.sockets.end()) {
        return;
      }
      Add({CoreRoleField(role)}, name + " is on socket " + std::to_string(found->socket_index) +
                                     ", which cores.sockets leaves out; choose another, or add "
                                     "the socket");
    } else if (std::ranges::find(topology_->forbidden, cpu, &Cpu::os_index) !=
               topology_->forbidden.end()) {
      Add({CoreRoleField(role)}, name +
                                     " is not one that this process may use (affinity or "
                                     "cpuset); choose from " +
                                     Choices() + ", or allow it with taskset or AllowedCPUs=");
    } else {
      Add({CoreRoleField(role)}, name + " is not in this machine; choose from " + Choices());
    }
  }

  void CheckSockets() {
    if (topology_ == nullptr) return;
    std::set<int> known;
    for (const Cpu& cpu : topology_->cpus) known.insert(cpu.socket_index);
    for (const int socket : request_.sockets) {
      if (known.contains(socket)) continue;
      Add({"cores.sockets"}, "socket " + std::to_string(socket) +
                                 " has no processor that this process may use; choose from " +
                                 CpuRanges({known.begin(), known.end()}));
    }
  }

  std::vector<int> CpusOfNode(int node) const {
    std::vector<int> cpus;
    for (const Cpu& cpu : topology_->cpus) {
      if (cpu.numa_node == node) cpus.push_back(cpu.os_index);
    }
    return cpus;
  }

  std::set<int> NodesOf(CoreRole role) const {
    std::set<int> nodes;
    for (const int cpu : map_.of(role)) nodes.insert(topology_->NodeOf(cpu));
    return nodes;
  }

  // Each of `role` wants one of `partner` on its node.
  void CheckNear(CoreRole role, CoreRole partner) {
    const std::set<int> near = NodesOf(partner);
    std::map<int, std::vector<int>> far;
    for (const int cpu : map_.of(role)) {
      const int node = topology_->NodeOf(cpu);
      if (!near.contains(node)) far[node].push_back(cpu);
    }
    const std::string other(CoreRoleName(partner));
    for (const auto& [node, cpus] : far) {
      Add({CoreRoleField(role), CoreRoleField(partner)},
          (cpus.size() == 1 ? "processor " : "processors ") + CpuRanges(cpus) +
              (cpus.size() == 1 ? " is" : " are") + " on NUMA node " + std::to_string(node) +
              ", far from every " + other + " core (node " + CpuRanges({near.begin(), near.end()}) +
              "); make one of " + CpuRanges(CpusOfNode(node)) + " a" +
              (partner == CoreRole::kIngress ? "n " : " ") + other + " core, or choose from node " +
              CpuRanges({near.begin(), near.end()}));
    }
  }

  void CheckNodes() {
    CheckNear(CoreRole::kShard, CoreRole::kIngress);
    CheckNear(CoreRole::kRecall, CoreRole::kShard);
  }

  std::vector<int> Shared(CoreRole a, CoreRole b) const {
    const std::set<int> in_a(map_.of(a).begin(), map_.of(a).end());
    std::set<int> both;
    for (const int cpu : map_.of(b)) {
      if (in_a.contains(cpu)) both.insert(cpu);
    }
    return {both.begin(), both.end()};
  }

  void CheckMode() {
    const std::vector<int> both = Shared(CoreRole::kIngress, CoreRole::kShard);
    if (request_.mode == CoreMode::kPipelined && !both.empty()) {
      Add({"cores.mode", "cores.shard", "cores.ingress"},
          "\"pipelined\" keeps ingress and shards apart, but both run on " + CpuRanges(both) +
              "; take " + (both.size() == 1 ? "it" : "them") +
              " out of one list, or write \"run_to_completion\"");
    }
    if (request_.mode == CoreMode::kRunToCompletion && !map_.ingress.empty() &&
        !map_.shard.empty() && map_.ingress != map_.shard) {
      Add({"cores.mode", "cores.shard", "cores.ingress"},
          "\"run_to_completion\" runs an ingress and a shard on each processor, but ingress has " +
              CpuRanges(map_.ingress) + " and shard has " + CpuRanges(map_.shard) +
              "; write the same list for both, or \"pipelined\"");
    }
  }

  void CheckSharing() {
    for (const CoreRole role : {CoreRole::kIngress, CoreRole::kShard, CoreRole::kRecall}) {
      const std::vector<int> both = Shared(CoreRole::kControl, role);
      if (request_.idle != IdleStrategy::kSpin || both.empty()) continue;
      Add({"cores.control", CoreRoleField(role), "cores.idle"},
          "processor " + CpuRanges(both) + " also is " +
              (role == CoreRole::kIngress ? "an " : "a ") + std::string(CoreRoleName(role)) +
              " core, which spins and leaves control no time; give control another processor, or "
              "set cores.idle = \"hybrid\"");
    }
    for (const CoreRole role : {CoreRole::kIngress, CoreRole::kShard}) {
      const std::vector<int> both = Shared(CoreRole::kRecall, role);
      if (both.empty()) continue;
      Add({"cores.recall"}, "processor " + CpuRanges(both) + " also is " +
                                (role == CoreRole::kIngress
                                     ? std::string("an ingress core, which recalls would hold up")
                                     : std::string("a shard core, which answers recalls anyway")) +
                                "; take it out of one list");
    }
  }

  const Topology* const topology_;
  const CoreRequest& request_;
  const CoreMap& map_;
  std::vector<CoreFault> faults_;
};

constexpr size_t kNumbersPerLine = 16;

// Numbers in lines of a bounded length.
void AppendNumbers(const std::vector<int>& cpus, std::string_view indent, std::string* out) {
  for (size_t i = 0; i < cpus.size(); ++i) {
    if (i % kNumbersPerLine == 0) out->append(i == 0 ? "" : "\n").append(indent);
    *out += std::to_string(cpus[i]) + ",";
    if (i + 1 < cpus.size() && (i + 1) % kNumbersPerLine != 0) *out += " ";
  }
  *out += "\n";
}

// A sentence as comment lines of at most 100 columns.
void AppendComment(std::string text, std::string_view indent, std::string* out) {
  constexpr size_t kColumns = 98;
  if (text[0] >= 'a' && text[0] <= 'z') text[0] = static_cast<char>(text[0] - 'a' + 'A');
  text += '.';
  while (!text.empty()) {
    const size_t room = kColumns - indent.size();
    size_t end = text.size();
    if (end > room) {
      end = text.rfind(' ', room);
      if (end == std::string::npos) end = text.size();
    }
    out->append(indent).append("# ").append(text.substr(0, end)).append("\n");
    text.erase(0, std::min(text.size(), end + 1));
  }
}

}  // namespace

std::string_view CoreRoleName(CoreRole role) {
  constexpr std::string_view kNames[] = {"control", "ingress", "shard", "recall"};
  return kNames[static_cast<size_t>(role)];
}

std::string_view CoreRoleField(CoreRole role) {
  constexpr std::string_view kNames[] = {"cores.control", "cores.ingress", "cores.shard",
                                         "cores.recall"};
  return kNames[static_cast<size_t>(role)];
}

std::string_view CoreModeName(CoreMode mode) {
  constexpr std::string_view kNames[] = {"auto", "run_to_completion", "pipelined"};
  return kNames[static_cast<size_t>(mode)];
}

std::string_view IdleStrategyName(IdleStrategy idle) {
  constexpr std::string_view kNames[] = {"spin", "hybrid", "sleep"};
  return kNames[static_cast<size_t>(idle)];
}

const std::vector<int>& CoreMap::of(CoreRole role) const {
  switch (role) {
    case CoreRole::kControl:
      return control;
    case CoreRole::kIngress:
      return ingress;
    case CoreRole::kShard:
      return shard;
    case CoreRole::kRecall:
      return recall;
  }
  return control;
}

std::vector<int>& CoreMap::of(CoreRole role) {
  return const_cast<std::vector<int>&>(std::as_const(*this).of(role));
}

CorePlan PlanCoreMap(const Topology& topology, const CoreRequest& request) {
  return Planner(topology, request).Plan();
}

std::vector<CoreFault> CheckCoreMap(const Topology* topology, const CoreRequest& request,
                                    const CoreMap& map) {
  return Checker(topology, request, map).Check();
}

std::string CoreMapToml(const CorePlan& plan, IdleStrategy idle) {
  std::string text = "[cores]\n";
  AppendComment(plan.mode_reason, "", &text);
  text.append("mode = \"").append(CoreModeName(plan.mode)).append("\"\n");
  AppendComment(idle == IdleStrategy::kHybrid
                    ? "looks again for 50 us, then sleeps; \"spin\" answers sooner where nothing "
                      "else runs here"
                    : "as asked for",
                "", &text);
  text.append("idle = \"").append(IdleStrategyName(idle)).append("\"\n");
  for (const CoreRole role : kCoreRoles) {
    if (plan.map.of(role).empty()) continue;
    std::vector<const CoreReason*> reasons;
    for (const CoreReason& reason : plan.reasons) {
      if (reason.role == role) reasons.push_back(&reason);
    }
    if (reasons.size() == 1 && plan.map.of(role).size() <= kNumbersPerLine) {
      AppendComment(reasons.front()->why, "", &text);
      text.append(CoreRoleName(role)).append(" = [");
      for (const int cpu : plan.map.of(role)) {
        text.append(text.ends_with('[') ? "" : ", ").append(std::to_string(cpu));
      }
    } else {
      text.append(CoreRoleName(role)).append(" = [\n");
      for (const CoreReason* reason : reasons) {
        AppendComment(reason->why, "  ", &text);
        AppendNumbers(reason->cpus, "  ", &text);
      }
    }
    text += "]\n";
  }
  if (plan.map.recall.empty()) {
    AppendComment("recall cores: none, recalls run on the shards' cores", "", &text);
  }
  for (const CoreReason& reason : plan.reasons) {
    if (reason.role) continue;
    AppendComment("processors " + CpuRanges(reason.cpus) + ": " + reason.why, "", &text);
  }
  return text;
}

std::string CpuRanges(std::vector<int> cpus) {
  std::ranges::sort(cpus);
  std::string text;
  for (size_t i = 0; i < cpus.size();) {
    size_t last = i;
    while (last + 1 < cpus.size() && cpus[last + 1] <= cpus[last] + 1) ++last;
    if (!text.empty()) text += ", ";
    text += std::to_string(cpus[i]);
    if (cpus[last] != cpus[i]) text += "-" + std::to_string(cpus[last]);
    i = last + 1;
  }
  return text;
}

}  // namespace engram
