#include "index/space_linker.h"

#include <algorithm>
#include <span>

#include "src/core/check.h"

namespace engram {

namespace {

// A sweep begins between two batches only, and takes out a part of the graph at most: with larger
// batches it would not keep up with what is updated.
constexpr uint32_t kMostBeforeSweep = 128;

}  // namespace

SpaceLinker::SpaceLinker(ArenaHeap* heap, const HnswBuildParams& params, uint32_t most)
    : most_(std::clamp(most, 1U, BatchLinker::kMaxBatch)),
      one_(heap, params),
      batch_(heap, params, &one_),
      learning_(heap) {}

SpaceLinker::Begun SpaceLinker::Begin(Space* space) {
  CHECK(!active(), "one space after the other");
  space_ = space;
  linked_ = 0;
  if (space->WantsCodes()) {
    activity_ = Activity::kLearning;
    return Begun::kStarted;
  }
  if (space->has_retired_codes()) return Begun::kNothing;
  if (space->LinksInBatches()) {
    std::array<NodeId, BatchLinker::kMaxBatch> nodes;
    const uint32_t most = space->WantsSweep() ? std::min(most_, kMostBeforeSweep) : most_;
    const size_t count = space->NextToLink(std::span(nodes).first(most));
    if (count == 0) return Begun::kNothing;
    if (!space->BeginLinking(&batch_, std::span(nodes).first(count))) return Begun::kMemoryShort;
    activity_ = Activity::kBatch;
    return Begun::kStarted;
  }
  const NodeId node = space->NextToLink();
  if (node == kNoNode) return Begun::kNothing;
  if (!space->BeginLinking(&one_, node)) return Begun::kMemoryShort;
  activity_ = Activity::kOne;
  return Begun::kStarted;
}

bool SpaceLinker::Step(uint32_t max_distances) {
  switch (activity_) {
    case Activity::kNone:
      return true;
    case Activity::kLearning:
      space_->StepCodes(&learning_, max_distances);
      if (space_->WantsCodes()) return false;
      break;
    case Activity::kOne:
      if (!one_.Step(max_distances)) return false;
      space_->FinishLinking(one_.node());
      linked_ = 1;
      break;
    case Activity::kBatch:
      if (!batch_.Step(max_distances)) return false;
      linked_ = static_cast<uint32_t>(batch_.nodes().size());
      space_->FinishLinking(batch_);
      break;
  }
  activity_ = Activity::kNone;
  return true;
}

}  // namespace engram
