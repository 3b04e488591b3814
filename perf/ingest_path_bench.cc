// What the ingress core spends on an observation: frame, CRC, decode, validate, copy into a slot,
// route, ring. The real IngestCore is given whole frames in memory; a shard that does nothing takes
// them from the rings. Beside it, in the same rounds: CRC32C of the bytes and a memcpy of them.
//
//   ingest_path_bench [--json]

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "dataplane/ingest_core.h"
#include "perf/bench_support.h"
#include "src/core/crc32c.h"
#include "src/core/hash.h"
#include "src/core/topology.h"

namespace engram {
namespace {

constexpr uint16_t kDimension = 768;
constexpr size_t kFrames = 64;  // in a round; with 16 observations each what a lane holds well
constexpr int kRounds = 401;
constexpr ConnectionId kClient{.index = 0, .generation = 1};

// Takes what is sent and forgets it.
class SilentNetwork final : public Network {
 public:
  Result<Endpoint> Listen(const Endpoint& endpoint) override { return endpoint; }
  Result<void> Start() override { return {}; }
  int Poll(NetworkHandler&, int) override { return 0; }
  bool Send(ConnectionId, std::span<const std::span<const std::byte>> parts) override {
    for (const auto& part : parts) bytes_ += part.size();
    return true;
  }
  size_t SendBacklog(ConnectionId) const override { return 0; }
  void SetReceivePaused(ConnectionId, bool) override {}
  void Close(ConnectionId, CloseMode) override { std::fprintf(stderr, "closed\n"); }
  void StopAccepting() override {}
  void Wait(int64_t) override {}
  void Wake() override {}
  std::string_view backend() const override { return "silent"; }

 private:
  size_t bytes_ = 0;
};

// Answers hello and settles every observation at once.
class NullShard {
 public:
  explicit NullShard(ShardPort port) : port_(std::move(port)), slots_(1024) {}
  size_t Poll() {
    ShardLink& link = port_.producers[0];
    size_t taken = 0;
    for (auto& lane : link.lanes) {
      const size_t count = lane.PopBatch(slots_);
      for (size_t i = 0; i < count; ++i) Answer(link, slots_[i]);
      taken += count;
    }
    return taken;
  }

 private:
  static void Answer(ShardLink& link, SlotId slot) {
    std::byte* bytes = link.producer_slab->At(slot);
    Completion completion{.slot = slot};
    if (reinterpret_cast<RequestHeader*>(bytes)->kind == RequestKind::kHello) {
      auto* hello = reinterpret_cast<HelloRequest*>(bytes);
      hello->session = SessionId(1);
      hello->metric = Metric::kCosine;
      hello->dimension = kDimension;
      completion.kind = CompletionKind::kHello;
      completion.origin = hello->origin;
    } else {
      const auto* observe = reinterpret_cast<const ObserveRequest*>(bytes);
      completion.origin = observe->origin;
      completion.sequence = observe->sequence;
      completion.reason = observe->skip_reason;
    }
    (void)link.completions.TryPush(completion);
  }

