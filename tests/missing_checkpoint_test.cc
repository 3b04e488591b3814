#include "src/missing_checkpoint.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "src/core/log_files.h"
#include "tests/support/scratch_directory.h"

namespace engram {
namespace {

class MissingCheckpointTest : public testing::Test {
 protected:
  // The files of the data directory, by "FOLDER/NAME"; one without a name is the folder alone.
  Result<void> Check(const std::vector<std::string>& files) {
    for (const std::string& file : files) {
      const std::filesystem::path path = folder_.path() + "/" + file;
      std::filesystem::create_directories(path.parent_path());
      if (path.has_filename()) std::ofstream(path) << "x";
    }
    auto root = CreatePosixDisk(folder_.path(), {});
    EXPECT_TRUE(root.has_value());
    return CheckLogsAreWhole(
        **root, [this](const std::string& folder, const DiskOptions& options, std::string*) {
          return CreatePosixDisk(folder_.path() + "/" + folder, options);
        });
  }
  void ExpectRefused(const std::vector<std::string>& files, const std::string& named) {
    const auto checked = Check(files);
    ASSERT_FALSE(checked.has_value());
    EXPECT_EQ(checked.error().code, ErrorCode::kCorrupt);
    EXPECT_TRUE(checked.error().message.starts_with(
        folder_.path() + "/CHECKPOINT is missing, but " + named + " is there"))
        << checked.error().message;
    EXPECT_NE(checked.error().message.find("restore a backup"), std::string::npos);
  }

  ScratchDirectory folder_;
};

TEST_F(MissingCheckpointTest, AnEmptyDirectoryIsNew) {
  EXPECT_TRUE(Check({}).has_value());
  EXPECT_FALSE(std::filesystem::exists(folder_.path() + "/vault")) << "nothing is made";
}

TEST_F(MissingCheckpointTest, LogsThatBeginAtTheirBeginningAreWhole) {
  EXPECT_TRUE(Check({"INSTANCE", "log-000/segment-00000001.log", "log-000/segment-00000002.log",
                     "log-001/", "vault/", "quarantine/"})
                  .has_value());
}

// The first round may have been cut off, and those before the second.
TEST_F(MissingCheckpointTest, CheckpointFilesOfRoundsThatFailedAreNoSign) {
  EXPECT_TRUE(Check({"log-000/segment-00000001.log", "log-000/checkpoint-00000001",
                     "log-000/checkpoint-00000002"})
                  .has_value());
}

TEST_F(MissingCheckpointTest, ALogWithoutItsBeginning) {
  ExpectRefused({"log-000/segment-00000001.log", "log-001/segment-00000003.log",
                 "log-001/segment-00000004.log"},
                "log-001/segment-00000003.log");
}

TEST_F(MissingCheckpointTest, ACheckpointFileBesideALogWithoutItsBeginning) {
  ExpectRefused({"log-000/checkpoint-00000004", "log-000/segment-00000003.log"},
                "log-000/checkpoint-00000004");
}

TEST_F(MissingCheckpointTest, ACheckpointFileWithoutALog) {
  ExpectRefused({"log-000/checkpoint-00000004"}, "log-000/checkpoint-00000004");
}

TEST_F(MissingCheckpointTest, AnyRecordsInTheVault) {
  ExpectRefused({"log-000/segment-00000001.log", "vault/segment-00000001.log"},
                "vault/segment-00000001.log");
}

}  // namespace
}  // namespace engram
