#include "index/waiting_probe.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "index/inverted_lists.h"
#include "index/nearest_selection.h"
#include "src/core/check.h"

namespace engram {

namespace {

// Members that are looked at for each one of ef, by how many wait (see MembersFor).
constexpr float kLeastPerEf = 128;
constexpr float kUsualPerEf = 384;
constexpr float kFewWaiting = 100'000;
// Signs err: so many are compared by int8, however few are wanted.
constexpr uint32_t kLeastKept = 128;
// Lists that are looked in at most.
constexpr size_t kMostLists = 4'096;
constexpr size_t kMostCandidates = 2 * WaitingProbe::kMaxFound + SignBlocks::kMembers;
constexpr size_t kComparedAtOnce = 8;
// Work, in distances of some 30 ns.
constexpr uint64_t kMembersPerDistance = 16;
constexpr uint64_t kListsPerDistance = 16;

}  // namespace

WaitingProbe::WaitingProbe()
    : lists_(kMostLists + kSelectionSlack),
      estimates_(kMostCandidates + kSelectionSlack),
      candidates_(kMostCandidates + kSelectionSlack),
      found_(kMaxFound) {}

void WaitingProbe::Begin(const Space* space, const Space::QueryForms& query, CommitStamp snapshot,
                         uint32_t ef, uint32_t wanted, const NodeFilter* filter) {
  space_ = space;
  query_ = query;
  is_far_ = *query.signs_are_far;
  snapshot_ = snapshot;
  filter_ = filter;
  kept_ = std::max({ef, wanted, kLeastKept});
  CHECK(kept_ <= kMaxFound, "as many as a recall may want");
  bound_ = HUGE_VALF;
  next_list_ = 0;
  candidate_count_ = 0;
  compared_ = 0;
  found_count_ = 0;
  members_ = 0;
  compared_by_int8_ = 0;
  const float members = MembersFor(std::max(ef, wanted), space->waiting());
  list_count_ = space->ChooseWaiting(query, members, lists_);
  work_ = list_count_ / kListsPerDistance + 1;
}

float WaitingProbe::MembersFor(uint32_t ef, uint64_t waiting) {
  const float share = static_cast<float>(waiting) / kFewWaiting;
  const float usual = kUsualPerEf * std::min(share, 1.0F);
  const float least = kLeastPerEf * std::sqrt(std::max(share, 1.0F));
  return std::max(least, usual) * static_cast<float>(ef);
}

bool WaitingProbe::Step(uint64_t max_distances, uint64_t* distances) {
  while (work_ < max_distances) {
    if (next_list_ < list_count_) {
      ScanList(lists_[next_list_++]);
      if (next_list_ == list_count_) Keep(kept_, kept_ + kept_ / 8);
    } else if (compared_ < candidate_count_) {
      CompareSome();
    } else {
      break;
    }
  }
  *distances += work_;
  work_ = 0;
  return next_list_ == list_count_ && compared_ == candidate_count_;
}

void WaitingProbe::ScanList(uint32_t list) {
  space_->ForEachWaiting(
      list, query_,
      [&](const InvertedLists::Block& block, const SignBlocks& signs, const std::byte* code) {
        if (candidate_count_ + SignBlocks::kMembers > kMostCandidates ||
            candidate_count_ > 2 * size_t{kept_}) {
          Keep(kept_, kept_ + kept_ / 3);
        }
        float* const estimates = estimates_.data() + candidate_count_;
        NodeId* const candidates = candidates_.data() + candidate_count_;
        size_t added = 0;
        if (is_far_) {
          added = block.nodes.size();
          std::copy(block.nodes.begin(), block.nodes.end(), candidates);
          CompareByInt8({candidates, added}, estimates);
          work_ += added;
          compared_by_int8_ += added;
        } else {
          members_ += block.nodes.size();
          added = signs.AppendNearer(block.codes.block, block.nodes.size(), signs.QueryOf(code),
                                     block.nodes.data(), bound_, estimates, candidates,
                                     block.codes.places);
          work_ += block.nodes.size() / kMembersPerDistance + 1;
        }
        // Now, lest what has ended, or is not asked for, takes the places of what is beside it.
        size_t visible = 0;
        for (size_t i = 0; i < added; ++i) {
          if (!space_->IsVisible(candidates[i], snapshot_)) continue;
          if (filter_ != nullptr && !filter_->Matches(candidates[i])) continue;
          candidates[visible] = candidates[i];
          estimates[visible++] = estimates[i];
        }
        candidate_count_ += visible;
      });
}

// The nearest `least` to `most`.
void WaitingProbe::Keep(size_t least, size_t most) {
  if (candidate_count_ <= most) return;
  const float bound = BoundOfNearest(estimates_.data(), nullptr, candidate_count_,
                                     static_cast<float>(least), static_cast<float>(most));
  const size_t kept = KeepNearer(bound, estimates_.data(), candidates_.data(), candidate_count_);
  candidate_count_ = std::min(kept, most);
  bound_ = std::min(bound_, bound);
}

void WaitingProbe::CompareByInt8(std::span<const NodeId> nodes, float* distances) const {
  const SearchTarget target = space_->TargetFor(query_.code);
  std::array<const std::byte*, kComparedAtOnce> rows;
  for (size_t first = 0; first < nodes.size(); first += kComparedAtOnce) {
    const size_t count = std::min(kComparedAtOnce, nodes.size() - first);
    for (size_t i = 0; i < count; ++i) rows[i] = target.vectors->Row(nodes[first + i]);
    target.distances(query_.code, rows.data(), count, target.padded_dimension, distances + first);
  }
}

void WaitingProbe::CompareSome() {
  const SearchTarget target = space_->TargetFor(query_.code);
  const size_t end = std::min(candidate_count_, compared_ + kComparedAtOnce);
  const size_t ahead = std::min(candidate_count_, end + kComparedAtOnce);
  for (size_t i = end; i < ahead; ++i) target.Prefetch(candidates_[i]);
  std::array<float, kComparedAtOnce> distances;
  CompareByInt8(std::span(candidates_).subspan(compared_, end - compared_), distances.data());
  for (size_t i = compared_; i < end; ++i) {
    found_[found_count_++] = {distances[i - compared_], candidates_[i]};
  }
  work_ += end - compared_;
  compared_by_int8_ += end - compared_;
  compared_ = end;
}

}  // namespace engram
