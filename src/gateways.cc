#include "src/gateways.h"

#include <utility>

namespace engram {

GatewayPlan GatewayPlan::Of(const Config& config, const NoteFn& note) {
  GatewayPlan plan;
  plan.grpc = config.grpc && GrpcGateway::IsBuilt();
  plan.http = config.http && HttpGateway::IsBuilt();
  if (config.grpc && !plan.grpc) {
    note(
        {Severity::kWarning, "grpc: this engramd was built without it; listen.grpc is not served"});
  }
  if (config.http && !plan.http) {
    note(
        {Severity::kWarning, "http: this engramd was built without it; listen.http is not served"});
  }
  return plan;
}

Result<std::unique_ptr<Gateways>> Gateways::Start(const Config& config, const GatewayPlan& plan,
                                                  const Surroundings& around) {
  std::unique_ptr<Gateways> gateways(new Gateways);
  if (plan.grpc) {
    GrpcOptions options;
    options.endpoint = *config.grpc;
    options.cpus = config.control_cpus;
    options.recovering = around.recovering;
    auto grpc = GrpcGateway::Start(options, around.core->OpenDoor(around.wake), around.clock,
                                   around.counters, around.spaces, around.streams);
    if (!grpc) return std::unexpected(grpc.error());
    gateways->grpc_ = *std::move(grpc);
  }
  if (plan.http) {
    HttpOptions options;
    options.endpoint = *config.http;
    options.cpus = config.control_cpus;
    options.origins = config.http_origins;
    options.max_connections = config.limits.max_connections;
    options.recovering = around.recovering;
    auto http = HttpGateway::Start(options, around.core->OpenDoor(around.wake), around.clock,
                                   around.spaces, around.streams);
    if (!http) return std::unexpected(http.error());
    gateways->http_ = *std::move(http);
  }
  return gateways;
}

void Gateways::SetServing() {
  if (grpc_ != nullptr) grpc_->SetServing();
  if (http_ != nullptr) http_->SetServing();
}

void Gateways::Shutdown(int64_t timeout_ns) {
  if (http_ != nullptr) http_->Shutdown(timeout_ns);
  if (grpc_ != nullptr) grpc_->Shutdown(timeout_ns);
}

}  // namespace engram
