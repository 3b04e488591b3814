#include "perf/recall_curve.h"

#include <gtest/gtest.h>

#include <cmath>

#include "perf/svg_plot.h"

namespace engram {
namespace {

const RecallCurve kTheirs = {
    {10, 0.85, 8'000}, {20, 0.92, 4'000}, {40, 0.96, 2'000}, {80, 0.98, 1'000}};

TEST(RecallCurveTest, TheRateBetweenTwoPointsIsOnALogarithmicScale) {
  EXPECT_DOUBLE_EQ(RateAt(kTheirs, 0.92).value(), 4'000);
  EXPECT_NEAR(RateAt(kTheirs, 0.94).value(), std::sqrt(4'000.0 * 2'000.0), 1e-6);
  EXPECT_NEAR(RateAt(kTheirs, 0.95).value(), 2'000 * std::pow(2.0, 0.25), 1e-6);
}

TEST(RecallCurveTest, BelowTheFirstPointItsRateCountsAndBeyondTheLastThereIsNone) {
  EXPECT_DOUBLE_EQ(RateAt(kTheirs, 0.5).value(), 8'000);
  EXPECT_DOUBLE_EQ(RateAt(kTheirs, 0.98).value(), 1'000);
  EXPECT_FALSE(RateAt(kTheirs, 0.9801));
  EXPECT_FALSE(RateAt({}, 0.5));
  EXPECT_FALSE(RateRatio(kTheirs, {{10, 0.9, 5'000}}, 0.95));
}

// Noise can make a higher ef look worse: the best that was seen counts.
TEST(RecallCurveTest, ADipIsNoLoss) {
  const RecallCurve dip = {{10, 0.95, 4'000}, {20, 0.94, 3'000}, {40, 0.97, 2'000}};
  EXPECT_DOUBLE_EQ(RateAt(dip, 0.945).value(), 4'000);
}

TEST(RecallCurveTest, TheLeastRatioIsOverWhatTheyReach) {
  // Twice as fast at every recall, up to 0.98.
  const RecallCurve twice = {
      {10, 0.85, 16'000}, {20, 0.92, 8'000}, {40, 0.96, 4'000}, {80, 0.98, 2'000}};
  EXPECT_NEAR(LeastRateRatio(twice, kTheirs).value(), 2, 1e-9);
  // Faster, but it ends before they do.
  EXPECT_EQ(LeastRateRatio({{10, 0.97, 50'000}}, kTheirs).value(), 0);
  EXPECT_FALSE(LeastRateRatio(kTheirs, {{10, 0.89, 1'000}}));
}

TEST(RecallCurveTest, CurvesAreComparedAtOurPointsFrom090To0995) {
  EXPECT_EQ(ComparedRecalls({{10, 0.85, 9}, {20, 0.92, 8}, {40, 0.99, 7}, {80, 0.9999, 6}}),
            (std::vector<double>{0.92, 0.99, 0.995}));
}

TEST(RecallCurveTest, EqualRatesAreAskedForAtEachRecall) {
  const auto equal = [](const RecallCurve& ours) -> bool {
    return HaveEqualRates({kTheirs}, ours, ComparedRecalls(ours))[0];
  };
  EXPECT_TRUE(equal(kTheirs));
  EXPECT_FALSE(equal({{10, 0.5, 1}})) << "nothing was compared";
  // Of two peers, one is short at one recall only.
  RecallCurve lame = kTheirs;
  lame[2].recalls_per_s *= 0.95;
  const std::vector<RecallCurve> peers = {kTheirs, lame};
  EXPECT_EQ(HaveEqualRates(peers, kTheirs, ComparedRecalls(kTheirs)),
            (std::vector<bool>{true, false}));
  EXPECT_EQ(HaveEqualRates(peers, kTheirs, {0.92, 0.98}), (std::vector<bool>{true, true}));
  EXPECT_EQ(HaveEqualRates(peers, kTheirs, {0.96}), (std::vector<bool>{true, false}));
}

TEST(RecallCurveTest, WhereWeAreFasterTheUsualPeerIsTheBar) {
  const RecallCurve ours = {{10, 0.96, 10'000}, {20, 0.99, 5'000}};
  const std::vector<RecallCurve> peers = {kTheirs, {{10, 0.96, 1'900}}, {{10, 0.96, 1'950}}};
  const std::vector<bool> usual_and_last = {true, false, true};
  EXPECT_EQ(HaveEqualRates(peers, ours, {0.96}), usual_and_last);
  EXPECT_EQ(HaveEqualRates(peers, ours, {0.96, 0.99}), usual_and_last) << "0.99 is beyond kTheirs";
  EXPECT_EQ(HaveEqualRates(peers, ours, {0.99}), (std::vector<bool>{false, false, false}));
}

TEST(RecallCurveTest, WhereTheUsualPeerIsFasterWeAreTheBar) {
  const std::vector<RecallCurve> peers = {kTheirs, {{10, 0.96, 1'000}}};
  EXPECT_EQ(HaveEqualRates(peers, {{10, 0.96, 1'010}}, {0.96}), (std::vector<bool>{true, true}));
}

size_t CountOf(const std::string& text, const std::string& part) {
  size_t count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

TEST(SvgPlotTest, PlotsWhatIsThere) {
  Plot plot{.title = "a < b & c",
            .subtitle = "",
            .x_label = "x",
            .y_label = "y",
            .log_y = true,
            .series = {{"ours", PlotSeries::Look::kFirst, {{0.9, 2'000}, {0.99, 150}}},
                       {"others", PlotSeries::Look::kFaint, {{0.9, 1'000}, {0.95, 100}}},
                       {"others", PlotSeries::Look::kFaint, {}}}};
  const std::string svg = RenderSvg(plot);
  EXPECT_EQ(CountOf(svg, "<polyline"), 3u);
  EXPECT_EQ(CountOf(svg, "<circle"), 2u) << "faint series have no dots";
  EXPECT_EQ(CountOf(svg, ">others<"), 1u) << "one entry in the legend";
  EXPECT_EQ(CountOf(svg, "a &lt; b &amp; c"), 1u);
  EXPECT_EQ(CountOf(svg, "nan") + CountOf(svg, "inf"), 0u);
  EXPECT_EQ(CountOf(svg, ">2,000<"), 1u) << "the scale ends at a round number";
}

TEST(SvgPlotTest, OnePointOrNoneStillGivesAScale) {
  for (const bool log_y : {false, true}) {
    Plot plot{.title = "",
              .subtitle = "",
              .x_label = "",
              .y_label = "",
              .log_y = log_y,
              .series = {{"one", PlotSeries::Look::kFirst, {{5, 7}}}}};
    const std::string one = RenderSvg(plot);
    EXPECT_EQ(CountOf(one, "nan") + CountOf(one, "inf"), 0u);
    plot.series[0].points.clear();
    const std::string none = RenderSvg(plot);
    EXPECT_EQ(CountOf(none, "nan") + CountOf(none, "inf"), 0u);
  }
}

}  // namespace
}  // namespace engram
