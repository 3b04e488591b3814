// The product of two rows of int8 by what every instruction set has, compiled once per instruction
// set: included by other such files only. AVX3_DL has instructions of its own for it.

#if defined(ENGRAM_INDEX_INT8_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ENGRAM_INDEX_INT8_PRODUCT_INL_H_
#undef ENGRAM_INDEX_INT8_PRODUCT_INL_H_
#else
#define ENGRAM_INDEX_INT8_PRODUCT_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>

#if HWY_TARGET != HWY_AVX3_DL

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

// Exact; `count` is a multiple of 64 and at most 4,096, which keeps every sum below 2^27.
HWY_INLINE int32_t Int8Product(const int8_t* HWY_RESTRICT a, const int8_t* HWY_RESTRICT b,
                               size_t count) {
#if HWY_TARGET == HWY_SCALAR
  int32_t sum = 0;
  for (size_t i = 0; i < count; ++i) sum += int32_t{a[i]} * int32_t{b[i]};
  return sum;
#else
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::CappedTag<int16_t, 32> wide;
  const hn::Rebind<int8_t, decltype(wide)> narrow;
  const hn::Repartition<int32_t, decltype(wide)> sum_tag;
  const size_t lanes = hn::Lanes(wide);
  // Each pair takes the sums that one instruction leaves in two registers on some targets.
  auto sum0 = hn::Zero(sum_tag);
  auto sum1 = hn::Zero(sum_tag);
  auto sum2 = hn::Zero(sum_tag);
  auto sum3 = hn::Zero(sum_tag);
  for (size_t i = 0; i < count; i += 2 * lanes) {
    const auto a0 = hn::PromoteTo(wide, hn::LoadU(narrow, a + i));
    const auto b0 = hn::PromoteTo(wide, hn::LoadU(narrow, b + i));
    const auto a1 = hn::PromoteTo(wide, hn::LoadU(narrow, a + i + lanes));
    const auto b1 = hn::PromoteTo(wide, hn::LoadU(narrow, b + i + lanes));
    sum0 = hn::ReorderWidenMulAccumulate(sum_tag, a0, b0, sum0, sum1);
    sum2 = hn::ReorderWidenMulAccumulate(sum_tag, a1, b1, sum2, sum3);
  }
  const auto sums = hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3));
  return hn::GetLane(hn::SumOfLanes(sum_tag, sums));
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#endif  // AVX3_DL

#endif  // per target
