// As in index/sign_blocks.cc, so that its targets are all tested here.
#define HWY_WANT_AVX3_DL

#include "index/sign_blocks.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "index/distance.h"
#include "src/core/arena_heap.h"
#include "tests/index/space_testing.h"

namespace engram {
namespace {

constexpr Metric kMetrics[] = {Metric::kCosine, Metric::kInnerProduct, Metric::kL2};
constexpr size_t kSlack = kSelectionSlack;

using Values = std::vector<float>;

Values RandomVector(Metric metric, uint32_t dimension, double scale, std::mt19937* random) {
  std::normal_distribution<double> normal;
  Values values(dimension);
  for (float& value : values) value = static_cast<float>(normal(*random) * scale);
  if (metric == Metric::kCosine) NormaliseInPlace(values.data(), dimension);
  return values;
}

double ExactDistance(Metric metric, const Values& a, const Values& b) {
  double dot = 0;
  double squared = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    dot += double{a[i]} * double{b[i]};
    squared += (double{a[i]} - double{b[i]}) * (double{a[i]} - double{b[i]});
  }
  return metric == Metric::kL2 ? squared : metric == Metric::kCosine ? squared / 2 : -dot;
}

// Members of one block, their codes, and the estimates by the definition.
class SignRig {
 public:
  SignRig(Metric metric, uint32_t dimension, const Values& centroid)
      : memory_(size_t{4} << 20),
        format_(RabitqFormat::Create(metric, dimension, centroid.data(), 5, &memory_.heap)),
        signs_(*format_),
        block_(memory_.heap.Allocate(signs_.block_bytes())) {
    // What was never set may be anything.
    std::memset(block_, 0x7F, signs_.block_bytes());
  }
  ~SignRig() {
    for (std::byte* row : rows_) memory_.heap.Free(row, format_->row_bytes());
    memory_.heap.Free(block_, signs_.block_bytes());
    RabitqFormat::Destroy(format_, &memory_.heap);
  }
  SignRig(const SignRig&) = delete;
  SignRig& operator=(const SignRig&) = delete;

  const std::byte* Encode(const Values& v) {
    rows_.push_back(memory_.heap.Allocate(format_->row_bytes()));
    format_->Encode(v.data(), rows_.back());
    return rows_.back();
  }
  void Set(uint32_t place, const std::byte* row) { signs_.Set(block_, place, row); }

