// shard_scaling_bench: shards share nothing, so N of them do N times the work of one.
//
//   shard_scaling_bench --data BASE --queries Q [--metric cosine|ip|l2] [--rows N]
//                       [--shards N,N,...] [--threads] [--json]
//
// A shard is an index alone: a space with its linker and its own arena (perf/engram_index.h). Each
// gets `rows` rows, whatever their number: N shards hold the first N * rows rows, each a stretch of
// them, as sets come in a random order.
//
// With --threads, where there are cores: a thread for each shard, pinned to a processor of its own
// (one of each core first), all begin at once. Inserts/s of all, by the clock until the last is
// done, and of a shard, over what a shard alone does. Numbers beyond the processors are left out.
//
// Without, on few cores: all shards in one thread in turns, a batch each. What an insert takes in
// processor time, distances, and instructions and misses of the last-level cache outside the
// kernel, and a vector in bytes. Distances, instructions and bytes stay what they are with one
// shard, or shards share something; time and misses may rise, as the shards share this one core's
// caches here. Where the machine counts no instructions this says so; then
//   valgrind --tool=callgrind --collect-atstart=no --toggle-collect='*TakeTurns*'
//     shard_scaling_bench ... --rows 5000 --shards N --rounds 1
// counts those of N * 5,000 inserts ("Collected"), by the kernels for processors without AVX-512.
//
// Beside them one index that holds all rows of the N shards, and the recall@10 of both: of N shards
// each gives its 10 nearest, of which the 10 nearest are taken.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "index/batch_linker.h"
#include "perf/bench_inputs.h"
#include "perf/bench_support.h"
#include "perf/engram_index.h"
#include "perf/hardware_counters.h"
#include "perf/vector_set.h"
#include "src/core/check.h"
#include "src/core/topology.h"
#include "tools/engramctl/recall_quality.h"
#include "tools/engramctl/table.h"

