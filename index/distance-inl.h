// Distance kernels, compiled once per instruction set: included by distance.cc only.

#if defined(ENGRAM_INDEX_DISTANCE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ENGRAM_INDEX_DISTANCE_INL_H_
#undef ENGRAM_INDEX_DISTANCE_INL_H_
#else
#define ENGRAM_INDEX_DISTANCE_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// At most one row's alignment unit in a register, so that a row is a whole number of registers.
using FloatTag = hn::CappedTag<float, 16>;
using Floats = hn::Vec<FloatTag>;

// What a pair of registers adds to the sum.
struct Product {
  HWY_INLINE Floats operator()(Floats a, Floats b, Floats sum) const {
    return hn::MulAdd(a, b, sum);
  }
};
struct SquaredDifference {
  HWY_INLINE Floats operator()(Floats a, Floats b, Floats sum) const {
    const Floats difference = hn::Sub(a, b);
    return hn::MulAdd(difference, difference, sum);
  }
};

// Four sums, so that one addition need not wait for the last. `count` is a multiple of 16.
template <typename Term>
HWY_INLINE float SumOfTerms(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b,
                            size_t count) {
  const FloatTag tag;
  const Term term;
  const size_t lanes = hn::Lanes(tag);
  Floats sum0 = hn::Zero(tag);
  Floats sum1 = hn::Zero(tag);
  Floats sum2 = hn::Zero(tag);
  Floats sum3 = hn::Zero(tag);
  size_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    sum0 = term(hn::Load(tag, a + i), hn::Load(tag, b + i), sum0);
    sum1 = term(hn::Load(tag, a + i + lanes), hn::Load(tag, b + i + lanes), sum1);
    sum2 = term(hn::Load(tag, a + i + 2 * lanes), hn::Load(tag, b + i + 2 * lanes), sum2);
    sum3 = term(hn::Load(tag, a + i + 3 * lanes), hn::Load(tag, b + i + 3 * lanes), sum3);
  }
  for (; i < count; i += lanes) sum0 = term(hn::Load(tag, a + i), hn::Load(tag, b + i), sum0);
  return hn::GetLane(hn::SumOfLanes(tag, hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3))));
}

// In double, so that neither tiny nor huge values leave the range. No alignment needed.
HWY_INLINE double SumOfSquaresInDouble(const float* HWY_RESTRICT v, size_t count) {
  double sum = 0;
  size_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<double, 8> wide;
  const hn::Rebind<float, decltype(wide)> narrow;
  const size_t lanes = hn::Lanes(wide);
  auto sum0 = hn::Zero(wide);
  auto sum1 = hn::Zero(wide);
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    const auto value0 = hn::PromoteTo(wide, hn::LoadU(narrow, v + i));
    const auto value1 = hn::PromoteTo(wide, hn::LoadU(narrow, v + i + lanes));
    sum0 = hn::MulAdd(value0, value0, sum0);
    sum1 = hn::MulAdd(value1, value1, sum1);
  }
  sum = hn::GetLane(hn::SumOfLanes(wide, hn::Add(sum0, sum1)));
#endif
  for (; i < count; ++i) sum += double{v[i]} * double{v[i]};
  return sum;
}

// v[i] * factor, rounded once from double.
HWY_INLINE void ScaleInDouble(float* v, size_t count, double factor) {
  size_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<double, 8> wide;
  const hn::Rebind<float, decltype(wide)> narrow;
  const size_t lanes = hn::Lanes(wide);
  const auto factors = hn::Set(wide, factor);
  for (; i + lanes <= count; i += lanes) {
    const auto value = hn::PromoteTo(wide, hn::LoadU(narrow, v + i));
    hn::StoreU(hn::DemoteTo(narrow, hn::Mul(value, factors)), narrow, v + i);
  }
#endif
  for (; i < count; ++i) v[i] = static_cast<float>(double{v[i]} * factor);
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#endif  // per target
