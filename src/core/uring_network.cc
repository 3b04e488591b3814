#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <memory>
#include <string>
#include <utility>

#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/huge_page_arena.h"
#include "src/core/socket_network.h"
#include "src/core/uring_setup.h"

namespace engram {

namespace {

constexpr unsigned kSubmissionEntries = 2048;
constexpr unsigned kCompletionEntriesMin = 4096;
constexpr unsigned kCompletionEntriesMax = 32768;
constexpr uint32_t kReceiveBuffersMax = 32768;  // of one ring of provided buffers
constexpr size_t kSendIovecs = 8;
static_assert(kSendIovecs * kSendBlockBytes == 128 * 1024, "one send is worth a system call");

enum class Operation : uint8_t { kAccept = 1, kReceive, kSend, kCancel, kCancelAccept, kWake };

// What a completion belongs to, in user_data: 8 bits of operation, 24 of index (a connection or a
// listener), 32 of generation.
constexpr uint64_t Tag(Operation operation, uint32_t index, uint32_t generation) {
  return uint64_t{static_cast<uint8_t>(operation)} << 56 | uint64_t{index} << 32 | generation;
}
struct Completion {
  Operation operation;
  ConnectionId id;
  int result;
  uint32_t flags;
};
Completion Decode(const io_uring_cqe& cqe) {
  return {.operation = static_cast<Operation>(cqe.user_data >> 56),
          .id = {.index = static_cast<uint32_t>(cqe.user_data >> 32) & 0xFF'FFFF,
                 .generation = static_cast<uint32_t>(cqe.user_data)},
          .result = cqe.res,
          .flags = cqe.flags};
}

// Where sendmsg finds its arguments. The kernel reads them when the entry is submitted
// (IORING_FEAT_SUBMIT_STABLE), so there is one for each submission entry, not one a connection.
struct SendArguments {
  msghdr message;
  std::array<iovec, kSendIovecs> iovecs;
};

// io_uring. One multishot accept a listener, one multishot receive a connection, at most one
// sendmsg a connection. Completions change a connection's state and mark it; Service submits what
// the state calls for. All entries of a Poll go to the kernel in one system call, and an idle Poll
// makes none.
//
// Invariant beyond the base's: the kernel works on a connection exactly while receive_armed or its
// queue is pinned; only then may a completion with its generation come.
class UringNetwork final : public SocketNetwork {
 public:
  static Result<std::unique_ptr<Network>> Create(const NetworkOptions& options);
  UringNetwork(Members members, HugePageArena arena);
  ~UringNetwork() override;

  Result<void> Start() override;
  int Poll(NetworkHandler& handler, int budget) override;
  void StopAccepting() override;
  void Wait(int64_t timeout_ns) override;
  std::string_view backend() const override { return "io_uring"; }

 private:
  struct Operations {
    bool receive_armed = false;
    bool receive_cancelled = false;  // of the armed receive
    bool send_cancelled = false;     // of the send under way
  };

  Result<void> Open(uint32_t receive_buffers);
  using SocketNetwork::Open;

  void Enter();
  bool MustEnter() const;
  io_uring_sqe* NextEntry();

  int Harvest(NetworkHandler& handler, int budget);
  int OnCompletion(NetworkHandler& handler, const Completion& completion);
  int OnAccepted(NetworkHandler& handler, const Completion& completion);
  int OnReceived(NetworkHandler& handler, const Completion& completion);
  void EndReceive(uint32_t index, int result);
  void OnSent(const Completion& completion);
  void OnCancelFailed(const Completion& completion);

  void ServiceMarked();
  bool Service(uint32_t index);
  bool ArmReceive(uint32_t index);
  bool StartSend(uint32_t index);
  bool Cancel(uint64_t target, uint64_t tag);
  void ArmListeners();
  void ArmWake();
  void ArmStarved();
  bool HasWork() const;

