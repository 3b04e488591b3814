#include "perf/engram_index.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "index/recall_job.h"
#include "index/space_linker.h"
#include "perf/bench_support.h"
#include "src/core/arena_heap.h"
#include "src/core/check.h"
#include "src/core/huge_page_arena.h"
#include "src/core/observation.h"
#include "src/core/reader_epochs.h"
#include "src/core/shard_port.h"

namespace engram {

namespace {

// As the shard slices linking between observations, and recalls.
constexpr uint32_t kLinkSliceDistances = 256;
// Beside its vectors and links, what a row may take with the rounding of blocks, and what a space
// takes in any case.
constexpr size_t kRowOverheadBytes = 1024;
constexpr size_t kFixedBytes = size_t{256} << 20;

size_t ArenaBytes(const SpaceOptions& options, size_t capacity) {
  // As f32 and as int8, whatever is kept of them.
  const size_t vector_bytes = size_t{options.dimension} * (sizeof(float) + 1);
  const size_t link_bytes = size_t{2} * options.build.M0 * sizeof(NodeId);
  return kFixedBytes + capacity * (vector_bytes + link_bytes + kRowOverheadBytes) * 5 / 4;
}

HugePageArena MakeArena(size_t bytes) {
  auto arena = HugePageArena::Create({.reserve_bytes = bytes});
  CHECK(arena.has_value(), "memory for the index");
  return *std::move(arena);
}

class EngramIndex final : public ComparedIndex {
 public:
  EngramIndex(const SpaceOptions& options, uint32_t batch, size_t capacity,
              LatencyHistogram* slices)
      : arena_(MakeArena(ArenaBytes(options, capacity))),
        heap_(&arena_),
        space_("compared", options, &heap_, &epochs_),
        linker_(&heap_, options.build, batch),
        batch_(batch),
        slices_(slices),
        slot_(kResultSlotBytes) {
    for (Asked& asked : asked_)
      asked.job = std::make_unique<RecallJob>(&heap_, nullptr, RecallJob::Core::kOfShard);
    (void)arena_.PrefaultAhead(arena_.reserve_bytes(), arena_.reserve_bytes());
  }

  void Insert(const VectorSet& base, size_t first, size_t last) override {
    while (first < last) {
      const size_t end = std::min(first + batch_, last);
      for (; first < end; ++first) Store(base, first);
      LinkAll();
    }
  }

  size_t linked() const override { return space_.linked(); }

  void Recall(const VectorSet& queries, size_t first, size_t last, uint32_t k, uint32_t ef,
              int64_t* rows) override {
    RecallRequest request;
    request.dtype = VectorDtype::kF32;
    request.dimension = static_cast<uint16_t>(queries.dimension());
    request.k = k;
    request.ef = ef;
    size_t next = first;
    for (size_t answered = first; answered < last;) {
      for (Asked& asked : asked_) {
        if (asked.rows == nullptr) {
          if (next == last) continue;
          const RefusalReason reason = asked.job->Begin(space_, request, queries.Bytes(next), ef);
          CHECK(reason == RefusalReason::kNone, "a recall was refused");
          asked.rows = rows + (next++ - first) * k;
        } else if (asked.job->Turn()) {
          Emit(asked.job.get(), std::span(std::exchange(asked.rows, nullptr), k));
          ++answered;
        }
      }
    }
  }

  uint64_t bytes() const override { return space_.resident_bytes(); }

  uint64_t distances() const override { return linker_.distances(); }

 private:
  void Store(const VectorSet& base, size_t row) {
    std::array<char, 24> id;
    const auto id_end = std::to_chars(id.data(), id.data() + id.size(), row).ptr;
    ObservationRef observation;
    observation.id = std::string_view(id.data(), static_cast<size_t>(id_end - id.data()));
    observation.dtype = VectorDtype::kF32;
    observation.dimension = base.dimension();
    observation.vector = base.Bytes(row);
    const StoreOutcome outcome = space_.Upsert(observation, ++stamp_);
    CHECK(outcome.reason == RefusalReason::kNone && !outcome.existed, "a row was refused");
  }

  template <typename Slice>
  auto Timed(Slice&& slice) {
    if (slices_ == nullptr) return slice();
    const int64_t begin_ns = ThreadCpuNs();
    const auto result = slice();
    slices_->Record(ThreadCpuNs() - begin_ns);
    return result;
  }

  void LinkAll() {
    for (;;) {
      const SpaceLinker::Begun begun = Timed([this] { return linker_.Begin(&space_); });
      if (begun == SpaceLinker::Begun::kNothing) return;
      CHECK(begun == SpaceLinker::Begun::kStarted, "memory for linking");
      while (!Timed([this] { return linker_.Step(kLinkSliceDistances); })) {
      }
    }
  }

  // Writes the hits in batches and reads their ids back; -1 where there are fewer.
  void Emit(RecallJob* job, std::span<int64_t> rows) {
    std::fill(rows.begin(), rows.end(), -1);
    auto row = rows.begin();
    for (bool last = false; !last;) {
      last = job->EmitBatch(std::span(slot_).first(job->NextBatchBytes(slot_.size())));
      ResultBatch batch;
      std::memcpy(&batch, slot_.data(), sizeof(batch));
      const std::byte* from = slot_.data() + sizeof(batch);
      for (uint16_t i = 0; i < batch.count; ++i) {
        HitHeader header;
        std::memcpy(&header, from, sizeof(header));
        const auto* id = reinterpret_cast<const char*>(from + sizeof(header));
        std::from_chars(id, id + header.id_bytes, *row++);
        from += header.hit_bytes;
      }
    }
  }

  HugePageArena arena_;
  ArenaHeap heap_;
  ReaderEpochs epochs_{1};
  Space space_;
  SpaceLinker linker_;
  const size_t batch_;
  LatencyHistogram* const slices_;
  // Recalls that are searched in turns.
  struct Asked {
    std::unique_ptr<RecallJob> job;
    int64_t* rows = nullptr;  // where the answer goes; nullptr: none is under way
  };
  std::array<Asked, 4> asked_;
  std::vector<std::byte> slot_;
  CommitStamp stamp_ = kNoStamp;
};

}  // namespace

std::unique_ptr<ComparedIndex> MakeEngramIndex(const SpaceOptions& options, uint32_t batch,
                                               size_t capacity, LatencyHistogram* slices) {
  return std::make_unique<EngramIndex>(options, batch, capacity, slices);
}

}  // namespace engram
