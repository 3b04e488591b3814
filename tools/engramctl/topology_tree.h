#pragma once

#include <cstddef>
#include <string>

#include "src/control/core_map.h"
#include "src/core/topology.h"

namespace engram {

// The machine as a tree for a terminal: sockets, NUMA nodes with their memory and NICs, level-3
// caches, cores with their hyperthreads, in lines of at most `line_columns`. With a plan each
// processor says its role.
std::string DrawTopology(const Topology& topology, const CorePlan* plan, size_t line_columns);

// "125.6 GiB", "32 MiB".
std::string BytesText(uint64_t bytes);

}  // namespace engram
