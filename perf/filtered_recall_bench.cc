// filtered_recall_bench: what a filter costs a recall, and what it finds.
//
//   filtered_recall_bench --data BASE --queries Q [--categories TSV] [--count N] [--ef N]
//                         [--metric cosine|ip|l2] [--rounds N] [--only FILTER] [--json]
//
// 1. The rows are stored with attributes, and linked: tags that half, a tenth, a hundredth and a
//    thousandth of them have, whatever they are; a `who` of a hundred; a `when` in another order
//    than theirs; and, with --categories (base.tsv of a set: the third column), a category, which
//    goes with what they are.
// 2. Each filter's truth: the ten nearest of the rows that match, by comparing all of these.
// 3. Each query is recalled with each filter, without any, and by comparing the rows that match,
//    given their numbers, by int8 and the nearest again by the vectors as they are kept. One recall
//    at a time; the median over queries and rounds, by processor time.
// 4. A line for each filter: what it finds, what it takes, and that as a multiple of what the
//    faster of the two others takes.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "index/recall_job.h"
#include "index/space.h"
#include "perf/bench_inputs.h"
#include "perf/bench_space.h"
#include "perf/bench_support.h"
#include "perf/vector_set.h"
#include "src/core/attributes.h"
#include "src/core/check.h"
#include "src/core/hash.h"
#include "src/core/shard_port.h"
#include "tools/engramctl/table.h"

