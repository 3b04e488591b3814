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

std::string_view PrecisionName(Precision precision) {
  switch (precision) {
    case Precision::kF32:
      return "f32";
    case Precision::kBf16:
      return "bf16";
    case Precision::kInt8:
      return "int8";
    case Precision::kUnspecified:
      break;
  }
  return "unspecified";
}

Precision PrecisionOfName(std::string_view name) {
  for (const Precision precision : {Precision::kF32, Precision::kBf16, Precision::kInt8}) {
    if (PrecisionName(precision) == name) return precision;
  }
  return Precision::kUnspecified;
}

bool IsValidSpaceName(std::string_view name) {
  if (name.empty() || name.size() > kMaxSpaceNameBytes) return false;
  return std::ranges::all_of(name, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
  });
}

}  // namespace engram
