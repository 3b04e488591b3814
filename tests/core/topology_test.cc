#include "src/core/topology.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace engram {
namespace {

cpu_set_t AllowedNow() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  EXPECT_EQ(sched_getaffinity(0, sizeof(allowed), &allowed), 0);
  return allowed;
}

TEST(TopologyTest, ListsExactlyTheProcessorsThatMayBeUsed) {
  const Result<Topology> topology = DiscoverTopology();
  ASSERT_TRUE(topology.has_value()) << topology.error().message;
  const cpu_set_t allowed = AllowedNow();
  EXPECT_EQ(static_cast<int>(topology->cpus.size()), CPU_COUNT(&allowed));
  int last = -1;
  for (const Cpu& cpu : topology->cpus) {
    EXPECT_TRUE(CPU_ISSET(cpu.os_index, &allowed)) << cpu.os_index;
    EXPECT_GT(cpu.os_index, last);
    last = cpu.os_index;
    EXPECT_GE(cpu.core_index, 0);
    EXPECT_GE(cpu.socket_index, 0);
    EXPECT_GE(cpu.numa_node, 0);
    EXPECT_EQ(topology->NodeOf(cpu.os_index), cpu.numa_node);
  }
  EXPECT_EQ(topology->NodeOf(-1), -1);
  EXPECT_EQ(topology->NodeOf(100'000), -1);
}

TEST(TopologyTest, LeavesOutWhatTheProcessMayNotUse) {
  const cpu_set_t allowed = AllowedNow();
  if (CPU_COUNT(&allowed) < 2) GTEST_SKIP() << "needs 2 processors";
  std::thread([] {
    const int first = DiscoverTopology()->cpus.front().os_index;
    ASSERT_TRUE(PinThisThread(first).has_value());
    const Result<Topology> narrowed = DiscoverTopology();
    ASSERT_TRUE(narrowed.has_value());
    ASSERT_EQ(narrowed->cpus.size(), 1u);
    EXPECT_EQ(narrowed->cpus[0].os_index, first);
    // But remembers that they are there.
    ASSERT_FALSE(narrowed->forbidden.empty());
    EXPECT_GT(narrowed->forbidden[0].os_index, first);
    EXPECT_EQ(narrowed->Find(narrowed->forbidden[0].os_index), nullptr);
  }).join();
}

TEST(TopologyTest, KnowsItsNodesCachesAndNics) {
  const Result<Topology> topology = DiscoverTopology();
  ASSERT_TRUE(topology.has_value());
  std::set<int> nodes;
  uint64_t bytes = 0;
  for (const NumaNode& node : topology->nodes) {
    EXPECT_TRUE(nodes.insert(node.os_index).second);
    bytes += node.memory_bytes;
  }
  EXPECT_GT(bytes, uint64_t{64} << 20);
  for (const Cpu& cpu : topology->cpus) {
    EXPECT_TRUE(nodes.contains(cpu.numa_node));
    EXPECT_LT(cpu.l3_index, static_cast<int>(topology->l3_bytes.size()));
  }
  for (const Nic& nic : topology->nics) {
    EXPECT_FALSE(nic.name.empty());
    EXPECT_TRUE(nic.numa_node == -1 || nodes.contains(nic.numa_node)) << nic.name;
  }
}

TEST(SyntheticTopologyTest, IsTheMachineDescribed) {
  const Result<Topology> topology = SyntheticTopology(
      "pack:2 [numa(memory=4GiB)] l3:2(size=8MiB) core:3 pu:2(indexes=2*12:12*1)");
  ASSERT_TRUE(topology.has_value()) << topology.error().message;
  ASSERT_EQ(topology->cpus.size(), 24u);
  // hwloc lists hyperthreads side by side, which on most servers are numbered far apart.
  EXPECT_TRUE(std::ranges::is_sorted(topology->cpus, {}, &Cpu::os_index));
  EXPECT_TRUE(topology->forbidden.empty()) << "what this process may use does not matter";
  for (const Cpu& cpu : topology->cpus) {
    const int core = cpu.os_index % 12;
    EXPECT_EQ(cpu.core_index, core);
    EXPECT_EQ(cpu.socket_index, core / 6);
    EXPECT_EQ(cpu.numa_node, core / 6);
    EXPECT_EQ(cpu.l3_index, core / 3);
  }
  EXPECT_EQ(topology->l3_bytes, std::vector<uint64_t>(4, uint64_t{8} << 20));
  ASSERT_EQ(topology->nodes.size(), 2u);
  EXPECT_EQ(topology->nodes[1].os_index, 1);
  EXPECT_EQ(topology->nodes[1].memory_bytes, uint64_t{4} << 30);
}

TEST(SyntheticTopologyTest, WithoutCoresEachProcessorIsOne) {
  const Result<Topology> topology = SyntheticTopology("pack:1 pu:4");
  ASSERT_TRUE(topology.has_value()) << topology.error().message;
  std::set<int> cores;
  for (const Cpu& cpu : topology->cpus) cores.insert(cpu.core_index);
  EXPECT_EQ(cores.size(), 4u);
}

TEST(SyntheticTopologyTest, WordsThatAreNoMachine) {
  for (const char* words : {"", "many cores", "pack:-1", "core:0"}) {
    const Result<Topology> topology = SyntheticTopology(words);
    ASSERT_FALSE(topology.has_value()) << words;
    EXPECT_EQ(topology.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(topology.error().message.find('"' + std::string(words) + '"'), std::string::npos);
  }
}

TEST(TopologyTest, PinsToEachProcessor) {
  const Result<Topology> topology = DiscoverTopology();
  ASSERT_TRUE(topology.has_value());
  for (const Cpu& cpu : topology->cpus) {
    std::thread([&cpu] {
      ASSERT_TRUE(PinThisThread(cpu.os_index).has_value());
      EXPECT_EQ(sched_getcpu(), cpu.os_index);
      const cpu_set_t now = AllowedNow();
      EXPECT_EQ(CPU_COUNT(&now), 1);
    }).join();
  }
}

TEST(TopologyTest, RefusesProcessorsThatAreNotOurs) {
  const cpu_set_t allowed = AllowedNow();
  int missing = CPU_SETSIZE - 1;
  while (missing > 0 && CPU_ISSET(missing, &allowed)) --missing;
  for (const int cpu : {missing, -1, CPU_SETSIZE, 1 << 30}) {
    const Result<void> pinned = PinThisThread(cpu);
    ASSERT_FALSE(pinned.has_value()) << cpu;
    EXPECT_EQ(pinned.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(pinned.error().message.find("processor " + std::to_string(cpu)), std::string::npos)
        << pinned.error().message;
  }
  const cpu_set_t after = AllowedNow();
  EXPECT_TRUE(CPU_EQUAL(&allowed, &after)) << "a refusal changes nothing";
}

}  // namespace
}  // namespace engram
