#include "src/core/vector_dtype.h"

#include <gtest/gtest.h>
#include <hwy/highway.h>
#include <hwy/targets.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace engram {
namespace {

constexpr VectorDtype kDtypes[] = {VectorDtype::kF32, VectorDtype::kF16, VectorDtype::kBf16,
                                   VectorDtype::kInt8};

std::vector<uint32_t> Dimensions() {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  // Past two whole vectors of the widest instruction set; the rest says nothing new about bounds.
  std::vector<uint32_t> dimensions{100, 127, 129};
  for (uint32_t dimension = 1; dimension <= 70; ++dimension) dimensions.push_back(dimension);
#else
  std::vector<uint32_t> dimensions{768, kMaxDimension};
  for (uint32_t dimension = 1; dimension <= 200; ++dimension) dimensions.push_back(dimension);
#endif
  return dimensions;
}

// One instruction set after the other, of those that the machine has and the kernels are built for.
class VectorDtypeTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    hwy::SetSupportedTargetsForTest(GetParam());
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};
INSTANTIATE_TEST_SUITE_P(Targets, VectorDtypeTest,
                         testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         [](const testing::TestParamInfo<int64_t>& target) {
                           return std::string(hwy::TargetName(target.param));
                         });

// The value of one number by the definition of its format, bit by bit.
float ValueOf(VectorDtype dtype, const std::byte* at, float scale) {
  switch (dtype) {
    case VectorDtype::kF32: {
      float value;
      std::memcpy(&value, at, 4);
      return value;
    }
    case VectorDtype::kBf16: {
      uint16_t bits;
      std::memcpy(&bits, at, 2);
      return std::bit_cast<float>(uint32_t{bits} << 16);
    }
    case VectorDtype::kF16: {
      uint16_t bits;
      std::memcpy(&bits, at, 2);
      const int exponent = (bits >> 10) & 31;
      const int mantissa = bits & 1023;
      float value = 0;
      if (exponent == 31) {
        value = mantissa == 0 ? std::numeric_limits<float>::infinity()
                              : std::numeric_limits<float>::quiet_NaN();
      } else if (exponent == 0) {
        value = std::ldexp(static_cast<float>(mantissa), -24);
      } else {
        value = std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
      }
      return (bits & 0x8000) != 0 ? -value : value;
    }
    case VectorDtype::kInt8:
      return static_cast<float>(static_cast<int8_t>(*at)) * scale;
    case VectorDtype::kNone:
      break;
  }
  return 0;
}

VectorFinding FindingOf(VectorDtype dtype, uint32_t dimension, const std::byte* from) {
  bool zero = true;
  for (uint32_t i = 0; i < dimension; ++i) {
    const float value = ValueOf(dtype, from + i * ElementBytes(dtype), 1);
    if (!std::isfinite(value)) return VectorFinding::kNotFinite;
    zero = zero && value == 0;
  }
  return zero ? VectorFinding::kZero : VectorFinding::kOrdinary;
}

