#include "index/hnsw_graph.h"

#include <algorithm>
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
  CHECK(params.M0 >= params.M && params.M0 <= kMaxM0, "M0 is M to 128");
}

bool HnswGraph::Reserve(size_t nodes) { return bottom_.Reserve(nodes) && nodes_.Reserve(nodes); }

void HnswGraph::Release() {
  entry_point_.store(kNoNode, std::memory_order_relaxed);
  for (NodeId node = 0; node < known_nodes_; ++node) FreeUpper(node);
  nodes_.Release();
  bottom_.Release();
  linked_count_ = 0;
  known_nodes_ = 0;
}

void HnswGraph::FreeUpper(NodeId node) {
  Node& entry = nodes_[node];
  if (entry.upper == nullptr) return;
  heap_->FreeArray(entry.upper, entry.level * upper_stride_);
  entry.upper = nullptr;
}

uint32_t HnswGraph::top_level() const {
  const NodeId entry = entry_point();
  return entry == kNoNode ? 0 : Level(entry);
}

uint32_t HnswGraph::Degree(NodeId node, uint32_t level) const {
  const NodeId* links = Links(node, level);
  const uint32_t places = MaxDegree(level);
  uint32_t degree = 0;
  while (degree < places && LoadLink(links + degree) != kNoNode) ++degree;
  return degree;
}

bool HnswGraph::HasLink(NodeId node, uint32_t level, NodeId target) const {
  const NodeId* links = Links(node, level);
  return std::find(links, links + Degree(node, level), target) != links + Degree(node, level);
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
    std::fill_n(upper, level * upper_stride_, kNoNode);
  }
  std::fill_n(bottom_.Row(node), bottom_.stride(), kNoNode);
  entry = Node{.upper = upper,
               .parent = kNoNode,
               .state = State::kLinking,
               .level = static_cast<uint8_t>(level),
               .children = 0,
               .reserved = 0};
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
  const uint32_t degree = Degree(node, level);
  if (degree == MaxDegree(level)) return false;
  StoreLink(MutableLinks(node, level) + degree, target);
  return true;
}

// The last link takes the removed one's place. A reader may meet it twice or, having passed the
// place, not at all: no worse than reading the list before it was last changed.
void HnswGraph::RemoveLink(NodeId node, uint32_t level, NodeId target) {
  NodeId* links = MutableLinks(node, level);
  const uint32_t degree = Degree(node, level);
  NodeId* place = std::find(links, links + degree, target);
  if (place == links + degree) return;
  StoreLink(place, LoadLink(links + degree - 1));
  StoreLink(links + degree - 1, kNoNode);
}

void HnswGraph::SetParent(NodeId node, NodeId parent) {
  CHECK(nodes_[node].parent == kNoNode, "a node's parent is set once");
  CHECK(nodes_[parent].children < MaxChildren(), "a parent has at most M0 / 2 children");
  nodes_[node].parent = parent;
  ++nodes_[parent].children;
}

void HnswGraph::FinishNode(NodeId node) {
  Node& entry = nodes_[node];
  CHECK(entry.state == State::kLinking, "a node is finished once");
  entry.state = State::kLinked;
  ++linked_count_;
  const NodeId top = entry_point_.load(std::memory_order_relaxed);
  if (top == kNoNode || entry.level > Level(top)) {
    entry_point_.store(node, std::memory_order_release);
  }
}

void HnswGraph::RemoveNode(NodeId node) {
  Node& entry = nodes_[node];
  CHECK(entry.state == State::kLinking, "only a node that is being linked is taken out again");
  for (uint32_t level = 0; level <= entry.level; ++level) {
    const NodeId* links = Links(node, level);
    const uint32_t degree = Degree(node, level);
    for (uint32_t i = 0; i < degree; ++i) RemoveLink(links[i], level, node);
  }
  if (entry.parent != kNoNode) --nodes_[entry.parent].children;
  FreeUpper(node);
  entry = Node{};
}

NodeId HnswGraph::FindParent(NodeId near) const {
  NodeId node = near;
  // Each turn goes one down in a finite tree, and a leaf has room.
  while (nodes_[node].children >= MaxChildren()) {
    const NodeId* links = Links(node, 0);
    const uint32_t degree = Degree(node, 0);
    NodeId child = kNoNode;
    for (uint32_t i = 0; i < degree; ++i) {
      if (nodes_[links[i]].parent != node) continue;
      child = links[i];
      if (nodes_[child].children < MaxChildren()) break;
    }
    CHECK(child != kNoNode, "a node links to its children");
    node = child;
  }
  return node;
}

