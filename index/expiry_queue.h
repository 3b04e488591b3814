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
// has nodes. Stamps of one home shard come in rising order, but for a few that overtake each other
// on their way; those of two homes may be far apart while their logs are replayed. So there is a
// list for each home, in order, and the oldest is the least of their fronts.
//
// Thread safety: the shard's alone. Add and Remove take no memory.
// Invariants: each list is in the order of stamps, oldest first; a node with a stamp is in the list
// of that stamp's home.
class ExpiryQueue {
 public:
  // `homes`: shards that draw stamps, at least 1. `heap` outlives the queue.
  ExpiryQueue(ArenaHeap* heap, uint16_t homes) : entries_(heap), lists_(homes) {
    CHECK(homes > 0, "somebody draws the stamps");
  }

  // Makes room for the nodes 0 to `nodes` - 1. False when the heap is spent.
  bool Reserve(size_t nodes) { return entries_.Reserve(nodes); }

  bool Has(NodeId node) const {
    return node < entries_.capacity() && entries_[node].stamp != kNoStamp;
  }

  // There is room for the node, and it is not in the queue. Looks back over those that are younger.
  void Add(NodeId node, CommitStamp stamp) {
    CHECK(stamp != kNoStamp && !Has(node), "a node is queued once, with the stamp of its content");
    List& list = ListOf(stamp);
    NodeId older = list.youngest;
    while (older != kNoNode && entries_[older].stamp > stamp) older = entries_[older].older;
    const NodeId younger = older == kNoNode ? list.oldest : entries_[older].younger;
    entries_[node] = {.stamp = stamp, .older = older, .younger = younger};
    (older == kNoNode ? list.oldest : entries_[older].younger) = node;
    (younger == kNoNode ? list.youngest : entries_[younger].older) = node;
    ++size_;
  }

  // Does nothing where it is not in the queue.
  void Remove(NodeId node) {
    if (!Has(node)) return;
    const Entry entry = entries_[node];
    List& list = ListOf(entry.stamp);
    (entry.older == kNoNode ? list.oldest : entries_[entry.older].younger) = entry.younger;
    (entry.younger == kNoNode ? list.youngest : entries_[entry.younger].older) = entry.older;
    entries_[node].stamp = kNoStamp;
    --size_;
  }

  // `to` takes the place of `from`, which is in the queue: the same content in another node.
  void Replace(NodeId from, NodeId to) {
    CHECK(Has(from) && !Has(to), "one node gives its place to another");
    const Entry entry = entries_[from];
    List& list = ListOf(entry.stamp);
    entries_[to] = entry;
    (entry.older == kNoNode ? list.oldest : entries_[entry.older].younger) = to;
    (entry.younger == kNoNode ? list.youngest : entries_[entry.younger].older) = to;
    entries_[from].stamp = kNoStamp;
  }

  // kNoNode when the queue is empty.
  NodeId oldest() const {
    NodeId oldest = kNoNode;
    for (const List& list : lists_) {
      if (list.oldest == kNoNode) continue;
      if (oldest == kNoNode || entries_[list.oldest].stamp < entries_[oldest].stamp) {
        oldest = list.oldest;
      }
    }
    return oldest;
  }
  // Of a node that is in the queue.
  CommitStamp StampOf(NodeId node) const { return entries_[node].stamp; }
  uint64_t size() const { return size_; }
  uint64_t bytes() const { return entries_.capacity() * sizeof(Entry); }

  // Each list is in order and holds what it counts. Slow: for tests.
  bool IsSound() const {
    uint64_t found = 0;
    for (size_t home = 0; home < lists_.size(); ++home) {
      NodeId before = kNoNode;
      for (NodeId node = lists_[home].oldest; node != kNoNode; node = entries_[node].younger) {
        const Entry& entry = entries_[node];
        if (entry.stamp == kNoStamp || HomeOf(entry.stamp) != home || entry.older != before ||
            (before != kNoNode && entries_[before].stamp > entry.stamp) || ++found > size_) {
          return false;
        }
        before = node;
      }
      if (lists_[home].youngest != before) return false;
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

  size_t HomeOf(CommitStamp stamp) const {
    return (stamp & ((CommitStamp{1} << kStampShardBits) - 1)) % lists_.size();
  }
  List& ListOf(CommitStamp stamp) { return lists_[HomeOf(stamp)]; }

  ChunkedArray<Entry> entries_;  // by node
  std::vector<List> lists_;      // by home
  uint64_t size_ = 0;
};

}  // namespace engram
