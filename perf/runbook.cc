#include "perf/runbook.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <iterator>
#include <limits>
#include <optional>
#include <utility>

namespace engram {

namespace {

using Operation = RunbookStep::Operation;

constexpr std::pair<std::string_view, Operation> kOperations[] = {{"insert", Operation::kInsert},
                                                                  {"search", Operation::kSearch},
                                                                  {"delete", Operation::kDelete},
                                                                  {"replace", Operation::kReplace}};
// Ends of ranges: beyond any set, and products with a count stay within 64 bits.
constexpr uint64_t kMostIds = uint64_t{1} << 32;
constexpr size_t kStepDepth = 2;
constexpr size_t kFieldDepth = 4;

std::optional<uint64_t> NumberIn(std::string_view text) {
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

// One line: `depth` blanks, a key, a colon and, but for headings, a value.
struct Line {
  uint32_t number = 0;
  size_t depth = 0;
  std::string_view key;
  std::string_view value;
};

class Parser {
 public:
  Parser(std::string_view text, const std::string& file, std::string_view part)
      : rest_(text), part_(part) {
    runbook_.file = file;
  }

  Result<Runbook> Run() {
    for (auto line = NextLine(); !line || line->number != 0; line = NextLine()) {
      if (!line) return std::unexpected(line.error());
      if (auto taken = Take(*line); !taken) return std::unexpected(taken.error());
    }
    if (auto closed = CloseStep(); !closed) return std::unexpected(closed.error());
    if (!found_) {
      return Fail(ErrorCode::kInvalidArgument,
                  runbook_.file + ": has no part " +
                      (part_.empty() ? "at all" : "\"" + std::string(part_) + "\""));
    }
    if (runbook_.steps.empty()) {
      return Fail(ErrorCode::kInvalidArgument,
                  runbook_.file + ": \"" + runbook_.part + "\" has no steps");
    }
    return std::move(runbook_);
  }

 private:
  // What a step's fields said so far.
  struct Fields {
    std::optional<Operation> operation;
    std::optional<uint64_t> start, end, tags_start, tags_end, ids_start, ids_end;
  };

  std::unexpected<Error> Bad(uint32_t line, const std::string& what) const {
    return Fail(ErrorCode::kInvalidArgument,
                runbook_.file + ":" + std::to_string(line) + ": " + what);
  }

  // The next line that says anything; number 0 at the end.
  Result<Line> NextLine() {
    while (!rest_.empty()) {
      const size_t end = std::min(rest_.find('\n'), rest_.size());
      std::string_view text = rest_.substr(0, end);
      rest_.remove_prefix(std::min(end + 1, rest_.size()));
      ++number_;
      if (text.find('\t') != std::string_view::npos) return Bad(number_, "has a tab");
      text = text.substr(0, text.find_last_not_of(" \r") + 1);
      const size_t depth = text.find_first_not_of(' ');
      if (depth == std::string_view::npos || text[depth] == '#') continue;
      return LineOf(text, depth);
    }
    return Line{};
  }

  Result<Line> LineOf(std::string_view text, size_t depth) const {
    const size_t colon = text.find(':', depth);
    if (colon == std::string_view::npos || colon == depth) {
      return Bad(number_, "\"" + std::string(text.substr(depth)) + "\" is no \"key: value\"");
    }
    Line line{.number = number_,
              .depth = depth,
              .key = text.substr(depth, colon - depth),
              .value = text.substr(colon + 1)};
    const size_t begin = line.value.find_first_not_of(' ');
    if (begin == std::string_view::npos) {
      line.value = {};
      return line;
    }
    if (begin == 0) return Bad(number_, "a blank belongs behind the colon");
    line.value.remove_prefix(begin);
    const char quote = line.value.front();
    if (quote == '"' || quote == '\'') {
      if (line.value.size() < 2 || line.value.back() != quote) {
        return Bad(number_, "a quoted value does not end");
      }
      line.value = line.value.substr(1, line.value.size() - 2);
    }
    return line;
  }

  Result<void> Take(const Line& line) {
    if (line.depth == 0) return TakePart(line);
    if (part_line_ == 0) return Bad(line.number, "stands before the name of a part");
    if (line.depth == kStepDepth) return TakeHeading(line);
    if (line.depth == kFieldDepth) return TakeField(line);
    return Bad(line.number, "is indented by " + std::to_string(line.depth) +
                                " blanks; parts are by 0, steps by 2, fields by 4");
  }

  Result<void> TakePart(const Line& line) {
    if (auto closed = CloseStep(); !closed) return closed;
    if (!line.value.empty()) return Bad(line.number, "the name of a part has no value");
    part_line_ = line.number;
    steps_ = 0;
    wanted_ = part_.empty() ? !found_ : line.key == part_;
    if (!wanted_) return {};
    if (found_) return Bad(line.number, "\"" + std::string(line.key) + "\" comes twice");
    found_ = true;
    runbook_.part = line.key;
    return {};
  }

  Result<void> TakeHeading(const Line& line) {
    if (auto closed = CloseStep(); !closed) return closed;
    if (line.key == "max_pts") {
      if (!NumberIn(line.value)) return Bad(line.number, "max_pts is a number");
      return {};
    }
    if (line.key == "gt_url") return {};
    if (NumberIn(line.key) != steps_ + 1 || !line.value.empty()) {
      return Bad(line.number, "\"" + std::string(line.key) + "\" where step " +
                                  std::to_string(steps_ + 1) + ", max_pts or gt_url may be");
    }
    ++steps_;
    step_line_ = line.number;
    return {};
  }

  Result<void> TakeField(const Line& line) {
    if (step_line_ == 0) return Bad(line.number, "stands outside a step");
    if (line.key == "operation") {
      const auto* named = std::ranges::find(kOperations, line.value,
                                            &std::pair<std::string_view, Operation>::first);
      if (fields_.operation) return Bad(line.number, "a second operation in one step");
      if (named == std::end(kOperations)) {
        return Bad(line.number, "operation \"" + std::string(line.value) +
                                    "\" is none of insert, search, delete, replace");
      }
      fields_.operation = named->second;
      return {};
    }
    std::optional<uint64_t>* const field = FieldOf(line.key);
    if (field == nullptr) {
      return Bad(line.number, "\"" + std::string(line.key) + "\" is no field of a step");
    }
    if (*field) return Bad(line.number, "\"" + std::string(line.key) + "\" comes twice");
    *field = NumberIn(line.value);
    if (!*field || **field > kMostIds) {
      return Bad(line.number, std::string(line.key) + " is a number up to 2^32");
    }
    return {};
  }

  std::optional<uint64_t>* FieldOf(std::string_view key) {
    if (key == "start") return &fields_.start;
    if (key == "end") return &fields_.end;
    if (key == "tags_start") return &fields_.tags_start;
    if (key == "tags_end") return &fields_.tags_end;
    if (key == "ids_start") return &fields_.ids_start;
    if (key == "ids_end") return &fields_.ids_end;
    return nullptr;
  }

  // Ends the step under way, if there is one.
  Result<void> CloseStep() {
    const uint32_t line = std::exchange(step_line_, 0);
    if (line == 0) return {};
    const Fields fields = std::exchange(fields_, {});
    if (!fields.operation) return Bad(line, "the step has no operation");
    RunbookStep step{.operation = *fields.operation, .tags = {}, .ids = {}, .line = line};
    const bool is_replace = step.operation == Operation::kReplace;
    const bool is_search = step.operation == Operation::kSearch;
    const auto range = [&](const std::optional<uint64_t>& start, const std::optional<uint64_t>& end,
                           bool wanted, const char* names, RunbookRange* out) -> Result<void> {
      if (start.has_value() != wanted || end.has_value() != wanted) {
        return Bad(line, std::string("the step ") + (wanted ? "lacks " : "may not have ") + names);
      }
      if (!wanted) return {};
      if (*start >= *end) return Bad(line, std::string("empty range in ") + names);
      *out = {*start, *end};
      return {};
    };
    if (auto sound =
            range(fields.start, fields.end, !is_replace && !is_search, "start and end", &step.tags);
        !sound) {
      return sound;
    }
    if (auto sound = range(fields.tags_start, fields.tags_end, is_replace,
                           "tags_start and tags_end", &step.tags);
        !sound) {
      return sound;
    }
    if (auto sound =
            range(fields.ids_start, fields.ids_end, is_replace, "ids_start and ids_end", &step.ids);
        !sound) {
      return sound;
    }
    if (is_replace && step.tags.size() != step.ids.size()) {
      return Bad(line, "as many tags as ids are replaced");
    }
    if (wanted_) runbook_.steps.push_back(step);
    return {};
  }

  std::string_view rest_;
  const std::string_view part_;
  Runbook runbook_;
  uint32_t number_ = 0;     // of the last line that was read
  uint32_t part_line_ = 0;  // of the part that it is in; 0: none yet
  bool wanted_ = false;     // that one is read
  bool found_ = false;
  uint64_t steps_ = 0;      // of that part
  uint32_t step_line_ = 0;  // of the step under way; 0: none
  Fields fields_;
};

}  // namespace

uint64_t Runbook::ids() const {
  uint64_t most = 0;
  for (const RunbookStep& step : steps) most = std::max({most, step.tags.end, step.ids.end});
  return most;
}

Result<Runbook> ParseRunbook(std::string_view text, const std::string& file,
                             std::string_view part) {
  return Parser(text, file, part).Run();
}

Result<Runbook> LoadRunbook(const std::string& path, std::string_view part) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return Fail(ErrorCode::kNotFound, path + ": cannot be read");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  return ParseRunbook(text, path, part);
}

Runbook ScaledTo(const Runbook& runbook, uint64_t count) {
  Runbook scaled = runbook;
  const uint64_t ids = runbook.ids();
  const auto scale = [&](RunbookRange* range) {
    range->first = range->first * count / ids;
    range->end = range->end * count / ids;
  };
  for (RunbookStep& step : scaled.steps) {
    scale(&step.tags);
    scale(&step.ids);
    if (step.operation != RunbookStep::Operation::kReplace) continue;
    const uint64_t size = std::min(step.tags.size(), step.ids.size());
    step.tags.end = step.tags.first + size;
    step.ids.end = step.ids.first + size;
  }
  return scaled;
}

}  // namespace engram