namespace engram {

namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;
using Shards = std::vector<std::unique_ptr<ComparedIndex>>;
constexpr uint32_t kNearest = 10;
constexpr size_t kWarmUpRows = 5'000;

struct Options {
  BenchInputs inputs;
  uint64_t rows = 12'000;
  std::vector<uint64_t> shards = {1, 2, 4, 8, 16};
  uint32_t batch = BatchLinker::kMaxBatch;
  uint32_t ef = 64;
  bool threads = false;
};

void AddOptions(CLI::App* app, Options* options) {
  options->inputs.rounds = 3;
  options->inputs.query_count = 200;
  AddInputOptions(app, &options->inputs);
  app->add_option("--rows", options->rows, "Of each shard")
      ->check(CLI::Range(kNearest, UINT32_MAX))
      ->capture_default_str();
  app->add_option("--shards", options->shards)
      ->delimiter(',')
      ->check(CLI::Range(1, 1'024))
      ->capture_default_str();
  app->add_option("--batch", options->batch, "Nodes linked at once, and rows of a turn")
      ->check(CLI::Range(1u, BatchLinker::kMaxBatch))
      ->capture_default_str();
  app->add_option("--ef", options->ef)->check(CLI::PositiveNumber)->capture_default_str();
  app->add_flag("--threads", options->threads, "A pinned thread for each shard");
}

// One way of inserting once.
struct Inserted {
  double us_an_insert = 0;    // processor time
  double per_s = 0;           // of all shards, by the clock
  double per_s_of_shard = 0;  // by the clock; the mean of the shards
  HardwareCounters::Counts counts{};
};

struct Point {
  size_t shards = 0;
  std::vector<Inserted> rounds;
  double distances_an_insert = 0;
  double bytes_a_vector = 0;
  double recall = 0;
  // Of the one index with all rows.
  double one_us_an_insert = 0;  // of the rows since the point before
  double one_bytes_a_vector = 0;
  double one_recall = 0;

  double MedianOf(double Inserted::* figure) const {
    std::vector<double> values;
    for (const Inserted& round : rounds) values.push_back(round.*figure);
    return Median(values);
  }
};

double ThreadSeconds() { return 1e-9 * static_cast<double>(ThreadCpuNs()); }
double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Processors to pin to: one of each core, then the others.
std::vector<int> ProcessorsOf(const Topology& topology) {
  std::vector<int> first;
  std::vector<int> others;
  std::set<int> cores;
  for (const Cpu& cpu : topology.cpus) {
    (cores.insert(cpu.core_index).second ? first : others).push_back(cpu.os_index);
  }
  first.insert(first.end(), others.begin(), others.end());
  return first;
}

class Bench {
 public:
  Bench(const Options& options, LoadedSets sets, std::vector<int> processors)
      : options_(options),
        sets_(std::move(sets)),
        processors_(std::move(processors)),
        metric_(MetricOfName(options.inputs.metric)),
        space_(SpaceOf(options.inputs, sets_.base.dimension())) {}

  std::vector<Point> Run() {
    MakeShard()->Insert(sets_.base, 0, std::min<size_t>(kWarmUpRows, options_.rows));
    std::vector<Point> points;
    for (const uint64_t count : options_.shards) points.push_back({.shards = count, .rounds = {}});
    for (int round = 0; round < options_.inputs.rounds; ++round) {
      for (Point& point : points) {
        Shards shards(point.shards);
        point.rounds.push_back(options_.threads ? InsertInThreads(&shards)
                                                : InsertInTurns(&shards));
        if (round == 0) LookAt(shards, &point);
        std::fprintf(stderr, "round %d: %zu shards\n", round + 1, point.shards);
      }
    }
    CompareWithOne(&points);
    return points;
  }
  // Empty where all was counted.
  const std::string& why_not_counted() const { return why_not_counted_; }

 private:
  std::unique_ptr<ComparedIndex> MakeShard() const {
    return MakeEngramIndex(space_, options_.batch, options_.rows);
  }

  Inserted InsertInTurns(Shards* shards) {
    for (auto& shard : *shards) shard = MakeShard();
    HardwareCounters counters;
    why_not_counted_ = counters.why();
    Inserted inserted;
    const auto start = Clock::now();
    const double processor = ThreadSeconds();
    inserted.counts = counters.Run([&] { TakeTurns(shards); });
    const auto rows = static_cast<double>(shards->size() * options_.rows);
    inserted.us_an_insert = 1e6 * (ThreadSeconds() - processor) / rows;
    inserted.per_s = rows / SecondsSince(start);
    inserted.per_s_of_shard = inserted.per_s / static_cast<double>(shards->size());
    return inserted;
  }

  // A name to count instructions by.
  [[gnu::noinline]] void TakeTurns(Shards* shards) const {
    for (size_t at = 0; at < options_.rows; at += options_.batch) {
      const size_t end = std::min<size_t>(at + options_.batch, options_.rows);
      for (size_t i = 0; i < shards->size(); ++i) {
        const size_t first = i * options_.rows;
        (*shards)[i]->Insert(sets_.base, first + at, first + end);
      }
    }
  }

  Inserted InsertInThreads(Shards* shards) const {
    const size_t count = shards->size();
    std::vector<double> seconds(count);
    std::vector<double> processor_seconds(count);
    std::barrier ready(static_cast<ptrdiff_t>(count));
    std::vector<std::thread> threads;
    for (size_t i = 0; i < count; ++i) {
      threads.emplace_back([&, i] {
        Must(PinThisThread(processors_[i]));
        (*shards)[i] = MakeShard();  // touched first where it is used
        ready.arrive_and_wait();
        const auto start = Clock::now();
        const double processor = ThreadSeconds();
        (*shards)[i]->Insert(sets_.base, i * options_.rows, (i + 1) * options_.rows);
        processor_seconds[i] = ThreadSeconds() - processor;
        seconds[i] = SecondsSince(start);
      });
    }
    for (std::thread& thread : threads) thread.join();
    const auto rows = static_cast<double>(options_.rows);
    Inserted inserted;
    for (size_t i = 0; i < count; ++i) {
      inserted.per_s_of_shard += rows / seconds[i] / static_cast<double>(count);
      inserted.us_an_insert += 1e6 * processor_seconds[i] / rows / static_cast<double>(count);
    }
    inserted.per_s = rows * static_cast<double>(count) / std::ranges::max(seconds);
    return inserted;
  }

  void LookAt(const Shards& shards, Point* point) {
    uint64_t bytes = 0;
    uint64_t distances = 0;
    for (const auto& shard : shards) {
      bytes += shard->bytes();
      distances += shard->distances();
    }
    const size_t rows = shards.size() * options_.rows;
    point->distances_an_insert = static_cast<double>(distances) / static_cast<double>(rows);
    point->bytes_a_vector = static_cast<double>(bytes) / static_cast<double>(rows);
    point->recall = RecallOf(shards, TruthOf(rows));
  }

  ExactTruth TruthOf(size_t rows) const {
    return ComputeTruth(sets_.base, sets_.queries, metric_, kNearest, rows);
  }

  // recall@10 of the nearest of what each of them gives.
  double RecallOf(const Shards& shards, const ExactTruth& truth) const {
    const size_t queries = sets_.queries.size();
    std::vector<int64_t> given(queries * kNearest);
    std::vector<std::vector<std::pair<double, int64_t>>> found(queries);
    for (const auto& shard : shards) {
      shard->Recall(sets_.queries, 0, queries, kNearest, options_.ef, given.data());
      for (size_t i = 0; i < given.size(); ++i) {
        if (given[i] < 0) continue;
        const double score = ExactScore(metric_, sets_.queries[i / kNearest],
                                        sets_.base[static_cast<size_t>(given[i])]);
        found[i / kNearest].emplace_back(metric_ == Metric::kL2 ? score : -score, given[i]);
      }
    }
    std::vector<int64_t> merged;
    for (auto& of_query : found) {
      std::ranges::sort(of_query);
      of_query.resize(kNearest, {0, -1});
      for (const auto& [score, row] : of_query) merged.push_back(row);
    }
    return RecallAtK(sets_.base, sets_.queries, truth, metric_, merged);
  }

  void CompareWithOne(std::vector<Point>* points) const {
    Shards one(1);
    one[0] = MakeEngramIndex(space_, options_.batch, sets_.base.size());
    size_t before = 0;
    for (Point& point : *points) {
      const size_t rows = point.shards * options_.rows;
      const double processor = ThreadSeconds();
      one[0]->Insert(sets_.base, before, rows);
      point.one_us_an_insert =
          1e6 * (ThreadSeconds() - processor) / static_cast<double>(rows - before);
      point.one_bytes_a_vector = static_cast<double>(one[0]->bytes()) / static_cast<double>(rows);
      point.one_recall = RecallOf(one, TruthOf(rows));
      before = rows;
    }
  }

  const Options& options_;
  const LoadedSets sets_;
  const std::vector<int> processors_;
  const Metric metric_;
  const SpaceOptions space_;
  std::string why_not_counted_;
};

// Of an insert; nothing where it was not counted.
std::optional<double> CountedOf(const Point& point, uint64_t rows,
                                std::optional<uint64_t> HardwareCounters::Counts::* what) {
  std::vector<double> values;
  for (const Inserted& round : point.rounds) {
    if (!(round.counts.*what)) return std::nullopt;
    values.push_back(static_cast<double>(*(round.counts.*what)) /
                     static_cast<double>(point.shards * rows));
  }
  return Median(values);
}

Json JsonOf(std::optional<double> value) {
  return value ? Json(FourDigits(*value)) : Json(nullptr);
}

void Print(const std::vector<Point>& points, const Options& options, const std::string& why) {
  constexpr auto kRight = Table::Align::kRight;
  const double alone = points.front().MedianOf(&Inserted::per_s_of_shard);
  std::vector<Table::Column> columns = {{"shards", kRight}, {"us an insert", kRight}};
  if (options.threads) {
    columns.insert(columns.end(),
                   {{"inserts/s", kRight}, {"of a shard", kRight}, {"over the first", kRight}});
  } else {
    columns.insert(columns.end(),
                   {{"distances", kRight}, {"instructions", kRight}, {"LLC misses", kRight}});
  }
  columns.insert(columns.end(), {{"bytes a vector", kRight},
                                 {"recall@10", kRight},
                                 {"one index: us an insert", kRight},
                                 {"bytes a vector", kRight},
                                 {"recall@10", kRight}});
  Table table(columns);
  for (const Point& point : points) {
    const double of_shard = point.MedianOf(&Inserted::per_s_of_shard);
    std::vector<std::string> cells = {std::to_string(point.shards),
                                      Shown(point.MedianOf(&Inserted::us_an_insert), "%.1f")};
    if (options.threads) {
      cells.push_back(ShownRate(point.MedianOf(&Inserted::per_s)));
      cells.push_back(ShownRate(of_shard));
      cells.push_back(Shown(of_shard / alone, "%.2f"));
    } else {
      using Counts = HardwareCounters::Counts;
      cells.push_back(ShownRate(point.distances_an_insert));
      cells.push_back(ShownRate(CountedOf(point, options.rows, &Counts::instructions)));
      cells.push_back(Shown(CountedOf(point, options.rows, &Counts::llc_misses), "%.1f"));
    }
    cells.insert(cells.end(),
                 {ShownRate(point.bytes_a_vector), Shown(point.recall, "%.4f"),
                  Shown(point.one_us_an_insert, "%.1f"), ShownRate(point.one_bytes_a_vector),
                  Shown(point.one_recall, "%.4f")});
    table.AddRow(cells);
  }
  if (!options.threads && !why.empty()) {
    std::printf("this machine counts no instructions, or no misses (%s)\n", why.c_str());
  }
  std::printf("\n");
  table.Print();
}

Json JsonOf(const Point& point, const Options& options) {
  Json json = {{"shards", point.shards},
               {"us_an_insert", FourDigits(point.MedianOf(&Inserted::us_an_insert))},
               {"inserts_per_s", std::round(point.MedianOf(&Inserted::per_s))},
               {"inserts_per_s_of_shard", std::round(point.MedianOf(&Inserted::per_s_of_shard))}};
  json["distances_an_insert"] = FourDigits(point.distances_an_insert);
  using Counts = HardwareCounters::Counts;
  json["instructions_an_insert"] = JsonOf(CountedOf(point, options.rows, &Counts::instructions));
  json["llc_misses_an_insert"] = JsonOf(CountedOf(point, options.rows, &Counts::llc_misses));
  json["bytes_per_vector"] = FourDigits(point.bytes_a_vector);
  json["recall_at_10"] = FourDigits(point.recall);
  json["one_index"] = {{"us_an_insert", FourDigits(point.one_us_an_insert)},
                       {"bytes_per_vector", FourDigits(point.one_bytes_a_vector)},
                       {"recall_at_10", FourDigits(point.one_recall)}};
  return json;
}

Result<void> Measure(Options options) {
  const auto topology = DiscoverTopology();
  if (!topology) return std::unexpected(topology.error());
  const std::vector<int> processors = ProcessorsOf(*topology);
  if (options.threads) {
    const auto too_many = [&](uint64_t count) { return count > processors.size(); };
    if (std::erase_if(options.shards, too_many) > 0) {
      std::fprintf(stderr, "there are %zu processors: no more shards than these\n",
                   processors.size());
    }
    if (options.shards.empty()) {
      return Fail(ErrorCode::kInvalidArgument, "no number of shards is left");
    }
  } else if (auto pinned = PinTo(options.inputs.processor); !pinned) {
    return pinned;
  }
  const uint64_t rows = options.shards.back() * options.rows;
  auto sets = LoadSets(options.inputs, rows, kNearest);
  if (!sets) return std::unexpected(sets.error());
  if (sets->base.size() < rows) {
    return Fail(ErrorCode::kInvalidArgument, std::to_string(options.shards.back()) + " shards of " +
                                                 std::to_string(options.rows) + " rows want " +
                                                 std::to_string(rows) + ", " + options.inputs.data +
                                                 " has " + std::to_string(sets->base.size()) +
                                                 ": give fewer --rows");
  }
  const uint32_t dimension = sets->base.dimension();
  const double load_before = LoadAverage();
  Bench bench(options, *std::move(sets), processors);
  const std::vector<Point> points = bench.Run();
  if (!options.inputs.json) {
    std::printf("%s: %s rows of %u a shard, %s, ef %u; %s; load %.2f to %.2f\n",
                SetNameOf(options.inputs.data).c_str(), WithThousands(options.rows).c_str(),
                dimension, options.inputs.metric.c_str(), options.ef,
                options.threads ? "a thread for each shard" : "one thread, shards in turns",
                load_before, LoadAverage());
    Print(points, options, bench.why_not_counted());
    return {};
  }
  Json json = {{"benchmark", "shard_scaling"},
               {"set", SetNameOf(options.inputs.data)},
               {"metric", options.inputs.metric},
               {"dimension", dimension},
               {"rows_per_shard", options.rows},
               {"ef", options.ef},
               {"threads", options.threads},
               {"rounds", options.inputs.rounds},
               {"processors", processors.size()},
               {"not_counted", bench.why_not_counted()},
               {"load_before", FourDigits(load_before)},
               {"load_after", FourDigits(LoadAverage())}};
  for (const Point& point : points) json["points"].push_back(JsonOf(point, options));
  std::printf("%s\n", json.dump().c_str());
  return {};
}

int Main(int argc, char** argv) {
  CLI::App app("Measures what shards of this project's index do side by side.");
  Options options;
  AddOptions(&app, &options);
  return RunBench(&app, argc, argv, "shard_scaling_bench", [&options] {
    std::ranges::sort(options.shards);
    options.shards.erase(std::ranges::unique(options.shards).begin(), options.shards.end());
    return Measure(options);
  });
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) { return engram::Main(argc, argv); }
