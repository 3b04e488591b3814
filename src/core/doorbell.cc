#include "src/core/doorbell.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>

#include "src/core/clock.h"

namespace engram {

Result<Doorbell> Doorbell::Create() {
  const int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (fd < 0) return FailErrno("eventfd: raise the limit of open files (ulimit -n)", errno);
  return Doorbell(fd);
}

void Doorbell::Wait(int64_t timeout_ns) {
  pollfd entry{.fd = fd_.get(), .events = POLLIN, .revents = 0};
  const timespec timeout{.tv_sec = timeout_ns / kNanosPerSecond,
                         .tv_nsec = timeout_ns % kNanosPerSecond};
  if (ppoll(&entry, 1, &timeout, nullptr) <= 0) return;
  uint64_t rings = 0;
  // Nonblocking; whatever it says, the bell is silent now.
  (void)!read(fd_.get(), &rings, sizeof(rings));
}

void Doorbell::Wake() {
  const uint64_t ring = 1;
  // Fails only when the bell rings already.
  (void)!write(fd_.get(), &ring, sizeof(ring));
}

}  // namespace engram
