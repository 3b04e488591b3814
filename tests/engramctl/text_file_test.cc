#include "tools/engramctl/text_file.h"

#include <gtest/gtest.h>
#include <zlib.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tests/engramctl/test_files.h"

namespace engram {
namespace {

std::string Gzip(const std::string& path, std::string_view bytes) {
  const gzFile file = gzopen(path.c_str(), "wb");
  EXPECT_NE(file, nullptr);
  EXPECT_EQ(gzwrite(file, bytes.data(), static_cast<unsigned>(bytes.size())),
            static_cast<int>(bytes.size()));
  EXPECT_EQ(gzclose(file), Z_OK);
  return ReadBytes(path);
}

class TextFileTest : public FileTest {
 protected:
  // Writes `bytes` as a file called `name` and reads it as texts.
  Result<std::vector<TextRow>> Read(const std::string& name, std::string_view bytes) {
    WriteBytes(dir_ + "/" + name, bytes);
    return ReadTexts(dir_ + "/" + name);
  }

  void ExpectCorrupt(const std::string& name, std::string_view bytes, const std::string& part) {
    const auto rows = Read(name, bytes);
    ASSERT_FALSE(rows.has_value()) << part;
    EXPECT_EQ(rows.error().code, ErrorCode::kCorrupt);
    EXPECT_NE(rows.error().message.find(name + ": " + part), std::string::npos)
        << rows.error().message;
  }
};

TEST_F(TextFileTest, ReadsFiveColumns) {
  const auto rows = Read("a.tsv",
                         "7\tdebian\tnet\tsniffit\tpacket sniffer\n"
                         "18446744073709551615\tkjv\tRuth\tRuth 1:1\tNow it came to pass");
  ASSERT_TRUE(rows) << rows.error().message;
  ASSERT_EQ(rows->size(), 2u);
  EXPECT_EQ((*rows)[0].id, 7u);
  EXPECT_EQ((*rows)[0].source, "debian");
  EXPECT_EQ((*rows)[0].category, "net");
  EXPECT_EQ((*rows)[0].key, "sniffit");
  EXPECT_EQ((*rows)[0].text, "packet sniffer");
  EXPECT_EQ((*rows)[1].id, 18446744073709551615u);
  EXPECT_EQ((*rows)[1].text, "Now it came to pass");
}

TEST_F(TextFileTest, OtherNamesHaveOneTextALine) {
  const auto rows = Read("a.txt", "first\n\nwith\ttab\n");
  ASSERT_TRUE(rows) << rows.error().message;
  ASSERT_EQ(rows->size(), 3u);
  EXPECT_EQ((*rows)[1].text, "");
  EXPECT_EQ((*rows)[2].text, "with\ttab");
  EXPECT_EQ((*rows)[2].id, 2u);
  EXPECT_EQ((*rows)[2].source, "");
}

// Long enough for several chunks, so that lines and the gzip stream lie across their edges.
TEST_F(TextFileTest, GzipReadsLikePlain) {
  std::string plain;
  for (int i = 0; i < 20'000; ++i) {
    plain += std::to_string(i) + "\ts\tc\tk" + std::to_string(i * 7919) + "\t" +
             std::string(static_cast<size_t>(i % 97), 'x') + "\n";
  }
  Gzip(dir_ + "/a.tsv.gz", plain);
  const auto compressed = ReadTexts(dir_ + "/a.tsv.gz");
  const auto read = Read("a.tsv", plain);
  ASSERT_TRUE(compressed) << compressed.error().message;
  ASSERT_TRUE(read) << read.error().message;
  ASSERT_EQ(compressed->size(), 20'000u);
  ASSERT_EQ(read->size(), 20'000u);
  for (size_t i = 0; i < read->size(); ++i) {
    ASSERT_EQ((*compressed)[i].id, i);
    ASSERT_EQ((*read)[i].id, i);
    ASSERT_EQ((*compressed)[i].key, "k" + std::to_string(i * 7919));
    ASSERT_EQ((*compressed)[i].text.size(), i % 97);
    ASSERT_EQ((*read)[i].text, (*compressed)[i].text);
  }
}

TEST_F(TextFileTest, CutOrDamagedGzipIsAnError) {
  std::string plain;
  for (int i = 0; i < 5'000; ++i) plain += std::to_string(i * 7919) + "\n";
  const std::string whole = Gzip(dir_ + "/whole.gz", plain);
  // Start behind the header of the stream. Its last 8 bytes are its sums.
  for (const size_t bytes : {size_t{20}, whole.size() / 2, whole.size() - 9, whole.size() - 1}) {
    ExpectCorrupt("cut.txt.gz", std::string_view(whole).substr(0, bytes), "gzip stream is damaged");
  }
  for (const size_t at : {whole.size() / 2, whole.size() - 6}) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x40);
    ExpectCorrupt("damaged.txt.gz", damaged, "gzip stream is damaged");
  }
}

TEST_F(TextFileTest, BadLinesAreNamed) {
  const std::string good = "0\ts\tc\tk\tt\n";
  const std::vector<std::pair<std::string, std::string>> bad = {
      {"1\ts\tc\tk", "line 2: has 4 columns"},
      {"1\ts\tc\tk\tt\tu", "line 2: has 6 columns"},
      {"", "line 2: has 1 columns"},
      {"\ts\tc\tk\tt", "line 2: id is not a decimal"},
      {"-1\ts\tc\tk\tt", "line 2: id is not"},
      {"1x\ts\tc\tk\tt", "line 2: id is not"},
      {"18446744073709551616\ts\tc\tk\tt", "line 2: id is not"},
  };
  for (const auto& [line, part] : bad) ExpectCorrupt("a.tsv", good + line + "\n", part);
}

TEST_F(TextFileTest, LinesAreBounded) {
  const std::string longest(TextLimits{}.line_bytes_max, 'x');
  const auto rows = Read("a.txt", "short\n" + longest + "\nshort\n");
  ASSERT_TRUE(rows) << rows.error().message;
  EXPECT_EQ((*rows)[1].text.size(), longest.size());
  ExpectCorrupt("a.txt", "short\n" + longest + "x\n", "line 2: longer than 65536 bytes");
  // A line without end is refused long before the file's end.
  Gzip(dir_ + "/endless.gz", std::string(16u << 20, 'x'));
  const auto endless = ReadTexts(dir_ + "/endless.gz");
  ASSERT_FALSE(endless.has_value());
  EXPECT_NE(endless.error().message.find("line 1: longer than"), std::string::npos);
}

TEST_F(TextFileTest, RowsAndBytesAreBounded) {
  const std::string bytes = "one\ntwo\nthree\n";
  WriteBytes(dir_ + "/a.txt", bytes);
  EXPECT_TRUE(ReadTexts(dir_ + "/a.txt", {.file_bytes_max = bytes.size(), .rows_max = 3}));
  const auto rows = ReadTexts(dir_ + "/a.txt", {.rows_max = 2});
  ASSERT_FALSE(rows.has_value());
  EXPECT_EQ(rows.error().code, ErrorCode::kResourceExhausted);
  EXPECT_NE(rows.error().message.find("a.txt: more than 2 lines"), std::string::npos);
  const auto total = ReadTexts(dir_ + "/a.txt", {.file_bytes_max = bytes.size() - 1});
  ASSERT_FALSE(total.has_value());
  EXPECT_EQ(total.error().code, ErrorCode::kResourceExhausted);
  EXPECT_NE(total.error().message.find("more than 13 bytes"), std::string::npos);
}

TEST_F(TextFileTest, EmptyAndMissingFiles) {
  ExpectCorrupt("a.tsv", "", "holds no text");
  const auto missing = ReadTexts(dir_ + "/absent.tsv");
  ASSERT_FALSE(missing.has_value());
  EXPECT_EQ(missing.error().code, ErrorCode::kNotFound);
  EXPECT_NE(missing.error().message.find("absent.tsv"), std::string::npos);
  EXPECT_FALSE(ReadTexts(dir_).has_value());
}

}  // namespace
}  // namespace engram
