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
// floor   To each of the two, right after it: writes of the same sizes from ready memory into a
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
#include <utility>
#include <vector>

#include "dataplane/ring_mesh.h"
#include "index/log/log_writer.h"
#include "index/log/segment_keeper.h"
#include "index/shard.h"
#include "perf/bench_support.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/disk.h"
#include "src/core/hash.h"
#include "src/core/huge_page_arena.h"
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
constexpr uint32_t kSegmentBytes = 64u << 20;
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

double SecondsSince(int64_t start_ns, Clock* clock) {
  return static_cast<double>(clock->MonotonicNs() - start_ns) / kNanosPerSecond;
}

// A write of so many bytes; 0: a flush.
using WriteTrace = std::vector<uint32_t>;

// Notes the sizes of the writes and where the flushes lie between them.
class TracedDisk final : public Disk {
 public:
  explicit TracedDisk(std::unique_ptr<Disk> disk) : disk_(std::move(disk)) {
    trace_.reserve(size_t{1} << 20);
  }
  WriteTrace TakeTrace() {
    WriteTrace trace = trace_;
    trace_.clear();
    return trace;
  }

  Result<void> LockDirectory() override { return disk_->LockDirectory(); }
  Result<std::vector<DirectoryEntry>> List() override { return disk_->List(); }
  Result<DiskFile> Open(const std::string& name, OpenMode mode, Caching caching) override {
    return disk_->Open(name, mode, caching);
  }
  void Close(FileId file) override { disk_->Close(file); }
  Result<void> Rename(const std::string& from, const std::string& to) override {
    return disk_->Rename(from, to);
  }
  Result<void> Remove(const std::string& name) override { return disk_->Remove(name); }
  Result<void> SyncDirectory() override { return disk_->SyncDirectory(); }
  bool Read(FileId file, uint64_t offset, std::span<std::byte> to, uint64_t tag) override {
    return disk_->Read(file, offset, to, tag);
  }
  bool Write(FileId file, uint64_t offset, std::span<const std::byte> from, uint64_t tag) override {
    const bool taken = disk_->Write(file, offset, from, tag);
    if (taken) trace_.push_back(static_cast<uint32_t>(from.size()));
    return taken;
  }
  bool Flush(FileId file, uint64_t tag) override {
    const bool taken = disk_->Flush(file, tag);
    if (taken) trace_.push_back(0);
    return taken;
  }
  size_t Poll(std::span<DiskCompletion> out) override { return disk_->Poll(out); }
  uint32_t in_flight() const override { return disk_->in_flight(); }
  void Wait(int64_t timeout_ns) override { disk_->Wait(timeout_ns); }
  const std::string& directory() const override { return disk_->directory(); }
  std::string_view backend() const override { return disk_->backend(); }

 private:
  std::unique_ptr<Disk> disk_;
  WriteTrace trace_;
};

// What takes turns in one round needs of its disk.
struct Place {
  const Options* options = nullptr;
  Clock* clock = nullptr;
  std::string folder;

  std::unique_ptr<Disk> MakeDisk(const std::string& name, const DiskOptions& disk_options) const {
    return Must(CreateDisk(options->posix ? DiskBackend::kPosix : DiskBackend::kAuto,
                           folder + "/" + name, disk_options, nullptr));
  }
};

struct AlignedMemory {
  AlignedMemory(size_t bytes, HugePagePolicy policy)
      : arena(Must(HugePageArena::Create({.reserve_bytes = bytes, .huge_pages = policy}))),
        span(arena.Allocate(bytes, kLogPageBytes), bytes) {
    std::memset(span.data(), 1, span.size());
  }
  HugePageArena arena;
  std::span<std::byte> span;
};

