// Vectors that are hard to put into codes of one bit, or into int8: a space that may be walked with
// codes recalls as well as one that is walked with int8, whatever it is given.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "src/core/hash.h"
#include "tests/index/coded_space_rig.h"
#include "tests/index/latent_vector.h"
#include "tests/support/sanitized.h"

namespace engram {
namespace {

constexpr uint64_t kVectors = kSanitized ? 600 : 2'000;
constexpr uint64_t kQueries = kSanitized ? 30 : 60;
constexpr uint64_t kFirstQuery = 1'000'000;
constexpr double kAllowed = 0.01;

// The vector with a number; of queries, too, which are those from kFirstQuery on.
using Draw = std::function<std::vector<float>(uint64_t)>;

std::vector<std::vector<float>> QueriesOf(const Draw& draw) {
  std::vector<std::vector<float>> queries;
  for (uint64_t i = 0; i < kQueries; ++i) queries.push_back(draw(kFirstQuery + i));
  return queries;
}

struct Data {
  std::string name;
  Metric metric;
  uint32_t dimension;
  Draw draw;
};

std::vector<float> Times(std::vector<float> vector, float factor) {
  for (float& value : vector) value *= factor;
  return vector;
}

// Nothing near: independent numbers.
std::vector<float> Noise(uint64_t number, uint32_t dimension) {
  SplitMix64 random(MixBits(number + 77));
  std::vector<float> vector(dimension);
  for (float& value : vector) value = static_cast<float>(random.Below(1 << 20)) / (1 << 19) - 1;
  return vector;
}

// One of them is a hundred times as large as the others, or all of them have it in common.
std::vector<float> Hot(uint64_t number, float factor, float offset) {
  std::vector<float> vector = LatentVector(number, 96);
  vector[17] = vector[17] * factor + offset;
  return vector;
}
std::vector<float> Sparse(uint64_t number) {
  std::vector<float> vector(96);
  for (uint64_t i = 0; i < 5; ++i) vector[MixBits(number * 5 + i) % 96] += 1;
  return vector;
}
// Their lengths are up to a thousandfold of each other's.
std::vector<float> OfAnyLength(uint64_t number) {
  return Times(LatentVector(number, 96), std::pow(10.0F, static_cast<float>(MixBits(number) % 4)));
}

std::vector<Data> AllData() {
  constexpr Metric kL2 = Metric::kL2;
  constexpr Metric kCosine = Metric::kCosine;
  constexpr Metric kProduct = Metric::kInnerProduct;
  std::vector<Data> all;
  const auto add = [&](const std::string& name, std::vector<Metric> metrics, uint32_t dimension,
                       const Draw& draw) {
    if (kSanitized) metrics.resize(1);
    for (const Metric metric : metrics) all.push_back({name, metric, dimension, draw});
  };
  add("OneHot", {kL2, kCosine, kProduct}, 96, [](uint64_t n) { return Hot(n, 100, 0); });
  add("OneOffset", {kL2, kCosine}, 96, [](uint64_t n) { return Hot(n, 1, 500); });
  add("Noise", {kL2, kCosine}, 96, [](uint64_t n) { return Noise(n, 96); });
  add("MostlyEqual", {kL2, kCosine, kProduct}, 96,
      [](uint64_t n) { return LatentVector(n % 10 == 0 ? n : 0, 96); });
  add("Copies", {kL2, kCosine}, 96, [](uint64_t n) { return LatentVector(n % 400, 96); });
  add("Sparse", {kL2, kCosine, kProduct}, 96, Sparse);
  // As small and as large as squares of floats allow under L2.
  add("Tiny", {kL2, kCosine}, 96, [](uint64_t n) { return Times(LatentVector(n, 96), 1e-20F); });
  add("Tinier", {kCosine}, 96, [](uint64_t n) { return Times(LatentVector(n, 96), 1e-30F); });
  add("Huge", {kL2, kCosine}, 96, [](uint64_t n) { return Times(LatentVector(n, 96), 1e17F); });
  add("Huger", {kCosine}, 96, [](uint64_t n) { return Times(LatentVector(n, 96), 1e30F); });
  add("OfAnyLength", {kL2, kProduct}, 96, OfAnyLength);
  for (const uint32_t dimension : {1U, 2U, 8U, 32U, 64U, 65U, 128U}) {
    const Draw latent = [dimension](uint64_t n) { return LatentVector(n, dimension); };
    add("Few", dimension == 1 ? std::vector{kL2} : std::vector{kL2, kCosine}, dimension, latent);
  }
  return all;
}

void ExpectRecallsAs(CodedSpaceRig* rig, CodedSpaceRig* plain,
                     const std::vector<std::vector<float>>& queries) {
  const TrueNearest truth = rig->NearestOf(queries);
  for (const uint32_t ef : {64U, 128U}) {
    EXPECT_GE(rig->Recall(truth, ef), plain->Recall(truth, ef) - kAllowed) << "ef " << ef;
  }
}

class HardDataTest : public testing::TestWithParam<Data> {};

TEST_P(HardDataTest, IsRecalledAsByInt8) {
  const Data& data = GetParam();
  CodedSpaceRig rig({.metric = data.metric, .dimension = data.dimension});
  CodedSpaceRig plain(
      {.metric = data.metric, .traversal = Traversal::kInt8, .dimension = data.dimension});
  for (CodedSpaceRig* one : {&rig, &plain}) {
    for (uint64_t id = 0; id < kVectors; ++id) {
      ASSERT_NO_FATAL_FAILURE(one->Store(id, data.draw(id)));
      if (id % 500 == 499) {
        ASSERT_NO_FATAL_FAILURE(one->Settle());
      }
    }
    ASSERT_NO_FATAL_FAILURE(one->Settle());
  }
  const std::vector<std::vector<float>> queries = QueriesOf(data.draw);
  ExpectRecallsAs(&rig, &plain, queries);
  // Half of them go: those that are left were linked to these.
  for (CodedSpaceRig* one : {&rig, &plain}) {
    for (uint64_t id = 0; id < kVectors; ++id) {
      if (MixBits(id) % 2 == 0) {
        ASSERT_NO_FATAL_FAILURE(one->Remove(id));
      }
    }
    ASSERT_NO_FATAL_FAILURE(one->Settle());
  }
  SCOPED_TRACE("half of them");
  ExpectRecallsAs(&rig, &plain, queries);
}

INSTANTIATE_TEST_SUITE_P(SpaceCodes, HardDataTest, testing::ValuesIn(AllData()),
                         [](const auto& param) {
                           const Data& data = param.param;
                           return data.name + "Of" + std::to_string(data.dimension) + "By" +
                                  std::string(MetricName(data.metric));
                         });

// With what they have in common so large int8 does not tell them apart, and no code that is made of
// it does: the graph is built by the vectors as they are kept, and walked with them.
TEST(SpaceCodesDataTest, WhereInt8TellsNothingApartTheKeptVectorsAreWalked) {
  const Draw draw = [](uint64_t number) {
    std::vector<float> vector = LatentVector(number, 96);
    for (float& value : vector) value += 10'000;
    return vector;
  };
  CodedSpaceRig rig({.dimension = 96});
  for (uint64_t id = 0; id < kVectors; ++id) {
    ASSERT_NO_FATAL_FAILURE(rig.Store(id, draw(id)));
  }
  ASSERT_NO_FATAL_FAILURE(rig.Settle());
  EXPECT_TRUE(rig.space.walks_exact());
  EXPECT_FALSE(rig.HasCodes());
  EXPECT_GE(rig.Recall(rig.NearestOf(QueriesOf(draw)), 64), 0.98);
}

// Squares of these are beyond what a float holds: nothing tells them apart, and nothing breaks.
TEST(SpaceCodesDataTest, NumbersWhoseSquaresAreNoFloatsAreStoredAndGoneAgain) {
  for (const Metric metric : {Metric::kL2, Metric::kInnerProduct}) {
    for (const float scale : {1e-30F, 1e-38F, 1e20F, 1e36F}) {
      if (kSanitized && std::abs(std::log10(scale)) < 35) continue;
      SCOPED_TRACE(std::string(MetricName(metric)) + " " + std::to_string(std::log10(scale)));
      CodedSpaceRig rig({.metric = metric});
      constexpr uint64_t kSome = kSanitized ? 400 : 700;
      for (uint64_t id = 0; id < kSome; ++id) {
        ASSERT_NO_FATAL_FAILURE(rig.Store(id, Times(LatentVector(id, 96), scale)));
        if (id % 200 == 199) {
          ASSERT_NO_FATAL_FAILURE(rig.Settle());
        }
      }
      ASSERT_NO_FATAL_FAILURE(rig.Settle());
      ASSERT_NO_FATAL_FAILURE(rig.ExpectAllThere());
      const RecallAnswer all =
          RunRecall(rig.space, &rig.job, rig.vectors[3], {.k = kSome, .ef = 2 * kSome});
      EXPECT_EQ(all.hits.size(), kSome);
      for (uint64_t id = 0; id < kSome; ++id) ASSERT_NO_FATAL_FAILURE(rig.Remove(id));
      ASSERT_NO_FATAL_FAILURE(rig.Settle());
    }
  }
}

}  // namespace
}  // namespace engram
