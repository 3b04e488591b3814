#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "index/hnsw_graph.h"
#include "index/hnsw_search.h"
#include "index/walk_list.h"
#include "src/core/arena_heap.h"
#include "src/core/check.h"
#include "src/core/ids.h"

namespace engram {

// Recall from an HNSW graph, for targets whose distances cost less than the memory they are read
// from:
// 1. Greedy descent (see hnsw_search.h). What it evaluates on the upper levels are the seeds of
//    step 2.
// 2. Beam search on level 0 with a WalkList. The distances of an expansion are taken several at
//    once, and only those below the list's bound are looked at one by one.
// 3. Where that is too small (more than kMaxWalkSlots evaluations, more places than the list has,
//    or ef above kMaxListEf), BeamSearch goes on from what was found; but not where the caller has
//    found half of ef elsewhere, and ef is not above kMaxListEf.
// 4. The k nearest of the results are the answer, by their distances in full.
// Each turn ends where memory has been asked for: the links of the next node, or the rows of its
// neighbours. A core that has several walks takes their turns one after another, and so waits for
// memory in none; three or four walks are enough. (To ask for the rows of one walk while those of
// another are evaluated is no faster than such turns.)

// What a walk needs besides the graph. One walk at a time; any number of graphs, one after the
// other.
//
// Thread safety: one core's alone.
class WalkScratch {
 public:
  // For walks with ef up to `max_ef`. `heap` must outlive the scratch. Takes memory at the first
  // Reserve only.
  explicit WalkScratch(ArenaHeap* heap, uint32_t max_ef = kMaxEf)
      : heap_(heap), beam_(heap, max_ef) {}
  WalkScratch(const WalkScratch&) = delete;
  WalkScratch& operator=(const WalkScratch&) = delete;
  ~WalkScratch() { Release(); }

  // Makes room for walks through graphs of nodes 0 to `nodes` - 1. Call it where a graph grows.
  // False when the heap is spent; the room is what it was then.
  bool Reserve(size_t nodes);
  void Release();

  uint32_t max_ef() const { return beam_.max_ef(); }
  size_t capacity() const { return marks_.count * 32; }

  // Distances evaluated by all walks with this scratch so far.
  uint64_t distances() const { return beam_.distances; }
  // For what the walk's caller evaluates besides.
  void AddDistances(uint64_t count) { beam_.distances += count; }

 private:
  friend class GraphWalkSteps;
  template <typename IsLive>
  friend class GraphWalk;

  // An expansion's links are written behind the last slot before it is known which are new, and
  // kernels touch a block beyond.
  static constexpr size_t kSlotRoom = kMaxWalkSlots + HnswGraph::kMaxM0 + WalkList::kBlockKeys + 1;

  struct Memory {
    std::array<NodeId, kSlotRoom> nodes;     // by slot
    std::array<float, kSlotRoom> distances;  // likewise
    std::array<NeighbourKey, WalkList::kMaxSize> found;
    alignas(kCacheLineBytes) std::array<std::byte, WalkList::kBytes> list;  // whole registers
  };

  // A bit for each node, then a word of ones.
  struct Marks {
    // True the first time in a walk. Nodes beyond the room were added after the walk began, and a
    // hole is beyond every room: both count as visited. No branch, as the outcome cannot be
    // predicted.
    bool Visit(NodeId node) const {
      uint32_t& word = words[std::min<size_t>(node / 32, count)];
      const uint32_t bit = 1U << node % 32;
      const bool is_new = (word & bit) == 0;
      word |= bit;
      return is_new;
    }
    uint32_t* words = nullptr;
    size_t count = 0;  // but the word of ones
  };

  void ForgetVisited();

  // Constant after construction.
  ArenaHeap* heap_;
  // Taken from the heap.
  Memory* memory_ = nullptr;
  Marks marks_;
  // The walk under way.
  uint32_t slots_ = 0;  // taken
  WalkList list_;
  SearchScratch beam_;
};

// What of a walk does not depend on which nodes are live.
class GraphWalkSteps {
 public:
  bool complete() const { return state_ == State::kComplete; }

 protected:
  // What the next turn does.
  enum class State : uint8_t {
    kLinks,  // gathers the links of current_, which were asked for
    kRows,   // evaluates the nodes that were gathered
    kBeam,   // an expansion of BeamSearch
    kComplete,
  };

