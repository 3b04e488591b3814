#include "tools/engramctl/space_listing.h"

#include <map>
#include <utility>

namespace engram {

namespace {

// A space that is larger than this has a graph, or soon will.
constexpr uint64_t kScannedObservationsMax = 4'096;

}  // namespace

bool SpaceSummary::LinkingDone() const {
  const bool has_graph = linked > 0 || observations > kScannedObservationsMax;
  return !has_graph || unlinked == 0;
}

std::vector<SpaceSummary> MergeSpaces(const std::vector<SpaceInfo>& records) {
  std::map<std::string, SpaceSummary> by_name;
  for (const SpaceInfo& info : records) {
    SpaceSummary& space = by_name[info.name];
    space.name = info.name;
    if (space.dimension == 0) space.dimension = info.record.dimension;
    if (space.metric == Metric::kUnspecified) space.metric = info.record.metric;
    space.observations += info.record.observations;
    space.linked += info.record.linked;
    space.unlinked += info.record.unlinked;
    space.retired += info.record.retired;
    space.resident_bytes += info.record.resident_bytes;
    for (size_t kind = 0; kind < kMemoryKinds; ++kind) space.memory[kind] += info.memory[kind];
    ++space.shards;
  }
  std::vector<SpaceSummary> spaces;
  for (auto& [name, space] : by_name) spaces.push_back(std::move(space));
  return spaces;
}

}  // namespace engram
