#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <memory>
#include <utility>

#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/socket_network.h"

namespace engram {

namespace {

// Sockets taken from the listeners in one Poll.
constexpr int kAcceptTurn = 64;
constexpr int kEpollEvents = 256;

// What an epoll event belongs to: a connection (index below, generation above) or one of these.
constexpr uint32_t kWakeTag = UINT32_MAX;
constexpr uint32_t kListenerTag = UINT32_MAX - 1;  // the generation's place holds which listener

constexpr uint64_t Tag(uint32_t low, uint32_t high) { return uint64_t{high} << 32 | low; }

// epoll, edge-triggered: each descriptor is registered once and never changed. An edge sets
// `readable` or clears `send_blocked`; they change back when the kernel says EAGAIN. So pausing is
// not reading, and costs no system call.
class PosixNetwork final : public SocketNetwork {
 public:
  static Result<std::unique_ptr<Network>> Create(const NetworkOptions& options);
  explicit PosixNetwork(Members members);
  ~PosixNetwork() override {
    if (epoll_fd_ >= 0) close(epoll_fd_);
  }

  Result<void> Start() override;
  int Poll(NetworkHandler& handler, int budget) override;
  void StopAccepting() override;
  void Wait(int64_t timeout_ns) override;
  std::string_view backend() const override { return "epoll"; }

 private:
  struct Readiness {
    bool readable = false;
    bool hung_up = false;  // the end of stream or an error is on its way: read until it shows
  };

  void CollectReadiness(int64_t timeout_ns);
  void NoteEvent(const epoll_event& event);
  int Accept(NetworkHandler& handler, int budget);
  bool AcceptOne(NetworkHandler& handler, const Listener& listener, int* events);
  int Receive(NetworkHandler& handler, int budget);
  bool ReceiveOne(NetworkHandler& handler, uint32_t index);
  void ServiceMarked();
  void Service(uint32_t index);
  bool HasWork() const;

  // Constant after construction.
  int epoll_fd_ = -1;
  // Owner core only.
  std::unique_ptr<std::byte[]> receive_buffer_;
  std::vector<Readiness> readiness_;
  std::vector<uint8_t> listener_ready_;
  UniqueQueue ready_;  // readable connections, those that waited longest first
  bool has_pwait2_ = true;
};

Result<std::unique_ptr<Network>> PosixNetwork::Create(const NetworkOptions& options) {
  auto members = CreateMembers(options);
  if (!members) return std::unexpected(members.error());
  auto network = std::make_unique<PosixNetwork>(std::move(*members));
  network->epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  if (network->epoll_fd_ < 0) return FailErrno("epoll_create1 (raise ulimit -n)", errno);
  return network;
}

PosixNetwork::PosixNetwork(Members members)
    : SocketNetwork(std::move(members)),
      receive_buffer_(std::make_unique<std::byte[]>(options_.receive_buffer_bytes)),
      readiness_(options_.max_connections),
      ready_(options_.max_connections) {}

Result<void> PosixNetwork::Start() {
  CHECK(!started_, "a network is started once");
  started_ = true;
  epoll_event event{};
  event.events = EPOLLIN | EPOLLET;
  event.data.u64 = Tag(kWakeTag, 0);
  if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, wake_fd_, &event) != 0) {
    return FailErrno("epoll_ctl of the eventfd", errno);
  }
  listener_ready_.assign(listeners_.size(), 0);
  for (uint32_t i = 0; i < listeners_.size() && !accept_stopped_; ++i) {
    event.data.u64 = Tag(kListenerTag, i);
    if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, listeners_[i].fd, &event) != 0) {
      return FailErrno("epoll_ctl of " + listeners_[i].endpoint.ToString(), errno);
    }
  }
  return {};
}

int PosixNetwork::Poll(NetworkHandler& handler, int budget) {
  CHECK(started_, "Start comes before Poll");
  if (accept_pause_polls_ > 0) --accept_pause_polls_;
  int events = DeliverFinished(handler, budget);
  CollectReadiness(0);
  events += Accept(handler, budget - events);
  events += Receive(handler, budget - events);
  ServiceMarked();
  if (!finished_.empty()) {
    events += DeliverFinished(handler, budget - events);
    ServiceMarked();  // OnClosed may have sent to others.
  }
  return events;
}

void PosixNetwork::CollectReadiness(int64_t timeout_ns) {
  std::array<epoll_event, kEpollEvents> events;
  int count = -1;
  if (timeout_ns > 0 && has_pwait2_) {
    const timespec timeout{.tv_sec = timeout_ns / kNanosPerSecond,
                           .tv_nsec = timeout_ns % kNanosPerSecond};
    count = epoll_pwait2(epoll_fd_, events.data(), kEpollEvents, &timeout, nullptr);
    has_pwait2_ = count >= 0 || errno != ENOSYS;
  }
  if (timeout_ns <= 0 || !has_pwait2_) {
    const int64_t timeout_ms = (timeout_ns + kNanosPerMilli - 1) / kNanosPerMilli;
    count = epoll_wait(epoll_fd_, events.data(), kEpollEvents,
                       static_cast<int>(std::clamp<int64_t>(timeout_ms, 0, INT32_MAX)));
  }
  CHECK(count >= 0 || errno == EINTR, "epoll_wait fails for a signal only");
  for (int i = 0; i < count; ++i) NoteEvent(events[static_cast<size_t>(i)]);
}

