#include "src/control/memory_codec.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include <google/protobuf/message.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

namespace engram {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::util::MessageDifferencer;

// Sets every field of `message` to something that is not its default, also those that somebody adds
// later: so none is forgotten on the way.
void FillAll(Message* message) {
  const auto* descriptor = message->GetDescriptor();
  const auto* reflection = message->GetReflection();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    const int number = field->number();
    if (field->is_map()) {
      Message* entry = reflection->AddMessage(message, field);
      FillAll(entry);
      continue;
    }
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_STRING: {
        const std::string text = "field " + std::to_string(number);
        if (field->is_repeated()) {
          reflection->AddString(message, field, text);
          reflection->AddString(message, field, text + "b");
        } else {
          reflection->SetString(message, field, text);
        }
        break;
      }
      case FieldDescriptor::CPPTYPE_FLOAT:
        if (field->is_repeated()) {
          reflection->AddFloat(message, field, 0.5F);
        } else {
          reflection->SetFloat(message, field, static_cast<float>(number) / 128);
        }
        break;
      case FieldDescriptor::CPPTYPE_INT64:
        reflection->SetInt64(message, field, number);
        break;
      case FieldDescriptor::CPPTYPE_INT32:
        reflection->SetInt32(message, field, number);
        break;
      case FieldDescriptor::CPPTYPE_BOOL:
        reflection->SetBool(message, field, true);
        break;
      case FieldDescriptor::CPPTYPE_ENUM:
        reflection->SetEnumValue(message, field, 1);
        break;
      case FieldDescriptor::CPPTYPE_MESSAGE:
        FillAll(reflection->MutableMessage(message, field));
        break;
      default:
        FAIL() << "a field of a kind that this test does not know: " << field->full_name();
    }
  }
}

std::string HitOf(PayloadKind kind, std::string_view id, std::string_view payload,
                  const std::vector<float>& vector = {}) {
  HitHeader header{};
  header.score = 0.5F;
  header.when_ns = -1;
  header.confidence = 0.9F;
  header.payload_bytes = static_cast<uint32_t>(payload.size());
  header.id_bytes = static_cast<uint16_t>(id.size());
  header.payload_kind = kind;
  header.vector_dimension = static_cast<uint16_t>(vector.size());
  const size_t bytes = sizeof(header) + vector.size() * sizeof(float) + id.size() + payload.size();
  header.hit_bytes = static_cast<uint32_t>(PadTo8(bytes));
  std::string hit(reinterpret_cast<const char*>(&header), sizeof(header));
  hit.append(reinterpret_cast<const char*>(vector.data()), vector.size() * sizeof(float));
  hit.append(id).append(payload);
  hit.resize(header.hit_bytes);
  return hit;
}

v1::Memory Decoded(const std::string& bytes) {
  HitReader reader(std::as_bytes(std::span(bytes)));
  const auto hit = reader.Next();
  v1::Memory memory;
  EXPECT_TRUE(hit);
  if (hit) ToMemory(*hit, &memory);
  EXPECT_FALSE(reader.Next());
  return memory;
}

TEST(MemoryCodecTest, AnEpisodesPayloadLacksOnlyWhatTheShardKeeps) {
  v1::Episode episode;
  FillAll(&episode);
  v1::Episode kept;
  ASSERT_TRUE(kept.ParseFromString(PayloadOf(episode)));
  EXPECT_EQ(kept.id(), "");
  EXPECT_FALSE(kept.has_when());
  EXPECT_EQ(kept.embedding_size(), 0);
  episode.clear_id();
  episode.clear_when();
  episode.clear_embedding();
  EXPECT_TRUE(MessageDifferencer::Equals(kept, episode)) << kept.DebugString();
}

TEST(MemoryCodecTest, AMemorysPayloadLacksOnlyWhatTheShardKeeps) {
  v1::Memory memory;
  FillAll(&memory);
  v1::Memory kept;
  ASSERT_TRUE(kept.ParseFromString(PayloadOf(memory)));
  memory.clear_id();
  memory.clear_embedding();
  // Of answers only.
  memory.clear_id_bytes();
  memory.clear_content_omitted();
  memory.clear_memory_space_id();
  EXPECT_TRUE(MessageDifferencer::Equals(kept, memory)) << kept.DebugString();
}

