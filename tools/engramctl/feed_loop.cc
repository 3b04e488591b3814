#include "tools/engramctl/feed_loop.h"

#include <poll.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "tools/engramctl/table.h"

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

const Feed* FeedOf(const Feed& feed) { return &feed; }
const Feed* FeedOf(const ResumingFeed& feed) { return &feed.feed(); }
int FdOf(const Feed& feed) { return feed.connection().fd(); }
int FdOf(const ResumingFeed& feed) { return feed.fd(); }
bool WantsToWrite(const Feed& feed) { return feed.connection().PendingBytes() > 0; }
bool WantsToWrite(const ResumingFeed& feed) { return feed.WantsToWrite(); }

// What the feeds have to say of refusals.
template <typename AnyFeed>
std::string NextNotice(std::span<const std::unique_ptr<AnyFeed>> feeds, int64_t now_ns,
                       RefusalNotice& notice) {
  std::string refusal;
  uint64_t waiting = 0;
  for (const auto& each : feeds) {
    const Feed* feed = FeedOf(*each);
    if (feed->last_wait().empty()) continue;
    waiting += feed->unsettled();
    if (refusal.empty()) refusal = feed->last_wait();
  }
  return notice.Next(refusal, waiting, now_ns);
}

template <typename AnyFeed>
Result<void> DriveAll(std::span<const std::unique_ptr<AnyFeed>> feeds, const FeedTurn& turn,
                      const FeedSay& say) {
  SystemClock clock;
  RefusalNotice notice;
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
    if (const std::string line = NextNotice(feeds, now_ns, notice); !line.empty()) say(line);
    if (!more_work) Sleep(entries, wake_ns);
  }
}

}  // namespace

void Say(const std::string& line) { std::fprintf(stderr, "engramctl: %s\n", line.c_str()); }

std::string RefusalNotice::Next(const std::string& refusal, uint64_t waiting, int64_t now_ns) {
  if (refusal.empty()) {
    since_ns_.reset();
    return "";
  }
  if (!since_ns_) since_ns_ = now_ns;
  if (now_ns - *since_ns_ < kRefusedNs || now_ns < next_ns_) return "";
  next_ns_ = now_ns + kRepeatNs;
  return "the server takes nothing: " + refusal + "; " + WithThousands(waiting) +
         " observations wait, for " + std::to_string((now_ns - *since_ns_) / kNanosPerSecond) +
         " s now";
}

void SleepUntil(int64_t wake_ns) {
  while (SystemClock().MonotonicNs() < wake_ns) Sleep({}, wake_ns);
}

Result<void> DriveFeeds(std::span<const std::unique_ptr<Feed>> feeds, const FeedTurn& turn,
                        const FeedSay& say) {
  return DriveAll(feeds, turn, say);
}

Result<void> DriveFeeds(std::span<const std::unique_ptr<ResumingFeed>> feeds, const FeedTurn& turn,
                        const FeedSay& say) {
  return DriveAll(feeds, turn, say);
}

}  // namespace engram
