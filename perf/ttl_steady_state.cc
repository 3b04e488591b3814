// The steady state: a shard with its log on a real disk takes observations as fast as its credit
// lets it, into a space whose observations expire as fast, while recalls go on and checkpoints are
// made. A line for each window: what was accepted and what expired a second, recall@10 against the
// exact ten of what lived, memory, disk, and what waits for the graph or to be swept out of it.
//
//   ttl_steady_state --data BASE.fvecs --queries QUERIES.fvecs [--seconds N] [--ttl-s N]
//                    [--window-s N] [--rows N] [--rate N] [--recalls-per-s N] [--ef N]
//                    [--checkpoint-mib N] [--dir D] [--json]
//
// --rate: so many observations a second, by the clock; without it as many as credit lets through.
// All in one thread, which so is shard, client and control plane. Data lies in a folder that is
// made in --dir (default: the current directory) and removed at the end. Rows come round again once
// all were sent, under new ids.

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "index/shard.h"
#include "perf/bench_support.h"
#include "perf/shard_on_disk.h"
#include "perf/shard_producer.h"
#include "perf/vector_set.h"
#include "src/core/clock.h"

namespace engram {
namespace {

constexpr std::string_view kSpace = "steady";
constexpr uint32_t kK = 10;
constexpr size_t kPayloadBytes = 200;
constexpr int kBurst = 64;

struct Options {
  bool json = false;
  std::string data;
  std::string queries;
  std::string dir = ".";
  double seconds = 10;
  double window_s = 0;  // 0: a sixth of it
  uint64_t ttl_s = 0;   // 0: a quarter of it, at least 1
  uint64_t rows = 1'000'000;
  double rate = 0;  // 0: as credit lets it
  double recalls_per_s = 10;
  uint32_t ef = 128;
  uint64_t checkpoint_mib = 256;
};

// VmRSS + HugetlbPages.
double ResidentMib() {
  std::ifstream status("/proc/self/status");
  double kib = 0;
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmRSS:") || line.starts_with("HugetlbPages:")) {
      kib += std::strtod(line.c_str() + line.find(':') + 1, nullptr);
    }
  }
  return kib / 1024;
}

// Files come and go meanwhile.
double FolderMib(const std::string& folder) {
  double bytes = 0;
  std::error_code error;
  for (auto at = std::filesystem::recursive_directory_iterator(folder, error);
       !error && at != std::filesystem::recursive_directory_iterator(); at.increment(error)) {
    std::error_code gone;
    const bool is_file = at->is_regular_file(gone);
    if (is_file && !gone) {
      const auto size = at->file_size(gone);
      if (!gone) bytes += static_cast<double>(size);
    }
  }
  return bytes / (1 << 20);
}

// A recall, and what lived when it was answered: the numbers from `first` to before `end`.
struct Asked {
  size_t window = 0;
  size_t query = 0;
  uint64_t first = 0;
  uint64_t end = 0;
  std::vector<uint64_t> hits;
};

struct Window {
  double seconds = 0;
  double accepted_per_s = 0;
  double expired_per_s = 0;
  double swept_per_s = 0;
  double recall_at_10 = 0;
  double recall_us = 0;  // on average
  uint64_t live = 0;
  uint64_t backlog = 0;
  uint64_t retired = 0;
  double space_mib = 0;
  double resident_mib = 0;  // beyond the vector files
  double disk_mib = 0;
  uint64_t checkpoints = 0;
};

ShardOnDiskOptions Setup(const Options& options, size_t dimension) {
  ShardOnDiskOptions setup;
  setup.folder = options.dir + "/ttl_steady_state." + std::to_string(getpid());
  setup.space = kSpace;
  setup.settings.metric = Metric::kCosine;
  setup.settings.dimension = static_cast<uint16_t>(dimension);
  setup.settings.partitions = 1;
  setup.settings.durability = Durability::kFsync;
  setup.settings.ttl_ns = static_cast<int64_t>(options.ttl_s) * kNanosPerSecond;
  setup.segment_bytes = 32u << 20;
  setup.checkpoints.every_bytes = options.checkpoint_mib << 20;
  setup.shard.default_ef = options.ef;
  return setup;
}

