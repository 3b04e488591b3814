#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "index/checkpoint/shard_saver.h"
#include "index/forward_ledger.h"
#include "index/hnsw_params.h"
#include "index/hnsw_sweep.h"
#include "index/log/log_writer.h"
#include "index/recall_job.h"
#include "index/session_table.h"
#include "index/shard_recovery.h"
#include "index/space.h"
#include "index/space_linker.h"
#include "src/core/arena_heap.h"
#include "src/core/clock.h"
#include "src/core/commit_stamp.h"
#include "src/core/counters.h"
#include "src/core/huge_page_arena.h"
#include "src/core/latency_histogram.h"
#include "src/core/reader_epochs.h"
#include "src/core/result.h"
#include "src/core/shard_port.h"

namespace engram {

struct ShardOptions {
  // Memory that the shard's spaces may take, in bytes. Address space at first; used as it fills.
  size_t memory_limit_bytes = size_t{4} << 30;
  HugePagePolicy huge_pages = HugePagePolicy::kAuto;
  int numa_node = -1;
  // Spaces are limited by the port's SpaceCatalogue.
  uint32_t max_sessions = 10'000;
  int64_t session_idle_timeout_ns = 300 * kNanosPerSecond;
  // Sessions that idled out of the max_sessions above, and how long they may still be resumed.
  uint32_t dormant_sessions = 1'000'000;
  int64_t session_keep_ns = int64_t{7} * 24 * 3'600 * kNanosPerSecond;
  // Between two rounds over the sessions that look for idle ones.
  int64_t cleanup_interval_ns = 60 * kNanosPerSecond;
  // Most sequences that a session may have under way beyond the last settled one.
  uint32_t max_credit = 4'096;
  // Vectors of a space that may wait for the graph, as what a recall must scan beside it, or to be
  // swept out of it. Credit ends at this; who sends beyond its credit is refused at twice as much.
  // N sessions that were granted their shares one after the other hold at most 1 + ln N times as
  // much credit.
  size_t unlinked_limit_bytes = size_t{72} << 20;
  // The same of a space whose backlog is looked for in lists: with so many a recall with ef 128
  // takes some 1.5 ms more.
  uint64_t waiting_limit = 4'000'000;
  uint32_t default_ef = 128;
  Traversal traversal = Traversal::kRabitq;
  HnswBuildParams build;
  // Nodes that are linked in a batch, 1 to 1,024. Fewer than 100 wait up to link_wait_ns for
  // others, but not while the space is rebuilt.
  uint32_t link_batch = BatchLinker::kMaxBatch;
  int64_t link_wait_ns = 20 * kNanosPerMilli;
  // How long what was updated or deleted is kept for recalls of earlier snapshots.
  int64_t snapshot_keep_ns = kNanosPerSecond;
  // Cores other than the shard's that may recall at a time.
  uint32_t readers = 1;
  // Observations of a space in this shard from which on the space grows to twice as many
  // partitions; 0: never. It also grows where unlinked_limit_bytes is reached.
  uint64_t grow_partition_at = 250'000;
  uint32_t graph_from = SpaceOptions::kGraphFrom;
  uint32_t list_from = SpaceOptions::kListFrom;
  // Observations that may be under way to the shards that own them.
  uint32_t max_forwards = 8'192;
  // Secret; draws session ids and hash seeds. The same seed gives the same run.
  uint64_t seed = 0;
};

enum class ShardCounter : uint8_t {
  kObservationsStored,
  kObservationsDeleted,
  kObservationsSkipped,  // refused as invalid, their sequence settled
  kObservationsRefused,  // for lack of room, or by a rule of sessions
  kObservationsLinked,
  kObservationsForwarded,  // to the shard that owns them; that one counts them as stored
  kForwardsUnderWay,
  kSpacesGrown,
  kRecalls,
  kRecallDistances,
  kRecallVectors,  // compared, in any form (RecallJob::Work)
  kRecallBytes,    // of these forms
  kLinkDistances,
  kObservationsSwept,  // updated or deleted ones, taken out of the graph
  kSweepDistances,
  kSpaces,
  kSessions,
  kMemoryUsedBytes,
  kMemoryLimitBytes,
  kLogBytesWritten,
  kLogCommits,           // flushes that made something durable
  kLogErrors,            // of the disk; what they concern is written again
  kLogUnsettledBytes,    // that are not known to be durable by the log itself; 0 at rest
  kObservationsExpired,  // past the TTL of their space
  kObservationsEvicted,  // for the quota of their space
  kRebuildLeft,          // observations that rebuilds under way have still to link anew
  kCount,
};
std::string_view ShardCounterName(ShardCounter counter);

// One shard core: the spaces that live here, their sessions, and every recall of them.
//
// A Poll serves, in this order: what other shards answer; what is left of a recall; the recall
// lanes of all producers; what other shards ask; high and normal observations, a batch each; a
// slice of upkeep (linking, sweeping, giving back).
//
// An observation of a space with several partitions is stored by the shard that owns its id, and
// answered by the home shard of its session (shard_partitions.cc).
//
// Thread safety: the shard core's alone; counters and histograms may be read by others, and
// PrefaultAhead is the control plane's.
// Invariants: an observation is completed once, after it is visible; while a recall is under way no
// space changes.
class Shard {
 public:
  // `clock` outlives the shard. Errors: kResourceExhausted.
  static Result<std::unique_ptr<Shard>> Create(const ShardOptions& options, Clock* clock,
                                               ShardPort port, const ShardStorage& storage = {});
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;
  ~Shard();

