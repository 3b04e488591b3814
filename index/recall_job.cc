#include "index/recall_job.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "index/nearest_selection.h"
#include "src/core/check.h"
#include "src/core/spsc_ring.h"
#include "src/core/vector_dtype.h"

namespace engram {

namespace {

// Rows of the scan that are asked for ahead of the one that is compared, and compared in a turn.
constexpr size_t kScanAhead = 4;
constexpr size_t kScannedAtOnce = 64;
constexpr size_t kComparedTogether = 8;
constexpr uint64_t kProbedInTurn = 128;
constexpr uint64_t kPickedInTurn = 128;
constexpr uint64_t kNewestInTurn = 1'024;
// Rows of int8, and rows as they are kept, that are asked for in a turn and compared in the next.
constexpr size_t kRefinedAtOnce = 8;
constexpr size_t kComparedAtOnce = 4;
// Observations that are asked for before they are handed out.
constexpr size_t kPrefetchedHits = 32;
// How many of the nearest by int8 are compared again: those beyond rarely belong to the k nearest.
constexpr uint32_t KeptFor(uint32_t k) { return k + k / 4 + 8; }
constexpr size_t kMaxKept = KeptFor(kMaxRecallResults);
// By codes of one bit first: more of those errs.
constexpr uint32_t PickedFor(uint32_t kept) { return 2 * kept + kept / 2; }
constexpr size_t kMaxFound = std::max<size_t>(PickedFor(kMaxKept), kMaxEf);
static_assert(kMaxFound <= FilteredScan::kMaxPicked);
// In distances: what a walk takes for each place where it has more than its list (fewer take less,
// recall_job_filter.cc), and what comparing all of the graph takes for a node of the space.
constexpr double kDistancesPerFarPlace = 55;
constexpr double kDistancesPerNode = 0.75;
// The most nodes, ended ones among them, that a walk's list has for each of ef, as far as what is
// known allows it; and what it finds in the graph in any case, unless that has it pass through more
// than so many.
constexpr double kMostWalkedPerPlace = 3;
constexpr double kLeastOfGraph = 8;
constexpr double kMostWalkedForLeast = 4'096;
// Where nobody says otherwise a walk has so many places for each of k, in a short recall and in a
// long one: of 198,147 text vectors it finds 0.96 of the nearest 100 then, and 0.98 of 1,000.
constexpr uint32_t kEfPerResult = 2;
constexpr uint32_t kEfPerResultOfLong = 3;
constexpr uint64_t kDistancesPerRow = 4;
// So many are put in order at once.
constexpr size_t kSortedAtOnce = 1'024;
// Of a recall with a bound, by how much a stage looks for more than the one before.
constexpr uint32_t kStageGrowth = 10;
// An estimate is taken to be wrong by at most so many times the root mean square of the errors.
constexpr double kErrorSpread = 3;
// Of fewer errors the mean says little.
constexpr size_t kLeastErrors = 8;

}  // namespace

RecallJob::RecallJob(ArenaHeap* heap, const LogWriter* log, Core core)
    : log_(log),
      core_(core),
      scratch_(heap),
      query_storage_(3 * Space::kMaxRowBytes + 2 * Space::kMaxCodeBytes + kCacheLineBytes),
      nearest_storage_(kMaxKept),
      found_(kMaxFound),
      compared_again_(kMaxKept),
      sort_(kMaxKept + kMaxFound),
      found_keys_(std::make_unique_for_overwrite<NeighbourKey[]>(kMaxFound)) {
  static_assert(Space::kMaxRowBytes % kCacheLineBytes == 0);
  const auto address = std::bit_cast<uintptr_t>(query_storage_.data());
  code_query_ = query_storage_.data() + (kCacheLineBytes - address % kCacheLineBytes);
  exact_query_ = code_query_ + Space::kMaxRowBytes;
  walk_query_ = exact_query_ + Space::kMaxRowBytes;
  forms_ = {.code = code_query_, .exact = exact_query_, .walk = walk_query_};
  if (core_ == Core::kOfShard) {
    probe_.emplace();
    filtering_ = std::make_unique<Filtering>();
    filtering_->estimates.resize(kMaxWalkSlots + kSelectionSlack);
    filtering_->candidates.resize(kMaxWalkSlots + kSelectionSlack);
    filtering_->latest.reserve(kMaxRecallResults);
    forms_.signs = walk_query_ + Space::kMaxRowBytes;
    forms_.signs_before = forms_.signs + Space::kMaxCodeBytes;
    forms_.signs_are_far = &signs_are_far_;
    found_across_ = std::make_unique_for_overwrite<FoundAcross[]>(kMaxFoundAcross);
  }
  nearest_.Attach(nearest_storage_.data());
  known_.reserve(kMaxKept + WaitingProbe::kMaxFound);
  hits_.reserve(kMaxKept + kMaxFound);
  sent_.reserve(kMaxRecallResults);
}

// 1.
RefusalReason RecallJob::Begin(const Space& space, const RecallRequest& request,
                               const std::byte* vector, uint32_t default_ef) {
  CHECK(request.filter_bytes == 0 || filtering_ != nullptr, "filters are the shard core's");
  filter_ = nullptr;
  codes_ = space.recall_codes();
  if (request.filter_bytes != 0) {
    const RefusalReason sound = BeginFilter(space, request, vector);
    if (sound != RefusalReason::kNone) return sound;
  }
  if (request.dimension == 0) return BeginNewest(space, request);
  const RefusalReason reason =
      space.PrepareQuery(request.dtype, request.dimension, request.scale, vector, &codes_, forms_);
  if (reason != RefusalReason::kNone) return reason;
  space_ = &space;
  metric_ = space.metric();
  across_ = request.across;
  TakeSnapshot(request.snapshot);
  // After the list of fresh nodes was taken: what left it before is past the horizon that is seen
  // here.
  if (request.snapshot != kNoStamp && request.snapshot < space.horizon()) {
    return RefusalReason::kSnapshotTooOld;
  }
  if (!scratch_.Reserve(space.node_count())) return RefusalReason::kMemoryFull;
  by_exact_ =
      space.has_exact() && ((!space.has_linked() && space.waiting() == 0) || space.walks_exact());
  // Where nothing is linked yet but will be before the scan ends, it stays with the exact rows.
  if (by_exact_) codes_ = nullptr;
  wanted_ = request.k;
  first_ = request.IsLong() ? request.first : 0;
  asked_ef_ = request.ef;
  default_ef_ = default_ef;
  has_bound_ = request.has_bound;
  bound_ = request.bound;
  sent_.clear();
  scored_ = true;
  BeginEmit(request.with_payload, request.with_vector, request.max_payload_bytes);
  is_first_stage_ = true;
  BeginStage(first_ > 0 ? first_ : wanted_);
  return RefusalReason::kNone;
}

uint32_t RecallJob::NextStage() const {
  return has_bound_ ? std::min(wanted_, kStageGrowth * k_) : wanted_;
}

// What comes first of a long recall is not to wait for a long walk.
uint32_t RecallJob::EfFor(uint32_t k) const {
  uint32_t ef =
      std::max(default_ef_, k * (k > kLongRecallFrom ? kEfPerResultOfLong : kEfPerResult));
  if (asked_ef_ > 0) ef = k < wanted_ ? std::min(ef, asked_ef_) : asked_ef_;
  return std::clamp(ef, k, kMaxEf);
}

void RecallJob::BeginStage(uint32_t k) {
  k_ = k;
  ef_ = EfFor(k_);
  const bool compare_again = space_->has_exact() && !by_exact_;
  kept_ = compare_again ? std::min(ef_, KeptFor(k_)) : k_;
  scanned_ = 0;
  found_count_ = 0;
  compared_ = 0;
  emitted_ = 0;
  nearest_.Clear();
  hits_.clear();
  walk_ef_ = ef_;
  phase_ = Phase::kScan;
  if (filter_ != nullptr) PlanFilter();
}

// The list of fresh nodes and the stamp must be of one moment: what was stored between the two
// would be missed in one form and hidden in the other.
void RecallJob::TakeSnapshot(CommitStamp wanted) {
  CommitStamp latest = space_->latest_stamp();
  for (;;) {
    fresh_ = core_ == Core::kOfShard ? space_->UnlistedNodes() : space_->FreshNodes();
    const CommitStamp now = space_->latest_stamp();
    if (now == latest) break;
    latest = now;
  }
  snapshot_ = wanted == kNoStamp ? latest : wanted;
}

bool RecallJob::Search(uint32_t max_distances) {
  const uint64_t limit = distances() + max_distances;
  do {
    if (phase_ != Phase::kSearch) {
      Turn();
    } else if (search_.Step(limit - distances())) {
      EndSearch();
    } else if (IsOverBudget()) {
      BeginPick();
    }
  } while (phase_ != Phase::kReady && distances() < limit);
  return phase_ == Phase::kReady;
}

bool RecallJob::Turn() {
  CHECK(phase_ != Phase::kIdle, "a recall was begun");
  switch (phase_) {
    case Phase::kNewest:
      NewestSlice(kNewestInTurn);
      break;
    case Phase::kPick:
      PickSlice(kPickedInTurn);
      break;
    case Phase::kScan:
      ScanSlice();
      if (scanned_ == fresh_.size()) EndScan();
      break;
    case Phase::kProbe:
      ProbeSlice(kProbedInTurn);
      break;
    case Phase::kSearch:
      if (search_.Turn()) {
        EndSearch();
      } else if (IsOverBudget()) {
        BeginPick();
      }
      break;
    case Phase::kOrderFound:
    case Phase::kOrderMerged:
    case Phase::kOrderCompared:
      OrderSlice();
      break;
    case Phase::kRefine:
      RefineSlice();
      break;
    case Phase::kCompare:
      CompareSlice();
      break;
    case Phase::kIdle:
    case Phase::kReady:
      break;
  }
  return phase_ == Phase::kReady;
}

// 2.
void RecallJob::ScanSlice() {
  const SearchTarget target =
      by_exact_ ? space_->ExactTargetFor(exact_query_) : space_->TargetFor(code_query_);
  const size_t end = std::min<size_t>(fresh_.size(), scanned_ + kScannedAtOnce);
  scratch_.AddDistances(end - scanned_);
  AddWork(end - scanned_, target.vectors->row_bytes());
  std::array<NodeId, kScannedAtOnce> nodes;
  std::array<const std::byte*, kScannedAtOnce> rows;
  std::array<float, kScannedAtOnce> distances;
  size_t count = 0;
  for (; scanned_ < end; ++scanned_) {
    const NodeId node = fresh_[scanned_];
    if (!space_->IsVisible(node, snapshot_)) continue;
    if (filter_ != nullptr && !filter_->Matches(node)) continue;
    // Those behind them are asked for while these are compared.
    if (count < kComparedTogether) target.Prefetch(node);
    nodes[count] = node;
    rows[count++] = target.vectors->Row(node);
  }
  if (target.distances == nullptr) {
    for (size_t i = 0; i < count; ++i) {
      if (i + kScanAhead < count) target.Prefetch(nodes[i + kScanAhead]);
      distances[i] = target.DistanceTo(nodes[i]);
    }
  } else {
    for (size_t i = 0; i < count; i += kComparedTogether) {
      const size_t ahead = std::min(count, i + 2 * kComparedTogether);
      for (size_t j = i + kComparedTogether; j < ahead; ++j) target.Prefetch(nodes[j]);
      target.distances(target.query, rows.data() + i, std::min(kComparedTogether, count - i),
                       target.padded_dimension, distances.data() + i);
    }
  }
  for (size_t i = 0; i < count; ++i) Offer(distances[i], nodes[i]);
}

void RecallJob::Offer(float distance, NodeId node) {
  const NeighbourKey key = KeyOf(distance, node);
  if (nearest_.size() < kept_) {
    nearest_.Push(key);
  } else if (key < nearest_.top()) {
    nearest_.ReplaceTop(key);
  }
}

void RecallJob::EndScan() {
  NoteKnown();
  if (core_ != Core::kOfShard || space_->waiting() == 0) {
    BeginSearch();
    return;
  }
  probe_->Begin(space_, forms_, snapshot_, ef_, kept_, filter_);
  phase_ = Phase::kProbe;
}

// A walk passes through what has ended, and goes on until it has found ef that live: where most of
// a graph has ended, as many places as that makes too many are taken by the nearest that were found
// beside it. Others than the shard's core cannot tell.
size_t RecallJob::PlacesForKnown() const {
  if (core_ != Core::kOfShard || filter_ != nullptr) return 0;
  const double share = static_cast<double>(space_->linked()) /
                       static_cast<double>(std::max<uint64_t>(space_->graph_nodes(), 1));
  const double found = std::max(kMostWalkedPerPlace * share * walk_ef_,
                                std::min(kLeastOfGraph, kMostWalkedForLeast * share));
  return walk_ef_ - std::min(static_cast<size_t>(found), size_t{walk_ef_});
}

// What was scanned.
void RecallJob::NoteKnown() {
  known_.clear();
  if (PlacesForKnown() == 0) return;
  for (const NeighbourKey key : nearest_.keys()) known_.push_back(DistanceOf(key));
}

// The nearest of them, as many as there are places.
void RecallJob::LeaveKnown() {
  const size_t places = PlacesForKnown();
  if (known_.size() <= places) return;
  std::ranges::nth_element(known_, known_.begin() + static_cast<ptrdiff_t>(places));
  known_.resize(places);
}

void RecallJob::ProbeSlice(uint64_t max_distances) {
  uint64_t distances = 0;
  const bool is_done = probe_->Step(max_distances, &distances);
  scratch_.AddDistances(distances);
  if (!is_done) return;
  AddWork(probe_->members(), space_->waiting_code_bytes());
  AddWork(probe_->compared(), space_->TargetFor(code_query_).vectors->row_bytes());
  const bool takes_known = PlacesForKnown() > 0;
  for (const Neighbour& found : probe_->found()) {
    if (takes_known) known_.push_back(found.distance);
    Offer(found.distance, found.node);
  }
  BeginSearch();
}

SearchTarget RecallJob::WalkTarget() const {
  if (by_exact_) return space_->ExactTargetFor(exact_query_);
  if (codes_ == nullptr) return space_->TargetFor(code_query_);
  return space_->WalkTargetFor(codes_, walk_query_);
}

// 3. What was linked since the scan began is in the scan, so a graph that has begun since is left
// alone.
void RecallJob::BeginSearch() {
  // Others than the shard's core cannot tell whether all of the graph has ended.
  const bool all_ended =
      core_ == Core::kOfShard && space_->linked() == 0 && space_->latest_stamp() <= snapshot_;
  if (!space_->has_linked() || all_ended) {
    Merge();
    return;
  }
  if (ComparesWholeGraph()) {
    BeginWholeGraph();
    return;
  }
  filters_in_walk_ = filter_ != nullptr && ef_ > GraphWalk<IsVisible>::kMaxListEf;
  search_ =
      GraphWalk<IsVisible>(IsVisible{space_, snapshot_, filters_in_walk_ ? filter_ : nullptr});
  walk_began_ = distances();
  LeaveKnown();
  search_.Begin(WalkTarget(), codes_ == nullptr ? kept_ : walk_ef_, walk_ef_, &scratch_, known_);
  phase_ = Phase::kSearch;
}

// Walks of few places take next to nothing of a graph, and beyond the list's they take longer.
bool RecallJob::ComparesWholeGraph() const {
  if (filtering_ == nullptr || filter_ != nullptr || ef_ <= GraphWalk<IsVisible>::kMaxListEf) {
    return false;
  }
  return kDistancesPerNode * static_cast<double>(space_->node_count()) <
         kDistancesPerFarPlace * ef_;
}

// What was found beside the graph stays.
void RecallJob::BeginWholeGraph() {
  filtering_->nodes.BeginLinked(space_, snapshot_);
  FilteredScan::Query query;
  query.rows = by_exact_ ? space_->ExactTargetFor(exact_query_) : space_->TargetFor(code_query_);
  // Into found_ also where there are no codes: what a batch has linked may be fresh as well, and is
  // not to take two places among the nearest.
  query.codes = codes_ != nullptr ? space_->WalkTargetFor(codes_, walk_query_) : query.rows;
  query.picked = codes_ != nullptr ? PickedFor(kept_) : kept_;
  filtering_->scan.Begin(space_, &filtering_->nodes, query);
  phase_ = Phase::kPick;
}

void RecallJob::EndSearch() {
  if (filter_ != nullptr && !filters_in_walk_) {
    EndFilteredSearch();
    return;
  }
  found_count_ = search_.TakeResults(std::span(found_).first(codes_ == nullptr ? kept_ : walk_ef_));
  EndFinding();
}

void RecallJob::CountWalk() {
  AddWork(distances() - walk_began_, WalkTarget().vectors->row_bytes());
}

void RecallJob::EndFinding() {
  CountWalk();
  if (codes_ == nullptr) {
    Merge();
  } else {
    BeginRefining();
  }
}

// `phase`: what the keys are.
void RecallJob::BeginOrder(Phase phase, std::span<NeighbourKey> keys) {
  phase_ = phase;
  if (keys.size() <= kSortedAtOnce) {
    std::ranges::sort(keys);
    EndOrder();
  } else {
    sort_.Begin(keys);
  }
}

void RecallJob::OrderSlice() {
  uint64_t distances = 0;
  const bool is_done = sort_.Step(&distances);
  scratch_.AddDistances(distances);
  if (is_done) EndOrder();
}

void RecallJob::EndOrder() {
  if (phase_ == Phase::kOrderFound) {
    for (size_t i = 0; i < found_count_; ++i) {
      found_[i] = {DistanceOf(found_keys_[i]), NodeOf(found_keys_[i])};
    }
    BeginRefining();
  } else if (phase_ == Phase::kOrderMerged) {
    EndMerge();
  } else {
    hits_.resize(std::min<size_t>(hits_.size(), k_));
    FinishSearch();
  }
}

void RecallJob::OrderFound() {
  for (size_t i = 0; i < found_count_; ++i) {
    found_keys_[i] = KeyOf(found_[i].distance, found_[i].node);
  }
  BeginOrder(Phase::kOrderFound, {found_keys_.get(), found_count_});
}

void RecallJob::BeginRefining() {
  refined_ = 0;
  compared_again_.Begin(kept_);
  AskToRefine();
  phase_ = Phase::kRefine;
}

void RecallJob::AskToRefine() const {
  const SearchTarget target = space_->TargetFor(code_query_);
  const size_t end = std::min<size_t>(found_count_, refined_ + kRefinedAtOnce);
  for (size_t i = refined_; i < end; ++i) target.Prefetch(found_[i].node);
}

void RecallJob::RefineSlice() {
  const SearchTarget target = space_->TargetFor(code_query_);
  const size_t begin = refined_;
  const size_t end = std::min<size_t>(found_count_, refined_ + kRefinedAtOnce);
  for (; refined_ < end; ++refined_) {
    Neighbour& found = found_[refined_];
    if (compared_again_.IsTooFar(found.distance)) {
      found_count_ = refined_;
      break;
    }
    const float distance = target.DistanceTo(found.node);
    compared_again_.Add(found.node, found.distance, distance);
    found.distance = distance;
  }
  scratch_.AddDistances(refined_ - begin);
  AddWork(refined_ - begin, target.vectors->row_bytes());
  if (refined_ == found_count_) {
    Merge();
  } else {
    AskToRefine();
  }
}

void RecallJob::Compared::Begin(size_t kept) {
  nearest_.Clear();
  kept_ = kept;
  count_ = 0;
  squared_errors_ = 0;
}

void RecallJob::Compared::Add(NodeId node, float known, float distance) {
  const double error = double{distance} - double{known};
  squared_errors_ += error * error;
  ++count_;
  const NeighbourKey key = KeyOf(distance, node);
  if (nearest_.size() < kept_) {
    nearest_.Push(key);
  } else if (key < nearest_.top()) {
    nearest_.ReplaceTop(key);
  }
}

bool RecallJob::Compared::IsTooFar(float known) const {
  if (nearest_.size() < kept_ || count_ < kLeastErrors) return false;
  const double beyond = double{known} - double{DistanceOf(nearest_.top())};
  return beyond > 0 && beyond * beyond * static_cast<double>(count_) >
                           kErrorSpread * kErrorSpread * squared_errors_;
}

// 4. A node that was linked meanwhile may be in both.
void RecallJob::Merge() {
  for (const NeighbourKey key : nearest_.keys()) hits_.push_back(key);
  for (size_t i = 0; i < found_count_; ++i)
    hits_.push_back(KeyOf(found_[i].distance, found_[i].node));
  BeginOrder(Phase::kOrderMerged, hits_);
}

void RecallJob::EndMerge() {
  hits_.erase(std::unique(hits_.begin(), hits_.end()), hits_.end());
  if (space_->has_exact() && !by_exact_) {
    hits_.resize(std::min<size_t>(hits_.size(), kept_));
    compared_again_.Begin(k_);
    AskToCompare();
    phase_ = Phase::kCompare;
  } else {
    hits_.resize(std::min<size_t>(hits_.size(), k_));
    FinishSearch();
  }
}

// 5.
void RecallJob::AskToCompare() const {
  const SearchTarget target = space_->ExactTargetFor(exact_query_);
  const size_t end = std::min<size_t>(hits_.size(), compared_ + kComparedAtOnce);
  for (size_t i = compared_; i < end; ++i) target.Prefetch(NodeOf(hits_[i]));
}

void RecallJob::CompareSlice() {
  const SearchTarget target = space_->ExactTargetFor(exact_query_);
  const size_t begin = compared_;
  const size_t end = std::min<size_t>(hits_.size(), compared_ + kComparedAtOnce);
  for (; compared_ < end; ++compared_) {
    const float known = DistanceOf(hits_[compared_]);
    if (compared_again_.IsTooFar(known)) {
      hits_.resize(compared_);
      break;
    }
    const NodeId node = NodeOf(hits_[compared_]);
    const float distance = target.DistanceTo(node);
    compared_again_.Add(node, known, distance);
    hits_[compared_] = KeyOf(distance, node);
  }
  // Whole rows from memory, which takes longer than other distances: very many of them are not to
  // make a slice long.
  scratch_.AddDistances((compared_ - begin) * (k_ > kLongRecallFrom ? kDistancesPerRow : 1));
  AddWork(compared_ - begin, target.vectors->row_bytes());
  if (compared_ < hits_.size()) {
    AskToCompare();
    return;
  }
  BeginOrder(Phase::kOrderCompared, hits_);
}

bool RecallJob::IsWithinBound(NeighbourKey hit) const {
  const float score = space_->ScoreOf(DistanceOf(hit));
  return space_->metric() == Metric::kL2 ? score <= bound_ : score >= bound_;
}

// What the stage has to say beyond those before it, and whether another one follows.
void RecallJob::FinishSearch() {
  if (has_bound_) {
    const auto beyond = std::ranges::partition_point(
        hits_, [this](NeighbourKey hit) { return IsWithinBound(hit); });
    hits_.erase(beyond, hits_.end());
  }
  is_last_stage_ = k_ == wanted_ || hits_.size() < k_;
  if (!sent_.empty()) {
    std::erase_if(
        hits_, [this](NeighbourKey hit) { return std::ranges::binary_search(sent_, NodeOf(hit)); });
    hits_.resize(std::min(hits_.size(), wanted_ - sent_.size()));
  }
  const size_t ahead = std::min(hits_.size(), kPrefetchedHits);
  for (size_t i = 0; i < ahead; ++i) space_->PrefetchObservation(NodeOf(hits_[i]));
  phase_ = Phase::kReady;
}

}  // namespace engram
