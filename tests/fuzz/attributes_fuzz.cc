// Attributes of observations and filters of recalls.
//
// 1. The input chooses one of the two, and whether it is the bytes themselves or a program that
//    writes them, with lengths at the edge of what is allowed.
// 2. The check, in memory of exactly the size, and a second one written from the grammar
//    (attributes_model.h) must agree, and so must what is read.
// 3. What is sound is written again and must be the same bytes.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/attributes.h"
#include "src/core/check.h"
#include "tests/core/attributes_model.h"
#include "tests/fuzz/fuzz_program.h"

namespace engram {
namespace {

constexpr size_t kAtMost = 4'352;  // beyond what is allowed

void TakeAttributes(const std::string& bytes) {
  const Exact exact(bytes);
  const auto model = ParseModelAttributes(bytes);
  CHECK((CheckAttributes(exact.get()) == RefusalReason::kNone) == model.has_value(),
        "the grammar says what is sound");
  if (!model) return;
  CHECK(ReadAttributes(exact.get()) == *model, "what is read is what was written");
  std::string again;
  for (const auto& [key, value] : *model) {
    CHECK(AppendAttribute(key, value, &again), "what was sound can be written");
  }
  CHECK(again == bytes, "it is written as it was read");
}

void TakeFilter(const std::string& bytes) {
  const Exact exact(bytes);
  const auto model = ParseModelFilter(bytes);
  CHECK((CheckFilter(exact.get()) == RefusalReason::kNone) == model.has_value(),
        "the grammar says what is sound");
  if (!model) return;
  CHECK(ReadFilter(exact.get()) == *model, "what is read is what was written");
  FilterWriter writer;
  writer.SetTimes({.begin_ns = model->begin_ns, .end_ns = model->end_ns});
  for (const ModelClause& clause : model->clauses) {
    const std::vector<std::string_view> values(clause.values.begin(), clause.values.end());
    CHECK(clause.excludes ? writer.Exclude(clause.key, values) : writer.Require(clause.key, values),
          "what was sound can be written");
  }
  if (writer.empty()) return;
  CHECK(writer.Bytes() == WriteModelFilter(*model), "it is written as it was read");
}

std::string AnyText(FuzzProgram* program) {
  constexpr std::array<uint8_t, 8> kLengths{0, 1, 2, 63, 64, 65, 254, 255};
  const uint8_t choice = program->Byte();
  const size_t bytes = choice < 128 ? kLengths[choice % kLengths.size()] : choice % 16;
  return std::string(bytes, static_cast<char>('a' + choice % 26));
}

std::string WrittenAttributes(FuzzProgram* program) {
  std::string bytes;
  while (!program->empty() && bytes.size() < kAtMost) {
    const std::string key = AnyText(program);
    bytes += WriteModelAttribute(key, AnyText(program));
  }
  return bytes;
}

std::string WrittenFilter(FuzzProgram* program) {
  ModelFilter filter{.begin_ns = program->Number(), .end_ns = program->Number()};
  size_t bytes = 0;
  while (!program->empty() && bytes < kAtMost) {
    ModelClause clause{.excludes = (program->Byte() & 1) != 0, .key = AnyText(program)};
    for (uint8_t n = program->Byte() % 72; n > 0 && bytes < kAtMost; --n) {
      clause.values.push_back(AnyText(program));
      bytes += clause.values.back().size();
    }
    bytes += 5 + clause.key.size();
    filter.clauses.push_back(std::move(clause));
  }
  return WriteModelFilter(filter);
}

void Run(std::span<const uint8_t> input) {
  FuzzProgram program(input);
  const uint8_t choice = program.Byte();
  const bool is_filter = (choice & 1) != 0;
  std::string bytes;
  if ((choice & 2) != 0) {
    bytes = is_filter ? WrittenFilter(&program) : WrittenAttributes(&program);
  } else {
    const std::vector<std::byte> raw = program.Bytes(kAtMost);
    bytes.assign(reinterpret_cast<const char*>(raw.data()), raw.size());
  }
  is_filter ? TakeFilter(bytes) : TakeAttributes(bytes);
}

}  // namespace
}  // namespace engram

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  engram::Run({data, size});
  return 0;
}