  ShardPort port_;
  std::vector<SlotId> slots_;
};

std::vector<std::byte> SealedFrame(FrameHeader header, const std::vector<std::byte>& body) {
  const std::span<const std::byte> parts[] = {body};
  SealFrame(&header, parts);
  std::vector<std::byte> frame(sizeof(header) + body.size());
  std::memcpy(frame.data(), &header, sizeof(header));
  std::memcpy(frame.data() + sizeof(header), body.data(), body.size());
  return frame;
}

std::vector<std::byte> ObserveFrame(uint64_t sequence, size_t batch) {
  std::vector<std::byte> body(sizeof(ObserveBody));
  const ObserveBody head{.count = static_cast<uint16_t>(batch)};
  std::memcpy(body.data(), &head, sizeof(head));
  for (size_t i = 0; i < batch; ++i) {
    const std::string id = std::to_string(sequence + i);
    RecordHeader record;
    record.dtype = VectorDtype::kF32;
    record.dimension = kDimension;
    record.id_bytes = static_cast<uint16_t>(id.size());
    record.record_bytes = static_cast<uint32_t>(RecordBytes(kDimension * 4, id.size(), 0));
    const size_t begin = body.size();
    body.resize(begin + record.record_bytes);
    std::memcpy(body.data() + begin, &record, sizeof(record));
    auto* vector = reinterpret_cast<float*>(body.data() + begin + sizeof(record));
    for (uint16_t d = 0; d < kDimension; ++d) {
      vector[d] = static_cast<float>(MixBits(sequence + i + d) % 1000) / 1000;
    }
    std::memcpy(body.data() + begin + sizeof(record) + kDimension * 4, id.data(), id.size());
  }
  return SealedFrame({.type = FrameType::kObserve, .session = 1, .sequence = sequence}, body);
}

struct Figures {
  double path_ticks = 0;    // an observation
  double crc_ticks = 0;     // CRC32C of its bytes
  double memcpy_ticks = 0;  // a copy of its bytes to a slot
};

Figures Measure(size_t batch) {
  SystemClock clock;
  SilentNetwork network;
  CounterCatalogue catalogue;
  SpaceCatalogue spaces(16, 1, 1, {});
  MeshOptions mesh_options;
  mesh_options.catalogue = &spaces;
  auto mesh = RingMesh::Create(mesh_options);
  if (!mesh) std::abort();
  auto core = IngestCore::Create({.max_connections = 4}, &clock, &network,
                                 mesh->TakeProducer(ProducerId(0)), &catalogue);
  if (!core) std::abort();
  NullShard shard(mesh->TakeShard(ShardId(0)));
  (*core)->Poll();
  (*core)->OnAccept(kClient);
  std::vector<std::byte> hello(sizeof(HelloBody));
  (*core)->OnReceive(kClient, SealedFrame({.type = FrameType::kHello}, hello));
  shard.Poll();
  (*core)->Poll();

  const std::vector<SlotClass> classes = {{.slot_bytes = 4096, .count = 8192}};
  auto slots = SlotSlab::Create(classes, HugePagePolicy::kAuto, -1);
  if (!slots) std::abort();
  std::vector<double> path;
  std::vector<double> crc;
  std::vector<double> copy;
  uint64_t sequence = 1;
  uint32_t sink = 0;
  const double observations = static_cast<double>(kFrames * batch);
  for (int round = 0; round < kRounds; ++round) {
    // Frames as they lie in a receive buffer: just written, in cache as far as it reaches.
    std::vector<std::vector<std::byte>> frames;
    for (size_t f = 0; f < kFrames; ++f, sequence += batch) {
      frames.push_back(ObserveFrame(sequence, batch));
    }
    const uint64_t t0 = Ticks();
    for (const auto& frame : frames) (*core)->OnReceive(kClient, frame);
    const uint64_t t1 = Ticks();
    for (const auto& frame : frames) sink ^= Crc32c(frame);
    const uint64_t t2 = Ticks();
    std::vector<SlotId> taken;
    taken.reserve(kFrames * batch);
    const uint64_t t3 = Ticks();
    for (const auto& frame : frames) {
      const size_t bytes = frame.size() / batch;
      for (size_t i = 0; i < batch; ++i) {
        taken.push_back(slots->Acquire(bytes));
        std::memcpy(slots->At(taken.back()), frame.data() + i * bytes, bytes);
      }
    }
    const uint64_t t4 = Ticks();
    for (const SlotId slot : taken) slots->Release(slot);
    path.push_back(static_cast<double>(t1 - t0) / observations);
    crc.push_back(static_cast<double>(t2 - t1) / observations);
    copy.push_back(static_cast<double>(t4 - t3) / observations);
    while (shard.Poll() > 0) {
    }
    // All slots are free again before the next round; a refused observation would leave it waiting.
    const Counter& accepted = (*core)->counter(IngestCounter::kObservationsAccepted);
    for (int polls = 0; accepted.Read() < sequence - 1; ++polls) {
      (*core)->Poll();
      if (polls > 1000) {
        std::fprintf(stderr, "some observations were refused: the figures mean nothing\n");
        std::exit(1);
      }
    }
  }
  if (sink == 1) std::fputs("", stderr);
  return {Median(path), Median(crc), Median(copy)};
}

int Main(int argc, char** argv) {
  if (auto topology = DiscoverTopology()) (void)PinThisThread(topology->cpus.front().os_index);
  const bool json = HasFlag(argc, argv, "--json");
  if (!json) {
    std::printf(
        "cost of a 768-d f32 observation on the ingress core, in TSC ticks, medians of %d "
        "rounds\n\n%8s %12s %12s %12s %14s\n",
        kRounds, "batch", "whole path", "CRC32C", "memcpy", "path / memcpy");
  }
  for (const size_t batch : {size_t{1}, size_t{16}}) {
    const Figures figures = Measure(batch);
    const double ratio = figures.path_ticks / figures.memcpy_ticks;
    if (json) {
      std::printf(
          "{\"batch\":%zu,\"path_ticks\":%.0f,\"crc_ticks\":%.0f,\"memcpy_ticks\":%.0f,"
          "\"path_over_memcpy\":%.2f}\n",
          batch, figures.path_ticks, figures.crc_ticks, figures.memcpy_ticks, ratio);
    } else {
      std::printf("%8zu %12.0f %12.0f %12.0f %14.2f\n", batch, figures.path_ticks,
                  figures.crc_ticks, figures.memcpy_ticks, ratio);
    }
  }
  return 0;
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) { return engram::Main(argc, argv); }
