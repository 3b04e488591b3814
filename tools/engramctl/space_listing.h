#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/core/memory_kinds.h"
#include "src/core/observation.h"
#include "tools/clients/cpp/engram_client.h"

namespace engram {

// A space over all the shards that hold a part of it.
struct SpaceSummary {
  std::string name;
  uint32_t dimension = 0;
  Metric metric = Metric::kUnspecified;
  uint64_t observations = 0;
  uint64_t linked = 0;
  uint64_t unlinked = 0;
  uint64_t retired = 0;
  uint64_t resident_bytes = 0;
  MemoryByKind memory{};  // of that
  uint32_t shards = 0;

  // Whether the background work of linking has nothing left to do. A small space is scanned and has
  // no graph, so that its observations stay unlinked.
  bool LinkingDone() const;
};

// Adds up the records of each name; sorted by name.
std::vector<SpaceSummary> MergeSpaces(const std::vector<SpaceInfo>& records);

}  // namespace engram
