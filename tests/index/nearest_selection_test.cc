#include "index/nearest_selection.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "src/core/hash.h"

namespace engram {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr uint32_t kUntouched = 0xABABABAB;

// An array with its slack, and behind that numbers that nothing may write to.
template <typename T>
class Slacked {
 public:
  Slacked(size_t count, T slack) : count_(count), items_(count + 2 * kSelectionSlack, slack) {
    for (size_t i = count + kSelectionSlack; i < items_.size(); ++i) items_[i] = Guard();
  }
  T* data() { return items_.data(); }
  const T* data() const { return items_.data(); }
  T& operator[](size_t i) { return items_[i]; }
  std::vector<T> First(size_t count) const {
    return {items_.begin(), items_.begin() + static_cast<ptrdiff_t>(count)};
  }
  bool GuardIsWhole() const {
    return std::all_of(items_.begin() + static_cast<ptrdiff_t>(count_ + kSelectionSlack),
                       items_.end(), [](T item) { return item == Guard(); });
  }

 private:
  static T Guard() { return static_cast<T>(12'345'678); }
  size_t count_;
  std::vector<T> items_;
};

// Sizes around the widths of registers as often as any.
size_t DrawCount(SplitMix64* random) {
  return random->Below(2) == 0 ? random->Below(70) : random->Below(2'001);
}

// Kinds: all different, many ties, all equal, far apart, with infinities, with NaN, with both.
constexpr uint64_t kKinds = 8;
float DrawDistance(SplitMix64* random, uint64_t kind) {
  const float even = static_cast<float>(random->Below(2'000'001)) / 1'000'000 - 1;
  switch (kind) {
    case 0:
      return even;
    case 1:
      return static_cast<float>(random->Below(7)) - 3;
    case 2:
      return 2.5F;
    case 3:
      return std::ldexp(even, static_cast<int>(random->Below(250)) - 125);
    case 4:
      return random->Below(4) == 0 ? HUGE_VALF : even;
    case 5:
      return random->Below(4) == 0 ? kNaN : even;
    case 6:
      return random->Below(3) == 0 ? -HUGE_VALF : random->Below(2) == 0 ? kNaN : HUGE_VALF;
    default:
      return random->Below(2) == 0 ? 0.0F : -0.0F;
  }
}

Slacked<float> DrawDistances(SplitMix64* random, size_t count, uint64_t kind) {
  // The slack would be nearest, were it counted.
  Slacked<float> distances(count, -1e30F);
  for (size_t i = 0; i < count; ++i) distances[i] = DrawDistance(random, kind);
  return distances;
}

float WeightBelow(const std::vector<float>& distances, const std::vector<float>& weights,
                  float bound) {
  float sum = 0;
  for (size_t i = 0; i < distances.size(); ++i) {
    if (distances[i] < bound) sum += weights.empty() ? 1 : weights[i];
  }
  return sum;
}

// The contract, and nothing of how it is found: enough is nearer than the bound, and no more than
// may be, but for those that are as far as the last one that is needed. Nothing is nearer than
// infinity that is infinitely far.
void ExpectBound(const std::vector<float>& distances, const std::vector<float>& weights,
                 float bound, float least, float most) {
  ASSERT_FALSE(std::isnan(bound));
  const float weight = WeightBelow(distances, weights, bound);
  const float finite = WeightBelow(distances, weights, HUGE_VALF);
  ASSERT_GE(weight, std::min(least, finite));
  if (weight <= most) return;
  // Without the farthest of those that are below it, it would be too little.
  float farthest = -HUGE_VALF;
  for (const float distance : distances) {
    if (distance < bound) farthest = std::max(farthest, distance);
  }
  ASSERT_LT(WeightBelow(distances, weights, farthest), std::max(least, 1e-30F))
      << "a nearer bound would have been enough";
}

TEST(NearestSelectionTest, TheBoundHasEnoughBelowItAndNotTooMuch) {
  SplitMix64 random(1);
  for (int round = 0; round < 6'000; ++round) {
    const uint64_t kind = static_cast<uint64_t>(round) % kKinds;
    const size_t count = DrawCount(&random);
    const Slacked<float> distances = DrawDistances(&random, count, kind);
    Slacked<float> weights(count, 1e6F);
    const bool weighted = random.Below(2) == 0;
    // Some weigh nothing, as lists without members do.
    for (size_t i = 0; i < count; ++i) {
      weights[i] = random.Below(4) == 0 ? 0 : static_cast<float>(random.Below(400));
    }
    const auto total = static_cast<uint64_t>(weighted ? 400 * count : count);
    const auto least = static_cast<float>(random.Below(total + total / 4 + 2));
    const float most = least * (random.Below(3) == 0 ? 1.0F : 1.15F) +
                       static_cast<float>(random.Below(3) == 0 ? random.Below(50) : 0);
    const float bound =
        BoundOfNearest(distances.data(), weighted ? weights.data() : nullptr, count, least, most);
    ASSERT_NO_FATAL_FAILURE(ExpectBound(distances.First(count),
                                        weighted ? weights.First(count) : std::vector<float>{},
                                        bound, least, most))
        << "round " << round << ", " << count << " of kind " << kind << ", " << least << " to "
        << most;
  }
}

TEST(NearestSelectionTest, TheBoundTakesAllWhereTheyWeighLess) {
  for (const size_t count : {1, 15, 16, 17, 500}) {
    Slacked<float> distances(count, -1e30F);
    for (size_t i = 0; i < count; ++i) distances[i] = static_cast<float>(i) - 5;
    const float bound = BoundOfNearest(distances.data(), nullptr, count, 1'000, 1'100);
    EXPECT_GT(bound, static_cast<float>(count) - 6);
  }
}

// One that is infinitely far is never nearer than a bound, and keeps out none of the others.
TEST(NearestSelectionTest, WhatIsInfinitelyFarKeepsOutNoOther) {
  Slacked<float> distances(4, -1e30F);
  distances[0] = 1;
  distances[1] = HUGE_VALF;
  distances[2] = 3;
  distances[3] = kNaN;
  for (const float least : {2.0F, 3.0F, 4.0F, 100.0F}) {
    const float bound = BoundOfNearest(distances.data(), nullptr, 4, least, least);
    EXPECT_GT(bound, 3) << least;
  }
}

TEST(NearestSelectionTest, TheBoundOfNothing) {
  Slacked<float> distances(3, -1e30F);
  for (size_t i = 0; i < 3; ++i) distances[i] = kNaN;
  EXPECT_EQ(BoundOfNearest(distances.data(), nullptr, 0, 1, 1), HUGE_VALF);
  EXPECT_EQ(BoundOfNearest(distances.data(), nullptr, 3, 1, 1), HUGE_VALF);
}

TEST(NearestSelectionTest, KeepNearerKeepsTheNearerInTheirOrder) {
  SplitMix64 random(2);
  for (int round = 0; round < 4'000; ++round) {
    const uint64_t kind = static_cast<uint64_t>(round) % kKinds;
    const size_t count = DrawCount(&random);
    Slacked<float> distances = DrawDistances(&random, count, kind);
    Slacked<uint32_t> ids(count, kUntouched);
    for (size_t i = 0; i < count; ++i) ids[i] = static_cast<uint32_t>(random.Next());
    const float bound = DrawDistance(&random, kind);
    std::vector<float> kept_distances;
    std::vector<uint32_t> kept_ids;
    for (size_t i = 0; i < count; ++i) {
      if (!(distances[i] < bound)) continue;
      kept_distances.push_back(distances[i]);
      kept_ids.push_back(ids[i]);
    }
    const size_t kept = KeepNearer(bound, distances.data(), ids.data(), count);
    ASSERT_EQ(kept, kept_ids.size()) << "round " << round;
    ASSERT_EQ(distances.First(kept), kept_distances);
    ASSERT_EQ(ids.First(kept), kept_ids);
    ASSERT_TRUE(distances.GuardIsWhole() && ids.GuardIsWhole());
  }
}

struct Products {
  Products(SplitMix64* random, size_t count)
      : products(count, 0), offsets(count, -1e30F), factors(count, 1), ids(count, kUntouched) {
    // The result of a fused multiplication is the same as of two roundings: all are integers.
    for (size_t i = 0; i < count; ++i) {
      products[i] = static_cast<int32_t>(random->Below(2'001)) - 1'000;
      offsets[i] = static_cast<float>(random->Below(1'001)) - 500;
      factors[i] = static_cast<float>(random->Below(9)) - 4;
      ids[i] = static_cast<uint32_t>(random->Next());
    }
  }
  float Distance(size_t i, float scale) {
    return offsets[i] + factors[i] * scale * static_cast<float>(products[i]);
  }
  Slacked<int32_t> products;
  Slacked<float> offsets;
  Slacked<float> factors;
  Slacked<uint32_t> ids;
};

TEST(NearestSelectionTest, AppendNearerAppendsTheNearer) {
  SplitMix64 random(3);
  for (int round = 0; round < 4'000; ++round) {
    const size_t count = DrawCount(&random);
    Products in(&random, count);
    const auto scale = static_cast<float>(1 + random.Below(4));
    const float bound = round % 10 == 0   ? HUGE_VALF
                        : round % 10 == 1 ? -HUGE_VALF
                                          : static_cast<float>(random.Below(8'001)) - 4'000;
    std::vector<float> distances;
    std::vector<uint32_t> ids;
    for (size_t i = 0; i < count; ++i) {
      if (!(in.Distance(i, scale) < bound)) continue;
      distances.push_back(in.Distance(i, scale));
      ids.push_back(in.ids[i]);
    }
    Slacked<float> out_distances(ids.size(), 0);
    Slacked<uint32_t> out_ids(ids.size(), 0);
    const size_t appended =
        AppendNearer(in.products.data(), in.offsets.data(), in.factors.data(), scale, in.ids.data(),
                     count, bound, out_distances.data(), out_ids.data());
    ASSERT_EQ(appended, ids.size()) << "round " << round;
    ASSERT_EQ(out_distances.First(appended), distances);
    ASSERT_EQ(out_ids.First(appended), ids);
    ASSERT_TRUE(out_distances.GuardIsWhole() && out_ids.GuardIsWhole());
  }
}

TEST(NearestSelectionTest, PlacesOfTheNearerUpToALimit) {
  SplitMix64 random(4);
  for (int round = 0; round < 4'000; ++round) {
    const uint64_t kind = static_cast<uint64_t>(round) % kKinds;
    const size_t count = DrawCount(&random);
    const Slacked<float> distances = DrawDistances(&random, count, kind);
    const float bound = DrawDistance(&random, kind);
    const size_t most = random.Below(4) == 0 ? random.Below(3) : 1 + random.Below(200);
    std::vector<uint32_t> wanted;
    for (size_t i = 0; i < count && wanted.size() < most; ++i) {
      if (distances.First(count)[i] < bound) wanted.push_back(static_cast<uint32_t>(i));
    }
    Slacked<uint32_t> places(most, kUntouched);
    const size_t found = PlacesNearer(distances.data(), count, bound, most, places.data());
    ASSERT_EQ(found, wanted.size()) << "round " << round;
    ASSERT_EQ(places.First(found), wanted);
    ASSERT_TRUE(places.GuardIsWhole());
  }
}

TEST(NearestSelectionTest, ScaledProductsAndTheFirstOfTheLeast) {
  SplitMix64 random(5);
  for (int round = 0; round < 4'000; ++round) {
    const size_t count = 1 + DrawCount(&random);
    Products in(&random, count);
    if (round % 3 == 0) {  // ties
      for (size_t i = 0; i < count; ++i) in.products[i] %= 2;
    }
    const auto scale = static_cast<float>(1 + random.Below(4));
    std::vector<float> wanted;
    for (size_t i = 0; i < count; ++i) wanted.push_back(in.Distance(i, scale));
    Slacked<float> out(count, 0);
    const size_t place = ScaleProducts(in.products.data(), in.offsets.data(), in.factors.data(),
                                       scale, count, out.data());
    ASSERT_EQ(out.First(count), wanted);
    ASSERT_EQ(place,
              static_cast<size_t>(std::min_element(wanted.begin(), wanted.end()) - wanted.begin()));
    ASSERT_TRUE(out.GuardIsWhole());
  }
}

// Where nothing is a number, or all is infinitely far, some place is named.
TEST(NearestSelectionTest, TheLeastOfWhatIsNoNumber) {
  SplitMix64 random(6);
  for (const float offset : {kNaN, HUGE_VALF}) {
    Products in(&random, 20);
    for (size_t i = 0; i < 20; ++i) in.offsets[i] = offset;
    Slacked<float> out(20, 0);
    EXPECT_LT(
        ScaleProducts(in.products.data(), in.offsets.data(), in.factors.data(), 1, 20, out.data()),
        20u);
  }
}

}  // namespace
}  // namespace engram