class SteadyState {
 public:
  SteadyState(const Options& options, const VectorSet& base, const VectorSet& queries)
      : options_(options),
        base_(base),
        queries_(queries),
        place_(Setup(options, base.dimension())),
        before_mib_(ResidentMib()) {
    producer_.Open(kSpace, &shard_);
  }

  std::vector<Window> Run() {
    const int64_t start_ns = clock_.MonotonicNs();
    const auto window_ns = static_cast<int64_t>(options_.window_s * kNanosPerSecond);
    const auto recall_ns = static_cast<int64_t>(kNanosPerSecond / options_.recalls_per_s);
    const auto end_ns = start_ns + static_cast<int64_t>(options_.seconds * kNanosPerSecond);
    int64_t next_recall_ns = start_ns + recall_ns;
    int64_t next_chore_ns = start_ns;
    BeginWindow(start_ns);
    while (true) {
      const int64_t now_ns = clock_.MonotonicNs();
      const uint64_t due = DueBy(now_ns - start_ns);
      for (int i = 0; i < kBurst && producer_.sent() < due && producer_.MaySend(); ++i)
        Send(now_ns);
      if (!recalling_ && now_ns >= next_recall_ns) {
        SendRecall(now_ns);
        next_recall_ns = std::max(next_recall_ns + recall_ns, now_ns);
      }
      shard_.Poll();
      producer_.TakeAnswers([this](uint64_t, const std::byte* slot) { TakeHits(slot); },
                            [this](uint64_t, RefusalReason reason) { FinishRecall(reason); });
      if (now_ns >= next_chore_ns) {
        (void)shard_.PrefaultAhead(size_t{64} << 20, size_t{2} << 20);
        place_.PollControl();
        next_chore_ns = now_ns + kNanosPerMilli;
      }
      if (now_ns - window_began_ns_ >= window_ns) {
        EndWindow(now_ns);
        BeginWindow(now_ns);
        if (now_ns + window_ns / 2 > end_ns) break;
      }
    }
    Must(shard_.CheckInvariants());
    Judge();
    return windows_;
  }

 private:
  struct Counts {
    uint64_t accepted = 0;
    uint64_t expired = 0;
    uint64_t swept = 0;
    uint64_t checkpoints = 0;
  };

  const Space& space() const { return *shard_.FindSpace(kSpace); }
  Counts CountsNow() const {
    return {.accepted = producer_.acked(),
            .expired = shard_.counter(ShardCounter::kObservationsExpired).Read(),
            .swept = shard_.counter(ShardCounter::kObservationsSwept).Read(),
            .checkpoints = place_.checkpointer().completed()};
  }

  void Send(int64_t now_ns) {
    const uint64_t number = producer_.sent();
    (void)producer_.Observe(number, base_[number % base_.size()], kPayloadBytes, now_ns);
  }
  void SendRecall(int64_t now_ns) {
    const size_t query = next_query_ % queries_.size();
    if (!producer_.Recall(queries_[query], kK, now_ns)) return;
    ++next_query_;
    asked_.push_back({.window = windows_.size(), .query = query, .hits = {}});
    recall_began_ns_ = now_ns;
    recalling_ = true;
  }

  void TakeHits(const std::byte* slot) {
    ShardProducer::ForEachHit(slot,
                              [this](uint64_t number) { asked_.back().hits.push_back(number); });
  }
  // Nothing is updated, and numbers expire in their order: so the last ones live.
  void FinishRecall(RefusalReason reason) {
    recalling_ = false;
    if (reason != RefusalReason::kNone) {
      asked_.pop_back();  // Nothing was stored yet.
      return;
    }
    Asked& asked = asked_.back();
    asked.end = shard_.counter(ShardCounter::kObservationsStored).Read();
    asked.first = asked.end - std::min(asked.end, space().live());
    recall_ns_ += clock_.MonotonicNs() - recall_began_ns_;
    ++recalls_;
  }

