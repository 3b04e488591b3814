#include "src/core/space_catalogue.h"

#include <algorithm>
#include <bit>

#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

namespace {

// Fixed: the answers may not differ between two starts of the daemon.
constexpr uint64_t kRoutingSeed = 0x656E6772616D0001;
constexpr uint64_t kIdSeed = 0x656E6772616D0002;

uint64_t DrawOf(uint64_t name_hash, uint16_t shard) {
  return MixBits(name_hash ^ MixBits(shard + uint64_t{1}));
}

// The highest draws, best first; the lower shard among equal ones. A selection, as the lists are
// short and nothing may be allocated.
void RankInto(std::string_view space, uint16_t shards, std::span<ShardId> ranking) {
  const uint64_t name = HashString(space, kRoutingSeed);
  uint64_t bound_draw = 0;
  uint16_t bound_shard = 0;
  for (size_t place = 0; place < ranking.size(); ++place) {
    bool found = false;
    uint64_t best_draw = 0;
    uint16_t best = 0;
    for (uint16_t shard = 0; shard < shards; ++shard) {
      const uint64_t draw = DrawOf(name, shard);
      const bool taken =
          place > 0 && (draw > bound_draw || (draw == bound_draw && shard <= bound_shard));
      if (taken || (found && draw <= best_draw)) continue;
      found = true;
      best_draw = draw;
      best = shard;
    }
    ranking[place] = ShardId(best);
    bound_draw = best_draw;
    bound_shard = best;
  }
}

}  // namespace

bool SpaceEntry::FixDimension(uint16_t dimension, uint32_t generation) {
  CHECK(dimension > 0, "0 says that a dimension is open");
  State known = Load();
  while (known.generation == generation && known.dimension == 0) {
    State fixed = known;
    fixed.dimension = dimension;
    if (state_.compare_exchange_weak(known, fixed, std::memory_order_acq_rel,
                                     std::memory_order_acquire)) {
      return true;
    }
  }
  return known.generation != generation || known.dimension == dimension;
}

bool SpaceEntry::Grow(uint16_t from, uint32_t generation) {
  if (uint32_t{from} * 2 > max_partitions()) return false;
  State known = Load();
  while (known.generation == generation && known.partitions == from) {
    State grown = known;
    grown.partitions = static_cast<uint16_t>(from * 2);
    if (state_.compare_exchange_weak(known, grown, std::memory_order_acq_rel,
                                     std::memory_order_acquire)) {
      return true;
    }
  }
  return false;
}

bool SpaceEntry::BeginDrop() {
  if (is_vacant() || dropping_.exchange(true, std::memory_order_acq_rel)) return false;
  // Read by nobody before the shards are asked.
  joined_.store(0, std::memory_order_relaxed);
  finished_.store(0, std::memory_order_relaxed);
  drop_stamp_.store(kNoStamp, std::memory_order_relaxed);
  return true;
}

// The last of the stamps that differ in the shard alone: a file can then leave out these bits.
void SpaceEntry::JoinDrop(CommitStamp stamp) {
  const CommitStamp end = stamp | ((CommitStamp{1} << kStampShardBits) - 1);
  CommitStamp latest = drop_stamp_.load(std::memory_order_relaxed);
  while (latest < end && !drop_stamp_.compare_exchange_weak(latest, end)) {
  }
  joined_.fetch_add(1, std::memory_order_acq_rel);
}

void SpaceEntry::FinishDrop(uint16_t shards) {
  if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == shards) {
    dropping_.store(false, std::memory_order_release);
  }
}

SpaceEntry::Use SpaceEntry::TotalUse() const {
  Use total;
  const uint16_t count = partitions();
  for (uint16_t p = 0; p < count; ++p) {
    total.observations += use_[p].observations.load(std::memory_order_relaxed);
    total.bytes += use_[p].bytes.load(std::memory_order_relaxed);
  }
  return total;
}

uint16_t SpaceEntry::PartitionIn(ShardId shard) const {
  const auto found = std::ranges::find(shards_, shard);
  return found == shards_.end() ? kNoPartition : static_cast<uint16_t>(found - shards_.begin());
}

