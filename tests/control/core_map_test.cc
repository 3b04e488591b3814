#include "src/control/core_map.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <ostream>
#include <set>
#include <string>
#include <vector>

#include "src/core/topology.h"

namespace engram {
namespace {

Topology Machine(const std::string& description) {
  auto topology = SyntheticTopology(description);
  EXPECT_TRUE(topology.has_value()) << topology.error().message;
  return topology ? *std::move(topology) : Topology();
}

std::string FaultsOf(const Topology* topology, const CoreRequest& request) {
  const CoreMap map = topology == nullptr ? request.given : PlanCoreMap(*topology, request).map;
  std::string text;
  for (const CoreFault& fault : CheckCoreMap(topology, request, map)) {
    text += (text.empty() ? "" : "\n") + std::string(fault.fields.front()) + ": " + fault.message;
  }
  return text;
}

// Machines of 1 and 2 sockets, 4 to 64 cores, with and without hyperthreads, numbered side by side
// or far apart; and small and odd ones.
std::vector<std::string> Machines() {
  std::vector<std::string> machines = {
      "pack:1 core:1 pu:1", "pack:1 core:2 pu:1", "pack:1 core:3 pu:1", "pack:1 core:1 pu:2",
      "pack:1 core:2 pu:2", "pack:1 core:3 pu:2",
      // One memory above two sockets; sockets of two nodes; nodes of one core.
      "pack:2 core:8 pu:2", "pack:2 numa:2 core:8 pu:2", "pack:4 [numa] core:1 pu:1",
      "pack:2 [numa] core:2 pu:1", "pack:2 [numa] core:1 pu:2", "pack:2 [numa] l3:4 core:8 pu:2",
      // More than 255 shards would fit.
      "pack:2 [numa] core:192 pu:1", "pack:1 core:300 pu:1"};
  for (const int sockets : {1, 2}) {
    for (const int cores : {4, 6, 8, 16, 24, 32, 64}) {
      const int each = cores / sockets;
      const std::string head = "pack:" + std::to_string(sockets) + (sockets > 1 ? " [numa]" : "") +
                               " core:" + std::to_string(each);
      machines.push_back(head + " pu:1");
      machines.push_back(head + " pu:2");
      machines.push_back(head + " pu:2(indexes=2*" + std::to_string(cores) + ":" +
                         std::to_string(cores) + "*1)");
    }
  }
  return machines;
}

class CoreMapOnMachineTest : public testing::TestWithParam<std::string> {
 protected:
  const Topology topology_ = Machine(GetParam());
  const CorePlan plan_ = PlanCoreMap(topology_, {});

