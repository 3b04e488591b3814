#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "src/control/gateway_inbox.h"
#include "src/core/clock.h"
#include "src/core/network.h"
#include "src/core/result.h"
#include "src/core/space_catalogue.h"
#include "src/core/stream_network.h"

namespace engram {

struct HttpOptions {
  Endpoint endpoint = {};      // port 0: any free one
  std::vector<int> cpus = {};  // where its thread runs
  // Origins whose pages browsers may be served for, beside those of IsServedOrigin.
  std::vector<std::string> origins = {};
  uint32_t max_connections = 10'000;
  // The largest body of a request, and the largest message of a WebSocket.
  size_t max_request_bytes = size_t{4} << 20;
  // What requests may take that are being read; beyond it they are refused.
  size_t request_memory_bytes = size_t{256} << 20;
  // What answers may take that clients have not read yet, as with gRPC.
  size_t unread_bytes = size_t{512} << 20;
  size_t unread_small_bytes = size_t{64} << 20;
  int handshake_ms = 10'000;  // for a connection's first request, or the answer to a close
  int exchange_ms = 30'000;   // for a body to come, and for an answer to be read
  // A connection without requests ends. A WebSocket that says nothing is sent a ping after half of
  // it, and ends if nothing comes then either.
  int keepalive_ms = 60'000;
  int call_ms = 60'000;  // within which a call is answered
  int heartbeat_ms = 30'000;
  // As with gRPC (GrpcOptions).
  std::function<std::string()> recovering = {};
  // The text of /metrics; empty: it is not served. Called by the gateway's thread.
  std::function<std::string()> metrics = {};
};

// Engram's stream over WebSocket, and calls, health and metrics over HTTP/1.1. Its one thread
// reaches the appliance through the gateway core's door and the pipes of streams only.
//
// Lifecycle: Start, once the gateway core polls; SetServing, where the options asked for it;
// Shutdown, while it still does; destructor.
class HttpGateway {
 public:
  // Whether this program was built with Boost.Beast and simdjson; without them Start fails with
  // kUnavailable.
  static bool IsBuilt();
  // `clock`, `spaces` and `streams` (whose ingress core polls until Shutdown has returned) outlive
  // the gateway. Errors name listen.http and the remedy.
  static Result<std::unique_ptr<HttpGateway>> Start(const HttpOptions& options, GatewayDoor door,
                                                    Clock* clock, const SpaceCatalogue* spaces,
                                                    StreamNetwork* streams);
  virtual ~HttpGateway() = default;

  // With the port that was given.
  virtual const Endpoint& endpoint() const = 0;
  // What was recovered is there: calls are answered from now on. Any thread, once.
  virtual void SetServing() = 0;
  // Takes no more, lets streams end as the ingress core settles them, waits for calls under way,
  // and cuts what is left by then. Blocks.
  virtual void Shutdown(int64_t timeout_ns) = 0;
};

}  // namespace engram
