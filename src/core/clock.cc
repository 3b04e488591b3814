#include "src/core/clock.h"

#include <ctime>

namespace engram {

namespace {

int64_t ReadNs(clockid_t id) {
  timespec now{};
  clock_gettime(id, &now);
  return int64_t{now.tv_sec} * kNanosPerSecond + now.tv_nsec;
}

}  // namespace

SystemClock::SystemClock() : wall_offset_ns_(ReadNs(CLOCK_REALTIME) - ReadNs(CLOCK_MONOTONIC)) {}

int64_t SystemClock::MonotonicNs() { return ReadNs(CLOCK_MONOTONIC); }

void SystemClock::PassWallNs(int64_t unix_ns) {
  const int64_t wanted = unix_ns + 1 - MonotonicNs();
  int64_t offset = wall_offset_ns_.load(std::memory_order_relaxed);
  while (offset < wanted && !wall_offset_ns_.compare_exchange_weak(offset, wanted)) {
  }
}

}  // namespace engram
