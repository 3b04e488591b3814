// long_recall_bench: when the first results of a recall of many are there, and when the last.
//
//   long_recall_bench --data BASE --queries Q [--count N] [--k K,K,...] [--waiting N] [--ef N]
//                     [--metric cosine|ip|l2] [--precision P] [--rounds N] [--json]
//
// 1. The rows are stored and, but for the last --waiting of them, linked.
// 2. Each query is recalled for each k in slices of a shard's, the ten nearest ahead of the others
//    where the recall is a long one. Taken: processor time until the first batch is written, until
//    the last one is, and of the longest slice.
// 3. Beside it all rows are compared by int8 and the k nearest of them sorted, which a recall must
//    not take longer than.
// 4. A line for each k: recall@10 of what came first, recall@k of all of it, medians and the 99th
//    percentile, and the multiple of comparing all.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
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
#include "perf/shard_producer.h"
#include "perf/vector_set.h"
#include "src/core/check.h"
#include "src/core/shard_port.h"
#include "tools/engramctl/table.h"

namespace engram {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint32_t kFirst = 10;

struct Options {
  BenchInputs inputs;
  uint64_t count = UINT32_MAX;
  uint64_t waiting = 0;
  uint32_t ef = 128;
  std::vector<uint32_t> ks = {10, 100, 1'000, 10'000};
};

struct Figures {
  uint32_t k = 0;
  double first_recall = 0;
  double recall = 0;
  std::vector<double> first_us;
  std::vector<double> last_us;
  double longest_slice_us = 0;
  std::vector<double> compare_all_us;
};

class Bench {
 public:
  Bench(const Options& options, LoadedSets sets)
      : options_(options),
        base_(std::move(sets.base)),
        queries_(std::move(sets.queries)),
        bench_(SpaceOf(options.inputs, base_.dimension()), base_.size()),
        space_(bench_.space()),
        job_(bench_.heap(), nullptr, RecallJob::Core::kOfShard),
        slot_(kResultSlotBytes) {}

  void Fill() {
    const size_t linked = base_.size() - std::min<size_t>(options_.waiting, base_.size());
    for (size_t row = 0; row < base_.size(); ++row) {
      bench_.Store(base_.Bytes(row));
      if (row + 1 == linked || (row < linked && (row + 1) % BatchLinker::kMaxBatch == 0)) {
        bench_.LinkAll();
      }
    }
    while (space_.WantsListing()) space_.ListSome(1);
  }

  Figures Run(uint32_t k) {
    Figures figures;
    figures.k = k;
    const ExactTruth first_truth = ComputeTruth(base_, queries_, space_.metric(), kFirst);
    const ExactTruth truth = ComputeTruth(base_, queries_, space_.metric(), k);
    std::vector<int64_t> first(queries_.size() * kFirst, -1);
    std::vector<int64_t> all(queries_.size() * k, -1);
    for (int round = 0; round < options_.inputs.rounds; ++round) {
      for (size_t query = 0; query < queries_.size(); ++query) {
        const std::vector<int64_t> rows = Recall(query, k, &figures);
        std::copy_n(rows.begin(), std::min<size_t>(rows.size(), kFirst), &first[query * kFirst]);
        std::ranges::copy(rows, &all[query * k]);
        const int64_t begin_ns = ThreadCpuNs();
        CompareAll(query, k);
        figures.compare_all_us.push_back(static_cast<double>(ThreadCpuNs() - begin_ns) / 1e3);
      }
    }
    figures.first_recall = RecallAtK(base_, queries_, first_truth, space_.metric(), first);
    figures.recall = RecallAtK(base_, queries_, truth, space_.metric(), all);
    return figures;
  }
  size_t rows() const { return base_.size(); }
  uint64_t waiting() const { return space_.waiting(); }

 private:
  // The rows found, as they came.
  std::vector<int64_t> Recall(size_t query, uint32_t k, Figures* figures) {
    RecallRequest request;
    request.dtype = VectorDtype::kF32;
    request.dimension = static_cast<uint16_t>(base_.dimension());
    request.k = k;
    request.first = kFirst;
    std::vector<int64_t> rows;
    rows.reserve(k);
    const int64_t begin_ns = ThreadCpuNs();
    int64_t slice_ns = begin_ns;
    int64_t first_ns = 0;
    const auto end_slice = [&] {
      const int64_t now_ns = ThreadCpuNs();
      figures->longest_slice_us =
          std::max(figures->longest_slice_us, static_cast<double>(now_ns - slice_ns) / 1e3);
      slice_ns = now_ns;
    };
    const RefusalReason reason = job_.Begin(space_, request, queries_.Bytes(query), options_.ef);
    CHECK(reason == RefusalReason::kNone, "a recall was refused");
    for (bool last = false; !last;) {
      while (!job_.Search(BenchSpace::kSliceDistances)) end_slice();
      last = job_.EmitBatch(slot_);
      if (first_ns == 0) first_ns = ThreadCpuNs();
      end_slice();
      ShardProducer::ForEachHit(
          slot_.data(), [&rows](uint64_t number) { rows.push_back(static_cast<int64_t>(number)); });
    }
    figures->first_us.push_back(static_cast<double>(first_ns - begin_ns) / 1e3);
    figures->last_us.push_back(static_cast<double>(slice_ns - begin_ns) / 1e3);
    return rows;
  }

