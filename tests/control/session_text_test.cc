#include "src/control/session_text.h"

#include <gtest/gtest.h>

#include "src/core/hash.h"

namespace engram {
namespace {

TEST(SessionTextTest, IsReadBack) {
  EXPECT_EQ(SessionText(SessionId(0x1f)), "000000000000001f");
  EXPECT_EQ(SessionText(SessionId(UINT64_MAX)), "ffffffffffffffff");
  SplitMix64 random(1);
  for (int i = 0; i < 1'000; ++i) {
    const SessionId session(random.Next() >> random.Below(60) | 1);
    EXPECT_EQ(SessionText(session).size(), 16u);
    EXPECT_EQ(ReadSession(SessionText(session)), session);
  }
}

TEST(SessionTextTest, NoOtherTextIsOne) {
  for (const char* text : {"", "0", "0000000000000000", "x", "1g", " 1", "1 ", "-1", "+1",
                           "10000000000000000", "0x1f"}) {
    EXPECT_FALSE(ReadSession(text).has_value()) << text;
  }
}

}  // namespace
}  // namespace engram
