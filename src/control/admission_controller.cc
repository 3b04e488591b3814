#include "src/control/admission_controller.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "src/core/check.h"

namespace engram {

namespace {

constexpr float kGrowingFrom = 0.5F;
constexpr float kBackpressureFrom = 0.8F;
constexpr float kOverloadedFrom = 0.9F;
// Half of what the rate is made of is younger than this.
constexpr double kRateHalfLifeSeconds = 0.1;

}  // namespace

AdmissionController::AdmissionController(const AdmissionOptions& options, Clock* clock,
                                         std::vector<ShardGauges> gauges, AdmissionBoard* board)
    : options_(options), clock_(clock), board_(board), sampled_ns_(clock->MonotonicNs()) {
  CHECK(gauges.size() == board->shards(), "each shard has its gauges");
  for (ShardGauges& gauge : gauges) {
    shards_.push_back({.gauges = std::move(gauge)});
    shards_.back().settled = shards_.back().gauges.settled->Read();
  }
  // So that what is read before the first sample is sound.
  const AdmissionLimits calm{.queue_capacity = options_.least_capacity,
                             .batch = options_.least_batch};
  for (uint16_t s = 0; s < board_->shards(); ++s) board_->Publish(ShardId(s), calm);
  board_->PublishGlobal(calm);
}

int AdmissionController::Poll() {
  const int64_t now_ns = clock_->MonotonicNs();
  if (now_ns - sampled_ns_ < options_.period_ns) return 0;
  const double seconds = static_cast<double>(now_ns - sampled_ns_) / kNanosPerSecond;
  sampled_ns_ = now_ns;
  AdmissionLimits all;
  float highest = 0;
  for (uint16_t s = 0; s < board_->shards(); ++s) {
    const AdmissionLimits limits = Sample(&shards_[s], seconds);
    board_->Publish(ShardId(s), limits);
    all.queue_depth += limits.queue_depth;
    all.queue_capacity += limits.queue_capacity;
    all.settled_per_second += limits.settled_per_second;
    all.retry_after_ms = std::max(all.retry_after_ms, limits.retry_after_ms);
    highest = std::max(highest, limits.pressure);
  }
  const float taken = static_cast<float>(all.queue_depth) / static_cast<float>(all.queue_capacity);
  all.pressure = std::min(1.0F, std::max(taken, highest / static_cast<float>(shards_.size())));
  global_ = Next(global_, all.pressure);
  all.state = global_;
  all.batch = BatchAt(all.pressure);
  board_->PublishGlobal(all);
  counters_[AdmissionCounter::kSamples].Add(1);
  return 1;
}

AdmissionLimits AdmissionController::Sample(Shard* shard, double seconds) {
  const ShardGauges& gauges = shard->gauges;
  // Before what was pushed, so that the difference is not below 0.
  const uint64_t settled = gauges.settled->Read();
  uint64_t pushed = 0;
  for (const Counter* counter : gauges.pushed) pushed += counter->Read();
  const uint64_t depth = pushed - std::min(pushed, settled);
  MeasureRate(shard, settled, depth > 0, seconds);

  AdmissionLimits limits;
  limits.queue_depth = static_cast<uint32_t>(std::min<uint64_t>(depth, UINT32_MAX));
  limits.queue_capacity = CapacityOf(shard->per_second);
  limits.settled_per_second = static_cast<float>(shard->per_second);
  const auto queued = static_cast<float>(depth) / static_cast<float>(limits.queue_capacity);
  const uint64_t most_backlog = gauges.backlog_limit->Read();
  const float unlinked = most_backlog == 0 ? 0
                                           : static_cast<float>(gauges.backlog->Read()) /
                                                 static_cast<float>(most_backlog);
  limits.pressure = std::min(1.0F, std::max(queued, unlinked));
  const LoadState before = std::exchange(shard->state, Next(shard->state, limits.pressure));
  limits.state = shard->state;
  if (before < LoadState::kBackpressure && limits.state >= LoadState::kBackpressure) {
    counters_[AdmissionCounter::kBackpressureActivations].Add(1);
  }
  if (before < LoadState::kOverloaded && limits.state == LoadState::kOverloaded) {
    counters_[AdmissionCounter::kOverloadActivations].Add(1);
  }
  limits.retry_after_ms =
      RetryAfterMs(static_cast<double>(depth) - limits.queue_capacity / 2.0, shard->per_second);
  limits.batch = BatchAt(limits.pressure);
  return limits;
}

void AdmissionController::MeasureRate(Shard* shard, uint64_t settled, bool is_busy,
                                      double seconds) const {
  const double rate = static_cast<double>(settled - shard->settled) / seconds;
  shard->settled = settled;
  const bool was_busy = std::exchange(shard->was_busy, is_busy);
  // It may have waited for work between two samples, and could have done more then.
  if (rate < shard->per_second && !(is_busy && was_busy)) return;
  const double weight = 1 - std::exp2(-seconds / kRateHalfLifeSeconds);
  shard->per_second += (rate - shard->per_second) * weight;
}

uint32_t AdmissionController::CapacityOf(double per_second) const {
  const double in_time = per_second * static_cast<double>(options_.queue_ns) / kNanosPerSecond;
  return static_cast<uint32_t>(std::clamp(in_time, static_cast<double>(options_.least_capacity),
                                          static_cast<double>(options_.most_capacity)));
}

uint32_t AdmissionController::RetryAfterMs(double above_half, double per_second) const {
  if (above_half <= 0) return 1;
  const double most_ms = static_cast<double>(options_.most_retry_ns) / kNanosPerMilli;
  if (per_second <= 0) return static_cast<uint32_t>(most_ms);
  return static_cast<uint32_t>(
      std::clamp(std::ceil(above_half / per_second * 1'000), 1.0, most_ms));
}

// From half of the capacity on as many more as are wanted at nine tenths.
uint32_t AdmissionController::BatchAt(float pressure) const {
  const float part =
      std::clamp((pressure - kGrowingFrom) / (kOverloadedFrom - kGrowingFrom), 0.0F, 1.0F);
  const auto more = static_cast<float>(options_.most_batch - options_.least_batch);
  return options_.least_batch + static_cast<uint32_t>(more * part);
}

LoadState AdmissionController::Next(LoadState state, float pressure) {
  LoadState reached = LoadState::kNormal;
  if (pressure >= kGrowingFrom) reached = LoadState::kGrowing;
  if (pressure >= kBackpressureFrom) reached = LoadState::kBackpressure;
  if (pressure >= kOverloadedFrom) reached = LoadState::kOverloaded;
  return pressure < kGrowingFrom ? LoadState::kNormal : std::max(state, reached);
}

void AdmissionController::AddCounters(std::string_view core, CounterCatalogue* catalogue) const {
  const auto add = [&](std::string_view name, AdmissionCounter which) {
    catalogue->push_back({std::string(core), name, &counters_[which]});
  };
  add("admission_samples", AdmissionCounter::kSamples);
  add("backpressure_activations", AdmissionCounter::kBackpressureActivations);
  add("overload_activations", AdmissionCounter::kOverloadActivations);
}

}  // namespace engram
