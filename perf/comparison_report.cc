#include "perf/comparison_report.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <span>
#include <system_error>

#include "perf/bench_inputs.h"
#include "perf/bench_support.h"
#include "perf/svg_plot.h"
#include "src/core/check.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

using Json = nlohmann::ordered_json;
constexpr size_t kTenths = 10;

Json Rounded(std::optional<double> value, double unit) {
  if (!value) return nullptr;
  return std::round(*value / unit) * unit;
}
// Shortest decimal that says as much: 0.1 + 0.2 would print 17 digits.
Json Ratio(std::optional<double> value) {
  if (!value) return nullptr;
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.4g", *value);
  return Json::parse(text.data());
}

// Rows that are in at the end of a tenth, and linked inserts/s within it.
struct Tenth {
  size_t rows = 0;
  std::optional<double> inserts_per_s;
};

std::vector<Tenth> TenthsOf(const ComparisonSubject& subject, const Contender& contender) {
  std::vector<Tenth> tenths;
  const size_t chunks = contender.chunks.size();
  size_t done = 0;
  for (size_t tenth = 1; tenth <= kTenths; ++tenth) {
    const size_t end = chunks * tenth / kTenths;
    if (end == done) continue;
    Contender part;
    part.chunks.assign(contender.chunks.begin() + static_cast<ptrdiff_t>(done),
                       contender.chunks.begin() + static_cast<ptrdiff_t>(end));
    tenths.push_back(
        {std::min(end * subject.options.chunk, subject.rows), part.InsertsPerSecond()});
    done = end;
  }
  return tenths;
}

std::optional<double> Over(std::optional<double> ours, std::optional<double> theirs) {
  if (!ours || !theirs) return std::nullopt;
  return *ours / *theirs;
}

std::optional<double> InsertsOver(const Contender& ours, const Contender* theirs) {
  if (theirs == nullptr) return std::nullopt;
  return Over(ours.InsertsPerSecond(), theirs->InsertsPerSecond());
}

std::optional<double> ChunkMedianOver(const Contender& ours, const Contender& theirs) {
  std::vector<double> ratios;
  for (size_t i = 0; i < ours.chunks.size(); ++i) {
    const Contender::Chunk& our = ours.chunks[i];
    const Contender::Chunk& their = theirs.chunks[i];
    if (our.linked == 0 || their.linked == 0) continue;
    ratios.push_back(static_cast<double>(our.linked) / our.seconds * their.seconds /
                     static_cast<double>(their.linked));
  }
  if (ratios.empty()) return std::nullopt;
  return Median(ratios);
}

// The peer with the most inserts/s of those that have equal rates at all these recalls.
const Contender* Cheapest(const std::vector<Contender>& contenders,
                          const std::vector<double>& recalls) {
  std::vector<RecallCurve> curves;
  for (const Contender& peer : std::span(contenders).subspan(1)) curves.push_back(peer.curve);
  const std::vector<bool> equal = HaveEqualRates(curves, contenders[0].curve, recalls);
  const Contender* cheapest = nullptr;
  for (size_t i = 0; i < equal.size(); ++i) {
    const Contender& peer = contenders[i + 1];
    if (!equal[i]) continue;
    if (cheapest == nullptr || peer.InsertsPerSecond() > cheapest->InsertsPerSecond()) {
      cheapest = &peer;
    }
  }
  return cheapest;
}
const Contender* CheapestOnCurve(const std::vector<Contender>& contenders) {
  return Cheapest(contenders, ComparedRecalls(contenders[0].curve));
}

// Recalls/s at this recall of the peers' best setting, over ours.
std::optional<double> BestOverOurs(const std::vector<Contender>& contenders, double recall) {
  std::optional<double> best;
  for (const Contender& peer : std::span(contenders).subspan(1)) {
    best = std::max(best, RateRatio(peer.curve, contenders[0].curve, recall));
  }
  return best;
}

double RecallWith(const Contender& contender, uint32_t ef) {
  const auto point = std::ranges::find(contender.curve, ef, &CurvePoint::ef);
  CHECK(point != contender.curve.end(), "the curve has the default ef");
  return point->recall;
}

double ShareOf(const MachineShare& share) {
  return share.seconds > 0 ? share.processor_seconds / share.seconds : 1;
}

