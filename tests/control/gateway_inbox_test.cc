#include "src/control/gateway_inbox.h"

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace engram {
namespace {

// Numbers that travel as if they were calls; nobody follows these pointers.
GatewayCommand CommandOf(uint64_t number) {
  return {.kind = GatewayCommand::Kind::kStart, .call = reinterpret_cast<GatewayCall*>(number)};
}
uint64_t NumberOf(const GatewayCommand& command) {
  return reinterpret_cast<uint64_t>(command.call);
}

class CountedCall final : public GatewayCall {
 public:
  explicit CountedCall(int* alive) : alive_(alive) { ++*alive_; }
  void Answered() override {}

 private:
  ~CountedCall() override { --*alive_; }
  int* alive_;
};

TEST(GatewayInboxTest, GivesBackInOrderOverManyRounds) {
  GatewayInbox inbox(4);
  EXPECT_FALSE(inbox.TryPop());
  uint64_t pushed = 0;
  uint64_t popped = 0;
  for (int round = 0; round < 100; ++round) {
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(inbox.TryPush(CommandOf(++pushed)));
    for (int i = 0; i < 3; ++i) ASSERT_EQ(NumberOf(inbox.TryPop().value()), ++popped);
    ASSERT_FALSE(inbox.TryPop());
  }
}

TEST(GatewayInboxTest, RefusesWhenFullAndTakesAgainAfterwards) {
  GatewayInbox inbox(4);
  ASSERT_EQ(inbox.capacity(), 4u);
  for (uint64_t i = 1; i <= 4; ++i) ASSERT_TRUE(inbox.TryPush(CommandOf(i)));
  EXPECT_FALSE(inbox.TryPush(CommandOf(5)));
  EXPECT_EQ(NumberOf(inbox.TryPop().value()), 1u);
  EXPECT_TRUE(inbox.TryPush(CommandOf(6)));
  EXPECT_FALSE(inbox.TryPush(CommandOf(7)));
  for (const uint64_t wanted : {2, 3, 4, 6}) EXPECT_EQ(NumberOf(inbox.TryPop().value()), wanted);
  EXPECT_FALSE(inbox.TryPop());
}

// A small inbox, so that it is full and empty all the time. TSan sees whether a command is whole.
TEST(GatewayInboxTest, ThreadsLoseNothingAndEachKeepsItsOrder) {
  constexpr uint64_t kThreads = 4;
  constexpr uint64_t kEach = 20'000;
  GatewayInbox inbox(8);
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&inbox, t] {
      for (uint64_t i = 1; i <= kEach; ++i) {
        while (!inbox.TryPush(CommandOf(t << 32 | i))) std::this_thread::yield();
      }
    });
  }
  std::vector<uint64_t> last(kThreads, 0);
  for (uint64_t taken = 0; taken < kThreads * kEach;) {
    const auto command = inbox.TryPop();
    if (!command) {
      std::this_thread::yield();
      continue;
    }
    ++taken;
    const uint64_t thread = NumberOf(*command) >> 32;
    ASSERT_LT(thread, kThreads);
    ASSERT_EQ(NumberOf(*command) & UINT32_MAX, ++last[thread]);
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(inbox.TryPop());
}

TEST(GatewayDoorTest, WakesForWhatItPushedOnly) {
  int alive = 0;
  int wakes = 0;
  GatewayInbox inbox(2);
  const std::atomic<uint32_t> retry_after_ms{17};
  GatewayDoor door(&inbox, &retry_after_ms, [&wakes] { ++wakes; });
  auto* call = new CountedCall(&alive);
  EXPECT_TRUE(door.Submit(call));
  EXPECT_EQ(wakes, 1);
  EXPECT_EQ(door.RetryAfterMs(), 17u);
  door.Cancel(call);
  EXPECT_EQ(wakes, 2);
  EXPECT_FALSE(door.Submit(call)) << "it is full";
  door.Cancel(call);
  EXPECT_EQ(wakes, 2);

  EXPECT_EQ(inbox.TryPop()->kind, GatewayCommand::Kind::kStart);
  const GatewayCommand cancel = inbox.TryPop().value();
  EXPECT_EQ(cancel.kind, GatewayCommand::Kind::kCancel);
  call->DropReference();
  EXPECT_EQ(alive, 1) << "the cancel in the inbox holds the call";
  cancel.call->DropReference();
  EXPECT_EQ(alive, 0) << "the cancel that was not taken holds nothing";
}

}  // namespace
}  // namespace engram
