#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "index/distance.h"
#include "index/hnsw_graph.h"
#include "index/vector_store.h"
#include "src/core/arena_heap.h"
#include "src/core/check.h"
#include "src/core/ids.h"
#include "src/core/observation.h"
#include "src/core/spsc_ring.h"

namespace engram {

// The steps of a search in an HNSW graph, for whoever links a node or recalls.
// 1. Greedy descent: from the entry point, on each level above 0, go to the nearest linked node
//    until none is nearer than where we are.
// 2. Beam search on a level (Malkov & Yashunin 2018, Algorithm 2): expand the nearest candidate
//    that has not been expanded; keep the ef nearest live nodes seen; stop when the nearest
//    candidate is farther than all of them.
// Retired nodes are walked through like any other, and never among the results.

struct Neighbour {
  float distance;
  NodeId node;
};

// A distance and a node in one number, ordered by distance and then by node.
using NeighbourKey = uint64_t;
inline NeighbourKey KeyOf(float distance, NodeId node) {
  const auto bits = std::bit_cast<uint32_t>(distance);
  const uint32_t ordered = bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFF : 0x80000000);
  return uint64_t{ordered} << 32 | node;
}
inline NodeId NodeOf(NeighbourKey key) { return static_cast<NodeId>(key); }
inline float DistanceOf(NeighbourKey key) {
  const auto ordered = static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>(ordered ^ ((ordered >> 31) != 0 ? 0x80000000 : 0xFFFFFFFF));
}

// A binary heap of keys in memory that someone else owns. `Before(a, b)`: a is nearer to the top.
template <typename Before>
class KeyHeap {
 public:
  void Attach(NeighbourKey* keys) { keys_ = keys; }
  void Clear() { size_ = 0; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  NeighbourKey top() const { return keys_[0]; }
  std::span<NeighbourKey> keys() { return {keys_, size_}; }

  void Push(NeighbourKey key) {
    size_t place = size_++;
    while (place != 0) {
      const size_t above = (place - 1) / 2;
      if (!Before()(key, keys_[above])) break;
      keys_[place] = keys_[above];
      place = above;
    }
    keys_[place] = key;
  }
  void ReplaceTop(NeighbourKey key) {
    size_t place = 0;
    for (;;) {
      size_t below = 2 * place + 1;
      if (below >= size_) break;
      // Written so that it compiles to a conditional move: the outcome cannot be predicted.
      below += static_cast<size_t>(below + 1 < size_ && Before()(keys_[below + 1], keys_[below]));
      if (!Before()(keys_[below], key)) break;
      keys_[place] = keys_[below];
      place = below;
    }
    keys_[place] = key;
  }
  void Pop() {
    const NeighbourKey last = keys_[--size_];
    if (size_ != 0) ReplaceTop(last);
  }
  // Makes a heap of the first `size` keys in memory, in whatever order they are.
  void Rebuild(size_t size) {
    size_ = size;
    std::make_heap(keys_, keys_ + size,
                   [](NeighbourKey a, NeighbourKey b) { return Before()(b, a); });
  }

 private:
  NeighbourKey* keys_ = nullptr;
  size_t size_ = 0;
};
struct NearestFirst {
  bool operator()(NeighbourKey a, NeighbourKey b) const { return a < b; }
};
struct FarthestFirst {
  bool operator()(NeighbourKey a, NeighbourKey b) const { return a > b; }
};

// What a search needs besides the graph: the marks of visited nodes, the candidates, the results.
// One search at a time; any number of graphs, one after the other.
//
// Thread safety: one core's alone.
class SearchScratch {
 public:
  // For searches with ef up to `max_ef`. `heap` must outlive the scratch. Takes memory at the first
  // Reserve only.
  explicit SearchScratch(ArenaHeap* heap, uint32_t max_ef = kMaxEf);
  SearchScratch(const SearchScratch&) = delete;
  SearchScratch& operator=(const SearchScratch&) = delete;
  ~SearchScratch() { Release(); }

  // Makes room for searches in graphs of nodes 0 to `nodes` - 1. Call it where a graph grows. False
  // when the heap is spent; the room is what it was then.
  bool Reserve(size_t nodes);
  void Release();

  uint32_t max_ef() const { return max_ef_; }
  size_t capacity() const { return visited_capacity_; }

  // Distances evaluated by all searches with this scratch so far.
  uint64_t distances = 0;

 private:
  template <typename IsLive>
  friend class BeamSearch;

