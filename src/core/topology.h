#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/core/result.h"

namespace engram {

// One logical processor.
struct Cpu {
  int os_index = 0;    // as in /proc/cpuinfo and taskset
  int core_index = 0;  // hyperthreads of one core share it
  int numa_node = 0;   // memory node nearest to it, as the operating system numbers them
  int socket_index = 0;
  int l3_index = -1;  // processors that share a level-3 cache share it; -1: not known
};

struct NumaNode {
  int os_index = 0;
  uint64_t memory_bytes = 0;
};

// A network device on PCI.
struct Nic {
  std::string name;    // as the kernel calls it, "eth0"
  std::string bus_id;  // "0000:17:00.0"
  int numa_node = -1;  // nearest node; -1: not known
};

// A machine, as far as cores are placed on it.
struct Topology {
  std::vector<Cpu> cpus;       // that this process may use, by rising os_index
  std::vector<Cpu> forbidden;  // in the machine, but not ours (affinity, cpuset); likewise
  std::vector<NumaNode> nodes;
  std::vector<Nic> nics;
  std::vector<uint64_t> l3_bytes;  // by l3_index

  // The processor with this number, or nullptr when it is not ours.
  const Cpu* Find(int os_index) const;
  // The node of processor `os_index`, or -1 when it is not ours.
  int NodeOf(int os_index) const;
};

// Asks hwloc. Errors: kInternal, with the remedy, when hwloc cannot read the machine.
Result<Topology> DiscoverTopology();

// A machine that is not there, in hwloc's words: "pack:2 [numa] l3:1 core:16 pu:2". Every processor
// is ours. Errors: kInvalidArgument naming the description.
Result<Topology> SyntheticTopology(const std::string& description);

// Binds the calling thread to one processor. Errors: kInvalidArgument naming the processor.
Result<void> PinThisThread(int os_index);

}  // namespace engram
