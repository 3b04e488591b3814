#include "index/shard.h"

#include <algorithm>
#include <string>
#include <utility>

#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

namespace {

constexpr size_t kObservationBatch = 64;
constexpr int kRequestsPerPoll = 64;
// Sessions that are moved or dropped in one round.
constexpr size_t kSessionSteps = 16;
// Id and payload of an observation that credit makes room for in the log.
constexpr size_t kUsualTextBytes = 512;

// What the rings of a lane hold, of all producers.
uint32_t LaneRoom(const ShardPort& port, Lane lane) {
  size_t room = 0;
  for (const ShardLink& link : port.producers) {
    room += link.lanes[static_cast<size_t>(lane)].capacity();
  }
  return static_cast<uint32_t>(room);
}

}  // namespace

Result<std::unique_ptr<Shard>> Shard::Create(const ShardOptions& options, Clock* clock,
                                             ShardPort port, const ShardStorage& storage) {
  auto arena = HugePageArena::Create({.reserve_bytes = options.memory_limit_bytes,
                                      .huge_pages = options.huge_pages,
                                      .numa_node = options.numa_node});
  if (!arena) return std::unexpected(arena.error());
  return std::unique_ptr<Shard>(
      new Shard(options, clock, std::move(port), storage, *std::move(arena)));
}

Shard::Shard(const ShardOptions& options, Clock* clock, ShardPort port, const ShardStorage& storage,
             HugePageArena arena)
    : options_(options),
      clock_(clock),
      port_(std::move(port)),
      arena_(std::make_unique<HugePageArena>(std::move(arena))),
      heap_(arena_.get()),
      epochs_(options.readers),
      stamp_clock_(port_.shard),
      hash_seed_(MixBits(options.seed + port_.shard.value())),
      space_of_entry_(port_.catalogue->max_spaces(), kNoNode),
      sessions_({.max_sessions = options.max_sessions,
                 .max_dormant = options.dormant_sessions,
                 .idle_timeout_ns = options.session_idle_timeout_ns,
                 .keep_ns = options.session_keep_ns,
                 .unix_ns = clock->WallNs(),
                 .seed = MixBits(options.seed + port_.shard.value() + 1),
                 .home = port_.shard}),
      storage_(storage),
      log_(storage.log),
      ledger_(log_ != nullptr || port_.catalogue->shards() > 1 ? options.max_forwards : 1,
              port_.catalogue->shards()),
      asked_(port_.catalogue->shards()),
      held_(port_.catalogue->shards()),
      linker_(&heap_, options.build, options.link_batch),
      sweep_(&heap_, options.build),
      answers_{Reply(&heap_, storage.log), Reply(&heap_, storage.log), Reply(&heap_, storage.log),
               Reply(&heap_, storage.log)},
      batch_(kObservationBatch),
      waiting_high_(LaneRoom(port_, Lane::kHigh), port_.catalogue->max_spaces(),
                    options.max_sessions + port_.catalogue->max_spaces()),
      waiting_normal_(LaneRoom(port_, Lane::kNormal), port_.catalogue->max_spaces(),
                      options.max_sessions + port_.catalogue->max_spaces()) {
  const uint32_t max_spaces = port_.catalogue->max_spaces();
  spaces_.reserve(max_spaces);
  entries_.reserve(max_spaces);
  partition_of_.reserve(max_spaces);
  logged_partitions_.reserve(max_spaces);
  pending_.reserve(max_spaces);
  growing_.reserve(max_spaces);
  deleting_.reserve(max_spaces);
  generation_of_.reserve(max_spaces);
  birth_of_.reserve(max_spaces);
  dropped_at_.reserve(max_spaces);
  aging_.reserve(max_spaces);
  attached_.reserve(max_spaces);
  announced_links_.reserve(max_spaces);
  upkeep_queued_.reserve(max_spaces);
  link_due_ns_.reserve(max_spaces);
  credit_due_.reserve(max_spaces);
  upkeep_queue_.reserve(max_spaces);
  listed_.reserve(2 * kMaxPageResults);
  counters_[ShardCounter::kMemoryLimitBytes].Set(arena_->reserve_bytes());
  if (log_ == nullptr) return;
  if (storage_.checkpoint != nullptr) {
    saver_ = std::make_unique<ShardSaver>(storage_.checkpoint_disk, &heap_,
                                          port_.catalogue->max_spaces());
  }
  recovery_ = std::make_unique<ShardRecovery>(storage_, &recovery_progress_);
  recovering_.store(true, std::memory_order_relaxed);
  port_.stamps->Publish(port_.shard, kNoStamp);
  port_.catalogue->BeginReplay();
}