  using Epoch = uint16_t;

  void ForgetVisited();
  // True the first time in a search. Nodes beyond the room were added after the search began: they
  // count as visited.
  bool Visit(NodeId node) {
    if (node >= visited_capacity_ || visited_[node] == epoch_) return false;
    visited_[node] = epoch_;
    return true;
  }
  // Makes room among the candidates: drops those beyond the results' bound, else the farther half.
  void TrimCandidates(bool bounded);

  // Constant after construction.
  ArenaHeap* heap_;
  uint32_t max_ef_;
  size_t candidates_capacity_;
  // Taken from the heap.
  NeighbourKey* candidate_keys_ = nullptr;
  NeighbourKey* result_keys_ = nullptr;
  Epoch* visited_ = nullptr;
  size_t visited_capacity_ = 0;
  // The search under way. A node is visited when its mark is epoch_.
  Epoch epoch_ = 0;
  KeyHeap<NearestFirst> candidates_;
  KeyHeap<FarthestFirst> results_;
};

// Asks for the cache lines of a row that a distance will read soon. The rest follows by the
// processor's own prefetcher once the distance runs.
inline void PrefetchRow(const std::byte* row, size_t row_bytes) {
  constexpr size_t kLinesAhead = 8;
  const size_t lines = std::min((row_bytes + kCacheLineBytes - 1) / kCacheLineBytes, kLinesAhead);
  for (size_t line = 0; line < lines; ++line) __builtin_prefetch(row + line * kCacheLineBytes);
}

// What is searched, with what, and for what. `query`: a row in the form of `vectors`.
struct SearchTarget {
  const HnswGraph* graph = nullptr;
  const VectorStore* vectors = nullptr;
  DistanceFn distance = nullptr;
  size_t padded_dimension = 0;
  const std::byte* query = nullptr;
  DistancesFn distances = nullptr;  // the same for several rows at once, where there is one

  float DistanceTo(NodeId node) const {
    return distance(query, vectors->Row(node), padded_dimension);
  }
  float DistanceBetween(NodeId a, NodeId b) const {
    return distance(vectors->Row(a), vectors->Row(b), padded_dimension);
  }
  // From one row to others.
  void DistancesBetween(const std::byte* row, std::span<const std::byte* const> others,
                        float* out) const {
    if (distances != nullptr) {
      distances(row, others.data(), others.size(), padded_dimension, out);
      return;
    }
    for (size_t i = 0; i < others.size(); ++i) out[i] = distance(row, others[i], padded_dimension);
  }
  void Prefetch(NodeId node) const { PrefetchRow(vectors->Row(node), vectors->row_bytes()); }
};

// Step 1, one hop: evaluates the links of *nearest on `level` and moves there if one is nearer.
// True if it moved. Adds the distances it evaluated to *distances.
bool GreedyHop(const SearchTarget& target, uint32_t level, NeighbourKey* nearest,
               uint64_t* distances);

// Step 2, one expansion at a time.
template <typename IsLive>
class BeamSearch {
 public:
  explicit BeamSearch(IsLive is_live = IsLive()) : is_live_(is_live) {}

  // `scratch` belongs to this search until its results have been read. 1 <= ef <= max_ef.
  void Begin(const SearchTarget& target, uint32_t level, uint32_t ef, SearchScratch* scratch) {
    CHECK(ef >= 1 && ef <= scratch->max_ef(), "ef is beyond the scratch");
    target_ = target;
    level_ = level;
    ef_ = ef;
    scratch_ = scratch;
    scratch_->ForgetVisited();
    scratch_->candidates_.Clear();
    scratch_->results_.Clear();
  }
  // The same on the next level, from the nodes that were found on this one.
  void BeginFromResults(uint32_t level) {
    level_ = level;
    scratch_->ForgetVisited();
    const std::span<NeighbourKey> found = scratch_->results_.keys();
    std::copy(found.begin(), found.end(), scratch_->candidate_keys_);
    scratch_->candidates_.Rebuild(found.size());
    scratch_->results_.Rebuild(found.size());
    for (const NeighbourKey key : found) scratch_->Visit(NodeOf(key));
  }
  // Also where the seed was added to the graph since the scratch's room was made: the descent may
  // end at such a node, and the others are found through it.
  void AddSeed(NeighbourKey seed) {
    scratch_->Visit(NodeOf(seed));
    Offer(seed);
  }

