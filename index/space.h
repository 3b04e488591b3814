#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "index/attribute_index.h"
#include "index/batch_linker.h"
#include "index/chunked_array.h"
#include "index/code_learning.h"
#include "index/estimate_agreement.h"
#include "index/expiry_queue.h"
#include "index/fresh_list.h"
#include "index/hnsw_graph.h"
#include "index/hnsw_linker.h"
#include "index/hnsw_params.h"
#include "index/hnsw_search.h"
#include "index/hnsw_sweep.h"
#include "index/id_map.h"
#include "index/inverted_lists.h"
#include "index/learning_schedule.h"
#include "index/time_index.h"
#include "index/vector_format.h"
#include "index/vector_store.h"
#include "index/walk_codes.h"
#include "src/core/arena_heap.h"
#include "src/core/commit_stamp.h"
#include "src/core/ids.h"
#include "src/core/log_address.h"
#include "src/core/log_record.h"
#include "src/core/memory_kinds.h"
#include "src/core/observation.h"
#include "src/core/reader_epochs.h"
#include "src/core/refusal_reason.h"
#include "src/core/result.h"

namespace engram {

// One observation as it is given to a space. Points into the request.
struct ObservationRef {
  std::string_view id;
  std::span<const std::byte> payload;  // only its length counts where record_bytes is not 0
  PayloadKind payload_kind = PayloadKind::kOpaque;
  VectorDtype dtype = VectorDtype::kNone;
  uint32_t dimension = 0;
  float scale = 1;
  const std::byte* vector = nullptr;
  int64_t when_ns = 0;
  float confidence = 1;
  LogAddress origin = kNoLogAddress;  // where its record lies
  uint32_t record_bytes = 0;          // there; 0: in no log, so the space keeps the payload
  std::span<const std::byte> attributes = {};  // that CheckAttributes has passed
};

// What a space keeps of an observation beside its vector.
struct StoredObservation {
  std::string_view id;
  std::span<const std::byte> payload;  // empty where it lies in a log
  uint32_t payload_bytes = 0;          // wherever it lies
  PayloadKind payload_kind = PayloadKind::kOpaque;
  bool was_hidden = false;  // `stamp` is later than that of its record
  int64_t when_ns = 0;
  float confidence = 1;
  CommitStamp stamp = kNoStamp;
  LogAddress origin = kNoLogAddress;
  uint32_t record_bytes = 0;  // at origin; 0: in no log
};

// What became of an observation. Where a later stamp was there already nothing that lives has
// changed, and that is no refusal.
struct StoreOutcome {
  RefusalReason reason = RefusalReason::kNone;
  // There was an observation with this id: a live or a hidden one for upserts and deletes, a live
  // one to suppress, a hidden one to restore.
  bool existed = false;
  CommitStamp later = kNoStamp;  // the stamp that was there already
  NodeId node = kNoNode;         // that an upsert is stored in
};

struct SpaceOptions {
  // Nodes from which on a graph pays: below that a scan takes well under a millisecond.
  static constexpr uint32_t kGraphFrom = 4'096;
  // Unlinked ones from which on it pays to list them: scanning so many takes as long as looking for
  // what is listed.
  static constexpr uint32_t kListFrom = 2'048;

  Metric metric = Metric::kCosine;
  Precision precision = Precision::kF32;
  Traversal traversal = Traversal::kRabitq;
  uint32_t dimension = 0;  // 0: that of the first observation
  HnswBuildParams build;
  uint64_t hash_seed = 0;            // secret
  uint32_t graph_from = kGraphFrom;  // more unlinked nodes than this begin the graph
  uint32_t list_from = kListFrom;    // more unlinked nodes than this are listed, not scanned
  bool ends_by_age = false;          // EndOldest will be called
  uint16_t homes = 1;                // with ends_by_age: shards that stamps come from
  // Keys that recalls may filter by, beside those that every space has; kMaxFilterKeys at most.
  std::vector<std::string> filter_keys = {};
};

// The observations of one memory space in one shard: vectors, ids, payloads, and the graph over
// them.
//
// A stored observation is a node. It is visible from Upsert on: nodes that are not linked yet are
// listed and scanned; the others are found through the graph. A small space has no graph. Each node
// has a begin stamp and, once it was updated or deleted, an end stamp: a recall sees what lived at
// its snapshot (DESIGN, principle 6).
//
// A node's life: kFree -> kUnlinked -> kLinking -> kLinked -> kRetired (updated or deleted; still
// in the graph) -> kDoomed (a sweep takes it out) -> kWaiting (until no reader can be on it) ->
// kFree, or from kUnlinked by kEnded, until it has left the fresh list, to kWaiting. A
// kTombstone is an id without a vector: what had the id was deleted, or superseded by what another
// shard has, and something earlier may still come from another home shard. Where it was superseded
// the tombstone has the stamp of what did so, which stands before it, should it come here: after a
// restart with other partitions it may. A kHidden node is what was suppressed: a copy in no list
// and no graph that no snapshot sees, until it is restored (kUnlinked) or superseded (kFree); the
// node that was live ends as if it had been deleted.
//
// Suppressing and restoring hold for the content that they meet, and content keeps its own stamp
// through them (ContentStamp). Upserts and deletes go by the stamps of contents alone, so one that
// comes late supersedes an older content whatever became of it meanwhile. Were it to lose against
// the stamp of a suppress, as against a tombstone, it would be lost, or, where it lies in another
// shard, be there beside the older one once both are restored.
//
// A rebuild (space_rebuild.cc) takes what is linked out of the graph and has it linked anew, in its
// place: kLinked -> kLifted (listed as fresh again, until a sweep has taken it out) -> kUnlinked;
// or, where it ends meanwhile, kLiftedEnded -> kEnded.
//
// A SpaceSaver reads it in slices while all this goes on; a SpaceLoader fills it at a restart.
// While a save is under way two things are kept longer than else, see Save below.
//
// Thread safety: writing is the shard's alone. Other cores may recall at any moment: what is marked
// "For readers" below, from inside the epochs.
// Invariants: each id is in the id map at most once, with its live or hidden node or tombstone;
// `fresh` lists all live nodes that are not kLinked; live = linked + unlinked; of the versions of
// an id at most one is open.
class Space {
 public:
  static constexpr uint32_t kGraphFrom = SpaceOptions::kGraphFrom;

