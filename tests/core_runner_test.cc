#include "src/core_runner.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "src/core/doorbell.h"
#include "src/core/spsc_ring.h"

namespace engram {
namespace {

constexpr uint64_t kRoundTrips = 20'000;

// One side of a ping-pong: sends back what it gets, plus one.
class Player {
 public:
  Player(const char* name, SpscRing<uint64_t>::Consumer in, SpscRing<uint64_t>::Producer out,
         Clock* clock)
      : in_(std::move(in)),
        out_(std::move(out)),
        bell_(*Doorbell::Create()),
        // A lost wake-up would be hidden by a short sleep: here it stands still for a minute.
        runner_(name, IdleStrategy::kSleep, clock,
                {.wait = [this](int64_t) { bell_.Wait(60 * kNanosPerSecond); },
                 .wake = [this] { bell_.Wake(); }}) {
    runner_.AddPoll([this] { return Poll(); });
  }

  void Serve() { EXPECT_TRUE(out_.TryPush(0)); }
  CoreRunner& runner() { return runner_; }
  uint64_t last() const { return last_.load(); }

 private:
  int Poll() {
    const auto value = in_.TryPop();
    if (!value) return 0;
    last_.store(*value);
    EXPECT_TRUE(out_.TryPush(*value + 1));
    return 1;
  }

  SpscRing<uint64_t>::Consumer in_;
  SpscRing<uint64_t>::Producer out_;
  Doorbell bell_;
  std::atomic<uint64_t> last_{0};
  CoreRunner runner_;
};

// Would catch: going to sleep without looking once more, a flag read before the work is published.
TEST(CoreRunner, NoWakeUpIsLost) {
  SystemClock clock;
  auto there = SpscRing<uint64_t>::Create(4);
  auto back = SpscRing<uint64_t>::Create(4);
  Player left("left", std::move(back.second), std::move(there.first), &clock);
  Player right("right", std::move(there.second), std::move(back.first), &clock);
  left.runner().AddPeer(&right.runner());
  right.runner().AddPeer(&left.runner());
  left.Serve();
  std::thread left_thread([&] { left.runner().Run(); });
  std::thread right_thread([&] { right.runner().Run(); });
  const int64_t deadline_ns = clock.MonotonicNs() + 50 * kNanosPerSecond;
  while (left.last() < kRoundTrips && clock.MonotonicNs() < deadline_ns) {
    std::this_thread::yield();
  }
  EXPECT_GE(left.last(), kRoundTrips) << "a runner slept on while it had work";
  left.runner().Stop();
  right.runner().Stop();
  left_thread.join();
  right_thread.join();
}

// Would catch: a Stop that a sleeping runner does not notice.
TEST(CoreRunner, StopEndsASleep) {
  SystemClock clock;
  auto bell = Doorbell::Create();
  ASSERT_TRUE(bell.has_value());
  CoreRunner runner(
      "idle", IdleStrategy::kSleep, &clock,
      {.wait = [&](int64_t) { bell->Wait(60 * kNanosPerSecond); }, .wake = [&] { bell->Wake(); }});
  std::atomic<bool> polled{false};
  runner.AddPoll([&] {
    polled.store(true);
    return 0;
  });
  const int64_t began_ns = clock.MonotonicNs();
  std::thread thread([&] { runner.Run(); });
  while (!polled.load()) std::this_thread::yield();
  runner.Stop();
  thread.join();
  EXPECT_LT(clock.MonotonicNs() - began_ns, 50 * kNanosPerSecond);
}

}  // namespace
}  // namespace engram
