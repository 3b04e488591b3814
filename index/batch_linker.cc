#include "index/batch_linker.h"

#include <algorithm>
#include <cmath>

#include "index/nearest_selection.h"
#include "src/core/check.h"

namespace engram {

namespace {

// What units of work take, in distances of some 30 ns.
constexpr uint32_t kWorkOfPreparing = 128;
constexpr uint32_t kWorkOfChoosing = 40;
constexpr uint32_t kLooksCountedPerDistance = 16;
constexpr uint32_t kLooksGroupedPerDistance = 8;
constexpr uint32_t kLooksAtOnce = 4'096;
constexpr uint32_t kPairsPerDistance = 32;
constexpr uint32_t kWorkOfSplit = 4'000;
// Nodes that are compared with a list at once.
constexpr size_t kQueriesAtOnce = 32;
// However few links are selected among: estimates are not right enough for fewer.
constexpr uint32_t kLeastCompared = 48;
// Candidates that are compared again at once.
constexpr size_t kComparedAtOnce = 8;
// So many more candidates than asked for may be kept, to find the bound in few passes.
constexpr size_t kCandidateTolerance = 8;
// One in so many nodes shows whether recalls may walk by codes, and while all is well whether signs
// are of use.
constexpr uint32_t kNodesPerCheck = 4;
constexpr uint32_t kNodesPerCheckWhenCalm = 16;
// Signs of fewer bits than this err more, and int8 rows cost less: more are compared again.
constexpr double kManyBits = 768;
constexpr double kMostComparedAgain = 2;

}  // namespace

BatchLinker::BatchLinker(ArenaHeap* heap, const HnswBuildParams& params, HnswLinker* linker)
    : heap_(heap), params_(params), linker_(linker) {
  static_assert(InvertedLists::kMostAtOnce <= BlockProducts::kMaxQueries);
  considered_ = CandidatesFor(params_.ef_construction);
}

BatchLinker::~BatchLinker() { FreeMemory(); }

bool BatchLinker::TakeMemory() {
  if (memory_.estimates != nullptr) return true;
  Memory taken;
  constexpr size_t kSlots = kMaxBatch * kCandidates + kSelectionSlack;
  taken.estimates = heap_->AllocateArray<float>(kSlots);
  taken.candidates = heap_->AllocateArray<NodeId>(kSlots);
  taken.looks = heap_->AllocateArray<Look>(size_t{kMaxBatch} * InvertedLists::kMostChosen);
  taken.queries = heap_->AllocateArray<Query>(size_t{kMaxBatch} * InvertedLists::kMostChosen);
  memory_ = taken;
  if (taken.estimates != nullptr && taken.candidates != nullptr && taken.looks != nullptr &&
      taken.queries != nullptr) {
    return true;
  }
  FreeMemory();
  return false;
}

void BatchLinker::FreeMemory() {
  constexpr size_t kSlots = kMaxBatch * kCandidates + kSelectionSlack;
  constexpr size_t kChosen = size_t{kMaxBatch} * InvertedLists::kMostChosen;
  const auto free = [this](auto* block, size_t count) {
    if (block != nullptr) heap_->FreeArray(block, count);
  };
  free(memory_.estimates, kSlots);
  free(memory_.candidates, kSlots);
  free(memory_.looks, kChosen);
  free(memory_.queries, kChosen);
  free(starts_, starts_count_);
  memory_ = {};
  starts_ = nullptr;
  starts_count_ = 0;
}

bool BatchLinker::Begin(const BatchTarget& target, std::span<const NodeId> nodes) {
  CHECK(!active() && !linker_->active(), "a linker links one batch at a time");
  CHECK(!nodes.empty() && nodes.size() <= kMaxBatch, "a batch is 1 to 1,024 nodes");
  const NodeId last = *std::max_element(nodes.begin(), nodes.end());
  const size_t room = std::max(target.graph->known_nodes(), size_t{last} + 1);
  if (!TakeMemory() || !target.lists->Reserve(room) || !linker_->Reserve(room)) {
    return false;
  }
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (target.graph->AddNode(nodes[i], linker_->DrawLevel(nodes[i]))) continue;
    while (i-- > 0) target.graph->RemoveNode(nodes[i]);
    return false;
  }
  target_ = target;
  target_.vectors.graph = target.graph;
  walk_ = target.codes->TargetFor(target.graph, linker_->walk_query());
  std::copy(nodes.begin(), nodes.end(), nodes_.begin());
  const double bits = static_cast<double>(target.codes->format().bits());
  const double compared = std::max(considered_.compared(), kLeastCompared) *
                          std::clamp(std::sqrt(kManyBits / bits), 1.0, kMostComparedAgain);
  compared_again_ = std::min(static_cast<uint32_t>(compared), uint32_t{kCandidates / 2});
  size_ = static_cast<uint32_t>(nodes.size());
  Advance(Phase::kPrepare);
  return true;
}

