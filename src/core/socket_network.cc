#include "src/core/socket_network.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "src/core/check.h"

namespace engram {

namespace {

// Connections that may wait to be accepted; the kernel caps it with net.core.somaxconn.
constexpr int kListenBacklog = 4096;
constexpr size_t kSendNowIovecs = 16;

// A socket address of either family, as the system calls want it.
union SocketAddress {
  sockaddr any;
  sockaddr_in v4;
  sockaddr_in6 v6;
};

Result<socklen_t> FillAddress(const Endpoint& endpoint, SocketAddress* address) {
  std::memset(address, 0, sizeof(*address));
  const std::string host = endpoint.host == "localhost" ? "127.0.0.1" : endpoint.host;
  if (inet_pton(AF_INET, host.c_str(), &address->v4.sin_addr) == 1) {
    address->v4.sin_family = AF_INET;
    address->v4.sin_port = htons(endpoint.port);
    return socklen_t{sizeof(address->v4)};
  }
  if (inet_pton(AF_INET6, host.c_str(), &address->v6.sin6_addr) == 1) {
    address->v6.sin6_family = AF_INET6;
    address->v6.sin6_port = htons(endpoint.port);
    return socklen_t{sizeof(address->v6)};
  }
  return Fail(ErrorCode::kInvalidArgument,
              "listen on \"" + endpoint.host + "\": not an IPv4 or IPv6 address");
}

std::unexpected<Error> ListenError(const Endpoint& endpoint, int error) {
  std::string what = "listen on " + endpoint.ToString();
  switch (error) {
    case EADDRINUSE:
      return FailErrno(what + " (another process holds it: stop that one, or set another port)",
                       error);
    case EACCES:
    case EPERM:
      return FailErrno(what + " (set a port above 1023, or grant CAP_NET_BIND_SERVICE)", error);
    case EADDRNOTAVAIL:
      return Fail(ErrorCode::kInvalidArgument,
                  what +
                      ": this machine does not have that address; `ip address` lists those it "
                      "has");
    case EAFNOSUPPORT:
      return Fail(ErrorCode::kUnavailable,
                  what + ": this machine has no such address family; use the other one");
    case EMFILE:
    case ENFILE:
      return FailErrno(what + " (raise ulimit -n)", error);
    default:
      return FailErrno(what, error);
  }
}

void SetFlag(int fd, int level, int name) {
  const int on = 1;
  setsockopt(fd, level, name, &on, sizeof(on));
}

}  // namespace

Result<Listener> OpenListener(const Endpoint& endpoint, bool share_port) {
  SocketAddress address;
  const auto length = FillAddress(endpoint, &address);
  if (!length) return std::unexpected(length.error());
  Listener listener;
  listener.endpoint = endpoint;
  listener.fd = socket(address.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (listener.fd < 0) return ListenError(endpoint, errno);
  // A restart must not wait for old connections in TIME_WAIT.
  SetFlag(listener.fd, SOL_SOCKET, SO_REUSEADDR);
  if (share_port) SetFlag(listener.fd, SOL_SOCKET, SO_REUSEPORT);
  if (address.any.sa_family == AF_INET6) SetFlag(listener.fd, IPPROTO_IPV6, IPV6_V6ONLY);
  SocketAddress bound;
  socklen_t bound_length = sizeof(bound);
  if (bind(listener.fd, &address.any, *length) != 0 || listen(listener.fd, kListenBacklog) != 0 ||
      getsockname(listener.fd, &bound.any, &bound_length) != 0) {
    const int error = errno;
    close(listener.fd);
    return ListenError(endpoint, error);
  }
  listener.endpoint.port =
      ntohs(bound.any.sa_family == AF_INET6 ? bound.v6.sin6_port : bound.v4.sin_port);
  return listener;
}

Result<SocketNetwork::Members> SocketNetwork::CreateMembers(const NetworkOptions& options) {
  CHECK(options.max_connections > 0 && options.max_connections < (1U << 24),
        "a network has 1 to 2^24 - 1 connections");
  CHECK(options.receive_buffer_bytes > 0 && options.receive_buffers > 0,
        "a network needs a receive buffer");
  auto pool = SendPool::Create(options.send_pool_bytes);
  if (!pool) return std::unexpected(pool.error());
  const int wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (wake_fd < 0) return FailErrno("eventfd (raise ulimit -n)", errno);
  return Members{.options = options, .pool = std::move(*pool), .wake_fd = wake_fd};
}

SocketNetwork::SocketNetwork(Members members)
    : options_(members.options),
      wake_fd_(members.wake_fd),
      connections_(members.options.max_connections),
      marked_(members.options.max_connections),
      finished_(members.options.max_connections),
      pool_(std::move(members.pool)) {
  // The lowest place first: so few connections use few lines of the tables.
  free_slots_.reserve(options_.max_connections);
  for (uint32_t i = options_.max_connections; i > 0; --i) free_slots_.push_back(i - 1);
}

SocketNetwork::~SocketNetwork() {
  for (Connection& connection : connections_) {
    if (connection.fd >= 0) close(connection.fd);
  }
  for (Listener& listener : listeners_) {
    if (listener.fd >= 0) close(listener.fd);
  }
  close(wake_fd_);
}

Result<Endpoint> SocketNetwork::Listen(const Endpoint& endpoint) {
  CHECK(!started_, "Listen comes before Start");
  auto listener = OpenListener(endpoint, options_.share_port);
  if (!listener) return std::unexpected(listener.error());
  listeners_.push_back(*listener);
  return listener->endpoint;
}

const SocketNetwork::Connection* SocketNetwork::Find(ConnectionId connection) const {
  if (connection.index >= connections_.size()) return nullptr;
  const Connection& found = connections_[connection.index];
  if (found.generation != connection.generation) return nullptr;
  if (found.phase == Phase::kFree || found.phase == Phase::kFinished) return nullptr;
  return &found;
}

SocketNetwork::Connection* SocketNetwork::Find(ConnectionId connection) {
  return const_cast<Connection*>(std::as_const(*this).Find(connection));
}

bool SocketNetwork::Open(int fd, uint32_t* index) {
  if (free_slots_.empty()) {
    // Accepted and closed at once, so that the peer learns it and the listener's queue stays free.
    close(fd);
    counters_[NetworkCounter::kConnectionsRefused].Add(1);
    return false;
  }
  *index = free_slots_.back();
  free_slots_.pop_back();
  SetFlag(fd, IPPROTO_TCP, TCP_NODELAY);
  Connection& connection = connections_[*index];
  uint32_t generation = connection.generation + 1;
  if (generation == 0) generation = 1;
  connection = Connection{};
  connection.fd = fd;
  connection.generation = generation;
  connection.phase = Phase::kOpen;
  counters_[NetworkCounter::kConnectionsAccepted].Add(1);
  Mark(*index);
  return true;
}

bool SocketNetwork::Send(ConnectionId connection,
                         std::span<const std::span<const std::byte>> parts) {
  Connection* found = Find(connection);
  if (found == nullptr || found->phase != Phase::kOpen) return false;
  size_t bytes = 0;
  for (std::span<const std::byte> part : parts) bytes += part.size();
  if (bytes == 0) return true;
  const uint32_t index = connection.index;
  if (bytes > options_.send_limit_bytes || found->queue.bytes > options_.send_limit_bytes - bytes) {
    BeginClosing(index, CloseCause::kSendBacklog);
    return false;
  }
  if (!MakeRoom(index, bytes)) return false;
  pool_.Append(found->queue, parts);
  Mark(index);
  return true;
}

// 1. While enough blocks are free beyond a reserve, nothing needs doing. The reserve is there
//    because a closed connection's blocks that the kernel still reads come back later.
// 2. Most backlogs are only this Poll's, not yet offered to the kernel: offer them.
// 3. Then the largest backlogs go, until enough is free or about to be. Large ones are slow
//    readers, so those who read suffer nothing.
bool SocketNetwork::MakeRoom(uint32_t index, size_t bytes) {
  Connection& connection = connections_[index];
  const size_t reserve = pool_.total_blocks() / 16;
  const auto needed = [&] { return pool_.BlocksNeeded(connection.queue, bytes); };
  const auto lacking = [&](size_t free) { return needed() > 0 && free < needed() + reserve; };

  if (!lacking(pool_.free_blocks())) return true;

  for (size_t left = marked_.size(); left > 0 && lacking(pool_.free_blocks()); --left) {
    const uint32_t other = marked_.Pop();
    Connection& candidate = connections_[other];
    const bool sends = candidate.phase == Phase::kOpen || candidate.phase == Phase::kDraining;
    if (sends && candidate.queue.bytes > 0 && candidate.queue.pinned == 0) SendNow(other);
    Mark(other);  // There may be more to do than sending.
  }

  if (needed() + reserve > pool_.total_blocks()) BeginClosing(index, CloseCause::kSendBacklog);
  while (connection.phase == Phase::kOpen &&
         lacking(pool_.free_blocks() + pool_.returning_blocks())) {
    BeginClosing(LargestBacklog(), CloseCause::kSendBacklog);
  }
  if (connection.phase == Phase::kOpen && needed() > pool_.free_blocks()) {
    BeginClosing(index, CloseCause::kSendBacklog);
  }
  return connection.phase == Phase::kOpen;
}

// Somebody has a backlog.
uint32_t SocketNetwork::LargestBacklog() const {
  uint32_t largest = UINT32_MAX;
  size_t bytes = 0;
  for (uint32_t i = 0; i < connections_.size(); ++i) {
    if (connections_[i].queue.bytes <= bytes) continue;
    largest = i;
    bytes = connections_[i].queue.bytes;
  }
  CHECK(largest != UINT32_MAX, "blocks that are neither free nor returning hold a backlog");
  return largest;
}

void SocketNetwork::SendNow(uint32_t index) {
  Connection& connection = connections_[index];
  std::array<iovec, kSendNowIovecs> iovecs;
  size_t turn = 0;
  while (connection.queue.bytes > 0) {
    if (turn >= kSendTurnBytes) {
      Mark(index);
      return;
    }
    msghdr message{};
    message.msg_iov = iovecs.data();
    message.msg_iovlen = pool_.Gather(connection.queue, iovecs);
    const ssize_t sent = sendmsg(connection.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN) {
        connection.send_blocked = true;
        return;
      }
      // The kernel is short of memory for now: try again in the next Poll.
      if (errno == ENOBUFS || errno == ENOMEM) {
        Mark(index);
        return;
      }
      BeginClosing(index, CloseCause::kError);
      return;
    }
    pool_.Consume(connection.queue, static_cast<size_t>(sent));
    counters_[NetworkCounter::kBytesSent].Add(static_cast<uint64_t>(sent));
    turn += static_cast<size_t>(sent);
  }
}

size_t SocketNetwork::SendBacklog(ConnectionId connection) const {
  const Connection* found = Find(connection);
  return found == nullptr ? 0 : found->queue.bytes;
}

void SocketNetwork::SetReceivePaused(ConnectionId connection, bool paused) {
  Connection* found = Find(connection);
  if (found == nullptr || found->paused == paused) return;
  found->paused = paused;
  Mark(connection.index);
}

void SocketNetwork::Close(ConnectionId connection, CloseMode mode) {
  Connection* found = Find(connection);
  if (found == nullptr) return;
  if (mode == CloseMode::kNow) {
    BeginClosing(connection.index, CloseCause::kLocal);
    return;
  }
  if (found->phase != Phase::kOpen) return;
  found->phase = Phase::kDraining;
  found->cause = CloseCause::kLocal;
  Mark(connection.index);
}

void SocketNetwork::PeerEnded(uint32_t index) {
  Connection& connection = connections_[index];
  if (connection.phase == Phase::kOpen) {
    connection.phase = Phase::kDraining;
    connection.cause = CloseCause::kPeerClosed;
  }
  connection.peer_ended = true;
  Mark(index);
}

void SocketNetwork::BeginClosing(uint32_t index, CloseCause cause) {
  Connection& connection = connections_[index];
  if (connection.phase != Phase::kOpen && connection.phase != Phase::kDraining) return;
  if (connection.phase == Phase::kOpen) connection.cause = cause;
  if (cause == CloseCause::kSendBacklog) counters_[NetworkCounter::kSendBacklogCloses].Add(1);
  connection.phase = Phase::kClosing;
  connection.cut = connection.queue.bytes > 0 || cause == CloseCause::kSendBacklog;
  pool_.Drop(connection.queue);
  Mark(index);
}

void SocketNetwork::AdvanceDraining(uint32_t index) {
  Connection& connection = connections_[index];
  if (connection.peer_ended) {
    BeginClosing(index, connection.cause);
    return;
  }
  if (connection.shutdown_sent) return;
  connection.shutdown_sent = true;
  if (shutdown(connection.fd, SHUT_WR) != 0) BeginClosing(index, CloseCause::kError);
}

void SocketNetwork::Finish(uint32_t index) {
  Connection& connection = connections_[index];
  CHECK(connection.phase == Phase::kClosing, "only a closing connection is finished");
  CHECK(connection.queue.head == kNoSendBlock, "a finished connection holds no blocks");
  if (connection.cut) {
    // A reset tells the peer that bytes are missing, and frees the kernel's memory at once.
    const linger now{.l_onoff = 1, .l_linger = 0};
    setsockopt(connection.fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
  }
  close(std::exchange(connection.fd, -1));
  connection.phase = Phase::kFinished;
  finished_.Push(index);
  accept_pause_polls_ = 0;  // A descriptor came free.
}

int SocketNetwork::DeliverFinished(NetworkHandler& handler, int budget) {
  int events = 0;
  while (events < budget && !finished_.empty()) {
    const uint32_t index = finished_.Pop();
    Connection& connection = connections_[index];
    const CloseCause cause = connection.cause;
    connection.phase = Phase::kFree;
    free_slots_.push_back(index);
    ++events;
    handler.OnClosed(IdOf(index), cause);
  }
  return events;
}

void SocketNetwork::PauseAccepting() {
  accept_pause_polls_ = kAcceptPausePolls;
  counters_[NetworkCounter::kAcceptErrors].Add(1);
}

void SocketNetwork::Wake() {
  // Whoever finds it pending may rely on the one before: its write has happened or will.
  if (wake_pending_.exchange(true, std::memory_order_acq_rel)) return;
  const int saved_errno = errno;  // This may run in a signal handler.
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof(one));
  errno = saved_errno;
}

}  // namespace engram
