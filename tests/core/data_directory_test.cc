#include "src/core/data_directory.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "src/core/clock.h"
#include "src/core/crc32c.h"
#include "src/core/simulated_disk.h"

namespace engram {
namespace {

class DataDirectoryTest : public testing::Test {
 protected:
  DataDirectoryTest() {
    std::string pattern = testing::TempDir() + "engram_data_directory_test_XXXXXX";
    root_ = mkdtemp(pattern.data());
    path_ = root_ + "/data";
  }
  ~DataDirectoryTest() override { std::filesystem::remove_all(root_); }

  std::string ReadInstance() const {
    std::ifstream file(path_ + "/INSTANCE", std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void WriteInstance(std::string_view text) const {
    std::ofstream(path_ + "/INSTANCE", std::ios::binary | std::ios::trunc) << text;
  }
  // Replaces the checksum by the right one.
  static std::string Sealed(const std::string& body) {
    std::array<char, 16> digits{};
    std::snprintf(digits.data(), digits.size(), "%08x", Crc32c(std::as_bytes(std::span(body))));
    return body + "crc32c " + digits.data() + "\n";
  }

  std::string root_;
  std::string path_;
};

TEST_F(DataDirectoryTest, MakesADirectoryOfItsOwn) {
  const SystemClock clock;
  const auto data = OpenDataDirectory(path_);
  ASSERT_TRUE(data.has_value()) << data.error().message;
  EXPECT_EQ(data->path(), path_);
  EXPECT_EQ(data->instance().format_version, kDataFormatVersion);
  EXPECT_NE(data->instance().id, InstanceId{});
  EXPECT_GT(data->instance().created_ns, 1'700'000'000 * kNanosPerSecond);
  struct stat status{};
  ASSERT_EQ(stat(path_.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700u);
  EXPECT_TRUE(ReadInstance().starts_with("engram data directory\nformat_version 2\ninstance_id " +
                                         ToString(data->instance().id) + "\n"))
      << ReadInstance();
}

TEST_F(DataDirectoryTest, IsTheSameWhenOpenedAgain) {
  std::optional<InstanceInfo> first;
  for (int round = 0; round < 3; ++round) {
    const auto data = OpenDataDirectory(path_);
    ASSERT_TRUE(data.has_value()) << data.error().message;
    if (!first) first = data->instance();
    EXPECT_EQ(data->instance().id, first->id);
    EXPECT_EQ(data->instance().created_ns, first->created_ns);
  }
  path_ += "2";
  EXPECT_NE(OpenDataDirectory(path_)->instance().id, first->id);
}

TEST_F(DataDirectoryTest, TwoHoldersConflict) {
  std::optional<DataDirectory> first(*OpenDataDirectory(path_));
  const auto second = OpenDataDirectory(path_);
  ASSERT_FALSE(second.has_value());
  EXPECT_EQ(second.error().code, ErrorCode::kAlreadyExists);
  EXPECT_EQ(second.error().message, "directory " + path_ + " is in use by process " +
                                        std::to_string(getpid()) +
                                        ": stop that process, or choose another directory");
  first.reset();
  EXPECT_TRUE(OpenDataDirectory(path_).has_value());
}

// kill -9 must not leave a lock that a person has to remove.
TEST_F(DataDirectoryTest, TheLockEndsWithItsProcess) {
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const auto data = OpenDataDirectory(path_);
    const char state = data ? 'y' : 'n';
    (void)!write(ready[1], &state, 1);
    while (true) pause();
  }
  char state = 0;
  ASSERT_EQ(read(ready[0], &state, 1), 1);
  EXPECT_EQ(state, 'y');
  const auto refused = OpenDataDirectory(path_);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(ready[0]);
  close(ready[1]);
  ASSERT_FALSE(refused.has_value());
  EXPECT_NE(refused.error().message.find("process " + std::to_string(child)), std::string::npos)
      << refused.error().message;
  EXPECT_TRUE(OpenDataDirectory(path_).has_value());
}

TEST_F(DataDirectoryTest, AnyDamageIsNamedWithItsRemedy) {
  ASSERT_TRUE(OpenDataDirectory(path_).has_value());
  const std::string good = ReadInstance();
  const auto expect_refused = [&](const std::string& text) {
    WriteInstance(text);
    const auto data = OpenDataDirectory(path_);
    ASSERT_FALSE(data.has_value()) << text;
    EXPECT_EQ(data.error().code, ErrorCode::kCorrupt) << text;
    EXPECT_NE(data.error().message.find(path_ + "/INSTANCE is damaged"), std::string::npos)
        << data.error().message;
    EXPECT_NE(data.error().message.find("restore it from a backup"), std::string::npos);
    EXPECT_EQ(ReadInstance(), text) << "it is not overwritten";
  };
  for (size_t length = 0; length < good.size(); length += 7) {
    expect_refused(good.substr(0, length));
  }
  expect_refused(good + "\n");
  expect_refused(std::string(5'000, 'x'));
  // Whole, but not what the grammar says.
  expect_refused(Sealed("another program's file\nformat_version 1\n"));
  expect_refused(Sealed("engram data directory\nversion 1\n"));
  expect_refused(Sealed("engram data directory\nformat_version one\n"));
  expect_refused(Sealed("engram data directory\nformat_version 1\ninstance_id 12\n"));
  expect_refused(
      Sealed("engram data directory\nformat_version 1\ninstance_id "
             "00112233445566778899aabbccddeeff\ncreated_ns\n"));
  WriteInstance(good);
  EXPECT_TRUE(OpenDataDirectory(path_).has_value());
}

// Would catch: a program of version 1 that takes a directory with logs for an empty one.
TEST_F(DataDirectoryTest, AnOlderOneGetsTheVersionOfToday) {
  ASSERT_TRUE(OpenDataDirectory(path_).has_value());
  WriteInstance(
      Sealed("engram data directory\nformat_version 1\ninstance_id "
             "00112233445566778899aabbccddeeff\ncreated_ns 7\n"));
  const auto data = OpenDataDirectory(path_);
  ASSERT_TRUE(data.has_value());
  EXPECT_EQ(data->instance().format_version, kDataFormatVersion);
  EXPECT_EQ(ToString(data->instance().id), "00112233445566778899aabbccddeeff");
  EXPECT_EQ(data->instance().created_ns, 7);
  EXPECT_TRUE(ReadInstance().starts_with("engram data directory\nformat_version 2\n"));
}

TEST_F(DataDirectoryTest, RefusesANewerFormat) {
  ASSERT_TRUE(OpenDataDirectory(path_).has_value());
  WriteInstance(Sealed("engram data directory\nformat_version 3\nanything else\n"));
  const auto data = OpenDataDirectory(path_);
  ASSERT_FALSE(data.has_value());
  EXPECT_EQ(data.error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(data.error().message,
            path_ +
                "/INSTANCE has format version 3, this program knows versions up to 2: start "
                "the newer program that wrote it, or choose another directory");
}

TEST_F(DataDirectoryTest, TakesNoDirectoryOfSomebodyElse) {
  std::filesystem::create_directories(path_ + "/lost+found");
  std::ofstream(path_ + "/thesis.tex") << "years of work";
  const auto data = OpenDataDirectory(path_);
  ASSERT_FALSE(data.has_value());
  EXPECT_EQ(data.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(data.error().message.find("thesis.tex"), std::string::npos) << data.error().message;
  EXPECT_NE(data.error().message.find("choose an empty directory"), std::string::npos);
  std::filesystem::remove(path_ + "/thesis.tex");
  EXPECT_TRUE(OpenDataDirectory(path_).has_value()) << "lost+found of a fresh file system is fine";
}

TEST_F(DataDirectoryTest, PathsThatCannotBeAreNamed) {
  for (const std::string& path : {root_ + "/a/b", std::string("/proc/engram")}) {
    const auto data = OpenDataDirectory(path);
    ASSERT_FALSE(data.has_value()) << path;
    EXPECT_NE(data.error().message.find(path), std::string::npos) << data.error().message;
  }
}

TEST(DataDirectoryCrashTest, NoFlippedBitGoesUnseen) {
  SimulatedClock clock;
  SimulatedDisk medium(&clock, 1);
  const auto open = [&] { return OpenDataDirectory(medium.Open("data"), 5, InstanceId{7}); };
  ASSERT_TRUE(open().has_value());
  const size_t bits = 8 * medium.ContentOf("data", kInstanceFileName)->size();
  for (size_t bit = 0; bit < bits; ++bit) {
    medium.FlipBit("data", kInstanceFileName, bit);
    const auto data = open();
    ASSERT_FALSE(data.has_value()) << bit;
    ASSERT_EQ(data.error().code, ErrorCode::kCorrupt) << data.error().message;
    medium.FlipBit("data", kInstanceFileName, bit);
  }
  EXPECT_TRUE(open().has_value());
}

// A process that dies right after the rename, seen by the next one, and then a power cut.
TEST(DataDirectoryCrashTest, AnIdentityThatWasReadStays) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    SimulatedClock clock;
    SimulatedDisk medium(&clock, seed);
    {
      const auto donor = medium.Open("donor");
      ASSERT_TRUE(OpenDataDirectory(medium.Open("donor"), 5, InstanceId{7}).has_value());
      const auto disk = medium.Open("data");
      const auto content = *medium.ContentOf("donor", kInstanceFileName);
      ASSERT_TRUE(ReplaceFile(*disk, "INSTANCE.new", content).has_value());
      ASSERT_TRUE(disk->Rename("INSTANCE.new", kInstanceFileName).has_value());
    }
    ASSERT_EQ(OpenDataDirectory(medium.Open("data"), 6, InstanceId{8})->instance().id,
              InstanceId{7});
    medium.Crash();
    ASSERT_EQ(OpenDataDirectory(medium.Open("data"), 7, InstanceId{9})->instance().id,
              InstanceId{7})
        << "seed " << seed;
  }
}

// Power fails at any moment of the first opens. Whatever is left can be opened, and an identity
// that was once handed out stays.
TEST(DataDirectoryCrashTest, AnIdentityOnceGivenStays) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    SimulatedClock clock;
    // Errors stand for the crash in the middle: after one, everything unsynced is at stake.
    SimulatedDisk medium(&clock, seed);
    SplitMix64 random(seed);
    std::optional<InstanceId> given;
    for (uint8_t round = 0; round < 6; ++round) {
      const double error = round < 5 && random.Below(2) == 0 ? 0.5 : 0.0;
      medium.SetFaults({.write_error_probability = error, .flush_error_probability = error});
      InstanceId fresh{};
      fresh.fill(static_cast<uint8_t>(round + 1));
      {
        const auto data = OpenDataDirectory(medium.Open("data"), clock.WallNs(), fresh);
        if (data) {
          if (given) {
            ASSERT_EQ(data->instance().id, *given) << "seed " << seed << " round " << int{round};
          }
          given = data->instance().id;
        } else {
          ASSERT_EQ(data.error().code, ErrorCode::kInternal)
              << "seed " << seed << ": " << data.error().message;
        }
      }
      if (random.Below(2) == 0) medium.Crash();
    }
    ASSERT_TRUE(given.has_value()) << "the last round has no errors";
  }
}

}  // namespace
}  // namespace engram
