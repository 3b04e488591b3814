#include "index/hnsw_graph.h"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "src/core/check.h"

namespace engram {
namespace {

constexpr uint32_t kLinksPerLine = 16;

// Lists of level 0 and of the upper levels begin at a cache line.
size_t PlacesOfList(uint32_t degree) {
  return (degree + kLinksPerLine - 1) & ~size_t{kLinksPerLine - 1};
}

std::unexpected<Error> Violation(NodeId node, const std::string& what) {
  return Fail(ErrorCode::kCorrupt, "graph: node " + std::to_string(node) + " " + what);
}

std::string OnLevel(uint32_t level) { return " on level " + std::to_string(level); }

}  // namespace

HnswGraph::HnswGraph(ArenaHeap* heap, const HnswBuildParams& params)
    : heap_(heap),
      max_degree_(params.M),
      max_degree0_(params.M0),
      upper_stride_(PlacesOfList(params.M)),
      bottom_(heap, PlacesOfList(params.M0)),
      nodes_(heap) {
  CHECK(params.M >= 2 && params.M <= kMaxM, "M is 2 to 64");
  // From 3 on a leaf of the tree has a place beside its parent and its doomed children.
  CHECK(params.M0 >= params.M && params.M0 >= 3 && params.M0 <= kMaxM0, "M0 is M to 128");
}

bool HnswGraph::Reserve(size_t nodes) { return bottom_.Reserve(nodes) && nodes_.Reserve(nodes); }

void HnswGraph::Release() {
  entry_point_.store(kNoNode, std::memory_order_relaxed);
  for (NodeId node = 0; node < known_nodes_; ++node) FreeUpper(node);
  nodes_.Release();
  bottom_.Release();
  root_ = kNoNode;
  next_entry_ = kNoNode;
  linked_count_ = 0;
  doomed_count_ = 0;
  known_nodes_ = 0;
  earlier_count_ = 0;
}

void HnswGraph::FreeUpper(NodeId node) {
  Node& entry = nodes_[node];
  if (entry.upper == nullptr) return;
  heap_->FreeArray(entry.upper, entry.level * upper_stride_);
  upper_bytes_ -= ArenaHeap::BlockBytes(UpperBytes(entry.level));
  entry.upper = nullptr;
}

uint32_t HnswGraph::top_level() const {
  const NodeId entry = entry_point();
  return entry == kNoNode ? 0 : Level(entry);
}

uint32_t HnswGraph::Degree(NodeId node, uint32_t level) const {
  uint32_t degree = 0;
  ForEachLink(node, level, [&](NodeId) { ++degree; });
  return degree;
}

bool HnswGraph::HasLink(NodeId node, uint32_t level, NodeId target) const {
  bool found = false;
  ForEachLink(node, level, [&](NodeId link) { found = found || link == target; });
  return found;
}

bool HnswGraph::AddNode(NodeId node, uint32_t level) {
  CHECK(level <= kMaxLevel, "level is 0 to 31");
  if (!Reserve(size_t{node} + 1)) return false;
  Node& entry = nodes_[node];
  CHECK(entry.state == State::kAbsent, "a node is added once");
  NodeId* upper = nullptr;
  if (level != 0) {
    upper = heap_->AllocateArray<NodeId>(level * upper_stride_);
    if (upper == nullptr) return false;
    upper_bytes_ += ArenaHeap::BlockBytes(UpperBytes(level));
    std::fill_n(upper, level * upper_stride_, kNoNode);
  }
  std::fill_n(bottom_.Row(node), bottom_.stride(), kNoNode);
  entry = Node{.upper = upper,
               .parent = kNoNode,
               .state = State::kLinking,
               .level = static_cast<uint8_t>(level),
               .children = 0,
               .generation = 0};
  known_nodes_ = std::max(known_nodes_, size_t{node} + 1);
  return true;
}

void HnswGraph::SetLinks(NodeId node, uint32_t level, std::span<const NodeId> links) {
  const uint32_t places = MaxDegree(level);
  CHECK(links.size() <= places, "a list holds at most M links, M0 on level 0");
  NodeId* list = MutableLinks(node, level);
  for (uint32_t i = 0; i < links.size(); ++i) StoreLink(list + i, links[i]);
  for (size_t i = links.size(); i < places; ++i) StoreLink(list + i, kNoNode);
}

bool HnswGraph::AppendLink(NodeId node, uint32_t level, NodeId target) {
  NodeId* links = MutableLinks(node, level);
  NodeId* const end = links + MaxDegree(level);
  NodeId* place = std::find_if(links, end, [](NodeId link) { return link >= kHole; });
  if (place == end) return false;
  StoreLink(place, target);
  return true;
}

// Holes at the end are no places of the list.
void HnswGraph::TrimHoles(NodeId* links, uint32_t places) {
  uint32_t end = places;
  while (end > 0 && links[end - 1] == kNoNode) --end;
  while (end > 0 && links[end - 1] == kHole) StoreLink(links + --end, kNoNode);
}

void HnswGraph::EditLinks(NodeId node, uint32_t level, std::span<const NodeId> wanted) {
  const uint32_t places = MaxDegree(level);
  CHECK(wanted.size() <= places, "a list holds at most M links, M0 on level 0");
  NodeId* links = MutableLinks(node, level);
  // 1. What is wanted and not there; the rest stays where it is.
  std::array<NodeId, kMaxM0> missing;
  uint32_t missing_count = 0;
  for (const NodeId target : wanted) {
    if (std::find(links, links + places, target) == links + places) {
      missing[missing_count++] = target;
    }
  }
  // 2. It goes where something is that is not wanted, and behind the last link.
  for (uint32_t place = 0; place < places; ++place) {
    const bool ends = links[place] == kNoNode;
    if (!ends && links[place] != kHole &&
        std::find(wanted.begin(), wanted.end(), links[place]) != wanted.end()) {
      continue;
    }
    if (missing_count > 0) {
      StoreLink(links + place, missing[--missing_count]);
    } else if (ends) {
      break;
    } else {
      StoreLink(links + place, kHole);
    }
  }
  TrimHoles(links, places);
}

void HnswGraph::RemoveLink(NodeId node, uint32_t level, NodeId target) {
  NodeId* links = MutableLinks(node, level);
  const uint32_t places = MaxDegree(level);
  NodeId* place = std::find(links, links + places, target);
  if (place == links + places) return;
  StoreLink(place, kHole);
  TrimHoles(links, places);
}

void HnswGraph::SetParent(NodeId node, NodeId parent) {
  Node& entry = nodes_[node];
  if (entry.parent != kNoNode && !IsDoomed(entry.parent)) --nodes_[entry.parent].children;
  entry.parent = parent;
  if (parent == kNoNode) {
    root_ = node;
    return;
  }
  CHECK(nodes_[parent].children < MaxChildren(), "a parent has at most M0 / 2 children");
  ++nodes_[parent].children;
}

void HnswGraph::FinishNode(NodeId node) {
  Node& entry = nodes_[node];
  CHECK(entry.state == State::kLinking, "a node is finished once");
  entry.state = State::kLinked;
  entry.generation = generation_;
  ++linked_count_;
  if (entry.parent == kNoNode) root_ = node;
  const NodeId top = entry_point_.load(std::memory_order_relaxed);
  // From doomed nodes alone nothing leads to the first one that is not.
  if (top == kNoNode || entry.level > Level(top) || linked_count_ == 1) {
    entry_point_.store(node, std::memory_order_release);
  }
  if (doomed_count_ > 0) OfferAsEntryPoint(node);
}

void HnswGraph::RemoveNode(NodeId node) {
  Node& entry = nodes_[node];
  CHECK(entry.state == State::kLinking, "only a node that is being linked is taken out again");
  for (uint32_t level = 0; level <= entry.level; ++level) {
    ForEachLink(node, level, [&](NodeId neighbour) { RemoveLink(neighbour, level, node); });
  }
  if (entry.parent != kNoNode) --nodes_[entry.parent].children;
  FreeUpper(node);
  entry = Node{};
}

void HnswGraph::Doom(NodeId node) {
  Node& entry = nodes_[node];
  CHECK(entry.state == State::kLinked, "only a linked node leaves");
  entry.state = State::kDoomed;
  if (entry.parent != kNoNode && !IsDoomed(entry.parent)) --nodes_[entry.parent].children;
  --linked_count_;
  ++doomed_count_;
}

void HnswGraph::OfferAsEntryPoint(NodeId node) {
  if (next_entry_ == kNoNode || Level(node) > Level(next_entry_)) next_entry_ = node;
}

void HnswGraph::ReplaceEntryPoint() {
  const NodeId entry = entry_point_.load(std::memory_order_relaxed);
  if (entry != kNoNode && IsDoomed(entry)) {
    entry_point_.store(next_entry_, std::memory_order_release);
  }
}

void HnswGraph::Forget(NodeId node) {
  CHECK(IsDoomed(node), "only a doomed node is forgotten");
  if (IsEarlier(node)) --earlier_count_;
  if (root_ == node) root_ = kNoNode;
  FreeUpper(node);
  nodes_[node] = Node{};
  --doomed_count_;
}

void HnswGraph::BeginGeneration() {
  CHECK(earlier_count_ == 0, "there are two generations at most");
  generation_ ^= 1;
  earlier_count_ = linked_count_ + doomed_count_;
}

NodeId HnswGraph::FindParent(NodeId near) const {
  NodeId node = near;
  // Each turn goes one down in a finite tree, and a leaf has room.
  while (nodes_[node].children >= MaxChildren()) {
    NodeId child = kNoNode;
    ForEachLink(node, 0, [&](NodeId link) {
      if (nodes_[link].parent != node || IsDoomed(link)) return;
      if (child == kNoNode || !MayHaveChild(child)) child = link;
    });
    CHECK(child != kNoNode, "a node links to its children");
    node = child;
  }
  return node;
}

bool HnswGraph::MayBeBelow(NodeId node, NodeId above, uint32_t max_steps) const {
  for (uint32_t step = 0; step < max_steps; ++step) {
    if (node == above) return true;
    node = nodes_[node].parent;
    if (node == kNoNode) return false;
  }
  return true;
}

Result<void> HnswGraph::CheckInvariants() const {
  const NodeId entry = entry_point();
  if (entry == kNoNode) {
    if (linked_count_ != 0) return Violation(entry, "is the entry point of a graph that has nodes");
    return {};
  }
  if (!IsLinked(entry) && !IsDoomed(entry)) {
    return Violation(entry, "is the entry point and not linked");
  }
  if (Result<void> nodes = CheckNodes(entry); !nodes) return nodes;
  if (Result<void> reachable = CheckReachable(); !reachable) return reachable;
  return CheckTree();
}

Result<void> HnswGraph::CheckNode(NodeId node) const {
  if (node >= known_nodes_ || IsAbsent(node)) return {};
  if (Result<void> lists = CheckLists(node); !lists) return lists;
  if (IsDoomed(node)) return {};
  const NodeId entry = entry_point();
  if (IsLinked(node) && (entry == kNoNode || Level(node) > Level(entry))) {
    return Violation(node, "is above the entry point's level");
  }
  return CheckParent(node);
}

Result<void> HnswGraph::CheckNodes(NodeId entry) const {
  size_t linked = 0;
  size_t doomed = 0;
  size_t earlier = 0;
  for (NodeId node = 0; node < known_nodes_; ++node) {
    if (IsAbsent(node)) continue;
    if (Result<void> lists = CheckLists(node); !lists) return lists;
    doomed += static_cast<size_t>(IsDoomed(node));
    earlier += static_cast<size_t>(IsEarlier(node));
    if (!IsLinked(node)) continue;
    ++linked;
    if (Level(node) > Level(entry)) return Violation(node, "is above the entry point's level");
  }
  if (linked != linked_count_ || doomed != doomed_count_) {
    return Fail(ErrorCode::kCorrupt, "graph: " + std::to_string(linked) + " nodes are linked and " +
                                         std::to_string(doomed) + " doomed, " +
                                         std::to_string(linked_count_) + " and " +
                                         std::to_string(doomed_count_) + " are counted");
  }
  if (earlier != earlier_count_) {
    return Fail(ErrorCode::kCorrupt, "graph: " + std::to_string(earlier) +
                                         " nodes are of the earlier generation, " +
                                         std::to_string(earlier_count_) + " are counted");
  }
  return {};
}

Result<void> HnswGraph::CheckLists(NodeId node) const {
  if ((nodes_[node].upper == nullptr) != (Level(node) == 0)) {
    return Violation(node, "has lists that do not fit its level");
  }
  for (uint32_t level = 0; level <= Level(node); ++level) {
    const NodeId* links = Links(node, level);
    const size_t places = level == 0 ? bottom_.stride() : upper_stride_;
    const NodeId* end = std::find(links, links + places, kNoNode);
    if (end > links + MaxDegree(level)) return Violation(node, "has too many links");
    if (std::find_if(end, links + places, [](NodeId link) { return link != kNoNode; }) !=
        links + places) {
      return Violation(node, "has a link beyond its degree" + OnLevel(level));
    }
    if (end != links && end[-1] == kHole) {
      return Violation(node, "has a list that ends in a hole" + OnLevel(level));
    }
    for (const NodeId* link = links; link != end; ++link) {
      if (*link == kHole) continue;
      if (Result<void> sound = CheckLink(node, level, *link); !sound) return sound;
      if (std::find(links, link, *link) != link) {
        return Violation(node, "links to " + std::to_string(*link) + OnLevel(level) + " twice");
      }
    }
  }
  return {};
}

Result<void> HnswGraph::CheckLink(NodeId node, uint32_t level, NodeId target) const {
  const std::string link = "links to " + std::to_string(target) + OnLevel(level);
  // What leads out of a doomed node is nobody's concern once it cannot be reached.
  if (target >= known_nodes_ || (IsAbsent(target) && !IsDoomed(node))) {
    return Violation(node, link + ", which is not in the graph");
  }
  if (target == node) return Violation(node, link + ", itself");
  if (!IsAbsent(target) && Level(target) < level && !IsDoomed(node)) {
    return Violation(node, link + ", which lacks that level");
  }
  return {};
}

Result<void> HnswGraph::CheckTree() const {
  if (linked_count_ > 0 && root_ == kNoNode) return Violation(root_, "is the root of linked nodes");
  std::vector<uint32_t> children(known_nodes_, 0);
  for (NodeId node = 0; node < known_nodes_; ++node) {
    if (IsAbsent(node) || IsDoomed(node)) continue;
    if (nodes_[node].parent != kNoNode) ++children[nodes_[node].parent];
    if (Result<void> parent = CheckParent(node); !parent) return parent;
  }
  for (NodeId node = 0; node < known_nodes_; ++node) {
    if (IsAbsent(node) || IsDoomed(node)) continue;
    if (children[node] != nodes_[node].children) return Violation(node, "miscounts its children");
    if (children[node] > MaxChildren()) return Violation(node, "has too many children");
  }
  return CheckAncestors();
}

// A parent may be doomed until the sweep has found the node another one.
Result<void> HnswGraph::CheckParent(NodeId node) const {
  const NodeId parent = nodes_[node].parent;
  if (parent != kNoNode && !IsLinked(parent) && !IsDoomed(parent)) {
    return Violation(node, "has a parent that is not linked");
  }
  if (!IsLinked(node)) return {};
  if (parent == kNoNode) {
    if (node != root_) return Violation(node, "is a second root of the tree");
  } else if (!HasLink(node, 0, parent)) {
    return Violation(node, "does not link to its parent " + std::to_string(parent));
  } else if (!HasLink(parent, 0, node)) {
    return Violation(node, "has no link from its parent " + std::to_string(parent));
  }
  return {};
}

// Up from each node until one whose way to the root is known; a cycle comes back to itself.
Result<void> HnswGraph::CheckAncestors() const {
  std::vector<NodeId> seen_from(known_nodes_, kNoNode);
  for (NodeId start = 0; start < known_nodes_; ++start) {
    if (!IsLinked(start)) continue;
    for (NodeId node = start; node != kNoNode && seen_from[node] == kNoNode;
         node = nodes_[node].parent) {
      seen_from[node] = start;
      const NodeId parent = nodes_[node].parent;
      if (parent != kNoNode && seen_from[parent] == start) {
        return Violation(start, "has a cycle among its ancestors");
      }
    }
  }
  return {};
}

Result<void> HnswGraph::CheckReachable() const {
  std::vector<bool> reached(known_nodes_, false);
  std::vector<NodeId> frontier{entry_point()};
  reached[entry_point()] = true;
  while (!frontier.empty()) {
    const NodeId node = frontier.back();
    frontier.pop_back();
    ForEachLink(node, 0, [&](NodeId link) {
      if (reached[link]) return;
      reached[link] = true;
      frontier.push_back(link);
    });
  }
  for (NodeId node = 0; node < known_nodes_; ++node) {
    if (IsLinked(node) && !reached[node]) {
      return Violation(node, "cannot be reached from the entry point on level 0");
    }
  }
  return {};
}

}  // namespace engram
