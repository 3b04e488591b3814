// Recalls whose payload is read from the log beside recalls of ids alone, and beside a shard
// without a log, which keeps its payloads in memory; and what an observation takes in memory in
// both.
//
//   payload_read_bench [--json] [--observations N] [--dimension D] [--payload B] [--seconds S]
//                      [--dir D] [--posix]
//
// One thread runs client, ingress core and shard in turn, over a socket of this machine, so the
// figures are of all three together. The log is in a folder under --dir (default: the current
// directory), which is removed at the end. What is read comes from the operating system's cache,
// but in the rows `cold`: before each of their recalls it is told to forget the log.

#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "dataplane/frame_format.h"
#include "perf/bench_support.h"
#include "src/appliance.h"
#include "src/log_store.h"
#include "tests/support/loopback_client.h"

namespace engram {
namespace {

struct Options {
  bool json = false;
  uint64_t observations = 20'000;
  uint16_t dimension = 128;
  uint32_t payload_bytes = 512;
  double seconds = 2;
  std::string directory = ".";
  DiskBackend backend = DiskBackend::kAuto;
};

[[noreturn]] void Fatal(const std::string& what) {
  std::fprintf(stderr, "payload_read_bench: %s\n", what.c_str());
  std::exit(1);
}

// An appliance with or without a log, and its client.
class Rig {
 public:
  Rig(const Options& options, bool with_log, const std::string& folder) : options_(options) {
    NetworkOptions network_options;
    network_options.max_connections = 16;
    network_ = Must(CreateNetwork(NetworkBackend::kAuto, network_options, nullptr));
    const Endpoint endpoint = Must(network_->Listen({.host = "127.0.0.1", .port = 0}));
    if (!network_->Start()) Fatal("the network does not start");
    ApplianceOptions appliance;
    appliance.ingest.max_connections = 16;
    appliance.shard.memory_limit_bytes = size_t{2} << 30;
    appliance.space_defaults.metric = Metric::kL2;
    if (with_log) {
      logs_ = Must(LogStore::Open(
          {}, &clock_,
          [this, folder](const std::string& log, const DiskOptions& disk, std::string* note) {
            return CreateDisk(options_.backend, folder + "/" + log, disk, note);
          },
          nullptr));
      appliance.storage.push_back(logs_->ForShard(0));
      appliance.log_disks = logs_->disks();
    }
    appliance_ = Must(Appliance::Create(appliance, &clock_, {network_.get()}));
    while (appliance_->shard(0).is_recovering()) appliance_->shard(0).Poll();
    if (logs_ != nullptr && !logs_->PrepareFirst()) Fatal("the log has no segment");
    client_ =
        std::make_unique<LoopbackClient>(endpoint.port, options.dimension, options.payload_bytes);
    RunUntil([this] { return client_->session != 0; });
  }

  template <typename Done>
  void RunUntil(Done&& done) {
    for (uint64_t i = 0; !done(); ++i) {
      client_->Step([this](const FrameHeader& header, std::span<const std::byte> body) {
        Take(header, body);
      });
      appliance_->ingest(0).Poll();
      appliance_->shard(0).Poll();
      if (logs_ != nullptr && i % 64 == 0) logs_->Poll();
    }
  }

  void Fill() {
    constexpr size_t kFrameObservations = 16;
    for (uint64_t next = 1; next <= options_.observations; next += kFrameObservations) {
      client_->QueueObserve(next, kFrameObservations);
      const uint64_t last = next + kFrameObservations - 1;
      RunUntil([&] { return client_->acked + 256 > last; });
    }
    RunUntil([&] { return client_->acked >= options_.observations; });
    // Linked, flushed, at rest.
    RunUntil([&] { return appliance_->shard(0).Idle() && appliance_->shard(0).Poll() == 0; });
  }

  struct Figures {
    double recalls_per_second = 0;
    double median_us = 0;
    double payload_bytes = 0;  // an answer
  };
  // One after the other, `forget` before each.
  template <typename Forget>
  Figures Recall(uint32_t k, uint16_t flags, const Forget& forget) {
    std::vector<double> times_us;
    const uint64_t payload_before = payload_bytes_;
    const uint64_t omitted_before = omitted_;
    const int64_t began_ns = clock_.MonotonicNs();
    const auto seconds = [&] { return static_cast<double>(clock_.MonotonicNs() - began_ns) / 1e9; };
    double asking_us = 0;
    while (seconds() < options_.seconds) {
      forget();
      client_->QueueRecall(k, flags);
      const int64_t asked_ns = clock_.MonotonicNs();
      RunUntil([this] { return client_->results == client_->recalls; });
      times_us.push_back(static_cast<double>(clock_.MonotonicNs() - asked_ns) / 1e3);
    }
    for (const double time_us : times_us) asking_us += time_us;
    if (omitted_ != omitted_before) Fatal("a payload was left out: use a smaller one");
    const auto count = static_cast<double>(times_us.size());
    return {.recalls_per_second = count / asking_us * 1e6,
            .median_us = Median(times_us),
            .payload_bytes = static_cast<double>(payload_bytes_ - payload_before) / count};
  }
  double BytesOfNode() const {
    return static_cast<double>(appliance_->shard(0).FindSpace("default")->resident_bytes()) /
           static_cast<double>(options_.observations);
  }

