#include "src/control/http_origin.h"

#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace engram {
namespace {

TEST(HttpOriginTest, PagesOfThisHostAndThisMachine) {
  const std::vector<std::string> none;
  for (const char* origin : {"", "http://localhost", "https://localhost:3000", "http://LocalHost",
                             "http://127.0.0.1:8080", "http://[::1]:1", "http://db.example.com",
                             "https://DB.example.com:444"}) {
    EXPECT_TRUE(IsServedOrigin(origin, "db.example.com:8080", none)) << origin;
  }
  EXPECT_TRUE(IsServedOrigin("http://[fe80::1]:3", "[fe80::1]:8080", none));
}

TEST(HttpOriginTest, NoOthers) {
  const std::vector<std::string> none;
  for (const char* origin :
       {"null", "http://example.com", "http://localhost.example.com",
        "http://127.0.0.1.example.com", "http://db.example.com.evil.com",
        "http://evil.com/localhost", "file://", "http://", "localhost", "db.example.com",
        "http://127.0.0.2", "http://[::1].evil.com:1", "http://evil.com:80@localhost",
        "http://localhost@evil.com", "http://[::1"}) {
    EXPECT_FALSE(IsServedOrigin(origin, "db.example.com:8080", none)) << origin;
  }
  EXPECT_FALSE(IsServedOrigin("http://", "", none));
}

TEST(HttpOriginTest, ThoseThatAreConfigured) {
  const std::vector<std::string> allowed = {"https://app.example.com", "http://b:8"};
  EXPECT_TRUE(IsServedOrigin("https://app.example.com", "db", allowed));
  EXPECT_TRUE(IsServedOrigin("http://B:8", "db", allowed));
  EXPECT_FALSE(IsServedOrigin("http://app.example.com", "db", allowed));
  EXPECT_FALSE(IsServedOrigin("https://app.example.com:444", "db", allowed));
  EXPECT_FALSE(IsServedOrigin("http://b:80", "db", allowed));
}

}  // namespace
}  // namespace engram
