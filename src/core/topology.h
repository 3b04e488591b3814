#pragma once

#include <string>
#include <vector>

#include "src/core/result.h"

namespace engram {

// One logical processor that this process may run on.
struct Cpu {
  int os_index = 0;    // as in /proc/cpuinfo and taskset
  int core_index = 0;  // hyperthreads of one core share it
  int numa_node = 0;   // memory node nearest to it
  int socket_index = 0;
};

// The processors that this process may use, by rising os_index.
struct Topology {
  std::vector<Cpu> cpus;

  // The node of processor `os_index`, or -1 when it is not ours.
  int NodeOf(int os_index) const;
};

// Asks hwloc. Errors: kInternal, with the remedy, when hwloc cannot read the machine.
Result<Topology> DiscoverTopology();

// Binds the calling thread to one processor. Errors: kInvalidArgument naming the processor.
Result<void> PinThisThread(int os_index);

}  // namespace engram
