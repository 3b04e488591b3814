#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "index/filtered_scan.h"
#include "index/fresh_list.h"
#include "index/graph_walk.h"
#include "index/hnsw_search.h"
#include "index/log/log_writer.h"
#include "index/node_filter.h"
#include "index/sliced_sort.h"
#include "index/space.h"
#include "index/waiting_probe.h"
#include "src/core/arena_heap.h"
#include "src/core/commit_stamp.h"
#include "src/core/observation.h"
#include "src/core/refusal_reason.h"
#include "src/core/shard_port.h"

namespace engram {

// One recall, in slices:
// 1. Begin: the query in the form of the space's rows, and the snapshot that is recalled.
// 2. Scan: the nodes that the graph does not know. While there is no graph, by the vectors as they
//    are kept, so the answer is exact; else by what the graph is walked with. On the shard's core
//    those of them that wait in lists are looked for there (WaitingProbe).
// 3. Search: the graph, with ef. Where it is walked with codes of one bit, what was found is
//    compared again by int8, in the order of the estimates, until the rest is too far by more than
//    estimates were wrong so far.
// 4. Merge: the nearest of both.
// 5. Compare again: where the graph is walked with codes, the nearest some by the vectors as they
//    are kept, until the rest is too far likewise; then the k nearest are the answer.
//    A long recall begins with those that are to come first (RecallRequest::first). Once these went
//    out steps 2 to 6 are done again for all of them, and what went out is left out. A recall with
//    a bound that found all of its first ones within the bound looks for ten times as many next,
//    until some are beyond it. In place of step 3, on the shard's core, all codes of the graph are
//    compared one after the other where that costs less than so long a walk.
// 6. Emit: the hits in batches, as result slots become free. A hit whose payload or vector lies in
//    a log names its record (kHitAtAddress), but for records that the shard's log still holds in
//    memory: they may not be on the disk yet, and are read here.
// Without a vector the latest of what the filter matches are the hits, by what their clients said
// of when they were. A get or a scroll is step 6 alone. A recall of all spaces is steps 1 to 5 for
// each of them, and step 6 for the nearest of all.
//
// With a filter (recall_job_filter.cc), on the shard's core alone, what does not match it is left
// out of step 2, and of what step 3 has come upon; the walk goes farther where too few of what is
// about the query match. Where so few match at all that to compare them costs no more, and where a
// walk has cost as much, that is done in place of both (FilteredScan).
//
// Thread safety: one core's alone. On another core than the shard's, from inside the space's epochs
// from Begin to the last batch. Takes memory from its heap only, and only when a space has grown
// since the last recall.
class RecallJob {
 public:
  enum class Core : uint8_t { kOther, kOfShard };
  // `heap` and `log`, the log of the shard whose core this is (nullptr: none, or another core),
  // must outlive the job. `core`: where it runs.
  explicit RecallJob(ArenaHeap* heap, const LogWriter* log = nullptr, Core core = Core::kOther);

  // Takes the memory for recalls of spaces of up to `nodes` nodes. Call it where a space grows, so
  // that a recall is not refused for lack of memory. False when the heap is spent.
  bool Reserve(size_t nodes) { return scratch_.Reserve(nodes); }

  // kNone, or why the recall cannot be done. `vector` as received, with the filter behind it; a
  // request with a filter is for Core::kOfShard alone. ef 0 takes `default_ef`.
  RefusalReason Begin(const Space& space, const RecallRequest& request, const std::byte* vector,
                      uint32_t default_ef);
  // Steps 2 to 5, until about `max_distances` distances have been evaluated. True when the hits are
  // ready.
  bool Search(uint32_t max_distances);
  // One turn of steps 2 to 5, to be followed by another recall's: it ends where memory has been
  // asked for. True when the hits are ready.
  bool Turn();
  // All spaces, on the shard's core: BeginAcross, then for each Begin, Search, and TakeFound; then
  // EndAcross, after which the hits are ready. `request` says so (RecallRequest::across).
  void BeginAcross(const RecallRequest& request);
  void TakeFound();
  void EndAcross();

  // These nodes, in this order, are the hits.
  void BeginListing(const Space& space, std::span<const NodeId> nodes, bool with_payload,
                    bool with_vector);

  // Bytes of the next batch, header included, at most `max_bytes`.
  size_t NextBatchBytes(size_t max_bytes) const;
  // Hits that were handed out.
  size_t emitted() const { return emitted_; }
  // Step 6: writes the next batch of at most `slot.size()` bytes. True when it was the last.
  // Where it was not and is_searching() says so, Search goes on first.
  bool EmitBatch(std::span<std::byte> slot);
  bool is_searching() const { return phase_ != Phase::kReady && phase_ != Phase::kIdle; }

