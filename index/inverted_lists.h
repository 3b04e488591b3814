#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "index/block_products.h"
#include "index/chunked_array.h"
#include "index/distance.h"
#include "index/nearest_selection.h"
#include "index/rabitq_format.h"
#include "index/sign_blocks.h"
#include "index/vector_format.h"
#include "index/vector_store.h"
#include "src/core/arena_heap.h"
#include "src/core/ids.h"
#include "src/core/result.h"
#include "src/core/spsc_ring.h"

namespace engram {

// Nodes by the nearest of some centroids (an inverted file, Jégou et al. 2011), with the RaBitQ
// codes of each list side by side (sign_blocks.h), so that nodes are compared with many members at
// once.
//
// The nearest of few centroids are found by their products with all of them; of many, those whose
// signs are nearest are compared.
//
// It begins with one list. A list that has grown too long is split in two by 2-means
// over some of its members (as in SPFresh's LIRE, Xu et al. 2023); neither half is smaller than a
// quarter. One that has few members left is merged into a list beside it. So lists stay of one size
// whatever comes and goes.
//
// Thread safety: the owner core's alone.
// Invariants (CheckInvariants proves them): a node is in at most one list, once, and where it is
// said to be; members lie in full blocks but for the last, which is no longer than it takes.
class InvertedLists {
 public:
  // A list is split that has more than most_members(): shorter lists are nearer to what is looked
  // for, but each costs a look at its centroid. So lists are short until there are some
  // kListsAimedAt, and then grow with what there is.
  static constexpr uint32_t kFewestMembers = 192;
  static constexpr uint32_t kMostMembers = 384;
  static constexpr uint32_t kListsAimedAt = 1'200;
  static constexpr uint32_t kLeastShare = 5;
  // Members that lie side by side.
  static constexpr uint32_t kBlockMembers = SignBlocks::kMembers;
  // Members of a list with the same code, unless told otherwise.
  static constexpr uint32_t kMostCopies = 4;
  // Nodes that Choose takes at once.
  static constexpr uint32_t kMostAtOnce = 16;
  // Lists that are chosen for a node at most.
  static constexpr uint32_t kMostChosen = 128;

  // One that lists are chosen for.
  struct Row {
    const std::byte* vector;  // int8
    const std::byte* code;    // nullptr where codes do not tell what is near
  };
  struct Choice {
    uint32_t home;   // the nearest list
    uint32_t count;  // of `lists`, to look for neighbours in
    std::array<uint32_t, kMostChosen + kSelectionSlack> lists;
  };

  // So many lists that their centroids are compared by signs first. Below that products with all
  // cost as little, as they stay in the second-level cache.
  static constexpr uint32_t kMany = 1'200;

  // A block of codes (SignBlocks), of so many places; nullptr where there is none.
  struct Codes {
    const std::byte* block;
    uint32_t places;
  };
  // Up to kBlockMembers members; member i of the block of codes is nodes[i].
  struct Block {
    std::span<const NodeId> nodes;  // room for kSelectionSlack more behind them
    Codes codes;
    Codes next;  // those of the block behind it in its list
  };

  // `vectors`: the int8 rows of the nodes, in `format`. Both outlive the lists. `coding`: of the
  // codes that are added; it is used until the lists are Recoded with another. The others as
  // kMostCopies and kMany.
  InvertedLists(ArenaHeap* heap, const VectorFormat* format, const VectorStore* vectors,
                const RabitqFormat* coding, uint32_t most_copies = kMostCopies,
                uint32_t many = kMany);
  InvertedLists(const InvertedLists&) = delete;
  InvertedLists& operator=(const InvertedLists&) = delete;
  ~InvertedLists() { Release(); }

  // Makes room for nodes 0 to `nodes` - 1, and the first list. False when the heap is spent.
  bool Reserve(size_t nodes);

  // For each of up to kMostAtOnce rows: its home, and the nearest lists that together have about
  // `members` members, by the space's metric. There is a list.
  void Choose(const BlockProducts& products, std::span<const Row> rows, float members,
              Choice* choices);
  // The nearest lists that together have about `members` members, as many as `lists` has room for
  // but kSelectionSlack; by signs alone where `row` has a code. Returns how many.
  size_t ChooseMany(const BlockProducts& products, const Row& row, float members,
                    std::span<uint32_t> lists) const;
  // `node`, which is in no list, becomes a member; not where as many as are allowed have the same
  // code: more would be in the way of what else is near. False when the heap is spent; nothing has
  // changed then.
  bool Add(uint32_t list, NodeId node, const std::byte* code);
  // Does nothing where the node is in no list.
  void Remove(NodeId node);
  bool Has(NodeId node) const { return node < home_of_.capacity() && home_of_[node] != kNoList; }