  // `heap` and `epochs` outlive the space.
  Space(std::string name, const SpaceOptions& options, ArenaHeap* heap, ReaderEpochs* epochs);
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;
  ~Space();

  // ---- For readers on any core ----

  // A query in the form of the rows that nodes are compared by (code), where they are others of
  // those that are kept (exact), and where the graph is walked with others of these (walk). Each
  // aligned to 64 bytes, with kMaxRowBytes.
  static constexpr size_t kMaxRowBytes = kMaxDimension * sizeof(float) + 2 * kCacheLineBytes;
  static constexpr size_t kMaxCodeBytes = kMaxDimension / 8 + 2 * kCacheLineBytes;
  struct QueryForms {
    std::byte* code;
    std::byte* exact;  // left alone without has_exact()
    std::byte* walk;   // left alone without codes to walk with
    // For WaitingProbe, kMaxCodeBytes each: signs of now, and of what lists that are not recoded
    // yet still have. nullptr: not asked for.
    std::byte* signs = nullptr;
    std::byte* signs_before = nullptr;
    bool* signs_are_far = nullptr;  // with `signs`: set where these do not tell what is near
  };
  // `codes`: as recall_codes() gave it, for the walk; nullptr afterwards where the query is too far
  // for codes. kNone, kWrongDimension, kZeroVector or kNotFinite, as Upsert.
  RefusalReason PrepareQuery(VectorDtype dtype, uint32_t dimension, float scale,
                             const std::byte* vector, const WalkCodes** codes,
                             const QueryForms& forms) const;
  // What the graph is walked with instead of `code`; nullptr where it is not. From inside the
  // epochs: it stays until the reader leaves.
  const WalkCodes* walk_codes() const { return walk_codes_.load(std::memory_order_acquire); }
  static constexpr uint32_t kLeastDimensionsWalked = 256;
  // The same for recalls. With few dimensions an int8 row takes hardly more cache lines than a code
  // and tells far better what is near: codes are for linking there.
  const WalkCodes* recall_codes() const {
    return walks_exact() || dimension() < kLeastDimensionsWalked ? nullptr : walk_codes();
  }
  SearchTarget WalkTargetFor(const WalkCodes* codes, const std::byte* walk) const {
    return codes->TargetFor(&graph_, walk);
  }
  // A recall of now: sees all that was stored before.
  CommitStamp latest_stamp() const { return latest_stamp_.load(std::memory_order_acquire); }
  bool IsVisible(NodeId node, CommitStamp snapshot) const {
    const Stamps& stamps = stamps_[node];
    return Load(stamps.begin) <= snapshot && snapshot < Load(stamps.end);
  }
  // The same of a node that was come upon in the graph. Nearly all of them began before the
  // snapshot and have no end, and a bit tells that, in a 128th of the memory of the stamps.
  bool IsVisibleInGraph(NodeId node, CommitStamp snapshot) const {
    const bool began_before = linked_up_to_.load(std::memory_order_acquire) <= snapshot;
    return (began_before && !HasEnd(node)) || IsVisible(node, snapshot);
  }
  // Nodes that a graph search may not find.
  FreshList::Snapshot FreshNodes() const { return fresh_.TakeSnapshot(); }
  // The earliest snapshot that may be asked for.
  CommitStamp horizon() const { return horizon_.load(std::memory_order_acquire); }
  // What searches need room for.
  size_t node_count() const { return node_count_.load(std::memory_order_acquire); }
  // `code` as PrepareQuery wrote it.
  SearchTarget TargetFor(const std::byte* code) const {
    return {.graph = &graph_,
            .vectors = &*codes_,
            .distance = code_format_->distance(),
            .padded_dimension = code_format_->padded_dimension(),
            .query = code,
            .distances = code_format_->distances()};
  }
  // The graph is walked with the vectors as they are kept: there are no others, or codes of int8 do
  // not tell these from each other.
  bool walks_exact() const { return walks_exact_.load(std::memory_order_acquire); }
  // Something may be found by a graph search alone.
  bool has_linked() const { return graph_.entry_point() != kNoNode; }
  // Whether what is found by code is compared again, and by what.
  bool has_exact() const { return exact_.has_value(); }
  SearchTarget ExactTargetFor(const std::byte* exact) const {
    return {&graph_, &*exact_, exact_format_->distance(), exact_format_->padded_dimension(), exact};
  }
  StoredObservation Get(NodeId node) const;
  // Asks for what Get reads.
  void PrefetchObservation(NodeId node) const {
    __builtin_prefetch(&nodes_[node]);
    __builtin_prefetch(&stamps_[node]);
  }
  // Its vector as it is kept (of norm 1 under cosine): dimension() floats.
  void GetVector(NodeId node, float* out) const;
  // The metric's score of a distance (see Metric).
  float ScoreOf(float distance) const;
  const std::string& name() const { return name_; }
  Metric metric() const { return options_.metric; }
  uint32_t dimension() const { return dimension_.load(std::memory_order_acquire); }

