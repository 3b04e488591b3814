#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "index/shard.h"
#include "perf/grown_set.h"
#include "perf/shard_producer.h"
#include "perf/vector_set.h"
#include "src/core/latency_histogram.h"

namespace engram {

// What is fed: observation number i has id IdOf(i), and one that has an id again replaces what had
// it.
class FedRows {
 public:
  virtual ~FedRows() = default;
  virtual uint64_t IdOf(uint64_t number) const = 0;
  virtual void Make(uint64_t number, std::span<float> row) const = 0;
};

// Ever more rows: those of a set and others like them.
class GrowingFeed final : public FedRows {
 public:
  explicit GrowingFeed(const GrownRows& rows) : rows_(rows) {}
  uint64_t IdOf(uint64_t number) const override { return number; }
  void Make(uint64_t number, std::span<float> row) const override { rows_.Make(number, row); }

 private:
  const GrownRows& rows_;
};

// A set's rows again and again, so that it neither grows nor stays as it is: an id gets another row
// of the set with each turn.
class ReplacingFeed final : public FedRows {
 public:
  explicit ReplacingFeed(const VectorSet& rows) : rows_(rows) {}
  uint64_t IdOf(uint64_t number) const override { return number % rows_.size(); }
  void Make(uint64_t number, std::span<float> row) const override {
    std::ranges::copy(rows_[RowOf(number)], row.begin());
  }
  size_t RowOf(uint64_t number) const {
    constexpr uint64_t kShift = 7'919;
    return (number + kShift * (number / rows_.size())) % rows_.size();
  }
  // The observation that an id is, once `lived` were stored.
  uint64_t NumberOf(uint64_t id, uint64_t lived) const {
    return (lived - 1 - id) / rows_.size() * rows_.size() + id;
  }

 private:
  const VectorSet& rows_;
};

struct FeedOptions {
  SpaceOptions space;  // metric, precision, traversal
  ShardOptions shard;
  uint32_t k = 10;
  int shard_processor = 0;
  int feed_processor = 1;
  bool times_slices = false;  // of processor time, which takes some 2 % of it
  std::string folder;         // of the log; empty: no log
};

// A recall that was answered.
struct AnsweredRecall {
  size_t query = 0;
  uint64_t lived = 0;  // observations that were acknowledged when it was sent
  // The id of an observation that had just been acknowledged and was asked for, else kNoId.
  uint64_t own = UINT64_MAX;
  std::vector<uint64_t> hits;  // ids, nearest first
};
inline constexpr uint64_t kNoId = UINT64_MAX;

// What went on between two moments.
struct FeedPhase {
  double seconds = 0;
  uint64_t accepted = 0;
  uint64_t due = 0;  // observations that the schedule asked for by the end
  uint64_t linked = 0;
  uint64_t backlog = 0;       // not linked, at the end
  uint64_t memory_bytes = 0;  // of the shard, in use at the end
  uint64_t recalls = 0;
  uint64_t recall_vectors = 0;
  uint64_t recall_bytes = 0;
  LatencyHistogram recall;   // from due to answered
  LatencyHistogram visible;  // an observation, from due to acknowledged
  LatencyHistogram slice;    // of the shard's rounds, processor time; with times_slices
  std::vector<AnsweredRecall> sampled;
};

// A shard on a thread of its own, and, on the caller's thread, a client that sends observations and
// recalls by the clock, whatever the answers (open loop).
class StreamingFeed {
 public:
  // `rows` and `queries` stay. Ends the program where the shard cannot be made.
  StreamingFeed(const FeedOptions& options, const FedRows& rows, const VectorSet& queries);
  StreamingFeed(const StreamingFeed&) = delete;
  StreamingFeed& operator=(const StreamingFeed&) = delete;
  ~StreamingFeed();

  struct Schedule {
    double observations_per_s = 0;  // kAsCreditAllows: closed loop
    double recalls_per_s = 0;
    double seconds = 0;  // 0: until `is_done`
    std::function<bool()> is_done{};
    size_t samples = 0;      // recalls that are kept, evenly
    uint32_t own_every = 0;  // one of so many asks for what was just acknowledged; 0: none
  };
  static constexpr double kAsCreditAllows = -1;
  std::unique_ptr<FeedPhase> Run(const Schedule& schedule);
  // Sends and waits until all is linked.
  void Preload(uint64_t observations);
  void Drain();

  uint64_t sent() const { return producer_->sent(); }
  // Observations that are not linked, and whether there are none. Stops the shard for a moment.
  uint64_t backlog();
  bool IsDrained();
  // Calls `work` with the shard at rest.
  void WithShardAtRest(const std::function<void(const Shard&)>& work);
  const VectorSet& queries() const { return queries_; }
  static constexpr std::string_view kSpaceName = "streamed";

 private:
  struct Place;
  struct Counts {
    uint64_t acked = 0;
    uint64_t linked = 0;
    uint64_t vectors = 0;
    uint64_t bytes = 0;
  };
  struct UnderWay {
    int64_t due_ns;
    bool is_sampled;
    AnsweredRecall recall;
  };

  void RunShard();
  Counts CountsNow() const;
  void SendObservation(int64_t due_ns);
  bool SendRecall(int64_t due_ns, const Schedule& schedule);
  void TakeAnswers(FeedPhase* phase);
  void TakeHits(uint64_t id, const std::byte* slot);

  const FeedOptions options_;
  const FedRows& rows_;
  const VectorSet& queries_;
  std::unique_ptr<Place> place_;
  Shard* shard_ = nullptr;
  ShardProducer* producer_ = nullptr;
  std::vector<float> row_;
  std::vector<int64_t> due_of_;  // a ring, by sequence
  uint64_t told_ = 0;            // acknowledgements whose times were recorded
  std::unordered_map<uint64_t, UnderWay> under_way_;
  uint64_t recalls_sent_ = 0;
  int64_t next_look_ns_ = 0;
  double sample_due_ = 0;
  // Shared with the shard's thread.
  std::atomic<LatencyHistogram*> slices_{nullptr};
  std::atomic<bool> wants_rest_{false};
  std::atomic<bool> rests_{false};
  std::atomic<bool> stops_{false};
  std::thread thread_;
};

}  // namespace engram
