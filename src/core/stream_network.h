#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string_view>
#include <vector>

#include "src/core/byte_ring.h"
#include "src/core/doorbell.h"
#include "src/core/network.h"
#include "src/core/result.h"
#include "src/core/send_queue.h"
#include "src/core/spsc_ring.h"

namespace engram {

class StreamNetwork;

// Who holds the client's end of a pipe. Its functions may call those of the pipe, and Connect, and
// nothing else of the network.
class StreamClient {
 public:
  virtual ~StreamClient() = default;
  // From the network's thread, at the end of a Poll in which there came bytes that no Peek has
  // seen, or room that AwaitRoom asked for, or the network's side ended the pipe; once for all of
  // them. Quick, never blocks, may be spurious, may come while a call to the pipe is under way;
  // never after OnGone. Where the network told of bytes and no Peek followed, it does not tell of
  // more.
  virtual void OnReady() = 0;
  // From the network's thread, the last call, at the end of the Poll that learns of Close. The
  // network has let go of the client, which may be deleted.
  virtual void OnGone() = 0;
};

// The client's end of a connection of a StreamNetwork.
//
// Thread safety: one thread at a time; another's calls happen before, which the caller sees to.
class StreamPipe {
 public:
  StreamPipe(const StreamPipe&) = delete;
  StreamPipe& operator=(const StreamPipe&) = delete;

  // All of `parts` together, or nothing: false where there is no room for them now, or the network
  // ended the pipe. Where it has begun to end it (kAfterSending) what is written is thrown away.
  [[nodiscard]] bool Write(std::span<const std::span<const std::byte>> parts);
  // What one Write can take at most, ever: the ring's size.
  size_t RoomAtMost() const { return to_network_.capacity(); }
  // An OnReady comes when there is room for `bytes`, or the pipe was ended (again, if it was told
  // of before). False: there is room already, and none comes; try again now. At most RoomAtMost.
  [[nodiscard]] bool AwaitRoom(size_t bytes);
  // Bytes that can be read now, as one span, valid until Consume: maybe fewer than there are, since
  // what lies at the other end of the ring comes once these were consumed. Whatever comes after
  // all that there is now is followed by an OnReady.
  std::span<const std::byte> Peek();
  // At most what Peek returned. Whoever leaves bytes in the pipe until more have come leaves at
  // most 3/4 of the ring, since the network waits for a quarter of it to send on.
  void Consume(size_t bytes);
  // The network ended it and nothing more can be read: after CloseMode::kAfterSending once all that
  // was sent was consumed; after kNow, or where the send backlog passed its limit, at once, and
  // what was not read is lost: Peek finds nothing, Write takes nothing. A span that Peek returned
  // before may still be read and consumed.
  bool ended() const;
  // Gives the pipe back: for the network the peer closed. OnGone follows. What was written before
  // is still handed over first, what was not read is thrown away. The last call to the pipe.
  void Close();

 private:
  friend class StreamNetwork;

  enum class End : uint8_t {
    kNone,
    kAfterAll,  // behind the bytes that are in the ring
    kCut,       // at once
  };
  // Signals.
  static constexpr uint8_t kQueued = 1;  // on its way to being looked after by the network
  static constexpr uint8_t kClosed = 2;  // by the client

  StreamPipe(StreamNetwork* network, uint32_t index, size_t ring_bytes);
  // For a new client. Nobody else uses the pipe. False where memory ran out.
  [[nodiscard]] bool Begin(StreamClient* client);
  // Has the network look after the pipe soon. After kClosed it may be another client's already.
  void Rouse(uint8_t signals);

  // Constant while it is somebody's.
  StreamNetwork* const network_;
  const uint32_t index_;            // ConnectionId::index
  StreamClient* client_ = nullptr;  // the network's; nullptr after OnGone

  ByteRing to_network_;
  ByteRing to_client_;

  // The client's alone. alignas: it is written with each call.
  alignas(kFalseSharingBytes) ByteRing::Producer writer_;
  ByteRing::Consumer reader_;

  // Written by the client, read by the network when it decides whether to tell. alignas: the
  // network's look must not take the lines beside it away from the client.
  alignas(kFalseSharingBytes) std::atomic<uint64_t> seen_{0};  // up to here by Peek
  std::atomic<uint64_t> room_wanted_{0};  // by AwaitRoom; 0: none, the network takes it back

  // Written by the network, read with each call. alignas: as above.
  alignas(kFalseSharingBytes) std::atomic<End> end_{End::kNone};
  // More is to be sent than there is room for; the client takes it back.
  std::atomic<bool> network_waits_{false};

