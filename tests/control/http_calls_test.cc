#include "src/control/http_calls.h"

#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "src/core/hash.h"

namespace engram {
namespace {

using Query = std::vector<std::pair<std::string, std::string>>;

TEST(HttpTargetTest, PathsAndQueries) {
  const auto target = HttpTarget::Read("/a%2Fb/c?x=1&y=a%20b+c&x=%E2%98%82&flag&=v&e=&&z==");
  ASSERT_TRUE(target.has_value());
  EXPECT_EQ(target->path, "/a%2Fb/c");
  EXPECT_EQ(target->query, (Query{{"x", "1"},
                                  {"y", "a b c"},
                                  {"x", "☂"},
                                  {"flag", ""},
                                  {"", "v"},
                                  {"e", ""},
                                  {"", ""},
                                  {"z", "="}}));
  EXPECT_EQ(target->Value("x"), "☂");
  EXPECT_EQ(target->Value("none"), "");
  EXPECT_EQ(HttpTarget::Read("/")->query, Query{});
  EXPECT_EQ(HttpTarget::Read("/?")->query, Query{});
  for (const char* none : {"", "*", "http://a/b", "a", "/?a=%", "/?a=%4", "/?%zz", "/?a=%4g"}) {
    EXPECT_FALSE(HttpTarget::Read(none).has_value()) << none;
  }
}

TEST(HttpTargetTest, WhatIsEncodedIsDecoded) {
  SplitMix64 random(1);
  for (int i = 0; i < 2'000; ++i) {
    std::string text;
    std::string encoded;
    for (uint64_t left = random.Below(20); left > 0; --left) {
      const auto byte = static_cast<char>(random.Next());
      text.push_back(byte);
      char escape[4];
      std::snprintf(escape, sizeof(escape), random.Below(2) == 0 ? "%%%02x" : "%%%02X",
                    static_cast<unsigned>(static_cast<unsigned char>(byte)));
      const bool is_plain = byte > ' ' && byte < 0x7f && byte != '%' && byte != '+';
      encoded += is_plain && random.Below(2) == 0 ? std::string(1, byte) : escape;
    }
    EXPECT_EQ(PercentDecoded(encoded, random.Below(2) == 0), text) << encoded;
  }
  EXPECT_EQ(PercentDecoded("a+b", false), "a+b");
  EXPECT_EQ(PercentDecoded("a+b", true), "a b");
  EXPECT_FALSE(PercentDecoded("%", true).has_value());
  EXPECT_FALSE(PercentDecoded("a%4", true).has_value());
}

// Every refusal has a status, and clients are told to wait with the right one.
TEST(HttpStatusTest, OfEveryRefusal) {
  for (const RefusalInfo& info : kRefusals) {
    const unsigned status = HttpStatusOf(info.reason);
    EXPECT_TRUE(status >= 400 && status < 600) << info.name;
    if (info.effect == RefusalEffect::kWaits) EXPECT_EQ(status, 429u) << info.name;
    if (info.effect == RefusalEffect::kConsumes) {
      EXPECT_TRUE(status == 400 || status == 413) << info.name;
    }
  }
  EXPECT_EQ(HttpStatusOf(RefusalReason::kNone), 200u);
  EXPECT_EQ(HttpStatusOf(RefusalReason::kShuttingDown), 503u);
  EXPECT_EQ(HttpStatusOf(RefusalReason::kUnknownSpace), 404u);
  EXPECT_EQ(HttpStatusOf(RefusalReason::kDeadlinePassed), 504u);
}

// Questions, without anybody to answer them. Answers are in tests/integration/http_test.py.
class HttpCallsTest : public testing::Test {
 protected:
  HttpCallsTest()
      : spaces_(10, 1, 1, {}),
        calls_({.clock = &clock_,
                .spaces = &spaces_,
                .reader = &reader_,
                .metrics = [] { return "engram_up 1\n"; },
                .recovering = [] { return "half of it"; }}) {}

