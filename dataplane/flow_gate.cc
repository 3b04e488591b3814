#include "dataplane/flow_gate.h"

#include <algorithm>

#include "src/core/clock.h"

namespace engram {

namespace {

constexpr int64_t kBurstNs = kNanosPerSecond / 10;
// What is read ahead in less than that is better kept than read again.
constexpr int64_t kSoonNs = 5 * kNanosPerMilli;

}  // namespace

void FlowGate::Take(const FlowRequestBody& request, int64_t now_ns) {
  const float wanted = request.preferred_rate;
  switch (request.action) {
    case FlowAction::kPause:
      is_paused_ = true;
      break;
    case FlowAction::kResume:
      is_paused_ = false;
      frames_left_ = INT64_MAX;
      break;
    case FlowAction::kSlowDown:
      SetRate(wanted > 0 ? wanted : (rate_ > 0 ? rate_ : kFirstRate) / 2, now_ns);
      break;
    case FlowAction::kSpeedUp:
      frames_left_ = INT64_MAX;
      if (wanted > 0) {
        SetRate(wanted, now_ns);
      } else {
        SetRate(2 * rate_ > kMostRate ? 0 : 2 * rate_, now_ns);
      }
      break;
    case FlowAction::kBufferStatus:
      frames_left_ = request.buffer_remaining;
      break;
  }
}

bool FlowGate::HoldsLong(int64_t now_ns) const {
  return is_paused_ || frames_left_ <= 0 || due_ns_ - slack_ns_ - now_ns > kSoonNs;
}

void FlowGate::NoteSent(int64_t now_ns) {
  if (frames_left_ != INT64_MAX) --frames_left_;
  if (rate_ > 0) due_ns_ = std::max(due_ns_, now_ns) + interval_ns_;
}

void FlowGate::SetRate(float rate, int64_t now_ns) {
  rate_ = rate > 0 ? std::max(rate, kLeastRate) : 0;
  interval_ns_ = rate_ > 0 ? static_cast<int64_t>(double{kNanosPerSecond} / rate_) : 0;
  slack_ns_ = std::max<int64_t>(kBurstNs - interval_ns_, 0);
  due_ns_ = now_ns;
}

}  // namespace engram