void BatchLinker::Advance(Phase next) {
  phase_ = next;
  next_ = 0;
  inner_ = 0;
}

bool BatchLinker::Step(uint32_t max_distances) {
  CHECK(active(), "Begin comes before Step");
  uint32_t work = 0;
  do {
    switch (phase_) {
      case Phase::kPrepare:
        work += StepPrepare();
        break;
      case Phase::kAssign:
        work += StepAssign();
        break;
      case Phase::kCount:
        work += StepCount();
        break;
      case Phase::kGroup:
        work += StepGroup();
        break;
      case Phase::kScan:
        work += StepScan();
        break;
      case Phase::kLink:
        work += StepLink(max_distances);
        break;
      case Phase::kSplit:
        if (target_.lists->SplitOne()) {
          work += kWorkOfSplit;
        } else {
          Advance(Phase::kMerge);
        }
        break;
      // Not in turn with splits: what one leaves the other might undo, without end.
      case Phase::kMerge:
        if (target_.lists->MergeOne(products_)) {
          work += kWorkOfSplit;
        } else {
          Advance(Phase::kFree);
        }
        break;
      case Phase::kFree:
        return true;
    }
  } while (work < max_distances && active());
  return !active();
}

// 1. One node.
uint32_t BatchLinker::StepPrepare() {
  const NodeId node = nodes_[next_];
  std::array<float, kMaxDimension> numbers;
  target_.format->Decode(target_.vectors.vectors->Row(node), numbers.data());
  Entry& entry = entries_[next_];
  entry = {.code = {}, .bound = HUGE_VALF, .candidates = 0, .lists = 0, .is_far = false};
  entry.is_far = target_.codes->IsFar(numbers.data());
  std::byte* const code = target_.codes->rows().Row(node);
  target_.codes->format().Encode(numbers.data(), code);
  entry.code = target_.codes->signs().QueryOf(code);
  if (++next_ == size_) Advance(Phase::kAssign);
  return kWorkOfPreparing;
}

// 2. Some nodes. Where memory is short a node is in no list: it is linked, and others will not find
// it by lists.
uint32_t BatchLinker::StepAssign() {
  const uint32_t count = std::min(size_ - next_, InvertedLists::kMostAtOnce);
  std::array<InvertedLists::Row, InvertedLists::kMostAtOnce> rows;
  for (uint32_t i = 0; i < count; ++i) {
    const Entry& entry = entries_[next_ + i];
    rows[i] = {target_.vectors.vectors->Row(nodes_[next_ + i]),
               entry.is_far ? nullptr : entry.code.code};
  }
  std::array<InvertedLists::Choice, InvertedLists::kMostAtOnce> choices;
  target_.lists->Choose(products_, {rows.data(), count}, static_cast<float>(params_.scanned),
                        choices.data());
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t place = next_ + i;
    const NodeId node = nodes_[place];
    InvertedLists::Choice& choice = choices[i];
    // It was empty before, or too many others come first.
    const auto end = choice.lists.begin() + choice.count;
    if (std::find(choice.lists.begin(), end, choice.home) == end) {
      const bool is_full = choice.count == InvertedLists::kMostChosen;
      choice.lists[is_full ? choice.count - 1 : choice.count++] = choice.home;
    }
    Look* const looks = memory_.looks + size_t{place} * InvertedLists::kMostChosen;
    for (uint32_t j = 0; j < choice.count; ++j) {
      looks[j] = {choice.lists[j], target_.lists->size(choice.lists[j])};
    }
    entries_[place].lists = entries_[place].is_far ? 0 : choice.count;
    (void)target_.lists->Add(choice.home, node, target_.codes->rows().Row(node));
  }
  next_ += count;
  if (next_ == size_) Advance(Phase::kCount);
  return kWorkOfChoosing * count;
}

