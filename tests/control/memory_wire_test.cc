#include "src/control/memory_wire.h"

#include <string>
#include <string_view>

#include <gtest/gtest.h>

#include "engram/v1/service.pb.h"

namespace engram {
namespace {

// The fields of the bytes below: RememberRequest has memory_space_id 1 (text), memory 2, episode 3,
// auto_link 10; Episode has id 1 (text), embedding 4 (packed), who 11 (text).
std::string FaultOf(std::string_view bytes) {
  const std::string fault = WireFault(*v1::RememberRequest::descriptor(), bytes);
  v1::RememberRequest request;
  const bool read = request.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()));
  EXPECT_EQ(read, fault.empty()) << "protobuf thinks otherwise: " << fault;
  return fault;
}

std::string Sized(char tag, std::string_view bytes) {
  return std::string{tag, static_cast<char>(bytes.size())}.append(bytes);
}

TEST(MemoryWireTest, WhatProtobufReadsHasNoFault) {
  EXPECT_EQ(FaultOf(""), "");
  v1::RememberRequest request;
  request.set_memory_space_id("space");
  request.mutable_episode()->set_id("köln");
  for (int i = 0; i < 300; ++i) request.mutable_episode()->add_embedding(0.5F);
  request.mutable_episode()->mutable_when()->set_seconds(-1);
  request.mutable_episode()->set_importance(1);
  request.set_auto_link(true);
  EXPECT_EQ(FaultOf(request.SerializeAsString()), "");
  // Fields that nobody knows, and a known one of another type: protobuf passes over them.
  EXPECT_EQ(FaultOf("\x82\x7d\x01x"), "");
  EXPECT_EQ(FaultOf("\x08\x01"), "");
  EXPECT_EQ(FaultOf(Sized(0x5a, "three")), "") << "link_threshold is one number, not several";
}

TEST(MemoryWireTest, TextThatIsNoUtf8IsNamed) {
  EXPECT_EQ(FaultOf(Sized(0x0a, "ab\xff")),
            "memory_space_id: byte 2 is 0xff, which is no UTF-8 there; expected text in UTF-8");
  EXPECT_EQ(FaultOf(Sized(0x1a, Sized(0x0a, "\xc3"))),
            "episode.id: byte 0 is 0xc3, which is no UTF-8 there; expected text in UTF-8");
  EXPECT_EQ(FaultOf(Sized(0x1a, Sized(0x5a, "Ada") + Sized(0x5a, "\xed\xa0\x80"))),
            "episode.who[1]: byte 0 is 0xed, which is no UTF-8 there; expected text in UTF-8");
  // Metadata is a map: entries with key 1 and value 2.
  EXPECT_EQ(FaultOf(Sized(0x12, Sized(0x5a, Sized(0x0a, "key") + Sized(0x12, "\x80")))),
            "memory.metadata[0].value: byte 0 is 0x80, which is no UTF-8 there; expected text in "
            "UTF-8");
}

TEST(MemoryWireTest, WhatIsCutOrMisshapenIsNamed) {
  EXPECT_EQ(FaultOf("\x0a\x05"
                    "ab"),
            "memory_space_id: its length is beyond the message's end; expected a whole message");
  EXPECT_EQ(FaultOf(Sized(0x1a,
                          "\x0a\x05"
                          "ab") +
                    "\x0a\x05"
                    "abcde"),
            "episode.id: its length is beyond the message's end; expected a whole message");
  EXPECT_EQ(FaultOf("\x0a\xff\xff\xff\xff\x0f"),
            "memory_space_id: its length is beyond the message's end; expected a whole message");
  EXPECT_EQ(FaultOf(Sized(0x1a, Sized(0x22, "12345"))),
            "episode.embedding: 5 bytes; expected 4 for each number");
  EXPECT_EQ(FaultOf(std::string_view("\x50", 1)),
            "auto_link: ends before it is whole; expected a field as protobuf writes it");
  EXPECT_EQ(FaultOf(Sized(0x1a, std::string_view("\xa5\x01\0\0", 4))),
            "episode.decay_rate: ends before it is whole; expected a field as protobuf writes it");
  EXPECT_EQ(FaultOf(std::string_view("\x8a\x80\x80\x80\x80\x00\x00", 7)),
            "tag: no number of a field; expected a field as protobuf writes it")
      << "a tag of 6 bytes";
  EXPECT_EQ(FaultOf("\xff\xff\xff"),
            "tag: no number of a field; expected a field as protobuf writes it");
  EXPECT_EQ(FaultOf(Sized(0x1a, std::string_view("\0", 1))),
            "episode.tag: no number of a field; expected a field as protobuf writes it");
  // memory_types of a recall's filter, packed.
  const auto fault_of_types = [](std::string_view numbers) {
    return WireFault(*v1::RecallRequest::descriptor(), "\xca" + Sized(0x06, Sized(0x32, numbers)));
  };
  EXPECT_EQ(fault_of_types("\x01\x02\xff\x01"), "");
  EXPECT_EQ(fault_of_types("\x01\xff"),
            "filter.memory_types: a number ends before it is whole; expected whole numbers");
  EXPECT_EQ(FaultOf("\x0c"),
            "memory_space_id: ends before it is whole; expected a field as "
            "protobuf writes it");
}

}  // namespace
}  // namespace engram
