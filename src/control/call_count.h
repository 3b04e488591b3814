#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

// What the transports count, so that they can end and stay within bounds.

namespace engram {

// Counts the calls that are not through, so that the end can wait for them.
//
// Thread safety: any thread may call anything.
class CallCount {
 public:
  // False once Close was called: the call is not taken.
  [[nodiscard]] bool Enter() {
    if ((state_.fetch_add(kCall) & kClosed) == 0) return true;
    Leave();
    return false;
  }
  void Leave() {
    if (state_.fetch_sub(kCall) - kCall != kClosed) return;
    const std::lock_guard lock(mutex_);
    none_left_.notify_all();
  }
  void Close() { state_.fetch_or(kClosed); }
  // After Close: waits until all have left. False when `timeout` passed before.
  bool WaitForNone(std::chrono::nanoseconds timeout) {
    std::unique_lock lock(mutex_);
    return none_left_.wait_for(lock, timeout, [this] { return state_.load() == kClosed; });
  }

 private:
  static constexpr uint64_t kClosed = 1;
  static constexpr uint64_t kCall = 2;

  std::atomic<uint64_t> state_{0};
  std::mutex mutex_;
  std::condition_variable none_left_;
};

// The bytes of answers that a transport has and clients have not read yet. A client that does not
// read would else fill the memory with them.
//
// Thread safety: any thread may call anything.
class UnreadAnswers {
 public:
  // Answers up to kSmallBytes may take `most_small` beyond `most`.
  UnreadAnswers(size_t most, size_t most_small) : most_(most), most_small_(most_small) {}
  // False where they would be too many; nothing is counted then.
  [[nodiscard]] bool Add(size_t bytes) {
    const size_t most = bytes <= kSmallBytes ? most_ + most_small_ : most_;
    if (bytes == 0) return true;
    if (bytes_.fetch_add(bytes, std::memory_order_relaxed) + bytes <= most) return true;
    Remove(bytes);
    return false;
  }
  void Remove(size_t bytes) { bytes_.fetch_sub(bytes, std::memory_order_relaxed); }

 private:
  static constexpr size_t kSmallBytes = size_t{64} << 10;

  const size_t most_;
  const size_t most_small_;
  std::atomic<size_t> bytes_{0};
};

}  // namespace engram
