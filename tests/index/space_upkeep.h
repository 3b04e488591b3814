#pragma once

#include <cstddef>
#include <cstdint>

#include "index/hnsw_params.h"
#include "index/hnsw_sweep.h"
#include "index/space.h"
#include "index/space_linker.h"
#include "src/core/arena_heap.h"
#include "src/core/ids.h"

namespace engram {

// Linking, sweeping and giving back for one space, in the order and by the rules of Shard::Upkeep.
// Step waits for a batch that is worth while, as a shard does for some time; Run does not.
class SpaceUpkeep {
 public:
  // Linker and sweep take their memory from `heap`, which is the space's where that is walked with
  // codes. All outlive this.
  SpaceUpkeep(Space* space, ArenaHeap* heap, const HnswBuildParams& build)
      : space_(space), linker_(heap, build, BatchLinker::kMaxBatch), sweep_(heap, build) {}

  // One slice. False when there is nothing to do now.
  bool Step(uint32_t distances) {
    waits_ = distances != UINT32_MAX;
    if (!linker_.active() && !sweep_.repairing_tree() && !Begin() && !sweep_.active()) return false;
    sweep_turn_ = !sweep_turn_;
    if (sweep_.active() && (sweep_turn_ || !linker_.active())) {
      if (sweep_.Step(distances)) {
        space_->FinishSweep(sweep_);
        ++sweeps_;
      }
    } else if (linker_.active()) {
      if (linker_.Step(distances)) links_ += linker_.linked();
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

  const SpaceLinker& linker() const { return linker_; }
  const HnswSweep& sweep() const { return sweep_; }
  uint64_t links() const { return links_; }
  uint64_t sweeps() const { return sweeps_; }

 private:
  static constexpr size_t kReclaimBatch = 64;
  static constexpr uint64_t kWorthwhileBatch = 100;

  // True where something was begun or is left.
  bool Begin() {
    const NodeId node = space_->NextToLink();
    const uint64_t kept = space_->retired() + space_->lifted();
    const bool has_more = !sweep_.active() && space_->Reclaim(kReclaimBatch);
    const bool has_freed = space_->retired() + space_->lifted() < kept;
    // A batch that is begun now lets none be given back for long.
    if (has_more && has_freed && space_->LinksInBatches()) return true;
    const bool has_rebuilt = space_->is_rebuilding() && space_->StepRebuild(rebuild_looks_);
    if (!sweep_.active() && space_->WantsSweep() && space_->BeginSweep(&sweep_)) return true;
    if ((node != kNoNode || space_->WantsCodes()) && !WaitsForBatch() &&
        linker_.Begin(space_) == SpaceLinker::Begun::kStarted) {
      return true;
    }
    return has_freed || has_rebuilt;
  }
  bool WaitsForBatch() {
    if (!waits_ || space_->WantsCodes() || !space_->LinksInBatches()) return false;
    if (space_->is_rebuilding()) return false;
    if (space_->linkable() < kWorthwhileBatch && ++waited_ < kWorthwhileBatch) return true;
    waited_ = 0;
    return false;
  }

  Space* space_;
  SpaceLinker linker_;
  HnswSweep sweep_;
  bool sweep_turn_ = false;
  bool waits_ = false;
  uint64_t waited_ = 0;
  size_t rebuild_looks_ = 256;
  uint64_t links_ = 0;
  uint64_t sweeps_ = 0;
};

}  // namespace engram
