#include "perf/live_tags.h"

#include <algorithm>
#include <queue>
#include <string>
#include <utility>

#include "index/distance.h"
#include "src/core/check.h"
#include "tools/engramctl/recall_quality.h"

namespace engram {

namespace {

using Operation = RunbookStep::Operation;

// Rows compared with all queries before the next ones come: they stay in L2 meanwhile.
constexpr size_t kBlockRows = 128;
// What float leaves for double to put in order.
constexpr size_t kCandidates = 64;

// The nearest `kept` of what it is shown.
class Nearest {
 public:
  using Candidate = std::pair<float, int32_t>;  // distance, who

  explicit Nearest(size_t kept) : kept_(kept) {}
  void Consider(float distance, int32_t who) {
    if (heap_.size() == kept_) {
      if (distance >= heap_.top().first) return;
      heap_.pop();
    }
    heap_.emplace(distance, who);
  }
  // In no order.
  template <typename Take>
  void TakeAll(Take&& take) {
    for (; !heap_.empty(); heap_.pop()) take(heap_.top().second);
  }

 private:
  const size_t kept_;
  std::priority_queue<Candidate> heap_;
};

}  // namespace

Result<std::vector<Mutation>> LiveTags::Take(const Runbook& runbook, const RunbookStep& step) {
  std::vector<Mutation> mutations;
  if (step.operation == Operation::kSearch) return mutations;
  const bool must_live = step.operation != Operation::kInsert;
  for (uint64_t tag = step.tags.first; tag < step.tags.end; ++tag) {
    if ((rows_[tag] != kNoRow) != must_live) {
      return Fail(ErrorCode::kInvalidArgument,
                  runbook.file + ":" + std::to_string(step.line) + ": tag " + std::to_string(tag) +
                      (must_live ? " does not live" : " lives already"));
    }
  }
  for (uint64_t tag = step.tags.first; tag < step.tags.end; ++tag) {
    uint64_t row = tag;
    if (step.operation == Operation::kReplace) row = step.ids.first + (tag - step.tags.first);
    const bool ends = step.operation == Operation::kDelete;
    rows_[tag] = ends ? kNoRow : static_cast<int32_t>(row);
    turns_[tag] = ++turn_;
    mutations.push_back({static_cast<uint32_t>(tag), rows_[tag]});
  }
  if (step.operation == Operation::kInsert) live_ += mutations.size();
  if (step.operation == Operation::kDelete) live_ -= mutations.size();
  return mutations;
}

std::vector<Mutation> LiveTags::InOrder() const {
  std::vector<Mutation> live;
  for (uint32_t tag = 0; tag < rows_.size(); ++tag) {
    if (rows_[tag] != kNoRow) live.push_back({tag, rows_[tag]});
  }
  std::ranges::sort(live, {}, [this](const Mutation& put) { return turns_[put.tag]; });
  return live;
}

LiveTruths::LiveTruths(const VectorSet& base, const VectorSet& queries, Metric metric, uint32_t k)
    : base_(base),
      queries_(queries),
      metric_(metric),
      k_(k),
      distances_(base.size() * queries.size()),
      computed_((base.size() + kBlockRows - 1) / kBlockRows) {}

void LiveTruths::Compute(size_t block) {
  if (computed_[block]) return;
  computed_[block] = true;
  const DistanceFn distance = DistanceFunction(Precision::kF32, metric_);
  const size_t first = block * kBlockRows;
  const size_t end = std::min(first + kBlockRows, base_.size());
  for (size_t query = 0; query < queries_.size(); ++query) {
    float* out = distances_.data() + query * base_.size();
    for (size_t row = first; row < end; ++row) {
      out[row] = distance(queries_.Bytes(query), base_.Bytes(row), base_.padded_dimension());
    }
  }
}

// The tags that live; their rows' distances are there then.
std::vector<int32_t> LiveTruths::Live(std::span<const int32_t> rows) {
  std::vector<int32_t> live;
  for (size_t tag = 0; tag < rows.size(); ++tag) {
    if (rows[tag] == kNoRow) continue;
    live.push_back(static_cast<int32_t>(tag));
    Compute(static_cast<size_t>(rows[tag]) / kBlockRows);
  }
  CHECK(live.size() >= k_, "enough lives");
  return live;
}

LiveTruth LiveTruths::Among(std::span<const int32_t> rows) {
  LiveTruth truth{.k = k_, .tags = {}, .kth_scores = {}};
  const std::vector<int32_t> live = Live(rows);
  for (size_t query = 0; query < queries_.size(); ++query) Add(query, rows, live, &truth);
  return truth;
}

LiveTruth LiveTruths::OfOne(size_t query, std::span<const int32_t> rows) {
  LiveTruth truth{.k = k_, .tags = {}, .kth_scores = {}};
  Add(query, rows, Live(rows), &truth);
  return truth;
}

void LiveTruths::Add(size_t query, std::span<const int32_t> rows, std::span<const int32_t> live,
                     LiveTruth* truth) const {
  Nearest nearest(std::max<size_t>(4 * k_, kCandidates));
  const float* const distances = Distances(query);
  for (const int32_t tag : live) nearest.Consider(distances[rows[static_cast<size_t>(tag)]], tag);
  std::vector<std::pair<double, int32_t>> exact;  // score with its sign such that less is nearer
  nearest.TakeAll([&](int32_t tag) {
    const auto row = static_cast<size_t>(rows[static_cast<size_t>(tag)]);
    const double score = ExactScore(metric_, queries_[query], base_[row]);
    exact.emplace_back(metric_ == Metric::kL2 ? score : -score, tag);
  });
  std::ranges::sort(exact);
  for (uint32_t place = 0; place < k_; ++place) truth->tags.push_back(exact[place].second);
  const double kth = exact[k_ - 1].first;
  truth->kth_scores.push_back(metric_ == Metric::kL2 ? kth : -kth);
}

Judged Judge(const VectorSet& base, std::span<const float> query, Metric metric,
             std::span<const int32_t> rows, const LiveTruth& truth, size_t number,
             std::span<const int64_t> returned) {
  Judged judged;
  std::vector<ReturnedRow> scored;
  for (const int64_t tag : returned) {
    const int32_t row = rows[static_cast<size_t>(tag)];
    if (row == kNoRow) {
      ++judged.dead;
      continue;
    }
    scored.push_back({tag, ExactScore(metric, query, base[static_cast<size_t>(row)])});
  }
  judged.hits = CountHits(scored, std::span(truth.tags).subspan(number * truth.k, truth.k), truth.k,
                          metric, truth.kth_scores[number]);
  return judged;
}

}  // namespace engram
