#include "tools/engramctl/backup_list.h"

#include <gtest/gtest.h>

#include <string>

namespace engram {
namespace {

BackupList SomeList() {
  return {.made_unix_ns = 1'234,
          .files = {{.crc = 0xdeadbeef, .bytes = 10, .name = "INSTANCE"},
                    {.crc = 1, .bytes = 0, .name = "log-000/segment-00000001.log"}}};
}

TEST(BackupList, ComesBackAsItWas) {
  EXPECT_EQ(ParseBackupList(PrintBackupList(SomeList())), SomeList());
  EXPECT_EQ(ParseBackupList(PrintBackupList({})), BackupList{});
}

TEST(BackupList, EveryTurnedBitAndEveryCutIsNoticed) {
  const std::string text = PrintBackupList(SomeList());
  for (size_t bit = 0; bit < text.size() * 8; ++bit) {
    std::string turned = text;
    turned[bit / 8] = static_cast<char>(turned[bit / 8] ^ (1 << bit % 8));
    EXPECT_EQ(ParseBackupList(turned), std::nullopt) << bit;
  }
  for (size_t length = 0; length < text.size(); ++length) {
    EXPECT_EQ(ParseBackupList(text.substr(0, length)), std::nullopt) << length;
  }
  EXPECT_EQ(ParseBackupList(text + "\n"), std::nullopt);
}

// A restore writes under these names.
TEST(BackupList, NamesLeadNowhereElse) {
  for (const char* name : {"", "..", ".", "/etc/passwd", "../x", "a/../b", "a/b/c", "a/", "a b",
                           "a/..", "a\\b", "a\nfile 00000000 0 b"}) {
    BackupList list;
    list.files.push_back({.crc = 0, .bytes = 0, .name = name});
    EXPECT_EQ(ParseBackupList(PrintBackupList(list)), std::nullopt) << name;
  }
}

}  // namespace
}  // namespace engram
