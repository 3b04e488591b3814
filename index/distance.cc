// For the VNNI kernel; before any header of Highway.
#define HWY_WANT_AVX3_DL

#include "index/distance.h"

#include <algorithm>
#include <cmath>

#include "src/core/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/distance.cc"
#include <hwy/foreach_target.h>  // Compiles what follows once per instruction set.
#include <hwy/highway.h>

#include "index/distance-inl.h"

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

float CosineOfF32(const std::byte* a, const std::byte* b, size_t padded_dimension) {
  return 1.0F - SumOfF32<Product>(a, b, padded_dimension);
}
float InnerProductOfF32(const std::byte* a, const std::byte* b, size_t padded_dimension) {
  return -SumOfF32<Product>(a, b, padded_dimension);
}
float L2OfF32(const std::byte* a, const std::byte* b, size_t padded_dimension) {
  return SumOfF32<SquaredDifference>(a, b, padded_dimension);
}

float CosineOfBf16(const std::byte* a, const std::byte* b, size_t padded_dimension) {
  return 1.0F - SumOfBf16<Product>(a, b, padded_dimension);
}
float InnerProductOfBf16(const std::byte* a, const std::byte* b, size_t padded_dimension) {
  return -SumOfBf16<Product>(a, b, padded_dimension);
}
float L2OfBf16(const std::byte* a, const std::byte* b, size_t padded_dimension) {
  return SumOfBf16<SquaredDifference>(a, b, padded_dimension);
}

double SquaredNormInDouble(const float* v, size_t count) { return SumOfSquaresInDouble(v, count); }
void Scale(float* v, size_t count, double factor) { ScaleInDouble(v, count, factor); }

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

ENGRAM_BEFORE_INT8_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

float CosineOfInt8(const std::byte* a, const std::byte* b, size_t padded_dimension) {
  return DistanceOfInt8<CosineOfDot>(a, b, padded_dimension);
}
float InnerProductOfInt8(const std::byte* a, const std::byte* b, size_t padded_dimension) {
  return DistanceOfInt8<InnerProductOfDot>(a, b, padded_dimension);
}
float L2OfInt8(const std::byte* a, const std::byte* b, size_t padded_dimension) {
  return DistanceOfInt8<L2OfDot>(a, b, padded_dimension);
}

void CosinesOfInt8(const std::byte* query, const std::byte* const* rows, size_t count,
                   size_t padded_dimension, float* out) {
  DistancesOfInt8<CosineOfDot>(query, rows, count, padded_dimension, out);
}
void InnerProductsOfInt8(const std::byte* query, const std::byte* const* rows, size_t count,
                         size_t padded_dimension, float* out) {
  DistancesOfInt8<InnerProductOfDot>(query, rows, count, padded_dimension, out);
}
void L2sOfInt8(const std::byte* query, const std::byte* const* rows, size_t count,
               size_t padded_dimension, float* out) {
  DistancesOfInt8<L2OfDot>(query, rows, count, padded_dimension, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace engram {

HWY_EXPORT(CosineOfF32);
HWY_EXPORT(InnerProductOfF32);
HWY_EXPORT(L2OfF32);
HWY_EXPORT(CosineOfBf16);
HWY_EXPORT(InnerProductOfBf16);
HWY_EXPORT(L2OfBf16);
HWY_EXPORT(CosineOfInt8);
HWY_EXPORT(InnerProductOfInt8);
HWY_EXPORT(L2OfInt8);
HWY_EXPORT(CosinesOfInt8);
HWY_EXPORT(InnerProductsOfInt8);
HWY_EXPORT(L2sOfInt8);
HWY_EXPORT(SquaredNormInDouble);
HWY_EXPORT(Scale);

DistanceFn DistanceFunction(Precision precision, Metric metric) {
  // Without this the table's first entry would choose the target anew on every call.
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  const auto of_metric = [metric](DistanceFn cosine, DistanceFn inner_product, DistanceFn l2) {
    switch (metric) {
      case Metric::kCosine:
        return cosine;
      case Metric::kInnerProduct:
        return inner_product;
      case Metric::kL2:
        return l2;
      case Metric::kUnspecified:
        break;
    }
    CHECK(false, "a space has a metric");
  };
  switch (precision) {
    case Precision::kF32:
      return of_metric(&HWY_DYNAMIC_DISPATCH(CosineOfF32), &HWY_DYNAMIC_DISPATCH(InnerProductOfF32),
                       &HWY_DYNAMIC_DISPATCH(L2OfF32));
    case Precision::kBf16:
      return of_metric(&HWY_DYNAMIC_DISPATCH(CosineOfBf16),
                       &HWY_DYNAMIC_DISPATCH(InnerProductOfBf16), &HWY_DYNAMIC_DISPATCH(L2OfBf16));
    case Precision::kInt8:
      return of_metric(&HWY_DYNAMIC_DISPATCH(CosineOfInt8),
                       &HWY_DYNAMIC_DISPATCH(InnerProductOfInt8), &HWY_DYNAMIC_DISPATCH(L2OfInt8));
    case Precision::kUnspecified:
      break;
  }
  CHECK(false, "a space has a precision");
}

DistancesFn Int8DistancesFunction(Metric metric) {
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  switch (metric) {
    case Metric::kCosine:
      return &HWY_DYNAMIC_DISPATCH(CosinesOfInt8);
    case Metric::kInnerProduct:
      return &HWY_DYNAMIC_DISPATCH(InnerProductsOfInt8);
    case Metric::kL2:
      return &HWY_DYNAMIC_DISPATCH(L2sOfInt8);
    case Metric::kUnspecified:
      break;
  }
  CHECK(false, "a space has a metric");
}

float SquaredNorm(const float* v, size_t count) {
  return static_cast<float>(HWY_DYNAMIC_DISPATCH(SquaredNormInDouble)(v, count));
}

bool NormaliseInPlace(float* v, size_t dimension) {
  // The squares of all floats, the smallest denormal included, are far inside double's range.
  const double squared = HWY_DYNAMIC_DISPATCH(SquaredNormInDouble)(v, dimension);
  if (squared == 0) return false;
  HWY_DYNAMIC_DISPATCH(Scale)(v, dimension, 1.0 / std::sqrt(squared));
  return true;
}

}  // namespace engram
#endif  // HWY_ONCE
