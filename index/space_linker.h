#pragma once

#include <array>
#include <cstdint>

#include "index/batch_linker.h"
#include "index/code_learning.h"
#include "index/hnsw_linker.h"
#include "index/hnsw_params.h"
#include "index/space.h"
#include "src/core/arena_heap.h"

namespace engram {

// What brings the nodes of a shard's spaces into their graphs, one space after the other, in
// slices: learning the codes that a graph is walked with, then linking in batches, or one by one
// where a space is not walked with such codes.
//
// Thread safety: the owner core's alone.
class SpaceLinker {
 public:
  // `heap` outlives the linker, and is that of the spaces that are given to it: what is learned for
  // a space stays with it. `most`: nodes of a batch, 1 to BatchLinker::kMaxBatch.
  SpaceLinker(ArenaHeap* heap, const HnswBuildParams& params, uint32_t most);
  SpaceLinker(const SpaceLinker&) = delete;
  SpaceLinker& operator=(const SpaceLinker&) = delete;

  enum class Begun : uint8_t {
    kNothing,     // there is nothing to do now
    kStarted,     // active() from now on
    kMemoryShort  // nothing has changed
  };
  // Begins what `space` needs next; it stays until that is done.
  Begun Begin(Space* space);
  // Goes on for about as long as `max_distances` distances take. True when it is done: the nodes
  // are linked then, and the space knows.
  bool Step(uint32_t max_distances);

  bool active() const { return activity_ != Activity::kNone; }
  // Nodes that the last activity linked.
  uint32_t linked() const { return linked_; }
  // Distances evaluated so far, estimates included.
  uint64_t distances() const { return one_.distances() + batch_.distances(); }
  const HnswBuildParams& params() const { return one_.params(); }

 private:
  enum class Activity : uint8_t { kNone, kLearning, kOne, kBatch };

  // Constant after construction.
  const uint32_t most_;
  // Take memory from the heap.
  HnswLinker one_;
  BatchLinker batch_;
  CodeLearning learning_;
  // Under way.
  Activity activity_ = Activity::kNone;
  Space* space_ = nullptr;
  uint32_t linked_ = 0;
};

}  // namespace engram
