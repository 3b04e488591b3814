#include "perf/streaming_feed.h"

#include <cstring>
#include <optional>
#include <utility>

#include "dataplane/ring_mesh.h"
#include "perf/bench_support.h"
#include "perf/shard_on_disk.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/space_catalogue.h"
#include "src/core/topology.h"

namespace engram {

namespace {

constexpr int kBurst = 32;
constexpr size_t kMostRecallsUnderWay = 256;
constexpr size_t kDueRing = size_t{1} << 16;
constexpr int64_t kChoreEveryNs = kNanosPerMilli;

SpaceSettings SettingsOf(const FeedOptions& options) {
  SpaceSettings settings;
  settings.metric = options.space.metric;
  settings.precision = options.space.precision;
  settings.dimension = static_cast<uint16_t>(options.space.dimension);
  settings.partitions = 1;
  settings.durability = options.folder.empty() ? Durability::kMemory : Durability::kFsync;
  return settings;
}

// A shard without a log, and what sends to it.
struct InMemory {
  InMemory(const FeedOptions& options, Clock* clock) : catalogue(4, 1, 1, {}) {
    CHECK(catalogue.Configure(StreamingFeed::kSpaceName, SettingsOf(options)) != nullptr,
          "there is room for a space");
    mesh.emplace(Must(RingMesh::Create(
        {.producer_numa_node = {}, .shard_numa_node = {}, .catalogue = &catalogue})));
    producer.emplace(mesh->TakeProducer(ProducerId(0)));
    shard = Must(Shard::Create(options.shard, clock, mesh->TakeShard(ShardId(0))));
  }
  SpaceCatalogue catalogue;
  std::optional<RingMesh> mesh;
  std::optional<ShardProducer> producer;
  std::unique_ptr<Shard> shard;
};

ShardOnDiskOptions OnDisk(const FeedOptions& options) {
  ShardOnDiskOptions setup;
  setup.folder = options.folder;
  setup.space = StreamingFeed::kSpaceName;
  setup.settings = SettingsOf(options);
  setup.segment_bytes = 64U << 20;
  setup.shard = options.shard;
  return setup;
}

uint64_t DueBy(int64_t elapsed_ns, double per_s) {
  return static_cast<uint64_t>(per_s * static_cast<double>(elapsed_ns) / kNanosPerSecond);
}
// When DueBy says one more than `which`.
int64_t DueAt(uint64_t which, double per_s) {
  return static_cast<int64_t>(static_cast<double>(which + 1) * kNanosPerSecond / per_s);
}

}  // namespace

struct StreamingFeed::Place {
  SystemClock clock;
  std::optional<InMemory> in_memory;
  std::optional<ShardOnDisk> on_disk;
};

StreamingFeed::StreamingFeed(const FeedOptions& options, const FedRows& rows,
                             const VectorSet& queries)
    : options_(options),
      rows_(rows),
      queries_(queries),
      place_(std::make_unique<Place>()),
      row_(queries.dimension()),
      due_of_(kDueRing) {
  if (options.folder.empty()) {
    place_->in_memory.emplace(options, &place_->clock);
    shard_ = place_->in_memory->shard.get();
    producer_ = &*place_->in_memory->producer;
  } else {
    place_->on_disk.emplace(OnDisk(options));
    shard_ = &place_->on_disk->shard();
    producer_ = &place_->on_disk->producer();
  }
  producer_->Open(kSpaceName, shard_);
  // Touched ahead, as the control plane does it, but at once: nothing waits for pages later.
  while (shard_->PrefaultAhead(options.shard.memory_limit_bytes, size_t{1} << 30) > 0) {
  }
  Must(PinThisThread(options.feed_processor));
  thread_ = std::thread([this] { RunShard(); });
}

StreamingFeed::~StreamingFeed() {
  stops_.store(true);
  thread_.join();
}

void StreamingFeed::RunShard() {
  Must(PinThisThread(options_.shard_processor));
  while (!stops_.load(std::memory_order_relaxed)) {
    if (wants_rest_.load(std::memory_order_acquire)) {
      rests_.store(true, std::memory_order_release);
      while (wants_rest_.load(std::memory_order_acquire)) std::this_thread::yield();
      rests_.store(false, std::memory_order_release);
    }
    LatencyHistogram* const slices = slices_.load(std::memory_order_acquire);
    const int64_t before_ns = slices == nullptr ? 0 : ThreadCpuNs();
    const int work = shard_->Poll();
    if (slices != nullptr && work > 0) slices->Record(ThreadCpuNs() - before_ns);
  }
}

void StreamingFeed::WithShardAtRest(const std::function<void(const Shard&)>& work) {
  wants_rest_.store(true, std::memory_order_release);
  while (!rests_.load(std::memory_order_acquire)) std::this_thread::yield();
  work(*shard_);
  wants_rest_.store(false, std::memory_order_release);
  while (rests_.load(std::memory_order_acquire)) std::this_thread::yield();
}

uint64_t StreamingFeed::backlog() {
  uint64_t unlinked = 0;
  WithShardAtRest([&unlinked](const Shard& shard) {
    unlinked = shard.FindSpace(kSpaceName)->unlinked_count();
  });
  return unlinked;
}

// Looks now and then, as each look stops the shard.
bool StreamingFeed::IsDrained() {
  constexpr int64_t kLookEveryNs = 20 * kNanosPerMilli;
  const int64_t now_ns = place_->clock.MonotonicNs();
  if (now_ns < next_look_ns_) return false;
  next_look_ns_ = now_ns + kLookEveryNs;
  return backlog() == 0;
}

StreamingFeed::Counts StreamingFeed::CountsNow() const {
  const auto read = [this](ShardCounter which) { return shard_->counter(which).Read(); };
  return {.acked = producer_->acked(),
          .linked = read(ShardCounter::kObservationsLinked),
          .vectors = read(ShardCounter::kRecallVectors),
          .bytes = read(ShardCounter::kRecallBytes)};
}

std::unique_ptr<FeedPhase> StreamingFeed::Run(const Schedule& schedule) {
  auto phase = std::make_unique<FeedPhase>();
  Clock& clock = place_->clock;
  const Counts before = CountsNow();
  if (options_.times_slices) slices_.store(&phase->slice, std::memory_order_release);
  const bool closed = schedule.observations_per_s == kAsCreditAllows;
  const uint64_t first_sent = producer_->sent();
  uint64_t recalls_due = 0;
  sample_due_ = 0;
  const int64_t start_ns = clock.MonotonicNs();
  int64_t next_chore_ns = start_ns;
  int64_t now_ns = start_ns;
  for (;; now_ns = clock.MonotonicNs()) {
    const int64_t elapsed_ns = now_ns - start_ns;
    const bool is_over = schedule.seconds > 0
                             ? static_cast<double>(elapsed_ns) >= schedule.seconds * kNanosPerSecond
                             : schedule.is_done();
    if (is_over) break;
    phase->due = closed ? UINT64_MAX : DueBy(elapsed_ns, schedule.observations_per_s);
    for (int i = 0; i < kBurst && producer_->MaySend(); ++i) {
      const uint64_t which = producer_->sent() - first_sent;
      if (which >= phase->due) break;
      SendObservation(closed ? now_ns : start_ns + DueAt(which, schedule.observations_per_s));
    }
    if (DueBy(elapsed_ns, schedule.recalls_per_s) > recalls_due &&
        SendRecall(start_ns + DueAt(recalls_due, schedule.recalls_per_s), schedule)) {
      ++recalls_due;
    }
    TakeAnswers(phase.get());
    if (place_->on_disk && now_ns >= next_chore_ns) {
      place_->on_disk->PollControl();
      next_chore_ns = now_ns + kChoreEveryNs;
    }
    __builtin_ia32_pause();
  }
  phase->seconds = static_cast<double>(now_ns - start_ns) / kNanosPerSecond;
  while (!under_way_.empty() || producer_->acked() < producer_->sent()) TakeAnswers(phase.get());
  slices_.store(nullptr, std::memory_order_release);
  const Counts after = CountsNow();
  phase->accepted = after.acked - before.acked;
  phase->linked = after.linked - before.linked;
  phase->recall_vectors = after.vectors - before.vectors;
  phase->recall_bytes = after.bytes - before.bytes;
  phase->backlog = backlog();
  phase->memory_bytes = shard_->counter(ShardCounter::kMemoryUsedBytes).Read();
  // The shard's thread has let go of the histogram.
  WithShardAtRest([](const Shard&) {});
  return phase;
}

void StreamingFeed::Preload(uint64_t observations) {
  const uint64_t wanted = producer_->sent() + observations;
  Run({.observations_per_s = kAsCreditAllows,
       .is_done = [this, wanted] { return producer_->sent() >= wanted; }});
  Drain();
}

void StreamingFeed::Drain() {
  Run({.is_done = [this] { return IsDrained(); }});
}

void StreamingFeed::SendObservation(int64_t due_ns) {
  const uint64_t number = producer_->sent();
  rows_.Make(number, row_);
  due_of_[number % kDueRing] = due_ns;
  (void)producer_->Observe(rows_.IdOf(number), row_, 0, due_ns);
}

// False when too many are under way.
bool StreamingFeed::SendRecall(int64_t due_ns, const Schedule& schedule) {
  if (under_way_.size() >= kMostRecallsUnderWay) return false;
  const uint64_t id = recalls_sent_;
  UnderWay asked{.due_ns = due_ns, .is_sampled = false, .recall = {}};
  asked.recall.query = id % queries_.size();
  asked.recall.lived = producer_->acked();
  const bool asks_for_own =
      schedule.own_every > 0 && id % schedule.own_every == 0 && producer_->acked() > 0;
  if (asks_for_own) {
    const uint64_t latest = producer_->acked() - 1;
    asked.recall.own = rows_.IdOf(latest);
    rows_.Make(latest, row_);
  } else if (schedule.samples > 0) {
    // Evenly over the phase, as far as recalls come evenly.
    sample_due_ += static_cast<double>(schedule.samples) /
                   (schedule.recalls_per_s * std::max(schedule.seconds, 1.0));
    asked.is_sampled = sample_due_ >= 1;
    if (asked.is_sampled) sample_due_ -= 1;
  }
  const std::span<const float> query =
      asks_for_own ? std::span<const float>(row_) : queries_[asked.recall.query];
  if (!producer_->Recall(query, options_.k, due_ns, {.request_id = id})) return false;
  under_way_.emplace(id, std::move(asked));
  ++recalls_sent_;
  return true;
}

void StreamingFeed::TakeAnswers(FeedPhase* phase) {
  producer_->TakeAnswers([this](uint64_t id, const std::byte* slot) { TakeHits(id, slot); },
                         [this, phase](uint64_t id, RefusalReason reason) {
                           CHECK(reason == RefusalReason::kNone, "no recall is refused");
                           const auto found = under_way_.find(id);
                           UnderWay& asked = found->second;
                           phase->recall.Record(place_->clock.MonotonicNs() - asked.due_ns);
                           ++phase->recalls;
                           if (asked.is_sampled || asked.recall.own != kNoId) {
                             phase->sampled.push_back(std::move(asked.recall));
                           }
                           under_way_.erase(found);
                         });
  if (told_ == producer_->acked()) return;
  const int64_t now_ns = place_->clock.MonotonicNs();
  for (; told_ < producer_->acked(); ++told_) {
    phase->visible.Record(now_ns - due_of_[told_ % kDueRing]);
  }
}

void StreamingFeed::TakeHits(uint64_t id, const std::byte* slot) {
  std::vector<uint64_t>* const hits = &under_way_.at(id).recall.hits;
  ShardProducer::ForEachHit(slot, [hits](uint64_t number) { hits->push_back(number); });
}

}  // namespace engram
