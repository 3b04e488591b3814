// How inverted lists stay of one size (see inverted_lists.h): long ones are split, short ones are
// merged.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "index/inverted_lists.h"

namespace engram {

namespace {

// 2-means looks at so many members, fewer where a row is long, so many times.
constexpr uint32_t kMostSampled = 64;
constexpr uint32_t kLeastSampled = 16;
constexpr size_t kSampledNumbers = 65'536;
constexpr int kMeansRounds = 3;
// A quarter of the members at least goes to either side.
constexpr uint32_t kBoundarySample = 128;
// A list is merged into the nearest of those that have so many times a list's members together.
constexpr uint32_t kMergedAmong = 8;

using Numbers = std::array<float, kMaxDimension>;

// Number i of a sample of every `stride`th member. Not of the first of each, lest it take after a
// period in the order in which members came.
uint32_t SampledPlace(uint32_t i, uint32_t stride) { return i * stride + i % stride; }

}  // namespace

// ---------------------------------------------------------------------------------------------
// Splitting

// 1. A second list: an empty one, if there is one, or a new one.
// 2. Two centroids, by 2-means over some of the members.
// 3. The boundary between them: the middle, moved where fewer than a quarter would lie on one side.
// 4. Members beyond it move. A tie stays, but for every other one where all of them are equal.
bool InvertedLists::SplitOne() {
  float* const end = sizes_ + count_;
  const auto most = static_cast<float>(most_members());
  const float* const found = std::find_if(sizes_, end, [most](float size) { return size > most; });
  if (found == end) return false;
  const auto list = static_cast<uint32_t>(found - sizes_);
  uint32_t other = count_;
  if (empty_ > 0) {
    other = static_cast<uint32_t>(std::find(sizes_, sizes_ + count_, 0.0F) - sizes_);
  } else if (!AddList()) {
    return false;
  }
  FindCentroids(list, other);
  CodeCentroid(list);
  CodeCentroid(other);
  const float boundary = FindBoundary(list, other);
  // From the end, as the last member takes the place of one that moves.
  uint32_t equal = 0;
  for (uint32_t place = lists_[list].size; place-- > 0;) {
    const NodeId node = MemberAt(list, place);
    const float margin = Margin(node, list, other);
    const bool moves = margin < boundary || (margin == boundary && ++equal % 2 == 0);
    if (moves && !Move(list, place, other)) break;
  }
  return lists_[other].size > 0;
}

bool InvertedLists::Move(uint32_t list, uint32_t place, uint32_t other) {
  Stored* block = lists_[list].first;
  for (; place >= kBlockMembers; place -= kBlockMembers) block = block->next;
  const NodeId node = block->nodes()[place];
  List& to = lists_[other];
  if (!MakeRoom(&to)) return false;
  const uint32_t to_place = to.size % kBlockMembers;
  to.last->nodes()[to_place] = node;
  CopyCode(block, place, to.last, to_place);
  if (to.size++ == 0) --empty_;
  sizes_[other] = static_cast<float>(to.size);
  List& from = lists_[list];
  const uint32_t last_place = (from.size - 1) % kBlockMembers;
  block->nodes()[place] = from.last->nodes()[last_place];
  if (block != from.last || place != last_place) {
    CopyCode(from.last, last_place, block, place);
  }
  LeaveLastPlace(&from);
  if (from.size == 0) ++empty_;
  sizes_[list] = static_cast<float>(from.size);
  home_of_[node] = other + 1;
  return true;
}

// 2. Begins with a member and the one that is farthest from it.
void InvertedLists::FindCentroids(uint32_t list, uint32_t other) {
  const uint32_t size = lists_[list].size;
  const size_t dimension = format_->dimension();
  const auto by_length = static_cast<uint32_t>(kSampledNumbers / format_->padded_dimension());
  const uint32_t samples = std::min(size, std::clamp(by_length, kLeastSampled, kMostSampled));
  std::array<NodeId, kMostSampled> sample;
  for (uint32_t i = 0; i < samples; ++i)
    sample[i] = MemberAt(list, SampledPlace(i, size / samples));
  const std::byte* const first = vectors_->Row(sample[0]);
  const auto farthest =
      std::max_element(sample.begin(), sample.begin() + samples, [&](NodeId a, NodeId b) {
        return Apart(first, vectors_->Row(a)) < Apart(first, vectors_->Row(b));
      });
  const std::byte* const opposite = vectors_->Row(*farthest);
  Numbers numbers;
  const std::array<uint32_t, 2> sides{list, other};
  const std::array<const std::byte*, 2> ends{first, opposite};
  for (size_t side = 0; side < 2; ++side) {
    format_->Decode(ends[side], numbers.data());
    SetCentroid(sides[side], numbers.data(), ends[side]);
  }
  // Numbers that float just holds add up beyond it.
  std::array<std::array<double, kMaxDimension>, 2> sums;
  for (int round = 0; round < kMeansRounds; ++round) {
    std::array<uint32_t, 2> counts{};
    for (auto& sum : sums) std::fill_n(sum.data(), dimension, 0.0);
    for (uint32_t i = 0; i < samples; ++i) {
      const size_t side = Margin(sample[i], list, other) < 0 ? 1 : 0;
      format_->AddDecoded(vectors_->Row(sample[i]), sums[side].data());
      ++counts[side];
    }
    if (counts[0] == 0 || counts[1] == 0) return;
    for (size_t side = 0; side < 2; ++side) {
      for (size_t j = 0; j < dimension; ++j) {
        numbers[j] = static_cast<float>(sums[side][j] / counts[side]);
      }
      SetCentroid(sides[side], numbers.data(), ends[side]);
    }
  }
}

// 3.
float InvertedLists::FindBoundary(uint32_t list, uint32_t other) const {
  const uint32_t size = lists_[list].size;
  const uint32_t samples = std::min(size, kBoundarySample);
  std::array<float, kBoundarySample> margins;
  for (uint32_t i = 0; i < samples; ++i) {
    margins[i] = Margin(MemberAt(list, SampledPlace(i, size / samples)), list, other);
  }
  std::sort(margins.begin(), margins.begin() + samples);
  return std::clamp(0.0F, margins[samples / 4], margins[samples - 1 - samples / 4]);
}

// ---------------------------------------------------------------------------------------------
// Merging

// 1. The first list that has few members, or none.
// 2. Its members move to the one whose centroid is nearest to its own.
// 3. The last list takes its number, so that none is looked at for nothing.
bool InvertedLists::MergeOne(const BlockProducts& products) {
  if (count_ < 2) return false;
  float* const end = sizes_ + count_;
  const auto least = static_cast<float>(least_members());
  const float* const found =
      std::find_if(sizes_, end, [least](float size) { return size < least; });
  if (found == end) return false;
  const auto list = static_cast<uint32_t>(found - sizes_);
  if (lists_[list].size > 0) {
    const uint32_t other = NearestOther(products, list);
    while (lists_[list].size > 0) {
      if (!Move(list, lists_[list].size - 1, other)) return false;
    }
  }
  DropEmpty(list);
  return true;
}

// 3.
void InvertedLists::DropEmpty(uint32_t list) {
  const uint32_t last = count_ - 1;
  if (list != last) {
    ForEachBlock(last, [&](const Block& block) {
      for (const NodeId node : block.nodes) home_of_[node] = list + 1;
    });
    lists_[list] = lists_[last];
    sizes_[list] = sizes_[last];
    Group* const to = groups_[list / kGroupLists];
    const Group* const from = groups_[last / kGroupLists];
    const uint32_t place = list % kGroupLists;
    const uint32_t last_place = last % kGroupLists;
    to->norms[place] = from->norms[last_place];
    to->by_product[place] = from->by_product[last_place];
    to->by_distance[place] = from->by_distance[last_place];
    std::memcpy(Centroid(list), Centroid(last), format_->row_bytes());
    codes_.Copy(CentroidCodes(last / kGroupLists), last_place, CentroidCodes(list / kGroupLists),
                place);
  }
  sizes_[last] = 0;
  --count_;
  --empty_;
  if (count_ % kGroupLists != 0) return;
  bytes_ -= ArenaHeap::BlockBytes(GroupBytes());
  heap_->Free(reinterpret_cast<std::byte*>(groups_[count_ / kGroupLists]), GroupBytes());
}

// By its centroid, among the lists about it; any where distances are beyond all numbers.
uint32_t InvertedLists::NearestOther(const BlockProducts& products, uint32_t list) {
  alignas(kCacheLineBytes) std::array<std::byte, kMostCodeBytes> code;
  EncodeCentroid(list, code.data());
  const Row row{Centroid(list), code.data()};
  Choice about;
  Choose(products, {&row, 1}, static_cast<float>(kMergedAmong * most_members()), &about);
  uint32_t nearest = (list + 1) % count_;
  float least = HUGE_VALF;
  for (const uint32_t other : std::span(about.lists).first(about.count)) {
    if (other == list) continue;
    const float apart = Apart(Centroid(list), Centroid(other));
    if (!(apart < least)) continue;
    nearest = other;
    least = apart;
  }
  return nearest;
}

}  // namespace engram
