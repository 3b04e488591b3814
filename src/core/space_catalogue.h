#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/commit_stamp.h"
#include "src/core/ids.h"
#include "src/core/observation.h"
#include "src/core/result.h"
#include "src/core/spsc_ring.h"

namespace engram {

// What becomes of an observation for which its space's quota has no room.
enum class WhenFull : uint8_t {
  kRefuse = 1,
  kEvictOldest = 2,  // it is taken, and the oldest one ends
};

// Attributes that recalls may filter by in a space of which nobody says otherwise, beside those
// that every space has (attributes.h).
inline constexpr std::array<std::string_view, 2> kDefaultFilterKeys = {"source", "category"};

// What an operator says of a space beforehand; 0, kUnspecified and nullptr leave it open.
struct SpaceSettings {
  Metric metric = Metric::kUnspecified;
  Precision precision = Precision::kUnspecified;
  Durability durability = Durability::kUnspecified;
  uint16_t dimension = 0;
  uint16_t partitions = 0;
  // Beside those that every space has; at most kMaxFilterKeys, each once and IsValidFilterKey.
  // Shared, so that making a space copies nothing.
  std::shared_ptr<const std::vector<std::string>> filter_keys = {};
  // Not filled from the defaults of spaces that were not configured.
  int64_t ttl_ns = 0;               // an observation ends when it is so old; 0: never
  uint64_t quota_observations = 0;  // over all partitions; 0: no bound
  uint64_t quota_bytes = 0;         // likewise, of memory
  WhenFull when_full = WhenFull::kRefuse;
};

// What a log or a checkpoint says of a space. Stored: unchangeable.
struct SpaceDefinition {
  Metric metric = Metric::kUnspecified;
  Precision precision = Precision::kUnspecified;
  Durability durability = Durability::kUnspecified;
  uint8_t growths = 0;     // how often its partitions have doubled
  uint16_t dimension = 0;  // 0: it was open
  uint16_t partitions = 0;

  uint16_t first_partitions() const { return static_cast<uint16_t>(partitions >> growths); }
};
static_assert(sizeof(SpaceDefinition) == 8);

// One memory space, as all cores know it.
//
// A space that is dropped keeps its entry, which begins anew: what has a stamp up to `birth` is of
// an earlier incarnation, and gone everywhere. `generation` tells incarnations apart within a
// process. A drop goes as follows (index/shard_commands.cc):
// 1. Who was asked for it begins it (BeginDrop). From now on nothing is found and nothing taken.
// 2. Each shard, once nothing of the space is under way there, says so with a stamp (JoinDrop).
// 3. When all have, the latest of these stamps ends the incarnation (SpaceCatalogue), and each
// shard
//    logs it and lets go of what it has.
// 4. The last one to have that on stable storage opens the space again (FinishDrop).
//
// Invariants: name, index, TTL, quotas, filter keys and shards never change. Within a generation
// neither do metric, precision and durability; dimension goes from 0 to its value once; partitions
// only grows, by doubling. Birth only rises.
class SpaceEntry {
 public:
  std::string_view name() const { return {name_.data(), name_bytes_}; }
  uint32_t index() const { return index_; }
  Metric metric() const { return metric_.load(std::memory_order_relaxed); }
  Precision precision() const { return precision_.load(std::memory_order_relaxed); }
  Durability durability() const { return durability_.load(std::memory_order_relaxed); }
  int64_t ttl_ns() const { return ttl_ns_; }
  uint64_t quota_observations() const { return quota_observations_; }
  uint64_t quota_bytes() const { return quota_bytes_; }
  WhenFull when_full() const { return when_full_; }
  // The keys of attributes that are kept for filters, beside those that every space has.
  std::span<const std::string> filter_keys() const { return *settings_.filter_keys; }
  bool has_quota() const { return use_ != nullptr; }
  bool evicts() const { return has_quota() && when_full_ == WhenFull::kEvictOldest; }
  // Its observations have to be known by age.
  bool ends_by_age() const { return ttl_ns_ > 0 || evicts(); }
  SpaceDefinition Definition() const {
    const uint16_t now = partitions();
    return {
        .metric = metric(),
        .precision = precision(),
        .durability = durability(),
        .growths = static_cast<uint8_t>(std::bit_width(now) - std::bit_width(first_partitions())),
        .dimension = dimension(),
        .partitions = now};
  }
  // 0 until the first observation.
  uint16_t dimension() const { return Load().dimension; }
  // Settles the dimension (not 0) if it is open. False when it is another one. True, and nothing
  // changes, where the generation is over that it is meant for.
  bool FixDimension(uint16_t dimension) { return FixDimension(dimension, generation()); }
  bool FixDimension(uint16_t dimension, uint32_t generation);

