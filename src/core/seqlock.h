#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "src/core/spsc_ring.h"

namespace engram {

// One writer publishes a small struct that any number of readers copy out whole.
//
// Thread safety: one writer thread; any number of readers. A reader never blocks the writer; it
// tries again when the writer was in between.
// Invariants: the version is odd while the writer is inside Store, even otherwise.
// The payload is kept as atomics, so a torn read is discarded without a data race (Boehm, "Can
// seqlocks get along with programming language memory models?", MSPC 2012). Its words are stored
// with release and loaded with acquire instead of between fences: the same plain moves on x86, and
// ThreadSanitizer, which knows no fences, understands it.
template <typename T>
class Seqlock {
  static_assert(std::is_trivially_copyable_v<T>);
  static constexpr size_t kWords = (sizeof(T) + 7) / 8;

 public:
  Seqlock() { Store(T{}); }

  void Store(const T& value) {
    std::array<uint64_t, kWords> words{};
    std::memcpy(words.data(), &value, sizeof(T));
    const uint64_t version = version_.load(std::memory_order_relaxed);
    version_.store(version + 1, std::memory_order_relaxed);
    // Release: whoever sees a new word also sees the odd version...
    for (size_t i = 0; i < kWords; ++i) words_[i].store(words[i], std::memory_order_release);
    // ...and whoever sees the even one also sees every new word.
    version_.store(version + 2, std::memory_order_release);
  }

  // False when the writer was in between; `*out` is unspecified then.
  [[nodiscard]] bool TryLoad(T* out) const {
    const uint64_t before = version_.load(std::memory_order_acquire);
    std::array<uint64_t, kWords> words;
    // Acquire: the second look at the version stays behind every word.
    for (size_t i = 0; i < kWords; ++i) words[i] = words_[i].load(std::memory_order_acquire);
    const uint64_t after = version_.load(std::memory_order_relaxed);
    if (before != after || (before & 1) != 0) return false;
    std::memcpy(static_cast<void*>(out), words.data(), sizeof(T));
    return true;
  }

  T Load() const {
    T value;
    while (!TryLoad(&value)) {
    }
    return value;
  }

 private:
  // alignas: what readers poll is kept off the lines that its owner writes otherwise.
  alignas(kFalseSharingBytes) std::atomic<uint64_t> version_{0};
  std::array<std::atomic<uint64_t>, kWords> words_{};
};

}  // namespace engram