namespace engram {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint32_t kNearest = 10;
constexpr uint32_t kCompared = 20;  // by the vectors as they are kept
constexpr uint32_t kSliceDistances = 256;
constexpr std::string_view kCategoryKey = "category";
constexpr size_t kCategories = 3;  // that are filtered by

struct Options {
  BenchInputs inputs;
  std::string categories;
  uint64_t count = UINT32_MAX;
  uint32_t ef = 128;
  std::string only;
};

struct Filter {
  std::string name;
  std::string bytes;
  std::function<bool(size_t row)> matches;
};

struct Figures {
  std::string name;
  size_t matching = 0;
  double recall = 0;
  double us = 0;
  double scan_us = 0;
};

uint64_t DrawOf(size_t row) { return MixBits(row + 1) % 1'000'000; }
int64_t WhenOf(size_t row) { return static_cast<int64_t>(MixBits(row + 77) % 1'000'000); }
size_t WhoOf(size_t row) { return MixBits(row + 5) % 100; }

std::string Requiring(std::string_view key, std::string_view value, const TimeRange& times = {}) {
  FilterWriter writer;
  writer.SetTimes(times);
  CHECK(writer.Require(key, {&value, 1}), "a filter of one clause");
  return writer.Bytes();
}

struct Tag {
  const char* name;
  uint64_t below;  // of a million
};
constexpr Tag kTags[] = {
    {"half", 500'000}, {"tenth", 100'000}, {"hundredth", 10'000}, {"thousandth", 1'000}};

// The third column of each line; empty without a file.
Result<std::vector<std::string>> ReadCategories(const std::string& path, size_t rows) {
  std::vector<std::string> categories;
  if (path.empty()) return categories;
  std::ifstream file(path);
  for (std::string line; categories.size() < rows && std::getline(file, line);) {
    const size_t second = line.find('\t', line.find('\t') + 1);
    categories.push_back(line.substr(second + 1, line.find('\t', second + 1) - second - 1));
  }
  if (categories.size() < rows) {
    return Fail(ErrorCode::kInvalidArgument, path + " has fewer lines than there are rows");
  }
  return categories;
}

std::vector<Filter> FiltersFor(const std::vector<std::string>& categories) {
  std::vector<Filter> filters;
  for (const Tag& tag : kTags) {
    filters.push_back({tag.name, Requiring(kTagKey, tag.name),
                       [below = tag.below](size_t row) { return DrawOf(row) < below; }});
  }
  const TimeRange tenth{.begin_ns = 300'000, .end_ns = 400'000};
  FilterWriter by_time;
  by_time.SetTimes(tenth);
  filters.push_back(
      {"a tenth of time", by_time.Bytes(), [tenth](size_t row) { return tenth.Has(WhenOf(row)); }});
  filters.push_back(
      {"half, a tenth of time", Requiring(kTagKey, "half", tenth),
       [tenth](size_t row) { return DrawOf(row) < 500'000 && tenth.Has(WhenOf(row)); }});
  filters.push_back(
      {"one who", Requiring(kWhoKey, "42"), [](size_t row) { return WhoOf(row) == 42; }});
  FilterWriter writer;
  constexpr std::string_view kHalf = "half";
  CHECK(writer.Exclude(kTagKey, {&kHalf, 1}), "a filter of one clause");
  filters.push_back(
      {"not half", writer.Bytes(), [](size_t row) { return DrawOf(row) >= 500'000; }});
  std::map<std::string, size_t> counts;
  for (const std::string& category : categories) ++counts[category];
  std::vector<std::pair<size_t, std::string>> by_count;
  for (const auto& [category, count] : counts) by_count.emplace_back(count, category);
  std::ranges::sort(by_count, std::greater<>());
  for (size_t i = 0; i < kCategories && i < by_count.size(); ++i) {
    const std::string& category = by_count[i * i * 5 % by_count.size()].second;
    filters.push_back(
        {std::string(kCategoryKey) + " " + category, Requiring(kCategoryKey, category),
         [&categories, category](size_t row) { return categories[row] == category; }});
  }
  return filters;
}

class Bench {
 public:
  Bench(const Options& options, LoadedSets sets, std::vector<std::string> categories)
      : options_(options),
        base_(std::move(sets.base)),
        queries_(std::move(sets.queries)),
        categories_(std::move(categories)),
        bench_(SpaceOptionsOf(), base_.size()),
        space_(bench_.space()),
        job_(bench_.heap(), nullptr, RecallJob::Core::kOfShard),
        slot_(kResultSlotBytes) {}

  void Fill() {
    for (size_t row = 0; row < base_.size(); ++row) {
      bench_.Store(base_.Bytes(row), WhenOf(row), AttributesOf(row));
      if ((row + 1) % BatchLinker::kMaxBatch == 0) bench_.LinkAll();
    }
    bench_.LinkAll();
  }

  std::vector<Figures> Run() {
    unfiltered_us_ = Time([this](size_t query) { Recall(query, {}); });
    std::vector<Figures> all;
    for (const Filter& filter : FiltersFor(categories_)) {
      if (options_.only.empty() || options_.only == filter.name) all.push_back(Measure(filter));
    }
    return all;
  }
  double unfiltered_us() const { return unfiltered_us_; }
  size_t rows() const { return base_.size(); }
  uint64_t attribute_bytes() const { return space_.attributes().bytes(); }
  uint64_t time_bytes() const { return space_.times().bytes(); }

 private:
  SpaceOptions SpaceOptionsOf() const {
    SpaceOptions space = SpaceOf(options_.inputs, base_.dimension());
    space.filter_keys = {std::string(kCategoryKey)};
    return space;
  }

  std::string AttributesOf(size_t row) const {
    std::string attributes;
    for (const Tag& tag : kTags) {
      if (DrawOf(row) < tag.below) (void)AppendAttribute(kTagKey, tag.name, &attributes);
    }
    (void)AppendAttribute(kWhoKey, std::to_string(WhoOf(row)), &attributes);
    if (!categories_.empty()) (void)AppendAttribute(kCategoryKey, categories_[row], &attributes);
    return attributes;
  }

  // The rows found; fewer than kNearest where fewer match.
  std::vector<int64_t> Recall(size_t query, const std::string& filter) {
    const size_t vector_bytes = base_.dimension() * sizeof(float);
    asked_.resize(vector_bytes + filter.size());
    std::memcpy(asked_.data(), queries_.Bytes(query), vector_bytes);
    std::memcpy(asked_.data() + vector_bytes, filter.data(), filter.size());
    RecallRequest request;
    request.dtype = VectorDtype::kF32;
    request.dimension = static_cast<uint16_t>(base_.dimension());
    request.k = kNearest;
    request.filter_bytes = static_cast<uint16_t>(filter.size());
    const RefusalReason reason = job_.Begin(space_, request, asked_.data(), options_.ef);
    CHECK(reason == RefusalReason::kNone, "a recall was refused");
    while (!job_.Search(kSliceDistances)) {
    }
    return Emit();
  }

  // Median of a recall's processor time, in us.
  template <typename One>
  double Time(One&& one) {
    std::vector<double> times;
    for (int round = 0; round < options_.inputs.rounds; ++round) {
      for (size_t query = 0; query < queries_.size(); ++query) {
        const int64_t begin_ns = ThreadCpuNs();
        one(query);
        times.push_back(static_cast<double>(ThreadCpuNs() - begin_ns) / 1e3);
      }
    }
    return Median(times);
  }

  Figures Measure(const Filter& filter) {
    Figures figures{.name = filter.name};
    std::vector<NodeId> nodes;
    for (size_t row = 0; row < base_.size(); ++row) {
      if (filter.matches(row)) nodes.push_back(static_cast<NodeId>(row));
    }
    figures.matching = nodes.size();
    figures.recall = RecallOf(filter, nodes);
    figures.us = Time([&](size_t query) { Recall(query, filter.bytes); });
    figures.scan_us = Time([&](size_t query) { Scan(query, nodes); });
    return figures;
  }

  double RecallOf(const Filter& filter, const std::vector<NodeId>& nodes) {
    if (nodes.empty()) return 1;
    const auto k = static_cast<uint32_t>(std::min<size_t>(kNearest, nodes.size()));
    VectorSet matching = VectorSet::Zeros(nodes.size(), base_.dimension());
    std::map<int64_t, int64_t> place_of;
    for (size_t i = 0; i < nodes.size(); ++i) {
      std::ranges::copy(base_[nodes[i]], matching.Row(i).data());
      place_of[nodes[i]] = static_cast<int64_t>(i);
    }
    const Metric metric = SpaceOptionsOf().metric;
    const ExactTruth truth = ComputeTruth(matching, queries_, metric, k);
    std::vector<int64_t> places(queries_.size() * k, -1);
    for (size_t query = 0; query < queries_.size(); ++query) {
      const std::vector<int64_t> rows = Recall(query, filter.bytes);
      for (size_t i = 0; i < rows.size() && i < k; ++i) {
        CHECK(place_of.contains(rows[i]), "a row was recalled that does not match");
        places[query * k + i] = place_of[rows[i]];
      }
    }
    return RecallAtK(matching, queries_, truth, metric, places);
  }

  // All of `nodes` by int8, eight rows asked for ahead, and the nearest of them again.
  void Scan(size_t query, const std::vector<NodeId>& nodes) {
    constexpr size_t kAtOnce = 16;
    const BenchSpace::Compared compared = bench_.CompareWith(queries_.Bytes(query));
    const SearchTarget& target = compared.by_int8;
    std::array<NeighbourKey, kCompared> kept;
    KeyHeap<FarthestFirst> nearest;
    nearest.Attach(kept.data());
    std::array<float, kAtOnce> distances;
    std::array<const std::byte*, kAtOnce> rows;
    for (size_t first = 0; first < nodes.size(); first += kAtOnce) {
      const size_t count = std::min(kAtOnce, nodes.size() - first);
      for (size_t i = 0; i < count; ++i) {
        rows[i] = target.vectors->Row(nodes[first + i]);
        if (first + i + kAtOnce < nodes.size()) target.Prefetch(nodes[first + i + kAtOnce]);
      }
      target.DistancesBetween(target.query, {rows.data(), count}, distances.data());
      for (size_t i = 0; i < count; ++i) {
        const NeighbourKey key = KeyOf(distances[i], nodes[first + i]);
        if (nearest.size() < kCompared) {
          nearest.Push(key);
        } else if (key < nearest.top()) {
          nearest.ReplaceTop(key);
        }
      }
    }
    const std::span<NeighbourKey> keys = nearest.keys();
    if (space_.has_exact()) {
      for (NeighbourKey& key : keys) {
        key = KeyOf(compared.exact.DistanceTo(NodeOf(key)), NodeOf(key));
      }
    }
    std::ranges::sort(keys);
    std::array<NodeId, kNearest> answer;
    const size_t count = std::min<size_t>(keys.size(), kNearest);
    for (size_t i = 0; i < count; ++i) answer[i] = NodeOf(keys[i]);
    job_.BeginListing(space_, std::span(answer).first(count), false, false);
    Emit();
  }

  // The rows of the hits.
  std::vector<int64_t> Emit() {
    CHECK(job_.EmitBatch(std::span(slot_).first(job_.NextBatchBytes(slot_.size()))),
          "all hits fit one slot");
    ResultBatch batch;
    std::memcpy(&batch, slot_.data(), sizeof(batch));
    const std::byte* from = slot_.data() + sizeof(batch);
    std::vector<int64_t> rows;
    for (uint16_t i = 0; i < batch.count; ++i) {
      HitHeader header;
      std::memcpy(&header, from, sizeof(header));
      const auto* id = reinterpret_cast<const char*>(from + sizeof(header));
      rows.push_back(std::stoll(std::string(id, header.id_bytes)));
      from += header.hit_bytes;
    }
    return rows;
  }

  const Options& options_;
  const VectorSet base_;
  const VectorSet queries_;
  const std::vector<std::string> categories_;
  BenchSpace bench_;
  Space& space_;
  RecallJob job_;
  std::vector<std::byte> slot_;
  std::vector<std::byte> asked_;
  double unfiltered_us_ = 0;
};

double RatioOf(const Figures& figures, double unfiltered_us) {
  return figures.us / std::min(figures.scan_us, unfiltered_us);
}

void Print(const std::vector<Figures>& all, const Bench& bench) {
  constexpr auto kRight = Table::Align::kRight;
  Table table({{"filter", Table::Align::kLeft},
               {"matching", kRight},
               {"share", kRight},
               {"recall@10", kRight},
               {"us/recall", kRight},
               {"us to compare all", kRight},
               {"us without", kRight},
               {"ratio", kRight}});
  for (const Figures& figures : all) {
    const double share = static_cast<double>(figures.matching) / static_cast<double>(bench.rows());
    table.AddRow({figures.name, std::to_string(figures.matching), Shown(share, "%.4f"),
                  Shown(figures.recall, "%.4f"), Shown(figures.us, "%.1f"),
                  Shown(figures.scan_us, "%.1f"), Shown(bench.unfiltered_us(), "%.1f"),
                  Shown(RatioOf(figures, bench.unfiltered_us()), "%.2f")});
  }
  table.Print();
}

Result<void> Measure(const Options& options) {
  if (auto pinned = PinTo(options.inputs.processor); !pinned) return pinned;
  auto sets = LoadSets(options.inputs, options.count, kNearest);
  if (!sets) return std::unexpected(sets.error());
  auto categories = ReadCategories(options.categories, sets->base.size());
  if (!categories) return std::unexpected(categories.error());
  const uint32_t dimension = sets->base.dimension();
  Bench bench(options, *std::move(sets), *std::move(categories));
  bench.Fill();
  const std::vector<Figures> all = bench.Run();
  if (all.empty()) {
    return Fail(
        ErrorCode::kInvalidArgument,
        "--only: " + options.only + " is none of the filters; without it the table names all");
  }
  const auto bytes_each = [&bench](uint64_t bytes) {
    return static_cast<double>(bytes) / static_cast<double>(bench.rows());
  };
  if (!options.inputs.json) {
    std::printf("%s: %zu rows of %u; ef %u; attributes %.1f bytes a row, times %.1f\n",
                SetNameOf(options.inputs.data).c_str(), bench.rows(), dimension, options.ef,
                bytes_each(bench.attribute_bytes()), bytes_each(bench.time_bytes()));
    Print(all, bench);
    return {};
  }
  Json json = {{"benchmark", "filtered_recall_bench"},
               {"set", SetNameOf(options.inputs.data)},
               {"n", bench.rows()},
               {"dimension", dimension},
               {"ef", options.ef},
               {"attribute_bytes_per_row", FourDigits(bytes_each(bench.attribute_bytes()))},
               {"time_bytes_per_row", FourDigits(bytes_each(bench.time_bytes()))},
               {"unfiltered_us", FourDigits(bench.unfiltered_us())}};
  for (const Figures& figures : all) {
    json["filters"].push_back({{"filter", figures.name},
                               {"matching", figures.matching},
                               {"recall_at_10", FourDigits(figures.recall)},
                               {"us", FourDigits(figures.us)},
                               {"compare_all_us", FourDigits(figures.scan_us)},
                               {"ratio", FourDigits(RatioOf(figures, bench.unfiltered_us()))}});
  }
  std::printf("%s\n", json.dump().c_str());
  return {};
}

int Main(int argc, char** argv) {
  CLI::App app("Measures recalls with a filter.");
  Options options;
  options.inputs.query_count = 200;
  AddInputOptions(&app, &options.inputs);
  app.add_option("--categories", options.categories, "Of the rows: the third column, by tabs");
  app.add_option("--count", options.count, "Only the first rows")->check(CLI::PositiveNumber);
  app.add_option("--ef", options.ef)->check(CLI::Range(kNearest, kMaxEf))->capture_default_str();
  app.add_option("--only", options.only, "One of the filters, by its name in the table");
  return RunBench(&app, argc, argv, "filtered_recall_bench",
                  [&options] { return Measure(options); });
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) { return engram::Main(argc, argv); }
