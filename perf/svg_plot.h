#pragma once

#include <string>
#include <vector>

#include "src/core/result.h"

namespace engram {

struct PlotPoint {
  double x = 0;
  double y = 0;
};

struct PlotSeries {
  std::string name;
  // kFaint: thin and grey, one entry in the legend for all of one name.
  enum class Look { kFirst, kSecond, kThird, kFaint } look = Look::kFaint;
  std::vector<PlotPoint> points;  // in the order in which they are joined
};

// Lines with dots over a grid, the legend at the right.
struct Plot {
  std::string title;
  std::string subtitle;
  std::string x_label;
  std::string y_label;
  bool log_y = false;  // every y is above 0 then
  std::vector<PlotSeries> series;
};

// The plot as an SVG 1.1 document.
std::string RenderSvg(const Plot& plot);

// Errors: those of the file system, naming the path.
Result<void> WriteSvg(const Plot& plot, const std::string& path);

}  // namespace engram
