#include "tools/engramctl/text_encoder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "tests/engramctl/test_files.h"

namespace engram {
namespace {

std::vector<float> Encode(const TextEncoder& encoder, std::string_view text) {
  // Poisoned, so that a value which Encode leaves alone shows.
  std::vector<float> vector(encoder.dimension(), std::numeric_limits<float>::quiet_NaN());
  encoder.Encode(text, vector);
  return vector;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// A model small enough to compute by hand: words "cat" and "dog2", five buckets, three dimensions,
// and four words a text.
struct SmallModel {
  std::string magic = "STBAG001";
  std::array<uint32_t, 4> header = {2, 5, 3, 4};  // words, buckets, dimension, words_per_text_max
  std::vector<float> scales = {0.5f, 2.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
  std::vector<int8_t> codes = {4, 0, 0, 0, 1, 0,                                // words
                               1, 0, 0, 0, 2, 0, 0, 0, 3, -4, 0, 0, 0, -5, 1};  // buckets
  std::string vocabulary = "cat\ndog2\n";

  std::string ModelBytes() const {
    std::string bytes = magic;
    bytes.append(reinterpret_cast<const char*>(header.data()), sizeof(header));
    bytes.append(reinterpret_cast<const char*>(scales.data()), scales.size() * sizeof(float));
    bytes.append(reinterpret_cast<const char*>(codes.data()), codes.size());
    return bytes;
  }
};

class SmallModelTest : public FileTest {
 protected:
  Result<TextEncoder> Load(const SmallModel& model) {
    WriteBytes(dir_ + "/model_i8.bin", model.ModelBytes());
    WriteBytes(dir_ + "/vocab.txt", model.vocabulary);
    return TextEncoder::Load(dir_);
  }

  // Loads, and expects an error of `code` whose message has each of `parts` and a remedy.
  void ExpectError(const SmallModel& model, const std::vector<std::string>& parts,
                   ErrorCode code = ErrorCode::kCorrupt) {
    const auto loaded = Load(model);
    ASSERT_FALSE(loaded.has_value());
    EXPECT_EQ(loaded.error().code, code);
    for (const std::string& part : parts) {
      EXPECT_NE(loaded.error().message.find(part), std::string::npos) << loaded.error().message;
    }
    EXPECT_NE(loaded.error().message.find("make the directory again"), std::string::npos)
        << loaded.error().message;
  }
};

TEST_F(SmallModelTest, AddsWordRowsAndNormalises) {
  const auto encoder = Load({});
  ASSERT_TRUE(encoder) << encoder.error().message;
  EXPECT_EQ(encoder->dimension(), 3u);
  EXPECT_EQ(encoder->word_count(), 2u);
  EXPECT_EQ(encoder->bucket_count(), 5u);
  EXPECT_EQ(encoder->words_per_text_max(), 4u);
  // cat is 0.5 * (4, 0, 0), dog2 is 2 * (0, 1, 0).
  const float half = static_cast<float>(2.0 * (1.0 / std::sqrt(8.0)));
  EXPECT_EQ(Encode(*encoder, "cat dog2"), (std::vector<float>{half, half, 0}));
  EXPECT_EQ(Encode(*encoder, "cat"), (std::vector<float>{1, 0, 0}));
}

TEST_F(SmallModelTest, WordsAreLowerCasedAndSplitAtOtherBytes) {
  const auto encoder = Load({});
  ASSERT_TRUE(encoder) << encoder.error().message;
  const std::vector<std::string> words = {"cat", "dog2", "z", "\xc3\xa9t"};
  EXPECT_EQ(encoder->Words("CAT--Dog2\tZ\n\xc3\xa9T"), words);
  // Neighbours of the letter and digit ranges in ASCII are no word bytes; 0x7f is none, 0x80 is.
  EXPECT_TRUE(encoder->Words("@[`{/:\x7f").empty());
  EXPECT_EQ(encoder->Words("\x80").size(), 1u);
}

TEST_F(SmallModelTest, OnlyTheFirstWordsCount) {
  const auto encoder = Load({});
  ASSERT_TRUE(encoder) << encoder.error().message;
  EXPECT_EQ(encoder->Words("cat cat cat cat dog2").size(), 4u);
  EXPECT_EQ(Encode(*encoder, "cat cat cat cat dog2"), Encode(*encoder, "cat"));
  EXPECT_NE(Encode(*encoder, "cat cat cat dog2"), Encode(*encoder, "cat"));
}

TEST_F(SmallModelTest, LongWordsAreCut) {
  SmallModel model;
  model.vocabulary = "cat\n" + std::string(24, 'k') + "\n";
  const auto encoder = Load(model);
  ASSERT_TRUE(encoder) << encoder.error().message;
  EXPECT_EQ(encoder->Words(std::string(1000, 'k') + " cat"),
            (std::vector<std::string>{std::string(24, 'k'), "cat"}));
  EXPECT_EQ(Encode(*encoder, std::string(1000, 'k')), (std::vector<float>{0, 1, 0}));
}

TEST_F(SmallModelTest, UnknownWordAddsItsTrigrams) {
  const auto encoder = Load({});
  ASSERT_TRUE(encoder) << encoder.error().message;
  // "<zq>" has the trigrams "<zq" and "zq>". Their FNV-1a values, computed by another program, are
  // 0x435f8946 and 0xe1bd5fde: buckets 4 and 1 of 5, rows (0, -5, 1) and (0, 2, 0).
  const double norm = std::sqrt(1.5 * 1.5 + 0.5 * 0.5);
  const std::vector<float> alone = Encode(*encoder, "zq");
  EXPECT_FLOAT_EQ(alone[0], 0.0f);
  EXPECT_FLOAT_EQ(alone[1], static_cast<float>(-1.5 / norm));
  EXPECT_FLOAT_EQ(alone[2], static_cast<float>(0.5 / norm));
  // Beside a known word the trigrams weigh as much as one word: (2, 0, 0) + (0, -3, 1) / 2.
  const double sum_norm = std::sqrt(2.0 * 2.0 + 1.5 * 1.5 + 0.5 * 0.5);
  const std::vector<float> both = Encode(*encoder, "cat zq");
  EXPECT_FLOAT_EQ(both[0], static_cast<float>(2.0 / sum_norm));
  EXPECT_FLOAT_EQ(both[1], static_cast<float>(-1.5 / sum_norm));
  EXPECT_FLOAT_EQ(both[2], static_cast<float>(0.5 / sum_norm));
}

TEST_F(SmallModelTest, TextWithoutWordsIsTheZeroVector) {
  const auto encoder = Load({});
  ASSERT_TRUE(encoder) << encoder.error().message;
  EXPECT_EQ(Encode(*encoder, ""), (std::vector<float>{0, 0, 0}));
  EXPECT_EQ(Encode(*encoder, " -- \t!"), (std::vector<float>{0, 0, 0}));
}

TEST_F(SmallModelTest, VocabularyLinesMayCarryARemarkAndLackTheLastNewline) {
  SmallModel model;
  model.vocabulary = "cat\t17 uses\ndog2";
  const auto encoder = Load(model);
  ASSERT_TRUE(encoder) << encoder.error().message;
  EXPECT_EQ(encoder->FindWord("cat"), 0u);
  EXPECT_EQ(encoder->FindWord("dog2"), 1u);
  EXPECT_EQ(encoder->FindWord("cat\t17 uses"), std::nullopt);
}

TEST_F(SmallModelTest, EveryTruncationIsAnError) {
  const std::string model = SmallModel{}.ModelBytes();
  for (size_t bytes = 0; bytes < model.size(); ++bytes) {
    WriteBytes(dir_ + "/model_i8.bin", std::string_view(model).substr(0, bytes));
    WriteBytes(dir_ + "/vocab.txt", SmallModel{}.vocabulary);
    const auto loaded = TextEncoder::Load(dir_);
    ASSERT_FALSE(loaded.has_value()) << bytes;
    EXPECT_EQ(loaded.error().code, ErrorCode::kCorrupt);
    EXPECT_NE(loaded.error().message.find("model_i8.bin"), std::string::npos);
  }
  const std::string vocabulary = SmallModel{}.vocabulary;
  // Without its last newline it is whole, and "dog" is another word; so cut off lines.
  for (const size_t bytes : {size_t{0}, size_t{2}, size_t{4}}) {
    SmallModel cut;
    cut.vocabulary = vocabulary.substr(0, bytes);
    ExpectError(cut, {"vocab.txt", "but the model has 2"});
  }
}

TEST_F(SmallModelTest, HostileLengthsAreRefusedByName) {
  const std::array<const char*, 4> names = {"words", "buckets", "dimension", "words_per_text_max"};
  for (size_t field = 0; field < names.size(); ++field) {
    for (const uint32_t value : {0u, 0x7fffffffu, 0xffffffffu}) {
      SmallModel model;
      model.header[field] = value;
      ExpectError(model, {"model_i8.bin: " + std::string(names[field]) + " is "});
    }
  }
  // Within every limit, but the file does not hold it: nothing of that size may be allocated.
  SmallModel large;
  large.header = {1u << 22, 1u << 20, 4096, 128};
  ExpectError(large, {"model_i8.bin", "but its header says 21495808024"});
  SmallModel longer;
  longer.codes.push_back(0);
  ExpectError(longer, {"model_i8.bin", "size is", "but its header says"});
}

TEST_F(SmallModelTest, BadContentIsRefusedByName) {
  SmallModel magic;
  magic.magic = "STBAG002";
  ExpectError(magic, {"model_i8.bin: magic"});
  SmallModel scale;
  scale.scales[3] = std::numeric_limits<float>::infinity();
  ExpectError(scale, {"model_i8.bin: scale of row 3"});
  SmallModel nan;
  nan.scales[6] = std::numeric_limits<float>::quiet_NaN();
  ExpectError(nan, {"model_i8.bin: scale of row 6"});

  const std::vector<std::pair<std::string, std::string>> vocabularies = {
      {"cat\ndog2\nowl\n", "line 3 is one more"},
      {"cat\n\n", "line 2: word has 0 bytes"},
      {"cat\n" + std::string(25, 'a') + "\n", "line 2: word has 25 bytes"},
      {"cat\r\ndog2\n", "line 1: word holds a byte"},
      {"cat\nDog2\n", "line 2: word holds a byte"},
      {"cat\ncat\n", "line 2: word stands there a second time"},
  };
  for (const auto& [vocabulary, part] : vocabularies) {
    SmallModel model;
    model.vocabulary = vocabulary;
    ExpectError(model, {"vocab.txt: " + part});
  }
}

TEST_F(SmallModelTest, MissingFilesNameThePath) {
  const auto nothing = TextEncoder::Load(dir_ + "/absent");
  ASSERT_FALSE(nothing.has_value());
  EXPECT_EQ(nothing.error().code, ErrorCode::kNotFound);
  EXPECT_NE(nothing.error().message.find("absent/model_i8.bin"), std::string::npos);

  WriteBytes(dir_ + "/model_i8.bin", SmallModel{}.ModelBytes());
  const auto half = TextEncoder::Load(dir_);
  ASSERT_FALSE(half.has_value());
  EXPECT_EQ(half.error().code, ErrorCode::kNotFound);
  EXPECT_NE(half.error().message.find("vocab.txt"), std::string::npos);

  // A directory where a file should be opens, but cannot be read.
  std::filesystem::create_directory(dir_ + "/vocab.txt");
  EXPECT_FALSE(TextEncoder::Load(dir_).has_value());
}

TEST_F(SmallModelTest, WrongRoomIsOurBug) {
  const auto encoder = Load({});
  ASSERT_TRUE(encoder) << encoder.error().message;
  std::vector<float> room(2);
  EXPECT_DEATH(encoder->Encode("cat", room), "the vector's room is the encoder's dimension");
  EXPECT_DEATH(encoder->RowCodes(7), "row is a word or a bucket");
}

// data/reference_vectors.fvecs holds what the full encoder, another program, gives for the lines of
// data/reference_texts.txt: known and unknown words, several alphabets, no words, too many words.
TEST(ShippedEncoderTest, GivesTheBitsOfTheFullEncoder) {
  const auto encoder = TextEncoder::Load(SampleDataDir() + "/encoder");
  ASSERT_TRUE(encoder) << encoder.error().message;
  EXPECT_EQ(encoder->dimension(), 768u);
  const std::string data = SourceDir() + "/tests/engramctl/data/";
  const auto expected = ReadVecs<float>(data + "reference_vectors.fvecs");
  std::ifstream texts(data + "reference_texts.txt");
  size_t row = 0;
  for (std::string text; std::getline(texts, text); ++row) {
    ASSERT_LT(row, expected.size());
    EXPECT_TRUE(SameBits(Encode(*encoder, text), expected[row])) << row << ": " << text;
  }
  EXPECT_EQ(row, 11u);
  EXPECT_EQ(row, expected.size());
}

TEST(ShippedEncoderTest, UnknownWordsStillGiveAUnitVector) {
  const auto encoder = TextEncoder::Load(SampleDataDir() + "/encoder");
  ASSERT_TRUE(encoder) << encoder.error().message;
  for (const char* text : {"zzyzxwv", "netwrok sniffing toolz", "\xff\xfe\x80", "stipendiary"}) {
    double squares = 0;
    for (const float value : Encode(*encoder, text)) squares += double{value} * value;
    EXPECT_NEAR(squares, 1.0, 1e-6) << text;
  }
}

}  // namespace
}  // namespace engram
