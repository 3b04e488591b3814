#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "src/core/clock.h"
#include "src/core/network.h"

namespace engram {

struct SimulatedNetworkOptions {
  NetworkOptions network;
  // How long a connection attempt or a piece of a stream travels, drawn evenly between the two.
  int64_t min_delay_ns = 10 * kNanosPerMicro;
  int64_t max_delay_ns = 200 * kNanosPerMicro;
  // Streams are cut at random places into pieces of 1 to this many bytes.
  size_t max_chunk_bytes = 4096;
  // That a Poll hands only a part of a connection's backlog to the transport, 0 to 1.
  double partial_send_probability = 0.25;
  // That a piece's arrival, in either direction, finds the connection reset, 0 to 1.
  double reset_probability = 0.0;
  // Bytes under way to a client, or arrived there and not fetched by ClientReceive.
  size_t client_window_bytes = size_t{64} * 1024;
  // Bytes under way to the server or arrived and not handed over yet; ClientSend takes no more.
  size_t server_window_bytes = SIZE_MAX;
};

// A network in memory for tests: no sockets, no threads, time from a SimulatedClock, chance from a
// seed. The same seed and the same calls give the same events, byte for byte.
//
// The server's side is Network. Clients are driven by the Client functions, which take a handle,
// the count of ClientConnect calls before it. Within a direction bytes keep their order; delays
// differ between connections and directions. Things arrive as the clock is stepped and the server
// polls.
//
// Thread safety: one thread, but Wake is anyone's. May allocate at any time.
class SimulatedNetwork final : public Network {
 public:
  using ClientHandle = uint32_t;

  SimulatedNetwork(SimulatedClock* clock, uint64_t seed,
                   const SimulatedNetworkOptions& options = {});

  // Network. Clients reach the server whether it listens or not; Listen only gives out ports.
  Result<Endpoint> Listen(const Endpoint& endpoint) override;
  Result<void> Start() override;
  int Poll(NetworkHandler& handler, int budget) override;
  using Network::Send;
  bool Send(ConnectionId connection, std::span<const std::span<const std::byte>> parts) override;
  size_t SendBacklog(ConnectionId connection) const override;
  void SetReceivePaused(ConnectionId connection, bool paused) override;
  void Close(ConnectionId connection, CloseMode mode) override;
  void StopAccepting() override { accepting_ = false; }
  // Returns at once; whoever wants time to pass steps the clock.
  void Wait(int64_t /*timeout_ns*/) override { woken_.store(false, std::memory_order_relaxed); }
  void Wake() override { woken_.store(true, std::memory_order_relaxed); }
  std::string_view backend() const override { return "simulated"; }

  // Whether Wake was called since the last Wait.
  bool woken() const { return woken_.load(std::memory_order_relaxed); }

  // Clients. A connection arrives as OnAccept in a later Poll, or is refused (ClientClosedByServer)
  // when max_connections are open or accepting has stopped.
  ClientHandle ClientConnect();
  // Returns how many of the first bytes the transport took; 0 on a closed connection.
  size_t ClientSend(ClientHandle client, std::span<const std::byte> bytes);
  // What has arrived since the last call.
  std::vector<std::byte> ClientReceive(ClientHandle client);
  // The client's end of stream; it may still receive.
  void ClientShutdown(ClientHandle client);
  // With `abort` a reset, which may overtake what was sent; otherwise the end of stream behind it.
  // The client takes no part any more: what still arrives is lost.
  void ClientClose(ClientHandle client, bool abort = false);
  // The server's end of stream, a reset or a refusal has arrived; all bytes before an end of stream
  // have too.
  bool ClientClosedByServer(ClientHandle client);
  // It was a reset or a refusal.
  bool ClientWasReset(ClientHandle client);

  // When the next thing arrives that is still under way, or nothing: a test may step the clock
  // there.
  std::optional<int64_t> NextArrivalNs() const;

 private:
  // One direction of a connection: pieces under way, in order, and bytes that have arrived.
  struct Stream {
    struct Piece {
      int64_t arrives_ns;
      size_t bytes;
    };
    std::deque<std::byte> bytes;  // under way and arrived
    std::deque<Piece> under_way;
    size_t arrived_bytes = 0;
    int64_t last_arrival_ns = 0;
    std::optional<int64_t> end_ns;    // the end of stream arrives
    std::optional<int64_t> reset_ns;  // a reset arrives
  };
  enum class Phase : uint8_t { kConnecting, kOpen, kDraining, kClosed, kGone };

  // Both sides of one client's connection. Index in clients_: the handle.
  struct Client {
    // The server's side.
    Phase phase = Phase::kConnecting;
    ConnectionId id;
    CloseCause cause = CloseCause::kLocal;
    bool paused = false;
    bool peer_ended = false;
    bool end_sent = false;
    std::deque<std::byte> backlog;
    int64_t connects_ns = 0;
    Stream to_server;
    // The client's side.
    Stream to_client;
    bool ended = false;   // no more ClientSend
    bool closed = false;  // takes no part any more
    bool was_reset = false;
  };
  static constexpr uint32_t kNoClient = UINT32_MAX;

  uint64_t Random();
  size_t RandomUpTo(size_t most);  // 1 to `most`
  bool Chance(double probability);
  int64_t ArrivalNs();

  void PutUnderWay(Stream& stream, std::span<const std::byte> bytes);
  void EndStream(Stream& stream);
  void Arrive(Client& client);
  void CloseNow(Client& client, CloseCause cause);
  Client* Find(ConnectionId connection);
  const Client* Find(ConnectionId connection) const;

  int AcceptDue(NetworkHandler& handler, int budget);
  int DeliverDue(NetworkHandler& handler, int budget);
  bool DeliverPiece(NetworkHandler& handler, uint32_t handle);
  void Transmit(Client& client);
  int ReportClosed(NetworkHandler& handler, int budget);

  SimulatedClock* clock_;
  SimulatedNetworkOptions options_;
  uint64_t random_state_;
  bool started_ = false;
  bool accepting_ = true;
  uint16_t next_port_ = 40'000;
  std::vector<Endpoint> listening_;
  std::deque<Client> clients_;   // never moves: handlers may connect more
  std::vector<uint32_t> live_;   // handles of connections that are not gone, by age
  std::vector<uint32_t> slots_;  // of each ConnectionId::index: its handle or kNoClient
  std::vector<uint32_t> generations_;
  std::vector<uint32_t> free_slots_;
  size_t backlog_bytes_ = 0;
  size_t turn_ = 0;
  std::atomic<bool> woken_{false};
};

}  // namespace engram
