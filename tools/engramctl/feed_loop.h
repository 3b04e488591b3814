#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "src/core/result.h"
#include "tools/clients/cpp/feed.h"
#include "tools/clients/cpp/resuming_feed.h"

namespace engram {

// What DriveFeeds asks each turn, with the time: offers what is due, and returns when it wants to
// be asked again at the latest; kNothingMore once everything was offered.
using FeedTurn = std::function<int64_t(int64_t now_ns)>;
inline constexpr int64_t kNothingMore = INT64_MAX;

// Polls the feeds in turn, and sleeps in poll(2) while none has work, until all is offered and
// settled. Errors: the first feed's.
Result<void> DriveFeeds(std::span<const std::unique_ptr<Feed>> feeds, const FeedTurn& turn);
// The same; a feed whose connection is broken waits and reconnects while the others go on.
Result<void> DriveFeeds(std::span<const std::unique_ptr<ResumingFeed>> feeds, const FeedTurn& turn);

// Sleeps until `wake_ns` of the monotonic clock.
void SleepUntil(int64_t wake_ns);

}  // namespace engram
