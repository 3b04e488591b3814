#include "src/core/result.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <string>

namespace engram {
namespace {

Result<int> Half(int value) {
  if (value % 2 != 0) return Fail(ErrorCode::kInvalidArgument, "value: give an even number");
  return value / 2;
}

TEST(ResultTest, CarriesAValueOrAnError) {
  ASSERT_TRUE(Half(4).has_value());
  EXPECT_EQ(*Half(4), 2);
  const Result<int> failed = Half(3);
  ASSERT_FALSE(failed.has_value());
  EXPECT_EQ(failed.error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(failed.error().message, "value: give an even number");
}

ErrorCode CodeOf(int errno_value) {
  const Result<void> failed = FailErrno("x", errno_value);
  return failed.error().code;
}

TEST(ResultTest, ErrnoDecidesTheCode) {
  EXPECT_EQ(CodeOf(ENOENT), ErrorCode::kNotFound);
  EXPECT_EQ(CodeOf(EADDRINUSE), ErrorCode::kAlreadyExists);
  EXPECT_EQ(CodeOf(EACCES), ErrorCode::kPermissionDenied);
  EXPECT_EQ(CodeOf(EROFS), ErrorCode::kPermissionDenied);
  EXPECT_EQ(CodeOf(ENOSPC), ErrorCode::kResourceExhausted);
  EXPECT_EQ(CodeOf(EDQUOT), ErrorCode::kResourceExhausted);
  EXPECT_EQ(CodeOf(ENOSYS), ErrorCode::kUnavailable);
  EXPECT_EQ(CodeOf(EINVAL), ErrorCode::kInvalidArgument);
  EXPECT_EQ(CodeOf(EIO), ErrorCode::kInternal);
}

TEST(ResultTest, ErrnoMessageNamesWhatAndWhy) {
  const Result<void> failed = FailErrno("open engram.toml", ENOENT);
  EXPECT_EQ(failed.error().message, "open engram.toml: No such file or directory");
}

}  // namespace
}  // namespace engram
