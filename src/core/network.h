#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "src/core/counters.h"
#include "src/core/result.h"

namespace engram {

// A TCP address: IPv4 dotted or IPv6, and a port (0: any free one).
struct Endpoint {
  std::string host = "127.0.0.1";
  uint16_t port = 0;

  std::string ToString() const;  // "127.0.0.1:7654", "[::1]:7654"
};
// Errors: kInvalidArgument naming the value and the form expected.
Result<Endpoint> ParseEndpoint(std::string_view text);

// Names a connection for its life; the generation tells it from an earlier one in the same place.
struct ConnectionId {
  uint32_t index = 0;
  uint32_t generation = 0;  // at least 1
  friend bool operator==(ConnectionId, ConnectionId) = default;
};

enum class CloseCause : uint8_t {
  kPeerClosed,   // end of stream; what was given to Send before is still sent first
  kError,        // reset or another error of the transport
  kLocal,        // Close was called
  kSendBacklog,  // the peer does not read and SendLimit was passed
};

// Whoever owns a Network gets its events through this, only from inside Network::Poll.
class NetworkHandler {
 public:
  virtual ~NetworkHandler() = default;
  virtual void OnAccept(ConnectionId connection) = 0;
  // `bytes` are the next bytes of the stream; valid during the call only, not aligned.
  virtual void OnReceive(ConnectionId connection, std::span<const std::byte> bytes) = 0;
  // The last event of a connection. Also comes after Close.
  virtual void OnClosed(ConnectionId connection, CloseCause cause) = 0;
};

struct NetworkOptions {
  uint32_t max_connections = 10'000;
  // Several networks of this process listen on one port; the kernel deals the connections out.
  bool share_port = false;
  // One receive buffer, in bytes, and how many (io_uring; the POSIX backend needs one). They are
  // made present at the start. With the table of them these are whole huge pages.
  size_t receive_buffer_bytes = size_t{128} * 1024;
  uint32_t receive_buffers = 63;
  // Unsent bytes that a connection may have; Send beyond that closes it (kSendBacklog).
  size_t send_limit_bytes = size_t{16} << 20;
  // Unsent bytes of all connections together.
  size_t send_pool_bytes = size_t{64} << 20;
};

// What a Network counts, for the control plane.
enum class NetworkCounter : uint8_t {
  kConnectionsAccepted,
  kConnectionsRefused,   // closed at once: max_connections were open
  kAcceptErrors,         // accept failed, mostly for want of descriptors
  kSendBacklogCloses,    // connections closed with CloseCause::kSendBacklog
  kReceiveBuffersSpent,  // io_uring: a receive waited for a buffer
  kBytesReceived,
  kBytesSent,
};
inline constexpr size_t kNetworkCounters = 7;
using NetworkCounterSet = CounterSet<NetworkCounter, kNetworkCounters>;
std::string_view NetworkCounterName(NetworkCounter counter);

// Stream connections of one core. Made anywhere, then used by one thread only.
//
// Lifecycle: Listen (any number of times, before Start), Start on the owner's thread, then Poll
// again and again. Nothing blocks but Wait. After Start nothing allocates.
class Network {
 public:
  virtual ~Network() = default;

  // Begins to listen; returns the address with the port that was given. An IPv6 address takes IPv6
  // connections only. Errors name the address and the remedy.
  virtual Result<Endpoint> Listen(const Endpoint& endpoint) = 0;
  // Called once by the owner's thread before the first Poll.
  virtual Result<void> Start() = 0;

  // Accepts, receives and sends without waiting; at most some `budget` events reach the handler.
  // Returns how many did. What was given to Send goes out at the latest at the end of Poll.
  virtual int Poll(NetworkHandler& handler, int budget) = 0;

  // Queues the concatenation of `parts` to be sent; the bytes are copied. False when the connection
  // is gone or its backlog passed the limit (OnClosed follows then).
  virtual bool Send(ConnectionId connection, std::span<const std::span<const std::byte>> parts) = 0;
  bool Send(ConnectionId connection, std::span<const std::byte> bytes) {
    const std::array<std::span<const std::byte>, 1> parts{bytes};
    return Send(connection, std::span<const std::span<const std::byte>>(parts));
  }
  // Bytes given to Send that the transport has not taken yet.
  virtual size_t SendBacklog(ConnectionId connection) const = 0;

  // While paused nothing more is read from the transport, so the peer's own window fills. Bytes
  // that were received before may still be handed over.
  virtual void SetReceivePaused(ConnectionId connection, bool paused) = 0;

  // Ends the connection; nothing that it still sends reaches the handler. OnClosed follows from a
  // later Poll. Does nothing when the connection is gone.
  //   kNow: at once. A peer that then misses unsent bytes sees a reset, not an end of stream.
  //   kAfterSending: the backlog is sent, then our end of stream, then OnClosed waits for the
  //   peer's end: closing earlier could reset the connection before the peer has read everything.
  //   Bounded by the owner's timeouts only: call Close again with kNow.
  enum class CloseMode : uint8_t { kAfterSending, kNow };
  virtual void Close(ConnectionId connection, CloseMode mode) = 0;
  // No more connections are accepted from now on.
  virtual void StopAccepting() = 0;

  // Blocks until an event, a Wake, or `timeout_ns` has passed. Only when Poll had nothing to do.
  virtual void Wait(int64_t timeout_ns) = 0;
  // Ends a Wait, the next one if none is going on. The only call that any thread may make.
  virtual void Wake() = 0;

  // "io_uring", "epoll", "simulated", "streams".
  virtual std::string_view backend() const = 0;

  // A peer that has gone is always told of, so silence means nothing: nobody need be asked to break
  // it, or be given up for it. A socket's peer may vanish without a word.
  virtual bool tells_of_lost_peers() const { return false; }

  // Written by the owner, read by anyone.
  const NetworkCounterSet& counters() const { return counters_; }

 protected:
  NetworkCounterSet counters_;
};

// io_uring: multishot accept and receive into a ring of provided buffers. Errors: kUnavailable or
// kPermissionDenied, naming what the kernel refuses, when it cannot be had here.
Result<std::unique_ptr<Network>> CreateUringNetwork(const NetworkOptions& options);
// epoll, for places where io_uring is forbidden.
Result<std::unique_ptr<Network>> CreatePosixNetwork(const NetworkOptions& options);

enum class NetworkBackend : uint8_t { kAuto, kUring, kPosix };
// kAuto: io_uring where it works, else POSIX; `note` then says why, for the start-up log.
Result<std::unique_ptr<Network>> CreateNetwork(NetworkBackend backend,
                                               const NetworkOptions& options, std::string* note);

}  // namespace engram