  uint64_t DueBy(int64_t elapsed_ns) const {
    if (options_.rate == 0) return UINT64_MAX;
    return static_cast<uint64_t>(options_.rate * static_cast<double>(elapsed_ns) / kNanosPerSecond);
  }

  void BeginWindow(int64_t now_ns) {
    window_began_ns_ = now_ns;
    began_ = CountsNow();
    recall_ns_ = 0;
    recalls_ = 0;
  }
  void EndWindow(int64_t now_ns) {
    const Counts counts = CountsNow();
    Window window;
    window.seconds = static_cast<double>(now_ns - window_began_ns_) / kNanosPerSecond;
    const auto rate = [&](uint64_t now, uint64_t before) {
      return static_cast<double>(now - before) / window.seconds;
    };
    window.accepted_per_s = rate(counts.accepted, began_.accepted);
    window.expired_per_s = rate(counts.expired, began_.expired);
    window.swept_per_s = rate(counts.swept, began_.swept);
    window.checkpoints = counts.checkpoints - began_.checkpoints;
    window.recall_us = recalls_ == 0 ? 0 : static_cast<double>(recall_ns_) / recalls_ / 1'000;
    window.live = space().live();
    window.backlog = space().backlog();
    window.retired = space().retired();
    window.space_mib = static_cast<double>(space().resident_bytes()) / (1 << 20);
    window.resident_mib = ResidentMib() - before_mib_;
    window.disk_mib = FolderMib(place_.folder());
    windows_.push_back(window);
  }

  // recall@10, once nothing runs any more. A hit is one that is as near as the tenth of what lived.
  void Judge() {
    constexpr size_t kJudgedPerWindow = 40;
    std::vector<double> sums(windows_.size() + 1);
    std::vector<size_t> counts(windows_.size() + 1);
    std::vector<size_t> all(windows_.size() + 1);
    for (const Asked& asked : asked_) ++all[asked.window];
    std::vector<size_t> seen(windows_.size() + 1);
    std::vector<float> scores;
    for (const Asked& asked : asked_) {
      const size_t step = std::max<size_t>(all[asked.window] / kJudgedPerWindow, 1);
      if (asked.end - asked.first < kK || seen[asked.window]++ % step != 0) continue;
      scores.clear();
      for (uint64_t number = asked.first; number < asked.end; ++number) {
        scores.push_back(Score(asked.query, number));
      }
      std::ranges::nth_element(scores, scores.begin() + (kK - 1), std::greater<>());
      const float bound = scores[kK - 1] - 1e-6F;
      const auto found = std::ranges::count_if(asked.hits, [&](uint64_t number) {
        return number >= asked.first && Score(asked.query, number) >= bound;
      });
      sums[asked.window] += static_cast<double>(found) / kK;
      ++counts[asked.window];
    }
    for (size_t w = 0; w < windows_.size(); ++w) {
      windows_[w].recall_at_10 = counts[w] == 0 ? 0 : sums[w] / static_cast<double>(counts[w]);
    }
  }
  float Score(size_t query, uint64_t number) const {
    const std::span<const float> a = queries_[query];
    const std::span<const float> b = base_[number % base_.size()];
    float sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
  }

  const Options& options_;
  const VectorSet& base_;
  const VectorSet& queries_;
  ShardOnDisk place_;
  ShardProducer& producer_ = place_.producer();
  Shard& shard_ = place_.shard();
  Clock& clock_ = place_.clock();
  const double before_mib_;
  bool recalling_ = false;
  int64_t recall_began_ns_ = 0;
  int64_t recall_ns_ = 0;
  int64_t recalls_ = 0;
  size_t next_query_ = 0;
  std::vector<Asked> asked_;
  std::vector<Window> windows_;
  int64_t window_began_ns_ = 0;
  Counts began_;
};