  void Begin(const SearchTarget& target, uint32_t k, uint32_t ef, WalkScratch* scratch);
  // kLinks to kRows. Asks for no rows.
  void Gather();
  // Asks for `count` more rows of those that were gathered.
  void AskForRows(size_t count);
  // Evaluates what was gathered.
  void Evaluate();
  // Step 1, after Evaluate: chooses where to look next. False once level 0 is reached.
  bool Descend();
  // Into the second cache: it has more misses under way at once than the first, and these keep the
  // first from what it is asked for meanwhile.
  static void AskForLines(const void* from, size_t bytes) {
    const auto* const bytes_at = static_cast<const std::byte*>(from);
    for (size_t at = 0; at < bytes; at += kCacheLineBytes) {
      __builtin_prefetch(bytes_at + at, 0, kIntoSecondCache);
    }
  }
  void AskForLinks(NodeId node) const {
    AskForLines(target_.graph->Links(node, level_),
                target_.graph->MaxDegree(level_) * sizeof(NodeId));
  }
  bool HasRoomForAnExpansion() const {
    return scratch_->slots_ + target_.graph->MaxDegree(level_) <= kMaxWalkSlots;
  }
  NodeId NodeAt(uint32_t slot) const { return scratch_->memory_->nodes[slot]; }
  NeighbourKey FullKeyOf(uint32_t slot) const {
    return KeyOf(scratch_->memory_->distances[slot], NodeAt(slot));
  }
  // Of the list: those that are not retired, nearest first.
  std::span<const NeighbourKey> SortedResultsOfList();

  static constexpr size_t kRowsAtOnce = 16;
  static constexpr int kIntoSecondCache = 2;  // of __builtin_prefetch

  State state_ = State::kComplete;
  bool descending_ = false;
  SearchTarget target_{};
  uint32_t k_ = 0;
  uint32_t ef_ = 0;
  WalkScratch* scratch_ = nullptr;
  uint32_t level_ = 0;
  NodeId current_ = kNoNode;
  NeighbourKey nearest_ = 0;  // of the descent
  float reference_ = 0;       // of the list's keys
  // The nodes that were gathered have the slots from first_slot_ on.
  uint32_t first_slot_ = 0;
  size_t rows_ahead_ = 0;  // that are asked for before the one that is compared
  size_t asked_ = 0;
  std::array<const std::byte*, HnswGraph::kMaxM0> rows_;  // those that were asked for
};

// Steps 1 to 4 in turns. Between two turns the graph may be changed; the query, the graph and the
// scratch must stay. The same graph gives the same answer, in whatever slices.
template <typename IsLive>
class GraphWalk : public GraphWalkSteps {
 public:
  // The largest ef that the list is used for: it must have room for retired nodes besides, and with
  // a larger one most walks would evaluate more than kMaxWalkSlots nodes.
  static constexpr uint32_t kMaxListEf = WalkList::kMaxSize / 2;

  explicit GraphWalk(IsLive is_live = IsLive()) : is_live_(is_live), beam_(is_live) {}

  // `ef` is raised to `k`; both are at most scratch->max_ef(). Nodes beyond the scratch's room
  // (WalkScratch::Reserve) are not found. `known`: distances of at most ef live ones that the
  // caller has found elsewhere, which take their places among the ef; they stay until the walk is
  // complete. So of a graph in which all about the query has been replaced, no more is walked
  // through than lies nearer than what replaced it.
  void Begin(const SearchTarget& target, uint32_t k, uint32_t ef, WalkScratch* scratch,
             std::span<const float> known = {}) {
    GraphWalkSteps::Begin(target, k, ef, scratch);
    CHECK(known.size() <= ef_, "no more can be among the ef");
    known_ = known;
    first_known_ = UINT32_MAX;
    end_known_ = UINT32_MAX;
    in_beam_ = false;
  }

  // One turn, to be followed by another walk's: at most the distances of one expansion. True when
  // the walk is complete.
  bool Turn() {
    TakeTurn(/*alone=*/false);
    return complete();
  }

  // Turns until about `max_distances` distances have been evaluated (one expansion more at most).
  // True when the walk is complete.
  bool Step(uint64_t max_distances) {
    const uint64_t limit = scratch_->distances() + max_distances;
    do {
      TakeTurn(/*alone=*/true);
    } while (!complete() && scratch_->distances() < limit);
    return complete();
  }

