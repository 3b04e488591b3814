#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "src/core/check.h"
#include "src/core/spsc_ring.h"

namespace engram {

// When a writer may reuse what readers on other cores might still look at: epoch-based reclamation
// (Fraser, "Practical lock-freedom", 2004).
// 1. A reader enters before it loads its first pointer and leaves after it has used the last one.
// 2. The writer takes a thing out of every place where a reader could come upon it, then closes the
//    epoch.
// 3. Once no reader that entered in that epoch or before is inside, nobody has the thing: it may be
//    reused.
//
// Thread safety: each reader place is one thread's at a time; Close and Passed are the writer's.
// Invariants: the epoch only rises; a reader's place is 0 or an epoch at or below the current one.
class ReaderEpochs {
 public:
  using Epoch = uint64_t;

  explicit ReaderEpochs(uint32_t readers) : places_(readers) {}
  ReaderEpochs(const ReaderEpochs&) = delete;
  ReaderEpochs& operator=(const ReaderEpochs&) = delete;

  // 1. Does not nest.
  void Enter(uint32_t reader) {
    std::atomic<Epoch>& place = places_[reader].entered;
    CHECK(place.load(std::memory_order_relaxed) == 0, "a reader leaves before it enters again");
    Epoch epoch = current_.load(std::memory_order_seq_cst);
    for (;;) {
      place.store(epoch, std::memory_order_seq_cst);
      // Had the writer closed this epoch before it could see us, it need not wait for us: then we
      // are of the next one, and see all that it took out.
      const Epoch now = current_.load(std::memory_order_seq_cst);
      if (now == epoch) return;
      epoch = now;
    }
  }
  void Leave(uint32_t reader) { places_[reader].entered.store(0, std::memory_order_release); }

  // 2. Returns the epoch that was closed.
  Epoch Close() { return current_.fetch_add(1, std::memory_order_seq_cst); }
  // 3.
  bool Passed(Epoch closed) const {
    for (const Place& place : places_) {
      const Epoch entered = place.entered.load(std::memory_order_seq_cst);
      if (entered != 0 && entered <= closed) return false;
    }
    return true;
  }
  uint32_t readers() const { return static_cast<uint32_t>(places_.size()); }

 private:
  // alignas: each place is written by another core.
  struct alignas(kFalseSharingBytes) Place {
    std::atomic<Epoch> entered{0};
  };
  std::vector<Place> places_;
  std::atomic<Epoch> current_{1};
};

// Inside from construction to destruction.
class ReaderGuard {
 public:
  ReaderGuard(ReaderEpochs* epochs, uint32_t reader) : epochs_(epochs), reader_(reader) {
    epochs_->Enter(reader_);
  }
  ReaderGuard(const ReaderGuard&) = delete;
  ReaderGuard& operator=(const ReaderGuard&) = delete;
  ~ReaderGuard() { epochs_->Leave(reader_); }

 private:
  ReaderEpochs* epochs_;
  uint32_t reader_;
};

}  // namespace engram
