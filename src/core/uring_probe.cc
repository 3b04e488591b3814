#include <liburing.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <memory>

#include "src/core/uring_setup.h"

namespace engram {

namespace {

// On a ring of its own, since the network's belongs to another thread.
class Probe {
 public:
  ~Probe() {
    if (has_ring_) io_uring_queue_exit(&ring_);
    for (int fd : fds_) {
      if (fd >= 0) close(fd);
    }
  }
  Result<void> Run();

 private:
  Result<void> Receive();
  Result<void> Accept();
  bool Complete(io_uring_cqe* out);

  io_uring ring_{};
  bool has_ring_ = false;
  std::array<int, 4> fds_{-1, -1, -1, -1};
  alignas(kUringPageBytes) std::array<std::byte, 2 * kUringPageBytes> memory_{};
  BufferRing buffers_;
};

Result<void> Probe::Run() {
  if (const int error = io_uring_queue_init(8, &ring_, kUringSetupFlags); error != 0) {
    return UringRefused("io_uring_queue_init", -error);
  }
  has_ring_ = true;
  if ((ring_.features & IORING_FEAT_SUBMIT_STABLE) == 0 ||
      (ring_.features & IORING_FEAT_NODROP) == 0 || (ring_.features & IORING_FEAT_EXT_ARG) == 0) {
    return Fail(ErrorCode::kUnavailable, "io_uring lacks features; it needs Linux 6.1 or later");
  }
  if (auto received = Receive(); !received) return received;
  return Accept();
}

bool Probe::Complete(io_uring_cqe* out) {
  __kernel_timespec timeout{.tv_sec = 1, .tv_nsec = 0};
  io_uring_cqe* cqe = nullptr;
  if (io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &timeout, nullptr) < 0) return false;
  if (cqe == nullptr) return false;
  *out = *cqe;
  io_uring_cqe_seen(&ring_, cqe);
  return true;
}

Result<void> Probe::Receive() {
  static_assert(sizeof(memory_) >= kUringPageBytes + 64);
  if (const int error = buffers_.Register(&ring_, memory_.data(), 64, 1); error != 0) {
    return UringRefused("io_uring_register_buf_ring", -error);
  }
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds_.data()) != 0) {
    return UringRefused("socketpair", errno);
  }
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
  io_uring_prep_recv_multishot(sqe, fds_[0], nullptr, 0, 0);
  sqe->flags |= IOSQE_BUFFER_SELECT;
  sqe->buf_group = kBufferGroup;
  io_uring_submit(&ring_);
  io_uring_cqe cqe;
  if (write(fds_[1], "x", 1) != 1 || !Complete(&cqe)) {
    return Fail(ErrorCode::kUnavailable, "io_uring multishot receive does not complete");
  }
  if (cqe.res < 0) return UringRefused("io_uring multishot receive", -cqe.res);
  const unsigned expected = IORING_CQE_F_BUFFER | IORING_CQE_F_MORE;
  if (cqe.res != 1 || (cqe.flags & expected) != expected) {
    return Fail(ErrorCode::kUnavailable, "io_uring receives, but not multishot into buffers");
  }
  return {};
}

Result<void> Probe::Accept() {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;  // No path: the kernel picks an abstract name.
  socklen_t length = sizeof(sa_family_t);
  fds_[2] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  fds_[3] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  sockaddr* any = reinterpret_cast<sockaddr*>(&address);
  if (fds_[2] < 0 || fds_[3] < 0 || bind(fds_[2], any, length) != 0 || listen(fds_[2], 1) != 0) {
    return UringRefused("a socket to try io_uring with", errno);
  }
  length = sizeof(address);
  if (getsockname(fds_[2], any, &length) != 0) return UringRefused("getsockname", errno);
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
  io_uring_prep_multishot_accept(sqe, fds_[2], nullptr, nullptr, SOCK_CLOEXEC);
  io_uring_submit(&ring_);
  io_uring_cqe cqe;
  if (connect(fds_[3], any, length) != 0 || !Complete(&cqe)) {
    return Fail(ErrorCode::kUnavailable, "io_uring multishot accept does not complete");
  }
  if (cqe.res < 0) return UringRefused("io_uring multishot accept", -cqe.res);
  close(cqe.res);
  if ((cqe.flags & IORING_CQE_F_MORE) == 0) {
    return Fail(ErrorCode::kUnavailable, "io_uring accepts, but not multishot");
  }
  return {};
}

}  // namespace

Result<void> ProbeUring() { return std::make_unique<Probe>()->Run(); }

}  // namespace engram