SpaceCatalogue::SpaceCatalogue(uint32_t max_spaces, uint16_t shards, uint16_t max_partitions,
                               const SpaceSettings& defaults, uint64_t seed)
    : max_spaces_(max_spaces),
      shards_(shards),
      max_partitions_(max_partitions),
      seed_(MixBits(seed)),
      mask_(std::bit_ceil(2 * max_spaces) - 1),
      defaults_(defaults),
      entries_(std::make_unique<SpaceEntry[]>(max_spaces)),
      shard_lists_(std::make_unique<ShardId[]>(size_t{max_spaces} * max_partitions)),
      table_(std::make_unique<std::atomic<uint32_t>[]>(size_t{mask_} + 1)) {
  CHECK(max_spaces > 0 && max_spaces <= (1u << 30), "space limit out of range");
  CHECK(max_partitions > 0 && max_partitions <= shards, "a shard holds one partition of a space");
  if (defaults_.metric == Metric::kUnspecified) defaults_.metric = Metric::kCosine;
  if (defaults_.precision == Precision::kUnspecified) defaults_.precision = Precision::kF32;
  if (defaults_.durability == Durability::kUnspecified) defaults_.durability = Durability::kFsync;
  if (defaults_.partitions == 0) defaults_.partitions = 1;
  if (defaults_.filter_keys == nullptr) {
    defaults_.filter_keys = std::make_shared<const std::vector<std::string>>(
        kDefaultFilterKeys.begin(), kDefaultFilterKeys.end());
  }
  CHECK(defaults_.partitions <= max_partitions, "more partitions than a space may have");
}

SpaceEntry* SpaceCatalogue::Configure(std::string_view name, const SpaceSettings& settings) {
  const std::lock_guard lock(mutex_);
  CHECK(Find(name) == nullptr, "a space is configured once");
  SpaceSettings full = settings;
  if (full.metric == Metric::kUnspecified) full.metric = defaults_.metric;
  if (full.precision == Precision::kUnspecified) full.precision = defaults_.precision;
  if (full.durability == Durability::kUnspecified) full.durability = defaults_.durability;
  if (full.dimension == 0) full.dimension = defaults_.dimension;
  if (full.partitions == 0) full.partitions = defaults_.partitions;
  if (full.filter_keys == nullptr) full.filter_keys = defaults_.filter_keys;
  SpaceEntry* entry = AddLocked(name, full);
  if (entry != nullptr) entry->configured_ = true;
  return entry;
}

SpaceEntry* SpaceCatalogue::Find(std::string_view name) const {
  SpaceEntry* entry = FindAny(name);
  return entry == nullptr || entry->is_vacant() ? nullptr : entry;
}

SpaceEntry* SpaceCatalogue::FindAny(std::string_view name) const {
  for (uint32_t place = FirstPlaceOf(name);; place = (place + 1) & mask_) {
    const uint32_t found = table_[place].load(std::memory_order_acquire);
    if (found == 0) return nullptr;
    SpaceEntry& entry = entries_[found - 1];
    if (entry.name() == name) return &entry;
  }
}

SpaceEntry* SpaceCatalogue::At(uint32_t index) const {
  CHECK(index < size(), "no such space");
  return &entries_[index];
}

SpaceEntry* SpaceCatalogue::FindOrAdd(std::string_view name, Metric metric) {
  if (SpaceEntry* known = Find(name); known != nullptr) return known;
  const std::lock_guard lock(mutex_);
  SpaceEntry* known = FindAny(name);
  // Not before all have let go of what it was.
  if (known != nullptr && (!known->is_vacant() || known->is_dropping())) return known;
  SpaceSettings settings = defaults_;
  if (metric != Metric::kUnspecified) settings.metric = metric;
  if (known == nullptr) return AddLocked(name, settings);
  BeginGenerationLocked(known, settings);
  known->vacant_.store(false, std::memory_order_release);
  return known;
}

Result<SpaceEntry*> SpaceCatalogue::Restore(std::string_view name,
                                            const SpaceDefinition& definition, CommitStamp birth) {
  const auto within = [this](uint16_t count) {
    return std::min(std::max<uint16_t>(count, 1), max_partitions_);
  };
  const std::lock_guard lock(mutex_);
  const bool was_dropped = definition.metric == Metric::kUnspecified;
  SpaceSettings settings = defaults_;
  if (!was_dropped) {
    settings.metric = definition.metric;
    settings.precision = definition.precision;
    settings.durability = definition.durability;
    settings.dimension = definition.dimension;
    settings.partitions = within(definition.first_partitions());
  }
  SpaceEntry* entry = FindAny(name);
  if (entry == nullptr) {
    entry = AddLocked(name, settings);
    if (entry != nullptr) {
      entry->birth_.store(birth, std::memory_order_release);
      entry->vacant_.store(was_dropped, std::memory_order_release);
    }
  }
  const std::string what = "space " + std::string(name);
  if (entry == nullptr) {
    return Fail(ErrorCode::kResourceExhausted,
                what + ": is beyond limits.max_spaces = " + std::to_string(max_spaces_) +
                    "; the data directory has more spaces than that");
  }
  if (birth < entry->birth()) return entry;
  EndIncarnationLocked(entry, birth);
  if (was_dropped) return entry;
  if (entry->is_vacant()) {
    BeginGenerationLocked(entry, settings);
    entry->vacant_.store(false, std::memory_order_release);
  }
  if (entry->metric() != definition.metric) {
    return Fail(ErrorCode::kInvalidArgument,
                what + ": is configured with metric " + std::string(MetricName(entry->metric())) +
                    ", and what the data directory has of it is of metric " +
                    std::string(MetricName(definition.metric)) + "; write that one");
  }
  if (definition.dimension != 0 && !entry->FixDimension(definition.dimension)) {
    return Fail(ErrorCode::kInvalidArgument,
                what + ": is configured with dimension " + std::to_string(entry->dimension()) +
                    ", and what the data directory has of it is of dimension " +
                    std::to_string(definition.dimension) + "; write that one");
  }
  const uint16_t partitions = within(definition.partitions);
  for (uint16_t seen = entry->partitions(); seen < partitions; seen = entry->partitions()) {
    if (uint32_t{seen} * 2 > max_partitions_) break;
    entry->Grow(seen);
  }
  return entry;
}