// One that ends while it recovers still has requests of its own under way.
Shard::~Shard() {
  for (uint64_t ticket = ledger_.oldest_ticket(); ticket < ledger_.next_ticket(); ++ticket) {
    const Forward& forward = ledger_.At(ticket);
    if (forward.is_replayed && forward.step != Forward::Step::kAnswered) FreeReplayed(forward);
  }
}

// What the shard publishes of its stamps (see StampBoard): while it polls the clock as it was
// before, so that what it takes now is later; between two polls nothing is under way but its
// forwards.
int Shard::Poll() {
  const auto publish = [this](CommitStamp complete) {
    port_.stamps->Publish(
        port_.shard, ledger_.empty() ? complete : std::min(complete, ledger_.OldestStamp() - 1));
  };
  if (is_recovering()) {
    now_ns_ = clock_->MonotonicNs();
    unix_ns_ = clock_->WallNs();
    const int work = Recover();
    if (is_recovering()) {
      if (recovery_ != nullptr) publish(recovery_->complete());
      return work;
    }
  }
  publish(StampBefore(clock_->WallNs()));
  now_ns_ = clock_->MonotonicNs();
  unix_ns_ = clock_->WallNs();
  const int work = Round();
  publish(kOpenStamp);
  return work;
}

int Shard::Round() {
  first_producer_ = (first_producer_ + 1) % port_.producers.size();
  if (!IsAnswering()) RenewStale();
  int work = TakeResultReturns();
  work += PollLog();
  work += TakePeerAnswers();
  work += ServeRequests();
  if (IsAnswering()) return work;
  // Rounds that take nothing do not tell.
  lists_ = std::exchange(listed_now_, false);
  list_beside_ = kMostListedBeside;
  work += SendWaiting();
  work += TakePeerRequests();
  work += StoreLogged();
  const int observations = TakeObservations(Lane::kHigh) + TakeObservations(Lane::kNormal);
  if (observations > 0) work += PollLog();
  work += observations;
  work += EndByAge(work > 0);
  work += StepCommands();
  work += Upkeep(observations > 0);
  work += StepCheckpoint();
  work += FreeCondemned();
  SweepSessions();
  counters_[ShardCounter::kMemoryUsedBytes].Set(heap_.live_bytes());
  counters_[ShardCounter::kForwardsUnderWay].Set(ledger_.size());
  return work;
}

int Shard::PollLog() {
  if (log_ == nullptr) return 0;
  if (hurries_.load(std::memory_order_relaxed)) log_->Hurry();
  const int work = log_->Poll(now_ns_);
  counters_[ShardCounter::kLogBytesWritten].Set(log_->bytes_written());
  counters_[ShardCounter::kLogCommits].Set(log_->commits());
  counters_[ShardCounter::kLogErrors].Set(log_->errors());
  counters_[ShardCounter::kLogUnsettledBytes].Set(
      log_->settled() ? 0 : 1 + log_->end() - std::min(log_->end(), log_->durable()));
  return work;
}

bool Shard::Idle() const {
  if (is_recovering() || IsAnswering() || !ledger_.empty()) return false;
  if (!commands_.empty() || !condemned_.empty()) return false;
  if (log_ != nullptr && !log_->settled()) return false;
  for (size_t s = 0; s < port_.peers.size(); ++s) {
    if (held_[s] || (s != port_.shard.value() && port_.peers[s].requests_in.Depth() > 0)) {
      return false;
    }
  }
  return std::ranges::all_of(port_.producers, [](const ShardLink& link) {
    return std::ranges::all_of(link.lanes, [](const auto& lane) { return lane.Depth() == 0; });
  });
}

// ---------------------------------------------------------------------------------------------
// Requests: hellos; what is answered in batches is in shard_answers.cc

int Shard::TakeResultReturns() {
  int work = 0;
  for (ShardLink& link : port_.producers) {
    const size_t count = link.result_returns.PopBatch(batch_);
    for (size_t i = 0; i < count; ++i) port_.result_slab->Release(batch_[i]);
    work += static_cast<int>(count);
  }
  return work;
}