  // ---- For the shard ----

  // Stores the observation with a stamp, in place of what has its id and an earlier one. kNone,
  // kWrongDimension, kZeroVector, kNotFinite (an int8 vector's product) or kMemoryFull; nothing has
  // changed then. The first observation that is not refused for its vector settles the dimension.
  // `several_homes`: an observation with an earlier stamp may still come, from another home shard.
  // Recalls of the snapshots between will see it.
  StoreOutcome Upsert(const ObservationRef& observation, CommitStamp stamp,
                      bool several_homes = false);
  // Ends what has this id and an earlier stamp. `several_homes`: likewise, and as it must lose a
  // tombstone is kept, until ForgetTombstones. kNone or kMemoryFull.
  StoreOutcome Delete(std::string_view id, CommitStamp stamp, bool several_homes);
  // As Delete with several homes, and ends what has this very stamp, too: it lies in another shard
  // as well, and stays there.
  StoreOutcome Yield(std::string_view id, CommitStamp stamp);
  // Hides what lives with this id and an earlier stamp. kNone or kMemoryFull; nothing has changed
  // then.
  StoreOutcome Suppress(std::string_view id, CommitStamp stamp, bool several_homes);
  // Brings back what was hidden with an earlier stamp. As Suppress.
  StoreOutcome Restore(std::string_view id, CommitStamp stamp);
  // The node's record is at `to`, no longer at `from`, and as long as before. kNoLogAddress as
  // `from`: it was stored with the record's length alone. False where the node has another one.
  bool MoveOrigin(NodeId node, LogAddress from, LogAddress to);
  // Whether Upsert would refuse the vector, and why.
  RefusalReason Judge(const ObservationRef& observation) const;
  // What ended at `horizon` or before is no longer kept for recalls of earlier snapshots. Rises.
  void SetHorizon(CommitStamp horizon) {
    if (horizon > this->horizon()) horizon_.store(horizon, std::memory_order_release);
  }
  // Forgets the tombstones with stamps up to `complete`, some of them at a time.
  void ForgetTombstones(CommitStamp complete);
  bool has_tombstones() const { return first_tombstone_ != kNoNode; }
  uint64_t tombstones() const { return tombstones_; }

  // Ending by age (space_expiry.cc), where the options say so.
  // The stamp of the oldest content that lives or is hidden; kOpenStamp when there is none.
  CommitStamp oldest_content() const;
  // Ends the oldest content, which is there: no snapshot from `end` on sees it.
  void EndOldest(CommitStamp end);
  // As EndOldest, and whatever else comes with its stamp or an earlier one has ended, too.
  void EvictOldest(CommitStamp end);
  // The stamp of the latest content that was evicted. Nothing older is stored again.
  CommitStamp evicted_up_to() const { return evicted_up_to_; }
  // Whatever has an earlier stamp was here when the space was saved, if it was loaded.
  CommitStamp loaded_up_to() const { return loaded_up_to_; }
  // All nodes, those that have contents in the order of these. Allocates.
  std::vector<NodeId> NodesByAge() const;
  // There is an observation with this id, live or hidden.
  bool HasContent(std::string_view id) const;
  // Bytes for what is live or hidden, without what has ended and still holds a place.
  uint64_t content_bytes() const;

  // kNoNode when there is none.
  NodeId FindLive(std::string_view id) const;
  // Live nodes in the order of a hash of their ids, from `*cursor` on: at most about `limit`, in
  // `nodes`. *cursor is where to go on, 0 at the end.
  void Scroll(uint64_t* cursor, size_t limit, std::vector<NodeId>* nodes) const;

