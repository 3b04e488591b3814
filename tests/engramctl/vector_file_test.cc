#include "tools/engramctl/vector_file.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "src/core/vector_dtype.h"
#include "tests/engramctl/test_files.h"
#include "tools/clients/cpp/vector_encoding.h"

namespace engram {
namespace {

class VectorFileTest : public FileTest {
 protected:
  std::string PathOf(const std::string& name) const { return dir_ + '/' + name; }
  std::string Write(const std::string& name, const std::string& bytes) {
    WriteBytes(PathOf(name), bytes);
    return PathOf(name);
  }
  static std::string ErrorOf(const Result<VectorFile>& file) {
    return file ? std::string("no error") : file.error().message;
  }
  static std::vector<float> RowOf(const VectorFile& file, uint64_t row) {
    std::vector<float> numbers(file.dimension());
    file.ReadRow(row, numbers);
    return numbers;
  }
};

template <typename T>
std::string BytesOfNumbers(const std::vector<T>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(T)};
}

// A row of .fvecs, .bvecs or .ivecs.
template <typename T>
std::string VecsRow(int32_t claimed, const std::vector<T>& numbers) {
  return BytesOfNumbers<int32_t>({claimed}) + BytesOfNumbers(numbers);
}

std::string Npy(int major, const std::string& header, const std::string& data) {
  std::string bytes = "\x93NUMPY";
  bytes += static_cast<char>(major);
  bytes += '\0';
  if (major == 1) {
    bytes += BytesOfNumbers<uint16_t>({static_cast<uint16_t>(header.size())});
  } else {
    bytes += BytesOfNumbers<uint32_t>({static_cast<uint32_t>(header.size())});
  }
  return bytes + header + data;
}

std::string NpyHeaderOf(const std::string& descr, const std::string& shape) {
  return "{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }   \n";
}

TEST_F(VectorFileTest, FvecsRoundTrip) {
  const std::string path = Write("a.fvecs", "");
  auto writer = FvecsWriter::Create(path);
  ASSERT_TRUE(writer.has_value());
  const std::vector<std::vector<float>> rows = {{1, 2, 3}, {-4, 0.5f, 6e30f}};
  for (const auto& row : rows) ASSERT_TRUE(writer->Append(row).has_value());
  ASSERT_TRUE(writer->Finish().has_value());

  const auto file = VectorFile::Open(path);
  ASSERT_TRUE(file.has_value()) << ErrorOf(file);
  EXPECT_EQ(file->rows(), 2u);
  EXPECT_EQ(file->dimension(), 3u);
  EXPECT_EQ(file->type(), ElementType::kF32);
  EXPECT_EQ(RowOf(*file, 0), rows[0]);
  EXPECT_EQ(RowOf(*file, 1), rows[1]);
}

TEST_F(VectorFileTest, WritingToAFullDiskIsReported) {
  auto writer = FvecsWriter::Create("/dev/full");
  if (!writer) GTEST_SKIP() << "this machine has no /dev/full";
  ASSERT_TRUE(writer->Append(std::vector<float>{1}).has_value());
  EXPECT_EQ(writer->Finish().error().code, ErrorCode::kResourceExhausted);
}

TEST_F(VectorFileTest, BvecsAndIvecs) {
  // Rows of 5 bytes: those after the first are not aligned.
  const auto bytes =
      VectorFile::Open(Write("a.bvecs", VecsRow<uint8_t>(1, {200}) + VecsRow<uint8_t>(1, {255})));
  ASSERT_TRUE(bytes.has_value()) << ErrorOf(bytes);
  EXPECT_EQ(RowOf(*bytes, 1), std::vector<float>{255});
  const auto integers = VectorFile::Open(Write("a.ivecs", VecsRow<int32_t>(2, {7, -1})));
  ASSERT_TRUE(integers.has_value()) << ErrorOf(integers);
  EXPECT_EQ(integers->IntegerAt(0, 0), 7);
  EXPECT_EQ(integers->IntegerAt(0, 1), -1);
}

TEST_F(VectorFileTest, OnlyTheFirstRowsWhereAsked) {
  const std::string whole = VecsRow<float>(1, {1}) + VecsRow<float>(1, {2});
  const auto file = VectorFile::Open(Write("a.fvecs", whole + VecsRow<float>(9, {3})), 2);
  ASSERT_TRUE(file.has_value()) << ErrorOf(file);  // the bad third row is not looked at
  EXPECT_EQ(file->rows(), 2u);
}

TEST_F(VectorFileTest, TruncatedAndMixedVecsAreCaughtAtEveryByte) {
  const std::string whole = VecsRow<float>(2, {1, 2}) + VecsRow<float>(2, {3, 4});
  for (size_t size = 0; size < whole.size(); ++size) {
    if (size == whole.size() / 2) continue;  // one whole row
    const auto file = VectorFile::Open(Write("cut.fvecs", whole.substr(0, size)));
    ASSERT_FALSE(file.has_value()) << size;
    EXPECT_EQ(file.error().code, ErrorCode::kCorrupt) << size;
  }
  const auto mixed = VectorFile::Open(Write(
      "mixed.fvecs", VecsRow<float>(2, {1, 2}) + VecsRow<float>(1, {3}) + std::string(4, 'x')));
  EXPECT_NE(ErrorOf(mixed).find("row 1 claims 1 numbers, row 0 has 2"), std::string::npos)
      << ErrorOf(mixed);
  for (const int32_t claimed : {0, -1, INT32_MIN, INT32_MAX, 70'000}) {
    const auto hostile = VectorFile::Open(Write("bad.fvecs", VecsRow<float>(claimed, {1, 2})));
    EXPECT_NE(ErrorOf(hostile).find("first row claims"), std::string::npos) << claimed;
  }
}

TEST_F(VectorFileTest, MissingUnknownAndUnusualFiles) {
  EXPECT_EQ(VectorFile::Open(PathOf("absent.fvecs")).error().code, ErrorCode::kNotFound);
  EXPECT_EQ(VectorFile::Open(Write("a.csv", "1,2")).error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(std::filesystem::create_directory(PathOf("directory.fvecs")));
  EXPECT_EQ(VectorFile::Open(PathOf("directory.fvecs")).error().code, ErrorCode::kCorrupt);
}

TEST_F(VectorFileTest, NpyOfEveryVersionAndType) {
  for (const int major : {1, 2, 3}) {
    const auto file = VectorFile::Open(Write(
        "a.npy", Npy(major, NpyHeaderOf("<f4", "(2, 2)"), BytesOfNumbers<float>({1, 2, 3, 4}))));
    ASSERT_TRUE(file.has_value()) << major << ErrorOf(file);
    EXPECT_EQ(RowOf(*file, 1), (std::vector<float>{3, 4}));
  }
  // 1.0 and -2.0 as binary16.
  const auto half = VectorFile::Open(Write(
      "h.npy", Npy(1, NpyHeaderOf("<f2", "(1, 2)"), BytesOfNumbers<uint16_t>({0x3C00, 0xC000}))));
  ASSERT_TRUE(half.has_value()) << ErrorOf(half);
  EXPECT_EQ(RowOf(*half, 0), (std::vector<float>{1, -2}));
  const auto unsigned_bytes =
      VectorFile::Open(Write("u.npy", Npy(1, NpyHeaderOf("|u1", "(1, 2)"), "\xff\x01")));
  ASSERT_TRUE(unsigned_bytes.has_value()) << ErrorOf(unsigned_bytes);
  EXPECT_EQ(RowOf(*unsigned_bytes, 0), (std::vector<float>{255, 1}));
  const auto signed_bytes =
      VectorFile::Open(Write("i.npy", Npy(1, NpyHeaderOf("|i1", "(1, 2)"), "\xff\x01")));
  ASSERT_TRUE(signed_bytes.has_value()) << ErrorOf(signed_bytes);
  EXPECT_EQ(RowOf(*signed_bytes, 0), (std::vector<float>{-1, 1}));
  const auto integers = VectorFile::Open(
      Write("t.npy", Npy(1, NpyHeaderOf("<i4", "(1,1)"), BytesOfNumbers<int32_t>({-9}))));
  ASSERT_TRUE(integers.has_value()) << ErrorOf(integers);
  EXPECT_EQ(integers->IntegerAt(0, 0), -9);
}

TEST_F(VectorFileTest, HostileNpyHeadersAreCaught) {
  const std::string data = BytesOfNumbers<float>({1, 2, 3, 4});
  const std::string whole = Npy(1, NpyHeaderOf("<f4", "(2, 2)"), data);
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_FALSE(VectorFile::Open(Write("cut.npy", whole.substr(0, size))).has_value()) << size;
  }
  EXPECT_FALSE(VectorFile::Open(Write("long.npy", whole + "x")).has_value());
  EXPECT_FALSE(VectorFile::Open(Write("v0.npy", Npy(0, NpyHeaderOf("<f4", "(2, 2)"), data))));
  EXPECT_FALSE(VectorFile::Open(Write("v4.npy", Npy(4, NpyHeaderOf("<f4", "(2, 2)"), data))));
  for (const char* shape :
       {"(4,)", "(4)", "()", "(2, 2, 1)", "(0, 2)", "(2, 0)", "(-2, -2)", "(2, 3)", "(1, 2)",
        "(4611686018427387905, 4)", "(18446744073709551616, 2)", "(2, 18446744073709551615)",
        "(2 2)", "[2, 2]", "(2, 2", "(2, 2.0)"}) {
    EXPECT_FALSE(
        VectorFile::Open(Write("shape.npy", Npy(1, NpyHeaderOf("<f4", shape), data))).has_value())
        << shape;
  }
  for (const char* descr : {">f4", "<f8", "<i8", "|O", "", "|V16"}) {
    EXPECT_FALSE(VectorFile::Open(Write("descr.npy", Npy(1, NpyHeaderOf(descr, "(2, 2)"), data)))
                     .has_value())
        << descr;
  }
  for (const char* header :
       {"", "{", "{}", "{'descr'", "{'descr': '<f4', 'shape': (2, 2)}",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }",
        "{'descr': '<f4', 'fortran_order': Maybe, 'shape': (2, 2), }",
        "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), 'x': 1}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), } {"}) {
    EXPECT_FALSE(VectorFile::Open(Write("header.npy", Npy(1, header, data))).has_value()) << header;
  }
  // A header whose length is 4 GiB.
  std::string claims = Npy(2, NpyHeaderOf("<f4", "(2, 2)"), data);
  std::memset(claims.data() + 8, 0xff, 4);
  EXPECT_NE(ErrorOf(VectorFile::Open(Write("huge.npy", claims))).find("claims a header"),
            std::string::npos);
}

// Decoding by the daemon's own code is the oracle of what the client encodes.
TEST(VectorEncodingTest, HalfIsTheNearestAndEveryHalfComesBack) {
  for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    float value = 0;
    DecodeVector(VectorDtype::kF16, 1, 1, reinterpret_cast<const std::byte*>(&half), &value);
    if (std::isnan(value)) {
      EXPECT_EQ(HalfOfFloat(value) & 0x7C00, 0x7C00);
      EXPECT_NE(HalfOfFloat(value) & 0x03FF, 0);
      continue;
    }
    ASSERT_EQ(HalfOfFloat(value), half);
    if ((half & 0x7FFF) >= 0x7BFF) continue;  // the largest has no finite neighbour
    // Exactly halfway to the next one, the even one is taken; a bit further, the next.
    const auto next_half = static_cast<uint16_t>(half + 1);
    float next = 0;
    DecodeVector(VectorDtype::kF16, 1, 1, reinterpret_cast<const std::byte*>(&next_half), &next);
    const float middle = value + (next - value) / 2;
    ASSERT_EQ(HalfOfFloat(middle), (half & 1) == 0 ? half : next_half) << bits;
    ASSERT_EQ(HalfOfFloat(std::nextafter(middle, next)), next_half) << bits;
    ASSERT_EQ(HalfOfFloat(std::nextafter(middle, value)), half) << bits;
  }
  EXPECT_EQ(HalfOfFloat(65'519.996f), 0x7BFF);
  EXPECT_EQ(HalfOfFloat(65'520.0f), 0x7C00);
  EXPECT_EQ(HalfOfFloat(-1e30f), 0xFC00);
}

TEST(VectorEncodingTest, Bfloat16RoundsToNearestEven) {
  EXPECT_EQ(Bfloat16OfFloat(1.0f), 0x3F80);
  EXPECT_EQ(Bfloat16OfFloat(std::bit_cast<float>(0x3F808000u)), 0x3F80);
  EXPECT_EQ(Bfloat16OfFloat(std::bit_cast<float>(0x3F808001u)), 0x3F81);
  EXPECT_EQ(Bfloat16OfFloat(std::bit_cast<float>(0x3F818000u)), 0x3F82);
  // A NaN whose upper half alone would be an infinity.
  EXPECT_EQ(Bfloat16OfFloat(std::bit_cast<float>(0x7F800001u)), 0x7FC0);
}

TEST(VectorEncodingTest, Int8KeepsTheLargestAndScales) {
  std::vector<std::byte> encoded;
  const std::vector<float> row = {0.5f, -1.0f, 0.0f, 0.25f};
  const float scale = EncodeVector(VectorDtype::kInt8, row, encoded);
  EXPECT_FLOAT_EQ(scale, 1.0f / 127);
  std::vector<float> decoded(row.size());
  DecodeVector(VectorDtype::kInt8, 4, scale, encoded.data(), decoded.data());
  EXPECT_FLOAT_EQ(decoded[1], -1.0f);
  for (size_t i = 0; i < row.size(); ++i) EXPECT_NEAR(decoded[i], row[i], scale / 2) << i;
}

TEST(VectorEncodingTest, Int8OfZeroAndOfWhatIsNotFinite) {
  std::vector<std::byte> encoded;
  EXPECT_EQ(EncodeVector(VectorDtype::kInt8, std::vector<float>{0, 0}, encoded), 1.0f);
  EXPECT_EQ(encoded, (std::vector<std::byte>{std::byte{0}, std::byte{0}}));
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    EXPECT_TRUE(std::isnan(EncodeVector(VectorDtype::kInt8, std::vector<float>{1, bad}, encoded)));
  }
}

}  // namespace
}  // namespace engram