  // One bounded round; returns how much was done. Never blocks.
  int Poll();

  // Nothing waits to be served (linking apart).
  bool Idle() const;

  // Makes memory present ahead of use (see HugePageArena).
  size_t PrefaultAhead(size_t ahead_bytes, size_t step_bytes) {
    return arena_->PrefaultAhead(ahead_bytes, step_bytes);
  }
  PageKind page_kind() const { return arena_->page_kind(); }
  void AddCounters(std::string_view core, CounterCatalogue* catalogue) const;
  const Counter& counter(ShardCounter which) const { return counters_[which]; }
  // True from Create until what the storage had is here again, in this shard and in those that own
  // it. Requests of producers wait meanwhile. May be asked by any thread.
  bool is_recovering() const { return recovering_.load(std::memory_order_acquire); }
  // While it recovers; may be read by any thread.
  const RecoveryProgress& recovery() const { return recovery_progress_; }
  // From now on all is written at once: before a shutdown. Any thread.
  void HurryLog() { hurries_.store(true, std::memory_order_relaxed); }
  const LatencyHistogram& receive_to_visible() const { return receive_to_visible_; }

  // For tests and for a look after a fault; nullptr when there is no such space.
  const Space* FindSpace(std::string_view name) const;
  Result<void> CheckInvariants() const;

 private:
  // A request that answers in batches. Several recalls may be under way: they are searched in
  // turns, so that one goes on while the memory that another has asked for is on its way.
  // Everything else is answered alone.
  struct Reply {
    enum class Phase : uint8_t { kNothing, kSearching, kEmitting, kIntrospecting };

    Reply(ArenaHeap* heap, const LogWriter* log) : recall(heap, log, RecallJob::Core::kOfShard) {}

    RecallJob recall;
    Phase phase = Phase::kNothing;
    size_t producer = 0;
    SlotId slot = kNoSlot;
    Origin origin = 0;
    uint64_t id = 0;
    // A recall of all spaces: the next one, and why it is refused.
    bool across = false;
    uint32_t next_space = 0;
    RefusalReason refusal = RefusalReason::kNone;
  };
  // More are no faster.
  static constexpr size_t kAnswersAtOnce = 4;

