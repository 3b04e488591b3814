#pragma once

#include <atomic>
#include <cstdint>

#include "src/core/check.h"

namespace engram {

inline constexpr int64_t kNanosPerMicro = 1'000;
inline constexpr int64_t kNanosPerMilli = 1'000'000;
inline constexpr int64_t kNanosPerSecond = 1'000'000'000;

// Where a core gets the time from. One call costs some 25 ns with the system's clock, so a Poll
// reads it once and passes it on.
class Clock {
 public:
  virtual ~Clock() = default;
  // Nanoseconds since an arbitrary point; never goes back.
  virtual int64_t MonotonicNs() = 0;
  // Nanoseconds since 1970-01-01T00:00:00Z.
  virtual int64_t WallNs() = 0;
  // From now on WallNs is later than `unix_ns`, for all who use this clock. At a restart it may
  // have been set back, and what happens next must not look earlier than what is on disk.
  virtual void PassWallNs(int64_t unix_ns) = 0;
};

// Its wall clock is read once, at construction, and goes on with the monotonic one: it never goes
// back, whatever the operator or NTP does meanwhile, as the order of commit stamps is the order of
// what happened. One for all cores of a process.
//
// Thread safety: any thread may call anything.
class SystemClock final : public Clock {
 public:
  SystemClock();
  int64_t MonotonicNs() override;
  int64_t WallNs() override {
    return wall_offset_ns_.load(std::memory_order_relaxed) + MonotonicNs();
  }
  void PassWallNs(int64_t unix_ns) override;

 private:
  std::atomic<int64_t> wall_offset_ns_;  // only rises
};

// A clock that a test steps.
class SimulatedClock final : public Clock {
 public:
  explicit SimulatedClock(int64_t start_ns = kNanosPerSecond) : now_ns_(start_ns) {}
  int64_t MonotonicNs() override { return now_ns_; }
  int64_t WallNs() override { return wall_offset_ns_ + now_ns_; }
  void PassWallNs(int64_t unix_ns) override {
    if (WallNs() <= unix_ns) wall_offset_ns_ = unix_ns + 1 - now_ns_;
  }
  void AdvanceNs(int64_t step_ns) {
    CHECK(step_ns >= 0, "time does not go back");
    now_ns_ += step_ns;
  }
  // Someone sets the clock on the wall, forth or back.
  void StepWallNs(int64_t step_ns) { wall_offset_ns_ += step_ns; }

 private:
  int64_t now_ns_;
  int64_t wall_offset_ns_ = 1'700'000'000 * kNanosPerSecond;
};

}  // namespace engram