// One log: what LogStore makes of it, and segments that are freed as soon as they are full.
class BenchLog {
 public:
  BenchLog(const Place& place, const std::string& name, uint64_t round_bytes)
      : writer_options_{.block_bytes = place.options->block_bytes,
                        .max_writes = place.options->max_writes},
        memory_(LogWriter::MemoryBytes(writer_options_), HugePagePolicy::kTransparent),
        ahead_(static_cast<uint32_t>(round_bytes / kSegmentBytes + 3)) {
    disk_ = std::make_unique<TracedDisk>(
        place.MakeDisk(name, {.max_in_flight = 64, .registered_buffers = {memory_.span}}));
    keeper_disk_ = place.MakeDisk(name, {.max_in_flight = 8, .registered_buffers = {}});
    writer_ = std::make_unique<LogWriter>(writer_options_, disk_.get(), &handoff_, memory_.span);
    keeper_ = std::make_unique<SegmentKeeper>(
        SegmentKeeperOptions{.segment_bytes = kSegmentBytes, .ahead = ahead_, .spare = 2 * ahead_},
        keeper_disk_.get(), place.clock, &handoff_);
  }

  LogWriter& writer() { return *writer_; }
  ShardStorage Storage() {
    ShardStorage storage;
    storage.log = writer_.get();
    storage.sources.push_back({.log = 0, .disk = disk_.get()});
    return storage;
  }
  // The writer has started, by itself or by its shard.
  void Prepare() {
    Must(keeper_->Start(handoff_.current.load()));
    Recycle();
  }
  // Enough is there for a round.
  void Recycle() {
    while (keeper_->segments().begin()->first < handoff_.current.load()) {
      keeper_->Free(keeper_->segments().begin()->first);
    }
    while (handoff_.prepared.load() < handoff_.current.load() + ahead_) {
      keeper_->Poll();
      keeper_disk_->Wait(kNanosPerMilli);
      CHECK(handoff_.trouble.load() == SegmentTrouble::kNone, "there is room on the disk");
    }
    (void)disk_->TakeTrace();
  }
  WriteTrace TakeTrace() { return disk_->TakeTrace(); }

 private:
  const LogWriterOptions writer_options_;
  AlignedMemory memory_;
  const uint32_t ahead_;
  SegmentHandoff handoff_;
  std::unique_ptr<TracedDisk> disk_;
  std::unique_ptr<Disk> keeper_disk_;
  std::unique_ptr<LogWriter> writer_;
  std::unique_ptr<SegmentKeeper> keeper_;
};

// The plain writer.
class Floor {
 public:
  Floor(const Place& place, uint64_t file_bytes)
      : clock_(place.clock),
        block_bytes_(place.options->block_bytes),
        max_writes_(place.options->max_writes),
        memory_(size_t{kBuffers} * block_bytes_, HugePagePolicy::kTransparent),
        disk_(place.MakeDisk("floor", {.max_in_flight = 64, .registered_buffers = {memory_.span}})),
        file_bytes_((file_bytes + block_bytes_ - 1) / block_bytes_ * block_bytes_) {
    SplitMix64 random(3);
    for (size_t at = 0; at < memory_.span.size(); at += 8) {
      const uint64_t bits = random.Next();
      std::memcpy(memory_.span.data() + at, &bits, 8);
    }
    file_ = Must(disk_->Open("floor.log", OpenMode::kCreate, Caching::kDirect)).id;
    for (uint64_t at = 0; at < file_bytes_; at += block_bytes_) {
      CHECK(disk_->Write(file_, at, memory_.span.first(block_bytes_), 0), "one at a time");
      WaitFor(0);
    }
    CHECK(disk_->Flush(file_, 0), "nothing is under way");
    WaitFor(0);
  }

  // All writes between two flushes together, then a flush. Seconds.
  double Replay(const WriteTrace& trace) {
    const int64_t start_ns = clock_->MonotonicNs();
    for (const uint32_t bytes : trace) {
      if (bytes == 0) {
        WaitFor(0);
        CHECK(disk_->Flush(file_, kFlush), "nothing is under way");
        WaitFor(0);
      } else {
        WaitFor(max_writes_ - 1);
        Write(bytes);
      }
    }
    WaitFor(0);
    return SecondsSince(start_ns, clock_);
  }