Json SettingOf(const Contender* contender) {
  if (contender == nullptr) return nullptr;
  return {{"m", contender->M}, {"ef_construction", contender->ef_construction}};
}

std::optional<double> BytesPerVector(const ComparisonSubject& subject, const Contender& contender) {
  if (contender.index->bytes() == 0) return std::nullopt;
  return static_cast<double>(contender.index->bytes()) / static_cast<double>(subject.rows);
}

Json Describe(const ComparisonSubject& subject, const Contender& contender) {
  Json described = SettingOf(&contender);
  described["linked"] = contender.Linked();
  described["linked_inserts_per_s"] = Rounded(contender.InsertsPerSecond(), 1);
  described["bytes_per_vector"] = Rounded(BytesPerVector(subject, contender), 1);
  for (const Tenth& tenth : TenthsOf(subject, contender)) {
    described["inserts"].push_back(
        {{"n", tenth.rows}, {"linked_per_s", Rounded(tenth.inserts_per_s, 1)}});
  }
  for (const CurvePoint& point : contender.curve) {
    described["curve"].push_back({{"ef", point.ef},
                                  {"recall_at_10", Ratio(point.recall)},
                                  {"recalls_per_s", Rounded(point.recalls_per_s, 1)}});
  }
  return described;
}

std::string NameOf(const Contender& contender) {
  return contender.name + ", M " + std::to_string(contender.M) + ", ef_c " +
         std::to_string(contender.ef_construction);
}

void PrintInserts(const ComparisonSubject& subject, const std::vector<Contender>& contenders) {
  const std::vector<Tenth> ours = TenthsOf(subject, contenders[0]);
  const std::vector<Tenth> theirs = TenthsOf(subject, contenders[1]);
  Table table({{"rows in", Table::Align::kRight},
               {"engram linked/s", Table::Align::kRight},
               {"hnswlib linked/s", Table::Align::kRight},
               {"engram / hnswlib", Table::Align::kRight}});
  for (size_t i = 0; i < ours.size(); ++i) {
    table.AddRow({WithThousands(ours[i].rows), ShownRate(ours[i].inserts_per_s),
                  ShownRate(theirs[i].inserts_per_s),
                  Shown(Over(ours[i].inserts_per_s, theirs[i].inserts_per_s), "%.2f")});
  }
  std::printf("\nInserts, of the rows since the line before:\n");
  table.Print();
}

void PrintCurves(const std::vector<Contender>& contenders) {
  Table table({{"ef", Table::Align::kRight},
               {"engram recall@10", Table::Align::kRight},
               {"recalls/s", Table::Align::kRight},
               {"hnswlib recall@10", Table::Align::kRight},
               {"recalls/s", Table::Align::kRight}});
  for (size_t i = 0; i < contenders[0].curve.size(); ++i) {
    const CurvePoint& our = contenders[0].curve[i];
    const CurvePoint& their = contenders[1].curve[i];
    table.AddRow({std::to_string(our.ef), Shown(our.recall, "%.4f"), ShownRate(our.recalls_per_s),
                  Shown(their.recall, "%.4f"), ShownRate(their.recalls_per_s)});
  }
  std::printf("\nRecalls, on one thread:\n");
  table.Print();

  Table ratios({{"recall@10", Table::Align::kRight},
                {"engram recalls/s", Table::Align::kRight},
                {"hnswlib recalls/s", Table::Align::kRight},
                {"engram / hnswlib", Table::Align::kRight}});
  for (const double recall : {0.90, 0.95, 0.98, 0.99}) {
    ratios.AddRow({Shown(recall, "%.2f"), ShownRate(RateAt(contenders[0].curve, recall)),
                   ShownRate(RateAt(contenders[1].curve, recall)),
                   Shown(RateRatio(contenders[0].curve, contenders[1].curve, recall), "%.2f")});
  }
  std::printf("\nOn the curves, at equal recall:\n");
  ratios.Print();
}

