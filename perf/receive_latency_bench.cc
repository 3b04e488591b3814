// From a client's send to the shard's ring, through a real TCP connection: a client thread sends
// single 768-d observations at a steady rate; the ingress core runs on another processor with its
// usual idle strategy. Beside it, in alternating rounds: the floor of the machine, a thread that
// blocks in recv and looks at the clock.
//
//   receive_latency_bench [--json] [--posix]

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "dataplane/ingest_core.h"
#include "perf/bench_support.h"
#include "src/core/topology.h"
#include "src/core_runner.h"

namespace engram {
namespace {

constexpr uint16_t kDimension = 768;
constexpr int kRounds = 5;
constexpr uint64_t kSendsPerRound = 10'000;
constexpr int64_t kPeriodNs = 200 * kNanosPerMicro;  // 5,000/s

int ConnectTo(uint16_t port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int one = 1;
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) std::abort();
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  return fd;
}

void SendAll(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) std::abort();
    bytes = bytes.subspan(static_cast<size_t>(sent));
  }
}

std::vector<std::byte> Sealed(FrameHeader header, std::vector<std::byte> body) {
  const std::span<const std::byte> parts[] = {body};
  SealFrame(&header, parts);
  std::vector<std::byte> frame(sizeof(header) + body.size());
  std::memcpy(frame.data(), &header, sizeof(header));
  if (!body.empty()) std::memcpy(frame.data() + sizeof(header), body.data(), body.size());
  return frame;
}

// One observation that carries the time of its sending as `when`.
std::vector<std::byte> Observation(uint64_t session, uint64_t sequence, int64_t sent_ns) {
  constexpr size_t kRecordBytes = RecordBytes(kDimension * 4, 1, 0);
  std::vector<std::byte> body(sizeof(ObserveBody) + kRecordBytes);
  const ObserveBody head{.count = 1};
  std::memcpy(body.data(), &head, sizeof(head));
  RecordHeader record;
  record.record_bytes = kRecordBytes;
  record.dtype = VectorDtype::kF32;
  record.dimension = kDimension;
  record.id_bytes = 1;
  record.when_ns = sent_ns;
  std::memcpy(body.data() + sizeof(head), &record, sizeof(record));
  auto* vector = reinterpret_cast<float*>(body.data() + sizeof(head) + sizeof(record));
  for (uint16_t d = 0; d < kDimension; ++d) vector[d] = 0.5f;
  std::memset(vector + kDimension, 'x', 1);
  return Sealed({.type = FrameType::kObserve, .session = session, .sequence = sequence}, body);
}

// Waits by the clock, spinning for the last stretch: a sleep alone wakes 90 us late.
void WaitUntil(Clock* clock, int64_t time_ns) {
  while (clock->MonotonicNs() < time_ns) {
  }
}

// Takes observations from the ring at once and keeps how old they are.
class RingEnd {
 public:
  RingEnd(ShardPort port, Clock* clock, LatencyHistogram* ages)
      : port_(std::move(port)), clock_(clock), ages_(ages) {}

  int Poll() {
    ShardLink& link = port_.producers[0];
    int work = 0;
    for (auto& lane : link.lanes) {
      while (const auto slot = lane.TryPop()) {
        Take(link, *slot);
        ++work;
      }
    }
    return work;
  }

 private:
  void Take(ShardLink& link, SlotId slot) {
    std::byte* bytes = link.producer_slab->At(slot);
    Completion completion{.slot = slot};
    const RequestKind kind = reinterpret_cast<RequestHeader*>(bytes)->kind;
    if (kind == RequestKind::kHello) {
      auto* hello = reinterpret_cast<HelloRequest*>(bytes);
      hello->session = SessionId(1);
      hello->metric = Metric::kL2;
      completion.kind = CompletionKind::kHello;
      completion.origin = hello->origin;
    } else if (kind == RequestKind::kObserve) {
      const auto* observe = reinterpret_cast<const ObserveRequest*>(bytes);
      ages_->Record(clock_->MonotonicNs() - observe->when_ns);
      completion.origin = observe->origin;
      completion.sequence = observe->sequence;
    } else {
      completion.kind = CompletionKind::kDetach;
    }
    (void)link.completions.TryPush(completion);
  }

  ShardPort port_;
  Clock* clock_;
  LatencyHistogram* ages_;
};

struct Outcome {
  LatencyHistogram send_to_ring;
  LatencyHistogram receive_to_ring;
};