  uint16_t partitions() const { return Load().partitions; }
  // Partitions that the space began with: ids were never placed by fewer.
  uint16_t first_partitions() const { return first_partitions_.load(std::memory_order_relaxed); }
  // From `from` to twice as many. False when that is more than max_partitions(), someone else did
  // it first, or the generation is over that it is meant for.
  bool Grow(uint16_t from) { return Grow(from, generation()); }
  bool Grow(uint16_t from, uint32_t generation);

  // Rises with each incarnation, and when the next one is first used. Whoever has read it sees that
  // generation's birth, metric, precision, durability and first_partitions, or later ones.
  uint32_t generation() const { return Load().generation; }
  CommitStamp birth() const { return birth_.load(std::memory_order_acquire); }
  // Dropped, and not used again: as if it had never been.
  bool is_vacant() const { return vacant_.load(std::memory_order_acquire); }

  // A drop is under way: the space is neither read nor written.
  bool is_dropping() const { return dropping_.load(std::memory_order_acquire); }
  // 1. False where one is under way, or nothing is there.
  bool BeginDrop();
  // 2. All that the shard has taken for the space has an earlier stamp.
  void JoinDrop(CommitStamp stamp);
  bool AllJoined(uint16_t shards) const {
    return joined_.load(std::memory_order_acquire) == shards;
  }
  // Once all have joined: the end of the incarnation.
  CommitStamp drop_stamp() const { return drop_stamp_.load(std::memory_order_relaxed); }
  // 4. Each of `shards` says it once.
  void FinishDrop(uint16_t shards);

  // False where a rebuild is under way, in some shard. Each of `shards` ends its part of it once.
  bool BeginRebuild(uint16_t shards) {
    uint16_t none = 0;
    return rebuilding_.compare_exchange_strong(none, shards, std::memory_order_relaxed);
  }
  void FinishRebuild() { rebuilding_.fetch_sub(1, std::memory_order_relaxed); }

  uint16_t max_partitions() const { return static_cast<uint16_t>(shards_.size()); }

  // Where partition `partition` lives. Which partition an id is of: PartitionOf(hash, partitions).
  ShardId ShardOf(uint16_t partition) const { return shards_[partition]; }
  // The partition that lives in `shard`, also while there are fewer; kNoPartition: none ever does.
  static constexpr uint16_t kNoPartition = UINT16_MAX;
  uint16_t PartitionIn(ShardId shard) const;
  // The home of a new session: the partitions in turn.
  ShardId NextHome() {
    return shards_[sessions_dealt_.fetch_add(1, std::memory_order_relaxed) % partitions()];
  }

  // Of what quotas bound. Only with has_quota().
  struct Use {
    uint64_t observations = 0;
    uint64_t bytes = 0;
  };
  // Each partition's shard says what it has; `partition` is below max_partitions().
  void PublishUse(uint16_t partition, const Use& use) {
    use_[partition].observations.store(use.observations, std::memory_order_relaxed);
    use_[partition].bytes.store(use.bytes, std::memory_order_relaxed);
  }
  // Of all partitions, as they said last.
  Use TotalUse() const;