// `bytes` bytes at `misalignment` from a cache line, ending exactly where the allocation ends, so
// that AddressSanitizer sees a read or write past either end.
class Buffer {
 public:
  Buffer(size_t bytes, size_t misalignment) : misalignment_(misalignment) {
    size_ = misalignment + bytes;
    memory_ = static_cast<std::byte*>(::operator new(size_, std::align_val_t{64}));
    std::memset(memory_, 0xEE, size_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(memory_, std::align_val_t{64}); }
  std::byte* data() { return memory_ + misalignment_; }
  bool FrontIntact() const {
    return std::all_of(memory_, memory_ + misalignment_,
                       [](std::byte b) { return b == std::byte{0xEE}; });
  }

 private:
  size_t misalignment_;
  size_t size_;
  std::byte* memory_;
};

void FillRandomly(std::mt19937_64& random, VectorDtype dtype, uint32_t dimension, std::byte* to) {
  for (uint32_t i = 0; i < dimension; ++i) {
    const size_t bytes = ElementBytes(dtype);
    do {
      const uint64_t bits = random();
      std::memcpy(to + i * bytes, &bits, bytes);
    } while (!std::isfinite(ValueOf(dtype, to + i * bytes, 1)));
  }
}

TEST_P(VectorDtypeTest, CopiesAndDecodesAtEveryDimensionAndMisalignment) {
  std::mt19937_64 random(1);
  for (const VectorDtype dtype : kDtypes) {
    for (const uint32_t dimension : Dimensions()) {
      const size_t bytes = VectorBytes(dtype, dimension);
      std::vector<std::byte> vector(bytes);
      FillRandomly(random, dtype, dimension, vector.data());
      std::vector<float> want(dimension);
      for (uint32_t i = 0; i < dimension; ++i) {
        want[i] = ValueOf(dtype, vector.data() + i * ElementBytes(dtype), 0.125f);
      }
      const VectorFinding finding = FindingOf(dtype, dimension, vector.data());
      for (size_t misalignment = 0; misalignment < 64; ++misalignment) {
        Buffer from(bytes, misalignment);
        Buffer copy(bytes, (misalignment * 7 + dimension) % 64);
        Buffer decoded(dimension * sizeof(float), misalignment / 4 * 4);
        std::memcpy(from.data(), vector.data(), bytes);
        ASSERT_EQ(CopyVector(dtype, dimension, from.data(), copy.data()), finding);
        ASSERT_EQ(std::memcmp(vector.data(), copy.data(), bytes), 0);
        ASSERT_TRUE(copy.FrontIntact());
        DecodeVector(dtype, dimension, 0.125f, copy.data(),
                     reinterpret_cast<float*>(decoded.data()));
        ASSERT_TRUE(decoded.FrontIntact());
        // Bytes, so that -0.0 stays -0.0 and denormals stay.
        ASSERT_EQ(std::memcmp(decoded.data(), want.data(), dimension * sizeof(float)), 0)
            << DtypeName(dtype) << " dimension " << dimension;
      }
    }
  }
}

// Each finding from a single number, which may sit in any lane or in the rest.
struct Special {
  uint32_t bits;
  VectorFinding finding;
};
std::vector<Special> SpecialsOf(VectorDtype dtype) {
  using enum VectorFinding;
  switch (dtype) {
    case VectorDtype::kF32:
      return {{0x7F800000, kNotFinite}, {0xFF800000, kNotFinite}, {0x7FC00000, kNotFinite},
              {0xFFC00000, kNotFinite}, {0x7F800001, kNotFinite}, {0x7F7FFFFF, kOrdinary},
              {0xFF7FFFFF, kOrdinary},  {0x00000001, kOrdinary},  {0x80000001, kOrdinary},
              {0x007FFFFF, kOrdinary},  {0x80000000, kZero},      {0, kZero}};
    case VectorDtype::kF16:
      return {{0x7C00, kNotFinite}, {0xFC00, kNotFinite}, {0x7E00, kNotFinite},
              {0xFE00, kNotFinite}, {0x7C01, kNotFinite}, {0x7BFF, kOrdinary},
              {0xFBFF, kOrdinary},  {0x0001, kOrdinary},  {0x8001, kOrdinary},
              {0x03FF, kOrdinary},  {0x8000, kZero},      {0, kZero}};
    case VectorDtype::kBf16:
      return {{0x7F80, kNotFinite}, {0xFF80, kNotFinite}, {0x7FC0, kNotFinite},
              {0xFFC0, kNotFinite}, {0x7F81, kNotFinite}, {0x7F7F, kOrdinary},
              {0xFF7F, kOrdinary},  {0x0001, kOrdinary},  {0x8001, kOrdinary},
              {0x007F, kOrdinary},  {0x8000, kZero},      {0, kZero}};
    case VectorDtype::kInt8:
      return {{0x80, kOrdinary}, {0x01, kOrdinary}, {0xFF, kOrdinary}, {0, kZero}};
    case VectorDtype::kNone:
      break;
  }
  return {};
}

TEST_P(VectorDtypeTest, FindsEachSpecialAtEachPosition) {
  std::mt19937_64 random(2);
  for (const VectorDtype dtype : kDtypes) {
    const size_t element = ElementBytes(dtype);
    for (const uint32_t dimension : Dimensions()) {
      std::vector<std::byte> from(VectorBytes(dtype, dimension));
      std::vector<std::byte> copy(from.size());
      std::vector<uint32_t> positions;
      for (uint32_t i = 0; i < dimension; ++i) {
        // All of a short vector; of a long one both ends and some between.
        if (dimension <= 200 || i < 66 || i + 66 >= dimension || random() % 64 == 0) {
          positions.push_back(i);
        }
      }
      for (const uint32_t position : positions) {
        for (const Special& special : SpecialsOf(dtype)) {
          std::memcpy(from.data() + position * element, &special.bits, element);
          ASSERT_EQ(CopyVector(dtype, dimension, from.data(), copy.data()), special.finding)
              << DtypeName(dtype) << " dimension " << dimension << " position " << position
              << " bits " << std::hex << special.bits;
          ASSERT_EQ(std::memcmp(copy.data(), from.data(), from.size()), 0);
        }
        std::memset(from.data() + position * element, 0, element);
      }
    }
  }
}

// One NaN among ordinary numbers, and one ordinary number among minus zeros.
TEST_P(VectorDtypeTest, ASpecialIsNotHiddenByItsNeighbours) {
  std::mt19937_64 random(3);
  for (const VectorDtype dtype : {VectorDtype::kF32, VectorDtype::kF16, VectorDtype::kBf16}) {
    const size_t element = ElementBytes(dtype);
    const uint32_t minus_zero = dtype == VectorDtype::kF32 ? 0x80000000 : 0x8000;
    const std::vector<Special> specials = SpecialsOf(dtype);
    for (const uint32_t dimension : {1u, 7u, 16u, 33u, 200u, 768u}) {
      std::vector<std::byte> from(VectorBytes(dtype, dimension));
      std::vector<std::byte> copy(from.size());
      for (uint32_t position = 0; position < dimension; ++position) {
        FillRandomly(random, dtype, dimension, from.data());
        std::memcpy(from.data() + position * element, &specials[position % 5].bits, element);
        ASSERT_EQ(CopyVector(dtype, dimension, from.data(), copy.data()),
                  VectorFinding::kNotFinite);
        for (uint32_t i = 0; i < dimension; ++i) {
          std::memcpy(from.data() + i * element, &minus_zero, element);
        }
        ASSERT_EQ(CopyVector(dtype, dimension, from.data(), copy.data()), VectorFinding::kZero);
        std::memcpy(from.data() + position * element, &specials[7].bits, element);
        ASSERT_EQ(CopyVector(dtype, dimension, from.data(), copy.data()), VectorFinding::kOrdinary);
      }
    }
  }
}

// Every f16, bf16 and int8 that there is.
TEST_P(VectorDtypeTest, DecodesEveryNumber) {
  for (const VectorDtype dtype : {VectorDtype::kF16, VectorDtype::kBf16, VectorDtype::kInt8}) {
    const size_t element = ElementBytes(dtype);
    std::vector<std::byte> from;
    for (uint32_t bits = 0; bits < 1u << (8 * element); ++bits) {
      std::byte number[4];
      std::memcpy(number, &bits, 4);
      // f16 that is not finite: outside DecodeVector's contract.
      if (dtype == VectorDtype::kF16 && !std::isfinite(ValueOf(dtype, number, 1))) continue;
      from.insert(from.end(), number, number + element);
    }
    const size_t count = from.size() / element;
    std::vector<float> decoded(count);
    DecodeVector(dtype, static_cast<uint32_t>(count), 0.25f, from.data(), decoded.data());
    for (size_t i = 0; i < count; ++i) {
      const float want = ValueOf(dtype, from.data() + i * element, 0.25f);
      ASSERT_EQ(std::bit_cast<uint32_t>(decoded[i]), std::bit_cast<uint32_t>(want))
          << DtypeName(dtype) << " " << i;
    }
  }
}

TEST(VectorDtypeBasicsTest, SizesAndNames) {
  EXPECT_EQ(VectorBytes(VectorDtype::kF32, 768), 3'072u);
  EXPECT_EQ(VectorBytes(VectorDtype::kF16, 768), 1'536u);
  EXPECT_EQ(VectorBytes(VectorDtype::kBf16, 768), 1'536u);
  EXPECT_EQ(VectorBytes(VectorDtype::kInt8, 768), 768u);
  EXPECT_EQ(VectorBytes(VectorDtype::kNone, 768), 0u);
  EXPECT_EQ(VectorBytes(static_cast<VectorDtype>(99), 768), 0u);
  EXPECT_EQ(DtypeName(VectorDtype::kF32), "f32");
  EXPECT_EQ(DtypeName(VectorDtype::kF16), "f16");
  EXPECT_EQ(DtypeName(VectorDtype::kBf16), "bf16");
  EXPECT_EQ(DtypeName(VectorDtype::kInt8), "int8");
  EXPECT_EQ(DtypeName(static_cast<VectorDtype>(99)), "none");
}

TEST(VectorDtypeBasicsTest, NoVectorIsZeroAndTouchesNothing) {
  EXPECT_EQ(CopyVector(VectorDtype::kNone, 5, nullptr, nullptr), VectorFinding::kZero);
  DecodeVector(VectorDtype::kNone, 5, 1, nullptr, nullptr);
}

}  // namespace
}  // namespace engram
