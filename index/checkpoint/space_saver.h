#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "index/checkpoint/live_table.h"
#include "index/checkpoint/space_extent.h"
#include "index/chunked_array.h"
#include "index/space.h"
#include "src/core/arena_heap.h"
#include "src/core/commit_stamp.h"
#include "src/core/ids.h"

namespace engram {

// Saves one space in slices, while observations come in and are linked, swept and given back
// between them. What is written is a sequence of extents (index/checkpoint/FORMAT.md), which a
// SpaceLoader reads.
//
// Steps:
// 1. The space's description.
// 2. The graph's lists, node after node. They are small beside the vectors, so they are of nearly
//    one moment.
// 3. The nodes in the order of their places, each as it is when its turn comes: so of different
//    moments. Those that are made beyond the last place meanwhile are left out.
// 4. The end: how many there were, the entry point.
//
// Why a space that is loaded from this, and to which the log is replayed, has every observation:
// - All that has happened to the space since before the save is in the part of the log that is
//   replayed, and replaying what was caught already changes nothing (Space goes by the stamps of
//   contents). So only content from before the save matters, which nothing has replaced since.
// - When the save begins it is in some node. Either that node is caught with it, or it was
//   suppressed before: then its node, though it has ended, is kept until its turn, and is saved
//   as the one that holds the content (SavedState::kSuppressed). The replay suppresses it again.
// - Where the copy is caught too the loader takes the one that began last.
// - Tombstones are kept as long as an observation with an earlier stamp may still be replayed.
// And why its graph is as good: every node whose lists were saved is kept until its turn, so links
// lead to the vectors for which they were chosen. Nodes that ended meanwhile come back as retired.
//
// Thread safety: the shard's alone.
// Invariants: Step takes no memory; the nodes before save_.next have had their turn in step 3,
// those before next_links_ in step 2.
class SpaceSaver {
 public:
  struct Options {
    bool with_payload = true;  // those that lie in no log
    // Counts the records of what is saved, under this number of the space; nullptr: nobody does.
    LiveTable* live = nullptr;
    uint32_t space = 0;
  };

  // `heap` outlives the saver.
  explicit SpaceSaver(ArenaHeap* heap) : suppressed_(heap), linked_(heap) {}
  SpaceSaver(const SpaceSaver&) = delete;
  SpaceSaver& operator=(const SpaceSaver&) = delete;
  ~SpaceSaver() { Abort(); }

  // Begins a save of `space`, which outlives it or is dropped after Abort. No observation with the
  // stamp `hold` or an earlier one will be replayed to what is saved, and all that comes to the
  // space from here on will be. Takes two bits for each node; false when the heap is spent.
  bool Begin(Space* space, CommitStamp hold) { return Begin(space, hold, Options()); }
  bool Begin(Space* space, CommitStamp hold, const Options& options);
  // Writes whole extents from the front of `to`, of about `max_nodes` nodes (at least 1). Returns
  // their bytes; 0: the next one does not fit, but it does in kMaxExtentBytes.
  size_t Step(std::span<std::byte> to, size_t max_nodes);
  // Ends a save that is not done; does nothing where there is none.
  void Abort();

  bool active() const { return space_ != nullptr; }
  // The last save has been written to its end.
  bool done() const { return done_; }
  // Nodes written by the save under way, or the last one.
  uint64_t nodes() const { return nodes_; }

 private:
  enum class Phase : uint8_t { kNone, kSpace, kLinks, kNodes, kEnd };

  size_t WriteExtent(std::span<std::byte> to, uint64_t* budget);
  size_t WriteSpace(std::span<std::byte> to);
  size_t WriteLinks(std::span<std::byte> to, uint64_t* budget);
  size_t WriteNodes(std::span<std::byte> to, uint64_t* budget);
  size_t WriteEnd(std::span<std::byte> to);
  size_t Seal(std::span<std::byte> extent, ExtentHeader header);
  bool DescribeLinks(NodeId node, SavedLinks* saved) const;
  void PutLinks(const SavedLinks& saved, std::byte* to) const;
  bool DescribeNode(NodeId node, SavedNode* saved) const;
  void DescribeText(NodeId node, SavedNode* saved) const;
  size_t RowBytes(const SavedNode& saved) const;
  size_t AttributeRoom(const SavedNode& saved) const;
  void PutNode(const SavedNode& saved, std::byte* to) const;

  // By node: see Space::Save.
  ChunkedArray<uint64_t> suppressed_;
  ChunkedArray<uint64_t> linked_;
  // The save under way.
  Space* space_ = nullptr;
  Options options_;
  Space::Save save_{};
  uint32_t dimension_ = 0;  // when it began
  Phase phase_ = Phase::kNone;
  bool done_ = false;
  NodeId next_links_ = 0;
  uint32_t ordinal_ = 0;
  uint64_t nodes_ = 0;
  uint64_t linked_nodes_ = 0;
};

}  // namespace engram