  uint64_t distances() const { return scratch_.distances(); }
  // For what whoever recalls does besides.
  void AddDistances(uint64_t count) { scratch_.AddDistances(count); }
  // What all recalls have compared so far: vectors, each as often as it was compared in another
  // form, and the bytes of these forms. Without a graph's links.
  struct Work {
    uint64_t vectors = 0;
    uint64_t bytes = 0;
  };
  const Work& work() const { return work_; }

 private:
  struct IsVisible {
    const Space* space;
    CommitStamp snapshot;
    const NodeFilter* filter = nullptr;  // nullptr: all are wanted
    bool operator()(NodeId node) const {
      return space->IsVisibleInGraph(node, snapshot) &&
             (filter == nullptr || filter->Matches(node));
    }
  };
  enum class Phase : uint8_t {
    kIdle,
    kNewest,
    kPick,
    kScan,
    kProbe,
    kSearch,
    kOrderFound,
    kRefine,
    kOrderMerged,
    kCompare,
    kOrderCompared,
    kReady,
  };

  struct FoundAcross {
    NeighbourKey key;
    const Space* space;
    bool operator<(const FoundAcross& other) const {
      return key != other.key ? key < other.key : space->name() < other.space->name();
    }
  };

  // Without a vector.
  struct Dated {
    int64_t when_ns;
    NodeId node;
    // The latest first; of those of one time the earlier one.
    bool operator<(const Dated& other) const {
      return when_ns != other.when_ns ? when_ns > other.when_ns : node < other.node;
    }
  };

  // Of recalls with a filter.
  struct Filtering {
    NodeFilter filter;
    FilteredNodes nodes;
    FilteredScan scan;
    uint64_t walk_budget = 0;
    double share = 1;  // of what is visible that matches, as far as is known
    // Of walks: what was evaluated, and of that the nearest.
    std::vector<float> estimates;
    std::vector<NodeId> candidates;
    // Without a vector: the latest so far, the earliest of them at the front.
    std::vector<Dated> latest;
  };

  // The nearest of those that were compared again so far, and by how much what they were known by
  // was wrong.
  class Compared {
   public:
    // Room for `most` keys.
    explicit Compared(size_t most) : storage_(most) { nearest_.Attach(storage_.data()); }
    void Begin(size_t kept);
    void Add(NodeId node, float known, float distance);
    // Whether what is known to be so far, and all that comes behind it, is not among the nearest.
    bool IsTooFar(float known) const;

   private:
    std::vector<NeighbourKey> storage_;
    KeyHeap<FarthestFirst> nearest_;
    size_t kept_ = 0;
    size_t count_ = 0;
    double squared_errors_ = 0;
  };

  void TakeSnapshot(CommitStamp wanted);
  uint32_t NextStage() const;
  uint32_t EfFor(uint32_t k) const;
  void BeginStage(uint32_t k);
  BatchEnd EndStage();
  bool IsWithinBound(NeighbourKey hit) const;
  RefusalReason BeginFilter(const Space& space, const RecallRequest& request,
                            const std::byte* vector);
  void PlanFilter();
  RefusalReason BeginNewest(const Space& space, const RecallRequest& request);
  void NewestSlice(uint64_t max_looks);
  void EndNewest();
  double EstimateShare() const;
  void BeginPick();
  void PickSlice(uint64_t max_distances);
  bool IsOverBudget() const {
    return filter_ != nullptr && distances() - walk_began_ > filtering_->walk_budget;
  }
  void EndFinding();
  void EndFilteredSearch();
  size_t TakeMatching(size_t wanted, float reach, size_t* within_reach);
  bool WidenWalk(size_t within_reach);
  void BeginOrder(Phase phase, std::span<NeighbourKey> keys);
  void OrderSlice();
  void EndOrder();
  void OrderFound();
  bool ComparingAllIsCheap() const;
  void BeginRefining();
  void ScanSlice();
  void EndScan();
  void ProbeSlice(uint64_t max_distances);
  void Offer(float distance, NodeId node);
  size_t PlacesForKnown() const;
  void NoteKnown();
  void LeaveKnown();
  // What the graph is walked with.
  SearchTarget WalkTarget() const;
  void BeginSearch();
  bool ComparesWholeGraph() const;
  void BeginWholeGraph();
  void CountWalk();
  void EndSearch();
  void AskToRefine() const;
  void RefineSlice();
  void Merge();
  void EndMerge();
  void AskToCompare() const;
  void CompareSlice();
  void FinishSearch();
  void AddWork(uint64_t vectors, size_t bytes_each) {
    work_.vectors += vectors;
    work_.bytes += vectors * bytes_each;
  }
  void BeginEmit(bool with_payload, bool with_vector, size_t max_payload_bytes);
  // How a hit goes out, given the payload that was sent before it.
  struct HitForm {
    size_t payload_bytes = 0;  // that are sent with it, or that whoever reads its record will send
    size_t hit_bytes = 0;
    bool at_address = false;
    std::span<const std::byte> record{};  // in the log's memory; else empty
  };
  const Space& SpaceOfHit(size_t hit) const {
    return across_ ? *found_across_[hit].space : *space_;
  }
  // Of the hit's space, where hits name theirs.
  std::string_view NameIn(size_t hit) const {
    return across_ ? std::string_view(found_across_[hit].space->name()) : std::string_view();
  }
  HitForm FormOf(size_t hit, const StoredObservation& stored, size_t sent) const;
  void WriteHit(size_t hit, const StoredObservation& stored, const HitForm& form,
                std::byte* to) const;
  std::byte* WriteContent(size_t hit, const StoredObservation& stored, const HitForm& form,
                          std::byte* to) const;
  void KeepNearestAcross();

