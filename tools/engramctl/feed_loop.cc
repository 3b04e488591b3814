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

}  // namespace

void SleepUntil(int64_t wake_ns) {
  while (SystemClock().MonotonicNs() < wake_ns) Sleep({}, wake_ns);
}

Result<void> DriveFeeds(std::span<const std::unique_ptr<Feed>> feeds, const FeedTurn& turn) {
  SystemClock clock;
  std::vector<pollfd> entries(feeds.size());
  for (;;) {
    const int64_t now_ns = clock.MonotonicNs();
    int64_t wake_ns = turn(now_ns);
    bool all_settled = wake_ns == kNothingMore;
    bool more_work = false;
    for (size_t i = 0; i < feeds.size(); ++i) {
      Feed& feed = *feeds[i];
      const Result<bool> worked = feed.Poll(now_ns);
      if (!worked) return std::unexpected(worked.error());
      more_work = more_work || *worked;
      all_settled = all_settled && feed.AllSettled();
      wake_ns = std::min(wake_ns, feed.NextWakeNs(now_ns));
      const bool writes = feed.connection().PendingBytes() > 0;
      entries[i] = {.fd = feed.connection().fd(),
                    .events = static_cast<short>(writes ? POLLIN | POLLOUT : POLLIN),
                    .revents = 0};
    }
    if (all_settled) return {};
    if (!more_work) Sleep(entries, wake_ns);
  }
}

}  // namespace engram
