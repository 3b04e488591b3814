// Requests as a hostile client might write them, from a seed: bytes to protobuf, to a question of
// the gateway core, to what a client is told. Whatever comes in, a question keeps to the bounds
// that the shards rely on, and a refusal has words. A check of this kind stands here and not in
// tests/fuzz/ because protobuf is not part of the engine, which is all that the fuzz tree builds.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include <google/protobuf/stubs/logging.h>
#include <gtest/gtest.h>

#include "dataplane/admission_gate.h"
#include "engram/v1/service.pb.h"
#include "src/control/memory_calls.h"
#include "src/control/memory_codec.h"
#include "src/control/memory_wire.h"
#include "src/core/attributes.h"
#include "src/core/hash.h"

namespace engram {
namespace {

using std::string_view_literals::operator""sv;

constexpr int kInputsOfKind = 40'000;  // four kinds

// ---- Requests to begin with ----

std::vector<std::string> RememberSeeds() {
  v1::RememberRequest episode;
  episode.set_memory_space_id("space-1");
  v1::Episode* e = episode.mutable_episode();
  e->set_id("an id");
  e->mutable_when()->set_seconds(1'700'000'000);
  e->set_what("what ☂");
  for (int i = 0; i < 6; ++i) e->add_embedding(static_cast<float>(i));
  e->mutable_encoding_confidence()->set_value(0.5F);
  e->add_who("Ada");
  e->add_who("Grace");
  e->set_importance(0.25F);
  e->set_consolidation_state(v1::CONSOLIDATION_STATE_RECENT);
  e->mutable_last_replay()->set_nanos(7);
  v1::RememberRequest memory;
  v1::Memory* m = memory.mutable_memory();
  m->add_embedding(-1);
  m->set_content("content");
  (*m->mutable_metadata())["key"] = "value";
  (*m->mutable_metadata())["source"] = "docs";
  m->add_tags("tag");
  m->mutable_confidence()->set_category(v1::CONFIDENCE_CATEGORY_HIGH);
  m->mutable_created_at()->set_seconds(-1);
  m->set_payload("\xff\x01");
  m->set_memory_type(v1::MEMORY_TYPE_SEMANTIC);
  // At the edges: the longest vector, one number more, the longest id, one byte more, nearly the
  // largest payload, and a little too large a one.
  v1::RememberRequest longest = episode;
  longest.mutable_episode()->set_id(std::string(kMaxIdBytes, 'i'));
  longest.mutable_episode()->mutable_embedding()->Resize(kMaxDimension, 1);
  v1::RememberRequest longer = longest;
  longer.mutable_episode()->add_embedding(1);
  v1::RememberRequest long_id = episode;
  long_id.mutable_episode()->set_id(std::string(kMaxIdBytes + 1, 'i'));
  v1::RememberRequest large = memory;
  large.mutable_memory()->set_content(std::string(kMaxPayloadBytes - 60, 'c'));
  v1::RememberRequest larger = memory;
  larger.mutable_memory()->set_content(std::string(kMaxPayloadBytes - 30, 'c'));
  v1::RememberRequest many_tags = memory;
  for (int i = 0; i < 61; ++i) many_tags.mutable_memory()->add_tags(std::string(70, 't'));
  v1::RememberRequest long_place = episode;
  long_place.mutable_episode()->set_where_location(std::string(256, 'w'));
  return {
      episode.SerializeAsString(), memory.SerializeAsString(),    longest.SerializeAsString(),
      longer.SerializeAsString(),  long_id.SerializeAsString(),   large.SerializeAsString(),
      larger.SerializeAsString(),  many_tags.SerializeAsString(), long_place.SerializeAsString()};
}

std::vector<std::string> RecallSeeds() {
  v1::RecallRequest cue;
  cue.set_memory_space_id("default");
  for (int i = 0; i < 4; ++i) cue.mutable_cue()->mutable_embedding()->add_vector(1);
  cue.mutable_cue()->mutable_embedding()->set_similarity_threshold(0.5F);
  cue.mutable_cue()->mutable_threshold()->set_value(0.1F);
  cue.mutable_cue()->set_max_results(7);
  cue.set_max_results(1'000);
  cue.set_ef_search(10'000);
  cue.set_snapshot_isolation(true);
  v1::Filter* filter = cue.mutable_filter();
  filter->mutable_time_start()->set_seconds(1'700'000'000);
  filter->add_required_tags("tag");
  filter->add_excluded_tags("old");
  filter->add_memory_types(v1::MEMORY_TYPE_SEMANTIC);
  filter->add_metadata()->set_key("source");
  filter->mutable_metadata(0)->add_values("docs");
  cue.mutable_context()->set_location("Köln");
  cue.mutable_context()->add_participants("Ada");
  v1::RecallRequest no_cue = cue;
  no_cue.clear_cue();
  v1::RecallRequest unknown_key = cue;
  unknown_key.mutable_filter()->mutable_metadata(0)->set_key("nobody");
  v1::RecallRequest many_tags = cue;
  for (int i = 0; i < 13; ++i) many_tags.mutable_filter()->add_required_tags("t");
  v1::RecallRequest bare;
  bare.mutable_cue()->mutable_embedding()->add_vector(1);
  v1::RecallRequest ids;
  for (int i = 0; i < 100; ++i) ids.add_ids("id" + std::to_string(i));
  v1::RecallRequest scroll;
  scroll.mutable_scroll()->set_limit(1'000);
  scroll.mutable_scroll()->set_cursor("ff.123456789abcdef0");
  v1::RecallRequest context;
  context.mutable_cue()->mutable_context()->set_location("Köln");
  return {cue.SerializeAsString(),       bare.SerializeAsString(),
          ids.SerializeAsString(),       scroll.SerializeAsString(),
          context.SerializeAsString(),   unknown_key.SerializeAsString(),
          many_tags.SerializeAsString(), no_cue.SerializeAsString()};
}

std::vector<std::string> ForgetSeeds() {
  v1::ForgetRequest id;
  id.set_memory_space_id("a");
  id.set_memory_id("m");
  id.set_mode(v1::FORGET_MODE_OVERWRITE);
  v1::ForgetRequest restore = id;
  restore.set_mode(v1::FORGET_MODE_SUPPRESS);
  restore.set_restore(true);
  v1::ForgetRequest pattern;
  pattern.mutable_pattern()->mutable_semantic()->set_query("q");
  return {id.SerializeAsString(), restore.SerializeAsString(), pattern.SerializeAsString()};
}

std::vector<std::string> IntrospectSeeds() {
  v1::IntrospectRequest request;
  request.set_memory_space_id("a");
  for (int i = 0; i < 999; ++i) request.add_metrics("m");
  v1::IntrospectRequest few = request;
  few.clear_metrics();
  few.add_metrics("space.observations");
  few.set_include_health(true);
  v1::IntrospectRequest all;
  return {few.SerializeAsString(), all.SerializeAsString(), request.SerializeAsString()};
}

// ---- Mutations ----

// Fields by themselves, to be put anywhere: protobuf takes the last one of several.
constexpr std::string_view kPieces[] = {
    "\x0a\x00"sv,                                      // field 1, empty
    "\x0a\x01\xff"sv,                                  // field 1, no UTF-8
    "\x0a\x03\xed\xa0\x80"sv,                          // field 1, a surrogate
    "\x22\x04\x00\x00\xc0\x7f"sv,                      // field 4, a NaN
    "\x22\x04\x00\x00\x80\x7f"sv,                      // field 4, an infinity
    "\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"sv,  // field 1, -1
    "\x50\xe9\x07"sv,                                  // field 10, 1001
    "\x50\x4d"sv,                                      // field 10, 77
    "\xb8\x06\xff\xff\xff\xff\x0f"sv,                  // field 103, the greatest
    "\xf0\x01\x4d"sv,                                  // field 30, 77
    "\x2d\x00\x00\xc0\x7f"sv,                          // field 5, a NaN
    "\x22\x05\x0d\x00\x00\xc0\x7f"sv,                  // field 4, a message with a NaN
    "\x12\x00"sv,
    "\x1a\x00"sv,
    "\x52\x00"sv,
    "\xaa\x06\x00"sv,
    "\x0b\x0c"sv,
    "\xff\xff\xff\xff\x0f"sv,
};

std::string Mutated(const std::vector<std::string>& seeds, SplitMix64* random) {
  // The large ones seldom, for speed.
  const size_t small = 1 + random->Below(2);
  std::string bytes =
      seeds[random->Below(random->Below(20) == 0 ? seeds.size() : std::min(small, seeds.size()))];
  for (uint64_t left = random->Below(4); left > 0; --left) {
    const size_t at = random->Below(bytes.size() + 1);
    const std::string_view piece = kPieces[random->Below(std::size(kPieces))];
    switch (random->Below(9)) {
      case 0:
        if (at < bytes.size()) bytes[at] = static_cast<char>(random->Next());
        break;
      case 1:
        if (at < bytes.size()) bytes[at] ^= static_cast<char>(1 << random->Below(8));
        break;
      case 2:
        bytes.resize(at);
        break;
      case 3:
        bytes.erase(at, random->Below(8));
        break;
      case 4:
        bytes.insert(at, piece);
        break;
      case 5:  // two requests in one
        bytes += seeds[random->Below(std::min<size_t>(seeds.size(), 2))];
        break;
      case 6: {  // the piece within the first message, with the right length
        const char tag = "\x12\x1a"[random->Below(2)];
        bytes += std::string{tag, static_cast<char>(piece.size())}.append(piece);
        break;
      }
      case 7:
        bytes += std::string("\x0a")
                     .append(1, static_cast<char>(random->Below(70)))
                     .append(random->Below(70), "aZ-_.9"[random->Below(6)]);
        break;
      default:
        bytes.append(piece);
    }
  }
  return bytes;
}

// ---- What must hold ----

void ExpectId(std::string_view id) {
  ASSERT_GE(id.size(), 1u);
  ASSERT_LE(id.size(), kMaxIdBytes);
}

void ExpectVector(const GatewayQuestion& question) {
  ASSERT_GE(question.vector.dimension, 1u);
  ASSERT_LE(question.vector.dimension, kMaxDimension);
}

// As the gateway core does it: the gate looks at the numbers.
void ExpectAdmittable(const GatewayQuestion& question) {
  const bool upsert = question.op == ObservationOp::kUpsert;
  const ObservationView view{.op = question.op,
                             .dtype = upsert ? VectorDtype::kF32 : VectorDtype::kNone,
                             .dimension = static_cast<uint16_t>(question.vector.dimension),
                             .confidence = question.confidence,
                             .when_ns = question.when_ns,
                             .vector = question.vector.bytes,
                             .id = question.id,
                             .attributes = std::as_bytes(std::span(question.attributes)),
                             .payload = std::as_bytes(std::span(question.payload))};
  alignas(64) static std::byte slot[kMaxSlotBytes];
  ASSERT_LE(SlotBytesFor(view), sizeof(slot));
  const RefusalReason reason = AdmitObservation(view, {.metric = Metric::kCosine}, slot);
  ASSERT_TRUE(reason == RefusalReason::kNone || reason == RefusalReason::kNotFinite ||
              reason == RefusalReason::kZeroVector)
      << DescribeRefusal(reason).name << ": the codec lets nothing else through";
}

// What was taken can be handed out: a client reads the answer.
void ExpectReadable(const GatewayQuestion& question) {
  HitHeader header{};
  header.payload_bytes = static_cast<uint32_t>(question.payload.size());
  header.id_bytes = static_cast<uint16_t>(question.id.size());
  header.payload_kind = question.payload_kind;
  header.when_ns = question.when_ns;
  header.confidence = question.confidence;
  header.hit_bytes =
      static_cast<uint32_t>(PadTo8(sizeof(header) + question.id.size() + question.payload.size()));
  std::string bytes(reinterpret_cast<const char*>(&header), sizeof(header));
  bytes.append(question.id).append(question.payload);
  bytes.resize(header.hit_bytes);
  HitReader reader(std::as_bytes(std::span(bytes)));
  v1::RecallResponse response;
  ToMemory(reader.Next().value(), response.add_memories());
  v1::RecallResponse read;
  ASSERT_TRUE(read.ParseFromString(response.SerializeAsString()));
  const v1::Memory& memory = read.memories(0);
  ASSERT_EQ(memory.id(), question.id);
  ASSERT_TRUE(std::isfinite(memory.decay_rate()));
  ASSERT_TRUE(memory.created_at().nanos() >= 0 && memory.last_access().nanos() >= 0);
}

void ExpectBounds(const GatewayQuestion& question) {
  switch (question.kind) {
    case CallKind::kObserve:
      ASSERT_NO_FATAL_FAILURE(ExpectId(question.id));
      ASSERT_LE(question.payload.size(), kMaxPayloadBytes);
      ASSERT_TRUE(question.confidence >= 0 && question.confidence <= 1) << question.confidence;
      if (question.op == ObservationOp::kUpsert) {
        ASSERT_NO_FATAL_FAILURE(ExpectVector(question));
        ASSERT_NO_FATAL_FAILURE(ExpectReadable(question));
      } else {
        ASSERT_TRUE(question.op == ObservationOp::kDelete ||
                    question.op == ObservationOp::kSuppress ||
                    question.op == ObservationOp::kRestore);
        ASSERT_TRUE(question.vector.empty() && question.payload.empty());
      }
      ASSERT_NO_FATAL_FAILURE(ExpectAdmittable(question));
      break;
    case CallKind::kRecall:
      // Without a vector there is a filter.
      if (!question.vector.empty() || question.filter.empty()) {
        ASSERT_NO_FATAL_FAILURE(ExpectVector(question));
      }
      ASSERT_FALSE(question.vector.empty() && question.across);
      ASSERT_TRUE(question.k >= 1 && question.k <= kMaxPageResults) << question.k;
      ASSERT_LE(question.ef, kMaxEf);
      ASSERT_EQ(CheckFilter(std::as_bytes(std::span(question.filter))), RefusalReason::kNone);
      break;
    case CallKind::kGet:
      ASSERT_TRUE(!question.ids.empty() && question.ids.size() <= 100);
      for (const std::string_view id : question.ids) ASSERT_NO_FATAL_FAILURE(ExpectId(id));
      break;
    case CallKind::kScroll:
      ASSERT_TRUE(question.limit >= 1 && question.limit <= kMaxPageResults) << question.limit;
      break;
    case CallKind::kIntrospect:
      break;
  }
}

// A refusal names a field, has an expectation, and can be sent.
void ExpectWords(const std::string& message) {
  const size_t colon = message.find(": ");
  ASSERT_TRUE(colon != std::string::npos && colon > 0) << message;
  ASSERT_TRUE(message.find("; ", colon) != std::string::npos) << message;
  ASSERT_EQ(Utf8Prefix(message), message.size());
  ASSERT_LT(message.size(), 700u);
}

const std::vector<std::string> kFilterKeys{"source", "lang"};

Asked Ask(const v1::RememberRequest& request, CallText* text, GatewayQuestion* question) {
  return AskRemember(request, 1, kFilterKeys, text, question);
}
Asked Ask(const v1::RecallRequest& request, CallText* text, GatewayQuestion* question) {
  RecallLimits limits;
  Asked asked = AskRecall(request, kFilterKeys, text, &limits, question);
  if (asked) {
    EXPECT_TRUE(std::isfinite(limits.least_similarity));
    EXPECT_TRUE(limits.least_confidence >= 0 && limits.least_confidence <= 1);
  }
  return asked;
}
Asked Ask(const v1::ForgetRequest& request, CallText*, GatewayQuestion* question) {
  return AskForget(request, question);
}
Asked Ask(const v1::IntrospectRequest& request, CallText*, GatewayQuestion* question) {
  return AskIntrospect(request, question);
}

struct Tally {
  int unreadable = 0;
  int refused = 0;
  int taken = 0;
  std::map<std::string, int> fields;  // refused because of
};

template <typename Request>
void Try(const std::string& bytes, Tally* tally) {
  Request request;
  const bool read = request.ParseFromString(bytes);
  const std::string fault = WireFault(*Request::descriptor(), bytes);
  ASSERT_EQ(read, fault.empty()) << "protobuf thinks otherwise: " << fault;
  if (!read) {
    ++tally->unreadable;
    ASSERT_NO_FATAL_FAILURE(ExpectWords(fault));
    return;
  }
  CallText text;
  GatewayQuestion question;
  const auto space = SpaceOfCall(request.memory_space_id(), "");
  Asked asked;
  if (space) {
    ASSERT_TRUE(IsValidSpaceName(space->view())) << space->view();
    asked = Ask(request, &text, &question);
  } else {
    asked = std::unexpected(space.error());
  }
  if (!asked) {
    ++tally->refused;
    ++tally->fields[asked.error().message.substr(0, asked.error().message.find(": "))];
    ASSERT_NO_FATAL_FAILURE(ExpectWords(asked.error().message));
    return;
  }
  ++tally->taken;
  ASSERT_NO_FATAL_FAILURE(ExpectBounds(question));
}

template <typename Request>
Tally TryMany(const std::vector<std::string>& seeds) {
  google::protobuf::SetLogHandler(nullptr);
  Tally tally;
  for (uint64_t seed = 0; seed < kInputsOfKind; ++seed) {
    SplitMix64 random(seed);
    const std::string bytes = Mutated(seeds, &random);
    Try<Request>(bytes, &tally);
    if (testing::Test::HasFatalFailure()) {
      ADD_FAILURE() << "seed " << seed;
      break;
    }
  }
  // Each way is taken often.
  EXPECT_GT(tally.unreadable, kInputsOfKind / 50);
  EXPECT_GT(tally.refused, kInputsOfKind / 1000);
  EXPECT_GT(tally.taken, kInputsOfKind / 20);
  return tally;
}

TEST(MemoryMutationsTest, Remember) {
  const Tally tally = TryMany<v1::RememberRequest>(RememberSeeds());
  for (const char* field :
       {"memory_space_id", "episode.id", "episode.embedding", "memory.embedding",
        "episode.encoding_confidence.value", "episode.consolidation_state",
        "memory.confidence.value", "episode.where_location", "memory.tags[57]"}) {
    EXPECT_TRUE(tally.fields.contains(field)) << field;
  }
}

TEST(MemoryMutationsTest, Recall) {
  const Tally tally = TryMany<v1::RecallRequest>(RecallSeeds());
  for (const char* field :
       {"cue.cue_type", "max_results", "ef_search", "cue.embedding.vector", "cue",
        "cue, ids, scroll", "scroll.cursor", "filter", "filter.metadata[0].key"}) {
    EXPECT_TRUE(tally.fields.contains(field)) << field;
  }
}

TEST(MemoryMutationsTest, Forget) {
  const Tally tally = TryMany<v1::ForgetRequest>(ForgetSeeds());
  for (const char* field : {"memory_id", "pattern", "mode", "target"}) {
    EXPECT_TRUE(tally.fields.contains(field)) << field;
  }
}

TEST(MemoryMutationsTest, Introspect) {
  const Tally tally = TryMany<v1::IntrospectRequest>(IntrospectSeeds());
  EXPECT_TRUE(tally.fields.contains("memory_space_id"));
}

// What a client's library may put into a header: bytes that are no text.
TEST(MemoryMutationsTest, SpaceNamesFromMetadata) {
  SplitMix64 random(1);
  for (int i = 0; i < 20'000; ++i) {
    std::string name(random.Below(100), 'a');
    for (char& c : name) {
      if (random.Below(8) == 0) c = static_cast<char>(random.Next());
    }
    const auto space = SpaceOfCall("", name);
    if (space) {
      ASSERT_TRUE(IsValidSpaceName(space->view()));
    } else {
      ASSERT_NO_FATAL_FAILURE(ExpectWords(space.error().message));
    }
    if (!name.empty() && name != "other") {
      ASSERT_NO_FATAL_FAILURE(ExpectWords(SpaceOfCall("other", name).error().message));
    }
  }
}

}  // namespace
}  // namespace engram
