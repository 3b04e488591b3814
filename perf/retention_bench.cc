// Disk over time while a fixed set of observations is overwritten again and again: a shard with its
// log on a real disk, checkpoints, freeing and taking over as in the daemon. A line for each
// window: what was written and taken over, what lives, what lies on the disk, and what the control
// plane's part of it costs.
//
//   retention_bench [--json] [--seconds N] [--window-s N] [--ids N] [--rate N] [--hot-permille N]
//                   [--segment-mib N] [--checkpoint-mib N] [--free-after-ms N]
//                   [--rewrite-below-permille N] [--dir D]
//
// Of the writes nine in ten go to --hot-permille of the ids (1000: all alike), so the others live
// long among dead ones. All in one thread. Data lies in a folder that is made in --dir (default:
// the current directory) and removed at the end.

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "perf/bench_support.h"
#include "perf/shard_on_disk.h"
#include "perf/shard_producer.h"
#include "src/checkpointer.h"
#include "src/core/clock.h"
#include "src/core/hash.h"
#include "src/core/log_files.h"

namespace engram {
namespace {

constexpr std::string_view kSpace = "overwritten";
constexpr size_t kDimension = 32;
constexpr size_t kPayloadBytes = 1'024;

struct Options {
  bool json = false;
  uint64_t seconds = 60;
  uint64_t window_s = 10;
  uint64_t ids = 20'000;
  uint64_t rate = 10'000;
  uint64_t hot_permille = 100;
  uint64_t segment_mib = 8;
  uint64_t checkpoint_mib = 32;
  uint64_t free_after_ms = 5'000;
  uint64_t rewrite_below_permille = 500;
  std::string dir = ".";
};

double Mib(uint64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

ShardOnDiskOptions Setup(const Options& options) {
  ShardOnDiskOptions setup;
  setup.folder = options.dir + "/retention_bench." + std::to_string(getpid());
  setup.space = kSpace;
  setup.settings.metric = Metric::kCosine;
  setup.settings.dimension = kDimension;
  setup.settings.partitions = 1;
  setup.segment_bytes = static_cast<uint32_t>(options.segment_mib << 20);
  setup.checkpoints.every_bytes = options.checkpoint_mib << 20;
  RetentionOptions& retention = setup.checkpoints.retention;
  retention.free_after_ns = static_cast<int64_t>(options.free_after_ms) * kNanosPerMilli;
  retention.rewrite_below_permille = static_cast<uint32_t>(options.rewrite_below_permille);
  return setup;
}

class Overwriting {
 public:
  explicit Overwriting(const Options& options) : options_(options), place_(Setup(options)) {
    producer_.Open(kSpace, &place_.shard());
  }

  void Run() {
    if (!options_.json) {
      std::printf("%8s %12s %12s %12s %10s %10s %10s %10s %10s\n", "s", "accepted/s", "log MiB/s",
                  "taken MiB/s", "live MiB", "disk MiB", "vault MiB", "disk/live", "CPU %");
    }
    start_ns_ = clock_.MonotonicNs();
    const int64_t end_ns = start_ns_ + static_cast<int64_t>(options_.seconds) * kNanosPerSecond;
    int64_t next_chore_ns = start_ns_;
    int64_t window_ns = start_ns_;
    for (int64_t now_ns = start_ns_; now_ns < end_ns; now_ns = clock_.MonotonicNs()) {
      const uint64_t due =
          static_cast<uint64_t>((now_ns - start_ns_) / 1'000) * options_.rate / 1'000'000;
      for (int i = 0; i < 64 && producer_.sent() < due && producer_.MaySend(); ++i) Send(now_ns);
      place_.shard().Poll();
      producer_.TakeAnswers();
      if (now_ns < next_chore_ns) continue;
      const int64_t before_ns = ThreadCpuNs();
      place_.PollControl();
      chores_ns_ += ThreadCpuNs() - before_ns;
      next_chore_ns = now_ns + kNanosPerMilli;
      if (now_ns - window_ns >= static_cast<int64_t>(options_.window_s) * kNanosPerSecond) {
        EndWindow(now_ns, now_ns - window_ns);
        window_ns = now_ns;
      }
    }
  }

 private:
  // All ids once, then nine in ten among the hot ones.
  uint64_t NextId() {
    if (producer_.sent() < options_.ids) return producer_.sent();
    const uint64_t hot = std::max<uint64_t>(1, options_.ids * options_.hot_permille / 1'000);
    return random_.Below(10) != 0 ? random_.Below(hot) : random_.Below(options_.ids);
  }
  void Send(int64_t now_ns) {
    const uint64_t number = NextId();
    std::array<float, kDimension> vector;
    for (float& each : vector) each = static_cast<float>(random_.Below(2'001)) - 1'000;
    (void)producer_.Observe(number, vector, kPayloadBytes, now_ns);
  }

  // Of the segments of a folder.
  uint64_t BytesOf(uint16_t log) const {
    uint64_t bytes = 0;
    std::error_code error;
    for (const auto& entry :
         std::filesystem::directory_iterator(place_.folder() + "/" + LogFolder(log), error)) {
      if (entry.path().filename().string().starts_with("segment-")) {
        bytes += entry.file_size(error);
      }
    }
    return bytes;
  }
  void EndWindow(int64_t now_ns, int64_t took_ns) {
    const double seconds = static_cast<double>(took_ns) / kNanosPerSecond;
    const uint64_t written = place_.logs().bytes_written();
    const uint64_t taken =
        place_.checkpointer().retention().counter(RetentionCounter::kTakenOverBytes);
    constexpr size_t kRecordBytes = LogRecordBytes(kSpace.size(), kDimension * sizeof(float),
                                                   ShardProducer::kIdBytes, kPayloadBytes);
    const uint64_t live = place_.shard().FindSpace(kSpace)->live() * kRecordBytes;
    const uint64_t vault = BytesOf(kVaultLog);
    const uint64_t disk = BytesOf(0) + vault;
    const char* format =
        options_.json
            ? "{\"s\": %.0f, \"accepted_per_s\": %.0f, \"log_mib_per_s\": %.1f, "
              "\"taken_over_mib_per_s\": %.2f, \"live_mib\": %.1f, \"disk_mib\": %.1f, "
              "\"vault_mib\": %.1f, \"disk_over_live\": %.2f, \"control_cpu_percent\": %.2f}\n"
            : "%8.0f %12.0f %12.1f %12.2f %10.1f %10.1f %10.1f %10.2f %10.2f\n";
    std::printf(format, static_cast<double>(now_ns - start_ns_) / kNanosPerSecond,
                static_cast<double>(producer_.acked() - acked_before_) / seconds,
                Mib(written - written_before_) / seconds, Mib(taken - taken_before_) / seconds,
                Mib(live), Mib(disk), Mib(vault),
                static_cast<double>(disk) / static_cast<double>(live),
                100.0 * static_cast<double>(chores_ns_) / static_cast<double>(took_ns));
    std::fflush(stdout);
    acked_before_ = producer_.acked();
    written_before_ = written;
    taken_before_ = taken;
    chores_ns_ = 0;
  }

  const Options& options_;
  ShardOnDisk place_;
  ShardProducer& producer_ = place_.producer();
  Clock& clock_ = place_.clock();
  SplitMix64 random_{7};
  int64_t start_ns_ = 0;
  uint64_t acked_before_ = 0;
  uint64_t written_before_ = 0;
  uint64_t taken_before_ = 0;
  int64_t chores_ns_ = 0;
};

int Main(int argc, char** argv) {
  Options options;
  const std::array<std::pair<std::string_view, uint64_t*>, 9> numbers{{
      {"--seconds", &options.seconds},
      {"--window-s", &options.window_s},
      {"--ids", &options.ids},
      {"--rate", &options.rate},
      {"--hot-permille", &options.hot_permille},
      {"--segment-mib", &options.segment_mib},
      {"--checkpoint-mib", &options.checkpoint_mib},
      {"--free-after-ms", &options.free_after_ms},
      {"--rewrite-below-permille", &options.rewrite_below_permille},
  }};
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    const auto at = std::ranges::find(numbers, name, [](const auto& each) { return each.first; });
    if (name == "--json") {
      options.json = true;
    } else if (i + 1 < argc && name == "--dir") {
      options.dir = argv[++i];
    } else if (i + 1 < argc && at != numbers.end()) {
      const std::string_view text = argv[++i];
      std::from_chars(text.data(), text.data() + text.size(), *at->second);
    } else {
      std::fprintf(stderr, "retention_bench: what is %s?\n", argv[i]);
      return 2;
    }
  }
  Overwriting(options).Run();
  return 0;
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) { return engram::Main(argc, argv); }