  // What a node holds, where that is the latest of its id; nothing for others.
  struct Content {
    enum class Kind : uint8_t { kLive, kHidden, kDeleted };
    Kind kind = Kind::kLive;
    StoredObservation stored;      // kDeleted: the id and the stamp alone
    CommitStamp stamp = kNoStamp;  // of the content
  };
  std::optional<Content> ContentOf(NodeId node) const;

  bool IsLinked(NodeId node) const { return nodes_[node].state == NodeState::kLinked; }

  // Filtered recalls (space_filters.cc). What is live or hidden is filed by its attributes and its
  // time, and what has ended until its place is given back, as a recall of an earlier snapshot may
  // see it.
  // kNone, kBadFilter or kUnknownFilterKey. Good until the space changes.
  RefusalReason CompileFilter(std::span<const std::byte> filter, CompiledFilter* compiled) const {
    return attributes_.Compile(filter, compiled);
  }
  const AttributeIndex& attributes() const { return attributes_; }
  const TimeIndex& times() const { return times_; }
  int64_t WhenOf(NodeId node) const { return nodes_[node].when_ns; }
  void PrefetchWhen(NodeId node) const { __builtin_prefetch(&nodes_[node].when_ns); }
  // As IsVisible, of any node, for the memory of a bit where the snapshot is of now.
  bool IsVisibleHere(NodeId node, CommitStamp snapshot) const {
    const bool is_now = latest_stamp_.load(std::memory_order_relaxed) <= snapshot;
    return (is_now && !HasEnd(node)) || IsVisible(node, snapshot);
  }
  // Has a code in walk_codes().
  bool HasWalkCode(NodeId node) const { return graph_.IsLinked(node) || graph_.IsDoomed(node); }

  // Upkeep, by the shard's linker and sweep between other work.
  // Waiting in lists (space_waiting.cc), where the space is walked with codes and more have come
  // than a scan should bear: what came first among those that are not linked is listed, and found
  // there.
  bool WantsListing() const;
  // What comes can wait in lists: recalls bear a large backlog.
  bool HasWaitingLists() const {
    return waiting_.has_value() && codes_step_ != CodesStep::kReleasing && walk_codes() != nullptr;
  }
  // Lists some, `most` and 16 at most; about 4 us each. Returns how many.
  size_t ListSome(size_t most = InvertedLists::kMostAtOnce);
  uint64_t waiting() const { return waiting_count_; }
  // Of a listed node's code, as a recall reads it. Where some are listed.
  size_t waiting_code_bytes() const {
    return SignBlocks::BlockBytes(walk_codes()->signs().bits()) / SignBlocks::kMembers;
  }
  // What is neither linked nor listed. Only on the shard's core.
  FreshList::Snapshot UnlistedNodes() const { return fresh_.TakeSnapshot().After(waiting_count_); }
  // The nearest of the lists of what waits, with about `members` members; returns how many. On the
  // shard's core, as the next.
  size_t ChooseWaiting(const QueryForms& query, float members, std::span<uint32_t> lists) const;
  // Calls visit(block, signs, code) for each block of a list.
  template <typename Visit>
  void ForEachWaiting(uint32_t list, const QueryForms& query, Visit&& visit) const {
    const bool is_recoded =
        codes_step_ != CodesStep::kRecoding || lists_->count() + list < next_recoded_;
    const SignBlocks& signs = (is_recoded ? walk_codes() : retired_codes_)->signs();
    const std::byte* const code = is_recoded ? query.signs : query.signs_before;
    waiting_->ForEachBlock(list,
                           [&](const InvertedLists::Block& block) { visit(block, signs, code); });
  }

  // The next node to link, kNoNode when there is nothing to do. Passes over what was updated or
  // deleted before it was linked.
  NodeId NextToLink();
  bool BeginLinking(HnswLinker* linker, NodeId node);
  // Once the linker is done with it.
  void FinishLinking(NodeId node);

  // Linking in batches (space_codes.cc), where the space is walked with codes.
  bool LinksInBatches() const { return lists_.has_value() && walk_codes() != nullptr; }
  // Up to nodes.size() nodes to link, in `nodes`; returns how many. The same nodes come again until
  // they are linked.
  size_t NextToLink(std::span<NodeId> nodes);
  bool BeginLinking(BatchLinker* linker, std::span<const NodeId> nodes);
  void FinishLinking(const BatchLinker& linker);