// The batch by list (a counting sort), some nodes at a time: first how many look in each list. No
// node has candidates without memory for it.
uint32_t BatchLinker::StepCount() {
  const uint32_t lists = target_.lists->count();
  if (next_ == 0) {
    if (!ReserveStarts(lists + 1)) {
      Advance(Phase::kLink);
      return 0;
    }
    std::fill_n(starts_, lists + 1, 0U);
  }
  const uint32_t looks =
      ForSomeLooks([this](uint32_t, const Look& look) { ++starts_[look.list + 1]; });
  if (next_ == size_) {
    for (uint32_t list = 0; list < lists; ++list) starts_[list + 1] += starts_[list];
    Advance(Phase::kGroup);
  }
  return (looks + lists) / kLooksCountedPerDistance;
}

bool BatchLinker::ReserveStarts(uint32_t count) {
  if (starts_count_ >= count) return true;
  if (starts_ != nullptr) heap_->FreeArray(starts_, starts_count_);
  starts_ = heap_->AllocateArray<uint32_t>(size_t{2} * count);
  starts_count_ = starts_ == nullptr ? 0 : 2 * count;
  return starts_ != nullptr;
}

uint32_t BatchLinker::StepGroup() {
  const uint32_t looks = ForSomeLooks([this](uint32_t place, const Look& look) {
    memory_.queries[starts_[look.list]++] = {place, look.members};
  });
  // Each start has moved to its list's end, which is where the next one begins.
  if (next_ == size_) Advance(Phase::kScan);
  return looks / kLooksGroupedPerDistance;
}

// Those of the next few nodes; returns how many.
template <typename Visit>
uint32_t BatchLinker::ForSomeLooks(Visit&& visit) {
  uint32_t count = 0;
  for (; next_ < size_ && count < kLooksAtOnce; ++next_) {
    const Look* const looks = memory_.looks + size_t{next_} * InvertedLists::kMostChosen;
    for (uint32_t i = 0; i < entries_[next_].lists; ++i) visit(next_, looks[i]);
    count += entries_[next_].lists;
  }
  return count;
}

// 3. One list with some of the nodes.
uint32_t BatchLinker::StepScan() {
  const uint32_t begin = next_ == 0 ? 0 : starts_[next_ - 1];
  const std::span<const Query> queries(memory_.queries + begin, starts_[next_] - begin);
  const size_t count = std::min<size_t>(queries.size() - inner_, kQueriesAtOnce);
  uint32_t pairs = 0;
  if (count > 0 && target_.lists->size(next_) > 0) {
    const bool is_last = inner_ + count == queries.size();
    const InvertedLists::Codes behind = target_.lists->FirstCodes(is_last ? NextScanned() : next_);
    uint32_t first = 0;
    target_.lists->ForEachBlock(next_, [&](const InvertedLists::Block& block) {
      ScanBlock(block, queries.subspan(inner_, count), first,
                block.next.block == nullptr ? behind : block.next);
      first += static_cast<uint32_t>(block.nodes.size());
    });
    pairs = static_cast<uint32_t>(count) * target_.lists->size(next_);
    estimates_ += pairs;
  }
  inner_ += static_cast<uint32_t>(count);
  if (inner_ == queries.size()) {
    inner_ = 0;
    if (++next_ == target_.lists->count()) Advance(Phase::kLink);
  }
  return 1 + pairs / kPairsPerDistance;
}

