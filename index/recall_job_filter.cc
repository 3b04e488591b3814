// Recalls with a filter (see recall_job.h; src/design/0019-filters.md).

#include <algorithm>
#include <cmath>

#include "index/recall_job.h"
#include "src/core/hash.h"
#include "src/core/vector_dtype.h"

namespace engram {

namespace {

// In distances by codes: what a walk takes for each place of its list, what a row takes by int8,
// and what an unfiltered recall takes in any case.
constexpr double kDistancesPerPlace = 12;
constexpr double kDistancesPerRow = 2.5;
constexpr double kDistancesBesides = 500;
// Of fewer nodes it does not pay to compare codes first.
constexpr uint64_t kLeastByCodes = 400;
constexpr uint32_t kLeastPicked = 128;
// Nodes that a filter is tried on, where clauses do not tell alone how many match.
constexpr uint32_t kSampled = 128;
constexpr uint64_t kSampledFrom = 1'000;

}  // namespace

RefusalReason RecallJob::BeginFilter(const RecallRequest& request, const std::byte* vector) {
  const std::byte* const filter = vector + VectorBytes(request.dtype, request.dimension);
  const RefusalReason reason = filtering_->filter.Begin(space_, {filter, request.filter_bytes});
  if (reason != RefusalReason::kNone) {
    phase_ = Phase::kIdle;
    return reason;
  }
  filter_ = &filtering_->filter;
  if (filter_->compiled().matches_none) {
    FinishSearch();
  } else {
    PlanFilter();
  }
  return reason;
}

// The share of what is visible that matches, by some nodes.
double RecallJob::EstimateShare() const {
  const uint64_t nodes = space_->node_count();
  uint32_t visible = 0;
  uint32_t matching = 0;
  std::array<NodeId, kSampled> sample;
  for (uint32_t i = 0; i < kSampled; ++i) {
    sample[i] = static_cast<NodeId>(MixBits(i) % nodes);
    filter_->Prefetch(sample[i]);
  }
  for (const NodeId node : sample) {
    if (!space_->IsVisible(node, snapshot_)) continue;
    ++visible;
    matching += static_cast<uint32_t>(filter_->Matches(node));
  }
  return (matching + 1.0) / (visible + 1.0);
}

// Compares what a walk would cost with comparing all that match.
void RecallJob::PlanFilter() {
  FilteredNodes& nodes = filtering_->nodes;
  nodes.Begin(space_, filter_, snapshot_);
  const auto total = static_cast<double>(std::max<uint64_t>(space_->live(), 1));
  double share = std::min(1.0, static_cast<double>(nodes.most()) / total);
  const CompiledFilter& filter = filter_->compiled();
  const bool is_known =
      nodes.is_indexed() && filter.clause_count + static_cast<size_t>(filter_->has_times()) == 1;
  if (!is_known && nodes.most() > kSampledFrom) share = std::min(share, EstimateShare());
  const double per_node = codes_ != nullptr ? 1.0 : kDistancesPerRow;
  const double scan = static_cast<double>(nodes.most()) * 0.25 + share * total * per_node;
  // So many of the nearest have to be seen that enough of them match.
  const double seen = ef_ / std::sqrt(share);
  const double walk = static_cast<double>(fresh_.size() + space_->waiting() / 8) +
                      (space_->has_linked() ? kDistancesBesides + kDistancesPerPlace * seen : 0);
  if (scan <= walk) {
    BeginPick();
    return;
  }
  walk_ef_ = std::min(ef_, std::max(static_cast<uint32_t>(std::ceil(seen * share)), 2 * k_));
  filtering_->walk_budget = static_cast<uint64_t>(scan);
}

// All that match, in place of what has been found so far.
void RecallJob::BeginPick() {
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
  for (const Neighbour& compared : filtering_->scan.compared()) {
    Offer(compared.distance, compared.node);
  }
  if (!is_done) return;
  found_count_ = filtering_->scan.TakePicked(found_);
  if (found_count_ == 0) {
    Merge();
  } else {
    BeginRefining();
  }
}

// Where more match about the query than elsewhere the walk ended before it had seen as many as one
// without a filter.
bool RecallJob::WidenWalk() {
  const uint32_t most = std::min(ef_, GraphWalk<IsVisible>::kMaxListEf);
  const size_t seen = search_.seen();
  if (walk_ef_ >= most || seen >= ef_) return false;
  const size_t wanted = size_t{walk_ef_} * ef_ / seen + 1;
  walk_ef_ = std::min(most, std::max(walk_ef_ + walk_ef_ / 4, static_cast<uint32_t>(wanted)));
  search_.Widen(codes_ == nullptr ? kept_ : walk_ef_, walk_ef_);
  return !search_.complete();
}

}  // namespace engram
