#include "index/rabitq_learner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "index/distance.h"
#include "index/rabitq_format.h"
#include "index/vector_format.h"
#include "src/core/arena_heap.h"
#include "src/core/huge_page_arena.h"
#include "src/core/observation.h"
#include "tests/index/real_vectors.h"
#include "tests/support/allocation_counter.h"

namespace engram {
namespace {

using Values = std::vector<float>;

TestVectors Normal(size_t count, uint32_t dimension, float scale, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  TestVectors vectors{.dimension = dimension, .values = Values(count * dimension)};
  for (float& value : vectors.values) value = normal(random) * scale;
  return vectors;
}

// Rows of a format, and a learner over them.
class Rig {
 public:
  Rig(Metric metric, Precision precision, const TestVectors& vectors,
      size_t arena_bytes = size_t{64} << 20)
      : format(precision, metric, vectors.dimension), count(vectors.size()) {
    Result<HugePageArena> created =
        HugePageArena::Create({.reserve_bytes = arena_bytes, .huge_pages = HugePagePolicy::kOff});
    arena = std::make_unique<HugePageArena>(std::move(*created));
    heap = std::make_unique<ArenaHeap>(arena.get());
    learner = std::make_unique<RabitqLearner>(heap.get());
    memory.resize(count * format.row_bytes() + 64);
    rows = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) % 64);
    for (size_t i = 0; i < count; ++i) {
      Values v(vectors[i].begin(), vectors[i].end());
      if (metric == Metric::kCosine) NormaliseInPlace(v.data(), v.size());
      format.Encode(v.data(), rows + i * format.row_bytes());
    }
  }

  RabitqSample Sample() const {
    return {.format = &format,
            .count = count,
            .row = [](const void* context, size_t index) -> const std::byte* {
              const auto* rig = static_cast<const Rig*>(context);
              EXPECT_LT(index, rig->count);
              return rig->rows + index * rig->format.row_bytes();
            },
            .context = this};
  }
  // Until it says that it is done, or has no memory.
  RabitqLearner::Progress Learn(uint64_t seed = 1) {
    learner->Start(Sample(), seed);
    steps = 0;
    while (true) {
      const RabitqLearner::Progress progress = learner->Step();
      ++steps;
      if (progress != RabitqLearner::Progress::kGoesOn) return progress;
    }
  }

  VectorFormat format;
  size_t count;
  std::unique_ptr<HugePageArena> arena;
  std::unique_ptr<ArenaHeap> heap;
  std::unique_ptr<RabitqLearner> learner;
  std::vector<std::byte> memory;
  std::byte* rows = nullptr;
  size_t steps = 0;
};

bool IsGood(Metric metric, Precision precision, const TestVectors& vectors) {
  Rig rig(metric, precision, vectors);
  EXPECT_EQ(rig.Learn(), RabitqLearner::Progress::kDone);
  return rig.learner->IsGood();
}
double Quality(Metric metric, Precision precision, const TestVectors& vectors) {
  Rig rig(metric, precision, vectors);
  EXPECT_EQ(rig.Learn(), RabitqLearner::Progress::kDone);
  return rig.learner->quality();
}

TEST(RabitqLearnerTest, TheCentroidIsTheMeanOfWhatIsStored) {
  const TestVectors vectors = Normal(777, 65, 1, 1);
  for (const Precision precision : {Precision::kF32, Precision::kInt8}) {
    Rig rig(Metric::kL2, precision, vectors);
    ASSERT_EQ(rig.Learn(), RabitqLearner::Progress::kDone);
    RabitqFormat* const format = rig.learner->TakeFormat();
    ASSERT_NE(format, nullptr);
    EXPECT_EQ(format->metric(), Metric::kL2);
    std::vector<double> mean(65);
    Values v(65);
    for (size_t i = 0; i < rig.count; ++i) {
      rig.format.Decode(rig.rows + i * rig.format.row_bytes(), v.data());
      for (size_t j = 0; j < 65; ++j) mean[j] += double{v[j]} / static_cast<double>(rig.count);
    }
    for (size_t j = 0; j < 65; ++j) ASSERT_NEAR(format->centroid()[j], mean[j], 1e-6);
    EXPECT_EQ(rig.learner->TakeFormat(), nullptr) << "given away twice";
    RabitqFormat::Destroy(format, rig.heap.get());
  }
}