// Requests until the lanes are empty or the round's share of distances is spent. What the round
// before has left under way is only brought to its end, so that observations have their turn.
int Shard::ServeRequests() {
  int work = 0;
  int requests = IsAnswering() ? kRequestsPerPoll : 0;
  const uint64_t limit = RecallDistances() + kRecallSliceDistances;
  has_checked_ = false;
  if (!IsAnswering() && owed_ > uint64_t{kMostSlices} * kIdleLinkDistances) return 0;
  for (;;) {
    for (; requests < kRequestsPerPoll && !has_checked_ && TakeNextRequest(); ++requests) ++work;
    if (!IsAnswering()) break;
    const size_t under_way = answers_under_way_;
    work += ContinueAnswers(limit);
    // None has come to its end: the share is spent, or there are no result slots.
    if (answers_under_way_ == under_way || RecallDistances() >= limit) break;
  }
  return work;
}

// False where none may be taken now: beside a recall that is under way only another one may, as all
// else may change spaces.
bool Shard::TakeNextRequest() {
  for (size_t i = 0; i < port_.producers.size(); ++i) {
    const size_t producer = (first_producer_ + i) % port_.producers.size();
    ShardLink& link = port_.producers[producer];
    auto& lane = link.lanes[static_cast<size_t>(Lane::kRecall)];
    const auto slot = lane.Peek();
    if (!slot) continue;
    const auto* header = reinterpret_cast<const RequestHeader*>(link.producer_slab->At(*slot));
    const bool is_recall = header->kind == RequestKind::kRecall;
    if (IsAnswering() && (!is_recall || FreeAnswer() == nullptr)) return false;
    (void)lane.TryPop();
    TakeRequest(producer, *slot);
    return true;
  }
  return false;
}

void Shard::TakeRequest(size_t producer, SlotId slot) {
  const std::byte* bytes = port_.producers[producer].producer_slab->At(slot);
  switch (reinterpret_cast<const RequestHeader*>(bytes)->kind) {
    case RequestKind::kHello:
      OpenSession(producer, slot);
      return;
    case RequestKind::kRecall:
      BeginRecall(producer, slot);
      return;
    case RequestKind::kDetach:
      DetachSession(producer, slot);
      return;
    case RequestKind::kIntrospect:
      BeginIntrospection(producer, slot);
      return;
    case RequestKind::kGet:
      BeginGet(producer, slot);
      return;
    case RequestKind::kScroll:
      BeginScroll(producer, slot);
      return;
    case RequestKind::kCheck:
      CheckSpace(producer, slot);
      return;
    case RequestKind::kCommand:
      BeginCommand(producer, slot);
      return;
    case RequestKind::kObserve:
      break;
  }
  CHECK(false, "observations do not travel on the recall lane");
}

void Shard::OpenSession(size_t producer, SlotId slot) {
  auto* hello = reinterpret_cast<HelloRequest*>(port_.producers[producer].producer_slab->At(slot));
  const RefusalReason reason = AnswerHello(producer, hello);
  Complete(
      producer,
      {.kind = CompletionKind::kHello, .reason = reason, .slot = slot, .origin = hello->origin});
}

RefusalReason Shard::AnswerHello(size_t producer, HelloRequest* hello) {
  const std::string_view name = hello->space.view();
  if (hello->wants_session && hello->session.value() != 0) {
    const std::optional<uint32_t> space = sessions_.SpaceOf(hello->session, unix_ns_);
    if (!space) return RefusalReason::kSessionExpired;
    if (spaces_[*space]->name() != name) return RefusalReason::kSessionSpaceMismatch;
  }
  SpaceEntry* entry = port_.catalogue->Find(name);
  // Who only recalls may come before the first observation.
  if (entry == nullptr && !hello->wants_session) return RefusalReason::kNone;
  if (entry == nullptr) entry = port_.catalogue->FindOrAdd(name, hello->metric);
  if (entry == nullptr) return RefusalReason::kSpaceLimit;
  if (entry->is_dropping()) return RefusalReason::kSpaceDropping;
  if (hello->metric != Metric::kUnspecified && hello->metric != entry->metric()) {
    return RefusalReason::kMetricMismatch;
  }
  // What a client says of the dimension before the first observation settles it.
  if (hello->dimension != 0 &&
      !(hello->wants_session ? entry->FixDimension(hello->dimension)
                             : entry->dimension() == 0 || entry->dimension() == hello->dimension)) {
    return RefusalReason::kDimensionMismatch;
  }
  hello->metric = entry->metric();
  hello->dimension = entry->dimension();
  if (!hello->wants_session) return RefusalReason::kNone;
  return AttachSession(producer, FindOrMakeSpace(entry), hello);
}

