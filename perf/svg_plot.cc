#include "perf/svg_plot.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <set>

namespace engram {

namespace {

constexpr double kWidth = 860;
constexpr double kHeight = 460;
constexpr double kLeft = 84;
constexpr double kRight = 620;
constexpr double kTop = 72;
constexpr double kBottom = 396;
constexpr double kLegendX = 640;
constexpr double kLegendStep = 24;

struct Stroke {
  const char* colour;
  double width;
};

Stroke StrokeOf(PlotSeries::Look look) {
  switch (look) {
    case PlotSeries::Look::kFirst:
      return {"#1659b8", 2.6};
    case PlotSeries::Look::kSecond:
      return {"#c8510a", 2.6};
    case PlotSeries::Look::kThird:
      return {"#7a4fa3", 2.0};
    case PlotSeries::Look::kFaint:
      break;
  }
  return {"#b4b8bf", 1.2};
}

std::string Escaped(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '&') {
      escaped += "&amp;";
    } else if (c == '<') {
      escaped += "&lt;";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

std::string Number(double value, const char* format = "%.1f") {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), format, value);
  return text.data();
}

// A stretch of numbers on an axis.
struct Scale {
  double low = 0;
  double high = 1;
  bool log = false;
  double from = 0;  // where low and high lie on the page
  double to = 1;
  std::vector<double> ticks;

