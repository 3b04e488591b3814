#include "index/link_selection.h"

#include <algorithm>
#include <array>

#include "src/core/check.h"

namespace engram {

namespace {

// A candidate is compared with so many of the chosen at once; the rest mostly need not be.
constexpr size_t kAtOnce = 4;

}  // namespace

bool LinkSelection::IsDominated(NeighbourKey candidate, std::span<const NeighbourKey> chosen) {
  const float distance = DistanceOf(candidate);
  const std::byte* const row = target_.vectors->Row(NodeOf(candidate));
  std::array<const std::byte*, kAtOnce> rows;
  std::array<float, kAtOnce> between;
  for (size_t i = 0; i < chosen.size(); i += kAtOnce) {
    const std::span<const NeighbourKey> some =
        chosen.subspan(i, std::min(kAtOnce, chosen.size() - i));
    for (size_t j = 0; j < some.size(); ++j) rows[j] = target_.vectors->Row(NodeOf(some[j]));
    target_.DistancesBetween(row, {rows.data(), some.size()}, between.data());
    distances_ += some.size();
    for (size_t j = 0; j < some.size(); ++j) {
      // Alpha moves the bound up, also where distances are negative (inner product).
      const float relaxed = between[j] > 0 ? between[j] * alpha_ : between[j] / alpha_;
      if (relaxed < distance) return true;
      if (relaxed == distance && between[j] <= DistanceOf(some[j])) return true;
    }
  }
  return false;
}

void LinkSelection::Prune(HnswGraph* graph, NodeId node, uint32_t level,
                          std::span<const NodeId> additional) {
  CHECK(additional.size() <= HnswGraph::kMaxM0, "some links at a time");
  const uint32_t max_degree = graph->MaxDegree(level);
  std::array<NodeId, 2 * HnswGraph::kMaxM0> nodes;
  uint32_t pool_size = 0;
  graph->ForEachLink(node, level, [&](NodeId link) {
    if (graph->IsDoomed(link)) return;
    target_.Prefetch(link);
    nodes[pool_size++] = link;
  });
  for (const NodeId link : additional) nodes[pool_size++] = link;
  std::array<NeighbourKey, 2 * HnswGraph::kMaxM0> pool;
  std::array<const std::byte*, 2 * HnswGraph::kMaxM0> rows;
  std::array<float, 2 * HnswGraph::kMaxM0> distances;
  for (uint32_t i = 0; i < pool_size; ++i) rows[i] = target_.vectors->Row(nodes[i]);
  target_.DistancesBetween(target_.vectors->Row(node), {rows.data(), pool_size}, distances.data());
  distances_ += pool_size;
  for (uint32_t i = 0; i < pool_size; ++i) pool[i] = KeyOf(distances[i], nodes[i]);
  const std::span<NeighbourKey> candidates(pool.data(), pool_size);
  std::sort(candidates.begin(), candidates.end());

  const auto must_stay = [&](NeighbourKey key) {
    return level == 0 && graph->IsTreeEdge(node, NodeOf(key));
  };
  auto reserved =
      static_cast<size_t>(std::count_if(candidates.begin(), candidates.end(), must_stay));
  std::array<NeighbourKey, HnswGraph::kMaxM0> kept;
  uint32_t count = 0;
  for (const NeighbourKey key : candidates) {
    if (must_stay(key)) {
      --reserved;
    } else if (count + reserved >= max_degree || IsDominated(key, {kept.data(), count})) {
      continue;
    }
    kept[count++] = key;
  }
  std::transform(kept.begin(), kept.begin() + count, nodes.begin(), NodeOf);
  graph->EditLinks(node, level, {nodes.data(), count});
}

}  // namespace engram