 private:
  void Take(const FrameHeader& header, std::span<const std::byte> body) {
    if (header.type == FrameType::kNak) Fatal("a request was refused");
    if (header.type != FrameType::kResult) return;
    body = body.subspan(sizeof(ResultBody));
    while (!body.empty()) {
      const auto hit = LoadAs<HitHeader>(body.data());
      payload_bytes_ += hit.payload_bytes;
      omitted_ += (hit.flags & kHitPayloadOmitted) != 0 ? 1 : 0;
      body = body.subspan(hit.hit_bytes);
    }
  }

  const Options& options_;
  SystemClock clock_;
  std::unique_ptr<Network> network_;
  std::unique_ptr<LogStore> logs_;
  std::unique_ptr<Appliance> appliance_;
  std::unique_ptr<LoopbackClient> client_;
  uint64_t payload_bytes_ = 0;
  uint64_t omitted_ = 0;
};

// Drops the files of a folder from the operating system's cache.
void Forget(const std::string& folder) {
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file()) continue;
    const int fd = open(entry.path().c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) != 0) {
      Fatal("the cache keeps " + entry.path().string());
    }
    close(fd);
  }
}

enum class Row : uint8_t { kIds, kPayload, kCold };

void Measure(const Options& options, bool with_log, const std::string& folder) {
  Rig rig(options, with_log, folder);
  rig.Fill();
  const char* place = with_log ? "log" : "memory";
  const char* format = options.json ? "{\"payloads\":\"%s\",\"bytes_a_node\":%.1f}\n"
                                    : "payloads in %s: %.1f bytes a node\n";
  std::printf(format, place, rig.BytesOfNode());
  for (const uint32_t k : {10U, 1'000U, kMaxRecallResults}) {
    double ids_alone = 0;
    for (const Row row : {Row::kIds, Row::kPayload, Row::kCold}) {
      if (row == Row::kCold && !with_log) continue;
      const Rig::Figures figures =
          rig.Recall(k, row == Row::kIds ? uint16_t{0} : kFrameFlagWithPayload, [&] {
            if (row == Row::kCold) Forget(folder);
          });
      if (row == Row::kIds) ids_alone = figures.recalls_per_second;
      const char* what = row == Row::kIds ? "ids" : row == Row::kPayload ? "payload" : "cold";
      const char* line =
          options.json
              ? "{\"payloads\":\"%s\",\"k\":%u,\"recall\":\"%s\",\"recalls_per_second\":%.1f,"
                "\"median_us\":%.1f,\"payload_bytes\":%.0f,\"ratio_to_ids\":%.3f}\n"
              : "payloads in %-6s  k %5u  %-7s  %9.1f recalls/s  median %9.1f us  "
                "%8.0f bytes  %.3f of ids alone\n";
      std::printf(line, place, k, what, figures.recalls_per_second, figures.median_us,
                  figures.payload_bytes, figures.recalls_per_second / ids_alone);
    }
  }
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) {
  engram::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) engram::Fatal(argument + " takes a value");
      return argv[++i];
    };
    if (argument == "--json") {
      options.json = true;
    } else if (argument == "--posix") {
      options.backend = engram::DiskBackend::kPosix;
    } else if (argument == "--observations") {
      options.observations = std::stoull(value()) / 16 * 16;
    } else if (argument == "--dimension") {
      options.dimension = static_cast<uint16_t>(std::stoul(value()));
    } else if (argument == "--payload") {
      options.payload_bytes = static_cast<uint32_t>(std::stoul(value()));
    } else if (argument == "--seconds") {
      options.seconds = std::stod(value());
    } else if (argument == "--dir") {
      options.directory = value();
    } else {
      engram::Fatal("unknown argument " + argument);
    }
  }
  std::string folder = options.directory + "/payload_read_XXXXXX";
  if (mkdtemp(folder.data()) == nullptr) engram::Fatal("no folder under " + options.directory);
  engram::Measure(options, false, folder);
  engram::Measure(options, true, folder);
  std::filesystem::remove_all(folder);
  return 0;
}
