#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "index/chunked_array.h"
#include "index/id_map.h"
#include "index/posting_lists.h"
#include "src/core/arena_heap.h"
#include "src/core/attributes.h"
#include "src/core/ids.h"
#include "src/core/refusal_reason.h"
#include "src/core/result.h"

namespace engram {

// A filter (src/core/attributes.h) in the numbers of one space's AttributeIndex. Stays good until
// that changes.
struct CompiledFilter {
  struct Clause {
    bool excludes = false;
    uint8_t first = 0;  // of `terms`
    uint8_t count = 0;
  };
  static constexpr size_t kNoClause = SIZE_MAX;

  std::span<const uint32_t> TermsOf(const Clause& clause) const {
    return std::span(terms).subspan(clause.first, clause.count);
  }
  // Only `when` counts.
  bool has_times_alone() const { return clause_count == 0; }

  TimeRange times;
  bool matches_none = false;   // a value that nobody has is required
  size_t rarest = kNoClause;   // of the required clauses, the one that fewest nodes can meet
  uint64_t most = UINT64_MAX;  // nodes that meet the clauses
  size_t clause_count = 0;
  size_t term_count = 0;
  std::array<Clause, kMaxFilterClauses> clauses;
  std::array<uint32_t, kMaxFilterValues> terms;  // rising, clause by clause
};

// The attributes of a space's nodes, and which nodes have which.
//
// A key and a value are a term, which is stored once. The terms of a node are a set, which is
// stored once, too, however many nodes have just these; a node names its set. A set knows its
// nodes, a term the sets that it is in (PostingLists). So what a filter says of a node is found out
// once for each set, and a node costs 8 bytes and its posting. Only keys that every space has or
// that were declared are kept.
//
// Thread safety: the owner core's alone. Takes memory from the heap alone, in bounded steps.
// Invariants (CheckInvariants proves them): a term is in a set, a set has a node; each is stored
// once; whoever names a node is named by it.
class AttributeIndex {
 public:
  using SetId = uint32_t;
  static constexpr SetId kNoAttributes = 0;

  // `declared`: keys beside those that every space has, kMaxFilterKeys at most. `seed` is secret.
  // `heap` outlives the index. Nothing is taken before the first node that has attributes.
  AttributeIndex(ArenaHeap* heap, std::span<const std::string> declared, uint64_t seed);
  AttributeIndex(const AttributeIndex&) = delete;
  AttributeIndex& operator=(const AttributeIndex&) = delete;
  ~AttributeIndex();

  // Of a node that has none: what CheckAttributes has passed. False when the heap is spent; nothing
  // has changed then.
  bool Add(NodeId node, std::span<const std::byte> attributes);
  // The same attributes as `other` has.
  bool AddAs(NodeId node, NodeId other);
  // Does nothing where it has none.
  void Remove(NodeId node);

  // kNoAttributes for nodes that have none, or were never heard of.
  SetId SetOf(NodeId node) const {
    if (node / kPageNodes >= pages_.capacity()) return kNoAttributes;
    const Page* const page = pages_[node / kPageNodes];
    return page == nullptr ? kNoAttributes : page->set[node % kPageNodes];
  }
  void PrefetchSet(NodeId node) const {
    if (node / kPageNodes >= pages_.capacity()) return;
    const Page* const page = pages_[node / kPageNodes];
    if (page != nullptr) __builtin_prefetch(&page->set[node % kPageNodes]);
  }
  // What Matches reads of a set: asked for in two turns, as the second is found by the first.
  void PrefetchRecord(SetId set) const { __builtin_prefetch(&sets_[set]); }
  void PrefetchMembers(SetId set) const {
    if (sets_[set].count > 1) __builtin_prefetch(sets_[set].members);
  }
  // What the node has, as it would be given to Add: its bytes, and these, by keys as they were
  // declared and then by values.
  size_t AttributeBytes(NodeId node) const;
  void WriteAttributes(NodeId node, std::byte* to) const;

  // kNone, kBadFilter, or kUnknownFilterKey where a clause's key is not kept.
  RefusalReason Compile(std::span<const std::byte> filter, CompiledFilter* compiled) const;
  // Whether nodes of this set meet the filter's clauses. `when` is the caller's.
  bool Matches(SetId set, const CompiledFilter& filter) const;

  // The nodes that meet a filter's clauses, by its rarest one, in slices. Nothing changes
  // meanwhile.
  class Candidates {
   public:
    // The filter has a rarest clause, and outlives this.
    void Begin(const AttributeIndex* index, const CompiledFilter* filter);
    // The next ones, maybe none, at most PostingLists::kInBlock; they stay until the next call.
    // False when those before were the last.
    bool Next(std::span<const NodeId>* nodes);