  // A recall's slice: some 100 to 200 us of distances at 768-d.
  static constexpr uint32_t kRecallSliceDistances = 1024;
  static constexpr size_t kEmitSliceHits = 1024;
  // Of recalls of all of them: looked at in a slice whether they are asked; and what it takes to
  // begin with one, in distances.
  static constexpr uint32_t kSpacesAtOnce = 64;
  static constexpr uint32_t kDistancesPerSpace = 64;
  // Nodes of a slice of a check, of which there is one in a round: some 100 to 200 us.
  static constexpr size_t kCheckSliceNodes = 128;
  // Observations that are stored in one round once they are logged.
  static constexpr int kMostStoredAtOnce = 64;
  // The same where those before them are listed meanwhile, which takes some 5 us each; and what is
  // taken of a lane then, of all producers, and of all other shards.
  static constexpr size_t kMostListedAtOnce = 16;
  // That a round lists beyond one for each that it stores.
  static constexpr size_t kMostListedBeside = 16;

  Shard(const ShardOptions& options, Clock* clock, ShardPort port, const ShardStorage& storage,
        HugePageArena arena);

  int Round();
  int PollLog();
  int TakeResultReturns();
  int ServeRequests();
  bool IsAnswering() const { return answers_under_way_ > 0; }
  uint64_t RecallDistances() const;
  RecallJob::Work RecallWork() const;
  bool ReserveRecalls(size_t nodes);
  Reply* FreeAnswer();
  int ContinueAnswers(uint64_t limit);
  int SearchInTurns(uint64_t limit);
  bool SearchSome(Reply* answer, bool is_alone, uint32_t distances);
  bool GoOnAcross(Reply* answer);
  bool IsAskedAcross(uint32_t space, const RecallRequest& request) const;
  bool TakeNextRequest();
  void TakeRequest(size_t producer, SlotId slot);
  void OpenSession(size_t producer, SlotId slot);
  RefusalReason AnswerHello(size_t producer, HelloRequest* hello);
  RefusalReason AttachSession(size_t producer, uint32_t space, HelloRequest* hello);
  RefusalReason FindOrMakeSpace(const HelloRequest& hello, uint32_t* space);
  void DetachSession(size_t producer, SlotId slot);
  void SweepSessions();
  template <typename Request>
  const Request* BeginAnswer(Reply* answer, size_t producer, SlotId slot);
  RefusalReason JudgeAnswer(const Reply& answer) const;
  bool MayAnswer(Reply* answer, uint32_t space);
  void BeginRecall(size_t producer, SlotId slot);
  void BeginGet(size_t producer, SlotId slot);
  void BeginScroll(size_t producer, SlotId slot);
  void BeginIntrospection(size_t producer, SlotId slot);
  void CheckSpace(size_t producer, SlotId slot);
  int EmitHits(Reply* answer);
  int EmitSpaceRecords(Reply* answer);
  size_t WriteSpaceRecord(const Space& space, std::byte* to) const;
  void SetUnderWay(Reply* answer, Reply::Phase phase);
  void FinishAnswer(Reply* answer, CompletionKind kind, RefusalReason reason);

  int TakeObservations(Lane lane);
  void TakeObservation(size_t producer, SlotId slot);
  RefusalReason JudgeSession(const Session* session, size_t producer,
                             const ObserveRequest& request) const;
  void TakeAlone(size_t producer, ObserveRequest* request, Completion completion);
  void TakeInSession(Session* session, size_t producer, ObserveRequest* request,
                     Completion completion);
  StoreOutcome Store(uint32_t space, const ObserveRequest& request, CommitStamp stamp,
                     bool in_credit);
  StoreOutcome Hide(uint32_t space, const ObserveRequest& request, CommitStamp stamp);
  bool HasRoom(uint32_t space, bool in_credit) const;
  uint64_t BacklogLimit(const Space& space) const;
  RefusalReason FixDimension(uint32_t space, const ObservationRef& observation);
  SpaceOptions OptionsOf(const SpaceEntry& entry) const;
  static ObservationRef ObservationIn(const ObserveRequest& request);
  void Refuse(size_t producer, const Completion& completion);

