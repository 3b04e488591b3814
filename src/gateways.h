#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "src/appliance.h"
#include "src/control/config.h"
#include "src/control/gateway_core.h"
#include "src/control/grpc_gateway.h"
#include "src/control/http_gateway.h"
#include "src/core/clock.h"
#include "src/core/note.h"
#include "src/core/result.h"
#include "src/core/stream_network.h"

namespace engram {

// Where this program serves clients of libraries: gRPC, HTTP and WebSocket.
struct GatewayPlan {
  bool grpc = false;
  bool http = false;

  // `note` is told of what is configured and was not built.
  static GatewayPlan Of(const Config& config, const NoteFn& note);
  bool any() const { return grpc || http; }
};

// The servers of libraries, whose threads are not ours.
//
// Lifecycle: Start, once the gateway core polls; SetServing; Shutdown and the destructor, while it
// still does.
class Gateways {
 public:
  struct Surroundings {
    Clock* clock;
    GatewayCore* core;
    std::function<void()> wake;  // the gateway core's
    const CounterCatalogue* counters;
    const SpaceCatalogue* spaces;
    StreamNetwork* streams;
    std::function<std::string()> recovering;  // how far it is; any thread asks
  };

  // Errors name the field of the configuration and the remedy.
  static Result<std::unique_ptr<Gateways>> Start(const Config& config, const GatewayPlan& plan,
                                                 const Surroundings& around);

  void SetServing();
  // As each of them says of itself. Blocks.
  void Shutdown(int64_t timeout_ns);

  // nullptr: not served.
  const GrpcGateway* grpc() const { return grpc_.get(); }
  const HttpGateway* http() const { return http_.get(); }

 private:
  Gateways() = default;

  std::unique_ptr<GrpcGateway> grpc_;
  std::unique_ptr<HttpGateway> http_;
};

}  // namespace engram