  // The codes that the graph is walked with are to be learned, or learned anew, or the nodes of the
  // graph to be given such codes: linking waits for it. No linker is active.
  bool WantsCodes() const;
  // Some of that, about as much as `max_distances` distances. `learning` is this space's from the
  // first call until WantsCodes is false.
  void StepCodes(CodeLearning* learning, uint32_t max_distances);
  // A reader may still be walking by earlier codes, which nodes that are linked now do not get:
  // linking waits for it, too.
  bool has_retired_codes() const { return retired_codes_ != nullptr; }
  // So many retired nodes are in the graph that a sweep pays. Fewer do when there is nothing to
  // link.
  bool WantsSweep() const;
  // Upkeep will have more to do once the horizon has passed what has ended.
  bool WaitsForHorizon() const;
  // False when memory is short or somebody may still want what a sweep would take out: try again
  // later. No linker is active.
  bool BeginSweep(HnswSweep* sweep);
  void FinishSweep(const HnswSweep& sweep);
  // Until it is taken back whatever has ended is swept, however little it is, for an operator.
  void SweepAll(bool sweeps_all) { sweeps_all_ = sweeps_all; }

  // Has all that is in the graph linked anew, at most `most` nodes at a time (at least 1), by the
  // linker that there is now; what has ended is swept out. By upkeep; takes no memory but for
  // places in the list of fresh nodes. No rebuild is under way.
  void BeginRebuild(uint64_t most);
  bool is_rebuilding() const { return rebuild_.step != Rebuild::Step::kNone; }
  // Some of it, by upkeep between sweeping and linking: looks at `max_nodes` nodes at most. True
  // when something was done.
  bool StepRebuild(size_t max_nodes);
  // Nodes that are still linked as before, or wait to be linked anew.
  uint64_t rebuild_left() const;
  // Nodes that have left the graph to be linked anew, ever.
  uint64_t relinked() const { return relinked_; }
  // Of these the ones that are on their way out.
  uint32_t lifted() const { return lifted_; }
  // That a linker may take.
  uint64_t linkable() const { return unlinked_ - lifted_live_; }

  // Places of what had ended that were given back, ever.
  uint64_t reclaimed() const { return reclaimed_; }
  // Of a space that nobody has to do with any more, ahead of its end: gives back texts, of
  // `max_nodes` nodes at most. True when no more is left than the end can do at once.
  bool Dismantle(size_t max_nodes);
  // Frees nodes that no reader can be on and no save needs, `max_nodes` at most. No linker is
  // active. True when some are left, but for what a save needs.
  bool Reclaim(size_t max_nodes);

  // How many unlinked nodes make `bytes` of vectors to scan.
  size_t NodesInBytes(size_t bytes) const;
  bool has_graph() const { return has_graph_; }

  // kCorrupt naming what is wrong. Reads everything: for tests.
  Result<void> CheckInvariants() const;
  // The same of a space that serves, in slices of `max_nodes`: what each node shows alone, and at
  // the end, where nothing has changed since the first slice, the counts. What only the whole graph
  // shows is left out.
  struct CheckState;
  // kMore, kSound or kChanged. Errors: kCorrupt naming what is wrong.
  Result<CheckOutcome> CheckSlice(size_t max_nodes, CheckState* state) const;

  uint64_t live() const { return live_; }
  uint64_t hidden() const { return hidden_; }
  uint64_t unlinked_count() const { return unlinked_; }
  uint64_t linked() const { return live_ - unlinked_; }
  // Of the graph, with those that have ended and were not taken out yet.
  uint64_t graph_nodes() const { return graph_.linked_count(); }
  // Updated or deleted, still holding a place.
  uint64_t retired() const { return retired_; }
  // Nodes whose rows are there for the next upserts.
  uint64_t free_nodes() const { return free_nodes_; }
  // An upsert was refused for want of memory: what has ended is given back sooner.
  void NoteMemoryShort() { memory_short_ = true; }
  // Those that have ended and are scanned still.
  uint64_t ended_listed() const { return fresh_.size() - unlinked_; }
  // Nodes that upkeep is behind by: those that wait for the graph, and the retired ones in it
  // beyond a share that sweeps let gather. 0 while there is no graph, as nothing waits for it.
  uint64_t backlog() const;
  // What it takes of the heap. Without what belongs to upkeep and saves that are under way.
  MemoryByKind memory() const;
  uint64_t resident_bytes() const { return SumOf(memory()); }
  // Of this what is in use, by what lives, is hidden, or has ended and is not given back yet.
  uint64_t held_bytes() const {
    return (live_ + hidden_ + retired_ + tombstones_) * NodeBytes() + text_bytes_ +
           attributes_.bytes();
  }

 private:
  friend class SpaceSaver;
  friend class SpaceLoader;
  friend class SpaceTestPeer;

