// What it costs to be durable: one log, and one shard with its log, beside a plain writer that
// writes the same bytes and knows nothing of records.
//
//   durable_ingest_bench [--json] [--rounds N] [--observations N] [--dir D] [--posix]
//                        [--block-kib N] [--max-writes N] [--no-latency]
//
// 768-d observations with 200 bytes of payload, as f32, bf16 and int8. Contenders, which take
// turns; medians:
//
// log     LogWriter: records are appended as long as there is room, and it is polled.
// shard   Slots are filled, a shard with durability fsync is polled and its answers are taken, all
//         in this thread. Each space holds fewer observations than a graph begins with.
// core    The same, but slots are filled and answers taken by another thread, as an ingress core
//         does it in the daemon: what is measured is the shard's core.
// floor   To each of them, right after it: writes of the same sizes from ready memory into a
// file
//         that was written before (O_DIRECT, registered buffers), and a flush wherever the
//         contender had one. A commit ends before the next one begins.
// deep    The same writes, the next ones going on while a flush is under way.
//
// Then, with observations sent by the clock at 10, 50 and 90 % of what the shard took at most: from
// the moment an observation was due to its acknowledgement. At 50 % also with durability memory,
// and with nothing to do at all (none): how late this thread itself is, by others on the machine.
//
// The segments are made and recycled between the rounds. Data lies in a folder that is made in
// --dir (default: the current directory) and removed at the end.

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "dataplane/ring_mesh.h"
#include "index/log/log_writer.h"
#include "index/shard.h"
#include "perf/bench_support.h"
#include "perf/log_and_floor.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/hash.h"
#include "src/core/latency_histogram.h"
#include "src/core/topology.h"

namespace engram {
namespace {

constexpr uint16_t kDimension = 768;
constexpr size_t kPayloadBytes = 200;
constexpr size_t kIdBytes = 16;
// Observations that wait for their acknowledgement, in bytes of records.
constexpr size_t kWindowBytes = size_t{3} << 20;
// Of a space, below what begins a graph.
constexpr uint64_t kSpaceObservations = 4'000;
constexpr double kTarget = 0.8;
constexpr double kMostSeconds = 1;

struct Options {
  bool json = false;
  bool posix = false;
  bool latency = true;
  int rounds = 5;
  uint64_t observations = 80'000;
  uint32_t block_bytes = LogWriterOptions{}.block_bytes;
  uint32_t max_writes = LogWriterOptions{}.max_writes;
  std::string dir = ".";
};

// What is sent: vectors as they lie in a receive buffer, more of them than a cache holds.
class Feed {
 public:
  explicit Feed(VectorDtype dtype) : dtype_(dtype), vector_bytes_(VectorBytes(dtype, kDimension)) {
    SplitMix64 random(5);
    bodies_.resize(kBodies * body_bytes());
    for (size_t i = 0; i < kBodies; ++i) {
      std::byte* to = bodies_.data() + i * body_bytes();
      for (size_t d = 0; d < kDimension; ++d) WriteElement(&random, to + d * ElementBytes(dtype));
      std::memset(to + vector_bytes_, 'p', kIdBytes + kPayloadBytes);
    }
  }
  VectorDtype dtype() const { return dtype_; }
  size_t vector_bytes() const { return vector_bytes_; }
  // Vector, id, payload.
  size_t body_bytes() const { return vector_bytes_ + kIdBytes + kPayloadBytes; }
  // With an id of its own.
  std::span<const std::byte> Body(uint64_t number) {
    std::byte* body = bodies_.data() + number % kBodies * body_bytes();
    std::array<char, kIdBytes + 1> id;
    for (size_t i = 0; i < kIdBytes; ++i) id[i] = "0123456789abcdef"[number >> 4 * i & 15];
    std::memcpy(body + vector_bytes_, id.data(), kIdBytes);
    return {body, body_bytes()};
  }
  float scale() const { return dtype_ == VectorDtype::kInt8 ? 1.0F / 127 : 1; }

 private:
  static constexpr size_t kBodies = 4'096;