  // A live one that was found elsewhere takes a place among the ef; it is no result.
  void AddKnown(float distance) {
    SearchScratch& s = *scratch_;
    const NeighbourKey key = KeyOf(distance, kNoNode);
    if (s.results_.size() < ef_) {
      s.results_.Push(key);
    } else if (key < s.results_.top()) {
      s.results_.ReplaceTop(key);
    }
  }

  // For walks of the caller's own once the search is complete.
  void ForgetVisited() { scratch_->ForgetVisited(); }
  bool Visit(NodeId node) { return scratch_->Visit(node); }

  // Expands the nearest candidate. False when the search is complete.
  bool Step() {
    SearchScratch& s = *scratch_;
    if (s.candidates_.empty()) return false;
    const NeighbourKey candidate = s.candidates_.top();
    if (s.results_.size() == ef_ && candidate > s.results_.top()) return false;
    s.candidates_.Pop();
    if (!s.candidates_.empty()) PrefetchLinks(NodeOf(s.candidates_.top()));
    const size_t count = GatherUnvisited(NodeOf(candidate));
    std::array<const std::byte*, kRowsAhead> rows;
    std::array<float, kRowsAhead> distances;
    for (size_t i = 0; i < count; i += kRowsAhead) {
      const size_t some = std::min(kRowsAhead, count - i);
      for (size_t j = 0; j < some; ++j) {
        rows[j] = target_.vectors->Row(fresh_[i + j]);
        if (i + j + kRowsAhead < count) target_.Prefetch(fresh_[i + j + kRowsAhead]);
      }
      target_.DistancesBetween(target_.query, {rows.data(), some}, distances.data());
      for (size_t j = 0; j < some; ++j) Offer(KeyOf(distances[j], fresh_[i + j]));
    }
    s.distances += count;
    return true;
  }

  // Once Step said false: gives what was found the distances that `target` says. Returns how many.
  size_t CompareAgain(const SearchTarget& target) {
    const std::span<NeighbourKey> found = scratch_->results_.keys();
    for (size_t i = 0; i < found.size(); ++i) {
      if (i + kRowsAhead < found.size()) target.Prefetch(NodeOf(found[i + kRowsAhead]));
      const NodeId node = NodeOf(found[i]);
      found[i] = KeyOf(target.DistanceTo(node), node);
    }
    return found.size();
  }
  // Once Step said false: up to ef live nodes, nearest first. Valid until the next Begin.
  std::span<const NeighbourKey> SortedResults() {
    const std::span<NeighbourKey> keys = scratch_->results_.keys();
    const auto known = std::partition(keys.begin(), keys.end(),
                                      [](NeighbourKey key) { return NodeOf(key) != kNoNode; });
    std::sort(keys.begin(), known);
    return {keys.begin(), known};
  }

 private:
  // Rows that are compared at once, and asked for before that: enough to cover memory's latency.
  static constexpr size_t kRowsAhead = 8;

  void PrefetchLinks(NodeId node) {
    const NodeId* links = target_.graph->Links(node, level_);
    const uint32_t places = target_.graph->MaxDegree(level_);
    for (uint32_t place = 0; place < places; place += 16) __builtin_prefetch(links + place);
  }

  size_t GatherUnvisited(NodeId node) {
    const NodeId* links = target_.graph->Links(node, level_);
    const uint32_t places = target_.graph->MaxDegree(level_);
    size_t count = 0;
    for (uint32_t place = 0; place < places; ++place) {
      const NodeId linked = HnswGraph::LoadLink(links + place);
      if (linked == kNoNode) break;
      // A hole is beyond every room, so it counts as visited.
      if (!scratch_->Visit(linked)) continue;
      if (count < kRowsAhead) target_.Prefetch(linked);
      fresh_[count++] = linked;
    }
    return count;
  }

  void Offer(NeighbourKey key) {
    SearchScratch& s = *scratch_;
    const bool full = s.results_.size() == ef_;
    if (full && key > s.results_.top()) return;
    if (s.candidates_.size() == s.candidates_capacity_) s.TrimCandidates(full);
    s.candidates_.Push(key);
    if (!is_live_(NodeOf(key))) return;
    if (full) {
      s.results_.ReplaceTop(key);
    } else {
      s.results_.Push(key);
    }
  }

  IsLive is_live_;
  SearchTarget target_{};
  uint32_t level_ = 0;
  uint32_t ef_ = 0;
  SearchScratch* scratch_ = nullptr;
  std::array<NodeId, HnswGraph::kMaxM0> fresh_;
};

}  // namespace engram