  // What became of an observation that its home takes.
  struct Taken {
    StoreOutcome outcome;
    CommitStamp stamp = kNoStamp;
    uint64_t ticket = 0;  // of the forward that answers it later; 0: it is visible
  };
  Taken Take(uint32_t space, Session* session, ObserveRequest* request, bool in_credit);
  bool OwnedHereAlone(uint32_t space, const ObserveRequest& request) const;
  RefusalReason Judge(uint32_t space, const ObserveRequest& request, bool in_credit);
  RefusalReason JudgeLogRoom(uint32_t space, const ObserveRequest& request) const;
  size_t RecordBytes(uint32_t space, const ObserveRequest& request) const;
  static size_t AttributeRoom(const ObserveRequest& request);
  bool HasMemoryFor(uint32_t space, const ObserveRequest& request) const;
  static size_t PendingBytes(const ObserveRequest& request);
  void Append(uint32_t space, RefusalReason skip_reason, CommitStamp stamp,
              ObserveRequest* request);
  bool IsLogged(const Forward& forward) const;
  int StoreLogged();
  void BeginStoring(uint64_t ticket);
  void FinishForward(uint64_t ticket);
  int Recover();
  bool OthersHaveLoaded() const;
  bool MustWaitForOthers(const LogRecord& record) const;
  Result<bool> Replay(const LogEntry& entry);
  bool AllHaveReplayed();
  void RestoreSession(SessionId id, uint32_t space, Sequence sequence, CommitStamp stamp,
                      int64_t last_active_unix_ns);
  Result<bool> ReplayObservation(const LogEntry& entry, uint32_t space);
  static ObserveRequest* RequestOf(const LogRecord& record, LogAddress address,
                                   uint32_t record_bytes);
  void ForwardReplayed(const ObserveRequest* request, uint32_t space, CommitStamp stamp);
  static void FreeReplayed(const Forward& forward);
  Result<void> EndRecovery();
  Result<int> LoadCheckpoint();
  Result<void> LoadExtent(std::span<const std::byte> extent);
  Result<void> LoadSpaceList(std::span<const std::byte> body, uint32_t count);
  Result<void> LoadSessions(std::span<const std::byte> body, uint32_t count);
  Result<void> BeginLoadingSpace(std::span<const std::byte> extent);
  Result<void> FinishLoadingSpace();
  bool HandOn();
  bool HandOnSessions();
  int StepCheckpoint();
  void NoteForCheckpoint(CheckpointHandoff* handoff);
  int SyncForCheckpoint(CheckpointHandoff* handoff);
  void ReportSave(CheckpointHandoff* handoff);
  void BeginForward(uint64_t ticket, size_t producer, const ObserveRequest& request,
                    const Completion& completion);
  void QueueAnswer(Session* session, size_t producer, const Completion& completion);
  void StepForward(uint64_t ticket);
  bool NextTarget(Forward* forward) const;
  bool Tell(uint64_t ticket);
  bool Send(uint64_t ticket);
  bool DoHere(Forward* forward);
  static PeerMessage::Kind MessageOf(const Forward& forward);
  static CommitStamp StampOf(const Forward& forward);
  static void NoteOutcome(Forward* forward, bool existed, CommitStamp later);
  StoreOutcome DoAsAsked(PeerMessage::Kind kind, uint32_t space, const ObserveRequest& request,
                         CommitStamp stamp, bool in_credit);
  void AnswerForward(const Forward& forward);
  int TakePeerAnswers();
  int SendWaiting();
  int TakePeerRequests();
  bool TakePeerRequest(ShardId home, const PeerMessage& message);
  bool Answer(ShardId home, const PeerMessage& message, const StoreOutcome& outcome);
  // Others may own its ids, or have owned them.
  bool MayForward(uint32_t space) const {
    return entries_[space]->max_partitions() > 1 ||
           partition_of_[space] == SpaceEntry::kNoPartition;
  }
  void GrowIfFull(uint32_t space);
  CommitStamp CompleteEverywhere() const;
  CommitStamp Horizon(CommitStamp complete) const;
  bool HasEnded(uint32_t space, CommitStamp stamp) const;
  static CommitStamp EndOf(const SpaceEntry& entry, CommitStamp stamp);
  int EndByAge(bool busy);
  void EndBeforeAnswer(uint32_t space);
  int EndByAgeIn(uint32_t index, int most);
  void KeepToQuota(uint32_t space, CommitStamp stamp);
  int Evict(uint32_t space, CommitStamp end, int most);
  bool IsOverShare(uint32_t space) const;
  void PublishUse(uint32_t space);
  RefusalReason JudgeQuota(uint32_t space, const ObserveRequest& request, bool* grows);
  RefusalReason JudgeGrowth(uint32_t space, const ObserveRequest& request) const;
  // A link's slice, with no observations coming in.
  static constexpr uint32_t kIdleLinkDistances = 256;
  // Where recalls come and no observations, upkeep is owed as many distances as they took, which
  // are a third as long: else recalls one after the other would keep it from what makes them slow.
  // It gets some slices more in a round, while these are short; and where more than a round's is
  // owed recalls wait for it, some 1 ms at most.
  static constexpr int kMostSlices = 4;
  // Nodes linked between two announcements of credit.
  static constexpr uint64_t kCreditEvery = 256;
  int Upkeep(bool busy);
  int StepUpkeep(bool busy);
  bool BeginUpkeep(bool busy);
  bool BeginUpkeepOfNext(bool busy);
  static bool EndsBeforeItIsLinked(const Space& space);
  bool WaitsForBatch(uint32_t index);
  void StepSweep(uint32_t distances);
  void StepLink(uint32_t distances);
  void FinishLink();
  void QueueForUpkeep(uint32_t space);

