#include "tools/engramctl/topology_tree.h"

#include <gtest/gtest.h>

#include <string>

#include "src/control/core_map.h"
#include "src/core/topology.h"

namespace engram {
namespace {

TEST(TopologyTreeTest, SocketsNodesCachesCoresAndNics) {
  Topology machine =
      SyntheticTopology("pack:2 [numa(memory=8GiB)] l3:2(size=32MiB) core:2 pu:2(indexes=2*8:8*1)")
          .value();
  machine.nics = {{.name = "eth0", .bus_id = "0000:17:00.0", .numa_node = 1},
                  {.name = "usb0", .bus_id = "", .numa_node = -1}};
  EXPECT_EQ(DrawTopology(machine, nullptr, 100),
            "machine: 2 sockets, 2 NUMA nodes, 8 cores, 16 processors, 16 GiB\n"
            "├─ socket 0\n"
            "│  └─ NUMA node 0, 8 GiB\n"
            "│     ├─ L3 cache, 32 MiB\n"
            "│     │  core 0: cpu 0, 8   core 1: cpu 1, 9\n"
            "│     └─ L3 cache, 32 MiB\n"
            "│        core 2: cpu 2, 10   core 3: cpu 3, 11\n"
            "├─ socket 1\n"
            "│  └─ NUMA node 1, 8 GiB\n"
            "│     ├─ NIC eth0 at PCI 0000:17:00.0\n"
            "│     ├─ L3 cache, 32 MiB\n"
            "│     │  core 4: cpu 4, 12   core 5: cpu 5, 13\n"
            "│     └─ L3 cache, 32 MiB\n"
            "│        core 6: cpu 6, 14   core 7: cpu 7, 15\n"
            "└─ NIC usb0, node unknown\n");
}

TEST(TopologyTreeTest, OneMemoryAboveTwoSockets) {
  Topology machine = SyntheticTopology("pack:2 core:2 pu:1").value();
  machine.forbidden = {machine.cpus.back()};
  machine.cpus.pop_back();
  EXPECT_EQ(DrawTopology(machine, nullptr, 100),
            "machine: 2 sockets, 1 NUMA node, 4 cores, 4 processors, 1 GiB\n"
            "└─ NUMA node 0, 1 GiB\n"
            "   ├─ socket 0\n"
            "   │  core 0: cpu 0   core 1: cpu 1\n"
            "   └─ socket 1\n"
            "      core 2: cpu 2              core 3: cpu 3 (not ours)\n");
}

TEST(TopologyTreeTest, RolesOfAPlanInLinesThatFit) {
  const Topology machine = SyntheticTopology("pack:1 l3:1(size=8MiB) core:4 pu:1").value();
  const CorePlan plan = PlanCoreMap(machine, {});
  EXPECT_EQ(DrawTopology(machine, &plan, 60),
            "machine: 1 socket, 1 NUMA node, 4 cores, 4 processors, 1 GiB\n"
            "└─ socket 0\n"
            "   └─ NUMA node 0, 1 GiB\n"
            "      └─ L3 cache, 8 MiB\n"
            "         core 0: cpu 0 control   core 1: cpu 1 ingress\n"
            "         core 2: cpu 2 shard 0   core 3: cpu 3 shard 1\n");
}

TEST(BytesTextTest, ThreeDigits) {
  EXPECT_EQ(BytesText(0), "0 B");
  EXPECT_EQ(BytesText(1024), "1 KiB");
  EXPECT_EQ(BytesText(25'276'502'016), "23.5 GiB");
  EXPECT_EQ(BytesText(uint64_t{480} << 20), "480 MiB");
}

}  // namespace
}  // namespace engram
