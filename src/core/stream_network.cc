#include "src/core/stream_network.h"

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <new>
#include <utility>

#include "src/core/check.h"

namespace engram {

namespace {

constexpr size_t kMoveIovecs = 8;

size_t SizeOf(std::span<const std::span<const std::byte>> parts) {
  size_t bytes = 0;
  for (std::span<const std::byte> part : parts) bytes += part.size();
  return bytes;
}

// Between what was published and the look at whether the other side waits, and the other way round.
void Fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

}  // namespace

// ---------------------------------------------------------------------------------------------
// The client's end

StreamPipe::StreamPipe(StreamNetwork* network, uint32_t index, size_t ring_bytes)
    : network_(network), index_(index), to_network_(ring_bytes), to_client_(ring_bytes) {}

bool StreamPipe::Begin(StreamClient* client) {
  if (!to_network_.TakeBuffer() || !to_client_.TakeBuffer()) return false;
  client_ = client;
  to_network_.Reset();
  to_client_.Reset();
  writer_ = ByteRing::Producer(&to_network_);
  reader_ = ByteRing::Consumer(&to_client_);
  seen_.store(0, std::memory_order_relaxed);
  room_wanted_.store(0, std::memory_order_relaxed);
  end_.store(End::kNone, std::memory_order_relaxed);
  network_waits_.store(false, std::memory_order_relaxed);
  signals_.store(kQueued, std::memory_order_relaxed);
  return true;
}

void StreamPipe::Rouse(uint8_t signals) {
  StreamNetwork* const network = network_;
  const uint8_t before = signals_.fetch_or(signals | kQueued, std::memory_order_acq_rel);
  if ((before & kQueued) == 0) network->PushRoused(this);
}

bool StreamPipe::Write(std::span<const std::span<const std::byte>> parts) {
  if (end_.load(std::memory_order_acquire) != End::kNone) return false;
  const size_t bytes = SizeOf(parts);
  if (!writer_.HasRoom(bytes)) return false;
  if (bytes == 0) return true;
  writer_.Write(parts, bytes);
  Rouse(kQueued);
  return true;
}

bool StreamPipe::AwaitRoom(size_t bytes) {
  CHECK(bytes <= RoomAtMost(), "whoever waits for room that cannot be waits for ever");
  room_wanted_.store(std::max<uint64_t>(bytes, 1), std::memory_order_relaxed);
  Fence();
  if (end_.load(std::memory_order_acquire) != End::kNone) {
    // The client may have been told of the end before: it is told once more.
    Rouse(kQueued);
    return true;
  }
  if (!writer_.HasRoom(bytes)) return true;
  room_wanted_.store(0, std::memory_order_relaxed);
  return false;
}

std::span<const std::byte> StreamPipe::Peek() {
  if (end_.load(std::memory_order_acquire) == End::kCut) return {};
  // Bounded: nothing is consumed meanwhile, so the ring fills up.
  for (uint64_t there = reader_.Refresh(); there != seen_.load(std::memory_order_relaxed);
       there = reader_.Refresh()) {
    seen_.store(there, std::memory_order_relaxed);
    Fence();
  }
  return reader_.Peek();
}

void StreamPipe::Consume(size_t bytes) {
  reader_.Consume(bytes);
  Fence();
  if (!network_waits_.load(std::memory_order_relaxed)) return;
  if (reader_.Room() < network_->send_step_) return;
  network_waits_.store(false, std::memory_order_relaxed);
  Rouse(kQueued);
}

bool StreamPipe::ended() const {
  const End end = end_.load(std::memory_order_acquire);
  return end == End::kCut || (end == End::kAfterAll && reader_.Empty());
}

void StreamPipe::Close() { Rouse(kClosed); }

// ---------------------------------------------------------------------------------------------
// Making, connecting, waking

Result<std::unique_ptr<StreamNetwork>> StreamNetwork::Create(const StreamNetworkOptions& options) {
  CHECK(options.max_connections > 0 && options.max_connections < (1U << 24),
        "a network has 1 to 2^24 - 1 connections");
  CHECK(options.ring_bytes >= 64 && std::has_single_bit(options.ring_bytes),
        "a ring's size is a power of two");
  auto pool = SendPool::Create(options.send_pool_bytes);
  if (!pool) return std::unexpected(pool.error());
  auto bell = Doorbell::Create();
  if (!bell) return std::unexpected(bell.error());
  return std::unique_ptr<StreamNetwork>(
      new StreamNetwork(options, std::move(*pool), std::move(*bell)));
}

StreamNetwork::StreamNetwork(const StreamNetworkOptions& options, SendPool pool, Doorbell bell)
    : options_(options),
      send_step_(options.ring_bytes / 4),
      connections_(options.max_connections),
      pool_(std::move(pool)),
      bell_(std::move(bell)) {
  due_.reserve(options.max_connections);
  pipes_.reserve(options.max_connections);
  warm_.reserve(kWarmPipes);
  cold_.reserve(options.max_connections);
}

StreamNetwork::~StreamNetwork() {
  for (const std::unique_ptr<StreamPipe>& pipe : pipes_) {
    const bool closed = (pipe->signals_.load(std::memory_order_acquire) & StreamPipe::kClosed) != 0;
    if (closed && pipe->client_ != nullptr) pipe->client_->OnGone();
  }
}

StreamPipe* StreamNetwork::Connect(StreamClient* client) {
  StreamPipe* pipe = nullptr;
  {
    const std::lock_guard lock(mutex_);
    SortRetired();
    pipe = TakePipe();
    if (pipe == nullptr) return nullptr;
    if (!pipe->Begin(client)) {
      memory_errors_.fetch_add(1, std::memory_order_relaxed);
      cold_.push_back(pipe);
      return nullptr;
    }
  }
  open_pipes_.fetch_add(1, std::memory_order_relaxed);
  PushRoused(pipe);
  return pipe;
}

// Here rather than in the owner's turn: freeing takes its time.
void StreamNetwork::SortRetired() {
  StreamPipe* next = nullptr;
  for (StreamPipe* pipe = retired_.exchange(nullptr, std::memory_order_acquire); pipe != nullptr;
       pipe = next) {
    next = pipe->next_;
    if (warm_.size() < kWarmPipes) {
      warm_.push_back(pipe);
    } else {
      pipe->to_network_.FreeBuffer();
      pipe->to_client_.FreeBuffer();
      cold_.push_back(pipe);
    }
  }
}

StreamPipe* StreamNetwork::TakePipe() {
  const auto take = [](std::vector<StreamPipe*>& free) {
    StreamPipe* const pipe = free.back();
    free.pop_back();
    return pipe;
  };
  if (accepting_.load(std::memory_order_relaxed)) {
    if (!warm_.empty()) return take(warm_);
    if (!cold_.empty()) return take(cold_);
    if (pipes_.size() < options_.max_connections) {
      const uint32_t index = static_cast<uint32_t>(pipes_.size());
      std::unique_ptr<StreamPipe> pipe(new (std::nothrow)
                                           StreamPipe(this, index, options_.ring_bytes));
      if (pipe == nullptr) {
        memory_errors_.fetch_add(1, std::memory_order_relaxed);
        return nullptr;
      }
      return pipes_.emplace_back(std::move(pipe)).get();
    }
  }
  refused_.fetch_add(1, std::memory_order_relaxed);
  return nullptr;
}

void StreamNetwork::PushRoused(StreamPipe* pipe) {
  StreamPipe* head = roused_.load(std::memory_order_relaxed);
  do {
    pipe->next_ = head;
  } while (!roused_.compare_exchange_weak(head, pipe, std::memory_order_release,
                                          std::memory_order_relaxed));
  WakeCore();
}

void StreamNetwork::WakeCore() {
  Fence();
  // One of those who find it asleep is enough.
  if (sleeping_.load(std::memory_order_relaxed) &&
      sleeping_.exchange(false, std::memory_order_relaxed)) {
    bell_.Wake();
  }
  if (wake_) wake_();
}

void StreamNetwork::RouseSelf() {
  // Wait looks for itself.
  if (wake_) wake_();
}

bool StreamNetwork::HasWork() const {
  return !turns_.empty() || !due_.empty() || roused_.load(std::memory_order_relaxed) != nullptr;
}

void StreamNetwork::Wait(int64_t timeout_ns) {
  CHECK(started_, "Start comes before Wait");
  if (timeout_ns <= 0 || HasWork()) return;
  sleeping_.store(true, std::memory_order_relaxed);
  Fence();
  if (!HasWork()) bell_.Wait(timeout_ns);
  sleeping_.store(false, std::memory_order_relaxed);
}

Result<Endpoint> StreamNetwork::Listen(const Endpoint& endpoint) {
  return Fail(ErrorCode::kInvalidArgument,
              "listen on " + endpoint.ToString() +
                  ": the connections of this network are made within the process, by Connect");
}

Result<void> StreamNetwork::Start() {
  CHECK(!started_, "a network is started once");
  started_ = true;
  return {};
}

// ---------------------------------------------------------------------------------------------
// The owner's turns

void StreamNetwork::PipeQueue::Push(StreamPipe* pipe) {
  pipe->next_ = nullptr;
  if (head_ == nullptr) {
    head_ = pipe;
  } else {
    tail_->next_ = pipe;
  }
  tail_ = pipe;
  ++size_;
}

StreamPipe* StreamNetwork::PipeQueue::Pop() {
  --size_;
  return std::exchange(head_, head_->next_);
}

int StreamNetwork::Poll(NetworkHandler& handler, int budget) {
  CHECK(started_, "Start comes before Poll");
  polling_ = true;
  TakeRoused();
  int events = 0;
  // Pipes that have more have it in the next Poll.
  for (size_t left = std::min(turns_.size(), kTurnsPerPoll); left > 0 && events < budget; --left) {
    if (Serve(handler, turns_.Pop())) ++events;
  }
  TellClients();
  counters_[NetworkCounter::kConnectionsRefused].Set(refused_.load(std::memory_order_relaxed));
  counters_[NetworkCounter::kAcceptErrors].Set(memory_errors_.load(std::memory_order_relaxed));
  polling_ = false;
  // After a Poll without events the core may go to sleep.
  if (events == 0 && !turns_.empty()) RouseSelf();
  return events;
}

void StreamNetwork::TakeRoused() {
  if (roused_.load(std::memory_order_relaxed) == nullptr) return;
  StreamPipe* pipe = roused_.exchange(nullptr, std::memory_order_acquire);
  StreamPipe* eldest = nullptr;
  while (pipe != nullptr) {
    StreamPipe* const elder = std::exchange(pipe->next_, eldest);
    eldest = std::exchange(pipe, elder);
  }
  while (eldest != nullptr) turns_.Push(std::exchange(eldest, eldest->next_));
}

// At most one event; true when there was one.
bool StreamNetwork::Serve(NetworkHandler& handler, StreamPipe* pipe) {
  const uint8_t signals = pipe->signals_.fetch_and(static_cast<uint8_t>(~StreamPipe::kQueued),
                                                   std::memory_order_acq_rel);
  Connection& connection = connections_[pipe->index_];
  if (connection.phase == Phase::kFree) return Open(handler, pipe);
  MakeDue(connection);
  if ((signals & StreamPipe::kClosed) != 0 && !connection.client_closed) {
    connection.client_closed = true;
    pool_.Drop(connection.queue);  // Nobody reads it.
  }
  switch (connection.phase) {
    case Phase::kOpen:
      return ServeOpen(handler, connection);
    case Phase::kDraining:
      return ServeDraining(handler, connection);
    case Phase::kFinished:
      return ReportClosed(handler, connection);
    case Phase::kFree:
    case Phase::kOver:
      break;
  }
  return false;
}

bool StreamNetwork::Open(NetworkHandler& handler, StreamPipe* pipe) {
  Connection& connection = connections_[pipe->index_];
  const uint32_t generation = connection.generation + 1;
  connection = Connection();
  connection.pipe = pipe;
  connection.generation = generation == 0 ? 1 : generation;
  connection.receiver = ByteRing::Consumer(&pipe->to_network_);
  connection.sender = ByteRing::Producer(&pipe->to_client_);
  Mark(connection);  // The client may have written, or closed, before.
  if (!accepting_.load(std::memory_order_relaxed)) {
    refused_.fetch_add(1, std::memory_order_relaxed);
    connection.phase = Phase::kOver;
    EndPipe(connection, StreamPipe::End::kCut);
    return false;
  }
  connection.phase = Phase::kOpen;
  counters_[NetworkCounter::kConnectionsAccepted].Add(1);
  handler.OnAccept(IdOf(connection));
  return true;
}

bool StreamNetwork::ServeOpen(NetworkHandler& handler, Connection& connection) {
  Pump(connection);
  if (connection.paused) return false;
  if (HandOver(handler, connection)) return true;
  if (!connection.client_closed) return false;
  connection.cause = CloseCause::kPeerClosed;
  return ReportClosed(handler, connection);
}

// True when the handler was called.
bool StreamNetwork::HandOver(NetworkHandler& handler, Connection& connection) {
  connection.receiver.Refresh();
  std::span<const std::byte> bytes = connection.receiver.Peek();
  if (bytes.empty()) return false;
  bytes = bytes.first(std::min(bytes.size(), kReceiveBytes));
  counters_[NetworkCounter::kBytesReceived].Add(bytes.size());
  handler.OnReceive(IdOf(connection), bytes);
  connection.receiver.Consume(bytes.size());
  const bool more = connection.receiver.Unread() > 0 || connection.client_closed;
  if (more && connection.phase == Phase::kOpen && !connection.paused) Mark(connection);
  return true;
}

bool StreamNetwork::ServeDraining(NetworkHandler& handler, Connection& connection) {
  connection.receiver.Refresh();
  counters_[NetworkCounter::kBytesReceived].Add(connection.receiver.Unread());
  connection.receiver.Consume(connection.receiver.Unread());
  if (connection.client_closed) return ReportClosed(handler, connection);
  Pump(connection);
  const bool ended =
      connection.pipe->end_.load(std::memory_order_relaxed) != StreamPipe::End::kNone;
  if (connection.queue.bytes == 0 && !ended) EndPipe(connection, StreamPipe::End::kAfterAll);
  return false;
}

bool StreamNetwork::ReportClosed(NetworkHandler& handler, Connection& connection) {
  connection.phase = Phase::kOver;
  handler.OnClosed(IdOf(connection), connection.cause);
  return true;
}

void StreamNetwork::TellClients() {
  if (due_.empty()) return;
  Fence();
  for (size_t i = 0; i < due_.size(); ++i) {
    Connection& connection = connections_[due_[i]];
    connection.is_due = false;
    TellClient(connection);
  }
  due_.clear();
}

void StreamNetwork::TellClient(Connection& connection) {
  if (connection.client_closed) {
    LetGo(connection);
  } else if (HasNews(connection)) {
    connection.pipe->client_->OnReady();
  }
}

bool StreamNetwork::HasNews(Connection& connection) {
  StreamPipe& pipe = *connection.pipe;
  bool news = !std::exchange(connection.end_told, true);

  // Where the client has not seen yet what it was told of last, it will see this with it.
  const uint64_t sent = connection.sender.position();
  const uint64_t seen = pipe.seen_.load(std::memory_order_relaxed);
  news = news || (seen != sent && seen >= connection.told);
  connection.told = sent;

  const bool ended = pipe.end_.load(std::memory_order_relaxed) != StreamPipe::End::kNone;
  uint64_t wanted = pipe.room_wanted_.load(std::memory_order_relaxed);
  while (wanted != 0 && (ended || wanted <= connection.receiver.Room())) {
    // It fails where the client asks again.
    if (pipe.room_wanted_.compare_exchange_weak(wanted, 0, std::memory_order_relaxed)) return true;
  }
  return news;
}

// The client has closed.
void StreamNetwork::LetGo(Connection& connection) {
  StreamPipe* const pipe = connection.pipe;
  if (pipe->client_ != nullptr) std::exchange(pipe->client_, nullptr)->OnGone();
  if (connection.phase != Phase::kOver) return;
  CHECK((pipe->signals_.load(std::memory_order_relaxed) & StreamPipe::kQueued) == 0,
        "nobody rouses a pipe that is over");
  connection.phase = Phase::kFree;
  pipe->next_ = retired_.load(std::memory_order_relaxed);
  while (!retired_.compare_exchange_weak(pipe->next_, pipe, std::memory_order_release,
                                         std::memory_order_relaxed)) {
  }
  open_pipes_.fetch_sub(1, std::memory_order_release);
}

void StreamNetwork::Mark(Connection& connection) {
  const uint8_t before =
      connection.pipe->signals_.fetch_or(StreamPipe::kQueued, std::memory_order_acq_rel);
  if ((before & StreamPipe::kQueued) != 0) return;
  turns_.Push(connection.pipe);
  if (!polling_) RouseSelf();
}

void StreamNetwork::MakeDue(Connection& connection) {
  if (std::exchange(connection.is_due, true)) return;
  due_.push_back(connection.pipe->index_);
  if (!polling_ && due_.size() == 1) RouseSelf();
}

// ---------------------------------------------------------------------------------------------
// Sending and ending

const StreamNetwork::Connection* StreamNetwork::Find(ConnectionId connection) const {
  if (connection.index >= connections_.size()) return nullptr;
  const Connection& found = connections_[connection.index];
  if (found.generation != connection.generation) return nullptr;
  return found.phase == Phase::kOpen || found.phase == Phase::kDraining ? &found : nullptr;
}

StreamNetwork::Connection* StreamNetwork::Find(ConnectionId connection) {
  return const_cast<Connection*>(std::as_const(*this).Find(connection));
}

bool StreamNetwork::Send(ConnectionId connection,
                         std::span<const std::span<const std::byte>> parts) {
  Connection* found = Find(connection);
  if (found == nullptr || found->phase != Phase::kOpen) return false;
  const size_t bytes = SizeOf(parts);
  if (bytes == 0 || found->client_closed) return true;
  size_t direct = 0;
  if (found->queue.bytes == 0) {
    direct = found->sender.HasRoom(bytes) ? bytes : std::min(bytes, found->sender.Room());
  }
  const size_t rest = bytes - direct;
  if (rest > options_.send_limit_bytes || found->queue.bytes > options_.send_limit_bytes - rest) {
    BeginClosing(*found, CloseCause::kSendBacklog);
    return false;
  }
  if (rest > 0 && !MakeRoom(*found, rest)) return false;
  found->sender.Write(parts, direct);
  counters_[NetworkCounter::kBytesSent].Add(direct);
  MakeDue(*found);
  if (rest == 0) return true;
  for (std::span<const std::byte> part : parts) {
    const size_t sent = std::min(direct, part.size());
    direct -= sent;
    const std::array<std::span<const std::byte>, 1> unsent{part.subspan(sent)};
    pool_.Append(found->queue, unsent);
  }
  Pump(*found);
  return true;
}

size_t StreamNetwork::SendBacklog(ConnectionId connection) const {
  const Connection* found = Find(connection);
  return found == nullptr ? 0 : found->queue.bytes;
}

void StreamNetwork::SetReceivePaused(ConnectionId connection, bool paused) {
  Connection* found = Find(connection);
  if (found == nullptr || found->paused == paused) return;
  found->paused = paused;
  if (!paused) Mark(*found);
}

void StreamNetwork::Close(ConnectionId connection, CloseMode mode) {
  Connection* found = Find(connection);
  if (found == nullptr) return;
  if (mode == CloseMode::kNow) {
    BeginClosing(*found, CloseCause::kLocal);
  } else if (found->phase == Phase::kOpen) {
    found->phase = Phase::kDraining;
    found->cause = CloseCause::kLocal;
    Mark(*found);
  }
}

void StreamNetwork::BeginClosing(Connection& connection, CloseCause cause) {
  if (connection.phase == Phase::kOpen) connection.cause = cause;
  if (cause == CloseCause::kSendBacklog) counters_[NetworkCounter::kSendBacklogCloses].Add(1);
  connection.phase = Phase::kFinished;
  pool_.Drop(connection.queue);
  EndPipe(connection, StreamPipe::End::kCut);
  Mark(connection);
}

void StreamNetwork::EndPipe(Connection& connection, StreamPipe::End end) {
  connection.pipe->end_.store(end, std::memory_order_release);
  connection.end_told = false;
  MakeDue(connection);
}

// Sends what there is room for, and has the client rouse us when there is room for more.
void StreamNetwork::Pump(Connection& connection) {
  if (connection.queue.bytes == 0) return;
  MoveQueued(connection);
  if (connection.queue.bytes == 0) return;
  connection.pipe->network_waits_.store(true, std::memory_order_relaxed);
  Fence();
  if (connection.sender.Room() >= send_step_) Mark(connection);
}

void StreamNetwork::MoveQueued(Connection& connection) {
  std::array<iovec, kMoveIovecs> queued;
  std::array<std::span<const std::byte>, kMoveIovecs> parts;
  size_t room = std::min(connection.sender.Room(), connection.queue.bytes);
  counters_[NetworkCounter::kBytesSent].Add(room);
  while (room > 0) {
    const size_t count = pool_.Gather(connection.queue, queued);
    for (size_t i = 0; i < count; ++i) {
      parts[i] = {static_cast<const std::byte*>(queued[i].iov_base), queued[i].iov_len};
    }
    const auto gathered = std::span(parts).first(count);
    const size_t step = std::min(room, SizeOf(gathered));
    connection.sender.Write(gathered, step);
    pool_.Consume(connection.queue, step);
    room -= step;
    MakeDue(connection);
  }
}

// Makes sure of the pool's blocks for `bytes` more, at the cost of whoever has the largest backlog
// of bytes that its client has left no room for. False when that was `connection` itself, or
// `bytes` are more than the pool has.
bool StreamNetwork::MakeRoom(Connection& connection, size_t bytes) {
  const auto lacking = [&](size_t blocks) {
    return pool_.BlocksNeeded(connection.queue, bytes) > blocks;
  };
  if (lacking(pool_.total_blocks())) BeginClosing(connection, CloseCause::kSendBacklog);
  while (connection.phase == Phase::kOpen && lacking(pool_.free_blocks())) {
    MoveQueued(LargestBacklog());
    if (lacking(pool_.free_blocks())) BeginClosing(LargestBacklog(), CloseCause::kSendBacklog);
  }
  return connection.phase == Phase::kOpen;
}

// Somebody has a backlog.
StreamNetwork::Connection& StreamNetwork::LargestBacklog() {
  Connection& largest = *std::ranges::max_element(
      connections_, {}, [](const Connection& connection) { return connection.queue.bytes; });
  CHECK(largest.queue.bytes > 0, "blocks that are not free hold a backlog");
  return largest;
}

}  // namespace engram
