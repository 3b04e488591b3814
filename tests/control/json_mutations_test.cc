// Texts as a hostile client might send them, from a seed: what is JSON is read and what is not is
// refused, as nlohmann-json, another reader altogether, says; whatever is read becomes a question
// within the bounds that the shards rely on, or a refusal with words. As with
// memory_mutations_test, it stands here and not in tests/fuzz/ because protobuf is not part of the
// engine.

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "src/control/memory_calls.h"
#include "src/control/memory_codec.h"
#include "src/core/attributes.h"
#include "src/core/hash.h"
#include "tests/control/json_testing.h"

namespace engram {
namespace {

constexpr int kInputs = 120'000;

const std::vector<std::string>& Seeds() {
  static const std::vector<std::string> seeds = {
      R"({"type":"init","memory_space_id":"films","client_buffer_size":7,"priority":"high"})",
      R"({"type":"observation","session_id":"0123456789abcdef","sequence_number":1,"episode":{)"
      R"("id":"x","when":"2026-03-01T12:00:00.5+02:00","what":"a \"b\" \u00e9\ud83d\ude00 ☂",)"
      R"("embedding":[1,-2.5,3e-2,0],"encoding_confidence":0.25,"who":["Ada","Grace"],)"
      R"("where_location":"Köln","importance":0.5,"consolidation_state":"recent"}})",
      R"({"type":"flow_control","action":"pause","buffer_remaining":3,"preferred_rate":0.5})",
      R"({"type":"recall","request_id":"r","vector":[0.5,0.25],"max_results":10,)"
      R"("similarity_threshold":0.5,"filter":{"required_tags":["a"],"metadata":{"source":["b"]},)"
      R"("time_start":"2020-01-01T00:00:00Z"},"snapshot_isolation":true,"ef_search":100})",
      R"({"type":"close","drain_queue":true,"unknown":{"deep":[1,[2,{"x":null}],true,"y"]}})"};
  return seeds;
}

constexpr std::string_view kPieces[] = {"{",
                                        "}",
                                        "[",
                                        "]",
                                        ",",
                                        ":",
                                        "\"",
                                        "\\",
                                        "\\u",
                                        "\\ud800",
                                        "null",
                                        "true",
                                        "NaN",
                                        "-Infinity",
                                        "1e400",
                                        "-0",
                                        "01",
                                        "1.",
                                        "1e39",
                                        "-",
                                        "18446744073709551616",
                                        "\"id\":7,",
                                        "\"embedding\":[",
                                        "\"vector\":[1,",
                                        "\"type\":",
                                        "\"episode\":{",
                                        "[[[[[[[[",
                                        "\xff",
                                        "\xc3",
                                        "\xe2\x98",
                                        "\xed\xa0\x80",
                                        "\n",
                                        "\t",
                                        " ",
                                        "\"what\":\"\",",
                                        "nul",
                                        "tru",
                                        "\"filter\":{\"x\":1},",
                                        "\"when\":\"9999-12-31T23:59:59Z\",",
                                        "\"encoding_confidence\":-1,",
                                        "\"sequence_number\":0,"};

std::string Mutated(SplitMix64* random) {
  std::string text = Seeds()[random->Below(Seeds().size())];
  for (uint64_t left = random->Below(4); left > 0; --left) {
    const size_t at = random->Below(text.size() + 1);
    const std::string_view piece = kPieces[random->Below(std::size(kPieces))];
    switch (random->Below(7)) {
      case 0:
        if (at < text.size()) text[at] = static_cast<char>(random->Next());
        break;
      case 1:
        if (at < text.size()) text[at] ^= static_cast<char>(1 << random->Below(8));
        break;
      case 2:
        text.resize(at);
        break;
      case 3:
        text.erase(at, random->Below(8));
        break;
      case 4:
        text.insert(at, piece);
        break;
      case 5: {  // a part of another, or of itself
        const std::string& other = Seeds()[random->Below(Seeds().size())];
        const size_t from = random->Below(other.size());
        text.insert(at, other.substr(from, random->Below(40)));
        break;
      }
      default: {  // a value for another
        const size_t colon = text.find(':', at);
        if (colon != std::string::npos) {
          const size_t end = text.find_first_of(",}]", colon);
          if (end != std::string::npos) text.replace(colon + 1, end - colon - 1, piece);
        }
        break;
      }
    }
  }
  return text;
}

// Whatever a question is, shards rely on this.
void CheckQuestion(const GatewayQuestion& question) {
  ASSERT_LE(question.vector.dimension, kMaxDimension);
  if (question.kind == CallKind::kObserve) {
    ASSERT_GE(question.vector.dimension, 1u);
    ASSERT_GE(question.id.size(), 1u);
    ASSERT_LE(question.id.size(), kMaxIdBytes);
    ASSERT_LE(question.payload.size(), kMaxPayloadBytes);
    ASSERT_TRUE(question.confidence >= 0 && question.confidence <= 1);
    v1::Episode kept;
    ASSERT_TRUE(
        kept.ParseFromArray(question.payload.data(), static_cast<int>(question.payload.size())));
    ASSERT_EQ(CheckAttributes(std::as_bytes(std::span(question.attributes))), RefusalReason::kNone);
    for (uint32_t i = 0; i < question.vector.dimension; ++i) {
      float number = 0;
      std::memcpy(&number, question.vector.bytes + i * sizeof(float), sizeof(float));
      ASSERT_TRUE(std::isfinite(number));
    }
    return;
  }
  ASSERT_GE(question.k, 1u);
  ASSERT_LE(question.k, kMaxRecallResults);
  ASSERT_LE(question.ef, kMaxEf);
  ASSERT_EQ(CheckFilter(std::as_bytes(std::span(question.filter))), RefusalReason::kNone);
}

void CheckText(std::string_view message) {
  ASSERT_GE(message.size(), 10u);
  ASSERT_LE(message.size(), 1'000u);
  ASSERT_EQ(Utf8Prefix(message), message.size()) << message;
}

struct Seen {
  int not_json = 0;
  int faults = 0;
  int observations = 0;
  int recalls = 0;
  int refused = 0;
};

void CheckAsk(JsonRequest* request, Seen* seen) {
  const std::vector<std::string> keys = {"source"};
  CallText text;
  RecallLimits limits;
  GatewayQuestion question;
  const bool recalls = request->type == JsonType::kRecall;
  const Asked asked = recalls ? AskJsonRecall(request, 1, keys, &text, &limits, &question)
                              : AskEpisode(request->episode, 1, &text, &question);
  if (!asked) {
    ++seen->refused;
    CheckText(asked.error().message);
    return;
  }
  ++(recalls ? seen->recalls : seen->observations);
  CheckQuestion(question);
}

TEST(JsonMutationsTest, WhatIsJsonIsReadAndNothingElse) {
  SplitMix64 random(11);
  ExactReader reader;
  JsonRequest request;
  Seen seen;
  for (int i = 0; i < kInputs; ++i) {
    const std::string text = Mutated(&random);
    SCOPED_TRACE(text);
    const auto fault = reader.Read(text, &request);
    const auto model = nlohmann::json::parse(text, nullptr, false);
    const bool is_object = model.is_object();
    if (fault) {
      ++seen.not_json;
      CheckText(*fault);
      // It may be nested too deeply.
      ASSERT_TRUE(!is_object || fault->ends_with("nested deeper than 32")) << *fault;
    } else if (!is_object) {
      // There is a number that is none or too large, or a word for one, which JSON has not; maybe
      // behind something else that is wrong.
      ASSERT_NE(request.fault, "");
    }
    if (!fault && !request.fault.empty()) {
      ++seen.faults;
      CheckText(request.fault);
    } else if (!fault) {
      CheckAsk(&request, &seen);
    }
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(seen.not_json, kInputs / 10);
  EXPECT_GT(seen.faults, kInputs / 100);
  EXPECT_GT(seen.observations, kInputs / 50);
  EXPECT_GT(seen.recalls, kInputs / 50);
  EXPECT_GT(seen.refused, kInputs / 50);
}

}  // namespace
}  // namespace engram
