#include "src/control/json_request.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "src/core/hash.h"
#include "tests/control/json_testing.h"

namespace engram {
namespace {

class JsonRequestTest : public testing::Test {
 protected:
  const JsonRequest& Read(std::string_view text,
                          JsonReader::Form form = JsonReader::Form::kMessage) {
    const auto fault = reader_.Read(text, &request_, form);
    EXPECT_FALSE(fault.has_value()) << text << ": " << *fault;
    return request_;
  }
  std::string Fault(std::string_view text) { return Read(text).fault; }
  std::string NotJson(std::string_view text) {
    return reader_.Read(text, &request_).value_or("it is JSON");
  }

  ExactReader reader_;
  JsonRequest request_;
};

TEST_F(JsonRequestTest, AllOfInit) {
  const JsonRequest& request =
      Read(R"( {"type":"init","memory_space_id":"films","client_buffer_size":7,)"
           R"("enable_backpressure":false,"resume_session_id":"00ff","protocol_version":1,)"
           R"("priority":"high","cumulative_acks":true} )");
  EXPECT_EQ(request.type, JsonType::kInit);
  EXPECT_EQ(request.space, "films");
  EXPECT_EQ(request.session, "00ff");
  EXPECT_EQ(request.init.client_buffer_size(), 7u);
  EXPECT_FALSE(request.init.enable_backpressure());
  EXPECT_EQ(request.init.protocol_version(), 1u);
  EXPECT_EQ(request.init.priority(), v1::SESSION_PRIORITY_HIGH);
  EXPECT_TRUE(request.init.cumulative_acks());
  EXPECT_EQ(request.fault, "");
}

TEST_F(JsonRequestTest, AnEngramClientsInit) {
  const JsonRequest& request = Read(R"({"type":"init","memory_space_id":"a"})");
  EXPECT_EQ(request.init.protocol_version(), 0u);
  EXPECT_EQ(request.init.client_buffer_size(), 0u);
  EXPECT_TRUE(request.init.enable_backpressure());
  EXPECT_FALSE(request.init.cumulative_acks());
  EXPECT_EQ(request.session, "");
}

TEST_F(JsonRequestTest, AllOfAnObservation) {
  const JsonRequest& request = Read(
      R"({"episode":{"what":"a \"b\" \u00e9\ud83d\ude00","embedding":[1,-2.5,3e-2],"id":"x",)"
      R"("when":"1970-01-01T00:00:01Z","encoding_confidence":0.25,"where_location":"K\u00f6ln",)"
      R"("who":["Ada","Grace"],"why":"w","how":"h","decay_rate":1,"emotional_valence":-1,)"
      R"("importance":0.5,"consolidation_state":"consolidated","last_replay":null},)"
      R"("session_id":"01","sequence_number":18446744073709551615,"type":"observation"})");
  EXPECT_EQ(request.fault, "");
  EXPECT_EQ(request.type, JsonType::kObservation);
  EXPECT_EQ(request.sequence, UINT64_MAX);
  EXPECT_EQ(request.session, "01");
  const v1::Episode& episode = request.episode;
  EXPECT_EQ(episode.id(), "x");
  EXPECT_EQ(episode.what(), "a \"b\" \u00e9\U0001F600");
  ASSERT_EQ(episode.embedding_size(), 3);
  EXPECT_EQ(episode.embedding(1), -2.5F);
  EXPECT_EQ(episode.embedding(2), 3e-2F);
  EXPECT_EQ(episode.when().seconds(), 1);
  EXPECT_EQ(episode.encoding_confidence().value(), 0.25F);
  EXPECT_EQ(episode.where_location(), "K\u00f6ln");
  EXPECT_EQ(episode.who(1), "Grace");
  EXPECT_EQ(episode.why() + episode.how(), "wh");
  EXPECT_EQ(episode.decay_rate() + episode.emotional_valence() + episode.importance(), 0.5F);
  EXPECT_EQ(episode.consolidation_state(), v1::CONSOLIDATION_STATE_CONSOLIDATED);
  EXPECT_FALSE(episode.has_last_replay());
}

TEST_F(JsonRequestTest, NothingStaysFromTheTextBefore) {
  Read(R"({"type":"recall","vector":[1],"filter":{"required_tags":["a"]},"request_id":7,)"
       R"("max_results":9,"similarity_threshold":0.5,"sequence_number":4,"action":"pause",)"
       R"("episode":{"id":"x","embedding":[1,2],"who":["a"],"what":7}})");
  EXPECT_NE(request_.fault, "");
  const JsonRequest& request = Read(R"({"episode":{"embedding":[3]}})");
  EXPECT_EQ(request.fault, "");
  EXPECT_EQ(request.type, JsonType::kUnknown);
  EXPECT_EQ(request.episode.ByteSizeLong(), 6u);
  EXPECT_EQ(request.recall.ByteSizeLong(), 0u);
  EXPECT_EQ(request.request_id, "");
  EXPECT_FALSE(request.sequence.has_value() || request.action.has_value() || request.has_vector);
  EXPECT_EQ(request.similarity_threshold, 0);
}

TEST_F(JsonRequestTest, NumbersAreReadToTheBit) {
  SplitMix64 random(1);
  std::vector<float> values;
  std::string text = R"({"episode":{"embedding":[)";
  for (int i = 0; i < 4'096; ++i) {
    const auto bits = static_cast<uint32_t>(random.Next());
    float value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    if (!std::isfinite(value)) value = 1;
    char digits[40];
    std::snprintf(digits, sizeof(digits), "%.*g", i % 2 == 0 ? 9 : 17, value);
    if (i > 0) text += i % 7 == 0 ? " ,\n " : ",";
    text += digits;
    values.push_back(value);
  }
  const JsonRequest& request = Read(text + "]}}");
  EXPECT_EQ(request.fault, "");
  ASSERT_EQ(static_cast<size_t>(request.episode.embedding_size()), values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(request.episode.embedding(static_cast<int>(i)), values[i]);
  }
}

TEST_F(JsonRequestTest, WhatIsNoNumberIsNamedAndTheRestRead) {
  for (const auto& [numbers, fault] : std::vector<std::pair<std::string, std::string>>{
           {"[1,NaN]", "[1]: NaN; expected a finite number that float32 can hold"},
           {"[Infinity]", "[0]: Infinity; expected a finite number that float32 can hold"},
           {"[0,-Infinity , 1]", "[1]: -Infinity; expected a finite number that float32 can hold"},
           {"[nan]", "[0]: nan; expected a finite number that float32 can hold"},
           {"[3.5e38]", "[0]: 3.5e38; expected a finite number that float32 can hold"},
           {"[-1e400,2]", "[0]: -1e400; expected a finite number that float32 can hold"},
           {"[0,null]", "[1]: null; expected a finite number that float32 can hold"},
           {"[[1]]", "[0]: a list; expected a finite number that float32 can hold"},
           {"[{\"a\":[2]},1]", "[0]: an object; expected a finite number that float32 can hold"},
           {"[\"1\"]", "[0]: \"1\"; expected a finite number that float32 can hold"},
           {"[true]", "[0]: true; expected a finite number that float32 can hold"},
           {"7", ": 7; expected a list of numbers"}}) {
    const std::string text = R"({"episode":{"embedding":)" + numbers +
                             R"(,"id":"x"},"sequence_number":5,"type":"observation"})";
    EXPECT_EQ(Fault(text), "episode.embedding" + fault);
    EXPECT_EQ(request_.sequence, 5u) << numbers;
    EXPECT_EQ(request_.episode.id(), "x") << numbers;
  }
  // At the edge of float32 it is rounded, as any reader rounds.
  EXPECT_EQ(Fault(R"({"episode":{"embedding":[3.4028235e38,-3.4028235677e38,1e-60]}})"), "");
  EXPECT_EQ(request_.episode.embedding(2), 0);
}

TEST_F(JsonRequestTest, ManyNumbers) {
  std::string text = R"({"vector":[0)";
  for (int i = 1; i < 100'000; ++i) text += ",0";
  EXPECT_EQ(Fault(text + "]}"), "vector: 100000 values; expected 1 to 4096");
  EXPECT_EQ(request_.recall.cue().embedding().vector_size(), 4'096);
}

TEST_F(JsonRequestTest, FaultsNameFieldValueAndRemedy) {
  for (const auto& [text, fault] : std::vector<std::pair<std::string, std::string>>{
           {R"({"type":7})", "type: 7; expected a text"},
           {R"({"sequence_number":-1})",
            "sequence_number: -1; expected a whole number from 0 to 18446744073709551615"},
           {R"({"sequence_number":1e3})",
            "sequence_number: 1e3; expected a whole number from 0 to 18446744073709551615"},
           {R"({"sequence_number":18446744073709551616})",
            "sequence_number: 18446744073709551616; expected a whole number from 0 to "
            "18446744073709551615"},
           {R"({"max_results":4294967296})", "max_results: 4294967296; expected 0 to 4294967295"},
           {R"({"cumulative_acks":1})", "cumulative_acks: 1; expected true or false"},
           {R"({"priority":"urgent"})", R"(priority: "urgent"; expected "normal", "high")"},
           {R"({"episode":[]})", "episode: a list; expected an object"},
           {R"({"episode":{"who":"Ada"}})", R"(episode.who: "Ada"; expected a list of texts)"},
           {R"({"episode":{"encoding_confidence":1.5}})",
            "episode.encoding_confidence: 1.5; expected 0 to 1"},
           {R"({"filter":{"metadata":{"who":[1]}}})", "filter.metadata.who: 1; expected a text"},
           {R"({"filter":{"color":"red"}})",
            "filter.color: there is no such filter; expected time_start, time_end, required_tags, "
            "excluded_tags or metadata"},
           {R"({"filter":{"time_end":"soon"}})",
            R"(filter.time_end: "soon"; expected a time as RFC 3339 has it, like )"
            R"("2026-03-01T12:00:00Z")"},
           // The first of several.
           {R"({"episode":{"id":7,"what":8},"sequence_number":9})",
            "episode.id: 7; expected a text"}}) {
    EXPECT_EQ(Fault(text), fault) << text;
  }
  EXPECT_FALSE(Read(R"({"sequence_number":-1})").sequence.has_value());
  // A value that is long is cut.
  const std::string fault = Fault(R"({"type":[],"priority":")" + std::string(5'000, 'x') + "\"}");
  EXPECT_LT(fault.size(), 200u);
}

TEST_F(JsonRequestTest, RequestIdsComeBackAsTheyWere) {
  for (const char* id :
       {"7", "-1", "1.50", "\"a\"", "\"\"", R"("\"\\\n")", "12345678901234567890"}) {
    EXPECT_EQ(Read(std::string(R"({"request_id":)") + id + " }").request_id, id);
  }
  EXPECT_EQ(Read(R"({"request_id":"\u00e9\/"})").request_id, "\"\u00e9/\"");
  EXPECT_EQ(Read(R"({"request_id":null})").request_id, "");
  EXPECT_EQ(Fault(R"({"request_id":[7]})"), "request_id: a list; expected a text");
  EXPECT_EQ(Fault(R"({"request_id":")" + std::string(257, 'x') + "\"}"),
            "request_id: 257 bytes; expected up to 256");
}

TEST_F(JsonRequestTest, WhatIsNoJsonIsToldWithItsPlace) {
  EXPECT_EQ(NotJson(""), "not JSON, empty; expected an object");
  EXPECT_EQ(NotJson("[1]"), "not JSON, at byte 0: expected an object");
  EXPECT_EQ(NotJson("{} {}").substr(0, 10), "not JSON, ");
  EXPECT_EQ(NotJson("{\"a\":\"\xff\"}"), "not JSON, a string is not UTF-8");
  EXPECT_TRUE(NotJson(R"({"a":1,"what":tru})").starts_with("not JSON, at byte ")) << NotJson("");
  for (const char* text : {"{",
                           "}",
                           "{]",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{\"a\":1,}",
                           "{\"a\":1 \"b\":2}",
                           "{,}",
                           "{\"a\":01}",
                           "{\"a\":+1}",
                           "{\"a\":1.}",
                           "{\"a\":.5}",
                           "{\"a\":1e}",
                           "{\"a\":'b'}",
                           "{a:1}",
                           "nul",
                           "{\"a\":\"\\x\"}",
                           "{\"a\":\"\\ud800\"}",
                           "{\"a\":\"\n\"}",
                           "{\"a\":\"b}",
                           "{\"a\":[1,]}",
                           "{\"a\":[1 2]}",
                           "{\"a\":[}",
                           "{\"a\":nulll}",
                           "{\"a\":truefalse}",
                           "{}}",
                           "{},",
                           "\xef\xbb\xbf{}x",
                           "{\"what\":NaN}",
                           "{\"vector\":[1\"a\"]}",
                           "{\"vector\":[Nan]}",
                           "{\"vector\":[1x]}",
                           "{\"type\":Infinity}",
                           "{\"\\ud800\":1}"}) {
    EXPECT_TRUE(NotJson(text).starts_with("not JSON, ")) << text;
  }
}

TEST_F(JsonRequestTest, NestingAndSizeAreBounded) {
  const auto nested = [](int levels) {
    std::string text = R"({"a":)";
    for (int i = 0; i < levels; ++i) text += "[";
    for (int i = 0; i < levels; ++i) text += "]";
    return text + "}";
  };
  EXPECT_EQ(Fault(nested(kMaxJsonNesting)), "");
  EXPECT_TRUE(NotJson(nested(kMaxJsonNesting + 1)).ends_with("nested deeper than 32"));
  EXPECT_TRUE(NotJson(nested(100'000)).ends_with("nested deeper than 32"));
  std::string longest = R"({"a":")" + std::string(kMaxJsonBytes - 8, 'x') + "\"}";
  ASSERT_EQ(longest.size(), kMaxJsonBytes);
  EXPECT_EQ(Fault(longest), "");
  EXPECT_EQ(NotJson(longest + " "), "not JSON, longer than 4194304 bytes");
}

TEST_F(JsonRequestTest, AnEpisodeByItself) {
  const JsonRequest& request =
      Read(R"({"memory_space_id":"a","id":"x","embedding":[1],"session_id":7,"type":[]})",
           JsonReader::Form::kEpisode);
  EXPECT_EQ(request.space, "a");
  EXPECT_EQ(request.episode.id(), "x");
  EXPECT_EQ(request.episode.embedding_size(), 1);
  EXPECT_EQ(request.fault, "");
}

// ---- Recalls to questions ----

class JsonRecallTest : public JsonRequestTest {
 protected:
  std::string Ask(std::string_view text) {
    Read(text);
    question_ = {};
    limits_ = {};
    const std::vector<std::string> keys = {"source"};
    const Asked asked =
        AskJsonRecall(&request_, 1'000'000'000, keys, &call_text_, &limits_, &question_);
    return asked ? "" : asked.error().message;
  }

  CallText call_text_;
  RecallLimits limits_;
  GatewayQuestion question_;
};

TEST_F(JsonRecallTest, AllOfARecall) {
  EXPECT_EQ(Ask(R"({"vector":[1,2],"max_results":7,"similarity_threshold":0.5,"ef_search":200,)"
                R"("include_embedding":true,"snapshot_isolation":true,)"
                R"("filter":{"metadata":{"source":["a","b"],"who":"c"},"required_tags":["t"],)"
                R"("excluded_tags":["u"],"time_start":"1970-01-01T00:00:00Z"}})"),
            "");
  EXPECT_EQ(question_.kind, CallKind::kRecall);
  EXPECT_EQ(question_.vector.dimension, 2u);
  EXPECT_EQ(question_.k, 7u);
  EXPECT_EQ(question_.ef, 200u);
  EXPECT_TRUE(question_.with_vector && question_.snapshot_isolation);
  EXPECT_FALSE(question_.filter.empty());
  EXPECT_EQ(limits_.least_similarity, 0.5F);
  EXPECT_TRUE(limits_.is_compared);
}

TEST_F(JsonRecallTest, AFilterAlone) {
  EXPECT_EQ(Ask(R"({"filter":{"metadata":{"source":"a"}}})"), "");
  EXPECT_TRUE(question_.vector.empty());
  EXPECT_FALSE(limits_.is_compared);
}

TEST_F(JsonRecallTest, FaultsNameTheFieldsThatJsonHas) {
  EXPECT_EQ(Ask("{}"), "vector: missing; expected 1 to 4096 numbers, or a filter");
  EXPECT_EQ(Ask(R"({"vector":[]})"), "vector: 0 values; expected 1 to 4096");
  EXPECT_EQ(Ask(R"({"vector":null})"), "vector: missing; expected 1 to 4096 numbers, or a filter");
  EXPECT_EQ(Ask(R"({"vector":[1],"max_results":10001})"),
            "max_results: 10001; expected 0 to 10000");
  EXPECT_EQ(Ask(R"({"vector":[1],"snapshot_time":"1970-01-01T00:00:02Z"})").substr(0, 14),
            "snapshot_time:");
  EXPECT_TRUE(Ask(R"({"vector":[1],"filter":{"metadata":{"nobody":"x"}}})")
                  .starts_with("filter.metadata[0].key: \"nobody\"; the space filters by"));
  EXPECT_EQ(Ask(R"({"vector":[NaN]})"),
            "vector[0]: NaN; expected a finite number that float32 can hold");
}

}  // namespace
}  // namespace engram
