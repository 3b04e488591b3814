#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "src/control/gateway_call.h"
#include "src/core/check.h"
#include "src/core/spsc_ring.h"

namespace engram {

struct GatewayCommand {
  enum class Kind : uint8_t {
    kStart,   // the call's question is to be answered
    kCancel,  // whoever asked has gone; holds a reference to the call
  };
  Kind kind = Kind::kStart;
  GatewayCall* call = nullptr;
};

// The one door from library threads to the gateway core: a bounded queue of commands of fixed size.
//
// Thread safety: any thread may push; TryPop is the gateway core's alone.
// Invariants: a cell's turn is its position while it is free for the push of that position,
// position
// + 1 while it holds that push, and position + capacity once it was taken. Commands come out in the
// order of their positions, so what a thread pushed after it saw another push comes out later.
//
// Each cell tells by itself whose turn it is, so producers meet on one counter only and the
// consumer on none of theirs (Vyukov's bounded queue, 2011, here with one consumer).
class GatewayInbox {
 public:
  // Rounded up to a power of two.
  explicit GatewayInbox(size_t min_capacity)
      : mask_(std::bit_ceil(min_capacity) - 1), cells_(std::make_unique<Cell[]>(mask_ + 1)) {
    CHECK(min_capacity > 1, "a cell's turns need two positions");
    for (size_t i = 0; i <= mask_; ++i) cells_[i].turn.store(i, std::memory_order_relaxed);
  }
  GatewayInbox(const GatewayInbox&) = delete;
  GatewayInbox& operator=(const GatewayInbox&) = delete;

  // False when it is full; nothing is stored then.
  [[nodiscard]] bool TryPush(const GatewayCommand& command) {
    uint64_t position = tail_.load(std::memory_order_relaxed);
    for (;;) {
      Cell& cell = cells_[position & mask_];
      const uint64_t turn = cell.turn.load(std::memory_order_acquire);
      if (turn == position) {
        if (tail_.compare_exchange_weak(position, position + 1, std::memory_order_relaxed)) {
          cell.command = command;
          cell.turn.store(position + 1, std::memory_order_release);
          return true;
        }
      } else if (turn < position) {
        return false;  // Still holds the push of one round before.
      } else {
        position = tail_.load(std::memory_order_relaxed);
      }
    }
  }

  [[nodiscard]] std::optional<GatewayCommand> TryPop() {
    Cell& cell = cells_[head_ & mask_];
    if (cell.turn.load(std::memory_order_acquire) != head_ + 1) return std::nullopt;
    const GatewayCommand command = cell.command;
    cell.turn.store(head_ + capacity(), std::memory_order_release);
    ++head_;
    return command;
  }

  size_t capacity() const { return mask_ + 1; }

 private:
  struct Cell {
    std::atomic<uint64_t> turn{0};
    GatewayCommand command;
  };

  // Constant after construction.
  const size_t mask_;
  const std::unique_ptr<Cell[]> cells_;
  // Producers. alignas: else each push would take the line of the constants and of head_ away from
  // everyone else.
  alignas(kFalseSharingBytes) std::atomic<uint64_t> tail_{0};
  // Consumer only. alignas: as above, the other way round.
  alignas(kFalseSharingBytes) uint64_t head_ = 0;
};

// What a transport holds of the gateway core.
//
// Thread safety: any thread may call anything.
class GatewayDoor {
 public:
  // `inbox` and `retry_after_ms` outlive the door; `wake` ends the gateway core's sleep, if it
  // sleeps.
  GatewayDoor(GatewayInbox* inbox, const std::atomic<uint32_t>* retry_after_ms,
              std::function<void()> wake)
      : inbox_(inbox), retry_after_ms_(retry_after_ms), wake_(std::move(wake)) {}

  // False when the inbox is full: the call is not answered then. Else Answered follows.
  [[nodiscard]] bool Submit(GatewayCall* call) {
    if (!inbox_->TryPush({.kind = GatewayCommand::Kind::kStart, .call = call})) return false;
    Wake();
    return true;
  }

  // Whoever asked has gone; `call` was submitted. Where the inbox is full the call goes on and is
  // answered to nobody.
  void Cancel(GatewayCall* call) {
    call->AddReference();
    if (inbox_->TryPush({.kind = GatewayCommand::Kind::kCancel, .call = call})) {
      Wake();
    } else {
      call->DropReference();
    }
  }

  // When there will be room again, for a call that was not taken.
  uint32_t RetryAfterMs() const { return retry_after_ms_->load(std::memory_order_relaxed); }

 private:
  void Wake() {
    // The command is visible before the core's flag is read (core_runner.h).
    std::atomic_thread_fence(std::memory_order_seq_cst);
    wake_();
  }

  GatewayInbox* const inbox_;
  const std::atomic<uint32_t>* const retry_after_ms_;
  const std::function<void()> wake_;
};

}  // namespace engram
