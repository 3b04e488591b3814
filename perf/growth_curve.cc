// growth_curve: how inserts and recalls fall as an index grows, up to more rows than a real set
// has.
//
//   growth_curve --data BASE --queries Q [--metric cosine|ip|l2] [--points N,N,...] [--real N]
//                [--peer-count N] [--slices] [--json]
//
// 1. The real rows in their order, then rows grown out of them, up to the last point
//    (perf/grown_set.h says how, and why that is fair). Figures up to the real set's size are the
//    real set's own. Queries are real ones that are not among the rows.
// 2. Index and peer insert up to a point, chunk by chunk in turns; then, by the exact truth over
//    the rows that are in, each recalls with each ef. Rates are by processor time
//    (peer_comparison.h). Then up to the next point. Beyond --peer-count rows the peer is left out,
//    as it is slow. With --slices each slice of linking is timed, which costs some percent.
// 3. A table for the set and one for the indexes, or one line of JSON with --json.
//
// What tells whether grown rows are like real ones, for each point: their share of the queries'
// true nearest, which is their share of the rows where they are; the distance to the tenth nearest
// and the local dimension about the queries (Levina and Bickel's maximum likelihood estimate, over
// ten neighbours), which should go on falling and staying, each, as they did before; the distance
// of rows to their nearest, which copies would make small. And --real N, with which only N rows of
// the real set are taken and grown to its size: compare with the same points without it.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "index/batch_linker.h"
#include "perf/bench_inputs.h"
#include "perf/bench_support.h"
#include "perf/engram_index.h"
#include "perf/grown_set.h"
#include "perf/hnswlib_index.h"
#include "perf/peer_comparison.h"
#include "perf/vector_set.h"
#include "src/core/observation.h"
#include "tools/engramctl/recall_quality.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

using Json = nlohmann::ordered_json;
constexpr uint32_t kNearest = 10;

struct Options {
  BenchInputs inputs;
  std::vector<uint64_t> points = {10'000, 30'000, 100'000, 300'000, 1'000'000};
  uint64_t real = UINT64_MAX;
  std::vector<uint32_t> efs = {64, 128};
  uint32_t batch = BatchLinker::kMaxBatch;
  uint32_t peer_M = 16;
  uint32_t peer_ef_construction = 200;
  uint64_t peer_count = 100'000;
  bool times_slices = false;
};

void AddOptions(CLI::App* app, Options* options) {
  options->inputs.query_count = 200;
  AddInputOptions(app, &options->inputs);
  app->add_option("--points", options->points, "Rows at which to recall, rising")
      ->delimiter(',')
      ->check(CLI::Range(kNearest, UINT32_MAX))
      ->capture_default_str();
  app->add_option("--real", options->real, "Rows of the set to take; the others are grown")
      ->check(CLI::PositiveNumber);
  app->add_option("--ef", options->efs)
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--batch", options->batch, "Ours: nodes linked at once")
      ->check(CLI::Range(1u, BatchLinker::kMaxBatch))
      ->capture_default_str();
  app->add_option("--peer-m", options->peer_M, "hnswlib's M")->capture_default_str();
  app->add_option("--peer-ef-construction", options->peer_ef_construction)->capture_default_str();
  app->add_option("--peer-count", options->peer_count, "Rows that hnswlib gets at most; 0: none")
      ->capture_default_str();
  app->add_flag("--slices", options->times_slices, "Ours: the processor time of linking's slices");
}

// What the rows that are in are like, seen from the queries.
struct Surroundings {
  double grown_of_rows = 0;
  double grown_of_nearest = 0;
  double distance_to_tenth = 0;  // Euclidean; median
  double local_dimension = 0;
  double distance_of_rows = 0;  // of a row to the nearest other; median
};