// The list behind next_ that some node looks in; next_ itself where there is none.
uint32_t BatchLinker::NextScanned() const {
  for (uint32_t list = next_ + 1; list < target_.lists->count(); ++list) {
    if (starts_[list] > starts_[list - 1]) return list;
  }
  return next_;
}

// `first`: members of the list before the block. `next`: the block that comes after it, which is
// asked for meanwhile.
void BatchLinker::ScanBlock(const InvertedLists::Block& block, std::span<const Query> queries,
                            uint32_t first, InvertedLists::Codes next) {
  const SignBlocks& signs = target_.codes->signs();
  const size_t next_bytes = signs.block_bytes(next.places);
  const size_t share = (next_bytes / queries.size() + kCacheLineBytes) & ~(kCacheLineBytes - 1);
  size_t asked = 0;
  for (const auto [place, visible] : queries) {
    for (const size_t end = std::min(asked + share, next_bytes); asked < end;
         asked += kCacheLineBytes) {
      __builtin_prefetch(next.block + asked, 0, 2);
    }
    if (visible <= first) continue;
    Entry& entry = entries_[place];
    if (entry.candidates + SignBlocks::kMembers + kSelectionSlack > kCandidates) {
      ShrinkCandidates(place, compared_again_, compared_again_ + compared_again_ / 3);
    }
    const size_t at = size_t{place} * kCandidates + entry.candidates;
    const size_t members = std::min<size_t>(block.nodes.size(), visible - first);
    entry.candidates += static_cast<uint32_t>(
        signs.AppendNearer(block.codes.block, members, entry.code, block.nodes.data(), entry.bound,
                           memory_.estimates + at, memory_.candidates + at, block.codes.places));
  }
}

void BatchLinker::ShrinkToCompared(uint32_t place) {
  ShrinkCandidates(place, compared_again_, compared_again_ + compared_again_ / kCandidateTolerance);
}

// The nearest `least` to `most`, unless there are fewer. Of many at one distance the first.
void BatchLinker::ShrinkCandidates(uint32_t place, size_t least, size_t most) {
  Entry& entry = entries_[place];
  float* const estimates = memory_.estimates + size_t{place} * kCandidates;
  NodeId* const candidates = memory_.candidates + size_t{place} * kCandidates;
  if (entry.candidates <= most) return;
  const float bound = BoundOfNearest(estimates, nullptr, entry.candidates,
                                     static_cast<float>(least), static_cast<float>(most));
  const size_t kept = KeepNearer(bound, estimates, candidates, entry.candidates);
  entry.candidates = static_cast<uint32_t>(std::min(kept, most));
  entry.bound = std::min(entry.bound, bound);
}

// 4. Some of one node.
uint32_t BatchLinker::StepLink(uint32_t max_distances) {
  const uint64_t before = linker_->distances() + compared_;
  if (!linker_->active()) BeginLink();
  if (linker_->Step(max_distances) && ++next_ == size_) Advance(Phase::kSplit);
  return static_cast<uint32_t>(linker_->distances() + compared_ - before);
}

void BatchLinker::BeginLink() {
  if (next_ == 0) ShrinkToCompared(0);
  // While this one's are compared, the next one's rows are on their way.
  if (next_ + 1 < size_) ShrinkToCompared(next_ + 1);
  const size_t found = CompareAgain(next_);
  CheckEstimates(found);
  sorter_(found_.data(), found, hwy::SortAscending());
  const size_t considered = ThinOut(found);
  const NodeId node = nodes_[next_];
  // Nothing is found where memory was short for grouping, or estimates are no numbers.
  if (entries_[next_].is_far || found == 0) {
    linker_->BeginAdded(target_.graph, target_.vectors, node);
    return;
  }
  if (target_.graph->Level(node) > 0) EncodeWalkQuery(node);
  linker_->BeginFound(target_.graph, target_.vectors, node, walk_, {found_.data(), considered});
}

