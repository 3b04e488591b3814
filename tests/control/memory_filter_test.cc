#include "src/control/memory_filter.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/control/memory_calls.h"
#include "src/core/attributes.h"
#include "tests/core/attributes_model.h"

namespace engram {
namespace {

const std::vector<std::string> kFilterKeys{"source", "lang"};

std::span<const std::byte> BytesIn(std::string_view text) { return std::as_bytes(std::span(text)); }

// What is asked of the shards, or why nothing is.
struct Stored {
  std::string refusal;
  ModelAttributes attributes;
};
Stored Remember(const v1::RememberRequest& request) {
  CallText text;
  GatewayQuestion question;
  const Asked asked = AskRemember(request, 0, kFilterKeys, &text, &question);
  if (!asked) return {asked.error().message, {}};
  EXPECT_EQ(CheckAttributes(BytesIn(question.attributes)), RefusalReason::kNone);
  return {"", ReadAttributes(BytesIn(question.attributes))};
}
Stored Remember(v1::Episode episode) {
  episode.add_embedding(1);
  v1::RememberRequest request;
  *request.mutable_episode() = episode;
  return Remember(request);
}
Stored Remember(v1::Memory memory) {
  memory.add_embedding(1);
  v1::RememberRequest request;
  *request.mutable_memory() = memory;
  return Remember(request);
}

struct Filtered {
  std::string refusal;
  ModelFilter filter;
};
Filtered Recall(v1::RecallRequest request) {
  if (!request.has_cue()) request.mutable_cue()->mutable_embedding()->add_vector(1);
  CallText text;
  RecallLimits limits;
  GatewayQuestion question;
  const Asked asked = AskRecall(request, kFilterKeys, &text, &limits, &question);
  if (!asked) return {asked.error().message, {}};
  EXPECT_EQ(CheckFilter(BytesIn(question.filter)), RefusalReason::kNone);
  return {"", ReadFilter(BytesIn(question.filter))};
}
v1::MetadataCondition* AddCondition(v1::RecallRequest* request, const std::string& key,
                                    const std::vector<std::string>& values) {
  v1::MetadataCondition* condition = request->mutable_filter()->add_metadata();
  condition->set_key(key);
  for (const std::string& value : values) condition->add_values(value);
  return condition;
}

// ---- What is stored ----

TEST(MemoryFilterTest, AnEpisodesAttributes) {
  v1::Episode episode;
  episode.set_where_location("Köln");
  episode.add_who("Ada");
  episode.add_who("");
  episode.add_who("Grace");
  EXPECT_EQ(Remember(episode).attributes, (ModelAttributes{{"memory_type", "episodic"},
                                                           {"where_location", "Köln"},
                                                           {"who", "Ada"},
                                                           {"who", "Grace"}}));
  EXPECT_EQ(Remember(v1::Episode()).attributes, (ModelAttributes{{"memory_type", "episodic"}}));
}

TEST(MemoryFilterTest, AMemorysAttributesAreTagsTypeAndDeclaredMetadata) {
  v1::Memory memory;
  memory.add_tags("red");
  memory.add_tags("");
  memory.add_tags("blue");
  memory.set_memory_type(v1::MEMORY_TYPE_SEMANTIC);
  auto& metadata = *memory.mutable_metadata();
  metadata["lang"] = "de";
  metadata["source"] = "";
  metadata["secret"] = "s";
  metadata["who"] = "nobody: it is no filter key of the space";
  EXPECT_EQ(
      Remember(memory).attributes,
      (ModelAttributes{
          {"memory_type", "semantic"}, {"", "red"}, {"", "blue"}, {"source", ""}, {"lang", "de"}}));
  EXPECT_TRUE(Remember(v1::Memory()).attributes.empty());
  for (const auto& [type, name] : {std::pair(v1::MEMORY_TYPE_EPISODIC, "episodic"),
                                   std::pair(v1::MEMORY_TYPE_PROCEDURAL, "procedural"),
                                   std::pair(v1::MEMORY_TYPE_WORKING, "working")}) {
    v1::Memory typed;
    typed.set_memory_type(type);
    EXPECT_EQ(Remember(typed).attributes, (ModelAttributes{{"memory_type", name}}));
  }
}

TEST(MemoryFilterTest, WhatIsTooLongToFilterByIsRefusedByItsField) {
  const std::string longest(255, 'x');
  const std::string longer(256, 'x');
  const std::string expected = ": 256 bytes; expected up to 255, as recalls filter by it";
  v1::Episode episode;
  episode.set_where_location(longest);
  episode.add_who("Ada");
  episode.add_who(longest);
  EXPECT_EQ(Remember(episode).refusal, "");
  episode.set_who(1, longer);
  EXPECT_EQ(Remember(episode).refusal, "episode.who[1]" + expected);
  episode.set_where_location(longer);
  EXPECT_EQ(Remember(episode).refusal, "episode.where_location" + expected);
  v1::Memory memory;
  memory.add_tags(longest);
  (*memory.mutable_metadata())["source"] = longest;
  (*memory.mutable_metadata())["other"] = longer;
  EXPECT_EQ(Remember(memory).refusal, "");
  (*memory.mutable_metadata())["source"] = longer;
  EXPECT_EQ(Remember(memory).refusal, "memory.metadata[\"source\"]" + expected);
  memory.set_tags(0, longer);
  EXPECT_EQ(Remember(memory).refusal, "memory.tags[0]" + expected);
}

TEST(MemoryFilterTest, MoreThanFitsIsRefusedByTheFirstThatDoesNot) {
  v1::Memory memory;
  for (int i = 0; i < 64; ++i) memory.add_tags("t");
  EXPECT_EQ(Remember(memory).refusal, "");
  memory.add_tags("one more");
  EXPECT_TRUE(Remember(memory).refusal.starts_with("memory.tags[64]: one more than recalls can"));
  v1::Episode episode;
  for (int i = 0; i < 20; ++i) episode.add_who(std::string(250, 'w'));
  EXPECT_TRUE(Remember(episode).refusal.starts_with("episode.who[15]: one more than recalls can"))
      << Remember(episode).refusal;
}

// ---- What is recalled ----

TEST(MemoryFilterTest, WithoutAFilterThereIsNone) {
  EXPECT_EQ(Recall({}).filter, ModelFilter());
  v1::RecallRequest request;
  request.mutable_filter();
  request.mutable_context();
  EXPECT_EQ(Recall(request).refusal, "");
  EXPECT_EQ(Recall(request).filter, ModelFilter());
}

TEST(MemoryFilterTest, EachPartOfAFilterIsAConditionOfItsOwn) {
  v1::RecallRequest request;
  v1::Filter* filter = request.mutable_filter();
  filter->mutable_time_start()->set_seconds(1);
  filter->mutable_time_end()->set_nanos(7);
  filter->mutable_time_end()->set_seconds(2);
  filter->add_required_tags("red");
  filter->add_required_tags("round");
  filter->add_excluded_tags("old");
  filter->add_excluded_tags("broken");
  AddCondition(&request, "source", {"docs", "mail"});
  AddCondition(&request, "lang", {""})->set_exclude(true);
  AddCondition(&request, "who", {"Ada"});
  filter->add_memory_types(v1::MEMORY_TYPE_EPISODIC);
  filter->add_memory_types(v1::MEMORY_TYPE_WORKING);
  const Filtered filtered = Recall(request);
  EXPECT_EQ(filtered.refusal, "");
  EXPECT_EQ(filtered.filter, (ModelFilter{1'000'000'000,
                                          2'000'000'007,
                                          {{false, "", {"red"}},
                                           {false, "", {"round"}},
                                           {true, "", {"old", "broken"}},
                                           {false, "source", {"docs", "mail"}},
                                           {true, "lang", {""}},
                                           {false, "who", {"Ada"}},
                                           {false, "memory_type", {"episodic", "working"}}}}));
}

TEST(MemoryFilterTest, AContextNarrowsTheFilterFurther) {
  v1::RecallRequest request;
  v1::ContextCue* context = request.mutable_context();
  context->mutable_time_start()->set_seconds(5);
  context->set_location("Köln");
  context->add_participants("Ada");
  context->add_participants("Grace");
  const std::vector<ModelClause> clauses{
      {false, "where_location", {"Köln"}}, {false, "who", {"Ada"}}, {false, "who", {"Grace"}}};
  EXPECT_EQ(Recall(request).filter, (ModelFilter{5'000'000'000, INT64_MAX, clauses}));
  request.mutable_filter()->mutable_time_start()->set_seconds(3);
  request.mutable_filter()->mutable_time_end()->set_seconds(9);
  EXPECT_EQ(Recall(request).filter, (ModelFilter{5'000'000'000, 9'000'000'000, clauses}));
  // Ranges that do not meet: nothing is found, and nothing is wrong.
  context->mutable_time_end()->set_seconds(6);
  request.mutable_filter()->mutable_time_start()->set_seconds(7);
  EXPECT_EQ(Recall(request).filter, (ModelFilter{7'000'000'000, 6'000'000'000, clauses}));
}

TEST(MemoryFilterTest, WhatIsWrongIsNamedWithItsRemedy) {
  const auto refusal = [](auto change) {
    v1::RecallRequest request;
    change(&request);
    return Recall(request).refusal;
  };
  using Request = v1::RecallRequest*;
  EXPECT_EQ(refusal([](Request r) { AddCondition(r, "color", {"red"}); }),
            "filter.metadata[0].key: \"color\"; the space filters by who, where_location, "
            "memory_type, source, lang; list it in filter_keys of the configuration");
  EXPECT_TRUE(refusal([](Request r) {
                AddCondition(r, "", {"red"});
              }).starts_with("filter.metadata[0].key: \"\"; "));
  EXPECT_EQ(refusal([](Request r) { AddCondition(r, "source", {}); }),
            "filter.metadata[0].values: empty; expected 1 to 64 values, any of which may match");
  EXPECT_EQ(refusal([](Request r) { AddCondition(r, "source", {"a", std::string(256, 'x')}); }),
            "filter.metadata[0].values: 256 bytes; expected up to 255, as recalls filter by it");
  EXPECT_EQ(refusal([](Request r) { r->mutable_filter()->add_required_tags(""); }),
            "filter.required_tags[0]: empty; expected a tag of 1 to 255 bytes");
  EXPECT_EQ(refusal([](Request r) {
              r->mutable_filter()->add_memory_types(v1::MEMORY_TYPE_UNSPECIFIED);
            }),
            "filter.memory_types[0]: 0; expected a MemoryType, 1 to 4");
  EXPECT_EQ(refusal([](Request r) {
              r->mutable_filter()->mutable_time_start()->set_seconds(5);
              r->mutable_filter()->mutable_time_end()->set_seconds(5);
            }),
            "filter.time_end: not after filter.time_start; expected a later time (it is not part "
            "of the range)");
  EXPECT_TRUE(refusal([](Request r) {
                r->mutable_context()->mutable_time_end()->set_nanos(-1);
              }).starts_with("context.time_end: 0 s and -1 ns; expected"));
  EXPECT_TRUE(refusal([](Request r) {
                for (int i = 0; i < 17; ++i) r->mutable_filter()->add_required_tags("t");
              }).starts_with("filter.required_tags[16]: one more than a filter can hold; "));
}

TEST(MemoryFilterTest, AFilterNeedsAnEmbeddingBesideIt) {
  const auto refusal = [](const v1::RecallRequest& request) {
    CallText text;
    RecallLimits limits;
    GatewayQuestion question;
    const Asked asked = AskRecall(request, kFilterKeys, &text, &limits, &question);
    return asked ? std::string("taken") : asked.error().message;
  };
  v1::RecallRequest request;
  request.mutable_filter();
  EXPECT_EQ(refusal(request),
            "filter: set without a cue; this appliance filters what cue.embedding finds");
  request.add_ids("a");
  EXPECT_TRUE(refusal(request).starts_with("filter: set without a cue; "));
  request.Clear();
  request.mutable_context();
  EXPECT_TRUE(refusal(request).starts_with("context: set without a cue; "));
  request.Clear();
  request.mutable_cue()->mutable_context()->set_location("Köln");
  request.set_all_spaces(true);
  EXPECT_EQ(refusal(request), "all_spaces: true; it needs cue.embedding");
}

TEST(MemoryFilterTest, AContextForACueIsAFilterAlone) {
  CallText text;
  RecallLimits limits;
  GatewayQuestion question;
  v1::RecallRequest request;
  request.mutable_cue()->mutable_context()->set_location("Köln");
  request.mutable_context()->add_participants("Ada");
  request.set_max_results(7);
  ASSERT_TRUE(AskRecall(request, kFilterKeys, &text, &limits, &question).has_value());
  EXPECT_TRUE(question.vector.empty());
  EXPECT_EQ(question.k, 7u);
  EXPECT_FALSE(limits.is_compared);
  FilterWriter writer;
  const std::string_view ada = "Ada";
  const std::string_view koln = "Köln";
  ASSERT_TRUE(writer.Require(kWhoKey, {&ada, 1}));
  ASSERT_TRUE(writer.Require(kWhereKey, {&koln, 1}));
  EXPECT_EQ(question.filter, writer.Bytes());
  // A context that asks for nothing is met by all.
  request.Clear();
  request.mutable_cue()->mutable_context();
  ASSERT_TRUE(AskRecall(request, kFilterKeys, &text, &limits, &question).has_value());
  EXPECT_EQ(question.filter, FilterWriter().BytesOfAny());
  EXPECT_EQ(question.filter.size(), 16u);
}

TEST(MemoryFilterTest, TheShardsRefusalOfAKeyNamesTheSpaceAndTheRemedy) {
  GatewayQuestion question;
  question.space = SpaceName("docs");
  GatewayAnswer answer;
  answer.reason = RefusalReason::kUnknownFilterKey;
  EXPECT_EQ(RefusalMessage(question, answer, "vector"),
            "filter.metadata: the space \"docs\" keeps no such key; list it in filter_keys of the "
            "configuration");
}

}  // namespace
}  // namespace engram
