#include "perf/vector_set.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <queue>
#include <utility>

#include "index/distance.h"
#include "src/core/check.h"
#include "tools/engramctl/recall_quality.h"
#include "tools/engramctl/vector_file.h"

namespace engram {

namespace {

constexpr size_t kAlignment = 64;
// Rows compared with all queries before the next ones come: they stay in L2 meanwhile.
constexpr size_t kTruthBlockRows = 128;
// What float leaves for double to put in order.
constexpr size_t kTruthCandidates = 64;

}  // namespace

VectorSet::VectorSet(size_t size, uint32_t dimension)
    : size_(size), dimension_(dimension), stride_(PaddedDimension(Precision::kF32, dimension)) {
  const size_t bytes = size_ * stride_ * sizeof(float);
  values_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, bytes)));
  CHECK(values_ != nullptr, "memory for the vectors");
  std::memset(values_.get(), 0, bytes);
}

Result<VectorSet> VectorSet::Load(const std::string& path, uint64_t rows_max, bool normalise) {
  const Result<VectorFile> file = VectorFile::Open(path, rows_max);
  if (!file) return std::unexpected(file.error());
  if (file->rows() == 0 || file->dimension() == 0) {
    return Fail(ErrorCode::kInvalidArgument, path + ": there are no vectors in it");
  }
  VectorSet set(file->rows(), file->dimension());
  for (size_t row = 0; row < set.size(); ++row) {
    const std::span<float> values(set.At(row), set.dimension());
    file->ReadRow(row, values);
    const bool finite = std::ranges::all_of(values, [](float v) { return std::isfinite(v); });
    if (!finite || (normalise && !NormaliseInPlace(values.data(), values.size()))) {
      return Fail(ErrorCode::kInvalidArgument,
                  path + ": row " + std::to_string(row) + " is not finite, or zero under cosine");
    }
  }
  return set;
}

Result<ExactTruth> LoadTruth(const std::string& path, const VectorSet& base,
                             const VectorSet& queries, Metric metric, uint32_t k) {
  const Result<VectorFile> file = VectorFile::Open(path, queries.size());
  if (!file) return std::unexpected(file.error());
  if (file->type() != ElementType::kI32 || file->rows() < queries.size() || file->dimension() < k) {
    return Fail(ErrorCode::kInvalidArgument,
                path + ": needs " + std::to_string(k) + " row numbers for each query");
  }
  ExactTruth truth{.k = k, .rows = {}, .kth_scores = {}};
  for (size_t query = 0; query < queries.size(); ++query) {
    for (uint32_t place = 0; place < k; ++place) {
      const int32_t row = file->IntegerAt(query, place);
      if (row < 0 || static_cast<size_t>(row) >= base.size()) {
        return Fail(ErrorCode::kInvalidArgument,
                    path + ": names row " + std::to_string(row) + ", which the vectors lack");
      }
      truth.rows.push_back(row);
    }
    truth.kth_scores.push_back(
        ExactScore(metric, queries[query], base[static_cast<size_t>(truth.rows.back())]));
  }
  return truth;
}

ExactTruth ComputeTruth(const VectorSet& base, const VectorSet& queries, Metric metric, uint32_t k,
                        size_t rows) {
  rows = std::min(rows, base.size());
  using Candidate = std::pair<float, int32_t>;  // distance, row
  const size_t kept = std::max<size_t>(4 * k, kTruthCandidates);
  const DistanceFn distance = DistanceFunction(Precision::kF32, metric);
  std::vector<std::priority_queue<Candidate>> nearest(queries.size());
  for (size_t first = 0; first < rows; first += kTruthBlockRows) {
    const size_t last = std::min(first + kTruthBlockRows, rows);
    for (size_t query = 0; query < queries.size(); ++query) {
      std::priority_queue<Candidate>& heap = nearest[query];
      for (size_t row = first; row < last; ++row) {
        const Candidate candidate(
            distance(queries.Bytes(query), base.Bytes(row), base.padded_dimension()),
            static_cast<int32_t>(row));
        if (heap.size() == kept && !(candidate < heap.top())) continue;
        if (heap.size() == kept) heap.pop();
        heap.push(candidate);
      }
    }
  }
  ExactTruth truth{.k = k, .rows = {}, .kth_scores = {}};
  for (size_t query = 0; query < queries.size(); ++query) {
    std::vector<std::pair<double, int32_t>> exact;  // score with its sign such that less is nearer
    for (; !nearest[query].empty(); nearest[query].pop()) {
      const int32_t row = nearest[query].top().second;
      const double score = ExactScore(metric, queries[query], base[static_cast<size_t>(row)]);
      exact.emplace_back(metric == Metric::kL2 ? score : -score, row);
    }
    std::ranges::sort(exact);
    for (uint32_t place = 0; place < k; ++place) truth.rows.push_back(exact[place].second);
    const double kth = exact[k - 1].first;
    truth.kth_scores.push_back(metric == Metric::kL2 ? kth : -kth);
  }
  return truth;
}

double RecallAtK(const VectorSet& base, const VectorSet& queries, const ExactTruth& truth,
                 Metric metric, std::span<const int64_t> returned) {
  uint64_t hits = 0;
  std::vector<ReturnedRow> rows(truth.k);
  for (size_t query = 0; query < queries.size(); ++query) {
    for (uint32_t place = 0; place < truth.k; ++place) {
      const int64_t row = returned[query * truth.k + place];
      CHECK(row < static_cast<int64_t>(base.size()), "a row that was inserted");
      rows[place] = {row, 0};
      if (row >= 0) {
        rows[place].score = ExactScore(metric, queries[query], base[static_cast<size_t>(row)]);
      }
    }
    hits += CountHits(rows, truth.Of(query), truth.k, metric, truth.kth_scores[query]);
  }
  return static_cast<double>(hits) / static_cast<double>(queries.size() * truth.k);
}

}  // namespace engram