// A quality worked out in one go, with sorting in place of heaps and slices.
TEST(RabitqLearnerTest, TheQualityIsTheShareOfNeighboursThatLookNear) {
  const TestVectors vectors = Normal(500, 64, 1, 2);
  Rig rig(Metric::kL2, Precision::kF32, vectors);
  ASSERT_EQ(rig.Learn(), RabitqLearner::Progress::kDone);
  RabitqFormat* const format = rig.learner->TakeFormat();
  std::vector<std::byte> memory((rig.count + 64) * 4096);
  std::byte* const codes = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) % 64);
  std::byte* const query = codes + rig.count * format->row_bytes();
  for (size_t i = 0; i < rig.count; ++i) {
    format->Encode(vectors[i].data(), codes + i * format->row_bytes());
  }
  size_t kept = 0;
  for (size_t k = 0; k < RabitqLearner::kQueries; ++k) {
    const size_t own = k * rig.count / RabitqLearner::kQueries;
    format->EncodeQuery(vectors[own].data(), query);
    std::vector<std::pair<float, size_t>> near;
    std::vector<std::pair<float, size_t>> looks_near;
    for (size_t i = 0; i < rig.count; ++i) {
      if (i == own) continue;
      near.emplace_back(rig.format.Distance(rig.rows + own * rig.format.row_bytes(),
                                            rig.rows + i * rig.format.row_bytes()),
                        i);
      looks_near.emplace_back(
          format->distance()(query, codes + i * format->row_bytes(), format->bits()), i);
    }
    std::sort(near.begin(), near.end());
    std::sort(looks_near.begin(), looks_near.end());
    for (size_t i = 0; i < 10; ++i) {
      for (size_t j = 0; j < 40; ++j)
        kept += static_cast<size_t>(near[i].second == looks_near[j].second);
    }
  }
  const double expected = static_cast<double>(kept) / (10.0 * RabitqLearner::kQueries);
  EXPECT_NEAR(rig.learner->quality(), expected, 1e-9);
  EXPECT_LT(expected, 0.95) << "too easy to tell anything";
  EXPECT_GT(expected, 0.3);
  RabitqFormat::Destroy(format, rig.heap.get());
}

// What a walk by codes would lose its way in.
TEST(RabitqLearnerTest, RefusesWhatCodesCannotTellApart) {
  for (const uint32_t dimension : {2U, 4U, 8U, 16U, 64U, 100U, 768U}) {
    const TestVectors vectors = Normal(4096, dimension, 1, 3);
    EXPECT_FALSE(IsGood(Metric::kCosine, Precision::kInt8, vectors)) << dimension;
    EXPECT_FALSE(IsGood(Metric::kL2, Precision::kF32, vectors)) << dimension;
  }
  // One hot dimension.
  TestVectors hot = Normal(4096, 256, 1, 3);
  for (size_t i = 0; i < hot.size(); ++i) hot.values[i * 256 + 7] *= 100;
  EXPECT_FALSE(IsGood(Metric::kL2, Precision::kF32, hot));
  EXPECT_FALSE(IsGood(Metric::kCosine, Precision::kInt8, hot));
  // Two far clusters: the centroid is between them, near to none.
  TestVectors far = Normal(4096, 256, 1, 3);
  for (size_t i = 0; i < far.values.size(); ++i) far.values[i] += i / 256 % 2 == 0 ? 30.0F : -30.0F;
  EXPECT_FALSE(IsGood(Metric::kL2, Precision::kF32, far));
}

TEST(RabitqLearnerTest, TakesWhatCodesTellApart) {
  // Clouds of 40 about 100 centres.
  const TestVectors centres = Normal(100, 256, 1, 4);
  TestVectors clouds = Normal(4000, 256, 0.5F, 5);
  for (size_t i = 0; i < clouds.values.size(); ++i) {
    clouds.values[i] += centres.values[i / 256 % 100 * 256 + i % 256];
  }
  EXPECT_TRUE(IsGood(Metric::kL2, Precision::kF32, clouds));
  EXPECT_TRUE(IsGood(Metric::kCosine, Precision::kInt8, clouds));
  // Duplicates are as near as each other, whichever is found.
  TestVectors copies = Normal(4096, 256, 1, 6);
  for (size_t i = 50; i < 4096; ++i) {
    std::memcpy(&copies.values[i * 256], &copies.values[i % 50 * 256], 256 * sizeof(float));
  }
  EXPECT_EQ(Quality(Metric::kL2, Precision::kF32, copies), 1);
}

