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

}  // namespace engram
