// Recalls whose payload is read from the log beside recalls of ids alone, and beside a shard
// without a log, which keeps its payloads in memory; and what an observation takes in memory in
// both.
//
//   payload_read_bench [--json] [--observations N] [--dimension D] [--payload B] [--seconds S]
//                      [--dir D] [--posix]
//
// One thread runs client, ingress core and shard in turn, over a socket of this machine, so the
// figures are of all three together. The log is in a folder under --dir (default: the current
// directory), which is removed at the end. What is read has just been written, so it comes from the
// operating system's cache.

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "dataplane/frame_format.h"
#include "perf/bench_support.h"
#include "src/appliance.h"
#include "src/core/hash.h"
#include "src/log_store.h"

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

template <typename T>
T Must(Result<T> result) {
  if (!result) Fatal(result.error().message);
  return *std::move(result);
}

// Frames over a socket that never waits.
class Client {
 public:
  explicit Client(uint16_t port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address));
    incoming_.resize(size_t{4} << 20);
  }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  ~Client() { close(fd_); }

  void Queue(FrameHeader header, std::span<const std::byte> body) {
    const std::span<const std::byte> parts[] = {body};
    SealFrame(&header, parts);
    const auto bytes = BytesOf(header);
    outgoing_.insert(outgoing_.end(), bytes.begin(), bytes.end());
    outgoing_.insert(outgoing_.end(), body.begin(), body.end());
  }
  void Step() {
    if (sent_ < outgoing_.size()) {
      const ssize_t n = send(fd_, outgoing_.data() + sent_, outgoing_.size() - sent_, MSG_NOSIGNAL);
      if (n > 0) sent_ += static_cast<size_t>(n);
      if (sent_ == outgoing_.size()) {
        outgoing_.clear();
        sent_ = 0;
      }
    }
    const ssize_t n = recv(fd_, incoming_.data() + filled_, incoming_.size() - filled_, 0);
    if (n > 0) filled_ += static_cast<size_t>(n);
    size_t at = 0;
    while (filled_ - at >= kFrameHeaderBytes) {
      const auto header = LoadAs<FrameHeader>(incoming_.data() + at);
      const size_t bytes = kFrameHeaderBytes + header.length;
      if (filled_ - at < bytes) break;
      Take(header, {incoming_.data() + at + kFrameHeaderBytes, header.length});
      at += bytes;
    }
    std::memmove(incoming_.data(), incoming_.data() + at, filled_ - at);
    filled_ -= at;
  }

  uint64_t session = 0;
  uint64_t acked = 0;
  uint64_t results = 0;
  uint64_t hits = 0;
  uint64_t payload_bytes = 0;
  uint64_t omitted = 0;

 private:
  void Take(const FrameHeader& header, std::span<const std::byte> body) {
    if (header.type == FrameType::kHelloAck) session = header.session;
    if (header.type == FrameType::kAck) acked = header.sequence;
    if (header.type == FrameType::kNak) Fatal("a request was refused");
    if (header.type != FrameType::kResult) return;
    body = body.subspan(sizeof(ResultBody));
    while (!body.empty()) {
      const auto hit = LoadAs<HitHeader>(body.data());
      ++hits;
      payload_bytes += hit.payload_bytes;
      omitted += (hit.flags & kHitPayloadOmitted) != 0 ? 1 : 0;
      body = body.subspan(hit.hit_bytes);
    }
    if ((header.flags & kFrameFlagMore) == 0) ++results;
  }

  int fd_;
  std::vector<std::byte> outgoing_;
  size_t sent_ = 0;
  std::vector<std::byte> incoming_;
  size_t filled_ = 0;
};

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
    client_ = std::make_unique<Client>(endpoint.port);
    HelloBody hello;
    hello.metric = Metric::kL2;
    client_->Queue({.type = FrameType::kHello}, BytesOf(hello));
    RunUntil([this] { return client_->session != 0; });
  }

  template <typename Done>
  void RunUntil(Done&& done) {
    for (uint64_t i = 0; !done(); ++i) {
      client_->Step();
      appliance_->ingest(0).Poll();
      appliance_->shard(0).Poll();
      if (logs_ != nullptr && i % 64 == 0) logs_->Poll();
    }
  }

  void Fill() {
    constexpr size_t kFrameObservations = 16;
    const std::string payload(options_.payload_bytes, 'p');
    for (uint64_t next = 1; next <= options_.observations; next += kFrameObservations) {
      std::vector<std::byte> body;
      const auto append = [&](std::span<const std::byte> bytes) {
        body.insert(body.end(), bytes.begin(), bytes.end());
      };
      append(BytesOf(ObserveBody{.count = kFrameObservations}));
      for (size_t i = 0; i < kFrameObservations; ++i) {
        const std::string id = "id" + std::to_string(next + i);
        RecordHeader record;
        record.dtype = VectorDtype::kF32;
        record.dimension = options_.dimension;
        record.id_bytes = static_cast<uint16_t>(id.size());
        record.payload_bytes = options_.payload_bytes;
        record.record_bytes = static_cast<uint32_t>(
            RecordBytes(options_.dimension * sizeof(float), id.size(), payload.size()));
        const size_t begin = body.size();
        append(BytesOf(record));
        const std::vector<float> vector = RandomVector();
        append(std::as_bytes(std::span(vector)));
        append(BytesOf(std::string_view(id)));
        append(BytesOf(std::string_view(payload)));
        body.resize(begin + record.record_bytes);
      }
      client_->Queue({.type = FrameType::kObserve, .session = client_->session, .sequence = next},
                     body);
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
  // One after the other.
  Figures Recall(uint32_t k, uint16_t flags) {
    std::vector<double> times_us;
    const uint64_t payload_before = client_->payload_bytes;
    const uint64_t omitted_before = client_->omitted;
    const int64_t began_ns = clock_.MonotonicNs();
    const auto seconds = [&] { return static_cast<double>(clock_.MonotonicNs() - began_ns) / 1e9; };
    while (seconds() < options_.seconds) {
      RecallBody recall;
      recall.k = k;
      recall.dimension = options_.dimension;
      recall.dtype = VectorDtype::kF32;
      std::vector<std::byte> body(sizeof(recall));
      std::memcpy(body.data(), &recall, sizeof(recall));
      const std::vector<float> vector = RandomVector();
      const auto bytes = std::as_bytes(std::span(vector));
      body.insert(body.end(), bytes.begin(), bytes.end());
      const int64_t asked_ns = clock_.MonotonicNs();
      client_->Queue({.type = FrameType::kRecall, .flags = flags, .sequence = ++recalls_}, body);
      RunUntil([this] { return client_->results == recalls_; });
      times_us.push_back(static_cast<double>(clock_.MonotonicNs() - asked_ns) / 1e3);
    }
    const double took = seconds();
    if (client_->omitted != omitted_before) Fatal("a payload was left out: use a smaller one");
    const auto count = static_cast<double>(times_us.size());
    return {.recalls_per_second = count / took,
            .median_us = Median(times_us),
            .payload_bytes = static_cast<double>(client_->payload_bytes - payload_before) / count};
  }
  double BytesOfNode() const {
    return static_cast<double>(appliance_->shard(0).FindSpace("default")->resident_bytes()) /
           static_cast<double>(options_.observations);
  }

 private:
  std::vector<float> RandomVector() {
    std::vector<float> vector(options_.dimension);
    for (float& number : vector) number = static_cast<float>(random_.Below(1000)) / 1000;
    return vector;
  }

  const Options& options_;
  SystemClock clock_;
  SplitMix64 random_{1};
  std::unique_ptr<Network> network_;
  std::unique_ptr<LogStore> logs_;
  std::unique_ptr<Appliance> appliance_;
  std::unique_ptr<Client> client_;
  uint64_t recalls_ = 0;
};

void Measure(const Options& options, bool with_log, const std::string& folder) {
  Rig rig(options, with_log, folder);
  rig.Fill();
  const char* place = with_log ? "log" : "memory";
  const char* format = options.json ? "{\"payloads\":\"%s\",\"bytes_a_node\":%.1f}\n"
                                    : "payloads in %s: %.1f bytes a node\n";
  std::printf(format, place, rig.BytesOfNode());
  for (const uint32_t k : {10U, 1'000U}) {
    double ids_alone = 0;
    for (const bool payload : {false, true}) {
      const Rig::Figures figures = rig.Recall(k, payload ? kFrameFlagWithPayload : uint16_t{0});
      if (!payload) ids_alone = figures.recalls_per_second;
      const char* line =
          options.json
              ? "{\"payloads\":\"%s\",\"k\":%u,\"with_payload\":%d,\"recalls_per_second\":%.1f,"
                "\"median_us\":%.1f,\"payload_bytes\":%.0f,\"ratio_to_ids\":%.3f}\n"
              : "payloads in %-6s  k %5u  with payload %d  %9.1f recalls/s  median %8.1f us  "
                "%8.0f bytes  %.3f of ids alone\n";
      std::printf(line, place, k, payload ? 1 : 0, figures.recalls_per_second, figures.median_us,
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