void Print(const Options& options, const std::vector<Window>& windows) {
  if (!options.json) {
    std::printf("%9s %9s %9s %9s %9s %8s %8s %8s %8s %9s %9s %5s\n", "accepted", "expired", "swept",
                "recall@10", "recall us", "live", "backlog", "retired", "space", "resident", "disk",
                "ckpts");
    std::printf("%9s %9s %9s %9s %9s %8s %8s %8s %8s %9s %9s\n", "1/s", "1/s", "1/s", "", "", "",
                "", "", "MiB", "MiB", "MiB");
  }
  for (const Window& w : windows) {
    const char* format =
        options.json
            ? "{\"accepted_per_s\": %.0f, \"expired_per_s\": %.0f, \"swept_per_s\": %.0f, "
              "\"recall_at_10\": %.4f, \"recall_us\": %.0f, \"live\": %llu, \"backlog\": %llu, "
              "\"retired\": %llu, \"space_mib\": %.1f, \"resident_mib\": %.1f, \"disk_mib\": %.1f, "
              "\"checkpoints\": %llu}\n"
            : "%9.0f %9.0f %9.0f %9.4f %9.0f %8llu %8llu %8llu %8.1f %9.1f %9.1f %5llu\n";
    std::printf(format, w.accepted_per_s, w.expired_per_s, w.swept_per_s, w.recall_at_10,
                w.recall_us, static_cast<unsigned long long>(w.live),
                static_cast<unsigned long long>(w.backlog),
                static_cast<unsigned long long>(w.retired), w.space_mib, w.resident_mib, w.disk_mib,
                static_cast<unsigned long long>(w.checkpoints));
  }
}

int Run(Options options) {
  if (options.window_s == 0) options.window_s = std::max(options.seconds / 6, 0.5);
  if (options.ttl_s == 0) options.ttl_s = std::max<uint64_t>(options.seconds / 4, 1);
  const VectorSet base = Must(VectorSet::Load(options.data, options.rows, true));
  const VectorSet queries = Must(VectorSet::Load(options.queries, 10'000, true));
  if (base.dimension() != queries.dimension()) {
    std::fprintf(stderr, "the queries have another dimension than the data\n");
    return 1;
  }
  SteadyState state(options, base, queries);
  Print(options, state.Run());
  return 0;
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) {
  engram::Options options;
  bool sound = true;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const char* text = i + 1 < argc ? argv[i + 1] : nullptr;
    const double value = text == nullptr ? 0 : std::strtod(text, nullptr);
    if (argument == "--json") {
      options.json = true;
      continue;
    }
    ++i;
    if (text == nullptr) {
      sound = false;
    } else if (argument == "--data") {
      options.data = text;
    } else if (argument == "--queries") {
      options.queries = text;
    } else if (argument == "--dir") {
      options.dir = text;
    } else if (argument == "--seconds" && value > 0) {
      options.seconds = value;
    } else if (argument == "--window-s" && value > 0) {
      options.window_s = value;
    } else if (argument == "--ttl-s" && value >= 1) {
      options.ttl_s = static_cast<uint64_t>(value);
    } else if (argument == "--rows" && value >= 1) {
      options.rows = static_cast<uint64_t>(value);
    } else if (argument == "--rate" && value > 0) {
      options.rate = value;
    } else if (argument == "--recalls-per-s" && value > 0) {
      options.recalls_per_s = value;
    } else if (argument == "--ef" && value >= 1) {
      options.ef = static_cast<uint32_t>(value);
    } else if (argument == "--checkpoint-mib" && value >= 0) {
      options.checkpoint_mib = static_cast<uint64_t>(value);
    } else {
      sound = false;
    }
  }
  if (!sound || options.data.empty() || options.queries.empty()) {
    std::fprintf(stderr,
                 "usage: %s --data BASE.fvecs --queries QUERIES.fvecs [--seconds N] [--ttl-s N] "
                 "[--window-s N] [--rows N] [--rate N] [--recalls-per-s N] [--ef N] "
                 "[--checkpoint-mib N] [--dir D] [--json]\n",
                 argv[0]);
    return 2;
  }
  return engram::Run(options);
}