  // Of a complete walk that needed no step 3 and knew of none: all nodes that were evaluated, with
  // their distances, and the distance up to which it has looked about it, HUGE_VALF where that is
  // everywhere.
  bool is_in_list() const { return !in_beam_; }
  std::span<const NodeId> evaluated() const {
    return {scratch_->memory_->nodes.data(), scratch_->slots_};
  }
  std::span<const float> distances() const {
    return {scratch_->memory_->distances.data(), scratch_->slots_};
  }
  float reach() const {
    const WalkKey farthest = scratch_->list_.bound();
    return farthest == kNoKey ? HUGE_VALF : scratch_->memory_->distances[SlotOf(farthest)];
  }
  // Such a walk goes on with a larger ef, at most kMaxListEf.
  void Widen(uint32_t ef) {
    ef_ = ef;
    BeginList();
    if (state_ != State::kBeam) ExpandNext(/*alone=*/false);
  }

  // Writes the nearest min(k, out.size()) live nodes that were found, nearest first, equal
  // distances by lower node; returns how many. Once, after Turn or Step said true.
  size_t TakeResults(std::span<Neighbour> out) {
    const std::span<const NeighbourKey> keys =
        in_beam_ ? beam_.SortedResults() : SortedResultsOfList();
    const size_t count = std::min({keys.size(), out.size(), size_t{k_}});
    for (size_t i = 0; i < count; ++i) out[i] = {DistanceOf(keys[i]), NodeOf(keys[i])};
    return count;
  }

 private:
  static constexpr uint32_t kSlotsBeforeKnown = 384;
  // Keys of one Offer to the list.
  static constexpr size_t kOfferedAtOnce = HnswGraph::kMaxM0;

  // `alone`: the next turn is this walk's too.
  void TakeTurn(bool alone) {
    switch (state_) {
      case State::kLinks:
        Gather();
        AskForRows(rows_ahead_);
        break;
      case State::kRows:
        Evaluate();
        Conclude(alone);
        break;
      case State::kBeam:
        if (!beam_.Step()) state_ = State::kComplete;
        break;
      case State::kComplete:
        break;
    }
  }

  // After Evaluate: what has been found out, and where to go from there.
  void Conclude(bool alone) {
    if (!descending_) {
      Offer(first_slot_);
      if (state_ != State::kBeam && IsFarFromReference()) Rebase();
      if (state_ != State::kBeam && first_known_ == UINT32_MAX && !known_.empty() &&
          scratch_->slots_ >= kSlotsBeforeKnown) {
        PlaceKnown();
        BeginList();
      }
    } else {
      if (Descend()) return;
      descending_ = false;
      BeginOnLevel0();
    }
    if (state_ != State::kBeam) ExpandNext(alone);
  }

  void ExpandNext(bool alone) {
    if (!HasRoomForAnExpansion()) {
      if (!KnowsEnough()) return HandOver(scratch_->list_.keys());
      state_ = State::kComplete;
      return;
    }
    WalkKey nearest;
    WalkKey runner_up;
    if (!scratch_->list_.TakeNearest(&nearest, &runner_up)) {
      state_ = State::kComplete;
      return;
    }
    current_ = NodeAt(SlotOf(nearest));
    AskForLinks(current_);
    // More often than not it comes next, and its links are there then.
    if (alone && runner_up != kNoKey) AskForLinks(NodeAt(SlotOf(runner_up)));
    state_ = State::kLinks;
  }

  void BeginOnLevel0() {
    if (ef_ > kMaxListEf) {
      HandOver({});
      for (const float distance : known_) beam_.AddKnown(distance);
      OfferToBeam(0);
      return;
    }
    BeginList();
  }

  // What is known takes slots of no node, which are never expanded; once the walk has come near, as
  // all that it begins with may be farther.
  void PlaceKnown() {
    first_known_ = scratch_->slots_;
    for (const float distance : known_) {
      if (scratch_->slots_ == kMaxWalkSlots) break;
      scratch_->memory_->nodes[scratch_->slots_] = kNoNode;
      scratch_->memory_->distances[scratch_->slots_++] = distance;
    }
    end_known_ = scratch_->slots_;
  }

  // The list anew, of all that has been evaluated and all that is known.
  void BeginList() {
    scratch_->list_.Begin(ef_);
    InsertKnown();
    Offer(0);
  }
  void InsertKnown() {
    WalkList& list = scratch_->list_;
    for (uint32_t slot = first_known_; slot < end_known_;) {
      const size_t count = std::min<size_t>(end_known_ - slot, kOfferedAtOnce);
      const size_t kept = list.KeysBelowBound(scratch_->memory_->distances.data() + slot, count,
                                              reference_, slot, keys_.data());
      for (size_t i = 0; i < kept; ++i) keys_[i] |= kExpanded;
      list.Insert(keys_.data(), kept);
      slot += static_cast<uint32_t>(count);
    }
  }