  void CompareAll(size_t query, uint32_t k) {
    const SearchTarget target = bench_.CompareWith(queries_.Bytes(query)).by_int8;
    constexpr size_t kAtOnce = 16;
    std::array<const std::byte*, kAtOnce> rows;
    std::array<float, kAtOnce> distances;
    keys_.clear();
    for (size_t first = 0; first < base_.size(); first += kAtOnce) {
      const size_t count = std::min(kAtOnce, base_.size() - first);
      for (size_t i = 0; i < count; ++i) {
        rows[i] = target.vectors->Row(static_cast<NodeId>(first + i));
      }
      target.DistancesBetween(target.query, {rows.data(), count}, distances.data());
      for (size_t i = 0; i < count; ++i) {
        keys_.push_back(KeyOf(distances[i], static_cast<NodeId>(first + i)));
      }
    }
    const auto nearest = keys_.begin() + static_cast<ptrdiff_t>(std::min<size_t>(k, keys_.size()));
    std::ranges::nth_element(keys_, nearest - 1);
    std::sort(keys_.begin(), nearest);
  }

  const Options& options_;
  const VectorSet base_;
  const VectorSet queries_;
  BenchSpace bench_;
  Space& space_;
  RecallJob job_;
  std::vector<std::byte> slot_;
  std::vector<NeighbourKey> keys_;
};

double Quantile(std::vector<double> values, double quantile) {
  std::ranges::sort(values);
  const auto place = static_cast<size_t>(quantile * static_cast<double>(values.size()));
  return values[std::min(place, values.size() - 1)];
}

void Print(const std::vector<Figures>& all) {
  constexpr auto kRight = Table::Align::kRight;
  Table table({{"k", kRight},
               {"recall@10, first", kRight},
               {"recall@k", kRight},
               {"us to first", kRight},
               {"P99", kRight},
               {"us to last", kRight},
               {"P99", kRight},
               {"longest slice", kRight},
               {"us to compare all", kRight},
               {"ratio", kRight}});
  for (const Figures& figures : all) {
    table.AddRow(
        {std::to_string(figures.k), Shown(figures.first_recall, "%.4f"),
         Shown(figures.recall, "%.4f"), Shown(Median(figures.first_us), "%.0f"),
         Shown(Quantile(figures.first_us, 0.99), "%.0f"), Shown(Median(figures.last_us), "%.0f"),
         Shown(Quantile(figures.last_us, 0.99), "%.0f"), Shown(figures.longest_slice_us, "%.0f"),
         Shown(Median(figures.compare_all_us), "%.0f"),
         Shown(Median(figures.last_us) / Median(figures.compare_all_us), "%.2f")});
  }
  table.Print();
}

Result<void> Measure(const Options& options) {
  if (auto pinned = PinTo(options.inputs.processor); !pinned) return pinned;
  auto sets = LoadSets(options.inputs, options.count, std::ranges::max(options.ks));
  if (!sets) return std::unexpected(sets.error());
  const uint32_t dimension = sets->base.dimension();
  Bench bench(options, *std::move(sets));
  bench.Fill();
  std::vector<Figures> all;
  for (const uint32_t k : options.ks) all.push_back(bench.Run(k));
  if (!options.inputs.json) {
    std::printf("%s: %zu rows of %u, %llu of them waiting; ef %u\n",
                SetNameOf(options.inputs.data).c_str(), bench.rows(), dimension,
                static_cast<unsigned long long>(bench.waiting()), options.ef);
    Print(all);
    return {};
  }
  Json json = {{"benchmark", "long_recall_bench"},
               {"set", SetNameOf(options.inputs.data)},
               {"n", bench.rows()},
               {"dimension", dimension},
               {"waiting", bench.waiting()},
               {"ef", options.ef}};
  for (const Figures& figures : all) {
    json["recalls"].push_back({{"k", figures.k},
                               {"first_recall_at_10", FourDigits(figures.first_recall)},
                               {"recall_at_k", FourDigits(figures.recall)},
                               {"first_us", FourDigits(Median(figures.first_us))},
                               {"first_p99_us", FourDigits(Quantile(figures.first_us, 0.99))},
                               {"last_us", FourDigits(Median(figures.last_us))},
                               {"last_p99_us", FourDigits(Quantile(figures.last_us, 0.99))},
                               {"longest_slice_us", FourDigits(figures.longest_slice_us)},
                               {"compare_all_us", FourDigits(Median(figures.compare_all_us))}});
  }
  std::printf("%s\n", json.dump().c_str());
  return {};
}

int Main(int argc, char** argv) {
  CLI::App app("Measures recalls of many results.");
  Options options;
  options.inputs.query_count = 50;
  options.inputs.rounds = 3;
  AddInputOptions(&app, &options.inputs);
  app.add_option("--count", options.count, "Only the first rows")->check(CLI::PositiveNumber);
  app.add_option("--waiting", options.waiting, "Rows that are not linked");
  app.add_option("--ef", options.ef)->check(CLI::Range(kFirst, kMaxEf))->capture_default_str();
  app.add_option("--k", options.ks, "Results, several by commas")
      ->delimiter(',')
      ->check(CLI::Range(kFirst, kMaxRecallResults));
  return RunBench(&app, argc, argv, "long_recall_bench", [&options] { return Measure(options); });
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) { return engram::Main(argc, argv); }
