#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "src/core/clock.h"
#include "src/core/result.h"
#include "tools/clients/cpp/feed.h"
#include "tools/clients/cpp/resuming_feed.h"

namespace engram {

// What DriveFeeds asks each turn, with the time: offers what is due, and returns when it wants to
// be asked again at the latest; kNothingMore once everything was offered.
using FeedTurn = std::function<int64_t(int64_t now_ns)>;
inline constexpr int64_t kNothingMore = INT64_MAX;

// Writes a line of engramctl's to standard error.
void Say(const std::string& line);
using FeedSay = std::function<void(const std::string& line)>;

// When to say that the server refuses what is sent: once it has done so for kRefusedNs without
// anything settled in between, so that a full queue that passes is not worth a word; and every
// kRepeatNs at most.
class RefusalNotice {
 public:
  static constexpr int64_t kRefusedNs = kNanosPerSecond;
  static constexpr int64_t kRepeatNs = 5 * kNanosPerSecond;

  // The line to say now, or "". `refusal` is in the server's words, empty while it refuses nothing.
  std::string Next(const std::string& refusal, uint64_t waiting, int64_t now_ns);

 private:
  std::optional<int64_t> since_ns_;
  int64_t next_ns_ = INT64_MIN;
};

// Polls the feeds in turn, and sleeps in poll(2) while none has work, until all is offered and
// settled. What a server refuses for now is said. Errors: the first feed's.
Result<void> DriveFeeds(std::span<const std::unique_ptr<Feed>> feeds, const FeedTurn& turn,
                        const FeedSay& say = Say);
// The same; a feed whose connection is broken waits and reconnects while the others go on.
Result<void> DriveFeeds(std::span<const std::unique_ptr<ResumingFeed>> feeds, const FeedTurn& turn,
                        const FeedSay& say = Say);

// Sleeps until `wake_ns` of the monotonic clock.
void SleepUntil(int64_t wake_ns);

}  // namespace engram
