#include "index/hnsw_search.h"

#include <cstring>

namespace engram {
namespace {

// Room for candidates, in multiples of ef. While every node is live at most ef of the candidates
// can still matter; the rest is for retired nodes, which crowd a search without filling it.
constexpr size_t kCandidatesPerEf = 4;
constexpr size_t kMinCandidates = 1024;
constexpr size_t kMinVisited = 4096;

}  // namespace

SearchScratch::SearchScratch(ArenaHeap* heap, uint32_t max_ef)
    : heap_(heap),
      max_ef_(max_ef),
      candidates_capacity_(std::max(max_ef * kCandidatesPerEf, kMinCandidates)) {
  CHECK(max_ef >= 1 && max_ef <= kMaxEf, "ef is 1 to 10,000");
}

bool SearchScratch::Reserve(size_t nodes) {
  if (result_keys_ == nullptr) {
    result_keys_ = heap_->AllocateArray<NeighbourKey>(max_ef_);
    if (result_keys_ == nullptr) return false;
    results_.Attach(result_keys_);
  }
  if (candidate_keys_ == nullptr) {
    candidate_keys_ = heap_->AllocateArray<NeighbourKey>(candidates_capacity_);
    if (candidate_keys_ == nullptr) return false;
    candidates_.Attach(candidate_keys_);
  }
  if (nodes <= visited_capacity_) return true;
  const size_t grown_capacity = std::bit_ceil(std::max(nodes, kMinVisited));
  Epoch* grown = heap_->AllocateArray<Epoch>(grown_capacity);
  if (grown == nullptr) return false;
  // A search under way keeps its marks.
  if (visited_ != nullptr) std::memcpy(grown, visited_, visited_capacity_ * sizeof(Epoch));
  std::memset(grown + visited_capacity_, 0, (grown_capacity - visited_capacity_) * sizeof(Epoch));
  if (visited_ != nullptr) heap_->FreeArray(visited_, visited_capacity_);
  visited_ = grown;
  visited_capacity_ = grown_capacity;
  return true;
}

void SearchScratch::Release() {
  if (visited_ != nullptr) heap_->FreeArray(visited_, visited_capacity_);
  if (candidate_keys_ != nullptr) heap_->FreeArray(candidate_keys_, candidates_capacity_);
  if (result_keys_ != nullptr) heap_->FreeArray(result_keys_, max_ef_);
  visited_ = nullptr;
  visited_capacity_ = 0;
  candidate_keys_ = nullptr;
  result_keys_ = nullptr;
}

void SearchScratch::ForgetVisited() {
  if (++epoch_ != 0) return;
  // The epochs have come round: marks of 65,536 searches ago must not count.
  if (visited_ != nullptr) std::memset(visited_, 0, visited_capacity_ * sizeof(Epoch));
  epoch_ = 1;
}

void SearchScratch::TrimCandidates(bool bounded) {
  NeighbourKey* const end = candidate_keys_ + candidates_.size();
  NeighbourKey* kept_end = end;
  if (bounded) {
    const NeighbourKey bound = results_.top();
    kept_end =
        std::partition(candidate_keys_, end, [bound](NeighbourKey key) { return key <= bound; });
  }
  const auto half = static_cast<ptrdiff_t>(candidates_capacity_ / 2);
  if (kept_end - candidate_keys_ > half) {
    kept_end = candidate_keys_ + half;
    std::nth_element(candidate_keys_, kept_end, end);
  }
  candidates_.Rebuild(static_cast<size_t>(kept_end - candidate_keys_));
}

bool GreedyHop(const SearchTarget& target, uint32_t level, NeighbourKey* nearest,
               uint64_t* distances) {
  std::array<NodeId, HnswGraph::kMaxM0> nodes;
  uint32_t count = 0;
  target.graph->ForEachLink(NodeOf(*nearest), level, [&](NodeId linked) {
    nodes[count++] = linked;
    target.Prefetch(linked);
  });
  const NeighbourKey before = *nearest;
  for (uint32_t i = 0; i < count; ++i) {
    *nearest = std::min(*nearest, KeyOf(target.DistanceTo(nodes[i]), nodes[i]));
  }
  *distances += count;
  return *nearest != before;
}

}  // namespace engram
