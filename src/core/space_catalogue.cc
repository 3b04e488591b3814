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

bool SpaceEntry::FixDimension(uint16_t dimension) {
  CHECK(dimension > 0, "0 says that a dimension is open");
  uint16_t known = 0;
  return dimension_.compare_exchange_strong(known, dimension, std::memory_order_acq_rel,
                                            std::memory_order_acquire) ||
         known == dimension;
}

bool SpaceEntry::Grow(uint16_t from) {
  if (uint32_t{from} * 2 > max_partitions()) return false;
  return partitions_.compare_exchange_strong(from, static_cast<uint16_t>(from * 2),
                                             std::memory_order_acq_rel);
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
  return AddLocked(name, full);
}

SpaceEntry* SpaceCatalogue::Find(std::string_view name) const {
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
  if (SpaceEntry* known = Find(name); known != nullptr) return known;
  SpaceSettings settings = defaults_;
  if (metric != Metric::kUnspecified) settings.metric = metric;
  return AddLocked(name, settings);
}

Result<SpaceEntry*> SpaceCatalogue::Restore(std::string_view name,
                                            const SpaceDefinition& definition) {
  const auto within = [this](uint16_t count) {
    return std::min(std::max<uint16_t>(count, 1), max_partitions_);
  };
  SpaceEntry* entry = Find(name);
  if (entry == nullptr) {
    const std::lock_guard lock(mutex_);
    entry = Find(name);
    if (entry == nullptr) {
      SpaceSettings settings = defaults_;
      settings.metric = definition.metric;
      settings.precision = definition.precision;
      settings.durability = definition.durability;
      settings.dimension = definition.dimension;
      settings.partitions = within(definition.first_partitions());
      entry = AddLocked(name, settings);
    }
  }
  const std::string what = "space " + std::string(name);
  if (entry == nullptr) {
    return Fail(ErrorCode::kResourceExhausted,
                what + ": is beyond limits.max_spaces = " + std::to_string(max_spaces_) +
                    "; the data directory has more spaces than that");
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
  entry.dimension_.store(settings.dimension, std::memory_order_relaxed);
  entry.partitions_.store(settings.partitions, std::memory_order_relaxed);
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
