#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "index/filtered_scan.h"
#include "index/fresh_list.h"
#include "index/graph_walk.h"
#include "index/hnsw_search.h"
#include "index/log/log_writer.h"
#include "index/node_filter.h"
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
// 6. Emit: the hits in batches, as result slots become free. A hit whose payload or vector lies in
//    a log names its record (kHitAtAddress), but for records that the shard's log still holds in
//    memory: they may not be on the disk yet, and are read here.
// A get or a scroll is step 6 alone.
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
  // These nodes, in this order, are the hits.
  void BeginListing(const Space& space, std::span<const NodeId> nodes, bool with_payload,
                    bool with_vector);

  // Bytes of the next batch, header included, at most `max_bytes`.
  size_t NextBatchBytes(size_t max_bytes) const;
  // Hits that were handed out.
  size_t emitted() const { return emitted_; }
  // Step 6: writes the next batch of at most `slot.size()` bytes. True when it was the last.
  bool EmitBatch(std::span<std::byte> slot);

  uint64_t distances() const { return scratch_.distances(); }
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
  enum class Phase : uint8_t { kIdle, kPick, kScan, kProbe, kSearch, kRefine, kCompare, kReady };

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
  RefusalReason BeginFilter(const Space& space, const RecallRequest& request,
                            const std::byte* vector);
  void PlanFilter();
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
  bool ComparingAllIsCheap() const;
  void BeginRefining();
  void ScanSlice();
  void EndScan();
  void ProbeSlice(uint64_t max_distances);
  void Offer(float distance, NodeId node);
  // What the graph is walked with.
  SearchTarget WalkTarget() const;
  void BeginSearch();
  void CountWalk();
  void EndSearch();
  void AskToRefine() const;
  void RefineSlice();
  void Merge();
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
  HitForm FormOf(const StoredObservation& stored, size_t sent) const;
  void WriteHit(NeighbourKey hit, const StoredObservation& stored, const HitForm& form,
                std::byte* to) const;
  std::byte* WriteContent(NodeId node, const StoredObservation& stored, const HitForm& form,
                          std::byte* to) const;

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
  std::vector<Neighbour> found_;    // by the graph
  Compared compared_again_;
  std::vector<NeighbourKey> hits_;  // nearest first

  Phase phase_ = Phase::kIdle;
  const Space* space_ = nullptr;
  const WalkCodes* codes_ = nullptr;  // that the graph is walked with, if not with code_query_
  FreshList::Snapshot fresh_;
  CommitStamp snapshot_ = kNoStamp;
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