  // The list that a node is in; of one that is in one.
  uint32_t HomeOf(NodeId node) const { return home_of_[node] - 1; }

  uint32_t count() const { return count_; }
  uint32_t size(uint32_t list) const { return lists_[list].size; }
  // Nodes in all lists.
  size_t members() const { return members_; }
  // Members that a list is split beyond.
  uint32_t most_members() const {
    // What was split has two thirds of what it is split beyond.
    const size_t wanted = members_ * 3 / 2 / kListsAimedAt;
    return static_cast<uint32_t>(std::clamp<size_t>(wanted, kFewestMembers, kMostMembers));
  }
  // Members that a list is merged below; a split seldom leaves fewer, as it looks at some alone.
  uint32_t least_members() const { return most_members() / kLeastShare; }
  // Of the first block of a list.
  Codes FirstCodes(uint32_t list) const { return CodesFrom(lists_[list].first); }
  template <typename Visit>
  void ForEachBlock(uint32_t list, Visit&& visit) const {
    uint32_t left = lists_[list].size;
    for (const Stored* block = lists_[list].first; left > 0; block = block->next) {
      const uint32_t here = left < kBlockMembers ? left : kBlockMembers;
      visit(Block{.nodes = {block->nodes(), here},
                  .codes = CodesFrom(block),
                  .next = CodesFrom(block->next)});
      left -= here;
    }
  }

  // Splits one list that has more than most_members(), if there is one and memory for it. False
  // where nothing was done.
  bool SplitOne();
  // Merges one list that has fewer than least_members() into the nearest other one, if there is
  // such a list; the last list has its number from then on. False where nothing was done.
  bool MergeOne(const BlockProducts& products);
  // From here on codes are of `coding`, which has the metric and dimension of the one before. All
  // lists are Recoded before anything is asked or added.
  void Use(const RabitqFormat* coding);
  // Writes the codes of one list anew: `code_of(node)` is the row.
  template <typename CodeOf>
  void Recode(uint32_t list, CodeOf&& code_of) {
    if (has_centroids()) CodeCentroid(list);
    uint32_t left = lists_[list].size;
    for (Stored* block = lists_[list].first; left > 0; block = block->next) {
      for (uint32_t i = 0; i < kBlockMembers && left > 0; ++i, --left) {
        SetCode(block, i, code_of(block->nodes()[i]));
      }
    }
  }

  // Ahead of their end: gives back members, list by list, until `most_members` are gone. True when
  // no more is left than the end can do at once.
  bool ReleaseSome(uint32_t most_members);

  // What they take of the heap.
  size_t bytes() const { return bytes_ + lists_.bytes() + groups_.bytes() + home_of_.bytes(); }
  // kCorrupt with what is wrong. For tests and checks; allocates.
  Result<void> CheckInvariants() const;

 private:
  friend class InvertedListsTestPeer;

  static constexpr uint32_t kNoList = 0;  // in home_of_, where a list is its number + 1
  static constexpr uint32_t kGroupLists = 64;
  static constexpr size_t kMostCodeBytes = kMaxDimension / 8 + 2 * kCacheLineBytes;

  // Behind it lie the nodes, with room for kSelectionSlack more, hashes of the codes, and the codes
  // from a cache line on.
  struct Stored {
    Stored* next;
    uint32_t places;  // kBlockMembers; of the last of a list also a half or a quarter of it

    NodeId* nodes() { return reinterpret_cast<NodeId*>(this + 1); }
    const NodeId* nodes() const { return reinterpret_cast<const NodeId*>(this + 1); }
    uint32_t* hashes() { return nodes() + places + kSelectionSlack; }
    const uint32_t* hashes() const { return nodes() + places + kSelectionSlack; }
  };
  static constexpr uint32_t kFewestPlaces = SignBlocks::kLeastPlaces;
  struct List {
    Stored* first;
    Stored* last;
    uint32_t size;
  };
  // Centroids side by side: what this tells of each, their codes, and their int8 rows.
  struct Group {
    using Numbers = std::array<float, kGroupLists + kSelectionSlack>;
    // In units of unit_: a centroid's squared norm, and its scale, negative, once and twice.
    Numbers norms;
    Numbers by_product;
    Numbers by_distance;
    Numbers zeros;
  };
  static constexpr size_t kGroupHeaderBytes = (sizeof(Group) + 63) / 64 * 64;