  size_t Cores() const {
    std::set<int> cores;
    for (const Cpu& cpu : topology_.cpus) cores.insert(cpu.core_index);
    return cores.size();
  }
  std::set<int> CoresOf(const std::vector<int>& cpus) const {
    std::set<int> cores;
    for (const int cpu : cpus) cores.insert(topology_.Find(cpu)->core_index);
    return cores;
  }
};

TEST_P(CoreMapOnMachineTest, EveryRoleHasProcessorsThatAreThereOnce) {
  for (const CoreRole role : {CoreRole::kControl, CoreRole::kIngress, CoreRole::kShard}) {
    const std::vector<int>& cpus = plan_.map.of(role);
    EXPECT_FALSE(cpus.empty()) << CoreRoleName(role);
    EXPECT_LE(cpus.size(), kMaxCoresOfRole);
    std::set<int> seen;
    for (const int cpu : cpus) {
      EXPECT_NE(topology_.Find(cpu), nullptr) << cpu;
      EXPECT_TRUE(seen.insert(cpu).second) << cpu;
    }
  }
  EXPECT_TRUE(plan_.map.recall.empty()) << "nothing is taken from the shards unasked";
}

TEST_P(CoreMapOnMachineTest, AShardHasAnIngressOnItsNode) {
  std::map<int, size_t> ingress;
  std::map<int, size_t> shards;
  for (const int cpu : plan_.map.ingress) ++ingress[topology_.NodeOf(cpu)];
  for (const int cpu : plan_.map.shard) ++shards[topology_.NodeOf(cpu)];
  for (const auto& [node, count] : shards) {
    EXPECT_GT(ingress[node], 0u) << node;
    EXPECT_LE(count, 4 * ingress[node]) << node;
  }
  for (const auto& [node, count] : ingress) EXPECT_GT(shards[node], 0u) << node;
}

TEST_P(CoreMapOnMachineTest, WorkersHaveCoresOfTheirOwn) {
  std::vector<int> workers = plan_.map.shard;
  if (plan_.map.ingress != plan_.map.shard) {
    workers.insert(workers.end(), plan_.map.ingress.begin(), plan_.map.ingress.end());
    EXPECT_EQ(plan_.mode, CoreMode::kPipelined);
  } else {
    EXPECT_EQ(plan_.mode, CoreMode::kRunToCompletion);
  }
  const std::set<int> cores = CoresOf(workers);
  EXPECT_EQ(cores.size(), workers.size()) << "two workers on hyperthreads of one core";
  if (Cores() >= 4) {
    EXPECT_FALSE(cores.contains(*CoresOf(plan_.map.control).begin()));
  }
  if (topology_.cpus.size() > 1) {
    EXPECT_EQ(std::ranges::count(workers, plan_.map.control.front()), 0);
  }
}

TEST_P(CoreMapOnMachineTest, NoCoreIsWastedWithoutAReason) {
  std::set<int> named;
  for (const CoreReason& reason : plan_.reasons) {
    EXPECT_FALSE(reason.why.empty());
    named.insert(reason.cpus.begin(), reason.cpus.end());
  }
  for (const Cpu& cpu : topology_.cpus) {
    EXPECT_TRUE(named.contains(cpu.os_index) || plan_.map.shard.size() == kMaxCoresOfRole)
        << cpu.os_index;
  }
  // The reasons of a role are its list in pieces.
  for (const CoreRole role : kCoreRoles) {
    std::vector<int> cpus;
    for (const CoreReason& reason : plan_.reasons) {
      if (reason.role == role) cpus.insert(cpus.end(), reason.cpus.begin(), reason.cpus.end());
    }
    EXPECT_EQ(cpus, plan_.map.of(role)) << CoreRoleName(role);
  }
}

TEST_P(CoreMapOnMachineTest, HasNoFaultAndIsTheSameEachTime) {
  EXPECT_EQ(FaultsOf(&topology_, {}), "");
  EXPECT_EQ(FaultsOf(&topology_, {.given = plan_.map, .mode = plan_.mode}), "");
  EXPECT_EQ(PlanCoreMap(topology_, {}).map, plan_.map);
  // What was planned stays as it is when it is written down.
  EXPECT_EQ(PlanCoreMap(topology_, {.given = plan_.map}).map, plan_.map);
  if (topology_.cpus.size() > 1) {
    EXPECT_EQ(FaultsOf(&topology_, {.idle = IdleStrategy::kSpin}), "");
  }
}

TEST_P(CoreMapOnMachineTest, KeepsToTheModeAskedFor) {
  const CoreRequest completion = {.mode = CoreMode::kRunToCompletion};
  const CoreMap map = PlanCoreMap(topology_, completion).map;
  EXPECT_EQ(map.ingress, map.shard);
  EXPECT_EQ(FaultsOf(&topology_, completion), "");

  const CoreRequest pipelined = {.mode = CoreMode::kPipelined};
  const std::string faults = FaultsOf(&topology_, pipelined);
  if (topology_.cpus.size() > 1 && topology_.nodes.size() == 1) {
    EXPECT_EQ(faults, "");
  } else if (topology_.cpus.size() == 1) {
    EXPECT_EQ(faults,
              "cores.mode: \"pipelined\" keeps ingress and shards apart, but both run on 0; take "
              "it out of one list, or write \"run_to_completion\"");
  }
}

// Whatever one role is given, the others are planned around it without a fault.
TEST_P(CoreMapOnMachineTest, PlansAroundWhatIsGiven) {
  // All of a small machine, some of a large one.
  const size_t step = topology_.cpus.size() / 32 + 1;
  for (size_t i = 0; i < topology_.cpus.size(); i += step) {
    const Cpu& cpu = topology_.cpus[i];
    for (const CoreRole role : {CoreRole::kControl, CoreRole::kIngress, CoreRole::kShard}) {
      CoreRequest request;
      request.given.of(role) = {cpu.os_index};
      const CoreMap map = PlanCoreMap(topology_, request).map;
      EXPECT_EQ(map.of(role), std::vector<int>{cpu.os_index});
      EXPECT_EQ(FaultsOf(&topology_, request), "") << CoreRoleName(role) << " " << cpu.os_index;
      if (topology_.cpus.size() > 2) {
        request.idle = IdleStrategy::kSpin;
        EXPECT_EQ(FaultsOf(&topology_, request), "") << CoreRoleName(role) << " " << cpu.os_index;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Machines, CoreMapOnMachineTest, testing::ValuesIn(Machines()),
                         [](const testing::TestParamInfo<std::string>& machine) {
                           std::string name = std::to_string(machine.index) + "_" + machine.param;
                           std::ranges::replace_if(
                               name, [](char c) { return !std::isalnum(c); }, '_');
                           return name;
                         });

CoreMap PlanOn(const std::string& description, const CoreRequest& request = {}) {
  return PlanCoreMap(Machine(description), request).map;
}

using Cpus = std::vector<int>;

TEST(CoreMapTest, SmallMachinesRunToCompletion) {
  EXPECT_EQ(PlanOn("pack:1 core:1 pu:1"),
            (CoreMap{.control = {0}, .ingress = {0}, .shard = {0}, .recall = {}}));
  EXPECT_EQ(PlanOn("pack:1 core:2 pu:1"),
            (CoreMap{.control = {1}, .ingress = {0}, .shard = {0}, .recall = {}}));
  EXPECT_EQ(PlanOn("pack:1 core:3 pu:1"),
            (CoreMap{.control = {2}, .ingress = {0, 1}, .shard = {0, 1}, .recall = {}}));
  EXPECT_EQ(PlanOn("pack:1 core:1 pu:2"),
            (CoreMap{.control = {1}, .ingress = {0}, .shard = {0}, .recall = {}}));
  EXPECT_EQ(PlanOn("pack:1 core:2 pu:2"),
            (CoreMap{.control = {3}, .ingress = {0, 2}, .shard = {0, 2}, .recall = {}}));
}

TEST(CoreMapTest, FromFourCoresOnEachRoleHasItsOwn) {
  EXPECT_EQ(PlanOn("pack:1 core:4 pu:1"),
            (CoreMap{.control = {0}, .ingress = {1}, .shard = {2, 3}, .recall = {}}));
  EXPECT_EQ(PlanOn("pack:2 [numa] core:4 pu:2(indexes=2*8:8*1)"),
            (CoreMap{.control = {0}, .ingress = {1, 4}, .shard = {2, 3, 5, 6, 7}, .recall = {}}));
}

TEST(CoreMapTest, SocketsNarrowThePlan) {
  const CoreMap map = PlanOn("pack:2 [numa] core:4 pu:1", {.sockets = {1}});
  EXPECT_EQ(map, (CoreMap{.control = {4}, .ingress = {5}, .shard = {6, 7}, .recall = {}}));
}

// The ingress core that hears the NIC first is the one that the first listener gets.
TEST(CoreMapTest, TheNodeOfTheNicIsServedFirst) {
  Topology machine = Machine("pack:2 [numa] core:4 pu:1");
  machine.nics = {{.name = "eth7", .bus_id = "0000:81:00.0", .numa_node = 1}};
  const CorePlan plan = PlanCoreMap(machine, {});
  EXPECT_EQ(plan.map.ingress, (Cpus{4, 1}));
  EXPECT_EQ(plan.map.shard, (Cpus{5, 6, 7, 2, 3}));
  const std::string toml = CoreMapToml(plan, IdleStrategy::kHybrid);
  EXPECT_NE(toml.find("# Node 1, next to eth7: 1 for 3 shards"), std::string::npos) << toml;
  EXPECT_NE(toml.find("# Node 0, no NIC of its own"), std::string::npos) << toml;
}

TEST(CoreMapTest, TomlOfAMapHasAReasonAtEachLine) {
  EXPECT_EQ(CoreMapToml(PlanCoreMap(Machine("pack:1 core:2 pu:1"), {}), IdleStrategy::kSpin),
            "[cores]\n"
            "# Each worker core both receives and stores: there are too few to keep them apart.\n"
            "mode = \"run_to_completion\"\n"
            "# As asked for.\n"
            "idle = \"spin\"\n"
            "# The last core; the others are workers.\n"
            "control = [1]\n"
            "# Node 0: runs to completion, the shard is on the same core.\n"
            "ingress = [0]\n"
            "# Node 0: runs to completion, fed by the ingress on the same core.\n"
            "shard = [0]\n"
            "# Recall cores: none, recalls run on the shards' cores.\n");
  const std::string large =
      CoreMapToml(PlanCoreMap(Machine("pack:2 [numa] core:64 pu:2"), {}), IdleStrategy::kHybrid);
  for (size_t at = 0; at < large.size();) {
    const size_t end = large.find('\n', at);
    EXPECT_LE(end - at, 100u) << large.substr(at, end - at);
    at = end + 1;
  }
}

struct FaultCase {
  const char* name;
  const char* machine;  // empty: none is known
  CoreRequest request;
  const char* faults;
};
void PrintTo(const FaultCase& c, std::ostream* out) { *out << c.name; }

class CoreMapFaultTest : public testing::TestWithParam<FaultCase> {};

TEST_P(CoreMapFaultTest, Says) {
  const FaultCase& c = GetParam();
  if (*c.machine == '\0') {
    EXPECT_EQ(FaultsOf(nullptr, c.request), c.faults);
  } else {
    const Topology machine = Machine(c.machine);
    EXPECT_EQ(FaultsOf(&machine, c.request), c.faults);
  }
}

CoreRequest Given(CoreMap map, CoreMode mode = CoreMode::kAuto,
                  IdleStrategy idle = IdleStrategy::kHybrid) {
  return {.given = std::move(map), .sockets = {}, .mode = mode, .idle = idle};
}

INSTANTIATE_TEST_SUITE_P(
    Faults, CoreMapFaultTest,
    testing::Values(
        FaultCase{"Twice", "", Given({.shard = {1, 2, 1, 2}}),
                  "cores.shard: processor 1 is listed twice; list it once\n"
                  "cores.shard: processor 2 is listed twice; list it once"},
        FaultCase{"NotThere", "pack:1 core:4 pu:1", Given({.ingress = {4, 9}}),
                  "cores.ingress: processor 4 is not in this machine; choose from 0-3\n"
                  "cores.ingress: processor 9 is not in this machine; choose from 0-3"},
        FaultCase{"Far", "pack:2 [numa] core:4 pu:1",
                  Given({.control = {0}, .ingress = {1}, .shard = {2, 5, 6}}),
                  "cores.shard: processors 5-6 are on NUMA node 1, far from every ingress core "
                  "(node 0); make one of 4-7 an ingress core, or choose from node 0"},
        FaultCase{"RecallFar", "pack:2 [numa] core:4 pu:1",
                  Given({.control = {0}, .ingress = {1}, .shard = {2, 3}, .recall = {7}}),
                  "cores.recall: processor 7 is on NUMA node 1, far from every shard core (node "
                  "0); make one of 4-7 a shard core, or choose from node 0"},
        FaultCase{"PipelinedShared", "",
                  Given({.ingress = {1, 2}, .shard = {2, 3}}, CoreMode::kPipelined),
                  "cores.mode: \"pipelined\" keeps ingress and shards apart, but both run on 2; "
                  "take it out of one list, or write \"run_to_completion\""},
        FaultCase{"CompletionApart", "",
                  Given({.ingress = {1}, .shard = {2, 3}}, CoreMode::kRunToCompletion),
                  "cores.mode: \"run_to_completion\" runs an ingress and a shard on each "
                  "processor, but ingress has 1 and shard has 2-3; write the same list for both, "
                  "or \"pipelined\""},
        FaultCase{"SpinBesideControl", "",
                  Given({.control = {0}, .ingress = {0}, .shard = {0}}, CoreMode::kAuto,
                        IdleStrategy::kSpin),
                  "cores.control: processor 0 also is an ingress core, which spins and leaves "
                  "control no time; give control another processor, or set cores.idle = "
                  "\"hybrid\"\n"
                  "cores.control: processor 0 also is a shard core, which spins and leaves "
                  "control no time; give control another processor, or set cores.idle = "
                  "\"hybrid\""},
        FaultCase{"SleepBesideControl", "",
                  Given({.control = {0}, .ingress = {0}, .shard = {0}}, CoreMode::kAuto,
                        IdleStrategy::kSleep),
                  ""},
        FaultCase{"RecallOnAShard", "",
                  Given({.control = {0}, .ingress = {1}, .shard = {2}, .recall = {2}}),
                  "cores.recall: processor 2 also is a shard core, which answers recalls anyway; "
                  "take it out of one list"},
        FaultCase{"UnknownSocket",
                  "pack:2 [numa] core:4 pu:1",
                  {.sockets = {2}},
                  "cores.sockets: socket 2 has no processor that this process may use; choose "
                  "from 0-1"},
        FaultCase{"OutsideSocket",
                  "pack:2 [numa] core:4 pu:1",
                  {.given = {.shard = {1}}, .sockets = {1}},
                  "cores.shard: processor 1 is on socket 0, which cores.sockets leaves out; "
                  "choose another, or add the socket"}),
    [](const testing::TestParamInfo<FaultCase>& fault) { return fault.param.name; });

TEST(CoreMapCheckTest, AProcessorThatIsKeptFromUs) {
  Topology machine = Machine("pack:1 core:4 pu:1");
  machine.forbidden = {machine.cpus.back()};
  machine.cpus.pop_back();
  EXPECT_EQ(FaultsOf(&machine, Given({.ingress = {3}})),
            "cores.ingress: processor 3 is not one that this process may use (affinity or "
            "cpuset); choose from 0-2, or allow it with taskset or AllowedCPUs=");
}

TEST(CoreMapCheckTest, ShardsAreNumberedInAByte) {
  CoreMap map;
  for (int cpu = 0; cpu < 256; ++cpu) map.shard.push_back(cpu);
  EXPECT_EQ(FaultsOf(nullptr, Given(map)),
            "cores.shard: 256 processors are more than 255; list fewer");
  map.shard.pop_back();
  EXPECT_EQ(FaultsOf(nullptr, Given(map)), "");
}

TEST(CpuRangesTest, JoinsNeighbours) {
  EXPECT_EQ(CpuRanges({}), "");
  EXPECT_EQ(CpuRanges({3}), "3");
  EXPECT_EQ(CpuRanges({2, 0, 1, 5, 8, 7}), "0-2, 5, 7-8");
}

}  // namespace
}  // namespace engram
