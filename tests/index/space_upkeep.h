#pragma once

#include <cstddef>
#include <cstdint>

#include "index/hnsw_linker.h"
#include "index/hnsw_params.h"
#include "index/hnsw_sweep.h"
#include "index/space.h"
#include "src/core/arena_heap.h"
#include "src/core/ids.h"

namespace engram {

// Linking, sweeping and giving back for one space, in the order and by the rules of Shard::Upkeep.
class SpaceUpkeep {
 public:
  // Linker and sweep take their memory from `heap`. All outlive this.
  SpaceUpkeep(Space* space, ArenaHeap* heap, const HnswBuildParams& build)
      : space_(space), linker_(heap, build), sweep_(heap, build) {}

  // One slice. False when there is nothing to do now.
  bool Step(uint32_t distances) {
    if (!linker_.active() && !sweep_.repairing_tree() && !Begin() && !sweep_.active()) return false;
    sweep_turn_ = !sweep_turn_;
    if (sweep_.active() && (sweep_turn_ || !linker_.active())) {
      if (sweep_.Step(distances)) {
        space_->FinishSweep(sweep_);
        ++sweeps_;
      }
    } else if (linker_.active()) {
      if (linker_.Step(distances)) {
        space_->FinishLinking(linker_.node());
        ++links_;
      }
    }
    return true;
  }
  // Until nothing is left that may be done now.
  void Run() {
    while (Step(UINT32_MAX)) {
    }
  }

  // Places that a rebuild looks at in one slice.
  void SetRebuildLooks(size_t looks) { rebuild_looks_ = looks; }

  const HnswLinker& linker() const { return linker_; }
  const HnswSweep& sweep() const { return sweep_; }
  uint64_t links() const { return links_; }
  uint64_t sweeps() const { return sweeps_; }

 private:
  static constexpr size_t kReclaimBatch = 64;

  // True where something was begun or is left.
  bool Begin() {
    const NodeId node = space_->NextToLink();
    const uint64_t kept = space_->retired() + space_->lifted();
    if (!sweep_.active()) space_->Reclaim(kReclaimBatch);
    const bool has_freed = space_->retired() + space_->lifted() < kept;
    const bool has_rebuilt = space_->is_rebuilding() && space_->StepRebuild(rebuild_looks_);
    if (!sweep_.active() && space_->WantsSweep() && space_->BeginSweep(&sweep_)) return true;
    if (node != kNoNode && space_->BeginLinking(&linker_, node)) return true;
    return has_freed || has_rebuilt;
  }

  Space* space_;
  HnswLinker linker_;
  HnswSweep sweep_;
  bool sweep_turn_ = false;
  size_t rebuild_looks_ = 256;
  uint64_t links_ = 0;
  uint64_t sweeps_ = 0;
};

}  // namespace engram
