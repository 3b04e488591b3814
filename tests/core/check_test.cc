#include "src/core/check.h"

#include <gtest/gtest.h>

namespace engram {
namespace {

TEST(CheckTest, PassesAndEvaluatesOnce) {
  int evaluations = 0;
  CHECK(++evaluations == 1, "the condition is evaluated once");
  EXPECT_EQ(evaluations, 1);
}

TEST(CheckTest, IsOneStatement) {
  // Would not compile, or take the wrong else, were the macro a bare if.
  const bool yes = true;
  if (yes)
    CHECK(yes, "taken");
  else
    CHECK(!yes, "not taken");
}

// Release builds define NDEBUG; CHECK must not care.
TEST(CheckDeathTest, AbortsNamingPlaceConditionAndMessage) {
  const int degree = 3;
  EXPECT_DEATH(CHECK(degree < 3, "degree over its bound"),
               "check_test.cc:[0-9]+: CHECK failed: degree < 3: degree over its bound");
}

}  // namespace
}  // namespace engram