  enum class NodeState : uint8_t {
    kFree,
    kUnlinked,
    kEnded,
    kLinking,
    kLinked,
    kRetiredLinking,
    kRetired,
    kDoomed,
    kWaiting,
    kTombstone,
    kHidden,
    kLifted,
    kLiftedEnded,
    kCount,
  };
  struct Node {
    // Written before the node is published, then constant, but for origin, which moves
    // (MoveOrigin). `text`: id, then the payload where it lies in no log; then, with was_hidden,
    // the stamp of the content.
    std::byte* text;
    int64_t when_ns;
    LogAddress origin;
    float confidence;
    uint32_t payload_bytes : 17;
    uint32_t record_words : 15;  // of 8 bytes, at origin; 0: in no log
    uint16_t id_bytes : 15;
    uint16_t was_hidden : 1;
    PayloadKind payload_kind;
    // The shard's alone.
    NodeState state;
    uint32_t next;  // of the list that it is in, by its state
  };
  static_assert(sizeof(Node) == 40);
  static_assert(kMaxPayloadBytes < size_t{1} << 17 && kMaxLogRecordBytes / 8 < size_t{1} << 15);
  // Of id and payload, as they lie in `text`.
  static size_t ContentBytes(const Node& node) {
    return size_t{node.id_bytes} + (node.record_words == 0 ? node.payload_bytes : 0);
  }
  struct Stamps {
    CommitStamp begin;
    CommitStamp end;
  };

  // A save under way, by SpaceSaver: the nodes from `next` to before `end` are still to come.
  //
  // What the log's replay brings again need not be caught: whatever was stored, deleted, suppressed
  // or restored since before the save. So content that comes from before has to be in some node
  // that is saved, and one that moves could miss its turn: a suppress makes a copy, maybe where the
  // save has been, and the node that it was in ends. That one is kept until its turn has come, and
  // saved as the content's; the replay suppresses it again. So are the nodes to which links were
  // saved, or these would lead to whatever came into their places. And a tombstone is kept while an
  // observation with an earlier stamp may still be replayed.
  struct Save {
    using Bits = ChunkedArray<uint64_t>;  // by node, 64 each

    CommitStamp hold;  // none with this stamp or an earlier one is replayed
    NodeId next;
    NodeId end;
    Bits* suppressed;  // a suppress ended it during the save
    Bits* linked;      // its links are saved

    static bool Test(const Bits& bits, NodeId node) {
      return (bits[node / 64] >> (node % 64) & 1) != 0;
    }
    static void Set(Bits* bits, NodeId node) { (*bits)[node / 64] |= uint64_t{1} << (node % 64); }
    bool IsAhead(NodeId node) const { return node >= next && node < end; }
    bool WasSuppressed(NodeId node) const { return IsAhead(node) && Test(*suppressed, node); }
    bool MustKeep(NodeId node) const {
      return IsAhead(node) && (Test(*suppressed, node) || Test(*linked, node));
    }
  };

  // One of them at a time, see space_rebuild.cc, which numbers the steps.
  struct Rebuild {
    enum class Step : uint8_t {
      kNone,
      kLifting,     // 1.
      kLeaving,     // 2. waits for readers
      kSweeping,    // 2.
      kForgetting,  // 3. waits for readers
      kLinking,     // 4.
      kEnding,      // 5.
    };
    Step step = Step::kNone;
    uint64_t most = 1;         // nodes of a batch
    uint64_t most_now = 1;     // of this one
    uint64_t visited = 0;      // places, of `turns`
    uint64_t turns = 0;        // a power of two, at least the places that there were
    uint64_t linked_when = 0;  // taken_first_, then
    ReaderEpochs::Epoch epoch = 0;
  };

  // How a space came by what its graph is walked with (space_codes.cc, which numbers the steps).
  enum class CodesStep : uint8_t {
    kNone,       // nothing learned, or nothing that is of use
    kDrift,      // 1.
    kLearning,   // 2.
    kEncoding,   // 3.
    kRecoding,   // 5.
    kReleasing,  // 6.
    kLearned,
  };

  static constexpr ReaderEpochs::Epoch kNoEpoch = 0;
  static constexpr uint32_t kNodesInWord = 64;  // of has_end_
  // No more of the graph leaves at once: a search near doomed nodes must go through them to find
  // others.
  static constexpr uint64_t kMostSweepShare = 8;

