#include "src/core/topology.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <string>
#include <thread>

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
  }).join();
}

// hwloc lists hyperthreads side by side, which on most servers are numbered far apart: with N
// processors, core 0 has 0 and N / 2.
TEST(TopologyTest, SortsProcessorsThatHwlocListsOtherwise) {
  const cpu_set_t allowed = AllowedNow();
  int count = 0;
  while (CPU_ISSET(count, &allowed)) ++count;
  if (count < 4) GTEST_SKIP() << "needs processors 0 to 3";
  const int cores = count / 2;
  std::string indexes;
  for (int core = 0; core < cores; ++core) {
    indexes += (core == 0 ? "" : ",") + std::to_string(core) + "," + std::to_string(core + cores);
  }
  const std::string synthetic =
      "pack:1 core:" + std::to_string(cores) + " pu:2(indexes=" + indexes + ")";
  ASSERT_EQ(setenv("HWLOC_SYNTHETIC", synthetic.c_str(), 1), 0);
  const Result<Topology> topology = DiscoverTopology();
  unsetenv("HWLOC_SYNTHETIC");
  ASSERT_TRUE(topology.has_value()) << topology.error().message;
  ASSERT_EQ(static_cast<int>(topology->cpus.size()), 2 * cores);
  EXPECT_TRUE(std::ranges::is_sorted(topology->cpus, {}, &Cpu::os_index));
  EXPECT_EQ(topology->cpus[0].core_index, topology->cpus[static_cast<size_t>(cores)].core_index);
  EXPECT_NE(topology->cpus[0].core_index, topology->cpus[1].core_index);
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