void SpaceCatalogue::EndIncarnation(SpaceEntry* entry, CommitStamp stamp) {
  const std::lock_guard lock(mutex_);
  EndIncarnationLocked(entry, stamp);
}

void SpaceCatalogue::EndIncarnationLocked(SpaceEntry* entry, CommitStamp stamp) {
  if (stamp <= entry->birth()) return;
  entry->birth_.store(stamp, std::memory_order_release);
  if (!entry->configured_) entry->vacant_.store(true, std::memory_order_release);
  BeginGenerationLocked(entry, entry->configured_ ? entry->settings_ : defaults_);
}

// The state goes last: it publishes the generation.
void SpaceCatalogue::BeginGenerationLocked(SpaceEntry* entry, const SpaceSettings& settings) {
  entry->metric_.store(settings.metric, std::memory_order_relaxed);
  entry->precision_.store(settings.precision, std::memory_order_relaxed);
  entry->durability_.store(settings.durability, std::memory_order_relaxed);
  entry->first_partitions_.store(settings.partitions, std::memory_order_relaxed);
  entry->state_.store({.generation = entry->generation() + 1,
                       .dimension = settings.dimension,
                       .partitions = settings.partitions},
                      std::memory_order_release);
  generations_ended_.fetch_add(1, std::memory_order_release);
}

uint64_t SpaceCatalogue::HashOfId(std::string_view id) { return HashString(id, kIdSeed); }

std::vector<ShardId> SpaceCatalogue::RankShards(std::string_view space, uint16_t shards,
                                                uint16_t count) {
  CHECK(count <= shards, "a shard comes once");
  std::vector<ShardId> ranking(count);
  RankInto(space, shards, ranking);
  return ranking;
}

ShardId SpaceCatalogue::FirstShard(std::string_view space) const {
  ShardId first;
  RankInto(space, shards_, std::span(&first, 1));
  return first;
}

uint32_t SpaceCatalogue::FirstPlaceOf(std::string_view name) const {
  return static_cast<uint32_t>(HashString(name, seed_)) & mask_;
}

// The entry, then the size, then its place in the table: whoever finds it by either finds it whole,
// and an index that was found by name is always below the size.
SpaceEntry* SpaceCatalogue::AddLocked(std::string_view name, const SpaceSettings& settings) {
  CHECK(IsValidSpaceName(name), "a space's name is checked before");
  CHECK(settings.partitions <= max_partitions_, "more partitions than a space may have");
  const uint32_t index = size_.load(std::memory_order_relaxed);
  if (index == max_spaces_) return nullptr;
  SpaceEntry& entry = entries_[index];
  name.copy(entry.name_.data(), entry.name_.size());
  entry.name_bytes_ = static_cast<uint8_t>(name.size());
  entry.index_ = index;
  entry.settings_ = settings;
  entry.metric_ = settings.metric;
  entry.precision_ = settings.precision;
  entry.durability_ = settings.durability;
  entry.ttl_ns_ = settings.ttl_ns;
  entry.quota_observations_ = settings.quota_observations;
  entry.quota_bytes_ = settings.quota_bytes;
  entry.when_full_ = settings.when_full;
  if (settings.quota_observations > 0 || settings.quota_bytes > 0) {
    entry.use_ = std::make_unique<SpaceEntry::PartitionUse[]>(max_partitions_);
  }
  entry.first_partitions_ = settings.partitions;
  entry.state_.store(
      {.generation = 0, .dimension = settings.dimension, .partitions = settings.partitions},
      std::memory_order_relaxed);
  const std::span<ShardId> list(&shard_lists_[size_t{index} * max_partitions_], max_partitions_);
  RankInto(name, shards_, list);
  entry.shards_ = list;
  uint32_t place = FirstPlaceOf(name);
  while (table_[place].load(std::memory_order_relaxed) != 0) place = (place + 1) & mask_;
  size_.store(index + 1, std::memory_order_release);
  table_[place].store(index + 1, std::memory_order_release);
  return &entry;
}

}  // namespace engram
