#include "perf/runbook.h"

#include <gtest/gtest.h>

#include <string>

namespace engram {
namespace {

using Operation = RunbookStep::Operation;

// As the runbooks are written: three kinds of quotes, fields in any order, comments, blanks at the
// end of lines, max_pts before or behind the steps, no line's end at the file's.
constexpr const char* kTwoParts =
    "# of two sets\n"
    "small-set:\n"
    "  max_pts: 100\n"
    "  # a remark\n"
    "  1: \n"
    "    operation: \"insert\"\n"
    "    start: 0\n"
    "    end: 60\n"
    "  2:\n"
    "    operation: 'search'\n"
    "  3:\r\n"
    "    tags_start: 10\n"
    "    tags_end: 20\n"
    "    operation: replace\n"
    "    ids_end: 90\n"
    "    ids_start: 80\n"
    "  gt_url: \"https://example.org/a: b\"\n"
    "\n"
    "other:\n"
    "  1:\n"
    "    end: 7\n"
    "    operation: delete\n"
    "    start: 3\n"
    "  max_pts: 7";

TEST(RunbookTest, PartsAreReadAsTheyAreWritten) {
  const auto first = ParseRunbook(kTwoParts, "two.yaml");
  ASSERT_TRUE(first) << first.error().message;
  EXPECT_EQ(first->part, "small-set");
  ASSERT_EQ(first->steps.size(), 3u);
  EXPECT_EQ(first->steps[0].operation, Operation::kInsert);
  EXPECT_EQ(first->steps[0].tags, (RunbookRange{0, 60}));
  EXPECT_EQ(first->steps[0].line, 5u);
  EXPECT_EQ(first->steps[1].operation, Operation::kSearch);
  EXPECT_EQ(first->steps[2].operation, Operation::kReplace);
  EXPECT_EQ(first->steps[2].tags, (RunbookRange{10, 20}));
  EXPECT_EQ(first->steps[2].ids, (RunbookRange{80, 90}));
  EXPECT_EQ(first->ids(), 90u) << "ids count, not tags alone";

  const auto other = ParseRunbook(kTwoParts, "two.yaml", "other");
  ASSERT_TRUE(other) << other.error().message;
  ASSERT_EQ(other->steps.size(), 1u);
  EXPECT_EQ(other->steps[0].operation, Operation::kDelete);
  EXPECT_EQ(other->steps[0].tags, (RunbookRange{3, 7}));
}

TEST(RunbookTest, WhatIsWrongIsNamedByFileAndLine) {
  const std::string step = "p:\n  1:\n    operation: insert\n    start: 0\n    end: 9\n";
  const struct {
    std::string text;
    const char* message;
  } wrong[] = {
      {"", "f.yaml: has no part"},
      {"p:\n  max_pts: 3\n", "f.yaml: \"p\" has no steps"},
      {"p: 3\n" + step, "f.yaml:1: the name of a part has no value"},
      {"p:\n  max_pts: many\n", "f.yaml:2: max_pts is a number"},
      {"  1:\n", "f.yaml:1: stands before"},
      {"p:\n    start: 3\n", "f.yaml:2: stands outside a step"},
      {"p:\n  max_points: 3\n", "f.yaml:2: \"max_points\" where step 1"},
      {"p:\n  2:\n", "f.yaml:2: \"2\" where step 1"},
      {step + "  3:\n", "f.yaml:6: \"3\" where step 2"},
      {step + "  1:\n", "f.yaml:6: \"1\" where step 2"},
      {step + "    end: 9\n", "f.yaml:6: \"end\" comes twice"},
      {step + "    stop: 9\n", "f.yaml:6: \"stop\" is no field"},
      {step + "   end: 9\n", "f.yaml:6: is indented by 3"},
      {step + "\tend: 9\n", "f.yaml:6: has a tab"},
      {step + "    end 9\n", "f.yaml:6: \"end 9\" is no"},
      {step + "    ids_start:9\n", "f.yaml:6: a blank belongs"},
      {step + "    ids_start: -9\n", "f.yaml:6: ids_start is a number"},
      {step + "    ids_start: 4294967297\n", "f.yaml:6: ids_start is a number"},
      {step + "    ids_start: 9 10\n", "f.yaml:6: ids_start is a number"},
      {step + "    ids_start: \"9\n", "f.yaml:6: a quoted value"},
      {step + "    ids_start: 9\n", "f.yaml:2: the step may not have ids_start and ids_end"},
      {step + "    operation: insert\n", "f.yaml:6: a second operation"},
      {step + "  2:\n    operation: update\n", "f.yaml:7: operation \"update\" is none of"},
      {step + "  2:\n", "f.yaml:6: the step has no operation"},
      {step + "  2:\n    operation: delete\n    start: 3\n", "f.yaml:6: the step lacks start"},
      {step + "  2:\n    operation: delete\n    start: 3\n    end: 3\n", "f.yaml:6: empty range"},
      {step + "  2:\n    operation: search\n    start: 3\n    end: 4\n",
       "f.yaml:6: the step may not have start"},
      {step + "  2:\n    operation: replace\n    tags_start: 0\n    tags_end: 2\n    ids_start: 5\n"
              "    ids_end: 8\n",
       "f.yaml:6: as many tags as ids"},
      {step + step, "f.yaml:6: \"p\" comes twice"},
  };
  for (const auto& [text, message] : wrong) {
    const auto parsed = ParseRunbook(text, "f.yaml", "p");
    ASSERT_FALSE(parsed) << text;
    EXPECT_EQ(parsed.error().message.substr(0, std::string(message).size()), message) << text;
  }
  EXPECT_FALSE(ParseRunbook(step, "f.yaml", "q"));
  EXPECT_EQ(LoadRunbook("/nowhere/f.yaml").error().code, ErrorCode::kNotFound);
}

// Faults in a part that is not read are told as well: the file is not what it should be.
TEST(RunbookTest, OtherPartsMustBeSoundToo) {
  const std::string text = std::string(kTwoParts) + "\n  2:\n    operation: none\n";
  EXPECT_EQ(ParseRunbook(text, "f.yaml").error().message.substr(0, 10), "f.yaml:26:");
}

Runbook WithSteps(std::vector<RunbookStep> steps) {
  return {.file = "f.yaml", .part = "p", .steps = std::move(steps)};
}

TEST(RunbookTest, ScaledRangesTouchLieWithinAndApartAsBefore) {
  const Runbook runbook = WithSteps({{Operation::kInsert, {0, 333}, {}, 1},
                                     {Operation::kInsert, {333, 1'000}, {}, 2},
                                     {Operation::kDelete, {100, 333}, {}, 3},
                                     {Operation::kSearch, {}, {}, 4}});
  for (const uint64_t count : {1u, 7u, 99u, 101u, 640u, 999u}) {
    const Runbook scaled = ScaledTo(runbook, count);
    EXPECT_EQ(scaled.ids(), count);
    EXPECT_EQ(scaled.steps[0].tags.first, 0u);
    EXPECT_EQ(scaled.steps[0].tags.end, scaled.steps[1].tags.first);
    EXPECT_EQ(scaled.steps[2].tags.end, scaled.steps[0].tags.end);
    EXPECT_LE(scaled.steps[2].tags.first, scaled.steps[2].tags.end);
    EXPECT_EQ(scaled.steps.size(), 4u);
  }
  EXPECT_EQ(ScaledTo(runbook, 100).steps[0].tags, (RunbookRange{0, 33}));
}

TEST(RunbookTest, ScaledReplacesHaveAsManyTagsAsIds) {
  Runbook runbook = WithSteps({{Operation::kInsert, {0, 500}, {}, 1},
                               {Operation::kReplace, {5, 105}, {899, 999}, 2},
                               {Operation::kReplace, {10, 13}, {500, 503}, 3}});
  for (uint64_t count = 1; count < 999; ++count) {
    const Runbook scaled = ScaledTo(runbook, count);
    for (const RunbookStep& step : scaled.steps) {
      if (step.operation != Operation::kReplace) continue;
      EXPECT_EQ(step.tags.size(), step.ids.size());
      EXPECT_LE(step.tags.end, scaled.steps[0].tags.end) << "what is replaced was inserted";
      EXPECT_LE(step.ids.end, count);
    }
  }
}

TEST(RunbookTest, SmallRunbooksAreStretched) {
  const Runbook runbook =
      WithSteps({{Operation::kInsert, {0, 250}, {}, 1}, {Operation::kInsert, {250, 500}, {}, 2}});
  EXPECT_EQ(ScaledTo(runbook, 500).steps[1].tags, (RunbookRange{250, 500}));
  const Runbook scaled = ScaledTo(runbook, 5'001);
  EXPECT_EQ(scaled.steps[0].tags, (RunbookRange{0, 2'500}));
  EXPECT_EQ(scaled.steps[1].tags, (RunbookRange{2'500, 5'001}));
}

TEST(RunbookTest, RangesUpToTheBoundAreScaledWithoutOverflow) {
  const uint64_t most = uint64_t{1} << 32;
  const Runbook runbook = WithSteps({{Operation::kInsert, {most / 2, most}, {}, 1}});
  EXPECT_EQ(ScaledTo(runbook, most - 1).steps[0].tags, (RunbookRange{most / 2 - 1, most - 1}));
}

}  // namespace
}  // namespace engram