void BatchLinker::EncodeWalkQuery(NodeId node) {
  std::array<float, kMaxDimension> numbers;
  target_.format->Decode(target_.vectors.vectors->Row(node), numbers.data());
  target_.codes->format().EncodeQuery(numbers.data(), linker_->walk_query());
}

// Where signs have chosen any ones of a crowd, the node is linked by int8. The estimates that
// recalls walk by are compared as well: in a narrow cloud they may tell nothing where signs, whose
// errors shrink with the angle, still do. As long as all is well some nodes show it.
void BatchLinker::CheckEstimates(size_t found) {
  EstimateAgreement* const agreement = target_.agreement;
  if (agreement == nullptr || found == 0 || entries_[next_].candidates != found) return;
  const bool is_calm = agreement->IsCalm();
  if (is_calm && next_ % kNodesPerCheckWhenCalm != 0) return;
  const std::span<const NeighbourKey> keys(found_.data(), found);
  const float* const by_signs = memory_.estimates + size_t{next_} * kCandidates;
  if (EstimateAgreement::Displacement({by_signs, found}, keys) > EstimateAgreement::kUseless) {
    entries_[next_].is_far = true;
  }
  if (next_ % kNodesPerCheck != 0) return;
  EncodeWalkQuery(nodes_[next_]);
  std::array<const std::byte*, kCandidates> codes;
  std::array<float, kCandidates> by_walk;
  for (size_t i = 0; i < found; ++i) codes[i] = target_.codes->rows().Row(NodeOf(keys[i]));
  const RabitqFormat& format = target_.codes->format();
  format.distances()(linker_->walk_query(), codes.data(), found, format.bits(), by_walk.data());
  agreement->Add(nodes_[next_], {by_walk.data(), found}, keys);
}

// Of what was found, nearest first, those that links are selected among; returns how many.
size_t BatchLinker::ThinOut(size_t found) {
  size_t kept = std::min<size_t>(found, considered_.nearest);
  for (size_t i = kept; i < found && kept < considered_.count(); i += kFartherStep) {
    found_[kept++] = found_[i];
  }
  return kept;
}

// The distances of the candidates that may be linked to; returns how many.
size_t BatchLinker::CompareAgain(uint32_t place) {
  const std::span<const NodeId> candidates(memory_.candidates + size_t{place} * kCandidates,
                                           entries_[place].candidates);
  const std::span<const NodeId> next(memory_.candidates + (size_t{place} + 1) * kCandidates,
                                     place + 1 < size_ ? entries_[place + 1].candidates : 0);
  const VectorStore& rows = *target_.vectors.vectors;
  const std::byte* const row = rows.Row(nodes_[place]);
  std::array<const std::byte*, kComparedAtOnce> some;
  std::array<NodeId, kComparedAtOnce> some_nodes;
  std::array<float, kComparedAtOnce> distances;
  size_t found = 0;
  for (size_t i = 0; i < std::max(candidates.size(), next.size()); i += kComparedAtOnce) {
    for (size_t j = i; j < std::min(i + kComparedAtOnce, next.size()); ++j) {
      const std::byte* const asked = rows.Row(next[j]);
      for (size_t at = 0; at < rows.row_bytes(); at += kCacheLineBytes) {
        __builtin_prefetch(asked + at, 0, 2);
      }
    }
    size_t count = 0;
    for (size_t j = i; j < std::min(i + kComparedAtOnce, candidates.size()); ++j) {
      if (target_.graph->IsDoomed(candidates[j])) continue;
      some_nodes[count] = candidates[j];
      some[count++] = rows.Row(candidates[j]);
    }
    target_.vectors.DistancesBetween(row, {some.data(), count}, distances.data());
    for (size_t j = 0; j < count; ++j) found_[found++] = KeyOf(distances[j], some_nodes[j]);
  }
  compared_ += candidates.size();
  return found;
}

}  // namespace engram