TEST(MemoryCodecTest, AMemoryComesBackWithWhatTheShardSaysOfIt) {
  v1::Memory stored;
  FillAll(&stored);
  const v1::Memory memory =
      Decoded(HitOf(PayloadKind::kMemory, "the id", PayloadOf(stored), {1, -2}));
  EXPECT_EQ(memory.id(), "the id");
  EXPECT_EQ(memory.content(), stored.content());
  EXPECT_EQ(memory.metadata().size(), 1u);
  EXPECT_EQ(memory.tags_size(), 2);
  EXPECT_EQ(memory.activation(), 0);
  EXPECT_EQ(memory.confidence().value(), 0.9F);
  EXPECT_EQ(memory.confidence().category(), v1::CONFIDENCE_CATEGORY_HIGH);
  EXPECT_EQ(memory.confidence().reasoning(), stored.confidence().reasoning());
  EXPECT_EQ(memory.created_at().seconds(), -1);
  EXPECT_EQ(memory.created_at().nanos(), 999'999'999);
  ASSERT_EQ(memory.embedding_size(), 2);
  EXPECT_EQ(memory.embedding(0), 1);
  EXPECT_EQ(memory.embedding(1), -2);
}

TEST(MemoryCodecTest, AnEpisodeComesBackAsAMemory) {
  v1::Episode episode;
  FillAll(&episode);
  const v1::Memory memory = Decoded(HitOf(PayloadKind::kEpisode, "e", PayloadOf(episode)));
  EXPECT_EQ(memory.id(), "e");
  EXPECT_EQ(memory.content(), "field 3");
  EXPECT_EQ(memory.memory_type(), v1::MEMORY_TYPE_EPISODIC);
  EXPECT_EQ(memory.decay_rate(), episode.decay_rate());
  EXPECT_EQ(memory.metadata().at("where_location"), "field 10");
  EXPECT_EQ(memory.metadata().at("who"), "field 11, field 11b");
  EXPECT_EQ(memory.metadata().at("why"), "field 12");
  EXPECT_EQ(memory.metadata().at("how"), "field 13");
  EXPECT_EQ(memory.metadata().at("emotional_valence"), "0.1640625");
  EXPECT_EQ(memory.metadata().at("importance"), "0.171875");
  EXPECT_EQ(memory.metadata().at("consolidation_state"), "CONSOLIDATION_STATE_RECENT");
  EXPECT_EQ(memory.last_access().seconds(), 1);
  EXPECT_EQ(memory.embedding_size(), 0);
  // An episode that says nothing has no metadata.
  EXPECT_TRUE(
      Decoded(HitOf(PayloadKind::kEpisode, "e", PayloadOf(v1::Episode()))).metadata().empty());
}

// Native clients may write any bytes; protobuf's strings may not have them.
TEST(MemoryCodecTest, BytesThatAreNoTextGoIntoBytesFields) {
  const v1::Memory text = Decoded(HitOf(PayloadKind::kOpaque, "id", "Grüße ☂ \xF0\x9F\x98\x80"));
  EXPECT_EQ(text.content(), "Grüße ☂ \xF0\x9F\x98\x80");
  EXPECT_EQ(text.payload(), "");
  for (const std::string_view bad : {"\xFF", "a\x80", "\xC3", "\xC0\x80", "\xE0\x80\x80",
                                     "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE2\x98", "\xC3x"}) {
    const v1::Memory memory = Decoded(HitOf(PayloadKind::kOpaque, bad, bad));
    EXPECT_EQ(memory.content(), "");
    EXPECT_EQ(memory.payload(), bad);
    EXPECT_EQ(memory.id(), "");
    EXPECT_EQ(memory.id_bytes(), bad);
  }
}

// Native clients say of what kind a payload is, and nobody has looked into it.
TEST(MemoryCodecTest, APayloadThatIsNotOfItsKindIsHandedOutAsItIs) {
  // Cut off, a length beyond the end, a wire type that is none; in field 10, which both have as a
  // text: no UTF-8, and one that is sound before one that is cut off.
  for (const std::string_view bad :
       {"\x1a", "\x1a\xff", "\x1f", "\x52\x01\xff", "\x52\x02ok\x52\x09no"}) {
    for (const PayloadKind kind : {PayloadKind::kEpisode, PayloadKind::kMemory}) {
      const v1::Memory memory = Decoded(HitOf(kind, "e", bad));
      EXPECT_EQ(memory.payload(), bad);
      EXPECT_EQ(memory.content(), "");
      EXPECT_TRUE(memory.metadata().empty());
      EXPECT_EQ(memory.id(), "e");
      EXPECT_EQ(memory.confidence().value(), 0.9F);
      std::string sent;
      EXPECT_TRUE(memory.SerializeToString(&sent));
      EXPECT_TRUE(v1::Memory().ParseFromString(sent)) << "the answer can be read";
    }
  }
}

