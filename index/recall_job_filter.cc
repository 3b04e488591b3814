// Recalls with a filter (see recall_job.h; src/design/0019-filters.md).

#include <algorithm>
#include <cmath>
#include <functional>

#include "index/nearest_selection.h"
#include "index/recall_job.h"
#include "src/core/check.h"
#include "src/core/hash.h"
#include "src/core/vector_dtype.h"

namespace engram {

namespace {

// In distances by codes: what a walk takes for each place of its list, what a row takes by int8, a
// look at what may match, and what a recall that walks takes in any case.
constexpr double kDistancesPerPlace = 33;
constexpr double kDistancesPerRow = 2.5;
constexpr double kDistancesPerLook = 0.5;
constexpr uint64_t kLooksPerDistance = 2;
constexpr double kDistancesBesides = 1'500;
// What matches within the reach of a walk, for each of k, that it may end, and what will do where
// its list can be no longer; by how much more than what is likely to do it is widened; and for each
// of those that are compared again what is looked at, as far as it is expected to match.
constexpr double kWithinReachPerK = 0.9;
constexpr double kLeastWithinReachPerK = 0.5;
constexpr double kWidenBy = 1.1;
// So many walks as far as they go may comparing all that match cost where the first walk has found
// too little.
constexpr double kCheapWalks = 1.25;
// Of a walk's list, for each of k that is expected to match, by a count or by some that were tried,
// and what it has room for in any case.
constexpr double kSeenPerK = 1.7;
constexpr double kSeenPerKGuessed = 3;
constexpr uint32_t kMostSeen = 400;
constexpr double kMatchingPerK = 1.8;
// Of fewer nodes it does not pay to compare codes first.
constexpr uint64_t kLeastByCodes = 400;
constexpr uint32_t kLeastPicked = 128;
// Nodes that a filter is tried on, where clauses do not tell alone how many match.
constexpr uint32_t kSampled = 128;

}  // namespace

// Before anything else is known of the recall: where few match no codes are needed.
RefusalReason RecallJob::BeginFilter(const Space& space, const RecallRequest& request,
                                     const std::byte* vector) {
  const std::byte* const filter = vector + VectorBytes(request.dtype, request.dimension);
  const RefusalReason reason = filtering_->filter.Begin(&space, {filter, request.filter_bytes});
  if (reason != RefusalReason::kNone) return reason;
  filter_ = &filtering_->filter;
  filtering_->nodes.Begin(&space, filter_, request.snapshot);
  if (filtering_->nodes.most() < kLeastByCodes) codes_ = nullptr;
  return reason;
}

RefusalReason RecallJob::BeginNewest(const Space& space, const RecallRequest& request) {
  CHECK(filter_ != nullptr, "who has no vector has a filter");
  space_ = &space;
  metric_ = space.metric();
  across_ = false;
  TakeSnapshot(request.snapshot);
  if (request.snapshot != kNoStamp && request.snapshot < space.horizon()) {
    return RefusalReason::kSnapshotTooOld;
  }
  wanted_ = request.k;
  first_ = 0;
  is_first_stage_ = true;
  is_last_stage_ = true;
  scored_ = false;
  hits_.clear();
  emitted_ = 0;
  BeginEmit(request.with_payload, request.with_vector, request.max_payload_bytes);
  filtering_->latest.clear();
  filtering_->nodes.Begin(space_, filter_, snapshot_);
  phase_ = Phase::kNewest;
  if (filter_->compiled().matches_none) EndNewest();
  return RefusalReason::kNone;
}

void RecallJob::NewestSlice(uint64_t max_looks) {
  std::vector<Dated>& latest = filtering_->latest;
  uint64_t looks = 0;
  bool has_more = true;
  while (has_more && looks < max_looks) {
    std::span<const NodeId> nodes;
    has_more = filtering_->nodes.Next(&nodes, &looks);
    for (const NodeId node : nodes) space_->PrefetchWhen(node);
    for (const NodeId node : nodes) {
      const Dated dated{space_->WhenOf(node), node};
      if (latest.size() < wanted_) {
        latest.push_back(dated);
        std::ranges::push_heap(latest, std::less<>());
      } else if (dated < latest.front()) {
        std::ranges::pop_heap(latest, std::less<>());
        latest.back() = dated;
        std::ranges::push_heap(latest, std::less<>());
      }
    }
  }
  scratch_.AddDistances(looks / kLooksPerDistance + 1);
  if (!has_more) EndNewest();
}

void RecallJob::EndNewest() {
  std::ranges::sort(filtering_->latest, std::less<>());
  for (const Dated& dated : filtering_->latest) hits_.push_back(KeyOf(0, dated.node));
  phase_ = Phase::kReady;
}

// The share of what is visible that matches, by some nodes.
double RecallJob::EstimateShare() const {
  const uint64_t nodes = space_->node_count();
  uint32_t visible = 0;
  uint32_t matching = 0;
  std::array<NodeId, kSampled> sample;
  for (uint32_t i = 0; i < kSampled; ++i) {
    sample[i] = static_cast<NodeId>(MixBits(i) % nodes);
  }
  filter_->Prefetch(sample);
  for (const NodeId node : sample) {
    if (!space_->IsVisible(node, snapshot_)) continue;
    ++visible;
    matching += static_cast<uint32_t>(filter_->Matches(node));
  }
  return (matching + 1.0) / (visible + 1.0);
}

// Compares what a walk would cost with comparing all that match.
void RecallJob::PlanFilter() {
  const CompiledFilter& filter = filter_->compiled();
  if (filter.matches_none) {
    FinishSearch();
    return;
  }
  const FilteredNodes& nodes = filtering_->nodes;
  if (nodes.most() < kLeastByCodes) {
    BeginPick();
    return;
  }
  const auto most = static_cast<double>(nodes.most());
  const auto total = static_cast<double>(std::max<uint64_t>(space_->live(), 1));
  double share = std::min(1.0, most / total);
  const bool is_known =
      nodes.is_indexed() && filter.clause_count + static_cast<size_t>(filter_->has_times()) == 1;
  if (!is_known) share = std::min(share, EstimateShare());
  const double per_node = codes_ != nullptr ? 1.0 : kDistancesPerRow;
  const double scan = most * kDistancesPerLook + share * total * per_node;
  const double seen_per_k = is_known ? kSeenPerK : kSeenPerKGuessed;
  const double seen = std::clamp<double>(seen_per_k * k_ / share, ef_, std::max(ef_, kMostSeen));
  const double walk = static_cast<double>(fresh_.size()) +
                      static_cast<double>(space_->waiting()) / 8 +
                      (space_->has_linked() ? kDistancesBesides + kDistancesPerPlace * seen : 0);
  filtering_->share = share;
  filtering_->walk_budget = static_cast<uint64_t>(scan);
  if (scan <= walk) {
    BeginPick();
  } else {
    walk_ef_ = static_cast<uint32_t>(seen);
  }
}

// All that match, in place of what has been found so far.
void RecallJob::BeginPick() {
  if (phase_ == Phase::kSearch) CountWalk();
  filtering_->nodes.Begin(space_, filter_, snapshot_);
  nearest_.Clear();
  found_count_ = 0;
  FilteredScan::Query query;
  query.rows = by_exact_ ? space_->ExactTargetFor(exact_query_) : space_->TargetFor(code_query_);
  if (codes_ != nullptr && filtering_->nodes.most() >= kLeastByCodes) {
    query.codes = space_->WalkTargetFor(codes_, walk_query_);
  }
  query.picked = std::min<uint32_t>(std::max({ef_, kept_, kLeastPicked}), kMaxEf);
  filtering_->scan.Begin(space_, &filtering_->nodes, query);
  phase_ = Phase::kPick;
}

void RecallJob::PickSlice(uint64_t max_distances) {
  uint64_t distances = 0;
  const bool is_done = filtering_->scan.Step(max_distances, &distances);
  scratch_.AddDistances(distances);
  AddWork(distances, WalkTarget().vectors->row_bytes());
  for (const Neighbour& compared : filtering_->scan.compared()) {
    Offer(compared.distance, compared.node);
  }
  if (!is_done) return;
  found_count_ = filtering_->scan.TakePicked(found_);
  if (found_count_ == 0 || codes_ == nullptr) {
    Merge();
  } else {
    OrderFound();
  }
}

// Of what the walk has evaluated the nearest some that match, nearest first, into found_. What
// matches within the reach of the walk is as good as all of it there; where that is not enough the
// walk goes on, and where it cannot all that match are compared.
void RecallJob::EndFilteredSearch() {
  if (!search_.is_in_list()) {
    BeginPick();
    return;
  }
  const float reach = search_.reach();
  const double wanted = kMatchingPerK * std::max(kept_, k_) / filtering_->share;
  size_t within_reach = 0;
  found_count_ =
      TakeMatching(std::max<size_t>(ef_, static_cast<size_t>(wanted)), reach, &within_reach);
  if (reach != HUGE_VALF && static_cast<double>(within_reach) < kWithinReachPerK * k_) {
    if (WidenWalk(within_reach)) return;
    const bool is_enough = static_cast<double>(within_reach) >= kLeastWithinReachPerK * k_;
    if (!is_enough || ComparingAllIsCheap()) {
      BeginPick();
      return;
    }
  }
  const std::span<Neighbour> found = std::span(found_).first(found_count_);
  std::ranges::sort(found, {}, [](const Neighbour& neighbour) {
    return KeyOf(neighbour.distance, neighbour.node);
  });
  found_count_ = std::min<size_t>(found_count_, codes_ == nullptr ? kept_ : ef_);
  EndFinding();
}

size_t RecallJob::TakeMatching(size_t wanted, float reach, size_t* within_reach) {
  const std::span<const NodeId> nodes = search_.evaluated();
  std::vector<float>& estimates = filtering_->estimates;
  std::vector<NodeId>& candidates = filtering_->candidates;
  size_t count = nodes.size();
  std::ranges::copy(nodes, candidates.begin());
  std::ranges::copy(search_.distances(), estimates.begin());
  if (wanted < count) {
    const auto least = static_cast<float>(wanted);
    const float bound = BoundOfNearest(estimates.data(), nullptr, count, least, least * 1.25F);
    count = KeepNearer(bound, estimates.data(), candidates.data(), count);
  }
  filter_->Prefetch(std::span(candidates).first(count));
  size_t found = 0;
  for (size_t i = 0; i < count && found < found_.size(); ++i) {
    const NodeId node = candidates[i];
    if (!filter_->Matches(node) || !space_->IsVisibleInGraph(node, snapshot_)) continue;
    found_[found++] = {estimates[i], node};
    *within_reach += static_cast<size_t>(estimates[i] <= reach);
  }
  return found;
}

// Costs hardly more than a walk as far as it goes.
bool RecallJob::ComparingAllIsCheap() const {
  constexpr double kWalk =
      kDistancesBesides + kDistancesPerPlace * GraphWalk<IsVisible>::kMaxListEf;
  return static_cast<double>(filtering_->walk_budget) < kCheapWalks * kWalk;
}

// As far as it is likely to take, at most as far as the list goes. False where it has been as far.
bool RecallJob::WidenWalk(size_t within_reach) {
  const double per_place = static_cast<double>(search_.evaluated().size()) / walk_ef_;
  const double most = std::min<double>(GraphWalk<IsVisible>::kMaxListEf,
                                       0.9 * kMaxWalkSlots / std::max(per_place, 1.0));
  if (walk_ef_ >= most - 1) return false;
  const double wider =
      walk_ef_ * kWidenBy * kWithinReachPerK * k_ / (static_cast<double>(within_reach) + 1);
  // Where as far as it goes is not likely to do, what matches lies elsewhere.
  if (wider > most && ComparingAllIsCheap()) return false;
  // Not so far that to compare all that match would cost less.
  if ((std::min(wider, most) - walk_ef_) * kDistancesPerPlace >
      static_cast<double>(filtering_->walk_budget)) {
    return false;
  }
  walk_ef_ = static_cast<uint32_t>(std::clamp(wider, walk_ef_ + 1.0, most));
  search_.Widen(walk_ef_);
  if (search_.complete()) EndFilteredSearch();
  return true;
}

}  // namespace engram