// 50 clouds of 40, and behind them one of `narrow` vectors, `width` wide where these are 0.5.
TestVectors WithNarrowCloud(size_t narrow, float width) {
  const TestVectors centres = Normal(100, 256, 1, 4);
  TestVectors vectors = Normal(2'000 + narrow, 256, 0.5F, 5);
  for (size_t i = 0; i < vectors.size(); ++i) {
    for (size_t j = 0; j < 256; ++j) {
      float& value = vectors.values[i * 256 + j];
      if (i < 2'000) {
        value += centres.values[i % 50 * 256 + j];
      } else {
        value = value / 0.5F * width + centres.values[99 * 256 + j];
      }
    }
  }
  return vectors;
}
std::vector<uint32_t> Every(uint32_t from, uint32_t to, size_t count) {
  std::vector<uint32_t> indexes;
  for (size_t i = 0; i < count; ++i) {
    indexes.push_back(static_cast<uint32_t>(from + i * (to - from) / count));
  }
  return indexes;
}

// However few they are of all, and whatever the quality of the others.
TEST(RabitqLearnerTest, WhatLiesCloseTogetherIsJudgedApart) {
  const TestVectors vectors = WithNarrowCloud(100, 0.02F);
  Rig rig(Metric::kL2, Precision::kF32, vectors);
  RabitqSample sample = rig.Sample();
  const auto learn = [&](std::span<const uint32_t> near) {
    sample.near = near;
    rig.learner->Start(sample, 1);
    while (rig.learner->Step() == RabitqLearner::Progress::kGoesOn) {
    }
  };
  learn({});
  EXPECT_TRUE(rig.learner->IsGood());
  EXPECT_EQ(rig.learner->near_quality(), 1) << "there is nothing to judge";
  const double alone = rig.learner->quality();
  const std::vector<uint32_t> narrow = Every(2'000, 2'100, RabitqLearner::kQueries);
  learn(narrow);
  EXPECT_EQ(rig.learner->quality(), alone);
  EXPECT_GE(rig.learner->quality(), RabitqLearner::kMinQuality);
  EXPECT_LT(rig.learner->near_quality(), RabitqLearner::kMinNearQuality);
  EXPECT_GT(rig.learner->near_quality(), 0.2);
  EXPECT_FALSE(rig.learner->IsGood());
  // And others of the same sample.
  const std::vector<uint32_t> wide = Every(0, 2'000, 10);
  learn(wide);
  EXPECT_EQ(rig.learner->quality(), alone);
  EXPECT_GE(rig.learner->near_quality(), RabitqLearner::kMinQuality);
  EXPECT_TRUE(rig.learner->IsGood());
}

// What is good of the near ones alone is no more good.
TEST(RabitqLearnerTest, WhatLiesAnywhereHasToBeGoodToo) {
  TestVectors vectors = Normal(2'100, 256, 1, 3);
  // Eight groups of a dozen.
  for (size_t i = 2'000; i < 2'100; ++i) {
    for (size_t j = 0; j < 256; ++j) {
      float& value = vectors.values[i * 256 + j];
      value = value * 0.1F + vectors.values[i % 8 * 256 + j];
    }
  }
  Rig rig(Metric::kL2, Precision::kF32, vectors);
  const std::vector<uint32_t> near = Every(2'000, 2'100, RabitqLearner::kQueries);
  RabitqSample sample = rig.Sample();
  sample.near = near;
  rig.learner->Start(sample, 1);
  while (rig.learner->Step() == RabitqLearner::Progress::kGoesOn) {
  }
  EXPECT_GE(rig.learner->near_quality(), RabitqLearner::kMinQuality);
  EXPECT_LT(rig.learner->quality(), RabitqLearner::kMinQuality);
  EXPECT_FALSE(rig.learner->IsGood());
}

TEST(RabitqLearnerTest, TakesRealVectors) {
  TestVectors data;
  TestVectors queries;
  const std::string missing = LoadFashionMnist(4096, 1, &data, &queries);
  if (!missing.empty()) GTEST_SKIP() << missing;
  for (const Metric metric : {Metric::kL2, Metric::kCosine, Metric::kInnerProduct}) {
    EXPECT_TRUE(IsGood(metric, Precision::kInt8, data)) << MetricName(metric);
  }
}

TEST(RabitqLearnerTest, ManyStepsHoweverWide) {
  for (const uint32_t dimension : {1U, 768U, 4096U}) {
    Rig rig(Metric::kL2, Precision::kF32, Normal(1024, dimension, 1, 7));
    ASSERT_EQ(rig.Learn(), RabitqLearner::Progress::kDone);
    // At 768 dimensions a slice decodes 32 rows; 2 * 32 slices for that.
    EXPECT_GT(rig.steps, dimension == 1 ? 60U : 64U);
    RabitqFormat::Destroy(rig.learner->TakeFormat(), rig.heap.get());
    EXPECT_EQ(rig.heap->live_bytes(), 0U) << "kept what it worked with";
  }
}

TEST(RabitqLearnerTest, SmallSamples) {
  for (const size_t count : {1, 2, 5, 11, 45}) {
    Rig rig(Metric::kL2, Precision::kF32, Normal(count, 100, 1, 8));
    ASSERT_EQ(rig.Learn(), RabitqLearner::Progress::kDone) << count;
    // No more than 40 others: all of them are candidates.
    if (count <= 41) {
      EXPECT_EQ(rig.learner->quality(), 1) << count;
    }
    rig.learner->Stop();
    EXPECT_EQ(rig.heap->live_bytes(), 0U);
  }
}

TEST(RabitqLearnerTest, GivesBackAllWhenStoppedOrSpent) {
  const TestVectors vectors = Normal(1000, 768, 1, 9);
  {
    Rig rig(Metric::kL2, Precision::kF32, vectors);
    for (size_t slices = 0; slices < 100; ++slices) {
      rig.learner->Start(rig.Sample(), 1);
      for (size_t i = 0; i < slices; ++i) rig.learner->Step();
      rig.learner->Stop();
      ASSERT_EQ(rig.heap->live_bytes(), 0U) << slices;
    }
  }
  // An arena that is spent at each allocation in turn: sums, vector, format, codes, query.
  size_t refused = 0;
  size_t done = 0;
  for (const size_t left : {2, 7, 12, 20, 100, 142, 144, 146, 148, 150, 160, 200}) {
    Rig rig(Metric::kL2, Precision::kF32, vectors, size_t{2} << 20);
    rig.arena->Allocate((size_t{2} << 20) - left * 1024, 64);
    const RabitqLearner::Progress progress = rig.Learn();
    if (progress == RabitqLearner::Progress::kNoMemory) {
      ++refused;
      EXPECT_EQ(rig.learner->TakeFormat(), nullptr);
      EXPECT_EQ(rig.heap->live_bytes(), 0U) << left;
    } else {
      ++done;
    }
    rig.learner->Stop();
    EXPECT_EQ(rig.heap->live_bytes(), 0U) << left;
  }
  EXPECT_GE(refused, 5U);
  EXPECT_GE(done, 1U);
}

TEST(RabitqLearnerTest, AllocatesNothing) {
  if (!AllocationsAreCounted()) GTEST_SKIP() << "a sanitizer counts allocations itself";
  Rig rig(Metric::kL2, Precision::kInt8, Normal(500, 128, 1, 10));
  CentroidDrift drift(rig.heap.get());
  const Values v(128, 1.0F);
  const uint64_t before = AllocationCount();
  rig.Learn();
  drift.Start(rig.learner->TakeFormat());
  drift.Add(v.data());
  EXPECT_EQ(AllocationCount(), before);
}

TEST(CentroidDriftTest, TellsWhatANewCentroidWouldSave) {
  Rig rig(Metric::kL2, Precision::kF32, Normal(2000, 100, 1, 11));
  ASSERT_EQ(rig.Learn(), RabitqLearner::Progress::kDone);
  RabitqFormat* const format = rig.learner->TakeFormat();
  CentroidDrift drift(rig.heap.get());
  // How far the later vectors' mean is, in standard deviations of each coordinate, and the share.
  for (const float shift : {0.0F, 0.5F, 1.0F, 3.0F}) {
    for (const size_t count : {20, 1000}) {
      ASSERT_TRUE(drift.Start(format));
      EXPECT_EQ(drift.SavedShare(), 0);
      TestVectors later = Normal(count, 100, 1, 12);
      for (float& value : later.values) value += shift;
      for (size_t i = 0; i < count; ++i) drift.Add(later[i].data());
      EXPECT_EQ(drift.count(), count);
      const double expected = double{shift} * shift / (1 + double{shift} * shift);
      // Without the correction 20 vectors about the centroid would show 0.05.
      EXPECT_NEAR(drift.SavedShare(), expected, count == 20 ? 0.03 : 0.02) << shift;
    }
  }
  drift.Stop();
  RabitqFormat::Destroy(format, rig.heap.get());
  EXPECT_EQ(rig.heap->live_bytes(), 0U);
}

TEST(CentroidDriftTest, KnowsWhenThereIsNothingToSave) {
  Rig rig(Metric::kL2, Precision::kF32, Normal(1, 10, 1, 13));
  ASSERT_EQ(rig.Learn(), RabitqLearner::Progress::kDone);
  RabitqFormat* const format = rig.learner->TakeFormat();
  CentroidDrift drift(rig.heap.get());
  ASSERT_TRUE(drift.Start(format));
  const Values same(format->centroid(), format->centroid() + 10);
  for (int i = 0; i < 5; ++i) drift.Add(same.data());
  EXPECT_EQ(drift.SavedShare(), 0);
  // All elsewhere, at one place.
  ASSERT_TRUE(drift.Start(format));
  const Values elsewhere(10, 5.0F);
  for (int i = 0; i < 5; ++i) drift.Add(elsewhere.data());
  EXPECT_NEAR(drift.SavedShare(), 1, 1e-9);
  drift.Stop();
  RabitqFormat::Destroy(format, rig.heap.get());
}

}  // namespace
}  // namespace engram