  bool IsLive(NodeId node) const {
    const NodeState state = nodes_[node].state;
    return state == NodeState::kUnlinked || state == NodeState::kLinking ||
           state == NodeState::kLinked || state == NodeState::kLifted;
  }
  bool IsLifted(NodeId node) const {
    const NodeState state = nodes_[node].state;
    return state == NodeState::kLifted || state == NodeState::kLiftedEnded;
  }
  // It ended, and no recall may ask for it any more.
  bool IsPast(NodeId node) const {
    return Load(stamps_[node].end) <= horizon_.load(std::memory_order_relaxed);
  }
  static CommitStamp Load(const CommitStamp& stamp) {
    return std::atomic_ref<CommitStamp>(const_cast<CommitStamp&>(stamp))
        .load(std::memory_order_acquire);
  }
  static void Store(CommitStamp* stamp, CommitStamp value) {
    std::atomic_ref<CommitStamp>(*stamp).store(value, std::memory_order_release);
  }
  // Whoever has a snapshot from its end on sees the bit, which was set before that could be known.
  bool HasEnd(NodeId node) const {
    const uint64_t& word = has_end_[node / kNodesInWord];
    return (std::atomic_ref<uint64_t>(const_cast<uint64_t&>(word))
                    .load(std::memory_order_relaxed) >>
                (node % kNodesInWord) &
            1) != 0;
  }
  void NoteEnd(NodeId node, bool has_end);
  void SetEnd(NodeId node, CommitStamp end);
  // Of a node that no reader can be led to yet. `end`: kOpenStamp for one that lives.
  void SetStamps(NodeId node, CommitStamp begin, CommitStamp end);
  void NoteLinking(NodeId node);
  void FixDimension(uint32_t dimension);
  void BeginLearning(CodeLearning* learning);
  void MeasureDrift(CodeLearning* learning, uint32_t max_distances);
  void StartLearner(CodeLearning* learning);
  void LearnSome(CodeLearning* learning, uint32_t max_distances);
  void EndLearning(CodeLearning* learning, bool is_done);
  void BeginEncoding(RabitqFormat* format, double mean_squared_residual);
  void WithdrawCodes();
  void EncodeSome(uint32_t max_distances);
  void RecodeSome(uint32_t max_distances);
  void ReleaseSome(uint32_t max_distances);
  void PublishCodes(WalkCodes* codes);
  void ReclaimCodes();
  void DropCodes(WalkCodes* codes);
  bool EncodeNode(WalkCodes* codes, NodeId node);
  bool ListNodes(const WalkCodes& codes, std::span<const NodeId> nodes);
  void GiveUpCodes();
  void EndLinking(NodeId node);
  // What links are chosen by.
  SearchTarget LinkTarget() const {
    return walks_exact() ? ExactTargetFor(nullptr) : TargetFor(nullptr);
  }
  RefusalReason DecodeInto(VectorDtype dtype, float scale, const std::byte* vector,
                           uint32_t dimension, float* numbers) const;
  NodeId TakeNode();
  bool ReserveRows(size_t nodes);
  bool ReserveStamps(size_t nodes);
  bool KeepsInList(NodeId node) const;
  bool ReserveFresh();
  void PopFresh();
  void MoveFreshToEnd();
  bool WantsDrop() const;
  void DropEnded();
  bool WriteText(Node* node, const ObservationRef& observation);
  bool FileNode(NodeId node, std::span<const std::byte> attributes);
  bool FileAs(NodeId node, NodeId other);
  bool FileByTime(NodeId node);
  void Unfile(NodeId node);
  bool CopyText(NodeId node, NodeId from);
  static size_t TextBytes(const Node& node);
  void FreeText(Node* node);
  CommitStamp ContentStamp(NodeId node) const;
  bool QueueByAge();
  uint64_t NodeBytes() const;
  void EndVersion(NodeId node, CommitStamp stamp);
  void ListRetired(NodeId node);
  void PutInLine(NodeId node);
  void AwaitReaders(NodeId node);
  bool WantsRetiredSweep() const;
  bool BeginRetiredSweep(HnswSweep* sweep);
  bool LiftSome(size_t max_nodes);
  bool BeginLiftedSweep(HnswSweep* sweep);
  void PutBack(NodeId node);
  void FreeNode(NodeId node);
  void EndSave();
  void Supersede(uint64_t hash, NodeId old, CommitStamp stamp, bool several_homes);
  void NoteSuperseded(uint64_t hash, NodeId node);
  void EndEarlier(uint64_t hash, std::string_view id, CommitStamp stamp);
  NodeId StoreLate(const ObservationRef& observation, bool is_upsert, const float* numbers,
                   uint64_t hash, NodeId latest, CommitStamp stamp);
  StoreOutcome EndContent(std::string_view id, CommitStamp stamp, bool several_homes, bool yields);
  bool MakeTombstone(uint64_t hash, std::string_view id, CommitStamp stamp, NodeId old);
  void Advance(CommitStamp stamp);
  uint64_t HashOf(std::string_view id) const;
  NodeId FindId(uint64_t hash, std::string_view id) const;
  std::string_view IdOf(NodeId node) const;
  Result<void> CheckNode(NodeId node) const;
  using StateCounts = std::array<uint64_t, static_cast<size_t>(NodeState::kCount)>;
  Result<void> CompareCounts(const StateCounts& by_state) const;
  Result<void> CheckCounts() const;
  Result<void> CheckFiled(NodeId node) const;
  uint64_t ChangesMark() const;
  std::unexpected<Error> Unsound(const std::string& what, uint64_t node) const;

  // Constant after construction.
  const std::string name_;
  const SpaceOptions options_;
  ArenaHeap* const heap_;
  ReaderEpochs* const epochs_;

  // Constant once the dimension is settled.
  std::optional<VectorFormat> code_format_;
  std::optional<VectorFormat> exact_format_;  // with has_exact()
  std::optional<VectorStore> codes_;
  std::optional<VectorStore> exact_;

