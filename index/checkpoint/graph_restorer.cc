#include "index/checkpoint/graph_restorer.h"

#include <algorithm>
#include <array>

#include "src/core/check.h"

namespace engram {

namespace {

// Each looks at every link. Few groups are left after the first one.
constexpr int kMostJoinPasses = 4;

}  // namespace

bool GraphRestorer::Add(NodeId node, uint32_t level, NodeId parent) {
  if (!graph_->AddNode(node, level)) return false;
  if (node >= levels_.size()) {
    levels_.resize(size_t{node} + 1, kNotIn);
    parents_.resize(size_t{node} + 1, kNoNode);
  }
  levels_[node] = static_cast<uint8_t>(level);
  parents_[node] = parent;
  return true;
}

void GraphRestorer::Remove(NodeId node) {
  // First its lists, so that the graph looks for no links back.
  for (uint32_t level = 0; level <= levels_[node]; ++level) graph_->SetLinks(node, level, {});
  graph_->RemoveNode(node);
  levels_[node] = kNotIn;
}

std::vector<NodeId> GraphRestorer::Finish(const SearchTarget& target, NodeId entry_point) {
  target_ = target;
  children_.assign(levels_.size(), 0);
  seen_.assign(levels_.size(), 0);
  CleanLists();  // 2.
  CutEdges();    // 3.
  FindGroups();
  JoinGroups();                                         // 4.
  const std::vector<NodeId> left = LeaveSmallGroups();  // 5.
  if (!left.empty()) CleanLists();
  Publish(entry_point);  // 6.
  return left;
}

void GraphRestorer::CleanLists() {
  for (NodeId node = 0; node < levels_.size(); ++node) {
    if (!IsIn(node)) continue;
    for (uint32_t level = 0; level <= levels_[node]; ++level) CleanList(node, level);
  }
}

void GraphRestorer::CleanList(NodeId node, uint32_t level) {
  const NodeId* links = graph_->Links(node, level);
  std::array<NodeId, HnswGraph::kMaxM0> kept;
  uint32_t count = 0;
  bool has_changed = false;
  ++list_;
  for (uint32_t place = 0; place < graph_->MaxDegree(level); ++place) {
    const NodeId target = links[place];
    if (target == kNoNode) break;
    kept[count++] = target;
    if (target == HnswGraph::kHole) continue;
    const bool is_sound =
        IsIn(target) && levels_[target] >= level && target != node && seen_[target] != list_;
    if (is_sound) {
      seen_[target] = list_;
      continue;
    }
    kept[count - 1] = HnswGraph::kHole;
    ++dropped_links_;
    has_changed = true;
  }
  for (; count > 0 && kept[count - 1] == HnswGraph::kHole; --count) has_changed = true;
  if (has_changed) graph_->SetLinks(node, level, {kept.data(), count});
}

void GraphRestorer::CutEdges() {
  for (NodeId node = 0; node < levels_.size(); ++node) {
    const NodeId parent = parents_[node];
    if (!IsIn(node) || parent == kNoNode) continue;
    if (IsIn(parent) && parent != node && children_[parent] < graph_->MaxChildren() &&
        graph_->HasLink(node, 0, parent) && graph_->HasLink(parent, 0, node)) {
      ++children_[parent];
    } else {
      parents_[node] = kNoNode;
    }
  }
}

// Up from each node until one whose top is known. A way that comes back to itself is cut there.
void GraphRestorer::FindGroups() {
  tops_.assign(levels_.size(), kNoNode);
  sizes_.assign(levels_.size(), 0);
  std::vector<NodeId> seen_from(levels_.size(), kNoNode);
  std::vector<NodeId> way;
  for (NodeId start = 0; start < levels_.size(); ++start) {
    if (!IsIn(start)) continue;
    way.clear();
    NodeId node = start;
    while (tops_[node] == kNoNode && seen_from[node] != start && parents_[node] != kNoNode) {
      seen_from[node] = start;
      way.push_back(node);
      node = parents_[node];
    }
    if (tops_[node] == kNoNode) {
      if (parents_[node] != kNoNode) {
        --children_[parents_[node]];
        parents_[node] = kNoNode;
      }
      tops_[node] = node;
      ++groups_;
    }
    for (const NodeId below : way) tops_[below] = tops_[node];
  }
  for (NodeId node = 0; node < levels_.size(); ++node) {
    if (IsIn(node)) ++sizes_[TopOf(node)];
  }
}

// Union-find with path halving (Tarjan and van Leeuwen 1984).
NodeId GraphRestorer::TopOf(NodeId node) {
  while (tops_[node] != node) {
    tops_[node] = tops_[tops_[node]];
    node = tops_[node];
  }
  return node;
}

void GraphRestorer::JoinGroups() {
  for (int pass = 0; pass < kMostJoinPasses && groups_ > 1; ++pass) {
    const uint64_t before = groups_;
    for (NodeId node = 0; node < levels_.size(); ++node) {
      if (!IsIn(node)) continue;
      graph_->ForEachLink(node, 0, [&](NodeId link) { Join(node, link); });
    }
    if (groups_ == before) return;
  }
}

// Where they are of two groups. The smaller one is turned, if one has to be.
void GraphRestorer::Join(NodeId a, NodeId b) {
  NodeId top = TopOf(a);
  NodeId small_top = TopOf(b);
  if (top == small_top) return;
  if (sizes_[top] < sizes_[small_top]) {
    std::swap(a, b);
    std::swap(top, small_top);
  }
  if (!Attach(b, a) && !Attach(a, b)) return;
  tops_[small_top] = top;
  sizes_[top] += sizes_[small_top];
  --groups_;
  ++joined_groups_;
}

bool GraphRestorer::Attach(NodeId child, NodeId parent) {
  if (children_[parent] >= graph_->MaxChildren()) return false;
  // Its own parent becomes its child.
  if (parents_[child] != kNoNode && children_[child] >= graph_->MaxChildren()) return false;
  MakeTop(child);
  parents_[child] = parent;
  ++children_[parent];
  LinkTo(child, parent);
  LinkTo(parent, child);
  return true;
}

// Turns the edges on the way up from it.
void GraphRestorer::MakeTop(NodeId node) {
  NodeId above = parents_[node];
  parents_[node] = kNoNode;
  while (above != kNoNode) {
    const NodeId next = parents_[above];
    --children_[above];
    parents_[above] = node;
    ++children_[node];
    node = above;
    above = next;
  }
}

// Where the list is full the farthest link that is no edge of the tree gives way.
void GraphRestorer::LinkTo(NodeId from, NodeId to) {
  if (graph_->HasLink(from, 0, to) || graph_->AppendLink(from, 0, to)) return;
  NeighbourKey farthest = 0;
  NodeId gives_way = kNoNode;
  graph_->ForEachLink(from, 0, [&](NodeId link) {
    if (IsTreeEdge(from, link)) return;
    const NeighbourKey key = KeyOf(target_.DistanceBetween(from, link), link);
    if (gives_way != kNoNode && key < farthest) return;
    farthest = key;
    gives_way = link;
  });
  CHECK(gives_way != kNoNode, "the tree takes no more than half of a list and one place");
  graph_->RemoveLink(from, 0, gives_way);
  const bool appended = graph_->AppendLink(from, 0, to);
  CHECK(appended, "a place was made");
}

std::vector<NodeId> GraphRestorer::LeaveSmallGroups() {
  std::vector<NodeId> left;
  if (groups_ <= 1) return left;
  const auto largest =
      static_cast<NodeId>(std::max_element(sizes_.begin(), sizes_.end()) - sizes_.begin());
  for (NodeId node = 0; node < levels_.size(); ++node) {
    if (IsIn(node) && TopOf(node) != TopOf(largest)) left.push_back(node);
  }
  for (const NodeId node : left) Remove(node);
  return left;
}

// The first one that is finished becomes the entry point, and gives way to higher ones alone.
void GraphRestorer::Publish(NodeId entry_point) {
  for (NodeId node = 0; node < levels_.size(); ++node) {
    if (IsIn(node) && parents_[node] != kNoNode) graph_->SetParent(node, parents_[node]);
  }
  if (IsIn(entry_point)) graph_->FinishNode(entry_point);
  for (NodeId node = 0; node < levels_.size(); ++node) {
    if (IsIn(node) && node != entry_point) graph_->FinishNode(node);
  }
}

}  // namespace engram