void PosixNetwork::NoteEvent(const epoll_event& event) {
  const uint32_t low = static_cast<uint32_t>(event.data.u64);
  const uint32_t high = static_cast<uint32_t>(event.data.u64 >> 32);
  if (low == kWakeTag) return;  // Wait looks at the flag.
  if (low == kListenerTag) {
    listener_ready_[high] = 1;
    return;
  }
  Connection* connection = Find({.index = low, .generation = high});
  if (connection == nullptr) return;
  Readiness& readiness = readiness_[low];
  if ((event.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) readiness.hung_up = true;
  if ((event.events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) {
    readiness.readable = true;
    ready_.Push(low);
  }
  if ((event.events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0 && connection->send_blocked) {
    connection->send_blocked = false;
    Mark(low);
  }
}

int PosixNetwork::Accept(NetworkHandler& handler, int budget) {
  int events = 0;
  int turn = kAcceptTurn;
  for (size_t i = 0; i < listeners_.size(); ++i) {
    while (listener_ready_[i] != 0 && accept_pause_polls_ == 0 && events < budget && turn-- > 0) {
      if (!AcceptOne(handler, listeners_[i], &events)) listener_ready_[i] = 0;
    }
  }
  return events;
}

// False when nothing waits any more.
bool PosixNetwork::AcceptOne(NetworkHandler& handler, const Listener& listener, int* events) {
  if (listener.fd < 0) return false;
  const int fd = accept4(listener.fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd < 0) {
    if (errno == EAGAIN) return false;
    // Errors of the connection that was waiting (accept(2)); the next one may be sound.
    const bool of_connection = errno == ECONNABORTED || errno == EINTR || errno == EPROTO ||
                               errno == ENETDOWN || errno == EHOSTUNREACH || errno == ENETUNREACH ||
                               errno == EHOSTDOWN || errno == ENONET || errno == ENOPROTOOPT ||
                               errno == EPERM;
    if (!of_connection) PauseAccepting();
    return true;
  }
  uint32_t index = 0;
  if (!Open(fd, &index)) return true;
  readiness_[index] = Readiness{};
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.u64 = Tag(index, connections_[index].generation);
  ++*events;
  handler.OnAccept(IdOf(index));
  if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) {
    PauseAccepting();
    BeginClosing(index, CloseCause::kError);
  }
  return true;
}

int PosixNetwork::Receive(NetworkHandler& handler, int budget) {
  int events = 0;
  // One buffer a connection in one Poll, so that a fast peer does not hold up the others.
  for (size_t left = ready_.size(); left > 0 && events < budget; --left) {
    if (ReceiveOne(handler, ready_.Pop())) ++events;
  }
  return events;
}

// True when the handler was called.
bool PosixNetwork::ReceiveOne(NetworkHandler& handler, uint32_t index) {
  Connection& connection = connections_[index];
  Readiness& readiness = readiness_[index];
  const bool reads = (connection.phase == Phase::kOpen && !connection.paused) ||
                     (connection.phase == Phase::kDraining && !connection.peer_ended);
  if (!reads || !readiness.readable) return false;
  const ssize_t received =
      recv(connection.fd, receive_buffer_.get(), options_.receive_buffer_bytes, MSG_DONTWAIT);
  if (received < 0) {
    if (errno == EAGAIN) {
      readiness.readable = false;
    } else if (errno == EINTR || errno == ENOBUFS || errno == ENOMEM) {
      ready_.Push(index);
    } else {
      BeginClosing(index, CloseCause::kError);
    }
    return false;
  }
  if (received == 0) {
    readiness.readable = false;
    PeerEnded(index);
    return false;
  }
  const size_t bytes = static_cast<size_t>(received);
  counters_[NetworkCounter::kBytesReceived].Add(bytes);
  // Less than asked for means that nothing is left, unless the end of stream follows, for which no
  // further edge would come.
  readiness.readable = bytes == options_.receive_buffer_bytes || readiness.hung_up;
  if (readiness.readable) ready_.Push(index);
  if (connection.phase == Phase::kDraining) return false;
  handler.OnReceive(IdOf(index), {receive_buffer_.get(), bytes});
  return true;
}

void PosixNetwork::ServiceMarked() {
  // Those that Service marks again are for the next Poll.
  for (size_t left = marked_.size(); left > 0; --left) Service(marked_.Pop());
}

void PosixNetwork::Service(uint32_t index) {
  Connection& connection = connections_[index];
  if (connection.phase == Phase::kOpen || connection.phase == Phase::kDraining) {
    if (readiness_[index].readable) ready_.Push(index);
    if (!connection.send_blocked) SendNow(index);
  }
  if (connection.phase == Phase::kDraining && connection.queue.bytes == 0) AdvanceDraining(index);
  if (connection.phase == Phase::kClosing) {
    // Out of epoll first: another holder of the descriptor would keep it registered.
    epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, connection.fd, nullptr);
    Finish(index);
  }
}

void PosixNetwork::StopAccepting() {
  if (std::exchange(accept_stopped_, true)) return;
  for (Listener& listener : listeners_) close(std::exchange(listener.fd, -1));
}

bool PosixNetwork::HasWork() const {
  if (!marked_.empty() || !finished_.empty() || !ready_.empty()) return true;
  if (accept_pause_polls_ > 0) return false;
  return std::ranges::any_of(listener_ready_, [](uint8_t ready) { return ready != 0; });
}

void PosixNetwork::Wait(int64_t timeout_ns) {
  CHECK(started_, "Start comes before Wait");
  if (timeout_ns > 0 && !HasWork() && !TakeWake()) {
    CollectReadiness(timeout_ns);
    TakeWake();
    accept_pause_polls_ = 0;
  }
}

}  // namespace

Result<std::unique_ptr<Network>> CreatePosixNetwork(const NetworkOptions& options) {
  return PosixNetwork::Create(options);
}

}  // namespace engram