   private:
    void AskForSets();
    bool NextSets();
    bool IsCandidate(SetId set) const;

    const AttributeIndex* index_ = nullptr;
    const CompiledFilter* filter_ = nullptr;
    size_t next_term_ = 0;  // of the rarest clause
    PostingLists::Reader set_reader_;
    // Of the block of sets that was asked for, and of the one that is gone through.
    std::array<SetId, PostingLists::kInBlock> ahead_;
    std::array<SetId, PostingLists::kInBlock> block_;
    size_t ahead_count_ = 0;
    size_t ahead_term_ = 0;        // whose sets these are, of the rarest clause
    size_t term_ = 0;              // likewise
    std::span<const SetId> sets_;  // that are left of the block
    PostingLists::Reader node_reader_;
    std::array<NodeId, PostingLists::kInBlock> single_;  // nodes that have a set of their own
  };

  // Nodes that have attributes.
  uint64_t nodes() const { return nodes_; }
  size_t terms() const { return term_map_.size(); }
  size_t sets() const { return set_map_.size(); }
  // What it takes of the heap.
  size_t bytes() const;
  // kCorrupt naming what is wrong. Reads everything: for tests.
  Result<void> CheckInvariants() const;

 private:
  static constexpr uint32_t kPageNodes = 1'024;
  struct Page {
    std::array<SetId, kPageNodes> set;
    std::array<uint32_t, kPageNodes> place;  // in the set's nodes
  };
  struct Term {
    std::byte* text;          // the value; nullptr: free
    PostingLists::List sets;  // free: `tail` is the next free one
    uint32_t nodes;           // that have it
    uint8_t key;
    uint8_t value_bytes;
    uint16_t reserved;
  };
  static_assert(sizeof(Term) == 24);
  // One term, and the set's place in the term's sets.
  struct Member {
    uint32_t term;
    uint32_t place;
  };
  struct Set {
    union {
      Member* members;  // of several, by rising terms
      Member one;
    };
    PostingLists::List nodes;  // free: `tail` is the next free one
    uint32_t count;            // of members; 0: free
    uint32_t reserved;

    std::span<Member> all() { return {count == 1 ? &one : members, count}; }
    std::span<const Member> all() const { return {count == 1 ? &one : members, count}; }
  };
  static_assert(sizeof(Set) == 24);
  using Terms = std::array<uint32_t, kMaxAttributes>;
  static constexpr uint32_t kNone = UINT32_MAX;
  static constexpr uint8_t kNoKey = UINT8_MAX;

  uint8_t KeyOf(std::string_view key) const;
  std::string_view ValueOf(const Term& term) const {
    return {reinterpret_cast<const char*>(term.text), term.value_bytes};
  }
  uint64_t HashOfTerm(uint8_t key, std::string_view value) const;
  uint64_t HashOfSet(std::span<const uint32_t> terms) const;
  uint64_t HashOfSet(const Set& set) const;
  uint32_t FindTerm(uint8_t key, std::string_view value) const;
  uint32_t MakeTerm(uint8_t key, std::string_view value);
  void FreeTerm(uint32_t term);
  void FreeUnused(std::span<const uint32_t> terms);
  bool TakeTerms(std::span<const std::byte> attributes, Terms* terms, size_t* count);
  SetId FindSet(std::span<const uint32_t> terms) const;
  SetId MakeSet(std::span<const uint32_t> terms);
  void FreeSet(SetId set);
  bool MakePage(NodeId node);
  void Join(NodeId node, SetId set);
  bool CompileClause(const FilterClause& clause, uint8_t key, CompiledFilter* compiled) const;
  void NoteMost(const CompiledFilter::Clause& clause, size_t place, CompiledFilter* compiled) const;
  void MoveNode(NodeId node, uint32_t place) {
    pages_[node / kPageNodes]->place[node % kPageNodes] = place;
  }
  Result<void> CheckSet(SetId set) const;
  Result<void> CheckTerm(uint32_t term) const;

  ArenaHeap* const heap_;
  const uint64_t seed_;
  std::vector<std::string> keys_;
  ChunkedArray<Page*> pages_;
  ChunkedArray<Term> terms_;
  ChunkedArray<Set> sets_;  // from 1 on
  PostingLists lists_;
  IdMap term_map_;
  IdMap set_map_;
  uint32_t made_terms_ = 0;
  uint32_t made_sets_ = 1;
  uint32_t first_free_term_ = kNone;
  uint32_t first_free_set_ = kNone;
  uint64_t nodes_ = 0;
  size_t page_bytes_ = 0;
  size_t block_bytes_ = 0;  // of values and of sets' members
};

}  // namespace engram
