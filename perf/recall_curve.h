#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace engram {

// What an index gave with one ef.
struct CurvePoint {
  uint32_t ef = 0;
  double recall = 0;         // recall@10, 0 to 1
  double recalls_per_s = 0;  // above 0
};
// By rising ef.
using RecallCurve = std::vector<CurvePoint>;

// The most recalls/s at which the curve has at least this recall: that of a point, or between two
// neighbouring points on a straight line from recall to the logarithm of recalls/s. So a curve that
// begins above `recall` has the rate of its first point there. Nothing where it does not reach it.
std::optional<double> RateAt(const RecallCurve& curve, double recall);

// RateAt of `ours` over that of `theirs`; nothing where one of them does not reach `recall`.
std::optional<double> RateRatio(const RecallCurve& ours, const RecallCurve& theirs, double recall);

// The least RateRatio over recalls from 0.90 to 0.995, in steps of 0.005, that `theirs` reaches; 0
// where `ours` does not reach one of them. Nothing where `theirs` does not reach 0.90.
std::optional<double> LeastRateRatio(const RecallCurve& ours, const RecallCurve& theirs);

// The recalls at which two curves are compared as a whole: those of the points of `ours` from 0.90
// on. A recall above 0.995 counts as 0.995: beyond that a handful of queries decides.
std::vector<double> ComparedRecalls(const RecallCurve& ours);

// Which of `peers` have equal recalls/s at equal recall, at each of `recalls`: at least 0.97 of
// what `ours` has there, or of what peers[0], the usual setting, has there where that is less. So
// where `ours` is faster than any peer, a peer must be as good as the usual one. A recall that
// `ours` or peers[0] does not reach rules nothing out. False for all where that leaves nothing to
// compare.
std::vector<bool> HaveEqualRates(const std::vector<RecallCurve>& peers, const RecallCurve& ours,
                                 const std::vector<double>& recalls);

}  // namespace engram
