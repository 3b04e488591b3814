// For VPOPCNTD; before any header of Highway.
#define HWY_WANT_AVX3_DL

#include "index/sign_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "index/sign_blocks.cc"
#include <hwy/foreach_target.h>  // Compiles what follows once per instruction set.
#include <hwy/highway.h>

#ifndef ENGRAM_INDEX_SIGN_BLOCKS_ONCE_
#define ENGRAM_INDEX_SIGN_BLOCKS_ONCE_
namespace engram {

// What a kernel takes of a block and a query.
struct SignScan {
  const std::byte* block;
  const std::byte* code;
  size_t bits;
  float norm;
  float offset;
  size_t places;
};

}  // namespace engram
#endif

HWY_BEFORE_NAMESPACE();
namespace engram {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using SignTag = hn::CappedTag<uint32_t, 16>;
using SignFloatTag = hn::RebindToFloat<SignTag>;
using SignIntTag = hn::RebindToSigned<SignTag>;
using SignFloats = hn::Vec<SignFloatTag>;

constexpr size_t kSignMembers = SignBlocks::kMembers;

// sin(x), -pi/2 <= x <= pi/2, to within 1e-6.
HWY_INLINE SignFloats SineOf(SignFloats x) {
  const SignFloatTag tag;
  const SignFloats square = hn::Mul(x, x);
  SignFloats sum = hn::MulAdd(square, hn::Set(tag, -0.00018363F), hn::Set(tag, 0.00830629F));
  sum = hn::MulAdd(square, sum, hn::Set(tag, -0.16664824F));
  sum = hn::MulAdd(square, sum, hn::Set(tag, 0.99999661F));
  return hn::Mul(x, sum);
}

// Calls visit(place, estimates) for kRegisters registers of members from `first` on;
// `place` is the first member of each.
template <size_t kRegisters, typename Visit>
HWY_INLINE void EstimateSome(const SignScan& scan, size_t first, const Visit& visit) {
  const SignTag tag;
  const SignFloatTag float_tag;
  const SignIntTag int_tag;
  const size_t lanes = hn::Lanes(tag);
  const auto* const words = reinterpret_cast<const uint32_t*>(scan.block);
  auto sum0 = hn::Zero(tag);
  auto sum1 = hn::Zero(tag);
  auto sum2 = hn::Zero(tag);
  auto sum3 = hn::Zero(tag);
  const uint32_t* at = words + first;
  for (size_t word = 0; word < scan.bits / 32; ++word, at += scan.places) {
    uint32_t of_query;
    std::memcpy(&of_query, scan.code + word * sizeof(of_query), sizeof(of_query));
    const auto query = hn::Set(tag, of_query);
    const auto ones = [&](size_t i) HWY_ATTR {
      return hn::PopulationCount(hn::Xor(hn::LoadU(tag, at + i * lanes), query));
    };
    sum0 = hn::Add(sum0, ones(0));
    if constexpr (kRegisters > 1) sum1 = hn::Add(sum1, ones(1));
    if constexpr (kRegisters > 2) sum2 = hn::Add(sum2, ones(2));
    if constexpr (kRegisters > 3) sum3 = hn::Add(sum3, ones(3));
  }
  const auto* const factors = reinterpret_cast<const float*>(words + scan.bits / 32 * scan.places);
  const SignFloats right_angle = hn::Set(float_tag, 1.57079632679F);
  const SignFloats step = hn::Set(float_tag, 3.14159265359F / static_cast<float>(scan.bits));
  const SignFloats norm = hn::Set(float_tag, scan.norm);
  const SignFloats offset = hn::Set(float_tag, scan.offset);
  const auto finish = [&](size_t i, hn::Vec<SignTag> sum) HWY_ATTR {
    const size_t place = first + i * lanes;
    const SignFloats disagreements = hn::ConvertTo(float_tag, hn::BitCast(int_tag, sum));
    const SignFloats sine = SineOf(hn::NegMulAdd(disagreements, step, right_angle));
    const SignFloats own = hn::Add(hn::LoadU(float_tag, factors + place), offset);
    const SignFloats by = hn::LoadU(float_tag, factors + scan.places + place);
    visit(place, hn::MulAdd(hn::Mul(sine, norm), by, own));
  };
  finish(0, sum0);
  if constexpr (kRegisters > 1) finish(1, sum1);
  if constexpr (kRegisters > 2) finish(2, sum2);
  if constexpr (kRegisters > 3) finish(3, sum3);
}

// The same for all registers that have some of the first `count` members.
template <typename Visit>
HWY_INLINE void ForEachEstimate(const SignScan& scan, size_t count, const Visit& visit) {
  const size_t lanes = hn::Lanes(SignTag());
  size_t first = 0;
  for (; first + 3 * lanes < count; first += 4 * lanes) EstimateSome<4>(scan, first, visit);
  if (first + 2 * lanes < count) {
    EstimateSome<3>(scan, first, visit);
  } else if (first + lanes < count) {
    EstimateSome<2>(scan, first, visit);
  } else if (first < count) {
    EstimateSome<1>(scan, first, visit);
  }
}

void SignEstimate(const SignScan& scan, size_t count, float* estimates) {
  const SignFloatTag tag;
  ForEachEstimate(scan, count, [&](size_t place, SignFloats of_some) HWY_ATTR {
    hn::StoreU(of_some, tag, estimates + place);
  });
}

size_t SignAppendNearer(const SignScan& scan, size_t count, const uint32_t* of_members, float bound,
                        float* estimates, uint32_t* ids) {
  const SignTag tag;
  const SignFloatTag float_tag;
  const size_t lanes = hn::Lanes(tag);
  HWY_ALIGN float values[kSignMembers];
  const SignFloats bounds = hn::Set(float_tag, bound);
  auto found = hn::FirstN(float_tag, 0);
  ForEachEstimate(scan, count, [&](size_t place, SignFloats of_some) HWY_ATTR {
    hn::Store(of_some, float_tag, values + place);
    found = hn::Or(found, hn::Lt(of_some, bounds));
  });
  // Mostly there is none, once the bound is low. Beyond `count` may lie what is nearer.
  if (hn::AllFalse(float_tag, found)) return 0;
  size_t appended = 0;
  for (size_t place = 0; place < count; place += lanes) {
    const auto of_some = hn::Load(float_tag, values + place);
    const auto nearer = hn::And(hn::Lt(of_some, bounds), hn::FirstN(float_tag, count - place));
    hn::StoreU(hn::Compress(of_some, nearer), float_tag, estimates + appended);
    hn::StoreU(hn::Compress(hn::LoadU(tag, of_members + place), hn::RebindMask(tag, nearer)), tag,
               ids + appended);
    appended += hn::CountTrue(float_tag, nearer);
  }
  return appended;
}

}  // namespace HWY_NAMESPACE
}  // namespace engram
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace engram {

HWY_EXPORT(SignEstimate);
HWY_EXPORT(SignAppendNearer);

// Where the row does not tell |r|, from the sum of its magnitudes, which a rotation makes those of
// a normal distribution.
SignBlocks::Factors SignBlocks::FactorsOf(const std::byte* row) const {
  std::array<float, 2> of_row;  // A and F
  std::memcpy(of_row.data(), row + bits_ / 8, sizeof(of_row));
  const auto [A, F] = of_row;
  switch (metric_) {
    case Metric::kL2:
      return {A, std::sqrt(A)};
    case Metric::kCosine:
      return {A, std::sqrt(2 * A)};
    case Metric::kInnerProduct:
    case Metric::kUnspecified:
      break;
  }
  return {A, -F * std::sqrt(2 / std::numbers::pi_v<float> * static_cast<float>(bits_))};
}

void SignBlocks::Set(std::byte* block, uint32_t place, const std::byte* row,
                     uint32_t places) const {
  auto* const words = reinterpret_cast<uint32_t*>(block);
  const size_t count = bits_ / 32;
  for (size_t word = 0; word < count; ++word) {
    std::memcpy(words + word * places + place, row + word * sizeof(uint32_t), sizeof(uint32_t));
  }
  const Factors factors = FactorsOf(row);
  auto* const floats = reinterpret_cast<float*>(words + count * places);
  floats[place] = factors.offset;
  floats[places + place] = metric_ == Metric::kL2 ? -2 * factors.norm : -factors.norm;
}

void SignBlocks::Copy(const std::byte* from, uint32_t from_place, std::byte* to, uint32_t to_place,
                      uint32_t from_places, uint32_t to_places) const {
  const auto* const source = reinterpret_cast<const uint32_t*>(from);
  auto* const target = reinterpret_cast<uint32_t*>(to);
  // The factors are two rows more.
  for (size_t row = 0; row < bits_ / 32 + 2; ++row) {
    target[row * to_places + to_place] = source[row * from_places + from_place];
  }
}

void SignBlocks::CopyFirst(size_t count, const std::byte* from, uint32_t from_places, std::byte* to,
                           uint32_t to_places) const {
  for (size_t row = 0; row < bits_ / 32 + 2; ++row) {
    std::memcpy(to + row * to_places * sizeof(uint32_t),
                from + row * from_places * sizeof(uint32_t), count * sizeof(uint32_t));
  }
}

SignBlocks::Query SignBlocks::QueryOf(const std::byte* row) const {
  const Factors factors = FactorsOf(row);
  const bool by_product = metric_ == Metric::kInnerProduct;
  return {row, factors.norm,
          by_product ? factors.offset - squared_norm_of_centroid_ : factors.offset};
}

void SignBlocks::Estimate(const std::byte* block, size_t count, const Query& query,
                          float* estimates) const {
  HWY_DYNAMIC_DISPATCH(SignEstimate)
  ({block, query.code, bits_, query.norm, query.offset, kMembers}, count, estimates);
}

size_t SignBlocks::AppendNearer(const std::byte* block, size_t count, const Query& query,
                                const uint32_t* of_members, float bound, float* estimates,
                                uint32_t* ids, uint32_t places) const {
  return HWY_DYNAMIC_DISPATCH(SignAppendNearer)(
      {block, query.code, bits_, query.norm, query.offset, places}, count, of_members, bound,
      estimates, ids);
}

}  // namespace engram
#endif  // HWY_ONCE
