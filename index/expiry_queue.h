#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "index/chunked_array.h"
#include "index/hnsw_graph.h"
#include "src/core/arena_heap.h"
#include "src/core/check.h"
#include "src/core/commit_stamp.h"
#include "src/core/ids.h"

namespace engram {

// The nodes of a space in the order of their contents' stamps, for what ends by age.
//
// A node is in it once, and leaves it when its content ends, so it is never longer than the space
// has nodes. Stamps come from several sources: the homes that draw them, and after a restart the
// logs and the files of checkpoints that are read one after the other. Those of one source rise,
// but for a few that overtake each other on their way; two sources may be any time apart. So there
// are several lists, each in order, and the oldest node is the least of their fronts. Adding:
// 1. Where some of the lists have younger ends, the stamp may have been overtaken: its place is
//    looked for a few nodes back in the one of these that ends first.
// 2. To the end of the list that ends last of those that it does not come before. With stamps that
//    rise per source this needs no more lists than there are sources, whatever their times: the
//    piles of patience sorting (Aldous and Diaconis 1999).
// 3. Where there is none, the stamp is the first of another source: a new list. Where there are no
//    more lists, its place is looked for however far back it is.
//
// Thread safety: the shard's alone. Add and Remove take no memory.
// Invariants: each list is in the order of stamps, oldest first, and not empty; each node with a
// stamp is in one list.
class ExpiryQueue {
 public:
  // `homes`: shards that draw stamps, at least 1. `heap` outlives the queue.
  ExpiryQueue(ArenaHeap* heap, uint16_t homes) : entries_(heap), most_lists_(kSources + homes) {
    CHECK(homes > 0, "somebody draws the stamps");
    lists_.reserve(most_lists_);
  }

  // Makes room for the nodes 0 to `nodes` - 1. False when the heap is spent.
  bool Reserve(size_t nodes) { return entries_.Reserve(nodes); }

  bool Has(NodeId node) const {
    return node < entries_.capacity() && entries_[node].stamp != kNoStamp;
  }

  // There is room for the node, and it is not in the queue.
  void Add(NodeId node, CommitStamp stamp) {
    CHECK(stamp != kNoStamp && !Has(node), "a node is queued once, with the stamp of its content");
    List* const list = ListFor(stamp);
    NodeId older = list->youngest;
    for (; older != kNoNode && entries_[older].stamp > stamp; ++steps_) {
      older = entries_[older].older;
    }
    const NodeId younger = older == kNoNode ? list->oldest : entries_[older].younger;
    entries_[node] = {.stamp = stamp, .older = older, .younger = younger};
    (older == kNoNode ? list->oldest : entries_[older].younger) = node;
    (younger == kNoNode ? list->youngest : entries_[younger].older) = node;
    ++size_;
  }

  // Does nothing where it is not in the queue.
  void Remove(NodeId node) {
    if (!Has(node)) return;
    const Entry entry = entries_[node];
    const bool is_last = entry.older == kNoNode && entry.younger == kNoNode;
    List* const list = ListAt(node);
    if (is_last) {
      *list = lists_.back();
      lists_.pop_back();
    } else {
      (entry.older == kNoNode ? list->oldest : entries_[entry.older].younger) = entry.younger;
      (entry.younger == kNoNode ? list->youngest : entries_[entry.younger].older) = entry.older;
    }
    entries_[node].stamp = kNoStamp;
    --size_;
  }

  // `to` takes the place of `from`, which is in the queue: the same content in another node.
  void Replace(NodeId from, NodeId to) {
    CHECK(Has(from) && !Has(to), "one node gives its place to another");
    const Entry entry = entries_[from];
    List* const list = ListAt(from);
    entries_[to] = entry;
    (entry.older == kNoNode ? list->oldest : entries_[entry.older].younger) = to;
    (entry.younger == kNoNode ? list->youngest : entries_[entry.younger].older) = to;
    entries_[from].stamp = kNoStamp;
  }

  // kNoNode when the queue is empty.
  NodeId oldest() const {
    NodeId oldest = kNoNode;
    for (const List& list : lists_) {
      if (oldest == kNoNode || entries_[list.oldest].stamp < entries_[oldest].stamp) {
        oldest = list.oldest;
      }
    }
    return oldest;
  }
  // Of a node that is in the queue.
  CommitStamp StampOf(NodeId node) const { return entries_[node].stamp; }
  uint64_t size() const { return size_; }
  // What it takes of the heap.
  uint64_t bytes() const { return entries_.bytes(); }
  // Lists that there are now, and nodes that Add has looked back over, ever: for tests.
  size_t lists() const { return lists_.size(); }
  uint64_t steps() const { return steps_; }

  // The lists are in order and hold what is counted. Slow: for tests.
  bool IsSound() const {
    uint64_t found = 0;
    for (const List& list : lists_) {
      NodeId before = kNoNode;
      for (NodeId node = list.oldest; node != kNoNode; node = entries_[node].younger) {
        const Entry& entry = entries_[node];
        if (entry.stamp == kNoStamp || entry.older != before ||
            (before != kNoNode && entries_[before].stamp > entry.stamp) || ++found > size_) {
          return false;
        }
        before = node;
      }
      if (before == kNoNode || list.youngest != before) return false;
    }
    return found == size_;
  }

 private:
  struct Entry {
    CommitStamp stamp;  // kNoStamp: not in the queue
    NodeId older;
    NodeId younger;
  };
  static_assert(sizeof(Entry) == 16);
  struct List {
    NodeId oldest = kNoNode;
    NodeId youngest = kNoNode;
  };

  // Besides the homes.
  static constexpr size_t kSources = 64;
  // Nodes that may have overtaken another one of their source.
  static constexpr int kOvertaking = 8;

  // Where a new node belongs.
  List* ListFor(CommitStamp stamp) {
    List* before = nullptr;
    List* after = nullptr;
    for (List& list : lists_) {
      const CommitStamp youngest = entries_[list.youngest].stamp;
      if (youngest > stamp) {
        if (after == nullptr || youngest < entries_[after->youngest].stamp) after = &list;
      } else if (before == nullptr || youngest > entries_[before->youngest].stamp) {
        before = &list;
      }
    }
    if (after != nullptr && WasOvertaken(*after, stamp)) return after;    // 1.
    if (before != nullptr) return before;                                 // 2.
    return lists_.size() < most_lists_ ? &lists_.emplace_back() : after;  // 3.
  }

  // Whether the stamp's place is a few nodes before the end.
  bool WasOvertaken(const List& list, CommitStamp stamp) {
    NodeId node = list.youngest;
    for (int n = 0; n < kOvertaking; ++n, ++steps_) {
      if (node == kNoNode || entries_[node].stamp <= stamp) return true;
      node = entries_[node].older;
    }
    return false;
  }

  // The list that begins or ends with the node, which is one of its ends; else no list is needed,
  // and it is any.
  List* ListAt(NodeId node) {
    const Entry& entry = entries_[node];
    if (entry.older != kNoNode && entry.younger != kNoNode) return lists_.data();
    for (List& list : lists_) {
      if ((entry.older == kNoNode ? list.oldest : list.youngest) == node) return &list;
    }
    CHECK(false, "a node that is queued is in a list");
    return nullptr;
  }

  ChunkedArray<Entry> entries_;  // by node
  const size_t most_lists_;
  std::vector<List> lists_;
  uint64_t size_ = 0;
  uint64_t steps_ = 0;
};

}  // namespace engram