  void WriteElement(SplitMix64* random, std::byte* to) const {
    const float value = static_cast<float>(random->Below(20'001)) / 10'000 - 1;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const auto upper = static_cast<uint16_t>(bits >> 16);
    const auto small = static_cast<int8_t>(value * 127);
    if (dtype_ == VectorDtype::kF32) std::memcpy(to, &bits, 4);
    if (dtype_ == VectorDtype::kBf16) std::memcpy(to, &upper, 2);
    if (dtype_ == VectorDtype::kInt8) std::memcpy(to, &small, 1);
  }

  const VectorDtype dtype_;
  const size_t vector_bytes_;
  std::vector<std::byte> bodies_;
};

constexpr std::string_view kSpace = "fsync-000000";

size_t RecordBytes(const Feed& feed) {
  return LogRecordBytes(kSpace.size(), feed.vector_bytes(), kIdBytes, kPayloadBytes);
}

// The log alone.
class LogContender {
 public:
  LogContender(const Place& place, uint64_t round_bytes)
      : clock_(place.clock), log_(place, "log", round_bytes) {
    Must(log_.writer().Start(0, 1));
    log_.Prepare();
    log_.writer().Poll(clock_->MonotonicNs());
  }
  BenchLog& log() { return log_; }

  double Run(Feed* feed, uint64_t observations) {
    LogWriter& writer = log_.writer();
    const size_t bytes = RecordBytes(*feed);
    const int64_t start_ns = clock_->MonotonicNs();
    int64_t now_ns = start_ns;
    for (uint64_t sent = 0; sent < observations || writer.durable() < writer.end();) {
      for (int i = 0; i < kBurst && sent < observations; ++i) {
        if (writer.JudgeRoom(bytes, false) != RefusalReason::kNone) break;
        Append(feed, ++sent, now_ns);
      }
      now_ns = clock_->MonotonicNs();
      writer.Poll(now_ns);
    }
    CHECK(writer.errors() == 0, "the disk works");
    return SecondsSince(start_ns, clock_);
  }

 private:
  static constexpr int kBurst = 64;

  void Append(Feed* feed, uint64_t number, int64_t now_ns) {
    const std::span<const std::byte> body = feed->Body(number);
    LogRecord record;
    record.dtype = feed->dtype();
    record.dimension = kDimension;
    record.stamp = ++stamp_;
    record.session = SessionId(1);
    record.sequence = stamp_;
    record.when_ns = now_ns;
    record.space = kSpace;
    record.vector = body.first(feed->vector_bytes());
    record.id = {reinterpret_cast<const char*>(body.data()) + feed->vector_bytes(), kIdBytes};
    record.payload = body.last(kPayloadBytes);
    log_.writer().Append(record, true);
  }

  Clock* const clock_;
  BenchLog log_;
  CommitStamp stamp_ = 0;
};

// A shard with its log, and this thread as its one ingress core.
class ShardContender {
 public:
  ShardContender(const Place& place, Feed* feed, const std::string& name, uint64_t round_bytes,
                 size_t memory_bytes)
      : clock_(place.clock),
        feed_(feed),
        log_(place, name, round_bytes),
        catalogue_(kMaxSpaces, 1, 1, {.metric = Metric::kL2, .precision = PrecisionOf(feed)}),
        mesh_(Must(RingMesh::Create({.huge_pages = HugePagePolicy::kTransparent,
                                     .producer_numa_node = {},
                                     .shard_numa_node = {},
                                     .catalogue = &catalogue_}))),
        producer_(mesh_.TakeProducer(ProducerId(0))) {
    ShardOptions options;
    options.memory_limit_bytes = memory_bytes;
    options.huge_pages = HugePagePolicy::kTransparent;
    options.unlinked_limit_bytes = size_t{1} << 30;
    shard_ = Must(Shard::Create(options, clock_, mesh_.TakeShard(ShardId(0)), log_.Storage()));
    while (shard_->is_recovering()) shard_->Poll();
    log_.Prepare();
    shard_->Poll();
  }
  BenchLog& log() { return log_; }

  // As fast as it goes. Seconds.
  double Run(uint64_t observations) {
    Begin(observations, Durability::kFsync);
    const int64_t start_ns = clock_->MonotonicNs();
    while (acked_ < observations) {
      for (int i = 0; i < kBurst && MaySend(); ++i) Send(start_ns);
      shard_->Poll();
      TakeAnswers();
    }
    return SecondsSince(start_ns, clock_);
  }

  // Likewise, with a thread of its own for the ingress core.
  double RunOnTwoCores(uint64_t observations) {
    Begin(observations, Durability::kFsync);
    const int64_t start_ns = clock_->MonotonicNs();
    std::atomic<bool> done = false;
    std::jthread ingress([&] {
      if (auto topology = DiscoverTopology()) (void)PinThisThread(topology->cpus.back().os_index);
      while (acked_ < observations) {
        for (int i = 0; i < kBurst && MaySend(); ++i) Send(start_ns);
        TakeAnswers();
      }
      done.store(true, std::memory_order_release);
    });
    while (!done.load(std::memory_order_acquire)) shard_->Poll();
    return SecondsSince(start_ns, clock_);
  }

  // By the clock. From due to acknowledged.
  std::unique_ptr<LatencyHistogram> RunAt(double per_second, uint64_t observations,
                                          Durability durability) {
    Begin(observations, durability);
    auto histogram = std::make_unique<LatencyHistogram>();
    histogram_ = histogram.get();
    const double interval_ns = kNanosPerSecond / per_second;
    const int64_t start_ns = clock_->MonotonicNs();
    while (acked_ < observations) {
      const int64_t now_ns = clock_->MonotonicNs();
      for (int i = 0; i < kBurst && MaySend(); ++i) {
        const int64_t due_ns =
            start_ns + static_cast<int64_t>(interval_ns * static_cast<double>(sent_));
        if (due_ns > now_ns) break;
        Send(due_ns);
      }
      shard_->Poll();
      TakeAnswers();
    }
    histogram_ = nullptr;
    return histogram;
  }

  // By the clock, with nothing to do. From due to noticed.
  std::unique_ptr<LatencyHistogram> RunNothing(double per_second, uint64_t observations) {
    auto histogram = std::make_unique<LatencyHistogram>();
    const double interval_ns = kNanosPerSecond / per_second;
    const int64_t start_ns = clock_->MonotonicNs();
    for (uint64_t i = 0; i < observations;) {
      const int64_t now_ns = clock_->MonotonicNs();
      for (; i < observations; ++i) {
        const int64_t due_ns =
            start_ns + static_cast<int64_t>(interval_ns * static_cast<double>(i));
        if (due_ns > now_ns) break;
        histogram->Record(now_ns - due_ns);
      }
    }
    return histogram;
  }

 private:
  static constexpr int kBurst = 64;
  static constexpr uint32_t kMaxSpaces = 4'096;
  static constexpr size_t kPrefaultStep = size_t{64} << 20;

  struct OpenSpace {
    uint32_t slot = 0;
    SessionId session;
    Sequence sequence = 0;
  };

  static Precision PrecisionOf(const Feed* feed) {
    if (feed->dtype() == VectorDtype::kInt8) return Precision::kInt8;
    return feed->dtype() == VectorDtype::kBf16 ? Precision::kBf16 : Precision::kF32;
  }

  // Spaces and sessions for so many; all of before is durable and its memory there.
  void Begin(uint64_t observations, Durability durability) {
    spaces_.clear();
    for (uint64_t i = 0; i * kSpaceObservations < observations; ++i) Open(durability);
    const size_t needs = static_cast<size_t>(observations) * (2 * feed_->body_bytes() + 2'048);
    while (shard_->PrefaultAhead(needs, kPrefaultStep) > 0) {
    }
    while (!shard_->Idle()) shard_->Poll();
    log_.Recycle();
    shard_->Poll();
    observations_ = observations;
    sent_ = acked_ = 0;
  }

  void Open(Durability durability) {
    std::array<char, 16> name;
    std::snprintf(name.data(), name.size(), "fsync-%06u", opened_++);
    const SpaceEntry* entry = catalogue_.Configure(name.data(), {.metric = Metric::kL2,
                                                                 .precision = PrecisionOf(feed_),
                                                                 .durability = durability,
                                                                 .dimension = kDimension});
    CHECK(entry != nullptr, "there are spaces enough");
    const SlotId slot = producer_.slab->Acquire(sizeof(HelloRequest));
    auto* hello = new (producer_.slab->At(slot)) HelloRequest;
    hello->origin = opened_;
    hello->space = SpaceName(name.data());
    ProducerLink& link = producer_.shards[0];
    CHECK(link.lanes[static_cast<size_t>(Lane::kRecall)].TryPush(slot), "the lane has room");
    while (true) {
      shard_->Poll();
      const auto completion = link.completions.TryPop();
      if (!completion || completion->kind != CompletionKind::kHello) continue;
      CHECK(completion->reason == RefusalReason::kNone, "a session is granted");
      spaces_.push_back({.slot = hello->session_slot, .session = hello->session});
      producer_.slab->Release(slot);
      return;
    }
  }

  bool MaySend() const {
    return sent_ < observations_ && (sent_ - acked_) * RecordBytes(*feed_) < kWindowBytes;
  }

  // To the spaces in turn.
  void Send(int64_t due_ns) {
    OpenSpace& space = spaces_[sent_ % spaces_.size()];
    const std::span<const std::byte> body = feed_->Body(sent_);
    const SlotId slot = producer_.slab->Acquire(kRequestBodyOffset + body.size());
    CHECK(slot != kNoSlot, "the slab holds the window");
    std::byte* bytes = producer_.slab->At(slot);
    auto* request = new (bytes) ObserveRequest;
    request->dtype = feed_->dtype();
    request->dimension = kDimension;
    request->id_bytes = kIdBytes;
    request->payload_bytes = kPayloadBytes;
    request->session_slot = space.slot;
    request->session = space.session;
    request->sequence = ++space.sequence;
    request->origin = opened_ - spaces_.size() + 1 + sent_ % spaces_.size();
    request->received_ns = due_ns;
    request->scale = feed_->scale();
    std::memcpy(bytes + kRequestBodyOffset, body.data(), body.size());
    CHECK(producer_.shards[0].lanes[static_cast<size_t>(Lane::kNormal)].TryPush(slot),
          "the lane holds the window");
    ++sent_;
  }

  void TakeAnswers() {
    int64_t now_ns = 0;
    while (const auto completion = producer_.shards[0].completions.TryPop()) {
      if (completion->kind != CompletionKind::kObserve) continue;
      if (completion->reason != RefusalReason::kNone) {
        std::fprintf(stderr, "refused: %s\n",
                     std::string(DescribeRefusal(completion->reason).name).c_str());
        std::exit(1);
      }
      const auto* request =
          reinterpret_cast<const ObserveRequest*>(producer_.slab->At(completion->slot));
      if (now_ns == 0) now_ns = clock_->MonotonicNs();
      if (histogram_ != nullptr) histogram_->Record(now_ns - request->received_ns);
      producer_.slab->Release(completion->slot);
      ++acked_;
    }
  }

  Clock* const clock_;
  Feed* const feed_;
  BenchLog log_;
  SpaceCatalogue catalogue_;
  RingMesh mesh_;
  ProducerPort producer_;
  std::unique_ptr<Shard> shard_;
  std::vector<OpenSpace> spaces_;
  uint32_t opened_ = 0;
  uint64_t observations_ = 0;
  uint64_t sent_ = 0;
  uint64_t acked_ = 0;
  LatencyHistogram* histogram_ = nullptr;
};

// One contender's rounds, each with its floors.
struct Rounds {
  std::vector<double> mb_per_s{};
  std::vector<double> observations_per_s{};
  std::vector<double> commits_per_s{};
  std::vector<double> commit_bytes{};
  std::vector<double> write_bytes{};
  std::vector<double> over_floor{};
  std::vector<double> over_deep_floor{};

  void Add(const WriteTrace& trace, uint64_t observations, double seconds, Floor* floor) {
    double bytes = 0;
    double commits = 0;
    double writes = 0;
    for (const uint32_t each : trace) {
      bytes += each;
      commits += each == 0;
      writes += each != 0;
    }
    const double floor_seconds = floor->Replay(trace);
    const double deep_seconds = floor->ReplayDeep(trace);
    mb_per_s.push_back(bytes / seconds / 1e6);
    observations_per_s.push_back(static_cast<double>(observations) / seconds);
    commits_per_s.push_back(commits / seconds);
    commit_bytes.push_back(bytes / std::max(commits, 1.0));
    write_bytes.push_back(bytes / std::max(writes, 1.0));
    over_floor.push_back(floor_seconds / seconds);
    over_deep_floor.push_back(deep_seconds / seconds);
  }
};

void PrintRounds(const Options& options, std::string_view dtype, const char* name,
                 const Rounds& rounds) {
  const double mb = Median(rounds.mb_per_s);
  const double floor = Median(rounds.over_floor);
  const double deep = Median(rounds.over_deep_floor);
  const char* format =
      options.json
          ? "{\"dtype\":\"%s\",\"contender\":\"%s\",\"mb_per_s\":%.0f,\"observations_per_s\":%.0f,"
            "\"commits_per_s\":%.0f,\"commit_kib\":%.0f,\"write_kib\":%.0f,\"over_floor\":%.3f,"
            "\"over_deep_floor\":%.3f}\n"
          : "%-6s %-6s %9.0f %14.0f %10.0f %11.0f %10.0f %12.2f %11.2f\n";
  std::printf(format, std::string(dtype).c_str(), name, mb, Median(rounds.observations_per_s),
              Median(rounds.commits_per_s), Median(rounds.commit_bytes) / 1024,
              Median(rounds.write_bytes) / 1024, floor, deep);
  std::fflush(stdout);
}

void PrintLatency(const Options& options, std::string_view dtype, const char* durability,
                  int percent, double per_second, const LatencyHistogram& histogram) {
  const auto us = [&](double quantile) {
    return static_cast<double>(histogram.QuantileNs(quantile)) / kNanosPerMicro;
  };
  const char* format = options.json
                           ? "{\"dtype\":\"%s\",\"durability\":\"%s\",\"percent\":%d,"
                             "\"observations_per_s\":%.0f,\"ack_p50_us\":%.0f,\"ack_p95_us\":%.0f,"
                             "\"ack_p99_us\":%.0f}\n"
                           : "%-6s %-10s %4d %% %14.0f %10.0f %10.0f %10.0f\n";
  std::printf(format, std::string(dtype).c_str(), durability, percent, per_second, us(0.5),
              us(0.95), us(0.99));
  std::fflush(stdout);
}

struct Case {
  const char* name;
  VectorDtype dtype;
};
constexpr std::array<Case, 3> kCases{
    {{"f32", VectorDtype::kF32}, {"bf16", VectorDtype::kBf16}, {"int8", VectorDtype::kInt8}}};

int Run(const Options& options) {
  SystemClock clock;
  std::string folder = options.dir + "/durable_ingest_XXXXXX";
  if (mkdtemp(folder.data()) == nullptr) {
    std::perror(folder.c_str());
    return 1;
  }
  const Place place{
      .clock = &clock,
      .folder = folder,
      .backend = options.posix ? DiskBackend::kPosix : DiskBackend::kAuto,
      .writer = {.block_bytes = options.block_bytes, .max_writes = options.max_writes}};
  const uint64_t round_bytes =
      options.observations *
      LogRecordBytes(kSpace.size(), kDimension * sizeof(float), kIdBytes, kPayloadBytes);
  Floor floor(place, round_bytes + round_bytes / 4);
  LogContender log(place, round_bytes);
  if (!options.json) {
    std::printf("%-6s %-6s %9s %14s %10s %11s %10s %12s %11s\n", "dtype", "", "MB/s",
                "observations/s", "commits/s", "KiB/commit", "KiB/write", "over floor",
                "over deep");
  }
  bool reached = true;
  std::vector<std::pair<const Case*, double>> rates;
  struct Late {
    const Case* which;
    const char* durability;
    int percent;
    double per_second;
    std::unique_ptr<LatencyHistogram> histogram;
  };
  std::vector<Late> late;
  for (const Case& each : kCases) {
    Feed feed(each.dtype);
    const size_t legs = 2 * (static_cast<size_t>(options.rounds) + 1) + 4;
    const size_t memory =
        (size_t{1} << 30) + legs * options.observations * (2 * feed.body_bytes() + 2'048);
    ShardContender shard(place, &feed, std::string("shard-") + each.name,
                         options.observations * RecordBytes(feed), memory);
    Rounds log_rounds;
    Rounds shard_rounds;
    Rounds core_rounds;
    for (int round = 0; round < options.rounds + 1; ++round) {  // The first one warms up.
      Rounds unused;
      log.log().Recycle();
      const double log_seconds = log.Run(&feed, options.observations);
      (round == 0 ? unused : log_rounds)
          .Add(log.log().TakeTrace(), options.observations, log_seconds, &floor);
      const double shard_seconds = shard.Run(options.observations);
      (round == 0 ? unused : shard_rounds)
          .Add(shard.log().TakeTrace(), options.observations, shard_seconds, &floor);
      const double core_seconds = shard.RunOnTwoCores(options.observations);
      (round == 0 ? unused : core_rounds)
          .Add(shard.log().TakeTrace(), options.observations, core_seconds, &floor);
    }
    PrintRounds(options, each.name, "log", log_rounds);
    PrintRounds(options, each.name, "shard", shard_rounds);
    PrintRounds(options, each.name, "core", core_rounds);
    reached &= std::ranges::max(log_rounds.over_floor) >= kTarget;
    if (!options.latency) continue;
    const double most = Median(shard_rounds.observations_per_s);
    const auto at = [&](int percent, Durability durability, const char* name) {
      const double per_second = most * percent / 100;
      const auto observations =
          std::min(options.observations, static_cast<uint64_t>(per_second * kMostSeconds));
      late.push_back(
          {&each, name, percent, per_second, shard.RunAt(per_second, observations, durability)});
    };
    for (const int percent : {10, 50, 90}) at(percent, Durability::kFsync, "fsync");
    at(50, Durability::kMemory, "memory");
    late.push_back({&each, "none", 50, most / 2,
                    shard.RunNothing(most / 2, std::min(options.observations,
                                                        static_cast<uint64_t>(most / 2)))});
  }
  if (options.latency && !options.json) {
    std::printf("\n%-6s %-10s %6s %14s %10s %10s %10s\n", "dtype", "durability", "load",
                "observations/s", "ack P50 us", "P95 us", "P99 us");
  }
  for (const Late& each : late) {
    PrintLatency(options, each.which->name, each.durability, each.percent, each.per_second,
                 *each.histogram);
  }
  std::filesystem::remove_all(folder);
  if (reached) return 0;
  std::fprintf(stderr, "the log alone stays below %.1f of the floor in every round\n", kTarget);
  return 1;
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) {
  engram::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const long value = i + 1 < argc ? std::strtol(argv[i + 1], nullptr, 10) : 0;
    if (argument == "--json") {
      options.json = true;
    } else if (argument == "--posix") {
      options.posix = true;
    } else if (argument == "--no-latency") {
      options.latency = false;
    } else if (argument == "--dir" && i + 1 < argc) {
      options.dir = argv[++i];
    } else if (argument == "--rounds" && value > 0) {
      options.rounds = static_cast<int>(value);
      ++i;
    } else if (argument == "--observations" && value > 0) {
      options.observations = static_cast<uint64_t>(value);
      ++i;
    } else if (argument == "--block-kib" && value > 0) {
      options.block_bytes = static_cast<uint32_t>(value) * 1024;
      ++i;
    } else if (argument == "--max-writes" && value > 0) {
      options.max_writes = static_cast<uint32_t>(value);
      ++i;
    } else {
      std::fprintf(stderr,
                   "usage: %s [--json] [--rounds N] [--observations N] [--dir D] [--posix] "
                   "[--block-kib N] [--max-writes N] [--no-latency]\n",
                   argv[0]);
      return 2;
    }
  }
  return engram::Run(options);
}