void PrintSettings(const ComparisonSubject& subject, const std::vector<Contender>& contenders) {
  Table table({{"index", Table::Align::kLeft},
               {"linked/s", Table::Align::kRight},
               {"engram's over it", Table::Align::kRight},
               {"recall@10, ef " + std::to_string(subject.default_ef), Table::Align::kRight},
               {"engram's least recalls/s over it", Table::Align::kRight},
               {"bytes a vector", Table::Align::kRight}});
  for (const Contender& contender : contenders) {
    table.AddRow({NameOf(contender), ShownRate(contender.InsertsPerSecond()),
                  Shown(InsertsOver(contenders[0], &contender), "%.2f"),
                  Shown(RecallWith(contender, subject.default_ef), "%.4f"),
                  Shown(LeastRateRatio(contenders[0].curve, contender.curve), "%.2f"),
                  ShownRate(BytesPerVector(subject, contender))});
  }
  std::printf("\nAll settings:\n");
  table.Print();
  const auto print = [&](const char* where, const Contender* cheapest) {
    std::printf("cheapest of hnswlib with equal recalls/s %s: %s, engram's inserts over it %s\n",
                where, cheapest != nullptr ? NameOf(*cheapest).c_str() : "none of these",
                Shown(InsertsOver(contenders[0], cheapest), "%.2f").c_str());
  };
  std::printf("\n");
  print("along the curve", CheapestOnCurve(contenders));
  print("at recall@10 0.95", Cheapest(contenders, {0.95}));
  print("at recall@10 0.99", Cheapest(contenders, {0.99}));
  std::printf("recalls/s of hnswlib's best setting over engram's: %s at 0.95, %s at 0.99\n",
              Shown(BestOverOurs(contenders, 0.95), "%.2f").c_str(),
              Shown(BestOverOurs(contenders, 0.99), "%.2f").c_str());
}

std::vector<PlotSeries> EmptySeries(const std::vector<Contender>& contenders) {
  const Contender* cheapest = CheapestOnCurve(contenders);
  if (cheapest == nullptr) cheapest = Cheapest(contenders, {0.95});
  std::vector<PlotSeries> series;
  for (size_t i = 0; i < contenders.size(); ++i) {
    PlotSeries one{.name = NameOf(contenders[i]), .points = {}};
    if (i == 0) {
      one.look = PlotSeries::Look::kFirst;
    } else if (i == 1) {
      one.look = PlotSeries::Look::kSecond;
    } else if (&contenders[i] == cheapest) {
      one.look = PlotSeries::Look::kThird;
    } else {
      one.name = "hnswlib, other settings";
    }
    series.push_back(std::move(one));
  }
  return series;
}

}  // namespace

std::string ComparisonJson(const ComparisonSubject& subject,
                           const std::vector<Contender>& contenders) {
  const Contender& ours = contenders[0];
  const Contender& theirs = contenders[1];
  const Contender* along_curve = CheapestOnCurve(contenders);
  const Contender* at_095 = Cheapest(contenders, {0.95});
  const Contender* at_099 = Cheapest(contenders, {0.99});
  const auto at = [&](double recall) { return Ratio(RateRatio(ours.curve, theirs.curve, recall)); };
  Json json;
  json["benchmark"] = "index_vs_peers";
  json["set"] = subject.set;
  json["metric"] = MetricName(subject.options.metric);
  json["dimension"] = subject.dimension;
  json["n"] = subject.rows;
  json["queries"] = subject.queries;
  json["linked_inserts_over_hnswlib"] = Ratio(InsertsOver(ours, &theirs));
  json["linked_inserts_over_hnswlib_chunk_median"] = Ratio(ChunkMedianOver(ours, theirs));
  json["linked_inserts_over_hnswlib_last_tenth"] =
      Ratio(Over(TenthsOf(subject, ours).back().inserts_per_s,
                 TenthsOf(subject, theirs).back().inserts_per_s));
  json["recalls_over_hnswlib_at_090"] = at(0.90);
  json["recalls_over_hnswlib_at_095"] = at(0.95);
  json["recalls_over_hnswlib_at_098"] = at(0.98);
  json["recalls_over_hnswlib_at_099"] = at(0.99);
  json["recalls_over_hnswlib_least"] = Ratio(LeastRateRatio(ours.curve, theirs.curve));
  json["default_ef"] = subject.default_ef;
  json["recall_at_10"] = Ratio(RecallWith(ours, subject.default_ef));
  json["hnswlib_recall_at_10"] = Ratio(RecallWith(theirs, subject.default_ef));
  json["hnswlib_cheapest"] = SettingOf(along_curve);
  json["linked_inserts_over_hnswlib_cheapest"] = Ratio(InsertsOver(ours, along_curve));
  json["hnswlib_cheapest_at_095"] = SettingOf(at_095);
  json["linked_inserts_over_hnswlib_cheapest_at_095"] = Ratio(InsertsOver(ours, at_095));
  json["hnswlib_best_recalls_at_095"] = Ratio(BestOverOurs(contenders, 0.95));
  json["hnswlib_cheapest_at_099"] = SettingOf(at_099);
  json["linked_inserts_over_hnswlib_cheapest_at_099"] = Ratio(InsertsOver(ours, at_099));
  json["hnswlib_best_recalls_at_099"] = Ratio(BestOverOurs(contenders, 0.99));
  json["seed"] = subject.seed;
  json["rounds"] = subject.options.rounds;
  json["processor_share_inserting"] = Ratio(ShareOf(subject.inserting));
  json["processor_share_recalling"] = Ratio(ShareOf(subject.recalling));
  json["load_before"] = Ratio(subject.load_before);
  json["load_after"] = Ratio(subject.load_after);
  json["engram"] = Describe(subject, ours);
  json["engram"]["precision"] = subject.precision;
  json["engram"]["traversal"] = subject.traversal;
  json["hnswlib"] = Describe(subject, theirs);
  json["hnswlib_others"] = Json::array();
  for (const Contender& other : std::span(contenders).subspan(2)) {
    json["hnswlib_others"].push_back(Describe(subject, other));
  }
  return json.dump();
}