  uint64_t CreditOf(Session* session);
  uint32_t RetryAfterMs(const Space& space, RefusalReason reason) const;
  void AnnounceCredit(uint32_t space);
  void Complete(size_t producer, const Completion& completion);
  bool Notify(ProducerId producer, const Completion& completion);
  uint32_t FindSpaceIndex(std::string_view name) const;
  uint32_t FindOrMakeSpace(SpaceEntry* entry);

  // Something that is done to a whole space, and under way (shard_commands.cc).
  struct Command {
    enum class Step : uint8_t { kBegin, kSweeping, kRebuilding, kForgetting, kJoined, kLogging };
    SpaceCommand what = SpaceCommand::kCompact;
    Step step = Step::kBegin;
    size_t producer = 0;
    SlotId slot = kNoSlot;
    SpaceEntry* entry = nullptr;
    uint32_t generation = 0;  // of the space when it began; not for kDrop
    // kCompact: places that are then given back, ever. kRebuild: that were relinked before, ever.
    uint64_t goal = 0;
    uint64_t session_cursor = 0;
    LogPosition log_end = 0;                      // kDrop: of the record that says so
    RefusalReason reason = RefusalReason::kNone;  // why it was not done
  };
  // A part that was dropped, and is freed in slices.
  struct Condemned {
    std::unique_ptr<Space> space;
    ReaderEpochs::Epoch epoch;
  };
  void BeginCommand(size_t producer, SlotId slot);
  int StepCommands();
  bool StepCommand(Command* command);
  bool StepCompact(Command* command, CommandRequest* request);
  bool StepRebuild(Command* command, CommandRequest* request);
  void CountRebuildLeft();
  bool StepDrop(Command* command, CommandRequest* request);
  bool HasUnderWay(uint32_t space);
  bool ForgetSessions(uint32_t space, uint64_t* cursor);
  bool JoinsDrop() const;
  void LogDrop(uint32_t space, CommitStamp stamp, Command* command);
  void RenewStale();
  void Renew(uint32_t space);
  int FreeCondemned();
  // What has this stamp is of an incarnation that was dropped.
  bool IsDropped(uint32_t space, CommitStamp stamp) const {
    return stamp <= entries_[space]->birth();
  }

  // Constant after construction.
  const ShardOptions options_;
  Clock* const clock_;

