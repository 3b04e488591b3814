#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "perf/runbook.h"
#include "perf/vector_set.h"
#include "src/core/observation.h"
#include "src/core/result.h"

namespace engram {

inline constexpr int32_t kNoRow = -1;

// One observation of a step: the tag gets the vector of the row, or ends.
struct Mutation {
  uint32_t tag = 0;
  int32_t row = kNoRow;  // kNoRow: deleted
};

// Which tags live as a runbook goes on, and the row of each: the model that indexes are judged by.
class LiveTags {
 public:
  explicit LiveTags(uint64_t tags) : rows_(tags, kNoRow), turns_(tags, 0) {}

  // What the step does, tag by tag in its order; nothing for a search. Errors: kInvalidArgument
  // where it inserts what lives, or deletes or replaces what does not; nothing has changed then.
  Result<std::vector<Mutation>> Take(const Runbook& runbook, const RunbookStep& step);

  // By tag; kNoRow where it does not live.
  std::span<const int32_t> rows() const { return rows_; }
  size_t live() const { return live_; }
  // What lives, in the order in which it came.
  std::vector<Mutation> InOrder() const;

 private:
  std::vector<int32_t> rows_;    // by tag
  std::vector<uint64_t> turns_;  // by tag: of all that came, the how manieth it was
  uint64_t turn_ = 0;
  size_t live_ = 0;
};

// The exact k nearest of each query among what lives.
struct LiveTruth {
  uint32_t k = 0;
  std::vector<int32_t> tags;       // k a query, nearest first
  std::vector<double> kth_scores;  // the score of each query's last one
};

// Distances of all queries from all rows that ever live, each computed once, blocks of rows at a
// time: a truth is then a pass over numbers. Takes 4 bytes a row and query. The set outlives it.
//
// Thread safety: one thread's alone.
class LiveTruths {
 public:
  LiveTruths(const VectorSet& base, const VectorSet& queries, Metric metric, uint32_t k);

  // Among the tags with a row in `rows`, of which there are at least k. In float first, then in
  // double among the nearest some; ties by lower tag.
  LiveTruth Among(std::span<const int32_t> rows);
  // The same of one query alone.
  LiveTruth OfOne(size_t query, std::span<const int32_t> rows);

 private:
  void Compute(size_t block);
  std::vector<int32_t> Live(std::span<const int32_t> rows);
  void Add(size_t query, std::span<const int32_t> rows, std::span<const int32_t> live,
           LiveTruth* truth) const;
  // The distances of a query, by row.
  const float* Distances(size_t query) const { return distances_.data() + query * base_.size(); }

  const VectorSet& base_;
  const VectorSet& queries_;
  const Metric metric_;
  const uint32_t k_;
  std::vector<float> distances_;
  std::vector<bool> computed_;  // by block of rows
};

// What an answer is worth.
struct Judged {
  uint32_t hits = 0;
  uint32_t dead = 0;  // tags that do not live
};
// `returned` for one query, at most k of them. A tag as near as the kth true one is a hit
// (tools/engramctl/recall_quality.h).
Judged Judge(const VectorSet& base, std::span<const float> query, Metric metric,
             std::span<const int32_t> rows, const LiveTruth& truth, size_t number,
             std::span<const int64_t> returned);

}  // namespace engram