  HttpPlan Ask(HttpMethod method, std::string_view target, std::string_view body = "",
               bool serves = true) {
    body_.assign(body);
    body_.append(JsonReader::kPaddingBytes, '\0');
    return calls_.Route({.method = method,
                         .target = target,
                         .space = space_,
                         .body = std::string_view(body_).substr(0, body.size())},
                        serves);
  }
  // What was asked, which is a question.
  const GatewayQuestion& Question(HttpMethod method, std::string_view target,
                                  std::string_view body = "") {
    HttpPlan plan = Ask(method, target, body);
    if (const auto* answer = std::get_if<HttpAnswer>(&plan)) {
      ADD_FAILURE() << answer->body;
      return none_;
    }
    asked_.push_back(std::move(std::get<HttpCallPtr>(plan)));
    return asked_.back()->question;
  }
  HttpAnswer Answer(HttpMethod method, std::string_view target, std::string_view body = "",
                    bool serves = true) {
    HttpPlan plan = Ask(method, target, body, serves);
    const auto* answer = std::get_if<HttpAnswer>(&plan);
    return answer != nullptr ? *answer : HttpAnswer{.body = "a question"};
  }

  SimulatedClock clock_;
  SpaceCatalogue spaces_;
  JsonReader reader_;
  HttpCalls calls_;
  std::string space_;
  std::string body_;
  std::vector<HttpCallPtr> asked_;
  const GatewayQuestion none_;
};

TEST_F(HttpCallsTest, Questions) {
  const GatewayQuestion& remember =
      Question(HttpMethod::kPost, "/api/v1/memories/remember?space=films",
               R"({"id":"a","embedding":[1,2],"what":"w"})");
  EXPECT_EQ(remember.kind, CallKind::kObserve);
  EXPECT_EQ(remember.op, ObservationOp::kUpsert);
  EXPECT_EQ(remember.space.view(), "films");
  EXPECT_EQ(remember.id, "a");
  EXPECT_EQ(remember.payload_kind, PayloadKind::kEpisode);
  EXPECT_EQ(remember.when_ns, clock_.WallNs());
  const GatewayQuestion& recall = Question(HttpMethod::kPost, "/api/v1/memories/recall",
                                           R"({"vector":[1],"memory_space_id":"x"})");
  EXPECT_EQ(recall.kind, CallKind::kRecall);
  EXPECT_EQ(recall.space.view(), "x");
  EXPECT_EQ(recall.k, 10u);
  const GatewayQuestion& same =
      Question(HttpMethod::kGet, "/api/v1/memories/recall?vector=1,-2e1,.5&max_results=3");
  EXPECT_EQ(same.vector.dimension, 3u);
  EXPECT_EQ(same.k, 3u);
  EXPECT_EQ(same.space.view(), "default");
  const GatewayQuestion& get =
      Question(HttpMethod::kGet, "/api/v1/memories/recall?id=a%2F&id=b&include_embedding=true");
  EXPECT_EQ(get.kind, CallKind::kGet);
  EXPECT_EQ(get.ids, (std::vector<std::string_view>{"a/", "b"}));
  EXPECT_TRUE(get.with_vector);
  for (const auto& [mode, op] :
       {std::pair{"", ObservationOp::kDelete}, std::pair{"?mode=delete", ObservationOp::kDelete},
        std::pair{"?mode=suppress", ObservationOp::kSuppress},
        std::pair{"?mode=restore", ObservationOp::kRestore}}) {
    const GatewayQuestion& forget =
        Question(HttpMethod::kDelete, std::string("/api/v1/memories/a%20b") + mode);
    EXPECT_EQ(forget.op, op);
    EXPECT_EQ(forget.id, "a b");
  }
  EXPECT_EQ(Question(HttpMethod::kGet, "/api/v1/spaces").kind, CallKind::kIntrospect);
}

TEST_F(HttpCallsTest, OrdersOfSpaces) {
  HttpPlan create = Ask(HttpMethod::kPost, "/api/v1/spaces", R"({"id":"new","metric":"ip"})");
  const auto& order = std::get<std::unique_ptr<SpaceOrder>>(create);
  EXPECT_EQ(order->what(), SpaceOrder::What::kCreate);
  EXPECT_EQ(order->space().view(), "new");
  HttpPlan drop = Ask(HttpMethod::kDelete, "/api/v1/spaces/old");
  EXPECT_EQ(std::get<std::unique_ptr<SpaceOrder>>(drop)->what(), SpaceOrder::What::kDrop);
  spaces_.FindOrAdd("new", Metric::kL2);
  EXPECT_EQ(Answer(HttpMethod::kPost, "/api/v1/spaces", R"({"id":"new"})").status, 409u);
  const HttpAnswer made = HttpCalls::TellOrder(
      *order, {.reason = RefusalReason::kNone, .metric = Metric::kL2, .dimension = 7});
  EXPECT_EQ(made.status, 201u);
  EXPECT_EQ(made.body, R"({"id":"new","metric":"l2","dimension":7})");
  const HttpAnswer refused = HttpCalls::TellOrder(
      *order, {.reason = RefusalReason::kSpaceDropping, .retry_after_ms = 9, .text = "wait"});
  EXPECT_EQ(refused.status, 429u);
  EXPECT_EQ(refused.retry_after_ms, 9u);
}

TEST_F(HttpCallsTest, HeaderQueryAndBodyAgree) {
  const char* remember = "/api/v1/memories/remember";
  const std::string with_body = R"({"embedding":[1],"memory_space_id":"a"})";
  space_ = "a";
  EXPECT_EQ(Question(HttpMethod::kPost, std::string(remember) + "?space=a", with_body).space.view(),
            "a");
  EXPECT_EQ(Answer(HttpMethod::kPost, std::string(remember) + "?space=b", with_body).body,
            R"({"error":{"code":"invalid_argument",)"
            R"("message":"space: \"b\"; x-memory-space says \"a\""}})");
  space_ = "";
  EXPECT_EQ(Answer(HttpMethod::kPost, std::string(remember) + "?space=b", with_body).status, 400u);
  space_ = "b";
  EXPECT_EQ(Answer(HttpMethod::kPost, remember, with_body).status, 400u);
}

