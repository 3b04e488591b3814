// tools/sample-data must hang together: texts, encoder, queries and ground truth. A part that was
// made again without the others would show as poor recall only, and be sought in the index.
#include <gtest/gtest.h>
#include <zlib.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/engramctl/test_files.h"
#include "tools/engramctl/text_encoder.h"
#include "tools/engramctl/text_file.h"

namespace engram {
namespace {

using Vectors = std::vector<std::vector<float>>;

class SampleDataTest : public testing::Test {
 protected:
  // Encoding all texts takes a second, so the tests share it.
  static void SetUpTestSuite() {
    auto encoder = TextEncoder::Load(SampleDataDir() + "/encoder");
    ASSERT_TRUE(encoder) << encoder.error().message;
    encoder_ = new TextEncoder(std::move(*encoder));
    texts_ = new std::vector<TextRow>(Texts("texts"));
    base_ = new Vectors(EncodeAll(*texts_));
  }
  static void TearDownTestSuite() {
    delete base_;
    delete texts_;
    delete encoder_;
    base_ = nullptr;
    texts_ = nullptr;
    encoder_ = nullptr;
  }
  void SetUp() override { ASSERT_NE(base_, nullptr); }

  static std::vector<TextRow> Texts(const std::string& name) {
    auto rows = ReadTexts(SampleDataDir() + "/" + name + ".tsv.gz");
    if (!rows) {
      ADD_FAILURE() << rows.error().message;
      return {};
    }
    return std::move(*rows);
  }

  static Vectors EncodeAll(const std::vector<TextRow>& rows) {
    Vectors vectors(rows.size(), std::vector<float>(encoder_->dimension()));
    for (size_t i = 0; i < rows.size(); ++i) encoder_->Encode(rows[i].text, vectors[i]);
    return vectors;
  }

  static inline TextEncoder* encoder_ = nullptr;
  static inline std::vector<TextRow>* texts_ = nullptr;
  static inline Vectors* base_ = nullptr;
};

uint32_t FvecsCrc(const Vectors& vectors) {
  uLong crc = crc32(0, nullptr, 0);
  for (const std::vector<float>& vector : vectors) {
    const int32_t length = static_cast<int32_t>(vector.size());
    crc = crc32(crc, reinterpret_cast<const Bytef*>(&length), sizeof(length));
    crc = crc32(crc, reinterpret_cast<const Bytef*>(vector.data()),
                static_cast<uInt>(vector.size() * sizeof(float)));
  }
  return static_cast<uint32_t>(crc);
}

// The ids of the `k` nearest by exact inner product, ties by lower id.
std::vector<int32_t> Nearest(const Vectors& base, const std::vector<float>& query, size_t k) {
  std::vector<std::pair<double, int32_t>> scored;
  for (size_t id = 0; id < base.size(); ++id) {
    double product = 0;
    for (size_t i = 0; i < query.size(); ++i) product += double{base[id][i]} * query[i];
    scored.emplace_back(-product, static_cast<int32_t>(id));
  }
  std::partial_sort(scored.begin(), scored.begin() + static_cast<ptrdiff_t>(k), scored.end());
  std::vector<int32_t> ids;
  for (size_t i = 0; i < k; ++i) ids.push_back(scored[i].second);
  return ids;
}

TEST_F(SampleDataTest, HoldsWhatItPromises) {
  EXPECT_GE(texts_->size(), 20'000u);
  std::map<std::string, size_t> sources;
  for (size_t i = 0; i < texts_->size(); ++i) {
    ASSERT_EQ((*texts_)[i].id, i);
    ++sources[(*texts_)[i].source];
  }
  EXPECT_GT(sources["debian"], texts_->size() / 2);
  EXPECT_GT(sources["wordnet"], 0u);
  EXPECT_GT(sources["kjv"], 0u);

  uintmax_t bytes = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(SampleDataDir())) {
    if (entry.is_regular_file()) bytes += entry.file_size();
  }
  EXPECT_LE(bytes, 20u << 20);
}

// checksums.tsv was made from vectors that equal those of the full encoder bit by bit.
TEST_F(SampleDataTest, VectorsHaveTheBitsOfTheFullEncoder) {
  std::map<std::string, std::string> found;
  for (const char* name : {"base", "query_docs", "query_short"}) {
    const bool is_base = std::strcmp(name, "base") == 0;
    char hex[16];
    std::snprintf(hex, sizeof(hex), "%08x", FvecsCrc(is_base ? *base_ : EncodeAll(Texts(name))));
    found[std::string(name) + ".fvecs"] = hex;
  }
  std::map<std::string, std::string> expected;
  std::ifstream sums(SampleDataDir() + "/checksums.tsv");
  for (std::string name, sum; sums >> name >> sum;) expected[name] = sum;
  EXPECT_EQ(found, expected);
}

TEST_F(SampleDataTest, GroundTruthIsExact) {
  for (const std::string name : {"query_docs", "query_short"}) {
    const auto truth = ReadVecs<int32_t>(SampleDataDir() + "/gt100_ip_" + name + ".ivecs");
    const Vectors queries = EncodeAll(Texts(name));
    ASSERT_EQ(truth.size(), queries.size());
    ASSERT_GE(queries.size(), 500u);
    for (size_t i = 0; i < truth.size(); ++i) {
      ASSERT_EQ(truth[i].size(), 100u);
      ASSERT_EQ(std::set<int32_t>(truth[i].begin(), truth[i].end()).size(), 100u);
    }
    // All of them take minutes under a sanitizer; a file that is out of step is wrong everywhere.
    for (size_t i = 0; i < truth.size(); i += 61) {
      EXPECT_EQ(Nearest(*base_, queries[i], 100), truth[i]) << name << " " << i;
    }
  }
}

TEST_F(SampleDataTest, ShortPhrasesKnowTheirRightPackage) {
  const std::vector<TextRow> queries = Texts("query_short");
  const auto right = ReadVecs<int32_t>(SampleDataDir() + "/right_query_short.ivecs");
  const auto truth = ReadVecs<int32_t>(SampleDataDir() + "/gt100_ip_query_short.ivecs");
  ASSERT_EQ(right.size(), queries.size());
  ASSERT_EQ(truth.size(), queries.size());
  size_t found_at_10 = 0;
  for (size_t i = 0; i < queries.size(); ++i) {
    ASSERT_EQ(right[i].size(), 1u);
    EXPECT_EQ((*texts_)[static_cast<size_t>(right[i][0])].key, queries[i].key);
    const auto end = truth[i].begin() + 10;
    found_at_10 += std::find(truth[i].begin(), end, right[i][0]) != end;
  }
  // 549 of 556 when it was made.
  EXPECT_GE(found_at_10 * 100, queries.size() * 98);
}

TEST_F(SampleDataTest, NetworkPacketSnifferFindsSniffit) {
  std::vector<float> query(encoder_->dimension());
  encoder_->Encode("network packet sniffer", query);
  const std::vector<int32_t> nearest = Nearest(*base_, query, 10);
  EXPECT_EQ((*texts_)[static_cast<size_t>(nearest[0])].key, "sniffit");
  for (const int32_t id : nearest) {
    const std::string& text = (*texts_)[static_cast<size_t>(id)].text;
    EXPECT_NE(text.find("etwork"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace engram
