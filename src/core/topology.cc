#include "src/core/topology.h"

#include <hwloc.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>

namespace engram {

namespace {

struct TopologyDeleter {
  void operator()(hwloc_topology_t topology) const { hwloc_topology_destroy(topology); }
};
using TopologyHandle = std::unique_ptr<std::remove_pointer_t<hwloc_topology_t>, TopologyDeleter>;

int IndexOfAncestor(hwloc_topology_t topology, hwloc_obj_t object, hwloc_obj_type_t type,
                    int otherwise) {
  hwloc_obj_t ancestor = hwloc_get_ancestor_obj_by_type(topology, type, object);
  return ancestor == nullptr ? otherwise : static_cast<int>(ancestor->logical_index);
}

Result<TopologyHandle> NewHandle() {
  hwloc_topology_t raw = nullptr;
  if (hwloc_topology_init(&raw) != 0) {
    return Fail(ErrorCode::kInternal, "hwloc: cannot start; check that libhwloc15 is installed");
  }
  return TopologyHandle(raw);
}

Cpu CpuOf(hwloc_topology_t raw, hwloc_obj_t pu) {
  Cpu cpu;
  cpu.os_index = static_cast<int>(pu->os_index);
  // Without cores (some virtual machines) each processor counts as one.
  cpu.core_index = IndexOfAncestor(raw, pu, HWLOC_OBJ_CORE, static_cast<int>(pu->logical_index));
  cpu.socket_index = IndexOfAncestor(raw, pu, HWLOC_OBJ_PACKAGE, 0);
  cpu.l3_index = IndexOfAncestor(raw, pu, HWLOC_OBJ_L3CACHE, -1);
  cpu.numa_node = pu->nodeset == nullptr ? 0 : std::max(0, hwloc_bitmap_first(pu->nodeset));
  return cpu;
}

std::vector<Nic> NicsOf(hwloc_topology_t raw) {
  std::vector<Nic> nics;
  for (hwloc_obj_t device = nullptr;
       (device = hwloc_get_next_obj_by_type(raw, HWLOC_OBJ_OS_DEVICE, device)) != nullptr;) {
    if (device->attr->osdev.type != HWLOC_OBJ_OSDEV_NETWORK) continue;
    Nic nic;
    nic.name = device->name == nullptr ? "?" : device->name;
    hwloc_obj_t pci = hwloc_get_ancestor_obj_by_type(raw, HWLOC_OBJ_PCI_DEVICE, device);
    if (pci != nullptr) {
      char text[32];
      const auto& bus = pci->attr->pcidev;
      std::snprintf(text, sizeof(text), "%04x:%02x:%02x.%x", static_cast<unsigned>(bus.domain),
                    static_cast<unsigned>(bus.bus), static_cast<unsigned>(bus.dev),
                    static_cast<unsigned>(bus.func));
      nic.bus_id = text;
    }
    hwloc_obj_t near = hwloc_get_non_io_ancestor_obj(raw, device);
    // Attached to the whole machine, a device says which node is near only if there is but one.
    if (near != nullptr && near->nodeset != nullptr && hwloc_bitmap_weight(near->nodeset) == 1) {
      nic.numa_node = hwloc_bitmap_first(near->nodeset);
    }
    nics.push_back(std::move(nic));
  }
  std::ranges::sort(nics, {}, &Nic::name);
  return nics;
}

// What a loaded hwloc topology says; `allowed` tells the processors that are ours.
Topology Read(hwloc_topology_t raw, const std::function<bool(unsigned)>& allowed) {
  Topology topology;
  for (hwloc_obj_t pu = nullptr;
       (pu = hwloc_get_next_obj_by_type(raw, HWLOC_OBJ_PU, pu)) != nullptr;) {
    (allowed(pu->os_index) ? topology.cpus : topology.forbidden).push_back(CpuOf(raw, pu));
  }
  // hwloc goes core by core, and hyperthreads are often numbered far apart.
  std::ranges::sort(topology.cpus, {}, &Cpu::os_index);
  std::ranges::sort(topology.forbidden, {}, &Cpu::os_index);
  for (hwloc_obj_t node = nullptr;
       (node = hwloc_get_next_obj_by_type(raw, HWLOC_OBJ_NUMANODE, node)) != nullptr;) {
    topology.nodes.push_back({.os_index = static_cast<int>(node->os_index),
                              .memory_bytes = node->attr->numanode.local_memory});
  }
  std::ranges::sort(topology.nodes, {}, &NumaNode::os_index);
  for (hwloc_obj_t cache = nullptr;
       (cache = hwloc_get_next_obj_by_type(raw, HWLOC_OBJ_L3CACHE, cache)) != nullptr;) {
    topology.l3_bytes.push_back(cache->attr->cache.size);
  }
  topology.nics = NicsOf(raw);
  return topology;
}

}  // namespace

const Cpu* Topology::Find(int os_index) const {
  const auto found = std::ranges::find(cpus, os_index, &Cpu::os_index);
  return found == cpus.end() ? nullptr : &*found;
}

int Topology::NodeOf(int os_index) const {
  const Cpu* cpu = Find(os_index);
  return cpu == nullptr ? -1 : cpu->numa_node;
}

Result<Topology> DiscoverTopology() {
  auto handle = NewHandle();
  if (!handle) return std::unexpected(handle.error());
  hwloc_topology_t raw = handle->get();
  // Also what a cpuset keeps from us, so that a message can tell it from what is not there.
  if (hwloc_topology_set_flags(raw, HWLOC_TOPOLOGY_FLAG_INCLUDE_DISALLOWED) != 0 ||
      hwloc_topology_set_io_types_filter(raw, HWLOC_TYPE_FILTER_KEEP_IMPORTANT) != 0 ||
      hwloc_topology_load(raw) != 0) {
    return Fail(ErrorCode::kInternal, "hwloc: cannot read the machine; is /sys mounted?");
  }
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
    return Fail(ErrorCode::kInternal, "sched_getaffinity failed; is a seccomp filter too strict?");
  }
  Topology topology = Read(raw, [&](unsigned cpu) { return CPU_ISSET(cpu, &allowed); });
  if (topology.cpus.empty()) {
    return Fail(ErrorCode::kInternal, "no processor may be used: check taskset or the cpuset");
  }
  return topology;
}

Result<Topology> SyntheticTopology(const std::string& description) {
  auto handle = NewHandle();
  if (!handle) return std::unexpected(handle.error());
  if (hwloc_topology_set_synthetic(handle->get(), description.c_str()) != 0 ||
      hwloc_topology_load(handle->get()) != 0) {
    return Fail(ErrorCode::kInvalidArgument,
                "\"" + description +
                    "\" is no machine in hwloc's words; write one like \"pack:2 [numa] l3:1 "
                    "core:16 pu:2\"");
  }
  return Read(handle->get(), [](unsigned) { return true; });
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
