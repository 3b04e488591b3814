#include "src/core_runner.h"

#include <hwy/cache_control.h>

#include <array>
#include <utility>

namespace engram {

namespace {

constexpr int64_t kHybridSpinNs = 50 * kNanosPerMicro;
// Timeouts are looked after even when nothing arrives.
constexpr int64_t kLongestSleepNs = 20 * kNanosPerMilli;

}  // namespace

CoreRunner::CoreRunner(std::string name, IdleStrategy idle, Clock* clock, Sleeper sleeper)
    : name_(std::move(name)), idle_(idle), clock_(clock), sleeper_(std::move(sleeper)) {}

void CoreRunner::Run() {
  int64_t idle_since_ns = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    const int64_t began_ns = clock_->MonotonicNs();
    if (Round() > 0) {
      counters_[RunnerCounter::kBusyRounds].Add(1);
      counters_[RunnerCounter::kLongestRoundNs].SetMax(
          static_cast<uint64_t>(clock_->MonotonicNs() - began_ns));
      WakePeers();
      idle_since_ns = 0;
      continue;
    }
    if (idle_since_ns == 0) idle_since_ns = began_ns;
    const bool spin = idle_ == IdleStrategy::kSpin ||
                      (idle_ == IdleStrategy::kHybrid && began_ns - idle_since_ns < kHybridSpinNs);
    if (spin) {
      hwy::Pause();
    } else {
      Sleep();
      idle_since_ns = 0;
    }
  }
}

int CoreRunner::Round() {
  counters_[RunnerCounter::kRounds].Add(1);
  int work = 0;
  for (const PollFn& poll : polls_) work += poll();
  return work;
}

void CoreRunner::WakePeers() {
  if (peers_.empty()) return;
  // What this round pushed is visible before the flags are read.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (CoreRunner* peer : peers_) peer->WakeIfSleeping();
}

void CoreRunner::WakeIfSleeping() {
  if (sleeping_.load(std::memory_order_relaxed)) sleeper_.wake();
}

void CoreRunner::Sleep() {
  sleeping_.store(true, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (Round() > 0) {
    sleeping_.store(false, std::memory_order_relaxed);
    WakePeers();
    return;
  }
  if (!stop_.load(std::memory_order_relaxed)) sleeper_.wait(kLongestSleepNs);
  sleeping_.store(false, std::memory_order_relaxed);
  counters_[RunnerCounter::kSleeps].Add(1);
}

void CoreRunner::Stop() {
  stop_.store(true, std::memory_order_relaxed);
  sleeper_.wake();
}

void CoreRunner::AddCounters(CounterCatalogue* catalogue) const {
  static constexpr std::array<std::string_view, static_cast<size_t>(RunnerCounter::kCount)> kNames =
      {"rounds", "busy_rounds", "sleeps", "longest_round_ns"};
  for (size_t i = 0; i < kNames.size(); ++i) {
    catalogue->push_back({name_, kNames[i], &counters_[static_cast<RunnerCounter>(i)]});
  }
}

}  // namespace engram
