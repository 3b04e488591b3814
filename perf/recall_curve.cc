#include "perf/recall_curve.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace engram {

namespace {

constexpr double kLeastRecall = 0.90;
constexpr double kMostRecall = 0.995;
constexpr int kRecallSteps = 19;  // of 0.005
constexpr double kEqualRate = 0.97;

}  // namespace

std::optional<double> RateAt(const RecallCurve& curve, double recall) {
  std::optional<double> best;
  const auto offer = [&best](double rate) { best = best ? std::max(*best, rate) : rate; };
  for (size_t i = 0; i < curve.size(); ++i) {
    if (curve[i].recall >= recall) offer(curve[i].recalls_per_s);
    if (i == 0 || curve[i - 1].recall >= recall || curve[i].recall < recall) continue;
    const CurvePoint& below = curve[i - 1];
    const CurvePoint& above = curve[i];
    const double share = (recall - below.recall) / (above.recall - below.recall);
    offer(std::exp(std::lerp(std::log(below.recalls_per_s), std::log(above.recalls_per_s), share)));
  }
  return best;
}

std::optional<double> RateRatio(const RecallCurve& ours, const RecallCurve& theirs, double recall) {
  const std::optional<double> our_rate = RateAt(ours, recall);
  const std::optional<double> their_rate = RateAt(theirs, recall);
  if (!our_rate || !their_rate) return std::nullopt;
  return *our_rate / *their_rate;
}

std::optional<double> LeastRateRatio(const RecallCurve& ours, const RecallCurve& theirs) {
  std::optional<double> least;
  for (int step = 0; step <= kRecallSteps; ++step) {
    const double recall = std::lerp(kLeastRecall, kMostRecall, step / double{kRecallSteps});
    if (!RateAt(theirs, recall)) break;
    const double ratio = RateRatio(ours, theirs, recall).value_or(0);
    least = least ? std::min(*least, ratio) : ratio;
  }
  return least;
}

std::vector<double> ComparedRecalls(const RecallCurve& ours) {
  std::vector<double> recalls;
  for (const CurvePoint& point : ours) {
    if (point.recall >= kLeastRecall) recalls.push_back(std::min(point.recall, kMostRecall));
  }
  return recalls;
}

std::vector<bool> HaveEqualRates(const std::vector<RecallCurve>& peers, const RecallCurve& ours,
                                 const std::vector<double>& recalls) {
  std::vector<bool> equal(peers.size(), true);
  bool compared = false;
  for (const double recall : recalls) {
    const double usual = RateAt(peers[0], recall).value_or(0);
    const double bar = kEqualRate * std::min(usual, RateAt(ours, recall).value_or(0));
    if (bar == 0) continue;
    compared = true;
    for (size_t i = 0; i < peers.size(); ++i) {
      if (RateAt(peers[i], recall).value_or(0) < bar) equal[i] = false;
    }
  }
  if (!compared) equal.assign(peers.size(), false);
  return equal;
}

}  // namespace engram