  // Written by both. alignas: as above.
  alignas(kFalseSharingBytes) std::atomic<uint8_t> signals_{0};
  StreamPipe* next_ = nullptr;  // while kQueued, or given back
};

struct StreamNetworkOptions {
  uint32_t max_connections = 10'000;
  // Of each direction, a power of two, at least 64; memory is touched as it is used.
  size_t ring_bytes = size_t{128} * 1024;
  // As in NetworkOptions; what is in a ring counts as sent.
  size_t send_limit_bytes = size_t{16} << 20;
  size_t send_pool_bytes = size_t{64} << 20;
};

// A network whose connections are pipes within the process: two rings of bytes each, between a
// library's thread (gRPC's, Beast's) and the core that polls. A connection is accepted, receives,
// sends and ends as one of a socket does; nothing is copied on receiving, and once on sending.
//
// The way of a client's bytes: Write -> ring -> Rouse -> roused_ -> TakeRoused -> turns_ -> Serve
// -> HandOver -> OnReceive. Back: Send -> ring, where it is full: SendQueue, later Pump -> due_ ->
// TellClients -> OnReady -> Peek.
//
// How no wake-up is lost. Each side first publishes what it did, then looks whether the other one
// waits; whoever is about to wait first says so, then looks once more; a sequentially consistent
// fence between the two steps on either side, so at least one sees the other (Dekker's pattern):
// 1. The client wrote, closed or made room: kQueued is set by a read-modify-write. Whoever sets it
//    puts the pipe on roused_, and wakes the core if it sleeps. The network clears it, likewise,
//    before it looks at the pipe. So a pipe is in one queue at most, once, and nothing can be full.
// 2. The network sent: it tells where `seen_` is what it had told of before. Peek moves `seen_` to
//    all there is, and looks again.
// 3. The network made room: room_wanted_. It has no room: network_waits_.
//
// Thread safety: Connect and Wake from anywhere; SetWake once, before the first Connect;
// counters() and open_pipes() from anywhere; everything else is the owner's alone. It outlives all
// calls to it and its pipes; clients that closed and were not told OnGone are told by the
// destructor.
// Invariants: a pipe is free (in warm_, cold_ or retired_, or not made yet) or somebody's. Its
// place in connections_ is the network's alone; it is free, too, until the pipe is first served.
// Bytes are in a SendQueue only while the ring before it is full or network_waits_ is set or the
// pipe is queued. A client's Close is seen in Serve only, so whatever else the client has done was
// done before. A pipe is given back when both OnClosed and OnGone were told.
class StreamNetwork final : public Network {
 public:
  // Errors: kResourceExhausted.
  static Result<std::unique_ptr<StreamNetwork>> Create(const StreamNetworkOptions& options);
  ~StreamNetwork() override;

  // `wake` is called when there is work for Poll and the core may sleep elsewhere than in Wait; by
  // any thread, also the owner's own: after a Send outside Poll, and by a Poll that found no
  // events but more to look at.
  void SetWake(std::function<void()> wake) { wake_ = std::move(wake); }
  // Any thread; may allocate and lock. nullptr where max_connections are open, or it accepts no
  // more, or memory ran out. `client` lives until its OnGone; it may be told of something before
  // this returns. One that was connected and not accepted before StopAccepting finds its pipe
  // ended.
  StreamPipe* Connect(StreamClient* client);
  // Pipes whose clients have not closed, or of which there is more to hand over or to tell.
  uint32_t open_pipes() const { return open_pipes_.load(std::memory_order_acquire); }

  // Errors: kInvalidArgument always; clients call Connect.
  Result<Endpoint> Listen(const Endpoint& endpoint) override;
  Result<void> Start() override;
  int Poll(NetworkHandler& handler, int budget) override;
  using Network::Send;
  bool Send(ConnectionId connection, std::span<const std::span<const std::byte>> parts) override;
  size_t SendBacklog(ConnectionId connection) const override;
  // What a paused connection's client writes stays in the ring; that it closed is not seen either,
  // but that nothing need be sent any more.
  void SetReceivePaused(ConnectionId connection, bool paused) override;
  // OnClosed is told early after kNow, but the place is taken until the client closes, too.
  void Close(ConnectionId connection, CloseMode mode) override;
  void StopAccepting() override { accepting_.store(false, std::memory_order_relaxed); }
  void Wait(int64_t timeout_ns) override;
  void Wake() override { bell_.Wake(); }
  std::string_view backend() const override { return "streams"; }
  bool tells_of_lost_peers() const override { return true; }

 private:
  friend class StreamPipe;

