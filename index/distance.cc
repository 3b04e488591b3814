#include "index/distance.h"

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

float CosineDistance(const float* a, const float* b, size_t padded_dimension) {
  return 1.0F - SumOfTerms<Product>(a, b, padded_dimension);
}
float InnerProductDistance(const float* a, const float* b, size_t padded_dimension) {
  return -SumOfTerms<Product>(a, b, padded_dimension);
}
float L2Distance(const float* a, const float* b, size_t padded_dimension) {
  return SumOfTerms<SquaredDifference>(a, b, padded_dimension);
}

double SquaredNormInDouble(const float* v, size_t count) { return SumOfSquaresInDouble(v, count); }
void Scale(float* v, size_t count, double factor) { ScaleInDouble(v, count, factor); }

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace engram {

HWY_EXPORT(CosineDistance);
HWY_EXPORT(InnerProductDistance);
HWY_EXPORT(L2Distance);
HWY_EXPORT(SquaredNormInDouble);
HWY_EXPORT(Scale);

DistanceFn DistanceFunction(Metric metric) {
  // Without this the table's first entry would choose the target anew on every call.
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  switch (metric) {
    case Metric::kCosine:
      return &HWY_DYNAMIC_DISPATCH(CosineDistance);
    case Metric::kInnerProduct:
      return &HWY_DYNAMIC_DISPATCH(InnerProductDistance);
    case Metric::kL2:
      return &HWY_DYNAMIC_DISPATCH(L2Distance);
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
