#include "tools/engramctl/recall_quality.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "src/core/check.h"

namespace engram {

namespace {

constexpr double kTieTolerance = 1e-6;

// Whether `score` is as near as `bound`, or nearer.
bool NoWorse(Metric metric, double score, double bound) {
  const double slack = kTieTolerance * std::max(std::fabs(score), std::fabs(bound));
  return metric == Metric::kL2 ? score <= bound + slack : score >= bound - slack;
}

bool Contains(std::span<const int32_t> rows, int64_t row) {
  return std::ranges::find(rows, row) != rows.end();
}

}  // namespace

uint32_t CountHits(std::span<const ReturnedRow> returned, std::span<const int32_t> truth,
                   uint32_t k, Metric metric, std::optional<double> kth_score) {
  CHECK(truth.size() >= k, "the truth names at least k neighbours");
  const auto nearest = truth.first(k);
  const auto beyond = truth.subspan(k);
  std::unordered_set<int64_t> hits;
  std::optional<double> bound = kth_score;
  for (const ReturnedRow& candidate : returned) {
    if (!Contains(nearest, candidate.row)) continue;
    hits.insert(candidate.row);
    // The worst returned true neighbour is at least as near as the k-th.
    if (!kth_score && (!bound || !NoWorse(metric, candidate.score, *bound))) {
      bound = candidate.score;
    }
  }
  for (const ReturnedRow& candidate : returned) {
    if (candidate.row < 0 || !bound || !NoWorse(metric, candidate.score, *bound)) continue;
    if (kth_score || Contains(beyond, candidate.row)) hits.insert(candidate.row);
  }
  return std::min<uint32_t>(k, static_cast<uint32_t>(hits.size()));
}

double ExactScore(Metric metric, std::span<const float> a, std::span<const float> b) {
  CHECK(a.size() == b.size(), "vectors of one space are equally long");
  double product = 0;
  double squares_a = 0;
  double squares_b = 0;
  double distance = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<double>(a[i]);
    const double y = static_cast<double>(b[i]);
    product += x * y;
    squares_a += x * x;
    squares_b += y * y;
    distance += (x - y) * (x - y);
  }
  switch (metric) {
    case Metric::kL2:
      return distance;
    case Metric::kInnerProduct:
      return product;
    case Metric::kCosine:
    case Metric::kUnspecified:
      break;
  }
  const double norms = std::sqrt(squares_a) * std::sqrt(squares_b);
  return norms > 0 ? product / norms : 0;
}

}  // namespace engram
