#include "index/filtered_scan.h"

#include <algorithm>
#include <cmath>

#include "src/core/check.h"

namespace engram {

namespace {

// Nodes that are looked at in the time of a distance.
constexpr uint64_t kLookedAtPerDistance = 8;
// Rows that are compared at once, and of a row the bytes that are asked for: the rest follows by
// the processor's own prefetcher.
constexpr size_t kRowsAtOnce = 16;
constexpr size_t kMostBytesAhead = 8 * kCacheLineBytes;
constexpr int kIntoSecondCache = 2;

}  // namespace

// ---------------------------------------------------------------------------------------------
// Which

void FilteredNodes::Begin(const Space* space, const NodeFilter* filter, CommitStamp snapshot) {
  space_ = space;
  filter_ = filter;
  snapshot_ = snapshot;
  block_ = {};
  next_ = 0;
  const CompiledFilter& compiled = filter->compiled();
  source_ = Source::kAll;
  most_ = space->node_count();
  if (filter->has_times()) {
    const uint64_t in_time = space->times().CountAtMost(compiled.times);
    if (in_time < most_) {
      source_ = Source::kTimes;
      most_ = in_time;
    }
  }
  if (compiled.most < most_ || (compiled.most == most_ && source_ == Source::kAll)) {
    source_ = Source::kAttributes;
    most_ = compiled.most;
  }
  if (source_ == Source::kTimes) by_time_.Begin(&space->times(), compiled.times);
  if (source_ == Source::kAttributes) by_attributes_.Begin(&space->attributes(), &compiled);
}

void FilteredNodes::BeginLinked(const Space* space, CommitStamp snapshot) {
  space_ = space;
  filter_ = nullptr;
  snapshot_ = snapshot;
  block_ = {};
  next_ = 0;
  source_ = Source::kLinked;
  most_ = space->node_count();
}

bool FilteredNodes::NextBlock(bool* are_in_time) {
  *are_in_time = false;
  switch (source_) {
    case Source::kAttributes:
      return by_attributes_.Next(&block_);
    case Source::kTimes:
      return by_time_.Next(&block_, are_in_time);
    case Source::kAll:
    case Source::kLinked:
      break;
  }
  return NextOfAll();
}

bool FilteredNodes::NextOfAll() {
  const auto end = static_cast<NodeId>(space_->node_count());
  size_t count = 0;
  while (count < all_.size() && next_ < end) all_[count++] = next_++;
  block_ = std::span(all_).first(count);
  return count > 0;
}

// Those of kAtOnce at most, into matching_.
size_t FilteredNodes::KeepMatching(std::span<const NodeId> nodes, bool are_in_time) {
  const bool asks_clauses = filter_->has_clauses() && source_ != Source::kAttributes;
  const bool asks_time = filter_->has_times() && !are_in_time;
  if (asks_clauses || asks_time) {
    filter_->Prefetch(nodes);
  }
  size_t count = 0;
  for (const NodeId node : nodes) {
    if (asks_clauses && !filter_->MeetsClauses(node)) continue;
    if (asks_time && !filter_->IsInTime(node)) continue;
    // Of all nodes some were never stamped.
    const bool is_visible = source_ == Source::kAll ? space_->IsVisible(node, snapshot_)
                                                    : space_->IsVisibleHere(node, snapshot_);
    if (is_visible) matching_[count++] = node;
  }
  return count;
}

size_t FilteredNodes::KeepLinked(std::span<const NodeId> nodes) {
  size_t count = 0;
  for (const NodeId node : nodes) {
    if (space_->HasWalkCode(node) && space_->IsVisibleInGraph(node, snapshot_)) {
      matching_[count++] = node;
    }
  }
  return count;
}

bool FilteredNodes::Next(std::span<const NodeId>* nodes, uint64_t* looked_at) {
  *nodes = {};
  if (block_.empty() && !NextBlock(&block_in_time_)) return false;
  const size_t count = std::min(block_.size(), kAtOnce);
  const std::span<const NodeId> some = block_.first(count);
  *nodes = std::span(matching_).first(
      source_ == Source::kLinked ? KeepLinked(some) : KeepMatching(some, block_in_time_));
  block_ = block_.subspan(count);
  *looked_at += count + 1;
  return true;
}

// ---------------------------------------------------------------------------------------------
// How near

FilteredScan::FilteredScan()
    : estimates_(std::make_unique_for_overwrite<float[]>(kRoom)),
      candidates_(std::make_unique_for_overwrite<NodeId[]>(kRoom)),
      compared_(kMostCompared) {}

void FilteredScan::Begin(const Space* space, FilteredNodes* nodes, const Query& query) {
  CHECK(query.picked <= kMaxPicked, "as many as a recall may want");
  space_ = space;
  nodes_ = nodes;
  query_ = query;
  all_have_codes_ =
      query.codes.has_value() && (nodes->are_linked() || space->FreshNodes().size() == 0);
  has_more_ = true;
  for (Chunk& chunk : by_codes_) chunk.count = 0;
  for (Chunk& chunk : by_rows_) chunk.count = 0;
  candidate_count_ = 0;
  compared_count_ = 0;
  bound_ = HUGE_VALF;
  is_bounded_ = false;
}

void FilteredScan::AddTo(Chunk* chunk, const SearchTarget& target, NodeId node) {
  const std::byte* const row = target.vectors->Row(node);
  const size_t ahead = std::min(target.vectors->row_bytes(), kMostBytesAhead);
  for (size_t at = 0; at < ahead; at += kCacheLineBytes) {
    __builtin_prefetch(row + at, 0, kIntoSecondCache);
  }
  chunk->nodes[chunk->count] = node;
  chunk->rows[chunk->count++] = row;
}

void FilteredScan::TakeChunk(std::span<const NodeId> nodes) {
  for (const NodeId node : nodes) {
    if (query_.codes && (all_have_codes_ || space_->HasWalkCode(node))) {
      AddTo(&by_codes_[taking_], *query_.codes, node);
    } else {
      AddTo(&by_rows_[taking_], query_.rows, node);
    }
  }
}

void FilteredScan::CompareChunk(Chunk* chunk, const SearchTarget& target, float* distances) {
  for (size_t i = 0; i < chunk->count; i += kRowsAtOnce) {
    const size_t some = std::min(kRowsAtOnce, chunk->count - i);
    if (target.distances != nullptr) {
      target.distances(target.query, chunk->rows.data() + i, some, target.padded_dimension,
                       distances + i);
      continue;
    }
    for (size_t j = i; j < i + some; ++j) {
      distances[j] = target.distance(target.query, chunk->rows[j], target.padded_dimension);
    }
  }
}

void FilteredScan::CompareCodes(Chunk* chunk) {
  std::array<float, kMostInChunk> distances;
  CompareChunk(chunk, *query_.codes, distances.data());
  const size_t wanted = query_.picked;
  if (candidate_count_ > 2 * wanted) {
    Keep(wanted, wanted + wanted / 3);
  }
  size_t count = candidate_count_;
  for (size_t i = 0; i < chunk->count; ++i) {
    estimates_[count] = distances[i];
    candidates_[count] = chunk->nodes[i];
    // Until there is a bound also what is beyond all numbers.
    count += static_cast<size_t>(!is_bounded_ || distances[i] < bound_);
  }
  candidate_count_ = count;
  chunk->count = 0;
}

void FilteredScan::CompareRows(Chunk* chunk) {
  std::array<float, kMostInChunk> distances;
  CompareChunk(chunk, query_.rows, distances.data());
  for (size_t i = 0; i < chunk->count; ++i) {
    compared_[compared_count_++] = {distances[i], chunk->nodes[i]};
  }
  chunk->count = 0;
}

bool FilteredScan::Step(uint64_t max_distances, uint64_t* distances) {
  compared_count_ = 0;
  uint64_t looked_at = 0;
  uint64_t work = 0;
  const auto may_go_on = [&] { return work + looked_at / kLookedAtPerDistance < max_distances; };
  bool is_done = false;
  while (!is_done && may_go_on() && compared_count_ + kMostInChunk <= kMostCompared) {
    const auto taken = [this] { return by_codes_[taking_].count + by_rows_[taking_].count; };
    while (has_more_ && taken() < kChunk && may_go_on()) {
      std::span<const NodeId> nodes;
      has_more_ = nodes_->Next(&nodes, &looked_at);
      TakeChunk(nodes);
    }
    if (has_more_ && taken() < kChunk) break;  // It is filled on in the next step.
    taking_ = 1 - taking_;
    work += taken();
    if (by_codes_[taking_].count > 0) CompareCodes(&by_codes_[taking_]);
    if (by_rows_[taking_].count > 0) CompareRows(&by_rows_[taking_]);
    const size_t others = by_codes_[1 - taking_].count + by_rows_[1 - taking_].count;
    is_done = !has_more_ && others == 0;
  }
  *distances += work + looked_at / kLookedAtPerDistance;
  return is_done;
}

// The nearest `least` to `most`.
void FilteredScan::Keep(size_t least, size_t most) {
  if (candidate_count_ <= most) return;
  const float bound = BoundOfNearest(estimates_.get(), nullptr, candidate_count_,
                                     static_cast<float>(least), static_cast<float>(most));
  const size_t kept = KeepNearer(bound, estimates_.get(), candidates_.get(), candidate_count_);
  candidate_count_ = std::min(kept, most);
  bound_ = std::min(bound_, bound);
  is_bounded_ = true;
}

size_t FilteredScan::TakePicked(std::span<Neighbour> found) {
  const size_t wanted = query_.picked;
  Keep(std::min(wanted, found.size()), std::min(wanted + wanted / 8, found.size()));
  for (size_t i = 0; i < candidate_count_; ++i) found[i] = {estimates_[i], candidates_[i]};
  return candidate_count_;
}

}  // namespace engram
