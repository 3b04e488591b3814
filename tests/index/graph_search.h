#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "index/hnsw_graph.h"
#include "index/hnsw_search.h"
#include "src/core/check.h"
#include "src/core/ids.h"

namespace engram {

// What other ways to search a graph are measured against: the steps of index/hnsw_search.h, then
// the k nearest of what they found. In slices; between two of them the graph may be changed, but
// the query, the graph and the scratch must stay.
template <typename IsLive>
class GraphSearch {
 public:
  explicit GraphSearch(IsLive is_live = IsLive()) : beam_(is_live) {}

  // `ef` is raised to `k`; both are at most scratch->max_ef(). Nodes beyond the scratch's room
  // (SearchScratch::Reserve) are not found.
  void Begin(const SearchTarget& target, uint32_t k, uint32_t ef, SearchScratch* scratch) {
    target_ = target;
    k_ = k;
    ef_ = std::max({ef, k, 1U});
    scratch_ = scratch;
    beam_.Begin(target, 0, ef_, scratch);
    const NodeId entry = target.graph->entry_point();
    state_ = State::kComplete;
    if (entry == kNoNode) return;
    level_ = target.graph->Level(entry);
    nearest_ = KeyOf(target.DistanceTo(entry), entry);
    ++scratch->distances;
    state_ = State::kDescent;
  }

  // Searches on until about `max_distances` distances have been evaluated (one expansion more at
  // most). True when the search is complete.
  bool Step(uint64_t max_distances) {
    const uint64_t limit = scratch_->distances + max_distances;
    while (state_ == State::kDescent) {
      if (level_ == 0) {
        beam_.AddSeed(nearest_);
        state_ = State::kBeam;
      } else if (!GreedyHop(target_, level_, &nearest_, &scratch_->distances)) {
        --level_;
      }
      if (scratch_->distances >= limit) return false;
    }
    while (state_ == State::kBeam) {
      if (!beam_.Step()) {
        state_ = State::kComplete;
      } else if (scratch_->distances >= limit) {
        return false;
      }
    }
    return true;
  }

  // Writes the nearest min(k, out.size()) live nodes that were found, nearest first, equal
  // distances by lower node; returns how many. Once, after Step said true.
  size_t TakeResults(std::span<Neighbour> out) {
    const std::span<const NeighbourKey> keys = beam_.SortedResults();
    const size_t count = std::min({keys.size(), out.size(), size_t{k_}});
    for (size_t i = 0; i < count; ++i) out[i] = {DistanceOf(keys[i]), NodeOf(keys[i])};
    return count;
  }

 private:
  enum class State : uint8_t { kDescent, kBeam, kComplete };

  BeamSearch<IsLive> beam_;
  SearchTarget target_{};
  uint32_t k_ = 0;
  uint32_t ef_ = 0;
  SearchScratch* scratch_ = nullptr;
  State state_ = State::kComplete;
  uint32_t level_ = 0;
  NeighbourKey nearest_ = 0;
};

// The whole recall at once: the nearest min(k, out.size()) nodes for which `is_live(node)` is true,
// nearest first, equal distances by lower node. Returns how many. A node that is being linked may
// be among them. `ef` is raised to `k`; both are at most scratch->max_ef(). The scratch has room
// for every node of the graph. Owner core only; other cores use GraphSearch.
template <typename IsLive>
size_t SearchGraph(const SearchTarget& target, uint32_t k, uint32_t ef, IsLive is_live,
                   SearchScratch* scratch, std::span<Neighbour> out) {
  CHECK(scratch->capacity() >= target.graph->known_nodes(),
        "SearchScratch::Reserve is called where a graph grows");
  GraphSearch<IsLive> search(is_live);
  search.Begin(target, k, ef, scratch);
  search.Step(UINT64_MAX / 2);
  return search.TakeResults(out);
}

}  // namespace engram
