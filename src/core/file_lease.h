#pragma once

#include <atomic>
#include <cstdint>

#include "src/core/clock.h"

namespace engram {

// Somebody's right that files stay as they are, which ends by itself unless it is extended: one who
// dies holds nothing for long.
//
// Thread safety: any thread, all of it.
// Invariants: while one owner's lease runs no other gets one; it ends by its owner, or by its time.
class FileLease {
 public:
  using Owner = uint32_t;
  static constexpr Owner kNobody = 0;

  // One that nobody has drawn among the last 16 million.
  Owner NewOwner() {
    for (;;) {
      const Owner owner = drawn_.fetch_add(1, std::memory_order_relaxed) & kOwnerMask;
      if (owner != kNobody) return owner;
    }
  }

  // Begins it, or makes it last until `for_ns` after now. Returns 0, or, while another's runs, for
  // how long that does unless it is extended.
  int64_t Extend(Owner owner, int64_t now_ns, int64_t for_ns) {
    const uint64_t until_ms =
        static_cast<uint64_t>(now_ns + for_ns + kNanosPerMilli - 1) / kNanosPerMilli;
    uint64_t word = word_.load();
    do {
      if (OwnerOf(word) != owner && now_ns < UntilNsOf(word)) return UntilNsOf(word) - now_ns;
    } while (!word_.compare_exchange_weak(word, uint64_t{owner} << kUntilBits | until_ms));
    return 0;
  }
  // Nothing where it is not this owner's.
  void End(Owner owner) {
    uint64_t word = word_.load();
    while (OwnerOf(word) == owner && !word_.compare_exchange_weak(word, 0)) {
    }
  }
  bool Runs(int64_t now_ns) const { return now_ns < UntilNsOf(word_.load()); }

 private:
  static constexpr int kUntilBits = 40;  // of milliseconds: 34 years
  static constexpr Owner kOwnerMask = 0xFFFFFF;

  static Owner OwnerOf(uint64_t word) { return static_cast<Owner>(word >> kUntilBits); }
  static int64_t UntilNsOf(uint64_t word) {
    return static_cast<int64_t>(word & ((uint64_t{1} << kUntilBits) - 1)) * kNanosPerMilli;
  }

  // Owner and end in one word, so that they change together.
  std::atomic<uint64_t> word_{0};
  std::atomic<Owner> drawn_{1};
};

}  // namespace engram
