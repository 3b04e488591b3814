// Streams that cannot be trusted: broken frames, and frames that do not come to their end.

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <set>
#include <span>

#include "tests/dataplane/ingest_rig.h"

namespace engram {
namespace {

using IngestStreamsTest = IngestCoreTest;

TEST_F(IngestStreamsTest, BrokenFramesAreRefusedByName) {
  struct Case {
    size_t offset;
    size_t bytes;
    uint64_t value;
    RefusalReason reason;
  };
  for (const Case& c :
       {Case{0, 4, 0x12345678, RefusalReason::kBadMagic}, Case{4, 1, 2, RefusalReason::kBadVersion},
        Case{8, 4, 0xFFFFFFFF, RefusalReason::kFrameTooLong},
        Case{8, 4, 1'048'577, RefusalReason::kFrameTooLong},
        Case{12, 4, 0xDEADBEEF, RefusalReason::kBadCrc},
        Case{40, 1, 0x55, RefusalReason::kBadCrc}}) {
    clients_.clear();
    Start();
    TestClient& other = Greeted();
    TestClient& client = Greeted();
    client.Send(Observations(client.session(), 1));
    WireBytes frame = Observations(client.session(), 2);
    SetWireNumber(frame, c.offset, c.bytes, c.value);
    client.Send(frame);
    client.Send(Observations(client.session(), 3));
    ExpectRefusedAndClosed(client, c.reason);
    // What came before stands; nothing of it and behind it is taken.
    EXPECT_EQ(SessionOf(client).last_sequence, 1u);
    EXPECT_EQ(h().shard().taken_of(RequestKind::kObserve), 1u);
    ExpectServes(other);
    EXPECT_TRUE(h().Finish());
  }
}

TEST_F(IngestStreamsTest, OnlyAClientsTypesAreTaken) {
  for (int type = 0; type < 256; ++type) {
    const std::set<int> known{kWireHello,      kWireObserve, kWireRecall, kWirePing,  kWireClose,
                              kWireIntrospect, kWireCommand, kWireScroll, kWireCheck, kWireFlow};
    if (known.contains(type) || (type > 20 && type % 50 != 0)) continue;
    TestClient& client = Greeted();
    client.Send(MakeFrame(static_cast<uint8_t>(type), {}));
    const WireNak nak = OnlyNak(client);
    EXPECT_EQ(nak.reason, CodeOf(RefusalReason::kBadType)) << type;
    EXPECT_EQ(nak.refused_type, type);
    EXPECT_TRUE(nak.closing);
    EXPECT_TRUE(client.closed());
    client.Close();
  }
}

// A pool of so many blocks for frames that have begun.
HarnessOptions WithBlocks(HarnessOptions options, size_t blocks) {
  options.ingest.partial_frame_bytes = blocks * 4096;
  options.network.max_chunk_bytes = 512;
  return options;
}

TEST_F(IngestStreamsTest, AClientKilledInMidFrameGivesItsBlocksBack) {
  for (const bool abort : {false, true}) {
    clients_.clear();
    Start(WithBlocks(CalmOptions(), 4));
    const uint32_t free_before = h().slab().free_slots();
    TestClient& victim = Greeted();
    const WireBytes frame = LargeObservation(victim.session(), 16'000);
    victim.Send(std::span(frame).first(15'000));
    h().Settle();
    if (abort) {
      victim.Abort();
    } else {
      victim.Close();
    }
    h().Settle();
    EXPECT_EQ(h().core().open_connections(), 0u);
    EXPECT_EQ(h().slab().free_slots(), free_before);
    // All four blocks are there for the next one.
    TestClient& next = Greeted();
    const WireBytes again = LargeObservation(next.session(), 16'000);
    next.Send(std::span(again).first(16'050));
    h().Settle();
    next.Send(std::span(again).subspan(16'050));
    EXPECT_EQ(LastAcked(next), 1u);
    EXPECT_EQ(h().counted(IngestCounter::kEvictedPartialFrames), 0u);
    EXPECT_GE(h().counted(IngestCounter::kFramesGathered), 1u);
    EXPECT_TRUE(h().Finish());
  }
}

TEST_F(IngestStreamsTest, ABrokenStreamGivesItsBlocksBack) {
  Start(WithBlocks(CalmOptions(), 4));
  for (int round = 0; round < 10; ++round) {
    TestClient& client = Greeted();
    WireBytes frame = LargeObservation(client.session(), 15'000);
    frame[5000] ^= std::byte{1};
    client.Send(frame);
    h().Settle();
    EXPECT_TRUE(client.closed());
    // Behind a good frame, so that it is begun in the middle of a piece, and with a bad header.
    TestClient& second = Greeted();
    WireBytes header = Ping();
    header[0] = std::byte{0};
    second.Send(std::span(header).first(20));
    h().Settle();
    second.Send(std::span(header).subspan(20));
    h().Settle();
    EXPECT_TRUE(second.closed());
    client.Close();
    second.Close();
  }
  TestClient& last = Greeted();
  last.Send(LargeObservation(last.session(), 16'000));
  EXPECT_EQ(LastAcked(last), 1u);
  EXPECT_EQ(h().counted(IngestCounter::kEvictedPartialFrames), 0u);
}

TEST_F(IngestStreamsTest, ASpentPoolEvictsTheOldestDribbler) {
  Start(WithBlocks(CalmOptions(), 8));
  TestClient& oldest = Greeted();
  TestClient& younger = Greeted();
  TestClient& fast = Greeted();
  const WireBytes dribble = LargeObservation(oldest.session(), 30'000);
  oldest.Send(std::span(dribble).first(5 * 4096));
  h().Settle();
  const WireBytes second = LargeObservation(younger.session(), 30'000);
  younger.Send(std::span(second).first(2 * 4096));
  h().Settle();
  fast.Send(LargeObservation(fast.session(), 12'000));
  EXPECT_EQ(LastAcked(fast), 1u);
  ExpectRefusedAndClosed(oldest, RefusalReason::kPartialFrameLimit);
  EXPECT_FALSE(younger.closed());
  EXPECT_EQ(h().counted(IngestCounter::kEvictedPartialFrames), 1u);
  younger.Send(std::span(second).subspan(2 * 4096));
  EXPECT_EQ(LastAcked(younger), 1u);
}

// The one that dribbles must not push out a faster one either when it is its own turn to need room.
TEST_F(IngestStreamsTest, ADribblerThatGrowsIsItselfTheOldest) {
  Start(WithBlocks(CalmOptions(), 8));
  TestClient& dribbler = Greeted();
  TestClient& younger = Greeted();
  const WireBytes first = LargeObservation(dribbler.session(), 30'000);
  const WireBytes second = LargeObservation(younger.session(), 30'000);
  dribbler.Send(std::span(first).first(4 * 4096));
  h().Settle();
  younger.Send(std::span(second).first(4 * 4096));
  h().Settle();
  dribbler.Send(std::span(first).subspan(4 * 4096, 100));
  ExpectRefusedAndClosed(dribbler, RefusalReason::kPartialFrameLimit);
  EXPECT_FALSE(younger.closed());
  younger.Send(std::span(second).subspan(4 * 4096));
  EXPECT_EQ(LastAcked(younger), 1u);
}

TEST_F(IngestStreamsTest, AFrameLargerThanThePoolHarmsOnlyItsSender) {
  Start(WithBlocks(CalmOptions(), 4));
  TestClient& other = Greeted();
  TestClient& client = Greeted();
  client.Send(LargeObservation(client.session(), 40'000));
  ExpectRefusedAndClosed(client, RefusalReason::kPartialFrameLimit);
  ExpectServes(other);
}

}  // namespace
}  // namespace engram
