#pragma once

#include <array>
#include <cstddef>

#include "index/rabitq_learner.h"
#include "src/core/arena_heap.h"
#include "src/core/ids.h"

namespace engram {

// What learning codes for a space takes, one space after the other: the shard has one.
struct CodeLearning {
  explicit CodeLearning(ArenaHeap* heap) : learner(heap), drift(heap) {}

  RabitqLearner learner;
  CentroidDrift drift;
  std::array<NodeId, RabitqLearner::kMaxSample> sample;
  size_t spread_size = 0;  // of the sample, what lies anywhere; the rest are neighbours
  size_t sample_size = 0;
  size_t next = 0;         // place in the sample
  bool has_moved = false;  // the centroid
};

}  // namespace engram