  // Readable by other cores; written by the shard only.
  std::atomic<uint32_t> dimension_{0};
  std::atomic<uint32_t> node_count_{0};  // ever made
  std::atomic<CommitStamp> latest_stamp_{kNoStamp};
  std::atomic<CommitStamp> horizon_{kNoStamp};
  std::atomic<WalkCodes*> walk_codes_{nullptr};
  std::atomic<bool> walks_exact_{false};  // with has_exact()
  ChunkedArray<Node> nodes_;
  ChunkedArray<Stamps> stamps_;
  ChunkedArray<uint64_t> has_end_;  // a bit for each node: its end stamp is not kOpenStamp
  // No node in the graph, and none that is being linked, has a later begin stamp.
  std::atomic<CommitStamp> linked_up_to_{kNoStamp};
  FreshList fresh_;
  HnswGraph graph_;

  // The shard's alone.
  IdMap ids_;
  AttributeIndex attributes_;
  TimeIndex times_;
  NodeId first_free_ = kNoNode;
  uint64_t free_nodes_ = 0;
  uint64_t nodes_taken_ = 0;  // ever
  // Retired nodes in the graph; those that a sweep may take once the horizon has passed sweep_end_
  // and then no reader of sweep_epoch_, closed at that time, is inside.
  NodeId first_retired_ = kNoNode;
  NodeId first_sweepable_ = kNoNode;
  CommitStamp sweep_end_ = kNoStamp;
  ReaderEpochs::Epoch sweep_epoch_ = kNoEpoch;
  uint32_t retired_linked_ = 0;  // in both
  // Out of everything; those of `closing_` once no reader of closing_epoch_ is inside.
  NodeId first_waiting_ = kNoNode;
  NodeId first_closing_ = kNoNode;
  ReaderEpochs::Epoch closing_epoch_ = 0;
  // Queue, by stamp as far as they came in that order.
  NodeId first_tombstone_ = kNoNode;
  NodeId last_tombstone_ = kNoNode;
  uint64_t tombstones_ = 0;
  uint64_t hidden_ = 0;
  // With several homes: a ring of the versions and tombstones that were superseded last.
  static constexpr size_t kSupersededKept = 1'024;
  struct Superseded {
    uint64_t hash;
    NodeId node;
  };
  Superseded* superseded_ = nullptr;
  uint64_t superseded_count_ = 0;  // ever
  uint64_t live_ = 0;
  uint64_t unlinked_ = 0;
  uint64_t retired_ = 0;
  uint64_t text_bytes_ = 0;
  bool has_graph_ = false;
  // With ends_by_age: all that is live or hidden.
  std::optional<ExpiryQueue> aged_;
  CommitStamp evicted_up_to_ = kNoStamp;
  CommitStamp loaded_up_to_ = kNoStamp;
  // Without a graph: what had ended by drop_end_ leaves the list once the horizon has passed that.
  CommitStamp drop_end_ = kNoStamp;
  bool memory_short_ = false;  // an upsert was refused
  bool sweeps_all_ = false;
  uint64_t reclaimed_ = 0;
  Rebuild rebuild_;
  NodeId first_lifted_ = kNoNode;  // that no sweep has taken yet
  uint32_t lifted_ = 0;
  uint32_t lifted_live_ = 0;
  uint64_t lifted_ever_ = 0;
  uint64_t relinked_ = 0;
  uint64_t taken_first_ = 0;  // nodes that were taken from the front of the list, ever
  uint32_t dismantled_ = 0;   // nodes
  // Codes to walk the graph with, and lists of the nodes in the graph with these.
  CodesStep codes_step_ = CodesStep::kNone;
  std::optional<InvertedLists> lists_;
  std::optional<InvertedLists> waiting_;  // what is not linked yet, the first ones
  uint64_t waiting_count_ = 0;            // so many of fresh_, from its front, are there
  WalkCodes* next_codes_ = nullptr;       // learned, and not given to all nodes yet
  WalkCodes* retired_codes_ = nullptr;    // until no reader is in retired_codes_epoch_
  ReaderEpochs::Epoch retired_codes_epoch_ = 0;
  uint32_t next_encoded_ = 0;  // node
  uint32_t next_recoded_ = 0;  // list
  LearningSchedule learn_when_;
  EstimateAgreement agreement_;             // of what was linked since codes were looked at last
  const CodeLearning* learning_ = nullptr;  // under way
  BlockProducts block_products_;
  // The saver's, where one is under way. What it must keep waits in a list until it ends.
  Save* save_ = nullptr;
  NodeId first_kept_ = kNoNode;
  NodeId last_kept_ = kNoNode;
};

// All zeros before the first slice. Whoever carries it need not be trusted: from a wrong one comes
// nothing worse than a wrong verdict.
struct Space::CheckState {
  uint32_t next = 0;  // node
  uint32_t begun = 0;
  uint64_t mark = 0;       // of the first slice
  StateCounts by_state{};  // of the nodes before `next`
};
static_assert(sizeof(Space::CheckState) <= kCheckStateBytes);

}  // namespace engram