TEST_F(HttpCallsTest, WhileItRecovers) {
  for (const char* target : {"/health/ready", "/api/v1/memories/recall?id=a", "/api/v1/spaces"}) {
    const HttpAnswer answer = Answer(HttpMethod::kGet, target, "", false);
    EXPECT_EQ(answer.status, 503u) << target;
    EXPECT_GT(answer.retry_after_ms, 0u);
    EXPECT_NE(answer.body.find("half of it"), std::string::npos);
  }
  EXPECT_EQ(Answer(HttpMethod::kGet, "/health/live", "", false).status, 200u);
  const HttpAnswer metrics = Answer(HttpMethod::kGet, "/metrics", "", false);
  EXPECT_EQ(metrics.body, "engram_up 1\n");
  EXPECT_TRUE(metrics.content_type.starts_with("text/plain; version=0.0.4"));
}

// Whatever is asked, there is a question, an order, or an answer in JSON that says what is wrong.
TEST_F(HttpCallsTest, TargetsAndBodiesOfAnyKind) {
  static constexpr std::string_view kParts[] = {"/api/v1/memories/",
                                                "remember",
                                                "recall",
                                                "/api/v1/spaces",
                                                "/",
                                                "?",
                                                "space=a",
                                                "&",
                                                "id=x",
                                                "vector=1,2",
                                                "max_results=5",
                                                "mode=suppress",
                                                "%",
                                                "%41",
                                                "%2f",
                                                "=",
                                                "+",
                                                "\xff",
                                                "/health/ready",
                                                "a",
                                                "..",
                                                "#"};
  static constexpr std::string_view kBodies[] = {"",
                                                 "{}",
                                                 R"({"embedding":[1,2]})",
                                                 R"({"vector":[1,2],"max_results":5})",
                                                 R"({"id":"s"})",
                                                 "[",
                                                 R"({"embedding":[1,NaN]})",
                                                 R"({"id":"s","metric":"l2","dimension":3})"};
  SplitMix64 random(3);
  for (int i = 0; i < 30'000; ++i) {
    std::string target =
        random.Below(4) == 0 ? "" : std::string(kParts[random.Below(4) == 0 ? 3 : 0]);
    for (uint64_t left = random.Below(7); left > 0; --left) {
      target += kParts[random.Below(std::size(kParts))];
    }
    space_ = random.Below(8) == 0 ? "a" : "";
    const auto method = static_cast<HttpMethod>(random.Below(5));
    HttpPlan plan = Ask(method, target, kBodies[random.Below(std::size(kBodies))]);
    const auto* answer = std::get_if<HttpAnswer>(&plan);
    if (answer == nullptr) continue;
    SCOPED_TRACE(target);
    ASSERT_TRUE(nlohmann::json::accept(answer->body)) << answer->body;
    if (answer->status == 200) continue;
    const nlohmann::json error = nlohmann::json::parse(answer->body)["error"];
    ASSERT_GT(error["code"].get<std::string>().size(), 3u);
    ASSERT_GT(error["message"].get<std::string>().size(), 5u);
    ASSERT_EQ(answer->allow.empty(), answer->status != 405);
  }
}

}  // namespace
}  // namespace engram
