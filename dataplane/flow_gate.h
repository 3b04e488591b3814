#pragma once

#include <cstdint>

#include "dataplane/frame_format.h"

namespace engram {

// What a client has said of the result frames that it wants to get (FORMAT.md, flow): none while it
// is paused, so many until its next word, so many a second.
//
// The rate is kept by when the next frame is due (GCRA, ITU-T I.371): each one is due an interval
// after the one before, and may go as long before that as a tenth of a second's worth of them
// takes, but for one. So what did not go for a while goes in a burst, which is bounded.
//
// Thread safety: the owner of the connection alone. Takes no memory.
class FlowGate {
 public:
  static constexpr float kFirstRate =
      1'000;  // a second; what is slowed down where nothing was said
  static constexpr float kMostRate = 1'000'000;  // sped up beyond that: no bound
  static constexpr float kLeastRate = 0.01F;

  // `request` is sound (DecodeFlow).
  void Take(const FlowRequestBody& request, int64_t now_ns);

  bool is_paused() const { return is_paused_; }
  // Frames a second; 0: no bound.
  float rate() const { return rate_; }
  // Whether a frame may go now.
  bool MaySend(int64_t now_ns) const {
    return !is_paused_ && frames_left_ > 0 && now_ns >= due_ns_ - slack_ns_;
  }
  // None may go for some time, or until the client says so: others have use for what is kept ready.
  bool HoldsLong(int64_t now_ns) const;
  // One went.
  void NoteSent(int64_t now_ns);

 private:
  void SetRate(float rate, int64_t now_ns);

  bool is_paused_ = false;
  float rate_ = 0;
  int64_t frames_left_ = INT64_MAX;  // none if it is below 1
  int64_t interval_ns_ = 0;          // 0: no bound
  int64_t slack_ns_ = 0;
  int64_t due_ns_ = 0;  // when the next frame is due
};

}  // namespace engram