// The shard's part of a space that is in the catalogue.
uint32_t Shard::FindOrMakeSpace(SpaceEntry* entry) {
  uint32_t& space = space_of_entry_[entry->index()];
  if (space != kNoNode) {
    if (generation_of_[space] != entry->generation()) Renew(space);
    return space;
  }
  generation_of_.push_back(entry->generation());
  birth_of_.push_back(entry->birth());
  dropped_at_.push_back(0);
  space = static_cast<uint32_t>(spaces_.size());
  spaces_.push_back(
      std::make_unique<Space>(std::string(entry->name()), OptionsOf(*entry), &heap_, &epochs_));
  entries_.push_back(entry);
  partition_of_.push_back(entry->PartitionIn(port_.shard));
  logged_partitions_.push_back(0);
  pending_.push_back(0);
  growing_.push_back(0);
  deleting_.push_back(0);
  if (entry->ends_by_age()) aging_.push_back(space);
  attached_.push_back(0);
  announced_links_.push_back(0);
  upkeep_queued_.push_back(false);
  link_due_ns_.push_back(0);
  credit_due_.push_back(false);
  counters_[ShardCounter::kSpaces].Set(spaces_.size());
  return space;
}

SpaceOptions Shard::OptionsOf(const SpaceEntry& entry) const {
  return {.metric = entry.metric(),
          .precision = entry.precision(),
          .traversal = options_.traversal,
          .dimension = entry.dimension(),
          .build = options_.build,
          .hash_seed = MixBits(hash_seed_ + entry.index()),
          .graph_from = options_.graph_from,
          .list_from = options_.list_from,
          .ends_by_age = entry.ends_by_age(),
          .homes = port_.catalogue->shards(),
          .filter_keys = {entry.filter_keys().begin(), entry.filter_keys().end()}};
}

RefusalReason Shard::AttachSession(size_t producer, uint32_t space, HelloRequest* hello) {
  const ProducerId holder(static_cast<uint16_t>(producer));
  Session* session = nullptr;
  if (hello->session.value() == 0) {
    session = sessions_.Open(space, holder, hello->origin, now_ns_, unix_ns_);
    if (session == nullptr) return RefusalReason::kSessionLimit;
    ++attached_[space];
  } else {
    const auto resumed = sessions_.Resume(hello->session, now_ns_, unix_ns_);
    if (!resumed) return resumed.error();
    session = *resumed;
    if (session->origin != 0) {
      Notify(session->producer, {.kind = CompletionKind::kFenced, .origin = session->origin});
    } else {
      ++attached_[space];
    }
    sessions_.Attach(session, holder, hello->origin, now_ns_);
    // What the connection before was granted ends with it.
    session->granted_sequence = session->last_sequence;
  }
  hello->session = session->id;
  hello->session_slot = sessions_.PlaceOf(*session);
  hello->last_sequence = session->told_sequence;
  hello->credit = CreditOf(session) - session->told_sequence;
  counters_[ShardCounter::kSessions].Set(sessions_.size());
  return RefusalReason::kNone;
}

void Shard::DetachSession(size_t producer, SlotId slot) {
  const auto* request =
      reinterpret_cast<const DetachRequest*>(port_.producers[producer].producer_slab->At(slot));
  Session* session = sessions_.At(request->session_slot, request->session);
  if (session != nullptr && session->origin == request->origin &&
      session->producer.value() == producer) {
    --attached_[session->space];
    sessions_.Detach(session, now_ns_);
    counters_[ShardCounter::kSessions].Set(sessions_.size());
  }
  Complete(producer, {.kind = CompletionKind::kDetach, .slot = slot, .origin = request->origin});
}

// Each cleanup interval a round over the sessions, in parts.
void Shard::SweepSessions() {
  if (now_ns_ < sweep_sessions_ns_) return;
  if (sessions_.Sweep(now_ns_, unix_ns_, kSessionSteps)) {
    sweep_sessions_ns_ = now_ns_ + options_.cleanup_interval_ns;
  }
  counters_[ShardCounter::kSessions].Set(sessions_.size());
}

// ---------------------------------------------------------------------------------------------
// Credit and completions