void PrintComparison(const ComparisonSubject& subject, const std::vector<Contender>& contenders) {
  std::printf("%s: %s vectors of %u, %s; %zu queries; engram %s, traversal %s; one thread\n",
              subject.set.c_str(), WithThousands(subject.rows).c_str(), subject.dimension,
              std::string(MetricName(subject.options.metric)).c_str(), subject.queries,
              subject.precision.c_str(), subject.traversal.c_str());
  std::printf(
      "rates by processor time; %.0f %% of the time was this program's; load %.2f to %.2f\n",
      100 * (subject.inserting.processor_seconds + subject.recalling.processor_seconds) /
          std::max(1e-9, subject.inserting.seconds + subject.recalling.seconds),
      subject.load_before, subject.load_after);
  PrintInserts(subject, contenders);
  PrintCurves(contenders);
  PrintSettings(subject, contenders);
}

Result<std::vector<std::string>> WriteComparisonPlots(const ComparisonSubject& subject,
                                                      const std::vector<Contender>& contenders,
                                                      const std::string& directory) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) {
    return Fail(ErrorCode::kInvalidArgument, directory + ": " + error.message());
  }
  const std::string subtitle = subject.set + ": first " + WithThousands(subject.rows) +
                               " vectors of " + std::to_string(subject.dimension) +
                               " dimensions, " + std::string(MetricName(subject.options.metric)) +
                               "; one thread, interleaved";
  Plot inserts{.title = "Linked inserts a second, as the index grows",
               .subtitle = subtitle,
               .x_label = "vectors in the index",
               .y_label = "linked inserts a second",
               .log_y = true,
               .series = EmptySeries(contenders)};
  Plot curve{.title = "Recalls a second at a recall@10",
             .subtitle = subtitle,
             .x_label = "recall@10",
             .y_label = "recalls a second",
             .log_y = true,
             .series = EmptySeries(contenders)};
  for (size_t i = 0; i < contenders.size(); ++i) {
    for (const Tenth& tenth : TenthsOf(subject, contenders[i])) {
      if (!tenth.inserts_per_s) continue;
      inserts.series[i].points.push_back({static_cast<double>(tenth.rows), *tenth.inserts_per_s});
    }
    for (const CurvePoint& point : contenders[i].curve) {
      curve.series[i].points.push_back({point.recall, point.recalls_per_s});
    }
  }
  const std::string prefix =
      directory + "/" + subject.set + "-" + std::to_string(subject.rows) + "-";
  const std::vector<std::string> paths = {prefix + "inserts.svg", prefix + "recall.svg"};
  if (auto written = WriteSvg(inserts, paths[0]); !written) {
    return std::unexpected(written.error());
  }
  if (auto written = WriteSvg(curve, paths[1]); !written) return std::unexpected(written.error());
  return paths;
}

}  // namespace engram
