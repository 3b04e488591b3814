#include <gtest/gtest.h>

#include <set>

#include "tools/engramctl/feed_loop.h"
#include "tools/engramctl/row_dealing.h"
#include "tools/engramctl/space_listing.h"
#include "tools/engramctl/table.h"

namespace engram {
namespace {

TEST(RowDealingTest, EveryRowGoesToOneConnectionOnceInOrder) {
  for (const uint64_t rows : {1u, 5u, 16u, 17u, 47u, 48u, 49u, 1'000u}) {
    for (const uint32_t connections : {1u, 2u, 3u, 7u}) {
      const RowDealing dealing = {.rows = rows, .batch = 16, .connections = connections};
      std::set<uint64_t> seen;
      for (uint32_t connection = 0; connection < connections; ++connection) {
        uint64_t last = 0;
        for (uint64_t i = 0; i < dealing.RowsOf(connection); ++i) {
          const uint64_t row = dealing.RowAt(connection, i);
          EXPECT_LT(row, rows);
          EXPECT_TRUE(seen.insert(row).second) << row;
          EXPECT_TRUE(i == 0 || row > last);
          last = row;
        }
      }
      EXPECT_EQ(seen.size(), rows) << rows << " over " << connections;
    }
  }
}

TEST(RowDealingTest, BatchesAreWhatTheConnectionsGetInTurn) {
  const RowDealing dealing = {.rows = 37, .batch = 16, .connections = 2};
  EXPECT_EQ(dealing.Batches(), 3u);
  EXPECT_EQ(dealing.RowsOfBatch(1), 16u);
  EXPECT_EQ(dealing.RowsOfBatch(2), 5u);
  EXPECT_EQ(dealing.RowsOf(0), 21u);
  EXPECT_EQ(dealing.RowsOf(1), 16u);
}

SpaceInfo InfoOf(const std::string& name, uint64_t linked, uint64_t unlinked) {
  SpaceInfo info = {};
  info.name = name;
  info.record.dimension = 8;
  info.record.metric = Metric::kL2;
  info.record.observations = linked + unlinked;
  info.record.linked = linked;
  info.record.unlinked = unlinked;
  return info;
}

TEST(SpaceListingTest, ShardsOfOneNameAreAddedUp) {
  SpaceInfo empty = InfoOf("a", 0, 0);
  empty.record.dimension = 0;
  const auto spaces = MergeSpaces({InfoOf("b", 1, 2), empty, InfoOf("a", 10, 5)});
  ASSERT_EQ(spaces.size(), 2u);
  EXPECT_EQ(spaces[0].name, "a");
  EXPECT_EQ(spaces[0].shards, 2u);
  EXPECT_EQ(spaces[0].dimension, 8u);
  EXPECT_EQ(spaces[0].observations, 15u);
  EXPECT_EQ(spaces[1].unlinked, 2u);
}

TEST(SpaceListingTest, LinkingIsDoneWhenAGraphHoldsAllOrNoneComes) {
  EXPECT_TRUE(MergeSpaces({InfoOf("a", 0, 4'096)})[0].LinkingDone());
  EXPECT_FALSE(MergeSpaces({InfoOf("a", 0, 4'097)})[0].LinkingDone());
  EXPECT_FALSE(MergeSpaces({InfoOf("a", 5, 1)})[0].LinkingDone());
  EXPECT_TRUE(MergeSpaces({InfoOf("a", 6, 0)})[0].LinkingDone());
}

TEST(RefusalNoticeTest, WhatLastsIsSaidAndNotTooOften) {
  RefusalNotice notice;
  int64_t now_ns = 100;
  // What passes is not worth a word.
  EXPECT_EQ(notice.Next("queue_full: x", 5, now_ns), "");
  now_ns += RefusalNotice::kRefusedNs - 1;
  EXPECT_EQ(notice.Next("queue_full: x", 5, now_ns), "");
  EXPECT_EQ(notice.Next("", 0, now_ns), "");
  EXPECT_EQ(notice.Next("disk_full: no room", 2'000, now_ns), "");
  now_ns += RefusalNotice::kRefusedNs;
  EXPECT_EQ(notice.Next("disk_full: no room", 2'000, now_ns),
            "the server takes nothing: disk_full: no room; 2,000 observations wait, for 1 s now");
  now_ns += RefusalNotice::kRepeatNs - 1;
  EXPECT_EQ(notice.Next("disk_full: no room", 2'000, now_ns), "");
  now_ns += 1;
  EXPECT_NE(notice.Next("disk_full: no room", 2'000, now_ns), "");
  // Nor more often where it comes and goes.
  EXPECT_EQ(notice.Next("", 0, now_ns), "");
  EXPECT_EQ(notice.Next("disk_full: no room", 1'999, now_ns), "");
  now_ns += RefusalNotice::kRefusedNs;
  EXPECT_EQ(notice.Next("disk_full: no room", 1'999, now_ns), "");
}

TEST(TableTest, NumbersAndCuts) {
  EXPECT_EQ(WithThousands(0), "0");
  EXPECT_EQ(WithThousands(999), "999");
  EXPECT_EQ(WithThousands(1'000), "1,000");
  EXPECT_EQ(WithThousands(1'234'567), "1,234,567");
  EXPECT_EQ(CutToColumns("abcdef", 0), "abcdef");
  EXPECT_EQ(CutToColumns("abcdef", 6), "abcdef");
  EXPECT_EQ(CutToColumns("abcdef", 4), "abc…");
  // Cut between characters, not within one.
  EXPECT_EQ(CutToColumns("ééé", 2), "é…");
}

TEST(TableTest, ColumnsLineUpAndTheLastIsCut) {
  Table table({{"n", Table::Align::kRight}, {"name", Table::Align::kLeft}, {"text"}});
  table.AddRow({"1", "é", "a rather long text"});
  table.AddRow({"22", "bcdef", ""});
  EXPECT_EQ(table.ToString(0),
            " n  name   text\n"
            " 1  é      a rather long text\n"
            "22  bcdef  \n");
  EXPECT_EQ(table.ToString(23),
            " n  name   text\n"
            " 1  é      a rather lo…\n"
            "22  bcdef  \n");
}

}  // namespace
}  // namespace engram
