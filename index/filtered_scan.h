#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "index/attribute_index.h"
#include "index/hnsw_search.h"
#include "index/nearest_selection.h"
#include "index/node_filter.h"
#include "index/space.h"
#include "index/time_index.h"
#include "src/core/commit_stamp.h"
#include "src/core/ids.h"

namespace engram {

// The nodes of a space that a filter matches and a snapshot sees, one after the other, in slices:
// by the rarest clause or by time, whichever names fewer, and where neither does, all nodes. Or
// those that are in the graph, without a filter.
//
// Thread safety: the shard core's alone; the space does not change between Begin and the end.
class FilteredNodes {
 public:
  // Gathered in one call at most.
  static constexpr size_t kAtOnce = 64;

  void Begin(const Space* space, const NodeFilter* filter, CommitStamp snapshot);
  void BeginLinked(const Space* space, CommitStamp snapshot);
  // How many they are at most, and whether an index names them.
  uint64_t most() const { return most_; }
  bool is_indexed() const { return source_ != Source::kAll; }
  bool are_linked() const { return source_ == Source::kLinked; }
  // The next ones, maybe none. False when those before were the last. What was looked at for them
  // is added to *looked_at.
  bool Next(std::span<const NodeId>* nodes, uint64_t* looked_at);

 private:
  enum class Source : uint8_t { kAttributes, kTimes, kAll, kLinked };

  bool NextBlock(bool* are_in_time);
  bool NextOfAll();
  size_t KeepMatching(std::span<const NodeId> nodes, bool are_in_time);
  size_t KeepLinked(std::span<const NodeId> nodes);

  const Space* space_ = nullptr;
  const NodeFilter* filter_ = nullptr;
  CommitStamp snapshot_ = kNoStamp;
  Source source_ = Source::kAll;
  uint64_t most_ = 0;
  AttributeIndex::Candidates by_attributes_;
  TimeIndex::Candidates by_time_;
  NodeId next_ = 0;  // of all
  std::span<const NodeId> block_;
  bool block_in_time_ = false;
  std::array<NodeId, kAtOnce> all_;
  std::array<NodeId, kAtOnce> matching_;
};

// The nearest of these nodes, all of them compared, in slices. Where there are many, and the space
// is walked with codes, what is in the graph is compared by these first.
//
// Thread safety: as FilteredNodes. Takes memory at construction only.
class FilteredScan {
 public:
  static constexpr uint32_t kMaxPicked = 32'000;

  struct Query {
    SearchTarget rows{};                  // what every node has
    std::optional<SearchTarget> codes{};  // what those in the graph have besides
    uint32_t picked = 1;                  // by codes, at least; at most kMaxPicked
  };

  FilteredScan();

  // `nodes` were begun.
  void Begin(const Space* space, FilteredNodes* nodes, const Query& query);
  // Until about `max_distances` distances' work is done; what it took is added to *distances. True
  // at the end.
  bool Step(uint64_t max_distances, uint64_t* distances);
  // Those that the last Step has compared by their rows, in no order, without the far ones where
  // `bound` of it said so.
  std::span<const Neighbour> compared() const { return {compared_.data(), compared_count_}; }
  // After the end: the nearest of those that were compared by codes, with estimates, in no order;
  // `picked` of them or a few more, and at most found.size(). Returns how many.
  size_t TakePicked(std::span<Neighbour> found);

 private:
  static constexpr size_t kMostCompared = 512;
  // Some that were asked for, and are compared once as many others have been asked for: an index
  // names few at a time, too few to be on their way meanwhile.
  static constexpr size_t kChunk = 48;
  static constexpr size_t kMostInChunk = kChunk + FilteredNodes::kAtOnce;
  static constexpr size_t kRoom = 2 * size_t{kMaxPicked} + kMostInChunk + kSelectionSlack;
  struct Chunk {
    size_t count = 0;
    std::array<NodeId, kMostInChunk> nodes;
    std::array<const std::byte*, kMostInChunk> rows;
  };

  void CompareChunk(Chunk* chunk, const SearchTarget& target, float* distances);
  void CompareCodes(Chunk* chunk);
  void CompareRows(Chunk* chunk);
  void TakeChunk(std::span<const NodeId> nodes);
  void AddTo(Chunk* chunk, const SearchTarget& target, NodeId node);
  void Keep(size_t least, size_t most);

  const Space* space_ = nullptr;
  FilteredNodes* nodes_ = nullptr;
  Query query_;
  bool all_have_codes_ = false;
  bool has_more_ = false;
  std::array<Chunk, 2> by_codes_;
  std::array<Chunk, 2> by_rows_;
  size_t taking_ = 0;  // of each two, the one that fills; the other was asked for
  size_t candidate_count_ = 0;
  float bound_ = 0;
  bool is_bounded_ = false;
  size_t compared_count_ = 0;
  const std::unique_ptr<float[]> estimates_;
  const std::unique_ptr<NodeId[]> candidates_;
  std::vector<Neighbour> compared_;
};

}  // namespace engram