  // Those of `count` members that are nearer than `bound`, as id and estimate.
  struct Found {
    std::vector<uint32_t> ids;
    std::vector<float> estimates;
  };
  Found Nearer(const std::byte* query, size_t count, float bound) const {
    constexpr uint32_t kUntouched = 0x5A5A5A5A;
    std::array<uint32_t, SignBlocks::kMembers + kSlack> ids{};
    for (uint32_t i = 0; i < SignBlocks::kMembers; ++i) ids[i] = 1'000 + i;
    Found found;
    found.ids.assign(SignBlocks::kMembers + 2 * kSlack, kUntouched);
    found.estimates.assign(found.ids.size(), 0);
    const size_t appended = signs_.AppendNearer(block_, count, signs_.QueryOf(query), ids.data(),
                                                bound, found.estimates.data(), found.ids.data());
    for (size_t i = appended + kSlack; i < found.ids.size(); ++i) {
      EXPECT_EQ(found.ids[i], kUntouched) << "wrote beyond the slack";
    }
    found.ids.resize(appended);
    found.estimates.resize(appended);
    ExpectAmongAll(found, query, count);
    for (uint32_t places = SignBlocks::kLeastPlaces; places < SignBlocks::kMembers; places *= 2) {
      if (count <= places) ExpectInBlockOf(places, found, query, count, bound);
    }
    return found;
  }
  // The same in a block of fewer places.
  void ExpectInBlockOf(uint32_t places, const Found& found, const std::byte* query, size_t count,
                       float bound) const {
    std::vector<uint32_t> words(signs_.block_bytes(places) / sizeof(uint32_t), 0x7F7F7F7F);
    auto* const block = reinterpret_cast<std::byte*>(words.data());
    signs_.CopyFirst(count, block_, SignBlocks::kMembers, block, places);
    std::vector<uint32_t> of_members(places + kSlack);
    for (uint32_t i = 0; i < places; ++i) of_members[i] = 1'000 + i;
    std::vector<uint32_t> ids(places + kSlack);
    std::vector<float> estimates(ids.size());
    const size_t appended =
        signs_.AppendNearer(block, count, signs_.QueryOf(query), of_members.data(), bound,
                            estimates.data(), ids.data(), places);
    ids.resize(appended);
    estimates.resize(appended);
    EXPECT_EQ(ids, found.ids) << places << " places";
    EXPECT_EQ(estimates, found.estimates) << places << " places";
  }
  // The same as where all are estimated.
  void ExpectAmongAll(const Found& found, const std::byte* query, size_t count) const {
    constexpr float kUntouched = -77;
    std::array<float, SignBlocks::kMembers + kSlack> all;
    all.fill(kUntouched);
    signs_.Estimate(block_, count, signs_.QueryOf(query), all.data());
    for (size_t i = 0; i < found.ids.size(); ++i) {
      EXPECT_EQ(found.estimates[i], all[found.ids[i] - 1'000]);
    }
    for (size_t i = count + kSlack; i < all.size(); ++i) EXPECT_EQ(all[i], kUntouched);
  }
  // From the codes' bits and the vectors, in double.
  double Expected(const std::byte* query, const Values& of_query, const std::byte* row,
                  const Values& of_row) const {
    size_t differ = 0;
    for (size_t i = 0; i < format_->bits() / 8; ++i) {
      differ += static_cast<size_t>(std::popcount(std::to_integer<uint8_t>(query[i] ^ row[i])));
    }
    const double bits = static_cast<double>(format_->bits());
    const double sine =
        std::sin(std::numbers::pi / 2 * (bits - 2 * static_cast<double>(differ)) / bits);
    const double a = std::sqrt(SquaredNorm(of_query));
    const double b = std::sqrt(SquaredNorm(of_row));
    switch (format_->metric()) {
      case Metric::kL2:
        return a * a + b * b - 2 * a * b * sine;
      case Metric::kCosine:
        return (a * a + b * b) / 2 - a * b * sine;
      default:
        return -a * b * sine - ByCentroid(of_row, true) - ByCentroid(of_query, false);
    }
  }
  const RabitqFormat& format() const { return *format_; }
  const SignBlocks& signs() const { return signs_; }
  std::byte* block() { return block_; }

 private:
  double SquaredNorm(const Values& v) const {
    double sum = 0;
    for (size_t i = 0; i < v.size(); ++i) {
      const double residual = double{v[i]} - double{format_->centroid()[i]};
      sum += residual * residual;
    }
    return sum;
  }
  // <v - c, c>, or <v, c>.
  double ByCentroid(const Values& v, bool residual) const {
    double sum = 0;
    for (size_t i = 0; i < v.size(); ++i) {
      const double c = double{format_->centroid()[i]};
      sum += (double{v[i]} - (residual ? c : 0)) * c;
    }
    return sum;
  }

  TestHeap memory_;
  RabitqFormat* format_;
  SignBlocks signs_;
  std::byte* block_;
  std::vector<std::byte*> rows_;
};

// The kernels of every instruction set that this machine has.
class SignBlocksTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};
INSTANTIATE_TEST_SUITE_P(Targets, SignBlocksTest,
                         testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const testing::TestParamInfo<int64_t>& target) {
                           return std::string(hwy::TargetName(target.param));
                         });

// Of each number of members, each width and each metric: the right ones, in their order, with the
// estimate that the definition gives.
TEST_P(SignBlocksTest, FindsWhatTheDefinitionFinds) {
  std::mt19937 random(1);
  for (const Metric metric : kMetrics) {
    for (const uint32_t dimension : {64U, 128U, 200U, 768U, 4096U}) {
      SignRig rig(metric, dimension, RandomVector(metric, dimension, 0.3, &random));
      std::vector<Values> members;
      std::vector<const std::byte*> rows;
      for (uint32_t place = 0; place < SignBlocks::kMembers; ++place) {
        members.push_back(RandomVector(metric, dimension, 1, &random));
        rows.push_back(rig.Encode(members.back()));
        rig.Set(place, rows.back());
      }
      const Values query = RandomVector(metric, dimension, 1, &random);
      const std::byte* const code = rig.Encode(query);
      std::vector<double> expected;
      for (size_t i = 0; i < members.size(); ++i) {
        expected.push_back(rig.Expected(code, query, rows[i], members[i]));
      }
      std::vector<double> sorted = expected;
      std::sort(sorted.begin(), sorted.end());
      // Between two that are apart: estimates agree to rounding only. Of a row of an inner product
      // the norm itself is an estimate.
      const double scale = metric == Metric::kCosine ? 1 : static_cast<double>(dimension);
      const double tolerance = (metric == Metric::kInnerProduct ? 0.1 : 1e-5) * scale;
      for (size_t count = 1; count <= members.size(); ++count) {
        const auto bound = static_cast<float>((sorted[20] + sorted[21]) / 2);
        const SignRig::Found all = rig.Nearer(code, count, HUGE_VALF);
        ASSERT_EQ(all.ids.size(), count);
        std::vector<uint32_t> nearer;
        for (size_t i = 0; i < count; ++i) {
          ASSERT_EQ(all.ids[i], 1'000 + i);
          ASSERT_NEAR(all.estimates[i], expected[i], tolerance) << dimension << " " << i;
          if (all.estimates[i] < bound) nearer.push_back(all.ids[i]);
        }
        ASSERT_EQ(rig.Nearer(code, count, bound).ids, nearer);
      }
      EXPECT_TRUE(rig.Nearer(code, members.size(), -HUGE_VALF).ids.empty());
    }
  }
}

// The error at an angle is no more than what the signs' binomial distribution says.
TEST_P(SignBlocksTest, EstimatesAreOfTheDistance) {
  constexpr uint32_t kDimension = 768;
  std::mt19937 random(2);
  for (const Metric metric : kMetrics) {
    SignRig rig(metric, kDimension, Values(kDimension, 0.0F));
    double errors = 0;
    double squares = 0;
    int count = 0;
    for (int round = 0; round < 4; ++round) {
      const Values query = RandomVector(Metric::kCosine, kDimension, 1, &random);
      const std::byte* const code = rig.Encode(query);
      std::vector<Values> members;
      for (uint32_t place = 0; place < SignBlocks::kMembers; ++place) {
        Values v = RandomVector(Metric::kCosine, kDimension, 1, &random);
        for (uint32_t i = 0; i < kDimension; ++i) v[i] += query[i];  // at some 45 degrees
        NormaliseInPlace(v.data(), kDimension);
        rig.Set(place, rig.Encode(v));
        members.push_back(v);
      }
      const SignRig::Found found = rig.Nearer(code, members.size(), HUGE_VALF);
      for (size_t i = 0; i < members.size(); ++i, ++count) {
        const double half = metric == Metric::kL2 ? 2 : 1;
        const double error = (found.estimates[i] - ExactDistance(metric, query, members[i])) / half;
        errors += error;
        squares += error * error;
      }
    }
    // pi sin(45 deg) sqrt(p (1 - p) / bits) = 0.035 with p = 1/4 would be of bits that do not know
    // of each other; those of vectors of one norm spread less.
    EXPECT_LT(std::sqrt(squares / count), 0.035) << static_cast<int>(metric);
    EXPECT_GT(std::sqrt(squares / count), 0.02) << static_cast<int>(metric);
    EXPECT_NEAR(errors / count, 0, 0.008) << static_cast<int>(metric);
  }
}

TEST_P(SignBlocksTest, AVectorIsNoFarFromItself) {
  std::mt19937 random(3);
  for (const Metric metric : {Metric::kCosine, Metric::kL2}) {
    SignRig rig(metric, 768, RandomVector(metric, 768, 0.3, &random));
    const Values v = RandomVector(metric, 768, 1, &random);
    const std::byte* const code = rig.Encode(v);
    rig.Set(0, code);
    const float scale = metric == Metric::kCosine ? 1 : 768;
    EXPECT_NEAR(rig.Nearer(code, 1, HUGE_VALF).estimates[0] / scale, 0, 1e-5);
  }
}

// Numbers whose norms leave a float's range give estimates that are none: they are not near, and do
// not keep others from being found.
TEST_P(SignBlocksTest, HugeNumbersHideNoOthers) {
  constexpr uint32_t kDimension = 128;
  std::mt19937 random(4);
  SignRig rig(Metric::kL2, kDimension, Values(kDimension, 0.0F));
  const std::byte* const huge = rig.Encode(Values(kDimension, std::numeric_limits<float>::max()));
  const Values v = RandomVector(Metric::kL2, kDimension, 1, &random);
  const std::byte* const code = rig.Encode(v);
  for (uint32_t near = 0; near < SignBlocks::kMembers; ++near) {
    for (uint32_t place = 0; place < SignBlocks::kMembers; ++place) {
      rig.Set(place, place == near ? code : huge);
    }
    const SignRig::Found found = rig.Nearer(code, SignBlocks::kMembers, 1'000.0F);
    ASSERT_EQ(found.ids, std::vector<uint32_t>{1'000 + near});
  }
}

TEST(SignBlocksMembers, ABlockOfFewerPlacesTakesAndCopiesTheSame) {
  constexpr uint32_t kPlaces = 2 * SignBlocks::kLeastPlaces;
  std::mt19937 random(6);
  SignRig rig(Metric::kCosine, 200, Values(200, 0.0F));
  std::vector<std::byte> copied(rig.signs().block_bytes(kPlaces), std::byte{1});
  std::vector<std::byte> set(copied.size(), std::byte{2});
  for (uint32_t place = 0; place < kPlaces; ++place) {
    const std::byte* const row = rig.Encode(RandomVector(Metric::kCosine, 200, 1, &random));
    rig.Set(SignBlocks::kMembers - 1 - place, row);
    rig.signs().Set(set.data(), place, row, kPlaces);
    rig.signs().Copy(rig.block(), SignBlocks::kMembers - 1 - place, copied.data(), place,
                     SignBlocks::kMembers, kPlaces);
  }
  EXPECT_EQ(copied, set);
}

TEST(SignBlocksMembers, ACopyIsTheMember) {
  std::mt19937 random(5);
  SignRig rig(Metric::kCosine, 200, Values(200, 0.0F));
  SignRig other(Metric::kCosine, 200, Values(200, 0.0F));
  std::vector<const std::byte*> rows;
  for (uint32_t place = 0; place < SignBlocks::kMembers; ++place) {
    rows.push_back(rig.Encode(RandomVector(Metric::kCosine, 200, 1, &random)));
    rig.Set(place, rows.back());
    other.Set(SignBlocks::kMembers - 1 - place, rows.back());
  }
  std::vector<std::byte> before(rig.block(), rig.block() + rig.signs().block_bytes());
  for (uint32_t place = 0; place < SignBlocks::kMembers; ++place) {
    rig.signs().Copy(other.block(), place, rig.block(), SignBlocks::kMembers - 1 - place);
  }
  EXPECT_EQ(std::memcmp(before.data(), rig.block(), before.size()), 0);
}

}  // namespace
}  // namespace engram