  const LogWriter* const log_;
  const Core core_;
  WalkScratch scratch_;
  GraphWalk<IsVisible> search_{IsVisible{nullptr, kNoStamp}};
  std::vector<std::byte> query_storage_;
  std::byte* code_query_ = nullptr;   // aligned to 64 bytes within query_storage_
  std::byte* exact_query_ = nullptr;  // likewise
  std::byte* walk_query_ = nullptr;   // likewise
  Space::QueryForms forms_{};
  bool signs_are_far_ = false;
  std::optional<WaitingProbe> probe_;     // on the shard's core
  std::unique_ptr<Filtering> filtering_;  // on the shard's core
  std::vector<NeighbourKey> nearest_storage_;
  KeyHeap<FarthestFirst> nearest_;  // of those scanned so far
  std::vector<float> known_;        // distances of what was found beside the graph, at most ef
  std::vector<Neighbour> found_;    // by the graph
  Compared compared_again_;
  std::vector<NeighbourKey> hits_;  // nearest first
  SlicedSort sort_;
  // Of found_, while it is put in order.
  const std::unique_ptr<NeighbourKey[]> found_keys_;

  static constexpr size_t kMaxFoundAcross = 3 * size_t{kMaxRecallResults};
  // What was found in all spaces so far, on the shard's core. Once ended by hit.
  std::unique_ptr<FoundAcross[]> found_across_;
  size_t found_across_count_ = 0;

  Phase phase_ = Phase::kIdle;
  bool across_ = false;
  Metric metric_ = Metric::kUnspecified;
  const Space* space_ = nullptr;
  const WalkCodes* codes_ = nullptr;  // that the graph is walked with, if not with code_query_
  FreshList::Snapshot fresh_;
  CommitStamp snapshot_ = kNoStamp;
  uint32_t wanted_ = 0;    // in all stages
  uint32_t first_ = 0;     // of a long recall; else 0
  uint32_t asked_ef_ = 0;  // 0: nobody said
  uint32_t default_ef_ = 0;
  bool has_bound_ = false;
  float bound_ = 0;
  bool is_last_stage_ = true;
  bool is_first_stage_ = true;
  std::vector<NodeId> sent_;  // in stages before, in rising order
  // Of the stage:
  uint32_t k_ = 0;
  uint32_t ef_ = 0;
  uint32_t walk_ef_ = 0;  // of the graph: ef, or more with a filter
  bool filters_in_walk_ = false;
  const NodeFilter* filter_ = nullptr;  // nullptr: there is none
  uint32_t kept_ = 0;  // of the scan and of the search: k, or more where they are compared again
  bool by_exact_ = false;  // scanned and walked by the vectors as they are kept
  bool scored_ = false;
  bool with_payload_ = false;
  bool with_vector_ = false;
  Work work_;
  size_t scanned_ = 0;
  uint64_t walk_began_ = 0;  // distances, then
  size_t found_count_ = 0;
  size_t refined_ = 0;
  size_t compared_ = 0;
  size_t emitted_ = 0;
  size_t payload_sent_ = 0;
  size_t max_payload_bytes_ = 0;
};

}  // namespace engram