// The highest sequence that the session may send: its share of what the space may still take before
// recalls would suffer, and at least 1 of it. Never less than the connection was granted before.
uint64_t Shard::CreditOf(Session* session) {
  const Space& space = *spaces_[session->space];
  const uint64_t limit = BacklogLimit(space);
  uint64_t room = limit - std::min(limit, space.backlog() + pending_[session->space]);
  // At least one, as the answers of forwards announce nothing.
  if (log_ != nullptr || entries_[session->space]->partitions() > 1) {
    room = std::min(room, std::max(ledger_.room(), uint64_t{1}));
  }
  if (log_ != nullptr) {
    const size_t record_bytes =
        LogRecordBytes(space.name().size(), space.dimension() * sizeof(float), 0, kUsualTextBytes);
    room = std::min(room, std::max<uint64_t>(log_->room_bytes() / record_bytes, 1));
  }
  const uint64_t sharers = std::max(attached_[session->space], uint32_t{1});
  const uint64_t share = std::min<uint64_t>(options_.max_credit, (room + sharers - 1) / sharers);
  session->granted_sequence = std::max(session->granted_sequence, session->last_sequence + share);
  return session->granted_sequence;
}

// Tells those who ran out of credit that there is room again.
void Shard::AnnounceCredit(uint32_t space) {
  sessions_.ForEachAttached(space, [&](Session& session) {
    const uint64_t before = session.granted_sequence;
    if (before > session.last_sequence + options_.max_credit / 2) return;
    if (CreditOf(&session) == before) return;
    if (Notify(session.producer, {.kind = CompletionKind::kCredit,
                                  .origin = session.origin,
                                  .credit_sequence = session.granted_sequence})) {
      return;
    }
    // Not said, so not granted. Again when the space's turn of linking comes round.
    session.granted_sequence = before;
    QueueForUpkeep(space);
  });
}

// When linking has made room for a batch, or the log has written some blocks.
uint32_t Shard::RetryAfterMs(const Space& space, RefusalReason reason) const {
  constexpr double kMaxMs = 1000;
  constexpr uint32_t kLogMs = 5;
  if (reason == RefusalReason::kLogBusy || reason == RefusalReason::kQueueFull) return kLogMs;
  const bool is_quota =
      reason == RefusalReason::kQuotaObservations || reason == RefusalReason::kQuotaMemory;
  if (is_quota || !space.has_graph()) return static_cast<uint32_t>(kMaxMs);
  const double ms = link_ns_ * kCreditEvery / kNanosPerMilli;
  return static_cast<uint32_t>(std::clamp(ms, 1.0, kMaxMs));
}

void Shard::Complete(size_t producer, const Completion& completion) {
  const bool pushed = port_.producers[producer].completions.TryPush(completion);
  CHECK(pushed, "the completion ring has room for every slot");
}

// False when the ring holds too much already.
bool Shard::Notify(ProducerId producer, const Completion& completion) {
  if (port_.producers[producer.value()].completions.Depth() >= kNoticeRoom) return false;
  Complete(producer.value(), completion);
  return true;
}

uint32_t Shard::FindSpaceIndex(std::string_view name) const {
  const SpaceEntry* entry = port_.catalogue->Find(name);
  return entry == nullptr || entry->is_dropping() ? kNoNode : space_of_entry_[entry->index()];
}

const Space* Shard::FindSpace(std::string_view name) const {
  const uint32_t index = FindSpaceIndex(name);
  return index == kNoNode ? nullptr : spaces_[index].get();
}

Result<void> Shard::CheckInvariants() const {
  for (const auto& space : spaces_) {
    if (auto sound = space->CheckInvariants(); !sound) return sound;
  }
  return {};
}

std::string_view ShardCounterName(ShardCounter counter) {
  static constexpr std::array<std::string_view, static_cast<size_t>(ShardCounter::kCount)> kNames =
      {"observations_stored",
       "observations_deleted",
       "observations_skipped",
       "observations_refused",
       "observations_linked",
       "observations_forwarded",
       "forwards_under_way",
       "spaces_grown",
       "recalls",
       "recall_distances",
       "recall_vectors",
       "recall_bytes",
       "link_distances",
       "observations_swept",
       "sweep_distances",
       "spaces",
       "sessions",
       "memory_used_bytes",
       "memory_limit_bytes",
       "log_bytes_written",
       "log_commits",
       "log_errors",
       "log_unsettled_bytes",
       "observations_expired",
       "observations_evicted",
       "rebuild_left"};
  return kNames[static_cast<size_t>(counter)];
}

void Shard::AddCounters(std::string_view core, CounterCatalogue* catalogue) const {
  for (size_t i = 0; i < static_cast<size_t>(ShardCounter::kCount); ++i) {
    const auto which = static_cast<ShardCounter>(i);
    catalogue->push_back({std::string(core), ShardCounterName(which), &counters_[which]});
  }
}

}  // namespace engram
