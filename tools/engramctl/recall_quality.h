#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "src/core/observation.h"

namespace engram {

// A neighbour that a recall returned, as a row of the base vectors.
struct ReturnedRow {
  int64_t row = -1;  // -1: its id is no row number, so it is no hit
  double score = 0;  // see Metric
};

// How many of `returned` are among the `k` nearest rows, ties included: the numerator of recall@k.
// `truth` holds the nearest rows, nearest first, at least k of them. A row counts once, and no more
// than k rows count.
//
// A row among the first k of `truth` is a hit. Another one is a hit when it is as near as the k-th
// true neighbour, so that it stands outside only because the truth had to break a tie:
//   * With `kth_score`, the exact score of truth[k - 1], where the scores of `returned` are exact
//     too: when its score is no worse than kth_score.
//   * Without, from what the server returned: when its score is no worse than the worst score of a
//     returned row that is among the first k, and `truth` goes beyond k and holds it there. This
//     can miss a tie, but counts none that is not one.
// Scores within 1e-6 of each other, relative to the larger, are equal.
uint32_t CountHits(std::span<const ReturnedRow> returned, std::span<const int32_t> truth,
                   uint32_t k, Metric metric, std::optional<double> kth_score);

// The score of two vectors of equal length, computed in double.
double ExactScore(Metric metric, std::span<const float> a, std::span<const float> b);

}  // namespace engram
