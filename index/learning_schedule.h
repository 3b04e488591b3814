#pragma once

#include <algorithm>
#include <cstdint>

namespace engram {

// When a space thinks of learning codes: once it has taken in some times as many nodes as lived the
// last time, and sooner where it doubts those that it has. Times are nodes that were taken, ever.
//
// A doubt that learning does not share costs a learning each time, so the next one is heard later
// each time, until one was right.
//
// Thread safety: none.
class LearningSchedule {
 public:
  // Nodes to take in before learning is thought of again, in units of those that live.
  static constexpr uint64_t kAgainFactor = 3;
  // The share of those that live, where learning failed for want of memory.
  static constexpr uint64_t kAfterFailure = 4;
  // And after the first doubt; doubled with each one that was wrong.
  static constexpr uint64_t kAfterDoubt = 8;
  static constexpr uint32_t kMostDoublings = 20;

  bool IsTime(uint64_t taken) const { return taken >= at_; }
  // The learning that is due, or under way, is for a doubt.
  bool is_doubted() const { return is_doubted_; }

  // Learnings that were begun, ever.
  uint64_t begun() const { return begun_; }

  // Codes are doubted. False where it is too early to listen.
  bool Doubt(uint64_t taken) {
    if (taken < listen_at_) return false;
    is_doubted_ = true;
    at_ = std::min(at_, taken);
    return true;
  }
  // Learning begins. `least`: nodes to take in, however few live.
  void Begin(uint64_t taken, uint64_t live, uint64_t least) {
    ++begun_;
    at_ = taken + std::max({kAgainFactor * live, least, uint64_t{1}});
  }
  // Learning has shown that codes are to be others, or none, or that all is well.
  void End(uint64_t taken, uint64_t live, bool has_changed) {
    if (!is_doubted_) return;
    is_doubted_ = false;
    doublings_ = has_changed ? 0 : std::min(doublings_ + 1, kMostDoublings);
    listen_at_ = taken + (std::max<uint64_t>(live / kAfterDoubt, 1) << doublings_);
  }
  // There was no memory for it.
  void Fail(uint64_t taken, uint64_t live) {
    is_doubted_ = false;
    at_ = std::min(at_, taken + std::max<uint64_t>(live / kAfterFailure, 1));
  }

 private:
  uint64_t at_ = 0;
  uint64_t listen_at_ = 0;
  uint64_t begun_ = 0;
  uint32_t doublings_ = 0;
  bool is_doubted_ = false;
};

}  // namespace engram