  // The same writes; a flush whenever there is something to flush and none is under way.
  double ReplayDeep(const WriteTrace& trace) {
    const int64_t start_ns = clock_->MonotonicNs();
    size_t next = 0;
    uint32_t writing = 0;
    bool flushing = false;
    bool dirty = false;
    uint32_t unflushed = 0;  // buffers that are not to be used again yet
    uint32_t flushed = 0;
    while (true) {
      while (next < trace.size() && trace[next] == 0) ++next;
      if (next == trace.size() && writing == 0 && !flushing && !dirty) break;
      if (next < trace.size() && writing < max_writes_ && unflushed < kBuffers) {
        Write(trace[next++]);
        ++writing;
        ++unflushed;
      }
      if (dirty && !flushing) {
        CHECK(disk_->Flush(file_, kFlush), "there is room");
        flushing = true;
        dirty = false;
        flushed = unflushed - writing;
      }
      std::array<DiskCompletion, 8> ends;
      const size_t count = disk_->Poll(ends);
      for (size_t i = 0; i < count; ++i) {
        CHECK(ends[i].error == 0, "the disk works");
        if (ends[i].tag == kFlush) {
          flushing = false;
          unflushed -= flushed;
        } else {
          --writing;
          dirty = true;
        }
      }
    }
    return SecondsSince(start_ns, clock_);
  }

 private:
  static constexpr uint32_t kBuffers = 8;
  static constexpr uint64_t kFlush = 1;

  void Write(uint32_t bytes) {
    if (at_ + bytes > file_bytes_) at_ = 0;
    CHECK(disk_->Write(file_, at_, memory_.span.subspan(turn_ * block_bytes_, bytes), 0),
          "there is room");
    at_ += bytes;
    turn_ = (turn_ + 1) % kBuffers;
  }
  void WaitFor(uint32_t most) {
    std::array<DiskCompletion, 8> ends;
    while (disk_->in_flight() > most) {
      const size_t count = disk_->Poll(ends);
      for (size_t i = 0; i < count; ++i) CHECK(ends[i].error == 0, "the disk works");
    }
  }

  Clock* const clock_;
  const uint32_t block_bytes_;
  const uint32_t max_writes_;
  AlignedMemory memory_;
  std::unique_ptr<Disk> disk_;
  const uint64_t file_bytes_;
  FileId file_;
  uint64_t at_ = 0;
  size_t turn_ = 0;
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
  if (auto topology = DiscoverTopology()) (void)PinThisThread(topology->cpus.front().os_index);
  SystemClock clock;
  std::string folder = options.dir + "/durable_ingest_XXXXXX";
  if (mkdtemp(folder.data()) == nullptr) {
    std::perror(folder.c_str());
    return 1;
  }
  const Place place{.options = &options, .clock = &clock, .folder = folder};
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
    const size_t legs = static_cast<size_t>(options.rounds) + 1 + 4;
    const size_t memory =
        (size_t{1} << 30) + legs * options.observations * (2 * feed.body_bytes() + 2'048);
    ShardContender shard(place, &feed, std::string("shard-") + each.name,
                         options.observations * RecordBytes(feed), memory);
    Rounds log_rounds;
    Rounds shard_rounds;
    for (int round = 0; round < options.rounds + 1; ++round) {  // The first one warms up.
      Rounds unused;
      log.log().Recycle();
      const double log_seconds = log.Run(&feed, options.observations);
      (round == 0 ? unused : log_rounds)
          .Add(log.log().TakeTrace(), options.observations, log_seconds, &floor);
      const double shard_seconds = shard.Run(options.observations);
      (round == 0 ? unused : shard_rounds)
          .Add(shard.log().TakeTrace(), options.observations, shard_seconds, &floor);
    }
    PrintRounds(options, each.name, "log", log_rounds);
    PrintRounds(options, each.name, "shard", shard_rounds);
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