  double At(double value) const {
    const double share =
        log ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
    return std::lerp(from, to, share);
  }
};

// 1, 2 or 5 times a power of ten, so that there are 4 to 10 ticks.
double TickStep(double range) {
  const double magnitude = std::pow(10.0, std::floor(std::log10(range / 4)));
  for (const double factor : {5.0, 2.0}) {
    if (range / (factor * magnitude) >= 4) return factor * magnitude;
  }
  return magnitude;
}

void SetLinear(Scale* scale) {
  const double step = TickStep(scale->high - scale->low);
  scale->low = step * std::floor(scale->low / step + 1e-9);
  scale->high = step * std::ceil(scale->high / step - 1e-9);
  const auto count = static_cast<int>(std::lround((scale->high - scale->low) / step));
  for (int i = 0; i <= count; ++i) scale->ticks.push_back(scale->low + i * step);
}

void SetLog(Scale* scale) {
  scale->log = true;
  std::vector<double> steps;
  for (int power = -3; power <= 9; ++power) {
    for (const double factor : {1.0, 2.0, 5.0}) steps.push_back(factor * std::pow(10.0, power));
  }
  const auto first = std::ranges::upper_bound(steps, scale->low) - 1;
  const auto last = std::ranges::lower_bound(steps, scale->high);
  scale->low = *first;
  scale->high = *last;
  scale->ticks.assign(first, last + 1);
}

// From the least to the greatest of the plot's numbers on one axis.
Scale ScaleOf(const Plot& plot, double PlotPoint::* axis) {
  Scale scale{.low = std::numeric_limits<double>::infinity(),
              .high = -std::numeric_limits<double>::infinity(),
              .ticks = {}};
  for (const PlotSeries& series : plot.series) {
    for (const PlotPoint& point : series.points) {
      scale.low = std::min(scale.low, point.*axis);
      scale.high = std::max(scale.high, point.*axis);
    }
  }
  if (!(scale.low < scale.high)) {  // One number, or none.
    scale.low = std::isfinite(scale.low) ? 0.5 * scale.low : 0;
    scale.high = std::isfinite(scale.high) && scale.high > 0 ? 1.5 * scale.high : 1;
  }
  return scale;
}

std::string TickText(double value) {
  if (value >= 1000) {
    std::string digits = Number(value, "%.0f");
    for (auto place = static_cast<ptrdiff_t>(digits.size()) - 3; place > 0; place -= 3) {
      digits.insert(static_cast<size_t>(place), 1, ',');
    }
    return digits;
  }
  return Number(value, "%g");
}

std::string Text(double x, double y, const std::string& text, const std::string& attributes) {
  return "<text x=\"" + Number(x) + "\" y=\"" + Number(y) + "\" " + attributes + ">" +
         Escaped(text) + "</text>\n";
}

std::string Line(double x1, double y1, double x2, double y2, const std::string& attributes) {
  return "<line x1=\"" + Number(x1) + "\" y1=\"" + Number(y1) + "\" x2=\"" + Number(x2) +
         "\" y2=\"" + Number(y2) + "\" " + attributes + "/>\n";
}

std::string Grid(const Plot& plot, const Scale& x, const Scale& y) {
  const std::string grid = R"(stroke="#e3e6ea" stroke-width="1")";
  const std::string label = R"(font-size="12" fill="#4a4f57" text-anchor=)";
  std::string svg;
  for (const double tick : x.ticks) {
    svg += Line(x.At(tick), kTop, x.At(tick), kBottom, grid);
    svg += Text(x.At(tick), kBottom + 18, TickText(tick), label + "\"middle\"");
  }
  for (const double tick : y.ticks) {
    svg += Line(kLeft, y.At(tick), kRight, y.At(tick), grid);
    svg += Text(kLeft - 8, y.At(tick) + 4, TickText(tick), label + "\"end\"");
  }
  svg += Line(kLeft, kBottom, kRight, kBottom, R"(stroke="#4a4f57" stroke-width="1")");
  svg += Text((kLeft + kRight) / 2, kBottom + 42, plot.x_label,
              R"(font-size="13" fill="#23272e" text-anchor="middle")");
  const std::string turned = "transform=\"rotate(-90 18 " + Number((kTop + kBottom) / 2) + ")\"";
  svg += Text(18, (kTop + kBottom) / 2, plot.y_label,
              R"(font-size="13" fill="#23272e" text-anchor="middle" )" + turned);
  return svg;
}

std::string Curve(const PlotSeries& series, const Scale& x, const Scale& y) {
  const Stroke stroke = StrokeOf(series.look);
  std::string joined;
  std::string dots;
  for (const PlotPoint& point : series.points) {
    const std::string at_x = Number(x.At(point.x));
    const std::string at_y = Number(y.At(point.y));
    joined += (joined.empty() ? "" : " ") + at_x + "," + at_y;
    dots += "<circle cx=\"" + at_x + "\" cy=\"" + at_y + "\" r=\"" + Number(stroke.width + 0.6) +
            "\" fill=\"" + stroke.colour + "\"/>\n";
  }
  return "<polyline points=\"" + joined + "\" fill=\"none\" stroke=\"" + stroke.colour +
         "\" stroke-width=\"" + Number(stroke.width) + "\" stroke-linejoin=\"round\"/>\n" +
         (series.look == PlotSeries::Look::kFaint ? "" : dots);
}

std::string Legend(const Plot& plot) {
  std::string svg;
  std::set<std::string> named;
  double y = kTop + 10;
  for (const PlotSeries& series : plot.series) {
    if (!named.insert(series.name).second) continue;
    const Stroke stroke = StrokeOf(series.look);
    svg += Line(kLegendX, y, kLegendX + 26, y,
                std::string("stroke=\"") + stroke.colour + "\" stroke-width=\"" +
                    Number(stroke.width) + "\"");
    svg += Text(kLegendX + 34, y + 4, series.name, R"(font-size="13" fill="#23272e")");
    y += kLegendStep;
  }
  return svg;
}

}  // namespace

std::string RenderSvg(const Plot& plot) {
  Scale x = ScaleOf(plot, &PlotPoint::x);
  Scale y = ScaleOf(plot, &PlotPoint::y);
  x.from = kLeft;
  x.to = kRight;
  y.from = kBottom;
  y.to = kTop;
  SetLinear(&x);
  if (plot.log_y) {
    SetLog(&y);
  } else {
    y.low = 0;
    SetLinear(&y);
  }
  const std::string size =
      "width=\"" + Number(kWidth, "%.0f") + "\" height=\"" + Number(kHeight, "%.0f") + "\"";
  std::string svg = "<svg xmlns=\"http://www.w3.org/2000/svg\" " + size + " viewBox=\"0 0 " +
                    Number(kWidth, "%.0f") + " " + Number(kHeight, "%.0f") +
                    "\" font-family=\"Helvetica, Arial, sans-serif\">\n<rect " + size +
                    " fill=\"#ffffff\"/>\n";
  svg += Text(kLeft, 28, plot.title, R"(font-size="17" font-weight="bold" fill="#23272e")");
  svg += Text(kLeft, 50, plot.subtitle, R"(font-size="12" fill="#4a4f57")");
  svg += Grid(plot, x, y);
  // The first series on top.
  for (auto series = plot.series.rbegin(); series != plot.series.rend(); ++series) {
    svg += Curve(*series, x, y);
  }
  return svg + Legend(plot) + "</svg>\n";
}

Result<void> WriteSvg(const Plot& plot, const std::string& path) {
  std::ofstream file(path, std::ios::trunc);
  file << RenderSvg(plot);
  file.close();
  if (!file) return FailErrno("writing " + path, errno);
  return {};
}

}  // namespace engram