  // Owner core only.
  ShardPort port_;
  std::unique_ptr<HugePageArena> arena_;
  ArenaHeap heap_;
  ReaderEpochs epochs_;
  StampClock stamp_clock_;
  const uint64_t hash_seed_;
  std::vector<std::unique_ptr<Space>> spaces_;
  std::vector<SpaceEntry*> entries_;         // by space
  std::vector<uint16_t> partition_of_;       // by space: the one that this shard holds
  std::vector<uint16_t> logged_partitions_;  // by space: as the log says last; 0: nothing yet
  std::vector<uint32_t> pending_;            // by space: upserts that were taken and not stored
  std::vector<uint32_t> growing_;            // by space: of a quota, taken here and not answered
  std::vector<uint32_t> deleting_;           // by space: deletes taken here and not answered
  std::vector<uint32_t> aging_;              // spaces that end by age
  size_t aging_turn_ = 0;
  std::vector<uint32_t> generation_of_;  // by space: of its entry, when it was made
  std::vector<CommitStamp> birth_of_;    // by space: likewise
  std::vector<LogPosition> dropped_at_;  // by space: where the log says so; 0: not since the start
  uint64_t generations_seen_ = 0;        // of the catalogue
  std::vector<Command> commands_;        // under way
  std::vector<Condemned> condemned_;
  std::vector<uint32_t> space_of_entry_;   // by index in the catalogue; kNoNode: none here
  std::vector<uint32_t> attached_;         // by space: sessions with a connection
  std::vector<uint64_t> announced_links_;  // by space: links made since credit was announced
  std::vector<int64_t> link_due_ns_;       // by space: a batch waits no longer; 0: none waits
  std::vector<bool> upkeep_queued_;        // by space
  std::vector<bool> credit_due_;           // by space: there may be room that nobody was told of
  std::vector<uint32_t> upkeep_queue_;     // spaces with something to do, served in turn
  size_t upkeep_turn_ = 0;
  size_t fruitless_turns_ = 0;  // in a row
  uint64_t recalled_ = 0;       // RecallDistances() when upkeep had its share of them
  uint64_t owed_ = 0;           // distances that upkeep may do for these
  SessionTable sessions_;
  int64_t sweep_sessions_ns_ = 0;  // when the next round over the sessions begins
  const ShardStorage storage_;
  LogWriter* const log_;  // nullptr: observations live in memory only
  ForwardLedger ledger_;
  uint64_t first_unlogged_ = 0;              // tickets before it are logged
  size_t pending_bytes_ = 0;                 // that these will take
  std::unique_ptr<ShardRecovery> recovery_;  // while recovering
  std::unique_ptr<ShardSaver> saver_;        // where the storage has a place for checkpoints
  uint32_t noted_round_ = 0;
  uint32_t saved_round_ = 0;
  uint32_t synced_round_ = 0;
  std::optional<LogPosition> sync_to_;  // in the round under way
  bool keeps_tombstones_ = false;       // of what may be replayed over the checkpoint under way
  std::vector<uint32_t> asked_;         // by shard: messages that it has not answered
  std::vector<std::optional<PeerMessage>> held_;  // by shard: what it asked and cannot be done yet
  SpaceLinker linker_;
  HnswSweep sweep_;
  uint32_t linking_space_ = 0;
  uint32_t sweeping_space_ = 0;
  bool sweep_turn_ = false;
  std::array<Reply, kAnswersAtOnce> answers_;
  size_t answers_under_way_ = 0;
  uint32_t introspected_ = 0;   // spaces whose records were written
  bool has_checked_ = false;    // in this round
  std::vector<NodeId> listed_;  // of a get or a scroll
  std::vector<SlotId> batch_;
  // Observations were listed in the round before, and are in this one.
  bool lists_ = false;
  bool listed_now_ = false;
  size_t list_beside_ = 0;     // so many may still be, see kMostListedBeside
  size_t first_peer_ = 0;      // served first in this round
  size_t first_producer_ = 0;  // served first in this round
  int64_t now_ns_ = 0;
  int64_t unix_ns_ = 0;
  int64_t link_retry_ns_ = 0;        // memory was short; try again then
  int64_t link_began_ns_ = 0;        // of the node under way
  double link_ns_ = kNanosPerMilli;  // a node takes, on average of the last ones

  // Written by the owner, read by others.
  CounterSet<ShardCounter, static_cast<size_t>(ShardCounter::kCount)> counters_;
  LatencyHistogram receive_to_visible_;
  std::atomic<bool> recovering_{false};
  RecoveryProgress recovery_progress_;
  // Written by anyone.
  std::atomic<bool> hurries_{false};
};

}  // namespace engram