Result<void> HnswGraph::CheckInvariants() const {
  const NodeId entry = entry_point();
  if (entry == kNoNode) {
    if (linked_count_ != 0) return Violation(entry, "is the entry point of a graph that has nodes");
    return {};
  }
  if (!IsLinked(entry)) return Violation(entry, "is the entry point and not linked");
  size_t linked = 0;
  for (NodeId node = 0; node < known_nodes_; ++node) {
    if (nodes_[node].state == State::kAbsent) continue;
    if (Result<void> lists = CheckLists(node); !lists) return lists;
    if (nodes_[node].state != State::kLinked) continue;
    ++linked;
    if (nodes_[node].level > Level(entry)) {
      return Violation(node, "is above the entry point's level");
    }
  }
  if (linked != linked_count_) {
    return Fail(ErrorCode::kCorrupt, "graph: " + std::to_string(linked) + " nodes are linked, " +
                                         std::to_string(linked_count_) + " are counted");
  }
  if (Result<void> reachable = CheckReachable(); !reachable) return reachable;
  return CheckTree();
}

Result<void> HnswGraph::CheckLists(NodeId node) const {
  if ((nodes_[node].upper == nullptr) != (Level(node) == 0)) {
    return Violation(node, "has lists that do not fit its level");
  }
  for (uint32_t level = 0; level <= Level(node); ++level) {
    const NodeId* links = Links(node, level);
    const uint32_t degree = Degree(node, level);
    const size_t places = level == 0 ? bottom_.stride() : upper_stride_;
    for (size_t place = degree; place < places; ++place) {
      if (links[place] != kNoNode) {
        return Violation(node, "has a link beyond its degree" + OnLevel(level));
      }
    }
    for (uint32_t i = 0; i < degree; ++i) {
      const NodeId target = links[i];
      const std::string link = "links to " + std::to_string(target) + OnLevel(level);
      if (target >= known_nodes_ || nodes_[target].state == State::kAbsent) {
        return Violation(node, link + ", which is not in the graph");
      }
      if (target == node) return Violation(node, link + ", itself");
      if (Level(target) < level) return Violation(node, link + ", which lacks that level");
      if (std::find(links, links + i, target) != links + i) return Violation(node, link + " twice");
    }
  }
  return {};
}

Result<void> HnswGraph::CheckTree() const {
  std::vector<uint32_t> children(known_nodes_, 0);
  NodeId root = kNoNode;
  for (NodeId node = 0; node < known_nodes_; ++node) {
    if (nodes_[node].state == State::kAbsent) continue;
    const NodeId parent = nodes_[node].parent;
    if (parent != kNoNode) {
      if (!IsLinked(parent)) return Violation(node, "has a parent that is not linked");
      ++children[parent];
    }
    if (nodes_[node].state != State::kLinked) continue;
    if (parent == kNoNode) {
      if (root != kNoNode) return Violation(node, "is a second root of the tree");
      root = node;
    } else if (!HasLink(node, 0, parent)) {
      return Violation(node, "does not link to its parent " + std::to_string(parent));
    } else if (!HasLink(parent, 0, node)) {
      return Violation(node, "has no link from its parent " + std::to_string(parent));
    }
  }
  for (NodeId node = 0; node < known_nodes_; ++node) {
    if (children[node] != nodes_[node].children) return Violation(node, "miscounts its children");
    if (children[node] > MaxChildren()) return Violation(node, "has too many children");
  }
  // Up from each node until one whose way to the root is known; a cycle comes back to itself.
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
    const NodeId* links = Links(node, 0);
    const uint32_t degree = Degree(node, 0);
    for (uint32_t i = 0; i < degree; ++i) {
      if (reached[links[i]]) continue;
      reached[links[i]] = true;
      frontier.push_back(links[i]);
    }
  }
  for (NodeId node = 0; node < known_nodes_; ++node) {
    if (IsLinked(node) && !reached[node]) {
      return Violation(node, "cannot be reached from the entry point on level 0");
    }
  }
  return {};
}

}  // namespace engram
