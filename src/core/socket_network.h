#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "src/core/network.h"
#include "src/core/send_queue.h"

namespace engram {

// A queue of small numbers in which each stands at most once, so its room is known beforehand.
class UniqueQueue {
 public:
  explicit UniqueQueue(uint32_t count) : entries_(count), contains_(count, 0) {}

  // Does nothing when `value` already waits.
  void Push(uint32_t value) {
    if (contains_[value] != 0) return;
    contains_[value] = 1;
    const size_t end = head_ + size_;
    entries_[end < entries_.size() ? end : end - entries_.size()] = value;
    ++size_;
  }
  // Not empty.
  uint32_t Pop() {
    const uint32_t value = entries_[head_];
    contains_[value] = 0;
    if (++head_ == entries_.size()) head_ = 0;
    --size_;
    return value;
  }
  bool Contains(uint32_t value) const { return contains_[value] != 0; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }

 private:
  std::vector<uint32_t> entries_;
  std::vector<uint8_t> contains_;
  size_t head_ = 0;
  size_t size_ = 0;
};

// A socket that listens.
struct Listener {
  int fd = -1;
  Endpoint endpoint;  // with the port that was given
};
// Errors: name the address and the remedy. The caller closes `fd`.
// `share_port`: others of this process may listen on it too.
Result<Listener> OpenListener(const Endpoint& endpoint, bool share_port);

// What the backends with real sockets share: the table of connections, the way a connection ends,
// what waits to be sent, and Wake. A backend adds how events come in.
//
// Thread safety: Listen and the destructor before and after the owner's time; Wake and counters()
// from anywhere; everything else is the owner's alone.
// Invariants: a connection whose phase is open, draining or closing has a descriptor, which is
// closed exactly once, in Finish, when no operation of the kernel uses it. Whatever changes a
// connection's state marks it; the backend looks at marked connections before Poll ends, so what
// has to be done follows from the state alone, not from who changed it.
//
// A connection's life: open -> draining (no Send any more; what is queued goes out; bytes that come
// are thrown away) -> closing (operations of the kernel end) -> finished (closed, OnClosed waits
// for Poll) -> free. Draining is left out where there is nothing to wait for.
class SocketNetwork : public Network {
 public:
  ~SocketNetwork() override;

  Result<Endpoint> Listen(const Endpoint& endpoint) final;
  using Network::Send;
  bool Send(ConnectionId connection, std::span<const std::span<const std::byte>> parts) final;
  size_t SendBacklog(ConnectionId connection) const final;
  void SetReceivePaused(ConnectionId connection, bool paused) final;
  void Close(ConnectionId connection, CloseMode mode) final;
  void Wake() final;

 protected:
  enum class Phase : uint8_t { kFree, kOpen, kDraining, kClosing, kFinished };

  struct Connection {
    int fd = -1;
    uint32_t generation = 0;
    Phase phase = Phase::kFree;
    CloseCause cause = CloseCause::kLocal;  // meaningful from draining on; the first cause stays
    bool paused = false;
    bool peer_ended = false;
    bool shutdown_sent = false;
    bool cut = false;           // closed with bytes unsent
    bool send_blocked = false;  // the kernel's buffer was full when SendNow ended
    SendQueue queue;
  };

  struct Members {
    NetworkOptions options;
    SendPool pool;
    int wake_fd;
  };
  // The parts that can fail to be had.
  static Result<Members> CreateMembers(const NetworkOptions& options);
  explicit SocketNetwork(Members members);

  ConnectionId IdOf(uint32_t index) const { return {index, connections_[index].generation}; }
  // Null when the connection is gone.
  Connection* Find(ConnectionId connection);
  const Connection* Find(ConnectionId connection) const;
  void Mark(uint32_t index) { marked_.Push(index); }

  // Takes a place for an accepted socket; false when max_connections are open, `fd` is closed then.
  bool Open(int fd, uint32_t* index);
  // The peer's end of stream was read.
  void PeerEnded(uint32_t index);
  // From any phase to closing.
  void BeginClosing(uint32_t index, CloseCause cause);
  // Draining, with nothing left to send: sends our end of stream; goes on to closing after the
  // peer's.
  void AdvanceDraining(uint32_t index);
  // Closing and no operation of the kernel left: closes the descriptor.
  void Finish(uint32_t index);
  // OnClosed for up to `budget` finished connections. Returns how many.
  int DeliverFinished(NetworkHandler& handler, int budget);

  // Sends from the queue by system call until it is empty, the kernel's buffer is full
  // (send_blocked) or kSendTurnBytes are gone (marked again). Nothing is pinned.
  void SendNow(uint32_t index);

  // Accept failed for want of something that comes back: pause, so as not to spin.
  void PauseAccepting();
  // True once for a Wake since the last time.
  bool TakeWake() { return wake_pending_.exchange(false, std::memory_order_acq_rel); }

  // Bytes of one connection that one Poll sends at most by SendNow.
  static constexpr size_t kSendTurnBytes = size_t{1} << 20;
  // Polls for which accepting pauses after a failure, unless a connection closes or Wait is called.
  static constexpr uint32_t kAcceptPausePolls = 1024;

  // Constant after construction.
  const NetworkOptions options_;
  const int wake_fd_;  // eventfd; watched for edges, so nobody reads it
  // Owner core only.
  bool started_ = false;
  bool accept_stopped_ = false;
  uint32_t accept_pause_polls_ = 0;
  std::vector<Listener> listeners_;
  std::vector<Connection> connections_;
  UniqueQueue marked_;
  UniqueQueue finished_;
  SendPool pool_;

 private:
  // Makes sure of the pool's blocks for `bytes` more of `index`, at the cost of whoever has the
  // largest backlog. False when that was `index` itself, or its Send is larger than the pool.
  bool MakeRoom(uint32_t index, size_t bytes);
  uint32_t LargestBacklog() const;

  std::vector<uint32_t> free_slots_;
  // Any thread.
  std::atomic<bool> wake_pending_{false};
};

}  // namespace engram
