#include "perf/streamed_shard.h"

#include <optional>
#include <string_view>
#include <utility>

#include "dataplane/ring_mesh.h"
#include "index/shard.h"
#include "perf/bench_support.h"
#include "perf/shard_producer.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/space_catalogue.h"

namespace engram {

namespace {

constexpr std::string_view kSpace = "streamed";
// Beside its vector and links, what an observation may take with the rounding of blocks; what a
// space takes in any case; and what has ended and is not given back yet, at most as many again.
constexpr size_t kRowOverheadBytes = 1'024;
constexpr size_t kFixedBytes = size_t{256} << 20;
constexpr size_t kEndedFactor = 2;
// A rest is one where nothing was done in so many rounds, with so much time passing between two:
// together more than ended ones are kept for recalls of earlier snapshots.
constexpr int kQuietRounds = 64;
constexpr int64_t kQuietNs = 50 * kNanosPerMilli;

// The system's clock, which can be stopped and moved ahead.
class MovableClock final : public Clock {
 public:
  int64_t MonotonicNs() override { return stopped_ns_.value_or(clock_.MonotonicNs() + shift_ns_); }
  int64_t WallNs() override { return wall_ns_ + MonotonicNs(); }
  void PassWallNs(int64_t unix_ns) override {
    if (WallNs() <= unix_ns) wall_ns_ = unix_ns + 1 - MonotonicNs();
  }
  void Advance(int64_t ns) { shift_ns_ += ns; }
  void Stop() { stopped_ns_ = MonotonicNs(); }
  void Start() {
    if (!stopped_ns_) return;
    shift_ns_ = *stopped_ns_ - clock_.MonotonicNs();
    stopped_ns_.reset();
  }

 private:
  SystemClock clock_;
  int64_t shift_ns_ = 0;
  int64_t wall_ns_ = clock_.WallNs() - clock_.MonotonicNs();
  std::optional<int64_t> stopped_ns_;
};

size_t BytesFor(const SpaceOptions& space, size_t observations) {
  // As f32 and as int8, whatever is kept of them.
  const size_t vector_bytes = size_t{space.dimension} * (sizeof(float) + 1);
  const size_t link_bytes = size_t{2} * space.build.M0 * sizeof(NodeId);
  return kFixedBytes + observations * (vector_bytes + link_bytes + kRowOverheadBytes) * 5 / 4;
}

class StreamedShard final : public StreamedIndex {
 public:
  StreamedShard(const SpaceOptions& space, size_t capacity, bool prefaults)
      : catalogue_(1, 1, 1, {}) {
    SpaceSettings settings;
    settings.metric = space.metric;
    settings.precision = space.precision;
    settings.dimension = static_cast<uint16_t>(space.dimension);
    settings.partitions = 1;
    settings.durability = Durability::kMemory;
    CHECK(catalogue_.Configure(kSpace, settings) != nullptr, "there is room for a space");
    mesh_.emplace(Must(RingMesh::Create(
        {.producer_numa_node = {}, .shard_numa_node = {}, .catalogue = &catalogue_})));
    producer_.emplace(mesh_->TakeProducer(ProducerId(0)));
    ShardOptions options;
    options.memory_limit_bytes = BytesFor(space, kEndedFactor * capacity);
    options.traversal = space.traversal;
    options.build = space.build;
    options.seed = space.hash_seed;
    shard_ = Must(Shard::Create(options, &clock_, mesh_->TakeShard(ShardId(0))));
    if (prefaults) {
      const size_t bytes = BytesFor(space, capacity);
      (void)shard_->PrefaultAhead(bytes, bytes);
    }
    producer_->Open(kSpace, shard_.get());
  }

  bool Send(const Mutation& mutation, const VectorSet& base) override {
    if (!producer_->MaySend()) return false;
    const int64_t now_ns = clock_.MonotonicNs();
    if (mutation.row == kNoRow) return producer_->Delete(mutation.tag, now_ns);
    return producer_->Observe(mutation.tag, base[static_cast<size_t>(mutation.row)], 0, now_ns);
  }
  uint64_t visible() const override { return producer_->acked(); }

  bool Ask(const VectorSet& queries, size_t query, uint32_t k, uint32_t ef) override {
    CHECK(!asked_, "one recall at a time");
    asked_ = producer_->Recall(queries[query], k, clock_.MonotonicNs(), {.ef = ef});
    answered_ = false;
    hits_.clear();
    return asked_;
  }
  bool TakeAnswer(std::vector<int64_t>* tags) override {
    if (!answered_) return false;
    asked_ = answered_ = false;
    tags->swap(hits_);
    return true;
  }

  void Poll() override { (void)Round(); }

  void Rest() override {
    for (int quiet = 0; quiet < kQuietRounds; ++quiet) {
      if (Round() > 0) {
        quiet = -1;
      } else {
        clock_.Advance(kQuietNs);
      }
    }
  }

  Waiting waiting() const override {
    const Space& space = *shard_->FindSpace(kSpace);
    return {.unlinked = space.live() - space.linked(),
            .retired = space.retired(),
            .linked_ever = shard_->counter(ShardCounter::kObservationsLinked).Read()};
  }
  void StopClock() override { clock_.Stop(); }
  void StartClock() override { clock_.Start(); }
  void CheckSound() const override { Must(shard_->CheckInvariants()); }

 private:
  int Round() {
    const int work = shard_->Poll();
    producer_->TakeAnswers([this](uint64_t, const std::byte* slot) { TakeHits(slot); },
                           [this](uint64_t, RefusalReason reason) {
                             CHECK(reason == RefusalReason::kNone, "a recall was refused");
                             answered_ = true;
                           });
    return work;
  }

  void TakeHits(const std::byte* slot) {
    ShardProducer::ForEachHit(
        slot, [this](uint64_t number) { hits_.push_back(static_cast<int64_t>(number)); });
  }

  MovableClock clock_;
  SpaceCatalogue catalogue_;
  std::optional<RingMesh> mesh_;
  std::optional<ShardProducer> producer_;
  std::unique_ptr<Shard> shard_;
  std::vector<int64_t> hits_;
  bool asked_ = false;
  bool answered_ = false;
};

}  // namespace

std::unique_ptr<StreamedIndex> MakeStreamedShard(const SpaceOptions& space, size_t capacity,
                                                 bool prefaults) {
  return std::make_unique<StreamedShard>(space, capacity, prefaults);
}

}  // namespace engram
