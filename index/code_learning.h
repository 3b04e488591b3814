#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "index/inverted_lists.h"
#include "index/rabitq_learner.h"
#include "src/core/arena_heap.h"
#include "src/core/ids.h"

namespace engram {

// What learning codes for a space takes, one space after the other: the shard has one.
//
// The sample is nodes that lie anywhere, by number, and behind them members of some lists that are
// not among these. Some of the lists' members, wherever they stand, are judged apart.
struct CodeLearning {
  static constexpr size_t kMostSpread = RabitqLearner::kMaxSample - RabitqLearner::kMaxSample / 4;
  static constexpr size_t kMostNear = RabitqLearner::kMaxSample / 4;

  explicit CodeLearning(ArenaHeap* heap) : learner(heap), drift(heap) {}

  // Begins a sample: those of `nodes` nodes that live, every so many where they are many.
  template <typename IsLive>
  void TakeSpread(size_t nodes, size_t most, IsLive&& is_live) {
    const size_t places = std::min(nodes, most);
    spread_size = 0;
    near_size = 0;
    lists_taken = 0;
    for (size_t place = 0; place < places; ++place) {
      const auto node = static_cast<NodeId>(place * nodes / places);
      if (is_live(node)) sample[spread_size++] = node;
    }
    sample_size = spread_size;
    next = 0;
    has_moved = true;
  }
  // Adds the members of a list, once.
  template <typename IsLive>
  void TakeNear(const InvertedLists& lists, uint32_t list, IsLive&& is_live) {
    const auto taken_end = taken.begin() + lists_taken;
    if (lists_taken == taken.size() || std::find(taken.begin(), taken_end, list) != taken_end) {
      return;
    }
    taken[lists_taken++] = list;
    const auto spread_end = sample.begin() + spread_size;
    lists.ForEachBlock(list, [&](const InvertedLists::Block& block) {
      for (const NodeId node : block.nodes) {
        if (near_size == kMostNear || !is_live(node)) continue;
        const auto found = std::lower_bound(sample.begin(), spread_end, node);
        if (found != spread_end && *found == node) {
          near[near_size++] = static_cast<uint32_t>(found - sample.begin());
        } else {
          near[near_size++] = static_cast<uint32_t>(sample_size);
          sample[sample_size++] = node;
        }
      }
    });
  }
  // The indexes of those that are judged apart: `most` at most, spread over all that were taken
  // from lists.
  std::span<const uint32_t> ChooseNear(size_t most = RabitqLearner::kQueries) {
    const size_t count = std::min(near_size, most);
    for (size_t i = 0; i < count; ++i) near[i] = near[i * near_size / count];
    return {near.data(), count};
  }

  RabitqLearner learner;
  CentroidDrift drift;
  std::array<NodeId, RabitqLearner::kMaxSample> sample;
  size_t spread_size = 0;  // of the sample, what lies anywhere
  size_t sample_size = 0;
  std::array<uint32_t, kMostNear> near;  // indexes of members of lists
  size_t near_size = 0;
  std::array<uint32_t, 8> taken;  // lists
  uint32_t lists_taken = 0;
  size_t next = 0;         // place in the sample
  bool has_moved = false;  // the centroid
};

}  // namespace engram