// Over some rows, evenly among the first `rows`.
double DistanceOfRows(const VectorSet& base, size_t rows) {
  constexpr size_t kSample = 200;
  VectorSet sample = VectorSet::Zeros(std::min(kSample, rows), base.dimension());
  for (size_t i = 0; i < sample.size(); ++i) {
    std::ranges::copy(base[i * rows / sample.size()], sample.Row(i).data());
  }
  const ExactTruth truth = ComputeTruth(base, sample, Metric::kL2, 2, rows);
  std::vector<double> distances;
  for (const double score : truth.kth_scores) distances.push_back(std::sqrt(score));
  return Median(distances);
}

Surroundings Look(const VectorSet& base, const VectorSet& queries, const ExactTruth& truth,
                  size_t rows, size_t real) {
  Surroundings seen;
  std::vector<double> tenths;
  double grown = 0;
  double logs = 0;
  double terms = 0;
  for (size_t query = 0; query < queries.size(); ++query) {
    std::vector<double> distances;
    for (const int32_t row : truth.Of(query)) {
      const auto place = static_cast<size_t>(row);
      distances.push_back(std::sqrt(ExactScore(Metric::kL2, queries[query], base[place])));
      grown += static_cast<double>(place >= real);
    }
    const double tenth = std::ranges::max(distances);
    tenths.push_back(tenth);
    for (const double distance : distances) {
      if (distance == tenth || distance == 0) continue;
      logs += std::log(tenth / distance);
      ++terms;
    }
  }
  seen.grown_of_rows = static_cast<double>(rows - std::min(rows, real)) / static_cast<double>(rows);
  seen.grown_of_nearest = grown / static_cast<double>(queries.size() * truth.k);
  seen.distance_to_tenth = Median(tenths);
  seen.local_dimension = logs > 0 ? terms / logs : 0;
  seen.distance_of_rows = DistanceOfRows(base, rows);
  return seen;
}

// One index at one point.
struct Figures {
  std::string name;
  std::optional<double> inserts_per_s;  // of what was linked since the point before
  std::optional<double> us_an_insert;   // over the last tenth of all rows
  double bytes_a_vector = 0;
  RecallCurve curve;
};

struct Point {
  size_t rows = 0;
  Surroundings seen;
  std::vector<Figures> figures;
};

// Linked inserts/s of the chunks that began at row `from` or later.
std::optional<double> RateSince(const Contender& contender, size_t from, size_t chunk) {
  Contender part;
  for (size_t i = from / chunk; i < contender.chunks.size(); ++i) {
    part.chunks.push_back(contender.chunks[i]);
  }
  return part.InsertsPerSecond();
}

class Curve {
 public:
  Curve(const Options& options, VectorSet base, VectorSet queries, size_t real)
      : options_(options), base_(std::move(base)), queries_(std::move(queries)), real_(real) {
    comparison_.metric = MetricOfName(options.inputs.metric);
    comparison_.rounds = options.inputs.rounds;
    comparison_.efs = options.efs;
    AddContenders();
  }

  std::vector<Point> Run() {
    std::vector<Point> points;
    WarmUpAndMake(base_, &contenders_);
    size_t before = 0;
    for (const uint64_t rows : options_.points) {
      if (rows > options_.peer_count) contenders_.resize(1);
      Add(MeasureInsertsOf(comparison_, base_, before, rows, &contenders_));
      points.push_back(Measure(before, rows));
      before = rows;
    }
    return points;
  }

  const LatencyHistogram& slices() const { return slices_; }
  // Processor time over time.
  double share() const { return share_.processor_seconds / std::max(1e-9, share_.seconds); }

 private:
  void AddContenders() {
    const SpaceOptions space = SpaceOf(options_.inputs, base_.dimension());
    contenders_.push_back({.name = "engram", .make = [space, this] {
                             return MakeEngramIndex(space, options_.batch, base_.size(),
                                                    options_.times_slices ? &slices_ : nullptr);
                           }});
    if (options_.peer_count < options_.points.front()) return;
    const HnswlibOptions peer{.metric = comparison_.metric,
                              .dimension = base_.dimension(),
                              .capacity = std::min<size_t>(options_.peer_count, base_.size()),
                              .M = options_.peer_M,
                              .ef_construction = options_.peer_ef_construction,
                              .seed = options_.inputs.seed};
    contenders_.push_back({.name = "hnswlib", .make = [peer] { return MakeHnswlibIndex(peer); }});
  }

