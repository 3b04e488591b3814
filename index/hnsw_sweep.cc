#include "index/hnsw_sweep.h"

#include <algorithm>

#include "src/core/check.h"

namespace engram {
namespace {

// How far up the tree is looked before a possible parent is passed over.
constexpr uint32_t kMaxAncestors = 64;
// To look through one node's lists for doomed links takes about as long as this many distances.
constexpr uint64_t kWorkOfLook = 1;
// Mending discards less than linking does. Links between distant groups of vectors are few, and a
// graph that is mended by the linker's own rule loses them one generation after the other, until
// searches no longer get from group to group. More than this costs more distances than it brings.
constexpr float kMendAlpha = 1.05F;

}  // namespace

HnswSweep::HnswSweep(ArenaHeap* heap, const HnswBuildParams& params)
    : heap_(heap), alpha_(params.alpha * kMendAlpha), bits_(heap) {}

HnswSweep::~HnswSweep() {
  if (batch_ != nullptr) heap_->FreeArray(batch_, kMaxBatch);
}

// 1.
bool HnswSweep::Begin(HnswGraph* graph, const SearchTarget& target, std::span<const NodeId> batch) {
  CHECK(!active(), "one sweep at a time");
  CHECK(batch.size() <= kMaxBatch, "a batch has at most kMaxBatch nodes");
  if (batch_ == nullptr) {
    batch_ = heap_->AllocateArray<NodeId>(kMaxBatch);
    if (batch_ == nullptr) return false;
  }
  if (!bits_.Reserve(graph->capacity() / 64 + 1)) return false;
  graph_ = graph;
  target_ = target;
  target_.graph = graph;
  batch_size_ = batch.size();
  std::copy(batch.begin(), batch.end(), batch_);
  graph_->BeginSweep();
  for (const NodeId node : batch) {
    graph_->Doom(node);
    bits_[node / 64] |= uint64_t{1} << (node % 64);
  }
  end_node_ = graph->known_nodes();
  next_ = 0;
  phase_ = Phase::kTree;
  return true;
}

bool HnswSweep::Step(uint32_t max_distances) {
  CHECK(active(), "Begin comes before Step");
  const uint64_t limit = distances_ + work_ + max_distances;
  while (active() && distances_ + work_ < limit) {
    if (phase_ == Phase::kTree) {
      StepTree();
    } else {
      StepLists();
    }
  }
  return !active();
}

// 2. The children of one doomed node.
void HnswSweep::StepTree() {
  if (next_ == batch_size_) {
    next_ = 0;
    phase_ = Phase::kLists;
    return;
  }
  const NodeId doomed = batch_[next_++];
  work_ += kWorkOfLook;
  graph_->ForEachLink(doomed, 0, [&](NodeId link) {
    if (graph_->IsLinked(link) && graph_->Parent(link) == doomed) FindNewParent(link);
  });
}

void HnswSweep::FindNewParent(NodeId child) {
  NodeId parent = NearestAdopter(child);
  if (parent == kNoNode) parent = AdopterFromAbove(child);
  graph_->SetParent(child, parent);
  if (parent == kNoNode) return;
  LinkTreeEdge(child, parent);
  LinkTreeEdge(parent, child);
}

NodeId HnswSweep::NearestAdopter(NodeId child) {
  NeighbourKey nearest = UINT64_MAX;
  graph_->ForEachLink(child, 0, [&](NodeId link) {
    if (!graph_->IsLinked(link) || !CanAdopt(link) ||
        graph_->MayBeBelow(link, child, kMaxAncestors)) {
      return;
    }
    nearest = std::min(nearest, KeyOf(Distance(child, link), link));
  });
  return nearest == UINT64_MAX ? kNoNode : NodeOf(nearest);
}

// All between the child and its nearest ancestor that is not doomed are doomed, so going down from
// that one through nodes that are not never comes to the child. Without such an ancestor the child
// is in another part than the root, if there is one yet.
NodeId HnswSweep::AdopterFromAbove(NodeId child) const {
  NodeId above = graph_->Parent(child);
  while (above != kNoNode && !graph_->IsLinked(above)) above = graph_->Parent(above);
  if (above == kNoNode) {
    if (graph_->root() == kNoNode || !graph_->IsLinked(graph_->root())) return kNoNode;
    above = graph_->root();
  }
  // A leaf can always adopt: beside its parent and its doomed children it has places left.
  while (!CanAdopt(above)) {
    NodeId below = kNoNode;
    graph_->ForEachLink(above, 0, [&](NodeId link) {
      if (graph_->Parent(link) != above || !graph_->IsLinked(link)) return;
      if (below == kNoNode || !CanAdopt(below)) below = link;
    });
    CHECK(below != kNoNode, "a node without room has children");
    above = below;
  }
  return above;
}

// It may have one more child, and its list has a place that no tree edge holds.
bool HnswSweep::CanAdopt(NodeId node) const {
  if (!graph_->MayHaveChild(node)) return false;
  uint32_t edges = 0;
  graph_->ForEachLink(node, 0, [&](NodeId link) {
    edges += static_cast<uint32_t>(graph_->IsTreeEdge(node, link));
  });
  return edges < graph_->MaxDegree(0);
}

// Where the list is full the farthest link that is no tree edge gives way.
void HnswSweep::LinkTreeEdge(NodeId from, NodeId to) {
  if (graph_->HasLink(from, 0, to) || graph_->AppendLink(from, 0, to)) return;
  NeighbourKey farthest = 0;
  graph_->ForEachLink(from, 0, [&](NodeId link) {
    if (graph_->IsTreeEdge(from, link)) return;
    farthest = std::max(farthest, KeyOf(Distance(from, link), link));
  });
  CHECK(farthest != 0, "a node that adopts, or is adopted, has a place");
  graph_->RemoveLink(from, 0, NodeOf(farthest));
  const bool appended = graph_->AppendLink(from, 0, to);
  CHECK(appended, "a place was made");
}

// 3. The lists of one node.
void HnswSweep::StepLists() {
  if (next_ == end_node_) {
    End();
    return;
  }
  const auto node = static_cast<NodeId>(next_++);
  work_ += kWorkOfLook;
  if (!graph_->IsLinked(node)) return;
  graph_->OfferAsEntryPoint(node);
  for (uint32_t level = 0; level <= graph_->Level(node); ++level) MendList(node, level);
}

void HnswSweep::MendList(NodeId node, uint32_t level) {
  std::array<NodeId, HnswGraph::kMaxM0> lost;
  std::array<NodeId, HnswGraph::kMaxM0> kept;
  size_t lost_count = 0;
  size_t kept_count = 0;
  graph_->ForEachLink(node, level, [&](NodeId link) {
    if (InBatch(link)) {
      lost[lost_count++] = link;
    } else {
      kept[kept_count++] = link;
    }
  });
  if (lost_count == 0) return;
  const std::span<const NodeId> few_lost(lost.data(), std::min(lost_count, kMaxLost));
  const size_t candidates = GatherReplacements(node, level, few_lost, {kept.data(), kept_count});
  const size_t limit = graph_->MaxDegree(level);
  for (size_t i = 0; i < candidates && kept_count < limit; ++i) {
    if (IsDominated(candidates_[i], {kept.data(), kept_count})) continue;
    kept[kept_count++] = NodeOf(candidates_[i]);
  }
  graph_->EditLinks(node, level, {kept.data(), kept_count});
}

// The lost nodes' neighbours, nearest first, in candidates_; returns how many.
size_t HnswSweep::GatherReplacements(NodeId node, uint32_t level, std::span<const NodeId> lost,
                                     std::span<const NodeId> kept) {
  size_t count = 0;
  for (const NodeId gone : lost) {
    graph_->ForEachLink(gone, level, [&](NodeId link) {
      if (link == node || !graph_->IsLinked(link) ||
          std::find(kept.begin(), kept.end(), link) != kept.end()) {
        return;
      }
      target_.Prefetch(link);
      candidates_[count++] = link;
    });
  }
  const auto end = candidates_.begin() + static_cast<ptrdiff_t>(count);
  std::sort(candidates_.begin(), end);
  count = static_cast<size_t>(std::unique(candidates_.begin(), end) - candidates_.begin());
  for (size_t i = 0; i < count; ++i) {
    const auto link = static_cast<NodeId>(candidates_[i]);
    candidates_[i] = KeyOf(Distance(node, link), link);
  }
  std::sort(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(count));
  return count;
}

// As HnswLinker's rule, without its care for ties: equal vectors stay connected by the tree.
bool HnswSweep::IsDominated(NeighbourKey candidate, std::span<const NodeId> kept) {
  const float distance = DistanceOf(candidate);
  return std::any_of(kept.begin(), kept.end(), [&](NodeId other) {
    const float between = Distance(NodeOf(candidate), other);
    return (between > 0 ? between * alpha_ : between / alpha_) <= distance;
  });
}

// 4.
void HnswSweep::End() {
  graph_->ReplaceEntryPoint();
  for (const NodeId node : batch()) bits_[node / 64] &= ~(uint64_t{1} << (node % 64));
  phase_ = Phase::kFree;
}

}  // namespace engram
