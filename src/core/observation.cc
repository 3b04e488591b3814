#include "src/core/observation.h"

#include <algorithm>

namespace engram {

std::string_view MetricName(Metric metric) {
  switch (metric) {
    case Metric::kCosine:
      return "cosine";
    case Metric::kInnerProduct:
      return "ip";
    case Metric::kL2:
      return "l2";
    case Metric::kUnspecified:
      break;
  }
  return "unspecified";
}

Metric MetricOfName(std::string_view name) {
  for (const Metric metric : {Metric::kCosine, Metric::kInnerProduct, Metric::kL2}) {
    if (MetricName(metric) == name) return metric;
  }
  return Metric::kUnspecified;
}

bool IsValidSpaceName(std::string_view name) {
  if (name.empty() || name.size() > kMaxSpaceNameBytes) return false;
  return std::ranges::all_of(name, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
  });
}

}  // namespace engram
