#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <tuple>
#include <utility>

#include "src/core/arena_heap.h"
#include "src/core/attributes.h"
#include "src/core/ids.h"
#include "src/core/result.h"

namespace engram {

// A space's nodes by their `when`, for filters by time.
//
// Nodes lie in blocks of up to 256, unsorted; a block has the nodes whose keys, (when, node), are
// from its own key on and below that of the next block. Blocks are listed in pages of up to 128, in
// order: a tree of three levels. A full block is split in two halves, but where the arrival is
// later than all in it: then a block begins with it. So what comes in order leaves full blocks,
// which is 4 bytes a node.
//
// Thread safety: the owner core's alone. Takes memory from the heap alone; a step moves a block, a
// page, or the list of pages, of which there is one for some 20,000 nodes.
// Invariants (CheckInvariants proves them): blocks and pages are not empty, and in order.
class TimeIndex {
 public:
  static constexpr uint32_t kBlockNodes = 256;
  static constexpr uint32_t kPageBlocks = 128;

  // `heap` outlives the index. Nothing is taken before the first node.
  explicit TimeIndex(ArenaHeap* heap) : heap_(heap) {}
  TimeIndex(const TimeIndex&) = delete;
  TimeIndex& operator=(const TimeIndex&) = delete;
  ~TimeIndex();

  // A node that is not there. `when_of(node)`: of those that are. False when the heap is spent;
  // nothing has changed then.
  template <typename WhenOf>
  bool Add(NodeId node, int64_t when_ns, WhenOf&& when_of) {
    const Key key{when_ns, node};
    const Place place = Locate(key);
    if (size_ > 0 && At(place).count == kBlockNodes) {
      std::array<Key, kBlockNodes> keys;
      const std::span<const NodeId> nodes = NodesAt(place);
      for (size_t i = 0; i < kBlockNodes; ++i) keys[i] = {when_of(nodes[i]), nodes[i]};
      if (!MakeRoom(place, key, &keys)) return false;
    }
    return Insert(key);
  }
  // Does nothing where the node, with this `when`, is not there.
  void Remove(NodeId node, int64_t when_ns);
  bool Has(NodeId node, int64_t when_ns) const;

  uint64_t size() const { return size_; }
  // Nodes in the range, and at most 510 others.
  uint64_t CountAtMost(const TimeRange& range) const;
  size_t bytes() const { return bytes_; }

  // The nodes of a range, in slices. Nothing changes meanwhile.
  class Candidates {
   public:
    void Begin(const TimeIndex* index, const TimeRange& range);
    // The next ones, 1 to kBlockNodes; where not *are_certain some may be out of the range. False
    // when those before were the last.
    bool Next(std::span<const NodeId>* nodes, bool* are_certain);

   private:
    const TimeIndex* index_ = nullptr;
    TimeRange range_;
    size_t page_ = 0;
    uint32_t block_ = 0;
  };

  // kCorrupt naming what is wrong; `when_of` as in Add. For tests.
  template <typename WhenOf>
  Result<void> CheckInvariants(WhenOf&& when_of) const {
    uint64_t nodes = 0;
    Key before{std::numeric_limits<int64_t>::min(), 0};
    for (size_t page = 0; page < page_count_; ++page) {
      uint64_t in_page = 0;
      for (uint32_t block = 0; block < pages_[page]->count; ++block) {
        const Place place{page, block};
        const Key next = KeyBehind(place);
        if (KeyAt(place) < before || KeyAt(place) >= next) return Unsound("blocks out of order");
        before = KeyAt(place);
        for (const NodeId node : NodesAt(place)) {
          const Key key{when_of(node), node};
          if (key < before || key >= next) return Unsound("a node in another's block");
        }
        if (NodesAt(place).empty()) return Unsound("an empty block");
        in_page += NodesAt(place).size();
      }
      if (in_page == 0 || in_page != pages_[page]->nodes) return Unsound("nodes of a page");
      nodes += in_page;
    }
    if (nodes != size_) return Unsound("number of nodes");
    return {};
  }

 private:
  using Key = std::pair<int64_t, NodeId>;
  struct Block {
    int64_t when_ns;  // with `node` its key
    NodeId node;
    uint16_t count;
    uint16_t capacity;
    NodeId* nodes;

    Key key() const { return {when_ns, node}; }
  };
  static_assert(sizeof(Block) == 24);
  struct Page {
    uint32_t count;
    uint32_t capacity;
    uint64_t nodes;

    Block* blocks() { return reinterpret_cast<Block*>(this + 1); }
    const Block* blocks() const { return reinterpret_cast<const Block*>(this + 1); }
  };
  struct Place {
    size_t page = 0;
    uint32_t block = 0;
  };
  static constexpr Key kBehindAll{std::numeric_limits<int64_t>::max(), kNoNode};
  static constexpr uint32_t kLeastNodes = 16;
  static constexpr uint32_t kLeastBlocks = 4;
  static constexpr uint32_t kFewNodes = kBlockNodes / 4;

  static std::unexpected<Error> Unsound(const char* what);
  Block& At(Place place) const { return pages_[place.page]->blocks()[place.block]; }
  Key KeyAt(Place place) const { return At(place).key(); }
  std::span<const NodeId> NodesAt(Place place) const { return {At(place).nodes, At(place).count}; }
  Key KeyBehind(Place place) const;
  Place Locate(Key key) const;
  bool Insert(Key key);
  bool MakeRoom(Place full, Key key, std::array<Key, kBlockNodes>* keys);
  bool MakeRoomForBlock(Place* place);
  bool AddPage(size_t at);
  bool Enlarge(Page** page);
  bool Append(Block* block, NodeId node);
  bool InsertBlock(Place place, Key key, uint32_t capacity);
  void EraseBlock(Place place);
  void MergeWithNext(Place place);
  static size_t PageBytes(uint32_t capacity) { return sizeof(Page) + capacity * sizeof(Block); }
  std::byte* Take(size_t bytes);
  void GiveBack(void* block, size_t bytes);

  ArenaHeap* const heap_;
  Page** pages_ = nullptr;
  size_t page_count_ = 0;
  size_t page_capacity_ = 0;
  uint64_t size_ = 0;
  size_t bytes_ = 0;
};

}  // namespace engram
