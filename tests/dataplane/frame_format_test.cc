#include "dataplane/frame_format.h"

#include <gtest/gtest.h>

#include <array>
#include <random>

#include "tests/dataplane/wire.h"

namespace engram {
namespace {

// A bit at a time and nothing else, so that the oracle of wire.h is checked too.
uint32_t BitwiseCrc(std::span<const std::byte> bytes) {
  uint32_t crc = 0xFFFFFFFF;
  for (std::byte byte : bytes) {
    crc ^= static_cast<uint8_t>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) != 0 ? (crc >> 1) ^ 0x82F63B78 : crc >> 1;
  }
  return ~crc;
}

template <typename T>
WireBytes BytesIn(const T& value) {
  const auto bytes = BytesOf(value);
  return {bytes.begin(), bytes.end()};
}

TEST(FrameFormatTest, TheOracleIsCrc32c) {
  EXPECT_EQ(BitwiseCrc(BytesOf(std::string_view("123456789"))), 0xE3069283u);
  const WireBytes zeros(32);
  EXPECT_EQ(BitwiseCrc(zeros), 0x8A9136AAu);  // RFC 3720 B.4
  std::mt19937 random(1);
  WireBytes bytes(300);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  EXPECT_EQ(OracleCrc(bytes), BitwiseCrc(bytes));
  EXPECT_EQ(OracleCrc(std::span(bytes).subspan(77), OracleCrc(std::span(bytes).first(77))),
            BitwiseCrc(bytes));
}

TEST(FrameFormatTest, HeaderLiesAsThePageSays) {
  const FrameHeader header{.type = FrameType::kObserve,
                           .flags = 0x1122,
                           .length = 0x33445566,
                           .crc = 0x778899AA,
                           .session = 0x0102030405060708,
                           .sequence = 0x1112131415161718};
  const WireBytes expected = WireWriter()
                                 .U32(0x31474E45)
                                 .U8(1)
                                 .U8(3)
                                 .U16(0x1122)
                                 .U32(0x33445566)
                                 .U32(0x778899AA)
                                 .U64(0x0102030405060708)
                                 .U64(0x1112131415161718)
                                 .Take();
  EXPECT_EQ(BytesIn(header), expected);
  EXPECT_EQ(WireText(std::span(expected).first(4)), "ENG1");
}

TEST(FrameFormatTest, TypesAndFlagsHaveTheirNumbers) {
  const std::array<std::pair<FrameType, int>, 11> types{{{FrameType::kHello, 1},
                                                         {FrameType::kHelloAck, 2},
                                                         {FrameType::kObserve, 3},
                                                         {FrameType::kAck, 4},
                                                         {FrameType::kNak, 5},
                                                         {FrameType::kRecall, 7},
                                                         {FrameType::kResult, 8},
                                                         {FrameType::kPing, 9},
                                                         {FrameType::kClose, 10},
                                                         {FrameType::kIntrospect, 11},
                                                         {FrameType::kIntrospection, 12}}};
  for (const auto& [type, number] : types) EXPECT_EQ(static_cast<int>(type), number);
  EXPECT_EQ(kFrameFlagMore, 1);
  EXPECT_EQ(kFrameFlagPingAnswer, 1);
  EXPECT_EQ(kFrameFlagWithPayload, 1);
  EXPECT_EQ(kFrameFlagWithVector, 2);
  EXPECT_EQ(kFrameFlagSnapshot, 4);
  EXPECT_EQ(kFrameFlagFiltered, 8);
  EXPECT_EQ(kFrameFlagBounded, 16);
  EXPECT_EQ(kFrameFlagAcross, 32);
  EXPECT_EQ(kFeatureNoSession, 1u);
  EXPECT_EQ(kFeatureAttributes, 2u);
  EXPECT_EQ(kFeatureWideRecalls, 4u);
  EXPECT_EQ(kNakFlagConsumed, 1);
  EXPECT_EQ(kNakFlagClosing, 2);
  EXPECT_EQ(kMaxFrameBodyBytes, 1'048'576u);
}

TEST(FrameFormatTest, BodiesLieAsThePageSays) {
  HelloBody hello{.features = 0x01020304,
                  .dimension = 0x0506,
                  .metric = Metric::kL2,
                  .priority = Priority::kHigh,
                  .space_bytes = 9};
  EXPECT_EQ(BytesIn(hello),
            WireWriter().U32(0x01020304).U16(0x0506).U8(3).U8(1).U8(9).Zeros(3).Take());

  HelloAckBody hello_ack{.features = 1,
                         .dimension = 768,
                         .metric = Metric::kInnerProduct,
                         .priority = Priority::kNormal,
                         .credit = 0x1122334455667788,
                         .max_frame_bytes = 0x01020304,
                         .max_recalls = 0x05060708};
  EXPECT_EQ(BytesIn(hello_ack), WireWriter()
                                    .U32(1)
                                    .U16(768)
                                    .U8(2)
                                    .U8(0)
                                    .U64(0x1122334455667788)
                                    .U32(0x01020304)
                                    .U32(0x05060708)
                                    .Take());

  EXPECT_EQ(BytesIn(ObserveBody{.count = 0x0102, .payload_kind = PayloadKind::kMemory}),
            WireWriter().U16(0x0102).U8(2).U8(0).Take());

  RecordHeader record{.record_bytes = 0x01020304,
                      .op = ObservationOp::kDelete,
                      .dtype = VectorDtype::kInt8,
                      .dimension = 0x0506,
                      .id_bytes = 0x0708,
                      .attribute_bytes = 0x0D0E,
                      .payload_bytes = 0x090A0B0C,
                      .scale = 0.5F,
                      .confidence = 0.25F,
                      .when_ns = -2};
  EXPECT_EQ(BytesIn(record), WireWriter()
                                 .U32(0x01020304)
                                 .U8(2)
                                 .U8(4)
                                 .U16(0x0506)
                                 .U16(0x0708)
                                 .U16(0x0D0E)
                                 .U32(0x090A0B0C)
                                 .F32(0.5F)
                                 .F32(0.25F)
                                 .U64(static_cast<uint64_t>(int64_t{-2}))
                                 .Take());

  EXPECT_EQ(BytesIn(AckBody{.credit = 0x0102030405060708}),
            WireWriter().U64(0x0102030405060708).Take());

  NakBody nak{.reason = RefusalReason::kQueueFull,
              .refused_type = FrameType::kRecall,
              .flags = 3,
              .retry_after_ms = 0x01020304,
              .expected = 0x05060708090A0B0C,
              .text_bytes = 0x0D0E};
  EXPECT_EQ(BytesIn(nak), WireWriter()
                              .U16(40)
                              .U8(7)
                              .U8(3)
                              .U32(0x01020304)
                              .U64(0x05060708090A0B0C)
                              .U16(0x0D0E)
                              .Zeros(6)
                              .Take());

  RecallBody recall{.k = 0x01020304,
                    .ef = 0x05060708,
                    .dimension = 0x090A,
                    .dtype = VectorDtype::kBf16,
                    .scale = 2};
  EXPECT_EQ(BytesIn(recall),
            WireWriter().U32(0x01020304).U32(0x05060708).U16(0x090A).U8(3).U8(0).F32(2).Take());

  EXPECT_EQ(BytesIn(ResultBody{.count = 0x0102, .metric = Metric::kCosine, .snapshot = 0x0304}),
            WireWriter().U16(0x0102).U8(1).U8(0).U32(0).U64(0x0304).Take());
  EXPECT_EQ(BytesIn(IntrospectBody{.what = IntrospectWhat::kStatus}), WireWriter().U8(2).Take());
  EXPECT_EQ(BytesIn(IntrospectionBody{.count = 0x0102, .what = IntrospectWhat::kStatus}),
            WireWriter().U16(0x0102).U8(2).U8(0).U32(0).Take());
  // hit
  HitHeader hit{.hit_bytes = 0x01020304,
                .score = 0.5F,
                .when_ns = 7,
                .stamp = 0x1112131415161718,
                .confidence = 0.25F,
                .payload_bytes = 0x05060708,
                .id_bytes = 0x090A,
                .flags = 1,
                .payload_kind = PayloadKind::kMemory,
                .vector_dimension = 0x0B0C,
                .space_bytes = 0x0D,
                .reserved = 0};
  EXPECT_EQ(BytesIn(hit), WireWriter()
                              .U32(0x01020304)
                              .F32(0.5F)
                              .U64(7)
                              .U64(0x1112131415161718)
                              .F32(0.25F)
                              .U32(0x05060708)
                              .U16(0x090A)
                              .U8(1)
                              .U8(2)
                              .U16(0x0B0C)
                              .U8(0x0D)
                              .U8(0)
                              .Take());
}

TEST(FrameFormatTest, RecordsArePaddedToEight) {
  for (size_t id = 1; id < 20; ++id) {
    const size_t bytes = RecordBytes(12, id, 5);
    EXPECT_EQ(bytes % 8, 0u);
    EXPECT_GE(bytes, 32 + 12 + id + 5);
    EXPECT_LT(bytes, 32 + 12 + id + 5 + 8);
  }
}

// A frame of two parts, with its header as sealed by the code under test.
struct SealedFrame {
  FrameHeader header;
  WireBytes bytes;
};
SealedFrame SealedExample() {
  SealedFrame frame;
  frame.header = {.type = FrameType::kRecall, .flags = 1, .session = 42, .sequence = 7};
  const std::array<std::span<const std::byte>, 2> parts{BytesOf(std::string_view("abc")),
                                                        BytesOf(std::string_view("defgh"))};
  SealFrame(&frame.header, parts);
  frame.bytes = WireWriter().Raw(BytesOf(frame.header)).Text("abcdefgh").Take();
  return frame;
}

TEST(FrameFormatTest, SealIsWhatThePageSays) {
  const SealedFrame frame = SealedExample();
  EXPECT_EQ(frame.header.length, 8u);
  const WireBytes oracle = MakeFrame(kWireRecall, {.flags = 1, .session = 42, .sequence = 7},
                                     WireWriter().Text("abcdefgh").Take());
  EXPECT_EQ(frame.bytes, oracle);
  WireBytes covered = oracle;
  covered.erase(covered.begin() + 12, covered.begin() + 16);
  EXPECT_EQ(frame.header.crc, BitwiseCrc(covered));
  FrameHeader read;
  EXPECT_EQ(CheckFrameHeader(frame.bytes.data(), &read), RefusalReason::kNone);
  EXPECT_EQ(BytesIn(read), BytesIn(frame.header));
  EXPECT_EQ(CheckFrameCrc(read, frame.bytes), RefusalReason::kNone);
}

TEST(FrameFormatTest, AnyFlippedBitIsCaught) {
  const SealedFrame frame = SealedExample();
  for (size_t bit = 0; bit < frame.bytes.size() * 8; ++bit) {
    WireBytes broken = frame.bytes;
    broken[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
    FrameHeader header;
    const RefusalReason first = CheckFrameHeader(broken.data(), &header);
    const size_t byte = bit / 8;
    if (byte < 4) {
      EXPECT_EQ(first, RefusalReason::kBadMagic) << bit;
    } else if (byte == 4) {
      EXPECT_EQ(first, RefusalReason::kBadVersion) << bit;
    } else if (byte == 10 && bit % 8 >= 5) {
      EXPECT_EQ(first, RefusalReason::kFrameTooLong) << bit;
    } else if (byte == 11) {
      EXPECT_EQ(first, RefusalReason::kFrameTooLong) << bit;
    } else {
      // A flipped length is caught because it is covered too, whatever else is in the buffer.
      EXPECT_EQ(CheckFrameCrc(header, broken), RefusalReason::kBadCrc) << bit;
    }
  }
}

TEST(FrameFormatTest, LengthIsBounded) {
  WireBytes bytes = MakeFrame(kWirePing, {});
  FrameHeader header;
  for (const auto& [length, reason] : std::initializer_list<std::pair<uint64_t, RefusalReason>>{
           {0, RefusalReason::kNone},
           {1'048'576, RefusalReason::kNone},
           {1'048'577, RefusalReason::kFrameTooLong},
           {0xFFFFFFFF, RefusalReason::kFrameTooLong},
           {0xFFFFFFE0, RefusalReason::kFrameTooLong}}) {
    SetWireNumber(bytes, 8, 4, length);
    EXPECT_EQ(CheckFrameHeader(bytes.data(), &header), reason) << length;
  }
}

TEST(FrameFormatTest, EveryOtherVersionIsRefused) {
  WireBytes bytes = MakeFrame(kWirePing, {});
  FrameHeader header;
  for (int version = 0; version < 256; ++version) {
    SetWireNumber(bytes, 4, 1, static_cast<uint64_t>(version));
    EXPECT_EQ(CheckFrameHeader(bytes.data(), &header),
              version == 1 ? RefusalReason::kNone : RefusalReason::kBadVersion);
  }
}

}  // namespace
}  // namespace engram