  // A connection's life: free -> open -> draining (Close; what is queued goes out, what comes is
  // thrown away) -> finished (OnClosed waits for its turn) -> over (told; the client has to close).
  // Draining is left out where the client has closed or is cut off.
  enum class Phase : uint8_t { kFree, kOpen, kDraining, kFinished, kOver };

  // The network's end of a pipe.
  struct Connection {
    StreamPipe* pipe = nullptr;
    uint32_t generation = 0;
    Phase phase = Phase::kFree;
    CloseCause cause = CloseCause::kLocal;  // meaningful from draining on; the first cause stays
    bool paused = false;
    bool client_closed = false;
    bool is_due = false;   // in due_
    bool end_told = true;  // false: the pipe was ended, and its client is to hear of it
    uint64_t told = 0;     // bytes up to here were told of, or need not be
    ByteRing::Consumer receiver;
    ByteRing::Producer sender;
    SendQueue queue;
  };

  // First in, first out, through StreamPipe::next_.
  class PipeQueue {
   public:
    void Push(StreamPipe* pipe);
    StreamPipe* Pop();  // not empty
    size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }

   private:
    StreamPipe* head_ = nullptr;
    StreamPipe* tail_ = nullptr;
    size_t size_ = 0;
  };

  StreamNetwork(const StreamNetworkOptions& options, SendPool pool, Doorbell bell);

  // Any thread.
  StreamPipe* TakePipe();
  void SortRetired();
  void PushRoused(StreamPipe* pipe);
  void WakeCore();

  // The owner's turns.
  void TakeRoused();
  bool Serve(NetworkHandler& handler, StreamPipe* pipe);
  bool Open(NetworkHandler& handler, StreamPipe* pipe);
  bool ServeOpen(NetworkHandler& handler, Connection& connection);
  bool HandOver(NetworkHandler& handler, Connection& connection);
  bool ServeDraining(NetworkHandler& handler, Connection& connection);
  bool ReportClosed(NetworkHandler& handler, Connection& connection);
  void TellClients();
  void TellClient(Connection& connection);
  bool HasNews(Connection& connection);
  void LetGo(Connection& connection);

  // Sending and ending.
  void Pump(Connection& connection);
  void MoveQueued(Connection& connection);
  bool MakeRoom(Connection& connection, size_t bytes);
  Connection& LargestBacklog();
  void BeginClosing(Connection& connection, CloseCause cause);
  void EndPipe(Connection& connection, StreamPipe::End end);

  void Mark(Connection& connection);
  void MakeDue(Connection& connection);
  // There is something to do that a sleeping core would not do.
  void RouseSelf();
  bool HasWork() const;
  ConnectionId IdOf(const Connection& connection) const {
    return {.index = connection.pipe->index_, .generation = connection.generation};
  }
  // Null when the connection is gone.
  Connection* Find(ConnectionId connection);
  const Connection* Find(ConnectionId connection) const;

  // Bytes of one pipe that one event hands over at most.
  static constexpr size_t kReceiveBytes = size_t{64} * 1024;
  // Pipes that one Poll serves at most; fewer where the budget of events is spent before.
  static constexpr size_t kTurnsPerPoll = 256;
  // Pipes given back that keep their buffers, for the next ones.
  static constexpr size_t kWarmPipes = 64;

  // Constant after construction, `wake_` after SetWake.
  const StreamNetworkOptions options_;
  const size_t send_step_;  // room for which the network waits
  std::function<void()> wake_;

  // Owner core only. alignas: else each Poll would take the line of the constants away from the
  // clients.
  alignas(kFalseSharingBytes) bool started_ = false;
  bool polling_ = false;
  std::vector<Connection> connections_;  // by ConnectionId::index
  PipeQueue turns_;                      // pipes to be served
  std::vector<uint32_t> due_;            // connections whose clients may have to be told
  SendPool pool_;
  Doorbell bell_;

  // Connecting threads, under the mutex, which the owner's never takes.
  std::mutex mutex_;
  std::vector<std::unique_ptr<StreamPipe>> pipes_;  // by index, all that were ever made
  std::vector<StreamPipe*> warm_;                   // free, with buffers
  std::vector<StreamPipe*> cold_;                   // free, without

  // Any thread. alignas: each client's call writes roused_ or reads sleeping_; kept off the lines
  // that the owner writes.
  alignas(kFalseSharingBytes) std::atomic<StreamPipe*> roused_{nullptr};  // to be served, by age
  std::atomic<bool> sleeping_{false};
  std::atomic<bool> accepting_{true};
  std::atomic<StreamPipe*> retired_{nullptr};  // given back by the owner
  std::atomic<uint32_t> open_pipes_{0};
  std::atomic<uint64_t> refused_{0};
  std::atomic<uint64_t> memory_errors_{0};
};

}  // namespace engram