  // Constant after Create.
  HugePageArena arena_;
  io_uring ring_{};
  bool has_ring_ = false;
  // Owner core only.
  BufferRing buffers_;
  uint32_t buffer_count_ = 0;
  std::vector<Operations> operations_;
  std::vector<uint8_t> listener_armed_;
  std::vector<uint8_t> listener_cancelled_;
  bool wake_armed_ = false;
  UniqueQueue starved_;  // receives that found no buffer, those that waited longest first
  std::unique_ptr<SendArguments[]> send_arguments_;
};

Result<std::unique_ptr<Network>> UringNetwork::Create(const NetworkOptions& options) {
  if (auto probed = ProbeUring(); !probed) return std::unexpected(probed.error());
  auto members = CreateMembers(options);
  if (!members) return std::unexpected(members.error());
  const uint32_t buffers = std::min(options.receive_buffers, kReceiveBuffersMax);
  ArenaOptions arena_options;
  arena_options.reserve_bytes = BufferRing::MemoryBytes(options.receive_buffer_bytes, buffers);
  auto arena = HugePageArena::Create(arena_options);
  if (!arena) {
    close(members->wake_fd);
    return Fail(arena.error().code, "receive buffers: " + arena.error().message);
  }
  auto network = std::make_unique<UringNetwork>(std::move(*members), std::move(*arena));
  if (auto opened = network->Open(buffers); !opened) return std::unexpected(opened.error());
  return network;
}

UringNetwork::UringNetwork(Members members, HugePageArena arena)
    : SocketNetwork(std::move(members)),
      arena_(std::move(arena)),
      operations_(options_.max_connections),
      starved_(options_.max_connections),
      send_arguments_(std::make_unique<SendArguments[]>(kSubmissionEntries)) {}

Result<void> UringNetwork::Open(uint32_t receive_buffers) {
  io_uring_params params{};
  // Disabled until Start: the thread that enables the ring is the one that may use it.
  params.flags = kUringSetupFlags | IORING_SETUP_R_DISABLED | IORING_SETUP_CQSIZE;
  // A connection rarely has more than a receive, a send and a cancellation to report. When it is
  // more at once the kernel keeps the rest and multishot operations end, to be armed again.
  params.cq_entries = std::clamp(std::bit_ceil(options_.max_connections) * 4, kCompletionEntriesMin,
                                 kCompletionEntriesMax);
  if (const int error = io_uring_queue_init_params(kSubmissionEntries, &ring_, &params);
      error != 0) {
    return UringRefused("io_uring_queue_init", -error);
  }
  has_ring_ = true;
  // The ring's descriptor is not registered: that belongs to a thread, and ending the network on
  // another one could undo that thread's own registration.
  buffer_count_ = receive_buffers;
  std::byte* memory = arena_.Allocate(
      BufferRing::MemoryBytes(options_.receive_buffer_bytes, receive_buffers), kUringPageBytes);
  CHECK(memory != nullptr, "an arena holds what it was made for");
  if (const int error =
          buffers_.Register(&ring_, memory, options_.receive_buffer_bytes, receive_buffers);
      error != 0) {
    return UringRefused("io_uring_register_buf_ring", -error);
  }
  return {};
}

UringNetwork::~UringNetwork() {
  // The ring ends in the background and holds the sockets until then; the ports must be free for
  // the next process now.
  for (Listener& listener : listeners_) {
    if (listener.fd >= 0) shutdown(listener.fd, SHUT_RDWR);
  }
  if (has_ring_) io_uring_queue_exit(&ring_);
}

Result<void> UringNetwork::Start() {
  CHECK(!started_, "a network is started once");
  // The raw call: liburing 2.3 declares io_uring_enable_rings without exporting it.
  if (const int error = io_uring_register(static_cast<unsigned>(ring_.ring_fd),
                                          IORING_REGISTER_ENABLE_RINGS, nullptr, 0);
      error != 0) {
    return FailErrno("io_uring_register(IORING_REGISTER_ENABLE_RINGS)", -error);
  }
  started_ = true;
  buffers_.Touch(buffer_count_);
  listener_armed_.assign(listeners_.size(), 0);
  listener_cancelled_.assign(listeners_.size(), 0);
  ArmListeners();
  ArmWake();
  Enter();
  return {};
}

// 1. Connections that ended since the last Poll.
// 2. What the kernel has for us, entering it only when there is something to fetch.
// 3. What follows from that, and from Sends and Closes since the last Poll, as submission entries.
// 4. One system call for all of them.
int UringNetwork::Poll(NetworkHandler& handler, int budget) {
  CHECK(started_, "Start comes before Poll");
  if (accept_pause_polls_ > 0) --accept_pause_polls_;
  int events = DeliverFinished(handler, budget);

  if (MustEnter()) Enter();
  events += Harvest(handler, budget - events);

  ServiceMarked();
  if (!finished_.empty()) {
    events += DeliverFinished(handler, budget - events);
    ServiceMarked();  // OnClosed may have sent to others.
  }
  ArmListeners();
  ArmWake();
  ArmStarved();

  if (io_uring_sq_ready(&ring_) > 0) Enter();
  return events;
}

bool UringNetwork::MustEnter() const {
  if (io_uring_sq_ready(&ring_) > 0) return true;
  if (io_uring_cq_ready(&ring_) > 0) return false;
  return (IO_URING_READ_ONCE(*ring_.sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) != 0;
}

// Submits what is prepared and lets the kernel post what has completed.
void UringNetwork::Enter() {
  const int result = io_uring_submit_and_get_events(&ring_);
  // What could not be submitted stays prepared for the next time.
  CHECK(
      result >= 0 || result == -EINTR || result == -EAGAIN || result == -EBUSY || result == -ENOMEM,
      "io_uring_enter fails only for now");
}

// Null when the queue is full and the kernel takes nothing now.
io_uring_sqe* UringNetwork::NextEntry() {
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
  if (sqe != nullptr) [[likely]]
    return sqe;
  Enter();
  return io_uring_get_sqe(&ring_);
}

int UringNetwork::Harvest(NetworkHandler& handler, int budget) {
  int events = 0;
  for (unsigned left = io_uring_cq_ready(&ring_); left > 0 && events < budget; --left) {
    const Completion completion = Decode(ring_.cq.cqes[*ring_.cq.khead & ring_.cq.ring_mask]);
    io_uring_cq_advance(&ring_, 1);
    events += OnCompletion(handler, completion);
  }
  return events;
}

// Returns how many events reached the handler: 0 or 1.
int UringNetwork::OnCompletion(NetworkHandler& handler, const Completion& completion) {
  switch (completion.operation) {
    case Operation::kAccept:
      return OnAccepted(handler, completion);
    case Operation::kReceive:
      return OnReceived(handler, completion);
    case Operation::kSend:
      OnSent(completion);
      return 0;
    case Operation::kCancel:
      OnCancelFailed(completion);
      return 0;
    case Operation::kCancelAccept:
      return 0;  // The accept had ended by itself.
    case Operation::kWake:
      // It came only to end a Wait.
      wake_armed_ = (completion.flags & IORING_CQE_F_MORE) != 0;
      return 0;
  }
  CHECK(false, "a completion names one of our operations");
  return 0;
}

int UringNetwork::OnAccepted(NetworkHandler& handler, const Completion& completion) {
  const uint32_t which = completion.id.index;
  if ((completion.flags & IORING_CQE_F_MORE) == 0) {
    listener_armed_[which] = 0;
    if (accept_stopped_) close(std::exchange(listeners_[which].fd, -1));
  }
  if (completion.result < 0) {
    if (!accept_stopped_ && completion.result != -ECONNABORTED) PauseAccepting();
    return 0;
  }
  if (accept_stopped_) {
    close(completion.result);
    return 0;
  }
  uint32_t index = 0;
  if (!Open(completion.result, &index)) return 0;
  operations_[index] = Operations{};
  handler.OnAccept(IdOf(index));
  return 1;
}

int UringNetwork::OnReceived(NetworkHandler& handler, const Completion& completion) {
  const uint32_t index = completion.id.index;
  Connection& connection = connections_[index];
  CHECK(connection.generation == completion.id.generation,
        "a connection ends after its last completion");
  int events = 0;
  if (completion.result > 0) {
    CHECK((completion.flags & IORING_CQE_F_BUFFER) != 0, "bytes come in a provided buffer");
    const uint16_t buffer = static_cast<uint16_t>(completion.flags >> IORING_CQE_BUFFER_SHIFT);
    const size_t bytes = static_cast<size_t>(completion.result);
    counters_[NetworkCounter::kBytesReceived].Add(bytes);
    if (connection.phase == Phase::kOpen) {
      handler.OnReceive(completion.id, {buffers_.At(buffer), bytes});
      events = 1;
    }
    buffers_.Recycle(buffer);
  } else if ((completion.flags & IORING_CQE_F_BUFFER) != 0) {
    // The end of the stream may come with an empty buffer.
    buffers_.Recycle(static_cast<uint16_t>(completion.flags >> IORING_CQE_BUFFER_SHIFT));
  }
  if ((completion.flags & IORING_CQE_F_MORE) == 0) EndReceive(index, completion.result);
  return events;
}

// The multishot receive has ended; Service arms another where one is wanted.
void UringNetwork::EndReceive(uint32_t index, int result) {
  operations_[index].receive_armed = false;
  operations_[index].receive_cancelled = false;
  Mark(index);
  if (result > 0) return;
  switch (-result) {
    case 0:
      PeerEnded(index);
      return;
    case ENOBUFS:
      counters_[NetworkCounter::kReceiveBuffersSpent].Add(1);
      starved_.Push(index);
      return;
    case ECANCELED:
    case EAGAIN:
    case EINTR:
      return;
    default:
      BeginClosing(index, CloseCause::kError);
  }
}

void UringNetwork::OnSent(const Completion& completion) {
  const uint32_t index = completion.id.index;
  Connection& connection = connections_[index];
  CHECK(connection.generation == completion.id.generation,
        "a connection ends after its last completion");
  pool_.Unpin(connection.queue);
  operations_[index].send_cancelled = false;
  Mark(index);
  if (completion.result >= 0) {
    const size_t bytes = static_cast<size_t>(completion.result);
    counters_[NetworkCounter::kBytesSent].Add(bytes);
    if (connection.phase != Phase::kClosing) pool_.Consume(connection.queue, bytes);
    return;
  }
  const int error = -completion.result;
  const bool for_now = error == EAGAIN || error == EINTR || error == ENOBUFS || error == ENOMEM ||
                       error == ECANCELED;
  if (!for_now) BeginClosing(index, CloseCause::kError);
}

// Success is not reported. A cancellation that found nothing has been overtaken by the operation's
// own end, whose completion came before; otherwise it is tried again.
void UringNetwork::OnCancelFailed(const Completion& completion) {
  const uint32_t index = completion.id.index;
  if (connections_[index].generation != completion.id.generation) return;
  operations_[index].receive_cancelled = false;
  operations_[index].send_cancelled = false;
  Mark(index);
}

void UringNetwork::ServiceMarked() {
  // Those that are marked again are for the next Poll.
  for (size_t left = marked_.size(); left > 0; --left) {
    const uint32_t index = marked_.Pop();
    if (!Service(index)) Mark(index);
  }
}

// Submits what the connection's state calls for. False when the submission queue is full.
bool UringNetwork::Service(uint32_t index) {
  Connection& connection = connections_[index];
  Operations& operations = operations_[index];
  const bool sending = connection.queue.pinned > 0;
  const uint32_t generation = connection.generation;
  const uint64_t cancel_tag = Tag(Operation::kCancel, index, generation);

  if (connection.phase == Phase::kDraining && connection.queue.bytes == 0 && !sending) {
    AdvanceDraining(index);
  }

  bool wants_receive = false;
  switch (connection.phase) {
    case Phase::kFree:
    case Phase::kFinished:
      return true;
    case Phase::kOpen:
      wants_receive = !connection.paused;
      break;
    case Phase::kDraining:
      wants_receive = !connection.peer_ended;
      break;
    case Phase::kClosing:
      break;
  }

  if (wants_receive && !operations.receive_armed && !starved_.Contains(index) &&
      !ArmReceive(index)) {
    return false;
  }
  if (!wants_receive && operations.receive_armed && !operations.receive_cancelled) {
    if (!Cancel(Tag(Operation::kReceive, index, generation), cancel_tag)) return false;
    operations.receive_cancelled = true;
  }
  if (connection.queue.bytes > 0 && !sending) return StartSend(index);
  if (connection.phase != Phase::kClosing) return true;
  if (sending && !operations.send_cancelled) {
    if (!Cancel(Tag(Operation::kSend, index, generation), cancel_tag)) return false;
    operations.send_cancelled = true;
  }
  if (!sending && !operations.receive_armed) Finish(index);
  return true;
}

bool UringNetwork::ArmReceive(uint32_t index) {
  io_uring_sqe* sqe = NextEntry();
  if (sqe == nullptr) return false;
  const Connection& connection = connections_[index];
  io_uring_prep_recv_multishot(sqe, connection.fd, nullptr, 0, 0);
  sqe->flags |= IOSQE_BUFFER_SELECT;
  sqe->buf_group = kBufferGroup;
  sqe->user_data = Tag(Operation::kReceive, index, connection.generation);
  operations_[index].receive_armed = true;
  return true;
}

bool UringNetwork::StartSend(uint32_t index) {
  io_uring_sqe* sqe = NextEntry();
  if (sqe == nullptr) return false;
  Connection& connection = connections_[index];
  SendArguments& arguments = send_arguments_[static_cast<size_t>(sqe - ring_.sq.sqes)];
  const size_t blocks = pool_.Gather(connection.queue, arguments.iovecs);
  arguments.message = msghdr{};
  arguments.message.msg_iov = arguments.iovecs.data();
  arguments.message.msg_iovlen = blocks;
  io_uring_prep_sendmsg(sqe, connection.fd, &arguments.message, MSG_NOSIGNAL);
  sqe->user_data = Tag(Operation::kSend, index, connection.generation);
  pool_.Pin(connection.queue, blocks);
  connection.send_blocked = false;
  return true;
}

// By user_data, which holds the generation, so it never meets an operation of a later connection.
bool UringNetwork::Cancel(uint64_t target, uint64_t tag) {
  io_uring_sqe* sqe = NextEntry();
  if (sqe == nullptr) return false;
  io_uring_prep_cancel64(sqe, target, 0);
  sqe->flags |= IOSQE_CQE_SKIP_SUCCESS;
  sqe->user_data = tag;
  return true;
}

void UringNetwork::ArmListeners() {
  for (uint32_t i = 0; i < listeners_.size(); ++i) {
    if (listeners_[i].fd < 0) continue;
    const bool armed = listener_armed_[i] != 0;
    if (accept_stopped_) {
      if (!armed) {
        close(std::exchange(listeners_[i].fd, -1));
      } else if (listener_cancelled_[i] == 0) {
        listener_cancelled_[i] =
            Cancel(Tag(Operation::kAccept, i, 0), Tag(Operation::kCancelAccept, i, 0));
      }
      continue;
    }
    if (armed || accept_pause_polls_ > 0) continue;
    io_uring_sqe* sqe = NextEntry();
    if (sqe == nullptr) return;
    io_uring_prep_multishot_accept(sqe, listeners_[i].fd, nullptr, nullptr,
                                   SOCK_NONBLOCK | SOCK_CLOEXEC);
    sqe->user_data = Tag(Operation::kAccept, i, 0);
    listener_armed_[i] = 1;
  }
}

void UringNetwork::ArmWake() {
  if (wake_armed_) return;
  io_uring_sqe* sqe = NextEntry();
  if (sqe == nullptr) return;
  io_uring_prep_poll_multishot(sqe, wake_fd_, POLLIN);
  sqe->user_data = Tag(Operation::kWake, 0, 0);
  wake_armed_ = true;
}

// Receives that found no buffer are armed again as buffers are free for them, the longest waiting
// first. They come before those that are armed still, which the kernel looks at after submitting.
void UringNetwork::ArmStarved() {
  if (starved_.empty()) return;
  // A buffer that is not free belongs to a completion that waits.
  const size_t held = std::min<size_t>(io_uring_cq_ready(&ring_), buffer_count_);
  for (size_t left = std::min(starved_.size(), buffer_count_ - held); left > 0; --left) {
    const uint32_t index = starved_.Pop();
    if (!Service(index)) Mark(index);
  }
}

void UringNetwork::StopAccepting() {
  if (std::exchange(accept_stopped_, true)) return;
  // Refuses new connections from now on; the next Poll ends the multishot accept.
  for (Listener& listener : listeners_) shutdown(listener.fd, SHUT_RDWR);
}

bool UringNetwork::HasWork() const {
  return !marked_.empty() || !finished_.empty() || !starved_.empty() ||
         io_uring_cq_ready(&ring_) > 0;
}

void UringNetwork::Wait(int64_t timeout_ns) {
  CHECK(started_, "Start comes before Wait");
  if (timeout_ns <= 0 || HasWork() || TakeWake()) return;
  __kernel_timespec timeout{.tv_sec = timeout_ns / kNanosPerSecond,
                            .tv_nsec = timeout_ns % kNanosPerSecond};
  io_uring_cqe* cqe = nullptr;
  const int result = io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &timeout, nullptr);
  CHECK(result >= 0 || result == -ETIME || result == -EINTR || result == -EAGAIN ||
            result == -EBUSY || result == -ENOMEM,
        "io_uring_enter fails only for now");
  TakeWake();
  accept_pause_polls_ = 0;
}

}  // namespace

Result<std::unique_ptr<Network>> CreateUringNetwork(const NetworkOptions& options) {
  return UringNetwork::Create(options);
}

}  // namespace engram