 private:
  friend class SpaceCatalogue;

  // alignas: each is written by another core with every observation.
  struct alignas(kFalseSharingBytes) PartitionUse {
    std::atomic<uint64_t> observations{0};
    std::atomic<uint64_t> bytes{0};
  };

  // What changes within a generation, and the generation, at once.
  struct State {
    uint32_t generation = 0;
    uint16_t dimension = 0;
    uint16_t partitions = 1;
  };
  static_assert(sizeof(State) == 8 && std::atomic<State>::is_always_lock_free);
  State Load() const { return state_.load(std::memory_order_acquire); }

  std::array<char, kMaxSpaceNameBytes> name_{};
  uint8_t name_bytes_ = 0;
  bool configured_ = false;
  uint32_t index_ = 0;
  std::atomic<Metric> metric_{Metric::kUnspecified};
  std::atomic<Precision> precision_{Precision::kUnspecified};
  std::atomic<Durability> durability_{Durability::kUnspecified};
  WhenFull when_full_ = WhenFull::kRefuse;
  std::atomic<uint16_t> first_partitions_{1};
  SpaceSettings settings_;  // it began with; a configured one begins with them again
  int64_t ttl_ns_ = 0;
  uint64_t quota_observations_ = 0;
  uint64_t quota_bytes_ = 0;
  std::unique_ptr<PartitionUse[]> use_;  // by partition; nullptr: no quota
  std::span<const ShardId> shards_;      // by partition, all that there may ever be
  std::atomic<State> state_{State()};
  std::atomic<uint32_t> sessions_dealt_{0};
  std::atomic<CommitStamp> birth_{kNoStamp};
  std::atomic<bool> vacant_{false};
  std::atomic<bool> dropping_{false};
  std::atomic<uint16_t> joined_{0};
  std::atomic<uint16_t> finished_{0};
  std::atomic<uint16_t> rebuilding_{0};  // shards that have not ended their part
  std::atomic<CommitStamp> drop_stamp_{kNoStamp};
};

// The partition that owns an id, by the hash of the id. With twice as many partitions an id stays
// or moves to one place, so those that ever owned it are PartitionOf(hash, p) for p = first, 2
// first,
// ... partitions.
constexpr uint16_t PartitionOf(uint64_t id_hash, uint16_t partitions) {
  return static_cast<uint16_t>((id_hash >> 32) % partitions);
}

// Every memory space by name: what it is and where it lives. Read on each hello and each recall,
// written when a space is made. A dropped space keeps its entry until a restart: it waits for the
// name to be used again, and no other space can have it.
//
// Thread safety: any core may call anything. Find and At do not wait; FindOrAdd locks where it
// adds, for a microsecond or so. Takes all its memory at construction. Invariants: entries never
// move and are never removed, so a pointer to one stays good as long as the catalogue; an entry is
// complete before its place in the table is published.
class SpaceCatalogue {
 public:
  // `max_partitions` of a space, 1 to `shards`; `defaults` for spaces that were not configured, its
  // own gaps being filled with cosine, f32, fsync, one partition and kDefaultFilterKeys. `seed`
  // keeps clients from choosing names that collide.
  SpaceCatalogue(uint32_t max_spaces, uint16_t shards, uint16_t max_partitions,
                 const SpaceSettings& defaults, uint64_t seed = 0);

  // Before the cores start: what the configuration says of a space; its gaps are filled from the
  // defaults. It exists from then on. nullptr when there are max_spaces already. The name is valid
  // and new, partitions are at most max_partitions().
  SpaceEntry* Configure(std::string_view name, const SpaceSettings& settings);

