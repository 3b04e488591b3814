// A process that dies of a record says of which; one that is killed says nothing.

#include "src/replay_crashes.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "index/log/replay_guard.h"
#include "tests/support/scratch_directory.h"

namespace engram {
namespace {

constexpr LogAddress kAddress = MakeLogAddress(1, MakeLogPosition(2, 4096));

class ReplayCrashesTest : public testing::Test {
 protected:
  // The signal that a process ends by that does `act` while the handler is there; 0: none.
  int EndOf(const std::function<void()>& act) {
    const pid_t child = fork();
    if (child == 0) {
      // Core files of these ends are of no use.
      const ReplayCrashHandler handler(folder_.path());
      const SignalStack stack;
      act();
      _exit(0);
    }
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  }
  std::map<LogAddress, uint32_t> Crashes() {
    const auto disk = CreatePosixDisk(
        folder_.path(), {.max_in_flight = 1, .max_open_files = 1, .registered_buffers = {}});
    EXPECT_TRUE(disk.has_value());
    const auto crashes = ReadReplayCrashes(**disk);
    EXPECT_TRUE(crashes.has_value());
    return crashes.value_or(std::map<LogAddress, uint32_t>{});
  }
  using Counts = std::map<LogAddress, uint32_t>;

  ScratchDirectory folder_;
};

// What the compiler cannot know.
volatile bool g_ends = false;
int* volatile g_nowhere = reinterpret_cast<int*>(8);

[[gnu::noinline]] int Recurse(int depth) {
  volatile char room[4096];
  room[0] = static_cast<char>(depth);
  return g_ends ? depth : Recurse(depth + 1) + room[0];
}

TEST_F(ReplayCrashesTest, AnEndOfItsOwnMakingIsToldWithItsRecord) {
  EXPECT_EQ(EndOf([] {
              const ReplayScope scope(kAddress);
              std::abort();
            }),
            SIGABRT);
  EXPECT_EQ(Crashes(), (Counts{{kAddress, 1}}));
}

TEST_F(ReplayCrashesTest, AFaultOfTheThreadIsToldAlsoAtTheEndOfItsStack) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers have handlers of their own";
#endif
  EXPECT_EQ(EndOf([] {
              const ReplayScope scope(kAddress + 1);
              raise(SIGFPE);
            }),
            SIGFPE);
  EXPECT_EQ(Crashes(), (Counts{{kAddress + 1, 1}}));
  EXPECT_EQ(EndOf([] {
              const ReplayScope scope(kAddress);
              *g_nowhere = 1;
            }),
            SIGSEGV);
  EXPECT_EQ(EndOf([] {
              const ReplayScope scope(kAddress);
              Recurse(0);
            }),
            SIGSEGV);
  EXPECT_EQ(Crashes(), (Counts{{kAddress, 2}, {kAddress + 1, 1}}));
}

// Also by a signal that would count if it were the process's own. Sanitizers have a handler for
// SIGSEGV of their own.
TEST_F(ReplayCrashesTest, WhoeverIsKilledSaysNothing) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  const std::vector<int> signals = {SIGKILL, SIGABRT, SIGTERM};
#else
  const std::vector<int> signals = {SIGKILL, SIGABRT, SIGSEGV, SIGTERM};
#endif
  for (const int signal : signals) {
    EXPECT_EQ(EndOf([signal] {
                const ReplayScope scope(kAddress);
                const pid_t victim = getpid();
                if (fork() == 0) {
                  kill(victim, signal);
                  _exit(0);
                }
                for (;;) pause();
              }),
              signal);
    EXPECT_EQ(Crashes(), Counts{}) << signal;
  }
}

TEST_F(ReplayCrashesTest, OutsideOfAReplayNothingIsTold) {
  EXPECT_EQ(EndOf([] { std::abort(); }), SIGABRT);
  EXPECT_EQ(Crashes(), Counts{});
  // The handler is gone with its object.
  EXPECT_EQ(EndOf([this] {
              {
                const ReplayCrashHandler inner(folder_.path());
              }
              const ReplayScope scope(kAddress);
              (void)scope;
            }),
            0);
  EXPECT_EQ(Crashes(), Counts{});
}

TEST_F(ReplayCrashesTest, LinesThatAreNotWholeArePassedOver) {
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(EndOf([] {
                const ReplayScope scope(kAddress);
                std::abort();
              }),
              SIGABRT);
  }
  const std::string path = folder_.path() + "/" + kReplayCrashesName;
  std::ifstream file(path);
  std::string whole((std::istreambuf_iterator<char>(file)), {});
  ASSERT_EQ(whole.size() % 2, 0u);
  const size_t line = whole.size() / 2;
  for (size_t kept = 0; kept < line; ++kept) {
    // The first line was cut off, then a whole one came.
    std::ofstream(path, std::ios::trunc) << whole.substr(0, kept) << whole.substr(line);
    EXPECT_EQ(Crashes(), (Counts{{kAddress, 1}})) << kept;
    std::ofstream(path, std::ios::trunc) << whole.substr(0, line + kept);
    EXPECT_EQ(Crashes(), (Counts{{kAddress, 1}})) << kept;
  }
  for (size_t bit = 0; bit < line * 8; ++bit) {
    std::string turned = whole.substr(0, line);
    turned[bit / 8] = static_cast<char>(turned[bit / 8] ^ (1 << bit % 8));
    std::ofstream(path, std::ios::trunc) << turned;
    EXPECT_EQ(Crashes(), Counts{}) << bit;
  }
}

TEST_F(ReplayCrashesTest, TheFileIsRemovedOnce) {
  const auto disk = CreatePosixDisk(
      folder_.path(), {.max_in_flight = 1, .max_open_files = 1, .registered_buffers = {}});
  ASSERT_TRUE(disk.has_value());
  EXPECT_TRUE(RemoveReplayCrashes(**disk).has_value());
  EndOf([] {
    const ReplayScope scope(kAddress);
    std::abort();
  });
  EXPECT_EQ(Crashes().size(), 1u);
  EXPECT_TRUE(RemoveReplayCrashes(**disk).has_value());
  EXPECT_EQ(Crashes(), Counts{});
}

}  // namespace
}  // namespace engram
