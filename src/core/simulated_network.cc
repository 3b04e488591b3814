#include "src/core/simulated_network.h"

#include <algorithm>
#include <utility>

#include "src/core/check.h"

namespace engram {

SimulatedNetwork::SimulatedNetwork(SimulatedClock* clock, uint64_t seed,
                                   const SimulatedNetworkOptions& options)
    : clock_(clock),
      options_(options),
      random_state_(seed),
      slots_(options.network.max_connections, kNoClient),
      generations_(options.network.max_connections, 0) {
  CHECK(options.min_delay_ns >= 0 && options.min_delay_ns <= options.max_delay_ns,
        "delays run from min to max");
  CHECK(options.max_chunk_bytes > 0 && options.client_window_bytes > 0 &&
            options.server_window_bytes > 0,
        "bytes must be able to move");
  for (uint32_t i = options.network.max_connections; i > 0; --i) free_slots_.push_back(i - 1);
}

// SplitMix64 (Steele, Lea and Flood, 2014): the same on every platform, unlike std's distributions.
uint64_t SimulatedNetwork::Random() {
  random_state_ += 0x9E3779B97F4A7C15;
  uint64_t z = random_state_;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

size_t SimulatedNetwork::RandomUpTo(size_t most) {
  return 1 + static_cast<size_t>(Random() % most);
}

bool SimulatedNetwork::Chance(double probability) {
  return static_cast<double>(Random() >> 11) * 0x1.0p-53 < probability;
}

int64_t SimulatedNetwork::ArrivalNs() {
  const uint64_t span = static_cast<uint64_t>(options_.max_delay_ns - options_.min_delay_ns) + 1;
  return clock_->MonotonicNs() + options_.min_delay_ns + static_cast<int64_t>(Random() % span);
}

void SimulatedNetwork::PutUnderWay(Stream& stream, std::span<const std::byte> bytes) {
  stream.bytes.insert(stream.bytes.end(), bytes.begin(), bytes.end());
  for (size_t left = bytes.size(); left > 0;) {
    const size_t piece = RandomUpTo(std::min(left, options_.max_chunk_bytes));
    stream.last_arrival_ns = std::max(stream.last_arrival_ns, ArrivalNs());
    stream.under_way.push_back({stream.last_arrival_ns, piece});
    left -= piece;
  }
}

void SimulatedNetwork::EndStream(Stream& stream) {
  stream.last_arrival_ns = std::max(stream.last_arrival_ns, ArrivalNs());
  stream.end_ns = stream.last_arrival_ns;
}

// Moves what is due in both directions from under way to arrived; a reset that is due takes effect.
void SimulatedNetwork::Arrive(Client& client) {
  const int64_t now = clock_->MonotonicNs();
  for (Stream* stream : {&client.to_server, &client.to_client}) {
    // What a reset overtook is lost.
    const int64_t until =
        stream->reset_ns && *stream->reset_ns <= now ? *stream->reset_ns - 1 : now;
    bool reset = false;
    while (!stream->under_way.empty() && stream->under_way.front().arrives_ns <= until) {
      stream->arrived_bytes += stream->under_way.front().bytes;
      stream->under_way.pop_front();
      reset = reset || (options_.reset_probability > 0 && Chance(options_.reset_probability));
    }
    if (reset && !client.to_client.reset_ns && !client.to_server.reset_ns) {
      client.to_client.reset_ns = now;
      client.to_server.reset_ns = now;
    }
  }
  if (client.to_client.reset_ns && *client.to_client.reset_ns <= now) {
    client.was_reset = true;
    client.ended = true;
  }
  // Once closed, nobody fetches: what arrives is thrown away and does not fill the window.
  if (client.closed) {
    client.to_client.bytes.erase(
        client.to_client.bytes.begin(),
        client.to_client.bytes.begin() +
            static_cast<std::ptrdiff_t>(std::exchange(client.to_client.arrived_bytes, 0)));
  }
}

Result<Endpoint> SimulatedNetwork::Listen(const Endpoint& endpoint) {
  CHECK(!started_, "Listen comes before Start");
  Endpoint given = endpoint;
  if (given.port == 0) given.port = next_port_++;
  for (const Endpoint& other : listening_) {
    if (other.host == given.host && other.port == given.port) {
      return Fail(ErrorCode::kAlreadyExists, "listen on " + given.ToString() +
                                                 " (it is listened on already: set another port)");
    }
  }
  listening_.push_back(given);
  return given;
}

Result<void> SimulatedNetwork::Start() {
  CHECK(!started_, "a network is started once");
  started_ = true;
  return {};
}

int SimulatedNetwork::Poll(NetworkHandler& handler, int budget) {
  CHECK(started_, "Start comes before Poll");
  for (uint32_t handle : live_) Arrive(clients_[handle]);
  int events = ReportClosed(handler, budget);
  events += AcceptDue(handler, budget - events);
  events += DeliverDue(handler, budget - events);
  for (uint32_t handle : live_) Transmit(clients_[handle]);
  events += ReportClosed(handler, budget - events);
  std::erase_if(live_, [&](uint32_t handle) { return clients_[handle].phase == Phase::kGone; });
  ++turn_;
  return events;
}

int SimulatedNetwork::AcceptDue(NetworkHandler& handler, int budget) {
  const int64_t now = clock_->MonotonicNs();
  std::vector<uint32_t> due;
  for (uint32_t handle : live_) {
    const Client& client = clients_[handle];
    if (client.phase == Phase::kConnecting && client.connects_ns <= now) due.push_back(handle);
  }
  std::ranges::sort(
      due, {}, [&](uint32_t handle) { return std::pair(clients_[handle].connects_ns, handle); });
  int events = 0;
  for (uint32_t handle : due) {
    if (events >= budget) break;
    Client& client = clients_[handle];
    if (!accepting_ || free_slots_.empty()) {
      counters_[NetworkCounter::kConnectionsRefused].Add(1);
      client.phase = Phase::kGone;
      client.to_client.reset_ns = now;
      client.was_reset = true;
      client.ended = true;
      continue;
    }
    const uint32_t slot = free_slots_.back();
    free_slots_.pop_back();
    if (++generations_[slot] == 0) generations_[slot] = 1;
    slots_[slot] = handle;
    client.id = {.index = slot, .generation = generations_[slot]};
    client.phase = Phase::kOpen;
    counters_[NetworkCounter::kConnectionsAccepted].Add(1);
    ++events;
    handler.OnAccept(client.id);
  }
  return events;
}

// Piece by piece, each connection in turn, beginning with another one in each Poll.
int SimulatedNetwork::DeliverDue(NetworkHandler& handler, int budget) {
  const size_t count = live_.size();
  int events = 0;
  bool delivered = true;
  while (delivered) {
    delivered = false;
    for (size_t i = 0; i < count && events < budget; ++i) {
      if (!DeliverPiece(handler, live_[(turn_ + i) % count])) continue;
      delivered = true;
      ++events;
    }
  }
  return events;
}

// True when the handler was called.
bool SimulatedNetwork::DeliverPiece(NetworkHandler& handler, uint32_t handle) {
  Client& client = clients_[handle];
  const int64_t now = clock_->MonotonicNs();
  if (client.phase != Phase::kOpen && client.phase != Phase::kDraining) return false;
  Stream& stream = client.to_server;
  const bool paused = client.phase == Phase::kOpen && client.paused;
  if (stream.arrived_bytes > 0 && !paused) {
    // Draining throws away all that came.
    const bool open = client.phase == Phase::kOpen;
    const size_t most = std::min(stream.arrived_bytes, options_.max_chunk_bytes);
    const size_t bytes = open ? RandomUpTo(most) : stream.arrived_bytes;
    const auto end = stream.bytes.begin() + static_cast<std::ptrdiff_t>(bytes);
    const std::vector<std::byte> piece(stream.bytes.begin(), end);
    stream.bytes.erase(stream.bytes.begin(), end);
    stream.arrived_bytes -= bytes;
    counters_[NetworkCounter::kBytesReceived].Add(bytes);
    if (open) handler.OnReceive(client.id, piece);
    if (open) return true;
  }
  if (paused) return false;
  if (stream.reset_ns && *stream.reset_ns <= now) {
    CloseNow(client, CloseCause::kError);
  } else if (stream.end_ns && *stream.end_ns <= now && !client.peer_ended) {
    client.peer_ended = true;
    if (client.phase == Phase::kOpen) {
      client.phase = Phase::kDraining;
      client.cause = CloseCause::kPeerClosed;
    }
  }
  return false;
}

void SimulatedNetwork::Transmit(Client& client) {
  if (client.phase != Phase::kOpen && client.phase != Phase::kDraining) return;
  Stream& stream = client.to_client;
  if (!client.backlog.empty()) {
    const size_t used = std::min(stream.bytes.size(), options_.client_window_bytes);
    size_t bytes = std::min(client.backlog.size(), options_.client_window_bytes - used);
    if (bytes > 0 && Chance(options_.partial_send_probability)) bytes = RandomUpTo(bytes);
    if (bytes > 0) {
      const auto end = client.backlog.begin() + static_cast<std::ptrdiff_t>(bytes);
      const std::vector<std::byte> piece(client.backlog.begin(), end);
      client.backlog.erase(client.backlog.begin(), end);
      backlog_bytes_ -= bytes;
      counters_[NetworkCounter::kBytesSent].Add(bytes);
      PutUnderWay(stream, piece);
    }
  }
  if (client.phase == Phase::kDraining && client.backlog.empty()) {
    if (!std::exchange(client.end_sent, true)) EndStream(stream);
    if (client.peer_ended) CloseNow(client, client.cause);
  }
}

// The server's side ends; OnClosed waits for ReportClosed.
void SimulatedNetwork::CloseNow(Client& client, CloseCause cause) {
  if (client.phase != Phase::kOpen && client.phase != Phase::kDraining) return;
  if (client.phase == Phase::kOpen) client.cause = cause;
  if (cause == CloseCause::kSendBacklog) {
    counters_[NetworkCounter::kSendBacklogCloses].Add(1);
  }
  const bool cut = !client.backlog.empty() || cause == CloseCause::kSendBacklog;
  backlog_bytes_ -= client.backlog.size();
  client.backlog.clear();
  if (cut && !client.to_client.reset_ns) {
    client.to_client.reset_ns = std::max(client.to_client.last_arrival_ns, ArrivalNs()) + 1;
  } else if (!std::exchange(client.end_sent, true)) {
    EndStream(client.to_client);
  }
  client.phase = Phase::kClosed;
}

int SimulatedNetwork::ReportClosed(NetworkHandler& handler, int budget) {
  int events = 0;
  for (size_t i = 0; i < live_.size() && events < budget; ++i) {
    Client& client = clients_[live_[i]];
    if (client.phase != Phase::kClosed) continue;
    client.phase = Phase::kGone;
    slots_[client.id.index] = kNoClient;
    free_slots_.push_back(client.id.index);
    ++events;
    handler.OnClosed(client.id, client.cause);
  }
  return events;
}

const SimulatedNetwork::Client* SimulatedNetwork::Find(ConnectionId connection) const {
  if (connection.index >= slots_.size() || slots_[connection.index] == kNoClient) return nullptr;
  const Client& client = clients_[slots_[connection.index]];
  if (client.id != connection || client.phase == Phase::kClosed) return nullptr;
  return &client;
}

SimulatedNetwork::Client* SimulatedNetwork::Find(ConnectionId connection) {
  return const_cast<Client*>(std::as_const(*this).Find(connection));
}

bool SimulatedNetwork::Send(ConnectionId connection,
                            std::span<const std::span<const std::byte>> parts) {
  Client* client = Find(connection);
  if (client == nullptr || client->phase != Phase::kOpen) return false;
  size_t bytes = 0;
  for (std::span<const std::byte> part : parts) bytes += part.size();
  if (client->backlog.size() + bytes > options_.network.send_limit_bytes ||
      bytes > options_.network.send_pool_bytes) {
    CloseNow(*client, CloseCause::kSendBacklog);
    return false;
  }
  while (backlog_bytes_ + bytes > options_.network.send_pool_bytes) {
    // The largest backlog goes, the eldest of equals.
    Client* largest = client;
    for (uint32_t handle : live_) {
      if (clients_[handle].backlog.size() > largest->backlog.size()) largest = &clients_[handle];
    }
    CloseNow(*largest, CloseCause::kSendBacklog);
    if (largest == client) return false;
  }
  for (std::span<const std::byte> part : parts) {
    client->backlog.insert(client->backlog.end(), part.begin(), part.end());
  }
  backlog_bytes_ += bytes;
  return true;
}

size_t SimulatedNetwork::SendBacklog(ConnectionId connection) const {
  const Client* client = Find(connection);
  return client == nullptr ? 0 : client->backlog.size();
}

void SimulatedNetwork::SetReceivePaused(ConnectionId connection, bool paused) {
  if (Client* client = Find(connection); client != nullptr) client->paused = paused;
}

void SimulatedNetwork::Close(ConnectionId connection, CloseMode mode) {
  Client* client = Find(connection);
  if (client == nullptr) return;
  if (mode == CloseMode::kNow) {
    CloseNow(*client, CloseCause::kLocal);
  } else if (client->phase == Phase::kOpen) {
    client->phase = Phase::kDraining;
    client->cause = CloseCause::kLocal;
  }
}

SimulatedNetwork::ClientHandle SimulatedNetwork::ClientConnect() {
  const ClientHandle handle = static_cast<ClientHandle>(clients_.size());
  Client& client = clients_.emplace_back();
  client.connects_ns = ArrivalNs();
  // Nothing overtakes the connection itself.
  client.to_server.last_arrival_ns = client.connects_ns;
  client.to_client.last_arrival_ns = client.connects_ns;
  live_.push_back(handle);
  return handle;
}

size_t SimulatedNetwork::ClientSend(ClientHandle handle, std::span<const std::byte> bytes) {
  Client& client = clients_.at(handle);
  Arrive(client);
  if (client.ended) return 0;
  const size_t used = std::min(client.to_server.bytes.size(), options_.server_window_bytes);
  const size_t taken = std::min(bytes.size(), options_.server_window_bytes - used);
  // A server that is gone answers with a reset.
  if (client.phase == Phase::kClosed || client.phase == Phase::kGone) {
    if (!client.to_client.reset_ns) client.to_client.reset_ns = ArrivalNs();
    return taken;
  }
  PutUnderWay(client.to_server, bytes.first(taken));
  return taken;
}

std::vector<std::byte> SimulatedNetwork::ClientReceive(ClientHandle handle) {
  Client& client = clients_.at(handle);
  Arrive(client);
  Stream& stream = client.to_client;
  const auto end =
      stream.bytes.begin() + static_cast<std::ptrdiff_t>(std::exchange(stream.arrived_bytes, 0));
  std::vector<std::byte> received(stream.bytes.begin(), end);
  stream.bytes.erase(stream.bytes.begin(), end);
  return received;
}

void SimulatedNetwork::ClientShutdown(ClientHandle handle) {
  Client& client = clients_.at(handle);
  if (std::exchange(client.ended, true)) return;
  EndStream(client.to_server);
}

void SimulatedNetwork::ClientClose(ClientHandle handle, bool abort) {
  Client& client = clients_.at(handle);
  if (std::exchange(client.closed, true)) return;
  const bool ended = std::exchange(client.ended, true);
  if (abort) {
    client.to_server.reset_ns = std::max(client.connects_ns, ArrivalNs());
  } else if (!ended) {
    EndStream(client.to_server);
  }
}

bool SimulatedNetwork::ClientClosedByServer(ClientHandle handle) {
  Client& client = clients_.at(handle);
  Arrive(client);
  const int64_t now = clock_->MonotonicNs();
  return client.was_reset || (client.to_client.end_ns && *client.to_client.end_ns <= now);
}

bool SimulatedNetwork::ClientWasReset(ClientHandle handle) {
  Client& client = clients_.at(handle);
  Arrive(client);
  return client.was_reset;
}

std::optional<int64_t> SimulatedNetwork::NextArrivalNs() const {
  const int64_t now = clock_->MonotonicNs();
  std::optional<int64_t> next;
  const auto consider = [&](int64_t at_ns) {
    if (at_ns > now && (!next || at_ns < *next)) next = at_ns;
  };
  for (const Client& client : clients_) {
    if (client.phase == Phase::kConnecting) consider(client.connects_ns);
    for (const Stream* stream : {&client.to_server, &client.to_client}) {
      if (!stream->under_way.empty()) consider(stream->under_way.front().arrives_ns);
      if (stream->end_ns) consider(*stream->end_ns);
      if (stream->reset_ns) consider(*stream->reset_ns);
    }
  }
  return next;
}

}  // namespace engram