  // nullptr when there is none, or it was dropped.
  SpaceEntry* Find(std::string_view name) const;
  // The same, also of one that was dropped.
  SpaceEntry* FindAny(std::string_view name) const;
  // Those of the space, or that it would have if it were made now.
  std::span<const std::string> FilterKeysOf(std::string_view name) const {
    const SpaceEntry* entry = FindAny(name);
    return entry != nullptr ? entry->filter_keys() : std::span(*defaults_.filter_keys);
  }
  // `index` is below size().
  SpaceEntry* At(uint32_t index) const;
  // Adds it with `metric` (kUnspecified: the default) if it is not there. One that is there stays
  // as it is, so the caller compares the metric. nullptr when there are max_spaces already. The
  // name is valid.
  SpaceEntry* FindOrAdd(std::string_view name, Metric metric);
  // A space as it was before a restart: adds it, or, where it was configured, takes over what may
  // change (its partitions). kInvalidArgument where the configuration says another metric or
  // dimension, kResourceExhausted when there are max_spaces already.
  // `birth` of that incarnation. A later one is known already: nothing changes. No metric: it had
  // been dropped.
  Result<SpaceEntry*> Restore(std::string_view name, const SpaceDefinition& definition,
                              CommitStamp birth = kNoStamp);
  // What has a stamp up to `stamp` is gone. Where the birth is as late already nothing changes. A
  // configured space exists again at once, empty.
  void EndIncarnation(SpaceEntry* entry, CommitStamp stamp);
  // A restart. Each shard that has a log begins before any of them polls, and ends once all that it
  // has read is stored, wherever. Incarnations may end by what is read until all have; from then
  // on by drops alone.
  void BeginReplay() { replaying_.fetch_add(1, std::memory_order_relaxed); }
  void EndReplay() { replaying_.fetch_sub(1, std::memory_order_acq_rel); }
  bool is_replaying() const { return replaying_.load(std::memory_order_acquire) > 0; }
  // Counts generations that ended, of all spaces.
  uint64_t generations_ended() const { return generations_ended_.load(std::memory_order_acquire); }
  uint32_t size() const { return size_.load(std::memory_order_acquire); }
  uint32_t max_spaces() const { return max_spaces_; }
  uint16_t shards() const { return shards_; }
  // Of any one space.
  uint16_t max_partitions() const { return max_partitions_; }

  // Hash of an observation's id for PartitionOf: the same on every core and after every start.
  static uint64_t HashOfId(std::string_view id);

  // The shards in the order in which `space` takes them, by rendezvous hashing (Thaler and
  // Ravishankar 1998): each shard draws a number from the space's name and its own, the highest
  // comes first. So when a shard is added, only what moves to it moves. The first `count` of them.
  static std::vector<ShardId> RankShards(std::string_view space, uint16_t shards, uint16_t count);
  // The first of them: where a space's first partition lives, also before the space is made.
  ShardId FirstShard(std::string_view space) const;

 private:
  uint32_t FirstPlaceOf(std::string_view name) const;
  SpaceEntry* AddLocked(std::string_view name, const SpaceSettings& settings);
  void EndIncarnationLocked(SpaceEntry* entry, CommitStamp stamp);
  void BeginGenerationLocked(SpaceEntry* entry, const SpaceSettings& settings);

  // Constant after construction.
  const uint32_t max_spaces_;
  const uint16_t shards_;
  const uint16_t max_partitions_;
  const uint64_t seed_;
  const uint32_t mask_;  // of the table, which is at most half full
  SpaceSettings defaults_;
  const std::unique_ptr<SpaceEntry[]> entries_;   // by index
  const std::unique_ptr<ShardId[]> shard_lists_;  // max_partitions_ of each entry

  // Written under mutex_, read by anyone.
  const std::unique_ptr<std::atomic<uint32_t>[]> table_;  // index + 1; 0: nothing
  std::atomic<uint32_t> size_{0};
  std::atomic<uint64_t> generations_ended_{0};
  std::atomic<uint32_t> replaying_{0};  // shards
  std::mutex mutex_;
};

}  // namespace engram
