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

#include <array>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "dataplane/ring_mesh.h"
#include "index/shard.h"
#include "src/checkpointer.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/hash.h"
#include "src/core/log_files.h"
#include "src/core/read_pins.h"
#include "src/log_store.h"

namespace engram {
namespace {

constexpr std::string_view kSpace = "overwritten";
constexpr size_t kDimension = 32;
constexpr size_t kPayloadBytes = 1'024;
constexpr size_t kIdBytes = 16;

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

template <typename T>
T Must(Result<T> result) {
  if (!result) {
    std::fprintf(stderr, "%s\n", result.error().message.c_str());
    std::exit(1);
  }
  if constexpr (!std::is_void_v<T>) return *std::move(result);
}

int64_t ThreadCpuNs() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec * kNanosPerSecond + now.tv_nsec;
}

double Mib(uint64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

class Overwriting {
 public:
  explicit Overwriting(const Options& options)
      : options_(options),
        folder_(options.dir + "/retention_bench." + std::to_string(getpid())),
        catalogue_(4, 1, 1, {}) {
    std::filesystem::create_directories(folder_);
    SpaceSettings settings;
    settings.metric = Metric::kCosine;
    settings.dimension = kDimension;
    settings.partitions = 1;
    CHECK(catalogue_.Configure(kSpace, settings) != nullptr, "there is room for a space");
    LogStoreOptions log_options;
    log_options.instance.fill(7);
    log_options.keeper.segment_bytes = static_cast<uint32_t>(options.segment_mib << 20);
    logs_ = Must(LogStore::Open(
        log_options, &clock_,
        [this](const std::string& name, const DiskOptions& disk, std::string* why) {
          return CreateDisk(DiskBackend::kAuto, folder_ + "/" + name, disk, why);
        },
        nullptr));
    root_ = Must(CreateDisk(DiskBackend::kPosix, folder_, DiskOptions{}, nullptr));
    CheckpointerOptions checkpoints{.every_bytes = options.checkpoint_mib << 20, .retention = {}};
    checkpoints.retention.free_after_ns =
        static_cast<int64_t>(options.free_after_ms) * kNanosPerMilli;
    checkpoints.retention.rewrite_below_permille =
        static_cast<uint32_t>(options.rewrite_below_permille);
    checkpointer_ = std::make_unique<Checkpointer>(checkpoints, root_.get(), logs_.get(), &clock_,
                                                   CheckpointManifest{}, &pins_);
    mesh_.emplace(Must(RingMesh::Create(
        {.producer_numa_node = {}, .shard_numa_node = {}, .catalogue = &catalogue_})));
    producer_.emplace(mesh_->TakeProducer(ProducerId(0)));
    shard_ = Must(
        Shard::Create(ShardOptions{}, &clock_, mesh_->TakeShard(ShardId(0)), logs_->ForShard(0)));
    while (shard_->is_recovering()) shard_->Poll();
    Must(logs_->PrepareFirst());
    OpenSession();
  }
  ~Overwriting() {
    shard_.reset();
    checkpointer_.reset();
    logs_.reset();
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
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
      for (int i = 0; i < 64 && sent_ < due && MaySend(); ++i) Send(now_ns);
      shard_->Poll();
      TakeAnswers();
      if (now_ns < next_chore_ns) continue;
      const int64_t before_ns = ThreadCpuNs();
      logs_->Poll();
      checkpointer_->Poll([](const std::string& line) {
        if (line.find("failed") != std::string::npos) std::fprintf(stderr, "%s\n", line.c_str());
      });
      chores_ns_ += ThreadCpuNs() - before_ns;
      next_chore_ns = now_ns + kNanosPerMilli;
      if (now_ns - window_ns >= static_cast<int64_t>(options_.window_s) * kNanosPerSecond) {
        EndWindow(now_ns, now_ns - window_ns);
        window_ns = now_ns;
      }
    }
  }

 private:
  void OpenSession() {
    const SlotId slot = producer_->slab->Acquire(sizeof(HelloRequest));
    auto* hello = new (producer_->slab->At(slot)) HelloRequest;
    hello->origin = 1;
    hello->space = SpaceName(kSpace);
    Push(Lane::kRecall, slot);
    while (session_.value() == 0) {
      shard_->Poll();
      TakeAnswers();
    }
  }
  void Push(Lane lane, SlotId slot) {
    CHECK(producer_->shards[0].lanes[static_cast<size_t>(lane)].TryPush(slot), "there is room");
  }
  bool MaySend() {
    return sent_ < credit_ &&
           !producer_->shards[0].lanes[static_cast<size_t>(Lane::kNormal)].Full();
  }
  // All ids once, then nine in ten among the hot ones.
  uint64_t NextId() {
    if (sent_ < options_.ids) return sent_;
    const uint64_t hot = std::max<uint64_t>(1, options_.ids * options_.hot_permille / 1'000);
    return random_.Below(10) != 0 ? random_.Below(hot) : random_.Below(options_.ids);
  }
  void Send(int64_t now_ns) {
    const size_t vector_bytes = kDimension * sizeof(float);
    const SlotId slot =
        producer_->slab->Acquire(kRequestBodyOffset + vector_bytes + kIdBytes + kPayloadBytes);
    if (slot == kNoSlot) return;
    const uint64_t number = NextId();
    ++sent_;
    auto* request = new (producer_->slab->At(slot)) ObserveRequest;
    request->dtype = VectorDtype::kF32;
    request->dimension = kDimension;
    request->id_bytes = kIdBytes;
    request->payload_bytes = kPayloadBytes;
    request->session_slot = session_slot_;
    request->session = session_;
    request->sequence = sent_;
    request->origin = 1;
    request->received_ns = now_ns;
    std::byte* body = producer_->slab->At(slot) + kRequestBodyOffset;
    std::array<float, kDimension> vector;
    for (float& each : vector) each = static_cast<float>(random_.Below(2'001)) - 1'000;
    std::memcpy(body, vector.data(), vector_bytes);
    std::array<char, 24> id;
    std::snprintf(id.data(), id.size(), "%016llu", static_cast<unsigned long long>(number));
    std::memcpy(body + vector_bytes, id.data(), kIdBytes);
    std::memset(body + vector_bytes + kIdBytes, 'p', kPayloadBytes);
    Push(Lane::kNormal, slot);
  }
  void TakeAnswers() {
    ProducerLink& link = producer_->shards[0];
    while (const auto done = link.completions.TryPop()) {
      credit_ = std::max(credit_, done->credit_sequence);
      if (done->kind == CompletionKind::kHello) {
        const auto* hello = reinterpret_cast<const HelloRequest*>(producer_->slab->At(done->slot));
        CHECK(done->reason == RefusalReason::kNone, "a session is granted");
        session_ = hello->session;
        session_slot_ = hello->session_slot;
        credit_ = hello->credit;
      } else if (done->kind == CompletionKind::kObserve) {
        if (done->reason != RefusalReason::kNone) {
          std::fprintf(stderr, "refused: %s\n",
                       std::string(DescribeRefusal(done->reason).text).c_str());
          std::exit(1);
        }
        ++acked_;
      }
      if (done->slot != kNoSlot) producer_->slab->Release(done->slot);
    }
  }

  // Of the segments of a folder.
  uint64_t BytesOf(uint16_t log) const {
    uint64_t bytes = 0;
    std::error_code error;
    for (const auto& entry :
         std::filesystem::directory_iterator(folder_ + "/" + LogFolder(log), error)) {
      if (entry.path().filename().string().starts_with("segment-")) {
        bytes += entry.file_size(error);
      }
    }
    return bytes;
  }
  void EndWindow(int64_t now_ns, int64_t took_ns) {
    const double seconds = static_cast<double>(took_ns) / kNanosPerSecond;
    const uint64_t written = logs_->bytes_written();
    const uint64_t taken = checkpointer_->retention().counter(RetentionCounter::kTakenOverBytes);
    constexpr size_t kRecordBytes =
        LogRecordBytes(kSpace.size(), kDimension * sizeof(float), kIdBytes, kPayloadBytes);
    const uint64_t live = shard_->FindSpace(kSpace)->live() * kRecordBytes;
    const uint64_t vault = BytesOf(kVaultLog);
    const uint64_t disk = BytesOf(0) + vault;
    const char* format =
        options_.json
            ? "{\"s\": %.0f, \"accepted_per_s\": %.0f, \"log_mib_per_s\": %.1f, "
              "\"taken_over_mib_per_s\": %.2f, \"live_mib\": %.1f, \"disk_mib\": %.1f, "
              "\"vault_mib\": %.1f, \"disk_over_live\": %.2f, \"control_cpu_percent\": %.2f}\n"
            : "%8.0f %12.0f %12.1f %12.2f %10.1f %10.1f %10.1f %10.2f %10.2f\n";
    std::printf(format, static_cast<double>(now_ns - start_ns_) / kNanosPerSecond,
                static_cast<double>(acked_ - acked_before_) / seconds,
                Mib(written - written_before_) / seconds, Mib(taken - taken_before_) / seconds,
                Mib(live), Mib(disk), Mib(vault),
                static_cast<double>(disk) / static_cast<double>(live),
                100.0 * static_cast<double>(chores_ns_) / static_cast<double>(took_ns));
    std::fflush(stdout);
    acked_before_ = acked_;
    written_before_ = written;
    taken_before_ = taken;
    chores_ns_ = 0;
  }

  const Options& options_;
  const std::string folder_;
  SystemClock clock_;
  SpaceCatalogue catalogue_;
  ReadPins pins_{1};
  std::unique_ptr<LogStore> logs_;
  std::unique_ptr<Disk> root_;
  std::unique_ptr<Checkpointer> checkpointer_;
  std::optional<RingMesh> mesh_;
  std::optional<ProducerPort> producer_;
  std::unique_ptr<Shard> shard_;
  SplitMix64 random_{7};
  SessionId session_;
  uint32_t session_slot_ = 0;
  Sequence credit_ = 0;
  uint64_t sent_ = 0;
  uint64_t acked_ = 0;
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
