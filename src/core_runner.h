#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/clock.h"
#include "src/core/counters.h"

namespace engram {

// What a core does when a round found nothing to do.
enum class IdleStrategy : uint8_t {
  kSpin,    // look again at once: lowest latency, a whole processor
  kHybrid,  // look again for 50 us, then sleep
  kSleep,   // sleep at once
};

enum class RunnerCounter : uint8_t { kRounds, kBusyRounds, kSleeps, kLongestRoundNs, kCount };

// One thread's loop: polls its components in turn, sleeps when none has work, and is woken by the
// runners that may have work for it.
//
// Thread safety: Run is called by the thread that owns the components; Stop, WakeIfSleeping and the
// counters may be used by any.
// Invariants: a runner that declared itself asleep has looked once more afterwards. A peer first
// publishes work, then looks whether the runner sleeps. So either sees the other (Dekker's pattern,
// with sequentially consistent fences), and no wake-up is lost.
class CoreRunner {
 public:
  // Looks for work once; returns how much it did.
  using PollFn = std::function<int()>;
  struct Sleeper {
    std::function<void(int64_t timeout_ns)> wait;
    std::function<void()> wake;
  };

  CoreRunner(std::string name, IdleStrategy idle, Clock* clock, Sleeper sleeper);
  CoreRunner(const CoreRunner&) = delete;
  CoreRunner& operator=(const CoreRunner&) = delete;

  // Before Run.
  void AddPoll(PollFn poll) { polls_.push_back(std::move(poll)); }
  void AddPeer(CoreRunner* peer) { peers_.push_back(peer); }

  // Until Stop.
  void Run();
  void Stop();
  void WakeIfSleeping();

  void AddCounters(CounterCatalogue* catalogue) const;
  const std::string& name() const { return name_; }

 private:
  int Round();
  void WakePeers();
  void Sleep();

  // Constant once Run began.
  const std::string name_;
  const IdleStrategy idle_;
  Clock* const clock_;
  const Sleeper sleeper_;
  std::vector<PollFn> polls_;
  std::vector<CoreRunner*> peers_;
  // Shared. alignas: peers look at it each round; kept off the lines that the owner writes.
  alignas(kFalseSharingBytes) std::atomic<bool> sleeping_{false};
  std::atomic<bool> stop_{false};
  // Owner only, read by others.
  CounterSet<RunnerCounter, static_cast<size_t>(RunnerCounter::kCount)> counters_;
};

}  // namespace engram
