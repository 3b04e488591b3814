#include "src/core/file_lease.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace engram {
namespace {

constexpr int64_t kFor = 10 * kNanosPerSecond;

TEST(FileLeaseTest, OnlyItsOwnerExtendsAndEndsIt) {
  FileLease lease;
  const FileLease::Owner a = lease.NewOwner();
  const FileLease::Owner b = lease.NewOwner();
  ASSERT_NE(a, b);
  EXPECT_FALSE(lease.Runs(0));
  EXPECT_EQ(lease.Extend(a, 1'000, kFor), 0);
  EXPECT_TRUE(lease.Runs(1'000));
  const int64_t left_ns = lease.Extend(b, kNanosPerSecond, kFor);
  EXPECT_GE(left_ns, kFor - kNanosPerSecond);
  EXPECT_LE(left_ns, kFor);
  lease.End(b);
  EXPECT_TRUE(lease.Runs(kNanosPerSecond));
  EXPECT_EQ(lease.Extend(a, kNanosPerSecond, kFor), 0);
  EXPECT_TRUE(lease.Runs(kFor + kNanosPerSecond - 1));
  lease.End(a);
  EXPECT_FALSE(lease.Runs(kNanosPerSecond));
  EXPECT_EQ(lease.Extend(b, kNanosPerSecond, kFor), 0);
}

// The end is never early, whatever the clock says.
TEST(FileLeaseTest, ItEndsByItselfAndThenAnotherMayHaveIt) {
  for (const int64_t now_ns : {int64_t{0}, int64_t{1}, int64_t{999'999}, int64_t{1'000'000},
                               int64_t{86'400} * 365 * kNanosPerSecond + 7}) {
    FileLease lease;
    const FileLease::Owner a = lease.NewOwner();
    const FileLease::Owner b = lease.NewOwner();
    ASSERT_EQ(lease.Extend(a, now_ns, kFor), 0);
    EXPECT_TRUE(lease.Runs(now_ns + kFor - 1));
    EXPECT_FALSE(lease.Runs(now_ns + kFor + kNanosPerMilli));
    EXPECT_EQ(lease.Extend(b, now_ns + kFor + kNanosPerMilli, kFor), 0);
    // Who had it before does not end what another has now.
    lease.End(a);
    EXPECT_TRUE(lease.Runs(now_ns + kFor + kNanosPerMilli));
    EXPECT_GT(lease.Extend(a, now_ns + kFor + kNanosPerMilli, kFor), 0);
  }
}

TEST(FileLeaseTest, OfManyThreadsOneHasIt) {
  constexpr int kThreads = 4;
  constexpr int kTurns = 20'000;
  FileLease lease;
  std::atomic<int> inside{0};
  std::atomic<int> turns{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      const FileLease::Owner owner = lease.NewOwner();
      for (int i = 0; i < kTurns; ++i) {
        if (lease.Extend(owner, 1, kFor) != 0) continue;
        EXPECT_EQ(inside.fetch_add(1), 0);
        turns.fetch_add(1);
        inside.fetch_sub(1);
        lease.End(owner);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(turns.load(), 0);
  EXPECT_FALSE(lease.Runs(1));
}

}  // namespace
}  // namespace engram
