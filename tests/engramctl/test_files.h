#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

namespace engram {

// The checkout's root: ENGRAM_SOURCE_DIR from the environment, else from the build.
inline std::string SourceDir() {
  if (const char* dir = std::getenv("ENGRAM_SOURCE_DIR")) return dir;
#ifdef ENGRAM_SOURCE_DIR
  return ENGRAM_SOURCE_DIR;
#else
  return ".";
#endif
}

// tools/sample-data, or what the environment names in its place.
inline std::string SampleDataDir() {
  if (const char* dir = std::getenv("ENGRAM_SAMPLE_DATA")) return dir;
  return SourceDir() + "/tools/sample-data";
}

inline std::string ReadBytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void WriteBytes(const std::string& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  ASSERT_TRUE(file.good()) << path;
}

// Rows of an .fvecs or .ivecs file: a little-endian int32 length, then as many values of 4 bytes.
template <typename T>
std::vector<std::vector<T>> ReadVecs(const std::string& path) {
  static_assert(sizeof(T) == 4);
  const std::string bytes = ReadBytes(path);
  std::vector<std::vector<T>> rows;
  for (size_t at = 0; at + 4 <= bytes.size();) {
    int32_t length = 0;
    std::memcpy(&length, bytes.data() + at, 4);
    at += 4;
    if (length < 0 || bytes.size() - at < static_cast<size_t>(length) * 4) {
      ADD_FAILURE() << path << " is cut short";
      return rows;
    }
    std::vector<T> row(static_cast<size_t>(length));
    std::memcpy(row.data(), bytes.data() + at, row.size() * 4);
    at += row.size() * 4;
    rows.push_back(std::move(row));
  }
  return rows;
}

// A directory of its own for each test, gone with it.
class FileTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    std::string pattern =
        testing::TempDir() + info->test_suite_name() + "." + info->name() + ".XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::string dir_;
};

}  // namespace engram
