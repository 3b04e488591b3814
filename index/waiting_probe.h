#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "index/hnsw_search.h"
#include "index/node_filter.h"
#include "index/space.h"
#include "src/core/commit_stamp.h"
#include "src/core/ids.h"

namespace engram {

// Looks for the nearest of what waits in lists to be linked (space_waiting.cc), in slices: the
// lists about the query are compared with it by the signs of both, and the nearest by these by
// int8.
//
// At ef 128 about a half of up to 100,000 that wait are looked at, 49,000 of up to 900,000 and more
// by the square root beyond. Of text vectors that finds as many of the ten nearest as the graph of
// all does, but for 0.01, with 40,000 to 500,000 that wait.
//
// Thread safety: the shard core's alone; the space does not change between Begin and the end. Takes
// memory at construction only.
class WaitingProbe {
 public:
  // The most that are found.
  static constexpr size_t kMaxFound =
      std::max<size_t>(kMaxEf, kMaxRecallResults + kMaxRecallResults / 2);

  WaitingProbe();

  // How many members a recall with `ef` looks at where so many wait; all, where there are fewer.
  static float MembersFor(uint32_t ef, uint64_t waiting);

  // `query`: as Space::PrepareQuery wrote it, with signs; stays until the end. `wanted`: how many
  // are to be found. Begins anew. `filter`: what is found matches it; nullptr: all does.
  void Begin(const Space* space, const Space::QueryForms& query, CommitStamp snapshot, uint32_t ef,
             uint32_t wanted, const NodeFilter* filter = nullptr);
  // Until about `max_distances` distances' work is done; what it took is added to `distances`. True
  // at the end.
  bool Step(uint64_t max_distances, uint64_t* distances);
  // After the end: what is visible, with distances by int8, in no order; at least `wanted` if so
  // many were found.
  std::span<const Neighbour> found() const { return {found_.data(), found_count_}; }
  // Members that were looked at by signs, and vectors that were compared by int8.
  uint64_t members() const { return members_; }
  uint64_t compared() const { return compared_by_int8_; }

 private:
  void ScanList(uint32_t list);
  void Keep(size_t least, size_t most);
  void CompareByInt8(std::span<const NodeId> nodes, float* distances) const;
  void CompareSome();

  const Space* space_ = nullptr;
  Space::QueryForms query_{};
  bool is_far_ = false;  // signs do not tell what is near the query
  CommitStamp snapshot_ = kNoStamp;
  const NodeFilter* filter_ = nullptr;
  uint32_t kept_ = 0;  // candidates by signs
  float bound_ = 0;    // beyond which none is kept
  size_t list_count_ = 0;
  size_t next_list_ = 0;
  size_t candidate_count_ = 0;
  size_t compared_ = 0;
  size_t found_count_ = 0;
  uint64_t work_ = 0;  // in distances
  uint64_t members_ = 0;
  uint64_t compared_by_int8_ = 0;
  std::vector<uint32_t> lists_;
  std::vector<float> estimates_;
  std::vector<NodeId> candidates_;
  std::vector<Neighbour> found_;
};

}  // namespace engram