  size_t ScoreStride() const { return size_t{list_capacity_} + kSelectionSlack; }
  // Of the heap, for sizes and scores.
  static size_t ScoreBytes(size_t stride) {
    return ArenaHeap::BlockBytes(stride * sizeof(float)) +
           ArenaHeap::BlockBytes(kMostAtOnce * stride * sizeof(float));
  }
  static constexpr size_t StoredHeaderBytes(uint32_t places) {
    return (sizeof(Stored) + (2 * places + kSelectionSlack) * sizeof(uint32_t) + 63) / 64 * 64;
  }
  size_t StoredBytes(uint32_t places) const {
    return StoredHeaderBytes(places) + codes_.block_bytes(places);
  }
  // BlockProducts takes rows that begin at a cache line.
  size_t CentroidStride() const { return (format_->row_bytes() + 63) / 64 * 64; }
  size_t GroupBytes() const {
    return kGroupHeaderBytes + codes_.block_bytes() + kGroupLists * CentroidStride();
  }
  static const std::byte* CodesOf(const Stored* block) {
    return reinterpret_cast<const std::byte*>(block) + StoredHeaderBytes(block->places);
  }
  static std::byte* CodesOf(Stored* block) {
    return reinterpret_cast<std::byte*>(block) + StoredHeaderBytes(block->places);
  }
  static Codes CodesFrom(const Stored* block) {
    return block == nullptr ? Codes{nullptr, 0} : Codes{CodesOf(block), block->places};
  }
  void SetCode(Stored* block, uint32_t place, const std::byte* code);
  void CopyCode(const Stored* from, uint32_t from_place, Stored* to, uint32_t to_place);
  uint32_t HashOf(const std::byte* code) const;
  uint32_t CopiesOf(const List& list, uint32_t hash) const;
  std::byte* CentroidCodes(uint32_t group) const {
    return reinterpret_cast<std::byte*>(groups_[group]) + kGroupHeaderBytes;
  }
  std::byte* Centroid(uint32_t list) const {
    return CentroidCodes(list / kGroupLists) + codes_.block_bytes() +
           list % kGroupLists * CentroidStride();
  }
  bool has_centroids() const { return unit_ != 0; }
  bool GrowScores();
  void FreeScores();
  void BeginWith(std::span<const Row> rows);
  void ScoreByProducts(const BlockProducts& products, std::span<const Row> rows,
                       Choice* choices) const;
  void ChooseByProducts(const BlockProducts& products, std::span<const Row> rows, float members,
                        Choice* choices);
  void EstimateGroup(const SignBlocks::Query& query, uint32_t first, float* scores) const;
  bool ChooseEstimated(const Row& row, float members, float* estimates, Choice* choice);
  void LeaveOutEmpty(float* scores) const;
  bool Move(uint32_t list, uint32_t place, uint32_t other);
  void DropEmpty(uint32_t list);
  uint32_t NearestOther(const BlockProducts& products, uint32_t list);
  bool AddList();
  void SetCentroid(uint32_t list, const float* mean, const std::byte* instead);
  void EncodeCentroid(uint32_t list, std::byte* code) const;
  void CodeCentroid(uint32_t list);
  Stored* AllocateBlock(uint32_t places);
  void FreeBlock(Stored* block);
  bool MakeRoom(List* list);
  bool ResizeLast(List* list, uint32_t places);
  void DropLast(List* list);
  void LeaveLastPlace(List* list);
  uint32_t Empty(uint32_t list);
  // By L2, whatever the metric.
  float Apart(const std::byte* a, const std::byte* b) const {
    return l2_(a, b, format_->padded_dimension());
  }
  NodeId MemberAt(uint32_t list, uint32_t place) const;
  // How much nearer a node is to `list` than to `other`.
  float Margin(NodeId node, uint32_t list, uint32_t other) const {
    const std::byte* row = vectors_->Row(node);
    return Apart(row, Centroid(other)) - Apart(row, Centroid(list));
  }
  void FindCentroids(uint32_t list, uint32_t other);
  float FindBoundary(uint32_t list, uint32_t other) const;
  void Release();

  // Constant after construction.
  ArenaHeap* heap_;
  const VectorFormat* format_;
  const VectorStore* vectors_;
  DistanceFn l2_;
  DistancesFn distances_;
  uint32_t most_copies_;
  uint32_t many_;
  // Of what is listed.
  const RabitqFormat* coding_;
  SignBlocks codes_;
  // Taken from the heap.
  ChunkedArray<List> lists_;
  ChunkedArray<Group*> groups_;
  ChunkedArray<uint32_t> home_of_;  // by node
  float* sizes_ = nullptr;          // by list
  float* scores_ = nullptr;         // of Choose: by node and list
  uint32_t list_capacity_ = 0;
  uint32_t count_ = 0;
  uint32_t empty_ = 0;  // lists that have no members
  size_t members_ = 0;
  double unit_ = 0;   // scale of the first centroid: keeps products in float's range
  size_t bytes_ = 0;  // of the heap, but for arrays
};

}  // namespace engram