  // So far that keys hardly tell the list's distances apart: the descent ended in another cluster
  // than the one that has been found since.
  bool IsFarFromReference() const {
    constexpr float kMostSpreads = 4;  // so that keys tell 128 distances apart
    const std::span<const WalkKey> keys = scratch_->list_.keys();
    if (keys.back() == kNoKey) return false;
    const float nearest = scratch_->memory_->distances[SlotOf(keys.front())];
    const float farthest = scratch_->memory_->distances[SlotOf(keys.back())];
    return nearest < reference_ && reference_ - nearest > kMostSpreads * (farthest - nearest);
  }
  // The list anew, of all that has been evaluated, by distances from the nearest. What had been
  // expanded is expanded again, and leads to no new nodes.
  void Rebase() {
    const float* const distances = scratch_->memory_->distances.data();
    reference_ = *std::min_element(distances, distances + scratch_->slots_);
    BeginList();
  }

  // Step 2 for the nodes from `slot` on.
  void Offer(uint32_t slot) {
    WalkList& list = scratch_->list_;
    while (slot < scratch_->slots_) {
      if (slot == first_known_) slot = end_known_;
      const uint32_t end =
          slot < first_known_ ? std::min(first_known_, scratch_->slots_) : scratch_->slots_;
      const size_t count = std::min<size_t>(end - slot, kOfferedAtOnce);
      size_t kept = list.KeysBelowBound(scratch_->memory_->distances.data() + slot, count,
                                        reference_, slot, keys_.data());
      // To ask whether a node is live may cost a cache miss.
      size_t live = 0;
      size_t retired = 0;
      for (size_t i = 0; i < kept; ++i) {
        const WalkKey key = keys_[i];
        if (is_live_(NodeAt(SlotOf(key)))) {
          keys_[live++] = key;
        } else {
          retired_keys_[retired++] = key;
        }
      }
      list.Insert(keys_.data(), live);
      slot += static_cast<uint32_t>(count);
      for (size_t i = 0; i < retired; ++i) {
        if (retired_keys_[i] >= list.bound() || list.InsertRetired(retired_keys_[i])) continue;
        if (KnowsEnough()) continue;
        HandOver(list.keys());
        for (; i < retired; ++i) beam_.AddSeed(FullKeyOf(SlotOf(retired_keys_[i])));
        return OfferToBeam(slot);
      }
    }
  }

  // Step 3. `keys`: of the list. Nodes that had been expanded are expanded again, and lead to no
  // new ones.
  void HandOver(std::span<const WalkKey> keys) {
    in_beam_ = true;
    state_ = State::kBeam;
    beam_.Begin(target_, 0, ef_, &scratch_->beam_);
    for (uint32_t slot = 0; slot < scratch_->slots_; ++slot) {
      if (!IsKnown(slot)) beam_.Visit(NodeAt(slot));
    }
    for (const WalkKey key : keys) {
      if (key == kNoKey) break;
      if (IsKnown(SlotOf(key))) {
        beam_.AddKnown(scratch_->memory_->distances[SlotOf(key)]);
        continue;
      }
      const bool is_done = (key & kExpanded) != 0 && scratch_->list_.IsRetired(key);
      if (!is_done) beam_.AddSeed(FullKeyOf(SlotOf(key)));
    }
  }
  void OfferToBeam(uint32_t slot) {
    for (; slot < scratch_->slots_; ++slot) {
      if (!IsKnown(slot)) beam_.AddSeed(FullKeyOf(slot));
    }
  }
  // So much that a walk through very many that have ended need not go on for the rest.
  bool KnowsEnough() const { return 2 * known_.size() >= ef_; }
  bool IsKnown(uint32_t slot) const { return slot >= first_known_ && slot < end_known_; }

  IsLive is_live_;
  BeamSearch<IsLive> beam_;
  bool in_beam_ = false;
  std::span<const float> known_;
  // Its slots, from the walk on level 0 on.
  uint32_t first_known_ = UINT32_MAX;
  uint32_t end_known_ = UINT32_MAX;
  std::array<WalkKey, kOfferedAtOnce + WalkList::kBlockKeys> keys_;
  std::array<WalkKey, kOfferedAtOnce> retired_keys_;
};

}  // namespace engram
