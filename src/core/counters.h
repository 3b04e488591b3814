#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/spsc_ring.h"

namespace engram {

// A number that one core writes and anyone reads. No read-modify-write instruction: the writer is
// alone.
class Counter {
 public:
  void Add(uint64_t amount) {
    value_.store(value_.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
  }
  void Set(uint64_t value) { value_.store(value, std::memory_order_relaxed); }
  void SetMax(uint64_t value) {
    if (value > Read()) Set(value);
  }
  uint64_t Read() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

// The counters of one core: an enum `E` with values 0 .. kCount - 1 names them.
// alignas: a core's counters are its own lines, else every increment would be shared traffic.
template <typename E, size_t kCount>
class alignas(kFalseSharingBytes) CounterSet {
 public:
  Counter& operator[](E which) { return counters_[static_cast<size_t>(which)]; }
  const Counter& operator[](E which) const { return counters_[static_cast<size_t>(which)]; }

 private:
  std::array<Counter, kCount> counters_{};
};

// Where to read a counter, for the control plane.
struct CounterView {
  std::string core;       // "ingress0", "shard1"
  std::string_view name;  // "observations_accepted"
  const Counter* counter;
};
using CounterCatalogue = std::vector<CounterView>;

}  // namespace engram
