#include "src/core/topology.h"

#include <hwloc.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <memory>
#include <type_traits>

namespace engram {

namespace {

struct TopologyDeleter {
  void operator()(hwloc_topology_t topology) const { hwloc_topology_destroy(topology); }
};
using TopologyHandle = std::unique_ptr<std::remove_pointer_t<hwloc_topology_t>, TopologyDeleter>;

int IndexOfAncestor(hwloc_topology_t topology, hwloc_obj_t object, hwloc_obj_type_t type) {
  hwloc_obj_t ancestor = hwloc_get_ancestor_obj_by_type(topology, type, object);
  return ancestor == nullptr ? 0 : static_cast<int>(ancestor->logical_index);
}

}  // namespace

int Topology::NodeOf(int os_index) const {
  for (const Cpu& cpu : cpus) {
    if (cpu.os_index == os_index) return cpu.numa_node;
  }
  return -1;
}

Result<Topology> DiscoverTopology() {
  hwloc_topology_t raw = nullptr;
  if (hwloc_topology_init(&raw) != 0) {
    return Fail(ErrorCode::kInternal, "hwloc: cannot start; check that libhwloc15 is installed");
  }
  const TopologyHandle handle(raw);
  if (hwloc_topology_load(raw) != 0) {
    return Fail(ErrorCode::kInternal, "hwloc: cannot read the machine; is /sys mounted?");
  }
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
    return Fail(ErrorCode::kInternal, "sched_getaffinity failed; is a seccomp filter too strict?");
  }
  Topology topology;
  for (hwloc_obj_t pu = nullptr;
       (pu = hwloc_get_next_obj_by_type(raw, HWLOC_OBJ_PU, pu)) != nullptr;) {
    if (!CPU_ISSET(pu->os_index, &allowed)) continue;
    Cpu cpu;
    cpu.os_index = static_cast<int>(pu->os_index);
    cpu.core_index = IndexOfAncestor(raw, pu, HWLOC_OBJ_CORE);
    cpu.socket_index = IndexOfAncestor(raw, pu, HWLOC_OBJ_PACKAGE);
    cpu.numa_node = pu->nodeset == nullptr ? 0 : hwloc_bitmap_first(pu->nodeset);
    topology.cpus.push_back(cpu);
  }
  if (topology.cpus.empty()) {
    return Fail(ErrorCode::kInternal, "no processor may be used: check taskset or the cpuset");
  }
  // hwloc goes core by core, and hyperthreads are often numbered far apart.
  std::ranges::sort(topology.cpus, {}, &Cpu::os_index);
  return topology;
}

Result<void> PinThisThread(int os_index) {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (os_index < 0 || os_index >= CPU_SETSIZE) {
    return Fail(ErrorCode::kInvalidArgument,
                "processor " + std::to_string(os_index) + " is out of range");
  }
  CPU_SET(os_index, &set);
  if (const int error = pthread_setaffinity_np(pthread_self(), sizeof(set), &set); error != 0) {
    return FailErrno("pin to processor " + std::to_string(os_index) +
                         ": choose one that this process may use (taskset -p)",
                     error);
  }
  return {};
}

}  // namespace engram
