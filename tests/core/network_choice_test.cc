// Which backend is chosen where the kernel forbids something.

#include <gtest/gtest.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "tests/core/network_rig.h"

namespace engram {
namespace {

// Makes the system call `number` end the process, or fail with EPERM.
bool ForbidSystemCall(int number, bool kill) {
  std::array<sock_filter, 4> filter{{
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(number), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, kill ? SECCOMP_RET_KILL_PROCESS : SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  }};
  const sock_fprog program{.len = filter.size(), .filter = filter.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) == 0;
}

// Runs `body` in a child process; its exit code, or -1 when a signal ended it.
int InChild(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

constexpr int kCannotFilter = 77;

TEST(CreateNetworkTest, FallsBackWhereIoUringIsForbidden) {
  const int result = InChild([] {
    if (!ForbidSystemCall(SYS_io_uring_setup, false)) return kCannotFilter;
    std::string note;
    const auto chosen = CreateNetwork(NetworkBackend::kAuto, NetworkOptions{}, &note);
    if (!chosen || (*chosen)->backend() != "epoll") return 1;
    if (note !=
        "io_uring is forbidden here (io_uring_queue_init: Operation not permitted); using epoll") {
      return 2;
    }
    const auto forced = CreateNetwork(NetworkBackend::kUring, NetworkOptions{}, nullptr);
    if (forced || forced.error().code != ErrorCode::kPermissionDenied) return 3;
    return 0;
  });
  if (result == kCannotFilter) GTEST_SKIP() << "seccomp filters cannot be set here";
  EXPECT_EQ(result, 0);
}

TEST(CreateNetworkTest, FallsBackWhereBufferRingsAreMissing) {
  const int result = InChild([] {
    if (!ForbidSystemCall(SYS_io_uring_register, false)) return kCannotFilter;
    std::string note;
    const auto chosen = CreateNetwork(NetworkBackend::kAuto, NetworkOptions{}, &note);
    if (!chosen || (*chosen)->backend() != "epoll") return 1;
    return note.find("using epoll") == std::string::npos ? 2 : 0;
  });
  if (result == kCannotFilter) GTEST_SKIP() << "seccomp filters cannot be set here";
  EXPECT_EQ(result, 0);
}

TEST(CreateNetworkTest, SaysNothingWhereIoUringWorks) {
  std::string note = "left from before";
  const auto chosen = CreateNetwork(NetworkBackend::kAuto, NetworkOptions{}, &note);
  ASSERT_TRUE(chosen.has_value());
  EXPECT_EQ(note.empty(), (*chosen)->backend() == "io_uring");
}

TEST(UringNetworkTest, AnIdlePollMakesNoSystemCall) {
  const int result = InChild([] {
    auto created = CreateUringNetwork(NetworkOptions{});
    if (!created) return kCannotFilter;
    Network& network = **created;
    const auto endpoint = network.Listen({});
    if (!endpoint || !network.Start()) return 1;
    const Peer peer(*endpoint);
    Recorder handler;
    while (handler.accepted.empty()) network.Poll(handler, 16);
    for (int i = 0; i < 100; ++i) network.Poll(handler, 16);
    if (!ForbidSystemCall(SYS_io_uring_enter, true)) return kCannotFilter;
    for (int i = 0; i < 1000; ++i) network.Poll(handler, 16);
    return 0;
  });
  if (result == kCannotFilter) GTEST_SKIP() << "io_uring or seccomp filters cannot be had here";
  EXPECT_EQ(result, 0) << "-1: ended by the filter";
}

}  // namespace
}  // namespace engram
