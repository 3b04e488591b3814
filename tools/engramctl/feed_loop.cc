#include "tools/engramctl/feed_loop.h"

#include <poll.h>

#include <algorithm>
#include <vector>

#include "src/core/clock.h"

namespace engram {

namespace {

// Until `wake_ns`, or until one of `entries` is ready.
void Sleep(std::span<pollfd> entries, int64_t wake_ns) {
  const int64_t left_ns = std::max<int64_t>(0, wake_ns - SystemClock().MonotonicNs());
  const timespec timeout = {.tv_sec = left_ns / kNanosPerSecond,
                            .tv_nsec = left_ns % kNanosPerSecond};
  // Errors and signals only mean that the next turn comes earlier.
  ppoll(entries.data(), entries.size(), &timeout, nullptr);
}

int FdOf(const Feed& feed) { return feed.connection().fd(); }
int FdOf(const ResumingFeed& feed) { return feed.fd(); }
bool WantsToWrite(const Feed& feed) { return feed.connection().PendingBytes() > 0; }
bool WantsToWrite(const ResumingFeed& feed) { return feed.WantsToWrite(); }

template <typename AnyFeed>
Result<void> DriveAll(std::span<const std::unique_ptr<AnyFeed>> feeds, const FeedTurn& turn) {
  SystemClock clock;
  std::vector<pollfd> entries(feeds.size());
  for (;;) {
    const int64_t now_ns = clock.MonotonicNs();
    int64_t wake_ns = turn(now_ns);
    bool all_settled = wake_ns == kNothingMore;
    bool more_work = false;
    for (size_t i = 0; i < feeds.size(); ++i) {
      AnyFeed& feed = *feeds[i];
      const Result<bool> worked = feed.Poll(now_ns);
      if (!worked) return std::unexpected(worked.error());
      more_work = more_work || *worked;
      all_settled = all_settled && feed.AllSettled();
      wake_ns = std::min(wake_ns, feed.NextWakeNs(now_ns));
      // poll(2) passes over an fd of -1, which a feed between two connections has.
      entries[i] = {.fd = FdOf(feed),
                    .events = static_cast<short>(WantsToWrite(feed) ? POLLIN | POLLOUT : POLLIN),
                    .revents = 0};
    }
    if (all_settled) return {};
    if (!more_work) Sleep(entries, wake_ns);
  }
}

}  // namespace

void SleepUntil(int64_t wake_ns) {
  while (SystemClock().MonotonicNs() < wake_ns) Sleep({}, wake_ns);
}

Result<void> DriveFeeds(std::span<const std::unique_ptr<Feed>> feeds, const FeedTurn& turn) {
  return DriveAll(feeds, turn);
}

Result<void> DriveFeeds(std::span<const std::unique_ptr<ResumingFeed>> feeds,
                        const FeedTurn& turn) {
  return DriveAll(feeds, turn);
}

}  // namespace engram
