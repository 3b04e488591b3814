#include "index/hnsw_linker.h"

#include <algorithm>
#include <cmath>

#include "src/core/check.h"

namespace engram {
namespace {

// Fibonacci hashing's constant and Stafford's mix 13, as in SplitMix64 (Steele et al. 2014).
uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

}  // namespace

HnswLinker::HnswLinker(ArenaHeap* heap, const HnswBuildParams& params)
    : heap_(heap),
      params_(params),
      level_scale_(1.0 / std::log(static_cast<double>(params.M))),
      scratch_(heap, params.ef_construction) {
  CHECK(params.M >= 2 && params.M <= HnswGraph::kMaxM, "M is 2 to 64");
  CHECK(params.alpha >= 1.0F, "alpha is at least 1");
}

HnswLinker::~HnswLinker() {
  if (extended_ != nullptr) heap_->FreeArray(extended_, ExtendedCapacity());
}

size_t HnswLinker::ExtendedCapacity() const {
  return size_t{params_.ef_construction} * (params_.M0 + 1);
}

uint32_t HnswLinker::DrawLevel(NodeId node) const {
  const uint64_t random = Mix(params_.seed ^ Mix(node));
  const double u = static_cast<double>((random >> 11) + 1) * 0x1p-53;
  const double level = -std::log(u) * level_scale_;
  return static_cast<uint32_t>(std::min(level, double{HnswGraph::kMaxLevel}));
}

bool HnswLinker::Begin(HnswGraph* graph, const SearchTarget& target, NodeId node) {
  CHECK(!active(), "a linker links one node at a time");
  CHECK(graph->MaxDegree(1) == params_.M && graph->MaxDegree(0) == params_.M0,
        "a linker and its graphs have the same M and M0");
  if (!scratch_.Reserve(std::max(graph->known_nodes(), size_t{node} + 1))) return false;
  if (params_.extend_candidates && extended_ == nullptr) {
    extended_ = heap_->AllocateArray<NeighbourKey>(ExtendedCapacity());
    if (extended_ == nullptr) return false;
  }
  node_level_ = DrawLevel(node);  // 1.
  if (!graph->AddNode(node, node_level_)) return false;
  node_ = node;
  graph_ = graph;
  target_ = target;
  target_.graph = graph;
  target_.query = target.vectors->Row(node);
  beam_ = BeamSearch<NotDoomed>(NotDoomed{graph});
  for (uint32_t level = 0; level <= node_level_; ++level) choices_[level].count = 0;

  const NodeId entry = graph->entry_point();
  if (entry == kNoNode) {  // The first node links to nothing.
    level_ = 0;
    next_ = 0;
    phase_ = Phase::kReverse;
    return true;
  }
  level_ = graph->top_level();
  nearest_ = KeyOf(Distance(node, entry), entry);
  phase_ = Phase::kDescent;
  return true;
}

bool HnswLinker::Step(uint32_t max_distances) {
  CHECK(active(), "Begin comes before Step");
  const uint64_t limit = scratch_.distances + max_distances;
  do {
    switch (phase_) {
      case Phase::kDescent:
        StepDescent();
        break;
      case Phase::kBeam:
        StepBeam();
        break;
      case Phase::kExtend:
        StepExtend();
        break;
      case Phase::kSelect:
        StepSelect();
        break;
      case Phase::kReverse:
        StepReverse();
        break;
      case Phase::kFree:
        return true;
    }
  } while (scratch_.distances < limit);
  return !active();
}

void HnswLinker::Abandon() {
  if (!active()) return;
  graph_->RemoveNode(node_);
  phase_ = Phase::kFree;
}

// 2.
void HnswLinker::StepDescent() {
  if (level_ > node_level_) {
    if (!GreedyHop(target_, level_, &nearest_, &scratch_.distances)) --level_;
    return;
  }
  beam_.Begin(target_, level_, params_.ef_construction, &scratch_);
  beam_.AddSeed(nearest_);
  phase_ = Phase::kBeam;
}

// 3.
void HnswLinker::StepBeam() {
  if (beam_.Step()) return;
  const std::span<const NeighbourKey> found = beam_.SortedResults();
  if (!params_.extend_candidates) {
    BeginSelect(found);
    return;
  }
  std::copy(found.begin(), found.end(), extended_);
  extended_count_ = found.size();
  found_ = found;
  beam_.ForgetVisited();
  for (const NeighbourKey key : found) beam_.Visit(NodeOf(key));
  next_ = 0;
  phase_ = Phase::kExtend;
}

// Algorithm 4's extendCandidates: the links of one found node.
void HnswLinker::StepExtend() {
  if (next_ == found_.size()) {
    std::sort(extended_, extended_ + extended_count_);
    BeginSelect({extended_, extended_count_});
    return;
  }
  graph_->ForEachLink(NodeOf(found_[next_++]), level_, [&](NodeId linked) {
    if (!beam_.Visit(linked) || graph_->IsDoomed(linked)) return;
    extended_[extended_count_++] = KeyOf(Distance(node_, linked), linked);
  });
}

// 4. `found` is sorted, nearest first.
void HnswLinker::BeginSelect(std::span<const NeighbourKey> found) {
  found_ = found;
  next_ = 0;
  discarded_count_ = 0;
  phase_ = Phase::kSelect;
}

// One candidate.
void HnswLinker::StepSelect() {
  Choice& choice = choices_[level_];
  if (next_ == found_.size() || choice.count == params_.M) {
    EndSelect();
    return;
  }
  const NeighbourKey key = found_[next_++];
  if (!IsDominated(key, {chosen_.data(), choice.count})) {
    chosen_[choice.count] = key;
    choice.nodes[choice.count++] = NodeOf(key);
  } else if (discarded_count_ < params_.M) {
    discarded_[discarded_count_++] = NodeOf(key);
  }
}

// True where a chosen node is nearer to the candidate than the centre is. Keys hold distances to
// the centre. A tie counts only if the candidate is no farther from the chosen node than the centre
// is: of several equal vectors one suffices, and that one must not keep out all others.
bool HnswLinker::IsDominated(NeighbourKey candidate, std::span<const NeighbourKey> chosen) {
  const float distance = DistanceOf(candidate);
  for (const NeighbourKey other : chosen) {
    const float between = Distance(NodeOf(candidate), NodeOf(other));
    // Alpha moves the bound up, also where distances are negative (inner product).
    const float relaxed = between > 0 ? between * params_.alpha : between / params_.alpha;
    if (relaxed < distance) return true;
    if (relaxed == distance && between <= DistanceOf(other)) return true;
  }
  return false;
}

void HnswLinker::EndSelect() {
  Choice& choice = choices_[level_];
  if (params_.keep_pruned) {
    for (uint32_t i = 0; i < discarded_count_ && choice.count < params_.M; ++i) {
      choice.nodes[choice.count++] = discarded_[i];
    }
  }
  if (level_ != 0) {
    --level_;
    if (found_.empty()) {  // Nothing but doomed nodes up here: go down from where the beam began.
      beam_.Begin(target_, level_, params_.ef_construction, &scratch_);
      beam_.AddSeed(nearest_);
    } else {
      beam_.BeginFromResults(level_);
    }
    phase_ = Phase::kBeam;
    return;
  }
  ChooseParent();
  // 5.
  for (uint32_t level = 0; level <= node_level_; ++level) {
    graph_->SetLinks(node_, level, {choices_[level].nodes.data(), choices_[level].count});
  }
  level_ = 0;
  next_ = 0;
  phase_ = Phase::kReverse;
}

// The nearest found node that may have one more child becomes the parent: so the tree stays among
// near nodes, and equal vectors form one part of it. It is chosen already unless nodes before it
// have all their children; then it is one more link, or takes the place of the last.
void HnswLinker::ChooseParent() {
  if (graph_->linked_count() == 0) return;  // It becomes the root.
  const auto with_room = std::find_if(found_.begin(), found_.end(), [this](NeighbourKey key) {
    return graph_->MayHaveChild(NodeOf(key));
  });
  const NodeId near = found_.empty() ? graph_->root() : NodeOf(found_[0]);
  const NodeId parent = with_room != found_.end() ? NodeOf(*with_room) : graph_->FindParent(near);
  graph_->SetParent(node_, parent);
  Choice& choice = choices_[0];
  const auto end = choice.nodes.begin() + choice.count;
  if (std::find(choice.nodes.begin(), end, parent) != end) return;
  if (choice.count < params_.M0) ++choice.count;
  choice.nodes[choice.count - 1] = parent;
}

// 6. One neighbour.
void HnswLinker::StepReverse() {
  if (next_ < choices_[level_].count) {
    const NodeId neighbour = choices_[level_].nodes[next_++];
    if (!graph_->AppendLink(neighbour, level_, node_)) PruneWithNode(neighbour, level_);
    return;
  }
  if (level_ < node_level_) {
    ++level_;
    next_ = 0;
    return;
  }
  graph_->FinishNode(node_);  // 7.
  phase_ = Phase::kFree;
}

// Chooses the links of `neighbour` among those that it has and the new node. What the heuristic
// discards is not kept: the room saves the next reverse links a choice.
void HnswLinker::PruneWithNode(NodeId neighbour, uint32_t level) {
  const uint32_t max_degree = graph_->MaxDegree(level);
  std::array<NodeId, HnswGraph::kMaxM0 + 1> nodes;
  uint32_t pool_size = 0;
  graph_->ForEachLink(neighbour, level, [&](NodeId link) {
    if (graph_->IsDoomed(link)) return;
    target_.Prefetch(link);
    nodes[pool_size++] = link;
  });
  nodes[pool_size++] = node_;
  std::array<NeighbourKey, HnswGraph::kMaxM0 + 1> pool;
  for (uint32_t i = 0; i < pool_size; ++i) pool[i] = KeyOf(Distance(neighbour, nodes[i]), nodes[i]);
  const std::span<NeighbourKey> candidates(pool.data(), pool_size);
  std::sort(candidates.begin(), candidates.end());

  const auto must_stay = [&](NeighbourKey key) {
    return level == 0 && graph_->IsTreeEdge(neighbour, NodeOf(key));
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
  graph_->EditLinks(neighbour, level, {nodes.data(), count});
}

}  // namespace engram
