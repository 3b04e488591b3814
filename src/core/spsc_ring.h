#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>

#include "src/core/check.h"

namespace engram {

inline constexpr size_t kCacheLineBytes = 64;
// Neighbouring lines are fetched in pairs (Intel's spatial prefetcher), so what two cores write is
// kept two lines apart.
inline constexpr size_t kFalseSharingBytes = 2 * kCacheLineBytes;

// A bounded queue between one producer core and one consumer core.
//
// Thread safety: exactly one thread uses the Producer, exactly one the Consumer. The handles are
// move-only, so ownership is visible where they are passed. Both keep the shared state alive.
// Invariants: head <= tail <= head + capacity, as 64-bit counts that never wrap in practice; the
// entries [head, tail) belong to the consumer, the others to the producer.
//
// Each side keeps a private copy of the other side's index and reads the shared one only when the
// copy says full (or empty): so a busy ring moves one cache line per batch, not per entry
// (Rigtorp's SPSCQueue; Lee, Bu and Chandranmenon, MCRingBuffer, 2010).
template <typename T>
class SpscRing {
  static_assert(std::is_trivially_copyable_v<T>, "ring entries are copied as bytes");

  struct State {
    explicit State(size_t capacity)
        : mask(capacity - 1), entries(std::make_unique<T[]>(capacity)) {}
    // Constant after construction.
    const size_t mask;
    const std::unique_ptr<T[]> entries;
    // Written by the producer, read by the consumer. alignas: else each push would take the line
    // of head_ away from the consumer.
    alignas(kFalseSharingBytes) std::atomic<uint64_t> tail{0};
    // Written by the consumer, read by the producer. alignas: as above, the other way round.
    alignas(kFalseSharingBytes) std::atomic<uint64_t> head{0};
    // alignas: keeps whatever is allocated behind this object off head's line pair.
    alignas(kFalseSharingBytes) char padding[kCacheLineBytes];
  };
  static_assert(alignof(State) == kFalseSharingBytes);
  static_assert(sizeof(State) >= 4 * kFalseSharingBytes);

 public:
  class Producer {
   public:
    Producer() = default;
    Producer(Producer&&) noexcept = default;
    Producer& operator=(Producer&&) noexcept = default;
    Producer(const Producer&) = delete;
    Producer& operator=(const Producer&) = delete;

    // False when the ring is full; nothing is stored then.
    [[nodiscard]] bool TryPush(const T& value) {
      if (tail_ - cached_head_ > state_->mask) {
        cached_head_ = state_->head.load(std::memory_order_acquire);
        if (tail_ - cached_head_ > state_->mask) return false;
      }
      state_->entries[tail_ & state_->mask] = value;
      ++tail_;
      state_->tail.store(tail_, std::memory_order_release);
      return true;
    }

    // True when TryPush would fail.
    bool Full() {
      if (Room() > 0) return false;
      cached_head_ = state_->head.load(std::memory_order_acquire);
      return Room() == 0;
    }

    // Stores as many of `values` as there is room for, in order, published at once. Returns how
    // many.
    size_t PushBatch(std::span<const T> values) {
      size_t room = Room();
      if (room < values.size()) {
        cached_head_ = state_->head.load(std::memory_order_acquire);
        room = Room();
      }
      const size_t count = std::min(room, values.size());
      for (size_t i = 0; i < count; ++i) {
        state_->entries[(tail_ + i) & state_->mask] = values[i];
      }
      if (count == 0) return 0;
      tail_ += count;
      state_->tail.store(tail_, std::memory_order_release);
      return count;
    }

    // Entries not yet taken by the consumer; exact when the consumer stands still.
    size_t Depth() const {
      return static_cast<size_t>(tail_ - state_->head.load(std::memory_order_acquire));
    }
    size_t capacity() const { return state_->mask + 1; }
    explicit operator bool() const { return state_ != nullptr; }

   private:
    friend class SpscRing;
    explicit Producer(std::shared_ptr<State> state) : state_(std::move(state)) {}
    size_t Room() const { return state_->mask + 1 - static_cast<size_t>(tail_ - cached_head_); }

    std::shared_ptr<State> state_;
    uint64_t tail_ = 0;         // Own copy of state_->tail.
    uint64_t cached_head_ = 0;  // At most state_->head.
  };

  class Consumer {
   public:
    Consumer() = default;
    Consumer(Consumer&&) noexcept = default;
    Consumer& operator=(Consumer&&) noexcept = default;
    Consumer(const Consumer&) = delete;
    Consumer& operator=(const Consumer&) = delete;

    // What TryPop would take; it stays.
    [[nodiscard]] std::optional<T> Peek() {
      if (cached_tail_ == head_) {
        cached_tail_ = state_->tail.load(std::memory_order_acquire);
        if (cached_tail_ == head_) return std::nullopt;
      }
      return state_->entries[head_ & state_->mask];
    }

    [[nodiscard]] std::optional<T> TryPop() {
      const std::optional<T> value = Peek();
      if (!value) return value;
      ++head_;
      state_->head.store(head_, std::memory_order_release);
      return value;
    }

    // Takes up to `out.size()` entries in order, given back to the producer at once. Returns how
    // many.
    size_t PopBatch(std::span<T> out) {
      size_t available = static_cast<size_t>(cached_tail_ - head_);
      if (available < out.size()) {
        cached_tail_ = state_->tail.load(std::memory_order_acquire);
        available = static_cast<size_t>(cached_tail_ - head_);
      }
      const size_t count = std::min(available, out.size());
      if (count == 0) return 0;
      for (size_t i = 0; i < count; ++i) out[i] = state_->entries[(head_ + i) & state_->mask];
      head_ += count;
      state_->head.store(head_, std::memory_order_release);
      return count;
    }

    // Entries waiting; exact when the producer stands still.
    size_t Depth() const {
      return static_cast<size_t>(state_->tail.load(std::memory_order_acquire) - head_);
    }
    size_t capacity() const { return state_->mask + 1; }
    explicit operator bool() const { return state_ != nullptr; }

   private:
    friend class SpscRing;
    explicit Consumer(std::shared_ptr<State> state) : state_(std::move(state)) {}

    std::shared_ptr<State> state_;
    uint64_t head_ = 0;         // Own copy of state_->head.
    uint64_t cached_tail_ = 0;  // At most state_->tail.
  };

  // A ring of at least `min_capacity` entries (rounded up to a power of two). Each core moves its
  // handle into memory of its own: both are written with every operation, so side by side, as they
  // are returned, they would cost an order of magnitude (perf/spsc_ring_bench.cc met that).
  static std::pair<Producer, Consumer> Create(size_t min_capacity) {
    CHECK(min_capacity > 0, "a ring needs room for one entry");
    auto state = std::make_shared<State>(std::bit_ceil(min_capacity));
    return {Producer(state), Consumer(state)};
  }
};

}  // namespace engram