  Point Measure(size_t before, size_t rows) {
    const ExactTruth truth = ComputeTruth(base_, queries_, comparison_.metric, kNearest, rows);
    for (Contender& contender : contenders_) contender.curve.clear();
    Add(MeasureRecalls(comparison_, base_, queries_, truth, &contenders_));
    Point point{.rows = rows, .seen = Look(base_, queries_, truth, rows, real_), .figures = {}};
    for (const Contender& contender : contenders_) {
      const auto late = RateSince(contender, rows - rows / 10, comparison_.chunk);
      point.figures.push_back({.name = contender.name,
                               .inserts_per_s = RateSince(contender, before, comparison_.chunk),
                               .us_an_insert = late ? std::optional(1e6 / *late) : std::nullopt,
                               .bytes_a_vector = static_cast<double>(contender.index->bytes()) /
                                                 static_cast<double>(rows),
                               .curve = contender.curve});
    }
    return point;
  }

  void Add(const MachineShare& share) {
    share_.processor_seconds += share.processor_seconds;
    share_.seconds += share.seconds;
  }

  const Options& options_;
  const VectorSet base_;
  const VectorSet queries_;
  const size_t real_;
  ComparisonOptions comparison_;
  std::vector<Contender> contenders_;
  MachineShare share_;
  LatencyHistogram slices_;
};

constexpr std::pair<const char*, double> kSliceQuantiles[] = {
    {"p50", 0.5}, {"p99", 0.99}, {"p999", 0.999}, {"longest", 1}};

std::string Shown(double value, const char* format) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), format, value);
  return text.data();
}
std::string ShownRate(std::optional<double> value) {
  return value ? WithThousands(static_cast<uint64_t>(std::llround(*value))) : "-";
}

void Print(const std::vector<Point>& points, const Options& options) {
  constexpr auto kRight = Table::Align::kRight;
  Table set({{"rows", kRight},
             {"grown", kRight},
             {"grown of the nearest", kRight},
             {"distance to the tenth", kRight},
             {"local dimension", kRight},
             {"distance of rows", kRight}});
  for (const Point& point : points) {
    set.AddRow(
        {WithThousands(point.rows), Shown(point.seen.grown_of_rows, "%.3f"),
         Shown(point.seen.grown_of_nearest, "%.3f"), Shown(point.seen.distance_to_tenth, "%.4g"),
         Shown(point.seen.local_dimension, "%.1f"), Shown(point.seen.distance_of_rows, "%.4g")});
  }
  std::printf("\nThe rows, as the queries see them:\n");
  set.Print();

  std::vector<Table::Column> columns = {{"rows", kRight},
                                        {"index", Table::Align::kLeft},
                                        {"linked/s since the line before", kRight},
                                        {"us an insert, last tenth", kRight},
                                        {"bytes a vector", kRight}};
  for (const uint32_t ef : options.efs) {
    columns.push_back({"recall@10, ef " + std::to_string(ef), kRight});
    columns.push_back({"recalls/s", kRight});
  }
  Table indexes(columns);
  for (const Point& point : points) {
    for (const Figures& figures : point.figures) {
      std::vector<std::string> cells = {
          WithThousands(point.rows), figures.name, ShownRate(figures.inserts_per_s),
          figures.us_an_insert ? Shown(*figures.us_an_insert, "%.1f") : "-",
          ShownRate(figures.bytes_a_vector)};
      for (const CurvePoint& at : figures.curve) {
        cells.push_back(Shown(at.recall, "%.4f"));
        cells.push_back(ShownRate(at.recalls_per_s));
      }
      indexes.AddRow(cells);
    }
  }
  std::printf("\nThe indexes, on one thread:\n");
  indexes.Print();
}

