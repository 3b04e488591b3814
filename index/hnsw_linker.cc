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
      scratch_(heap, params.ef_construction),
      selection_(params.alpha) {
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

bool HnswLinker::Begin(HnswGraph* graph, const SearchTarget& target, NodeId node,
                       const SearchTarget* walk) {
  CHECK(!active(), "a linker links one node at a time");
  if (!Reserve(std::max(graph->known_nodes(), size_t{node} + 1))) return false;
  if (!graph->AddNode(node, DrawLevel(node))) return false;  // 1.
  SetNode(graph, target, node, walk);
  has_found_ = false;
  BeginSearch();
  return true;
}

void HnswLinker::BeginFound(HnswGraph* graph, const SearchTarget& target, NodeId node,
                            const SearchTarget& walk, std::span<const NeighbourKey> found) {
  CHECK(!active(), "a linker links one node at a time");
  CHECK(scratch_.capacity() >= graph->known_nodes(), "Reserve is called where a graph grows");
  SetNode(graph, target, node, &walk);
  has_found_ = true;
  found_at_bottom_ = found;
  BeginSearch();
}

void HnswLinker::BeginAdded(HnswGraph* graph, const SearchTarget& target, NodeId node) {
  CHECK(!active(), "a linker links one node at a time");
  CHECK(scratch_.capacity() >= graph->known_nodes(), "Reserve is called where a graph grows");
  SetNode(graph, target, node, nullptr);
  has_found_ = false;
  BeginSearch();
}

void HnswLinker::SetNode(HnswGraph* graph, const SearchTarget& target, NodeId node,
                         const SearchTarget* walk) {
  CHECK(graph->MaxDegree(1) == params_.M && graph->MaxDegree(0) == params_.M0,
        "a linker and its graphs have the same M and M0");
  node_ = node;
  node_level_ = graph->Level(node);
  graph_ = graph;
  target_ = target;
  target_.graph = graph;
  target_.query = target.vectors->Row(node);
  walk_ = walk == nullptr ? target_ : *walk;
  selection_.SetTarget(target_);
}

bool HnswLinker::Reserve(size_t nodes) {
  if (!scratch_.Reserve(nodes)) return false;
  if (params_.extend_candidates && extended_ == nullptr) {
    extended_ = heap_->AllocateArray<NeighbourKey>(ExtendedCapacity());
    if (extended_ == nullptr) return false;
  }
  return true;
}

void HnswLinker::BeginSearch() {
  beam_ = BeamSearch<NotDoomed>(NotDoomed{graph_});
  for (uint32_t level = 0; level <= node_level_; ++level) choices_[level].count = 0;
  const NodeId entry = graph_->entry_point();
  if (entry == kNoNode) {  // The first node links to nothing.
    level_ = 0;
    next_ = 0;
    phase_ = Phase::kReverse;
    return;
  }
  level_ = graph_->top_level();
  if (has_found_ && (node_level_ == 0 || level_ == 0)) {
    BeginBottom();
    return;
  }
  ++scratch_.distances;
  nearest_ = KeyOf(walk_.DistanceTo(entry), entry);
  phase_ = Phase::kDescent;
}

void HnswLinker::BeginBottom() {
  level_ = 0;
  BeginSelect(found_at_bottom_);
}

bool HnswLinker::Step(uint32_t max_distances) {
  CHECK(active(), "Begin comes before Step");
  const uint64_t limit = distances() + max_distances;
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
  } while (distances() < limit);
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
    if (!GreedyHop(walk_, level_, &nearest_, &scratch_.distances)) --level_;
    return;
  }
  beam_.Begin(walk_, level_, params_.ef_construction, &scratch_);
  beam_.AddSeed(nearest_);
  phase_ = Phase::kBeam;
}

// 3.
void HnswLinker::StepBeam() {
  if (beam_.Step()) return;
  if (walk_.vectors != target_.vectors) {
    scratch_.distances += beam_.CompareAgain(target_);
  }
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
    extended_[extended_count_++] = KeyOf(selection_.Distance(node_, linked), linked);
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
  if (!selection_.IsDominated(key, {chosen_.data(), choice.count})) {
    chosen_[choice.count] = key;
    choice.nodes[choice.count++] = NodeOf(key);
  } else if (discarded_count_ < params_.M) {
    discarded_[discarded_count_++] = NodeOf(key);
  }
}

void HnswLinker::EndSelect() {
  Choice& choice = choices_[level_];
  if (params_.keep_pruned) {
    for (uint32_t i = 0; i < discarded_count_ && choice.count < params_.M; ++i) {
      choice.nodes[choice.count++] = discarded_[i];
    }
  }
  if (level_ == 1 && has_found_) {
    BeginBottom();
    return;
  }
  if (level_ != 0) {
    --level_;
    if (found_.empty()) {  // Nothing but doomed nodes up here: go down from where the beam began.
      beam_.Begin(walk_, level_, params_.ef_construction, &scratch_);
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
  for (uint32_t i = 0; i < choices_[0].count; ++i) PrefetchLinks(choices_[0].nodes[i]);
  level_ = 0;
  next_ = 0;
  phase_ = Phase::kReverse;
}

// They will get a link back.
void HnswLinker::PrefetchLinks(NodeId node) const {
  const NodeId* links = graph_->Links(node, 0);
  for (uint32_t place = 0; place < graph_->MaxDegree(0);
       place += kCacheLineBytes / sizeof(NodeId)) {
    __builtin_prefetch(links + place, 1);
  }
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
    if (!graph_->AppendLink(neighbour, level_, node_)) {
      selection_.Prune(graph_, neighbour, level_, {&node_, 1});
    }
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

}  // namespace engram