TEST(MemoryCodecTest, WhatAnswersAloneSayIsNotTakenFromAPayload) {
  v1::Memory forged;
  FillAll(&forged);
  const v1::Memory memory =
      Decoded(HitOf(PayloadKind::kMemory, "the id", forged.SerializeAsString()));
  EXPECT_EQ(memory.content(), forged.content());
  EXPECT_EQ(memory.id(), "the id");
  EXPECT_EQ(memory.id_bytes(), "");
  EXPECT_EQ(memory.embedding_size(), 0);
  EXPECT_FALSE(memory.content_omitted());
  EXPECT_EQ(memory.memory_space_id(), "");
}

TEST(MemoryCodecTest, HitsAreReadOneAfterTheOther) {
  const std::string bytes = HitOf(PayloadKind::kOpaque, "one", "1") +
                            HitOf(PayloadKind::kOpaque, "second", "", {1, 2, 3}) +
                            HitOf(PayloadKind::kOpaque, "3", "three");
  HitReader reader(std::as_bytes(std::span(bytes)));
  EXPECT_EQ(reader.Next()->payload, "1");
  const HitView second = reader.Next().value();
  EXPECT_EQ(second.id, "second");
  EXPECT_EQ(second.header.vector_dimension, 3);
  EXPECT_EQ(reader.Next()->payload, "three");
  EXPECT_FALSE(reader.Next());
}

TEST(MemoryCodecTest, TimesGoThereAndBack) {
  for (const int64_t unix_ns : {int64_t{0}, int64_t{1}, int64_t{-1}, int64_t{-1'000'000'000},
                                int64_t{-1'500'000'000}, int64_t{1'700'000'000'123'456'789}}) {
    const auto time = ToTimestamp(unix_ns);
    EXPECT_GE(time.nanos(), 0);
    EXPECT_EQ(ToUnixNs(time), unix_ns);
  }
  google::protobuf::Timestamp time;
  time.set_nanos(1'000'000'000);
  EXPECT_FALSE(ToUnixNs(time));
  time.set_nanos(-1);
  EXPECT_FALSE(ToUnixNs(time));
  time.set_nanos(999'999'999);
  for (const int64_t seconds : {INT64_MAX, INT64_MIN, INT64_MAX / 1'000'000'000}) {
    time.set_seconds(seconds);
    EXPECT_FALSE(ToUnixNs(time)) << seconds;
  }
}

TEST(MemoryCodecTest, ConfidenceAndItsCategory) {
  EXPECT_EQ(CategoryOf(0), v1::CONFIDENCE_CATEGORY_NONE);
  EXPECT_EQ(CategoryOf(0.09F), v1::CONFIDENCE_CATEGORY_NONE);
  EXPECT_EQ(CategoryOf(0.1F), v1::CONFIDENCE_CATEGORY_LOW);
  EXPECT_EQ(CategoryOf(0.5F), v1::CONFIDENCE_CATEGORY_MEDIUM);
  EXPECT_EQ(CategoryOf(0.9F), v1::CONFIDENCE_CATEGORY_HIGH);
  EXPECT_EQ(CategoryOf(0.999F), v1::CONFIDENCE_CATEGORY_HIGH);
  EXPECT_EQ(CategoryOf(1), v1::CONFIDENCE_CATEGORY_CERTAIN);
  v1::Confidence confidence;
  EXPECT_EQ(ValueOf(confidence), 0);
  confidence.set_category(v1::CONFIDENCE_CATEGORY_MEDIUM);
  EXPECT_EQ(ValueOf(confidence), 0.5F);
  confidence.set_value(0.2F);
  EXPECT_EQ(ValueOf(confidence), 0.2F) << "the value goes first";
}

TEST(MemoryCodecTest, Similarity) {
  EXPECT_EQ(SimilarityOf(Metric::kCosine, 0.25F), 0.25F);
  EXPECT_EQ(SimilarityOf(Metric::kCosine, 1.0000001F), 1);
  EXPECT_EQ(SimilarityOf(Metric::kInnerProduct, 7), 1);
  EXPECT_EQ(SimilarityOf(Metric::kInnerProduct, -7), -7);
  EXPECT_EQ(SimilarityOf(Metric::kL2, 0), 1);
  EXPECT_EQ(SimilarityOf(Metric::kL2, 3), 0.25F);
}

}  // namespace
}  // namespace engram