Json JsonOf(const Figures& figures) {
  Json json;
  json["linked_inserts_per_s"] =
      figures.inserts_per_s ? Json(std::round(*figures.inserts_per_s)) : Json(nullptr);
  json["us_an_insert_last_tenth"] =
      figures.us_an_insert ? Json(FourDigits(*figures.us_an_insert)) : Json(nullptr);
  json["bytes_per_vector"] = std::round(figures.bytes_a_vector);
  for (const CurvePoint& point : figures.curve) {
    json["curve"].push_back({{"ef", point.ef},
                             {"recall_at_10", FourDigits(point.recall)},
                             {"recalls_per_s", std::round(point.recalls_per_s)}});
  }
  return json;
}

Json JsonOf(const Point& point) {
  Json json = {{"n", point.rows},
               {"grown", FourDigits(point.seen.grown_of_rows)},
               {"grown_of_nearest", FourDigits(point.seen.grown_of_nearest)},
               {"distance_to_tenth", FourDigits(point.seen.distance_to_tenth)},
               {"local_dimension", FourDigits(point.seen.local_dimension)},
               {"distance_of_rows", FourDigits(point.seen.distance_of_rows)}};
  for (const Figures& figures : point.figures) json[figures.name] = JsonOf(figures);
  return json;
}

Result<void> Measure(const Options& options) {
  if (auto pinned = PinTo(options.inputs.processor); !pinned) return pinned;
  const size_t rows = options.points.back();
  auto sets = LoadSets(options.inputs, std::min<uint64_t>(options.real, rows), kNearest);
  if (!sets) return std::unexpected(sets.error());
  const size_t real = sets->base.size();
  if (real < rows) {
    std::fprintf(stderr, "growing %zu rows to %zu\n", real, rows);
    sets->base =
        GrowSet(sets->base, rows,
                {.metric = MetricOfName(options.inputs.metric), .seed = options.inputs.seed});
  }
  const uint32_t dimension = sets->base.dimension();
  const double load_before = LoadAverage();
  Curve curve(options, std::move(sets->base), std::move(sets->queries), real);
  const std::vector<Point> points = curve.Run();
  if (!options.inputs.json) {
    std::printf("%s: %s real rows of %u, %s; engram %s, traversal %s; one thread\n",
                SetNameOf(options.inputs.data).c_str(), WithThousands(real).c_str(), dimension,
                options.inputs.metric.c_str(), options.inputs.precision.c_str(),
                options.inputs.traversal.c_str());
    std::printf(
        "rates by processor time; %.0f %% of the time was this program's; load %.2f to "
        "%.2f\n",
        100 * curve.share(), load_before, LoadAverage());
    Print(points, options);
    if (options.times_slices) {
      std::printf("\nSlices of linking, us:");
      for (const auto& [name, quantile] : kSliceQuantiles) {
        std::printf("  %s %.0f", name,
                    static_cast<double>(curve.slices().QuantileNs(quantile)) / 1e3);
      }
      std::printf("\n");
    }
    return {};
  }
  Json json = {{"benchmark", "growth_curve"},
               {"set", SetNameOf(options.inputs.data)},
               {"metric", options.inputs.metric},
               {"dimension", dimension},
               {"real", real},
               {"precision", options.inputs.precision},
               {"traversal", options.inputs.traversal},
               {"seed", options.inputs.seed},
               {"processor_share", FourDigits(curve.share())},
               {"load_before", FourDigits(load_before)},
               {"load_after", FourDigits(LoadAverage())}};
  for (const Point& point : points) json["points"].push_back(JsonOf(point));
  for (const auto& [name, quantile] : kSliceQuantiles) {
    if (options.times_slices) json["slice_ns"][name] = curve.slices().QuantileNs(quantile);
  }
  std::printf("%s\n", json.dump().c_str());
  return {};
}

int Main(int argc, char** argv) {
  CLI::App app("Measures this project's index as it grows, on a real set made larger.");
  Options options;
  AddOptions(&app, &options);
  return RunBench(&app, argc, argv, "growth_curve", [&options] {
    std::ranges::sort(options.points);
    return Measure(options);
  });
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) { return engram::Main(argc, argv); }