void RunIngress(NetworkBackend backend, int ingress_cpu, int client_cpu, Outcome* outcome) {
  SystemClock clock;
  std::string note;
  auto network = CreateNetwork(backend, {.max_connections = 16}, &note);
  if (!network) std::abort();
  const auto endpoint = (*network)->Listen({.host = "127.0.0.1", .port = 0});
  SpaceCatalogue spaces(16, 1, 1, {});
  MeshOptions mesh_options;
  mesh_options.catalogue = &spaces;
  auto mesh = RingMesh::Create(mesh_options);
  if (!endpoint || !mesh) std::abort();
  CounterCatalogue catalogue;
  auto core = IngestCore::Create({.max_connections = 16}, &clock, network->get(),
                                 mesh->TakeProducer(ProducerId(0)), &catalogue);
  if (!core) std::abort();
  RingEnd ring(mesh->TakeShard(ShardId(0)), &clock, &outcome->send_to_ring);
  CoreRunner runner(
      "ingress", IdleStrategy::kHybrid, &clock,
      {.wait = [&](int64_t ns) { (*network)->Wait(ns); }, .wake = [&] { (*network)->Wake(); }});
  runner.AddPoll([&] { return (*core)->Poll(); });
  runner.AddPoll([&] { return ring.Poll(); });
  std::thread thread([&] {
    (void)PinThisThread(ingress_cpu);
    if (!(*network)->Start()) std::abort();
    runner.Run();
  });
  (void)PinThisThread(client_cpu);
  const int fd = ConnectTo(endpoint->port);
  SendAll(fd, Sealed({.type = FrameType::kHello}, std::vector<std::byte>(sizeof(HelloBody))));
  std::vector<std::byte> answer(4096);
  if (recv(fd, answer.data(), answer.size(), 0) <= 0) std::abort();
  int64_t next_ns = clock.MonotonicNs();
  for (uint64_t i = 1; i <= kSendsPerRound; ++i, next_ns += kPeriodNs) {
    WaitUntil(&clock, next_ns);
    SendAll(fd, Observation(1, i, clock.MonotonicNs()));
    while (recv(fd, answer.data(), answer.size(), MSG_DONTWAIT) > 0) {
    }
  }
  while (outcome->send_to_ring.Count() % kSendsPerRound != 0) {
  }
  close(fd);
  runner.Stop();
  thread.join();
  outcome->receive_to_ring.Merge((*core)->receive_to_ring());
}

// The floor: what the kernel and the scheduler take to wake a thread that waits in recv.
void RunFloor(int receiver_cpu, int client_cpu, LatencyHistogram* ages) {
  SystemClock clock;
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0 ||
      listen(listener, 1) != 0 ||
      getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) != 0) {
    std::abort();
  }
  const size_t frame_bytes = Observation(1, 1, 0).size();
  std::thread thread([&] {
    (void)PinThisThread(receiver_cpu);
    const int fd = accept(listener, nullptr, nullptr);
    std::vector<std::byte> frame(frame_bytes);
    for (uint64_t i = 0; i < kSendsPerRound; ++i) {
      if (recv(fd, frame.data(), frame.size(), MSG_WAITALL) <= 0) std::abort();
      const auto record = LoadAs<RecordHeader>(frame.data() + 32 + sizeof(ObserveBody));
      ages->Record(clock.MonotonicNs() - record.when_ns);
    }
    close(fd);
  });
  (void)PinThisThread(client_cpu);
  const int fd = ConnectTo(ntohs(address.sin_port));
  int64_t next_ns = clock.MonotonicNs();
  for (uint64_t i = 1; i <= kSendsPerRound; ++i, next_ns += kPeriodNs) {
    WaitUntil(&clock, next_ns);
    SendAll(fd, Observation(1, i, clock.MonotonicNs()));
  }
  thread.join();
  close(fd);
  close(listener);
}

int Main(int argc, char** argv) {
  const bool json = HasFlag(argc, argv, "--json");
  const NetworkBackend backend =
      HasFlag(argc, argv, "--posix") ? NetworkBackend::kPosix : NetworkBackend::kAuto;
  const auto topology = DiscoverTopology();
  if (!topology || topology->cpus.size() < 2) {
    std::fprintf(stderr, "needs two processors: one for the client, one for the ingress core\n");
    return 1;
  }
  const int ingress_cpu = topology->cpus[0].os_index;
  const int client_cpu = topology->cpus[1].os_index;
  auto outcome = std::make_unique<Outcome>();
  auto floor = std::make_unique<LatencyHistogram>();
  for (int round = 0; round < kRounds; ++round) {
    RunIngress(backend, ingress_cpu, client_cpu, outcome.get());
    RunFloor(ingress_cpu, client_cpu, floor.get());
  }
  const auto us = [](const LatencyHistogram& histogram, double quantile) {
    return static_cast<double>(histogram.QuantileNs(quantile)) / 1000;
  };
  const struct {
    const char* name;
    const char* key;
    const LatencyHistogram& histogram;
  } rows[] = {{"send -> ring", "send_to_ring", outcome->send_to_ring},
              {"receive -> ring", "receive_to_ring", outcome->receive_to_ring},
              {"send -> recv returns (floor)", "floor", *floor}};
  if (!json) {
    std::printf(
        "768-d observations one by one at 5,000/s over TCP, %llu each, us\n\n%-30s %9s %9s "
        "%9s\n",
        static_cast<unsigned long long>(kRounds * kSendsPerRound), "", "P50", "P99", "P99.9");
    for (const auto& row : rows) {
      std::printf("%-30s %9.1f %9.1f %9.1f\n", row.name, us(row.histogram, 0.5),
                  us(row.histogram, 0.99), us(row.histogram, 0.999));
    }
    std::printf("\nsend -> ring over the floor: %.2f at P50, %.2f at P99\n",
                us(outcome->send_to_ring, 0.5) / us(*floor, 0.5),
                us(outcome->send_to_ring, 0.99) / us(*floor, 0.99));
    return 0;
  }
  std::printf("{");
  for (const auto& row : rows) {
    std::printf("\"%s_p50_us\":%.1f,\"%s_p99_us\":%.1f,\"%s_p999_us\":%.1f,", row.key,
                us(row.histogram, 0.5), row.key, us(row.histogram, 0.99), row.key,
                us(row.histogram, 0.999));
  }
  std::printf("\"send_to_ring_over_floor_p50\":%.2f}\n",
              us(outcome->send_to_ring, 0.5) / us(*floor, 0.5));
  return 0;
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) { return engram::Main(argc, argv); }
