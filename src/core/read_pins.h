#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "src/core/check.h"
#include "src/core/spsc_ring.h"

namespace engram {

// When files may go that answers under way might still read from: as ReaderEpochs, but a reader is
// inside many times over, for as long as its clients take.
// 1. A core that answers enters before it asks the shards, and leaves with what it was given once
//    it has read the last record.
// 2. Who removes files sees to it that no shard names them any more, then closes the epoch.
// 3. Once nobody that entered in that epoch or before is inside, the files may go.
//
// Thread safety: each reader place is one core's; Close and Passed are the control plane's.
// Invariants: at most kKept epochs have readers inside.
class ReadPins {
 public:
  using Epoch = uint64_t;

  explicit ReadPins(uint32_t readers) : places_(readers) {}
  ReadPins(const ReadPins&) = delete;
  ReadPins& operator=(const ReadPins&) = delete;

  // 1.
  Epoch Enter(uint32_t reader) {
    for (;;) {
      const Epoch epoch = current_.load(std::memory_order_seq_cst);
      Count(reader, epoch, 1);
      // Had it been closed before we could be seen, nobody would wait for us.
      if (current_.load(std::memory_order_seq_cst) == epoch) return epoch;
      Count(reader, epoch, -1);
    }
  }
  void Leave(uint32_t reader, Epoch epoch) { Count(reader, epoch, -1); }

  // 2. Returns the epoch that was closed; 0: those before have readers inside still, try again.
  Epoch Close() {
    const Epoch epoch = current_.load(std::memory_order_relaxed);
    if (epoch >= kKept && !Passed(epoch + 1 - kKept)) return 0;
    current_.store(epoch + 1, std::memory_order_seq_cst);
    return epoch;
  }
  // 3.
  bool Passed(Epoch closed) const {
    const Epoch current = current_.load(std::memory_order_relaxed);
    const Epoch oldest = current >= kKept ? current + 1 - kKept : 1;
    for (Epoch epoch = oldest; epoch <= closed; ++epoch) {
      for (const Place& place : places_) {
        if (place.inside[epoch % kKept].load(std::memory_order_seq_cst) != 0) return false;
      }
    }
    return true;
  }
  // Rises with every Close: files that were removed may be closed then.
  Epoch current() const { return current_.load(std::memory_order_relaxed); }
  uint32_t readers() const { return static_cast<uint32_t>(places_.size()); }

 private:
  static constexpr Epoch kKept = 4;

  // alignas: each place is written by another core.
  struct alignas(kFalseSharingBytes) Place {
    std::array<std::atomic<uint32_t>, kKept> inside{};
  };

  // A place has one writer.
  void Count(uint32_t reader, Epoch epoch, int by) {
    std::atomic<uint32_t>& inside = places_[reader].inside[epoch % kKept];
    const uint32_t now = inside.load(std::memory_order_relaxed) + static_cast<uint32_t>(by);
    CHECK(now != UINT32_MAX, "who leaves has entered");
    inside.store(now, std::memory_order_seq_cst);
  }

  std::vector<Place> places_;
  std::atomic<Epoch> current_{1};
};

}  // namespace engram
