#include "src/control/http_origin.h"

#include <algorithm>
#include <cctype>

namespace engram {

namespace {

bool SameText(std::string_view a, std::string_view b) {
  return std::ranges::equal(
      a, b, [](unsigned char x, unsigned char y) { return std::tolower(x) == std::tolower(y); });
}

// Of "host", "host:port" or "[v6]:port".
std::string_view WithoutPort(std::string_view authority) {
  const size_t end = authority.starts_with('[') ? authority.find(']') + 1 : authority.find(':');
  // What follows the address is a port, or it is no address.
  if (end < authority.size() && authority[end] != ':') return authority;
  return authority.substr(0, end);
}

}  // namespace

bool IsServedOrigin(std::string_view origin, std::string_view host,
                    std::span<const std::string> allowed) {
  if (origin.empty()) return true;
  if (std::ranges::any_of(allowed, [&](std::string_view each) { return SameText(each, origin); })) {
    return true;
  }
  // "null", and what is no origin, is nobody's.
  const size_t scheme = origin.find("://");
  if (scheme == std::string_view::npos) return false;
  const std::string_view from = WithoutPort(origin.substr(scheme + 3));
  for (const std::string_view local : {"localhost", "127.0.0.1", "[::1]"}) {
    if (SameText(from, local)) return true;
  }
  return !from.empty() && SameText(from, WithoutPort(host));
}

}  // namespace engram
