#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "src/core/admission_board.h"
#include "src/core/clock.h"
#include "src/core/counters.h"

namespace engram {

// What the controller sees of one shard: counters that its cores write.
struct ShardGauges {
  // Observations that were pushed to it, by each producer, and that it has answered, ever.
  std::vector<const Counter*> pushed{};
  const Counter* settled = nullptr;
  // What waits to be linked, and how much of that recalls bear.
  const Counter* backlog = nullptr;
  const Counter* backlog_limit = nullptr;
};

struct AdmissionOptions {
  int64_t period_ns = 5 * kNanosPerMilli;
  // What waits is to be settled within this: a shard's capacity is what it settles meanwhile.
  int64_t queue_ns = 50 * kNanosPerMilli;
  uint32_t least_capacity = 1'024;
  uint32_t most_capacity = 8'192;
  uint32_t least_batch = 32;
  uint32_t most_batch = 256;
  int64_t most_retry_ns = 5 * kNanosPerSecond;
};

enum class AdmissionCounter : uint8_t {
  kSamples,
  kBackpressureActivations,  // a shard's state rose to kBackpressure or beyond it
  kOverloadActivations,
  kCount,
};

// Reads how much waits for each shard and how fast it is settled, and publishes what may be
// admitted: states with hysteresis, batches, and when to come again.
//
// 1. Sample: depth = pushed - settled; settled a second since the last sample.
// 2. The rate. While a shard has work all the time, what it settles is what it can: a moving
//    average. Else it can at least as much as it did: the average only rises.
// 3. The capacity: what is settled within queue_ns, within bounds. The pressure: the larger of
//    depth / capacity and backlog / backlog_limit.
// 4. The state: see LoadState. Retry: until depth is half of the capacity, at that rate.
//
// Thread safety: one core's alone; the counters may be read by others.
class AdmissionController {
 public:
  // `clock` and `board` outlive it; one gauge a shard of the board.
  AdmissionController(const AdmissionOptions& options, Clock* clock,
                      std::vector<ShardGauges> gauges, AdmissionBoard* board);

  // Does something each period_ns; returns whether it did.
  int Poll();

  void AddCounters(std::string_view core, CounterCatalogue* catalogue) const;

 private:
  struct Shard {
    ShardGauges gauges;
    uint64_t settled = 0;  // at the last sample
    bool was_busy = false;
    double per_second = 0;
    LoadState state = LoadState::kNormal;
  };

  AdmissionLimits Sample(Shard* shard, double seconds);
  void MeasureRate(Shard* shard, uint64_t settled, bool is_busy, double seconds) const;
  uint32_t CapacityOf(double per_second) const;
  uint32_t RetryAfterMs(double above_half, double per_second) const;
  uint32_t BatchAt(float pressure) const;
  static LoadState Next(LoadState state, float pressure);

  const AdmissionOptions options_;
  Clock* const clock_;
  AdmissionBoard* const board_;
  std::vector<Shard> shards_;
  LoadState global_ = LoadState::kNormal;
  int64_t sampled_ns_ = 0;
  CounterSet<AdmissionCounter, static_cast<size_t>(AdmissionCounter::kCount)> counters_;
};

}  // namespace engram
