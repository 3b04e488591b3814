#include "src/core/network.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <charconv>
#include <string>
#include <utility>

namespace engram {

std::string Endpoint::ToString() const {
  const bool is_v6 = host.find(':') != std::string::npos;
  return (is_v6 ? "[" + host + "]" : host) + ":" + std::to_string(port);
}

Result<Endpoint> ParseEndpoint(std::string_view text) {
  const auto fail = [&](const char* why) {
    return Fail(ErrorCode::kInvalidArgument,
                "address \"" + std::string(text) + "\": " + why +
                    "; expected ADDRESS:PORT, for example 127.0.0.1:7654 or [::1]:7654");
  };
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos) return fail("the port is missing");
  std::string_view host = text.substr(0, colon);
  const std::string_view port = text.substr(colon + 1);

  Endpoint endpoint;
  const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), endpoint.port);
  if (error != std::errc{} || end != port.data() + port.size()) {
    return fail("the port is not a number from 0 to 65535");
  }

  const bool in_brackets = host.size() >= 2 && host.front() == '[' && host.back() == ']';
  if (in_brackets) host = host.substr(1, host.size() - 2);
  endpoint.host = host == "localhost" && !in_brackets ? "127.0.0.1" : std::string(host);
  in6_addr unused;
  if (inet_pton(in_brackets ? AF_INET6 : AF_INET, endpoint.host.c_str(), &unused) != 1) {
    return fail(in_brackets ? "what stands in brackets is not an IPv6 address"
                            : "the host is neither an IPv4 address nor an IPv6 one in brackets");
  }
  return endpoint;
}

std::string_view NetworkCounterName(NetworkCounter counter) {
  switch (counter) {
    case NetworkCounter::kConnectionsAccepted:
      return "connections_accepted";
    case NetworkCounter::kConnectionsRefused:
      return "connections_refused";
    case NetworkCounter::kAcceptErrors:
      return "accept_errors";
    case NetworkCounter::kSendBacklogCloses:
      return "send_backlog_closes";
    case NetworkCounter::kReceiveBuffersSpent:
      return "receive_buffers_spent";
    case NetworkCounter::kBytesReceived:
      return "bytes_received";
    case NetworkCounter::kBytesSent:
      return "bytes_sent";
  }
  return "?";
}

Result<std::unique_ptr<Network>> CreateNetwork(NetworkBackend backend,
                                               const NetworkOptions& options, std::string* note) {
  if (note != nullptr) note->clear();
  if (backend == NetworkBackend::kPosix) return CreatePosixNetwork(options);
  auto uring = CreateUringNetwork(options);
  if (uring || backend == NetworkBackend::kUring) return uring;
  if (note != nullptr) {
    *note = std::string(uring.error().code == ErrorCode::kPermissionDenied
                            ? "io_uring is forbidden here ("
                            : "io_uring cannot be used here (") +
            uring.error().message + "); using epoll";
  }
  return CreatePosixNetwork(options);
}

}  // namespace engram
