#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <span>

#include "src/core/check.h"
#include "src/core/spsc_ring.h"

namespace engram {

// A bounded queue of bytes between one producer thread and one consumer thread, which reads them
// where they lie.
//
// Thread safety: exactly one thread uses the Producer, exactly one the Consumer; the other calls
// are made while nobody uses either. The ring outlives its handles.
// Invariants: positions are 64-bit counts of bytes that never wrap in practice; byte p lies at p
// modulo the capacity. start <= tail; what is unread is [max(head, start), tail), never more than
// the capacity; it belongs to the consumer, all other places to the producer. `start` moves only
// while nothing is unread.
//
// Whoever writes little at a time and is read at once would still walk through the whole buffer,
// and touch all of its memory. So a producer that leaves a page and finds everything read begins
// again at the buffer's first byte (`start` is the position of that): such a ring keeps to a page
// or two, which stay in the cache, and what is written at once is rarely cut where the buffer ends.
class ByteRing {
 public:
  // `capacity` is a power of two, in bytes. The buffer is taken by TakeBuffer.
  explicit ByteRing(size_t capacity) : mask_(capacity - 1) {
    CHECK(std::has_single_bit(capacity), "positions are cut to places by a mask");
  }
  ByteRing(const ByteRing&) = delete;
  ByteRing& operator=(const ByteRing&) = delete;

  // Does nothing where it has one. Untouched pages cost nothing. False where memory ran out.
  [[nodiscard]] bool TakeBuffer() {
    if (buffer_ == nullptr) buffer_.reset(new (std::nothrow) std::byte[capacity()]);
    return buffer_ != nullptr;
  }
  void FreeBuffer() { buffer_.reset(); }
  // Empties it. Handles are made anew afterwards.
  void Reset() {
    start_.store(0, std::memory_order_relaxed);
    tail_.store(0, std::memory_order_relaxed);
    head_.store(0, std::memory_order_relaxed);
  }

  size_t capacity() const { return mask_ + 1; }

  class Producer {
   public:
    Producer() = default;
    explicit Producer(ByteRing* ring) : ring_(ring) {}
    Producer(Producer&&) noexcept = default;
    Producer& operator=(Producer&&) noexcept = default;
    Producer(const Producer&) = delete;
    Producer& operator=(const Producer&) = delete;

    // Bytes that can be written now.
    size_t Room() {
      Refresh();
      return KnownRoom();
    }
    // Looks at what the consumer has taken only where it has to.
    bool HasRoom(size_t bytes) { return bytes <= KnownRoom() || bytes <= Room(); }

    // Writes the first `bytes` of the concatenation of `parts`, which is at least as long;
    // published at once. The caller has asked for the room.
    void Write(std::span<const std::span<const std::byte>> parts, size_t bytes) {
      CHECK(bytes <= KnownRoom(), "whoever writes has asked for the room");
      if (bytes == 0) return;
      StartAnew(bytes);
      for (size_t i = 0; bytes > 0; ++i) {
        const size_t step = std::min(parts[i].size(), bytes);
        Copy(parts[i].first(step));
        bytes -= step;
      }
      ring_->tail_.store(tail_, std::memory_order_release);
    }

    // Behind the last byte written.
    uint64_t position() const { return tail_; }

   private:
    size_t KnownRoom() const {
      return ring_->capacity() - static_cast<size_t>(tail_ - cached_head_);
    }
    // The consumer's index stays behind a new start until it takes something.
    void Refresh() {
      cached_head_ = std::max(cached_head_, ring_->head_.load(std::memory_order_acquire));
    }

    void StartAnew(size_t bytes) {
      const size_t page = std::min(kPageBytes, ring_->capacity());
      const bool leaves_page = (tail_ ^ (tail_ + bytes)) >= page;
      if (!leaves_page || (tail_ & ring_->mask_) == 0) return;
      Refresh();
      if (cached_head_ != tail_) return;
      tail_ = (tail_ | ring_->mask_) + 1;
      cached_head_ = tail_;
      // Published with the tail.
      ring_->start_.store(tail_, std::memory_order_relaxed);
    }

    void Copy(std::span<const std::byte> bytes) {
      if (bytes.empty()) return;
      const size_t place = tail_ & ring_->mask_;
      const size_t first = std::min(bytes.size(), ring_->capacity() - place);
      std::memcpy(&ring_->buffer_[place], bytes.data(), first);
      if (first < bytes.size()) {
        std::memcpy(&ring_->buffer_[0], &bytes[first], bytes.size() - first);
      }
      tail_ += bytes.size();
    }

    ByteRing* ring_ = nullptr;
    uint64_t tail_ = 0;         // Own copy of ring_->tail_.
    uint64_t cached_head_ = 0;  // At most max(ring_->head_, ring_->start_).
  };

  class Consumer {
   public:
    Consumer() = default;
    explicit Consumer(ByteRing* ring) : ring_(ring) {}
    Consumer(Consumer&&) noexcept = default;
    Consumer& operator=(Consumer&&) noexcept = default;
    Consumer(const Consumer&) = delete;
    Consumer& operator=(const Consumer&) = delete;

    // Looks for what was written since; Peek and Unread tell of it. Returns the position behind the
    // last byte there is.
    uint64_t Refresh() {
      cached_tail_ = ring_->tail_.load(std::memory_order_acquire);
      if (cached_tail_ != head_) {
        // A start that was moved later than this tail would need these bytes to be read.
        head_ = std::max(head_, ring_->start_.load(std::memory_order_relaxed));
      }
      return cached_tail_;
    }

    // The first bytes that the last Refresh found, up to the end of the buffer; what lies at its
    // beginning comes once these were consumed. Valid until then.
    std::span<const std::byte> Peek() const {
      const size_t place = head_ & ring_->mask_;
      return {&ring_->buffer_[place], std::min(Unread(), ring_->capacity() - place)};
    }
    // At most Unread().
    void Consume(size_t bytes) {
      CHECK(bytes <= Unread(), "no more is consumed than was found");
      head_ += bytes;
      ring_->head_.store(head_, std::memory_order_release);
    }
    // Bytes that the last Refresh found and that were not consumed since.
    size_t Unread() const { return static_cast<size_t>(cached_tail_ - head_); }
    // Room that this leaves the producer.
    size_t Room() const { return ring_->capacity() - Unread(); }
    // Nothing at all is there now.
    bool Empty() const { return ring_->tail_.load(std::memory_order_acquire) == head_; }

   private:
    ByteRing* ring_ = nullptr;
    uint64_t head_ = 0;         // Own copy of ring_->head_, or the start, where that is later.
    uint64_t cached_tail_ = 0;  // At most ring_->tail_.
  };

 private:
  static constexpr size_t kPageBytes = 4096;

  // Constant while a handle is used.
  const size_t mask_;
  std::unique_ptr<std::byte[]> buffer_;
  // Written by the producer, read by the consumer. alignas: else each write would take the line of
  // head_ away from the consumer.
  alignas(kFalseSharingBytes) std::atomic<uint64_t> tail_{0};
  std::atomic<uint64_t> start_{0};
  // Written by the consumer, read by the producer. alignas: as above, the other way round.
  alignas(kFalseSharingBytes) std::atomic<uint64_t> head_{0};
};
static_assert(sizeof(ByteRing) == 3 * kFalseSharingBytes);

}  // namespace engram
